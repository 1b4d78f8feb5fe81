// Token embedding: a row of the weight per token.
//
//   out_t = weight_{token_t}                           dweight_v += sum over t with token_t = v of dout_t
//
// out, dout (T, C); token (T), every id in [0, V) (the loader has checked them); weight, dweight (V, C).
#pragma once
#include "../core/kernel.h"
#include <algorithm>
#include <vector>

template <class E> void embedding_forward(Cpu, E* out, const int32_t* token, const E* weight, size_t T, size_t C) {
#pragma omp parallel for schedule(static)
    for (size_t t = 0; t < T; t++) memcpy((void*)(out + t * C), weight + size_t(token[t]) * C, C * sizeof(E));
}

// A token that comes often is summed in Acc first and added once: a bf16 sum would stop growing after 256 equal
// terms. The positions of one id stand together after sorting (id, position), in the order of the tokens; each
// (id, block of channels) is one thread's work, so there are no atomics and the bits do not depend on the threads.
template <class E, class G>
void embedding_backward(Cpu, G* dweight, const E* dout, const int32_t* token, size_t T, size_t C) {
    using A = Acc<E>;
    constexpr size_t block = 256;
    std::vector<uint64_t> order(T);
    for (size_t t = 0; t < T; t++) order[t] = uint64_t(token[t]) << 32 | t;
    std::sort(order.begin(), order.end());
    std::vector<size_t> first; // where each id begins in `order`, then T
    for (size_t i = 0; i < T; i++)
        if (i == 0 || order[i] >> 32 != order[i - 1] >> 32) first.push_back(i);
    first.push_back(T);

    size_t ids = first.size() - 1, blocks = (C + block - 1) / block;
#pragma omp parallel for schedule(dynamic, 16)
    for (size_t work = 0; work < ids * blocks; work++) {
        size_t id = work / blocks, c0 = work % blocks * block, width = std::min(block, C - c0);
        A sum[block] = {};
        for (size_t i = first[id]; i < first[id + 1]; i++) {
            const E* d = dout + (order[i] & 0xffffffffu) * C + c0;
            for (size_t c = 0; c < width; c++) sum[c] += A(d[c]);
        }
        G* row = dweight + (order[first[id]] >> 32) * C + c0;
        for (size_t c = 0; c < width; c++) row[c] = G(A(row[c]) + sum[c]);
    }
}

#ifdef __CUDACC__
#include <cub/device/device_radix_sort.cuh>

// blockDim (x, y): y tokens a block, x threads a token, 4 packs in flight each. Bound by memory and L2: with
// tokens as in text (16384, a third of them different) 78% of a copy's bandwidth on H200, counting every row of the
// weight once, 117% counting a row a token.
template <class E, int W> __global__ void __launch_bounds__(128)
    embedding_forward_kernel(E* out, const int32_t* token, const E* weight, size_t T, size_t C) {
    const size_t t = size_t(blockIdx.x) * blockDim.y + threadIdx.y, stride = size_t(blockDim.x) * W;
    if (t >= T) return;
    const E* from = weight + size_t(token[t]) * C;
    E* to = out + t * C;
    for (size_t c = threadIdx.x * W; c < C; c += 4 * stride) {
        Pack<E, W> x[4];
#pragma unroll
        for (int k = 0; k < 4; k++)
            if (c + k * stride < C) x[k] = pack_load<W>(from + c + k * stride);
#pragma unroll
        for (int k = 0; k < 4; k++)
            if (c + k * stride < C) pack_store(to + c + k * stride, x[k]);
    }
}

template <class E> void embedding_forward(Gpu gpu, E* out, const int32_t* token, const E* weight, size_t T, size_t C) {
    if (T == 0 || C == 0) return;
    auto launch = [&](auto width) {
        constexpr int W = decltype(width)::value;
        unsigned x = 128; // a power of two, as many as the row has packs
        while (x / 2 >= C / W && x > 1) x /= 2;
        const dim3 threads(x, 128 / x);
        const unsigned blocks = grid_blocks((T + threads.y - 1) / threads.y);
        embedding_forward_kernel<E, W><<<blocks, threads, 0, gpu.stream>>>(out, token, weight, T, C);
    };
    if (packs_fit<E>(C, out, weight)) launch(std::integral_constant<int, pack_width<E>>());
    else launch(std::integral_constant<int, 1>());
    CUDA_CHECK(cudaGetLastError());
}

