// What the tests of the ring share, on both machines: rows in every mode, inputs of the whole batch, a rank's part.
#pragma once
#include "../layers/ring.cuh"
#include "check.h"

constexpr RingExchange exchanges[] = {
    {RingBackend::ring, 2}, {RingBackend::ring, 100}, {RingBackend::allgather}, {RingBackend::ulysses}};

enum class Mode { full, intra, anchor, interleaved, padded, masked };
constexpr Mode modes[] = {Mode::full, Mode::intra, Mode::anchor, Mode::interleaved, Mode::padded, Mode::masked};
inline bool has_anchor(Mode m) { return m != Mode::intra; }

// doc[] of B rows with documents of `mean` tokens. interleaved: pieces in mixed order; padded: two thirds of a row are
// padding, a document of its own (rows differ); masked: equal documents, of which those beyond a third have no label,
// so that the last rank has nothing to learn from.
inline std::vector<int32_t> make_docs(Mode mode, size_t B, size_t S, double mean, uint64_t seed) {
    std::vector<int32_t> doc(B * S);
    for (size_t b = 0; b < B && mode != Mode::full; b++) {
        int32_t current = 1, last = 1;
        for (size_t i = 0; i < S; i++) {
            if (i > 1 && hash_uniform(seed + b, i) < 1 / mean) {
                last++;
                current = mode == Mode::interleaved ? 1 + int32_t(hash64(seed + b, S + i) % last) : last;
            }
            if (mode == Mode::padded && i >= S / 3 + b) current = last + 1;
            if (mode == Mode::masked) current = 1 + int32_t(i * 24 / S);
            doc[b * S + i] = current;
        }
        if (has_anchor(mode)) doc[b * S] = 0;
    }
    return doc;
}

struct Sizes {
    size_t H, K, D;
    size_t qkv() const { return (H + 2 * K) * D; }
};

// One rank's results in the order of its local tokens: (T, H, D), (T, H + 2K, D), (T, H).
template <class E> struct Result {
    Buffer<E> out, dqkv;
    Buffer<Acc<E>> lse;
};

struct Case {
    size_t B, S;
    Sizes z;
    std::vector<int32_t> doc;
    bool anchor;
    Buffer<double> qkv, dout;
    Case(int ring, Mode mode, size_t B, size_t length, double mean, Sizes z, uint64_t seed)
        : B(B), S(ring_padded_length(length, ring)), z(z), doc(make_docs(mode, B, S, mean, seed)),
          anchor(has_anchor(mode)), qkv(B * S * z.qkv(), seed), dout(B * S * z.H * z.D, seed + 1) {
        if (mode != Mode::padded && mode != Mode::masked) return;
        for (size_t b = 0; b < B; b++) // what has no label has no gradient
            for (size_t i = (S / 3 + b) * z.H * z.D; i < S * z.H * z.D; i++) dout[b * S * z.H * z.D + i] = 0;
    }
    RingPlan plan(const Comm& comm, const AttentionTiles& tiles = attention_tiles_cpu,
                  const RingExchange& exchange = {}) const {
        RingPlan p;
        ring_plan_build(p, doc.data(), anchor, B, S, comm.rank, comm.size, tiles, exchange);
        return p;
    }
};

// Largest difference between the local results of a ring and those of one rank, which has the rows in order.
template <class A, class X>
double local_error(const RingPlan& plan, const Buffer<A>& local, const Buffer<X>& whole, size_t S, size_t width) {
    double worst = 0;
    for (size_t b = 0; b < plan.local.rows(); b++)
        for (size_t t = plan.local.row_begin[b]; t < size_t(plan.local.row_begin[b + 1]); t++)
            worst = std::max(worst, largest_error(local.data() + t * width,
                                                  whole.data() + (b * S + plan.local.index[t]) * width, width));
    return worst;
}

