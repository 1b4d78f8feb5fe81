"""The counter-based hash of core/types.h in numpy, and the small models whose weights come from it.

Tests, the golden vectors of dev/golden.py and the C++ suite draw the same numbers, so no weights are stored.
"""
import json
import zlib

import numpy as np

MASK = 0xFFFFFFFFFFFFFFFF


@np.errstate(over="ignore")  # products wrap modulo 2^64
def hash64(seed, index):
    """uint64 for each index: the same bits as hash64 in core/types.h."""
    start = ((seed * 0x9E3779B97F4A7C15) + 0x632BE59BD9B4E019) & MASK
    z = np.asarray(index).astype(np.uint64) + np.uint64(start)
    for _ in range(2):
        z = z + np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z = z ^ (z >> np.uint64(31))
    return z


def hash_uniform(seed, index):
    return (hash64(seed, index) >> np.uint64(11)).astype(np.float64) * 2.0**-53


@np.errstate(over="ignore")
def hash_normal(seed, index):
    index = np.asarray(index).astype(np.uint64)
    u = 1.0 - hash_uniform(seed, index * np.uint64(2))
    v = hash_uniform(seed, index * np.uint64(2) + np.uint64(1))
    return np.sqrt(-2.0 * np.log(u)) * np.cos(6.283185307179586476925 * v)


# Four families, as keyword arguments of transformers' configurations; with the two fields of ARCHITECTURE they
# are a config.json. Small enough for finite differences, awkward enough to tell the families apart: grouped
# heads, a head size that is not C / H, llama3 scaling whose three bands all occur, bias, a tied head.
SHAPE = dict(vocab_size=160, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
             hidden_act="silu")
FAMILIES = {
    "llama2": dict(SHAPE, num_key_value_heads=4, max_position_embeddings=128, rms_norm_eps=1e-5,
                   bos_token_id=1, eos_token_id=2, tie_word_embeddings=False,
                   rope_parameters={"rope_type": "default", "rope_theta": 10000.0}),
    "llama3": dict(SHAPE, num_key_value_heads=2, max_position_embeddings=512, rms_norm_eps=1e-5,
                   bos_token_id=1, eos_token_id=2, tie_word_embeddings=False,
                   rope_parameters={"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0,
                                    "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                                    "original_max_position_embeddings": 64}),
    "mistral": dict(SHAPE, num_key_value_heads=2, head_dim=24, max_position_embeddings=256, rms_norm_eps=1e-5,
                    bos_token_id=1, eos_token_id=2, tie_word_embeddings=False, sliding_window=None,
                    rope_parameters={"rope_type": "default", "rope_theta": 1000000.0}),
    "qwen2": dict(SHAPE, num_key_value_heads=2, max_position_embeddings=256, rms_norm_eps=1e-6,
                  bos_token_id=None, eos_token_id=2, tie_word_embeddings=True, use_sliding_window=False,
                  rope_parameters={"rope_type": "default", "rope_theta": 1000000.0}),
}
ARCHITECTURE = {"llama2": ("LlamaForCausalLM", "llama"), "llama3": ("LlamaForCausalLM", "llama"),
                "mistral": ("MistralForCausalLM", "mistral"), "qwen2": ("Qwen2ForCausalLM", "qwen2")}
TOKENS = 48


def config_json(family):
    architecture, model_type = ARCHITECTURE[family]
    return dict(FAMILIES[family], architectures=[architecture], model_type=model_type, dtype="float32")


def model_shapes(config):
    """{Hugging Face name: shape} in the order of the parameters; `config` as in config.json."""
    C, F, V = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    H, K = config["num_attention_heads"], config["num_key_value_heads"]
    D = config.get("head_dim") or C // H
    shapes = {"model.embed_tokens.weight": (V, C)}
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        rows = {"q": H * D, "k": K * D, "v": K * D}
        shapes[prefix + "input_layernorm.weight"] = (C,)
        shapes.update({prefix + f"self_attn.{n}_proj.weight": (rows[n], C) for n in rows})
        if config["model_type"] == "qwen2":
            shapes.update({prefix + f"self_attn.{n}_proj.bias": (rows[n],) for n in rows})
        shapes[prefix + "self_attn.o_proj.weight"] = (C, H * D)
        shapes[prefix + "post_attention_layernorm.weight"] = (C,)
        shapes[prefix + "mlp.gate_proj.weight"] = (F, C)
        shapes[prefix + "mlp.up_proj.weight"] = (F, C)
        shapes[prefix + "mlp.down_proj.weight"] = (C, F)
    shapes["model.norm.weight"] = (C,)
    if not config.get("tie_word_embeddings"):
        shapes["lm_head.weight"] = (V, C)
    return shapes


def model_weights(config):
    """{Hugging Face name: float32 array}. Element i of a tensor is drawn from hash_normal(crc32(name), i):
    matrices times 0.08, the embedding times 0.15, norms 1 + 0.1 z, biases 0.1 z."""
    weights = {}
    for name, shape in model_shapes(config).items():
        z = hash_normal(zlib.crc32(name.encode()), np.arange(int(np.prod(shape)))).reshape(shape)
        if name.endswith("norm.weight"):
            z = 1 + 0.1 * z
        else:
            z = z * (0.1 if name.endswith("bias") else 0.15 if "embed" in name else 0.08)
        weights[name] = z.astype(np.float32)
    return weights


def model_tokens(config, count=TOKENS):
    """Token ids for a model: its BOS if it has one, then hashed ids that are no special tokens."""
    V = config["vocab_size"]
    ids = (hash64(zlib.crc32(b"tokens"), np.arange(count)) % np.uint64(V - 3)).astype(np.int32) + 3
    if config.get("bos_token_id") is not None:
        ids[0] = config["bos_token_id"]
    return ids


def bf16_bits(x):
    """float32 -> the upper half, rounded to nearest even (no NaN here)."""
    u = np.ascontiguousarray(x, np.float32).view(np.uint32)
    return ((u + 0x7FFF + ((u >> 16) & 1)) >> 16).astype(np.uint16)


def write_safetensors(path, tensors, dtype="F32", metadata=None):
    """tensors: [(name, float32 array)], written in this order. Not the scripts' writer: that one is on trial."""
    table, data = {"__metadata__": metadata or {"format": "pt"}}, b""
    for name, array in tensors:
        raw = bf16_bits(array) if dtype == "BF16" else array.astype({"F32": "<f4", "F16": "<f2", "F64": "<f8"}[dtype])
        table[name] = {"dtype": dtype, "shape": list(array.shape),
                       "data_offsets": [len(data), len(data) + raw.nbytes]}
        data += raw.tobytes()
    header = json.dumps(table).encode()
    header += b" " * (-len(header) % 8)
    path.write_bytes(len(header).to_bytes(8, "little") + header + data)


def write_hf_folder(folder, family, dtype="F32", shards=1, config=None):
    """A Hugging Face model folder with hashed weights; tensors sorted by name, as the library leaves them."""
    folder.mkdir()
    config = dict(config or config_json(family), dtype={"F32": "float32", "BF16": "bfloat16", "F16": "float16"}[dtype])
    weights = sorted(model_weights(config).items())
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    if shards == 1:
        write_safetensors(folder / "model.safetensors", weights, dtype)
        return
    weight_map = {}
    for i in range(shards):
        name, part = f"model-{i + 1:05}-of-{shards:05}.safetensors", weights[i::shards]
        write_safetensors(folder / name, part, dtype)
        weight_map.update({tensor: name for tensor, _ in part})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
