// The GPU as it is found at the start.
#include "gpu.h"

TEST_CASE("the kernels are those that were compiled for this GPU, where there are such") {
    const Gpu gpu = the_gpu();
    const GpuFacts g = gpu_facts(gpu.context->device);
    CHECK(gpu_fault(g) == "");
    for (int c : g.built_for)
        if (c == g.capability) CHECK(gpu.context->compute == g.capability);
    CHECK(gpu.context->compute >= 80);
    CHECK(gpu_fault(1000).find("GPU 1000 is wanted") == 0);
}
