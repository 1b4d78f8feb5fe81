"""scripts/convert_hf.py and export_hf.py: weights reach the right place, come back byte for byte, and damaged or
foreign models end in one clear line. Needs the program for the order of parameters: ./train_llama or $TRAIN_LLAMA."""
import filecmp
import json
import os
import pathlib
import subprocess
import sys
import zlib

import numpy as np
import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "scripts"), str(ROOT / "test")]
import convert_hf  # noqa: E402
import export_hf  # noqa: E402
import hashed  # noqa: E402
import hf_common as hf  # noqa: E402

BINARY = os.environ.get("TRAIN_LLAMA", str(ROOT / "train_llama"))
QUIET = dict(binary=BINARY, say=lambda line: None)
FAMILIES = list(hashed.FAMILIES)


ask_program, answers = hf.parameter_layout, {}


def remembered_layout(header, binary):
    """The layout follows from the shape alone; to start the program each time would take most of the tests' time."""
    key = (binary, *(header[n].tobytes() for n in hf.HEADER.names if n not in ("dtype", "elements")))
    if key not in answers:
        answers[key] = ask_program(header, binary)
    return answers[key]


hf.parameter_layout = remembered_layout


def convert(source, out, **more):
    """What was said."""
    lines = []
    convert_hf.convert(source, out, **{**QUIET, "say": lines.append, **more})
    return "\n".join(lines)


def refuses(source, out, message, **more):
    with pytest.raises(hf.Fault) as fault:
        convert(source, out, **more)
    assert message in str(fault.value) and "\n" not in str(fault.value), fault.value
    assert not list(out.parent.glob("*.tmp")) and not out.exists()


def same_files(a, b):
    names = sorted(f.name for f in a.iterdir())
    assert names == sorted(f.name for f in b.iterdir())
    assert filecmp.cmpfiles(a, b, names, shallow=False) == (names, [], [])


def tensors_of(path):
    """{name: float64 array} and the header of a weights file, by the program's own table."""
    header = hf.read_header(path)
    layout, _ = hf.parameter_layout(header, BINARY)
    dtype = hf.DTYPES[header["dtype"]]
    flat = np.fromfile(path, hf.STORAGE[dtype], offset=1024)
    flat = hf.to_float(flat, dtype).astype(np.float64)
    return {name: flat[at:at + int(np.prod(shape))].reshape(shape) for at, shape, name in layout}, header, flat


def rewrite_header(path, change):
    """Applies `change` to the JSON of a safetensors header, data unchanged."""
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    table = json.loads(raw[8:8 + length])
    change(table)
    header = json.dumps(table).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + raw[8 + length:])


def change_config(folder, remove=(), **fields):
    config = json.loads((folder / "config.json").read_text())
    config.update(fields)
    for name in remove:
        del config[name]
    (folder / "config.json").write_text(json.dumps(config))


