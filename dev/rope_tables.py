"""The numbers of dev/rope.md, from the folders that scripts/run_rope.sh and the commands at its end write.

    python3 dev/rope_tables.py rope

A number is "mean +- standard error over sequences", written to the error's first digit. What has not been run is left
out.
"""

import math
import pathlib
import sys

import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent / "scripts"))
from plot_rope import pick, read_csv, values  # noqa: E402

PAIR = {"d1": 0, "d2": 16}


def number(value, error):
    """1.2345, 0.0678 -> "1.23 +- 0.07"."""
    if not error or math.isnan(error):
        return f"{value:.4g}"
    places = -math.floor(math.log10(float(f"{error:.0e}")))
    if value and abs(value) < 1e-3:
        places = max(places + math.floor(math.log10(abs(value))), 0)
        return f"{value:.{places}e} +- {error:.0e}".replace("e-0", "e-")
    return f"{value:.{max(places, 0)}f} +- {error:.{max(places, 0)}f}"


def row(*cells):
    print("| " + " | ".join(str(x) for x in cells) + " |")


def heading(text, *cells):
    print(f"\n{text}\n")
    row(*cells)
    print("|" + "---|" * len(cells))


def cell(lines, column="sum_abs"):
    return number(lines[0][column], lines[0][column + "_se"]) if lines else ""


def deviations(root, folders):
    """D(0, 16) of every folder's weights."""
    shift = {f: pick(read_csv(root / f, "shift.csv"), experiment="shift", **PAIR) for f in folders}
    variants = list(dict.fromkeys(x["variant"] for lines in shift.values() for x in lines))
    heading("D(0, 16) by weights and variant", "weights", "sequences", *variants)
    for lines in shift.values():
        if lines:
            row(lines[0]["weights"], f"{lines[0]['sequences']:.0f}", *(cell(pick(lines, variant=v)) for v in variants))
    last = next((lines for lines in reversed(shift.values()) if lines), [])
    heading("the three readings, last weights", "variant", "by weights", "by columns", "signed")
    for line in last:
        row(line["variant"], *(cell([line], c) for c in ("sum_abs", "column_abs", "signed_sum")))


def one_folder(folder):
    shift, layer, head, key = (read_csv(folder, name + ".csv") for name in ("shift", "layer", "head", "key"))
    frozen = pick(shift, experiment="frozen")
    heading(f"{folder}: frozen q and k", "rounded", "D")
    for line in frozen:
        row(line["variant"], cell([line]))
    base = pick(shift, experiment="base") + pick(shift, experiment="shift", **PAIR)
    bases = sorted(values(pick(shift, experiment="base"), "base"))
    heading(f"{folder}: larger bases", "base", *(f"{b:g}" for b in bases))
    for variant in values(pick(shift, experiment="base"), "variant"):
        row(variant, *(cell(pick(base, variant=variant, base=b)) for b in bases))
    by_layer = pick(layer, **PAIR)
    numbers = values(by_layer, "layer")
    heading(f"{folder}: by layer", "variant", *(f"{x:.0f}" for x in numbers))
    for variant in values(by_layer, "variant"):
        row(variant, *(f"{x['sum_abs']:.3g}" for x in pick(by_layer, variant=variant)))
    errors = [x["sum_abs_se"] / x["sum_abs"] for x in by_layer if x["sum_abs"]]
    print(f"\nstandard errors by layer: at most {100 * max(errors, default=0):.2g}%")
    lengths(folder)
    claims(folder, shift, head, key)


def lengths(folder):
    length = read_csv(folder, "length.csv")
    at = sorted(values(length, "length"))
    heading(f"{folder}: change of the first key's logit by length", "variant", *(f"{x:g}" for x in at))
    for variant in values(length, "variant"):
        mine = pick(length, variant=variant)
        for column, name in (("logit_abs", ""), ("logit", ", signed")):
            row(variant + name, *(cell(pick(mine, length=x), column) for x in at))


