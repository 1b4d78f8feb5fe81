"""The tables of dev/rope.md's model of 110M parameters, from the folders that scripts/run_rope.sh writes into one.

    python3 dev/rope_tables.py rope

A number is "mean +- standard error over sequences", written to the error's first digit; "(no error)" stands where one
sequence was measured, or where all agree. Ratios of one sequence's values are paired: sum over sum, with the error of
what each sequence is off it. What has not been run is left out; a folder that lacks a table is named at the end.
"""

import math
import pathlib
import sys

import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent / "scripts"))
from plot_rope import KEY_COLUMNS, frozen_roundings, pick, read_csv, values  # noqa: E402

PAIR = {"d1": 0, "d2": 16}
left_out = []


def decimals(value, places):
    """Rounded there, which may be left of the point; never -0."""
    return f"{round(value, places) + 0.0:.{max(places, 0)}f}"


def number(value, error):
    """1.2345, 0.0678 -> "1.23 +- 0.07"; below a thousandth "1.23e-4 +- 7e-6"."""
    if math.isnan(value):
        return ""
    if not error or math.isnan(error):
        return f"{value:.4g} (no error)".replace("e-0", "e-")
    error = float(f"{error:.0e}")
    places = -int(f"{error:e}".split("e")[1])
    shown = f"{error:.0e}".replace("e-0", "e-") if places > 5 else decimals(error, places)
    rounded = round(value, places)
    if max(abs(value), error) >= 1e-3 or not rounded:
        return f"{decimals(value, places) if rounded or places <= 5 else '0'} +- {shown}"
    exponent = int(f"{rounded:e}".split("e")[1])
    return f"{rounded:.{places + exponent}e} +- {error:.0e}".replace("e-0", "e-")


def significant(value, digits=2):
    """0.1234 -> "0.12", 0.1 -> "0.10", 2.71e-6 -> "2.7e-6"."""
    rounded = float(f"{value:.{digits - 1}e}")
    exponent = int(f"{rounded:e}".split("e")[1])
    if rounded and exponent < -3:
        return f"{rounded:.{digits - 1}e}".replace("e-0", "e-")
    return decimals(rounded, digits - 1 - exponent)


def percent(value):
    return significant(100 * value) + "%"


def short(value):
    return f"{value:g}".replace("e+0", "e")


def table(text, columns, rows):
    """In markdown; nothing without rows."""
    rows = [list(map(str, row)) for row in rows]
    if not rows:
        return
    print(f"\n{text}\n")
    for row in [columns, ["---"] * len(columns), *rows]:
        print("| " + " | ".join(row) + " |")


def cell(lines, column="sum_abs", times=1):
    return number(times * lines[0][column], times * lines[0][column + "_se"]) if lines else ""


def paired(above, below):
    """Ratio of the sums of two values of each sequence, and its error."""
    above, below = np.array(above), np.array(below)
    if not below.all():
        return math.nan, math.nan
    ratio = above.sum() / below.sum()
    off = (above - ratio * below) / below.mean()
    return ratio, np.std(off, ddof=1) / math.sqrt(len(off)) if len(off) > 1 else math.nan


def deviations(root, folders):
    """D(0, 16) of every folder's weights."""
    shift = {f: pick(read_csv(root / f, "shift.csv"), experiment="shift", **PAIR) for f in folders}
    shift = {folder: lines for folder, lines in shift.items() if lines}
    variants = list(dict.fromkeys(x["variant"] for lines in shift.values() for x in lines))
    table("D(0, 16) by weights and variant", ["weights", "sequences", *variants],
          [[lines[0]["weights"], f"{lines[0]['sequences']:.0f}", *(cell(pick(lines, variant=v)) for v in variants)]
           for lines in shift.values()])
    for lines in list(shift.values())[-1:]:
        table(f"the three readings, {lines[0]['weights']}", ["variant", "by weights", "by columns", "signed"],
              [[x["variant"], *(cell([x], c) for c in ("sum_abs", "column_abs", "signed_sum"))] for x in lines])