def test_hash_is_that_of_core_types():
    """Values printed by hash64, hash_uniform and hash_normal of core/types.h."""
    assert int(hashed.hash64(0, 0)) == 9857899409763097596
    assert int(hashed.hash64(123456789, 1 << 40)) == 9568608284773754351
    assert int(hashed.hash64(2**64 - 1, np.uint64(2**64 - 1))) == 11721439767161966293
    assert float(hashed.hash_uniform(0, 1)) == 0.18488664075944516
    assert abs(float(hashed.hash_normal(0, 1)) - 1.2515198636011649) < 1e-15


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("dtype", ["F32", "BF16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_round_trip(tmp_path, family, dtype, shards):
    source = tmp_path / "source"
    hashed.write_hf_folder(source, family, dtype, shards)
    (source / "tokenizer.json").write_text("{}")
    (source / "generation_config.json").write_text('{"a": 1}')
    # transformers 4 spelling, so that config.json needs no addition
    rope = hashed.FAMILIES[family]["rope_parameters"]
    scaling = None if rope["rope_type"] == "default" else {k: v for k, v in rope.items() if k != "rope_theta"}
    change_config(source, ["rope_parameters"], rope_theta=rope["rope_theta"], rope_scaling=scaling)
    convert(source, tmp_path / "m.bin")

    config = json.loads((source / "config.json").read_text())
    found, header, flat = tensors_of(tmp_path / "m.bin")
    wanted = hashed.model_weights(config)
    assert found.keys() == wanted.keys()
    for name, array in wanted.items():
        if dtype == "BF16":
            array = hf.to_float(hashed.bf16_bits(array), "BF16")
        assert np.array_equal(found[name], array), name
    assert hf.DTYPES[header["dtype"]] == dtype and header["elements"] == len(flat)

    export_hf.export(tmp_path / "m.bin", tmp_path / "back", **QUIET)
    same_files(source, tmp_path / "back")
    export_hf.export(tmp_path / "m.bin", tmp_path / "again", like=source, **QUIET)
    same_files(source, tmp_path / "again")


def test_sizes_that_need_padding(tmp_path):
    """No tensor's size is a multiple of 64 elements."""
    config = dict(hashed.config_json("qwen2"), hidden_size=36, num_attention_heads=3, num_key_value_heads=1,
                  head_dim=10, intermediate_size=22, vocab_size=33)
    hashed.write_hf_folder(tmp_path / "a", "qwen2", config=config)
    convert(tmp_path / "a", tmp_path / "m.bin")
    found, header, flat = tensors_of(tmp_path / "m.bin")
    assert all(np.array_equal(found[name], array) for name, array in hashed.model_weights(config).items())
    assert len(flat) == header["elements"] > sum(a.size for a in found.values())
    assert np.count_nonzero(flat) == sum(np.count_nonzero(a) for a in found.values())  # padding is zero
    export_hf.export(tmp_path / "m.bin", tmp_path / "out", **QUIET)
    assert filecmp.cmp(tmp_path / "a" / "model.safetensors", tmp_path / "out" / "model.safetensors", shallow=False)


def test_header_fields(tmp_path):
    hashed.write_hf_folder(tmp_path / "a", "llama3")
    convert(tmp_path / "a", tmp_path / "a.bin")
    word = np.fromfile(tmp_path / "a.bin", "<i4", 256)
    real = lambda i: float(word[i:i + 2].view("<f8")[0])  # noqa: E731
    assert word[:17].tolist() == [0x4D414C4C, 1, 0, 2, 64, 4, 2, 16, 96, 160, 0, 0, 1, 2, 512, 64, 5]
    assert (real(20), real(22), real(24), real(26), real(28)) == (1e-5, 500000.0, 8.0, 1.0, 4.0)
    assert int(word[18:20].view("<u8")[0]) * 4 + 1024 == os.path.getsize(tmp_path / "a.bin")
    hashed.write_hf_folder(tmp_path / "b", "qwen2")
    change_config(tmp_path / "b", bos_token_id=2)  # as Qwen2 writes it: its EOS
    convert(tmp_path / "b", tmp_path / "b.bin", asked="bf16")
    word = np.fromfile(tmp_path / "b.bin", "<i4", 256)
    assert word[2:17].tolist() == [1, 2, 64, 4, 2, 16, 96, 160, 1, 1, -1, 2, 256, 0, 0]


ROPES = {
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 2.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 64, "beta_fast": 20.0, "mscale": 0.7,
             "mscale_all_dim": 1.5},
    "longrope": {"short_factor": [1.1] * 8, "long_factor": [2.5, 3, 4, 5, 6, 7, 8, 9.25],
                 "original_max_position_embeddings": 64, "attention_factor": 1.3},
    "llama3": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64},
}