def claims(folder, shift, head, key):
    """What the paper's claims are held against."""
    print(f"\n{folder}: for the claims")
    swept = pick(shift, experiment="shift", d2=16)
    for variant in values(swept, "variant"):
        mine = sorted(pick(swept, variant=variant), key=lambda x: x["d1"])
        print(f"- {variant}, D(shift, 16): " + ", ".join(f"{x['d1']:g}: {x['sum_abs']:.4g}" for x in mine))
    sample = [x for x in read_csv(folder, "sample.csv") if x["variant"] == "bf16:C" and x["d2"] == 16]
    spread = []
    for s in values(sample, "sequence"):
        d = [x["sum_abs"] for x in sample if x["sequence"] == s]
        if len(d) > 2:
            at0 = pick(sample, sequence=s, d1=0)[0]["sum_abs"]
            spread.append(f"{at0:.3f} ({100 * np.std(d) / np.mean(d):.1f}%)")
    print("- bf16:C, single sequences at shift 0 and their spread over the shifts:", ", ".join(spread))
    first = [x for x in head if x["variant"] == "bf16:C" and (x["d1"], x["d2"]) == (0, 16)]
    if first:
        mass = [x["first_mass"] for x in first]
        print(f"- bf16:C, the first key's attention: mean {100 * np.mean(mass):.3f}%, most of a head "
              f"{100 * max(mass):.3f}%")
        total, part = sum(x["sum_abs"] for x in first), sum(x["first_sum_abs"] for x in first)
        print(f"- bf16:C, its part of D: {part:.3g} of {total:.4g}, {100 * part / total:.3f}%")
    for variant in values(key, "variant"):
        mine = pick(key, variant=variant)
        inner = [x for x in mine[:-16] if x["abs"] > 0 and x["mass"] > 0]
        if inner:
            part, mass = (np.log([x[c] for x in inner]) for c in ("abs", "mass"))
            print(f"- {variant}, logarithms of the keys' parts of D against those of their attention: correlation "
                  f"{np.corrcoef(mass, part)[0, 1]:.3f}, slope {np.polyfit(mass, part, 1)[0]:.2f}")


def sinks(root, folders):
    """Of the folders sink_R and sink_R_key_K, and of `result`: what the key K (0) gets of the attention, and has of D."""
    key_of = {folder: int(folder.split("_key_")[1]) if "_key_" in folder else 0 for folder in folders}
    places = [("result", at) for at in sorted({0, *key_of.values()})] + list(key_of.items())
    heading("sinks", "folder", "network", "attention it gets", "D", "its part of D", "share", "change of its logit",
            "of other keys' logits", "place among the keys", "a unit of its attention, of the mean")
    for folder, at in places:
        shift, key, head, layer = (read_csv(root / folder, name + ".csv") for name in ("shift", "key", "head", "layer"))
        for line in pick(shift, experiment="shift", **PAIR):
            keys = pick(key, variant=line["variant"])
            heads = len(pick(head, variant=line["variant"], **PAIR))
            if not keys or not heads:
                continue
            it, others = keys[at], [x["logit_abs"] for x in keys if x["key"] != at]
            mean = sum(x["abs"] for x in keys) / sum(x["mass"] for x in keys)
            place, medians = 1 + sum(x["abs"] > it["abs"] for x in keys), it["abs"] / np.median([x["abs"] for x in keys])
            row(f"{folder}, key {at}", line["variant"], number(100 * it["mass"] / heads, 100 * it["mass_se"] / heads) + "%",
                cell([line]), cell([it], "abs"), f"{100 * it['abs'] / line['sum_abs']:.3f}%", cell([it], "logit_abs"),
                f"{np.mean(others):.4g}" if at else cell([line], "rest_logit_abs"), f"{place}, {medians:.3g} medians",
                f"{it['abs'] / it['mass'] / mean:.2f}")
            if at and folder != "result":
                print(f"  the first key's share: {100 * line['first_sum_abs'] / line['sum_abs']:.3f}%")
        by_layer = pick(layer, variant="bf16:C", **PAIR)
        if by_layer and at == 0 and folder != "result":
            print("  bf16:C by layer, attention and share of D: " + ", ".join(
                f"{100 * x['first_mass'] * len(by_layer) / heads:.0f}% {100 * x['first_sum_abs'] / x['sum_abs']:.0f}%"
                for x in by_layer))


def main():
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        sys.exit(__doc__)
    root = pathlib.Path(sys.argv[1])
    if not (root / "result/shift.csv").is_file():
        sys.exit(f"rope_tables.py: no {root}/result/shift.csv: scripts/run_rope.sh makes it")
    folders = sorted(p.parent.name for p in root.glob("*/*.csv") if p.name in ("shift.csv", "length.csv"))
    folders = list(dict.fromkeys(folders))
    steps = sorted((f for f in folders if f.startswith("step_")), key=lambda f: int(f[5:]))
    deviations(root, [f for f in folders if f.startswith("random")] + steps + ["result"])
    one_folder(root / "result")
    sinks(root, [f for f in folders if f.startswith("sink_")])
    for folder in folders:
        if folder != "result" and (root / folder / "length.csv").is_file():
            lengths(root / folder)


if __name__ == "__main__":
    main()
