// Attention on any GPU, for any storage type and head sizes of 2 to 256: plain multiply-adds in fp32, tiles in shared
// memory, sums in a fixed order. It computes what attention_mma.cuh does not take, and is the control of experiments in
// fp32. Also what both share: the backward's beginning (delta, the anchor's gradients) and its end (rounding).
// The mathematics, the mask and the tile map stand in attention_anchor.cuh.
#pragma once
#include "../attention_anchor.cuh"
#include "../core/kernel.h"

#ifdef __CUDACC__
// Which tile and head a block works on. Heads come in groups whose keys and values fit the L2 cache together; in a
// group, the tiles with most work first.
struct TileOfHead {
    MapTile tile;
    int head;
};
__device__ inline TileOfHead tile_of_head(const DeviceMap& map, int heads, int together) {
    const int group = blockIdx.x / (map.count * together), in = blockIdx.x % (map.count * together);
    const int size = min(together, heads - group * together);
    return {map.tiles[in / size], group * together + in % size};
}
// Heads in a group; half of the L2 is the share that holds on to what is read again and again.
inline int heads_together(Gpu gpu, size_t tokens, size_t bytes_per_token, size_t heads) {
    const size_t bytes = std::max<size_t>(tokens * bytes_per_token, 1);
    return int(std::max<size_t>(1, std::min(heads, gpu.context->l2_bytes / 2 / bytes)));
}

// A map by keys, asked by queries: of its tiles first .. first + 255, the numbers of those that visit a query of
// [begin, end), in order; their count is returned. For all threads of a block of 32 WARPS, between two barriers.
template <int WARPS> struct TileList { int tile[32 * WARPS], count[WARPS]; };
template <int WARPS>
__device__ int tiles_that_visit(TileList<WARPS>& list, const DeviceMap& map, int first, int begin, int end) {
    const int warp = threadIdx.x / 32, number = first + int(threadIdx.x);
    bool visits = false;
    if (number < map.count)
        for (int r = map.tiles[number].first_range; r < map.tiles[number].last_range; r++)
            visits |= map.ranges[r].begin < end && map.ranges[r].end > begin;
    const unsigned votes = __ballot_sync(~0u, visits);
    if (threadIdx.x % 32 == 0) list.count[warp] = __popc(votes);
    __syncthreads();
    int place = __popc(votes & ((1u << threadIdx.x % 32) - 1)), all = 0;
    for (int w = 0; w < WARPS; w++) place += w < warp ? list.count[w] : 0, all += list.count[w];
    if (visits) list.tile[place] = number;
    __syncthreads();
    return all;
}
// The queries that a tile of keys visits lie in one row, from the first of its ranges to the last one.
struct Span {
    int begin, end;
    __device__ bool holds(int t) const { return t >= begin && t < end; }
};
__device__ inline Span visited(const DeviceMap& map, const MapTile& tile) {
    return {map.ranges[tile.first_range].begin, map.ranges[tile.last_range - 1].end};
}

struct RowBegins {
    static constexpr int most = 64;
    int32_t begin[most + 1];
};

template <class E> struct AttentionBegin {
    float *delta, *dq, *partial; // partial (rows, parts, 2, H, D): what the anchor receives, or null
    const E *dout, *out, *q, *anchor;
    const float* lse;
    size_t q_stride;
    int row, T, H, K, D; // row: the number of the first
    bool split;          // the order of dq's columns
};

// W elements of each of `PACKS` packs, 32 lanes apart when the head is wide.
template <class E, int W, int LANES, int PACKS> struct HeadSlice {
    Pack<E, W> pack[PACKS];
    __device__ void load(const E* from, int lane, int D, bool valid) {
#pragma unroll
        for (int i = 0; i < PACKS; i++) {
            const int d = (i * LANES + lane) * W;
            if (valid && d < D) pack[i] = pack_load<W>(from + d);
            else
                for (uint32_t& word : pack[i].word) word = 0;
        }
    }
    __device__ float operator[](int i) const { return pack[i / W][i % W]; }
};