// A local rank's part of the inputs of the whole batch, rows of `width`.
template <class E> Buffer<E> local_rows(const RingPlan& plan, const Buffer<E>& whole, size_t S, size_t width) {
    Buffer<E> local(plan.local.size() * width);
    for (size_t b = 0; b < plan.local.rows(); b++)
        for (size_t t = plan.local.row_begin[b]; t < size_t(plan.local.row_begin[b + 1]); t++)
            std::copy_n(whole.data() + (b * S + plan.local.index[t]) * width, width, local.data() + t * width);
    return local;
}
// The sum of the squares of these differences.
template <class A, class X>
double local_squares(const RingPlan& plan, const Buffer<A>& local, const Buffer<X>& whole, size_t S, size_t width) {
    const Buffer<X> right = local_rows(plan, whole, S, width);
    double sum = 0;
    for (size_t i = 0; i < local.count; i++) sum += std::pow(double(local[i]) - double(right[i]), 2);
    return sum;
}
// (H, T) as the layers have it to (T, H), the order of all else.
template <class A> Buffer<A> by_token(const Buffer<A>& by_head, size_t H) {
    Buffer<A> to(by_head.count);
    const size_t T = by_head.count / H;
    for (size_t t = 0; t < T; t++)
        for (size_t h = 0; h < H; h++) to[t * H + h] = by_head[h * T + t];
    return to;
}

// The LSE as the backend leaves it to (T, H) of the local tokens: with ulysses other ranks have the other heads.
template <class A> Buffer<A> local_lse(const Comm& comm, const RingPlan& plan, const Buffer<A>& lse, size_t H) {
    if (plan.backend != RingBackend::ulysses) return by_token(lse, H);
    const size_t T = plan.local.size(), all_tokens = plan.gathered.size();
    Buffer<A> all(H * all_tokens), to(T * H);
    comm_gather(Cpu(), comm, all.data(), lse.data(), lse.count);
    size_t t = 0;
    for (const TokenRange& range : plan.places[plan.rank])
        for (int32_t i = range.begin; i < range.end; i++, t++)
            for (size_t h = 0; h < H; h++) to[t * H + h] = all[h * all_tokens + i];
    return to;
}

template <class E> struct Scratch {
    Buffer<Acc<E>> state, delta, dkv, danchor, dgathered, dkv_send, dkv_receive;
    Buffer<E> anchor, send, receive, gathered;
    explicit Scratch(const RingScratchSizes& n)
        : state(n.state), delta(n.delta), dkv(n.dkv), danchor(n.danchor), dgathered(n.dgathered), dkv_send(n.dkv_send),
          dkv_receive(n.dkv_receive), anchor(n.anchor), send(n.send), receive(n.receive), gathered(n.gathered) {}
    RingScratch<E> pointers() {
        return {state, delta, dkv, anchor, danchor, send, receive, gathered, dgathered, dkv_send, dkv_receive};
    }
};

// On the CPU, from inputs of the whole batch.
template <class E> Result<E> attend(const Comm& comm, const RingPlan& plan, const Buffer<E>& qkv, const Buffer<E>& dout,
                                    size_t S, Sizes z) {
    const size_t T = plan.local.size(), B = plan.local.rows(), W = z.qkv(), O = z.H * z.D;
    const Buffer<E> local_qkv = local_rows(plan, qkv, S, W), local_dout = local_rows(plan, dout, S, O);
    Scratch<E> scratch(ring_scratch_sizes(Cpu(), {plan.backend, plan.held}, T, comm.size, B, z.H, z.K, z.D));
    RingScratch<E> pointers = scratch.pointers();
    Result<E> r{Buffer<E>(T * O), Buffer<E>(T * W), Buffer<Acc<E>>(T * z.H)};
    ring_attention_forward(Cpu(), comm, plan, r.out.data(), r.lse.data(), local_qkv.data(), pointers, z.H, z.K, z.D);
    for (Buffer<E>* x : {&scratch.anchor, &scratch.send, &scratch.receive, &scratch.gathered}) x->poison();
    for (auto* x : {&scratch.state, &scratch.delta, &scratch.dkv, &scratch.dgathered}) x->poison();
    ring_attention_backward(Cpu(), comm, plan, r.dqkv.data(), local_dout.data(), r.out.data(), r.lse.data(),
                            local_qkv.data(), pointers, z.H, z.K, z.D);
    return {std::move(r.out), std::move(r.dqkv), local_lse(comm, plan, r.lse, z.H)};
}
