// RMSNorm: every token's channels divided by their root mean square, times a weight per channel.
//
//   rstd_t = 1 / sqrt(mean_c in_tc^2 + eps)            n_tc = in_tc rstd_t
//   out_tc = n_tc weight_c
//
// Backward, with g_tc = dout_tc weight_c; rstd depends on every channel of its token, hence the mean:
//   din_tc      = rstd_t (g_tc - n_tc mean_c(g_tc n_tc)) + dresidual_tc
//   dweight_c  += sum_t dout_tc n_tc
//
// in, out, dout, din, dresidual (T, C); weight, dweight (C); rstd (T). Zhang and Sennrich, arXiv 1910.07467.
#pragma once
#include "../core/kernel.h"
#include <algorithm>
#include <cmath>
#include <vector>

template <class E>
void rmsnorm_forward(Cpu, E* out, Acc<E>* rstd, const E* in, const E* weight, size_t T, size_t C, double eps) {
    using A = Acc<E>;
    REQUIRE(C > 0, "RMSNorm needs at least one channel");
#pragma omp parallel for schedule(static)
    for (size_t t = 0; t < T; t++) {
        const E* x = in + t * C;
        E* y = out + t * C;
        A squares = 0;
#pragma omp simd reduction(+ : squares)
        for (size_t c = 0; c < C; c++) squares += A(x[c]) * A(x[c]);
        A r = A(1) / std::sqrt(squares / A(C) + A(eps));
        rstd[t] = r;
#pragma GCC ivdep
        for (size_t c = 0; c < C; c++) y[c] = E(A(x[c]) * r * A(weight[c]));
    }
}

// The tokens are cut into at most this many parts, each with its own sum for dweight; the parts are then added in
// order. Their number does not depend on the threads, so neither do the bits of dweight.
constexpr size_t rmsnorm_parts = 64;

// One part's tokens: writes their din and adds to the part's dweight sum (C). din may alias dresidual.
template <class E> void rmsnorm_backward_part(E* din, Acc<E>* dweight_sum, const E* dout, const E* in, const E* weight,
                                              const Acc<E>* rstd, const E* dresidual, size_t t_begin, size_t t_end,
                                              size_t C) {
    using A = Acc<E>;
    for (size_t t = t_begin; t < t_end; t++) {
        const E *x = in + t * C, *dy = dout + t * C, *residual = dresidual ? dresidual + t * C : nullptr;
        E* dx = din + t * C;
        A r = rstd[t], dot = 0;
#pragma omp simd reduction(+ : dot)
        for (size_t c = 0; c < C; c++) {
            A n = A(x[c]) * r, d = A(dy[c]);
            dot += d * A(weight[c]) * n;
            dweight_sum[c] += d * n;
        }
        A mean = dot / A(C);
#pragma GCC ivdep
        for (size_t c = 0; c < C; c++) {
            A d = r * (A(dy[c]) * A(weight[c]) - A(x[c]) * r * mean);
            dx[c] = E(residual ? d + A(residual[c]) : d);
        }
    }
}

// dresidual: the gradient that reaches `in` past the norm, or null; it may alias din.
template <class E, class G> void rmsnorm_backward(Cpu, E* din, G* dweight, const E* dout, const E* in, const E* weight,
                                                  const Acc<E>* rstd, const E* dresidual, size_t T, size_t C) {
    using A = Acc<E>;
    REQUIRE(C > 0, "RMSNorm needs at least one channel");
    size_t parts = std::min(T, rmsnorm_parts);
    std::vector<A> sums(parts * C);
#pragma omp parallel for schedule(static)
    for (size_t p = 0; p < parts; p++)
        rmsnorm_backward_part(din, sums.data() + p * C, dout, in, weight, rstd, dresidual, T * p / parts,
                              T * (p + 1) / parts, C);
#pragma omp parallel for schedule(static)
    for (size_t c = 0; c < C; c++) {
        A sum = A(dweight[c]);
        for (size_t p = 0; p < parts; p++) sum += sums[p * C + c];
        dweight[c] = G(sum);
    }
}

