"""core/comm_gpu.cu where there is no GPU: test/gpu_comm.cu upon a CUDA runtime made of threads (test/cuda_threads.h)."""

import os
import pathlib
import re
import shutil
import subprocess

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
FLAGS = "-std=c++20 -O1 -fopenmp -fno-math-errno -w -D__CUDACC__ -I.".split()
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
pytestmark = pytest.mark.skipif(not shutil.which("mpicxx") or not shutil.which("mpirun"), reason="there is no MPI")


def plain(source):
    """C++ of CUDA: a launch is a call, and the one instruction that is used has other words."""
    source = re.sub(r"(\w+(?:<[\w, ]+>)?)\s*<<<(.*?)>>>\(", r"cuda_launch(\2, \1, ", source, flags=re.S)
    return re.sub(r'asm\("cvt.rn.bf16x2.*', "pair = uint32_t(bf16(high).bits) << 16 | bf16(low).bits;", source)


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cuda_threads")
    units = ["core/comm_gpu.cu", "core/comm_mpi.cpp", "test/gpu_comm.cu", "test/cuda_threads.cpp"]
    for name in ("core", "test"):
        (folder / name).mkdir()
    for path in [*ROOT.glob("core/*.h"), *ROOT.glob("test/*.h"), *map(ROOT.joinpath, units)]:
        text = path.read_text()
        (folder / path.relative_to(ROOT)).write_text(text if path.name == "cuda_threads.h" else plain(text))
    for name in ("cuda.h", "cuda_runtime.h"):
        (folder / name).write_text('#include "test/cuda_threads.h"\n')
    for unit in units:
        flags = [flag for flag in FLAGS if unit != "core/comm_mpi.cpp" or flag != "-D__CUDACC__"]
        subprocess.run(["mpicxx", *flags, "-x", "c++", "-c", unit, "-o", unit + ".o"], cwd=folder, check=True)
    subprocess.run(["mpicxx", "-fopenmp", *(unit + ".o" for unit in units), "-o", "gpu_comm"], cwd=folder, check=True)
    return folder / "gpu_comm"


def on_ranks(ranks, *command):
    return ["mpirun", "--oversubscribe", "--bind-to", "none", "-np", str(ranks), *command, "--no-colors"]


def passes(command, **environment):
    run = subprocess.run(command, env={**ENVIRONMENT, **environment}, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0 and "| 0 failed" in run.stdout, run.stdout[-4000:] + run.stderr[-2000:]
    return run.stdout


@pytest.mark.parametrize("ranks, one_queue", [(2, False), (3, True), (4, False), (4, True)])
def test_the_communicator_for_gpus(program, ranks, one_queue):
    """With one queue for all streams nothing goes on beside anything: what it costs cannot be told."""
    left_out = "*(large)*" + (",*cost*" if one_queue else "")
    passes([*on_ranks(ranks, program), f"-tce={left_out}"], **({"CUDA_THREADS": "1"} if one_queue else {}))


@pytest.mark.parametrize("ranks, transport", [(2, "NCCL"), (4, "CUDA IPC and NCCL")])
def test_what_is_mapped_but_not_the_peers_memory_is_left_to_nccl(program, ranks, transport):
    """GPUs whose copies end somewhere else without an error: between even and odd ranks here."""
    out = passes([*on_ranks(ranks, program), "-tce=*(large)*,*cost*"], CUDA_THREADS_MAPS="others", TEST_TRANSPORT_AUTO="1")
    assert f"{ranks} ranks, {transport}\n" in out, out[-2000:]
    run = subprocess.run(on_ranks(ranks, program), env={**ENVIRONMENT, "CUDA_THREADS_MAPS": "others"}, capture_output=True,
                         text=True, timeout=60)
    apart, pairs = {2: (1, 1), 4: (4, 6)}[ranks]
    assert run.returncode != 0
    assert f"--transport ipc: CUDA IPC does not connect {apart} of the {pairs} pairs of ranks" in run.stderr, run.stderr


def test_the_rank_that_is_missing_is_named(program):
    passes([program, "--no-colors", "-tc=GPU: a rank that dies*"])