// LANES threads take a head of a token, a block a number of heads of the tokens of one part of one row; a thread keeps
// its sums for the anchor in registers. Bound by memory: of bf16, 6 bytes read and 4 written an element; on an H200,
// 78 to 82% of a copy's speed at 16384 tokens and 85% at 65536 (32 heads of 128).
template <class E, int W, int LANES, int PACKS> __global__ void __launch_bounds__(256)
    attention_begin_kernel(const __grid_constant__ AttentionBegin<E> a, const __grid_constant__ RowBegins rows) {
    using Slice = HeadSlice<E, W, LANES, PACKS>;
    constexpr int N = W * PACKS;
    const int lane = threadIdx.x % LANES, head = (blockIdx.y * blockDim.x + threadIdx.x) / LANES;
    const int end_of_row = rows.begin[blockIdx.z + 1], length = end_of_row - rows.begin[blockIdx.z];
    const int each = (length + gridDim.x - 1) / gridDim.x, first = rows.begin[blockIdx.z] + each * blockIdx.x;
    const int last = min(first + each, end_of_row);
    const float scale = float(1 / sqrt(double(a.D)));
    const size_t width = size_t(a.K) * a.D;

    Slice k0, v0, dout, out, q;
    const size_t at_anchor = (a.row + blockIdx.z) * 2 * width + head / (a.H / a.K) * a.D;
    const bool anchored = a.anchor != nullptr;
    k0.load(a.anchor + at_anchor, lane, a.D, anchored && head < a.H);
    v0.load(a.anchor + at_anchor + width, lane, a.D, anchored && head < a.H);
    float start[N]; // of dq, over its factor
#pragma unroll
    for (int n = 0; n < N; n++) start[n] = k0[n];
    if constexpr (W == 4 && PACKS == 1)
        if (a.split && anchored && head < a.H)
#pragma unroll
            for (int n = 0; n < N; n++) start[n] = float(a.anchor[at_anchor + lane / 2 * 8 + 2 * n + lane % 2]);
    struct Token {
        Slice dout, out, q;
        float lse;
    };
    float dk0[N] = {}, dv0[N] = {};
    auto load = [&](Token& token, int t) {
        const bool valid = t < last && head < a.H;
        const size_t at = (size_t(t) * a.H + head) * a.D;
        token.dout.load(a.dout + at, lane, a.D, valid), token.out.load(a.out + at, lane, a.D, valid);
        if (!anchored) return;
        token.q.load(a.q + t * a.q_stride + head * a.D, lane, a.D, valid);
        token.lse = valid ? a.lse[size_t(head) * a.T + t] : 0;
    };
    auto take = [&](const Token& token, int t) {
        float delta = 0, score = 0, dp0 = 0;
#pragma unroll
        for (int d = 0; d < N; d++) {
            delta += token.dout[d] * token.out[d];
            if (anchored) score += token.q[d] * k0[d], dp0 += token.dout[d] * v0[d];
        }
#pragma unroll
        for (int other = LANES / 2; other > 0; other /= 2) {
            delta += __shfl_xor_sync(~0u, delta, other);
            score += __shfl_xor_sync(~0u, score, other);
            dp0 += __shfl_xor_sync(~0u, dp0, other);
        }
        const float p0 = anchored ? exp_for<E>(scale * score - token.lse) : 0;
        const float dp_part = p0 * (dp0 - delta), ds0 = scale * dp_part, to_dq = a.split ? dp_part : ds0;
        const bool valid = t < last && head < a.H;
        if (valid && lane == 0) a.delta[size_t(head) * a.T + t] = delta;
        float* dq = a.dq + (size_t(t) * a.H + head) * a.D;
#pragma unroll
        for (int pack = 0; pack < PACKS; pack++) {
            float part[W];
#pragma unroll
            for (int d = 0; d < W; d++) {
                const int n = pack * W + d;
                part[d] = to_dq * start[n];
                if (valid && anchored) dk0[n] += ds0 * token.q[n], dv0[n] += p0 * token.dout[n];
            }
            if (valid && (pack * LANES + lane) * W < a.D) pack_store<float, W>(dq + (pack * LANES + lane) * W, part);
        }
    };
    // As many turns for all, because of the shuffles. `ahead` tokens are on their way while one is taken.
    constexpr int ahead = PACKS == 1 ? 4 : 1;
    const int step = blockDim.y;
    Token next[ahead];
    int t = first + threadIdx.y;
#pragma unroll
    for (int i = 0; i < ahead; i++) load(next[i], t + i * step);
    for (int turn = 0; turn < each; turn += ahead * step, t += ahead * step) {
#pragma unroll
        for (int i = 0; i < ahead; i++) {
            const Token now = next[i];
            load(next[i], t + (ahead + i) * step);
            take(now, t + i * step);
        }
    }

    if (!anchored) return;
    __shared__ float sums[256][2 * N + 1];
    const int thread = threadIdx.y * blockDim.x + threadIdx.x;
#pragma unroll
    for (int n = 0; n < N; n++) sums[thread][n] = dk0[n], sums[thread][N + n] = dv0[n];
    __syncthreads();
    if (threadIdx.y > 0 || head >= a.H) return;
    float* to = a.partial + (size_t(blockIdx.z) * gridDim.x + blockIdx.x) * 2 * a.H * a.D + head * a.D;
#pragma unroll
    for (int n = 0; n < 2 * N; n++) {
        const int d = (n % N / W * LANES + lane) * W + n % W;
        float sum = 0;
        for (int y = 0; y < blockDim.y; y++) sum += sums[y * blockDim.x + threadIdx.x][n];
        if (d < a.D) to[size_t(n / N) * a.H * a.D + d] = sum;
    }
}

