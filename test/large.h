// Arrays of more than 2^32 elements for the tests of the GPU: they never come to the host but by rows.
#pragma once
#include "gpu.h"

template <class E> __global__ void large_fill_kernel(E* x, size_t count, uint64_t seed, float scale) {
    const size_t stride = size_t(gridDim.x) * blockDim.x;
    for (size_t i = size_t(blockIdx.x) * blockDim.x + threadIdx.x; i < count; i += stride)
        x[i] = E(scale * (2 * float(hash64(seed, i) >> 40) * 0x1p-24f - 1));
}

// Poisoned (every bit 1: NaN, or -1) or uniform in [-scale, scale), between guards of its own.
template <class E> struct LargeBuffer {
    static constexpr size_t guard = Buffer<E>::guard;
    static constexpr uint8_t guard_byte = Buffer<E>::guard_byte;
    E* block = nullptr;
    size_t count;

    explicit LargeBuffer(size_t n) : count(n) {
        CUDA_CHECK(cudaMalloc((void**)&block, (n + 2 * guard) * sizeof(E)));
        CUDA_CHECK(cudaMemset(block, guard_byte, guard * sizeof(E)));
        CUDA_CHECK(cudaMemset(block + guard, 0xff, n * sizeof(E)));
        CUDA_CHECK(cudaMemset(block + guard + n, guard_byte, guard * sizeof(E)));
        CUDA_CHECK(cudaDeviceSynchronize());
    }
    LargeBuffer(size_t n, uint64_t seed, float scale = 1) : LargeBuffer(n) {
        large_fill_kernel<<<2048, 256>>>(data(), n, seed, scale);
        CUDA_CHECK(cudaDeviceSynchronize());
    }
    LargeBuffer(const LargeBuffer&) = delete;
    ~LargeBuffer() {
        check_guards(block, count);
        CUDA_CHECK(cudaFree(block));
    }
    E* data() { return block + guard; }
    operator E*() { return data(); }

    // Elements [first, first + n).
    Buffer<E> part(size_t first, size_t n) {
        Buffer<E> to(n);
        CUDA_CHECK(cudaDeviceSynchronize());
        CUDA_CHECK(cudaMemcpy(to.data(), data() + first, n * sizeof(E), cudaMemcpyDeviceToHost));
        return to;
    }
    void set(size_t first, const Buffer<E>& from) {
        CUDA_CHECK(cudaMemcpy(data() + first, from.data(), from.count * sizeof(E), cudaMemcpyHostToDevice));
        CUDA_CHECK(cudaDeviceSynchronize()); // a small copy may still be on its way
    }
};
