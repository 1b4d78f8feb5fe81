// A CUDA runtime made of threads, to run the communicator for GPUs where there is none: core/comm_gpu.cu and
// test/gpu_comm.cu, compiled as C++ (test/test_cuda_threads.py). A stream is a thread that works through a queue, an
// event counts how often it was recorded and has come, a GPU's memory is memory that other processes can map, a kernel
// runs thread by thread, and copies are late at random. CUDA_THREADS=1 gives all streams one queue, as a driver may.
// What of CUDA is here is what those files use.
#pragma once
#include <cstddef>
#include <cstdint>
#include <functional>
#include <tuple>

#define __CUDA_ARCH_LIST__ 900
#define __global__
#define __device__
#define __host__
#define __shared__
#define __launch_bounds__(...)

struct Queue;
struct Event;
using cudaStream_t = Queue*;
using cudaEvent_t = Event*;
enum cudaError_t {
    cudaSuccess,
    cudaErrorNotReady,
    cudaErrorInvalidValue,
    cudaErrorInsufficientDriver,
    cudaErrorNoKernelImageForDevice,
    cudaErrorInvalidDeviceFunction,
    cudaErrorInvalidPtx,
    cudaErrorUnsupportedPtxVersion,
    cudaErrorJitCompilerNotFound,
};
enum cudaMemcpyKind { cudaMemcpyHostToDevice, cudaMemcpyDeviceToHost, cudaMemcpyDeviceToDevice };
enum { cudaStreamNonBlocking, cudaEventDisableTiming, cudaIpcMemLazyEnablePeerAccess, cudaEnableDefault };
enum { cudaDevAttrComputeCapabilityMajor, cudaDevAttrComputeCapabilityMinor };
struct cudaFuncAttributes {
    int ptxVersion, binaryVersion;
};
struct cudaDeviceProp {
    int multiProcessorCount, l2CacheSize;
    char name[256];
    size_t sharedMemPerMultiprocessor;
};
struct cudaIpcMemHandle_t {
    int process, file, rank; // of the world
    size_t bytes;
};
enum cudaDriverEntryPointQueryResult { cudaDriverEntryPointSuccess };
using CUresult = int;
using CUdeviceptr = uintptr_t;
constexpr CUresult CUDA_SUCCESS = 0;
constexpr unsigned CU_STREAM_WAIT_VALUE_GEQ = 0;
CUresult cuStreamWriteValue32(cudaStream_t stream, CUdeviceptr to, uint32_t value, unsigned flags);
CUresult cuStreamWaitValue32(cudaStream_t stream, CUdeviceptr at, uint32_t value, unsigned flags);
cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** function, unsigned version, int flags,
                                             cudaDriverEntryPointQueryResult* found);

inline cudaError_t cudaDeviceCanAccessPeer(int* can, int, int) { return *can = 1, cudaSuccess; }
cudaError_t cudaMalloc(void** memory, size_t bytes);
cudaError_t cudaMallocHost(void** memory, size_t bytes);
cudaError_t cudaFree(void* memory);
cudaError_t cudaIpcGetMemHandle(cudaIpcMemHandle_t* handle, void* memory);
cudaError_t cudaIpcOpenMemHandle(void** memory, cudaIpcMemHandle_t handle, unsigned flags);
cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind kind);
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind kind, cudaStream_t stream);
cudaError_t cudaMemset(void* to, int byte, size_t bytes);
cudaError_t cudaMemsetAsync(void* to, int byte, size_t bytes, cudaStream_t stream);
cudaError_t cudaStreamCreateWithPriority(cudaStream_t* stream, unsigned flags, int priority);
cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned flags);
cudaError_t cudaStreamQuery(cudaStream_t stream);
cudaError_t cudaStreamSynchronize(cudaStream_t stream);
cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned flags);
cudaError_t cudaDeviceSynchronize();
cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned flags);
inline cudaError_t cudaEventCreate(cudaEvent_t* event) { return cudaEventCreateWithFlags(event, 0); }
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream);
cudaError_t cudaEventQuery(cudaEvent_t event);
cudaError_t cudaEventSynchronize(cudaEvent_t event);
cudaError_t cudaEventElapsedTime(float* ms, cudaEvent_t from, cudaEvent_t to);

constexpr unsigned cudaHostRegisterDefault = 0;
inline cudaError_t cudaHostRegister(void*, size_t, unsigned) { return cudaSuccess; }

// What is the same for every GPU.
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return "an error"; }
inline const char* cudaGetErrorName(cudaError_t) { return "cudaError"; }
inline cudaError_t cudaGetDeviceCount(int* count) { return *count = 8, cudaSuccess; }
inline cudaError_t cudaDriverGetVersion(int* version) { return *version = 13000, cudaSuccess; }
inline cudaError_t cudaRuntimeGetVersion(int* version) { return *version = 13000, cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int* value, int what, int) {
    return *value = what == cudaDevAttrComputeCapabilityMajor ? 9 : 0, cudaSuccess;
}
template <class F> cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, F) {
    return *attributes = {90, 90}, cudaSuccess;
}
inline cudaError_t cudaMemGetInfo(size_t* free, size_t* all) { return *free = *all = size_t(1) << 36, cudaSuccess; }
inline cudaError_t cudaGetDeviceProperties(cudaDeviceProp* p, int) { return *p = {1, 1 << 20, "threads"}, cudaSuccess; }
inline cudaError_t cudaDeviceGetStreamPriorityRange(int* a, int* b) { return *a = *b = 0, cudaSuccess; }

// Kernels: kernel<<<grid, block, 0, stream>>>(arguments) is made into cuda_launch(grid, block, 0, stream, kernel,
// arguments) before it is compiled. The threads of a block do not meet: no kernel here has a barrier.
struct Index {
    unsigned x;
};
inline thread_local Index blockIdx, threadIdx, gridDim, blockDim;
void stream_do(cudaStream_t stream, std::function<void()> work);
template <class... P, class... A>
void cuda_launch(unsigned grid, unsigned block, size_t, cudaStream_t stream, void (*kernel)(P...), A... arguments) {
    stream_do(stream, [=, values = std::tuple<P...>(arguments...)] {
        gridDim.x = grid, blockDim.x = block;
        for (blockIdx.x = 0; blockIdx.x < grid; blockIdx.x++)
            for (threadIdx.x = 0; threadIdx.x < block; threadIdx.x++) std::apply(kernel, values);
    });
}
// Nanoseconds; of a kernel's first thread alone: the others, which come after it, need not wait again.
int64_t clock64();
inline void atomicAdd(unsigned long long* to, unsigned long long x) { __atomic_fetch_add(to, x, __ATOMIC_SEQ_CST); }
inline float __uint_as_float(uint32_t bits) { return __builtin_bit_cast(float, bits); }
inline uint32_t __float_as_uint(float x) { return __builtin_bit_cast(uint32_t, x); }
struct uint2 {
    unsigned x, y;
};
struct uint4 {
    unsigned x, y, z, w;
};
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
template <class T> T __ldcs(const T* p) { return *p; }
template <class T> void __stcs(T* p, T x) { *p = x; }
template <class T> T __shfl_xor_sync(unsigned, T, int); // for what is compiled and not used
void __syncthreads();
