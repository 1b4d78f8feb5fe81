// The memory of the two machines: allocation, copies, waiting; and what a Gpu tag's context holds.
#pragma once
#include "types.h"
#include <algorithm>
#include <chrono>
#include <string>
#include <sys/mman.h>
#include <vector>

// What a GPU's memory holds beside the arena: the driver's context, the kernels, cuBLASLt, GpuContext::scratch.
constexpr double gpu_overhead_bytes = 0.65 * (1 << 30);

// A queue of the GPU's for every stream, so that none waits behind another's transfer. Call it before anything in the
// process calls CUDA, which UCX does where MPI loads it.
inline void cuda_queues() { setenv("CUDA_DEVICE_MAX_CONNECTIONS", "32", 0); }

// Zeroed memory of the device, on a 256-byte boundary; fails with the size when there is not enough.
inline uint8_t* device_allocate(Cpu, size_t bytes) {
    constexpr size_t alignment = 256;
    void* block = bytes ? calloc(1, bytes + alignment) : nullptr;
    if (bytes && !block) fail("cannot allocate %.2f GiB; --plan shows what takes it", double(bytes) / (1 << 30));
    return (uint8_t*)((uintptr_t(block) + alignment - 1) / alignment * alignment);
}

// Each is in order with the work that was given to the device before. After copy_to_device `from` is free at once;
// copy_to_host and device_wait return when all that work is done.
inline void copy_to_device(Cpu, void* to, const void* from, size_t bytes) { memcpy(to, from, bytes); }
inline void copy_to_host(Cpu, void* to, const void* from, size_t bytes) { memcpy(to, from, bytes); }
inline void copy_on_device(Cpu, void* to, const void* from, size_t bytes) { memcpy(to, from, bytes); }
inline void fill_zero(Cpu, void* to, size_t bytes) { memset(to, 0, bytes); }
inline void device_wait(Cpu) {}

