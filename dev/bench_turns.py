"""Causal attention, ours and cuDNN's (as torch calls it), in turn, each measured behind a second of the same products, as in
training: a GPU that has rested, or comes from something light, is faster for a moment, whoever comes first.

    python3 dev/bench_turns.py [--bench build/cuda/bench_attention] [--rounds 7] [16384 65536]

32 heads of 128, bf16; TFLOP/s of visible pairs (4 D H a pair forward, 10 backward); then the median of all rounds, and
the ratio of each round, from the smallest to the largest."""

import argparse
import re
import statistics
import subprocess
import time

H, D = 32, 128


def ours(bench, tokens):
    """Forward and backward, by a run of its own."""
    name = f"{tokens // 1024}K causal"
    done = subprocess.run([bench, name, "warm"], capture_output=True, text=True, check=True)
    row = re.search(rf"^\| {name} +\|.*? (\d+) TF/s.*?\|.*? (\d+) TF/s", done.stdout, re.M)
    return tuple(float(rate) for rate in row.groups())


class Cudnn:
    """The same of cuDNN's, with the same heat and as many calls: three to warm up, then the median of the timed ones."""

    def __init__(self):
        import torch
        self.torch = torch
        self.factors = [torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2)]

    def heat(self, seconds=1):
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            for _ in range(16):
                self.factors[0] @ self.factors[1].t()
            self.torch.cuda.synchronize()

    def ms(self, call, rounds):
        cuda = self.torch.cuda
        self.heat()
        for _ in range(3):
            call()
        times = []
        for _ in range(rounds):
            begin, end = cuda.Event(enable_timing=True), cuda.Event(enable_timing=True)
            begin.record()
            call()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end))
        return statistics.median(times)

    def rates(self, tokens):
        torch = self.torch
        from torch.nn.attention import SDPBackend, sdpa_kernel
        q, k, v, dout = (torch.randn(1, H, tokens, D, device="cuda", dtype=torch.bfloat16, requires_grad=i < 3) for i in range(4))
        rounds = 5 if tokens > 32768 else 11

        def forward():
            return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)

        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            with torch.no_grad():
                forward_ms = self.ms(forward, rounds)
            out = forward()
            backward_ms = self.ms(lambda: torch.autograd.grad(out, (q, k, v), dout, retain_graph=True), rounds)
        flops = D * H * tokens * (tokens + 1) / 2
        return 4 * flops / forward_ms / 1e9, 10 * flops / backward_ms / 1e9


def main(args, theirs):
    rates = {tokens: [] for tokens in args.tokens}
    for i in range(args.rounds):
        for tokens in args.tokens:  # who is first changes from round to round
            mine = ours(args.bench, tokens) if i % 2 == 0 else None
            other = theirs(tokens)
            mine = mine or ours(args.bench, tokens)
            rates[tokens].append((*mine, *other))
            print("round {}, {}K: ours {:.0f} / {:.0f}, cuDNN {:.0f} / {:.0f} TF/s".format(i + 1, tokens // 1024, *mine, *other),
                  flush=True)
    print("| causal | ours | cuDNN | forward, ours / cuDNN | backward |\n|---|---|---|---|---|")
    for tokens, rows in rates.items():
        middle = [statistics.median(column) for column in zip(*rows)]
        ratios = [sorted(row[i] / row[i + 2] for row in rows) for i in (0, 1)]
        print("| {}K | {:.0f} / {:.0f} | {:.0f} / {:.0f} | {} | {} |".format(
            tokens // 1024, *middle, *(f"{statistics.median(r):.2f} ({r[0]:.2f} to {r[-1]:.2f})" for r in ratios)))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tokens", nargs="*", type=int, default=[16384, 65536])
    parser.add_argument("--bench", default="build/cuda/bench_attention")
    parser.add_argument("--rounds", type=int, default=7)
    main(parser.parse_args(), Cudnn().rates)
