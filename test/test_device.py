"""What a CUDA build of the program says where no GPU can be used, upon made-up drivers (test/driver_stub.cpp), and what
core/device.h makes of the answers of a made-up CUDA runtime (test/device_answers.cpp)."""

import ctypes
import os
import pathlib
import re
import subprocess

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
BINARY = pathlib.Path(os.environ.get("TRAIN_LLAMA", ROOT / "train_llama"))
# The major version of the toolkit, which is that of the library for its products; a build without CUDA has none.
TOOLKIT = int((re.search(rb"libcublasLt\.so\.(\d+)", BINARY.read_bytes()) or [0, 0])[1])
needs_cuda = pytest.mark.skipif(not TOOLKIT, reason=f"{BINARY.name} is built without CUDA")


def a_driver():
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None


@pytest.fixture(scope="module")
def stub(tmp_path_factory):
    folder = tmp_path_factory.mktemp("driver")
    subprocess.run(["g++", "-shared", "-fPIC", ROOT / "test" / "driver_stub.cpp", "-o", folder / "libcuda.so.1"], check=True)
    return folder


def started(device, folder=None, cwd=None, **env):
    """A step on the device, with the libcuda.so.1 of that folder before the machine's."""
    path = ":".join(filter(None, [str(folder or ""), os.environ.get("LD_LIBRARY_PATH")]))
    args = ["--device", device, "-e", "tiny", "-c", "16", "--steps", "1"]
    return subprocess.run([BINARY, *args], capture_output=True, text=True, cwd=cwd, timeout=60,
                          env={**os.environ, "LD_LIBRARY_PATH": path, **{k: str(v) for k, v in env.items()}})


def refusal(done):
    """The one line that it ends with."""
    assert done.returncode == 1 and "step" not in done.stdout, (done.returncode, done.stdout, done.stderr)
    return re.fullmatch(r"train_llama: rank 0: (.*); --device cpu runs without a GPU\n", done.stderr).group(1)


@needs_cuda
def test_a_driver_older_than_the_toolkit_is_to_be_updated(stub, tmp_path):
    older = TOOLKIT - 1
    told = refusal(started("gpu", stub, tmp_path, DRIVER_VERSION=1000 * older + 80))
    assert re.fullmatch(rf"the driver knows CUDA {older}\.8 and this program was built with {TOOLKIT}\.\d: update the "
                        "driver, or build with an older toolkit", told), told


@needs_cuda
@pytest.mark.parametrize("status, reason", [(100, "no CUDA-capable device is detected"), (802, "system not yet initialized")])
def test_a_driver_that_finds_no_gpu_says_why(stub, tmp_path, status, reason):
    """Also one newer than the toolkit."""
    for version in (1000 * TOOLKIT + 990, 1000 * TOOLKIT + 1000):
        told = refusal(started("gpu", stub, tmp_path, DRIVER_VERSION=version, DRIVER_STATUS=status))
        assert told == f"no GPU can be used: {reason}"


@needs_cuda
def test_without_a_driver_there_is_none(tmp_path):
    """Also with a libcuda.so.1 that is no library, as an installation that was cut leaves it."""
    (tmp_path / "libcuda.so.1").touch()
    assert refusal(started("gpu", tmp_path, tmp_path)) == "there is no NVIDIA driver here"
    if not a_driver():
        assert refusal(started("gpu", cwd=tmp_path)) == "there is no NVIDIA driver here"


@pytest.mark.skipif(bool(TOOLKIT), reason=f"{BINARY.name} is built with CUDA")
def test_a_build_without_cuda_says_so(tmp_path):
    assert refusal(started("gpu", cwd=tmp_path)) == "this program was built without CUDA, it has no GPU layers"


@needs_cuda
def test_auto_is_the_cpu_where_no_gpu_can_be_used(stub, tmp_path):
    """And where the machine has a driver, it says why."""
    for version, why in ((1000 * TOOLKIT, "no GPU can be used: no CUDA-capable device"), (11000, "the driver knows CUDA 11.0")):
        done = started("auto", stub, tmp_path, DRIVER_VERSION=version, DRIVER_STATUS=100)
        assert done.returncode == 0 and "step 1/1" in done.stdout, done.stdout + done.stderr
        line = f"on the CPU, though this machine has an NVIDIA driver: {why}"
        assert (line in done.stdout) == os.path.exists("/dev/nvidiactl")


def test_what_is_made_of_the_runtimes_answers(tmp_path):
    (tmp_path / "cuda_runtime.h").touch()  # device_answers.cpp brings it
    flags = ["-std=c++20", "-fopenmp", "-w", "-D__CUDACC__", f"-I{tmp_path}", f"-I{ROOT}"]
    program = tmp_path / "device_answers"
    subprocess.run(["g++", *flags, ROOT / "test" / "device_answers.cpp", ROOT / "test" / "main.cpp", "-o", program], check=True)
    done = subprocess.run([program, "--no-colors"], capture_output=True, text=True)
    assert done.returncode == 0 and "| 0 failed" in done.stdout, done.stdout