// danchor += the partial sums, over the parts and the heads of a group, always in the same order: 8 threads an element.
template <class E>
__global__ void attention_begin_sum_kernel(float* danchor, const float* partial, int parts, int H, int K, int D) {
    __shared__ float sums[8][32];
    const int i = blockIdx.x * 32 + threadIdx.x, width = K * D, group = H / K;
    float sum = 0;
    if (i < 2 * width) {
        const int head = i % width / D * group, d = i % D;
        const float* from = partial + size_t(blockIdx.y) * parts * 2 * H * D + (i / width * H + head) * size_t(D) + d;
        for (int part = threadIdx.y; part < parts; part += 8)
            for (int g = 0; g < group; g++) sum += from[size_t(part) * 2 * H * D + g * D];
    }
    sums[threadIdx.y][threadIdx.x] = sum;
    __syncthreads();
    if (threadIdx.y > 0 || i >= 2 * width) return;
    for (int y = 1; y < 8; y++) sum += sums[y][threadIdx.x];
    danchor[size_t(blockIdx.y) * 2 * width + i] += sum;
}

template <int W, int LANES, int PACKS, class E>
void attention_begin_launch(Gpu gpu, AttentionBegin<E> a, float* danchor, const int32_t* row_begin, size_t B) {
    const unsigned heads = std::min(a.H, 256 / LANES), tokens = 256 / (heads * LANES);
    const unsigned columns = (a.H + heads - 1) / heads;
    const size_t partial_bytes = size_t(2) * a.H * a.D * sizeof(float);
    const size_t places = GpuContext::scratch_bytes / partial_bytes;
    REQUIRE(!danchor || places > 0, "so many heads need a larger scratch");
    const size_t most = std::min<size_t>(RowBegins::most, places);
    const size_t resident = resident_blocks(gpu, attention_begin_kernel<E, W, LANES, PACKS>, 256);
    for (size_t row = 0; row < B; row += most) {
        const size_t count = std::min(most, B - row);
        RowBegins rows;
        int32_t longest = 0;
        for (size_t b = 0; b <= count; b++) rows.begin[b] = row_begin[row + b];
        for (size_t b = 0; b < count; b++) longest = std::max(longest, rows.begin[b + 1] - rows.begin[b]);
        if (longest == 0) continue;
        const size_t wanted = std::max<size_t>(1, resident / (columns * count)); // blocks for every row
        const size_t parts = std::min({wanted, places / count, (longest + 16 * size_t(tokens) - 1) / (16 * tokens)});
        a.row = int(row), a.partial = (float*)gpu.context->scratch;
        attention_begin_kernel<E, W, LANES, PACKS>
            <<<dim3(unsigned(parts), columns, unsigned(count)), dim3(heads * LANES, tokens), 0, gpu.stream>>>(a, rows);
        CUDA_CHECK(cudaGetLastError());
        if (!danchor) continue;
        const size_t width = size_t(2) * a.K * a.D;
        attention_begin_sum_kernel<E>
            <<<dim3(unsigned((width + 31) / 32), unsigned(count)), dim3(32, 8), 0, gpu.stream>>>(
                danchor + row * width, a.partial, int(parts), a.H, a.K, a.D);
        CUDA_CHECK(cudaGetLastError());
    }
}

