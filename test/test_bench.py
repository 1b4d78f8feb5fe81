"""dev/bench.sh reads two tables and divides: with stand-ins for the benchmark and the peers, no GPU is needed."""

import os
import pathlib
import re
import subprocess

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
# As build/cuda/bench_attention and the peers' script print them; the portable kernels are half as fast.
OURS = """#!/bin/sh
echo "NVIDIA H200 $2, plain copy 4280 GB/s, tensor cores' nominal peak 989 TF/s (dense bf16)"
echo "| case | forward, share of peak | backward | of it: ms (share of a copy) |"
echo "|---|---|---|---|"
row() {
    printf "| %-22s |    0.242 ms %4.0f TF/s 60.7%% |    0.690 ms %4.0f TF/s 40.4%% | main    0.500, begin  0.100 " "$1" $2 $3
    echo "( 98%), end  0.050 ( 97%) |"
}
case "$1$2" in
    "") row "4K causal" 700 500; row "64K causal" 770 540; row "16K causal, D 64" 1 1 ;;
    causalhot) row "4K causal" 600 400; row "64K causal" 660 440; row "16K causal, D 64" 1 1; row "16K causal, 8 KV heads" 1 1 ;;
    portable) row "4K causal" 300 200 ;;
    anchor) row "64K anchor, mean 4096" 500 300; row "64K anchor, mean 16384" 600 500; row "16K anchor, mean 2048" 400 350 ;;
esac
"""
PEERS = """import sys
def row(name, S, f, b):
    print(f'{name:28s} S={S:7d} fwd {1.5:8.3f} ms {f:7.1f} TF/s  bwd {2.5:8.3f} ms {b:7.1f} TF/s', flush=True)
if len(sys.argv) > 1:
    S, mean = map(int, sys.argv[2:])
    if mean == 16384:
        sys.exit("Traceback: out of memory")
    row(f'flex anchor mean={mean} docs=17', S, 250, 200)
else:
    print('cublas 8192x4096x4096: 0.400 ms 690 TF/s')
    print('copy 4.28 TB/s')
    row('cudnn causal', 4096, 500, 320)
    row('torch FA2 causal', 4096, 400, 250)
    print('torch FA2 causal', 32768, 'failed', 'S= out of memory')
    row('cudnn causal', 65536, 600, 550)
"""

# Eight steps as the trainer prints them; the first three are slow. The options stand where the peaks are.
TRAINER = """#!/bin/sh
echo "$*" >> "$0.calls"
case "$*" in *"-c 32768"*) echo "train_llama: rank 0: 200.00 GiB are needed and a rank has 139.80"; exit 1 ;; esac
echo "anchor attention, context 4096, memory 100.00 GiB a rank, recompute norm:3, master none"
for i in 1 2 3 4 5 6 7 8; do
    ms=$((i < 4 ? 900 : 1000 + 5 * i % 8))
    echo "step $i/8 | loss 9.5 | norm 1.6 | lr 3.00e-04 | $ms ms | $((16384000 / ms)) tok/s | 6$((i))0.5 TFLOP/s/GPU | 99.5 GiB"
done
"""
TITAN = """import sys
print('warning of a library')
print('titan S=%s L=%s %s B=%s  9999 tok/s  model 440.0 TFLOP/s  peak 100 GB' % tuple(sys.argv[1:]))
"""


def test_turns_alternate_and_end_with_medians(tmp_path, monkeypatch, capsys):
    """With a stand-in for cuDNN, and one for ours that is measured slower every time."""
    monkeypatch.syspath_prepend(str(ROOT / "dev"))
    import bench_turns
    (tmp_path / "ours").write_text(f"""#!/bin/sh
echo "$*" >> {tmp_path}/calls
n=$(wc -l < {tmp_path}/calls)
echo "| 16K causal, D 64       |    1.000 ms    1 TF/s  0.1% |    1.000 ms    1 TF/s  0.1% | main 1, begin 1 (98%), end 1 (97%) |"
echo "| 16K causal             |    1.000 ms  $((800 - n)) TF/s 75.3% |    1.000 ms  $((600 - n)) TF/s 57.9% | main 1, begin 1 (98%) |"
""")
    (tmp_path / "ours").chmod(0o755)
    order = []

    def theirs(tokens):
        order.append(len((tmp_path / "calls").read_text().splitlines()) if (tmp_path / "calls").exists() else 0)
        return tokens / 64 + len(order), 500 - len(order)  # 257, 499, and so on

    bench_turns.main(bench_turns.argparse.Namespace(bench=tmp_path / "ours", rounds=3, tokens=[16384]), theirs)
    assert (tmp_path / "calls").read_text() == "16K causal warm\n" * 3 and order == [1, 1, 3]
    rows = capsys.readouterr().out.splitlines()
    assert rows[1] == "round 2, 16K: ours 798 / 598, cuDNN 258 / 498 TF/s"
    # 799 / 257 = 3.11, 798 / 258 = 3.09, 797 / 259 = 3.08; 599 / 499, 598 / 498, 597 / 497 = 1.20
    assert rows[-1] == "| 16K | 798 / 598 | 258 / 498 | 3.09 (3.08 to 3.11) | 1.20 (1.20 to 1.20) |"


