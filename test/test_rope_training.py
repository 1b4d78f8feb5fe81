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
    commit = rope_training.first_line("git", "rev-parse", "--short", "HEAD")
    rows = (out / "table.md").read_text().strip().split("\n")
    assert len(rows) == 6 and rows[2].startswith("| full | bf16 | 2 |") and "+-" in rows[3]
    assert {x["commit"] for x in lines} == {commit} and {x["device"] for x in lines} == {"CPU"}
    seconds = {(x["task"], x["mode"], x["dtype"], x["seed"]): float(x["seconds"]) for x in lines}
    assert rows[5] == f"8 runs, {f'commit {commit}, ' if commit else ''}on CPU, {sum(seconds.values()):.0f} s." + (
        "" if commit else "; of 8 the commit is not recorded.")
    # A file from before these columns goes on: what is there stays, what is not is said.
    kept = [x for x in lines if x["seed"] == "1"]
    with open(out / "scores.csv", "w") as file:
        writer = csv.DictWriter(file, [k for k in lines[0] if k not in rope_training.MADE], extrasaction="ignore")
        writer.writeheader()
        writer.writerows(kept)
    assert "of 4 the commit is not recorded" in run(out, *small) or not commit
    again = list(csv.DictReader(open(out / "scores.csv")))
    assert {x["commit"] for x in again} == {"", commit}
    values = [{tuple(x[k] for k in (*rope_training.RUN, "times", "from")): x["value"] for x in some} for some in (lines, again)]
    assert values[0] == values[1] and len(lines) == len(again)
    pytest.importorskip("matplotlib")
    image = (out / "training.png").read_bytes()
    assert image[:4] == b"\x89PNG" and int.from_bytes(image[16:20], "big") == 6.5 * 220  # a page's text, in print


def write_scores(folder, runs, length=64):
    """scores.csv of runs (mode, dtype, seed, value) on recall."""
    folder.mkdir()
    with open(folder / "scores.csv", "w") as file:
        writer = csv.DictWriter(file, rope_training.COLUMNS)
        writer.writeheader()
        for mode, dtype, seed, value in runs:
            writer.writerows({"task": "recall", "mode": mode, "dtype": dtype, "seed": seed, "times": t, "length": t * length,
                              "from": 0, "measure": "recall", "value": value / t, "commit": "abc1234",
                              "device": "GPU of a kind", "seconds": 1.5} for t in (1, 2, 4))


def test_folders_are_merged(tmp_path):
    a, b, out = tmp_path / "a", tmp_path / "b", tmp_path / "out"
    write_scores(a, [("full", "bf16", 1, 0.2), ("full", "bf16", 2, 0.4)])
    write_scores(b, [("anchor", "float", 1, 0.8), ("full", "bf16", 3, 0.6)])
    before = (a / "scores.csv").read_bytes()
    shown = run(out, "--merge", a, b, TRAIN_LLAMA="nowhere")  # nothing is trained, so nothing that trains is needed
    rows = (out / "table.md").read_text().split("\n")
    assert [x.split(" | ")[:3] for x in rows[2:4]] == [["| full", "bf16", "3"], ["| anchor", "float", "1"]]
    assert " 0.400 +- 0.115 | 0.200 +- 0.058 | 0.100 +- 0.029 |" in rows[2]
    assert rows[5] == "4 runs, commit abc1234, on GPU of a kind, 6 s." and rows[5] in shown
    assert (a / "scores.csv").read_bytes() == before and not (out / "scores.csv").exists()
    write_scores(tmp_path / "alone", [("full", "bf16", 9, 0.4)])
    run(out, "--merge", tmp_path / "alone")
    assert (out / "table.md").read_text().split("\n")[2] == "| full | bf16 | 1 | 0.400 | 0.200 | 0.100 |"  # no error, no books
    write_scores(tmp_path / "twice", [("full", "bf16", 2, 0.4)])
    assert "full bf16 2 is in" in run(out, "--merge", a, tmp_path / "twice", ok=False)
    write_scores(tmp_path / "long", [("full", "bf16", 9, 0.4)], length=512)
    assert "another --scale" in run(out, "--merge", a, tmp_path / "long", ok=False)
    assert "no " in run(out, "--merge", a, tmp_path / "missing", ok=False)