def one_folder(folder):
    shift, layer, key = (read_csv(folder, name + ".csv") for name in ("shift", "layer", "key"))
    table(f"{folder}: frozen q and k, D(0, 16)", ["rounded", "D"],
          [[line["variant"], cell([line])] for line in frozen_roundings(shift)])
    larger_bases(folder, shift)
    by_layer = pick(layer, **PAIR)
    numbers = sorted(values(by_layer, "layer"))
    table(f"{folder}: D(0, 16) by layer", ["variant", *(f"{x:.0f}" for x in numbers)],
          [[variant, *(significant(at[n]) if n in at else "" for n in numbers)] for variant in values(by_layer, "variant")
           for at in [{x["layer"]: x["sum_abs"] for x in pick(by_layer, variant=variant)}]])
    errors = [x["sum_abs_se"] / x["sum_abs"] for x in by_layer if x["sum_abs"] and not math.isnan(x["sum_abs_se"])]
    if errors:
        print(f"\nstandard errors by layer: at most {percent(max(errors))}")
    lengths(folder)
    by_shift(folder, shift)
    first_key(folder, shift, read_csv(folder, "head.csv"), key)
    by_attention(folder, key)


def larger_bases(folder, shift):
    base = pick(shift, experiment="base")
    bases, variants = sorted(values(base, "base")), values(base, "variant")
    at = {(x["variant"], x["base"]): x for x in base}
    columns = ["variant", *map(short, bases)]
    table(f"{folder}: D(0, 16) by RoPE base", columns,
          [[v, *(cell([at[v, b]] if (v, b) in at else []) for b in bases)] for v in variants])
    single = {(x["variant"], x["base"], x["sequence"]): x["sum_abs"] for x in read_csv(folder, "base.csv")}

    def against_first(v, b):
        both = [(d, single[v, bases[0], i]) for (u, c, i), d in single.items()
                if (u, c) == (v, b) and (v, bases[0], i) in single]
        return number(*paired(*zip(*both))) if both else ""

    if single:
        table(f"{folder}: D(0, 16) at a base / at {short(bases[0])}, of the same sequences", ["variant", *columns[2:]],
              [[v, *(against_first(v, b) for b in bases[1:])] for v in variants if len(bases) > 1])
    elif base:
        left_out.append(f"{folder}: no base.csv, so no ratios of bases")


def lengths(folder):
    length = read_csv(folder, "length.csv")
    at = sorted(values(length, "length"))
    table(f"{folder}: change of the first key's logit by length, summed over the heads",
          ["variant", "mean of", *(f"{x:g}" for x in at)],
          [[variant, kind, *(cell(pick(length, variant=variant, length=x), column) for x in at)]
           for variant in values(length, "variant") for column, kind in (("logit_abs", "absolute"), ("logit", "signed"))])


def by_shift(folder, shift):
    swept = pick(shift, experiment="shift", d2=16)
    variants = values(swept, "variant")
    table(f"{folder}: D(shift, 16)", ["shift", "sequences", *variants],
          [[short(s), short(pick(swept, d1=s)[0]["sequences"]), *(cell(pick(swept, variant=v, d1=s)) for v in variants)]
           for s in sorted(values(swept, "d1"))])
    sample = pick(read_csv(folder, "sample.csv"), d2=16)
    at = {(x["variant"], x["d1"], x["sequence"]): x["sum_abs"] for x in sample}
    variants, rows = values(sample, "variant"), []
    for s in sorted(set(values(sample, "d1")) - {0}):
        both = {v: [(at[v, s, i], at[v, 0, i]) for i in values(sample, "sequence") if {(v, s, i), (v, 0, i)} <= at.keys()]
                for v in variants}
        rows.append([short(s), max(map(len, both.values())),
                     *(number(*paired(*zip(*both[v]))) if both[v] else "" for v in variants)])
    table(f"{folder}: D(shift, 16) / D(0, 16) of the same sequences", ["shift", "sequences", *variants], rows)
    rows = []
    for sequence in values(pick(sample, variant="bf16:C"), "sequence"):
        d = {x["d1"]: x["sum_abs"] for x in pick(sample, variant="bf16:C", sequence=sequence)}
        if len(d) > 2:
            rows.append([f"{sequence:g}", significant(d[0], 4) if 0 in d else "",
                         percent(np.std(list(d.values()), ddof=1) / np.mean(list(d.values())))])
    table(f"{folder}: single sequences, bf16:C", ["sequence", "D(0, 16)", "standard deviation over the shifts"], rows)


def share(part, whole):
    return f"{100 * part / whole:.3f}%" if whole else ""


