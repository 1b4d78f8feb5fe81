// What core/device.h makes of the answers of the CUDA runtime, upon one that answers as it is told (test_device.py
// compiles this as C++).
#include "cuda_threads.h"
#include <utility>
#undef __CUDA_ARCH_LIST__
#define __CUDA_ARCH_LIST__ 800, 900

// An H100 under a program for A100 and H100. What has another status than cudaSuccess sets nothing.
struct Answers {
    int driver = 13000, count = 1, capability = 90;
    cudaFuncAttributes probe = {90, 90};
    cudaError_t counted = cudaSuccess, opened = cudaSuccess, asked = cudaSuccess, loaded = cudaSuccess;
    int opens = 0, loads = 0;          // how often a GPU was opened, and the probe loaded
    cudaError_t pending = cudaSuccess; // what cudaGetLastError would say
};
static Answers answers;
static cudaError_t answer(cudaError_t status) {
    if (status != cudaSuccess) answers.pending = status;
    return status;
}
static cudaError_t answer_count(int* count) {
    if (answers.counted == cudaSuccess) *count = answers.count;
    return answer(answers.counted);
}
static cudaError_t answer_open(int) { return answers.opens++, answer(answers.opened); }
static cudaError_t answer_attribute(int* value, int what, int) {
    const bool major = what == cudaDevAttrComputeCapabilityMajor;
    if (answers.asked == cudaSuccess) *value = major ? answers.capability / 10 : answers.capability % 10;
    return answer(answers.asked);
}
static cudaError_t answer_probe(cudaFuncAttributes* attributes, void (*)()) {
    answers.loads++;
    if (answers.loaded == cudaSuccess) *attributes = answers.probe;
    return answer(answers.loaded);
}
static cudaError_t answer_peer(int* can, int device, int other) { return *can = device / 2 == other / 2, cudaSuccess; }
static cudaError_t answer_last() { return std::exchange(answers.pending, cudaSuccess); }
#define cudaGetDeviceCount answer_count
#define cudaDriverGetVersion(version) (*(version) = answers.driver, cudaSuccess)
#define cudaSetDevice answer_open
#define cudaDeviceGetAttribute answer_attribute
#define cudaFuncGetAttributes answer_probe
#define cudaDeviceCanAccessPeer answer_peer // within pairs of neighbours
#define cudaGetLastError answer_last
#include "../core/device.h"
#include "check.h"

namespace {
GpuFacts facts_of(const Answers& told, int device = 0) {
    answers = told;
    const GpuFacts g = gpu_facts(device);
    CHECK(answers.pending == cudaSuccess); // else a later call would be charged with it
    CHECK(g.device == device);
    CHECK(g.runtime == 13000);
    CHECK(g.built_for == std::vector<int>{80, 90});
    return g;
}
std::string fault_of(const Answers& told, int device = 0) { return gpu_fault(facts_of(told, device)); }
} // namespace

TEST_CASE("a GPU that has code is taken, with its own or with older code") {
    Answers told;
    told.driver = 13020;
    GpuFacts g = facts_of(told);
    CHECK(gpu_fault(g) == "");
    CHECK(g.driver == 13020);
    CHECK(g.count == 1);
    CHECK(g.capability == 90);
    CHECK(gpu_compute(g) == 90);
    told.capability = 103, told.probe = {80, 103}; // PTX for 8.0, which the driver has compiled
    g = facts_of(told);
    CHECK(gpu_fault(g) == "");
    CHECK(g.capability == 103);
    CHECK(gpu_compute(g) == 80);
    told.capability = 86, told.probe = {0, 80};
    g = facts_of(told);
    CHECK(gpu_fault(g) == "");
    CHECK(gpu_compute(g) == 80);
}

TEST_CASE("a driver that is missing, too old or finds no GPU says so") {
    Answers told;
    told.driver = 12080, told.counted = cudaErrorInsufficientDriver;
    CHECK(fault_of(told) == "the driver knows CUDA 12.8 and this program was built with 13.0: update the driver, or "
                            "build with an older toolkit");
    CHECK(answers.opens == 0);
    told.driver = 0;
    CHECK(fault_of(told) == "there is no NVIDIA driver here");
    told.driver = 13000, told.counted = cudaErrorInvalidValue;
    CHECK(fault_of(told) == "no GPU can be used: an error");
    CHECK(answers.opens == 0);
    CHECK(gpu_count() == 0);
    CHECK(answers.pending == cudaSuccess);
    told = Answers();
    told.count = 2;
    CHECK(fault_of(told, 2).find("GPU 2 is wanted and there are 2: start one rank a GPU") == 0);
    CHECK(answers.opens == 0);
    CHECK(fault_of(told, 1) == "");
    CHECK(answers.opens == 1);
}

TEST_CASE("a host's GPUs all reach each other, or do not") {
    answers = {}, answers.count = 3;
    for (int device : {0, 1}) CHECK(gpu_reaches_all(device, 2));
    CHECK(gpu_reaches_all(0, 1));
    for (int device : {0, 1, 2}) CHECK(!gpu_reaches_all(device, 3));
    answers.count = 2; // more ranks than GPUs are refused elsewhere
    CHECK(gpu_reaches_all(0, 4));
}

TEST_CASE("a GPU before A100 is too old, whatever its driver makes of the program") {
    Answers told;
    for (cudaError_t loaded : {cudaSuccess, cudaErrorNoKernelImageForDevice}) {
        told.loaded = loaded;
        told.capability = 70;
        CHECK(fault_of(told) == "GPU 0 has compute capability 7.0, bf16 needs 8.0 (A100 or later)");
        told.capability = 75;
        CHECK(fault_of(told) == "GPU 0 has compute capability 7.5, bf16 needs 8.0 (A100 or later)");
        CHECK(answers.loads == 0);
    }
}

TEST_CASE("a GPU that does not load the kernels has no code, or something else is wrong with it") {
    Answers told;
    told.capability = 120;
    for (cudaError_t none : {cudaErrorNoKernelImageForDevice, cudaErrorInvalidDeviceFunction, cudaErrorInvalidPtx,
                             cudaErrorUnsupportedPtxVersion, cudaErrorJitCompilerNotFound}) {
        told.loaded = none;
        CHECK(fault_of(told) == "GPU 0 has compute capability 12.0, and this program holds code for 8.0, 9.0 alone (an "
                                "error): build it with make GPU_ARCH=120 train_llama");
        CHECK(answers.loads == 1);
    }
    for (cudaError_t Answers::*call : {&Answers::opened, &Answers::asked, &Answers::loaded}) {
        told = Answers();
        told.*call = cudaErrorInvalidValue;
        CHECK(fault_of(told) == "GPU 0 cannot be used: an error");
    }
}
