"""Draws the figures of test_rope from its CSV files, on the axes of arXiv 2411.13476.

    python3 scripts/plot_rope.py rope/result                       one folder of ./test_rope
    python3 scripts/plot_rope.py rope/step_* -o rope/figures       several, such as the checkpoints of a training

figure1.png     the paper's three panels, those of them that were measured: D against the shift; per key; the first
                key's logit against the length; below on logarithmic axes, there the logit's absolute change; bars and
                bands are standard errors (of several weights, the last and the first, with the paper's variants; so
                for the next two)
figure7.png     single samples; the other sweep
layers.png      per layer, and per layer and head
causes.png      frozen queries and keys with one place of rounding at a time; larger bases; the layer-local check
training.png    D of every folder's weights, when there are several

A variant has one colour and marker in all figures; of several weights the last one's lines are solid, its markers full.
"""

import argparse
import csv
import functools
import itertools
import math
import pathlib
import sys

import numpy as np

try:  # dev/rope_tables.py reads the tables by this file's functions, and draws nothing
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
except ImportError:
    plt = None

# Figures are as wide as the text of a page, so that their letters are there as large as here: 7 points at least.
WIDTH, DPI = 6.5, 220
FONTS = {"font.size": 8, "axes.titlesize": 8, "axes.labelsize": 8, "xtick.labelsize": 7, "ytick.labelsize": 7,
         "legend.fontsize": 7}
# Of every variant, apart by colour and, in print without it, by marker.
STYLES = {"float:E": ("#888888", "v"), "float:F": ("#000000", "s"), "bf16:E": ("#56b4e9", "^"),
          "bf16:F": ("#0072b2", "D"), "bf16:C": ("#d55e00", "o"), "bf16:B": ("#e69f00", "P"),
          "bf16:A": ("#cc79a7", "x"), "bf16:D": ("#009e73", "*")}
OTHER_STYLES = itertools.cycle(zip(("#332288", "#882255", "#999933", "#44aa99", "#aa4499"), "<>phd"))
LINES = ("-", "--", ":", "-.")
# The roundings of frozen queries and keys, single places first; letter:F is angles=float once more.
FROZEN = {"letter:E": "nothing (E)", "angles=float": "fp32 angles (F)", "input=bf16": "q and k before the rotation",
          "table=bf16": "cos and sin", "rotation=bf16": "the rotation's products and sums",
          "storage=bf16": "q and k after the rotation", "logits=bf16": "logits", "angles=bf16": "bf16 angles",
          "letter:C": "as C", "letter:B": "as B", "letter:A": "as A", "letter:D": "as D"}
READINGS = {"sum_abs": "sum of |difference|", "column_abs": "sum of |column sums|", "signed_sum": "signed sum"}
KEY_COLUMNS = {"sum_abs": "abs", "column_abs": "column_abs", "signed_sum": "signed"}
TEXT = {"weights", "experiment", "variant", "angles", "keys"}


def read_csv(folder, name):
    """The lines of folder/name as dicts, numbers as floats; none when there is no such file."""
    path = pathlib.Path(folder) / name
    if not path.is_file():
        return []
    try:
        text = path.read_text()
        whole = text[:text.rfind("\n") + 1]  # a run that was stopped may have left part of a line
        lines = [{k: v if k in TEXT else float(v) for k, v in line.items()}
                 for line in csv.DictReader(whole.splitlines())]
    except (TypeError, ValueError):
        sys.exit(f"{pathlib.Path(sys.argv[0]).name}: {path}: damaged, not a table of test_rope")
    for line in lines:
        line["folder"] = str(folder)
    return lines


def pick(lines, **wanted):
    return [line for line in lines if all(line[k] == v for k, v in wanted.items())]


def values(lines, key):
    """Each key value once, in the order of its first line."""
    return list(dict.fromkeys(line[key] for line in lines))


def label(line, many):
    return f"{line['weights']}, {line['variant']}" if many else line["variant"]


def draw(axes, lines, x, y, **style):
    """y against x with its standard error; a logarithmic axis shows what is above zero."""
    lines = sorted(lines, key=lambda line: line[x])
    error = [0 if math.isnan(line[y + "_se"]) else line[y + "_se"] for line in lines]
    axes.errorbar([line[x] for line in lines], [line[y] for line in lines], error, capsize=2, linewidth=1, **style)


