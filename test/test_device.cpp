// What stands between a run and a GPU: every end has a sentence that says what to do instead.
#include "../core/device.h"
#include "check.h"

namespace {
// An H100 that has the code of a program for A100 and H100, by CUDA 13.0.
GpuFacts usable() {
    GpuFacts g;
    g.driver = g.runtime = 13000, g.count = 8, g.capability = g.code = 90, g.built_for = {80, 90};
    return g;
}
// The words that a sentence must have.
void check_says(const GpuFacts& g, std::vector<std::string> words) {
    const std::string fault = gpu_fault(g);
    for (const std::string& word : words)
        CHECK_MESSAGE(fault.find(word) != std::string::npos, "'", fault, "' lacks '", word, "'");
}
} // namespace

TEST_CASE("a GPU that has code is taken") {
    GpuFacts g = usable();
    CHECK(gpu_fault(g) == "");
    g.device = 7;
    CHECK(gpu_fault(g) == "");
    g.capability = 86, g.code = 80; // A100's machine code runs there
    CHECK(gpu_fault(g) == "");
    g.driver = 13020, g.runtime = 13000; // an older program
    CHECK(gpu_fault(g) == "");
    g.driver = 13000, g.runtime = 13020; // one of the same major version may be newer: the driver decides
    CHECK(gpu_fault(g) == "");
}

TEST_CASE("without a driver, GPU or device of that number there is nothing to look at") {
    CHECK(gpu_fault(GpuFacts()) == "there is no NVIDIA driver here");
    GpuFacts g = usable();
    g.count = g.capability = g.code = 0, g.error = "no CUDA-capable device is detected";
    CHECK(gpu_fault(g) == "no GPU can be used: no CUDA-capable device is detected");
    g = usable();
    g.device = 8, g.capability = g.code = 0;
    check_says(g, {"GPU 8 is wanted and there are 8", "one rank a GPU"});
    g = usable();
    g.capability = g.code = 0, g.error = "the device is busy";
    CHECK(gpu_fault(g) == "GPU 0 cannot be used: the device is busy");
    g.capability = 90, g.error = "out of memory"; // while the kernels were loaded
    CHECK(gpu_fault(g) == "GPU 0 cannot be used: out of memory");
}

TEST_CASE("a driver older than the toolkit comes before what it says of GPUs") {
    GpuFacts g = usable();
    g.driver = 12080, g.driver_too_old = true, g.count = g.capability = g.code = 0, g.error = "insufficient driver";
    check_says(g, {"the driver knows CUDA 12.8", "built with 13.0", "update the driver"});
}

TEST_CASE("a GPU before A100 is none, whatever code there is") {
    GpuFacts g = usable();
    g.capability = 75, g.code = 0, g.no_code = true, g.error = "no kernel image";
    check_says(g, {"compute capability 7.5", "8.0"});
    CHECK(gpu_fault(g).find("make") == std::string::npos); // building it anew is no help
}

TEST_CASE("a GPU without code says what there is and how to build for it") {
    GpuFacts g = usable();
    g.device = 3, g.capability = 100, g.code = 0, g.no_code = true;
    g.error = "no kernel image is available for execution on the device";
    check_says(g, {"GPU 3 has compute capability 10.0", "code for 8.0, 9.0 alone", "make GPU_ARCH=100 train_llama",
                   "no kernel image"});
    g.capability = 80, g.built_for = {90}; // 90a alone, on A100
    check_says(g, {"compute capability 8.0", "code for 9.0 alone", "make GPU_ARCH=80 train_llama"});
    g.capability = 120, g.built_for = {90};
    check_says(g, {"compute capability 12.0", "make GPU_ARCH=120 train_llama"});
}

TEST_CASE("kernels written for a GPU are those that it has, not those that its number promises") {
    GpuFacts g = usable();
    CHECK(gpu_compute(g) == 90);
    g.code = 80; // PTX for 8.0, compiled by the driver: the Hopper attention in it is empty
    CHECK(gpu_compute(g) == 80);
    g.capability = 100;
    CHECK(gpu_compute(g) == 80);
    g.capability = 80, g.code = 80;
    CHECK(gpu_compute(g) == 80);
}
