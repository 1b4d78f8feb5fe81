// Cross entropy of the softmax, fused with its gradient, one row of logits per token.
//
//   m = max_v logits_tv     Z = sum_v e^(logits_tv - m)
//   loss_t     = log Z + m - logits_{t, label_t}
//   dlogits_tv = (e^(logits_tv - m) / Z - [v = label_t]) scale
//
// The largest term of Z is 1, so neither overflow nor a Z of 0 can happen with finite logits. A NaN or +inf among the
// logits gives a NaN loss, -inf at the label an infinite one. label_t < 0: the token is not counted, its loss is 0 and
// its row of dlogits is 0.
//
// logits, dlogits (T, V); label (T), below V; loss (T); argmax (T): the first of the largest logits (0 if all are NaN).
#pragma once
#include "../core/fastexp.h"
#include "../core/kernel.h"
#include <cfloat>
#include <climits>
#include <limits>

template <class A> struct SoftmaxRow {
    A max, sum; // m and Z
};

template <class E> SoftmaxRow<Acc<E>> softmax_row(const E* x, size_t V) {
    using A = Acc<E>;
    A m = -std::numeric_limits<A>::infinity(), sum = 0;
#pragma omp simd reduction(max : m)
    for (size_t v = 0; v < V; v++) m = A(x[v]) > m ? A(x[v]) : m;
#pragma omp simd reduction(+ : sum)
    for (size_t v = 0; v < V; v++) sum += fast_exp(A(x[v]) - m);
    return {m, sum};
}

// argmax may be null; it is also given for tokens that are not counted.
template <class E>
void loss_forward(Cpu, Acc<E>* loss, int32_t* argmax, const E* logits, const int32_t* label, size_t T, size_t V) {
    using A = Acc<E>;
    REQUIRE(V > 0, "the vocabulary is empty");
#pragma omp parallel for schedule(static)
    for (size_t t = 0; t < T; t++) {
        const E* x = logits + t * V;
        SoftmaxRow<A> row = softmax_row(x, V);
        loss[t] = label[t] < 0 ? A(0) : std::log(row.sum) + (row.max - A(x[label[t]]));
        if (argmax) {
            size_t v = 0;
            while (v < V && !(A(x[v]) == row.max)) v++;
            argmax[t] = int32_t(v < V ? v : 0);
        }
    }
}

// Overwrites the logits with their gradient.
template <class E>
void loss_forward_backward(Cpu, Acc<E>* loss, E* logits, const int32_t* label, double scale, size_t T, size_t V) {
    using A = Acc<E>;
    REQUIRE(V > 0, "the vocabulary is empty");
#pragma omp parallel for schedule(static)
    for (size_t t = 0; t < T; t++) {
        E* x = logits + t * V;
        if (label[t] < 0) {
            loss[t] = 0;
            memset((void*)x, 0, V * sizeof(E));
            continue;
        }
        SoftmaxRow<A> row = softmax_row(x, V);
        A at_label = A(x[label[t]]), each = A(scale) / row.sum;
        loss[t] = std::log(row.sum) + (row.max - at_label);
#pragma GCC ivdep
        for (size_t v = 0; v < V; v++) x[v] = E(fast_exp(A(x[v]) - row.max) * each);
        x[label[t]] = E((fast_exp(at_label - row.max) / row.sum - A(1)) * A(scale));
    }
}

#ifdef __CUDACC__
// Adds W logits to a row of which some are in already: when the largest grows, the sum is scaled to it. Starting from
// the lowest float instead of -inf keeps a start of only -inf logits from becoming NaN.
__device__ inline SoftmaxRow<float> softmax_row_empty() { return {-FLT_MAX, 0}; }

template <class E, int W> __device__ void softmax_row_add(SoftmaxRow<float>& row, const Pack<E, W>& x) {
    float m = row.max;
#pragma unroll
    for (int j = 0; j < W; j++) m = fmaxf(m, x[j]);
    row.sum *= exp_for<E>(row.max - m);
    row.max = m;
#pragma unroll
    for (int j = 0; j < W; j++) row.sum += exp_for<E>(x[j] - m);
}

// Every thread gets the row of the whole block.
template <class E>
__device__ SoftmaxRow<float> softmax_row_join(SoftmaxRow<float> mine, SoftmaxRow<float> (&slot)[32]) {
    auto join_warp = [](SoftmaxRow<float> x) {
        const float m = warp_max(x.max);
        return SoftmaxRow<float>{m, warp_sum(x.sum * exp_for<E>(x.max - m))};
    };
    const unsigned warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    mine = join_warp(mine);
    if (lane == 0) slot[warp] = mine;
    __syncthreads();
    return join_warp(lane < blockDim.x / 32 ? slot[lane] : softmax_row_empty());
}

