// Flash attention on tensor cores of any GPU from sm_80 on: mma.sync, ldmatrix, cp.async. bf16, head sizes 32, 64, 128.
// The mathematics, the mask and the tile map stand in attention_anchor.cuh; other sizes and types are computed by
// attention_simt.cuh.
//
// A product of a warp takes fragments of 16 x 16 (A) and 16 x 8 (B); a lane holds rows lane / 4 and lane / 4 + 8 and
// pairs of neighbouring columns 2 (lane % 4), + 8. The sum's fragment (C) has the same places as A, so that P, once
// rounded, is the next product's A as it stands in the registers.
#pragma once
#include "attention_simt.cuh"

#ifdef __CUDACC__
__device__ inline uint32_t shared_address(const void* p) { return uint32_t(__cvta_generic_to_shared(p)); }

// Four 8 x 8 matrices; lane i gives the address of row i % 8 of matrix i / 8.
__device__ inline void load_matrices(uint32_t (&to)[4], uint32_t address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(address));
}
__device__ inline void load_matrices_transposed(uint32_t (&to)[4], uint32_t address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(address));
}

// c (16, 8) += a (16, 16) b (16, 8)
__device__ inline void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
                 "{%0, %1, %2, %3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Copies in the background; without `valid` the bytes become zero and `from` is not read.
__device__ inline void copy_16(uint32_t to, const void* from, bool valid) {
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(valid ? 16 : 0));
}
template <int BYTES> __device__ void copy_small(uint32_t to, const void* from, bool valid) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(to), "l"(from), "n"(BYTES),
                 "r"(valid ? BYTES : 0));
}