def bench(tmp_path, **env):
    (tmp_path / "bench_attention").write_text(OURS)
    (tmp_path / "bench_attention").chmod(0o755)
    (tmp_path / "attention_peers.py").write_text(PEERS)
    (tmp_path / "peer_titan.py").write_text(TITAN)
    (tmp_path / "train_llama").write_text(TRAINER)
    (tmp_path / "train_llama").chmod(0o755)
    (ROOT / "build").mkdir(exist_ok=True)
    return subprocess.run(["bash", str(ROOT / "dev/bench.sh")], capture_output=True, text=True, timeout=60, check=True,
                          env={**os.environ, "BUILD": str(tmp_path), "PEER_SCRIPTS": str(tmp_path), "PYTHON": "python3",
                               "TRAIN_LLAMA": str(tmp_path / "train_llama"), **env}).stdout


def ratios(out):
    return re.findall(r"\| (.*?) +\| ([\d.]+) forward, ([\d.]+) backward, times (.*) \|", out)


def test_causal_peers_are_compared_with_ours_and_flash_attention_2_with_the_portable_kernels(tmp_path):
    out = bench(tmp_path, PART="attention", PEERS="1")
    ours, portable = out.split("H200 portable")
    assert ratios(ours) == [("4K causal", "1.20", "1.25", "cudnn"), ("4K causal", "1.50", "1.60", "torch FA2"),
                            ("64K causal", "1.10", "0.80", "cudnn")]
    assert ratios(portable) == [("4K causal", "0.75", "0.80", "torch FA2")]
    assert re.search(r"(?m)^== attention took \d+ s$", out)


def test_flex_attention_is_a_part_of_its_own_whose_cases_can_be_chosen(tmp_path):
    out = bench(tmp_path, PART="flex", PEERS="1")
    assert ratios(out) == [("64K anchor, mean 4096", "2.00", "1.50", "flex"), ("16K anchor, mean 2048", "1.60", "1.75", "flex")]
    assert re.findall(r"(?m)^    (\S+): \d+ s$", out) == ["65536:4096", "65536:16384", "16384:2048"]
    out = bench(tmp_path, PART="flex", PEERS="1", FLEX="16384:2048")
    assert ratios(out) == [("16K anchor, mean 2048", "1.60", "1.75", "flex")]


@pytest.mark.parametrize("part", ["attention", "flex"])
def test_without_peers_there_are_no_ratios(tmp_path, part):
    out = bench(tmp_path, PART=part)
    assert "TF/s" in out and not ratios(out) and "flex anchor" not in out


def test_a_step_is_the_median_of_the_last_ones_and_beside_its_peer(tmp_path):
    out = bench(tmp_path, PART="step anchor", STEPS="4k 32k", PEERS="1", OPTIONS="--deterministic")
    rows = re.findall(r"(?m)^\| (7B.*?) +\| +(\d+) ms \| +(\d+) tokens/s \| +([\d.]+) TF/s \| +([\d.]+) GiB \|", out)
    # Steps 4 to 8 take 1004, 1001, 1006, 1003 and 1000 ms. Both parts were asked for.
    assert rows == [("7B, 4 x 4K, full", "1003", "16334", "670.5", "99.50")] * 2
    assert "| 7B, 32K, full | failed: train_llama: rank 0: 200.00 GiB are needed" in out
    assert re.search(r"titan S=4096 L=32 sdpa B=4 .* model 440.0", out) and "recompute norm:3" in out
    assert re.findall(r"(?m)^    ratio (.*)$", out) == ["1.52"] * 2  # none for what failed
    calls = (tmp_path / "train_llama.calls").read_text().split("\n")
    assert "-c 4096 -b 4 --attention full --deterministic" in calls[0] and "--steps 8" in calls[0]


@pytest.mark.parametrize("part, rows", [("anchor", [("4096", "1024"), ("32768", "4096")]),
                                        ("anchor64", [("65536", "4096"), ("65536", "16384")])])
def test_the_steps_with_documents_are_parts_of_their_own(tmp_path, part, rows):
    bench(tmp_path, PART=part)
    calls = (tmp_path / "train_llama.calls").read_text().strip().split("\n")
    assert [re.search(r"-c (\d+) .*--generator_mean (\d+)", call).groups() for call in calls] == rows
    assert not any("--attention full" in call for call in calls)