def draw_band(axes, lines, x, y, logarithmic, **style):
    """|y| against x as a line in a band of its standard error, for more points than bars have room for; a few of them
    have markers, evenly spaced on the axis."""
    lines = sorted(lines, key=lambda line: line[x])
    at, value, error = (np.array([line[column] for line in lines]) for column in (x, y, y + "_se"))
    value, error = abs(value), np.nan_to_num(error)
    few = np.geomspace(1, len(at), 8) - 1 if logarithmic else np.linspace(0, len(at) - 1, 8)
    axes.plot(at + 1, value, linewidth=0.7, markevery=sorted(set(few.round().astype(int).tolist())), **style)
    axes.fill_between(at + 1, np.maximum(value - error, value / 100), value + error, alpha=0.3, linewidth=0,
                      color=style["color"])


@functools.cache
def colour_and_marker(variant):
    """The same in every figure. A letter alone is a rounding without a network."""
    name = ("float:" if variant in ("E", "F") else "bf16:") + variant if len(variant) == 1 else variant
    return STYLES[name] if name in STYLES else next(OTHER_STYLES)


def style(variant, weights=0):
    """weights: 0 for the last ones, 1 for those before, and so on."""
    colour, marker = colour_and_marker(variant)
    return {"color": colour, "marker": marker, "linestyle": LINES[weights % len(LINES)],
            "markerfacecolor": "none" if weights else colour, "markersize": {"P": 5, "x": 4, "*": 5}.get(marker, 3.5)}


def legend(target, axes, **place):
    """Of everything drawn on axes, each name once; below them, where it covers nothing."""
    shown = {}
    for plot in axes:
        for handle, name in zip(*plot.get_legend_handles_labels()):
            shown.setdefault(name, handle)
    target.legend(shown.values(), shown, frameon=False, **place)


def finish(figure, path, made):
    figure.savefig(path, dpi=DPI)
    plt.close(figure)
    made.append(path)


def curves(lines, beside=()):
    """(lines, their style, label among it) for every kind of weights and variant; labels name the weights when the
    figure, which has the lines `beside` too, shows several."""
    names = values([*beside, *lines], "weights")
    for weights in values(lines, "weights"):
        for variant in values(pick(lines, weights=weights), "variant"):
            mine = pick(lines, weights=weights, variant=variant)
            before = len(names) - 1 - names.index(weights)
            yield mine, {"label": label(mine[0], len(names) > 1), **style(variant, before)}


def as_in_the_paper(tables):
    """Of several kinds of weights: the last one's float:F, bf16:C and bf16:A, and the first one's bf16:C, as figure 1 of
    the paper shows pretrained weights in bf16 and fp32 and random ones in bf16."""
    names = values(tables["shift"], "weights")
    if len(names) < 2:
        return tables
    wanted = {(names[-1], v) for v in ("float:F", "bf16:C", "bf16:A")} | {(names[0], "bf16:C")}
    return {name: [line for line in lines if (line.get("weights"), line["variant"]) in wanted]
            for name, lines in tables.items()}


def shift_axis(axes):
    """Logarithmic but for the shifts about the reference, from 0 to a little right of the last point."""
    axes.set_xscale("symlog", linthresh=20)
    axes.set_xlim(-1, 1.3 * max((line.get_xdata().max() for line in axes.lines if len(line.get_xdata())), default=20))


def most_common_d2(lines):
    d2 = [line["d2"] for line in lines]
    return max(set(d2), key=d2.count)


def by_shift(axes, shown, shift, reading, logarithmic):
    reference = most_common_d2(shift)
    all_curves = list(curves(pick(shown, d2=reference), shift))
    most = max((len(lines) for lines, _ in all_curves), default=0)
    for lines, look in all_curves:  # a line through a few of the others' points would hide what lies between
        draw(axes, lines, "d1", reading, **{**look, **({"linestyle": "none"} if len(lines) < most else {})})
    axes.set_xlabel("shift $\\Delta_1$ (tokens)" + ("" if logarithmic else ",\nsmall ones apart below"))
    axes.set_ylabel(f"D($\\Delta_1$, {reference:g}): {READINGS[reading]}")
    axes.set_title(f"attention difference,\n{shift[0]['length']:g} tokens")
    if logarithmic:
        shift_axis(axes)


def by_key(axes, shown, key, shift, reading, logarithmic):
    for lines, look in curves(shown, shift):
        draw_band(axes, lines, "key", KEY_COLUMNS[reading], logarithmic, **look)
    axes.set_xlabel("key position + 1")
    axes.set_ylabel("|its part of signed D|" if reading == "signed_sum" else "its part of D")
    axes.set_title(f"per key,\nshift {key[0]['d1']:g} against {key[0]['d2']:g}")
    if logarithmic:
        axes.set_xscale("log")


