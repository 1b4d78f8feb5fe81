// Token embedding: a row of the weight per token.
//
//   out_t = weight_{token_t}                           dweight_v += sum over t with token_t = v of dout_t
//
// out, dout (T, C); weight, dweight (V, C). The T tokens come sorted, as token_order leaves them, every id in [0, V)
// (the loader has checked them).
#pragma once
#include "../core/kernel.h"
#include <algorithm>
#include <numeric>
#include <vector>

struct alignas(8) TokenAt {
    int32_t id, position;
};

// A batch's tokens, the positions of one id together: its run. Long runs come first, of equal ones the lower id, and
// positions rise. So a row of the weight is read once in a few tokens, and of its gradient read and written once. The
// order is cut into pieces of even work, each a run or several short ones; but of a run of more than an eighth of all
// tokens and of 1024, which would take longer than all the rest, a piece is a part.
struct TokenOrder {
    static constexpr int32_t together = 8;   // short runs make a piece up to this length,
    static constexpr int32_t alone = 32;     // and up to this length one warp does it; longer ones take a block
    static constexpr size_t parts_most = 16; // of all the runs that are cut
    static constexpr int forward_batch = 6;  // tokens that a thread of the forward writes

    std::vector<TokenAt> token;    // (T)
    std::vector<int32_t> piece;    // where each begins, then T
    unsigned parts = 0, longs = 0; // pieces [0, parts) are parts of runs, [0, longs) longer than `alone`
    const TokenAt* device_token = nullptr;
    const int32_t* device_piece = nullptr;
};

// Sorts by counting, in time O(T + the largest id).
inline TokenOrder token_order(const std::vector<int32_t>& token) {
    const size_t T = token.size();
    REQUIRE(T < size_t(1) << 30, "take fewer tokens at once");
    TokenOrder o;
    std::vector<int32_t> count(T ? size_t(*std::max_element(token.begin(), token.end())) + 1 : 0), place(T + 1);
    for (int32_t id : token) count[id]++;
    for (int32_t n : count) place[T - n] += n; // tokens whose run is as long as n
    std::exclusive_scan(place.begin(), place.end(), place.begin(), 0);
    std::vector<int32_t> next(count.size());
    for (size_t id = 0; id < count.size(); id++) next[id] = place[T - count[id]], place[T - count[id]] += count[id];
    o.token.resize(T);
    for (size_t t = 0; t < T; t++) o.token[next[token[t]]++] = {token[t], int32_t(t)};

    const int32_t most = std::max(int32_t(T / (TokenOrder::parts_most / 2)), 32 * TokenOrder::alone);
    for (int32_t i = 0, n; i < int32_t(T); i += n) {
        n = count[o.token[i].id];
        const int32_t cuts = (n + most - 1) / most;
        if (n > TokenOrder::alone) o.longs += cuts;
        if (cuts > 1) o.parts += cuts;
        if (o.piece.empty() || i + n - o.piece.back() > TokenOrder::together)
            for (int32_t k = 0; k < cuts; k++) o.piece.push_back(i + int32_t(int64_t(n) * k / cuts));
    }
    o.piece.push_back(int32_t(T));
    return o;
}

// Device memory for the order of T tokens. Two neighbouring pieces hold more than `together` tokens, unless one is the
// last, or a part of a run.
template <class Dev> size_t token_order_bytes(Dev, size_t T) {
    const size_t pieces = 2 * T / (TokenOrder::together + 1) + TokenOrder::parts_most + 2;
    return std::is_same_v<Dev, Gpu> ? T * sizeof(TokenAt) + pieces * sizeof(int32_t) : 0;
}
inline void token_order_upload(Cpu, TokenOrder&, void*) {}

template <class E> void embedding_forward(Cpu, E* out, const TokenOrder& order, const E* weight, size_t C) {
#pragma omp parallel for schedule(static)
    for (size_t i = 0; i < order.token.size(); i++) {
        const auto [id, t] = order.token[i];
        memcpy((void*)(out + size_t(t) * C), weight + size_t(id) * C, C * sizeof(E));
    }
}

