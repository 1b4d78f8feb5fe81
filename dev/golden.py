#!/usr/bin/env python3
"""Golden vectors from Hugging Face transformers: run once where torch and transformers 5 are, commit the result.

    python3 dev/golden.py [--out test/golden]

For each family of test/hashed.py one JSON file: config.json as transformers writes it, token ids, the logits of some
positions, the mean loss over next tokens, and of every parameter's gradient the norm and some entries. The weights
are hashed from the parameters' names, so none are stored. The model runs in double; transformers forms RMSNorm's
statistics, the softmax and the rotary table in fp32 whatever the model's type, so figures are good to about 1e-6.

rope.json: inverse frequencies and attention factor of every RoPE scaling, computed by transformers in fp32: good to
about 1e-6 of each frequency (the exponent's rounding times ln base). One case a line.
"""
import argparse
import copy
import json
import pathlib
import sys
import tempfile
import zlib

import numpy as np
import torch
import torch.nn.functional as functional
import transformers
from transformers import modeling_rope_utils
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "test"))
import hashed  # noqa: E402

SAMPLES = 8        # gradient entries of each parameter
ROW_STEP = 4       # logits of every fourth position, and of the last


def digits(x):
    return float(f"{float(x):.9g}")


def build_model(family):
    architecture, _ = hashed.ARCHITECTURE[family]
    model_class = getattr(transformers, architecture)
    config = model_class.config_class(**copy.deepcopy(hashed.FAMILIES[family]))
    config._attn_implementation = "eager"
    model = model_class(config).to(torch.float64).eval()
    weights = hashed.model_weights(hashed.config_json(family))
    loaded = model.load_state_dict({n: torch.from_numpy(w).double() for n, w in weights.items()}, strict=False)
    model.tie_weights()
    missing = [n for n in loaded.missing_keys if not (config.tie_word_embeddings and n == "lm_head.weight")]
    assert not missing and not loaded.unexpected_keys, (missing, loaded.unexpected_keys)
    named = dict(model.named_parameters())
    assert named.keys() == weights.keys(), named.keys() ^ weights.keys()
    for name, w in weights.items():
        assert np.array_equal(named[name].detach().numpy(), w.astype(np.float64)), name
    return model


def written_config(model):
    """config.json as save_pretrained writes it."""
    with tempfile.TemporaryDirectory() as folder:
        model.config.architectures = [type(model).__name__]
        model.config.dtype = "float32"
        model.config.save_pretrained(folder)
        return json.loads((pathlib.Path(folder) / "config.json").read_text())


def gradient_samples(name, gradient):
    flat = gradient.reshape(-1)
    index = hashed.hash64(zlib.crc32(name.encode()) + 1, np.arange(SAMPLES)) % np.uint64(flat.numel())
    index = sorted({int(i) for i in index})
    return {"norm": digits(gradient.norm()), "index": index, "value": [digits(flat[i]) for i in index]}


def golden_model(family):
    model = build_model(family)
    ids = torch.from_numpy(hashed.model_tokens(hashed.FAMILIES[family])).long()
    logits = model(input_ids=ids[None], use_cache=False).logits[0].double()
    loss = functional.cross_entropy(logits[:-1], ids[1:])
    loss.backward()
    rows = sorted({*range(0, len(ids), ROW_STEP), len(ids) - 1})
    return {
        "transformers": transformers.__version__,
        "config": written_config(model),
        "tokens": ids.tolist(),
        "loss": digits(loss),
        "logit_scale": digits(logits.abs().max()),
        "rows": rows,
        "logits": [[digits(x) for x in logits[r]] for r in rows],
        "gradients": {n: gradient_samples(n, p.grad) for n, p in model.named_parameters()},
    }


def write_lines(path, value):
    """JSON with one line for each key, each row and each case."""
    def lines(v, deeper=()):
        if isinstance(v, dict):
            inside = (f"{json.dumps(k)}: {lines(x) if k in deeper else json.dumps(x)}" for k, x in v.items())
            return "{\n" + ",\n".join(inside) + "\n}"
        return "[\n" + ",\n".join(map(json.dumps, v)) + "\n]"
    path.write_text(lines(value, ("config", "logits", "gradients")) + "\n")


def rope_cases():
    """(D, base, max_position_embeddings, rope fields, sequence lengths)"""
    ramp = [round(1 + 0.37 * i, 4) for i in range(64)]
    yarn = {"rope_type": "yarn", "factor": 16.0, "original_max_position_embeddings": 4096}
    longrope = {"rope_type": "longrope", "original_max_position_embeddings": 4096}
    llama3 = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0,
              "original_max_position_embeddings": 8192}
    yield 128, 1e4, 4096, {"rope_type": "default"}, [4096]
    yield 64, 5e6, 65536, {"rope_type": "default"}, [65536]
    yield 128, 1e4, 4096, {"rope_type": "linear", "factor": 8.0}, [4096, 32768]
    yield 128, 1e4, 4096, {"rope_type": "dynamic", "factor": 2.0}, [1024, 4096, 4097, 32768]
    yield 64, 5e5, 8192, {"rope_type": "dynamic", "factor": 4.0}, [8192, 131072]
    yield 128, 1e4, 65536, yarn, [4096, 65536]
    yield 64, 1e6, 65536, dict(yarn, beta_fast=20.0, beta_slow=2.0, attention_factor=1.25), [65536]
    yield 64, 1e4, 65536, dict(yarn, mscale=0.707, mscale_all_dim=1.0), [65536]
    yield 128, 1e4, 131072, dict(longrope, short_factor=ramp[::-1], long_factor=ramp), [4096, 4097, 131072]
    yield 64, 1e4, 131072, dict(longrope, short_factor=[1.0] * 32, long_factor=ramp[:32], factor=16.0), [65536]
    yield 64, 1e4, 131072, dict(longrope, short_factor=[1.0] * 32, long_factor=ramp[:32], attention_factor=1.5), [4096]
    yield 128, 5e5, 131072, dict(llama3, factor=8.0), [8192, 131072]
    yield 64, 5e5, 131072, dict(llama3, factor=32.0), [131072]


def golden_rope():
    cases = []
    for D, base, context, rope, lengths in rope_cases():
        config = transformers.LlamaConfig(hidden_size=4 * D, num_attention_heads=4, max_position_embeddings=context,
                                          rope_parameters=dict(rope, rope_theta=base))
        for S in lengths:
            if rope["rope_type"] == "default":
                embedding = LlamaRotaryEmbedding(config)
                inv_freq, factor = embedding.inv_freq, embedding.attention_scaling
            else:
                init = modeling_rope_utils.ROPE_INIT_FUNCTIONS[rope["rope_type"]]
                inv_freq, factor = init(config, torch.device("cpu"), seq_len=S)
            cases.append({"D": D, "base": base, "max_context": context, **rope, "S": S,
                          "attention_factor_used": digits(factor), "inv_freq": [digits(x) for x in inv_freq]})
            assert len(inv_freq) == D // 2
    return cases


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=pathlib.Path, default=ROOT / "test" / "golden")
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    for family in hashed.FAMILIES:
        value = golden_model(family)
        write_lines(out / f"{family}.json", value)
        print(f"{family}: loss {value['loss']:.6f}, logits up to {value['logit_scale']:.3f}, "
              f"{(out / f'{family}.json').stat().st_size:,} bytes")
    cases = golden_rope()
    write_lines(out / "rope.json", cases)
    print(f"rope: {len(cases)} cases, {(out / 'rope.json').stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
