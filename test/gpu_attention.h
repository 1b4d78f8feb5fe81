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
    Uploaded<QueryTile> forward_tiles, backward_tiles;
    Uploaded<KeyRange> forward_ranges, backward_ranges;
    static AttentionMap built(const Tokens& q, const Tokens& k, const AttentionTiles& tiles) {
        AttentionMap map;
        attention_map_build(map, q, k, tiles);
        return map;
    }
    MapOnGpu(const Tokens& qt, const Tokens& kt, const AttentionTiles& tiles)
        : map(built(qt, kt, tiles)), q(token_labels(qt, false)), k(token_labels(kt, true)),
          forward_tiles(map.forward.tiles), backward_tiles(map.backward.tiles), forward_ranges(map.forward.ranges),
          backward_ranges(map.backward.ranges) {}
    DeviceMap forward() const {
        return {forward_tiles.data, forward_ranges.data, int(map.forward.tiles.size()), map.forward.tile};
    }
    DeviceMap backward() const {
        return {backward_tiles.data, backward_ranges.data, int(map.backward.tiles.size()), map.backward.tile};
    }
};
