// What the deviation experiment of arXiv 2411.13476 is made of: a rotation that rounds where it is told to, and sums
// over the attention weights of two runs that differ only by a shift of all positions.
//
//   a_ij = q_i.k_j / sqrt(D), j <= i         P_ij = exp(a_ij - lse_i)         dP_ij = P_ij(run 1) - P_ij(run 2)
//   column j:  sum_i dP_ij,  sum_i |dP_ij|,  sum_i P_ij(run 2),  sum_i da_ij,  sum_i |da_ij|
//
// Every reading of the paper's D is a sum of these columns, weighed by n_j = 1 / (number of queries that see key j).
// The weights are streamed by tiles: no (T, T) matrix exists.
//
// qkv (T, H + 2K, D): query, key and value heads; the first two rotated, the values only carried along. All numbers are
// in A, which is float or double; "rounded to bf16" leaves them there. lse (H, T); columns (H, 5, T); first (H, T).
#pragma once
#include "../core/fastexp.h"
#include "../layers/convert.cuh"
#include "../layers/matmul.cuh"
#include "../rope.cuh"
#include <optional>

// Where bf16 enters. f32 anywhere but in `angles` means: not rounded below the type that the network computes in.
struct Rounding {
    Type angles = Type::f64;   // of pos inv_freq: f64, f32 (both factors and the product), bf16 (likewise)
    Type input = Type::f32;    // q and k before the rotation; a bf16 network's are so already
    Type table = Type::f32;    // cos and sin
    Type rotation = Type::f32; // both products and their sum
    Type storage = Type::f32;  // rotated q and k, as the dot product gets them
    Type logits = Type::f32;   // the dot product itself, as an unfused product in bf16 stores it
    // P as the operand of P V. None: bf16 in a bf16 network where q and k are stored so, as in training, else f32.
    std::optional<Type> weights = {};
};

struct NamedRounding {
    char letter;
    Rounding rounding;
    const char* meaning;
};
// The experiment's variants. The paper's have fp32 angles, as Hugging Face computes them; E is their limit.
// clang-format off
constexpr Type fp32 = Type::f32, in_bf16 = Type::bf16;
constexpr NamedRounding named_roundings[] = {
    //     angles      input  table    rotation storage logits
    {'E', {Type::f64,  fp32,  fp32,    fp32,    fp32,    fp32}, "nothing rounded, angles in double"},
    {'F', {Type::f32,  fp32,  fp32,    fp32,    fp32,    fp32}, "fp32 throughout (the paper's control)"},
    {'C', {Type::f32,  fp32,  fp32,    fp32,    in_bf16, fp32}, "one rounding of q and k (paper's text)"},
    {'B', {Type::f32,  fp32,  in_bf16, fp32,    in_bf16, fp32}, "bf16 cos, sin, one rounding (flash-attn)"},
    {'A', {Type::f32,  fp32,  in_bf16, in_bf16, in_bf16, fp32}, "bf16 cos, sin, three roundings (HF)"},
    {'D', {Type::bf16, fp32,  in_bf16, in_bf16, in_bf16, fp32}, "bf16 angles, else as A (old transformers)"},
};
// clang-format on

inline const NamedRounding* rounding_by_letter(char letter) {
    for (const NamedRounding& named : named_roundings)
        if (named.letter == letter) return &named;
    return nullptr;
}

HOST_DEVICE inline double study_angle(int32_t pos, double inv_freq, Type angles) {
    if (angles == Type::f32) return double(float(pos) * float(inv_freq));
    return rope_angle(pos, inv_freq, angles == Type::bf16 ? RopePrecision::bf16_angle : RopePrecision::exact);
}
HOST_DEVICE inline RopePrecision study_table_precision(Type table) {
    return table == Type::bf16 ? RopePrecision::bf16_table : RopePrecision::exact;
}
template <class A> HOST_DEVICE A study_rounded(A x) { return A(float(bf16(float(x)))); }