// delta, the anchor's share of dQ (or 0) as its start, and dk0, dv0 added to danchor.
template <class E>
void attention_backward_begin(Gpu gpu, float* delta /*(H, T)*/, float* dq /*(T, H, D)*/,
                              float* danchor /*(B, 2, K, D), added to; or null*/, const E* dout /*(T, H, D)*/,
                              const E* out /*(T, H, D)*/, const float* lse /*(H, T)*/, const E* q, size_t q_stride,
                              const E* anchor /*(B, 2, K, D) or null*/, const int32_t* row_begin /*(B + 1), host*/,
                              size_t B, size_t T, size_t H, size_t K, size_t D, DqOrder order = DqOrder::plain) {
    REQUIRE(K > 0 && H > 0 && H % K == 0 && D > 0 && D <= 256, "at most 256 a head, the heads a multiple of KV heads");
    REQUIRE(!anchor == !danchor, "pass the anchor's gradient with the anchor");
    REQUIRE(T < size_t(1) << 31 && row_begin[0] == 0 && size_t(row_begin[B]) == T, "rows cover fewer than 2^31 tokens");
    const AttentionBegin<E> a{delta,  dq,     nullptr, dout,     out,
                              q,      anchor, lse,     q_stride, 0,
                              int(T), int(H), int(K),  int(D),   order == DqOrder::split};
    constexpr int W = pack_width<float>; // 16 bytes of dQ
    const bool packs = packs_fit<E>(q_stride, dout, out, q, anchor) && uintptr_t(dq) % 16 == 0;
    REQUIRE(!a.split || (packs && (D == 64 || D == 128)), "split columns are for rows on 16 bytes, heads of 64 or 128");
    if (packs && D == 128) attention_begin_launch<W, 128 / W, 1>(gpu, a, danchor, row_begin, B);
    else if (packs && D == 64) attention_begin_launch<W, 64 / W, 1>(gpu, a, danchor, row_begin, B);
    else if (packs && D == 32) attention_begin_launch<W, 32 / W, 1>(gpu, a, danchor, row_begin, B);
    else attention_begin_launch<1, 32, 8>(gpu, a, danchor, row_begin, B);
}

// The one rounding of gradients to their storage, where those in split order get their `scale`. Threads of a block lie
// along a token, or several tokens when it is narrow. Bound by memory: of bf16, 4 bytes read and 2 written an element;
// 93 and 98% of a copy's speed there.
template <class E, int W, DqOrder order>
__global__ void attention_end_kernel(E* to, size_t stride, const float* from, size_t T, size_t width, float scale) {
    const size_t t = blockIdx.x * size_t(blockDim.y) + threadIdx.y;
    if (t >= T) return;
    for (size_t i = threadIdx.x * W; i < width; i += blockDim.x * W) {
        const auto x = pack_load<W>(from + t * width + i);
        float values[W];
#pragma unroll
        for (int j = 0; j < W; j++) values[j] = order == DqOrder::split ? x[dq_place(j)] * scale : x[j];
        pack_store<E, W>(to + t * stride + i, values);
    }
}
template <class E> void attention_backward_end(Gpu gpu, E* dq_out, size_t stride /*elements between tokens*/,
                                               const float* dq /*(T, H, D)*/, size_t T, size_t H, size_t D,
                                               DqOrder order = DqOrder::plain) {
    const size_t width = H * D;
    REQUIRE(width > 0 && stride >= width, "tokens must not overlap");
    if (T == 0) return;
    constexpr int W = pack_width<float>; // 16 bytes of dQ
    const bool packs = packs_fit<E>(width, dq_out, dq) && stride % pack_width<E> == 0;
    auto launch = [&](auto kernel, size_t each) {
        const unsigned x = unsigned(std::min<size_t>(256, width / each)), y = 256 / x;
        kernel<<<grid_blocks((T + y - 1) / y), dim3(x, y), 0, gpu.stream>>>(dq_out, stride, dq, T, width,
                                                                            1 / std::sqrt(float(D)));
        CUDA_CHECK(cudaGetLastError());
    };
    if (order == DqOrder::split) {
        REQUIRE(packs && width % 8 == 0, "split columns are for rows on 16 bytes");
        launch(attention_end_kernel<E, 8, DqOrder::split>, 8);
    } else if (packs) launch(attention_end_kernel<E, W, DqOrder::plain>, W);
    else launch(attention_end_kernel<E, 1, DqOrder::plain>, 1);
}