@pytest.mark.parametrize("kind", ROPES)
def test_both_spellings_of_rope(tmp_path, kind):
    """type and rope_type, rope_scaling and rope_parameters: one header; written back in both spellings."""
    base = hashed.config_json("llama2")
    del base["rope_parameters"]
    rope = ROPES[kind]
    headers = [hf.config_to_header(dict(base, **fields), "config.json")[0] for fields in (
        dict(rope_theta=5e6, rope_scaling=dict(rope, type=kind)),
        dict(rope_theta=5e6, rope_scaling=dict(rope, rope_type=kind)),
        dict(rope_parameters=dict(rope, rope_type=kind, rope_theta=5e6)),
        dict(rope_scaling=dict(rope, rope_type=kind, rope_theta=5e6), rope_parameters={"rope_type": "default"}))]
    assert all(h.tobytes() == headers[0].tobytes() for h in headers)
    header = headers[0]
    assert hf.SCALINGS[header["scaling"]] == kind and header["base"] == 5e6
    assert header["factor"] == rope.get("factor", 2.0)  # longrope without one: 128 / 64
    for name in ("beta_fast", "mscale", "mscale_all_dim", "attention_factor", "low_freq_factor"):
        if name in rope:
            assert header[name] == rope[name]
    written = export_hf.fresh_config(header)
    assert written["rope_theta"] == 5e6 == written["rope_parameters"]["rope_theta"]
    for fields in ({"rope_parameters": written["rope_parameters"]},
                   {"rope_theta": written["rope_theta"], "rope_scaling": written["rope_scaling"]}):
        again, _ = hf.config_to_header(dict(base, **fields), "config.json")
        again["bos"], again["eos"] = header["bos"], header["eos"]
        assert again.tobytes() == header.tobytes()


def test_longer_context_reaches_config_json(tmp_path):
    """What a training changes in the header stands in the export, in both spellings; the rest is untouched."""
    hashed.write_hf_folder(tmp_path / "a", "llama2")
    change_config(tmp_path / "a", my_field=[1, 2])
    convert(tmp_path / "a", tmp_path / "a.bin")
    raw = bytearray((tmp_path / "a.bin").read_bytes())
    header = np.frombuffer(raw, hf.HEADER, 1)
    header["base"], header["max_context"] = 5e6, 65536
    (tmp_path / "a.bin").write_bytes(raw)
    export_hf.export(tmp_path / "a.bin", tmp_path / "out", **QUIET)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["my_field"] == [1, 2] and config["max_position_embeddings"] == 65536
    assert config["rope_theta"] == 5e6 and config["rope_scaling"] is None
    assert config["rope_parameters"] == {"rope_type": "default", "rope_theta": 5e6}
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (tmp_path / "a" / "model.safetensors").read_bytes()


def test_other_types(tmp_path):
    """fp16 becomes float, and goes back exactly; bf16 rounds to nearest even; float from bf16 is exact."""
    hashed.write_hf_folder(tmp_path / "half", "mistral", "F16", 2)
    assert "fp16" in convert(tmp_path / "half", tmp_path / "half.bin")
    found, _, _ = tensors_of(tmp_path / "half.bin")
    for name, array in hashed.model_weights(hashed.config_json("mistral")).items():
        assert np.array_equal(found[name], array.astype(np.float16)), name
    export_hf.export(tmp_path / "half.bin", tmp_path / "half_back", asked="fp16", **QUIET)
    for file in (tmp_path / "half").glob("*.safetensors"):
        assert filecmp.cmp(file, tmp_path / "half_back" / file.name, shallow=False)

    hashed.write_hf_folder(tmp_path / "f", "llama2")
    convert(tmp_path / "f", tmp_path / "f.bin", asked="bf16")
    found, _, _ = tensors_of(tmp_path / "f.bin")
    for name, array in hashed.model_weights(hashed.config_json("llama2")).items():
        assert np.array_equal(found[name], hf.to_float(hashed.bf16_bits(array), "BF16")), name
    export_hf.export(tmp_path / "f.bin", tmp_path / "f_bf16", **QUIET)  # template float, weights bf16
    assert json.loads((tmp_path / "f_bf16" / "config.json").read_text())["dtype"] == "bfloat16"
    hashed.write_hf_folder(tmp_path / "g", "llama2", "BF16")
    convert(tmp_path / "f_bf16", tmp_path / "again.bin")
    convert(tmp_path / "g", tmp_path / "g.bin")
    assert filecmp.cmp(tmp_path / "again.bin", tmp_path / "g.bin", shallow=False)


