"""The program as a user runs it: options, training, checkpoints, ranks, evaluation."""

import hashlib
import json
import os
import pathlib
import re
import shutil
import signal
import struct
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
BINARY = os.environ.get("TRAIN_LLAMA", str(ROOT / "train_llama"))
# TRAIN_DEVICE=gpu runs the same tests on a GPU, where repeated bits must be asked for.
ON_GPU = os.environ.get("TRAIN_DEVICE", "cpu") == "gpu"
DEVICE = ["--device", "gpu", "--deterministic"] if ON_GPU else ["--device", "cpu"]
sys.path.insert(0, str(ROOT / "data"))
from token_file import write_tokens  # noqa: E402

MPIRUN = ["mpirun", "--oversubscribe", "--allow-run-as-root", "--bind-to", "none", "-np"]
HAS_MPI = shutil.which("mpirun") is not None and "(MPI)" in subprocess.run(
    [BINARY, "--device", "cpu", "-e", "tiny", "--steps", "1", "-c", "16"], capture_output=True, text=True).stdout
SMALL = ["-e", "tiny", "--layers", "1", "--channels", "32", "--heads", "2", "--ffn", "48", "-c", "64", "--generator_mean",
         "20", "--vocab", "64", "-l", "3e-3"]
# Heads of 64 and 128 and rows of several tiles, for which there are special kernels of attention.
HEADS_64 = ["--channels", "128", "-c", "300", "--generator_mean", "80", "--dtype", "bf16"]
HEADS_128 = ["--channels", "256", "--kv_heads", "1", "-c", "300", "--generator_mean", "80", "--dtype", "bf16"]
# The most ranks that a test may start: one a GPU, or with TRAIN_SHARE=1 up to four that share GPUs where there are
# fewer, and as many as it likes on the CPU.
GPUS = int(os.environ.get("TRAIN_GPUS", 1))
SHARE = os.environ.get("TRAIN_SHARE") == "1"
RANKS = (4 if not ON_GPU or SHARE else GPUS) if HAS_MPI else 1
needs_ranks = pytest.mark.skipif(RANKS < 2, reason="built without MPI, or fewer than two GPUs")
# Ranks that share one GPU take 5 to 10 s to start: what the CPU's ranks or gpu_model_ranks show is left to them.
many_gpus = pytest.mark.skipif(ON_GPU and GPUS < 2, reason="fewer than two GPUs")


def command(*args, ranks=1):
    sharing = ["-x", "TRAIN_LLAMA_SHARE_GPUS=1"] if ON_GPU and ranks > GPUS else []
    return ([*MPIRUN, str(ranks), *sharing] if ranks > 1 else []) + [BINARY, *DEVICE, *map(str, args)]


def run(*args, ranks=1, ok=True, cwd=None, threads=1):
    done = subprocess.run(command(*args, ranks=ranks), capture_output=True, text=True, cwd=cwd, timeout=120,
                          env={**os.environ, "OMP_NUM_THREADS": str(threads)})
    assert (done.returncode == 0) == ok, done.stdout + done.stderr
    return done.stdout if ok else done.stderr


def events(folder, kind="step"):
    """The lines of a log; of one that is being written, those that have their end."""
    lines = [json.loads(line) for line in open(folder / "log.jsonl") if line.endswith("\n")]
    return [line for line in lines if line["event"] == kind]


def rest_of(process, seconds=90):
    """What it prints until it ends. If that takes longer, it is killed, and its processes' states and signals are told."""
    told = []

    def end():
        children = pathlib.Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        for pid in (str(process.pid), *children):
            lines = pathlib.Path("/proc", pid, "status").read_text().splitlines()
            told.append(" ".join(line for line in lines if re.match("Name|State|Threads|ShdPnd|Sig", line)))
        for pid in (process.pid, *map(int, children)):
            os.kill(pid, signal.SIGKILL)

    timer = threading.Timer(seconds, end)
    timer.start()
    rest = process.stdout.read()
    timer.cancel()
    assert not told, f"no end within {seconds} s\n" + "\n".join(told) + rest[-500:]
    return rest


def digest(checkpoint):
    """What must be equal between two runs: every file that the manifest lists."""
    return {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in checkpoint.iterdir() if f.suffix == ".bin"}


def newest(folder):
    return max(folder.glob("step_????????"))


def test_the_bare_command_says_what_it_takes(tmp_path):
    out = run("--steps", 2, "-c", 32, cwd=tmp_path)
    assert f"a random model of size {'llama2-7b' if ON_GPU else 'tiny'}" in out and "made-up documents" in out and "step 2/2" in out


@pytest.mark.host_only
def test_every_option_refuses_a_bad_value_by_name():
    table = re.findall(r"^\| (?:`-.`, )?`--(\w+)` \| (.*?) \| ((?:\\\||[^|])*) \|", run("--options_table"), re.M)
    assert len(table) > 50
    tried = 0
    for name, _, span in table:
        if ".." in span:
            low, high = span.split("..")
            bad = ["4k", "", "nan", str(float(high) * 10 + 1), "-1" if float(low) >= 0 else "x"]
        elif "\\|" in span:
            bad = ["nonsense", span.replace("\\|", "|"), ""]
        elif span == "" and name in ("help", "plan", "resume", "tied", "shuffle", "interleave"):
            bad = ["2", "yes"]
        else:
            continue
        for value in bad:
            message = run(f"--{name}={value}", ok=False)
            assert f"--{name}" in message and len(message.strip().split("\n")) == 1, message
            tried += 1
    assert tried > 150
    assert "--nonsense" in run("--nonsense", "1", ok=False)
    assert "wants a value" in run("--context", ok=False)
    for name in ("model", "train_data", "out", "lr", "attention"):
        assert f"--{name} wants a value" in run(f"--{name}", "", "--steps", 1, ok=False)
    assert "recompute" in run("--recompute", "norm,nonsense", ok=False)


@pytest.mark.parametrize("args, message", [
    (["-e", "missing.bin"], "missing.bin"),
    (["-i", "missing_*.bin"], "missing_"),
    (["-c", "1"], "at least 2"),
    (["--total_batch", "65"], "not a multiple"),
    (["--channels", "33", "--heads", "2"], "multiple"),
    (["--heads", "3", "--channels", "33", "--kv_heads", "1"], "even"),
    (["--dtype", "double", "--opt_dtype", "float"], "double"),
    (["--rope_scaling", "longrope"], "longrope"),
    (["--prompt", "1,x", "--generate", "4"], "--prompt"),
    (["--generate", "100"], "--context"),
    (["--memory", "0.0001"], "GiB"),
    (["--device", "gpu", "--memory", "0.001"], "GPU" if not ON_GPU else "GiB are needed"),
    (["--rope_base", "0.5"], "rope base"),
    (["--rope_scaling", "linear", "--rope_factor", "0.5"], "factor"),
    (["-e", "llama3-8b", "--vocab", "8"], "bos or eos"),
    (["--resume"], "--out"),
    (["--save_every", "5"], "--out"),
    (["--dump_logits", "/nonexistent/x.f32"], "/nonexistent/x.f32"),
    (["--eval", "x.csv", "--generate", "4"], "a run each"),
    (["--ranks", "4"], "--plan"),
    (["--total_batch", "640000000000"], "--total_batch"),
    (["--rope_scaling", "linear"], "--rope_factor"),
    (["--rope_scaling", "none", "--rope_factor", "4"], "--rope_factor"),
    (["-e", "30m"], "llama2-7b"),
    (["-e", "."], "is a folder: name a weights file, as run/step_00000100/weights.bin"),
    (["--eval", "scores.csv"], "--val_data, else of --train_data"),
    (["--prompt", "1,2"], "--generate"),
])
def test_bad_input_ends_with_a_clear_line(args, message, tmp_path):
    if ON_GPU and not any(name in args for name in ("--memory", "double", "-i")):
        pytest.skip("the host's part")
    shown = run(*SMALL, *args, ok=False, cwd=tmp_path)
    assert message in shown, shown


