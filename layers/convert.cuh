// The small change of the trainer: from one storage type to another, random and constant values, sums.
#pragma once
#include "../core/kernel.h"
#include <algorithm>
#include <vector>

// to, from (count): to the nearest value of the type, ties to even.
template <class To, class From> void convert(Cpu, To* to, const From* from, size_t count) {
#pragma omp parallel for schedule(static)
    for (size_t i = 0; i < count; i++) to[i] = To(from[i]);
}

// to (count) += from (count), rounded once.
template <class E> void add(Cpu, E* to, const E* from, size_t count) {
#pragma omp parallel for schedule(static)
    for (size_t i = 0; i < count; i++) to[i] = E(Acc<E>(to[i]) + Acc<E>(from[i]));
}

// x_i = deviation times a standard normal value, the one at first + i in the order that `seed` chooses: a pure function
// of both, so that any part of a model can be started by itself.
template <class E> void random_normal(Cpu, E* x, size_t count, uint64_t seed, size_t first, double deviation) {
#pragma omp parallel for schedule(static)
    for (size_t i = 0; i < count; i++) x[i] = E(deviation * hash_normal(seed, first + i));
}

template <class E> void fill(Cpu, E* x, size_t count, double value) {
#pragma omp parallel for schedule(static)
    for (size_t i = 0; i < count; i++) x[i] = E(value);
}

// total (1): the sum of x (count), in double and in a fixed order, written or added to what is there.
template <class A> void sum(Cpu, double* total, const A* x, size_t count, bool add) {
    double all = add ? *total : 0;
    for (size_t i = 0; i < count; i++) all += double(x[i]);
    *total = all;
}

#ifdef __CUDACC__
// A thread takes 4 times 4 neighbours, or 4 single elements where an address is not on 16 bytes; thread 0 of the grid
// takes what is left of the last 4. Bound by memory: 94% (to float) and 101% of a copy's bandwidth on H200.
template <class To, class From, int W> __global__ void __launch_bounds__(256)
    convert_kernel(To* to, const From* from, size_t count) {
    const size_t begin = (size_t(blockIdx.x) * 4 * blockDim.x + threadIdx.x) * W, stride = size_t(blockDim.x) * W;
    Pack<From, W> x[4];
#pragma unroll
    for (int k = 0; k < 4; k++)
        if (begin + k * stride + W <= count) x[k] = pack_load<W>(from + begin + k * stride);
#pragma unroll
    for (int k = 0; k < 4; k++) {
        if (begin + k * stride + W > count) continue;
        float y[W];
#pragma unroll
        for (int j = 0; j < W; j++) y[j] = x[k][j];
        pack_store(to + begin + k * stride, y);
    }
    if (begin == 0)
        for (size_t i = count - count % W; i < count; i++) to[i] = To(float(from[i]));
}

template <class To, class From> void convert(Gpu gpu, To* to, const From* from, size_t count) {
    constexpr unsigned threads = 256;
    if (count == 0) return;
    auto launch = [&](auto width) {
        constexpr int W = decltype(width)::value;
        const unsigned blocks = grid_blocks((count + 4 * W * threads - 1) / (4 * W * threads));
        convert_kernel<To, From, W><<<blocks, threads, 0, gpu.stream>>>(to, from, count);
    };
    if (packs_fit<float>(0, to, from)) launch(std::integral_constant<int, 4>());
    else launch(std::integral_constant<int, 1>());
    CUDA_CHECK(cudaGetLastError());
}

// A thread takes W neighbours; thread 0 of the grid also what is left of the last W. Bound by memory.
template <class E, int W> __global__ void __launch_bounds__(256) add_kernel(E* to, const E* from, size_t count) {
    const size_t i = (size_t(blockIdx.x) * blockDim.x + threadIdx.x) * W;
    if (i + W <= count) {
        const Pack<E, W> a = pack_load<W>(to + i), b = pack_load<W>(from + i);
        float y[W];
#pragma unroll
        for (int j = 0; j < W; j++) y[j] = a[j] + b[j];
        pack_store(to + i, y);
    }
    if (i == 0)
        for (size_t j = count - count % W; j < count; j++) to[j] = E(float(to[j]) + float(from[j]));
}

template <class E> void add(Gpu gpu, E* to, const E* from, size_t count) {
    constexpr unsigned threads = 256;
    if (count == 0) return;
    auto launch = [&](auto width) {
        constexpr int W = decltype(width)::value;
        const unsigned blocks = grid_blocks((count + W * threads - 1) / (W * threads));
        add_kernel<E, W><<<blocks, threads, 0, gpu.stream>>>(to, from, count);
    };
    if (packs_fit<E>(0, to, from)) launch(std::integral_constant<int, pack_width<E>>());
    else launch(std::integral_constant<int, 1>());
    CUDA_CHECK(cudaGetLastError());
}