// A block per token, each thread with its largest logit and its sum; where two are equal the first place counts, and a
// NaN never does. Bound by memory.
template <class E, int W> __global__ void __launch_bounds__(1024)
    loss_forward_kernel(float* loss, int32_t* argmax, const E* logits, const int32_t* label, size_t V) {
    __shared__ SoftmaxRow<float> slot[32];
    __shared__ float slot_best[32];
    __shared__ int slot_place[32];
    const E* x = logits + blockIdx.x * V;
    const unsigned packs = unsigned(V / W);
    SoftmaxRow<float> row = softmax_row_empty();
    float best = -INFINITY;
    int place = INT_MAX;
    auto take = [&](float value, int where) {
        if (value > best || (value == best && where < place)) best = value, place = where;
    };
    auto take_lanes = [&] {
#pragma unroll
        for (int lane = 16; lane > 0; lane /= 2) {
            const float value = __shfl_xor_sync(~0u, best, lane);
            take(value, __shfl_xor_sync(~0u, place, lane));
        }
    };
#pragma unroll 4
    for (unsigned p = threadIdx.x; p < packs; p += blockDim.x) {
        const Pack<E, W> v = pack_load<W>(x + size_t(p) * W);
        softmax_row_add(row, v);
#pragma unroll
        for (int j = 0; j < W; j++) take(v[j], int(p) * W + j);
    }
    take_lanes();
    const unsigned warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    if (lane == 0) slot_best[warp] = best, slot_place[warp] = place;
    row = softmax_row_join<E>(row, slot); // its barrier serves both
    if (warp > 0) return;
    best = -INFINITY, place = INT_MAX;
    if (lane < blockDim.x / 32) best = slot_best[lane], place = slot_place[lane];
    take_lanes();
    if (lane > 0) return;
    const int32_t at = label[blockIdx.x];
    loss[blockIdx.x] = at < 0 ? 0 : logf(row.sum) + (row.max - float(x[at]));
    if (argmax) argmax[blockIdx.x] = place < INT_MAX ? place : 0;
}

// A block per token. The logits are read once and wait in registers, P packs a thread, while the row's sum forms; each
// joins the sum as it arrives, so that the exponentials run under the loads. A row longer than P packs for 1024 threads
// (65536 bf16) is taken in chunks of this size: the first is read last and waits, the others are read again, mostly
// from L2, which holds the rows of all blocks. Bound by memory; the two exponentials an element keep the special
// function units busy for over half of that time. H200, of a copy's bandwidth: 87% with 2048 tokens of 32000 logits;
// 68% with 512, which take 22 us, where a plain copy of as much comes to 87%; 74% with 512 of 128256.
template <class E, int W, int P> __global__ void __launch_bounds__(1024)
    loss_forward_backward_kernel(float* loss, E* logits, const int32_t* label, float scale, size_t V) {
    __shared__ SoftmaxRow<float> slot[32];
    E* x = logits + blockIdx.x * V;
    const unsigned packs = unsigned(V / W), stride = blockDim.x, chunk = P * stride;
    const int32_t at = label[blockIdx.x];
    if (at < 0) {
        const float zero[W] = {};
        for (unsigned p = threadIdx.x; p < packs; p += stride) pack_store(x + size_t(p) * W, zero);
        if (threadIdx.x == 0) loss[blockIdx.x] = 0;
        return;
    }
    Pack<E, W> kept[P];
    auto load = [&](unsigned begin) {
#pragma unroll
        for (int k = 0; k < P; k++)
            if (const unsigned p = begin + threadIdx.x + k * stride; p < packs)
                kept[k] = pack_load<W>(x + size_t(p) * W);
    };
    SoftmaxRow<float> row = softmax_row_empty();
    for (unsigned begin = (packs - 1) / chunk * chunk;; begin -= chunk) {
        load(begin);
#pragma unroll
        for (int k = 0; k < P; k++)
            if (begin + threadIdx.x + k * stride < packs) softmax_row_add(row, kept[k]);
        if (begin == 0) break;
    }
    const float at_label = float(x[at]); // before the barrier, after which it is overwritten
    row = softmax_row_join<E>(row, slot);
    if (threadIdx.x == 0) loss[blockIdx.x] = logf(row.sum) + (row.max - at_label);

    const float each = scale / row.sum;
    for (unsigned begin = 0; begin < packs; begin += chunk) {
        if (begin > 0) load(begin);
#pragma unroll
        for (int k = 0; k < P; k++)
            if (const unsigned p = begin + threadIdx.x + k * stride; p < packs) {
                float d[W];
#pragma unroll
                for (int j = 0; j < W; j++) d[j] = exp_for<E>(kept[k][j] - row.max) * each;
                pack_store(x + size_t(p) * W, d);
            }
    }
    if (threadIdx.x == unsigned(at) / W % stride) // the thread that has just written there
        x[at] = E((exp_for<E>(at_label - row.max) / row.sum - 1) * scale);
}

template <class E>
void loss_forward(Gpu gpu, float* loss, int32_t* argmax, const E* logits, const int32_t* label, size_t T, size_t V) {
    REQUIRE(V > 0, "the vocabulary is empty");
    if (T == 0) return;
    auto launch = [&](auto width) {
        constexpr int W = decltype(width)::value;
        const unsigned threads = block_threads(V / W, 4, 512);
        loss_forward_kernel<E, W><<<grid_blocks(T), threads, 0, gpu.stream>>>(loss, argmax, logits, label, V);
    };
    if (packs_fit<E>(V, logits)) launch(std::integral_constant<int, pack_width<E>>());
    else launch(std::integral_constant<int, 1>());
    CUDA_CHECK(cudaGetLastError());
}

template <class E>
void loss_forward_backward(Gpu gpu, float* loss, E* logits, const int32_t* label, double scale, size_t T, size_t V) {
    REQUIRE(V > 0, "the vocabulary is empty");
    if (T == 0) return;
    auto launch = [&](auto width) {
        constexpr int W = decltype(width)::value, P = 8;
        const unsigned threads = block_threads(V / W, P, 1024);
        loss_forward_backward_kernel<E, W, P>
            <<<grid_blocks(T), threads, 0, gpu.stream>>>(loss, logits, label, float(scale), V);
    };
    if (packs_fit<E>(V, logits)) launch(std::integral_constant<int, pack_width<E>>());
    else launch(std::integral_constant<int, 1>());
    CUDA_CHECK(cudaGetLastError());
}
#endif