// table (T, D/2, 2): cos, sin of pos (T) and inv_freq (D/2), both in the device's memory.
template <class A> void study_table(Cpu, A* table, const int32_t* pos, const double* inv_freq, double attention_factor,
                                    const Rounding& r, size_t T, size_t D) {
#pragma omp parallel for schedule(static)
    for (size_t t = 0; t < T; t++)
        for (size_t i = 0; i < D / 2; i++)
            rope_cos_sin<A>(table + (t * (D / 2) + i) * 2, study_angle(pos[t], inv_freq[i], r.angles), attention_factor,
                            study_table_precision(r.table));
}

// The first `heads` of every token's `all` heads to the nearest bf16, in place.
template <class A> void study_round(Cpu, A* qkv, size_t T, size_t heads, size_t all, size_t D) {
#pragma omp parallel for schedule(static)
    for (size_t t = 0; t < T; t++)
        for (size_t i = 0; i < heads * D; i++) qkv[t * all * D + i] = study_rounded(qkv[t * all * D + i]);
}

// In place, by the trainer's own rotation. With q and k from a bf16 network, C, B, A and D with the trainer's angles
// give the bits of rope_forward<bf16>.
template <class Dev, class A>
void study_rotate(Dev dev, A* qkv, const A* table, const Rounding& r, size_t T, size_t H, size_t K, size_t D) {
    if (r.input == Type::bf16) study_round(dev, qkv, T, H + K, H + 2 * K, D);
    const auto precision = r.rotation == Type::bf16 ? RopePrecision::bf16_rotation : RopePrecision::exact;
    rope_forward(dev, qkv, table, precision, T, H, K, D);
    if (r.storage == Type::bf16) study_round(dev, qkv, T, H + K, H + 2 * K, D);
}

enum ColumnSum { weight_signed, weight_abs, weight_mass, logit_signed, logit_abs, column_sums };
constexpr size_t study_rows = 64; // queries at once

// One head's queries and keys, each (T, D), and the products of some queries with the keys before them. A thread takes
// whole heads, so its products run on it alone.
template <class A> struct StudyHead {
    std::vector<A> q, k, product;
    size_t D;
    A scale;
    bool round;

    StudyHead(const A* qkv, size_t h, Type logits, size_t T, size_t H, size_t K, size_t D)
        : q(T * D), k(T * D), product(study_rows * T), D(D), scale(A(1 / std::sqrt(double(D)))),
          round(logits == Type::bf16) {
        for (size_t t = 0; t < T; t++) {
            const A* token = qkv + t * (H + 2 * K) * D;
            std::copy_n(token + h * D, D, q.data() + t * D);
            std::copy_n(token + (H + h * K / H) * D, D, k.data() + t * D);
        }
    }
    // Logits (rows, last) of the queries [last - rows, last).
    const A* logits(size_t rows, size_t last) {
        const A* none = nullptr;
        matmul_forward(Cpu{}, product.data(), q.data() + (last - rows) * D, k.data(), none, none, rows, D, last);
#pragma GCC ivdep
        for (size_t i = 0; i < rows * last; i++) product[i] = (round ? study_rounded(product[i]) : product[i]) * scale;
        return product.data();
    }
};

// lse (H, T): logarithm of the sum of e^logit over the keys that a query sees.
template <class A>
void study_lse(Cpu, A* lse, const A* qkv, const Rounding& r, size_t T, size_t H, size_t K, size_t D) {
#pragma omp parallel for schedule(dynamic)
    for (size_t h = 0; h < H; h++) {
        StudyHead<A> head(qkv, h, r.logits, T, H, K, D);
        for (size_t first = 0; first < T; first += study_rows) {
            const size_t last = std::min(first + study_rows, T);
            const A* logits = head.logits(last - first, last);
            for (size_t i = first; i < last; i++) {
                const A* row = logits + (i - first) * last;
                const A most = *std::max_element(row, row + i + 1);
                A sum = 0;
#pragma omp simd reduction(+ : sum)
                for (size_t j = 0; j <= i; j++) sum += fast_exp(row[j] - most);
                lse[h * T + i] = most + std::log(sum);
            }
        }
    }
}

