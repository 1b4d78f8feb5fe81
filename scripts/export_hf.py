#!/usr/bin/env python3
"""Weights file of train_llama -> Hugging Face model folder.

    python scripts/export_hf.py llama2-7b.bin out/                          # the folder llama2-7b.hf is the template
    python scripts/export_hf.py run/step_00002000 out/ --like llama2-7b.hf  # a checkpoint of a converted model
    python scripts/export_hf.py run/step_00002000 out/ --tokenizer tokenizer.model   # a model trained from scratch

The template (a Hugging Face folder, or the .hf folder that convert_hf.py left) gives the tokenizer, the
configuration and the cut into shards. Unchanged weights of the same element type come out byte for byte as
they were. Context length, RoPE and special tokens follow the weights file: config.json is changed where it
says otherwise, and then, as always without a template, holds both spellings of the RoPE fields: rope_theta and
rope_scaling for transformers 4, rope_parameters for 5. Tensors are copied one at a time.
"""
import argparse
import json
import pathlib
import shutil

import numpy as np

import hf_common as hf

ARCHITECTURE_FIELDS = {"L": "num_hidden_layers", "C": "hidden_size", "H": "num_attention_heads",
                       "K": "num_key_value_heads", "D": "head_dim", "F": "intermediate_size", "V": "vocab_size",
                       "tied": "tie_word_embeddings", "qkv_bias": "bias of q, k and v"}
ROPE_FIELDS = ["scaling", "factor", "low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow",
               "attention_factor", "mscale", "mscale_all_dim", "original_context", "short_factor", "long_factor"]


def parse_size(text):
    units = {"KB": 10**3, "MB": 10**6, "GB": 10**9}
    digits, unit = text[:-2], text[-2:].upper()
    if unit not in units or not digits.isdigit() or int(digits) == 0:
        raise argparse.ArgumentTypeError(f"'{text}': a size like 500MB or 5GB is expected")
    return int(digits) * units[unit]


def set_rope(config, header):
    """Both spellings, so that transformers 4 and 5 read the same."""
    rope, base = hf.header_to_rope(header), float(header["base"])
    config["rope_theta"] = base
    config["rope_scaling"] = rope
    config["rope_parameters"] = dict(rope or {"rope_type": "default"}, rope_theta=base)


def id_or_null(value):
    return None if value < 0 else int(value)


def fresh_config(header):
    qwen = bool(header["qkv_bias"])
    config = {
        "architectures": ["Qwen2ForCausalLM" if qwen else "LlamaForCausalLM"],
        "model_type": "qwen2" if qwen else "llama",
        "vocab_size": int(header["V"]), "hidden_size": int(header["C"]), "intermediate_size": int(header["F"]),
        "num_hidden_layers": int(header["L"]), "num_attention_heads": int(header["H"]),
        "num_key_value_heads": int(header["K"]), "head_dim": int(header["D"]),
        "hidden_act": "silu", "rms_norm_eps": float(header["eps"]),
        "max_position_embeddings": int(header["max_context"]),
        "bos_token_id": id_or_null(header["bos"]), "eos_token_id": id_or_null(header["eos"]),
        "tie_word_embeddings": bool(header["tied"]), "attention_dropout": 0.0, "initializer_range": 0.02,
        "use_cache": True,
    }
    config.update({"use_sliding_window": False} if qwen else {"attention_bias": False, "mlp_bias": False})
    set_rope(config, header)
    return config


