"""Does attention's deviation matter for training? The paper's four ways to pack, in miniature, with the control it lacks.

    make train_llama train_fp32_attention
    python3 scripts/rope_training.py rope/training --books books.jsonl --tokenizer tokenizer.model

Trains full, intra, intra_reset and anchor attention in bf16, and as controls full and anchor once more with everything in
fp32, and anchor in a bf16 network whose RoPE and attention are fp32 (attention_float), each with several seeds, on two
tasks: books cut into documents (11.4M parameters, context 1024), and facts to be recalled (data/recall.py, 0.1M
parameters, context 512). Scores each on the same rows (two held-out books, whole; questions) at 1, 2 and 4 times the
trained length. What is done already is not done again, so a stopped study goes on by the same command. --limit ends it
after so many seconds, once the run at hand is finished.

Writes scores.csv, table.md and training.png into the folder. Two GPUs share the work by folders of their own:

    CUDA_VISIBLE_DEVICES=0 python3 scripts/rope_training.py rope/a --runs full:bf16 anchor:bf16 --books ... &
    CUDA_VISIBLE_DEVICES=1 python3 scripts/rope_training.py rope/b --runs full:float anchor:float --books ...
    python3 scripts/rope_training.py rope/training --merge rope/a rope/b
"""

import argparse
import csv
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import numpy as np

ROOT = pathlib.Path(__file__).resolve().parent.parent
TRAINER = os.environ.get("TRAIN_LLAMA", "./train_llama")
sys.path[:0] = [str(ROOT / "data"), str(ROOT / "scripts")]
import recall  # noqa: E402
from plot_rope import DPI, FONTS, WIDTH, plt  # noqa: E402

CONTROL = os.environ.get("CONTROL", "./train_fp32_attention")
RUNS = [("full", "bf16"), ("intra", "bf16"), ("intra_reset", "bf16"), ("anchor", "bf16"), ("full", "float"),
        ("anchor", "float"), ("anchor", "attention_float")]
# Of every run, apart by colour and, in print without it, by marker.
STYLES = dict(zip(RUNS, [("#0072b2", "o"), ("#d55e00", "s"), ("#009e73", "^"), ("#000000", "D"), ("#56b4e9", "P"),
                         ("#888888", "x"), ("#cc79a7", "*")]))
TIMES, BUCKETS = (1, 2, 4), 8
RUN = ("task", "mode", "dtype", "seed")
MADE = ("commit", "device", "seconds")  # of a run, on each of its lines; files from before have none
COLUMNS = (*RUN, "times", "length", "from", "measure", "value", *MADE)
SCALES = {  # shape, context, options of the training, rows of context 1 that are scored
    "books": {
        "full": ("-e 30M --tied --layers 4 --channels 256 --heads 4 --ffn 688", 1024,
                 "-b 16 --steps 900 -l 2e-3 --schedule cosine --warmup 60", 128),
        "tiny": ("-e 30M --tied --layers 1 --channels 32 --heads 2 --ffn 64", 64,
                 "-b 4 --steps 8 -l 2e-3 --schedule cosine --warmup 4", 8),
    },
    "recall": {
        "full": ("-e tiny --tied --layers 2 --channels 64 --heads 2 --ffn 176 --rope_base 1000", 512,
                 "-b 4 --steps 2920 -l 6e-3 --schedule cosine --warmup 50 --weight_decay 0.01", 128),
        "tiny": ("-e tiny --tied --layers 1 --channels 32 --heads 2 --ffn 64 --rope_base 1000", 64,
                 "-b 4 --steps 8 -l 6e-3 --schedule cosine --warmup 4", 8),
    },
}


