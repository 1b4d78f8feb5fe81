"""For which GPUs make builds, with stand-ins for nvcc and nvidia-smi."""

import os
import pathlib
import re
import subprocess

ROOT = pathlib.Path(__file__).resolve().parent.parent


def codes(tmp_path, gpus, *args, **env):
    """The code that the compiler is asked for, on a machine with GPUs of these compute capabilities."""
    (tmp_path / "nvcc").write_text("#!/bin/sh\n")
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\n" + (f"printf '{gpus}'\n" if gpus else "exit 9\n"))
    for name in ("nvcc", "nvidia-smi"):
        (tmp_path / name).chmod(0o755)
    clean = {k: v for k, v in os.environ.items() if k not in ("MAKEFLAGS", "MAKEOVERRIDES", "MFLAGS", "GPU_ARCH", "CUDA")}
    out = subprocess.run(["make", "-n", "-B", "CUDA=1", "BUILD=build/none", *args, "build/none/comm_gpu.o"], cwd=ROOT,
                         capture_output=True, text=True, check=True,
                         env={**clean, "PATH": f"{tmp_path}:{os.environ['PATH']}", **env}).stdout
    return re.findall(r"-gencode=arch=(\S+),code=(\S+)", out)


def test_without_a_gpu_there_is_code_for_a100_and_h100_and_ptx_for_later_ones(tmp_path):
    default = [("compute_80", "sm_80"), ("compute_90a", "sm_90a"), ("compute_80", "compute_80")]
    assert codes(tmp_path, "") == default
    for message in ("NVIDIA-SMI has failed because it could not reach the driver.\\n", "No devices were found\\n"):
        assert codes(tmp_path, message) == default


def test_for_the_gpus_that_are_here_or_named_there_is_code_for_them_alone(tmp_path):
    assert codes(tmp_path, "9.0\\n9.0\\n") == [("compute_90a", "sm_90a")]
    assert codes(tmp_path, "8.0\\n12.0\\n") == [("compute_120", "sm_120"), ("compute_80", "sm_80")]
    # As the program says where it has no code for a GPU, in both ways of passing it.
    for gpus in ("", "9.0\\n"):
        assert codes(tmp_path, gpus, "GPU_ARCH=100") == [("compute_100", "sm_100")]
        assert codes(tmp_path, gpus, GPU_ARCH="90") == [("compute_90a", "sm_90a")]