def test_the_figure_is_readable_in_print(tmp_path, monkeypatch):
    """Markers tell the runs apart where there are no colours; losses lie in bands of their errors, bars of recall stand
    side by side; letters as in test_rope's."""
    plt = pytest.importorskip("matplotlib.pyplot")
    figures = []
    monkeypatch.setattr(plt, "close", figures.append)
    write_scores(tmp_path / "a", [(*run, seed, 0.1 * i + 0.01 * seed) for i, run in enumerate(rope_training.RUNS) for seed in (1, 2)])
    recall = rope_training.read_scores(tmp_path / "a/scores.csv")
    books = [{**x, "task": "books", "from": k * x["length"] // 8} for x in recall for k in range(8)]
    for lines, panels in (recall + books, 3), (books, 2), (recall, 1):
        rope_training.draw(lines, tmp_path / "figure.png")
        figure = figures.pop()
        assert figure.get_figwidth() <= 6.5 and len(figure.axes) == panels
        figure.draw_without_rendering()
        sizes = {text.get_fontsize() for text in figure.findobj(plt.Text) if text.get_text()}
        assert min(sizes) >= 7
        for axes in figure.axes:
            by_length = axes.get_ylabel() == "recall"
            curves = [x.lines[0] for x in axes.containers] if by_length else axes.lines[:7]
            looks = [(x.get_color(), x.get_marker()) for x in curves]
            assert looks == list(rope_training.STYLES.values()) and all(len(set(part)) == 7 for part in zip(*looks))
            assert len({round(float(x.get_xdata()[0]), 6) for x in curves}) == (7 if by_length else 1)
        if panels > 1:  # at 4x means are 0.1 i + 0.015, a quarter of it, of two seeds 0.01 apart
            for axes, less in zip(figure.axes, (0, 0.015)):
                assert np.allclose([x.get_ydata() for x in axes.lines[:7]], [[(0.1 * i + 0.015 - less) / 4] * 8 for i in range(7)])
                assert axes.lines[0].get_xdata().tolist() == [16 + 32 * k for k in range(8)]
                assert axes.lines[7].get_xdata()[0] == 64 and len(axes.collections) == 7
                band = axes.collections[3].get_paths()[0].vertices[:, 1]
                assert np.allclose([band.min(), band.max()], (0.3 + 0.015 - less + np.array([-0.005, 0.005])) / 4)
            assert figure.axes[1].get_ylabel() == "loss minus that of full, bf16"
        names = [x.get_text() for x in figure.legends[0].get_texts()]
        assert names == [", ".join(run) for run in rope_training.RUNS]


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


@pytest.mark.skipif(os.environ.get("TRAIN_DEVICE") != "gpu", reason="of the GPU's tests")
@pytest.mark.parametrize("mode", ["full", "anchor"])
def test_the_control_trains_on_a_gpu_as_on_the_cpu(tmp_path, mode):
    losses = {}
    for device in ("cpu", "gpu"):
        done = subprocess.run(
            [rope_training.CONTROL, "-e", "tiny", "--layers", "2", "--channels", "128", "--heads", "2", "--vocab", "256",
             "-c", "300", "-b", "2", "--generator_mean", "80", "--dtype", "bf16", "-l", "5e-4", "--steps", "10",
             "--seed", "1",
             "--attention", mode, "--device", device, "-o", tmp_path / device], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        lines = [json.loads(line) for line in open(tmp_path / device / "log.jsonl")]
        losses[device] = np.array([line["loss"] for line in lines if line["event"] == "step"])
    assert len(losses["gpu"]) == 10 and losses["cpu"][-1] < losses["cpu"][0] - 0.3
    assert np.abs(losses["gpu"] - losses["cpu"]).max() < 1e-3  # bf16 attention is 1e-4 off
