"""Checks what a compiler does not: the include graph, layout, and what never belongs into the tree.

    python3 dev/lint.py        prints one line a fault, ends with their number
"""

import pathlib
import re
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
CODE = {".cu", ".cuh", ".h", ".cpp"}
TEXT = CODE | {".py", ".sh", ".md", ".yaml", ".yml", ".json", ".txt"}
# Kernels, the trainer and the attention may be longer than other files.
LONG = {"train_llama.cu", "attention_anchor.cuh", "layers/attention_mma.cuh", "layers/attention_hopper.cuh"}
# A layer stands by itself, but for the ring, for one layer in several files, and for the small change all may use.
LAYER_INCLUDES = {
    "layers/ring.cuh": {"attention_anchor.cuh", "layers/ring_plan.cuh"},
    "layers/ring_plan.cuh": {"attention_anchor.cuh"},
    "layers/update.cuh": {"layers/adamw.cuh"},
    "layers/grad_norm.cuh": {"layers/convert.cuh"},
    "layers/matmul.cuh": {"layers/matmul_gpu.cuh"},
    "layers/matmul_gpu.cuh": {"layers/matmul.cuh"},
    "attention_anchor.cuh": {"layers/attention_mma.cuh", "layers/attention_hopper.cuh"},
    "layers/attention_simt.cuh": {"attention_anchor.cuh"},
    "layers/attention_mma.cuh": {"attention_anchor.cuh", "layers/attention_simt.cuh"},
    "layers/attention_hopper.cuh": {"attention_anchor.cuh", "layers/attention_mma.cuh"},
}
CLANG_FORMAT = 14
ONE_FILE_EACH = {"mpi.h": "core/", "nccl.h": "core/", "cublasLt.h": "layers/matmul_gpu.cuh"}

# The host runs ahead of the GPU: within a step it waits in step_finish alone, a step late, for the log line. These
# functions may wait, or call what waits (allocation does too); all others are in the way of a step.
WAITS = re.compile(r"\b(cuda(Stream|Event|Device)Synchronize|cu(Stream|Event|Ctx)Synchronize|cudaMemcpy(2D|Peer|"
                   r"(To|From)Symbol)?|cudaMemset|cudaMalloc\w*|cudaHost(Alloc|Register)|cudaFree\w*|"
                   r"cuMem(Alloc|Free)\w*|device_allocate|host_allocate|device_wait|copy_to_host|readback_wait|to_host)\(")
MAY_WAIT = {
    # What others wait by; copy_to_device waits for a slot that was sent 63 MiB before, readback_open the first time.
    "core/device.h": {
        "device_allocate": {"cudaMalloc", "cudaMemset", "cudaDeviceSynchronize"},
        "device_wait": {"cudaStreamSynchronize"},
        "host_allocate": {"cudaHostRegister"},
        "copy_to_device": {"cudaEventSynchronize"},
        "copy_to_host": {"device_wait"},
        "readback_open": {"cudaMallocHost"},
        "readback_wait": {"cudaEventSynchronize"},
        "gpu_open": {"cudaMallocHost", "device_allocate"},
    },
    # Opening and closing.
    "core/comm_gpu.cu": {
        "peer_try": {"cudaStreamSynchronize"},
        "map_peers": {"cudaMemcpy"},
        "comm_gpu_open": {"device_allocate"},
        "comm_open": {"device_allocate"},
        "comm_close": {"device_wait"},
    },
    # The first product, and the choice of algorithms before the first step.
    "layers/matmul_gpu.cuh": {"matmul_cache": {"cudaMalloc"}, "matmul_race": {"device_wait"}},
    # Setup, the end of the last step, checkpoints, evaluation.
    "train_llama.cu": {
        "run": {"device_allocate", "host_allocate"},
        "model_tune": {"device_wait"},
        "step_finish": {"readback_wait"},
        "save": {"copy_to_host"},
        "to_host": {"copy_to_host"},
        "score_rows": {"to_host"},
        "dump_logits": {"to_host"},
        "generate": {"to_host"},
    },
}


def floor(path):
    """Includes go downward only: the trainer, the layers, the core."""
    if path.startswith(("test/", "dev/")):
        return 3
    if path == "train_llama.cu":
        return 2
    if path.startswith("layers/") or path in ("attention_anchor.cuh", "rope.cuh"):
        return 1
    return 0


def include_faults(path, text):
    for number, name in re.findall(r'(?m)^()#include ["<]([^">]+)[">]', text):
        del number
        if name in ONE_FILE_EACH and not path.startswith(("test/", "dev/")):
            yield f"includes {name}: only one file of {ONE_FILE_EACH[name]} may", name
        target = next((t for t in ((ROOT / path).parent / name, ROOT / name) if t.is_file()), None)
        if target is None:
            continue
        target = target.resolve().relative_to(ROOT).as_posix()
        if floor(target) > floor(path):
            yield f"includes {target}, which is above it", None
        if floor(target) == floor(path) == 1 and target not in LAYER_INCLUDES.get(path, ()):
            yield f"includes the layer {target}: it is not in LAYER_INCLUDES", None
        if floor(path) == 1 and target == "core/comm.h" and path != "layers/ring.cuh":
            yield "includes core/comm.h: only layers/ring.cuh may", None