static __global__ void embedding_positions_kernel(int32_t* position, unsigned T) {
    const unsigned t = blockIdx.x * blockDim.x + threadIdx.x;
    if (t < T) position[t] = int32_t(t);
}

// Sorting (id, position) brings the positions of one id together: its run. The order is cut into pieces of equal
// length, whatever the runs, so that an id that stands everywhere is no more work than another. A piece's sum of a run
// goes to dweight if the whole run lies in the piece; a run that continues in the next pieces leaves partial sums, one
// a piece.
struct EmbeddingRuns {
    const int32_t *id, *position; // (T), sorted
    float* partial; // (pieces, 2, C): of the run that began before the piece; of the run that goes on after
    size_t T, C, piece;
    unsigned strips; // blocks of a piece, each with a strip of the channels
};

// A block sums a strip of a piece, W channels a thread, the rows of 4 or 8 positions and what their runs are added to
// in flight. Bound by memory: with 16384 tokens as in text 81% of a copy's bandwidth on H200, 73% with a float dweight.
// The whole backward comes to 40%, as the sort takes 54 of 130 us, whatever C.
template <class E, class G, int W> __global__ void __launch_bounds__(128)
    embedding_backward_kernel(G* dweight, const E* dout, EmbeddingRuns runs) {
    const size_t k = blockIdx.x / runs.strips, C = runs.C;
    const size_t c = (size_t(blockIdx.x % runs.strips) * blockDim.x + threadIdx.x) * W;
    if (c >= C) return;
    constexpr int batch = W == 1 ? 8 : 128 / (W * int(sizeof(G)));
    const size_t begin = k * runs.piece, end = min(begin + runs.piece, runs.T);
    float* partial = runs.partial + 2 * k * C + c;
    const int32_t before = begin > 0 ? runs.id[begin - 1] : -1; // the id of a run that began before, if it goes on
    float sum[W] = {};
    for (size_t i = begin; i < end; i += batch) {
        Pack<E, W> d[batch];
        Pack<G, W> old[batch];
        int32_t id[batch + 1];
#pragma unroll
        for (int j = 0; j <= batch; j++) id[j] = i + j < runs.T ? runs.id[i + j] : -1;
#pragma unroll
        for (int j = 0; j < batch; j++)
            if (i + j < end) {
                d[j] = pack_load<W>(dout + size_t(runs.position[i + j]) * C + c);
                if (id[j + 1] != id[j] && id[j] != before) old[j] = pack_load<W>(dweight + size_t(id[j]) * C + c);
            }
#pragma unroll
        for (int j = 0; j < batch; j++)
            if (i + j < end) {
                const bool last = id[j + 1] != id[j];
#pragma unroll
                for (int w = 0; w < W; w++) sum[w] += d[j][w];
                if (id[j] == before && (last || i + j + 1 == end)) pack_store(partial, sum);
                else if (last) {
#pragma unroll
                    for (int w = 0; w < W; w++) sum[w] += old[j][w];
                    pack_store(dweight + size_t(id[j]) * C + c, sum);
                } else if (i + j + 1 == end) pack_store(partial + C, sum);
                if (last)
#pragma unroll
                    for (int w = 0; w < W; w++) sum[w] = 0;
            }
    }
}