// 2^x, with 2^-inf = 0
__device__ inline float exp2_approximate(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// Rows of W bf16 in shared memory, without bank conflicts: the 16-byte chunks of a row are permuted by its number.
template <int W> __device__ constexpr uint32_t swizzle(int row) { return W >= 64 ? row % 8 : row / (64 / W) % (W / 8); }
template <int W> __device__ constexpr uint32_t tile_address(int row, int chunk) {
    return row * 2 * W + ((chunk ^ swizzle<W>(row)) << 4);
}

// What a lane passes to load_matrices for the 16 x 16 at row 0, column 0. To it, xor 32 k moves k times 16 columns, and
// adding 32 W moves 16 rows. `along`: matrices 1 and 2 are rows 8..15 and columns 8..15; `across`: the other way round.
//   along:  A of (m, k) rows;  B, transposed, of (k, n) rows
//   across: B of (n, k) rows;  A, transposed, of (k, m) rows
template <int W> __device__ uint32_t lane_along(int lane) { return tile_address<W>(lane % 16, lane / 16); }
template <int W> __device__ uint32_t lane_across(int lane) {
    return tile_address<W>(lane % 8 + lane / 16 * 8, lane / 8 % 2);
}

// ROWS rows of D, `stride` elements apart; from row `valid` on they are zero. 8 threads copy 128 bytes of a row at
// once; `from` and `to` are the thread's own, as tile_source and tile_target give them.
template <int D, int THREADS> struct TileCopy {
    static constexpr int threads_a_row = D < 64 ? D / 8 : 8, step = THREADS / threads_a_row; // step: a multiple of 8
    int row = threadIdx.x / threads_a_row, column = threadIdx.x % threads_a_row * 8;
    __device__ uint32_t target() const { return tile_address<D>(row, column / 8); }

    template <int ROWS> __device__ void load(uint32_t to, const bf16* from, uint32_t stride, int valid) const {
#pragma unroll
        for (int i = 0; i < (ROWS + step - 1) / step; i++, from += size_t(step) * stride)
#pragma unroll
            for (int d = 0; d < D; d += 64)
                if (ROWS % step == 0 || row + i * step < ROWS)
                    copy_16(to + i * step * 2 * D + 2 * d, from + d, row + i * step < valid);
    }
    // The same, for a tile at `to` whose row 0 stands at `from`.
    template <int ROWS> __device__ void tile(uint32_t to, const bf16* from, uint32_t stride, int valid) const {
        load<ROWS>(to + target(), from + size_t(uint32_t(row)) * stride + column, stride, valid);
    }
};

// s (16 M, 8 N) += a b^T, depth D; both stand in shared memory with D elements a row. aside() is done beside the first
// products.
template <int D, int M, int N, class Aside>
__device__ void scores(float (&s)[M][N][4], uint32_t a_along, uint32_t b_across, Aside aside) {
    constexpr int pairs = N / 2, steps = D / 16 * pairs;
    uint32_t a[2][M][4], b[3][4]; // fragments come two steps before they are used
    auto load_a = [&](int k) {
#pragma unroll
        for (int m = 0; m < M; m++) load_matrices(a[k % 2][m], (a_along ^ (k << 5)) + m * 32 * D);
    };
    auto load_b = [&](int step) {
        load_matrices(b[step % 3], (b_across ^ (step / pairs << 5)) + step % pairs * 32 * D);
    };
    load_a(0), load_b(0), load_b(1);
#pragma unroll
    for (int step = 0; step < steps; step++) {
        const int k = step / pairs, n = step % pairs;
        if (step + 2 < steps) load_b(step + 2);
        if (n == pairs - 2 && k + 1 < D / 16) load_a(k + 1);
        const uint32_t(&now)[4] = b[step % 3];
#pragma unroll
        for (int m = 0; m < M; m++) {
            multiply_add(s[m][2 * n], a[k % 2][m], now[0], now[1]);
            multiply_add(s[m][2 * n + 1], a[k % 2][m], now[2], now[3]);
        }
        if (step == pairs - 1) aside();
    }
}
__device__ inline void nothing_aside() {}

// Every column of s starts at what start(column of the lane's first, of two) gives.
template <int M, int N, class Start> __device__ void scores_start(float (&s)[M][N][4], Start start) {
#pragma unroll
    for (int n = 0; n < N; n++) {
        const float2 x = start(n * 8);
#pragma unroll
        for (int m = 0; m < M; m++) s[m][n][0] = s[m][n][2] = x.x, s[m][n][1] = s[m][n][3] = x.y;
    }
}

// sum (16 M, D) += p b, depth 16 CHUNKS; b stands in shared memory. fragment(chunk, m, r) computes register r of p's
// fragment m: rows of half r % 2, columns from 8 (r / 2) on. That is done between the products of the chunk before, so
// that exponentials and tensor cores overlap; prepare(chunk) comes some products earlier, and fetches what it needs.
template <int D, int M, int CHUNKS, class Fragment, class Prepare>
__device__ void multiply_chunks(float (&sum)[M][D / 8][4], uint32_t b_along, Fragment fragment, Prepare prepare) {
    constexpr int registers = M * 4, steps = D / 16, wait = steps / 4;
    uint32_t p[2][M][4], b[2][4];
    auto load = [&](int step) {
        load_matrices_transposed(b[step % 2], (b_along ^ (step % steps << 5)) + step / steps * 32 * D);
    };
    load(0);
#pragma unroll
    for (int i = 0; i < registers; i++) p[0][i / 4][i % 4] = fragment(0, i / 4, i % 4);
#pragma unroll
    for (int chunk = 0; chunk < CHUNKS; chunk++) {
        const bool more = chunk + 1 < CHUNKS;
        if (more) prepare(chunk + 1);
#pragma unroll
        for (int d = 0; d < steps; d++) {
            if (more || d + 1 < steps) load(chunk * steps + d + 1);
            const uint32_t(&now)[4] = b[d % 2];
#pragma unroll
            for (int m = 0; m < M; m++) {
                multiply_add(sum[m][2 * d], p[chunk % 2][m], now[0], now[1]);
                multiply_add(sum[m][2 * d + 1], p[chunk % 2][m], now[2], now[3]);
            }
            if (more && d >= wait)
#pragma unroll
                for (int i = (d - wait) * registers / (steps - wait); i < (d - wait + 1) * registers / (steps - wait);
                     i++)
                    p[(chunk + 1) % 2][i / 4][i % 4] = fragment(chunk + 1, i / 4, i % 4);
        }
    }
}
__device__ inline void no_preparation(int) {}

// The state m starts at this instead of -inf, so that m - m is 0 and 2^(-inf - m) is 0.
constexpr float nothing_seen = -1e30f;
// m is raised, and O and l multiplied, only when a score exceeds it by this much (base 2): P stays below 2^8, which
// changes no relative error, and the sums are far from the largest float.
constexpr float lazy_maximum = 8;
constexpr float log2_e = 1.44269504088896341f;

template <int D, int KEYS, int WARPS> struct ForwardShared {
    bf16 q[32 * WARPS * D]; // later the output
    bf16 k[2][KEYS * D], v[2][KEYS * D];
    TokenLabel q_label[32 * WARPS], k_label[KEYS];
    float start[32 * WARPS]; // the anchor's scores
};

// A block takes one tile of queries of one head, a warp 32 of its queries, and goes through the keys, KEYS at a time,
// while the next ones are copied to the other half of the shared memory. Scores stay in base 2 units. The exponentials
// of 16 keys are computed between the products P V of the 16 keys before.
//
// Causal, head size 128, on an H200: 399 TF/s at 16384 tokens, 410 at 65536. mma.sync alone reaches 629 there; the two
// warps of a scheduler (registers allow no third) do not always have a product ready when it is free.
template <int D, int KEYS, int WARPS> __global__ void __launch_bounds__(32 * WARPS, 8 / WARPS)
    attention_mma_forward_kernel(const __grid_constant__ AttentionForward<bf16> a, int together) {
    constexpr int threads = 32 * WARPS, queries = 32 * WARPS, row_bytes = 2 * D;
    extern __shared__ __align__(1024) uint8_t shared_memory[];
    auto& shared = *(ForwardShared<D, KEYS, WARPS>*)shared_memory;
    const auto [tile, head] = tile_of_head(a.map, a.H, together);
    const int kv_head = head / (a.H / a.K), lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int valid = tile.end - tile.begin;
    if (tile.first_range == tile.last_range && !a.first && !a.last) return; // the state stays as it is
    const float to_base_2 = log2_e * float(1 / sqrt(double(D)));

    const TileCopy<D, threads> copy;
    const uint32_t target = shared_address(shared.k) + copy.target(), stride = uint32_t(a.kv_stride);
    const bf16* source = a.kv + copy.row * a.kv_stride + kv_head * D + copy.column;
    auto load_keys = [&](int begin, int stage) { // zeros, when there are none to come and begin is -1
        const int first = max(begin, 0), count = begin < 0 ? 0 : a.Tk - begin;
        const bf16* from = source + size_t(uint32_t(first)) * stride;
        const uint32_t to = target + stage * KEYS * row_bytes;
        copy.template load<KEYS>(to, from, stride, count);
        copy.template load<KEYS>(to + 2 * KEYS * row_bytes, from + a.K * D, stride, count);
    };
    copy.template tile<queries>(shared_address(shared.q), a.q + tile.begin * a.q_stride + head * D,
                                uint32_t(a.q_stride), valid);
    copy_small<8>(shared_address(&shared.q_label[threadIdx.x]), a.q_label + tile.begin + threadIdx.x,
                  int(threadIdx.x) < valid);
    if (tile.first_range < tile.last_range) load_keys(a.map.ranges[tile.first_range].begin, 0);
    copies_commit();

    // The lane's rows of the tile: row(m, half) for m, half in 0, 1.
    auto row = [&](int m, int half) { return warp * 32 + m * 16 + half * 8 + lane / 4; };
    float o[2][D / 8][4], m2[2][2], sum[2][2]; // m2: m in base 2; sum: of this lane's columns
    if (a.first && a.anchor) {
        copies_wait<0>();
        __syncthreads();
        const bf16* k0 = a.anchor + (size_t(tile.row) * 2 * a.K + kv_head) * D;
        float score = 0;
#pragma unroll
        for (int chunk = 0; chunk < D / 8; chunk++) {
            const auto q = pack_load<8>(shared.q + tile_address<D>(threadIdx.x, chunk) / 2);
            const auto k = pack_load<8>(k0 + chunk * 8);
#pragma unroll
            for (int i = 0; i < 8; i++) score += q[i] * k[i];
        }
        shared.start[threadIdx.x] = score * to_base_2;
        __syncwarp();
        const bf16* v0 = k0 + a.K * D;
#pragma unroll
        for (int m = 0; m < 2; m++)
#pragma unroll
            for (int half = 0; half < 2; half++) {
                m2[m][half] = shared.start[row(m, half)], sum[m][half] = lane % 4 == 0;
#pragma unroll
                for (int n = 0; n < D / 8; n++)
#pragma unroll
                    for (int i = 0; i < 2; i++) o[m][n][2 * half + i] = float(v0[n * 8 + lane % 4 * 2 + i]);
            }
    } else {
#pragma unroll
        for (int m = 0; m < 2; m++)
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const bool go_on = !a.first && row(m, half) < valid;
                const size_t t = tile.begin + row(m, half);
                const float lse = go_on ? a.lse[size_t(head) * a.T + t] : -INFINITY;
                m2[m][half] = lse == -INFINITY ? nothing_seen : lse * log2_e;
                sum[m][half] = lse != -INFINITY && lane % 4 == 0;
#pragma unroll
                for (int n = 0; n < D / 8; n++) {
                    const float* from = a.state + (t * a.H + head) * D + n * 8 + lane % 4 * 2;
                    const float2 x = go_on ? *(const float2*)from : make_float2(0, 0);
                    o[m][n][2 * half] = x.x, o[m][n][2 * half + 1] = x.y;
                }
            }
    }

    const uint32_t q_lane = shared_address(shared.q) + warp * 32 * row_bytes + lane_along<D>(lane);
    int stage = 0;
    auto visit = [&](auto masked, int begin, int end, int next) {
        copies_wait<0>();
        __syncthreads();                 // the keys are here, and nobody reads the other stage any more
        TokenLabel label{0, hidden_doc}; // on its way while the products are computed
        if (decltype(masked)::value && int(threadIdx.x) < min(KEYS, end - begin))
            label = a.k_label[begin + threadIdx.x];
        float s[2][KEYS / 8][4] = {};
        auto load_next = [&] { load_keys(next, stage ^ 1), copies_commit(); };
        scores<D>(s, q_lane, shared_address(shared.k[stage]) + lane_across<D>(lane), load_next);
        if constexpr (decltype(masked)::value) {
            if (threadIdx.x < KEYS) shared.k_label[threadIdx.x] = label;
            __syncthreads();
            TokenLabel mine[2][2];
#pragma unroll
            for (int i = 0; i < 4; i++) mine[i / 2][i % 2] = shared.q_label[row(i / 2, i % 2)];
#pragma unroll
            for (int n = 0; n < KEYS / 8; n++)
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    const int column = n * 8 + lane % 4 * 2 + i;
                    const TokenLabel k = shared.k_label[column];
#pragma unroll
                    for (int r = 0; r < 4; r++)
                        if (!visible(mine[r / 2][r % 2].index, mine[r / 2][r % 2].doc, k.index, k.doc))
                            s[r / 2][n][r % 2 * 2 + i] = -INFINITY;
                }
        }

        float top[2][2];
        bool higher = false;
#pragma unroll
        for (int m = 0; m < 2; m++)
#pragma unroll
            for (int half = 0; half < 2; half++) {
                float x = s[m][0][2 * half];
#pragma unroll
                for (int n = 0; n < KEYS / 8; n++) x = fmaxf(x, fmaxf(s[m][n][2 * half], s[m][n][2 * half + 1]));
                top[m][half] = x * to_base_2;
                higher |= top[m][half] > m2[m][half] + lazy_maximum;
            }
        if (__any_sync(~0u, higher)) {
#pragma unroll
            for (int m = 0; m < 2; m++)
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    float x = fmaxf(m2[m][half], top[m][half]);
                    x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
                    x = fmaxf(x, __shfl_xor_sync(~0u, x, 2));
                    const float factor = exp2_approximate(m2[m][half] - x);
                    m2[m][half] = x, sum[m][half] *= factor;
#pragma unroll
                    for (int n = 0; n < D / 8; n++) o[m][n][2 * half] *= factor, o[m][n][2 * half + 1] *= factor;
                }
        }

        auto probabilities = [&](int chunk, int m, int r) {
            const float* x = &s[m][2 * chunk + r / 2][r % 2 * 2];
            const float p0 = exp2_approximate(x[0] * to_base_2 - m2[m][r % 2]);
            const float p1 = exp2_approximate(x[1] * to_base_2 - m2[m][r % 2]);
            sum[m][r % 2] += p0 + p1;
            return bf16_pair(p0, p1);
        };
        multiply_chunks<D, 2, KEYS / 16>(o, shared_address(shared.v[stage]) + lane_along<D>(lane), probabilities,
                                         no_preparation);
        stage ^= 1;
    };
    for (int r = tile.first_range; r < tile.last_range; r++) {
        const VisitedRange range = a.map.ranges[r];
        const int after = r + 1 < tile.last_range ? a.map.ranges[r + 1].begin : -1;
        const int whole = range.masked ? range.begin : range.end - (range.end - range.begin) % KEYS;
        auto next = [&](int begin) { return begin + KEYS < range.end ? begin + KEYS : after; };
        int begin = range.begin;
        for (; begin < whole; begin += KEYS) visit(std::false_type(), begin, range.end, next(begin));
        for (; begin < range.end; begin += KEYS) visit(std::true_type(), begin, range.end, next(begin));
    }
    if (tile.first_range == tile.last_range) { // nobody has waited for the queries, whose place the output takes
        copies_wait<0>();
        __syncthreads();
    }