// A token that comes often is summed in Acc first and added once: a bf16 sum would stop growing after 256 equal
// terms. Each (id, block of channels) is one thread's work, in the order of the positions, so there are no atomics and
// the bits do not depend on the threads.
template <class E, class G> void embedding_backward(Cpu, G* dweight, const E* dout, const TokenOrder& order, size_t C) {
    using A = Acc<E>;
    constexpr size_t block = 256;
    const std::vector<TokenAt>& token = order.token;
    std::vector<size_t> first; // where each id begins, then T
    for (size_t i = 0; i < token.size(); i++)
        if (i == 0 || token[i].id != token[i - 1].id) first.push_back(i);
    first.push_back(token.size());

    size_t ids = first.size() - 1, blocks = (C + block - 1) / block;
#pragma omp parallel for schedule(dynamic, 16)
    for (size_t work = 0; work < ids * blocks; work++) {
        size_t id = work / blocks, c0 = work % blocks * block, width = std::min(block, C - c0);
        A sum[block] = {};
        for (size_t i = first[id]; i < first[id + 1]; i++) {
            const E* d = dout + size_t(token[i].position) * C + c0;
            for (size_t c = 0; c < width; c++) sum[c] += A(d[c]);
        }
        G* row = dweight + size_t(token[first[id]].id) * C + c0;
        for (size_t c = 0; c < width; c++) row[c] = G(A(row[c]) + sum[c]);
    }
}

#ifdef __CUDACC__
// Brings the order into `memory`, of token_order_bytes.
inline void token_order_upload(Gpu gpu, TokenOrder& order, void* memory) {
    const size_t T = order.token.size(), bytes = T * sizeof(TokenAt);
    order.device_token = (const TokenAt*)memory;
    order.device_piece = (const int32_t*)(order.device_token + T);
    copy_to_device(gpu, memory, order.token.data(), bytes);
    copy_to_device(gpu, (uint8_t*)memory + bytes, order.piece.data(), order.piece.size() * sizeof(int32_t));
}

// A thread takes a few tokens of the order: it reads each row that differs from the one before, all in flight, and
// writes them all; for that many registers the launch bounds ask for one block. From Hopper on it is launched early
// (programmatic dependent launch): its blocks may start as the kernel before it ends, whose writes they see only after
// the wait. Until then they read the order alone: only copies write that, and no kernel starts before the copies ahead
// of it in the stream have ended. Bound by memory, mostly by the writes: with tokens as in text (16384, a third of them
// different) 84% of a copy's bandwidth on H200, and 87% behind a kernel that lets it begin early, as this one does.
template <class E, int W> __global__ void __launch_bounds__(256, 1)
    embedding_forward_kernel(E* out, const TokenAt* token, const E* weight, size_t T, size_t C, unsigned strips) {
    constexpr int batch = TokenOrder::forward_batch;
    const size_t begin = size_t(blockIdx.x / strips) * batch;
    const size_t c = (size_t(blockIdx.x % strips) * blockDim.x + threadIdx.x) * W;
    if (c >= C) return;
    TokenAt at[batch];
    Pack<E, W> x[batch];
#pragma unroll
    for (int j = 0; j < batch; j++) at[j] = begin + j < T ? token[begin + j] : TokenAt{-1, -1};
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;\ngriddepcontrol.wait;" ::: "memory");
#endif
#pragma unroll
    for (int j = 0; j < batch; j++)
        if (at[j].id >= 0 && (j == 0 || at[j].id != at[j - 1].id))
            x[j] = pack_load<W, Access::once>(weight + size_t(at[j].id) * C + c);
#pragma unroll
    for (int j = 0; j < batch; j++) {
        if (j > 0 && at[j].id == at[j - 1].id) x[j] = x[j - 1];
        if (at[j].id >= 0) pack_store<E, W, Access::once>(out + size_t(at[j].position) * C + c, x[j]);
    }
}