// columns (H, 5, T): the sums above between the runs 1 and 2.
template <class A> void study_columns(Cpu, A* columns, const A* qkv1, const A* lse1, const A* qkv2, const A* lse2,
                                      const Rounding& r, size_t T, size_t H, size_t K, size_t D) {
    std::fill_n(columns, H * column_sums * T, A(0));
#pragma omp parallel for schedule(dynamic)
    for (size_t h = 0; h < H; h++) {
        StudyHead<A> head1(qkv1, h, r.logits, T, H, K, D), head2(qkv2, h, r.logits, T, H, K, D);
        A* sums = columns + h * column_sums * T;
        for (size_t first = 0; first < T; first += study_rows) {
            const size_t last = std::min(first + study_rows, T), keys = 128;
            const A *logits1 = head1.logits(last - first, last), *logits2 = head2.logits(last - first, last);
            for (size_t begin = 0; begin < last; begin += keys) // the sums of so many keys stay in cache
                for (size_t i = std::max(first, begin); i < last; i++) {
                    const A *a1 = logits1 + (i - first) * last, *a2 = logits2 + (i - first) * last;
                    const A l1 = lse1[h * T + i], l2 = lse2[h * T + i];
                    const size_t end = std::min(begin + keys, i + 1);
#pragma GCC ivdep
                    for (size_t j = begin; j < end; j++) {
                        const A p1 = fast_exp(a1[j] - l1), p2 = fast_exp(a2[j] - l2), d = a1[j] - a2[j];
                        sums[weight_signed * T + j] += p1 - p2;
                        sums[weight_abs * T + j] += std::fabs(p1 - p2);
                        sums[weight_mass * T + j] += p2;
                        sums[logit_signed * T + j] += d;
                        sums[logit_abs * T + j] += std::fabs(d);
                    }
                }
        }
    }
}

// first (H, T): every query's logit of the first key.
template <class A>
void study_first(Cpu, A* first, const A* qkv, const Rounding& r, size_t T, size_t H, size_t K, size_t D) {
    const A scale = A(1 / std::sqrt(double(D)));
#pragma omp parallel for schedule(static)
    for (size_t t = 0; t < T; t++)
        for (size_t h = 0; h < H; h++) {
            const A *q = qkv + (t * (H + 2 * K) + h) * D, *k = qkv + (H + h * K / H) * D;
            A dot = 0;
            for (size_t i = 0; i < D; i++) dot += q[i] * k[i];
            first[h * T + t] = (r.logits == Type::bf16 ? study_rounded(dot) : dot) * scale;
        }
}

// Attention in A whose P alone is rounded to bf16, where the trainer's is, so that its P V can be told from q k^T:
//   att_i (T, H, D) = sum_j bf16(p_ij) v_j / sum_j p_ij,   p_ij = exp(a_ij - max_j a_ij)
template <class A> void study_attention(Cpu, A* att, const A* qkv, size_t T, size_t H, size_t K, size_t D) {
#pragma omp parallel for schedule(dynamic)
    for (size_t h = 0; h < H; h++) {
        StudyHead<A> head(qkv, h, Type::f32, T, H, K, D);
        const A* values = qkv + (H + K + h * K / H) * D;
        for (size_t first = 0; first < T; first += study_rows) {
            const size_t last = std::min(first + study_rows, T);
            const A* logits = head.logits(last - first, last);
            for (size_t i = first; i < last; i++) {
                const A* row = logits + (i - first) * last;
                const A most = *std::max_element(row, row + i + 1);
                A *to = att + (i * H + h) * D, sum = 0;
                std::fill_n(to, D, A(0));
                for (size_t j = 0; j <= i; j++) {
                    const A p = fast_exp(row[j] - most), rounded = study_rounded(p);
                    sum += p;
                    for (size_t d = 0; d < D; d++) to[d] += rounded * values[j * (H + 2 * K) * D + d];
                }
                for (size_t d = 0; d < D; d++) to[d] /= sum;
            }
        }
    }
}