#pragma unroll
    for (int m = 0; m < 2; m++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            float l = sum[m][half];
            l += __shfl_xor_sync(~0u, l, 1);
            l += __shfl_xor_sync(~0u, l, 2);
            const float share = l > 0 ? 1 / l : 0;
            const size_t t = tile.begin + row(m, half);
            const bool mine = row(m, half) < valid;
            if (mine && lane % 4 == 0)
                a.lse[size_t(head) * a.T + t] = l > 0 ? (m2[m][half] + log2f(l)) / log2_e : -INFINITY;
#pragma unroll
            for (int n = 0; n < D / 8; n++) {
                const float x = o[m][n][2 * half] * share, y = o[m][n][2 * half + 1] * share;
                if (a.last) // a warp's own queries, which it has read for the last time
                    *(uint32_t*)((uint8_t*)shared.q + tile_address<D>(row(m, half), n) + lane % 4 * 4) =
                        bf16_pair(x, y);
                else if (mine) *(float2*)(a.state + (t * a.H + head) * D + n * 8 + lane % 4 * 2) = make_float2(x, y);
            }
        }
    if (!a.last) return;
    __syncwarp();
#pragma unroll
    for (int i = 0; i < D / 8; i++) {
        const int line = warp * 32 + (i * 32 + lane) / (D / 8), chunk = lane % (D / 8);
        const uint4 x = *(const uint4*)((const uint8_t*)shared.q + tile_address<D>(line, chunk));
        if (line < valid) *(uint4*)(a.out + ((size_t(tile.begin) + line) * a.H + head) * D + chunk * 8) = x;
    }
}

