"""dev/lint.py sees a host that waits for the GPU where a step would have to."""

import pathlib
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "dev"))
import lint  # noqa: E402


def waits(path, old="", new=""):
    text = (ROOT / path).read_text()
    assert old in text
    return [(function, call) for _, function, call in lint.waits(path, text.replace(old, old + new, 1))]


@pytest.mark.parametrize("path", sorted(lint.MAY_WAIT))
def test_the_tree_waits_only_where_it_may(path):
    assert waits(path) == []
    text = (ROOT / path).read_text()
    for function, calls in lint.MAY_WAIT[path].items():
        seen = {call for allowed in [dict(lint.MAY_WAIT[path], **{function: set()})]
                for call in calls_of(path, text, allowed)}
        assert seen == calls, f"{function} is in MAY_WAIT for what it does not do"


def calls_of(path, text, allowed):
    before, lint.MAY_WAIT[path] = lint.MAY_WAIT[path], allowed
    try:
        return [call for _, _, call in lint.waits(path, text)]
    finally:
        lint.MAY_WAIT[path] = before


def test_a_wait_in_a_step_or_a_layer_is_a_fault():
    update = "    readback_mark(m.dev, m.readback[(state.step + 1) % 2]);\n"
    assert waits("train_llama.cu", update, "    device_wait(m.dev);\n") == [("step_update", "device_wait")]
    # What step_finish may not: only the readback is awaited there.
    finish = "    Readback& readback = m.readback[r.step % 2];\n"
    assert waits("train_llama.cu", finish, "    copy_to_host(m.dev, &r, m.update, 8);\n") == [("step_finish", "copy_to_host")]
    launch = "    if (T == 0 || C == 0) return;\n"
    for call in ("CUDA_CHECK(cudaStreamSynchronize(gpu.stream));", "CUDA_CHECK(cudaMemcpy(out, weight, 8, kind));",
                 "CUDA_CHECK(cudaFree(out));", "CUDA_CHECK(cudaDeviceSynchronize());", "cudaEventSynchronize(event);",
                 "uint8_t* more = device_allocate(gpu, 8);"):
        faults = waits("layers/embedding.cuh", launch, f"    {call}\n")
        assert len(faults) == 1 and faults[0][0].startswith("embedding_"), (call, faults)


def test_what_does_not_wait_is_none():
    text = "inline void layer(Gpu gpu) {\n    cudaMemcpyAsync(a, b, n, k, gpu.stream); // cudaFree( would\n}\n"
    assert list(lint.waits("layers/x.cuh", text)) == []
    text += "inline void device_wait(Gpu gpu) { go(); }\nvoid other() { device_wait(gpu); }\n"
    assert list(lint.waits("layers/x.cuh", text)) == [(5, "other", "device_wait")]


@pytest.mark.parametrize("path", ["layers/embedding.cuh", "layers/attention_simt.cuh", "core/comm_gpu.cu"])
def test_work_for_the_default_stream_is_a_fault(path):
    text = (ROOT / path).read_text()
    assert list(lint.on_the_default_stream(text)) == []
    line = 1 + text.count("\n")
    for call in ("k<<<grid, 256>>>(a, b, c, d);", "k<int, 8><<<dim3(8, 2, 1), 256, 8>>>(a);", "cudaMemsetAsync(p, 0, f(n, 8));",
                 "cudaMemcpyAsync(a, b, n,\n    cudaMemcpyDefault);"):
        assert list(lint.on_the_default_stream(f"{text}{call}\n")) == [line], call
    for call in ("k<<<dim3(8, 2), 256, 0, gpu.stream>>>(a);", "cudaMemcpyAsync(a, b, n, kind, s);", "// k<<<1, 2>>>(a);"):
        assert list(lint.on_the_default_stream(f"{text}{call}\n")) == [], call
