// What the ladders of attention share: the sizes, the check against double, the timing, the trainer's arguments.
#pragma once
#include "../../attention_anchor.cuh"
#include "../bench.h"

constexpr int H = 32, D = 128;       // of LLaMA-2-7B
constexpr size_t stride = 3 * H * D; // between tokens

// One document of T tokens, none of them an anchor.
inline Tokens causal_tokens(int T) {
    Tokens tokens{{}, std::vector<int32_t>(T, 1), {0, T}};
    for (int t = 0; t < T; t++) tokens.index.push_back(t);
    return tokens;
}
inline double visible_pairs(int T) { return H * double(T) * (T + 1) / 2; } // of all heads

// The largest error of a head's row, in units of the bf16 that holds its largest value; more than one and a half would
// be wrong: half for the rounding of the result; those of P and dS, of random sign, add up to less than another one.
// What was not written (NaN) is infinitely wrong.
constexpr double most_units = 1.5;
inline double row_error(const bf16* row, const double* right /*(D)*/) {
    double largest = 0, worst = 0;
    for (int d = 0; d < D; d++) largest = std::max(largest, std::fabs(right[d]));
    const double unit = std::ldexp(1.0, std::ilogb(largest) - 7);
    for (int d = 0; d < D; d++) {
        const double error = std::fabs(double(row[d]) - right[d]) / unit;
        worst = std::max(worst, std::isnan(error) ? double(INFINITY) : error);
    }
    return worst;
}

// A row of the table; whether the version is right.
inline bool print_version(const char* name, double ms, double flops, double error) {
    const bool right = error <= most_units;
    printf("| %-36s | %9.3f ms | %6.1f TF/s | error %.2f units |%s\n", name, ms, flops / ms / 1e9, error,
           right ? "" : " WRONG");
    fflush(stdout);
    return right;
}

// T causal tokens, their output, and what all versions said so far.
struct Ladder {
    const Gpu gpu = gpu_open(0);
    const int T;
    const size_t count = size_t(T) * stride;
    bf16 *const qkv = bench_normal<bf16>(gpu, count, 1), *const out = bench_normal<bf16>(gpu, count / 3, 2);
    float* const lse = bench_normal<float>(gpu, size_t(H) * T, 3);
    std::vector<bf16> qkv_host, out_host;
    bool right = true;

    explicit Ladder(int T) : T(T), qkv_host(count), out_host(count / 3) {
        copy_to_host(gpu, qkv_host.data(), qkv, count * sizeof(bf16));
    }

    // Of a few queries' O.
    double worst_error() const {
        double worst = 0;
        for (int i = 0; i < 24; i++) {
            const int t = i < 3 ? i : i == 3 ? T - 1 : int(hash64(7, i) % T), head = int(hash64(8, i) % H);
            const bf16* q = qkv_host.data() + t * stride + head * D;
            const bf16 *k = qkv_host.data() + (H + head) * D, *v = k + H * D;
            double o[D] = {}, sum = 0;
            for (int key = 0; key <= t; key++) {
                double s = 0;
                for (int d = 0; d < D; d++) s += double(q[d]) * double(k[key * stride + d]);
                const double p = std::exp(s / std::sqrt(double(D)));
                sum += p;
                for (int d = 0; d < D; d++) o[d] += p * double(v[key * stride + d]);
            }
            for (double& x : o) x /= sum;
            worst = std::max(worst, row_error(out_host.data() + (size_t(t) * H + head) * D, o));
        }
        return worst;
    }

    // A row of the table.
    template <class F> void run(const char* name, F launch) {
        CUDA_CHECK(cudaMemsetAsync(out, 0xff, count / 3 * sizeof(bf16), gpu.stream)); // NaN
        launch();
        CUDA_CHECK(cudaGetLastError());
        copy_to_host(gpu, out_host.data(), out, count / 3 * sizeof(bf16));
        const double error = worst_error(), ms = bench_ms(gpu, launch, 5);
        right &= print_version(name, ms, 4.0 * D * visible_pairs(T), error);
    }

    template <class X> const X* upload(const std::vector<X>& from) const {
        X* to = (X*)device_allocate(gpu, from.size() * sizeof(X));
        copy_to_device(gpu, to, from.data(), from.size() * sizeof(X));
        return to;
    }
    // The trainer's kernels want a map.
    AttentionForward<bf16> trainer(const AttentionTiles& tiles) const {
        const Tokens tokens = causal_tokens(T);
        AttentionMap map;
        attention_map_build(map, tokens, tokens, tiles);
        const DeviceMap device = device_map(map.forward, [this](const auto& from) { return upload(from); });
        return {qkv,
                qkv + H * D,
                nullptr,
                stride,
                stride,
                upload(token_labels(tokens, false)),
                upload(token_labels(tokens, true)),
                device,
                true,
                true,
                out,
                lse,
                nullptr,
                T,
                T,
                H,
                H,
                D};
    }
};