// 256 threads, 16 by 16, work on 32 by 32 pairs of query and key: thread (y, x) has the pairs of rows y, y + 16 and
// columns x, x + 16, and of a sum of 32 rows by D the same rows and d = 4 x + 64 i + 0..3. A tile's rows stand in
// shared memory as floats, padded with zeros to an odd number of float4, so that 8 of them share no bank.
constexpr int simt_tile = 32, simt_threads = 256, simt_most = 256; // simt_most: of D
inline AttentionTiles attention_simt_tiles() { return {simt_tile, simt_tile, simt_tile, simt_tile}; }
HOST_DEVICE constexpr int simt_row(int D) { return ((D + 3) / 4 | 1) * 4; }
inline size_t simt_shared_bytes(int tiles, int squares, int D) {
    return sizeof(float) * simt_tile * (tiles * simt_row(D) + squares * (simt_tile + 1));
}

struct SimtSum {
    float at[2][simt_most / 64][4] = {}; // row, i, d
};
struct SimtThread {
    int x = threadIdx.x % 16, y = threadIdx.x / 16;
};

// From memory to a tile; rows from `valid` on are zero.
template <class E> __device__ void simt_load(float* tile, const E* from, size_t stride, int valid, int D) {
    const int row = simt_row(D);
    for (int i = threadIdx.x; i < simt_tile * row; i += simt_threads)
        tile[i] = i / row < valid && i % row < D ? float(from[i / row * stride + i % row]) : 0.f;
}

// s = a b^T. What it is multiplied with next must round alike everywhere (__fmul_rn): one key alone then has P = 1.
__device__ inline void simt_scores(float (&s)[2][2], const float* a, const float* b, int D) {
    const SimtThread me;
    const int row = simt_row(D);
    s[0][0] = s[0][1] = s[1][0] = s[1][1] = 0;
    for (int d = 0; d < row; d += 4)
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const float4 u = *(const float4*)(a + (me.y + 16 * i) * row + d);
#pragma unroll
            for (int j = 0; j < 2; j++) {
                const float4 v = *(const float4*)(b + (me.x + 16 * j) * row + d);
                s[i][j] += u.x * v.x + u.y * v.y + u.z * v.z + u.w * v.w;
            }
        }
}

// sum += p b, or p^T b; p is a square in shared memory.
template <bool TRANSPOSED> __device__ void simt_multiply(SimtSum& sum, const float* p, const float* b, int D) {
    const SimtThread me;
    const int row = simt_row(D);
    for (int k = 0; k < simt_tile; k++)
#pragma unroll
        for (int i = 0; i < simt_most / 64; i++) {
            const int d = 4 * me.x + 64 * i;
            if (d >= D) continue;
            const float4 v = *(const float4*)(b + k * row + d);
#pragma unroll
            for (int r = 0; r < 2; r++) {
                const int y = me.y + 16 * r;
                const float x = TRANSPOSED ? p[k * (simt_tile + 1) + y] : p[y * (simt_tile + 1) + k];
                sum.at[r][i][0] += x * v.x, sum.at[r][i][1] += x * v.y;
                sum.at[r][i][2] += x * v.z, sum.at[r][i][3] += x * v.w;
            }
        }
}

// f(row, d, value&) for all that a thread holds of a sum.
template <class F> __device__ void simt_each(SimtSum& sum, int D, F f) {
    const SimtThread me;
#pragma unroll
    for (int r = 0; r < 2; r++)
#pragma unroll
        for (int i = 0; i < simt_most / 64; i++)
#pragma unroll
            for (int j = 0; j < 4; j++)
                if (4 * me.x + 64 * i + j < D) f(me.y + 16 * r, 4 * me.x + 64 * i + j, sum.at[r][i][j]);
}

// Of the 16 threads that share their rows.
template <class F> __device__ float simt_over_row(float x, F f) {
#pragma unroll
    for (int other = 8; other > 0; other /= 2) x = f(x, __shfl_xor_sync(~0u, x, other));
    return x;
}

