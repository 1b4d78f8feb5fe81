// What attention_backward.cu needs beside its kernels: the backward's arrays, the check against double, the timing, the
// trainer's arguments.
#pragma once
#include "attention.h"

struct BackwardLadder {
    enum Part { dq_part, dk_part, dv_part }; // of dqkv
    struct Sample {
        Part part;
        int token, head;
        std::vector<double> right;
    };
    const int T;
    const Ladder forward{T}; // its qkv, O and LSE
    const Gpu gpu = forward.gpu;
    const size_t count = forward.count / 3;
    bf16 *const dout = bench_normal<bf16>(gpu, count, 4), *const dqkv = bench_normal<bf16>(gpu, forward.count, 5);
    float *const dq = bench_normal<float>(gpu, count, 6), *const delta = bench_normal<float>(gpu, size_t(H) * T, 7);
    std::vector<bf16> out_host, dout_host;
    std::vector<float> lse_host;
    std::vector<Sample> samples;
    bool right = true;

    // O and LSE are the trainer's, which attention_hopper.cu checks; here they are what the backward is given.
    explicit BackwardLadder(int T) : T(T), out_host(count), dout_host(count), lse_host(size_t(H) * T) {
        attention_hopper_forward(gpu, forward.trainer(attention_hopper_tiles(D)));
        copy_to_host(gpu, out_host.data(), forward.out, count * sizeof(bf16));
        copy_to_host(gpu, dout_host.data(), dout, count * sizeof(bf16));
        copy_to_host(gpu, lse_host.data(), forward.lse, lse_host.size() * sizeof(float));
        // The edges of tiles, but no sums of a few pairs only, which cancel; then any.
        const int query[] = {63, 64, 127, T - 1}, key[] = {0, 64, 127, T - 10};
        for (int i = 0; i < 12; i++) {
            const int head = int(hash64(11, i) % H);
            const int t = i < 4 ? query[i] : int(hash64(9, i) % T), u = i < 4 ? key[i] : int(hash64(10, i) % T);
            samples.push_back({dq_part, t, head, {}});
            samples.push_back({dk_part, u, head, {}});
            samples.push_back({dv_part, u, head, {}});
        }
        for (Sample& s : samples) s.right = in_double(s.part, s.token, s.head);
    }

    // dQ of a query, over the keys that it sees, or dK or dV of a key, over the queries that see it.
    std::vector<double> in_double(Part part, int token, int head) const {
        std::vector<double> sum(D);
        const bool of_query = part == dq_part;
        for (int other = of_query ? 0 : token; other < (of_query ? token + 1 : T); other++) {
            const int query = of_query ? token : other, key = of_query ? other : token;
            const bf16* q = forward.qkv_host.data() + query * stride + head * D;
            const bf16 *k = forward.qkv_host.data() + key * stride + (H + head) * D, *v = k + H * D;
            const size_t at = (size_t(query) * H + head) * D;
            double s = 0, dp = 0, delta = 0;
            for (int d = 0; d < D; d++) {
                s += double(q[d]) * double(k[d]);
                dp += double(dout_host[at + d]) * double(v[d]);
                delta += double(dout_host[at + d]) * double(out_host[at + d]);
            }
            const double p = std::exp(s / std::sqrt(double(D)) - lse_host[size_t(head) * T + query]);
            const double ds = p * (dp - delta) / std::sqrt(double(D));
            for (int d = 0; d < D; d++)
                sum[d] += part == dv_part ? p * double(dout_host[at + d]) : ds * double(of_query ? k[d] : q[d]);
        }
        return sum;
    }

    double worst_error() const {
        double worst = 0;
        for (const Sample& s : samples) {
            bf16 row[D];
            copy_to_host(gpu, row, dqkv + s.token * stride + (s.part * H + s.head) * D, sizeof row);
            worst = std::max(worst, row_error(row, s.right.data()));
        }
        return worst;
    }

    // A row of the table; `order` is that of dQ's columns while it is summed.
    template <class F> void run(const char* name, DqOrder order, F launch) {
        auto all = [&] {
            const int32_t row_begin[] = {0, T};
            attention_backward_begin<bf16>(gpu, delta, dq, nullptr, dout, forward.out, forward.lse, forward.qkv, stride,
                                           nullptr, row_begin, 1, T, H, H, D, order);
            launch();
            attention_backward_end<bf16>(gpu, dqkv, stride, dq, T, H, D, order);
        };
        CUDA_CHECK(cudaMemsetAsync(dqkv, 0xff, forward.count * sizeof(bf16), gpu.stream)); // NaN
        all();
        CUDA_CHECK(cudaGetLastError());
        const double error = worst_error(), ms = bench_ms(gpu, all, 5);
        right &= print_version(name, ms, 10.0 * D * visible_pairs(T), error);
    }

    // The trainer's kernels want a map, by keys.
    AttentionBackward<bf16> trainer(const AttentionTiles& tiles) const {
        const Tokens tokens = causal_tokens(T);
        AttentionMap map;
        attention_map_build(map, tokens, tokens, tiles);
        AttentionBackward<bf16> a{};
        a.q = forward.qkv, a.kv = forward.qkv + H * D, a.q_stride = a.kv_stride = a.dkv_out_stride = stride;
        a.dout = dout, a.lse = forward.lse, a.delta = delta, a.dq = dq, a.dkv_out = dqkv + H * D;
        a.q_label = forward.upload(token_labels(tokens, false)), a.k_label = forward.upload(token_labels(tokens, true));
        a.map = device_map(map.backward, [this](const auto& from) { return forward.upload(from); });
        a.T = a.Tk = T, a.H = a.K = H, a.D = D;
        return a;
    }
};