// Both to the nearest half; P is at most 1. What goes from one warp to another is rounded less than as bf16.
__device__ inline uint32_t half_pair(float low, float high) {
    uint32_t pair;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
}
__device__ inline float2 half_unpack(uint32_t pair) {
    float2 x;
    asm("{.reg .f16 low, high; mov.b32 {low, high}, %2; cvt.f32.f16 %0, low; cvt.f32.f16 %1, high;}"
        : "=f"(x.x), "=f"(x.y)
        : "r"(pair));
    return x;
}

// 16 columns of a row += what four lanes hold of two fragments, in no fixed order: x, y in the first 8 columns and z, w
// in the last 8. Neighbouring lanes exchange a pair, so that each has four neighbouring columns.
__device__ inline void add_to_sixteen(float* to, int lane, bool valid, float x, float y, float z, float w) {
    const bool odd = lane % 2;
    const float other0 = __shfl_xor_sync(~0u, odd ? x : z, 1), other1 = __shfl_xor_sync(~0u, odd ? y : w, 1);
    if (!valid) return;
    to += lane % 4 / 2 * 4 + odd * 8;
    x = odd ? other0 : x, y = odd ? other1 : y, z = odd ? z : other0, w = odd ? w : other1;
#if __CUDA_ARCH__ >= 900
    asm volatile("red.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(to), "f"(x), "f"(y), "f"(z), "f"(w) : "memory");
#else
    atomicAdd(to, x), atomicAdd(to + 1, y), atomicAdd(to + 2, z), atomicAdd(to + 3, w);
#endif
}

// Barriers of a block beside __syncthreads, by number: one side only tells, the other one waits for it. The tool
// racecheck does not follow a side that only tells: with -DRACECHECK that one waits too.
template <int NUMBER, int THREADS> __device__ void barrier_tell() {
#ifdef RACECHECK
    asm volatile("bar.sync %0, %1;" ::"n"(NUMBER), "n"(THREADS) : "memory");
#else
    asm volatile("bar.arrive %0, %1;" ::"n"(NUMBER), "n"(THREADS) : "memory");
#endif
}
template <int NUMBER, int THREADS> __device__ void barrier_wait() {
    asm volatile("bar.sync %0, %1;" ::"n"(NUMBER), "n"(THREADS) : "memory");
}

struct QueryStep {
    int head, begin, end; // queries [begin, end) of this head
    int masked;
};

template <int D, int KEYS, int QUERIES> struct BackwardShared {
    bf16 k[KEYS * D], v[KEYS * D];                    // later dK and dV
    bf16 q[3][QUERIES * D], dout[3][QUERIES * D];     // of steps n - 1, n, n + 1
    uint4 p[2][KEYS * QUERIES / 8];                   // P^T of steps n - 1, n: halves, as the lanes hold them
    bf16 ds[KEYS * QUERIES];                          // dS^T
    float start[3][QUERIES], minus_delta[3][QUERIES]; // start of S: -LSE, in units of S
    TokenLabel q_label[3][QUERIES], k_label[KEYS];
    QueryStep step[8];                     // of steps n - 2 .. n + 2
    int next_head, next_range, next_begin; // where step n + 3 begins
};

// A block keeps one tile of keys and values of one KV head in shared memory and goes through the queries that see it,
// of all heads of the group, QUERIES at a time. Warp w of the first four and warp w of the last four share a quarter of
// the keys, as rows:
//   all          dQ = dS K of step n - 2, added to memory
//   first four   S^T = K Q^T, P^T, dV += P^T dO of step n
//   last four    dP^T = V dO^T, dS^T, dK += dS^T Q of step n - 1
// so that one half's exponentials and conversions run beside the other half's products, and both sums stay in
// registers. P^T and dS^T enter their products from the registers; P^T goes to the other half lane by lane, dS^T to
// all. S starts at -LSE and dP at -delta, which takes both subtractions from the way between products.
//
// Causal, head size 128, on an H200: 323 TF/s at 16384 tokens, 328 at 65536, half of what mma.sync alone reaches. 59%
// of the shared memory's bandwidth is in use, and the halves wait for each other a tenth of the time.
template <int D, int KEYS, int QUERIES> __global__ void __launch_bounds__(256, 1)
    attention_mma_backward_kernel(const __grid_constant__ AttentionBackward<bf16> a, int together, int parts) {
    constexpr int M = KEYS / 64, N = QUERIES / 8, CHUNKS = QUERIES / 16, row_bytes = 2 * D;
    extern __shared__ __align__(1024) uint8_t shared_memory[];
    auto& shared = *(BackwardShared<D, KEYS, QUERIES>*)shared_memory;
    auto [tile, tile_head] = tile_of_head(a.map, a.K * parts, together * parts);
    const int kv_head = tile_head / parts, group = a.H / a.K;
    tile.begin += tile_head % parts * KEYS;
    const int valid = min(tile.end - tile.begin, KEYS);
    if (valid <= 0) return;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
    const bool first_half = threadIdx.x < 128;
    const float scale = float(1 / sqrt(double(D))), to_base_2 = log2_e * scale;

    int steps = 0;
    for (int r = tile.first_range; r < tile.last_range; r++)
        steps += (a.map.ranges[r].end - a.map.ranges[r].begin + QUERIES - 1) / QUERIES;
    steps *= group;
    if (steps == 0 && !a.dkv_out) return;

    auto plan_step = [&](int n) { // by one thread
        if (n >= steps) return;
        const VisitedRange range = a.map.ranges[shared.next_range];
        const int begin = shared.next_begin, end = min(begin + QUERIES, range.end);
        shared.step[n % 8] = {shared.next_head, begin, end, range.masked || valid < KEYS};
        if (end < range.end) {
            shared.next_begin = end;
        } else {
            const bool more = shared.next_range + 1 < tile.last_range;
            shared.next_range = more ? shared.next_range + 1 : tile.first_range, shared.next_head += !more;
            shared.next_begin = a.map.ranges[shared.next_range].begin;
        }
    };
    // LSE or delta of one query, by each thread of the last four warps; stored when it has come, a step later.
    constexpr int rows = 2 * QUERIES;
    static_assert(rows <= 128);
    const int row_thread = int(threadIdx.x) - 128, row_query = row_thread % QUERIES;
    const bool row_is_delta = row_thread >= QUERIES;
    float row_value = 0;
    auto store_rows = [&](int n) {
        if (row_thread < 0 || row_thread >= rows) return;
        float* to = row_is_delta ? shared.minus_delta[n % 3] : shared.start[n % 3];
        // A query that saw nothing has LSE = -inf and gets P = 0.
        to[row_query] = row_value == -INFINITY ? -INFINITY : row_is_delta ? -row_value : -row_value / scale;
    };
    const TileCopy<D, 256> copy;
    auto load_step = [&](int n, const QueryStep& at) {
        const int stage = n % 3, count = n < steps ? at.end - at.begin : 0;
        const size_t t = at.begin;
        copy.template tile<QUERIES>(shared_address(shared.q[stage]), a.q + t * a.q_stride + at.head * D,
                                    uint32_t(a.q_stride), count);
        copy.template tile<QUERIES>(shared_address(shared.dout[stage]), a.dout + (t * a.H + at.head) * D, a.H * D,
                                    count);
        if (row_thread >= 0 && row_thread < rows) {
            const float* from = (row_is_delta ? a.delta : a.lse) + size_t(at.head) * a.T + t;
            row_value = row_query < count ? from[row_query] : row_is_delta ? 0 : -INFINITY;
        }
        if (at.masked && threadIdx.x < QUERIES)
            copy_small<8>(shared_address(&shared.q_label[stage][threadIdx.x]), a.q_label + t + threadIdx.x,
                          int(threadIdx.x) < count);
    };

    if (threadIdx.x == 255 && steps > 0) {
        shared.next_head = kv_head * group, shared.next_range = tile.first_range;
        shared.next_begin = a.map.ranges[tile.first_range].begin;
        plan_step(0), plan_step(1);
    }
    if (threadIdx.x < KEYS)
        shared.k_label[threadIdx.x] =
            threadIdx.x < valid ? a.k_label[tile.begin + threadIdx.x] : TokenLabel{0, hidden_doc};
    __syncthreads();
    const bf16* key = a.kv + tile.begin * a.kv_stride + kv_head * D;
    copy.template tile<KEYS>(shared_address(shared.k), key, uint32_t(a.kv_stride), valid);
    copy.template tile<KEYS>(shared_address(shared.v), key + a.K * D, uint32_t(a.kv_stride), valid);
    if (steps > 0) load_step(0, shared.step[0]);
    copies_commit();

    const uint32_t along = lane_along<D>(lane), across = lane_across<D>(lane);
    const int first_row = warp * (KEYS / 4), pair = lane % 4 * 2; // of the lane's fragments
    float sum[M][D / 8][4] = {};                                  // dV or dK
    for (int n = 0; n < steps + 2; n++) {
        copies_wait<0>();
        if (n < steps) store_rows(n);
        __syncthreads(); // step n is here; P^T of n - 1 and dS^T of n - 2 are complete, their readers' stages free
        const QueryStep next = shared.step[(n + 1) % 8];
        // dQ (QUERIES, D) = dS K: a half of the warps takes a half of the queries, and its warps share the columns, or
        // queries too when there are few columns. read() comes when dS has been read.
        auto query_gradient = [&](auto read) {
            constexpr int across_d = D / 16 < 4 ? D / 16 : 4, across_q = 8 / across_d;
            constexpr int MQ = QUERIES / 16 / across_q, ND = D / 16 / across_d;
            static_assert(MQ > 0);
            if (n < 2 || !a.dq) return read();
            const int number = threadIdx.x / 32, m_first = number / across_d * MQ, d_first = number % across_d * ND;
            float dq[MQ][2 * ND][4] = {};
            const uint32_t ds = shared_address(shared.ds) + lane_across<QUERIES>(lane);
            const uint32_t k = shared_address(shared.k) + along;
#pragma unroll
            for (int depth = 0; depth < KEYS / 16; depth++) {
                uint32_t x[MQ][4];
#pragma unroll
                for (int m = 0; m < MQ; m++)
                    load_matrices_transposed(x[m], (ds ^ ((m_first + m) << 5)) + depth * 32 * QUERIES);
#pragma unroll
                for (int d = 0; d < ND; d++) {
                    uint32_t b[4];
                    load_matrices_transposed(b, (k ^ ((d_first + d) << 5)) + depth * 32 * D);
#pragma unroll
                    for (int m = 0; m < MQ; m++) {
                        multiply_add(dq[m][2 * d], x[m], b[0], b[1]);
                        multiply_add(dq[m][2 * d + 1], x[m], b[2], b[3]);
                    }
                }
            }
            read();
            const QueryStep at = shared.step[(n - 2) % 8];
#pragma unroll
            for (int m = 0; m < MQ; m++)
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    const int t = at.begin + (m_first + m) * 16 + half * 8 + lane / 4;
                    float* to = a.dq + (size_t(t) * a.H + at.head) * D + d_first * 16;
#pragma unroll
                    for (int d = 0; d < ND; d++)
                        add_to_sixteen(to + d * 16, lane, t < at.end, dq[m][2 * d][2 * half] * scale,
                                       dq[m][2 * d][2 * half + 1] * scale, dq[m][2 * d + 1][2 * half] * scale,
                                       dq[m][2 * d + 1][2 * half + 1] * scale);
                }
        };
        auto load_next = [&] { load_step(n + 1, next), copies_commit(); };

        if (first_half) {
            query_gradient([] { barrier_tell<1, 256>(); });
            if (n >= steps) continue;
            const int stage = n % 3;
            const bool masked = shared.step[n % 8].masked;
            float s[M][N][4];
            scores_start(s, [&](int column) { return *(const float2*)&shared.start[stage][column + pair]; });
            scores<D>(s, shared_address(shared.k) + first_row * row_bytes + along,
                      shared_address(shared.q[stage]) + across, load_next);
            if (masked) {
                TokenLabel k[M][2];
#pragma unroll
                for (int i = 0; i < 2 * M; i++) k[i / 2][i % 2] = shared.k_label[first_row + i * 8 + lane / 4];
#pragma unroll
                for (int i = 0; i < 2 * N; i++) {
                    const TokenLabel q = shared.q_label[stage][i / 2 * 8 + pair + i % 2];
#pragma unroll
                    for (int r = 0; r < 2 * M; r++)
                        if (!visible(q.index, q.doc, k[r / 2][r % 2].index, k[r / 2][r % 2].doc))
                            s[r / 2][i / 2][r % 2 * 2 + i % 2] = -INFINITY;
                }
            }
            uint4* exchange = shared.p[n % 2] + warp * 32 + lane;
            uint4 halves;
            auto probabilities = [&](int chunk, int m, int r) {
                const float* x = &s[m][2 * chunk + r / 2][r % 2 * 2];
                const float p0 = exp2_approximate(x[0] * to_base_2), p1 = exp2_approximate(x[1] * to_base_2);
                (&halves.x)[r] = half_pair(p0, p1);
                if (r == 3) exchange[(chunk * M + m) * 128] = halves;
                return bf16_pair(p0, p1);
            };
            multiply_chunks<D, M, CHUNKS>(sum, shared_address(shared.dout[stage]) + along, probabilities,
                                          no_preparation);
        } else {
            if (n >= 1 && n <= steps) {
                const int stage = (n - 1) % 3;
                const uint4* exchange = shared.p[(n - 1) % 2] + warp * 32 + lane;
                uint4 halves[M];
                auto prepare = [&](int chunk) {
#pragma unroll
                    for (int m = 0; m < M; m++) halves[m] = exchange[(chunk * M + m) * 128];
                };
                float dp[M][N][4];
                scores_start(dp, [&](int column) { return *(const float2*)&shared.minus_delta[stage][column + pair]; });
                scores<D>(dp, shared_address(shared.v) + first_row * row_bytes + along,
                          shared_address(shared.dout[stage]) + across, load_next);
                const uint32_t ds = shared_address(shared.ds) + tile_address<QUERIES>(lane / 4, 0) + 2 * pair;
                query_gradient([&] { prepare(0); });
                barrier_wait<1, 256>(); // dS^T of the step before has been read
                auto gradients = [&](int chunk, int m, int r) {
                    const float2 p = half_unpack((&halves[m].x)[r]);
                    const float* x = &dp[m][2 * chunk + r / 2][r % 2 * 2];
                    const uint32_t both = bf16_pair(p.x * x[0], p.y * x[1]);
                    const int row = first_row + m * 16 + r % 2 * 8;
                    asm volatile("st.shared.b32 [%0], %1;" ::"r"((ds ^ ((2 * chunk + r / 2) << 4)) + row * 2 * QUERIES),
                                 "r"(both));
                    return both;
                };
                multiply_chunks<D, M, CHUNKS>(sum, shared_address(shared.q[stage]) + along, gradients, prepare);
            } else {
                load_next();
                query_gradient([] {});
                barrier_wait<1, 256>();
            }
            if (threadIdx.x == 255) plan_step(n + 2); // this half waits for the other one anyway
        }
    }

    // dV (first half) and dK, in place of V and K: to storage by whole rows, or added to what is there.
    copies_wait<0>();
    __syncthreads();
    const int value = first_half;
    bf16* staged = value ? shared.v : shared.k;
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int row = first_row + m * 16 + half * 8 + lane / 4;
            const bool anchor = a.danchor && row < valid && shared.k_label[row].doc == hidden_doc;
            const float* danchor = a.danchor + ((size_t(tile.row) * 2 + value) * a.K + kv_head) * D + pair;
            float* to = a.dkv + ((size_t(tile.begin) + row) * 2 + value) * a.K * D + kv_head * D + pair;
#pragma unroll
            for (int d = 0; d < D / 8; d++) {
                float x = sum[m][d][2 * half], y = sum[m][d][2 * half + 1];
                if (!value) x *= scale, y *= scale;
                if (a.dkv_out) {
                    if (anchor) x += danchor[d * 8], y += danchor[d * 8 + 1];
                    *(uint32_t*)((uint8_t*)staged + tile_address<D>(row, d) + 2 * pair) = bf16_pair(x, y);
                } else if (row < valid) {
                    float2* both = (float2*)(to + d * 8);
                    const float2 before = *both;
                    *both = make_float2(before.x + x, before.y + y);
                }
            }
        }
    if (!a.dkv_out) return;
    __syncwarp(); // a warp's own rows
