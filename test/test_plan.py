"""What `auto` chooses as memory shrinks, by --plan, which needs no GPU: master weights, then what is recomputed, in order."""

import os
import pathlib
import re
import subprocess

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
BINARY = os.environ.get("TRAIN_LLAMA", str(ROOT / "train_llama"))
PARTS = ["norm", "swiglu", "residual", "qkv", "ffn", "attention"]  # as --recompute documents them
LAYERS = 32
BYTES_8 = ["--grad_dtype", "bf16", "--opt_dtype", "bf16", "--master", "none"]
BYTES_14 = ["--grad_dtype", "float", "--opt_dtype", "bf16", "--master", "float"]
BYTES_18 = ["--grad_dtype", "float", "--opt_dtype", "float", "--master", "float"]


class Plan:
    """The layout of LLaMA-2-7B, 65536 tokens a GPU: units of layers x parts that are recomputed, GiB, master or not."""

    def __init__(self, memory, *args):
        out = subprocess.run([BINARY, "-e", "llama2-7b", "-c", "65536", "--attention", "full", "--device", "gpu", "--plan",
                              "--memory", str(memory), *args], capture_output=True, text=True, check=True, timeout=120).stdout
        self.recompute, tile = re.search(r"recompute ([^\s,]+(?:,[^\s,]+)*)(?:, ffn_tile (\d+))?\n", out).groups()
        self.tile = int(tile or 0)
        self.needed = float(re.search(r"  all +([\d.]+) of", out).group(1))
        self.master = float(re.search(r"  master weights +([\d.]+)", out).group(1)) > 0
        self.fits = "does not fit" not in out
        layers = dict.fromkeys(PARTS, 0)
        for item in [] if self.recompute == "none" else self.recompute.split(","):
            name, _, count = item.partition(":")
            layers[name] = int(count or LAYERS)
        self.layers = [layers[part] for part in PARTS]
        self.units = sum(self.layers)


def test_the_plan_says_what_the_hosts_memory_would_save():
    """And that is what the plan with it comes to."""
    def told(*args):
        return subprocess.run([BINARY, "-e", "llama2-7b", "--device", "gpu", "--plan", "--memory", "139.8", *BYTES_8, *args],
                              capture_output=True, text=True, check=True, timeout=120).stdout

    def step(out):
        return re.search(r"(\d+) ms a step", out)

    if not step(told("-c", "4096")):
        pytest.skip("the ceilings of the GPU here are not known")
    long = ["-c", "65536", "--generator_mean", "4096"]
    out = told(*long)
    saved, gib = re.search(r"\n  (\d+) ms with --offload qkv,residual, for (\d+) GiB of the host's memory a rank\n$", out).groups()
    away = told(*long, "--offload", "qkv,residual")
    assert int(saved) < 0.98 * int(step(out).group(1)) and int(saved) == int(step(away).group(1))
    assert abs(float(gib) - float(re.search(r"of the host, besides +([\d.]+)", away).group(1))) < 0.6
    assert "with --offload" not in away  # it is there
    assert "with --offload" not in told("-c", "4096", "-b", "4")  # nothing is recomputed
    assert "with --offload" not in told(*long, "--recompute", "all")  # that was asked for


def test_the_names_are_those_of_the_option_table():
    table = subprocess.run([BINARY, "--options_table"], capture_output=True, text=True, check=True).stdout
    assert ",".join(PARTS) in table


def by_hand(layers, tile):
    names = [f"{part}:{count}" for part, count in zip(PARTS, layers) if count]
    return ["--recompute", ",".join(names) or "none", "--ffn_tile", str(tile)]


def test_as_memory_shrinks_more_is_recomputed_in_order_and_attention_last():
    plans = [Plan(memory, *BYTES_8) for memory in (400, 290, 260, 230, 210, 180, 139.8, 110, 90, 80, 77)]
    for plan in plans:
        assert plan.fits
        last = max((i for i, count in enumerate(plan.layers) if count), default=0)
        # Whole parts, or nearly: what the last layer freed too much keeps some of theirs, at most the 5.4 residuals that a
        # layer's gate and up are. Then some layers of the last.
        assert all(count >= LAYERS - 5 for count in plan.layers[:last]), plan.recompute
        assert plan.tile == (16384 if plan.layers[-1] else 0)
    units = [plan.units for plan in plans]
    assert units == sorted(units) and len(set(units)) > 9
    assert units[0] == 0 and plans[0].recompute == "none"
    for part in range(len(PARTS)):  # each is the last of a plan somewhere
        assert any(0 < plan.layers[part] < LAYERS and not any(plan.layers[part + 1:]) for plan in plans), PARTS[part]


@pytest.mark.parametrize("memory", [180, 139.8, 95, 80])
def test_no_layer_more_could_be_kept(memory):
    plan = Plan(memory, *BYTES_8)
    assert plan.fits and plan.needed < 0.998 * memory
    for part, count in enumerate(plan.layers):
        if count and not (plan.tile and PARTS[part] in ("swiglu", "ffn")):
            fewer = [n - (i == part) for i, n in enumerate(plan.layers)]
            assert not Plan(memory, *by_hand(fewer, plan.tile), *BYTES_8).fits, PARTS[part]


def test_the_master_copy_goes_before_attention_is_recomputed():
    types = ["--grad_dtype", "bf16", "--opt_dtype", "bf16"]
    none = None  # the last plan without a master
    for memory in (139.8, 110, 95, 85, 77):
        plan, with_master = Plan(memory, *types), Plan(memory, *types, "--master", "float")
        assert plan.fits
        if plan.layers[-1] == 0:
            assert plan.master == (with_master.fits and with_master.layers[-1] == 0)
        else:  # neither fits with attention kept
            assert Plan(memory, *types, "--master", "none").layers[-1] > 0
            assert plan.master == with_master.fits
        none = none or not plan.master and plan.layers[-1] == 0
    assert none and Plan(139.8, *types).master


def test_8_14_and_18_bytes_a_parameter_fit_one_h200_with_65536_tokens():
    eight, fourteen, eighteen = (Plan(139.8, *types) for types in (BYTES_8, BYTES_14, BYTES_18))
    assert eight.fits and fourteen.fits and eighteen.fits
    assert eight.units < fourteen.units < eighteen.units
    assert eight.layers[-1] == fourteen.layers[-1] == 0  # attention is kept
    assert not Plan(60, *BYTES_18).fits