#ifdef __CUDACC__
// A thread an entry, in double; once a run, for all layers.
static __global__ void study_table_kernel(float* table, const int32_t* pos, const double* inv_freq,
                                          double attention_factor, Type angles, RopePrecision precision, size_t entries,
                                          unsigned pairs) {
    const size_t entry = size_t(blockIdx.x) * blockDim.x + threadIdx.x;
    if (entry >= entries) return;
    const double angle = study_angle(pos[entry / pairs], inv_freq[entry % pairs], angles);
    rope_cos_sin<float>(table + entry * 2, angle, attention_factor, precision);
}
inline void study_table(Gpu gpu, float* table, const int32_t* pos, const double* inv_freq, double attention_factor,
                        const Rounding& r, size_t T, size_t D) {
    const size_t entries = T * (D / 2);
    study_table_kernel<<<grid_blocks((entries + 127) / 128), 128, 0, gpu.stream>>>(
        table, pos, inv_freq, attention_factor, r.angles, study_table_precision(r.table), entries, unsigned(D / 2));
    CUDA_CHECK(cudaGetLastError());
}

// A block a token.
static __global__ void study_round_kernel(float* qkv, size_t width, size_t stride) {
    for (size_t i = threadIdx.x; i < width; i += blockDim.x)
        qkv[blockIdx.x * stride + i] = study_rounded(qkv[blockIdx.x * stride + i]);
}
inline void study_round(Gpu gpu, float* qkv, size_t T, size_t heads, size_t all, size_t D) {
    study_round_kernel<<<grid_blocks(T), 256, 0, gpu.stream>>>(qkv, heads * D, all * D);
    CUDA_CHECK(cudaGetLastError());
}

// The tile of a block: 64 queries by 64 keys, 256 threads (tx, ty) of 16 x 16 with 4 x 4 products each. D passes
// through shared memory 16 at a time, transposed, so that a thread reads its 4 queries and 4 keys in two accesses.
constexpr unsigned study_tile = 64, study_chunk = 16, study_threads = 256;
struct StudyOperand {
    float value[study_chunk][study_tile + 4];
};

// Rows [first, first + 64) of x (T, D), `stride` apart, dimensions [d, d + 16); zero outside.
__device__ inline void study_load(StudyOperand& to, const float* x, size_t stride, unsigned first, unsigned T,
                                  unsigned d, unsigned D) {
    const unsigned row = threadIdx.x / 4, column = threadIdx.x % 4 * 4;
#pragma unroll
    for (unsigned i = 0; i < 4; i++) {
        const bool inside = first + row < T && d + column + i < D;
        to.value[column + i][row] = inside ? x[(first + row) * stride + d + column + i] : 0;
    }
}
__device__ inline void study_multiply(float (&sum)[4][4], const StudyOperand& q, const StudyOperand& k) {
    const unsigned tx = threadIdx.x % 16, ty = threadIdx.x / 16;
#pragma unroll
    for (unsigned d = 0; d < study_chunk; d++) {
        const float4 a = *(const float4*)&q.value[d][ty * 4], b = *(const float4*)&k.value[d][tx * 4];
        const float rows[4] = {a.x, a.y, a.z, a.w}, columns[4] = {b.x, b.y, b.z, b.w};
#pragma unroll
        for (int r = 0; r < 4; r++)
#pragma unroll
            for (int c = 0; c < 4; c++) sum[r][c] += rows[r] * columns[c];
    }
}

// What all kernels know of their inputs.
struct StudySizes {
    unsigned T, H, K, D;
    float scale;
    bool round;

    __device__ size_t stride() const { return size_t(H + 2 * K) * D; }
    __device__ const float* query(const float* qkv, size_t head) const { return qkv + head * D; }
    __device__ const float* key(const float* qkv, size_t head) const { return qkv + (H + head * K / H) * D; }
    __device__ const float* value(const float* qkv, size_t head) const { return key(qkv, head) + size_t(K) * D; }
    __device__ float logit(float dot) const { return (round ? study_rounded(dot) : dot) * scale; }
};

