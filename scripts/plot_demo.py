"""The demo's picture: loss curves of both trainings, and recall by distance and depth at three moments.

    python3 scripts/plot_demo.py DEMO_FOLDER OUT.png
"""

import pathlib
import sys

import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent / "data"))
from plot import draw_loss, plt  # noqa: E402
from recall import CELLS, grid  # noqa: E402

MOMENTS = [("before.csv", "short training only"), ("base.csv", "RoPE base raised"), ("after.csv", "trained on")]


def main():
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    demo = pathlib.Path(sys.argv[1])
    figure, axes = plt.subplots(1, 4, figsize=(16, 4), layout="constrained", gridspec_kw={"width_ratios": [1.3, 1, 1, 1]})
    draw_loss(axes[0], demo / "short", "context 512")
    draw_loss(axes[0], demo / "long", "context 2048")
    axes[0].set_title("training")
    for plot, (scores, title) in zip(axes[1:], MOMENTS):
        hits, asked = grid(demo / "test.bin", demo / scores)
        with np.errstate(invalid="ignore"):
            image = plot.imshow(hits / asked, vmin=0, vmax=1, cmap="viridis", origin="lower")
        ticks, labels = np.arange(CELLS + 1) - 0.5, [f"{i * 2048 // CELLS}" for i in range(CELLS + 1)]
        plot.set_xticks(ticks, labels, fontsize=7)
        plot.set_yticks(ticks, labels, fontsize=7)
        plot.set_xlabel("distance from fact to answer (tokens)")
        plot.set_ylabel("place of the fact")
        plot.set_title(f"{title}: recall {hits.sum() / asked.sum():.2f}")
    figure.colorbar(image, ax=axes[3])
    figure.savefig(sys.argv[2], dpi=110)
    print(sys.argv[2])


if __name__ == "__main__":
    main()
