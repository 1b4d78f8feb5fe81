// Matrix products of the linear layers: forward, gradient of the input, gradient of the weight.
//
// A linear layer takes T tokens from M to N channels; its weight is (N, M), as Hugging Face stores it:
//
//     forward           out(T, N)      = in(T, M) weight(N, M)^T + bias(N) + residual(T, N)
//     backward_input    din(T, M)      = dout(T, N) weight(N, M)
//     backward_weight   dweight(N, M) += dout(T, N)^T in(T, M)
//                       dbias(N)      += sum over t of dout(t, N)
//
// All three are one product C(m, n) = A(m, k) B(k, n). An operand is a pointer and two strides, so a
// transpose is only another order of packing. The scheme is GotoBLAS's (Goto and van de Geijn 2008; the
// names are BLIS's, Van Zee and van de Geijn 2015), with each block of C a task of its own, no barriers:
//
//            n                  for each block of C                             one OpenMP task
//        +---+----+                 for each kc of k
//     k  |   | B  |                     pack B(kc, block's columns)                 512 KB, stays in L2
//        +---+----+                     for each 8 MR rows of the block
//     +---+  +---+----+                     pack A(8 MR, kc)                        128 KB, L2
//   m | A |  |   | C  |                     for each MR rows                        A panel 16 KB, stays in L1
//     +---+  +---+----+                         for each NR columns                 B panel 32 KB, streamed
//                                                   tile(MR, NR) += A B             in registers
//                                                   after the last kc: store(tile)  along the rows of C
//
// (Sizes for AVX-512.) C is written along its rows: down a column every line would lie in another page,
// which cost a fifth where k is short. Eight panels of A are packed together, since one alone would take
// less than a line from each of kc rows of a transposed operand.
//
// Packing converts to Acc<E> and pads with zeros, so the kernel knows one type and one size. Between
// two kc the tiles wait in Acc<E>; an element is rounded to its storage type once, after bias, residual
// or the old gradient were added. Every element is summed over k in the same order, kc at a time,
// whatever the blocks and threads: the bits do not depend on the number of threads. (The forward of up to
// 4 rows, for generation, sums in an order of its own.)
//
// Measured in float on 2 cores of a Sapphire Rapids (model 207), T = 4096 or the head's 512, 256 to 1024
// channels: 260 to 300 GF/s, 91% to 113% of OpenBLAS 0.3.21's sgemm with its SkylakeX kernels, whose peak
// here is 313 (dev/bench_cpu.cpp). On one core double reaches 0.5 of float, bf16 0.8 (forward) to 1.
#pragma once
#include "../core/vector.h"
#include <algorithm>
#include <omp.h>
#include <utility>

// The accumulators of an MR x NR tile, NR being two vectors, fill the registers but for two of B and a
// broadcast of A: 28 + 3 of 32 (AVX-512), 12 + 3 of 16 (AVX2). A step of k then takes MR + 2 loads for
// 2 MR FMAs, and as many of these are in flight: the FMA units are the bound.
constexpr size_t gemm_mr = vector_bytes == 64 ? 14 : vector_bytes == 32 ? 6 : 4;

typedef uint32_t GemmBits __attribute__((vector_size(vector_bytes)));
typedef uint16_t GemmHalves __attribute__((vector_size(vector_bytes / 2), aligned(2), may_alias));

template <class A> struct GemmSizes {
    static constexpr size_t width = vector_lanes<A>;
    static constexpr size_t mr = gemm_mr, nr = 2 * width;
    static constexpr size_t a_pitch = (mr + width - 1) / width * width;     // packed rows are whole vectors
    static constexpr size_t kc = 256, group = 8;                            // group: A panels packed together
    static constexpr size_t rows = 5 * group * mr, cols = 2048 / sizeof(A); // a block of C at most: 1.1 MB of tiles
    static constexpr size_t a_panel = kc * a_pitch, b_panel = kc * nr, tile = mr * nr;
};

// Products that are worth waking another thread: 4 us at 140 GF/s.
constexpr size_t gemm_grain = 1 << 18;

constexpr size_t gemm_pieces(size_t size, size_t piece) { return (size + piece - 1) / piece; }

template <class A, class E> inline typename NativeVector<A>::type gemm_load(const E* p) {
    using V = typename NativeVector<A>::type;
    if constexpr (std::is_same_v<E, bf16>) return (V)(__builtin_convertvector(*(const GemmHalves*)p, GemmBits) << 16);
    else return *(const typename NativeVector<A>::loose*)p;
}