// A tile's products of queries from i0 on with keys from j0 on; q and k are free again when it returns.
__device__ inline void study_dots(float (&dot)[4][4], StudyOperand& q, StudyOperand& k, const float* qkv, size_t head,
                                  unsigned i0, unsigned j0, const StudySizes& n) {
    for (unsigned d = 0; d < n.D; d += study_chunk) {
        study_load(q, n.query(qkv, head), n.stride(), i0, n.T, d, n.D);
        study_load(k, n.key(qkv, head), n.stride(), j0, n.T, d, n.D);
        __syncthreads();
        study_multiply(dot, q, k);
        __syncthreads();
    }
}

// A block 64 queries of a head (blockIdx.x), the longest rows of all heads first: a model of few heads has few blocks,
// and a multiprocessor that got long ones of every head would end last. The 16 threads of a row keep a maximum and a
// sum of their own keys each and merge them at the end. D T^2 FLOPs a head, bound by fp32 arithmetic and its operands.
static __global__ void __launch_bounds__(study_threads) study_lse_kernel(float* lse, const float* qkv, StudySizes n) {
    __shared__ StudyOperand q, k;
    const unsigned tx = threadIdx.x % 16, ty = threadIdx.x / 16;
    const unsigned head = blockIdx.x, i0 = (gridDim.y - 1 - blockIdx.y) * study_tile;
    float most[4], sum[4] = {};
    for (float& m : most) m = -INFINITY;
    for (unsigned j0 = 0; j0 <= i0; j0 += study_tile) {
        float dot[4][4] = {};
        study_dots(dot, q, k, qkv, head, i0, j0, n);
#pragma unroll
        for (int r = 0; r < 4; r++)
#pragma unroll
            for (int c = 0; c < 4; c++) {
                if (j0 + tx * 4 + c > i0 + ty * 4 + r) continue;
                const float a = n.logit(dot[r][c]);
                if (a > most[r]) sum[r] = sum[r] * expf(most[r] - a) + 1, most[r] = a;
                else sum[r] += expf(a - most[r]);
            }
    }
#pragma unroll
    for (int r = 0; r < 4; r++) {
        float m = most[r];
        for (int lane = 8; lane > 0; lane /= 2) m = fmaxf(m, __shfl_xor_sync(~0u, m, lane));
        float s = sum[r] * expf(most[r] - m);
        for (int lane = 8; lane > 0; lane /= 2) s += __shfl_xor_sync(~0u, s, lane);
        const unsigned i = i0 + ty * 4 + r;
        if (tx == 0 && i < n.T) lse[size_t(head) * n.T + i] = m + logf(s);
    }
}

inline StudySizes study_sizes(const Rounding& r, size_t T, size_t H, size_t K, size_t D) {
    return {unsigned(T),           unsigned(H), unsigned(K), unsigned(D), float(1 / std::sqrt(double(D))),
            r.logits == Type::bf16};
}
inline dim3 study_grid(size_t T, size_t H) {
    const size_t tiles = (T + study_tile - 1) / study_tile;
    REQUIRE(tiles < 65536, "take sequences of less than 4194304 tokens");
    return dim3(unsigned(H), unsigned(tiles));
}

inline void study_lse(Gpu gpu, float* lse, const float* qkv, const Rounding& r, size_t T, size_t H, size_t K,
                      size_t D) {
    study_lse_kernel<<<study_grid(T, H), study_threads, 0, gpu.stream>>>(lse, qkv, study_sizes(r, T, H, K, D));
    CUDA_CHECK(cudaGetLastError());
}