def test_bf16_rounding():
    x = np.array([1, 1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-8 + 2**-20, np.inf, -np.inf, 3.4e38, -0.0, np.nan], np.float32)
    bits = hf.from_float(x, "BF16")
    assert bits[:8].tolist() == [0x3F80, 0x3F80, 0x3F82, 0x3F81, 0x7F80, 0xFF80, 0x7F80, 0x8000]
    assert np.isnan(hf.to_float(bits, "BF16")[8])


def test_export_from_scratch(tmp_path):
    """No template: a fresh configuration, shards cut by size, an index, the tokenizer beside them."""
    for family in FAMILIES:
        hashed.write_hf_folder(tmp_path / family, family)
        convert(tmp_path / family, tmp_path / "m.bin")
        (tmp_path / "m.bin").rename(tmp_path / f"{family}_scratch.bin")  # no .hf folder of that name
        (tmp_path / "tokenizer.model").write_bytes(b"x")
        out = tmp_path / f"{family}_out"
        export_hf.export(tmp_path / f"{family}_scratch.bin", out, limit=60000,
                         tokenizer=tmp_path / "tokenizer.model", **QUIET)
        shards = sorted(out.glob("model-*-of-*.safetensors"))
        assert len(shards) > 2 and (out / "tokenizer.model").exists()
        assert all(len(hf.read_safetensors(s)[0]) == 1 or s.stat().st_size < 64000 for s in shards)
        config = json.loads((out / "config.json").read_text())
        assert config["architectures"] == ["Qwen2ForCausalLM" if family == "qwen2" else "LlamaForCausalLM"]
        convert(out, tmp_path / "back.bin")
        assert filecmp.cmp(tmp_path / "back.bin", tmp_path / f"{family}_scratch.bin", shallow=False)


def test_safetensors_library_reads_the_export(tmp_path):
    safetensors = pytest.importorskip("safetensors.numpy")
    hashed.write_hf_folder(tmp_path / "a", "qwen2")
    convert(tmp_path / "a", tmp_path / "m.bin")
    export_hf.export(tmp_path / "m.bin", tmp_path / "out", limit=10**9, **QUIET)
    found = safetensors.load_file(tmp_path / "out" / "model.safetensors")
    wanted = hashed.model_weights(hashed.config_json("qwen2"))
    assert found.keys() == wanted.keys() and all(np.array_equal(found[n], wanted[n]) for n in wanted)


def test_buffers_of_early_llama_files_are_kept(tmp_path):
    """rotary_emb.inv_freq is no weight, yet stands in the files, in another type; the export holds it again."""
    source = tmp_path / "a"
    hashed.write_hf_folder(source, "llama2", "BF16", 2)
    path = source / "model-00002-of-00002.safetensors"
    name, extra = "model.layers.0.self_attn.rotary_emb.inv_freq", np.linspace(1, 0, 8, dtype="<f4").tobytes()
    data = len(path.read_bytes()) - 8 - int.from_bytes(path.read_bytes()[:8], "little")
    path.write_bytes(path.read_bytes() + extra)
    rewrite_header(path, lambda t: t.update({name: {"dtype": "F32", "shape": [8], "data_offsets": [data, data + 32]}}))
    index = json.loads((source / "model.safetensors.index.json").read_text())
    index["weight_map"][name] = path.name
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    convert(source, tmp_path / "m.bin")
    for out, like in (("x", None), ("y", source)):
        export_hf.export(tmp_path / "m.bin", tmp_path / out, like=like, **QUIET)
        for file in source.glob("*.safetensors*"):
            assert filecmp.cmp(file, tmp_path / out / file.name, shallow=False)