#ifdef __CUDACC__
// A block per token. The row waits in registers, P packs a thread, between the sum of squares and the output; of a
// longer row, a chunk of this size after the other, the first chunk is read last and waits, and the others are read
// again. The weights, which every block reads, come from L1 and L2. Bound by memory: 92% of a copy's bandwidth on H200.
template <class E, int W, int P> __global__ void __launch_bounds__(1024)
    rmsnorm_forward_kernel(E* out, float* rstd, const E* in, const E* weight, size_t C, float eps) {
    __shared__ float slot[32];
    const unsigned packs = unsigned(C / W), stride = blockDim.x, chunk = P * stride;
    const E* x = in + blockIdx.x * C;
    E* y = out + blockIdx.x * C;
    auto load = [&](Pack<E, W>(&to)[P], const E* from, unsigned begin) {
#pragma unroll
        for (int k = 0; k < P; k++)
            if (const unsigned p = begin + threadIdx.x + k * stride; p < packs)
                to[k] = pack_load<W>(from + size_t(p) * W);
    };
    Pack<E, W> kept[P], scale[P];
    float squares = 0;
    for (unsigned begin = (packs - 1) / chunk * chunk;; begin -= chunk) {
        load(kept, x, begin);
        if (begin == 0) load(scale, weight, 0);
#pragma unroll
        for (int k = 0; k < P; k++)
            if (begin + threadIdx.x + k * stride < packs)
#pragma unroll
                for (int j = 0; j < W; j++) squares += kept[k][j] * kept[k][j];
        if (begin == 0) break;
    }
    const float r = 1 / sqrtf(block_sum(squares, slot) / float(C) + eps);
    if (threadIdx.x == 0) rstd[blockIdx.x] = r;
    for (unsigned begin = 0; begin < packs; begin += chunk) {
        if (begin > 0) load(kept, x, begin), load(scale, weight, begin);
#pragma unroll
        for (int k = 0; k < P; k++)
            if (const unsigned p = begin + threadIdx.x + k * stride; p < packs) {
                float normed[W];
#pragma unroll
                for (int j = 0; j < W; j++) normed[j] = kept[k][j] * r * scale[k][j];
                pack_store(y + size_t(p) * W, normed);
            }
    }
}

template <class E>
void rmsnorm_forward(Gpu gpu, E* out, float* rstd, const E* in, const E* weight, size_t T, size_t C, double eps) {
    REQUIRE(C > 0, "RMSNorm needs at least one channel");
    if (T == 0) return;
    auto launch = [&](auto width) {
        constexpr int W = decltype(width)::value, P = 4;
        const unsigned threads = block_threads(C / W, P, 1024);
        rmsnorm_forward_kernel<E, W, P>
            <<<grid_blocks(T), threads, 0, gpu.stream>>>(out, rstd, in, weight, C, float(eps));
    };
    if (packs_fit<E>(C, out, in, weight)) launch(std::integral_constant<int, pack_width<E>>());
    else launch(std::integral_constant<int, 1>());
    CUDA_CHECK(cudaGetLastError());
}

template <bool with_residual> constexpr int rmsnorm_backward_tensors = with_residual ? 3 : 2;
// Packs a thread. With fewer, twice as many warps share the registers and a row: without the residual so little is read
// a row that waiting for the row's sum shows.
template <bool with_residual> constexpr int rmsnorm_backward_packs = with_residual ? 4 : 2;

// What of a token the channels' gradients have in common: rstd and mean_c(g_tc n_tc).
struct RmsnormRow {
    float rstd, mean;
};

// din of W neighbours, and their share of dweight.
template <class E, int W> __device__ void rmsnorm_backward_pack(E* din, float (&dweight)[W], const Pack<E, W>& dy,
                                                                const Pack<E, W>& x, const Pack<E, W>& weight,
                                                                const Pack<E, W>* residual, RmsnormRow row) {
    float dx[W];
#pragma unroll
    for (int j = 0; j < W; j++) {
        const float normed = x[j] * row.rstd;
        dweight[j] += dy[j] * normed;
        dx[j] = row.rstd * (dy[j] * weight[j] - normed * row.mean);
        if (residual) dx[j] += (*residual)[j];
    }
    pack_store(din, dx);
}