inline double seconds_now() {
    return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// A value on its way from the device to the host: sent in order with the work, looked at when the host wants it. The
// times from readback_open and from readback_mark, between the two, to readback_send are the device's.
struct Readback {
    void* memory = nullptr;
    void *opened = nullptr, *marked = nullptr, *sent = nullptr; // the GPU's events
    double seconds = 0, since_mark = 0;                         // the CPU's clock there; after readback_wait the times
};
inline void readback_open(Cpu, Readback& readback, size_t bytes) {
    if (!readback.memory) readback.memory = malloc(bytes);
    readback.seconds = seconds_now();
}
inline void readback_mark(Cpu, Readback& readback) { readback.since_mark = seconds_now(); }
inline void readback_send(Cpu, Readback& readback, const void* from, size_t bytes) {
    memcpy(readback.memory, from, bytes);
    readback.seconds = seconds_now() - readback.seconds, readback.since_mark = seconds_now() - readback.since_mark;
}
inline const void* readback_wait(Cpu, Readback& readback) { return readback.memory; }

// Memory of the host for copies to and from a device, until the program ends; fails with the size when there is none.
inline uint8_t* host_allocate(Cpu, size_t bytes) {
    void* block = bytes ? malloc(bytes) : nullptr;
    if (bytes && !block) fail("cannot allocate %.2f GiB: --offload less", double(bytes) / (1 << 30));
    return (uint8_t*)block;
}

// Copies between a device's memory and that of the host which go on beside the device's work, one behind the other:
// what stands between aside_begin and aside_end begins when the work given so far is done. Work given after aside_wait
// begins when what was ended last with that mark (0 or 1) has arrived. The CPU copies as late as it may, in aside_wait,
// so that a wait which is missing shows.
struct Aside {
    Stream stream = {};
    void *begun = nullptr, *ended[2] = {}; // the GPU's events
    struct Copy {
        void* to;
        const void* from;
        size_t bytes;
    };
    std::vector<Copy> copies; // the CPU's
    size_t done = 0, due[2] = {};
};
inline void aside_begin(Cpu, Aside&) {}
inline void aside_to_host(Cpu, Aside& a, void* to, const void* from, size_t n) { a.copies.push_back({to, from, n}); }
inline void aside_to_device(Cpu, Aside& a, void* to, const void* from, size_t n) { a.copies.push_back({to, from, n}); }
inline void aside_end(Cpu, Aside& a, int mark) { a.due[mark] = a.copies.size(); }
inline void aside_wait(Cpu, Aside& a, int mark) {
    for (; a.done < a.due[mark]; a.done++) memcpy(a.copies[a.done].to, a.copies[a.done].from, a.copies[a.done].bytes);
    if (a.done == a.copies.size()) a.copies.clear(), a.done = a.due[0] = a.due[1] = 0;
}

// Which GPU of its host a rank takes, and how many ranks take that one.
struct GpuPlace {
    int device = 0, ranks = 1;
};
// Rank number `rank` of a host's takes the GPU of that number, or where ranks share, the GPUs in turn.
inline GpuPlace gpu_place(bool shared, int rank, int ranks, int gpus) {
    if (!shared || gpus == 0) return {rank, 1};
    const int device = rank % gpus;
    return {device, (ranks - device + gpus - 1) / gpus};
}
// TRAIN_LLAMA_SHARE_GPUS=1, for tests and trials: the ranks of a host may outnumber its GPUs.
inline bool gpus_are_shared() {
    const char* value = getenv("TRAIN_LLAMA_SHARE_GPUS");
    if (!value || strcmp(value, "") == 0 || strcmp(value, "0") == 0) return false;
    if (strcmp(value, "1") != 0)
        fail("TRAIN_LLAMA_SHARE_GPUS is 1, which lets the ranks of a host share its GPUs, or 0, not '%s'", value);
    return true;
}
// Bytes of a GPU's memory that a rank can have, the driver's own included, when all that share it have their contexts.
inline double gpu_memory_share(double free, double all, int ranks) {
    return std::min(all, free + ranks * gpu_overhead_bytes) / ranks;
}

// What is known of a GPU before it is used; capabilities as 80, 90, 100.
struct GpuFacts {
    int driver = 0, runtime = 0; // CUDA's versions, 13000 for 13.0; driver 0: there is none
    bool driver_too_old = false;
    int device = 0, count = 0, capability = 0;
    std::vector<int> built_for; // what this program holds code for
    int code = 0;               // that of the code the GPU takes from it
    bool no_code = false;
    std::string error; // CUDA's, of the first call that failed
};

// Why that GPU cannot be used, or an empty string. Machine code runs on GPUs of the same first digit, from its own
// second digit on, and code for 90a on 9.0 alone; PTX on all later ones. Which of it there is, only the driver knows.
inline std::string gpu_fault(const GpuFacts& g) {
    char text[640] = "";
    if (g.driver == 0) return "there is no NVIDIA driver here";
    if (g.driver_too_old)
        snprintf(text, sizeof text,
                 "the driver knows CUDA %d.%d and this program was built with %d.%d: update the driver, or build with "
                 "an older toolkit",
                 g.driver / 1000, g.driver % 1000 / 10, g.runtime / 1000, g.runtime % 1000 / 10);
    else if (g.count == 0) snprintf(text, sizeof text, "no GPU can be used: %s", g.error.c_str());
    else if (g.device >= g.count)
        snprintf(text, sizeof text,
                 "GPU %d is wanted and there are %d: start one rank a GPU, and let each see all GPUs of its host; for "
                 "trials, ranks share GPUs with TRAIN_LLAMA_SHARE_GPUS=1",
                 g.device, g.count);
    else if (g.capability > 0 && g.capability < 80)
        snprintf(text, sizeof text, "GPU %d has compute capability %d.%d, bf16 needs 8.0 (A100 or later)", g.device,
                 g.capability / 10, g.capability % 10);
    else if (g.no_code) {
        std::string built_for;
        for (int c : g.built_for)
            built_for += (built_for.empty() ? "" : ", ") + std::to_string(c / 10) + "." + std::to_string(c % 10);
        snprintf(text, sizeof text,
                 "GPU %d has compute capability %d.%d, and this program holds code for %s alone (%s): build it with "
                 "make GPU_ARCH=%d train_llama",
                 g.device, g.capability / 10, g.capability % 10, built_for.c_str(), g.error.c_str(), g.capability);
    } else if (!g.error.empty()) snprintf(text, sizeof text, "GPU %d cannot be used: %s", g.device, g.error.c_str());
    return text;
}

// What the kernels may count on: the GPU's capability, or that of older PTX which the driver has compiled for it.
inline int gpu_compute(const GpuFacts& g) { return std::min(g.capability, g.code); }

#ifdef __CUDACC__
// A CUDA call that fails ends all ranks; one that fails after a kernel names the kernel's file too.
#define CUDA_CHECK(call)                                                                                            \
    do {                                                                                                            \
        cudaError_t cuda_status = (call);                                                                           \
        if (cuda_status != cudaSuccess)                                                                             \
            fail("%s:%d: %s: %s (%s); CUDA_LAUNCH_BLOCKING=1 shows which kernel it was", __FILE__, __LINE__, #call, \
                 cudaGetErrorString(cuda_status), cudaGetErrorName(cuda_status));                                   \
    } while (0)

// Host memory that the GPU can read while the host goes on: a ring of slots, each free again when its event has come.
struct Staging {
    static constexpr size_t slots = 64, slot_bytes = size_t(1) << 20;
    uint8_t* memory = nullptr;
    cudaEvent_t sent[slots] = {};
    size_t next = 0;
};

struct MatmulCache; // layers/matmul.cuh
struct CommGpu;     // core/comm_gpu.cu

struct GpuContext {
    static constexpr size_t scratch_bytes = size_t(64) << 20;
    int device = 0, sms = 0, compute = 0; // compute: 80, 90, ..., gpu_compute's
    size_t l2_bytes = 0;
    size_t shared_bytes = 0; // a multiprocessor's shared memory; a block takes 1 KiB more of it than it asks for
    char name[256] = "";
    bool deterministic = false;
    bool portable_attention = false; // mma.sync also where a kernel is written for the GPU
    // For what a launcher needs during its own kernels alone (cuBLASLt's workspace, partial sums). All launchers work
    // on one stream, so each may use all of it; the communicator, which has others, does not use it.
    uint8_t* scratch = nullptr;
    Staging staging;
    MatmulCache* matmul = nullptr;
    CommGpu* comm = nullptr;
};

inline uint8_t* device_allocate(Gpu, size_t bytes) {
    void* block = nullptr;
    if (bytes == 0) return nullptr;
    if (cudaError_t status = cudaMalloc(&block, bytes); status != cudaSuccess) {
        size_t free = 0, all = 0;
        cudaMemGetInfo(&free, &all);
        fail("cannot allocate %.2f GiB on the GPU (%s; %.2f of %.2f GiB are free); --plan shows what takes it",
             double(bytes) / (1 << 30), cudaGetErrorString(status), double(free) / (1 << 30), double(all) / (1 << 30));
    }
    CUDA_CHECK(cudaMemset(block, 0, bytes));
    CUDA_CHECK(cudaDeviceSynchronize()); // it was cleared on another stream than ours
    return (uint8_t*)block;
}

inline void device_wait(Gpu gpu) { CUDA_CHECK(cudaStreamSynchronize(gpu.stream)); }

inline void copy_to_device(Gpu gpu, void* to, const void* from, size_t bytes) {
    Staging& s = gpu.context->staging;
    for (size_t done = 0; done < bytes; done += Staging::slot_bytes) {
        const size_t n = bytes - done < Staging::slot_bytes ? bytes - done : Staging::slot_bytes;
        const size_t slot = s.next++ % Staging::slots;
        uint8_t* pinned = s.memory + slot * Staging::slot_bytes;
        CUDA_CHECK(cudaEventSynchronize(s.sent[slot]));
        memcpy(pinned, (const uint8_t*)from + done, n);
        CUDA_CHECK(cudaMemcpyAsync((uint8_t*)to + done, pinned, n, cudaMemcpyHostToDevice, gpu.stream));
        CUDA_CHECK(cudaEventRecord(s.sent[slot], gpu.stream));
    }
}

inline void copy_to_host(Gpu gpu, void* to, const void* from, size_t bytes) {
    CUDA_CHECK(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToHost, gpu.stream));
    device_wait(gpu);
}
inline void copy_on_device(Gpu gpu, void* to, const void* from, size_t bytes) {
    CUDA_CHECK(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToDevice, gpu.stream));
}
inline void fill_zero(Gpu gpu, void* to, size_t bytes) { CUDA_CHECK(cudaMemsetAsync(to, 0, bytes, gpu.stream)); }