def by_length(axes, shown, shift, logarithmic):
    for lines, look in curves(shown, shift):
        draw(axes, lines, "length", "logit_abs" if logarithmic else "logit", **look)
    axes.set_xscale("log", base=2)
    axes.set_xlabel("length (tokens)")
    axes.set_ylabel("mean |change| of that logit" if logarithmic else "$D_{logit}$ of the first key")
    axes.set_title(f"first key's logit, all layers\nand heads, {'absolute' if logarithmic else 'signed'}")
    if not logarithmic:
        axes.axhline(0, color="black", linewidth=0.6)


def figure1(tables, out, reading, made):
    """Above on the paper's axes, without what is too small or too large to be seen there; below on logarithmic ones."""
    shift, key, length = pick(tables["shift"], experiment="shift"), tables["key"], tables["length"]
    panels = [name for name, lines in (("shift", shift), ("key", key), ("length", length)) if lines]
    if not panels:
        return
    if key and KEY_COLUMNS[reading] not in key[-1]:
        sys.exit(f"plot_rope.py: {key[-1]['folder']}/key.csv: has no {reading} yet; measure it again with this test_rope")
    figure, rows = plt.subplots(2, len(panels), figsize=(WIDTH, 5.4), squeeze=False, layout="constrained")
    for row, logarithmic in zip(rows, (False, True)):
        axes = dict(zip(panels, row))
        shown = {name: [x for x in lines if logarithmic or not x["variant"].endswith(":D")]
                 for name, lines in (("shift", shift), ("key", key), ("length", length))}
        if shift:
            by_shift(axes["shift"], shown["shift"], shift, reading, logarithmic)
        if key:
            by_key(axes["key"], shown["key"], key, shift, reading, logarithmic)
        if length:
            by_length(axes["length"], shown["length"], shift, logarithmic)
        for plot in row:
            plot.set_yscale("log" if logarithmic else "linear")
    legend(figure, rows.flat, loc="outside lower center", ncols=4)
    finish(figure, out / "figure1.png", made)


def figure7(tables, out, reading, made):
    shift = pick(tables["shift"], experiment="shift")
    if not shift:
        return
    figure, axes = plt.subplots(1, 2, figsize=(WIDTH, 3.6), layout="constrained")
    reference = most_common_d2(shift)
    variant = "bf16:C" if pick(shift, variant="bf16:C") else values(shift, "variant")[-1]
    samples = pick(tables["sample"], variant=variant, d2=reference)
    samples = pick(samples, weights=samples[-1]["weights"]) if samples else []
    for i, number in enumerate(values(samples, "sequence")[:5]):
        lines = sorted(pick(samples, sequence=number), key=lambda line: line["d1"])
        axes[0].plot([line["d1"] for line in lines], [line[reading] for line in lines], linewidth=1,
                     label=f"sample {number:g}",
                     **{**style(variant, i), "marker": "osv^D"[i], "markerfacecolor": "none"})
    axes[0].set_title(f"single samples, {variant}")
    axes[0].set_xlabel("shift $\\Delta_1$ (tokens)")
    axes[0].set_ylabel(f"D($\\Delta_1$, {reference:g})")
    fixed = pick(shift, d2=reference)[0]["d1"]
    other = list(curves(pick(shift, d1=fixed)))
    for lines, look in [x for x in other if len(x[0]) > 1] or other:  # random weights may have gone through no sweep
        draw(axes[1], lines, "d2", reading, **look)
    axes[1].set_yscale("log")
    axes[1].set_title("the other sweep")
    axes[1].set_xlabel("shift $\\Delta_2$ (tokens)")
    axes[1].set_ylabel(f"D({fixed:g}, $\\Delta_2$)")
    for plot in axes:
        shift_axis(plot)
        legend(plot, [plot], loc="upper center", bbox_to_anchor=(0.5, -0.18), ncols=2)
    finish(figure, out / "figure7.png", made)