// Bound by the double-precision logarithm, root and cosine of an element; only a new model needs it.
template <class E>
__global__ void random_normal_kernel(E* x, size_t count, uint64_t seed, size_t first, double deviation) {
    const size_t stride = size_t(gridDim.x) * blockDim.x;
    for (size_t i = size_t(blockIdx.x) * blockDim.x + threadIdx.x; i < count; i += stride)
        x[i] = E(deviation * hash_normal(seed, first + i));
}

template <class E> void random_normal(Gpu gpu, E* x, size_t count, uint64_t seed, size_t first, double deviation) {
    if (count == 0) return;
    const unsigned blocks = unsigned(std::min((count + 255) / 256, size_t(gpu.context->sms) * 8));
    random_normal_kernel<<<blocks, 256, 0, gpu.stream>>>(x, count, seed, first, deviation);
    CUDA_CHECK(cudaGetLastError());
}

// Neighbouring threads write neighbours; bound by memory, and used to start a model only.
template <class E> __global__ void fill_kernel(E* x, size_t count, E value) {
    const size_t stride = size_t(gridDim.x) * blockDim.x;
    for (size_t i = size_t(blockIdx.x) * blockDim.x + threadIdx.x; i < count; i += stride) x[i] = value;
}

template <class E> void fill(Gpu gpu, E* x, size_t count, double value) {
    if (count == 0) return;
    const unsigned blocks = unsigned(std::min((count + 255) / 256, size_t(gpu.context->sms) * 8));
    fill_kernel<<<blocks, 256, 0, gpu.stream>>>(x, count, E(value));
    CUDA_CHECK(cudaGetLastError());
}

// A block's share of a sum of term(x_i), in double. A thread takes 4 times W neighbours a round, a grid apart, with all
// loads in flight; thread 0 of the grid takes what is left of the last W. Bound by memory: 98% of a copy's bandwidth
// on H200.
template <int W, class E, class Term> __global__ void __launch_bounds__(256)
    sum_kernel(double* partial, const E* x, size_t count, Term term) {
    __shared__ double slot[32];
    const size_t begin = (size_t(blockIdx.x) * blockDim.x + threadIdx.x) * W,
                 stride = size_t(gridDim.x) * blockDim.x * W;
    double total = 0;
    for (size_t i = begin; i < count; i += 4 * stride) {
        Pack<E, W> v[4];
#pragma unroll
        for (int k = 0; k < 4; k++)
            if (i + k * stride + W <= count) v[k] = pack_load<W>(x + i + k * stride);
#pragma unroll
        for (int k = 0; k < 4; k++)
            if (i + k * stride + W <= count)
#pragma unroll
                for (int j = 0; j < W; j++) total += term(double(v[k][j]));
    }
    if (begin == 0)
        for (size_t i = count - count % W; i < count; i++) total += term(double(float(x[i])));
    total = block_sum(total, slot);
    if (threadIdx.x == 0) partial[blockIdx.x] = total;
}

// One block adds the shares, each thread those of its number plus a multiple of 256.
static __global__ void __launch_bounds__(256)
    sum_partials_kernel(double* total, const double* partial, unsigned partials, bool add) {
    __shared__ double slot[32];
    double mine = 0;
    for (unsigned i = threadIdx.x; i < partials; i += blockDim.x) mine += partial[i];
    mine = block_sum(mine, slot);
    if (threadIdx.x == 0) *total = add ? *total + mine : mine;
}

// The order is fixed by `count` and the number of blocks that the GPU holds.
template <class E, class Term> void sum_of(Gpu gpu, double* total, const E* x, size_t count, Term term, bool add) {
    constexpr unsigned threads = 256;
    double* partial = (double*)gpu.context->scratch;
    unsigned blocks = 0;
    auto launch = [&](auto width) {
        constexpr int W = decltype(width)::value;
        const size_t enough = (count + threads * W - 1) / (threads * W);
        blocks = unsigned(std::min<size_t>(enough, resident_blocks(gpu, sum_kernel<W, E, Term>, threads)));
        if (blocks > 0) sum_kernel<W><<<blocks, threads, 0, gpu.stream>>>(partial, x, count, term);
    };
    if (packs_fit<E>(0, x)) launch(std::integral_constant<int, pack_width<E>>());
    else launch(std::integral_constant<int, 1>());
    CUDA_CHECK(cudaGetLastError());
    sum_partials_kernel<<<1, threads, 0, gpu.stream>>>(total, partial, blocks, add);
    CUDA_CHECK(cudaGetLastError());
}

struct SumOfValues {
    __device__ double operator()(double x) const { return x; }
};

inline void sum(Gpu gpu, double* total, const float* x, size_t count, bool add) {
    sum_of(gpu, total, x, count, SumOfValues(), add);
}
#endif