def execute(command):
    done = subprocess.run([str(word) for word in command], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"rope_training.py: {' '.join(map(str, command))}\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return done.stdout


def first_line(*command):
    """Of what a program prints; "" where it is not there or fails."""
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    except OSError:
        return ""
    return "" if done.returncode else done.stdout.split("\n")[0].strip()


def device_name(device):
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    gpu = device != "cpu" and first_line("nvidia-smi", "-i", chosen, "--query-gpu=name", "--format=csv,noheader")
    return gpu or ("CPU" if device != "gpu" else "GPU")


def cut(books, out, context, seed=1):
    """The books but for the last two in pieces of log-uniform length, about an eighth to four times `context` tokens of
    four letters, shuffled; the last two whole."""
    random = np.random.default_rng(seed)
    texts = [json.loads(line)["text"] for line in open(books) if line.strip()]
    if len(texts) < 3:
        sys.exit(f"rope_training.py: {books}: {len(texts)} books, two to hold out and one to train on are needed")
    pieces = []
    for text in texts[:-2]:
        at = 0
        while at < len(text):
            size = int(4 * context * np.exp(random.uniform(np.log(1 / 8), np.log(4))))
            pieces.append(text[at : at + size])
            at += size
    for name, part in (("train", [pieces[i] for i in random.permutation(len(pieces))]), ("val", texts[-2:])):
        with open(out / f"{name}.jsonl", "w") as file:
            file.writelines(json.dumps({"text": text, "source": "books"}) + "\n" for text in part)


def make_data(args, out):
    """Both tasks' token files, once; a folder is of one scale and one text."""
    data = out / "data"
    done = data / "done"
    made = {"scale": args.scale, "books": args.books, "tokenizer": args.tokenizer}
    if done.exists():
        before = json.loads(done.read_text() or "{}")
        other = [f"--{k} {before[k]}" for k in made if k in before and made[k] not in (None, before[k])]
        if other:
            sys.exit(f"rope_training.py: {out} was begun with {' '.join(other)}: pass the same, or another folder")
        return data
    for name, path in (("--books", args.books), ("--tokenizer", args.tokenizer)):
        if not (pathlib.Path(path).is_file() if path else name == "--tokenizer"):
            sys.exit(f"rope_training.py: {name} {path}: no such file")
    data.mkdir(parents=True, exist_ok=True)
    context = {task: SCALES[task][args.scale][1] for task in SCALES}
    cut(args.books, data, context["books"])
    for name in ("train", "val"):
        execute([sys.executable, "data/prepare.py", data / f"{name}.jsonl", "-o", data / f"books_{name}", "--force",
                 *(["--tokenizer", args.tokenizer] if args.tokenizer else [])])
    tokens = 6_000_000 if args.scale == "full" else 20_000
    execute([sys.executable, "data/recall.py", "train", data / "recall_train.bin", "--tokens", tokens, "--length",
             context["recall"] // 8, context["recall"] - 1])
    for times in TIMES:
        execute([sys.executable, "data/recall.py", "test", data / f"recall_test_{times}.bin", "--seed", 100 + times, "--rows",
                 SCALES["recall"][args.scale][3] // times, "--context", times * context["recall"]])
    done.write_text(json.dumps(made))
    return data


def by_position(path, length):
    """Mean loss in each eighth of the row."""
    sums, counts = np.zeros(BUCKETS), np.zeros(BUCKETS)
    for line in csv.DictReader(open(path)):
        bucket = int(line["index"]) * BUCKETS // length
        sums[bucket] += float(line["loss"])
        counts[bucket] += 1
    return sums / counts


def run_one(args, out, data, task, mode, dtype, seed):
    """Trains one model, scores it, and returns its lines of scores.csv."""
    shape, context, options, rows = SCALES[task][args.scale]
    folder = out / f"{task}_{mode}_{dtype}_{seed}"
    program = CONTROL if dtype == "attention_float" else TRAINER
    machine = ["--device", args.device, "--dtype", "bf16" if dtype == "attention_float" else dtype]
    train = data / ("books_train_0*.bin" if task == "books" else "recall_train.bin")
    folder.mkdir(exist_ok=True)
    algorithms = out / f"matmul_{task}_{dtype}.txt"  # a GPU times the products' algorithms once, not in every run
    if algorithms.exists():
        shutil.copy(algorithms, folder / "matmul.txt")
    execute([program, *shape.split(), "-i", train, "-c", context, *options.split(), "--attention", mode, *machine,
             "--seed", seed, "-o", folder, "--keep", 1, "--resume"])
    if (folder / "matmul.txt").exists():
        shutil.copy(folder / "matmul.txt", algorithms)
    steps = int(options.split()[options.split().index("--steps") + 1])
    weights = folder / f"step_{steps:08d}" / "weights.bin"
    if not weights.is_file():
        sys.exit(f"rope_training.py: {folder.name} was stopped before step {steps}; the same command goes on")
    lines = []
    for times in TIMES:
        length, scores = times * context, folder / f"scores_{times}.csv"
        test = data / ("books_val_0*.bin" if task == "books" else f"recall_test_{times}.bin")
        # The same rows for all: one document (or what is left of one) behind one BOS, every token sees all before it.
        execute([program, "-e", weights, "-j", test, "-c", length, "--val_rows", max(1, rows // times), "--eval",
                 scores, "--attention", "anchor", *machine])
        line = {"task": task, "mode": mode, "dtype": dtype, "seed": seed, "times": times, "length": length}
        if task == "books":
            for bucket, loss in enumerate(by_position(scores, length)):
                lines.append({**line, "from": bucket * length // BUCKETS, "measure": "loss", "value": loss})
        else:
            hits, asked = recall.grid(test, scores)
            lines.append({**line, "from": 0, "measure": "recall", "value": hits.sum() / asked.sum()})
    return lines


def read_scores(path):
    lines = list(csv.DictReader(open(path))) if path.exists() else []
    for line in lines:
        line.update({k: int(line[k]) for k in ("seed", "times", "length", "from")}, value=float(line["value"]))
        line.update({k: line.get(k) or "" for k in MADE})
    return lines


def merge(folders):
    """The lines of several folders' scores.csv; of one study, and every run once."""
    lines, owner, length = [], {}, {}
    for folder in folders:
        mine = read_scores(folder / "scores.csv")
        if not mine:
            sys.exit(f"rope_training.py: no {folder}/scores.csv, or nothing in it")
        for line in mine:
            run, at = tuple(line[k] for k in RUN), (line["task"], line["times"])
            if owner.setdefault(run, folder) != folder:
                sys.exit(f"rope_training.py: {' '.join(map(str, run))} is in {owner[run]} and in {folder}: leave one out")
            if length.setdefault(at, line["length"]) != line["length"]:
                sys.exit(f"rope_training.py: {folder} is of another --scale than {folders[0]}")
        lines += mine
    return lines


def mean_and_error(lines):
    """Over the seeds; each seed's value is the mean of its lines."""
    seeds = sorted({line["seed"] for line in lines})
    values = [np.mean([x["value"] for x in lines if x["seed"] == s]) for s in seeds]
    return np.mean(values), np.std(values, ddof=1) / np.sqrt(len(values)) if len(values) > 1 else np.nan


def table(lines):
    """Markdown: loss in the rows' first eighth within the trained length, in all of it, and beyond it; recall."""
    columns = [("loss, 1x", "books", 1, 0), ("loss, 2x", "books", 2, 0), ("2x, second half", "books", 2, 0.5),
               ("loss, 4x", "books", 4, 0), ("4x, last quarter", "books", 4, 0.75), ("recall, 1x", "recall", 1, 0),
               ("recall, 2x", "recall", 2, 0), ("recall, 4x", "recall", 4, 0)]
    columns = [column for column in columns if any(x["task"] == column[1] for x in lines)]
    text = "| attention | type | seeds | " + " | ".join(c[0] for c in columns) + " |\n|" + "---|" * (3 + len(columns)) + "\n"
    for mode, dtype in RUNS:
        mine = [x for x in lines if (x["mode"], x["dtype"]) == (mode, dtype)]
        if not mine:
            continue
        cells = []
        for _, task, times, part in columns:
            here = [x for x in mine if x["task"] == task and x["times"] == times and x["from"] >= part * x["length"]]
            mean, error = mean_and_error(here) if here else (np.nan, np.nan)
            cells.append((f"{mean:.3f}" if here else "") + (f" +- {error:.3f}" if error >= 0 else ""))
        text += f"| {mode} | {dtype} | {len({x['seed'] for x in mine})} | " + " | ".join(cells) + " |\n"
    return text


def how_made(lines):
    """By what the runs were made, and how long they took; what older files do not tell is said."""
    runs = list({tuple(line[k] for k in RUN): line for line in lines}.values())
    known = {k: [line[k] for line in runs if line[k]] for k in MADE}
    text = f"{len(runs)} runs"
    for key, name in ("commit", "commit"), ("device", "on"):
        text += f", {name} {', '.join(dict.fromkeys(known[key]))}" if known[key] else ""
    text += f", {sum(map(float, known['seconds'])):.0f} s" if known["seconds"] else ""
    for key in MADE:
        missing = len(runs) - len(known[key])
        text += f"; of {missing} the {key} is not recorded" if missing else ""
    return text + "."


def report(lines, out):
    text = f"{table(lines)}\n{how_made(lines)}\n"
    (out / "table.md").write_text(text)
    draw(lines, out / "training.png")
    return text


def by_eighth(lines):
    """Of one run on books at the longest length: positions, the eighths' middles, mean losses and standard errors."""
    lines = [x for x in lines if x["times"] == TIMES[-1]]
    at = sorted({x["from"] for x in lines})
    means, errors = zip(*(mean_and_error([x for x in lines if x["from"] == f]) for f in at)) if at else ((), ())
    middle = max((x["length"] for x in lines), default=0) / BUCKETS / 2
    return np.array(at) + middle, np.array(means), np.nan_to_num(errors)


def draw_books(axes, beside, lines):
    """Loss by position; beside it minus that of the first run, which tells apart what lies close together."""
    mine = {run: by_eighth([x for x in lines if (x["mode"], x["dtype"]) == run]) for run in RUNS}
    mine = {run: points for run, points in mine.items() if len(points[0])}
    first = next(iter(mine))
    for run, (at, mean, error) in mine.items():
        less = np.interp(at, *mine[first][:2])
        for plot, value in (axes, mean), (beside, mean - less):
            plot.plot(at, value, **style(run))
            plot.fill_between(at, value - error, value + error, alpha=0.15, linewidth=0, color=STYLES[run][0])
    trained = next(x["length"] // x["times"] for x in lines)
    for plot in axes, beside:
        plot.axvline(trained, color="black", linewidth=0.6, linestyle=":")
        plot.set_xlabel("position in the row;\ndotted: the trained length")
    axes.set_ylabel("loss on held-out books (nats)")
    beside.set_ylabel(f"loss minus that of {', '.join(first)}")


def draw_recall(axes, lines):
    for i, run in enumerate(RUNS):
        mine = [x for x in lines if (x["mode"], x["dtype"]) == run]
        aside = (i - (len(RUNS) - 1) / 2) * 0.05  # bars side by side
        points = [(t + aside, *mean_and_error([x for x in mine if x["times"] == t])) for t in sorted({x["times"] for x in mine})]
        if points:
            axes.errorbar(*zip(*points), capsize=2, **style(run))
    axes.set_xlabel("length,\nin trained lengths")
    axes.set_ylabel("recall")
    axes.set_xticks(TIMES)


def style(run):
    colour, marker = STYLES[run]
    return {"linewidth": 1, "markersize": 5 if marker in "Px*" else 3.5, "marker": marker, "color": colour,
            "label": ", ".join(run), "linestyle": {"float": "--", "attention_float": ":"}.get(run[1], "-")}


def draw(lines, path):
    """Means in bands, or with bars, of their standard errors over the seeds."""
    if plt is None:
        print("no matplotlib here: no figure; the same command where it is draws it")
        return
    if not lines:
        return
    plt.rcParams.update(FONTS)
    books, asked = ([x for x in lines if x["task"] == task] for task in ("books", "recall"))
    figure, plots = plt.subplots(1, 2 * bool(books) + bool(asked), figsize=(WIDTH, 3.4), squeeze=False, layout="constrained")
    if books:
        draw_books(*plots[0, :2], books)
    if asked:
        draw_recall(plots[0, -1], asked)
    shown = {name: handle for plot in plots[0] for handle, name in zip(*plot.get_legend_handles_labels())}
    figure.legend(shown.values(), shown, loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(path, dpi=DPI)
    plt.close(figure)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=pathlib.Path)
    parser.add_argument("--books", help='books, {"text": ...} a line; needed once, to make the token files')
    parser.add_argument("--tokenizer", help="SentencePiece model or tokenizer.json; none: bytes")
    parser.add_argument("--tasks", nargs="+", choices=SCALES, default=list(SCALES))
    parser.add_argument("--runs", nargs="+", help="some of " + " ".join(f"{m}:{d}" for m, d in RUNS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--scale", choices=("full", "tiny"), default="full", help="tiny: seconds on a CPU, to try it")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--data_only", action="store_true", help="make the token files, train nothing")
    parser.add_argument("--limit", type=float, default=float("inf"), help="seconds")
    parser.add_argument("--merge", nargs="+", type=pathlib.Path, metavar="FOLDER",
                        help="trains nothing: table.md and training.png of what these folders hold")
    args = parser.parse_args()
    if args.merge:
        lines = merge(args.merge)
        args.out.mkdir(parents=True, exist_ok=True)
        print(f"{report(lines, args.out)}{args.out / 'table.md'}, training.png")
        return
    wanted = args.runs or [f"{m}:{d}" for m, d in RUNS]
    unknown = [name for name in wanted if tuple(name.split(":")) not in RUNS]
    if unknown or args.seeds < 1:
        parser.error(f"--runs takes {' '.join(f'{m}:{d}' for m, d in RUNS)}, --seeds at least 1, not {unknown or args.seeds}")
    for program in {CONTROL if name.endswith("attention_float") else TRAINER for name in wanted}:
        if not (ROOT / program).is_file():
            parser.error(f"no {program} here: make {pathlib.Path(program).name}")
    args.books, args.tokenizer = (path and str(pathlib.Path(path).resolve()) for path in (args.books, args.tokenizer))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # ends the training that runs, too
    start, out = time.time(), args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    data = make_data(args, out)
    if args.data_only:
        print(data)
        return
    lines = read_scores(out / "scores.csv")
    made = {"commit": first_line("git", "rev-parse", "--short", "HEAD"), "device": device_name(args.device)}
    left = 0
    for seed in range(1, args.seeds + 1):  # seed by seed, so that an early end compares like with like
        for mode, dtype in RUNS:
            for task in args.tasks:
                mine = {"task": task, "mode": mode, "dtype": dtype, "seed": seed}
                if f"{mode}:{dtype}" not in wanted or any(all(x[k] == v for k, v in mine.items()) for x in lines):
                    continue
                if time.time() - start > args.limit:
                    left += 1
                    continue
                began = time.time()
                new = run_one(args, out, data, task, mode, dtype, seed)
                made["seconds"] = f"{time.time() - began:.1f}"
                lines += [{**line, **made} for line in new]
                with open(out / "scores.csv.tmp", "w") as file:
                    writer = csv.DictWriter(file, COLUMNS)
                    writer.writeheader()
                    writer.writerows(lines)
                os.replace(out / "scores.csv.tmp", out / "scores.csv")
                print(f"{task}, {mode}, {dtype}, seed {seed}: {time.time() - began:.0f} s", flush=True)
    print(report(lines, out) + f"{out / 'scores.csv'}, table.md, training.png" + (f"; {left} runs are left" if left else ""))


if __name__ == "__main__":
    main()