#pragma unroll
    for (int i = 0; i < KEYS * D / 8 / 128; i++) {
        const int line = first_row + (i * 32 + lane) / (D / 8), chunk = lane % (D / 8);
        const uint4 x = *(const uint4*)((const uint8_t*)staged + tile_address<D>(line, chunk));
        bf16* to = a.dkv_out + (size_t(tile.begin) + line) * a.dkv_out_stride + (value * a.K + kv_head) * D + chunk * 8;
        if (line < valid) *(uint4*)to = x;
    }
}

template <int D> struct QueryGradientShared {
    bf16 q[64 * D], dout[64 * D], k[64 * D], v[64 * D];
    TokenLabel k_label[64];
    TileList<4> list;
};

// dQ alone and in a fixed order, for runs that must repeat bit by bit: a block takes 64 queries of one head, a warp 16
// of them, and goes through the tiles of keys that visit one of them, in the map's order. It computes S and dP once
// more.
template <int D> __global__ void __launch_bounds__(128, 3)
    attention_mma_dq_kernel(const __grid_constant__ AttentionBackward<bf16> a, int blocks) {
    extern __shared__ __align__(1024) uint8_t shared_memory[];
    auto& shared = *(QueryGradientShared<D>*)shared_memory;
    const int head = blockIdx.x / blocks, begin = (blocks - 1 - blockIdx.x % blocks) * 64, end = min(begin + 64, a.T);
    const int kv_head = head / (a.H / a.K), lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const float scale = float(1 / sqrt(double(D))), to_base_2 = log2_e * scale;
    const TileCopy<D, 128> copy;
    copy.template tile<64>(shared_address(shared.q), a.q + begin * a.q_stride + head * D, uint32_t(a.q_stride),
                           end - begin);
    copy.template tile<64>(shared_address(shared.dout), a.dout + (size_t(begin) * a.H + head) * D, a.H * D,
                           end - begin);
    copies_commit();

    float minus_lse[2], delta[2];
    TokenLabel mine[2];
    const int t = begin + warp * 16 + lane / 4; // and t + 8
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const size_t row = size_t(head) * a.T + t + 8 * half;
        const bool valid = t + 8 * half < end;
        const float lse = valid ? a.lse[row] : -INFINITY;
        minus_lse[half] = lse == -INFINITY ? -INFINITY : -lse * log2_e;
        delta[half] = valid ? a.delta[row] : 0;
        mine[half] = valid ? a.q_label[t + 8 * half] : TokenLabel{-1, -1};
    }
    const uint32_t along = lane_along<D>(lane), across = lane_across<D>(lane), first_row = warp * 16 * 2 * D;
    float dq[1][D / 8][4] = {};
    for (int first = 0; first < a.map.count; first += 128) {
        const int count = tiles_that_visit(shared.list, a.map, first, begin, end);
        for (int i = 0; i < count; i++) {
            const MapTile tile = a.map.tiles[shared.list.tile[i]];
            const Span queries = visited(a.map, tile);
            bool all = false;
            for (int r = tile.first_range; r < tile.last_range; r++)
                all |= !a.map.ranges[r].masked && a.map.ranges[r].begin <= begin && a.map.ranges[r].end >= end;
            for (int from = tile.begin; from < tile.end; from += 64) {
                const int valid = tile.end - from;
                const bf16* key = a.kv + from * a.kv_stride + kv_head * D;
                __syncthreads();
                copy.template tile<64>(shared_address(shared.k), key, uint32_t(a.kv_stride), valid);
                copy.template tile<64>(shared_address(shared.v), key + a.K * D, uint32_t(a.kv_stride), valid);
                if (threadIdx.x < 64)
                    shared.k_label[threadIdx.x] =
                        threadIdx.x < valid ? a.k_label[from + threadIdx.x] : TokenLabel{0, hidden_doc};
                copies_commit(), copies_wait<0>();
                __syncthreads();
                float s[1][8][4] = {}, dp[1][8][4] = {};
                scores<D>(s, shared_address(shared.q) + first_row + along, shared_address(shared.k) + across,
                          nothing_aside);
                scores<D>(dp, shared_address(shared.dout) + first_row + along, shared_address(shared.v) + across,
                          nothing_aside);
                if (!all || valid < 64)
#pragma unroll
                    for (int j = 0; j < 16; j++) {
                        const TokenLabel k = shared.k_label[j / 2 * 8 + lane % 4 * 2 + j % 2];
#pragma unroll
                        for (int half = 0; half < 2; half++)
                            if (!queries.holds(t + 8 * half) ||
                                !visible(mine[half].index, mine[half].doc, k.index, k.doc))
                                s[0][j / 2][2 * half + j % 2] = -INFINITY;
                    }
                auto gradients = [&](int chunk, int, int r) {
                    const float *x = &s[0][2 * chunk + r / 2][r % 2 * 2], *y = &dp[0][2 * chunk + r / 2][r % 2 * 2];
                    const float p0 = exp2_approximate(x[0] * to_base_2 + minus_lse[r % 2]);
                    const float p1 = exp2_approximate(x[1] * to_base_2 + minus_lse[r % 2]);
                    return bf16_pair(p0 * (y[0] - delta[r % 2]), p1 * (y[1] - delta[r % 2]));
                };
                multiply_chunks<D, 1, 4>(dq, shared_address(shared.k) + along, gradients, no_preparation);
            }
        }
        __syncthreads();
    }
    copies_wait<0>();
