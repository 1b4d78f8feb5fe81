// Rotary position embedding: every query and key head turned by angles that grow with the position.
//
//   angle_ti = pos_t inv_freq_i                              i in [0, D/2), inv_freq_i = base^(-2i/D) before scaling
//   (x_i, x_{i+D/2}) -> (x_i cos - x_{i+D/2} sin, x_{i+D/2} cos + x_i sin)
//
// A rotation by pos_q and one by pos_k leave q.k a function of pos_q - pos_k: exactly so only in exact arithmetic,
// which is what RopePrecision is about. Backward is the transpose: the rotation by -angle (cos and sin may carry a
// common attention factor, which the transpose keeps). The pairs (i, i + D/2) are those of Hugging Face's weights.
//
// qkv (T, H + 2K, D): H query heads, K key heads, K value heads, the last not rotated.
// table (T, D/2, 2): cos, sin. Su et al., arXiv 2104.09864.
#pragma once
#include "core/config.h"
#include "core/kernel.h"
#include <algorithm>
#include <cmath>

// The frequencies that extend a context, by the formulas of transformers' ROPE_INIT_FUNCTIONS, in double. f is the
// unscaled frequency; `original` is the context before scaling, S the length of the whole row.
//
//   linear    f / factor
//   dynamic   f of the base  base (factor S' / max_context - (factor - 1))^(D / (D - 2)),  S' = max(S, max_context)
//   yarn      f / factor below beta_slow turns in the original context, f above beta_fast, linear in i between
//   longrope  f / long_factor_i if S > original, else f / short_factor_i
//   llama3    f / factor below low_freq_factor turns, f above high_freq_factor, linear in the turns between

// YaRN (arXiv 2309.00071): the index, as a real number, whose pair makes `turns` full turns in the original context.
inline double yarn_index(double turns, double base, double original, double D) {
    return D * std::log(original / (turns * 2 * M_PI)) / (2 * std::log(base));
}

inline double yarn_mscale(double factor, double mscale) {
    return factor <= 1 ? 1 : 0.1 * mscale * std::log(factor) + 1;
}

inline double rope_yarn(double* inv_freq, const RopeConfig& r, double original, size_t D) {
    double low = std::max(std::floor(yarn_index(r.beta_fast, r.base, original, double(D))), 0.0);
    double high = std::min(std::ceil(yarn_index(r.beta_slow, r.base, original, double(D))), double(D) - 1);
    if (low == high) high += 0.001;
    for (size_t i = 0; i < D / 2; i++) {
        double ramp = std::clamp((double(i) - low) / (high - low), 0.0, 1.0);
        inv_freq[i] = inv_freq[i] / r.factor * ramp + inv_freq[i] * (1 - ramp);
    }
    if (r.attention_factor != 0) return r.attention_factor;
    if (r.mscale != 0 && r.mscale_all_dim != 0)
        return yarn_mscale(r.factor, r.mscale) / yarn_mscale(r.factor, r.mscale_all_dim);
    return yarn_mscale(r.factor, 1);
}

// LongRoPE (arXiv 2402.13753). Without a factor of its own (1) the ratio of the contexts counts, as in Phi-3.
inline double rope_longrope(double* inv_freq, const RopeConfig& r, double original, size_t D, size_t S) {
    const float* divisor = double(S) > original ? r.long_factor : r.short_factor;
    for (size_t i = 0; i < D / 2; i++) inv_freq[i] /= double(divisor[i]);
    double factor = r.factor > 1 ? r.factor : r.max_context / original;
    if (r.attention_factor != 0) return r.attention_factor;
    return factor <= 1 ? 1 : std::sqrt(1 + std::log(factor) / std::log(original));
}

// Llama 3.1.
inline void rope_llama3(double* inv_freq, const RopeConfig& r, double original, size_t D) {
    for (size_t i = 0; i < D / 2; i++) {
        double turns = original * inv_freq[i] / (2 * M_PI);
        double keep = (turns - r.low_freq_factor) / (r.high_freq_factor - r.low_freq_factor);
        if (turns < r.low_freq_factor) keep = 0;
        else if (turns > r.high_freq_factor) keep = 1;
        inv_freq[i] = (1 - keep) * inv_freq[i] / r.factor + keep * inv_freq[i];
    }
}

