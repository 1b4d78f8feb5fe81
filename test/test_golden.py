"""The program against Hugging Face transformers, by the golden vectors of dev/golden.py: logits through the real path
(converter, weights file, token file, train_llama), gradients in double, RoPE frequencies of every scaling."""
import filecmp
import json
import os
import pathlib
import shutil
import subprocess
import sys

import numpy as np
import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "scripts"), str(ROOT / "data"), str(ROOT / "test")]
import convert_hf  # noqa: E402
import hashed  # noqa: E402
import hf_common as hf  # noqa: E402
import token_file  # noqa: E402

BINARY = os.environ.get("TRAIN_LLAMA", str(ROOT / "train_llama"))
GOLDEN = pathlib.Path(os.environ.get("GOLDEN", ROOT / "test" / "golden"))
FAMILIES = list(hashed.FAMILIES)


def golden(name):
    path = GOLDEN / f"{name}.json"
    if not path.exists():
        pytest.skip(f"{path} is missing: dev/golden.py writes it where torch and transformers are")
    return json.loads(path.read_text())


def converted(folder, family, config=None, dtype="F32"):
    hashed.write_hf_folder(folder / "hf", family, dtype, config=config)
    convert_hf.convert(folder / "hf", folder / "model.bin", binary=BINARY, say=lambda line: None)
    return folder / "model.bin"


def program_logits(folder, model, tokens, config):
    """(S, V) logits of train_llama in float for one document."""
    bos = config.get("bos_token_id")
    token_file.write_tokens(folder / "tokens.bin", [tokens], config["vocab_size"], -1 if bos is None else bos)
    done = subprocess.run(
        [BINARY, "--device", os.environ.get("TRAIN_DEVICE", "cpu"), "--dtype", "float", "--attention", "full",
         "-c", str(len(tokens)), "-e", str(model), "-i", str(folder / "tokens.bin"), "--dump_logits", str(folder / "logits")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return np.fromfile(folder / "logits", "<f4").reshape(len(tokens), config["vocab_size"])


@pytest.fixture(scope="module")
def probe(tmp_path_factory):
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if not compiler:
        pytest.skip("no C++ compiler for test/golden_probe.cpp")
    path = tmp_path_factory.mktemp("probe") / "golden_probe"
    subprocess.run([compiler, "-x", "c++", "-std=c++20", "-O1", "-fopenmp", f"-I{ROOT}",
                    str(ROOT / "test" / "golden_probe.cpp"), str(ROOT / "core" / "comm_serial.cpp"), "-o", str(path)],
                   check=True)

    def ask(*args):
        return subprocess.run([str(path), *map(str, args)], check=True, capture_output=True, text=True).stdout.split()
    return ask


@pytest.mark.parametrize("family", FAMILIES)
def test_logits(tmp_path, family):
    """Within 1e-4 of the logit scale; float arithmetic on this size leaves about 1e-6."""
    g = golden(family)
    model = converted(tmp_path, family, g["config"])
    logits = program_logits(tmp_path, model, g["tokens"], g["config"])
    assert g["tokens"] == hashed.model_tokens(g["config"]).tolist()
    error = np.abs(logits[g["rows"]] - np.array(g["logits"])).max()
    assert error <= 1e-4 * g["logit_scale"], f"{error} of {g['logit_scale']}"
    log_sum = np.log(np.exp(logits[:-1].astype(np.float64)).sum(1))
    loss = (log_sum - logits[range(len(logits) - 1), g["tokens"][1:]]).mean()
    assert abs(loss - g["loss"]) < 1e-5 * g["loss"]


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients(tmp_path, family, probe):
    """In double. transformers' fp32 parts (RMSNorm, softmax, angles up to 47 rad: 3e-6) allow 1e-4 of the rms entry."""
    g = golden(family)
    model = converted(tmp_path, family, g["config"])
    (tmp_path / "tokens.txt").write_text(" ".join(map(str, g["tokens"])))
    loss = float(probe("gradients", model, tmp_path / "tokens.txt", tmp_path / "gradients")[0])
    assert abs(loss - g["loss"]) < 1e-5 * g["loss"]
    flat = np.fromfile(tmp_path / "gradients", np.float64)
    layout, elements = hf.parameter_layout(hf.read_header(model), BINARY)
    assert elements == len(flat) and {name for _, _, name in layout} == g["gradients"].keys()
    for offset, shape, name in layout:
        ours, theirs = flat[offset:offset + int(np.prod(shape))], g["gradients"][name]
        assert abs(np.linalg.norm(ours) / theirs["norm"] - 1) < 1e-4, name
        worst = np.abs(ours[theirs["index"]] - theirs["value"]).max()
        assert worst <= 1e-4 * theirs["norm"] / np.sqrt(len(ours)), f"{name}: {worst}, norm {theirs['norm']}"


def test_rope_frequencies(tmp_path, probe):
    """Every scaling, from the configuration through the header to rope_frequencies. transformers computes in fp32."""
    for case in golden("rope"):
        D = case["D"]
        other = ("D", "S", "base", "max_context", "attention_factor_used", "inv_freq")
        config = dict(hashed.config_json("llama2"), hidden_size=4 * D, max_position_embeddings=case["max_context"],
                      rope_parameters={"rope_theta": case["base"], **{k: v for k, v in case.items() if k not in other}})
        header, _ = hf.config_to_header(config, "config.json")
        (tmp_path / "header").write_bytes(header.tobytes())
        factor, *inv_freq = map(float, probe("rope", tmp_path / "header", D, case["S"]))
        label = {k: v for k, v in case.items() if not isinstance(v, list)}
        assert abs(factor - case["attention_factor_used"]) < 1e-7, label
        assert np.allclose(inv_freq, case["inv_freq"], rtol=5e-6, atol=0), label


@pytest.mark.parametrize("family", ["llama3", "qwen2"])
def test_bf16_weights_compute_as_their_float_values(tmp_path, family):
    """A bf16 file read with --dtype float gives the bits that the same values in a float file give."""
    config = hashed.config_json(family)
    (tmp_path / "b").mkdir()
    model = converted(tmp_path / "b", family, config, "BF16")
    convert_hf.convert(tmp_path / "b" / "hf", tmp_path / "float.bin", "float", BINARY, lambda line: None)
    tokens = hashed.model_tokens(config).tolist()
    program_logits(tmp_path / "b", model, tokens, config)
    program_logits(tmp_path, tmp_path / "float.bin", tokens, config)
    assert filecmp.cmp(tmp_path / "b" / "logits", tmp_path / "logits", shallow=False)