// out[0], out[1] = a0 b0 a1 b1 ..: the lower halves of a and b interleaved, then the upper.
template <class V> inline void gemm_zip(V* out, V a, V b) {
    constexpr size_t width = sizeof(V) / sizeof(a[0]);
    if constexpr (width == 16) {
        out[0] = __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
        out[1] = __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
    } else if constexpr (width == 8) {
        out[0] = __builtin_shufflevector(a, b, 0, 8, 1, 9, 2, 10, 3, 11);
        out[1] = __builtin_shufflevector(a, b, 4, 12, 5, 13, 6, 14, 7, 15);
    } else if constexpr (width == 4) {
        out[0] = __builtin_shufflevector(a, b, 0, 4, 1, 5);
        out[1] = __builtin_shufflevector(a, b, 2, 6, 3, 7);
    } else {
        out[0] = __builtin_shufflevector(a, b, 0, 2);
        out[1] = __builtin_shufflevector(a, b, 1, 3);
    }
}

// Column j of the width x width square at `source` (rows `stride` apart, zero from row `valid` on) goes
// to target + j * pitch. Zipping row i with row i + width/2 turns the bits of the index (row, lane) by
// one place, so after log2(width) rounds row and lane have changed places.
template <class A, class E>
inline void gemm_transpose(A* target, size_t pitch, const E* source, size_t stride, size_t valid) {
    using V = typename NativeVector<A>::type;
    constexpr int width = GemmSizes<A>::width;
    constexpr auto all = std::make_integer_sequence<int, width>{};
    constexpr auto half = std::make_integer_sequence<int, width / 2>{};
    V x[width], y[width];
    unroll([&](int i) { x[i] = size_t(i) < valid ? gemm_load<A>(source + i * stride) : V{}; }, all);
    for (int round = 1; round < width; round *= 2) {
        unroll([&](int i) { gemm_zip(y + 2 * i, x[i], x[i + width / 2]); }, half);
        unroll([&](int i) { x[i] = y[i]; }, all);
    }
    unroll([&](int i) { *(V*)(target + i * pitch) = x[i]; }, all);
}

// Element (lane, k) is data[lane * lane_stride + k * k_stride], one of the strides being 1. The lanes
// of A are the rows of C, those of B its columns.
template <class E> struct GemmOperand {
    const E* data;
    size_t lanes, lane_stride, k_stride;
};

// Packs lanes [first, last) for k in [k0, k0 + kc): panel p holds the `pitch` lanes from first + p * step
// on, element (lane, k) at [k][lane], zero beyond the last lane of x.
template <class A, size_t step, size_t pitch, class E>
void gemm_pack(A* target, const GemmOperand<E>& x, size_t first, size_t last, size_t k0, size_t kc) {
    using S = GemmSizes<A>;
    using V = typename NativeVector<A>::type;
    const E* source = x.data + first * x.lane_stride + k0 * x.k_stride;
    size_t panels = gemm_pieces(last - first, step), room = x.lanes - first, whole = 0;
    if (x.k_stride != 1 && room >= pitch) whole = std::min(panels, (room - pitch) / step + 1);
    for (size_t k = 0; whole && k < kc; k++)
        for (size_t p = 0; p < whole; p++)
            for (size_t lane = 0; lane < pitch; lane += S::width)
                *(V*)(target + (p * S::kc + k) * pitch + lane) =
                    gemm_load<A>(source + k * x.k_stride + p * step + lane);

    for (size_t p = whole; p < panels; p++) {
        A* panel = target + p * S::kc * pitch;
        const E* from = source + p * step * x.lane_stride;
        size_t valid = std::min(pitch, room - p * step), k = 0;
        for (; x.k_stride == 1 && k + S::width <= kc; k += S::width)
            for (size_t lane = 0; lane < pitch; lane += S::width)
                gemm_transpose(panel + k * pitch + lane, pitch, from + lane * x.lane_stride + k, x.lane_stride,
                               valid - std::min(lane, valid));
        for (; k < kc; k++)
            for (size_t lane = 0; lane < pitch; lane++)
                panel[k * pitch + lane] = lane < valid ? A(from[lane * x.lane_stride + k * x.k_stride]) : A(0);
    }
}

// tile(MR, NR) = a(kc, MR)^T b(kc, NR), or += that.
template <class A> void gemm_tile(A* tile, const A* a, const A* b, size_t kc, bool add) {
    using S = GemmSizes<A>;
    using V = typename NativeVector<A>::type;
    constexpr auto rows = std::make_integer_sequence<int, S::mr>{};
    V sum[S::mr][2] = {};
    for (size_t k = 0; k < kc; k++, a += S::a_pitch, b += S::nr) {
        V b0 = ((const V*)b)[0], b1 = ((const V*)b)[1];
        unroll([&](int i) { sum[i][0] += a[i] * b0, sum[i][1] += a[i] * b1; }, rows);
    }
    V* c = (V*)tile;
    if (add) unroll([&](int i) { sum[i][0] += c[2 * i], sum[i][1] += c[2 * i + 1]; }, rows);
    unroll([&](int i) { c[2 * i] = sum[i][0], c[2 * i + 1] = sum[i][1]; }, rows);
}