// Writes inv_freq (D/2); returns the attention factor, which multiplies cos and sin. S is the global row length,
// never a shard's or a document's: every rank and every document must turn alike.
inline double rope_frequencies(double* inv_freq, const RopeConfig& r, size_t D, size_t S) {
    REQUIRE(D >= 2 && D % 2 == 0, "RoPE rotates pairs: take an even head size");
    double base = r.base, original = r.original_context ? r.original_context : r.max_context;
    if (r.scaling == RopeScaling::dynamic) {
        REQUIRE(D > 2, "dynamic RoPE scaling needs a head size above 2");
        double length = double(std::max(S, size_t(r.max_context)));
        base *= std::pow(r.factor * length / r.max_context - (r.factor - 1), double(D) / double(D - 2));
    }
    for (size_t i = 0; i < D / 2; i++) inv_freq[i] = std::pow(base, -2 * double(i) / double(D));

    switch (r.scaling) {
        case RopeScaling::none:
        case RopeScaling::dynamic:
            return 1;
        case RopeScaling::linear:
            for (size_t i = 0; i < D / 2; i++) inv_freq[i] /= r.factor;
            return 1;
        case RopeScaling::yarn:
            return rope_yarn(inv_freq, r, original, D);
        case RopeScaling::longrope:
            return rope_longrope(inv_freq, r, original, D, S);
        case RopeScaling::llama3:
            rope_llama3(inv_freq, r, original, D);
            return 1;
    }
    fail("unknown RoPE scaling %d", int(r.scaling));
}

// Where bf16 enters. The capitals are the variants of the deviation experiment (arXiv 2411.13476), whose own angles are
// fp32 but in D.
enum class RopePrecision {
    exact,         // C: angles in double, cos and sin in Acc<E>, one rounding to E
    bf16_table,    // B: cos and sin rounded to bf16, the rotation as above (flash-attn's kernel)
    bf16_rotation, // A: the same table, both products and their sum rounded to bf16 (Hugging Face in bf16)
    bf16_angle,    // D: bf16(bf16(pos) bf16(inv_freq)) as the angle, the rest as A (transformers before PR 29285)
};

struct RopePrecisionName {
    const char* name;
    RopePrecision precision;
};
constexpr RopePrecisionName rope_precision_names[] = {{"exact", RopePrecision::exact},
                                                      {"bf16_table", RopePrecision::bf16_table},
                                                      {"bf16_rotation", RopePrecision::bf16_rotation},
                                                      {"bf16_angle", RopePrecision::bf16_angle}};

inline const char* rope_precision_name(RopePrecision precision) { return rope_precision_names[int(precision)].name; }

// False if there is no such name.
inline bool rope_precision_parse(const char* name, RopePrecision* precision) {
    for (const RopePrecisionName& entry : rope_precision_names)
        if (!strcmp(entry.name, name)) return *precision = entry.precision, true;
    return false;
}

// In double: at position 4M an fp32 angle is wrong by up to 0.2 rad, as half an ulp of 2^22 is 0.25.
HOST_DEVICE inline double rope_angle(int32_t pos, double inv_freq, RopePrecision precision) {
    if (precision != RopePrecision::bf16_angle) return double(pos) * inv_freq;
    return double(bf16(float(bf16(float(pos))) * float(bf16(float(inv_freq)))));
}

// One entry of the table: cos and sin as the rotation gets them.
template <class E>
HOST_DEVICE void rope_cos_sin(Acc<E>* entry, double angle, double attention_factor, RopePrecision precision) {
    using A = Acc<E>;
    A c = A(std::cos(angle) * attention_factor), s = A(std::sin(angle) * attention_factor);
    bool round = precision != RopePrecision::exact;
    entry[0] = round ? A(float(bf16(float(c)))) : c;
    entry[1] = round ? A(float(bf16(float(s)))) : s;
}