template <class E> void embedding_forward(Gpu gpu, E* out, const TokenOrder& order, const E* weight, size_t C) {
    const size_t T = order.token.size();
    if (T == 0 || C == 0) return;
    auto launch = [&](auto width) {
        constexpr int W = decltype(width)::value;
        const unsigned threads = block_threads(C / W, 1, 256);
        const size_t strips = (C / W + threads - 1) / threads, batch = TokenOrder::forward_batch;
        cudaLaunchAttribute early;
        early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
        early.val.programmaticStreamSerializationAllowed = 1;
        cudaLaunchConfig_t config{};
        config.gridDim = grid_blocks((T + batch - 1) / batch * strips), config.blockDim = threads;
        config.stream = gpu.stream, config.attrs = &early, config.numAttrs = gpu.context->compute >= 90 ? 1 : 0;
        CUDA_CHECK(cudaLaunchKernelEx(&config, embedding_forward_kernel<E, W>, out, order.device_token, weight, T, C,
                                      unsigned(strips)));
    };
    if (packs_fit<E>(C, out, weight)) launch(std::integral_constant<int, pack_width<E>>());
    else launch(std::integral_constant<int, 1>());
}

// What the kernels know of an order; a strip is 32 packs of the channels, one a lane.
struct EmbeddingPieces {
    const TokenAt* token;
    const int32_t* piece;
    unsigned pieces, parts, longs, strips;
    size_t C;
};

// A strip of a long run: every warp of the block sums the rows of every 8th token, 8 of them in flight, and meanwhile
// reads where the next 8 are. The sums meet in shared memory and are added in the warps' order, to dweight; of a part
// of a run they wait for the join.
template <class E, class G, int W> __device__ void
embedding_backward_run(G* dweight, float* partial, const E* dout, const EmbeddingPieces& p, size_t k, size_t c) {
    __shared__ float sums[8][W][32];
    const int warp = int(threadIdx.x / 32), lane = int(threadIdx.x % 32);
    const TokenAt* end = p.token + p.piece[k + 1];
    G* row = dweight + size_t(p.token[p.piece[k]].id) * p.C + c;
    const bool mine = c < p.C, whole = k >= p.parts;
    float sum[W] = {};
    dout += c;
    int32_t t[8];
    auto positions = [&](const TokenAt* token) {
#pragma unroll
        for (int j = 0; j < 8; j++) t[j] = token + 8 * j < end ? token[8 * j].position : -1;
    };
    const TokenAt* token = p.token + p.piece[k] + warp;
    positions(token);
    for (; token < end && mine; token += 64) {
        Pack<E, W> d[8];
#pragma unroll
        for (int j = 0; j < 8; j++)
            if (t[j] >= 0) d[j] = pack_load<W, Access::once>(dout + size_t(t[j]) * p.C);
        positions(token + 64);
#pragma unroll
        for (int j = 0; j < 8; j++)
            if (token + 8 * j < end)
#pragma unroll
                for (int w = 0; w < W; w++) sum[w] += d[j][w];
    }
    Pack<G, W> old;
    if (mine && warp == 0 && whole) old = pack_load<W, Access::once>(row);
#pragma unroll
    for (int w = 0; w < W; w++) sums[warp][w][lane] = sum[w];
    __syncthreads();
    if (warp > 0 || !mine) return;
#pragma unroll
    for (int w = 0; w < W; w++) {
        for (int other = 1; other < 8; other++) sum[w] += sums[other][w][lane];
        if (whole) sum[w] += old[w];
    }
    if (whole) pack_store<G, W, Access::once>(row, sum);
    else pack_store(partial + k * p.C + c, sum);
}