// The block of the piece in which a run begins that goes on adds the partial sums, in the order of the pieces:
// some 6 us, the longest chain of reads from L2.
template <class G, int W> __global__ void __launch_bounds__(128)
    embedding_join_kernel(G* dweight, EmbeddingRuns runs, size_t pieces) {
    const size_t k = blockIdx.x / runs.strips, C = runs.C;
    const size_t c = (size_t(blockIdx.x % runs.strips) * blockDim.x + threadIdx.x) * W;
    const size_t begin = k * runs.piece, end = begin + runs.piece;
    if (end >= runs.T) return;
    const int32_t id = runs.id[end - 1];
    if (runs.id[end] != id || (begin > 0 && runs.id[begin - 1] == id)) return;
    size_t last = k; // the run's last piece
    for (unsigned found = blockDim.x; found == blockDim.x; last += found) {
        const size_t j = last + 1 + threadIdx.x;
        found = __syncthreads_count(j < pieces && runs.id[j * runs.piece] == id);
    }
    if (c >= C) return;
    float sum[W];
    const Pack<float, W> own = pack_load<W>(runs.partial + (2 * k + 1) * C + c);
#pragma unroll
    for (int w = 0; w < W; w++) sum[w] = own[w];
    for (size_t j = k + 1; j <= last; j += 8) {
        Pack<float, W> share[8];
#pragma unroll
        for (int n = 0; n < 8; n++)
            if (j + n <= last) share[n] = pack_load<W>(runs.partial + 2 * (j + n) * C + c);
#pragma unroll
        for (int n = 0; n < 8; n++)
            if (j + n <= last)
#pragma unroll
                for (int w = 0; w < W; w++) sum[w] += share[n][w];
    }
    const Pack<G, W> old = pack_load<W>(dweight + size_t(id) * C + c);
#pragma unroll
    for (int w = 0; w < W; w++) sum[w] += old[w];
    pack_store(dweight + size_t(id) * C + c, sum);
}

// Sorts into the scratch memory; returns the runs without their pieces, and the bytes taken.
inline EmbeddingRuns embedding_sort(Gpu gpu, size_t* used, const int32_t* token, size_t T, size_t C) {
    const size_t array = (T * sizeof(int32_t) + 255) / 256 * 256;
    uint8_t* scratch = gpu.context->scratch;
    int32_t *id = (int32_t*)scratch, *position = (int32_t*)(scratch + array),
            *unsorted = (int32_t*)(scratch + 2 * array);
    size_t bytes = 0;
    auto sort = [&](void* work) {
        CUDA_CHECK(
            cub::DeviceRadixSort::SortPairs(work, bytes, token, id, unsorted, position, int(T), 0, 31, gpu.stream));
    };
    sort(nullptr); // asks for `bytes`
    *used = (3 * array + bytes + 255) / 256 * 256;
    REQUIRE(*used + 2 * C * sizeof(float) <= GpuContext::scratch_bytes, "take fewer tokens at once");
    embedding_positions_kernel<<<unsigned((T + 255) / 256), 256, 0, gpu.stream>>>(unsorted, unsigned(T));
    CUDA_CHECK(cudaGetLastError());
    sort(scratch + 3 * array);
    return {id, position, nullptr, T, C, 0, 0};
}

template <class E, class G>
void embedding_backward(Gpu gpu, G* dweight, const E* dout, const int32_t* token, size_t T, size_t C) {
    if (T == 0 || C == 0) return;
    REQUIRE(T < size_t(1) << 30, "take fewer tokens at once");
    size_t used = 0;
    EmbeddingRuns runs = embedding_sort(gpu, &used, token, T, C);
    runs.partial = (float*)(gpu.context->scratch + used);
    const size_t pieces_that_fit = (GpuContext::scratch_bytes - used) / (2 * C * sizeof(float));
    runs.piece = std::max(size_t(32), (T + pieces_that_fit - 1) / pieces_that_fit);
    const size_t pieces = (T + runs.piece - 1) / runs.piece;
    auto launch = [&](auto width) {
        constexpr int W = decltype(width)::value;
        const unsigned threads = block_threads(C / W, 1, 128);
        runs.strips = unsigned((C / W + threads - 1) / threads);
        const unsigned blocks = grid_blocks(pieces * runs.strips);
        embedding_backward_kernel<E, G, W><<<blocks, threads, 0, gpu.stream>>>(dweight, dout, runs);
        CUDA_CHECK(cudaGetLastError());
        embedding_join_kernel<G, W><<<blocks, threads, 0, gpu.stream>>>(dweight, runs, pieces);
        CUDA_CHECK(cudaGetLastError());
    };
    if (packs_fit<E>(C, dweight, dout)) launch(std::integral_constant<int, pack_width<E>>());
    else launch(std::integral_constant<int, 1>());
}
#endif
