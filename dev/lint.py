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
        target = next((t for t in (ROOT / name, (ROOT / path).parent / name) if t.is_file()), None)
        if target is None:
            continue
        target = target.resolve().relative_to(ROOT).as_posix()
        if floor(target) > floor(path):
            yield f"includes {target}, which is above it", None
        if floor(target) == floor(path) == 1 and target not in LAYER_INCLUDES.get(path, ()):
            yield f"includes the layer {target}: it is not in LAYER_INCLUDES", None
        if floor(path) == 1 and target == "core/comm.h" and path != "layers/ring.cuh":
            yield "includes core/comm.h: only layers/ring.cuh may", None


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