// The first blocks take a strip of a long run each. In the others every warp takes a strip of a piece of short runs,
// the rows of 4 tokens and what their runs are added to in flight; of 3 where dweight is wider than dout, so that more
// warps fit. Bound by memory: 87% of a copy's bandwidth on H200, also with a float dweight.
template <class E, class G, int W> __global__ void __launch_bounds__(256, W == pack_width<E> ? 3 : 5)
    embedding_backward_kernel(G* dweight, float* partial, const E* dout, EmbeddingPieces p) {
    constexpr int batch = W == pack_width<E> ? 4 : 3;
    const unsigned lane = threadIdx.x % 32, of_runs = p.longs * p.strips;
    if (blockIdx.x < of_runs) {
        const size_t k = blockIdx.x / p.strips, c = size_t(blockIdx.x % p.strips * 32 + lane) * W;
        return embedding_backward_run<E, G, W>(dweight, partial, dout, p, k, c);
    }
    const size_t work = size_t(blockIdx.x - of_runs) * 8 + threadIdx.x / 32, C = p.C;
    const size_t k = p.longs + work / p.strips, c = (work % p.strips * 32 + lane) * W;
    if (k >= p.pieces || c >= C) return;
    dweight += c, dout += c;
    float sum[W] = {};
    for (int i = p.piece[k], end = p.piece[k + 1]; i < end; i += batch) {
        Pack<E, W> d[batch];
        Pack<G, W> old[batch];
        TokenAt at[batch + 1];
#pragma unroll
        for (int j = 0; j <= batch; j++) at[j] = i + j < end ? p.token[i + j] : TokenAt{-1, -1};
#pragma unroll
        for (int j = 0; j < batch; j++) {
            if (at[j].id >= 0) d[j] = pack_load<W, Access::once>(dout + size_t(at[j].position) * C);
            if (at[j].id != at[j + 1].id) old[j] = pack_load<W, Access::once>(dweight + size_t(at[j].id) * C);
        }
#pragma unroll
        for (int j = 0; j < batch; j++) {
            if (at[j].id < 0) break;
#pragma unroll
            for (int w = 0; w < W; w++) sum[w] += d[j][w];
            if (at[j].id == at[j + 1].id) continue;
#pragma unroll
            for (int w = 0; w < W; w++) sum[w] += old[j][w];
            pack_store<G, W, Access::once>(dweight + size_t(at[j].id) * C, sum);
#pragma unroll
            for (int w = 0; w < W; w++) sum[w] = 0;
        }
    }
}

// Adds the sums of a run's parts, in their order: a thread per channel, and the block of a run's first part.
template <class G> __global__ void __launch_bounds__(256)
    embedding_join_kernel(G* dweight, const float* partial, EmbeddingPieces p) {
    const size_t c = size_t(blockIdx.x) * blockDim.x + threadIdx.x;
    auto id = [&](unsigned k) { return k < p.parts ? p.token[p.piece[k]].id : -1; };
    unsigned k = blockIdx.y;
    if (c >= p.C || (k > 0 && id(k - 1) == id(k))) return;
    G& to = dweight[size_t(id(k)) * p.C + c];
    float sum = 0;
    do sum += partial[size_t(k++) * p.C + c];
    while (id(k) == id(k - 1));
    to = G(float(to) + sum);
}

template <class E, class G>
void embedding_backward(Gpu gpu, G* dweight, const E* dout, const TokenOrder& order, size_t C) {
    if (order.token.empty() || C == 0) return;
    REQUIRE(order.parts * C * sizeof(float) <= GpuContext::scratch_bytes, "so many channels need a larger scratch");
    float* partial = (float*)gpu.context->scratch; // (parts, C)
    const unsigned pieces = unsigned(order.piece.size() - 1);
    EmbeddingPieces p = {order.device_token, order.device_piece, pieces, order.parts, order.longs, 0, C};
    auto launch = [&](auto width) {
        constexpr int W = decltype(width)::value;
        const size_t strips = (C / W + 31) / 32;
        const unsigned blocks = grid_blocks(p.longs * strips + ((p.pieces - p.longs) * strips + 7) / 8);
        p.strips = unsigned(strips);
        embedding_backward_kernel<E, G, W><<<blocks, 256, 0, gpu.stream>>>(dweight, partial, dout, p);
    };
    constexpr int W = std::min(pack_width<E>, pack_width<G>);
    if (packs_fit<E>(C, dweight, dout)) launch(std::integral_constant<int, W>());
    else launch(std::integral_constant<int, 1>());
    CUDA_CHECK(cudaGetLastError());
    if (p.parts == 0) return;
    const dim3 joins(grid_blocks((C + 255) / 256), p.parts);
    embedding_join_kernel<<<joins, 256, 0, gpu.stream>>>(dweight, partial, p);
    CUDA_CHECK(cudaGetLastError());
}
#endif
