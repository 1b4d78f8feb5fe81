"""Draws the loss curves of one or more runs from their log.jsonl.

    python3 scripts/plot.py run1 run2 -o loss.png        a run: a folder with log.jsonl, or the file itself
"""

import argparse
import json
import pathlib
import sys

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402


def read_log(run):
    """The steps and the validation losses of a run, each a list of dicts, and the tokens by then of every step, also of
    those that were skipped. Of a step that was done twice (the run was resumed) the later one counts."""
    path = pathlib.Path(run)
    path = path / "log.jsonl" if path.is_dir() else path
    lines = []
    try:
        for number, line in enumerate(path.read_text().splitlines(), 1):
            try:
                lines.append(json.loads(line))
            except json.JSONDecodeError:
                print(f"plot.py: {path}:{number}: left out, not a line of a log", file=sys.stderr)
    except OSError as error:
        sys.exit(f"plot.py: {path}: {error.strerror}")
    pick = {kind: {e["step"]: e for e in lines if e["event"] == kind} for kind in ("step", "validation")}
    tokens = {e["step"]: e["tokens"] for e in lines if e["event"] in ("step", "skip")}
    return *([events[k] for k in sorted(events)] for events in pick.values()), tokens


def smooth(values, share=0.05):
    """Mean over the last `share` of the curve, so that the trend shows."""
    width, out = max(1, int(len(values) * share)), []
    for i in range(len(values)):
        window = values[max(0, i - width + 1) : i + 1]
        out.append(sum(window) / len(window))
    return out


def draw_loss(axes, run, label=None):
    steps, validation, tokens = read_log(run)
    millions = [s["tokens"] / 1e6 for s in steps]
    losses = [s["loss"] for s in steps]
    (line,) = axes.plot(millions, losses, alpha=0.25, linewidth=0.8)
    axes.plot(millions, smooth(losses), color=line.get_color(), label=label or pathlib.Path(run).name)
    points = [(tokens[v["step"]] / 1e6, v["loss"]) for v in validation if v["step"] in tokens]
    if points:
        axes.plot(*zip(*points), "o--", color=line.get_color(), markersize=3, label="validation")
    axes.set_xlabel("million tokens")
    axes.set_ylabel("loss (nats)")
    axes.legend(frameon=False)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", nargs="+")
    parser.add_argument("-o", "--out", default="loss.png")
    args = parser.parse_args()
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for run in args.run:
        draw_loss(axes, run)
    try:
        figure.savefig(args.out, dpi=150)
    except (OSError, ValueError) as error:  # no such folder; no such format
        sys.exit(f"plot.py: {args.out}: {error}")
    print(args.out)


if __name__ == "__main__":
    main()