inline void readback_open(Gpu gpu, Readback& readback, size_t bytes) {
    if (!readback.memory) {
        CUDA_CHECK(cudaMallocHost(&readback.memory, bytes));
        CUDA_CHECK(cudaEventCreate((cudaEvent_t*)&readback.opened));
        CUDA_CHECK(cudaEventCreate((cudaEvent_t*)&readback.marked));
        CUDA_CHECK(cudaEventCreate((cudaEvent_t*)&readback.sent));
    }
    CUDA_CHECK(cudaEventRecord((cudaEvent_t)readback.opened, gpu.stream));
    CUDA_CHECK(cudaEventRecord((cudaEvent_t)readback.marked, gpu.stream)); // until readback_mark says otherwise
}
inline void readback_mark(Gpu gpu, Readback& readback) {
    CUDA_CHECK(cudaEventRecord((cudaEvent_t)readback.marked, gpu.stream));
}
inline void readback_send(Gpu gpu, Readback& readback, const void* from, size_t bytes) {
    CUDA_CHECK(cudaMemcpyAsync(readback.memory, from, bytes, cudaMemcpyDeviceToHost, gpu.stream));
    CUDA_CHECK(cudaEventRecord((cudaEvent_t)readback.sent, gpu.stream));
}
inline const void* readback_wait(Gpu, Readback& readback) {
    float ms = 0;
    CUDA_CHECK(cudaEventSynchronize((cudaEvent_t)readback.sent));
    CUDA_CHECK(cudaEventElapsedTime(&ms, (cudaEvent_t)readback.opened, (cudaEvent_t)readback.sent));
    readback.seconds = 1e-3 * ms;
    CUDA_CHECK(cudaEventElapsedTime(&ms, (cudaEvent_t)readback.marked, (cudaEvent_t)readback.sent));
    readback.since_mark = 1e-3 * ms;
    return readback.memory;
}