def layers(tables, out, reading, made):
    layer, head = tables["layer"], tables["head"]
    if not layer or not head:  # of a run that was stopped there may be one alone
        return
    first = layer[-1]
    first = pick(layer, weights=first["weights"])[0]
    layer = pick(layer, d1=first["d1"], d2=first["d2"])
    figure, axes = plt.subplots(1, 2, figsize=(WIDTH, 3.6), layout="constrained")
    for lines, look in curves(layer):
        draw(axes[0], lines, "layer", reading, **look)
    axes[0].set_yscale("log")
    axes[0].xaxis.set_major_locator(plt.MaxNLocator(integer=True))
    axes[0].set_xlabel("layer")
    axes[0].set_ylabel(f"its part of D({first['d1']:g}, {first['d2']:g})")
    axes[0].set_title("D by layer")
    across = 3 if len(values(layer, "weights")) == 1 else 1
    legend(axes[0], axes[:1], loc="upper center", bbox_to_anchor=(0.5, -0.18), ncols=across)
    variant = "bf16:C" if pick(head, variant="bf16:C") else values(head, "variant")[-1]
    head = pick(head, variant=variant, weights=head[-1]["weights"])
    rows, columns = values(head, "layer"), values(head, "head")
    image = np.full((len(rows), len(columns)), np.nan)
    for line in head:
        image[rows.index(line["layer"]), columns.index(line["head"])] = line[reading]
    shown = axes[1].imshow(image, cmap="viridis", aspect="auto", origin="lower")
    axes[1].set_xlabel("head")
    axes[1].set_ylabel("layer")
    for ticks, at in ((axes[1].set_yticks, rows), (axes[1].set_xticks, columns)):
        step = (len(at) + 11) // 12
        ticks(range(0, len(at), step), [f"{x:g}" for x in at[::step]])
    axes[1].set_title(f"D by layer and head, {variant}")
    figure.colorbar(shown, ax=axes[1])
    finish(figure, out / "layers.png", made)


def bars(axes, lines, name, reading):
    names = [line[name] for line in lines]
    error = [0 if math.isnan(line[reading + "_se"]) else line[reading + "_se"] for line in lines]
    axes.barh(range(len(names)), [line[reading] for line in lines], xerr=error, capsize=2, color="#aaaaaa")
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_xscale("log")


def frozen_roundings(lines):
    """Of one folder's lines of shift.csv, those of frozen queries and keys as FROZEN names and orders them."""
    by_name = {line["variant"]: line for line in pick(lines, experiment="frozen")}
    return [{**by_name[name], "variant": shown} for name, shown in FROZEN.items() if name in by_name]


def relative(lines, reading):
    """D at every base as a share of that at the smallest one, each with its own standard error."""
    first = min(lines, key=lambda line: line["base"])[reading]
    return [{**line, reading: line[reading] / first, reading + "_se": line[reading + "_se"] / abs(first)}
            for line in lines]


def causes(tables, out, reading, made):
    frozen, base = (pick(tables["shift"], experiment=e) for e in ("frozen", "base"))
    local = tables["local"]
    if not (frozen or base or local):
        return
    figure, places = plt.subplot_mosaic([["frozen", "frozen"], ["base", "local"]], figsize=(WIDTH, 6.2), layout="constrained")
    axes = list(places.values())
    if frozen:
        bars(axes[0], frozen_roundings(pick(frozen, folder=frozen[-1]["folder"])), "variant", reading)
        axes[0].set_xlabel(f"D({frozen[0]['d1']:g}, {frozen[0]['d2']:g})")
    axes[0].set_title("frozen q and k: one place rounds")
    for i, (lines, look) in enumerate(curves(base)):
        apart = [{**line, "base": line["base"] * 1.15**i} for line in relative(lines, reading)]  # bars side by side
        draw(axes[1], apart, "base", reading, **look)
    if base:
        axes[1].set_xscale("log")
    axes[1].set_xlabel("RoPE base")
    axes[1].set_ylabel("D / D at the smallest base")
    axes[1].set_title("the same weights at larger bases")
    for line in local[:1]:
        for variant in values(local, "variant"):
            mine = pick(local, variant=variant, keys="first", folder=line["folder"])
            axes[2].plot([x["base"] for x in mine], [x["mean_abs"] for x in mine], linewidth=1, label=variant,
                         **style(variant))
            known = [x for x in mine if not math.isnan(x["expected"])]
            axes[2].plot([x["base"] for x in known], [x["expected"] for x in known], "ko", markersize=8,
                         markerfacecolor="none")
        axes[2].set_xscale("log")
        axes[2].set_yscale("log")
    axes[2].set_xlabel("RoPE base")
    axes[2].set_ylabel("mean |logit difference|, no $1/\\sqrt{d}$")
    axes[2].set_title("single pairs (circles: expected)")
    for plot in axes[1:]:
        legend(plot, [plot], loc="upper center", bbox_to_anchor=(0.5, -0.18), ncols=3)
    finish(figure, out / "causes.png", made)


