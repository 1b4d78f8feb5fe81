"""What convert_hf.py and export_hf.py share: safetensors, config.json and the header of a weights file.

Needs numpy alone. The header of safetensors is read and checked here rather than by the library, so that
a damaged or hostile file ends in one clear line, and so that its bytes can be kept for an identical export.
"""
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile

import numpy as np

ROOT = pathlib.Path(__file__).resolve().parent.parent
CHUNK = 1 << 24  # bytes moved at a time; weights are never held whole


class Fault(Exception):
    """What a user did or has; its text is the one line that is printed."""


def run(main):
    """Runs a script's main: a Fault becomes one line and exit status 1."""
    name = pathlib.Path(sys.argv[0]).name
    try:
        main()
    except Fault as fault:
        sys.exit(f"{name}: {fault}")
    except OSError as error:
        sys.exit(f"{name}: {error.filename or 'file'}: {error.strerror or error}")


# The header of a weights file: core/config.h.

MAGIC, VERSION, ALIGNMENT = 0x4D414C4C, 1, 64
INTS = ("magic version dtype L C H K D F V tied qkv_bias bos eos max_context original_context scaling").split()
REALS = ("eps base factor low_freq_factor high_freq_factor beta_fast beta_slow attention_factor mscale "
         "mscale_all_dim").split()
HEADER = np.dtype({
    "names": INTS + ["elements"] + REALS + ["short_factor", "long_factor"],
    "formats": ["<i4"] * len(INTS) + ["<u8"] + ["<f8"] * len(REALS) + [("<f4", 64), ("<f4", 64)],
    "offsets": [4 * i for i in range(len(INTS))] + [72] + [80 + 8 * i for i in range(len(REALS))] + [256, 512],
    "itemsize": 1024,
})
SCALINGS = ["none", "linear", "dynamic", "yarn", "longrope", "llama3"]

# Element types: safetensors' name -> bytes; ours by the number in the header.
SIZES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1,
         "F8_E4M3": 1, "F8_E5M2": 1, "U16": 2, "U32": 4, "U64": 8}
STORAGE = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}  # bf16 travels as its bits
DTYPES = ["F32", "BF16", "F64"]  # by the header's number
DTYPE_OPTIONS = {"float": "F32", "bf16": "BF16", "fp16": "F16", "double": "F64"}
TORCH_NAMES = {"F32": "float32", "BF16": "bfloat16", "F64": "float64", "F16": "float16"}


def new_header():
    header = np.zeros((), HEADER)
    header["magic"], header["version"] = MAGIC, VERSION
    return header


def read_header(path):
    """The header of a weights file, with the file's size checked against it."""
    size = os.path.getsize(path)
    if size < HEADER.itemsize:
        raise Fault(f"{path}: {size} bytes, too short for a weights file")
    with open(path, "rb") as f:
        header = np.frombuffer(f.read(HEADER.itemsize), HEADER).reshape(())
    if header["magic"] != MAGIC:
        raise Fault(f"{path}: not a weights file of train_llama")
    if header["version"] != VERSION:
        raise Fault(f"{path}: version {header['version']} of the format, this script knows {VERSION}")
    if not 0 <= header["dtype"] < len(DTYPES):
        raise Fault(f"{path}: unknown element type {header['dtype']}")
    expected = HEADER.itemsize + int(header["elements"]) * SIZES[DTYPES[header["dtype"]]]
    if size != expected:
        raise Fault(f"{path}: {size} bytes, its header says {expected}: truncated or damaged")
    return header


def find_weights(path):
    """The weights file named, or the only one in a checkpoint's folder."""
    path = pathlib.Path(path)
    if not path.is_dir():
        return path
    found = []
    for file in sorted(path.iterdir()):
        if file.is_file() and file.stat().st_size >= HEADER.itemsize:
            with open(file, "rb") as f:
                if f.read(4) == MAGIC.to_bytes(4, "little"):
                    found.append(file)
    if len(found) != 1:
        raise Fault(f"{path}: holds {len(found)} weights files; name the one to export")
    return found[0]


def find_binary(given):
    candidates = [given] if given else [ROOT / "train_llama", pathlib.Path.cwd() / "train_llama"]
    for path in candidates:
        if os.path.isfile(path) and os.access(path, os.X_OK):
            return os.path.abspath(path)
    raise Fault(f"{given or 'train_llama'}: no such program; build it (make train_llama) or name it with --binary")