struct GemmBlock {
    size_t row, col, rows, cols;
};

// One block of C. store(row, col, count, sum): what becomes of `count` finished sums of one row.
template <class A, class E, class Store>
void gemm_block(const GemmOperand<E>& a, const GemmOperand<E>& b, size_t k, GemmBlock block, A* scratch, Store store) {
    using S = GemmSizes<A>;
    const size_t row0 = block.row, row1 = row0 + block.rows, col0 = block.col, col1 = col0 + block.cols;
    A *a_packed = scratch, *b_packed = a_packed + S::group * S::a_panel;
    A* tiles = b_packed + gemm_pieces(block.cols, S::nr) * S::b_panel;
    for (size_t k0 = 0; k0 < k; k0 += S::kc) {
        size_t kc = std::min(S::kc, k - k0);
        gemm_pack<A, S::nr, S::nr>(b_packed, b, col0, col1, k0, kc);
        A* tile = tiles;
        for (size_t row = row0; row < row1; row += S::mr) {
            size_t in_group = (row - row0) / S::mr % S::group;
            if (in_group == 0)
                gemm_pack<A, S::mr, S::a_pitch>(a_packed, a, row, std::min(row1, row + S::group * S::mr), k0, kc);
            const A *a_panel = a_packed + in_group * S::a_panel, *b_panel = b_packed;
            for (size_t col = col0; col < col1; col += S::nr, b_panel += S::b_panel) {
                gemm_tile(tile, a_panel, b_panel, kc, k0 > 0);
                if (k0 + kc == k)
                    for (size_t r = 0; r < std::min(S::mr, row1 - row); r++)
                        store(row + r, col, std::min(S::nr, col1 - col), tile + r * S::nr);
                if (k > S::kc) tile += S::tile;
            }
        }
    }
}

// The size of a block for which the slowest thread has the least to do. For each k an element of a tile
// costs 1, which is 1 / (2 width) of a cycle, and one to be packed `width`, half a cycle.
template <class A> GemmBlock gemm_block_size(size_t m, size_t n, size_t threads) {
    using S = GemmSizes<A>;
    size_t x0 = gemm_pieces(m, S::rows), y0 = gemm_pieces(n, S::cols), least = SIZE_MAX;
    GemmBlock best = {};
    for (size_t x = x0; x < x0 + threads; x++)
        for (size_t y = y0; y < y0 + threads; y++) {
            size_t rows = gemm_pieces(gemm_pieces(m, x), S::mr) * S::mr;
            size_t cols = gemm_pieces(gemm_pieces(n, y), S::nr) * S::nr;
            size_t rounds = gemm_pieces(gemm_pieces(m, rows) * gemm_pieces(n, cols), threads);
            size_t cost = rounds * (rows * cols + S::width * (rows + cols));
            if (cost < least) least = cost, best = {0, 0, rows, cols};
        }
    return best;
}

template <class A, class E, class Store>
void gemm(const GemmOperand<E>& a, const GemmOperand<E>& b, size_t k, Store store) {
    using S = GemmSizes<A>;
    const size_t m = a.lanes, n = b.lanes;
    if (m == 0 || n == 0) return;
    const size_t threads = std::min<size_t>(omp_get_max_threads(), 1 + m * n * k / gemm_grain);
    const GemmBlock size = gemm_block_size<A>(m, n, threads);
    const size_t across = gemm_pieces(n, size.cols), blocks = gemm_pieces(m, size.rows) * across;
    const size_t tiles = k > S::kc ? size.rows / S::mr * (size.cols / S::nr) : 1;
    const size_t scratch = S::group * S::a_panel + size.cols / S::nr * S::b_panel + tiles * S::tile;
#pragma omp parallel if (blocks > 1)
    {
        VectorScratch<A> mine(scratch);
#pragma omp for schedule(dynamic)
        for (size_t i = 0; i < blocks; i++) {
            size_t row = i / across * size.rows, col = i % across * size.cols;
            gemm_block(a, b, k, {row, col, std::min(size.rows, m - row), std::min(size.cols, n - col)}, mine.data(),
                       store);
        }
    }
}

