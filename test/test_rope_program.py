"""test_rope as a user runs it: its CSV files, its figures, and what it refuses."""

import csv
import fcntl
import math
import os
import pathlib
import re
import shutil
import struct
import subprocess
import sys
import time

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
    assert not ok or "--progress" in args or not done.stderr, done.stderr
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
        "sample": ["weights", *front, "sequence", "sum_abs", "column_abs", "signed_sum", "first_logit", "place"],
        "base": ["weights", *front, "sequence", "sum_abs", "column_abs", "signed_sum", "first_logit", "place"],
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
    for line in only(shift, experiment="base"):
        single = [float(x["sum_abs"]) for x in only(read(measured, "base"), variant=line["variant"], base=line["base"])]
        assert len(single) == 3 and np.isclose(np.mean(single), float(line["sum_abs"]), rtol=1e-7)
    assert len(only(shift, experiment="frozen")) == 6 + 7


@pytest.mark.host_only
def test_an_experiment_leaves_the_tables_of_the_others(trained, tmp_path):
    args = ["--model", trained / "weights.bin", "--data", trained / "text.bin", *FEW, "--variants", "bf16:C"]
    run(*args, "--experiments", "shift", "--out", tmp_path)
    before = (tmp_path / "shift.csv").read_bytes()
    run(*args, "--experiments", "length", "--out", tmp_path)
    assert (tmp_path / "shift.csv").read_bytes() == before and read(tmp_path, "length")
    columns = (tmp_path / "sample.csv").read_text().split("\n")[0]
    (tmp_path / "sample.csv").write_text("weights,variant,base\n1,2,3\n")  # a table of an older program is replaced
    run(*args, "--experiments", "shift", "--out", tmp_path)
    assert (tmp_path / "sample.csv").read_text().startswith(columns + "\n")
    (tmp_path / "sample.csv").write_text("mine\n")
    assert "not a table as this program writes it" in run(*args, "--experiments", "shift", "--out", tmp_path, ok=False)
    assert (tmp_path / "sample.csv").read_text() == "mine\n"
    assert "goes with shift" in run(*args, "--experiments", "other", "--out", tmp_path, ok=False)