template <class E> void rope_table(Cpu, Acc<E>* table, const int32_t* pos, const double* inv_freq,
                                   double attention_factor, RopePrecision precision, size_t T, size_t D) {
#pragma omp parallel for schedule(static)
    for (size_t t = 0; t < T; t++)
        for (size_t i = 0; i < D / 2; i++)
            rope_cos_sin<E>(table + (t * (D / 2) + i) * 2, rope_angle(pos[t], inv_freq[i], precision), attention_factor,
                            precision);
}

// Turns one head by the table's angles (sign 1) or back (sign -1); three_roundings: see bf16_rotation.
template <bool three_roundings, class E> void rope_rotate(E* x, const Acc<E>* table, Acc<E> sign, size_t D) {
    using A = Acc<E>;
    auto sum = [](A a, A b) {
        if constexpr (three_roundings) return A(float(bf16(float(bf16(float(a))) + float(bf16(float(b))))));
        else return a + b;
    };
    const size_t half = D / 2;
#pragma GCC ivdep
    for (size_t i = 0; i < half; i++) {
        A x1 = A(x[i]), x2 = A(x[i + half]), c = table[2 * i], s = sign * table[2 * i + 1];
        x[i] = E(sum(x1 * c, -x2 * s));
        x[i + half] = E(sum(x2 * c, x1 * s));
    }
}

template <class E> void rope_apply(E* qkv, const Acc<E>* table, RopePrecision precision, Acc<E> sign, size_t T,
                                   size_t H, size_t K, size_t D) {
    REQUIRE(D % 2 == 0, "RoPE rotates pairs: take an even head size");
    bool three_roundings = precision == RopePrecision::bf16_rotation || precision == RopePrecision::bf16_angle;
#pragma omp parallel for schedule(static)
    for (size_t t = 0; t < T; t++)
        for (size_t h = 0; h < H + K; h++) {
            E* x = qkv + (t * (H + 2 * K) + h) * D;
            const Acc<E>* entries = table + t * D;
            if (three_roundings) rope_rotate<true>(x, entries, sign, D);
            else rope_rotate<false>(x, entries, sign, D);
        }
}

// In place on the query and key heads.
template <class E>
void rope_forward(Cpu, E* qkv, const Acc<E>* table, RopePrecision precision, size_t T, size_t H, size_t K, size_t D) {
    rope_apply(qkv, table, precision, Acc<E>(1), T, H, K, D);
}

template <class E>
void rope_backward(Cpu, E* dqkv, const Acc<E>* table, RopePrecision precision, size_t T, size_t H, size_t K, size_t D) {
    rope_apply(dqkv, table, precision, Acc<E>(-1), T, H, K, D);
}

#ifdef __CUDACC__
// As kernel arguments; more pairs take more launches.
struct RopeFrequencies {
    static constexpr size_t most = 256;
    double value[most];
};

// A thread an entry, in double. The time is that of the cosines and sines; once a batch, for all layers.
template <class E> __global__ void rope_table_kernel(float* table, const int32_t* pos,
                                                     const __grid_constant__ RopeFrequencies inv_freq,
                                                     double attention_factor, RopePrecision precision, size_t entries,
                                                     unsigned pairs, size_t first, size_t half) {
    const size_t entry = size_t(blockIdx.x) * blockDim.x + threadIdx.x;
    if (entry >= entries) return;
    const size_t t = entry / pairs, i = entry % pairs;
    rope_cos_sin<E>(table + (t * half + first + i) * 2, rope_angle(pos[t], inv_freq.value[i], precision),
                    attention_factor, precision);
}

template <class E> void rope_table(Gpu gpu, float* table, const int32_t* pos, const double* inv_freq,
                                   double attention_factor, RopePrecision precision, size_t T, size_t D) {
    for (size_t first = 0; T > 0 && first < D / 2; first += RopeFrequencies::most) {
        const size_t pairs = std::min(D / 2 - first, RopeFrequencies::most);
        RopeFrequencies part = {};
        std::copy(inv_freq + first, inv_freq + first + pairs, part.value);
        rope_table_kernel<E><<<grid_blocks((T * pairs + 127) / 128), 128, 0, gpu.stream>>>(
            table, pos, part, attention_factor, precision, T * pairs, unsigned(pairs), first, D / 2);
        CUDA_CHECK(cudaGetLastError());
    }
}