def parameter_layout(header, binary):
    """[(offset in elements, shape, Hugging Face name)] in file order, and the elements in all.

    Asked of the program itself, so that the order of parameters is written down once.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "header.bin")
        with open(path, "wb") as f:
            f.write(header.tobytes())
        done = subprocess.run([binary, "--dump_params", "-e", path], capture_output=True, text=True)
    if done.returncode:
        said = (done.stderr.strip() or done.stdout.strip() or f"exit status {done.returncode}").splitlines()[-1]
        raise Fault(f"{binary} --dump_params: {said.replace(path, 'this model')}")
    layout, end = [], 0
    for line in done.stdout.splitlines():
        match = re.fullmatch(r"(\d+)\t(\d+)(?:x(\d+))?\t(\S+)", line)
        if not match:
            continue
        shape = tuple(int(n) for n in match.group(2, 3) if n)
        if int(match[1]) < end:
            raise Fault(f"{binary} --dump_params: {match[4]} overlaps the tensor before it")
        layout.append((int(match[1]), shape, match[4]))
        end = int(match[1]) + int(np.prod(shape, dtype=np.int64))
    if not layout:
        raise Fault(f"{binary} --dump_params printed no tensors")
    return layout, -(-end // ALIGNMENT) * ALIGNMENT


# config.json <-> header. Defaults are those of transformers' configuration classes, for files that omit a field.

FAMILIES = {
    "LlamaForCausalLM": dict(num_key_value_heads=None, bos_token_id=1, eos_token_id=2, max_position_embeddings=2048),
    "MistralForCausalLM": dict(num_key_value_heads=8, bos_token_id=1, eos_token_id=2, max_position_embeddings=131072,
                               sliding_window=4096),
    "Qwen2ForCausalLM": dict(num_key_value_heads=32, bos_token_id=None, eos_token_id=None,
                             max_position_embeddings=32768),
}


def read_json(path):
    try:
        with open(path, encoding="utf-8") as f:
            value = json.load(f)
    except (ValueError, RecursionError) as error:
        raise Fault(f"{path}: not JSON: {error}") from None
    if not isinstance(value, dict):
        raise Fault(f"{path}: a JSON object is expected")
    return value


def number(table, name, default, kind, where):
    value = table.get(name)
    value = default if value is None else value
    fits = isinstance(value, int) if kind is int else isinstance(value, (int, float))
    if not fits or isinstance(value, bool) or not abs(value) < 2**31 * (1e6 if kind is float else 1):
        raise Fault(f"{where}: {name} is {json.dumps(value)}, a{'n integer' if kind is int else ' number'} is expected")
    return kind(value)


def token_id(config, name, default, where):
    value = config.get(name, default)
    if isinstance(value, list):  # LLaMA-3's instruction models name several ends
        value = value[0] if value else None
    return -1 if value is None else number({name: value}, name, None, int, where)


def config_to_header(config, where):
    """The header (without dtype and elements) that config.json describes, and warnings for the user."""
    family = (config.get("architectures") or [None])[0]
    if family not in FAMILIES:
        raise Fault(f"{where}: architecture {family}; only {', '.join(FAMILIES)} can be converted")
    default, warnings = FAMILIES[family], []
    for name, wanted in (("quantization_config", None), ("mlp_bias", False), ("attention_bias", False),
                         ("hidden_act", "silu"), ("partial_rotary_factor", 1.0)):
        if config.get(name, wanted) not in (wanted, None):
            raise Fault(f"{where}: {name} is {json.dumps(config[name])[:80]}, which this program does not have")
    window = config.get("sliding_window", default.get("sliding_window"))
    if window is not None and config.get("use_sliding_window", family != "Qwen2ForCausalLM"):
        warnings.append(f"sliding_window is {window}: this program attends to everything before; "
                        "the same only up to that length")

    header = new_header()
    for field, name in (("L", "num_hidden_layers"), ("C", "hidden_size"), ("H", "num_attention_heads"),
                        ("F", "intermediate_size"), ("V", "vocab_size")):
        header[field] = number(config, name, None, int, where)
    if not (header["H"] > 0 and header["C"] > 0):
        raise Fault(f"{where}: hidden_size and num_attention_heads must be positive")
    header["K"] = number(config, "num_key_value_heads", default["num_key_value_heads"] or int(header["H"]), int, where)
    header["D"] = number(config, "head_dim", int(header["C"]) // int(header["H"]), int, where)
    header["eps"] = number(config, "rms_norm_eps", 1e-6, float, where)
    header["tied"] = bool(config.get("tie_word_embeddings", False))
    header["qkv_bias"] = family == "Qwen2ForCausalLM"
    header["bos"] = token_id(config, "bos_token_id", default["bos_token_id"], where)
    header["eos"] = token_id(config, "eos_token_id", default["eos_token_id"], where)
    if header["bos"] == header["eos"]:
        header["bos"] = -1  # Qwen2 writes its EOS here; its tokenizer has no BOS
    header["max_context"] = number(config, "max_position_embeddings", default["max_position_embeddings"], int, where)
    rope_to_header(header, config, where)
    return header, warnings


def rope_to_header(header, config, where):
    """RoPE in either spelling: rope_theta and rope_scaling (transformers 4), rope_parameters (5). When both are
    there, rope_scaling wins, as it does in transformers."""
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if isinstance(rope.get("full_attention"), dict):  # one per layer type
        rope = rope["full_attention"]
    where = f"{where}: RoPE"
    kind = rope.get("rope_type", rope.get("type", "default"))
    kind = "none" if kind == "default" else kind
    if kind not in SCALINGS:
        raise Fault(f"{where} type '{kind}' is unknown; known are default, {', '.join(SCALINGS[1:])}")
    if rope.get("partial_rotary_factor", 1.0) != 1.0 or rope.get("truncate", True) is not True:
        raise Fault(f"{where} with partial_rotary_factor or truncate=false is not supported")
    header["scaling"] = SCALINGS.index(kind)
    header["base"] = number(rope, "rope_theta", config.get("rope_theta") or 10000.0, float, where)
    header["factor"] = 1
    for name, value in (("low_freq_factor", 1), ("high_freq_factor", 4), ("beta_fast", 32), ("beta_slow", 1)):
        header[name] = number(rope, name, value, float, where)
    original = config.get("original_max_position_embeddings") or rope.get("original_max_position_embeddings")
    if kind in ("yarn", "longrope", "llama3") and original is not None:
        header["original_context"] = number({"original context": original}, "original context", None, int, where)
    if kind in ("yarn", "longrope"):
        for name in ("attention_factor", "mscale", "mscale_all_dim"):
            header[name] = number(rope, name, 0, float, where)
        implied = int(header["max_context"]) / int(header["original_context"] or header["max_context"])
        header["factor"] = number(rope, "factor", implied, float, where)
    elif kind != "none":
        header["factor"] = number(rope, "factor", None, float, where)
    if kind == "longrope":
        for name in ("short_factor", "long_factor"):
            factors = rope.get(name)
            if not isinstance(factors, list) or len(factors) != header["D"] // 2 or len(factors) > 64:
                raise Fault(f"{where}: {name} must list {header['D'] // 2} factors (at most 64)")
            header[name][:len(factors)] = [number({name: x}, name, None, float, where) for x in factors]


def header_to_rope(header):
    """The dict that rope_scaling (without rope_theta) and rope_parameters (with it) hold; None: no scaling."""
    kind = SCALINGS[header["scaling"]]
    if kind == "none":
        return None
    rope = {"rope_type": kind, "factor": float(header["factor"])}
    names = {"llama3": ["low_freq_factor", "high_freq_factor"], "yarn": ["beta_fast", "beta_slow"]}.get(kind, [])
    rope.update((name, float(header[name])) for name in names)
    if kind in ("yarn", "longrope"):
        optional = ("attention_factor", "mscale", "mscale_all_dim")
        rope.update((name, float(header[name])) for name in optional if header[name] != 0)
    if kind == "longrope":
        for name in ("short_factor", "long_factor"):  # the shortest decimals that read back as the same floats
            rope[name] = [float(str(x)) for x in header[name][:header["D"] // 2]]
    if kind in ("yarn", "longrope", "llama3"):
        rope["original_max_position_embeddings"] = int(header["original_context"] or header["max_context"])
    return rope


# safetensors: u64 length, JSON header, data.

class Tensor:
    """One tensor in a file: where its bytes lie, what they are."""

    def __init__(self, dtype, shape, path, begin, end):
        self.dtype, self.shape, self.path, self.begin, self.end = dtype, shape, path, begin, end

    def bytes(self):
        if self.begin == self.end:
            return np.zeros(0, np.uint8)
        return np.memmap(self.path, np.uint8, "r", self.begin, (self.end - self.begin,))


def read_safetensors(path, header_only=False):
    """Checks a safetensors header against its file; returns ({name: Tensor} in file order, the header's bytes).
    header_only: the file is a header that was kept without its data."""
    size = os.path.getsize(path)
    with open(path, "rb") as f:
        length = int.from_bytes(f.read(8), "little")
        if size < 8 or length > min(size - 8, 100_000_000):
            raise Fault(f"{path}: not safetensors, or truncated: a header of {length} bytes in a file of {size}")
        raw = f.read(length)

    def no_twins(pairs):
        if len(dict(pairs)) != len(pairs):
            raise Fault(f"{path}: the header names a tensor twice")
        return dict(pairs)
    try:
        table = json.loads(raw.decode("utf-8"), object_pairs_hook=no_twins)
    except (ValueError, RecursionError) as error:
        raise Fault(f"{path}: the header is not JSON: {error}") from None
    if not isinstance(table, dict):
        raise Fault(f"{path}: the header is not a JSON object")
    table.pop("__metadata__", None)
    tensors = {name: checked_entry(path, name, entry, 8 + length) for name, entry in table.items()}
    tensors = dict(sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].end)))
    end = 8 + length
    for name, tensor in tensors.items():
        if tensor.begin != end:
            raise Fault(f"{path}: {name} {'overlaps' if tensor.begin < end else 'leaves a hole behind'} "
                        "the tensor before it")
        end = tensor.end
    if not header_only and end != size:
        raise Fault(f"{path}: {size} bytes, its tensors end at {end}: "
                    f"{'truncated' if size < end else 'bytes that belong to no tensor'}")
    return tensors, length.to_bytes(8, "little") + raw


def checked_entry(path, name, entry, data):
    def natural(values):
        return isinstance(values, list) and all(type(n) is int and 0 <= n < 2**62 for n in values)
    if not isinstance(entry, dict) or entry.get("dtype") not in SIZES:
        kind = entry.get("dtype") if isinstance(entry, dict) else entry
        raise Fault(f"{path}: {name} has unknown element type {json.dumps(kind)[:40]}")
    shape, offsets = entry.get("shape"), entry.get("data_offsets")
    if not natural(shape) or not natural(offsets) or len(offsets) != 2:
        raise Fault(f"{path}: {name}: shape {shape} or data_offsets {offsets} is malformed")
    expected = SIZES[entry["dtype"]]
    for n in shape:
        expected *= n
    if offsets[1] - offsets[0] != expected:
        raise Fault(f"{path}: {name}: {entry['dtype']} {shape} needs {expected} bytes, its range has "
                    f"{offsets[1] - offsets[0]}")
    return Tensor(entry["dtype"], tuple(shape), str(path), data + offsets[0], data + offsets[1])


def safetensors_header(entries, dtype):
    """Header bytes for [(name, shape)] in this order, padded to 8 bytes as the library does."""
    table, end = {"__metadata__": {"format": "pt"}}, 0
    for name, shape in entries:
        begin, end = end, end + int(np.prod(shape, dtype=np.int64)) * SIZES[dtype]
        table[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
    raw = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
    raw += b" " * (-len(raw) % 8)
    return len(raw).to_bytes(8, "little") + raw


INDEX = "model.safetensors.index.json"
HEADER_SUFFIX = ".header"  # a shard's kept header, in the folder that convert_hf.py leaves beside the weights
EXTRA = "extra.kept"       # tensors that are no weights, kept for the export


def find_shards(folder):
    """The safetensors files of a model (or their kept headers), by name, as the index says when there is one."""
    folder = pathlib.Path(folder)
    if not folder.is_dir():
        raise Fault(f"{folder}: no such folder")
    for pattern, suffix in (("*.safetensors", ""), ("*.safetensors" + HEADER_SUFFIX, HEADER_SUFFIX)):
        files = {f.name.removesuffix(suffix): f for f in sorted(folder.glob(pattern))}
        if files:
            break
    else:
        legacy = any(folder.glob("pytorch_model*.bin"))
        raise Fault(f"{folder}: no safetensors files" + (
            "; it has pytorch_model.bin, which this script does not read: save it again with transformers' "
            "save_pretrained" if legacy else ""))
    if (folder / INDEX).exists():
        mapped = read_json(folder / INDEX).get("weight_map")
        if not isinstance(mapped, dict) or not all(isinstance(v, str) for v in mapped.values()):
            raise Fault(f"{folder / INDEX}: weight_map is missing or malformed")
        missing = sorted(set(mapped.values()) - set(files))
        if missing:
            raise Fault(f"{folder}: the index names {some(missing)}, not in the folder: the download is incomplete")
        files = {name: files[name] for name in sorted(set(mapped.values()))}
    elif len(files) > 1:
        if "model.safetensors" not in files:
            raise Fault(f"{folder}: {len(files)} safetensors files but no {INDEX}")
        files = {"model.safetensors": files["model.safetensors"]}
    return files


def open_model(folder):
    """({name: Tensor} of all shards, {shard: header bytes}, {shard: [names in file order]})"""
    tensors, headers, order = {}, {}, {}
    for shard, path in find_shards(folder).items():
        found, headers[shard] = read_safetensors(path, header_only=path.name.endswith(HEADER_SUFFIX))
        twins = sorted(set(found) & set(tensors))
        if twins:
            raise Fault(f"{path}: {some(twins)} also stands in another shard")
        tensors.update(found)
        order[shard] = list(found)
    index = pathlib.Path(folder) / INDEX
    if index.exists():
        mapped = read_json(index)["weight_map"]
        wrong = sorted(name for name in set(mapped) | set(tensors) if name not in order.get(mapped.get(name), ()))
        if wrong:
            raise Fault(f"{index}: {some(wrong)}: index and shards do not agree")
    return tensors, headers, order


def some(names):
    names = list(names)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def is_extra(name):
    return name.endswith("rotary_emb.inv_freq")  # a buffer that early LLaMA files hold; it follows from the config


def split_names(tensors, layout, where):
    """Checks names and shapes against the program's layout; returns the names of tensors that are no weights."""
    wanted = {name: shape for _, shape, name in layout}
    tied_head = {"lm_head.weight"} & set(tensors) - set(wanted)
    extra = sorted(name for name in tensors if is_extra(name) and name not in wanted)
    missing = [name for name in wanted if name not in tensors]
    unexpected = [name for name in tensors if name not in wanted and name not in extra and name not in tied_head]
    if missing:
        raise Fault(f"{where}: missing {some(missing)}")
    if unexpected:
        raise Fault(f"{where}: unexpected {some(unexpected)}: this is not the architecture that config.json names")
    for name in list(wanted) + list(tied_head):
        shape = wanted.get(name) or wanted["model.embed_tokens.weight"]
        if tensors[name].shape != shape:
            raise Fault(f"{where}: {name} is {list(tensors[name].shape)}, config.json makes it {list(shape)}")
    return extra


# Elements.

def to_float(block, dtype):
    """bf16 bits or any float type -> a numpy float type that holds its values exactly."""
    return (block.astype("<u4") << 16).view("<f4") if dtype == "BF16" else block


def from_float(values, dtype):
    """Round to nearest even."""
    if dtype != "BF16":
        with np.errstate(over="ignore"):
            return values.astype(STORAGE[dtype])
    u = values.astype("<f4").view("<u4")
    rounded = ((u + 0x7FFF + ((u >> 16) & 1)) >> 16).astype("<u2")
    return np.where(np.isnan(values), (u >> 16).astype("<u2") | 0x40, rounded).astype("<u2")


def copy_elements(out, source, source_dtype, dtype, name, bar=None):
    """Writes the elements in `source` (bytes) to the file `out` as `dtype`, a chunk at a time."""
    for at in range(0, len(source), CHUNK):
        block = np.asarray(source[at:at + CHUNK])
        if source_dtype != dtype:
            values = to_float(block.view(STORAGE[source_dtype]), source_dtype)
            block = from_float(values, dtype)
            if dtype == "F16" and np.any(np.isinf(block) & np.isfinite(values)):
                raise Fault(f"{name} holds values beyond fp16's 65504; export as bf16 or float")
        out.write(block.tobytes())
        if bar is not None:
            bar.update(min(CHUNK, len(source) - at))


def progress(total, what):
    try:
        from tqdm import tqdm
    except ImportError:
        return None
    return tqdm(total=total, desc=what, unit="B", unit_scale=True, disable=not sys.stderr.isatty())


class Replacing:
    """Writes `path` under a temporary name; only a complete file takes the name."""

    def __init__(self, path):
        self.path, self.temporary = path, f"{path}.tmp"

    def __enter__(self):
        self.file = open(self.temporary, "wb")
        return self.file

    def __exit__(self, kind, failed, traceback):
        try:
            if failed is None:
                self.file.flush()
                os.fsync(self.file.fileno())
            self.file.close()
        except OSError as error:  # a disk that is full may say so at the last bytes
            failed = failed or error
        if failed is None:
            os.replace(self.temporary, self.path)
            return
        os.unlink(self.temporary)
        if isinstance(failed, OSError) and not failed.filename:
            raise Fault(f"{self.path}: {failed.strerror or failed}") from None
        if kind is None:
            raise failed


def copy_small_files(source, target):
    """Tokenizer, configuration and licence: everything that goes with a model but its weights."""
    for file in sorted(pathlib.Path(source).iterdir()):
        wanted = file.suffix in (".json", ".model", ".txt", ".jinja", ".tiktoken") or \
            file.name.startswith(("LICENSE", "NOTICE", "USE_POLICY"))
        if file.is_file() and wanted and not file.name.endswith(".bin.index.json"):
            shutil.copyfile(file, pathlib.Path(target) / file.name)