// A block 64 keys of a head (blockIdx.x), over all queries behind them, the first keys of all heads first. A column is
// one block's, so nothing is added by atomics and the bits are the same every time. Both runs' tiles are in flight
// together. 2 D T^2 FLOPs a head and T^2 exponentials.
static __global__ void __launch_bounds__(study_threads)
    study_columns_kernel(float* columns, const float* qkv1, const float* lse1, const float* qkv2, const float* lse2,
                         StudySizes n) {
    __shared__ StudyOperand q1, k1, q2, k2;
    const unsigned tx = threadIdx.x % 16, ty = threadIdx.x / 16, head = blockIdx.x;
    const unsigned j0 = blockIdx.y * study_tile;
    lse1 += size_t(head) * n.T, lse2 += size_t(head) * n.T;
    float sums[column_sums][4] = {};
    for (unsigned i0 = j0; i0 < n.T; i0 += study_tile) {
        float dot1[4][4] = {}, dot2[4][4] = {};
        for (unsigned d = 0; d < n.D; d += study_chunk) {
            study_load(q1, n.query(qkv1, head), n.stride(), i0, n.T, d, n.D);
            study_load(k1, n.key(qkv1, head), n.stride(), j0, n.T, d, n.D);
            study_load(q2, n.query(qkv2, head), n.stride(), i0, n.T, d, n.D);
            study_load(k2, n.key(qkv2, head), n.stride(), j0, n.T, d, n.D);
            __syncthreads();
            study_multiply(dot1, q1, k1);
            study_multiply(dot2, q2, k2);
            __syncthreads();
        }
#pragma unroll
        for (int r = 0; r < 4; r++) {
            const unsigned i = i0 + ty * 4 + r;
            if (i >= n.T) break;
            const float l1 = lse1[i], l2 = lse2[i];
#pragma unroll
            for (int c = 0; c < 4; c++) {
                if (j0 + tx * 4 + c > i) continue;
                const float a1 = n.logit(dot1[r][c]), a2 = n.logit(dot2[r][c]);
                const float p1 = expf(a1 - l1), p2 = expf(a2 - l2);
                sums[weight_signed][c] += p1 - p2, sums[weight_abs][c] += fabsf(p1 - p2), sums[weight_mass][c] += p2;
                sums[logit_signed][c] += a1 - a2, sums[logit_abs][c] += fabsf(a1 - a2);
            }
        }
    }
    float(*rows)[study_tile] = (float(*)[study_tile]) & q1; // (16, 64): what the 16 threads of a column have
    for (int s = 0; s < column_sums; s++) {
        __syncthreads();
#pragma unroll
        for (int c = 0; c < 4; c++) rows[ty][tx * 4 + c] = sums[s][c];
        __syncthreads();
        const unsigned j = threadIdx.x;
        if (j >= study_tile || j0 + j >= n.T) continue;
        float sum = 0;
        for (int row = 0; row < 16; row++) sum += rows[row][j];
        columns[(size_t(head) * column_sums + s) * n.T + j0 + j] = sum;
    }
}
inline void study_columns(Gpu gpu, float* columns, const float* qkv1, const float* lse1, const float* qkv2,
                          const float* lse2, const Rounding& r, size_t T, size_t H, size_t K, size_t D) {
    study_columns_kernel<<<study_grid(T, H), study_threads, 0, gpu.stream>>>(columns, qkv1, lse1, qkv2, lse2,
                                                                             study_sizes(r, T, H, K, D));
    CUDA_CHECK(cudaGetLastError());
}