// Pinned. Its pages are made by all threads: one alone takes minutes for what a long context puts there.
inline uint8_t* host_allocate(Gpu, size_t bytes) {
    if (bytes == 0) return nullptr;
    constexpr size_t page = size_t(2) << 20;
    bytes = (bytes + page - 1) / page * page;
    uint8_t* block = (uint8_t*)aligned_alloc(page, bytes);
    const double gib = double(bytes) / (1 << 30);
    if (!block) fail("cannot allocate %.2f GiB of the host's memory: --offload less", gib);
    madvise(block, bytes, MADV_HUGEPAGE);
#pragma omp parallel for
    for (size_t at = 0; at < bytes; at += 4096) block[at] = 0;
    if (cudaError_t status = cudaHostRegister(block, bytes, cudaHostRegisterDefault); status != cudaSuccess)
        fail("cannot pin %.2f GiB of the host's memory (%s): --offload less", gib, cudaGetErrorString(status));
    return block;
}
inline void aside_begin(Gpu gpu, Aside& a) {
    if (!a.stream) {
        CUDA_CHECK(cudaStreamCreateWithFlags(&a.stream, cudaStreamNonBlocking));
        for (void** event : {&a.begun, &a.ended[0], &a.ended[1]})
            CUDA_CHECK(cudaEventCreateWithFlags((cudaEvent_t*)event, cudaEventDisableTiming));
    }
    CUDA_CHECK(cudaEventRecord((cudaEvent_t)a.begun, gpu.stream));
    CUDA_CHECK(cudaStreamWaitEvent(a.stream, (cudaEvent_t)a.begun, 0));
}
inline void aside_to_host(Gpu, Aside& a, void* to, const void* from, size_t bytes) {
    CUDA_CHECK(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToHost, a.stream));
}
inline void aside_to_device(Gpu, Aside& a, void* to, const void* from, size_t bytes) {
    CUDA_CHECK(cudaMemcpyAsync(to, from, bytes, cudaMemcpyHostToDevice, a.stream));
}
inline void aside_end(Gpu, Aside& a, int mark) { CUDA_CHECK(cudaEventRecord((cudaEvent_t)a.ended[mark], a.stream)); }
inline void aside_wait(Gpu gpu, Aside& a, int mark) {
    if (a.stream) CUDA_CHECK(cudaStreamWaitEvent(gpu.stream, (cudaEvent_t)a.ended[mark], 0));
}

// The GPUs of this host that the process sees, 0 when the call fails. The first call of CUDA in every program.
inline cudaError_t gpu_count(int& count) {
    cuda_queues();
    const cudaError_t status = cudaGetDeviceCount(&count);
    if (status != cudaSuccess) count = 0;
    return status;
}

inline int gpu_count() {
    int count = 0;
    gpu_count(count);
    cudaGetLastError(); // gpu_facts tells it
    return count;
}

// Whether the GPU can fetch from all of the first `gpus` of this host.
inline bool gpu_reaches_all(int device, int gpus) {
    gpus = std::min(gpus, gpu_count());
    for (int other = 0; other < gpus; other++) {
        int can = 0;
        if (other != device && (cudaDeviceCanAccessPeer(&can, device, other) != cudaSuccess || !can)) return false;
    }
    return true;
}

