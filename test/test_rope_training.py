"""The training study at its tiny scale: its files, its arithmetic, that it goes on where it stopped, what it refuses."""

import csv
import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts"))
sys.path.insert(0, str(ROOT / "data"))
import rope_training  # noqa: E402
from token_file import read_shard  # noqa: E402


def run(*args, ok=True, **env):
    done = subprocess.run([sys.executable, str(ROOT / "scripts/rope_training.py"), *map(str, args)], capture_output=True,
                          text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1", **env})
    assert (done.returncode == 0) == ok, done.stdout + done.stderr
    return done.stdout + done.stderr


def lines_of(values):
    """{seed: [values]} as the lines of one task, mode and length."""
    return [{"seed": seed, "value": value} for seed, some in values.items() for value in some]


def test_errors_are_those_over_seeds():
    mean, error = rope_training.mean_and_error(lines_of({1: [1, 3], 2: [5], 3: [8]}))
    assert mean == 5 and np.isclose(error, np.std([2, 5, 8], ddof=1) / np.sqrt(3))
    assert np.isnan(rope_training.mean_and_error(lines_of({1: [1]}))[1])


def test_loss_by_position(tmp_path):
    with open(tmp_path / "scores.csv", "w") as file:
        file.write("row,index,doc,label,correct,loss\n")
        file.writelines(f"{row},{i},1,5,0,{i // 2 + row}\n" for row in (0, 2) for i in range(16))
    assert rope_training.by_position(tmp_path / "scores.csv", 16).tolist() == [i + 1 for i in range(8)]


def test_books_are_cut_without_loss_and_two_are_held_out(tmp_path):
    texts = ["".join(chr(97 + (i * 7 + b) % 26) for i in range(5000)) for b in range(4)]
    (tmp_path / "books.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    rope_training.cut(tmp_path / "books.jsonl", tmp_path, context=64)
    train, val = ([json.loads(x)["text"] for x in open(tmp_path / f"{n}.jsonl")] for n in ("train", "val"))
    assert val == texts[2:]
    assert sorted("".join(train)) == sorted(texts[0] + texts[1]) and len(train) > 10
    assert all(any(piece in text for text in texts[:2]) for piece in train)
    assert 4 * 64 / 8 <= np.median([len(x) for x in train]) <= 4 * 64 * 4
    (tmp_path / "few.jsonl").write_text(json.dumps({"text": "a"}) + "\n")
    with pytest.raises(SystemExit, match="2 books|1 books"):
        rope_training.cut(tmp_path / "few.jsonl", tmp_path, context=64)


def test_a_tiny_study_goes_on_where_it_stopped(tmp_path):
    out = tmp_path / "study"
    with open(tmp_path / "books.jsonl", "w") as file:
        for book in range(3):
            file.write(json.dumps({"text": "".join(f"{i * i % 997} and {i} of {book}; " for i in range(2000))}) + "\n")
    small = ["--scale", "tiny", "--seeds", "2", "--device", "cpu", "--runs", "full:bf16", "anchor:attention_float"]
    run(out, *small, "--books", tmp_path / "books.jsonl", "--data_only")
    (out / "data" / "done").unlink()  # as if it had been stopped while it made the files
    run(out, *small, "--books", tmp_path / "books.jsonl", "--data_only")
    assert "was begun with --scale tiny" in run(out, "--data_only", ok=False)
    stopped = tmp_path / "trainer"
    stopped.write_text("#!/bin/sh\n")  # leaves without a word, as on SIGTERM
    stopped.chmod(0o755)
    assert "was stopped before step 8" in run(out, *small, ok=False, TRAIN_LLAMA=str(stopped))
    assert len(read_shard(next((out / "data").glob("books_train_0*.bin")))["tokens"]) > 10000
    assert "8 runs are left" in run(out, *small, "--limit", "0")
    assert "recall, " not in run(out, *small, "--tasks", "books").split("| attention")[0]
    assert "books, " not in run(out, *small).split("| attention")[0]
    lines = list(csv.DictReader(open(out / "scores.csv")))
    assert len(lines) == 2 * 2 * (3 * 8 + 3)
    assert {(x["task"], x["mode"], x["dtype"], x["seed"]) for x in lines} == {
        (t, m, d, s) for t in ("books", "recall") for m, d in (("full", "bf16"), ("anchor", "attention_float")) for s in ("1", "2")}
    losses = [float(x["value"]) for x in lines if x["measure"] == "loss"]
    assert all(3 < loss < 7 for loss in losses)  # some bytes learnt, no more: ln 257 = 5.5
    assert all(0 <= float(x["value"]) <= 1 for x in lines if x["measure"] == "recall")
    rows = (out / "table.md").read_text().strip().split("\n")
    assert len(rows) == 4 and rows[2].startswith("| full | bf16 | 2 |") and "+-" in rows[3]
    pytest.importorskip("matplotlib")
    image = (out / "training.png").read_bytes()
    assert image[:4] == b"\x89PNG" and int.from_bytes(image[16:20], "big") == 6.5 * 220  # a page's text, in print


def train(program, out, dtype):
    """Losses and gradient norms of 8 updates."""
    subprocess.run([program, "--device", "cpu", "-e", "tiny", "-c", "96", "-b", "2", "--steps", "8", "-l", "1e-2", "-o", out,
                    "--dtype", dtype], check=True, capture_output=True, timeout=300, cwd=ROOT)
    lines = [json.loads(line) for line in open(out / "log.jsonl")]
    return np.array([[x["loss"], x["norm"]] for x in lines if "norm" in x])


def test_the_control_differs_in_the_attention_alone(tmp_path):
    def runs(dtype):
        return [train(program, tmp_path / f"{i}_{dtype}", dtype)
                for i, program in enumerate((rope_training.TRAINER, rope_training.CONTROL))]

    trainer, control = runs("float")
    assert len(trainer) == 8 and (trainer == control).all()
    trainer, control = runs("bf16")
    # Both round all else, so the first losses agree to bf16's 2^-9 and norms to a few of those; then roundings part them.
    assert (trainer != control).any() and np.allclose(trainer[0], control[0], rtol=2**-7)
    assert np.allclose(trainer[:, 0], control[:, 0], rtol=0.01)


def test_bad_arguments_are_refused(tmp_path):
    assert "--runs" in run(tmp_path, "--runs", "full:half", ok=False)
    assert "--seeds" in run(tmp_path, "--seeds", "0", ok=False)
    assert "missing.jsonl" in run(tmp_path, "--books", "missing.jsonl", "--tokenizer", "x", ok=False)