def updated_config(config, header, dtype, where):
    """The template's config.json with what the weights file says otherwise; None: nothing to change."""
    said, _ = hf.config_to_header(config, where)
    for field, name in ARCHITECTURE_FIELDS.items():
        if said[field] != header[field]:
            raise hf.Fault(f"{where} describes another model: {name} is {said[field]}, "
                           f"the weights have {header[field]}")
    config, changed = dict(config), False
    for field, name, value in (("max_context", "max_position_embeddings", int(header["max_context"])),
                               ("eps", "rms_norm_eps", float(header["eps"])),
                               ("bos", "bos_token_id", id_or_null(header["bos"])),
                               ("eos", "eos_token_id", id_or_null(header["eos"]))):
        if said[field] != header[field]:
            config[name], changed = value, True
    same_rope = said["base"] == header["base"] and all(np.array_equal(said[f], header[f]) for f in ROPE_FIELDS)
    if not same_rope or ("rope_parameters" in config and "rope_theta" not in config):
        if "original_max_position_embeddings" in config:  # would outrank the one in the RoPE fields
            config["original_max_position_embeddings"] = int(header["original_context"] or header["max_context"])
        set_rope(config, header)
        changed = True
    key = "dtype" if "dtype" in config and "torch_dtype" not in config else "torch_dtype"
    if config.get(key, hf.TORCH_NAMES[dtype]) != hf.TORCH_NAMES[dtype]:
        config[key], changed = hf.TORCH_NAMES[dtype], True
    return config if changed else None


def cut_into_shards(names, shapes, dtype, limit):
    """[(file name, [names])]: tensors in order, a new file before `limit` bytes are exceeded."""
    groups, used = [[]], 0
    for name in names:
        size = int(np.prod(shapes[name], dtype=np.int64)) * hf.SIZES[dtype]
        if groups[-1] and used + size > limit:
            groups.append([])
            used = 0
        groups[-1].append(name)
        used += size
    if len(groups) == 1:
        return [("model.safetensors", groups[0])]
    return [(f"model-{i + 1:05}-of-{len(groups):05}.safetensors", g) for i, g in enumerate(groups)]


def with_headers(groups, shapes, dtype):
    return [(f, names, hf.safetensors_header([(n, shapes[n]) for n in names], dtype)) for f, names in groups if names]


def plan_shards(template, layout, dtype, limit):
    """[(file name, [names], header bytes)], the tensors that are kept aside, and whether all is as in the template."""
    shapes = {name: shape for _, shape, name in layout}
    if template is None:
        groups = cut_into_shards(list(shapes), shapes, dtype, limit or parse_size("5GB"))
        return with_headers(groups, shapes, dtype), {}, False
    tensors, headers, order = hf.open_model(template)
    extra = hf.split_names(tensors, layout, template)
    kept = {name: tensors[name].bytes for name in extra}
    if any(tensors[name].path.endswith(hf.HEADER_SUFFIX) for name in extra):  # their data lies in a file of its own
        aside = hf.read_safetensors(pathlib.Path(template) / hf.EXTRA)[0]
        kept = {name: aside[name].bytes for name in extra}
    if limit is None and all(t.dtype == dtype for name, t in tensors.items() if name not in extra):
        return [(f, order[f], headers[f]) for f in order], kept, True
    names = [n for f in order for n in order[f] if n in shapes]
    groups = cut_into_shards(names, shapes, dtype, limit) if limit else \
        [(f, [n for n in order[f] if n in shapes]) for f in order]
    return with_headers(groups, shapes, dtype), {}, False


def write_shards(out, model, header, layout, shards, kept, dtype):
    stored = hf.DTYPES[header["dtype"]]
    size = hf.SIZES[stored]
    where = {name: (header.itemsize + offset * size, int(np.prod(shape, dtype=np.int64)) * size)
             for offset, shape, name in layout}
    where.setdefault("lm_head.weight", where["model.embed_tokens.weight"])  # tied, yet stored by the template
    bar = hf.progress(sum(where[n][1] for _, names, _ in shards for n in names if n in where), "export")
    for file, names, raw in shards:
        with hf.Replacing(out / file) as f:
            f.write(raw)
            for name in names:
                if name in kept:
                    f.write(kept[name]().tobytes())
                    continue
                begin, length = where[name]
                hf.copy_elements(f, np.memmap(model, np.uint8, "r", begin, (length,)), stored, dtype, name, bar)
    if bar is not None:
        bar.close()