// A product of two contiguous rows, in four interleaved chains of FMAs to hide their latency.
template <class A, class E> A gemm_dot(const E* a, const E* b, size_t count) {
    using V = typename NativeVector<A>::type;
    constexpr size_t width = GemmSizes<A>::width;
    V sum[4] = {};
    size_t i = 0;
    for (; i + 4 * width <= count; i += 4 * width)
        for (size_t j = 0; j < 4; j++) sum[j] += gemm_load<A>(a + i + j * width) * gemm_load<A>(b + i + j * width);
    sum[0] = (sum[0] + sum[1]) + (sum[2] + sum[3]);
    A total = 0;
    for (; i < count; i++) total += A(a[i]) * A(b[i]);
    for (size_t j = 0; j < width; j++) total += sum[0][j];
    return total;
}

// in (T, M), weight (N, M), bias (N) or null, residual (T, N) or null; residual may be out. Up to
// `few_rows` rows (generation) go row by row without packing, which would take longer than the product.
template <class E> void matmul_forward(Cpu, E* out, const E* in, const E* weight, const E* bias, const E* residual,
                                       size_t T, size_t M, size_t N) {
    using A = Acc<E>;
    REQUIRE(M > 0 && N > 0, "a linear layer has at least one channel in and out");
    constexpr size_t few_rows = 4;
    if (T <= few_rows) {
#pragma omp parallel for schedule(static) if (T * M * N > gemm_grain)
        for (size_t n = 0; n < N; n++)
            for (size_t t = 0; t < T; t++) {
                A sum = gemm_dot<A>(in + t * M, weight + n * M, M);
                if (bias) sum += A(bias[n]);
                if (residual) sum += A(residual[t * N + n]);
                out[t * N + n] = E(sum);
            }
        return;
    }
    gemm<A, E>({in, T, M, 1}, {weight, N, M, 1}, M, [=](size_t t, size_t n, size_t count, A* sum) {
        if (bias) {
#pragma omp simd
            for (size_t j = 0; j < count; j++) sum[j] += A(bias[n + j]);
        }
        if (residual) {
#pragma omp simd
            for (size_t j = 0; j < count; j++) sum[j] += A(residual[t * N + n + j]);
        }
#pragma omp simd
        for (size_t j = 0; j < count; j++) out[t * N + n + j] = E(sum[j]);
    });
}

// din (T, M) = dout (T, N) weight (N, M)
template <class E>
void matmul_backward_input(Cpu, E* din, const E* dout, const E* weight, size_t T, size_t M, size_t N) {
    using A = Acc<E>;
    REQUIRE(M > 0 && N > 0, "a linear layer has at least one channel in and out");
    gemm<A, E>({dout, T, N, 1}, {weight, M, 1, M}, N, [=](size_t t, size_t m, size_t count, A* sum) {
#pragma omp simd
        for (size_t j = 0; j < count; j++) din[t * M + m + j] = E(sum[j]);
    });
}

// dweight (N, M) += dout (T, N)^T in (T, M); dbias (N) += the sum of dout's rows, unless null. The
// gradients are of their own type G: the sum over the T tokens is complete before it is added.
template <class E, class G>
void matmul_backward_weight(Cpu, G* dweight, G* dbias, const E* dout, const E* in, size_t T, size_t M, size_t N) {
    using A = Acc<E>;
    REQUIRE(M > 0 && N > 0, "a linear layer has at least one channel in and out");
    gemm<A, E>({dout, N, 1, N}, {in, M, 1, M}, T, [=](size_t n, size_t m, size_t count, A* sum) {
#pragma omp simd
        for (size_t j = 0; j < count; j++) dweight[n * M + m + j] = G(dweight[n * M + m + j] + sum[j]);
    });
    if (!dbias || T == 0) return;
    constexpr size_t strip = 64, kc = GemmSizes<A>::kc;
#pragma omp parallel for schedule(static)
    for (size_t n0 = 0; n0 < N; n0 += strip) {
        size_t count = std::min(strip, N - n0);
        A sum[strip] = {};
        for (size_t t0 = 0; t0 < T; t0 += kc) {
            A part[strip] = {};
            for (size_t t = t0; t < std::min(T, t0 + kc); t++) {
#pragma omp simd
                for (size_t j = 0; j < count; j++) part[j] += A(dout[t * N + n0 + j]);
            }
            for (size_t j = 0; j < count; j++) sum[j] += part[j];
        }
        for (size_t j = 0; j < count; j++) dbias[n0 + j] = G(dbias[n0 + j] + sum[j]);
    }
}

#ifdef __CUDACC__
#include "matmul_gpu.cuh"
#endif