def first_key(folder, shift, head, key):
    """Its part of D in all three readings; of the signed one, which may be as good as 0, beside it and not as a share."""
    attention, parts = [], []
    for line in pick(shift, experiment="shift", **PAIR):
        variant = {"variant": line["variant"]}
        mass = [x["first_mass"] for x in pick(head, **variant, **PAIR)]
        first = pick(key, key=0, **variant, **PAIR)
        if mass:
            attention.append([line["variant"], len(mass), f"{100 * np.mean(mass):.3f}%", f"{100 * max(mass):.3f}%"])
        if first and first[0].keys() >= set(KEY_COLUMNS.values()):
            by_weights, by_columns, signed = (cell(first, column) for column in KEY_COLUMNS.values())
            parts.append([line["variant"], by_weights, share(first[0]["abs"], line["sum_abs"]), by_columns,
                          share(first[0]["column_abs"], line["column_abs"]), signed, cell([line], "signed_sum")])
    table(f"{folder}: the first key's attention", ["variant", "heads", "mean of the heads", "most of a head"], attention)
    table(f"{folder}: the first key's part of D(0, 16)", [
        "variant", "by weights", "share", "by columns", "share by columns", "signed", "all keys, signed"], parts)


def by_attention(folder, key):
    """The keys' parts of D against their attention, but for the last 16, which few queries see."""
    rows = []
    for variant in values(pick(key, **PAIR), "variant"):
        inner = [x for x in pick(key, variant=variant, **PAIR)
                 if x["key"] < x["length"] - 16 and x["abs"] > 0 and x["mass"] > 0]
        if len(inner) > 2:
            part, mass = (np.log([x[c] for x in inner]) for c in ("abs", "mass"))
            rows.append([variant, len(inner), decimals(np.corrcoef(mass, part)[0, 1], 3),
                         decimals(np.polyfit(mass, part, 1)[0], 2)])
    table(f"{folder}: logarithm of a key's part of D against that of its attention",
          ["variant", "keys", "correlation", "slope"], rows)


def sink_name(folder):
    """sink_6 -> ("6", 0), sink_6_key_1000 -> ("6", 1000), others -> None."""
    words = folder.split("_")
    try:
        return (words[1], int(words[3]) if words[2:3] == ["key"] else 0) if len(words) in (2, 4) else None
    except ValueError:
        return None


def against(samples, reference, variant):
    """A sink's D over that without one, and of how many sequences: the same in both, known by their places in the data;
    None when there are none."""
    def by_place(lines):
        return {x["place"]: x["sum_abs"] for x in pick(lines, variant=variant, **PAIR) if "place" in x}

    mine, without = by_place(samples), by_place(reference)
    same = sorted(mine.keys() & without.keys())
    return [number(*paired(*zip(*((mine[p], without[p]) for p in same)))), len(same)] if same else None


