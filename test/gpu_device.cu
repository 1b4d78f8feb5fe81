// The GPU as it is found at the start, and whether initcheck would find what the tests leave unset.
#include "gpu.h"

static __global__ void copy_kernel(float* to, const float* from) { *to = *from; }

TEST_CASE("the kernels are those that were compiled for this GPU, where there are such") {
    const Gpu gpu = the_gpu();
    const GpuFacts g = gpu_facts(gpu.context->device);
    CHECK(gpu_fault(g) == "");
    for (int c : g.built_for)
        if (c == g.capability) CHECK(gpu.context->compute == g.capability);
    CHECK(gpu.context->compute >= 80);
    CHECK(gpu_fault(1000).find("GPU 1000 is wanted") == 0);
}

// Both read what nobody has written, so initcheck must say so; run_gpu.sh runs each by itself.
TEST_CASE("unset: an output is read" * doctest::skip()) {
    DeviceBuffer<float> to(1), from(1);
    copy_kernel<<<1, 1, 0, the_gpu().stream>>>(to, from);
    CUDA_CHECK(cudaGetLastError());
    CHECK((left_unset() || std::isnan(to.host()[0])));
}
TEST_CASE("unset: the scratch memory is read" * doctest::skip()) {
    const FreshScratch scratch;
    DeviceBuffer<float> to(1);
    copy_kernel<<<1, 1, 0, the_gpu().stream>>>(to, (const float*)the_gpu().context->scratch);
    CUDA_CHECK(cudaGetLastError());
    CHECK((left_unset() || std::isnan(to.host()[0])));
}
