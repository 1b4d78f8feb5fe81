// What the benchmarks share: timing by events, hashed data on the GPU, the copy bandwidth, rows of a table.
#pragma once
#include "../core/device.h"
#include <algorithm>
#include <string>
#include <vector>

// Normal values, scaled: element i is hash_normal(seed, i). Never time on zeros: they run faster.
template <class E> __global__ void bench_fill_kernel(E* x, size_t count, uint64_t seed, float scale) {
    for (size_t i = blockIdx.x * size_t(blockDim.x) + threadIdx.x; i < count; i += size_t(gridDim.x) * blockDim.x)
        x[i] = E(scale * float(hash_normal(seed, i)));
}
template <class E> E* bench_normal(Gpu gpu, size_t count, uint64_t seed, float scale = 1) {
    E* x = (E*)device_allocate(gpu, count * sizeof(E));
    bench_fill_kernel<<<4096, 256, 0, gpu.stream>>>(x, count, seed, scale);
    CUDA_CHECK(cudaGetLastError());
    return x;
}

// Median milliseconds of f() on the stream: three calls to warm up, then `rounds` (odd) timed one by one.
template <class F> double bench_ms(Gpu gpu, F f, int rounds = 11) {
    cudaEvent_t begin, end;
    CUDA_CHECK(cudaEventCreate(&begin));
    CUDA_CHECK(cudaEventCreate(&end));
    for (int i = 0; i < 3; i++) f();
    std::vector<float> times(rounds);
    for (float& ms : times) {
        CUDA_CHECK(cudaEventRecord(begin, gpu.stream));
        f();
        CUDA_CHECK(cudaEventRecord(end, gpu.stream));
        CUDA_CHECK(cudaEventSynchronize(end));
        CUDA_CHECK(cudaEventElapsedTime(&ms, begin, end));
    }
    cudaEventDestroy(begin), cudaEventDestroy(end);
    std::nth_element(times.begin(), times.begin() + rounds / 2, times.end());
    return times[rounds / 2];
}

// Bytes per second, read plus written, of a plain copy of 4 GiB: the ceiling of memory-bound kernels.
inline double bench_copy_bandwidth(Gpu gpu) {
    const size_t bytes = size_t(4) << 30;
    float *from = bench_normal<float>(gpu, bytes / 4, 1), *to = bench_normal<float>(gpu, bytes / 4, 2);
    double ms = bench_ms(gpu, [&] { copy_on_device(gpu, to, from, bytes); });
    CUDA_CHECK(cudaFree(from));
    CUDA_CHECK(cudaFree(to));
    return 2 * double(bytes) / (ms * 1e-3);
}

// name | ms | GB/s | share of `ceiling` (bytes per second)
inline void bench_row_bytes(const char* name, double ms, double bytes, double ceiling) {
    double rate = bytes / (ms * 1e-3);
    printf("| %-36s | %9.3f ms | %7.0f GB/s | %5.1f%% of a copy |\n", name, ms, rate / 1e9, 100 * rate / ceiling);
    fflush(stdout);
}
// name | ms | TFLOP/s | share of `ceiling` (FLOP per second), said in words
inline void bench_row_flops(const char* name, double ms, double flops, double ceiling, const char* of_what) {
    double rate = flops / (ms * 1e-3);
    printf("| %-36s | %9.3f ms | %7.0f TF/s | %5.1f%% of %s |\n", name, ms, rate / 1e12, 100 * rate / ceiling, of_what);
    fflush(stdout);
}