def test_stored_head_of_a_tied_model(tmp_path):
    source = tmp_path / "a"
    source.mkdir()
    config = hashed.config_json("qwen2")
    weights = hashed.model_weights(config)
    (source / "config.json").write_text(json.dumps(config))
    head = [("lm_head.weight", weights["model.embed_tokens.weight"])]
    hashed.write_safetensors(source / "model.safetensors", [*weights.items(), *head])
    convert(source, tmp_path / "m.bin")
    export_hf.export(tmp_path / "m.bin", tmp_path / "out", **QUIET)
    assert filecmp.cmp(source / "model.safetensors", tmp_path / "out" / "model.safetensors", shallow=False)
    hashed.write_safetensors(source / "model.safetensors", [*weights.items(), (head[0][0], head[0][1] + 1)])
    refuses(source, tmp_path / "n.bin", "lm_head.weight is not the embedding")


def entry(table, name="model.norm.weight"):
    return table[name]


BAD_HEADERS = {
    "overlap": (lambda t: t.update(a={"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}), "overlaps"),
    "hole": (lambda t: t.pop("model.layers.0.mlp.down_proj.weight"), "leaves a hole behind the tensor before it"),
    "beyond": (lambda t: t.update(z={"dtype": "F32", "shape": [2], "data_offsets": [10**9, 10**9 + 8]}),
               "leaves a hole"),
    "range": (lambda t: entry(t).update(shape=[63]), "needs 252 bytes, its range has 256"),
    "backwards": (lambda t: entry(t).update(data_offsets=[8, 0]), "its range has -8"),
    "negative": (lambda t: entry(t).update(shape=[-64]), "malformed"),
    "float": (lambda t: entry(t).update(shape=[64.0]), "malformed"),
    "bool": (lambda t: entry(t).update(shape=[True]), "malformed"),
    "huge": (lambda t: entry(t).update(shape=[2**61, 2**61, 2**61]), "needs"),
    "offsets": (lambda t: entry(t).update(data_offsets=[0]), "malformed"),
    "dtype": (lambda t: entry(t).update(dtype="X9"), "unknown element type"),
    "entry": (lambda t: t.update(a=3), "unknown element type"),
}


@pytest.mark.parametrize("fault", BAD_HEADERS)
def test_bad_safetensors_header(tmp_path, fault):
    hashed.write_hf_folder(tmp_path / "a", "llama2")
    change, message = BAD_HEADERS[fault]
    rewrite_header(tmp_path / "a" / "model.safetensors", change)
    refuses(tmp_path / "a", tmp_path / "m.bin", message)


def test_bad_safetensors_bytes(tmp_path):
    hashed.write_hf_folder(tmp_path / "a", "llama2")
    path, out = tmp_path / "a" / "model.safetensors", tmp_path / "m.bin"
    good = path.read_bytes()
    length = int.from_bytes(good[:8], "little")
    for raw, message in (
            (b"", "not safetensors, or truncated"), (good[:7], "truncated"), (good[:100], "truncated"),
            (good[:-1], "truncated"), (good + b"\0", "bytes that belong to no tensor"),
            ((2**63).to_bytes(8, "little") + good[8:], "a header of 9223372036854775808 bytes"),
            ((10**8 + 1).to_bytes(8, "little") + good[8:], "a header of 100000001 bytes"),
            (good[:8] + b"x" + good[9:], "not JSON"), (good[:8] + b"\xff" + good[9:], "not JSON"),
            (good[:8] + b"[" * length + good[8 + length:], "not JSON"),
            (b"\2\0\0\0\0\0\0\0[]", "not a JSON object"),
            (b"\x0d\0\0\0\0\0\0\0" + b'{"a":1,"a":2}', "names a tensor twice")):
        path.write_bytes(raw)
        refuses(tmp_path / "a", out, message)
    os.truncate(path, 10**8 + 100)  # sparse, and long enough for an absurd header
    with open(path, "r+b") as f:
        f.write((10**8 + 1).to_bytes(8, "little"))
    refuses(tmp_path / "a", out, "a header of 100000001 bytes in a file of 100000100")


def test_damage_anywhere_never_crashes(tmp_path):
    """A flipped byte in the header ends in a Fault or, where it is harmless, in a conversion; in nothing else."""
    hashed.write_hf_folder(tmp_path / "a", "llama2")
    path = tmp_path / "a" / "model.safetensors"
    good = path.read_bytes()
    length = int.from_bytes(good[:8], "little")
    refused = 0
    for k in range(300):
        at = int(hashed.hash64(1, k) % np.uint64(8 + length))
        flip = 1 << int(hashed.hash64(2, k) % np.uint64(8))
        path.write_bytes(good[:at] + bytes([good[at] ^ flip]) + good[at + 1:])
        try:
            hf.open_model(tmp_path / "a")
        except hf.Fault:
            refused += 1
    assert refused > 150  # the others changed a tensor's name, which the layout then refuses


def test_wrong_tensors(tmp_path):
    out, config = tmp_path / "m.bin", hashed.config_json("llama2")
    weights = hashed.model_weights(config)

    def folder(name, tensors, **fields):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(dict(config, **fields)))
        hashed.write_safetensors(tmp_path / name / "model.safetensors", list(tensors.items()))
        return tmp_path / name
    some = dict(list(weights.items())[:-6])
    refuses(folder("missing", some), out, "missing ")
    refuses(folder("extra", dict(weights, **{"model.layers.0.self_attn.q_proj.bias": np.zeros(64)})), out,
            "unexpected model.layers.0.self_attn.q_proj.bias")
    refuses(folder("shape", weights, vocab_size=161), out,
            "model.embed_tokens.weight is [160, 64], config.json makes it [161, 64]")
    refuses(folder("heads", weights, num_key_value_heads=3), out, "--dump_params:")


def test_mixed_types_and_shards(tmp_path):
    source, out = tmp_path / "a", tmp_path / "m.bin"
    hashed.write_hf_folder(source, "llama2", "F32", 2)
    first, second = sorted(source.glob("*.safetensors"))
    names = list(hf.read_safetensors(second)[0])
    weights = hashed.model_weights(hashed.config_json("llama2"))
    good = second.read_bytes()
    hashed.write_safetensors(second, [(n, weights[n]) for n in names], "BF16")
    refuses(source, out, "mixed types (BF16, F32)")
    convert(source, out, asked="float")
    out.unlink()
    second.write_bytes(good)
    second.rename(source / "elsewhere")
    refuses(source, out, "the download is incomplete")
    (source / "elsewhere").rename(second)
    index = source / "model.safetensors.index.json"
    table = json.loads(index.read_text())
    table["weight_map"][names[0]] = first.name
    index.write_text(json.dumps(table))
    refuses(source, out, "index and shards do not agree")
    index.write_text('{"weight_map": {"a": "../../etc/passwd"}}')
    refuses(source, out, "not in the folder")
    index.unlink()
    refuses(source, out, "no model.safetensors.index.json")


@pytest.mark.parametrize("fields, message", [
    (dict(architectures=["GPT2LMHeadModel"]), "architecture GPT2LMHeadModel; only LlamaForCausalLM"),
    (dict(hidden_act="gelu"), 'hidden_act is "gelu"'),
    (dict(attention_bias=True), "attention_bias is true"),
    (dict(quantization_config={"bits": 4}), "quantization_config"),
    (dict(hidden_size="64"), 'hidden_size is "64", an integer is expected'),
    (dict(num_hidden_layers=None), "num_hidden_layers is null"),
    (dict(num_attention_heads=0), "must be positive"),
    (dict(rope_parameters={"rope_type": "magic"}), "RoPE type 'magic' is unknown"),
    (dict(rope_parameters={"rope_type": "linear"}), "factor is null"),
    (dict(rope_parameters={"rope_type": "longrope", "short_factor": [1], "long_factor": [1]}), "must list 8 factors"),
])
def test_wrong_config(tmp_path, fields, message):
    hashed.write_hf_folder(tmp_path / "a", "llama2")
    change_config(tmp_path / "a", **fields)
    refuses(tmp_path / "a", tmp_path / "m.bin", message)


def test_window(tmp_path):
    hashed.write_hf_folder(tmp_path / "a", "mistral")
    assert "sliding_window" not in convert(tmp_path / "a", tmp_path / "m.bin")
    change_config(tmp_path / "a", sliding_window=32)
    assert "sliding_window is 32" in convert(tmp_path / "a", tmp_path / "m.bin")
    hashed.write_hf_folder(tmp_path / "q", "qwen2")
    change_config(tmp_path / "q", sliding_window=32)  # use_sliding_window is false
    assert "sliding_window" not in convert(tmp_path / "q", tmp_path / "m.bin")


def test_only_a_weights_file_is_overwritten(tmp_path):
    hashed.write_hf_folder(tmp_path / "a", "llama2")
    model = tmp_path / "a" / "model.safetensors"
    before = model.read_bytes()
    with pytest.raises(hf.Fault, match="no weights file of this trainer"):
        convert(tmp_path / "a", model)
    assert model.read_bytes() == before
    for _ in range(2):
        convert(tmp_path / "a", tmp_path / "m.bin")


def test_the_folder_beside_the_weights_replaces_nothing_else(tmp_path):
    def files(folder):
        return {f: f.read_bytes() for f in folder.rglob("*") if f.is_file()}
    hashed.write_hf_folder(tmp_path / "m.hf", "llama2")
    before = files(tmp_path / "m.hf")
    refuses(tmp_path / "m.hf", tmp_path / "m.bin", "is the model itself")
    (tmp_path / "n.hf" / "sub").mkdir(parents=True)
    (tmp_path / "n.hf" / "sub" / "notes.txt").write_text("mine")
    refuses(tmp_path / "m.hf", tmp_path / "n.bin", "no conversion left it")
    hashed.write_hf_folder(tmp_path / "o.hf", "llama3")
    refuses(tmp_path / "m.hf", tmp_path / "o.bin", "no conversion left it")
    (tmp_path / "p.hf").write_text("mine")
    refuses(tmp_path / "m.hf", tmp_path / "p.bin", "no conversion left it")
    (tmp_path / "q.hf").symlink_to(tmp_path / "o.hf")
    refuses(tmp_path / "m.hf", tmp_path / "q.bin", "no conversion left it")
    assert files(tmp_path / "m.hf") == before and (tmp_path / "n.hf" / "sub" / "notes.txt").read_text() == "mine"
    convert(tmp_path / "m.hf", tmp_path / "r.bin")
    convert(tmp_path / "o.hf", tmp_path / "r.bin")  # one that a conversion left
    refuses(tmp_path / "r.hf", tmp_path / "s.bin", "was left by a conversion")
    (tmp_path / "t.bin").write_bytes(b"xy")
    with pytest.raises(hf.Fault, match="no weights file of this trainer"):
        convert(tmp_path / "m.hf", tmp_path / "t.bin")


@pytest.mark.skipif(not pathlib.Path("/dev/full").exists(), reason="no /dev/full")
@pytest.mark.parametrize("size", [10, 1 << 20])
def test_a_full_disk_is_named_and_leaves_nothing(tmp_path, size):
    """10 bytes fail as the file is closed, more at once."""
    (tmp_path / "x.bin.tmp").symlink_to("/dev/full")
    with pytest.raises(hf.Fault, match="x.bin: No space left"):
        with hf.Replacing(tmp_path / "x.bin") as f:
            f.write(bytes(size))
    assert not list(tmp_path.iterdir())


def test_bad_export(tmp_path):
    hashed.write_hf_folder(tmp_path / "a", "llama2")
    hashed.write_hf_folder(tmp_path / "b", "llama3")
    convert(tmp_path / "a", tmp_path / "m.bin")
    good = (tmp_path / "m.bin").read_bytes()

    def refused(message, raw=good, **more):
        (tmp_path / "m.bin").write_bytes(raw)
        with pytest.raises(hf.Fault) as fault:
            export_hf.export(tmp_path / "m.bin", tmp_path / "out", **QUIET, **more)
        assert message in str(fault.value)
        assert not (tmp_path / "out").exists() or not list((tmp_path / "out").glob("*.tmp"))
    refused("too short", b"x")
    refused("not a weights file", b"x" * 2000)
    refused("version 9", good[:4] + b"\x09" + good[5:])
    refused("unknown element type", good[:8] + b"\x07" + good[9:])
    refused("truncated or damaged", good[:-4])
    refused("describes another model: num_key_value_heads is 2, the weights have 4", like=tmp_path / "b")
    (tmp_path / "m.bin").write_bytes(good)
    export_hf.export(tmp_path / "m.bin", tmp_path / "out", **QUIET)
    refused("already holds model.safetensors")
    refused("no such file", force=True, tokenizer=tmp_path / "nowhere.model")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "config.json").write_text("{}")
    with pytest.raises(hf.Fault, match="already holds config.json"):
        export_hf.export(tmp_path / "m.bin", tmp_path / "mine", **QUIET)
    assert (tmp_path / "mine" / "config.json").read_text() == "{}"
    export_hf.export(tmp_path / "m.bin", tmp_path / "out", force=True, **QUIET)
    with pytest.raises(hf.Fault, match="is the template itself"):
        export_hf.export(tmp_path / "m.bin", tmp_path / "a", like=tmp_path / "a", force=True, **QUIET)
    assert filecmp.cmp(tmp_path / "a" / "model.safetensors", tmp_path / "out" / "model.safetensors", shallow=False)


def test_checkpoint_folder(tmp_path):
    hashed.write_hf_folder(tmp_path / "a", "llama2")
    convert(tmp_path / "a", tmp_path / "m.bin")
    step = tmp_path / "step_5"
    step.mkdir()
    with pytest.raises(hf.Fault, match="holds 0 weights files"):
        export_hf.export(step, tmp_path / "out", **QUIET)
    (step / "moments.bin").write_bytes(b"y" * 5000)
    (step / "weights.bin").write_bytes((tmp_path / "m.bin").read_bytes())
    export_hf.export(step, tmp_path / "out", like=tmp_path / "m.hf", **QUIET)
    assert filecmp.cmp(tmp_path / "a" / "model.safetensors", tmp_path / "out" / "model.safetensors", shallow=False)


def test_command_lines(tmp_path):
    """As a user calls them."""
    def call(script, *args):
        return subprocess.run([sys.executable, str(ROOT / "scripts" / script), *map(str, args)],
                              capture_output=True, text=True)
    hashed.write_hf_folder(tmp_path / "a", "llama2")
    done = call("convert_hf.py", tmp_path / "a", tmp_path / "m.bin", "--binary", BINARY)
    assert done.returncode == 0 and "2 layers, F32" in done.stdout, done.stderr
    done = call("export_hf.py", tmp_path / "m.bin", tmp_path / "out", "--binary", BINARY)
    assert done.returncode == 0, done.stderr
    assert filecmp.cmp(tmp_path / "a" / "model.safetensors", tmp_path / "out" / "model.safetensors", shallow=False)
    done = call("convert_hf.py", tmp_path / "nowhere", tmp_path / "n.bin")
    assert done.returncode == 1 and done.stderr.startswith("convert_hf.py: ") and done.stderr.count("\n") == 1
    done = call("export_hf.py", tmp_path / "m.bin", tmp_path / "o2", "--binary", "/nowhere")
    assert done.returncode == 1 and "no such program" in done.stderr
    done = call("export_hf.py", tmp_path / "m.bin", tmp_path / "o2", "--max_shard_size", "5")
    assert done.returncode == 2 and "a size like 500MB" in done.stderr


def test_seed_of_a_tensor_is_its_name():
    weights = hashed.model_weights(hashed.config_json("qwen2"))
    name = "model.layers.1.self_attn.k_proj.bias"
    assert weights[name][3] == np.float32(0.1 * hashed.hash_normal(zlib.crc32(name.encode()), np.array([3]))[0])