def test_the_loss_falls_and_the_log_tells(tmp_path):
    run(*SMALL, "--steps", 60, "-o", tmp_path / "run", "--dtype", "float")
    steps = events(tmp_path / "run")
    assert [s["step"] for s in steps] == list(range(1, 61))
    assert steps[-1]["loss"] < steps[0]["loss"] - 0.5
    assert events(tmp_path / "run", "start")[0]["context"] == "64"
    for field in ("norm", "lr", "tokens_per_second", "memory_gib", "imbalance", "counted"):
        assert steps[0][field] > 0


@pytest.mark.parametrize("extra", [
    [], ["--dtype", "bf16", "--master", "none"], ["--dtype", "bf16", "--master", "float", "--grad_dtype", "float"],
    ["--interleave", "--schedule", "cosine", "--warmup", "4", "--total_batch", "256", "-b", "2"], HEADS_64, HEADS_128])
def test_resume_is_bit_exact(tmp_path, extra):
    args = [*SMALL, *extra, "--steps", 12, "--save_every", 5, "--keep", 0]
    run(*args, "-o", tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    for later in ("step_00000010", "step_00000012"):
        shutil.rmtree(tmp_path / "cut" / later)
    out = run(*args, "-o", tmp_path / "cut", "--resume")
    assert "going on from step 5" in out
    assert digest(tmp_path / "whole" / "step_00000012") == digest(tmp_path / "cut" / "step_00000012")


# Products of many blocks, with sums over 2048 tokens that more than one algorithm would split.
LARGER = [*HEADS_128, "--channels", 1024, "--heads", 8, "--ffn", 2816, "--layers", 2, "-c", 2048, "--vocab", 4096]


@pytest.mark.parametrize("extra", [[], HEADS_64, HEADS_128, [*HEADS_128, "--attention", "full"],
                                   pytest.param(LARGER, marks=pytest.mark.skipif(not ON_GPU, reason="minutes"))])
def test_a_run_repeats_bit_for_bit(tmp_path, extra):
    for name in "ab":
        run(*SMALL, *extra, "--steps", 6, "-o", tmp_path / name, threads=2)
    assert digest(newest(tmp_path / "a")) == digest(newest(tmp_path / "b"))


@needs_ranks
@pytest.mark.parametrize("backend", ["ring", "allgather", "ulysses"])
@pytest.mark.parametrize("ranks", [2, 4])
def test_a_run_on_ranks_repeats_bit_for_bit(tmp_path, ranks, backend):
    if ranks > RANKS or ON_GPU and (ranks == 4) != (backend == "ring"):
        pytest.skip("fewer ranks, or on a GPU: each backend once")
    for name in "ab":
        run(*SMALL, "--heads", 4, "--total_batch", 128, "--steps", 4, "--ring_backend", backend, "-o", tmp_path / name,
            ranks=ranks, threads=4 // ranks)
    assert digest(newest(tmp_path / "a")) == digest(newest(tmp_path / "b"))
    assert len(digest(newest(tmp_path / "a"))) == ranks + 2  # every rank's optimizer, weights, state


@pytest.mark.host_only
def test_a_new_run_does_not_overwrite_an_old_one(tmp_path):
    run(*SMALL, "--steps", 2, "-o", tmp_path / "run")
    assert "--resume" in run(*SMALL, "--steps", 2, "-o", tmp_path / "run", ok=False)


@pytest.mark.host_only
def test_resume_with_another_model_is_refused(tmp_path):
    run(*SMALL, "--steps", 2, "-o", tmp_path / "run")
    for option, value, named in (("--rope_base", 999, "RoPE base 10000 and 999 (--rope_base)"),
                                 ("-c", 1024, "context 512 and 1024 (--context)"),
                                 ("--layers", 2, "layers 1 and 2 (--layers)"), ("--vocab", 80, "vocabulary 64 and 80 (--vocab")):
        said = run(*SMALL, option, value, "-o", tmp_path / "run", "--resume", ok=False)
        assert f"differ in {named}" in said and "resume with the options" in said, said
    said = run(*SMALL, "--dtype", "bf16", "--opt_dtype", "float", "-o", tmp_path / "run", "--resume", ok=False)
    assert "has weights in float, this run in bf16: resume with --dtype float" in said
    run(*SMALL, "--dtype", "bf16", "--steps", 1, "-o", tmp_path / "half")  # with master weights, the first to be missed
    said = run(*SMALL, "--dtype", "float", "-o", tmp_path / "half", "--resume", ok=False)
    assert "holds a run in bf16 with master weights: pass --dtype bf16" in said


@pytest.mark.host_only
def test_a_run_goes_on_without_the_weights_it_began_with(tmp_path):
    run(*SMALL, "--steps", 1, "-o", tmp_path / "first")
    begun = tmp_path / "begun.bin"
    shutil.copy(newest(tmp_path / "first") / "weights.bin", begun)
    args = ["-e", begun, "-c", 64, "--generator_mean", 20, "-o", tmp_path / "run", "--resume"]
    run(*args, "--steps", 2)
    begun.unlink()
    out = run(*args, "--steps", 3)
    assert f"no {begun} here any more" in out and "going on from step 2" in out and "lr 2.00e-05" in out


@needs_ranks
@pytest.mark.host_only
def test_resume_on_another_number_of_ranks(tmp_path):
    args = [*SMALL, "-c", 72, "--total_batch", 288, "--save_every", 4, "--dtype", "float"]
    run(*args, "--steps", 16, "-o", tmp_path / "whole")
    for steps, ranks, zero in ((4, 4, 1), (8, 2, 2), (10, 4, 3), (12, 1, 1), (16, 4, 2)):
        ranks = min(ranks, RANKS)
        run(*args, "--steps", steps, "--ring", min(ranks, 2), "--zero", zero, "-o", tmp_path / "cut", "--resume",
            ranks=ranks)
    whole, cut = events(tmp_path / "whole"), events(tmp_path / "cut")
    for a, b in zip(whole, cut, strict=True):
        assert a["tokens"] == b["tokens"] and a["counted"] == b["counted"]
        assert abs(a["loss"] - b["loss"]) < 1e-3


# A ring of all ranks, first to last, at every level of ZeRO and by every backend.
ELASTIC = [
    ((4, 1, "ring"), (2, 2, "allgather"), (1, 3, "auto"), (4, 3, "ulysses")),
    ((4, 3, "allgather"), (2, 1, "ulysses"), (1, 1, "auto"), (4, 2, "ring")),
]


@needs_ranks
@pytest.mark.parametrize("parts, attention", [(ELASTIC[0], "anchor"), (ELASTIC[1], "full"),
                                              pytest.param(ELASTIC[0], "full", marks=many_gpus),
                                              pytest.param(ELASTIC[1], "anchor", marks=many_gpus)])
def test_a_ring_of_4_goes_on_with_2_1_and_4_ranks(tmp_path, parts, attention):
    """In double, several micro-batches an update: as one that nobody has interrupted. On a GPU as in
    test_ranks_train_alike, after a step by the bound of its later ones."""
    args = [*SMALL, "--heads", 4, "--attention", attention, "-c", 64, "--total_batch", 256, "--dtype",
            "float" if ON_GPU else "double"]
    for i, (ranks, zero, backend) in enumerate(parts):
        ranks = min(ranks, RANKS)
        out = run(*args, "--steps", 3 * (i + 1), "--ring", ranks, "--ring_backend", backend, "--zero", zero, "-o",
                  tmp_path / "cut", "--resume", ranks=ranks)
        assert i == 0 or f"going on from step {3 * i}" in out
        assert f"{ranks} rank" in out and f"rings of {ranks}" in out
    run(*args, "--steps", 12, "-o", tmp_path / "whole")
    for a, b in zip(events(tmp_path / "whole"), events(tmp_path / "cut"), strict=True):
        assert (a["step"], a["tokens"], a["counted"]) == (b["step"], b["tokens"], b["counted"])
        assert abs(a["loss"] - b["loss"]) < (1e-3 if ON_GPU else 1e-9 * a["loss"])


@needs_ranks
@pytest.mark.parametrize("extra", [
    pytest.param([], marks=many_gpus), pytest.param(["--tied"], marks=many_gpus),
    pytest.param(["--transport", "nccl"], marks=pytest.mark.skipif(not ON_GPU or GPUS < 2, reason="NCCL wants a GPU a rank")),
    ["--dtype", "bf16", "--master", "none", "--ring", 1],
    ["--dtype", "bf16", "--master", "float", "--recompute", "all"]])
def test_zero_levels_write_the_same_checkpoints(tmp_path, extra):
    """One micro-batch an update: the same sums in the same order, so the same bits, also when the level changes."""
    args, ranks = [*SMALL, "--layers", 3, *extra, "--save_every", 3, "--keep", 0], min(RANKS, 2 if SHARE else 3)
    for zero in (1, 2, 3):
        run(*args, "--steps", 9, "--zero", zero, "-o", tmp_path / str(zero), ranks=ranks)
        run(*args, "--steps", 3 * zero, "--zero", zero, "-o", tmp_path / "changing", "--resume", ranks=ranks)
    for folder in ("2", "3", "changing"):
        for step in ("step_00000003", "step_00000009"):
            assert digest(tmp_path / "1" / step) == digest(tmp_path / folder / step)


@needs_ranks
def test_zero_levels_with_micro_batches_differ_by_rounding(tmp_path):
    """Ranks are then summed before micro-batches: as in test_ranks_train_alike."""
    args = [*SMALL, "--steps", 4, "--total_batch", 256, "--dtype", "float" if ON_GPU else "double"]
    for zero in (1, 2, 3):
        run(*args, "--zero", zero, "-o", tmp_path / str(zero), ranks=2)
    assert digest(newest(tmp_path / "2")) == digest(newest(tmp_path / "3"))
    for a, b in zip(events(tmp_path / "1"), events(tmp_path / "2"), strict=True):
        near = 1e-9 if not ON_GPU else 2e-5 if a["step"] == 1 else 1e-3
        assert abs(a["loss"] - b["loss"]) < near and abs(a["norm"] - b["norm"]) < 10 * near * a["norm"]


@needs_ranks
def test_sharded_weights_serve_validation_scores_and_samples(tmp_path):
    """Also when the last rows are fewer than the rings: then some of these have none, and their weights are needed."""
    ranks = min(RANKS, 3)
    documents = [[62, *np.random.default_rng(i).integers(0, 60, size=10 + i)] for i in range(30)]
    write_tokens(tmp_path / "val.bin", documents, 64, bos=62)
    outputs = []
    for zero in (1, 3):
        shards = ["--zero", zero]
        outputs.append([
            run(*SMALL, *shards, "-j", tmp_path / "val.bin", "--eval", tmp_path / f"{zero}.csv", "--val_rows", 3 * ranks + 1,
                "--ring", 1, ranks=ranks).split("->")[0],
            (tmp_path / f"{zero}.csv").read_text(),
            run(*SMALL, *shards, "--generate", 8, "--prompt", "5,9,11", "-c", 72, ranks=ranks),
            re.findall(r"validation loss.*|^[\d ]+$", run(
                *SMALL, *shards, "-i", tmp_path / "val.bin", "-j", tmp_path / "val.bin", "--steps", 4, "--val_every", 2,
                "--val_rows", ranks + 1, "--ring", 1, "--sample_every", 3, ranks=ranks), re.M)])
    assert outputs[0] == outputs[1] and len(outputs[0][3]) == 4


@pytest.mark.host_only
def test_the_plan_counts_what_zero_shares():
    def parts(*args):
        out = run("-e", "llama2-7b", "-c", 65536, "--device", "gpu", "--plan", "--ranks", 8, *args)
        return {name: float(gib) for name, gib in re.findall(r"^  (\w[\w ,]*?) +([\d.]+)(?: of.*)?$", out, re.M)}, out

    (one, _), (two, _), (three, _) = (parts("--zero", zero) for zero in (1, 2, 3))
    for plan in (two, three):
        assert abs(plan["gradients"] - one["gradients"] / 8) < 0.01 and plan["moments"] == one["moments"]
        assert 0.7 < plan["gradients in use"] < 0.8  # two buffers of a layer's 202 million elements
    assert two["weights"] == one["weights"] and abs(three["weights"] - one["weights"] / 8) < 0.01
    assert one["all"] - 10.3 < two["all"] < one["all"] - 10.1 and two["all"] - 10.3 < three["all"] < two["all"] - 10.1
    # Less is recomputed with what is saved, and a run that does not fit is told to share more.
    _, whole = parts("--memory", 50)
    _, shared = parts("--memory", 50, "--zero", 3)
    assert "recompute none" not in whole and "recompute none" in shared
    assert "this would: --zero 2\n" in parts("--memory", 24)[1] and "this would: --zero 3\n" in parts("--memory", 16)[1]


@needs_ranks
@pytest.mark.parametrize("attention", ["anchor", *(pytest.param(other, marks=many_gpus)
                                                   for other in ("full", "intra", "intra_reset"))])
def test_ranks_train_alike(tmp_path, attention):
    """In double, on a GPU in float: a lost or doubled token changes the loss by 1e-3, rounding in the first step by a few
    1e-7 of each token's; later on AdamW follows the sign even of gradients that are all rounding."""
    args = [*SMALL, "--attention", attention, "--steps", 3, "-b", 2, "--total_batch", 256, "--dtype",
            "float" if ON_GPU else "double"]
    runs = {"1": {}, "2": {"ranks": 2}, "21": {"ranks": 2, "extra": ["--ring", 1]}, "3": {"ranks": 3}}
    if ON_GPU and GPUS > 1:
        runs["nccl"] = {"ranks": 2, "extra": ["--transport", "nccl"]}
    for name, how in runs.items():
        if how.get("ranks", 1) <= RANKS:
            run(*args, *how.get("extra", []), "-o", tmp_path / name, ranks=how.get("ranks", 1))
    for name in runs:
        if not (tmp_path / name).exists():
            continue
        for a, b in zip(events(tmp_path / "1"), events(tmp_path / name), strict=True):
            near = 1e-9 if not ON_GPU else 2e-5 if a["step"] == 1 else 1e-3
            assert abs(a["loss"] - b["loss"]) < near and abs(a["norm"] - b["norm"]) < 10 * near * a["norm"]


@needs_ranks
@many_gpus
@pytest.mark.parametrize("attention", ["full", "intra", "intra_reset", "anchor"])
def test_a_ring_without_a_row_waits_for_the_validation_of_others(tmp_path, attention):
    write_tokens(tmp_path / "val.bin", [[62, *range(3, 40)] for _ in range(8)], 64, bos=62)
    args = [*SMALL, "--attention", attention, "-j", tmp_path / "val.bin", "--val_rows", 1, "--steps", 2, "-l", 1e-9]
    loss = []
    for ranks in (1, 2):
        run(*args, "-o", tmp_path / str(ranks), "--ring", 1, ranks=ranks)
        loss.append(events(tmp_path / str(ranks), "validation")[-1]["loss"])
    assert abs(loss[0] - loss[1]) < 1e-4


@needs_ranks
@pytest.mark.parametrize("attention", ["full", pytest.param("anchor", marks=many_gpus)])
def test_every_ring_backend_trains_alike(tmp_path, attention):
    """Differences as in test_ranks_train_alike."""
    args = [*SMALL, "--attention", attention, "--steps", 3, "-b", 2, "--dtype", "float" if ON_GPU else "double"]
    run(*args, "-o", tmp_path / "one")
    for backend in ("auto", "ring", "allgather", "ulysses"):
        run(*args, "--ring_backend", backend, "-o", tmp_path / backend, ranks=2)
        for a, b in zip(events(tmp_path / "one"), events(tmp_path / backend), strict=True):
            near = 1e-9 if not ON_GPU else 2e-5 if a["step"] == 1 else 1e-3
            assert abs(a["loss"] - b["loss"]) < near and abs(a["norm"] - b["norm"]) < 10 * near * a["norm"]


@pytest.mark.skipif(RANKS < 3, reason="fewer than three ranks")
@pytest.mark.host_only
def test_ulysses_needs_kv_heads_for_all_ranks():
    assert "--ring_backend ulysses" in run(*SMALL, "--ring_backend", "ulysses", ok=False, ranks=3)


@pytest.mark.skipif(not ON_GPU or RANKS < 2, reason="not on ranks with GPUs")
def test_the_log_tells_what_transfers_cost(tmp_path):
    out = run(*SMALL, "--steps", 4, "-o", tmp_path / "run", ranks=2)
    assert "data travel between GPUs by CUDA IPC" in out and len(re.findall(r"moving [\d.]+% waiting [\d.]+%", out)) == 4
    assert ("2 ranks share a GPU" in out) == (GPUS < 2)  # then a transfer may seem to take no time
    for step, time in zip(events(tmp_path / "run"), events(tmp_path / "run", "time"), strict=True):
        parts = [time[part] for part in ("compute", "moving", "waiting", "optimizer")]
        assert abs(sum(parts) - step["seconds"]) < 1e-6 and (time["moving"] > 0 or GPUS < 2) and time["waiting"] >= 0
        assert time["rank"] in (0, 1)


def test_sharing_gpus_is_asked_for_by_1():
    """And leaves NCCL out, also of what a plan takes to be between hosts."""
    def plan(value, *args, device="gpu"):
        return subprocess.run([BINARY, "--device", device, "-e", "tiny", "--plan", "--ranks", "16", *args],
                              capture_output=True, text=True, env={**os.environ, "TRAIN_LLAMA_SHARE_GPUS": value})

    assert "TRAIN_LLAMA_SHARE_GPUS is 1" in plan("yes").stderr
    assert "--transport nccl wants a GPU for every rank" in plan("1", "--transport", "nccl").stderr
    transfers = [float(re.search(r"^  transfers +([\d.]+)$", plan(*args).stdout, re.M).group(1))
                 for args in (("0",), ("0", "--transport", "nccl"), ("",), ("1",), ("1", "--transport", "ipc"))]
    assert transfers[0] == transfers[1] == transfers[2] > transfers[3] + 0.9 and transfers[3] == transfers[4]
    assert plan("yes", device="cpu").returncode == 0  # not looked at


@pytest.mark.alone
@pytest.mark.skipif(not ON_GPU or RANKS <= GPUS, reason="a GPU for every rank, or none")
def test_ranks_share_gpus_only_when_they_are_asked_to():
    refused = subprocess.run([*MPIRUN, str(GPUS + 1), BINARY, *DEVICE, *SMALL], capture_output=True, text=True)
    assert refused.returncode and f"GPU {GPUS} is wanted and there are {GPUS}" in refused.stderr
    assert "TRAIN_LLAMA_SHARE_GPUS=1" in refused.stderr

    def memory(ranks):
        return float(re.search(r"^  all .* of ([\d.]+)$", run(*SMALL, "--plan", ranks=ranks), re.M).group(1))

    assert abs(memory(1) / -(-RANKS // GPUS) - memory(RANKS)) < 1  # GiB: what contexts take is not known to the MiB


@needs_ranks
def test_the_log_tells_how_even_the_work_is(tmp_path):
    out = run(*SMALL, "-c", 512, "--steps", 4, "-o", tmp_path / "run", ranks=2)
    steps = events(tmp_path / "run")
    assert re.findall(r" \| work ([\d.]+) steps ([\d.]+)$", out, re.M) == [
        (f"{s['imbalance']:.2f}", f"{s['step_imbalance']:.2f}") for s in steps]
    assert all(1 <= s["imbalance"] <= s["step_imbalance"] < 2 for s in steps)
    assert "work" not in run(*SMALL, "--steps", 1)


@pytest.mark.skipif(not ON_GPU or RANKS < 2, reason="not on ranks with GPUs")
@pytest.mark.parametrize("stop", [signal.SIGKILL, signal.SIGSTOP])
def test_a_rank_that_dies_or_hangs_ends_all(tmp_path, stop):
    """Rank 1 is found by its place in mpirun's children; the timeout leaves time for the first step's choices."""
    process = subprocess.Popen(command(*SMALL, "--steps", 10000000, "--timeout", 20, ranks=2), stdout=subprocess.PIPE,
                               stderr=subprocess.STDOUT, text=True)
    for line in process.stdout:
        if line.startswith("step 3/"):
            break
    ranks = [int(pid) for pid in pathlib.Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
    begin = time.time()
    os.kill(max(ranks), stop)
    rest = rest_of(process)
    assert process.wait(60) != 0 and time.time() - begin < 30
    assert "no progress for 20 s" in rest if stop == signal.SIGSTOP else "signal 9" in rest


@pytest.mark.skipif(RANKS < 3, reason="fewer than three ranks")
@pytest.mark.host_only
def test_a_ring_that_does_not_divide_is_refused():
    assert "--ring 2" in run(*SMALL, "--ring", 2, ok=False, ranks=3)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_leaves(tmp_path, number):
    process = subprocess.Popen(command(*SMALL, "--steps", 100000, "-o", tmp_path / "run"), stdout=subprocess.PIPE, text=True,
                               stderr=subprocess.PIPE, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    for line in process.stdout:
        if line.startswith("step 3/"):
            process.send_signal(number)
            break
    rest = rest_of(process)
    assert process.wait(60) == 0 and "leaving" in rest
    assert ("Ctrl-C again ends at once" in process.stderr.read()) == (number == signal.SIGINT)
    assert "going on from step" in run(*SMALL, "--steps", 1, "-o", tmp_path / "run", "--resume")


@pytest.mark.skipif(ON_GPU, reason="a GPU's memory does not depend on threads")
@needs_ranks
def test_ranks_with_unlike_threads_come_to_one_layout():
    """Copies of gradients that the CPU's attention takes go by the threads; here they decide what is recomputed."""
    layout = ["-e", "tiny", "-c", 4096, "--layers", 4, "--heads", 2, "--channels", 128, "--memory", 0.05, "--steps", 1]
    done = subprocess.run(
        [*MPIRUN, "2", "sh", "-c", 'OMP_NUM_THREADS=$((1 + 7 * OMPI_COMM_WORLD_RANK)) exec "$@"', "sh", BINARY, *DEVICE,
         *map(str, layout), "--timeout", "20"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "recompute norm" in done.stdout, done.stdout + done.stderr


@needs_ranks
def test_sigusr1_to_mpirun_saves_and_leaves(tmp_path):
    """Where hwloc finds PoCL, whose LLVM takes the signal from mpirun, that is left away, as the README says."""
    process = subprocess.Popen(command(*SMALL, "--steps", 100000, "-o", tmp_path / "run", ranks=2),
                               stdout=subprocess.PIPE, text=True,
                               env={**os.environ, "OMP_NUM_THREADS": "1", "HWLOC_COMPONENTS": "-opencl"})
    for line in process.stdout:
        if line.startswith("step 3/"):
            process.send_signal(signal.SIGUSR1)
            break
    assert "saved, leaving" in rest_of(process) and process.wait(60) == 0


@pytest.mark.host_only
def test_a_closed_terminal_does_not_end_a_run(tmp_path):
    """Nobody reads what it prints (head has gone), then SIGHUP: it saves."""
    run_ = subprocess.Popen(command(*SMALL, "--steps", 1000000, "-o", tmp_path), stdout=subprocess.PIPE,
                            stderr=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"},
                            preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL))  # nohup's is inherited
    run_.stdout.readline()
    run_.stdout.close()
    while len(events(tmp_path) if (tmp_path / "log.jsonl").exists() else []) < 50:
        assert run_.poll() is None
        time.sleep(0.05)
    run_.send_signal(signal.SIGHUP)
    assert run_.wait(60) == 0 and newest(tmp_path)


@pytest.mark.parametrize("ucx", [False, True])
@pytest.mark.host_only
def test_nohup_keeps_a_run_alive(tmp_path, ucx):
    """UCX, with which many clusters build their MPI, takes SIGHUP for itself."""
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    if ucx:
        env |= {"OMPI_MCA_pml": "ucx", "OMPI_MCA_pml_ucx_tls": "any", "OMPI_MCA_pml_ucx_devices": "any"}
        if not HAS_MPI or subprocess.run(command("--dump_params"), env=env, capture_output=True).returncode:
            pytest.skip("no MPI with UCX")
    out = open(tmp_path / "stdout", "w+")
    run_ = subprocess.Popen(command(*SMALL, "--steps", 1000000, "-o", tmp_path), stdout=out, stderr=out, env=env,
                            preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))
    steps = lambda: len(events(tmp_path)) if (tmp_path / "log.jsonl").exists() else 0  # noqa: E731
    while not steps():
        assert run_.poll() is None, (tmp_path / "stdout").read_text()[-2000:]
        time.sleep(0.05)
    run_.send_signal(signal.SIGHUP)
    reached = steps()
    while steps() < reached + 20:
        assert run_.poll() is None, (tmp_path / "stdout").read_text()[-2000:]
        time.sleep(0.05)
    run_.send_signal(signal.SIGTERM)
    assert run_.wait(60) == 0


@pytest.mark.host_only
def test_one_run_a_folder_and_a_cut_log_goes_on(tmp_path):
    first = subprocess.Popen(command(*SMALL, "--steps", 1000000, "-o", tmp_path), stdout=subprocess.DEVNULL,
                             env={**os.environ, "OMP_NUM_THREADS": "1"})
    while not (tmp_path / "log.jsonl").exists() or not events(tmp_path):
        assert first.poll() is None
        time.sleep(0.05)
    assert "another run" in run(*SMALL, "--steps", 2, "-o", tmp_path, "--resume", ok=False)
    first.kill()
    first.wait()
    with open(tmp_path / "log.jsonl", "a") as log:
        log.write('{"event": "st')
    run(*SMALL, "--steps", 2, "-o", tmp_path, "--resume")  # there is no checkpoint: a new run, and a log of its own
    lines = (tmp_path / "log.jsonl").read_text().splitlines()
    assert [line["event"] for line in map(json.loads, lines)] == ["start", "step", "step"]
    assert (tmp_path / "log.jsonl.old").read_text().endswith('{"event": "st')
    with open(tmp_path / "log.jsonl", "a") as log:
        log.write('{"event": "st')
    run(*SMALL, "--steps", 4, "-o", tmp_path, "--resume")
    lines = (tmp_path / "log.jsonl").read_text().splitlines()
    assert lines.count('{"event": "st') == 1 and json.loads(lines[0])["event"] == "start" and json.loads(lines[-1])["step"] == 4


@pytest.mark.host_only
def test_checkpoints_that_cannot_be_used_are_kept(tmp_path):
    run(*SMALL, "--steps", 4, "--save_every", 2, "-o", tmp_path)
    for step in tmp_path.glob("step_*"):
        with open(step / "weights.bin", "r+b") as f:
            f.truncate(5000)
    before = {f: f.read_bytes() for f in tmp_path.glob("step_*/*")}
    message = run(*SMALL, "--steps", 6, "--save_every", 2, "-o", tmp_path, "--resume", ok=False)
    assert "no checkpoint" in message and message.count("not used") == 2
    assert {f: f.read_bytes() for f in tmp_path.glob("step_*/*")} == before


def test_killed_at_any_instant_the_newest_checkpoint_loads(tmp_path):
    folder, reached = tmp_path / "run", 0
    for i in range(4 if ON_GPU else 12):  # a start on a GPU takes seconds, and the host's code is the same
        process = subprocess.Popen(command(*SMALL, "--steps", 100000, "--save_every", 1, "-o", folder, "--resume"),
                                   stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        next(line for line in process.stdout if line.startswith("step "))
        time.sleep((i * 0.6180339 % 1) * 0.5)
        process.kill()
        process.communicate()
        done = newest(folder) if list(folder.glob("step_????????")) else None
        step = int(done.name[5:]) if done else 0
        assert step >= reached
        reached = step
    out = run(*SMALL, "--steps", reached + 1, "-o", folder, "--resume")
    assert f"going on from step {reached}" in out and reached > 0


@pytest.mark.host_only
def test_a_damaged_checkpoint_is_named_and_the_one_before_taken(tmp_path):
    run(*SMALL, "--steps", 4, "--save_every", 2, "-o", tmp_path / "run")
    weights = newest(tmp_path / "run") / "weights.bin"
    data = bytearray(weights.read_bytes())
    data[5000] ^= 4
    weights.write_bytes(data)
    done = subprocess.run(command(*SMALL, "--steps", 5, "-o", tmp_path / "run", "--resume"), capture_output=True, text=True)
    assert done.returncode == 0 and "going on from step 2" in done.stdout
    assert "weights.bin" in done.stderr and "step_00000004" in done.stderr


def masters(checkpoint):
    """The master copy of every part, as shard_add writes it."""
    data, at, found = (checkpoint / "optimizer_00000.bin").read_bytes(), 0, []
    while at < len(data):
        begin, end, *types = struct.unpack_from("<QQ3i", data, at + 8)
        assert types == [1, 1, 0]  # moments in bf16, a master in float
        at += 64 + 2 * 2 * (end - begin)
        found.append((begin, np.frombuffer(data, np.float32, end - begin, at)))
        at += 4 * (end - begin)
    return found


def test_a_master_copy_has_all_bits_of_the_weights_file(tmp_path):
    run(*SMALL, "--dtype", "float", "--steps", 3, "-o", tmp_path / "float")
    weights = newest(tmp_path / "float") / "weights.bin"
    exact = np.fromfile(weights, np.float32)[256:]
    run("-e", weights, "-c", 64, "--dtype", "bf16", "--master", "float", "--steps", 1, "-l", 1e-20, "-o",
        tmp_path / "bf16")
    assert sum(len(values) for _, values in masters(newest(tmp_path / "bf16"))) == len(exact)
    for begin, values in masters(newest(tmp_path / "bf16")):
        assert np.array_equal(values, exact[begin:begin + len(values)])


@pytest.mark.host_only
def test_a_resumed_run_says_what_has_changed(tmp_path):
    args = [*SMALL, "-o", tmp_path, "--schedule", "cosine"]
    vocab = tmp_path / 'the "new".vocab'
    vocab.write_text("x\n" * 64)
    run(*args, "--steps", 2, "--vocab_file", vocab)
    assert "changed" not in run(*args, "--steps", 2, "--vocab_file", vocab, "--resume")
    out = run(*args, "--steps", 3, "--resume", "--seed", 4, "--attention", "full")
    assert re.search(r"^changed since the last start: (.*)$", out, re.M).group(1).split(", ") == [
        "--attention anchor -> full", "--steps 2 -> 3", rf'--vocab_file {tmp_path}/the \"new\".vocab -> none',
        "--seed 1337 -> 4"]


@pytest.mark.host_only
def test_a_resumed_run_knows_its_data_by_what_is_in_them(tmp_path):
    def changed(steps, name):
        out = run(*SMALL, "-o", tmp_path / "run", "--steps", steps, "-i", tmp_path / name, "--resume")
        return re.findall(r"^changed since the last start: (.*)$", out, re.M)

    documents = [[62, *range(60)] for _ in range(9)]
    write_tokens(tmp_path / "a.bin", documents, 64, bos=62)
    assert changed(2, "a.bin") == changed(2, "a.bin") == []
    shutil.copy(tmp_path / "a.bin", tmp_path / "b.bin")
    assert changed(2, "b.bin") == [f"--train_data {tmp_path}/a.bin -> {tmp_path}/b.bin"]
    for other in ([[62, *reversed(range(60))] for _ in range(9)], documents, documents[:8]):
        write_tokens(tmp_path / "b.bin", other, 64, bos=62)
        assert changed(2, "b.bin") == ["the contents of the training data"]


@pytest.mark.parametrize("master", ["none", "float"])
def test_a_resumed_run_keeps_its_kind_of_master(tmp_path, master):
    args = [*SMALL, "--dtype", "bf16", "-o", tmp_path]
    run(*args, "--master", master, "--steps", 2)
    assert f"master {master}" in run(*args, "--steps", 4, "--resume")
    if master == "float" and not ON_GPU:  # there bf16 is the default
        assert "--dtype bf16" in run(*SMALL, "-o", tmp_path, "--steps", 6, "--resume", ok=False)


@pytest.mark.host_only
def test_no_option_overwrites_weights_or_tokens(tmp_path):
    run(*SMALL, "--steps", 1, "-o", tmp_path / "run")
    write_tokens(tmp_path / "val.bin", [[62, 5, 6, 7]], 64, bos=62)
    scores, text = tmp_path / "scores.csv", tmp_path / "books.jsonl"
    text.write_text("{}")
    assert "would overwrite" in run(*SMALL, "-j", tmp_path / "val.bin", "--eval", text, ok=False) and text.read_text() == "{}"
    assert "/nonexistent/x.csv" in run(*SMALL, "-j", tmp_path / "val.bin", "--eval", "/nonexistent/x.csv", ok=False)
    assert f"name a weights file, as {newest(tmp_path / 'run')}/weights.bin" in run("-e", tmp_path / "run", ok=False)
    for _ in range(2):  # its own it may
        run(*SMALL, "-j", tmp_path / "val.bin", "--eval", scores)
    for target in (newest(tmp_path / "run") / "weights.bin", tmp_path / "val.bin"):
        before = target.read_bytes()
        for option in ("--eval", "--dump_logits"):
            assert "would overwrite" in run(*SMALL, "-j", tmp_path / "val.bin", option, target, ok=False)
        assert target.read_bytes() == before


@pytest.mark.host_only
def test_text_without_a_token_to_predict_is_refused(tmp_path):
    write_tokens(tmp_path / "val.bin", [[5]] * 100, 64)
    args = [*SMALL, "--attention", "intra", "-j", tmp_path / "val.bin"]
    assert "no token to predict" in run(*args, "--eval", tmp_path / "x.csv", ok=False)
    assert "no token to predict" in run(*args, "--steps", 1, ok=False)


@pytest.mark.host_only
def test_validation_on_what_is_trained_is_said(tmp_path):
    write_tokens(tmp_path / "a.bin", [[62, *range(60)] for _ in range(9)], 64, bos=62)
    (tmp_path / "b.bin").symlink_to(tmp_path / "a.bin")
    out = run(*SMALL, "-i", tmp_path / "a.bin", "-j", tmp_path / "b.bin", "--steps", 9)
    assert "is in --train_data and in --val_data" in out and "540 tokens, 1.07 times through them in 9 steps" in out


@pytest.mark.host_only
def test_texts_of_two_tokenizers_are_refused(tmp_path):
    for name, tokenizer in (("train", 1), ("val", 2)):
        write_tokens(tmp_path / f"{name}.bin", [[62, 5, 6, 7]] * 9, 64, bos=62)
        raw = bytearray((tmp_path / f"{name}.bin").read_bytes())
        struct.pack_into("<Q", raw, 4 * 12, tokenizer)  # its hash
        (tmp_path / f"{name}.bin").write_bytes(raw)
    args = ["-i", tmp_path / "train.bin", "-c", 64, "--steps", 1]
    run(*SMALL, *args, "-j", tmp_path / "train.bin")
    assert "different tokenizers" in run(*SMALL, *args, "-j", tmp_path / "val.bin", ok=False)
    run(*SMALL, "--steps", 1, "-o", tmp_path / "run")  # its documents begin with another token
    weights = newest(tmp_path / "run") / "weights.bin"
    assert "another tokenizer's" in run("-e", weights, *args)
    assert "another tokenizer's" in run("-e", weights, "-c", 64, "-j", tmp_path / "val.bin", "--eval", tmp_path / "x.csv")


def test_trained_weights_start_another_run(tmp_path):
    run(*SMALL, "--steps", 2, "-o", tmp_path / "run")
    weights = newest(tmp_path / "run") / "weights.bin"
    out = run("-e", weights, "-c", 128, "--rope_base", "50000", "--steps", 1, "-o", tmp_path / "next")
    assert "RoPE base 50000" in out and "lr 2.00e-05" in out
    assert "fixes the model's shape" in run("-e", weights, "--layers", 2, ok=False)
    saved = newest(tmp_path / "next") / "weights.bin"
    assert np.fromfile(saved, "<i4", 16)[14] == 512 and np.fromfile(saved, "<f8", 13)[11] == 50000


def test_eval_scores_every_label_once(tmp_path):
    documents = [[62, *np.random.default_rng(i).integers(0, 60, size=10 + i)] for i in range(30)]
    write_tokens(tmp_path / "val.bin", documents, 64, bos=62)
    texts = sum(len(d) - 1 for d in documents)
    rows = 1000  # more than there are: the data's end ends the scoring
    run(*SMALL, "-j", tmp_path / "val.bin", "--eval", tmp_path / "a.csv", "--val_rows", rows)
    lines = np.genfromtxt(tmp_path / "a.csv", delimiter=",", names=True)
    assert len(set(zip(lines["row"], lines["index"]))) == len(lines)
    assert lines["row"].max() == -(-texts // 63) - 1
    assert np.all(np.abs(lines["loss"] - np.log(64)) < 1)
    if RANKS > 1 and (GPUS > 1 or not ON_GPU):
        run(*SMALL, "-j", tmp_path / "val.bin", "--eval", tmp_path / "b.csv", "--val_rows", rows, "--ring", 1,
            ranks=min(3, RANKS))
        run(*SMALL, "-j", tmp_path / "val.bin", "--eval", tmp_path / "c.csv", "--val_rows", rows, ranks=2)
        for other in "bc":
            again = np.genfromtxt(tmp_path / f"{other}.csv", delimiter=",", names=True)
            assert np.array_equal(again[["row", "index", "label"]], lines[["row", "index", "label"]])
            assert np.abs(again["loss"] - lines["loss"]).max() < 1e-5


@pytest.mark.host_only
def test_eval_ends_with_the_data(tmp_path):
    """However many rows at a time, also where the text fills the last row to its end."""
    for tokens in (3 * 63, 3 * 63 + 1):
        write_tokens(tmp_path / "val.bin", [[62, *np.arange(tokens) % 60]], 64, bos=62)
        rows = -(-tokens // 63)
        for batch in (1, 2, 8):
            run(*SMALL, "-j", tmp_path / "val.bin", "--eval", tmp_path / "x.csv", "--val_rows", 50, "-b", batch)
            lines = np.genfromtxt(tmp_path / "x.csv", delimiter=",", names=True)
            assert len(set(lines["row"])) == rows and len(set(zip(lines["row"], lines["index"]))) == len(lines)


def test_generation_is_what_the_logits_say(tmp_path):
    tokens = [int(t) for t in run(*SMALL, "--generate", 8, "--prompt", "5,9,11", "--temperature", 0).split()]
    assert tokens[:3] == [5, 9, 11] and 4 <= len(tokens) <= 11
    write_tokens(tmp_path / "row.bin", [tokens], 64)
    run(*SMALL, "-c", len(tokens), "-i", tmp_path / "row.bin", "--attention", "full", "--dump_logits", tmp_path / "logits")
    logits = np.fromfile(tmp_path / "logits", "<f4").reshape(len(tokens), 64)
    assert logits[2:-1].argmax(axis=1).tolist() == tokens[3:]
    sampled = [run(*SMALL, "--generate", 8, "--prompt", "5,9,11", "--seed", s) for s in (1, 1, 2)]
    assert sampled[0] == sampled[1] != sampled[2]


def test_samples_and_validation_while_training(tmp_path):
    write_tokens(tmp_path / "data.bin", [[62, *range(60)] for _ in range(50)], 64, bos=62)
    (tmp_path / "data.vocab").write_text("".join(f"<{i}>\n" for i in range(64)))
    out = run(*SMALL, "-i", tmp_path / "data.bin", "-j", tmp_path / "data.bin", "--steps", 60, "--val_every", 30,
              "--sample_every", 60, "--vocab_file", tmp_path / "data.vocab", "-l", "1e-2", "--temperature", 0)
    losses = [float(x) for x in re.findall(r"validation loss ([\d.]+)", out)]
    assert len(losses) == 2 and losses[1] < losses[0] < 4.2
    assert "<62>" in out


@pytest.mark.alone
@pytest.mark.skipif(bool(os.environ.get("SAN")), reason="sanitizers take memory of their own")
def test_the_plan_is_what_a_run_takes(tmp_path):
    """The arena is all but the program itself, which a run of a tiny model shows; on a GPU it is in the plan."""
    def peak(name, *args):
        run(*args, "--steps", 2, "-o", tmp_path / name)
        return events(tmp_path / name)[-1]["memory_gib"]

    program = 0 if ON_GPU else peak("small", *SMALL)
    model = ["-e", "tiny", "--layers", 4, "--channels", 768, "--heads", 12, "--ffn", 2048, "--vocab", 16384, "-c", 1024]
    for name, extra in (("kept", []), ("again", ["--recompute", "all"]), ("away", ["--offload", "all"])):
        planned = float(re.search(r"  all +([\d.]+) of", run(*model, *extra, "--plan")).group(1))
        assert planned > 0.5
        assert abs(peak(name, *model, *extra) - program - planned) < 0.05 * planned


def test_offloaded_activations_change_no_bit(tmp_path):
    args = [*SMALL, "--layers", 5, "--dtype", "bf16" if ON_GPU else "float", "--total_batch", 128, "--steps", 3]
    for name, extra in (("kept", []), ("away", ["--offload", "all"]), ("some", ["--offload", "qkv,input", "--recompute", "norm"])):
        run(*args, *extra, "-o", tmp_path / name)
        assert digest(newest(tmp_path / name)) == digest(newest(tmp_path / "kept"))
    assert "input,residual,qkv,attention" in run(*SMALL, "--offload", "qkv,nonsense", ok=False)


@pytest.mark.host_only
def test_a_context_beyond_a_gpu_is_told_to_offload():
    long = ["-e", "llama2-7b", "-c", 262144, "--device", "gpu", "--plan", "--master", "none"]
    assert "does not fit; this would: --offload input,attention\n" in run(*long)
    out = run(*long, "--offload", "input,attention")
    host = float(re.search(r"of the host, besides +([\d.]+)", out).group(1))
    assert "does not fit" not in out and host == pytest.approx(30 * (2 * 2 + 1 / 32), abs=1e-3)


def test_the_plan_of_a_7b_needs_no_gpu():
    out = run("-e", "llama2-7b", "-c", 65536, "--device", "gpu", "--plan", "--ranks", 8)
    assert "6.74B parameters" in out and "8 ranks in rings of 8 by ring" in out
    total = float(re.search(r"  all +([\d.]+) of", out).group(1))
    assert 40 < total < 139


def test_a_plan_that_does_not_fit_names_what_would(tmp_path):
    """Between what is taken with nothing and with all recomputed; then as it says."""
    model = ["-e", "tiny", "--layers", 6, "--channels", 256, "--heads", 4, "--ffn", 1024, "--vocab", 512, "-c", 2048, "-b", 2,
             "--master", "none"]
    most, least = (float(re.search(r"^  all +([\d.]+) of", run(*model, "--recompute", which, "--plan"), re.M).group(1))
                   for which in ("none", "all"))
    assert most > least + 0.1
    memory = ["--memory", (most + least) / 2]
    done = subprocess.run(command(*model, *memory, "--recompute", "none"), capture_output=True, text=True, cwd=tmp_path,
                          timeout=120)
    needed, there = map(float, re.search(r"([\d.]+) GiB are needed and a rank has ([\d.]+)", done.stderr).groups())
    assert done.returncode and abs(needed - most) < 0.01 and abs(there - memory[1]) < 0.01
    assert re.search(r"^  memory of a rank +GiB\n(  \S.* [\d.]+\n)+  all .* of .*\n\n  does not fit; this would: "
                     r"--recompute auto\n", done.stdout, re.M), done.stdout
    assert "does not fit" not in run(*model, *memory, "--plan")
    assert "step 1/1" in run(*model, *memory, "--steps", 1)
    all_of_it = ["--memory", most * 1.001, "--recompute", "none"]  # what the plan says does not fit, a run refuses
    assert "does not fit" in run(*model, *all_of_it, "--plan") and "GiB are needed" in run(*model, *all_of_it, ok=False)


@pytest.mark.skipif(not ON_GPU, reason="no GPU's memory to run out of")
def test_a_model_beyond_the_gpu_is_told_what_would_fit(tmp_path):
    done = subprocess.run(command("-e", "llama2-13b", "--layers", 120, "-c", 4096), capture_output=True, text=True,
                          cwd=tmp_path, timeout=120)
    assert done.returncode and "GiB are needed and a rank has" in done.stderr
    parts = re.findall(r"^  (\S[\w ,]*?) +([\d.]+)(?: of ([\d.]+))?$", done.stdout, re.M)
    assert {"weights", "gradients", "moments", "CUDA, cuBLASLt"} < {name for name, _, _ in parts}
    name, needed, there = parts[-1]
    assert name == "all" and float(needed) > float(there) and abs(sum(float(x) for _, x, _ in parts[:-1]) - float(needed)) < 0.01
    assert re.search(r"does not fit; this would: .*on \d+ ranks$", done.stdout, re.M)


def crc32c(data):
    crc = 0xffffffff
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82f63b78 if crc & 1 else 0)
    return crc ^ 0xffffffff


def logged_products(text):
    """Shape and algorithm of each, without addresses."""
    text = re.sub(r"=0[xX][0-9a-fA-F]+", "=", text)
    return re.findall(r"\[Trace\]\[cublasLt\w*Matmul\] .*?(Adesc=.*) algo=\[(.*?)\]", text)


@pytest.mark.skipif(not ON_GPU, reason="the CPU has one algorithm for a product")
def test_the_algorithms_of_products_stay_with_the_run(tmp_path):
    """What another GPU or library wrote is left out, though it is sound, and what is here takes its place. With
    --deterministic nothing is timed, but what the file holds is taken."""
    def start(steps, *extra):
        return run(*SMALL, "--steps", steps, "-o", tmp_path, "--resume", *(extra or ["--deterministic=0"]))

    def altered(line, old, new):
        text = re.sub(old, new, line[:-9]).encode()
        return f"{text.decode()} {crc32c(text):08x}"

    file = tmp_path / "matmul.txt"
    assert "timing the algorithms" in start(1)
    lines = file.read_text().splitlines()
    keys = sorted(line.split()[:10] for line in lines)  # all but the algorithm
    assert len(keys) > 9 and all(line == altered(line, "^$", "") for line in lines)
    again = start(2)
    assert f"{len(lines)} matrix products take the algorithms of {file}" in again and "timing the algorithms" not in again
    assert file.read_text().splitlines() == lines
    for steps, old, new in ((3, "cublasLt \\d+", "cublasLt 1"), (4, "(cublasLt \\d+) .*", "\\1 another GPU")):
        file.write_text("".join(altered(line, old, new) + "\n" for line in lines))
        assert file.read_text().splitlines()[0] != lines[0]
        again = start(steps)
        assert "timing the algorithms" in again and "take the algorithms" not in again
        assert sorted(line.split()[:10] for line in file.read_text().splitlines()) == keys
        assert file.read_text().count(lines[0].split(" cublasLt ")[1][:-9]) == len(keys)  # all by this library and GPU
    again = start(5, "--deterministic")
    assert f"{len(keys)} matrix products take the algorithms of {file}" in again and "timing" not in again
    file.unlink()
    assert "algorithms" not in start(6, "--deterministic") and not file.exists()


@pytest.mark.skipif(not ON_GPU or RANKS < 2, reason="not on ranks with GPUs")
def test_all_ranks_take_the_algorithms_that_rank_0_timed(tmp_path):
    """As cuBLASLt logs the products: a step that rank 0 times while rank 1 takes first guesses, then three to train."""
    line = command(*SMALL, "--steps", 3, "--deterministic=0", ranks=2)
    at = line.index(BINARY)
    line[at:at] = ["sh", "-c", 'CUBLASLT_LOG_FILE="$0.$OMPI_COMM_WORLD_RANK" exec "$@"', str(tmp_path / "rank")]
    done = subprocess.run(line, capture_output=True, text=True, timeout=120,
                          env={**os.environ, "OMP_NUM_THREADS": "1", "CUBLASLT_LOG_LEVEL": "2"})
    assert done.returncode == 0 and "timing the algorithms" in done.stdout, done.stdout + done.stderr
    timing, other = (logged_products((tmp_path / f"rank.{rank}").read_text()) for rank in (0, 1))
    step = len(other) // 4
    assert step > 9 and len(other) == 4 * step < len(timing)
    assert other[step:] == timing[-3 * step:]
    assert {shape for shape, _ in other[:step]} == {shape for shape, _ in other[step:]}
    assert set(other[:step]) != set(other[step:])  # else all guesses are the fastest, and this could not fail


@needs_ranks
def test_all_ranks_let_the_plan_say_what_would_fit(tmp_path):
    done = subprocess.run(command("-e", "llama2-13b", "--layers", 80, "--memory", 1, ranks=2), capture_output=True,
                          text=True, cwd=tmp_path, timeout=120)
    assert done.returncode and "does not fit; this would: " in done.stdout and "GiB are needed" in done.stderr


@pytest.mark.host_only
def test_what_would_fit_keeps_to_what_was_asked_for():
    def fits(*args):
        out = run("--device", "gpu", "--plan", "--ranks", 4, *args)
        return re.search(r"this would: (.*)", out).group(1)

    # 8 KV heads go over 8 ranks at most; rings stay as large as they were asked for
    assert "ranks" not in fits("-e", "llama3-8b", "-c", 4194304, "--ring_backend", "ulysses", "--zero", 3)
    assert "ranks" not in fits("-e", "llama2-7b", "-c", 4194304, "--ring", 2)
    assert "ranks" in fits("-e", "llama2-7b", "-c", 4194304)


@pytest.mark.parametrize("attention, ranks, backend", [("anchor", 8, "ring"), ("full", 8, "ulysses"), ("full", 6, "ring"),
                                                      ("full", 16, "ring")])
@pytest.mark.host_only
def test_auto_takes_the_fastest_ring_backend(attention, ranks, backend):
    out = run("-e", "llama2-7b", "-c", 4096, "--device", "gpu", "--plan", "--attention", attention, "--ranks", ranks)
    assert f"{ranks} ranks in rings of {ranks} by {backend}," in out  # 32 KV heads: 6 ranks do not divide them


@pytest.mark.host_only
def test_the_plan_estimates_the_step():
    def step(*args):
        out = run("-e", "llama2-7b", "-c", 65536, "--device", "gpu", "--plan", *args)
        if "On NVIDIA H200" not in out:
            pytest.skip("the ceilings of the GPU here are not known")
        ms, tokens, flops = re.search(r"(\d+) ms a step, (\d+) tokens/s, ([\d.]+) TFLOP/s per GPU", out).groups()
        return float(ms), float(tokens), float(flops), out

    ms, tokens, flops, out = step("--attention", "full", "--recompute", "none")
    assert abs(tokens * ms / 1e3 - 65536) < 65536 * 1e-4 and "32768 visible keys a token as in a full mask" in out
    # README, "Speed": 6 N T + 12 L C pairs
    model = 6 * (6.738e9 - 32000 * 4096) * 65536 + 12 * 32 * 4096 * 65536 * 65537 / 2
    assert abs(flops * ms / 1e3 - model / 1e12) < model / 1e12 * 1e-3
    again = step("--attention", "full", "--recompute", "all")
    assert again[0] > 1.1 * ms and "recomputed attention" in again[3] and "recomputed" not in out
    assert "made-up documents of 4096 tokens" in step("--generator_mean", 4096)[3]
    ranks = step("--ranks", 8, "--attention", "full")
    assert ms / 8 < ranks[0] < ms / 6 and "ring, keys and gradients" in ranks[3] and "CUDA IPC" in ranks[3]
    assert "TFLOP/s" not in run("-e", "tiny", "--device", "cpu", "--plan")
    assert "with these heads" in run("-e", "tiny", "--device", "gpu", "--plan")


@pytest.mark.host_only
def test_dump_params_names_every_tensor():
    lines = [line.split("\t") for line in run("--dump_params", "-e", "qwen2-1.5b").splitlines()]
    names = [name for _, _, name in lines]
    assert len(names) == len(set(names)) == 28 * 12 + 2
    assert "lm_head.weight" not in names and "model.layers.27.self_attn.v_proj.bias" in names
    shapes = dict((name, shape) for _, shape, name in lines)
    assert shapes["model.layers.0.self_attn.k_proj.weight"] == "256x1536"
    assert shapes["model.layers.0.self_attn.k_proj.bias"] == "256"
    ends = [int(o) + int(np.prod([int(n) for n in s.split("x")])) for o, s, _ in lines]
    assert all(int(o) >= end for (o, _, _), end in zip(lines[1:], ends))


@pytest.mark.host_only
def test_llmc_shards_train(tmp_path):
    header = np.zeros(256, "<i4")
    tokens = np.tile(np.r_[50256, np.arange(100)], 20)
    header[:3] = 20240520, 1, len(tokens)
    with open(tmp_path / "gpt2.bin", "wb") as f:
        f.write(header.tobytes() + tokens.astype("<u2").tobytes())
    out = run("-e", "tiny", "-i", tmp_path / "gpt2.bin", "-c", 64, "--steps", 2)
    assert "20 documents, 2000 tokens" in out


def launched(tmp_path, launcher, script, *args, **env):
    """What a script of several nodes runs, with a stand-in for its launcher."""
    (tmp_path / launcher).write_text('#!/bin/sh\nfor argument; do echo "$argument"; done\n')
    (tmp_path / launcher).chmod(0o755)
    clean = {k: v for k, v in os.environ.items() if k not in ("LD_LIBRARY_PATH", "OMP_NUM_THREADS")}
    return subprocess.run([*script, *args], capture_output=True, text=True, check=True, cwd=ROOT,
                          env={**clean, "PATH": f"{tmp_path}:{os.environ['PATH']}", **env}).stdout.splitlines()


@pytest.mark.parametrize("launcher, script", [("mpirun", ["sh", "scripts/run_nodes.sh", "hosts.txt"]),
                                              ("srun", ["bash", "scripts/run_slurm.sh"])])
@pytest.mark.host_only
def test_several_nodes_resume_where_there_is_a_folder(tmp_path, launcher, script):
    for out in (["-o", "my run"], ["-o=run"], ["--out", "run"], ["--out=run"], []):
        args = ["-i", "books 0*.bin", *out, "--steps", "3"]
        line = launched(tmp_path, launcher, script, *args)
        begin = line.index("./train_llama")
        assert line[begin:] == ["./train_llama", "--device", "gpu", *(["--resume"] if out else []), *args]


@pytest.mark.host_only
def test_several_nodes_get_the_environment_that_is_set(tmp_path, monkeypatch):
    for name in [name for name in os.environ if name.startswith(("NCCL_", "UCX_"))]:
        monkeypatch.delenv(name)

    def passed(**env):
        line = launched(tmp_path, "mpirun", ["sh", "scripts/run_nodes.sh", "hosts.txt"], "-e", "tiny", **env)
        return [name for x, name in zip(line, line[1:]) if x == "-x"]

    assert passed() == ["PATH", "OMP_NUM_THREADS=8"]
    assert passed(LD_LIBRARY_PATH="/opt/mpi/lib", OMP_NUM_THREADS="4") == ["PATH", "LD_LIBRARY_PATH", "OMP_NUM_THREADS=4"]
    network = {"NCCL_SOCKET_IFNAME": "ib0,ib1", "NCCL_IB_HCA": "mlx5_0 mlx5_1\nUCX_FALSE=1", "NCCL_NVLS_ENABLE": "",
               "UCX_NET_DEVICES": "mlx5_0:1"}
    others = {"CUDA_VISIBLE_DEVICES": "0", "MY_NCCL_DEBUG": "INFO", "UCX": "1"}
    assert passed(**network, **others) == ["PATH", "OMP_NUM_THREADS=8", *sorted(network)]
    # srun passes everything, if sbatch was not told otherwise or srun is told so.
    line = launched(tmp_path, "srun", ["bash", "scripts/run_slurm.sh"], "-e", "tiny")
    assert {"--export=ALL", "--gpu-bind=none", "--cpu-bind=none"} < set(line)


@pytest.mark.skipif(not ON_GPU or not HAS_MPI, reason="no GPUs")
def test_auto_takes_no_cpu_for_a_rank_that_has_no_gpu():
    line = [*MPIRUN, str(GPUS + 1), BINARY, "--device", "auto", *SMALL, "--steps", "1"]
    done = subprocess.run(line, capture_output=True, text=True, timeout=120)
    assert done.returncode != 0 and "step" not in done.stdout
    assert f"GPU {GPUS} is wanted and there are {GPUS}" in done.stderr, done.stdout + done.stderr
