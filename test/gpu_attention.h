// What the tests of attention's kernels share: the CPU's results, and maps in the memory of the GPU.
#pragma once
#include "attention_rows.h"
#include "gpu.h"

// Of one problem: gradients rounded to storage, as (T, H + 2K, D).
template <class E> struct Result {
    Buffer<E> out, dqkv;
    Buffer<Acc<E>> lse; // (H, T)
};

// k0, v0 of every row, from its token 0.
template <class E> Buffer<E> anchors(const Tokens& t, const Buffer<E>& qkv, Sizes z) {
    Buffer<E> anchor(t.rows() * z.kv());
    for (size_t b = 0; b < t.rows(); b++)
        for (size_t i = 0; i < z.kv(); i++) anchor[b * z.kv() + i] = qkv[t.row_begin[b] * z.qkv() + z.H * z.D + i];
    return anchor;
}
inline bool anchored(const Tokens& t) { return is_anchor(t.index[0], t.doc[0]); }

template <class E> Result<E> attend_cpu(const Tokens& t, const Buffer<E>& qkv, const Buffer<E>& dout, Sizes z) {
    using A = Acc<E>;
    const auto [H, K, D] = z;
    const size_t T = t.size(), W = z.qkv();
    const Cpu cpu;
    Result<E> r{Buffer<E>(T * H * D), Buffer<E>(T * W), Buffer<A>(H * T)};
    Buffer<A> state(T * H * D), dq(T * H * D), dkv(T * z.kv()), danchor(t.rows() * z.kv()), delta(H * T);
    const Buffer<E> anchor = anchors(t, qkv, z);
    const E *k0 = anchored(t) ? anchor.data() : nullptr, *kv = qkv.data() + H * D;
    A* dk0 = k0 ? danchor.data() : nullptr;
    AttentionMap map;
    attention_map_build(map, t, t, attention_tiles_cpu);
    dkv.fill(0), danchor.fill(0);
    attention_forward(cpu, r.out.data(), r.lse.data(), state.data(), qkv.data(), W, kv, W, k0, map, Portion(), t, t, H,
                      K, D);
    attention_backward_begin(cpu, delta.data(), dq.data(), dk0, dout.data(), r.out.data(), r.lse.data(), qkv.data(), W,
                             k0, t, H, K, D);
    attention_backward(cpu, dq.data(), dkv.data(), r.dqkv.data() + H * D, W, dk0, dout.data(), qkv.data(), W, kv, W,
                       r.lse.data(), delta.data(), map, t, t, H, K, D);
    attention_store(cpu, r.dqkv.data(), W, dq.data(), T, H * D);
    return r;
}

// A vector in the GPU's memory.
template <class X> struct Uploaded {
    X* data = nullptr;
    explicit Uploaded(const std::vector<X>& from) {
        CUDA_CHECK(cudaMalloc((void**)&data, std::max<size_t>(from.size(), 1) * sizeof(X)));
        CUDA_CHECK(cudaMemcpy(data, from.data(), from.size() * sizeof(X), cudaMemcpyHostToDevice));
        CUDA_CHECK(cudaDeviceSynchronize()); // as in DeviceBuffer
    }
    Uploaded(const Uploaded&) = delete;
    ~Uploaded() { CUDA_CHECK(cudaFree(data)); }
};
struct MapOnGpu {
    AttentionMap map;
    Uploaded<TokenLabel> q, k;
    std::vector<std::shared_ptr<void>> arrays;
    static AttentionMap built(const Tokens& q, const Tokens& k, const AttentionTiles& tiles) {
        AttentionMap map;
        attention_map_build(map, q, k, tiles);
        return map;
    }
    MapOnGpu(const Tokens& qt, const Tokens& kt, const AttentionTiles& tiles)
        : map(built(qt, kt, tiles)), q(token_labels(qt, false)), k(token_labels(kt, true)) {
        auto put = [this]<class X>(const std::vector<X>& from) {
            auto on_gpu = std::make_shared<Uploaded<X>>(from);
            arrays.push_back(on_gpu);
            return on_gpu->data;
        };
        map.device_forward = device_map(map.forward, put), map.device_backward = device_map(map.backward, put);
    }
    DeviceMap forward() const { return map.device_forward; }
    DeviceMap backward() const { return map.device_backward; }
};

// Keys in portions: token i is a key of call portion[i], twenty neighbours of the same one.
inline std::vector<size_t> random_portions(size_t T, size_t portions, uint64_t seed) {
    std::vector<size_t> portion(T);
    for (size_t i = 0; i < T; i++) portion[i] = hash64(seed, i / 20) % portions;
    return portion;
}

// By the kernels that the GPU's context chooses: queries of document 2, of which there is no key, beside others that
// see some; two heads of one KV head.
inline void check_blind_queries(int T, size_t D) {
    const Gpu gpu = the_gpu();
    const FreshScratch scratch;
    Tokens q{{}, {}, {0, T}}, k = q;
    for (int i = 0; i < T; i++) q.index.push_back(i + 5), q.doc.push_back(1 + i / 3 % 2);
    for (int i = 0; i < T; i++) k.index.push_back(i), k.doc.push_back(1 + 2 * (i % 2));
    const MapOnGpu map(q, k, attention_tiles<bf16>(gpu, D));
    DeviceBuffer<bf16> x(Buffer<bf16>(T * 2 * D, 1)), kv(Buffer<bf16>(T * 2 * D, 2));
    DeviceBuffer<bf16> dout(Buffer<bf16>(T * 2 * D, 3)), out(Buffer<bf16>(T * 2 * D)), dkv(Buffer<bf16>(T * 2 * D));
    DeviceBuffer<float> lse(2 * T), delta(2 * T), dq(T * 2 * D);
    attention_forward_launch<bf16>(gpu,
                                   {x.data(), kv.data(), nullptr, 2 * D, 2 * D, map.q.data, map.k.data, map.forward(),
                                    true, true, out.data(), lse.data(), nullptr, T, T, 2, 1, int(D)});
    attention_backward_begin<bf16>(gpu, delta, dq, nullptr, dout.data(), out.data(), lse, x.data(), 2 * D, nullptr, q,
                                   2, 1, D);
    attention_backward_launch<bf16>(gpu, {x.data(),
                                          kv.data(),
                                          2 * D,
                                          2 * D,
                                          dout.data(),
                                          lse.data(),
                                          delta.data(),
                                          map.q.data,
                                          map.k.data,
                                          map.backward(),
                                          dq.data(),
                                          nullptr,
                                          dkv.data(),
                                          2 * D,
                                          nullptr,
                                          T,
                                          T,
                                          2,
                                          1,
                                          int(D)});
    const Buffer<bf16> out_host = out.host(), dkv_host = dkv.host();
    const Buffer<float> lse_host = lse.host(), dq_host = dq.host();
    bool right = true;
    for (size_t i = 0; i < out_host.count; i++) {
        const size_t token = i / D / 2;
        const bool blind = q.doc[token] == 2;
        right &= std::isinf(lse_host[i / D % 2 * T + token]) == blind;
        right &= (out_host[i] == 0) == blind && std::isfinite(out_host[i]);
        right &= (dq_host[i] == 0) == blind && std::isfinite(dq_host[i]);
    }
    for (int i = 0; i < T; i++) right &= (dkv_host[i * 2 * D] != 0) == (k.doc[i] == 1); // 3 is seen by nobody
    INFO("D " << D);
    CHECK(right);
}