def sinks(root, folders):
    """Of the folders sink_R and sink_R_key_K: what the key K (0) gets of the attention, and has of D; and the same keys of
    the same sequences without a sink, in sink_0, the same command with --sink 0."""
    named = {folder: sink_name(folder) for folder in folders}
    for folder in (f for f in folders if named[f] is None):
        left_out.append(f"{folder}: its name is not sink_R or sink_R_key_K")
    named = {folder: name for folder, name in named.items() if name and folder != "sink_0"}
    without = "sink_0"
    if named and without not in folders:
        left_out.append("D without a sink: no sink_0, of the same sequences by --sink 0")
    places = [(without, "none", at) for at in sorted({at for _, at in named.values()}) if without in folders]
    places += [(folder, *name) for folder, name in named.items()]
    tables = {folder: {name: read_csv(root / folder, name + ".csv") for name in ("shift", "key", "head", "layer", "sample")}
              for folder in {without, *(folder for folder, _, _ in places)}}
    attention, part, ratio, layers, first, numbers = [], [], [], [], [], []
    for folder, raised, at in places:
        t = tables[folder]
        missing = [name for name in ("shift", "key", "head") if not t[name]]
        if missing:
            left_out.append(f"{folder}: no {', '.join(name + '.csv' for name in missing)}")
            continue
        for line in pick(t["shift"], experiment="shift", **PAIR):
            variant = {"variant": line["variant"]}
            keys = pick(t["key"], **variant, **PAIR)
            heads = len(pick(t["head"], **variant, **PAIR))
            it = pick(keys, key=at)
            if not it or not heads:
                left_out.append(f"{folder}, {line['variant']}: no key {at}, or no heads")
                continue
            front = [folder, at, raised, line["variant"]]
            all_mass, all_parts = sum(x["mass"] for x in keys), sum(x["abs"] for x in keys)
            median = np.median([x["abs"] for x in keys])
            others = [x["logit_abs"] for x in keys if x["key"] != at]
            attention.append([*front, cell(it, "mass", 100 / heads), f"{100 * it[0]['mass'] / all_mass:.3f}",
                              cell(it, "logit_abs"),
                              significant(np.mean(others), 4) if at else cell([line], "rest_logit_abs")])
            part.append([*front, cell([line]), cell(it, "abs"), f"{100 * it[0]['abs'] / line['sum_abs']:.3f}",
                         1 + sum(x["abs"] > it[0]["abs"] for x in keys),
                         significant(it[0]["abs"] / median, 3) if median else "",
                         significant(it[0]["abs"] / it[0]["mass"] / (all_parts / all_mass)) if all_parts else ""])
            if folder == without:
                continue
            same = against(t["sample"], tables[without]["sample"], line["variant"])
            if same:
                ratio.append([*front, *same])
            elif without in folders:
                left_out.append(f"{folder}, {line['variant']}: D against none: {without} has none of its sequences")
            if at:
                first.append([*front, f"{100 * line['first_sum_abs'] / line['sum_abs']:.3f}"])
            by_layer = {} if at else {x["layer"]: x for x in pick(t["layer"], **variant, **PAIR)}
            numbers = sorted({*numbers, *by_layer})
            layers += [[folder, line["variant"], "a head's attention", {n: 100 * x["first_mass"] * len(by_layer) / heads
                                                                        for n, x in by_layer.items()}],
                       [folder, line["variant"], "D", {n: 100 * x["first_sum_abs"] / x["sum_abs"]
                                                       for n, x in by_layer.items() if x["sum_abs"]}]] if by_layer else []
    front = ["folder", "key", "raised by", "variant"]
    table("sinks: the key's attention, and how far its logit moves", [
        *front, "attention it gets, % of a head's", "% of all keys' attention, n_j-weighted", "change of its logit",
        "change of other keys' logits"], attention)
    table("sinks: the key's part of D(0, 16)", [
        *front, "D", "the key's part", "% of D", "rank among the keys", "in parts of the median key",
        "part for its attention, in that of all keys"], part)
    table("sinks: D(0, 16) with the sink / without, of the same sequences", [*front, "ratio", "sequences"], ratio)
    table("sinks at other keys: the first key", [*front, "% of D"], first)
    table("sinks by layer", ["folder", "variant", "% of", *map(short, numbers)],
          [[*front, *(significant(at[n]) if n in at else "" for n in numbers)] for *front, at in layers])


def rounded_weights(root):
    """D of the variants that tell P V and the logits from RoPE, over bf16:C of the same sequences."""
    lines = pick(read_csv(root / "weights", "sample.csv"), **PAIR)
    d = {v: {x["place"]: x["sum_abs"] for x in pick(lines, variant=v)} for v in values(lines, "variant")}
    mean = {x["variant"]: x for x in pick(read_csv(root / "weights", "shift.csv"), experiment="shift", **PAIR)}
    under = d.get("bf16:C", {})
    rows = []
    for variant, mine in d.items():
        both = [(mine[place], under[place]) for place in mine if place in under]
        rows.append([variant, len(mine), cell([mean[variant]]), number(*paired(*zip(*both))) if both else ""])
    table("P V and the logits apart from RoPE: D(0, 16)", [
        "variant", "sequences", "D", "D / that of bf16:C, of the same sequences"], rows)


def by_number(folder):
    """step_125 before step_1000, and step_final behind."""
    number = folder[5:]
    return (0, int(number), "") if number.isdecimal() else (1, 0, number)


def main():
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        sys.exit(__doc__)
    root = pathlib.Path(sys.argv[1])
    if not (root / "result/shift.csv").is_file():
        sys.exit(f"rope_tables.py: no {root}/result/shift.csv: scripts/run_rope.sh makes it")
    folders = sorted({p.parent.name for p in root.glob("*/*.csv") if p.name in ("shift.csv", "length.csv")})
    steps = sorted((f for f in folders if f.startswith("step_")), key=by_number)
    deviations(root, [f for f in folders if f.startswith("random")] + steps + ["result"])
    one_folder(root / "result")
    for name in "paper_random", "paper":
        by_shift(root / name, read_csv(root / name, "shift.csv"))
    rounded_weights(root)
    sinks(root, [f for f in folders if f.startswith("sink_")])
    for folder in folders:
        if folder != "result":
            lengths(root / folder)
    if left_out:
        print("\nleft out:", *dict.fromkeys(left_out), sep="\n- ")


if __name__ == "__main__":
    main()