// A block a token; blockDim (x, y): x threads a head, each with W pairs whose cosines and sines it reads once for all
// its heads, y heads side by side and 4 of them in flight. Bound by memory: 90% of a copy's bandwidth on H200.
template <bool three_roundings, class E, int W>
__global__ void rope_apply_kernel(E* qkv, const float* table, float sign, size_t heads, size_t all_heads, size_t D) {
    constexpr int unroll = 4;
    const size_t half = D / 2;
    E* x = qkv + blockIdx.x * all_heads * D;
    auto round = [](float a) { return __uint_as_float(bf16_pair(0, a)); };
    auto sum = [&](float a, float b) {
        if constexpr (three_roundings) return round(round(a) + round(b));
        else return a + b;
    };
    for (size_t i = threadIdx.x * W; i < half; i += blockDim.x * W) {
        Pack<float, 2 * W> cos_sin;
        if constexpr (W > 1) cos_sin = pack_load<2 * W>(table + (blockIdx.x * half + i) * 2);
        else
#pragma unroll
            for (int j = 0; j < 2; j++) cos_sin.word[j] = __float_as_uint(table[(blockIdx.x * half + i) * 2 + j]);
        for (size_t h = threadIdx.y; h < heads; h += unroll * blockDim.y) {
            Pack<E, W> x1[unroll], x2[unroll];
#pragma unroll
            for (int k = 0; k < unroll; k++)
                if (const size_t head = h + k * blockDim.y; head < heads) {
                    x1[k] = pack_load<W>(x + head * D + i);
                    x2[k] = pack_load<W>(x + head * D + half + i);
                }
#pragma unroll
            for (int k = 0; k < unroll; k++)
                if (const size_t head = h + k * blockDim.y; head < heads) {
                    float y1[W], y2[W];
#pragma unroll
                    for (int j = 0; j < W; j++) {
                        const float c = cos_sin[2 * j], s = sign * cos_sin[2 * j + 1];
                        y1[j] = sum(x1[k][j] * c, -x2[k][j] * s);
                        y2[j] = sum(x2[k][j] * c, x1[k][j] * s);
                    }
                    pack_store(x + head * D + i, y1);
                    pack_store(x + head * D + half + i, y2);
                }
        }
    }
}

template <class E> void rope_apply(Gpu gpu, E* qkv, const float* table, RopePrecision precision, float sign, size_t T,
                                   size_t H, size_t K, size_t D) {
    REQUIRE(D % 2 == 0, "RoPE rotates pairs: take an even head size");
    if (T == 0 || H + K == 0 || D == 0) return;
    const bool three_roundings = precision == RopePrecision::bf16_rotation || precision == RopePrecision::bf16_angle;
    auto launch = [&](auto rounding, auto width) {
        constexpr int W = decltype(width)::value;
        const unsigned x = unsigned(std::min<size_t>(D / 2 / W, 128));
        const dim3 threads(x, unsigned(std::min<size_t>(H + K, std::max(1u, 128 / x))));
        rope_apply_kernel<decltype(rounding)::value, E, W>
            <<<grid_blocks(T), threads, 0, gpu.stream>>>(qkv, table, sign, H + K, H + 2 * K, D);
    };
    auto launch_for = [&](auto width) {
        if (three_roundings) launch(std::true_type(), width);
        else launch(std::false_type(), width);
    };
    if (packs_fit<E>(D / 2, qkv, table)) launch_for(std::integral_constant<int, pack_width<E>>());
    else launch_for(std::integral_constant<int, 1>());
    CUDA_CHECK(cudaGetLastError());
}

template <class E> void rope_forward(Gpu gpu, E* qkv, const float* table, RopePrecision precision, size_t T, size_t H,
                                     size_t K, size_t D) {
    rope_apply(gpu, qkv, table, precision, 1, T, H, K, D);
}

template <class E> void rope_backward(Gpu gpu, E* dqkv, const float* table, RopePrecision precision, size_t T, size_t H,
                                      size_t K, size_t D) {
    rope_apply(gpu, dqkv, table, precision, -1, T, H, K, D);
}
#endif