// A block takes a tile of queries of one head. Bound by the reads of shared memory, four floats for 4 multiply-adds.
template <class E> __global__ void __launch_bounds__(simt_threads)
    attention_simt_forward_kernel(const __grid_constant__ AttentionForward<E> a, int together) {
    extern __shared__ __align__(16) float simt_shared[];
    const auto [tile, head] = tile_of_head(a.map, a.H, together);
    const int D = a.D, size = simt_tile * simt_row(D), kv_head = head / (a.H / a.K), valid = tile.end - tile.begin;
    float *q = simt_shared, *k = q + size, *v = k + size, *square = v + size;
    const SimtThread me;
    const float scale = float(1 / sqrt(double(D)));
    simt_load(q, a.q + tile.begin * a.q_stride + head * D, a.q_stride, valid, D);
    __syncthreads();

    SimtSum o;
    float m[2] = {-INFINITY, -INFINITY}, l[2] = {}; // of rows y, y + 16
    if (a.first && a.anchor) {
        const E* k0 = a.anchor + (size_t(tile.row) * 2 * a.K + kv_head) * D;
        for (int r = 0; r < 2; r++) {
            float score = 0;
            for (int d = me.x; d < D; d += 16) score += q[(me.y + 16 * r) * simt_row(D) + d] * float(k0[d]);
            m[r] = scale * simt_over_row(score, [](float x, float y) { return x + y; }), l[r] = 1;
        }
        simt_each(o, D, [&](int, int d, float& x) { x = float(k0[a.K * D + d]); });
    } else if (!a.first) {
        for (int r = 0; r < 2; r++) {
            if (me.y + 16 * r < valid) m[r] = a.lse[size_t(head) * a.T + tile.begin + me.y + 16 * r];
            l[r] = m[r] == -INFINITY ? 0 : 1;
        }
        simt_each(o, D, [&](int row, int d, float& x) {
            if (row < valid) x = a.state[((size_t(tile.begin) + row) * a.H + head) * D + d];
        });
    }

    for (int range = tile.first_range; range < tile.last_range; range++)
        for (int begin = a.map.ranges[range].begin; begin < a.map.ranges[range].end; begin += simt_tile) {
            const int keys = min(simt_tile, a.map.ranges[range].end - begin);
            const E* key = a.kv + begin * a.kv_stride + kv_head * D;
            __syncthreads();
            simt_load(k, key, a.kv_stride, keys, D), simt_load(v, key + a.K * D, a.kv_stride, keys, D);
            __syncthreads();
            float s[2][2];
            simt_scores(s, q, k, D);
            for (int i = 0; i < 2; i++) {
                const int row = me.y + 16 * i;
                const TokenLabel query = a.q_label[tile.begin + min(row, valid - 1)];
                float old = m[i];
                for (int j = 0; j < 2; j++) {
                    const int column = me.x + 16 * j;
                    const TokenLabel label = column < keys ? a.k_label[begin + column] : TokenLabel{0, hidden_doc};
                    const bool seen = visible(query.index, query.doc, label.index, label.doc);
                    s[i][j] = seen ? __fmul_rn(scale, s[i][j]) : -INFINITY;
                }
                m[i] = fmaxf(old, simt_over_row(fmaxf(s[i][0], s[i][1]), [](float x, float y) { return fmaxf(x, y); }));
                const float from = m[i] == -INFINITY ? 0 : m[i], factor = expf(old - from);
                float sum = 0;
                for (int j = 0; j < 2; j++) {
                    const float p = expf(s[i][j] - from);
                    sum += p;
                    square[row * (simt_tile + 1) + me.x + 16 * j] = float(E(p));
                }
                l[i] = l[i] * factor + simt_over_row(sum, [](float x, float y) { return x + y; });
                for (auto& four : o.at[i])
                    for (float& x : four) x *= factor;
            }
            __syncthreads();
            simt_multiply<false>(o, square, v, D);
        }

    for (int r = 0; r < 2; r++) {
        const int row = me.y + 16 * r;
        if (me.x == 0 && row < valid)
            a.lse[size_t(head) * a.T + tile.begin + row] = l[r] > 0 ? m[r] + logf(l[r]) : -INFINITY;
        l[r] = l[r] > 0 ? 1 / l[r] : 0;
    }
    simt_each(o, D, [&](int row, int d, float& x) {
        const size_t at = ((size_t(tile.begin) + row) * a.H + head) * D + d;
        if (row < valid && a.last) a.out[at] = E(x * l[row / 16]);
        else if (row < valid) a.state[at] = x * l[row / 16];
    });
}