#pragma unroll
    for (int half = 0; half < 2; half++)
#pragma unroll
        for (int n = 0; n < D / 8; n++) {
            if (t + 8 * half >= end) continue;
            float2* to = (float2*)(a.dq + (size_t(t + 8 * half) * a.H + head) * D + n * 8 + lane % 4 * 2);
            const float2 before = *to;
            *to = make_float2(before.x + scale * dq[0][n][2 * half], before.y + scale * dq[0][n][2 * half + 1]);
        }
}

constexpr bool attention_mma_takes(size_t D) { return D == 32 || D == 64 || D == 128; }
inline AttentionTiles attention_mma_tiles(size_t D) {
    REQUIRE(attention_mma_takes(D), "take attention_simt for such a head size");
    return {128, 64, 64, 128};
}

template <class A> void attention_mma_require(const A& a) {
    attention_require(a, 128);
    REQUIRE(a.q_stride < size_t(1) << 31 && a.kv_stride < size_t(1) << 31, "a token has fewer than 2^31 elements");
    REQUIRE(packs_fit<bf16>(a.q_stride, a.q, a.kv) && a.kv_stride % 8 == 0, "queries and keys start on 16 bytes");
}

// The keys of a tile are as many as the GPU's shared memory allows: 228 KiB a multiprocessor on Hopper, 164 on an A100,
// 100 on sm_86 and sm_89.
constexpr size_t least_shared_memory = size_t(100) << 10; // of any GPU from sm_80 on
constexpr bool blocks_fit(size_t blocks, size_t bytes, size_t shared) { return blocks * (bytes + 1024) <= shared; }

