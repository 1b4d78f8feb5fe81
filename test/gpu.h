// What the tests of the GPU share: one GPU, and guarded, poisoned buffers in its memory.
#pragma once
#include "../core/device.h"
#include "check.h"

// The GPU of this test process; the ranks of a test share the GPUs there are.
inline Gpu the_gpu() {
    static const Gpu gpu = [] {
        const char* local_rank = getenv("OMPI_COMM_WORLD_LOCAL_RANK");
        int count = 0;
        gpu_count(count);
        return gpu_open(local_rank && count ? atoi(local_rank) % count : 0);
    }();
    return gpu;
}

// A Buffer's double in device memory, between guard words. Made from a count it is poisoned as Buffer is, made from a
// Buffer it holds its values. host() brings it back; the destructor fails the test when a guard word was touched.
template <class E> struct DeviceBuffer {
    static constexpr size_t guard = 64;
    E* block = nullptr;
    size_t count;

    explicit DeviceBuffer(size_t n) : DeviceBuffer(Buffer<E>(n)) {}
    explicit DeviceBuffer(const Buffer<E>& from) : count(from.count) {
        static_assert(Buffer<E>::guard == guard);
        CUDA_CHECK(cudaMalloc((void**)&block, bytes()));
        CUDA_CHECK(cudaMemcpy(block, from.store.data(), bytes(), cudaMemcpyHostToDevice));
        CUDA_CHECK(cudaDeviceSynchronize()); // the copy may still be on its way, and our stream does not wait for it
    }
    DeviceBuffer(const DeviceBuffer&) = delete;
    ~DeviceBuffer() {
        host(); // checks the guards
        CUDA_CHECK(cudaFree(block));
    }
    size_t bytes() const { return (count + 2 * guard) * sizeof(E); }
    E* data() { return block + guard; }
    operator E*() { return data(); }
    Buffer<E> host() const {
        CUDA_CHECK(cudaDeviceSynchronize());
        Buffer<E> to(count); // its own destructor looks at the guards that came along
        CUDA_CHECK(cudaMemcpy(to.store.data(), block, bytes(), cudaMemcpyDeviceToHost));
        return to;
    }
    void set(const Buffer<E>& from) {
        CHECK(from.count == count);
        CUDA_CHECK(cudaMemcpy(block, from.store.data(), bytes(), cudaMemcpyHostToDevice));
        CUDA_CHECK(cudaDeviceSynchronize()); // the copy may still be on its way, and our stream does not wait for it
    }
    void poison() { set(Buffer<E>(count)); }
};