// P and dS of 32 queries and 32 keys, in storage precision, to two squares (queries, keys).
template <class E> struct SimtPairs {
    const AttentionBackward<E>& a;
    const float *q, *dout, *k, *v;
    float *p, *ds;
    __device__ void compute(int head, int q_begin, Span queries, int k_begin, int k_end) const {
        const SimtThread me;
        const float scale = float(1 / sqrt(double(a.D)));
        float s[2][2], dp[2][2];
        simt_scores(s, q, k, a.D), simt_scores(dp, dout, v, a.D);
        for (int i = 0; i < 2; i++)
            for (int j = 0; j < 2; j++) {
                const int row = me.y + 16 * i, column = me.x + 16 * j, at = row * (simt_tile + 1) + column;
                const int t = q_begin + row, from = k_begin + column;
                float probability = 0, delta = 0;
                if (queries.holds(t) && from < k_end) {
                    const TokenLabel query = a.q_label[t], key = a.k_label[from];
                    const float lse = a.lse[size_t(head) * a.T + t];
                    delta = a.delta[size_t(head) * a.T + t];
                    if (visible(query.index, query.doc, key.index, key.doc) && lse != -INFINITY)
                        probability = expf(__fmul_rn(scale, s[i][j]) - lse);
                }
                p[at] = float(E(probability)), ds[at] = float(E(probability * (dp[i][j] - delta)));
            }
    }
};

// A block takes a tile of keys of one KV head, and goes through the queries that see it.
template <class E> __global__ void __launch_bounds__(simt_threads)
    attention_simt_dkv_kernel(const __grid_constant__ AttentionBackward<E> a, int together) {
    extern __shared__ __align__(16) float simt_shared[];
    const auto [tile, kv_head] = tile_of_head(a.map, a.K, together);
    const int D = a.D, size = simt_tile * simt_row(D), group = a.H / a.K, valid = tile.end - tile.begin;
    float *q = simt_shared, *dout = q + size, *k = dout + size, *v = k + size, *p = v + size;
    const SimtPairs<E> pairs{a, q, dout, k, v, p, p + simt_tile * (simt_tile + 1)};
    const float scale = float(1 / sqrt(double(D)));
    const E* key = a.kv + tile.begin * a.kv_stride + kv_head * D;
    simt_load(k, key, a.kv_stride, valid, D), simt_load(v, key + a.K * D, a.kv_stride, valid, D);

    SimtSum dk, dv;
    for (int head = kv_head * group; head < (kv_head + 1) * group; head++)
        for (int range = tile.first_range; range < tile.last_range; range++)
            for (int begin = a.map.ranges[range].begin; begin < a.map.ranges[range].end; begin += simt_tile) {
                const Span queries{begin, min(begin + simt_tile, a.map.ranges[range].end)};
                const int count = queries.end - begin;
                __syncthreads();
                simt_load(q, a.q + begin * a.q_stride + head * D, a.q_stride, count, D);
                simt_load(dout, a.dout + (size_t(begin) * a.H + head) * D, size_t(a.H) * D, count, D);
                __syncthreads();
                pairs.compute(head, begin, queries, tile.begin, tile.end);
                __syncthreads();
                simt_multiply<true>(dv, pairs.p, dout, D), simt_multiply<true>(dk, pairs.ds, q, D);
            }

    auto store = [&](SimtSum& gradient, int value, float factor) {
        simt_each(gradient, D, [&](int row, int d, float& sum) {
            if (row >= valid) return;
            const size_t t = tile.begin + row, column = (value * a.K + kv_head) * size_t(D) + d, width = 2 * a.K * D;
            float x = factor * sum;
            if (a.dkv_out && a.danchor && a.k_label[t].doc == hidden_doc) x += a.danchor[tile.row * width + column];
            if (a.dkv_out) a.dkv_out[t * a.dkv_out_stride + column] = E(x);
            else a.dkv[t * width + column] += x;
        });
    };
    store(dk, 0, scale), store(dv, 1, 1);
}