@pytest.mark.host_only
def test_two_at_once_do_not_share_a_folder(trained, tmp_path):
    few = ["--pairs", 200, "--experiments", "local", "--plot=0", "--out", tmp_path]
    busy = f"{tmp_path}: another test_rope writes its tables there; wait for it, or pass another --out\n"
    with open(tmp_path / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert run(*few, ok=False).endswith(busy) and not (tmp_path / "local.csv").exists()
    run(*few)
    before = (tmp_path / "local.csv").read_bytes()
    long = subprocess.Popen([BINARY, "--device", DEVICE, *map(str, [*few, "--pairs", 10000000])], stdout=subprocess.DEVNULL)
    try:
        for _ in range(1000):
            with open(tmp_path / "lock") as lock:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    break
            time.sleep(0.01)
        assert long.poll() is None and run(*few, ok=False).endswith(busy)
    finally:
        long.kill()
        long.wait()
    run(*few)
    assert (tmp_path / "local.csv").read_bytes() == before


def test_long_work_says_how_far_it_is(trained, tmp_path):
    args = ["--model", trained / "weights.bin", "--data", trained / "text.bin", "--out", tmp_path, *FEW, "--sweep", 2,
            "--experiments", "shift,length,base,frozen", "--variants", "float:F,bf16:C", "--base_variants", "bf16:C"]

    def run_both(*more):
        done = subprocess.run([BINARY, "--device", DEVICE, *map(str, [*args, *more])], capture_output=True, text=True,
                              timeout=120, env={**os.environ, "OMP_NUM_THREADS": "1"})
        assert done.returncode == 0, done.stderr
        return re.sub(r"[\d.]+ s$", "", done.stdout, flags=re.M), done.stderr.splitlines()

    short, silent = run_both()
    out, lines = run_both("--progress", 0)
    assert short == out and not silent
    seen = [re.fullmatch(r"(.*): (\d+) of (\d+) sequences, \d+ s", line).groups() for line in lines]
    passes = {what: [int(done) for name, done, _ in seen if name == what] for what, _, _ in seen}
    # Three shifts beside the reference for two sequences, one for the third.
    assert passes == {"frozen": [0, 1], "base 10000 bf16:C": [0, 0, 1, 1], "base 1e+06 bf16:C": [0, 0, 1, 1]} | {
        f"{what} {v}": done for v in ("float:F", "bf16:C")
        for what, done in (("shift", [0] * 4 + [1] * 4 + [2] * 2), ("length", [0, 0, 1, 1, 2, 2]))}
    assert {count for what, _, count in seen if what.split()[0] in ("shift", "length")} == {"3"}
    assert {count for what, _, count in seen if what.split()[0] in ("base", "frozen")} == {"2"}
    assert run_both("--progress", 1000) == (out, [])


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
    # The same place in the data, the same text; rows of 150 tokens, the longest length, are cut from it.
    places = {name: {int(x["place"]): x["sum_abs"] for x in lines} for name, lines in samples.items()}
    rows = 4 * 699 // 149
    assert list(places["all"]) == [i * rows // 7 * 149 for i in range(7)]
    assert list(places["some"].items()) == [list(places["all"].items())[i] for i in (3, 6)]
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


@pytest.mark.parametrize("place", ["angles", "input", "table", "rotation", "storage", "logits", "weights"])
def test_every_place_rounds_what_it_names(place, trained, tmp_path):
    """By its option and, with the same bits, within a variant."""
    few = ["--model", trained / "weights.bin", "--data", trained / "text.bin", "--experiments", "shift", *FEW]
    run(*few, "--out", tmp_path / "plain", "--variants", "float:E,bf16:E")
    run(*few, "--out", tmp_path / "option", "--variants", "float:E,bf16:E", f"--{place}", "bf16")
    run(*few, "--out", tmp_path / "variant", "--variants", f"float:E/{place}=bf16,bf16:E/{place}=bf16")
    for name in "shift", "layer":
        assert read(tmp_path / "option", name) == read(tmp_path / "variant", name)

    def layers(folder, variant):
        return [float(x["sum_abs"]) for x in only(read(folder, "layer"), variant=variant, d1=0, d2=16)]

    for network in "float", "bf16":
        plain, rounded = layers(tmp_path / "plain", f"{network}:E"), layers(tmp_path / "option", f"{network}:E/{place}=bf16")
        assert len(rounded) == 2
        if place == "weights":  # is behind what is measured of the first layer
            assert rounded[0] == plain[0] and rounded[1] != plain[1]
        elif (place, network) == ("input", "bf16"):
            assert rounded == plain  # they are so already
        else:
            assert rounded[0] != plain[0]
        if place in ("angles", "table", "rotation", "storage"):
            assert rounded[0] > 100 * plain[0]


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
    for place, column, scale in (2, "logit", "linear"), (5, "logit_abs", "log"):
        shown = next(x for x in figure1.axes[place].containers if x.get_label() == "bf16:C")
        wanted = [float(x[column]) for x in only(read(measured, "length"), variant="bf16:C")]
        assert np.allclose(shown.lines[0].get_ydata(), wanted) and figure1.axes[place].get_yscale() == scale


def test_figure1_has_the_panels_that_were_measured(measured, tmp_path, drawn):
    """The paper's, side by side: D by shift, by key, the logit by length; above on linear axes, below on logarithmic ones."""
    for tables, columns in ("shift key length", 3), ("shift key", 2), ("length", 1):
        folder = tmp_path / tables.replace(" ", "_")
        folder.mkdir()
        for name in tables.split():
            shutil.copy(measured / f"{name}.csv", folder)
        axes = drawn(folder)["figure1.png"].axes
        assert [x.get_yscale() for x in axes] == ["linear"] * columns + ["log"] * columns
        labels = [x.get_xlabel().split()[0] for x in axes]
        assert labels == 2 * [{"shift": "shift", "key": "key", "length": "length"}[name] for name in tables.split()]
        assert all(x.containers or x.collections for x in axes)


@pytest.fixture
def drawn(monkeypatch):
    """draw(folders) -> {name: figure} of plot_rope.py."""
    pytest.importorskip("matplotlib")
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import plot_rope

    def draw(*folders):
        figures = {}
        monkeypatch.setattr(plot_rope, "finish", lambda figure, path, made: figures.update({path.name: figure}))
        monkeypatch.setattr(sys, "argv", ["plot_rope.py", *map(str, folders)])
        plot_rope.main()
        for figure in figures.values():
            plot_rope.plt.close(figure)
        return figures

    return draw


def curve(axes, name):
    """The line that the legend calls so."""
    found = [x.lines[0] for x in axes.containers if x.get_label() == name and hasattr(x, "lines")]
    return (found or [x for x in axes.lines if x.get_label() == name])[0]


def test_a_variant_looks_the_same_everywhere(measured, trained, tmp_path, drawn):
    run("--model", trained / "weights.bin", "--data", trained / "text.bin", "--out", tmp_path, "--start", "kaiming", "--label",
        "random", "--experiments", "shift", "--variants", "bf16:C,bf16:A", *FEW, "--shifts", "0,4")
    one, two = drawn(measured), drawn(tmp_path, measured)
    looks, lines = {}, []
    for figures, last in (one, ""), (two, "trained, "):
        for name, figure in figures.items():
            for axes in figure.axes:
                for label in axes.get_legend_handles_labels()[1]:
                    line = curve(axes, label)
                    variant = label.removeprefix("random, ").removeprefix("trained, ")
                    if variant in VARIANTS:
                        looks.setdefault(variant, set()).add((line.get_color(), line.get_marker()))
                        full = line.get_markerfacecolor() != "none"
                        assert full == (not label.startswith("random, ")), (name, label)
                    elif variant in "FECBAD":
                        network = "float" if variant in "EF" else "bf16"
                        looks[f"{network}:{variant}"].add((line.get_color(), line.get_marker()))
                    lines.append(label)
    assert looks.keys() == set(VARIANTS) and all(len(look) == 1 for look in looks.values())
    assert len(set().union(*looks.values())) == len(VARIANTS)
    for part in (0, 1):  # of colour and marker each
        assert len({list(look)[0][part] for look in looks.values()}) == len(VARIANTS)
    assert "random, bf16:C" in lines and "trained, bf16:A" in lines
    by_shift = next(x for x in two["figure1.png"].axes if x.get_xscale() == "symlog")
    assert curve(by_shift, "random, bf16:C").get_linestyle() == "None"  # two shifts, the others four
    assert curve(by_shift, "trained, bf16:C").get_linestyle() == "-"
    other = two["figure7.png"].axes[1]
    assert "random, bf16:C" not in other.get_legend_handles_labels()[1]  # went through no other sweep
    assert other.get_xlim()[1] == pytest.approx(130)


def test_causes_have_their_names_and_bases_are_relative(measured, drawn):
    frozen, base, _ = drawn(measured)["causes.png"].axes
    assert [x.get_text() for x in frozen.get_yticklabels()] == [
        "nothing (E)", "fp32 angles (F)", "q and k before the rotation", "cos and sin", "the rotation's products and sums",
        "q and k after the rotation", "logits", "bf16 angles", "as C", "as B", "as A", "as D"]
    shift = read(measured, "shift")
    wanted = [float(only(shift, experiment="frozen", variant=v)[0]["sum_abs"]) for v in ("table=bf16", "letter:A")]
    assert np.allclose([frozen.patches[i].get_width() for i in (3, 10)], wanted)
    d = [float(x["sum_abs"]) for x in only(shift, experiment="base", variant="bf16:C")]
    assert base.get_yscale() == "linear" and np.allclose(curve(base, "bf16:C").get_ydata(), np.array(d) / d[0])


def test_the_first_keys_attention_is_a_share_of_a_head(measured, trained, tmp_path, drawn):
    run("--model", trained / "weights.bin", "--data", trained / "text.bin", "--out", tmp_path, "--start", "kaiming", "--label",
        "random", "--experiments", "shift", "--variants", "bf16:C,bf16:A", *FEW, "--shifts", "0,4")
    mass = drawn(tmp_path, measured)["training.png"].axes[2]
    alike = mass.containers
    assert len(alike) == 1 and mass.get_title() == "all variants alike"
    wanted = [float(only(read(folder, "shift"), experiment="shift", d1=0, d2=16, variant=alike[0].get_label())[0]["first_mass"])
              for folder in (tmp_path, measured)]
    assert np.allclose(alike[0].lines[0].get_ydata(), 100 * np.array(wanted) / 4)  # 2 layers of 2 heads


def test_curves_that_differ_are_both_drawn(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    from plot_rope import coinciding
    lines = [{"variant": v, "place": p, "y": y} for v, some in {"a": [1, 2], "b": [1.009, 2.015], "c": [1, 2.03]}.items()
             for p, y in enumerate(some)] + [{"variant": "d", "place": 1, "y": 2.03}]
    assert coinciding(lines, "y") == [["a", "b"], ["c", "d"]]


@pytest.mark.host_only
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
    *(([f"--{place}", "half"], f"--{place}") for place in ("angles", "input", "table", "rotation", "storage", "logits", "weights")),
    (["--input", "double"], "--input"),
    (["--variants", "bf16:E/"], "'bf16:E/'"),
    (["--variants", "bf16:E/weights"], "takes angles, input, table, rotation, storage, logits or weights"),
    (["--variants", "bf16:E/weights=half"], "'bf16:E/weights=half'"),
    (["--variants", "bf16:E/nonsense=bf16"], "'bf16:E/nonsense=bf16'"),
    (["--variants", "bf16:E/logits=double"], "'bf16:E/logits=double'"),
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
@pytest.mark.host_only
def test_bad_arguments_are_refused(args, message, trained, tmp_path):
    if args[0] == "--device" and DEVICE == "gpu":
        pytest.skip("there is one")
    shown = run("--model", trained / "weights.bin", "--data", trained / "text.bin", "--out", tmp_path / "out", *FEW, *args,
                ok=False)
    assert message in shown and len(shown.strip().split("\n")) == 1, shown
    assert shown.startswith(f"{pathlib.Path(BINARY).name}: ")


@pytest.mark.parametrize("args", [["--layers", 99], ["--data", "x.bin"], ["--lengths", 64], ["--sink", 4], ["--sequences", 8],
                                  ["--experiments", "shift"], ["--experiments", "local,base"]])
@pytest.mark.host_only
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


@pytest.mark.host_only
def test_the_recipe_goes_through_its_text_eight_times_at_most(recipe, tmp_path):
    """2001 tokens; measuring and drawing are left out."""
    (tmp_path / "scripts/plot_rope.py").write_text("")
    (tmp_path / "test_rope").write_text('#!/bin/sh\necho "$2" "$6" "$8" >> looked\n[ "$6" != "$STOP" ]\n')
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
    done = start(28, PROTOCOL="1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "through the 2001 tokens of rope/books_0*.bin: 8 are made; 224000 tokens would be enough" in done.stdout
    looked = [line.split() for line in (tmp_path / "looked").read_text().splitlines()]
    weights, folders, _ = zip(*(line[:3] for line in looked))
    assert weights == tuple(f"rope/run/step_{n:08}/weights.bin" for n in (8, 8, 1, 2, 4, *9 * [8]))
    sinks = [f"sink_{r}" for r in (0, 2, 4, 6, 8)]  # at a context of 64 none at key 1000
    assert [x.removeprefix("rope/") for x in folders] == [
        "random_kaiming", "random_normal", "step_1", "step_2", "step_4", "result", "paper_random", "paper", "weights", *sinks]

    def looked_again(**more):
        (tmp_path / "looked").write_text("")
        assert start(28, **more).returncode == (1 if "STOP" in more else 0)
        return [line.split()[1].removeprefix("rope/") for line in (tmp_path / "looked").read_text().splitlines()]

    # What is there is not measured again, but for other options and newer weights, and where it was stopped it goes on.
    assert looked_again(PROTOCOL="1") == []
    assert looked_again(PROTOCOL="1", SINKS="0 9") == ["sink_9"]
    assert looked_again(PROTOCOL="1", SEQUENCES="4") == ["result", "paper_random", "paper", "weights"]
    assert looked_again(PROTOCOL="1", STOP="rope/paper") == ["result", "paper_random", "paper"]
    assert looked_again() == []
    assert looked_again(PROTOCOL="1") == ["paper", "weights"]
    later = time.time() + 60
    os.utime(tmp_path / "rope/run/step_00000002/weights.bin", (later, later))
    assert looked_again() == ["step_2"]
    # Figures that cannot be drawn are an error, unless it is matplotlib that is missing.
    (tmp_path / "scripts/plot_rope.py").write_text("raise SystemExit(3)")
    (tmp_path / "with/matplotlib").mkdir(parents=True)
    (tmp_path / "with/matplotlib/__init__.py").write_text("")
    done = start(28, PYTHONPATH=str(tmp_path / "with"))
    assert done.returncode == 3 and "s: done" not in done.stdout
    done = start(28, PYTHONPATH=without_matplotlib(tmp_path))
    assert done.returncode == 0 and "no figures, no matplotlib: where it is, " in done.stdout and "s: done" in done.stdout


def without_matplotlib(folder):
    """A PYTHONPATH on which it cannot be imported."""
    (folder / "without").mkdir(exist_ok=True)
    (folder / "without/matplotlib.py").write_text("raise ImportError('none here')")
    return str(folder / "without")


def test_the_recipe_runs_to_its_figures(recipe, tmp_path):
    pytest.importorskip("matplotlib")
    assert "make test_rope" in subprocess.run([*recipe, "a", "b"], capture_output=True, text=True).stdout
    (tmp_path / "test_rope").symlink_to(BINARY)
    usage = subprocess.run(recipe, capture_output=True, text=True)
    assert usage.returncode == 1 and "tokenizer.model" in usage.stdout
    small = {"MODEL": "-e tiny --layers 1 --channels 32 --heads 2 --ffn 48", "CONTEXT": "64", "BATCH": "2", "STEPS": "4",
             "SAVE_EVERY": "2", "POINTS": "2", "SEQUENCES": "3", "SWEEP": "2", "DEVICE": DEVICE, "PROTOCOL": "1", "SINKS": "3",
             "SINK_KEY": "5", "ROPE_OPTIONS": "--length 64 --lengths 32,64 --pairs 200 --bases 1e4,1e6 --shifts 0,100"}
    done = subprocess.run([*recipe, "none.jsonl", "none.model"], capture_output=True, text=True, timeout=300,
                          env={**os.environ, **small, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr
    assert {x["weights"] for x in read(tmp_path / "rope/step_2", "shift")} == {"step 2"}
    assert {x["weights"] for x in read(tmp_path / "rope/random_kaiming", "shift")} == {"random (kaiming)"}
    assert {x["experiment"] for x in read(tmp_path / "rope/result", "shift")} == {"shift", "base", "frozen"}
    assert {x["sequences"] for x in only(read(tmp_path / "rope/result", "shift"), d1=0, experiment="shift", d2=16)} == {"3"}
    assert {x["sequences"] for x in read(tmp_path / "rope/step_2", "shift")} == {"2"}
    assert (tmp_path / "rope/figures/training.png").is_file() and (tmp_path / "rope/result/figure1.png").is_file()
    paper = only(read(tmp_path / "rope/paper", "shift"), d2=16)
    assert {(x["variant"], x["sequences"]) for x in paper} == {(v, "3") for v in ("float:F", "bf16:C", "bf16:A")}
    assert len(paper) == 3 * 19  # all of the paper's shifts
    for name, variants in ("paper", 3), ("paper_random", 1):
        length = read(tmp_path / "rope" / name, "length")
        assert len(length) == 4 * variants and {x["sequences"] for x in length} == {"3"}  # 64 to 512, which the text fills
    assert {x["weights"] for x in read(tmp_path / "rope/paper_random", "shift")} == {"random (kaiming)"}
    assert (tmp_path / "rope/paper/figure1.png").is_file()
    for folder, key in ("sink_3", 0), ("sink_6_key_5", 5):
        keys = only(read(tmp_path / "rope" / folder, "key"), variant="bf16:C")
        assert max(keys, key=lambda x: float(x["mass"]) * (64 - int(x["key"])))["key"] == str(key)
        shutil.rmtree(tmp_path / "rope" / folder)
    check_tables(tmp_path)


def shown(text):
    """What dev/rope_tables.py printed: {title: [{column: cell}]}."""
    found = {}
    for block in re.findall(r"^([^|\n].*)\n\n((?:\|.*\n)+)", text, re.M):
        columns, rule, *rows = [[cell.strip() for cell in line[1:-1].split(" | ")] for line in block[1].splitlines()]
        assert rows and rule == ["---"] * len(columns) and all(len(row) == len(columns) for row in rows), block
        found[re.sub(r"^\S*/rope/", "", block[0])] = [dict(zip(columns, row)) for row in rows]
    return found


def agrees(cell, value, error):
    """Rounded to the error's first digit, and no further."""
    got, got_error = map(float, cell.split(" +- "))
    return got_error == float(f"{error:.0e}") and abs(got - value) <= 0.51 * 10 ** math.floor(math.log10(got_error))


def check_tables(folder):
    """dev/rope_tables.py over the recipe's folders, and over some that it cannot use."""
    rope = folder / "rope"
    for name, *sink in ("sink_0", "--sink", 0), ("sink_4", "--sink", 4), ("sink_4_key_9", "--sink", 4, "--sink_key", 9):
        run("--model", rope / "run/step_00000004/weights.bin", "--data", rope / "books_val_000000.bin", "--out", rope / name,
            "--experiments", "shift", "--variants", "bf16:C", "--length", 64, "--shifts", 0, "--sequences", 3, "--plot=0", *sink)
    shutil.copytree(rope / "step_2", rope / "step_final")
    shutil.copytree(rope / "sink_4", rope / "sink_5")
    (rope / "sink_5/key.csv").unlink()
    (rope / "length_9").mkdir()
    (rope / "length_9/length.csv").write_text((rope / "result/length.csv").read_text().split("\n")[0] + "\n")
    header, *keys = (rope / "sink_4/key.csv").read_text().splitlines()
    (rope / "sink_4/key.csv").write_text("\n".join([header, *reversed(keys)]) + "\n")  # looked up by key, not by place
    done = subprocess.run([sys.executable, ROOT / "dev/rope_tables.py", rope], capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": without_matplotlib(folder)})
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("left out:\n- sink_5: no key.csv\n") and "-0.00 " not in done.stdout
    tables = shown(done.stdout)
    assert not any("length_9" in title for title in tables)
    shift, sample = (read(rope / "result", name) for name in ("shift", "sample"))

    weights = tables["D(0, 16) by weights and variant"]
    assert [x["weights"] for x in weights][2:] == ["step 2", "step 2", "step 4"]
    d = only(shift, d1=0, d2=16, experiment="shift", variant="bf16:C")[0]
    assert agrees(weights[-1]["bf16:C"], float(d["sum_abs"]), float(d["sum_abs_se"]))
    first = tables["result: the first key's part of D(0, 16)"]
    assert [x["variant"] for x in first] == [x["variant"] for x in tables["the three readings, step 4"]]
    row = next(x for x in first if x["variant"] == "bf16:C")
    key = only(read(rope / "result", "key"), key=0, d1=0, d2=16, variant="bf16:C")[0]
    for name, column in ("by weights", "abs"), ("by columns", "column_abs"), ("signed", "signed"):
        assert agrees(row[name], float(key[column]), float(key[column + "_se"]))
    for name, column, whole in ("share", "abs", "sum_abs"), ("share by columns", "column_abs", "column_abs"):
        assert row[name] == f"{100 * float(key[column]) / float(d[whole]):.3f}%"
    assert agrees(row["all keys, signed"], float(d["signed_sum"]), float(d["signed_sum_se"]))
    frozen = tables["result: frozen q and k, D(0, 16)"]
    assert [x["rounded"] for x in frozen][:2] == ["nothing (E)", "fp32 angles (F)"] and len(frozen) == 12
    by_layer = tables["result: D(0, 16) by layer"]
    for line in only(read(rope / "result", "layer"), d1=0, d2=16):
        row = next(x for x in by_layer if x["variant"] == line["variant"])
        assert float(row[line["layer"]]) == float(f"{float(line['sum_abs']):.1e}")

    def by_sequence(lines, **pair):
        return np.array([float(x["sum_abs"]) for x in only(lines, variant="bf16:C", d2=16, **pair)])

    def ratio(above, below):
        mean = above.mean() / below.mean()
        return mean, np.std(above - mean * below, ddof=1) / below.mean() / math.sqrt(len(above))

    large, small = (by_sequence(read(rope / "result", "base"), base=base) for base in ("1e+06", "10000"))
    row = next(x for title, rows in tables.items() if "at a base / at 10000" in title for x in rows if x["variant"] == "bf16:C")
    assert len(large) == len(small) == 2 and agrees(row["1e6"], *ratio(large, small))
    far, near = by_sequence(sample, d1=100), by_sequence(sample, d1=0)
    assert len(far) == 2 and len(near) == 3  # the sweep's come first
    row = next(x for x in tables["result: D(shift, 16) / D(0, 16) of the same sequences"] if x["shift"] == "100")
    assert row["sequences"] == "2" and agrees(row["bf16:C"], *ratio(far, near[:2]))

    split = {x["variant"]: x for x in tables["P V and the logits apart from RoPE: D(0, 16)"]}
    assert list(split) == ["bf16:E", "bf16:E/weights=bf16", "bf16:F", "bf16:F/weights=bf16", "bf16:C/weights=float", "bf16:C",
                           "bf16:C/logits=bf16"]
    both = {v: np.array([float(x["sum_abs"]) for x in only(read(rope / "weights", "sample"), variant=v)]) for v in split}
    column = "D / that of bf16:C, of the same sequences"
    assert agrees(split["bf16:E"][column], *ratio(both["bf16:E"], both["bf16:C"])) and len(both["bf16:C"]) == 3

    rows = {x["folder"]: x for x in tables["sinks: D(0, 16) with the sink / without, of the same sequences"]}
    assert [(x["key"], x["raised by"], x["sequences"]) for x in rows.values()] == [("0", "4", "3"), ("9", "4", "3")]
    without = by_sequence(read(rope / "sink_0", "sample"), d1=0)
    assert agrees(rows["sink_4"]["ratio"], *ratio(by_sequence(read(rope / "sink_4", "sample"), d1=0), without))
    rows = {(x["folder"], x["key"]): x for x in tables["sinks: the key's attention, and how far its logit moves"]}
    assert list(rows) == [("sink_0", "0"), ("sink_0", "9"), ("sink_4", "0"), ("sink_4_key_9", "9")]
    for (name, at), row in rows.items():
        key = read(rope / name, "key")
        mass = {x["key"]: float(x["mass"]) for x in key}
        assert float(row["% of all keys' attention, n_j-weighted"]) == round(100 * mass[at] / sum(mass.values()), 3)
        error = float(only(key, key=at)[0]["mass_se"])
        assert agrees(row["attention it gets, % of a head's"], 100 * mass[at] / 2, 100 * error / 2)  # 1 layer of 2 heads
    # Other sequences are not compared with.
    samples = read(rope / "sink_0", "sample")
    with open(rope / "sink_0/sample.csv", "w") as file:
        writer = csv.DictWriter(file, samples[0])
        writer.writeheader()
        writer.writerows({**x, "place": int(x["place"]) + 1} for x in samples)
    for wanted, rows in (("- sink_4, bf16:C: D against none: sink_0 has none of its sequences\n", 4),
                         ("- D without a sink: no sink_0, of the same sequences by --sink 0\n", 2)):
        done = subprocess.run([sys.executable, ROOT / "dev/rope_tables.py", rope], capture_output=True, text=True, check=True)
        assert wanted in done.stdout and "with the sink / without" not in done.stdout
        assert len(shown(done.stdout)["sinks: the key's part of D(0, 16)"]) == rows
        shutil.rmtree(rope / "sink_0", ignore_errors=True)


@pytest.mark.parametrize("value, error, wanted", [
    (1.2345, 0.0678, "1.23 +- 0.07"), (-0.003, 0.02, "0.00 +- 0.02"), (-6e-4, 3e-2, "0.00 +- 0.03"), (0.0, 0.02, "0.00 +- 0.02"),
    (6.3614e-4, 2e-7, "6.361e-4 +- 2e-7"), (-8e-4, 2e-4, "-8e-4 +- 2e-4"), (9.97e-4, 1e-5, "1.00e-3 +- 1e-5"),
    (3e-5, 4e-4, "0.0000 +- 0.0004"), (1e-8, 3e-7, "0 +- 3e-7"), (0.0013537, 2e-6, "0.001354 +- 2e-6"), (138.04, 0.61, "138.0 +- 0.6"),
    (138.04, 12.3, "140 +- 10"), (0.5, 0.0961, "0.5 +- 0.1"), (0.123456, math.nan, "0.1235 (no error)"),
    (2.5e-5, 0.0, "2.5e-5 (no error)"), (math.nan, math.nan, "")])
def test_numbers_are_written_to_their_errors_place(value, error, wanted, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "dev"))
    import rope_tables
    assert rope_tables.number(value, error) == wanted


def test_ratios_of_the_same_sequences_have_the_error_of_what_they_do_not_share(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "dev"))
    from rope_tables import paired
    assert paired([2, 4, 6], [1, 2, 3]) == (2, 0)  # however far the sequences lie apart
    ratio, error = paired([2, 4, 9], [1, 2, 3])  # 2.5, and off it by -0.5, -1, 1.5 of 2
    assert ratio == 2.5 and np.isclose(error, math.sqrt((0.25**2 + 0.5**2 + 0.75**2) / 2 / 3))
    assert all(map(math.isnan, paired([1, 2], [0, 1]))) and math.isnan(paired([1], [2])[1])


def test_significant_digits_are_rounded_once(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "dev"))
    from rope_tables import by_number, significant, sink_name
    assert [significant(x) for x in (0.1095, 0.1, 0.0996, 2.71e-6, 138.0, 9.96, 0.0, 0.00123)] == [
        "0.11", "0.10", "0.10", "2.7e-6", "140", "10", "0.0", "0.0012"]
    assert sorted(["step_final", "step_1000", "step_125"], key=by_number) == ["step_125", "step_1000", "step_final"]
    assert [sink_name(f) for f in ("sink_6", "sink_6_key_1000", "sink_6_key_x", "sink_a_b")] == [("6", 0), ("6", 1000), None, None]
