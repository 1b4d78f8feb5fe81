#!/usr/bin/env python3
"""Hugging Face model folder -> weights file of train_llama.

    python scripts/convert_hf.py ~/models/Llama-2-7b-hf llama2-7b.bin
    python scripts/convert_hf.py ~/models/Qwen2-1.5B qwen2.bin --dtype float

Reads config.json and the safetensors (one file or shards with an index) of LlamaForCausalLM,
MistralForCausalLM and Qwen2ForCausalLM. Weights are copied tensor by tensor: memory stays small whatever the
model's size. Beside OUT.bin a folder OUT.hf keeps config, tokenizer and the shards' headers, from which
export_hf.py writes the model back, byte for byte if the weights have not changed.

Layout of OUT.bin: core/config.h (a header of 1024 bytes, then the parameters in the order of
`train_llama --dump_params`, each padded to 64 elements).
"""
import argparse
import pathlib
import shutil

import numpy as np

import hf_common as hf


def choose_dtype(tensors, asked):
    """The element type of the weights file, and a remark for the user or None."""
    kinds = sorted({t.dtype for t in tensors.values()})
    unknown = [k for k in kinds if k not in hf.STORAGE]
    if unknown:
        raise hf.Fault(f"weights of type {', '.join(unknown)} (quantised?) cannot be converted; "
                       "use the model in bf16, fp16 or float")
    if asked != "keep":
        return hf.DTYPE_OPTIONS[asked], None
    if len(kinds) > 1:
        raise hf.Fault(f"the weights are of mixed types ({', '.join(kinds)}); choose one: --dtype float loses "
                       "nothing, --dtype bf16 is half as large")
    if kinds == ["F16"]:
        return "F32", "fp16 weights become float: exact, twice as large (--dtype bf16 would round them)"
    return kinds[0], None


def check_tied_head(tensors, header):
    """A tied model may store its head as well; it must then be the embedding."""
    head, embedding = tensors.get("lm_head.weight"), tensors["model.embed_tokens.weight"]
    if not header["tied"] or head is None:
        return
    a, b = head.bytes(), embedding.bytes()
    chunks = range(0, len(a), hf.CHUNK)
    if head.dtype != embedding.dtype or not all(
            np.array_equal(a[i:i + hf.CHUNK], b[i:i + hf.CHUNK]) for i in chunks):
        raise hf.Fault("config.json says tie_word_embeddings, but lm_head.weight is not the embedding; "
                       "set tie_word_embeddings to false if the head is to be used")


def is_kept(folder):
    """Whether an earlier conversion left this folder, or it is empty."""
    if folder.is_symlink() or not folder.is_dir():
        return False
    files = list(folder.iterdir())
    return all(f.is_file() and f.suffix != ".safetensors" for f in files) and \
        (not files or any(f.name.endswith(hf.HEADER_SUFFIX) for f in files))


def check_kept(folder, source):
    """The folder beside the weights may replace one that an earlier conversion left, and nothing else."""
    if folder.exists() and folder.samefile(source):
        raise hf.Fault(f"{folder}: is the model itself, and the folder beside the weights would replace it; give the "
                       "weights file another name")
    if (folder.exists() or folder.is_symlink()) and not is_kept(folder):
        raise hf.Fault(f"{folder}: stands where the folder beside the weights would, and no conversion left it; move "
                       "it, or give the weights file another name")


def keep_for_export(folder, source, tensors, headers, extra):
    """The folder beside the weights: small files, shard headers, tensors that are no weights."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    hf.copy_small_files(source, folder)
    for shard, raw in headers.items():
        (folder / (shard + hf.HEADER_SUFFIX)).write_bytes(raw)
    if extra:
        entries = [(name, (tensors[name].end - tensors[name].begin,)) for name in extra]
        with hf.Replacing(folder / hf.EXTRA) as f:
            f.write(hf.safetensors_header(entries, "U8"))
            for name in extra:
                f.write(tensors[name].bytes().tobytes())


def convert(source, out, asked="keep", binary=None, say=print):
    source, out = pathlib.Path(source), pathlib.Path(out)
    if out.suffix == ".hf":
        raise hf.Fault(f"{out}: the weights file must not end in .hf; that name is kept for the folder beside it")
    if out.is_file() and out.stat().st_size and not np.array_equal(np.fromfile(out, "<i4", 1), [hf.MAGIC]):
        raise hf.Fault(f"{out}: there is such a file, and it is no weights file of this trainer")
    if not (source / "config.json").is_file():
        raise hf.Fault(f"{source}: no config.json; name the folder of a Hugging Face model")
    kept = out.with_suffix(".hf")
    check_kept(kept, source)
    header, warnings = hf.config_to_header(hf.read_json(source / "config.json"), source / "config.json")
    tensors, headers, _ = hf.open_model(source)
    if any(t.path.endswith(hf.HEADER_SUFFIX) for t in tensors.values()):
        raise hf.Fault(f"{source}: was left by a conversion, without the weights; name the model's own folder")
    layout, elements = hf.parameter_layout(header, hf.find_binary(binary))
    extra = hf.split_names(tensors, layout, source)
    weights = {name: t for name, t in tensors.items() if name not in extra}
    dtype, remark = choose_dtype(weights, asked)
    check_tied_head(tensors, header)
    header["dtype"], header["elements"] = hf.DTYPES.index(dtype), elements
    for line in warnings + ([remark] if remark else []):
        say(f"note: {line}")

    size = hf.SIZES[dtype]
    bar = hf.progress(sum(t.end - t.begin for t in weights.values()), "convert")
    with hf.Replacing(out) as f:
        f.write(header.tobytes())
        for offset, _, name in layout:
            f.write(bytes(header.itemsize + offset * size - f.tell()))  # padding of the tensor before
            hf.copy_elements(f, tensors[name].bytes(), tensors[name].dtype, dtype, name, bar)
        f.write(bytes(header.itemsize + elements * size - f.tell()))
    if bar is not None:
        bar.close()
    keep_for_export(kept, source, tensors, headers, extra)
    parameters = sum(int(np.prod(shape)) for _, shape, _ in layout)
    say(f"{out}: {parameters:,} parameters, {header['L']} layers, {dtype}, {out.stat().st_size:,} bytes; "
        f"{kept}/ holds what export_hf.py needs")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", metavar="HF_DIR", help="folder with config.json and *.safetensors")
    parser.add_argument("out", metavar="OUT.bin", help="weights file to write; OUT.hf/ is written beside it")
    parser.add_argument("--dtype", choices=["keep", "float", "bf16"], default="keep",
                        help="element type of the weights file; keep: as the source (fp16 becomes float)")
    parser.add_argument("--binary", help="train_llama, asked for the order of the parameters (default: ./train_llama)")
    args = parser.parse_args()
    convert(args.source, args.out, args.dtype, args.binary)


if __name__ == "__main__":
    hf.run(main)