// Two blocks a multiprocessor, so that one computes exponentials while the other multiplies.
template <int D> int attention_mma_forward_keys(Gpu gpu) {
    const bool fits = D < 128 || blocks_fit(2, sizeof(ForwardShared<D, 64, 4>), gpu.context->shared_bytes);
    return fits ? 64 : 32;
}
template <int D> int attention_mma_backward_keys(Gpu gpu) {
    const bool fits = D < 64 || blocks_fit(1, sizeof(BackwardShared<D, 128, 64>), gpu.context->shared_bytes);
    return fits ? 128 : 64;
}

template <int D, int KEYS> void attention_mma_forward_tiles(Gpu gpu, const AttentionForward<bf16>& a) {
    auto* kernel = attention_mma_forward_kernel<D, KEYS, 4>;
    constexpr size_t bytes = sizeof(ForwardShared<D, KEYS, 4>);
    allow_shared_memory(gpu, kernel, bytes);
    const int together = heads_together(gpu, a.Tk, 2 * D * sizeof(bf16), a.K) * (a.H / a.K);
    kernel<<<grid_blocks(size_t(a.map.count) * a.H), 128, bytes, gpu.stream>>>(a, together);
    CUDA_CHECK(cudaGetLastError());
}

template <int D> void attention_mma_forward_heads(Gpu gpu, const AttentionForward<bf16>& a) {
    constexpr int fewest = D < 128 ? 64 : 32;
    static_assert(blocks_fit(1, sizeof(ForwardShared<D, fewest, 4>), least_shared_memory));
    if (attention_mma_forward_keys<D>(gpu) == 64) attention_mma_forward_tiles<D, 64>(gpu, a);
    else if constexpr (D == 128) attention_mma_forward_tiles<D, 32>(gpu, a);
}