def write_json(path, value):
    with hf.Replacing(path) as f:
        f.write((json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())


def prepare_folder(out, force):
    out.mkdir(parents=True, exist_ok=True)
    old = [f for f in out.iterdir() if f.name.endswith((".safetensors", ".safetensors.index.json"))]
    held = sorted(f.name for f in old) or [f.name for f in (out / "config.json",) if f.exists()]
    if held and not force:
        raise hf.Fault(f"{out} already holds {hf.some(held)}; name another folder, or --force")
    for file in old:
        file.unlink()


def export(model, out, like=None, asked="keep", limit=None, tokenizer=None, binary=None, force=False, say=print):
    model, out = hf.find_weights(model), pathlib.Path(out)
    header = hf.read_header(model)
    dtype = hf.DTYPES[header["dtype"]] if asked == "keep" else hf.DTYPE_OPTIONS[asked]
    if like is None and model.with_suffix(".hf").is_dir():
        like = model.with_suffix(".hf")
    layout, elements = hf.parameter_layout(header, hf.find_binary(binary))
    if elements != header["elements"]:
        raise hf.Fault(f"{model}: {header['elements']} elements, this shape has {elements}: "
                       "damaged, or of another version")
    source = like and pathlib.Path(like) / "config.json"
    template_config = hf.read_json(source) if like else None
    config = updated_config(template_config, header, dtype, source) if like else dict(
        fresh_config(header), torch_dtype=hf.TORCH_NAMES[dtype])
    shards, kept, same_cut = plan_shards(like, layout, dtype, limit)
    if like and out.exists() and pathlib.Path(like).samefile(out):
        raise hf.Fault(f"{out} is the template itself; name another folder")
    if tokenizer and not pathlib.Path(tokenizer).is_file():
        raise hf.Fault(f"{tokenizer}: no such file")
    prepare_folder(out, force)

    write_shards(out, model, header, layout, shards, kept, dtype)
    if like:
        hf.copy_small_files(like, out)
    if not same_cut:
        (out / hf.INDEX).unlink(missing_ok=True)
        if len(shards) > 1:
            total = sum(int(np.prod(shape)) * hf.SIZES[dtype] for _, shape, _ in layout)
            write_json(out / hf.INDEX, {"metadata": {"total_size": total},
                                        "weight_map": {n: f for f, names, _ in shards for n in names}})
    if config is not None:
        write_json(out / "config.json", config)
    if tokenizer and pathlib.Path(tokenizer).resolve().parent != out.resolve():
        shutil.copyfile(tokenizer, out / pathlib.Path(tokenizer).name)
    say(f"{out}: {len(shards)} safetensors file{'s' * (len(shards) > 1)}, {dtype}, " +
        ("config.json of the template, unchanged" if config is None else
         "config.json brought up to date" if like else "config.json made from the weights' header"))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="MODEL.bin", help="weights file, or a checkpoint's folder")
    parser.add_argument("out", metavar="OUT_DIR", help="folder to write")
    parser.add_argument("--like", metavar="DIR", help="template: a Hugging Face folder, or a .hf folder of "
                        "convert_hf.py (default: MODEL.hf if it is there)")
    parser.add_argument("--dtype", choices=["keep", "float", "bf16", "fp16"], default="keep",
                        help="element type to write; keep: the weights file's")
    parser.add_argument("--max_shard_size", type=parse_size, metavar="SIZE",
                        help="largest file, as 500MB or 5GB (default: the template's cut; without one, 5GB)")
    parser.add_argument("--tokenizer", metavar="FILE", help="tokenizer.model or tokenizer.json to copy along")
    parser.add_argument("--binary", help="train_llama, asked for the order of the parameters (default: ./train_llama)")
    parser.add_argument("--force", action="store_true", help="replace safetensors that OUT_DIR already holds")
    args = parser.parse_args()
    export(args.model, args.out, args.like, args.dtype, args.max_shard_size, args.tokenizer, args.binary, args.force)


if __name__ == "__main__":
    hf.run(main)
