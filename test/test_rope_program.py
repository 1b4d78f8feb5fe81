"""test_rope as a user runs it: its CSV files, its figures, and what it refuses."""

import csv
import math
import os
import pathlib
import re
import shutil
import struct
import subprocess
import sys

import numpy as np
import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
BINARY = os.environ.get("TEST_ROPE", str(ROOT / "test_rope"))
TRAINER = os.environ.get("TRAIN_LLAMA", str(ROOT / "train_llama"))
DEVICE = os.environ.get("TRAIN_DEVICE", "cpu")
PLOT = str(ROOT / "scripts/plot_rope.py")
sys.path.insert(0, str(ROOT / "data"))
from token_file import write_tokens  # noqa: E402

SHIFTS, VARIANTS = [0, 4, 16, 100], ["float:E", "float:F", "bf16:E", "bf16:F", "bf16:C", "bf16:B", "bf16:A", "bf16:D"]
FEW = ["--length", 96, "--lengths", "32,96,150", "--shifts", "0,4,16,100", "--sequences", 3, "--pairs", 200,
       "--bases", "1e4,1e6", "--plot=0"]


def run(*args, ok=True, cwd=None):
    done = subprocess.run([BINARY, "--device", DEVICE, *map(str, args)], capture_output=True, text=True, cwd=cwd,
                          timeout=120, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert (done.returncode == 0) == ok, done.stdout + done.stderr
    return done.stdout if ok else done.stderr


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with the weights of a few updates, and text."""
    folder = tmp_path_factory.mktemp("rope")
    random = np.random.default_rng(1)
    documents = [[1] + random.integers(3, 64, size=700).tolist() for _ in range(4)]
    write_tokens(folder / "text.bin", documents, 64, bos=1, source="test")
    subprocess.run([TRAINER, "--device", "cpu", "-e", "tiny", "--channels", "32", "--heads", "2", "--ffn", "48", "-c", "96",
                    "-i", folder / "text.bin", "-l", "1e-2", "--steps", "20", "-o", folder / "run"], check=True,
                   capture_output=True)
    shutil.copy(next((folder / "run").glob("step_*")) / "weights.bin", folder / "weights.bin")
    return folder


@pytest.fixture(scope="module")
def measured(trained):
    run("--model", trained / "weights.bin", "--data", trained / "text.bin", "--out", trained / "out", *FEW)
    return trained / "out"


def read(folder, name):
    with open(folder / f"{name}.csv") as file:
        return list(csv.DictReader(file))


def only(lines, **wanted):
    return [line for line in lines if all(line[k] == str(v) for k, v in wanted.items())]


def test_every_table_has_its_columns_and_lines(measured):
    pair = ["sum_abs", "column_abs", "signed_sum", "first_sum_abs", "first_signed", "first_logit", "first_logit_abs",
            "rest_logit_abs", "first_mass"]
    pair = [name + tail for name in pair for tail in ("", "_se")]
    front = ["variant", "base", "length", "d1", "d2"]
    for name, columns in {
        "shift": ["weights", "experiment", *front, "sequences", *pair],
        "layer": ["weights", *front, "layer", "sequences", *pair],
        "head": ["weights", *front, "layer", "head", "sequences", *pair],
        "key": ["weights", *front, "key", "sequences", "signed", "signed_se", "abs", "abs_se", "column_abs", "column_abs_se", "mass", "mass_se", "logit",
                "logit_se", "logit_abs", "logit_abs_se"],
        "length": ["weights", "variant", "base", "d1", "d2", "length", "sequences", "logit", "logit_se", "logit_abs",
                   "logit_abs_se"],
        "sample": ["weights", *front, "sequence", "sum_abs", "column_abs", "signed_sum", "first_logit"],
        "local": ["variant", "angles", "base", "keys", "pairs", "mean_abs", "expected"],
    }.items():
        lines = read(measured, name)
        assert list(lines[0]) == columns, name
        for line in lines:
            for key, value in line.items():
                if key not in ("weights", "variant", "experiment", "angles", "keys", "expected"):
                    assert math.isfinite(float(value)), (name, key, line)
    shift = read(measured, "shift")
    for variant in VARIANTS:
        swept = only(shift, experiment="shift", variant=variant)
        assert {(int(x["d1"]), int(x["d2"])) for x in swept} == {(0, 16), (4, 16), (100, 16), (0, 4), (0, 100)}
        assert len(only(read(measured, "key"), variant=variant)) == 96
        assert len(only(read(measured, "head"), variant=variant)) == 2 * 2
        assert len(only(read(measured, "layer"), variant=variant)) == 2 * 5
        assert len(only(read(measured, "sample"), variant=variant)) == 3 * 5
        assert [x["length"] for x in only(read(measured, "length"), variant=variant)] == ["32", "96", "150"]
    assert len(only(shift, experiment="base")) == 3 * 2
    assert len(only(shift, experiment="frozen")) == 6 + 7


def test_an_experiment_leaves_the_tables_of_the_others(trained, tmp_path):
    args = ["--model", trained / "weights.bin", "--data", trained / "text.bin", *FEW, "--variants", "bf16:C"]
    run(*args, "--experiments", "shift", "--out", tmp_path)
    before = (tmp_path / "shift.csv").read_bytes()
    run(*args, "--experiments", "length", "--out", tmp_path)
    assert (tmp_path / "shift.csv").read_bytes() == before and read(tmp_path, "length")
    (tmp_path / "sample.csv").write_text("mine\n")
    assert "not a table as this program writes it" in run(*args, "--experiments", "shift", "--out", tmp_path, ok=False)
    assert (tmp_path / "sample.csv").read_text() == "mine\n"
    assert "goes with shift" in run(*args, "--experiments", "other", "--out", tmp_path, ok=False)


def test_dynamic_scaling_goes_by_the_sequence(trained, tmp_path):
    """The base of a sequence, also where longer ones are measured beside it."""
    header = bytearray((trained / "weights.bin").read_bytes())
    struct.pack_into("<i", header, 4 * 16, 2)  # core/config.h: scaling
    struct.pack_into("<d", header, 80 + 8 * 2, 4.0)  # factor
    (tmp_path / "weights.bin").write_bytes(header)
    args = ["--model", tmp_path / "weights.bin", "--data", trained / "text.bin", "--length", 96, "--lengths", "150",
            "--shifts", "0,100", "--sequences", 1, "--plot=0", "--variants", "bf16:C"]
    shifts = []
    for experiments in ("shift", "shift,length"):
        run(*args, "--experiments", experiments, "--out", tmp_path / experiments.replace(",", "_"))
        shifts.append((tmp_path / experiments.replace(",", "_") / "shift.csv").read_bytes())
    assert shifts[0] == shifts[1]


def test_the_numbers_agree_with_each_other(measured):
    swept = only(read(measured, "shift"), experiment="shift", d1=0, d2=16)
    for line in swept:
        value = {k: float(v) for k, v in line.items() if k not in ("weights", "variant", "experiment")}
        assert value["sum_abs"] >= value["column_abs"] >= abs(value["signed_sum"])
        assert value["sum_abs"] >= value["first_sum_abs"] >= abs(value["first_signed"])
        mine = dict(variant=line["variant"], d1=0, d2=16)
        samples = [float(x["sum_abs"]) for x in only(read(measured, "sample"), **mine)]
        assert np.isclose(np.mean(samples), value["sum_abs"], rtol=1e-6)
        assert np.isclose(np.std(samples, ddof=1) / np.sqrt(3), value["sum_abs_se"], rtol=1e-4)
        keys = only(read(measured, "key"), **mine)
        assert np.isclose(sum(float(x["abs"]) for x in keys), value["sum_abs"], rtol=1e-6)
        assert np.isclose(float(keys[0]["abs"]), value["first_sum_abs"], rtol=1e-6)
        assert np.isclose(sum(float(x["column_abs"]) for x in keys), value["column_abs"], rtol=1e-6)
        assert all(float(x["abs"]) >= float(x["column_abs"]) >= abs(float(x["signed"])) for x in keys)
        for table in ("head", "layer"):
            parts = only(read(measured, table), **mine)
            assert np.isclose(sum(float(x["sum_abs"]) for x in parts), value["sum_abs"], rtol=1e-6)
        # The longer run's dot products may add up in another order: all that there is in E and F, nothing beside a step
        # of bf16, of which there are 96 queries' in this mean, but for a value that another order rounds to its neighbour.
        at_length = only(read(measured, "length"), variant=line["variant"], length=96)[0]
        if line["variant"][-1] not in "EF":
            assert np.isclose(float(at_length["logit_abs"]), value["first_logit_abs"], rtol=0.02 if DEVICE == "cpu" else 0.3)
    d = {line["variant"]: float(line["sum_abs"]) for line in swept}
    # A step of bf16 is 2^16 of fp32's; at positions this small fp32 angles are hardly worse than the rest of fp32.
    assert 100 * max(d["float:E"], d["float:F"]) < d["bf16:C"] < 0.5 * d["bf16:D"]
    frozen = {x["variant"]: float(x["sum_abs"]) for x in only(read(measured, "shift"), experiment="frozen")}
    assert frozen["storage=bf16"] > 100 * frozen["input=bf16"]
    assert frozen["letter:C"] > 100 * frozen["letter:F"]


def test_a_sweep_takes_some_of_the_sequences(trained, tmp_path):
    args = ["--model", trained / "weights.bin", "--data", trained / "text.bin", "--experiments", "shift,other,length,base,frozen",
            "--variants", "bf16:C", "--base_variants", "bf16:C", *FEW, "--sequences", 7]
    run(*args, "--out", tmp_path / "all")
    run(*args, "--out", tmp_path / "some", "--sweep", 2)
    every, some = ({(x["experiment"], x["variant"], x["base"], x["d1"], x["d2"]): x for x in read(tmp_path / name, "shift")}
                   for name in ("all", "some"))
    assert every.keys() == some.keys() and all(x["sequences"] == "7" for x in every.values())
    assert read(tmp_path / "all", "length") == read(tmp_path / "some", "length")
    samples = {name: only(read(tmp_path / name, "sample"), d1=4) for name in ("all", "some")}
    assert [len(x) for x in samples.values()] == [7, 2]
    # Evenly spread: those that a run of two alone would take need not be of these, but these are of the seven.
    values = {name: [float(x["sum_abs"]) for x in lines] for name, lines in samples.items()}
    assert [i for i, x in enumerate(values["all"]) if x in values["some"]] == [3, 6]
    for pair, line in some.items():
        main = pair[0] == "shift" and (pair[3], pair[4]) == ("0", "16")
        assert line["sequences"] == ("7" if main else "2"), pair
        if main:
            assert np.isclose(float(line["sum_abs"]), float(every[pair]["sum_abs"]), rtol=1e-9)
            assert np.isclose(float(line["sum_abs_se"]), float(every[pair]["sum_abs_se"]), rtol=1e-6)
        if pair[3] == "4":
            assert np.isclose(float(line["sum_abs"]), np.mean(values["some"]), rtol=1e-9)
    keys = only(read(tmp_path / "some", "key"), sequences=7)
    assert len(keys) == 96


@pytest.mark.skipif(DEVICE == "gpu", reason="double is the CPU's")
def test_in_double_nothing_moves(trained, tmp_path):
    run("--model", trained / "weights.bin", "--data", trained / "text.bin", "--out", tmp_path, "--experiments", "shift",
        "--variants", "double:E,double:C", *FEW)
    for line in read(tmp_path, "shift"):
        assert (float(line["sum_abs"]) < 1e-10) == (line["variant"] == "double:E")


def test_a_sink_draws_attention_and_leaves_exact_arithmetic_alone(trained, tmp_path):
    seen = {}
    for name, *sink in ("none",), ("first", "--sink", 4), ("tenth", "--sink", 4, "--sink_key", 10):
        run("--model", trained / "weights.bin", "--data", trained / "text.bin", "--out", tmp_path / name, "--experiments",
            "shift", "--variants", "bf16:C" + ",double:E" * (DEVICE == "cpu"), *FEW, *sink)
        keys = read(tmp_path / name, "key")
        seen[name] = {v: [float(x["mass"]) for x in only(keys, variant=v)] for v in ("bf16:C", "double:E")}
        for line in only(read(tmp_path / name, "shift"), variant="double:E"):
            assert float(line["sum_abs"]) < 1e-10, name
    for variant in ("bf16:C", "double:E")[: 1 + (DEVICE == "cpu")]:
        none, first, tenth = (seen[name][variant] for name in ("none", "first", "tenth"))
        assert first[0] > 5 * none[0] and tenth[10] > 5 * none[10]
        assert first[10] < none[10] and np.isclose(tenth[0], none[0], rtol=0.5)


def test_single_places_can_be_set_and_layers_chosen(trained, tmp_path):
    run("--model", trained / "weights.bin", "--data", trained / "text.bin", "--out", tmp_path, "--experiments", "shift",
        "--variants", "float:E,bf16:C", "--storage", "bf16", "--table", "float", "--layers", "1", *FEW)
    assert {x["d2"] for x in read(tmp_path, "shift")} == {"16"} and not (tmp_path / "length.csv").exists()
    assert {x["variant"] for x in read(tmp_path, "shift")} == {f"{n}/table=float/storage=bf16" for n in ("float:E", "bf16:C")}
    assert {x["layer"] for x in read(tmp_path, "layer")} == {"1"}
    run("--model", trained / "weights.bin", "--data", trained / "text.bin", "--out", tmp_path, "--experiments", "shift,length",
        "--variants", "bf16:C,bf16:B", "--length_variants", "float:F,bf16:B", *FEW)
    assert {x["variant"] for x in read(tmp_path, "shift")} == {"bf16:C", "bf16:B"}
    assert [x["variant"] for x in read(tmp_path, "length")] == 3 * ["float:F"] + 3 * ["bf16:B"]


def test_figures(measured, trained, tmp_path):
    pytest.importorskip("matplotlib")
    for start in ("kaiming", "normal"):
        run("--model", trained / "weights.bin", "--data", trained / "text.bin", "--out", trained / start, "--start", start,
            "--label", start, "--experiments", "shift,length", "--variants", "bf16:C,bf16:A", *FEW)
        assert {x["weights"] for x in read(trained / start, "shift")} == {start}
    folders = [trained / "kaiming", trained / "normal", measured]
    done = subprocess.run([sys.executable, PLOT, *map(str, folders), "-o", str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for name in ("figure1", "figure7", "layers", "causes", "training"):
        image = (tmp_path / f"{name}.png").read_bytes()
        assert image[:8] == b"\x89PNG\r\n\x1a\n" and len(image) > 20000
        assert int.from_bytes(image[16:20], "big") >= 1400
        assert str(tmp_path / f"{name}.png") in done.stdout
    refused = subprocess.run([sys.executable, PLOT, str(tmp_path / "nowhere")], capture_output=True, text=True)
    assert refused.returncode == 1 and "no CSV files" in refused.stderr


@pytest.mark.parametrize("reading, column", [("sum_abs", "abs"), ("column_abs", "column_abs"), ("signed_sum", "signed")])
def test_figures_are_readable_in_print_and_show_the_reading_by_key(reading, column, measured, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import plot_rope
    figures = {}

    def finish(figure, path, made):
        figure.draw_without_rendering()
        plot_rope.plt.close(figure)
        figures[path.name] = figure

    monkeypatch.setattr(plot_rope, "finish", finish)
    monkeypatch.setattr(sys, "argv", ["plot_rope.py", str(measured), "-o", str(tmp_path), "--reading", reading])
    plot_rope.main()
    shutil.copytree(measured, tmp_path / "other")
    for table in (tmp_path / "other").glob("*.csv"):
        table.write_text(table.read_text().replace("trained,", "other,"))
    figure1 = figures["figure1.png"]
    if reading == "sum_abs":
        monkeypatch.setattr(sys, "argv", ["plot_rope.py", str(measured), str(tmp_path / "other")])
        plot_rope.main()
    assert ("training.png" in figures) == (reading == "sum_abs")
    for name, figure in [*figures.items(), ("figure1.png", figure1)]:
        assert figure.get_figwidth() <= 6.5, name  # of a page's text
        sizes = {text.get_fontsize() for text in figure.findobj(plot_rope.matplotlib.text.Text) if text.get_text()}
        assert min(sizes) >= 7, name
    by_key = next(x for x in figure1.axes if "key position" in x.get_xlabel() and x.get_yscale() == "log")
    wanted = only(read(measured, "key"), variant="bf16:C")
    line = next(x for x in by_key.lines if x.get_label() == "bf16:C")
    assert np.allclose(line.get_ydata(), [abs(float(x[column])) for x in wanted])
    value, error = (np.array([float(x[c]) for x in wanted]) for c in (column, column + "_se"))
    assert len(by_key.collections) == len(VARIANTS)
    top = by_key.collections[VARIANTS.index("bf16:C")].get_paths()[0].vertices[:, 1].max()
    assert np.isclose(top, (abs(value) + error).max())
    absolute = next(x for x in figure1.axes if "absolute" in x.get_title())
    shown = next(x for x in absolute.containers if x.get_label() == "bf16:C")
    assert np.allclose(shown.lines[0].get_ydata(), [float(x["logit_abs"]) for x in only(read(measured, "length"), variant="bf16:C")])


def test_without_a_model_it_says_how_to_get_one(tmp_path):
    out = run("--pairs", 2000, "--plot=0", cwd=tmp_path)
    assert "make demo" in out and "run_rope.sh" in out and "--model weights.bin" in out
    figures = {line[0]: float(re.search(r"  ([\d.e-]+)(?:   \(|$)", line[2:])[1])
               for line in re.findall(r"^  ([EFCBAD]  .*)$", out, re.M)}
    for letter, expected in {"F": 1.25e-4, "C": 0.0254, "B": 0.0325, "A": 0.0399, "D": 4.33}.items():
        assert abs(figures[letter] / expected - 1) < 0.1
    assert figures["E"] < 1e-6


def test_without_arguments_it_takes_the_demos_model(trained, tmp_path):
    shutil.copytree(trained / "run", tmp_path / "demo/long")
    shutil.copy(trained / "text.bin", tmp_path / "demo/test.bin")
    few = ["--experiments", "shift", "--variants", "bf16:C", *FEW]
    assert "demo/long/step_00000020/weights.bin: " in run(*few, cwd=tmp_path)
    assert (tmp_path / "demo/result/shift.csv").is_file() and not (tmp_path / "rope").exists()
    # Of two models, the newest, and a word about the other; each has a folder of its own for what is measured.
    shutil.copytree(trained / "run", tmp_path / "rope/run")
    shutil.copy(trained / "text.bin", tmp_path / "rope/books_val_000000.bin")
    for newer, older in ("rope/run", "demo/long"), ("demo/long", "rope/run"):
        for folder, time in (newer, 2e9), (older, 1e9):
            os.utime(tmp_path / folder / "step_00000020/weights.bin", (time, time))
        out = run(*few, cwd=tmp_path)
        assert re.search(f"^{newer}/step_00000020/weights.bin is taken, the newest; {older}/step_00000020/weights.bin is", out)
        assert f"\n{newer}/step_00000020/weights.bin: " in out and (tmp_path / "rope/result/shift.csv").is_file()


def test_without_a_number_it_takes_as_many_sequences_as_the_data_fill(trained, tmp_path):
    """The GPU's numbers are in test_rope_experiment.cpp."""
    write_tokens(tmp_path / "few.bin", [[1] + [5, 7, 11] * 100], 64, bos=1, source="test")
    args = ["--model", trained / "weights.bin", "--data", tmp_path / "few.bin", "--variants", "bf16:C", "--shifts", "0,4",
            "--experiments", "shift,length", "--plot=0", "--length", 96, "--out", tmp_path / "out"]
    out = run(*args)
    wanted = 50 if DEVICE == "gpu" else 4
    assert (f"few.bin: 300 tokens fill 3 sequences of 96: so many are measured, not {wanted}; and 2 of 128, so --lengths "
            "ends at 64\n") in out
    assert {x["sequences"] for x in read(tmp_path / "out", "shift")} == {"3"}
    assert [x["length"] for x in read(tmp_path / "out", "length")] == ["64"]
    run(*args, "--sequences", 2)
    assert [x["length"] for x in read(tmp_path / "out", "length")] == ["64", "128"]
    assert "300 tokens are 3 sequences of 96, not 4" in run(*args, "--sequences", 4, ok=False)
    assert "do not fill one sequence of 400: pass a smaller --length" in run(*args, "--length", 400, ok=False)


@pytest.mark.parametrize("args, message", [
    (["--nonsense", "1"], "unknown option '--nonsense'"),
    (["nonsense"], "not an option"),
    (["--experiments", "shift,nonsense"], "nonsense"),
    (["--experiments", ""], "--experiments"),
    (["--variants", "float:X"], "--variants"),
    (["--variants", "half:C"], "--variants"),
    (["--variants", "float:E,"], "--variants"),
    (["--length_variants", "bf16:"], "--length_variants"),
    (["--shifts", "1,x"], "--shifts"),
    (["--shifts", "-1"], "--shifts"),
    (["--reference", "0"], "two shifts"),
    (["--bases", "1"], "--bases"),
    (["--angles", "half"], "--angles"),
    (["--length", "4k"], "--length"),
    (["--length", "1"], "--length"),
    (["--lengths", "0"], "--lengths"),
    (["--layers", "2"], "--layers"),
    (["--sink", "-1"], "--sink"),
    (["--sink_key", "96"], "--sink_key"),
    (["--layers", "1..0"], "--layers"),
    (["--sequences", "1000"], "--sequences"),
    (["--label", "a,b"], "--label"),
    (["--variants", "float:E,bf16:C,float:E"], "--variants: 'float:E,bf16:C,float:E' has float:E twice"),
    (["--length_variants", "bf16:C,bf16:C"], "has bf16:C twice"),
    (["--lengths", "32,32"], "--lengths: '32,32' has 32 twice"),
    (["--shifts", "4,0,4"], "--shifts: '4,0,4' has 4 twice"),
    (["--bases", "1e4,10000"], "--bases: '1e4,10000' has 10000 twice"),
    (["--experiments", "shift,shift"], "has shift twice"),
    (["--experiments", "local", "--layers", "0"], "--experiments local looks at none"),
    (["--start", "zeros"], "--start"),
    (["--model", "missing.bin"], "missing.bin"),
    (["--data", "missing.bin"], "missing.bin"),
    (["--data", ""], "--data"),
    (["--out", "/proc/nowhere"], "/proc/nowhere: cannot be made: No such file or directory; pass another --out\n"),
    (["--device", "gpu"], "--device cpu"),
])
def test_bad_arguments_are_refused(args, message, trained, tmp_path):
    if args[0] == "--device" and DEVICE == "gpu":
        pytest.skip("there is one")
    shown = run("--model", trained / "weights.bin", "--data", trained / "text.bin", "--out", tmp_path / "out", *FEW, *args,
                ok=False)
    assert message in shown and len(shown.strip().split("\n")) == 1, shown
    assert shown.startswith(f"{pathlib.Path(BINARY).name}: ")


@pytest.mark.parametrize("args", [["--layers", 99], ["--data", "x.bin"], ["--lengths", 64], ["--sink", 4], ["--sequences", 8],
                                  ["--experiments", "shift"], ["--experiments", "local,base"]])
def test_options_for_a_model_are_refused_where_there_is_none(args, tmp_path):
    shown = run("--pairs", 200, "--plot=0", *args, cwd=tmp_path, ok=False)
    assert f"option {args[0]} is for a model, and neither rope/run nor demo/long holds one: pass --model" in shown
    assert not (tmp_path / "rope").exists()


@pytest.fixture
def recipe(tmp_path):
    """The command of run_rope.sh in a folder of its own, where the text is there already and test_rope is not."""
    (tmp_path / "scripts").mkdir()
    for name in ("run_rope.sh", "plot_rope.py"):
        shutil.copy(ROOT / "scripts" / name, tmp_path / "scripts" / name)
    (tmp_path / "data").symlink_to(ROOT / "data")
    (tmp_path / "train_llama").symlink_to(TRAINER)
    (tmp_path / ".venv/bin").mkdir(parents=True)
    (tmp_path / ".venv/bin/python").write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    (tmp_path / ".venv/bin/python").chmod(0o755)
    (tmp_path / "rope").mkdir()
    random = np.random.default_rng(2)
    for name in ("books_000000", "books_val_000000"):  # made already, so neither text nor tokenizer is looked at
        documents = [[1] + random.integers(3, 64, size=2000).tolist()]
        write_tokens(tmp_path / f"rope/{name}.bin", documents, 64, bos=1, source="test")
    return ["sh", str(tmp_path / "scripts/run_rope.sh")]


def test_the_recipe_goes_through_its_text_eight_times_at_most(recipe, tmp_path):
    """2001 tokens; measuring is left out."""
    (tmp_path / "test_rope").write_text('#!/bin/sh\necho "$2" "$6" "$8" >> looked\n')
    (tmp_path / "test_rope").chmod(0o755)

    def start(batch, **more):
        env = {"MODEL": "-e tiny --layers 1 --channels 32 --heads 2 --ffn 48", "CONTEXT": "64", "BATCH": str(batch),
               "DEVICE": DEVICE, "OMP_NUM_THREADS": "1", **more}
        return subprocess.run([*recipe, "none.jsonl", "none.model"], capture_output=True, text=True, timeout=100,
                              env={**os.environ, **env})

    refused = "updates of {} tokens go more than 8 times through the 2001 tokens of rope/books_0*.bin: at most {} do not; {} "
    for batch, steps, most, enough in (2, 126, 125, 2016), (2, 1000, 125, 16000):
        done = start(batch, STEPS=str(steps))
        assert done.returncode == 1 and f"{steps} " + refused.format(64 * batch, most, enough) in done.stdout
    assert refused.format(2112, 7, 264000) in start(33).stdout  # too few for points on the way
    assert refused.format(1920, 8, 240000) in start(30, POINTS="1").stdout
    assert not (tmp_path / "rope/run").exists()
    done = start(28)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "through the 2001 tokens of rope/books_0*.bin: 8 are made; 224000 tokens would be enough" in done.stdout
    looked = [line.split()[0] for line in (tmp_path / "looked").read_text().splitlines()]
    assert looked == [f"rope/run/step_{n:08}/weights.bin" for n in (8, 8, 1, 2, 4, 8)]


def test_the_recipe_runs_to_its_figures(recipe, tmp_path):
    pytest.importorskip("matplotlib")
    assert "make test_rope" in subprocess.run([*recipe, "a", "b"], capture_output=True, text=True).stdout
    (tmp_path / "test_rope").symlink_to(BINARY)
    usage = subprocess.run(recipe, capture_output=True, text=True)
    assert usage.returncode == 1 and "tokenizer.model" in usage.stdout
    small = {"MODEL": "-e tiny --layers 1 --channels 32 --heads 2 --ffn 48", "CONTEXT": "64", "BATCH": "2", "STEPS": "4",
             "SAVE_EVERY": "2", "POINTS": "2", "SEQUENCES": "3", "SWEEP": "2", "DEVICE": DEVICE,
             "ROPE_OPTIONS": "--length 64 --lengths 32,64 --pairs 200 --bases 1e4,1e6 --shifts 0,100"}
    done = subprocess.run([*recipe, "none.jsonl", "none.model"], capture_output=True, text=True, timeout=300,
                          env={**os.environ, **small, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr
    assert {x["weights"] for x in read(tmp_path / "rope/step_2", "shift")} == {"step 2"}
    assert {x["weights"] for x in read(tmp_path / "rope/random_kaiming", "shift")} == {"random (kaiming)"}
    assert {x["experiment"] for x in read(tmp_path / "rope/result", "shift")} == {"shift", "base", "frozen"}
    assert {x["sequences"] for x in only(read(tmp_path / "rope/result", "shift"), d1=0, experiment="shift", d2=16)} == {"3"}
    assert {x["sequences"] for x in read(tmp_path / "rope/step_2", "shift")} == {"2"}
    assert (tmp_path / "rope/figures/training.png").is_file() and (tmp_path / "rope/result/figure1.png").is_file()
    tables = subprocess.run([sys.executable, ROOT / "dev/rope_tables.py", tmp_path / "rope"], capture_output=True, text=True)
    assert tables.returncode == 0, tables.stderr
    d = only(read(tmp_path / "rope/result", "shift"), d1=0, d2=16, experiment="shift", variant="bf16:C")[0]
    last = next(line for line in tables.stdout.splitlines() if line.startswith("| step 4 |")).split("|")
    names = next(line for line in tables.stdout.splitlines() if line.startswith("| weights |")).split("|")
    value, error = map(float, last[names.index(" bf16:C ")].split(" +- "))
    assert abs(value - float(d["sum_abs"])) <= error and error == float(f"{float(d['sum_abs_se']):.0e}")