// The facts of this host's GPU number `device`, in whose memory this makes the driver's context. The probe is loaded
// with all kernels of its file, and what it was compiled for, they were.
static __global__ void gpu_probe_kernel() {}
inline GpuFacts gpu_facts(int device) {
    GpuFacts g;
    cudaError_t status = gpu_count(g.count);
    g.driver_too_old = status == cudaErrorInsufficientDriver;
    cudaDriverGetVersion(&g.driver), cudaRuntimeGetVersion(&g.runtime);
    for (int c : {__CUDA_ARCH_LIST__}) g.built_for.push_back(c / 10);
    g.device = device;
    if (status == cudaSuccess && device < g.count) {
        int major = 0, minor = 0;
        status = cudaSetDevice(device);
        if (status == cudaSuccess) status = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
        if (status == cudaSuccess) status = cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
        if (status == cudaSuccess) g.capability = major * 10 + minor;
        cudaFuncAttributes probe = {};
        if (status == cudaSuccess && major >= 8) status = cudaFuncGetAttributes(&probe, gpu_probe_kernel);
        g.code = probe.ptxVersion ? probe.ptxVersion : probe.binaryVersion;
        for (cudaError_t none : {cudaErrorNoKernelImageForDevice, cudaErrorInvalidDeviceFunction, cudaErrorInvalidPtx,
                                 cudaErrorUnsupportedPtxVersion, cudaErrorJitCompilerNotFound})
            g.no_code |= status == none;
    }
    if (status != cudaSuccess) g.error = cudaGetErrorString(status);
    cudaGetLastError(); // it is told here
    return g;
}
inline std::string gpu_fault(int device) { return gpu_fault(gpu_facts(device)); }

// Bytes of GPU memory that a rank can have, see gpu_memory_share.
inline double gpu_memory(const GpuPlace& place) {
    size_t free = 0, all = 0;
    CUDA_CHECK(cudaSetDevice(place.device));
    CUDA_CHECK(cudaMemGetInfo(&free, &all)); // makes the context
    return gpu_memory_share(double(free), double(all), place.ranks);
}
inline double gpu_memory_used() {
    size_t free = 0, all = 0;
    CUDA_CHECK(cudaMemGetInfo(&free, &all));
    return double(all - free);
}

inline std::string gpu_name(int device) {
    cudaDeviceProp properties;
    CUDA_CHECK(cudaGetDeviceProperties(&properties, device));
    return properties.name;
}

// Opens a GPU of this host.
inline Gpu gpu_open(int device, bool deterministic = false, bool portable_attention = false) {
    const GpuFacts facts = gpu_facts(device);
    const std::string fault = gpu_fault(facts);
    if (!fault.empty()) fail("%s; --device cpu runs without a GPU", fault.c_str());
    CUDA_CHECK(cudaSetDevice(device));
    cudaDeviceProp properties;
    CUDA_CHECK(cudaGetDeviceProperties(&properties, device));
    Gpu gpu;
    gpu.context = new GpuContext;
    GpuContext& c = *gpu.context;
    c.device = device, c.sms = properties.multiProcessorCount, c.compute = gpu_compute(facts);
    c.l2_bytes = size_t(properties.l2CacheSize), c.shared_bytes = properties.sharedMemPerMultiprocessor;
    c.deterministic = deterministic, c.portable_attention = portable_attention;
    snprintf(c.name, sizeof c.name, "%s", properties.name);
    CUDA_CHECK(cudaStreamCreateWithFlags(&gpu.stream, cudaStreamNonBlocking));
    CUDA_CHECK(cudaMallocHost((void**)&c.staging.memory, Staging::slots * Staging::slot_bytes));
    for (cudaEvent_t& event : c.staging.sent) CUDA_CHECK(cudaEventCreateWithFlags(&event, cudaEventDisableTiming));
    c.scratch = device_allocate(gpu, GpuContext::scratch_bytes);
    return gpu;
}
#else
// Built without CUDA: there is nothing to open.
inline std::string gpu_fault(int) { return "this program was built without CUDA, it has no GPU layers"; }
inline int gpu_count() { return 0; }
inline bool gpu_reaches_all(int, int) { return true; }
inline double gpu_memory(const GpuPlace&) { return 0; }
inline std::string gpu_name(int) { return ""; }
#endif