// The blocks that fit on the GPU at once share the tokens, block b taking b, b + blocks and so on. While one token is
// computed the next is on its way to shared memory (2 tokens; dout, in and dresidual; P packs a thread, who copies and
// reads its own). The sums of dweight stay in registers over all tokens and become the block's row of `partial`
// (blocks, C) at the end. Channels beyond P packs a thread are read twice and summed in that row. Bound by memory: 89%
// of a copy's bandwidth on H200 (86% without a residual), with the adding of the partial rows.
template <class E, int W, int P, bool with_residual> __global__ void __launch_bounds__(2048 / P)
    rmsnorm_backward_kernel(E* din, float* partial, const E* dout, const E* in, const E* weight, const float* rstd,
                            const E* dresidual, size_t T, size_t C) {
    constexpr int tensors = rmsnorm_backward_tensors<with_residual>;
    extern __shared__ uint4 rmsnorm_rows[];
    __shared__ float slot[2][32];
    const unsigned packs = unsigned(C / W), stride = blockDim.x, first = threadIdx.x;
    float* sums = partial + blockIdx.x * C;
    auto mine = [&](int stage, int tensor, int k) -> Pack<E, W>& {
        return ((Pack<E, W>*)rmsnorm_rows)[((stage * tensors + tensor) * P + k) * stride + first];
    };
    auto fetch = [&](unsigned t, int stage) {
#pragma unroll
        for (int k = 0; k < P; k++)
            if (t < T && first + k * stride < packs) {
                const size_t i = t * C + size_t(first + k * stride) * W;
                pack_copy_async(&mine(stage, 0, k), dout + i), pack_copy_async(&mine(stage, 1, k), in + i);
                if constexpr (with_residual) pack_copy_async(&mine(stage, 2, k), dresidual + i);
            }
        copies_commit();
    };
    fetch(blockIdx.x, 0);
    float dweight[P][W] = {};
    Pack<E, W> scale[P];
#pragma unroll
    for (int k = 0; k < P; k++)
        if (first + k * stride < packs) scale[k] = pack_load<W>(weight + size_t(first + k * stride) * W);
    for (unsigned p = first + P * stride; p < packs; p += stride)
        pack_store(sums + size_t(p) * W, dweight[0]); // still 0

    int stage = 0;
    float r_next = rstd[blockIdx.x];
    for (unsigned t = blockIdx.x; t < T; t += gridDim.x, stage ^= 1) {
        const size_t row = t * C;
        const float r = r_next;
        fetch(t + gridDim.x, stage ^ 1);
        if (t + gridDim.x < T) r_next = rstd[t + gridDim.x];
        copies_wait<1>();
        float dot = 0;
        auto add = [&](const Pack<E, W>& dy, const Pack<E, W>& x, const Pack<E, W>& weight) {
            float part = 0;
#pragma unroll
            for (int j = 0; j < W; j++) part += dy[j] * weight[j] * (x[j] * r);
            dot += part;
        };
#pragma unroll
        for (int k = 0; k < P; k++)
            if (first + k * stride < packs) add(mine(stage, 0, k), mine(stage, 1, k), scale[k]);
        for (unsigned p = first + P * stride; p < packs; p += stride) {
            const size_t i = size_t(p) * W;
            add(pack_load<W>(dout + row + i), pack_load<W>(in + row + i), pack_load<W>(weight + i));
        }
        const RmsnormRow common = {r, block_sum(dot, slot[stage]) / float(C)};
#pragma unroll
        for (int k = 0; k < P; k++)
            if (first + k * stride < packs)
                rmsnorm_backward_pack(din + row + size_t(first + k * stride) * W, dweight[k], mine(stage, 0, k),
                                      mine(stage, 1, k), scale[k],
                                      with_residual ? &mine(stage, tensors - 1, k) : nullptr, common);
        for (unsigned p = first + P * stride; p < packs; p += stride) {
            const size_t i = size_t(p) * W;
            Pack<E, W> beyond;
            if (with_residual) beyond = pack_load<W>(dresidual + row + i);
            float sum[W];
#pragma unroll
            for (int j = 0; j < W; j++) sum[j] = sums[i + j];
            rmsnorm_backward_pack(din + row + i, sum, pack_load<W>(dout + row + i), pack_load<W>(in + row + i),
                                  pack_load<W>(weight + i), with_residual ? &beyond : nullptr, common);
            pack_store(sums + i, sum);
        }
    }
#pragma unroll
    for (int k = 0; k < P; k++)
        if (first + k * stride < packs) pack_store(sums + size_t(first + k * stride) * W, dweight[k]);
}