def waits(path, text):
    """Calls for which the host waits, outside of the functions that may: (line, function, call)."""
    function, head, depth = "", "", 0
    for number, line in enumerate(text.split("\n"), 1):
        line = re.sub(r"""//.*|"(\\.|[^"\\])*"|'(\\.|[^'\\])'""", "", line)
        if line.startswith("#") or line.endswith("\\"):
            continue
        # Namespaces and aggregates do not hide the functions in them; a head is what stands before a function's brace.
        if depth == 0:
            head += " " + line
            if re.match(r"\s*(inline )?(namespace|struct|class|enum|union|extern)\b[^()]*\{", head):
                head = ""
                continue
            if "{" not in line:
                head = "" if ";" in line or line.startswith("}") else head
                continue
            named = re.search(r"(\w+)\(", re.sub(r"__launch_bounds__\([^)]*\)|template <[^(]*?> ", "", head))
            function, head = named.group(1) if named else "", ""
        depth += line.count("{") - line.count("}")
        for call in WAITS.finditer(line):
            declares = call.group(1) == function and line.find(call.group(0)) < line.find("{")
            if not declares and call.group(1) not in MAY_WAIT.get(path, {}).get(function, ()):
                yield number, function, call.group(1)
    if depth:
        yield number, function, "an open brace"


def on_the_default_stream(text):
    """Lines of what would run on the default stream, in step with all others: launches by <<<blocks, threads>>> or
    <<<blocks, threads, bytes>>>, copies without a stream behind their kind."""
    code = re.sub(r"//.*", lambda comment: " " * len(comment.group(0)), text)
    for call, end, least in (("<<<", ">>>", 4), ("cudaMemsetAsync(", ")", 4), ("cudaMemcpyAsync(", ")", 5)):
        for at in re.finditer(re.escape(call), code):
            depth, arguments, i = 0, 1, at.end()
            while i < len(code) and (depth > 0 or not code.startswith(end, i)):
                depth += (code[i] in "([{") - (code[i] in ")]}")
                arguments += code[i] == "," and depth == 0
                i += 1
            if arguments < least:
                yield code.count("\n", 0, at.start()) + 1


def faults(path, text, users):
    lines = text.split("\n")
    suffix = pathlib.Path(path).suffix
    for number, line in enumerate(lines, 1):
        if line != line.rstrip():
            yield f"{number}: white space at the end"
        if "\t" in line and suffix in CODE | {".py"}:
            yield f"{number}: a tab"
        if suffix in CODE and len(line) > 120:
            yield f"{number}: {len(line)} columns, more than 120"
        if re.search(r"\b(TODO|FIXME|XXX)\b(?!.*#\d)", line) and path != "dev/lint.py":
            yield f"{number}: TODO without an issue number"
    if text and not text.endswith("\n"):
        yield f"{len(lines)}: no newline at the end"
    if suffix not in CODE:
        return
    if suffix in {".h", ".cuh"} and "#pragma once" not in text:
        yield "1: no #pragma once"
    if len(lines) > 600 and path not in LONG:
        yield f"{len(lines)}: a file of more than 600 lines"
    if len(re.findall(r"(?m)^#ifdef __CUDACC__", text)) > 1:
        yield "more than one #ifdef __CUDACC__"
    if floor(path) < 3:
        for number, function, call in waits(path, text):
            yield f"{number}: {call} in {function}: the host waits there for the GPU, and it is not in MAY_WAIT"
        for number in on_the_default_stream(text):
            yield f"{number}: no stream is named, so this would run on the default one"
    for fault, once in include_faults(path, text):
        if once:
            users.setdefault(once, []).append(path)
            where = ONE_FILE_EACH[once]
            if path.startswith(where) and len(users[once]) == 1:
                continue
        yield fault


def format_faults(paths):
    """What `make format` would change; only with the version the tree is formatted with, others differ."""
    try:
        version = subprocess.run(["clang-format", "--version"], capture_output=True, text=True).stdout
    except FileNotFoundError:
        version = ""
    if f"version {CLANG_FORMAT}." not in version:
        print(f"lint: no clang-format {CLANG_FORMAT} here, formatting is not checked")
        return
    for path in paths:
        done = subprocess.run(["clang-format", "--dry-run", "-Werror", path], cwd=ROOT, capture_output=True)
        if done.returncode:
            yield path


def main():
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    count, users, code = 0, {}, []
    for path in sorted(set(listed.stdout.split("\n")) - {""}):
        file = ROOT / path
        if not file.is_file():
            continue
        if file.stat().st_size > 1 << 20:
            print(f"{path}: larger than 1 MB")
            count += 1
        if file.suffix not in TEXT and file.name != "Makefile":
            continue
        if file.suffix in CODE:
            code.append(path)
        for fault in faults(path, file.read_text(), users):
            print(f"{path}:{fault}")
            count += 1
    for path in format_faults(code):
        print(f"{path}: run make format")
        count += 1
    print(f"lint: {count} faults" if count else "lint: clean")
    return count > 0


if __name__ == "__main__":
    sys.exit(main())
