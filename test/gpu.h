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

// initcheck finds reads of memory that nobody has written: for its run (TEST_UNSET=1) what a test would poison is left
// unset instead. It counts copies to the host as reads too. It does not follow what the bulk copy engine writes (before
// its version 2025.4), so what attention's Hopper kernels and cuBLASLt write stays poisoned, or zeroed as an arena is.
inline bool left_unset() {
    static const bool unset = getenv("TEST_UNSET") != nullptr;
    return unset;
}

// The guard words on both sides of `count` elements, of which `block` begins with the first.
template <class E> void check_guards(const E* block, size_t count) {
    CUDA_CHECK(cudaDeviceSynchronize());
    for (const E* side : {block, block + Buffer<E>::guard + count}) {
        uint8_t bytes[Buffer<E>::guard * sizeof(E)];
        CUDA_CHECK(cudaMemcpy(bytes, side, sizeof bytes, cudaMemcpyDeviceToHost));
        CHECK_MESSAGE(std::all_of(bytes, bytes + sizeof bytes, [](uint8_t b) { return b == Buffer<E>::guard_byte; }),
                      "a guard word was overwritten");
    }
}

// A Buffer's double in device memory, between guard words. Made from a count it is an output, every element of which
// the kernels are to write: poisoned as Buffer is, or left unset. Made from a Buffer it holds its values. host() brings
// it back; the destructor fails the test when a guard word was touched.
template <class E> struct DeviceBuffer {
    static constexpr size_t guard = Buffer<E>::guard;
    E* block = nullptr;
    size_t count;

    explicit DeviceBuffer(size_t n) : count(n) {
        CUDA_CHECK(cudaMalloc((void**)&block, bytes()));
        if (left_unset()) {
            CUDA_CHECK(cudaMemset(block, Buffer<E>::guard_byte, guard * sizeof(E)));
            CUDA_CHECK(cudaMemset(data() + n, Buffer<E>::guard_byte, guard * sizeof(E)));
            CUDA_CHECK(cudaDeviceSynchronize());
        } else poison();
    }
    explicit DeviceBuffer(const Buffer<E>& from) : count(from.count) {
        CUDA_CHECK(cudaMalloc((void**)&block, bytes()));
        set(from);
    }
    DeviceBuffer(const DeviceBuffer&) = delete;
    ~DeviceBuffer() {
        check_guards(block, count);
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
    // The first n elements, those that the kernels leave alone.
    void set_first(const Buffer<E>& from, size_t n) {
        CHECK(n <= std::min(count, from.count));
        CUDA_CHECK(cudaMemcpy(data(), from.data(), n * sizeof(E), cudaMemcpyHostToDevice));
        CUDA_CHECK(cudaDeviceSynchronize());
    }
    void poison() { set(Buffer<E>(count)); }
};

// For a scope the launchers have another scratch memory, that nobody has written: poisoned (NaN, or -1), or left unset.
struct FreshScratch {
    GpuContext& context = *the_gpu().context;
    uint8_t *block = nullptr, *kept = context.scratch;
    FreshScratch() {
        CUDA_CHECK(cudaMalloc((void**)&block, GpuContext::scratch_bytes));
        if (!left_unset()) CUDA_CHECK(cudaMemset(block, 0xff, GpuContext::scratch_bytes));
        CUDA_CHECK(cudaDeviceSynchronize());
        context.scratch = block;
    }
    FreshScratch(const FreshScratch&) = delete;
    ~FreshScratch() {
        CUDA_CHECK(cudaDeviceSynchronize());
        context.scratch = kept;
        CUDA_CHECK(cudaFree(block));
    }
};