// A block 64 queries of a head (blockIdx.x) and 64 of its dimensions (blockIdx.z), the longest rows first. The maximum
// is that of the keys so far, as in the trainer's kernels. A tile's P lies in shared memory transposed, as
// study_multiply wants its first operand, and meets the values 16 keys at a time. 2 D T^2 FLOPs a head, at a head size
// of 128 3 D T^2, for the logits are computed twice.
static __global__ void __launch_bounds__(study_threads)
    study_attention_kernel(float* att, const float* qkv, StudySizes n) {
    __shared__ StudyOperand q, k, p[study_tile / study_chunk];
    const unsigned tx = threadIdx.x % 16, ty = threadIdx.x / 16, head = blockIdx.x;
    const unsigned i0 = (gridDim.y - 1 - blockIdx.y) * study_tile, d0 = blockIdx.z * study_tile;
    float out[4][4] = {}, sum[4] = {}, most[4];
    for (float& m : most) m = -INFINITY;
    for (unsigned j0 = 0; j0 <= i0; j0 += study_tile) {
        float dot[4][4] = {};
        study_dots(dot, q, k, qkv, head, i0, j0, n);
#pragma unroll
        for (int r = 0; r < 4; r++) {
            float m = most[r]; // a tile has a key that the row sees, so it is finite from here on
#pragma unroll
            for (int c = 0; c < 4; c++) {
                const bool seen = j0 + tx * 4 + c <= i0 + ty * 4 + r;
                dot[r][c] = seen ? n.logit(dot[r][c]) : -INFINITY;
                m = fmaxf(m, dot[r][c]);
            }
            for (int lane = 8; lane > 0; lane /= 2) m = fmaxf(m, __shfl_xor_sync(~0u, m, lane));
            const float alpha = expf(most[r] - m);
            most[r] = m, sum[r] *= alpha;
#pragma unroll
            for (int c = 0; c < 4; c++) {
                const float weight = expf(dot[r][c] - m);
                out[r][c] *= alpha, sum[r] += weight;
                p[tx / 4].value[tx % 4 * 4 + c][ty * 4 + r] = study_rounded(weight);
            }
        }
        for (unsigned chunk = 0; chunk < study_tile / study_chunk; chunk++) {
            for (unsigned e = threadIdx.x; e < study_chunk * study_tile; e += study_threads) {
                const unsigned row = e / study_tile, d = d0 + e % study_tile, j = j0 + chunk * study_chunk + row;
                const bool inside = j < n.T && d < n.D;
                k.value[row][e % study_tile] = inside ? n.value(qkv, head)[j * n.stride() + d] : 0;
            }
            __syncthreads();
            study_multiply(out, p[chunk], k);
            __syncthreads();
        }
    }
#pragma unroll
    for (int r = 0; r < 4; r++) {
        for (int lane = 8; lane > 0; lane /= 2) sum[r] += __shfl_xor_sync(~0u, sum[r], lane);
#pragma unroll
        for (int c = 0; c < 4; c++) {
            const unsigned i = i0 + ty * 4 + r, d = d0 + tx * 4 + c;
            if (i < n.T && d < n.D) att[(size_t(i) * n.H + head) * n.D + d] = out[r][c] / sum[r];
        }
    }
}
inline void study_attention(Gpu gpu, float* att, const float* qkv, size_t T, size_t H, size_t K, size_t D) {
    dim3 grid = study_grid(T, H);
    grid.z = unsigned((D + study_tile - 1) / study_tile);
    study_attention_kernel<<<grid, study_threads, 0, gpu.stream>>>(att, qkv, study_sizes({}, T, H, K, D));
    CUDA_CHECK(cudaGetLastError());
}

// A warp a query of a head.
static __global__ void study_first_kernel(float* first, const float* qkv, StudySizes n) {
    const unsigned t = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32, lane = threadIdx.x % 32;
    if (t >= n.T) return;
    const float *q = n.query(qkv, blockIdx.y) + t * n.stride(), *k = n.key(qkv, blockIdx.y);
    float dot = 0;
    for (unsigned i = lane; i < n.D; i += 32) dot += q[i] * k[i];
    dot = warp_sum(dot);
    if (lane == 0) first[size_t(blockIdx.y) * n.T + t] = n.logit(dot);
}
inline void study_first(Gpu gpu, float* first, const float* qkv, const Rounding& r, size_t T, size_t H, size_t K,
                        size_t D) {
    study_first_kernel<<<dim3(unsigned((T + 7) / 8), unsigned(H)), 256, 0, gpu.stream>>>(first, qkv,
                                                                                         study_sizes(r, T, H, K, D));
    CUDA_CHECK(cudaGetLastError());
}
#endif
