// RoPE and attention in fp32 within a bf16 network, forward and backward, from the q, k, v that their product has left
// to the output, which is rounded once. What train_fp32_attention calls in place of the trainer's functions of these
// names; for other types they are the trainer's.
#pragma once
#include "../layers/convert.cuh"
#include "../layers/ring.cuh"
#include "../rope.cuh"

namespace fp32 {
template <class E> constexpr bool replaced = std::is_same_v<E, bf16>;

// Of one layer, for the tokens and heads of the largest call so far. The rotation waits for the attention: it has to be
// done to the fp32 copy.
struct Buffers {
    size_t tokens = 0;
    float *qkv, *out, *dqkv, *dout; // (T, H + 2K, D), (T, H, D)
    RingScratch<float> scratch;
    const float* angles = nullptr;
    RopePrecision precision;
};
inline Buffers buffers;

template <class Dev> void reserve(Dev dev, size_t T, size_t B, size_t H, size_t K, size_t D) {
    if (T <= buffers.tokens) return;
    auto take = [dev](size_t count) { return (float*)device_allocate(dev, count * sizeof(float)); };
    const RingScratchSizes n = ring_scratch_sizes(dev, {}, T, 1, B, H, K, D);
    buffers.tokens = T;
    for (float** to : {&buffers.qkv, &buffers.dqkv}) *to = take(T * (H + 2 * K) * D);
    for (float** to : {&buffers.out, &buffers.dout}) *to = take(T * H * D);
    buffers.scratch.state = take(n.state), buffers.scratch.delta = take(n.delta),
    buffers.scratch.dkv = n.dkv ? take(n.dkv) : nullptr;
    buffers.scratch.anchor = take(n.anchor), buffers.scratch.danchor = take(n.danchor);
}

#ifdef __CUDACC__
template <class E> AttentionTiles attention_tiles(Gpu gpu, size_t D) {
    return ::attention_tiles<std::conditional_t<replaced<E>, float, E>>(gpu, D);
}
#endif
template <class E> AttentionTiles attention_tiles(Cpu cpu, size_t D) { return ::attention_tiles<E>(cpu, D); }

template <class Dev, class E> void rope_forward(Dev dev, E* qkv, const Acc<E>* angles, RopePrecision precision,
                                                size_t T, size_t H, size_t K, size_t D) {
    if constexpr (replaced<E>) buffers.angles = angles, buffers.precision = precision;
    else ::rope_forward(dev, qkv, angles, precision, T, H, K, D);
}
template <class Dev, class E> void rope_backward(Dev dev, E* dqkv, const Acc<E>* angles, RopePrecision precision,
                                                 size_t T, size_t H, size_t K, size_t D) {
    if constexpr (!replaced<E>) ::rope_backward(dev, dqkv, angles, precision, T, H, K, D);
}

// From q, k, v before RoPE to the fp32 output in `buffers`.
template <class Dev> void attend(Dev dev, const Comm& comm, const RingPlan& plan, float* lse, const bf16* qkv, size_t H,
                                 size_t K, size_t D) {
    const size_t T = plan.local.size();
    REQUIRE(comm.size == 1, "the control runs on one rank");
    reserve(dev, T, plan.local.rows(), H, K, D);
    convert(dev, buffers.qkv, qkv, T * (H + 2 * K) * D);
    ::rope_forward(dev, buffers.qkv, buffers.angles, buffers.precision, T, H, K, D);
    ::ring_attention_forward(dev, comm, plan, buffers.out, lse, (const float*)buffers.qkv, buffers.scratch, H, K, D);
}

template <class Dev, class E> void ring_attention_forward(Dev dev, const Comm& comm, const RingPlan& plan, E* out,
                                                          Acc<E>* lse, const E* qkv, RingScratch<E>& scratch, size_t H,
                                                          size_t K, size_t D) {
    if constexpr (replaced<E>) {
        attend(dev, comm, plan, lse, qkv, H, K, D);
        convert(dev, out, (const float*)buffers.out, plan.local.size() * H * D);
    } else ::ring_attention_forward(dev, comm, plan, out, lse, qkv, scratch, H, K, D);
}

// Computes the forward again, since the output that was kept is rounded.
template <class Dev, class E> void ring_attention_backward(Dev dev, const Comm& comm, const RingPlan& plan, E* dqkv,
                                                           const E* dout, const E* out, Acc<E>* lse, const E* qkv,
                                                           RingScratch<E>& scratch, size_t H, size_t K, size_t D) {
    if constexpr (replaced<E>) {
        const size_t T = plan.local.size();
        attend(dev, comm, plan, lse, qkv, H, K, D);
        convert(dev, buffers.dout, dout, T * H * D);
        ::ring_attention_backward(dev, comm, plan, buffers.dqkv, (const float*)buffers.dout, (const float*)buffers.out,
                                  (const float*)lse, (const float*)buffers.qkv, buffers.scratch, H, K, D);
        ::rope_backward(dev, buffers.dqkv, buffers.angles, buffers.precision, T, H, K, D);
        convert(dev, dqkv, (const float*)buffers.dqkv, T * (H + 2 * K) * D);
    } else ::ring_attention_backward(dev, comm, plan, dqkv, dout, out, lse, qkv, scratch, H, K, D);
}
} // namespace fp32