inline void attention_mma_forward(Gpu gpu, const AttentionForward<bf16>& a) {
    attention_mma_require(a);
    if (a.map.count == 0) return;
    if (a.D == 128) attention_mma_forward_heads<128>(gpu, a);
    else if (a.D == 64) attention_mma_forward_heads<64>(gpu, a);
    else if (a.D == 32) attention_mma_forward_heads<32>(gpu, a);
    else REQUIRE(false, "take attention_simt for such a head size");
}

// A tile of 128 keys is given to 128 / KEYS blocks.
template <int D, int KEYS, int QUERIES> void attention_mma_backward_tiles(Gpu gpu, const AttentionBackward<bf16>& a) {
    auto* kernel = attention_mma_backward_kernel<D, KEYS, QUERIES>;
    constexpr size_t bytes = sizeof(BackwardShared<D, KEYS, QUERIES>), parts = 128 / KEYS;
    allow_shared_memory(gpu, kernel, bytes);
    const size_t query_bytes = a.H / a.K * D * (2 * sizeof(bf16) + sizeof(float)); // Q, dO, dQ of a KV head's group
    const int together = heads_together(gpu, a.T, query_bytes, a.K);
    kernel<<<grid_blocks(a.map.count * parts * a.K), 256, bytes, gpu.stream>>>(a, together, int(parts));
    CUDA_CHECK(cudaGetLastError());
}

template <int D> void attention_mma_backward_heads(Gpu gpu, const AttentionBackward<bf16>& a) {
    constexpr int fewest = D < 64 ? 128 : 64;
    static_assert(blocks_fit(1, sizeof(BackwardShared<D, fewest, fewest / 2>), least_shared_memory));
    static_assert(blocks_fit(1, sizeof(QueryGradientShared<D>), least_shared_memory));
    AttentionBackward<bf16> by_keys = a;
    if (gpu.context->deterministic) by_keys.dq = nullptr;
    if (attention_mma_backward_keys<D>(gpu) == 128) attention_mma_backward_tiles<D, 128, 64>(gpu, by_keys);
    else if constexpr (D >= 64) attention_mma_backward_tiles<D, 64, 32>(gpu, by_keys);
    if (!gpu.context->deterministic || a.T == 0) return;
    const size_t blocks = (size_t(a.T) + 63) / 64;
    allow_shared_memory(gpu, attention_mma_dq_kernel<D>, sizeof(QueryGradientShared<D>));
    attention_mma_dq_kernel<D>
        <<<grid_blocks(blocks * a.H), 128, sizeof(QueryGradientShared<D>), gpu.stream>>>(a, int(blocks));
    CUDA_CHECK(cudaGetLastError());
}

inline void attention_mma_backward(Gpu gpu, const AttentionBackward<bf16>& a) {
    attention_mma_require(a);
    REQUIRE(packs_fit<bf16>(a.dkv_out ? a.dkv_out_stride : 8, a.dout, a.dkv_out), "gradients start on 16 bytes");
    if (a.map.count == 0) return;
    if (a.D == 128) attention_mma_backward_heads<128>(gpu, a);
    else if (a.D == 64) attention_mma_backward_heads<64>(gpu, a);
    else if (a.D == 32) attention_mma_backward_heads<32>(gpu, a);
    else REQUIRE(false, "take attention_simt for such a head size");
}
#endif