def attention_share(tables, lines):
    """first_mass, which is summed over the heads, in per cent of one head's attention; head.csv tells how many."""
    shown = []
    for line in lines:
        heads = pick(tables["head"], folder=line["folder"], variant=line["variant"], d1=line["d1"], d2=line["d2"])
        heads = len({(x["layer"], x["head"]) for x in heads})
        if heads:
            shown.append({**line, **{c: 100 * line[c] / heads for c in ("first_mass", "first_mass_se")}})
    return shown


def coinciding(lines, y):
    """Lists of variants whose curves nobody could tell apart: at all places within a hundredth of the largest value."""
    curve = {v: {line["place"]: line[y] for line in pick(lines, variant=v)} for v in values(lines, "variant")}
    near = 0.01 * max((abs(line[y]) for line in lines), default=0)
    groups = []
    for variant, mine in sorted(curve.items(), key=lambda item: -len(item[1])):  # some have fewer places
        for group in groups:
            first = curve[group[0]]
            if mine.keys() <= first.keys() and all(abs(mine[p] - first[p]) <= near for p in mine):
                group.append(variant)
                break
        else:
            groups.append([variant])
    return groups


def training(tables, out, reading, made):
    """Every kind of weights in the order of the folders: random ones first, then a training's checkpoints."""
    shift = pick(tables["shift"], experiment="shift")
    names = values(shift, "weights")
    if len(names) < 2:
        return
    pair = next(line for line in shift if line["d2"] == most_common_d2(shift))
    shift = pick(shift, d1=pair["d1"], d2=pair["d2"])
    figure, places = plt.subplots(2, 2, figsize=(WIDTH, 5.8), layout="constrained")
    axes, beside = list(places.flat[:3]), places.flat[3]
    shift = [{**line, "place": names.index(line["weights"])} for line in shift]
    for plot, y in zip(axes, (reading, "first_logit_abs", "first_mass")):
        shown = attention_share(tables, shift) if y == "first_mass" else shift
        groups = coinciding(shown, y) if y == "first_mass" else [[v] for v in values(shown, "variant")]
        for group in groups:
            draw(plot, pick(shown, variant=group[0]), "place", y, **{"label": group[0], **style(group[0])})
        if any(len(group) > 1 for group in groups):
            same = [" = ".join(group) for group in groups if len(group) > 1]
            plot.set_title("\n".join(same) if len(groups) > 1 else "all variants alike")
        plot.set_xticks(range(len(names)), names, rotation=45, ha="right")
        plot.set_yscale("linear" if y == "first_mass" else "log")
    axes[0].set_ylabel(f"D({pair['d1']:g}, {pair['d2']:g}): {READINGS[reading]}")
    axes[1].set_ylabel("first key: mean |logit difference|")
    axes[2].set_ylabel("first key: attention (% of a head's)")
    beside.axis("off")
    legend(beside, axes, loc="center", ncols=2)
    finish(figure, out / "training.png", made)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="+")
    parser.add_argument("-o", "--out", help="folder for the figures; default: the first one")
    parser.add_argument("--reading", choices=READINGS, default="sum_abs", help="which of D's three readings")
    args = parser.parse_args()
    if plt is None:
        sys.exit("plot_rope.py: no matplotlib here")
    plt.rcParams.update(FONTS)
    names = ("shift", "layer", "head", "key", "length", "sample", "local")
    tables = {name: [line for folder in args.folder for line in read_csv(folder, name + ".csv")] for name in names}
    if not any(tables.values()):
        sys.exit(f"plot_rope.py: no CSV files of test_rope in {', '.join(args.folder)}")
    labelled = [line for name in names if name != "local" for line in tables[name]]
    folders = {}  # of each label; two that share one are told apart by their names
    for line in labelled:
        folders.setdefault(line["weights"], set()).add(line["folder"])
    for line in labelled:
        if len(folders[line["weights"]]) > 1:
            line["weights"] += f" ({line['folder']})"
    out = pathlib.Path(args.out or args.folder[0])
    out.mkdir(parents=True, exist_ok=True)
    made = []
    for figure in (figure1, figure7, layers):
        figure(as_in_the_paper(tables), out, args.reading, made)
    for figure in (causes, training):
        figure(tables, out, args.reading, made)
    print(*made, sep="\n")


if __name__ == "__main__":
    main()