// Adds the blocks' rows: 32 channels a block, 32 threads a channel with every 32nd row each, two rounds of loads for
// the 528 blocks of an H200. The rows were just written and mostly come from L2.
template <class G> __global__ void __launch_bounds__(1024)
    rmsnorm_dweight_kernel(G* dweight, const float* partial, unsigned rows, size_t C) {
    constexpr unsigned parts = 32, batch = 9;
    __shared__ float slot[parts][32];
    const unsigned lane = threadIdx.x % 32, part = threadIdx.x / 32;
    const size_t c = size_t(blockIdx.x) * 32 + lane;
    float sum = 0;
    for (unsigned row = part; row < rows && c < C; row += batch * parts) {
        float x[batch]; // in flight together
#pragma unroll
        for (unsigned k = 0; k < batch; k++) x[k] = row + k * parts < rows ? partial[(row + k * parts) * C + c] : 0;
#pragma unroll
        for (unsigned k = 0; k < batch; k++) sum += x[k];
    }
    slot[part][lane] = sum;
    __syncthreads();
    if (part > 0 || c >= C) return;
    float total = float(dweight[c]);
#pragma unroll
    for (unsigned i = 0; i < parts; i++) total += slot[i][lane];
    dweight[c] = G(total);
}

template <class E, class G> void rmsnorm_backward(Gpu gpu, E* din, G* dweight, const E* dout, const E* in,
                                                  const E* weight, const float* rstd, const E* dresidual, size_t T,
                                                  size_t C) {
    REQUIRE(C > 0, "RMSNorm needs at least one channel");
    REQUIRE(C * sizeof(float) <= GpuContext::scratch_bytes, "a row of dweight must fit into the scratch memory");
    REQUIRE(T < size_t(1) << 31, "take fewer tokens at once");
    if (T == 0) return;
    float* partial = (float*)gpu.context->scratch;
    const size_t rows_that_fit = GpuContext::scratch_bytes / (C * sizeof(float));
    unsigned blocks = 0;
    int shared = 0; // bytes that a block may have
    CUDA_CHECK(cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, gpu.context->device));
    auto launch = [&](auto width, auto residual) {
        constexpr bool with_residual = decltype(residual)::value;
        constexpr int W = decltype(width)::value, P = rmsnorm_backward_packs<with_residual>;
        constexpr size_t thread_bytes = 2 * rmsnorm_backward_tensors<with_residual> * P * sizeof(Pack<E, W>);
        auto kernel = rmsnorm_backward_kernel<E, W, P, with_residual>;
        const size_t threads_that_fit = (size_t(shared) - 1024) / thread_bytes / 32 * 32;
        const unsigned threads = block_threads(C / W, P, unsigned(std::min<size_t>(2048 / P, threads_that_fit)));
        const size_t bytes = threads * thread_bytes;
        CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(bytes)));
        blocks = unsigned(std::min({size_t(resident_blocks(gpu, kernel, threads, bytes)), rows_that_fit, T}));
        kernel<<<blocks, threads, bytes, gpu.stream>>>(din, partial, dout, in, weight, rstd, dresidual, T, C);
    };
    auto launch_for = [&](auto width) {
        if (dresidual) launch(width, std::true_type());
        else launch(width, std::false_type());
    };
    if (packs_fit<E>(C, din, dout, in, weight, dresidual)) launch_for(std::integral_constant<int, pack_width<E>>());
    else launch_for(std::integral_constant<int, 1>());
    CUDA_CHECK(cudaGetLastError());
    rmsnorm_dweight_kernel<<<grid_blocks((C + 31) / 32), 1024, 0, gpu.stream>>>(dweight, partial, blocks, C);
    CUDA_CHECK(cudaGetLastError());
}
#endif