// A block takes 32 queries of one head, and goes through the tiles of keys that visit one of them, in their order.
template <class E> __global__ void __launch_bounds__(simt_threads)
    attention_simt_dq_kernel(const __grid_constant__ AttentionBackward<E> a, int blocks) {
    extern __shared__ __align__(16) float simt_shared[];
    __shared__ TileList<simt_threads / 32> list;
    const int head = blockIdx.x / blocks, begin = (blocks - 1 - blockIdx.x % blocks) * simt_tile;
    const int end = min(begin + simt_tile, a.T), kv_head = head / (a.H / a.K);
    const int D = a.D, size = simt_tile * simt_row(D);
    float *q = simt_shared, *dout = q + size, *k = dout + size, *v = k + size, *p = v + size;
    const SimtPairs<E> pairs{a, q, dout, k, v, p, p + simt_tile * (simt_tile + 1)};
    simt_load(q, a.q + begin * a.q_stride + head * D, a.q_stride, end - begin, D);
    simt_load(dout, a.dout + (size_t(begin) * a.H + head) * D, size_t(a.H) * D, end - begin, D);

    SimtSum dq;
    for (int first = 0; first < a.map.count; first += simt_threads) {
        const int count = tiles_that_visit(list, a.map, first, begin, end);
        for (int i = 0; i < count; i++) {
            const MapTile tile = a.map.tiles[list.tile[i]];
            const E* key = a.kv + tile.begin * a.kv_stride + kv_head * D;
            __syncthreads();
            simt_load(k, key, a.kv_stride, tile.end - tile.begin, D);
            simt_load(v, key + a.K * D, a.kv_stride, tile.end - tile.begin, D);
            __syncthreads();
            pairs.compute(head, begin, visited(a.map, tile), tile.begin, tile.end);
            __syncthreads();
            simt_multiply<false>(dq, pairs.ds, k, D);
        }
        __syncthreads();
    }
    const float scale = float(1 / sqrt(double(D)));
    simt_each(dq, D, [&](int row, int d, float& x) {
        if (begin + row < end) a.dq[((size_t(begin) + row) * a.H + head) * D + d] += scale * x;
    });
}

// What every launcher asks of its arguments.
template <class A> void attention_require(const A& a, int most) {
    REQUIRE(a.K > 0 && a.H > 0 && a.H % a.K == 0, "the heads must be a multiple of the KV heads");
    REQUIRE(a.D > 0 && a.D <= most && a.T >= 0 && a.Tk >= 0, "such a head size has no kernel");
    REQUIRE(a.map.count == 0 || (a.map.tiles && a.map.ranges && a.q_label && a.k_label), "upload the map");
    REQUIRE(a.map.turns == 0, "a map with turns is for the Hopper backward");
}

// More than 48 KiB of shared memory must be asked for.
template <class Kernel> void allow_shared_memory(Gpu gpu, Kernel kernel, size_t bytes) {
    int most = 0;
    CUDA_CHECK(cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, gpu.context->device));
    REQUIRE(bytes <= size_t(most), "this GPU has too little shared memory for such a head size");
    CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(bytes)));
}

template <class E> void attention_simt_forward(Gpu gpu, const AttentionForward<E>& a) {
    attention_require(a, simt_most);
    if (a.map.count == 0) return;
    const size_t bytes = simt_shared_bytes(3, 1, a.D);
    const int together = heads_together(gpu, a.Tk, 2 * a.D * sizeof(E), a.K) * (a.H / a.K);
    allow_shared_memory(gpu, attention_simt_forward_kernel<E>, bytes);
    attention_simt_forward_kernel<E>
        <<<grid_blocks(size_t(a.map.count) * a.H), simt_threads, bytes, gpu.stream>>>(a, together);
    CUDA_CHECK(cudaGetLastError());
}

template <class E> void attention_simt_backward(Gpu gpu, const AttentionBackward<E>& a) {
    attention_require(a, simt_most);
    if (a.map.count == 0) return;
    const size_t bytes = simt_shared_bytes(4, 2, a.D), blocks = (size_t(a.T) + simt_tile - 1) / simt_tile;
    const int together = heads_together(gpu, a.T, 2 * a.H / a.K * a.D * sizeof(E), a.K);
    allow_shared_memory(gpu, attention_simt_dkv_kernel<E>, bytes);
    attention_simt_dkv_kernel<E>
        <<<grid_blocks(size_t(a.map.count) * a.K), simt_threads, bytes, gpu.stream>>>(a, together);
    CUDA_CHECK(cudaGetLastError());
    if (blocks == 0) return;
    allow_shared_memory(gpu, attention_simt_dq_kernel<E>, bytes);
    attention_simt_dq_kernel<E><<<grid_blocks(blocks * a.H), simt_threads, bytes, gpu.stream>>>(a, int(blocks));
    CUDA_CHECK(cudaGetLastError());
}
#endif
