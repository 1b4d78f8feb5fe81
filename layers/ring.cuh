// Attention across the ranks of one ring, by one of three exchanges (--ring_backend); the plan is ring_plan.cuh's.
//
//   ring       Rank r attends its queries to its own keys first; in step s = 1..n-1 it sends keys and values to rank
//              r + s and receives those of rank r - s (mod n), each time only the chunks of which the receiver sees
//              something. (O, LSE) in Acc goes on from step to step as the running state of attention_anchor.cuh.
//              Backward: dK and dV of received keys are summed in Acc, go back to their owner in step s, and are added
//              there in the order of the steps; dQ stays.
//   allgather  The same keys, all at once; then one call for own and received ones, in the order of the row. dK and dV
//              of received keys go back at once, in Acc, and are added at the owner in the order of the ranks.
//   ulysses    All-to-all: every rank gets H / n heads (K / n KV heads) of all tokens, attends over whole rows, and
//              sends its part of O back; in the backward so with Q, K, V, O, dO and with dQ, dK, dV.
//              (Jacobs et al. 2023, arXiv 2309.14509)
//   anchor     ring, allgather: its k0, v0 (a row's token 0, on rank 0) are broadcast; dk0, dv0 are summed over the
//              ring and added to token 0 on rank 0. ulysses: it is in the row.
//
// Own keys and values are packed once, and others fetch from there what they see, so a rank has nothing to do for them
// later. Where the buffers hold what all steps move (packs), all transfers start at once and no rank waits in a step
// for one that is behind; gradients of keys are added when all steps are done. Else (a full mask, whose steps are of
// equal work; or memory is short) two steps are under way at a time.
#pragma once
#include "../attention_anchor.cuh"
#include "../core/comm.h"
#include "../core/kernel.h"
#include "ring_plan.cuh"

// Buffers of one layer's attention; a layer leaves nothing in them for another call. Sizes in elements; h is
// ring_steps_held, n the number of ranks. In brackets: what ulysses has there, X = (3 H + 2 K) D.
template <class E> struct RingScratch {
    Acc<E>* state = nullptr;       // (T, H, D) o in the forward, dq in the backward [(n T, H / n, D)]
    Acc<E>* delta = nullptr;       // (H, T) [(H / n, n T)]
    Acc<E>* dkv = nullptr;         // (T, 2, K, D) of the own tokens [(n T, 2, K / n, D)]
    E* anchor = nullptr;           // (B, 2, K, D) k0, v0
    Acc<E>* danchor = nullptr;     // (B, 2, K, D)
    E* send = nullptr;             // (T, 2, K, D) own keys and values [(T, X)]
    E* receive = nullptr;          // (<= h T, 2, K, D) [(T, X)]
    E* gathered = nullptr;         // allgather: (<= n T, 2, K, D) own and received [(n T, X / n)]
    Acc<E>* dgathered = nullptr;   // likewise, allgather alone
    Acc<E>* dkv_send = nullptr;    // (<= h T, 2, K, D) of received tokens
    Acc<E>* dkv_receive = nullptr; // (<= h T, 2, K, D) of sent tokens
};
struct RingScratchSizes {
    size_t state, delta, dkv, anchor, danchor, send, receive, gathered, dgathered, dkv_send, dkv_receive;
};
template <class Dev> RingScratchSizes ring_scratch_sizes(Dev, const RingExchange& exchange, size_t T, size_t ring,
                                                         size_t B, size_t H, size_t K, size_t D) {
    const size_t own = T * 2 * K * D, anchor = B * 2 * K * D, held = ring == 1 ? 0 : ring_steps_held(exchange, ring);
    const bool ulysses = ring > 1 && exchange.backend == RingBackend::ulysses;
    const size_t dkv =
        std::is_same_v<Dev, Gpu> && (ring == 1 || ulysses) ? 0 : own; // then dK and dV are stored at once
    const size_t heads = T * (3 * H + 2 * K) * D;
    if (ulysses) return {T * H * D, T * H, dkv, anchor, anchor, heads, heads, heads, 0, 0, 0};
    const size_t all = ring > 1 && exchange.backend == RingBackend::allgather ? ring * own : 0, moving = held * own;
    return {T * H * D, T * H, dkv, anchor, anchor, ring > 1 ? own : 0, moving, all, all, moving, moving};
}

// Rows of `width` elements, each `stride` from the next.
template <class E>
void ring_copy(Cpu, E* to, size_t to_stride, const E* from, size_t from_stride, size_t tokens, size_t width) {
#pragma omp parallel for schedule(static)
    for (size_t t = 0; t < tokens; t++) std::copy_n(from + t * from_stride, width, to + t * to_stride);
}
template <class A> void ring_add(Cpu, A* to, const A* from, size_t count) {
#pragma omp parallel for schedule(static)
    for (size_t i = 0; i < count; i++) to[i] += from[i];
}

#ifdef __CUDACC__
// Gpu: one block a token, W elements at once a thread. Bound by memory.
template <class E, int W> __global__ void __launch_bounds__(256)
    ring_copy_kernel(E* to, size_t to_stride, const E* from, size_t from_stride, size_t width) {
    to += blockIdx.x * to_stride, from += blockIdx.x * from_stride;
#pragma unroll 4
    for (size_t i = threadIdx.x * W; i < width; i += 256 * W) pack_store<E, W>(to + i, pack_load<W>(from + i));
}
template <class E>
void ring_copy(Gpu gpu, E* to, size_t to_stride, const E* from, size_t from_stride, size_t tokens, size_t width) {
    if (tokens == 0) return;
    const bool packs =
        packs_fit<E>(width, to, from) && to_stride % pack_width<E> == 0 && from_stride % pack_width<E> == 0;
    auto kernel = packs ? ring_copy_kernel<E, pack_width<E>> : ring_copy_kernel<E, 1>;
    kernel<<<grid_blocks(tokens), 256, 0, gpu.stream>>>(to, to_stride, from, from_stride, width);
    CUDA_CHECK(cudaGetLastError());
}

template <class A, int W> __global__ void __launch_bounds__(256) ring_add_kernel(A* to, const A* from, size_t count) {
    const size_t i = (blockIdx.x * size_t(256) + threadIdx.x) * W;
    if (i >= count) return;
    const Pack<A, W> x = pack_load<W>(to + i), y = pack_load<W>(from + i);
    A sum[W];
#pragma unroll
    for (int j = 0; j < W; j++) sum[j] = x[j] + y[j];
    pack_store<A, W>(to + i, sum);
}
template <class A> void ring_add(Gpu gpu, A* to, const A* from, size_t count) {
    if (count == 0) return;
    const bool packs = packs_fit<A>(count, to, from);
    const size_t each = 256 * (packs ? pack_width<A> : 1);
    auto kernel = packs ? ring_add_kernel<A, pack_width<A>> : ring_add_kernel<A, 1>;
    kernel<<<grid_blocks((count + each - 1) / each), 256, 0, gpu.stream>>>(to, from, count);
    CUDA_CHECK(cudaGetLastError());
}
#endif

// to (tokens, to_stride) = the tokens in `ranges`.
template <class Dev, class E> void ring_gather(Dev dev, E* to, size_t to_stride, const E* from, size_t from_stride,
                                               const std::vector<TokenRange>& ranges, size_t width) {
    for (const TokenRange& r : ranges) {
        ring_copy(dev, to, to_stride, from + r.begin * from_stride, from_stride, r.end - r.begin, width);
        to += (r.end - r.begin) * to_stride;
    }
}
// The tokens in `ranges` = from (tokens, from_stride).
template <class Dev, class E> void ring_scatter(Dev dev, E* to, size_t to_stride, const E* from, size_t from_stride,
                                                const std::vector<TokenRange>& ranges, size_t width) {
    for (const TokenRange& r : ranges) {
        ring_copy(dev, to + r.begin * to_stride, to_stride, from, from_stride, r.end - r.begin, width);
        from += (r.end - r.begin) * from_stride;
    }
}
// The tokens in `ranges` += from (tokens, width).
template <class Dev, class A>
void ring_add(Dev dev, A* to, const A* from, const std::vector<TokenRange>& ranges, size_t width) {
    for (const TokenRange& r : ranges) {
        ring_add(dev, to + r.begin * width, from, (r.end - r.begin) * width);
        from += (r.end - r.begin) * width;
    }
}

// Where the first tokens of the rows are.
inline std::vector<TokenRange> anchor_ranges(const Tokens& tokens) {
    std::vector<TokenRange> ranges;
    for (size_t b = 0; b < tokens.rows(); b++) ranges.push_back({tokens.row_begin[b], tokens.row_begin[b] + 1});
    return ranges;
}

// The rows' k0 and v0 from rank 0 to all; null without an anchor.
template <class Dev, class E> const E* ring_anchor(Dev dev, const Comm& comm, const RingPlan& plan, E* anchor,
                                                   const E* kv, size_t stride, size_t width) {
    if (!plan.anchor) return nullptr;
    if (plan.rank == 0) ring_gather(dev, anchor, width, kv, stride, anchor_ranges(plan.local), width);
    comm_broadcast(dev, comm, anchor, plan.local.rows() * width, 0);
    return anchor;
}

// The messages of one step, under way.
using Shifts = std::vector<Shift>;

template <class Dev, class X> Shifts ring_start(Dev dev, const Comm& comm, const std::vector<RingMove>& moves,
                                                const X* send, int to, X* receive, int from, size_t width) {
    Shifts shifts;
    for (const RingMove& m : moves) {
        shifts.push_back(
            shift_start(dev, comm, send + m.at * width, m.send * width, to, receive, m.receive * width, from));
        receive += m.receive * width;
    }
    return shifts;
}
template <class Dev> void ring_wait(Dev dev, Shifts& shifts) {
    for (Shift& shift : shifts) shift_wait(dev, shift);
}

// The keys and values of one step; beyond the last step: nothing.
template <class Dev, class E> void ring_start_keys(Dev dev, const Comm& comm, const RingPlan& plan, size_t i,
                                                   RingScratch<E>& scratch, size_t width, std::vector<Shifts>& keys) {
    if (i >= plan.steps.size()) return;
    const RingStep& s = plan.steps[i];
    keys[i] = ring_start(dev, comm, s.keys, (const E*)scratch.send, s.to, scratch.receive + s.received_at * width,
                         s.from, width);
}
// The gradients of the keys received in a step to their owner, those of the keys sent to this rank.
template <class Dev, class E>
Shifts ring_start_back(Dev dev, const Comm& comm, const RingStep& s, RingScratch<E>& scratch, size_t width) {
    return ring_start(dev, comm, s.back, (const Acc<E>*)scratch.dkv_send, s.from,
                      scratch.dkv_receive + s.sent_at * width, s.to, width);
}

// Packs the own keys and starts all steps, or as many as there is room for.
template <class Dev, class E> std::vector<Shifts> ring_begin_keys(Dev dev, const Comm& comm, const RingPlan& plan,
                                                                  const E* kv, size_t stride, RingScratch<E>& scratch,
                                                                  size_t width) {
    const size_t steps = plan.steps.size();
    std::vector<Shifts> keys(steps);
    if (steps > 0) ring_copy(dev, scratch.send, width, kv, stride, plan.local.size(), width);
    for (size_t i = 0; i < (plan.early ? steps : 2); i++) ring_start_keys(dev, comm, plan, i, scratch, width, keys);
    return keys;
}

// The anchor's gradient, summed over the ring, to token 0; then the one rounding.
template <class Dev, class E> void ring_store_dkv(Dev dev, const Comm& comm, const RingPlan& plan, E* dkv_out,
                                                  size_t stride, RingScratch<E>& scratch, size_t width) {
    const size_t B = plan.local.rows();
    if (plan.anchor) comm_sum(dev, comm, scratch.danchor, B * width);
    if (plan.anchor && plan.rank == 0)
        ring_add(dev, scratch.dkv, (const Acc<E>*)scratch.danchor, anchor_ranges(plan.local), width);
    attention_store(dev, dkv_out, stride, scratch.dkv, plan.local.size(), width);
}

// Brings own and received keys into the row's order, when they have come.
template <class Dev, class E>
void allgather_keys(Dev dev, const RingPlan& plan, std::vector<Shifts>& keys, RingScratch<E>& scratch, size_t width) {
    auto put = [&](const E* from, int rank) {
        ring_scatter(dev, scratch.gathered, width, from, width, plan.places[rank], width);
    };
    put(scratch.send, plan.rank);
    for (Shifts& shifts : keys) ring_wait(dev, shifts);
    for (const RingStep& s : plan.steps) put(scratch.receive + s.received_at * width, s.from);
}

template <class Dev, class E> void allgather_forward(Dev dev, const Comm& comm, const RingPlan& plan, E* out,
                                                     Acc<E>* lse, const E* qkv, RingScratch<E>& scratch, size_t H,
                                                     size_t K, size_t D) {
    const size_t stride = (H + 2 * K) * D, width = 2 * K * D;
    const E* kv = qkv + H * D;
    const E* anchor = ring_anchor(dev, comm, plan, scratch.anchor, kv, stride, width);
    std::vector<Shifts> keys = ring_begin_keys(dev, comm, plan, kv, stride, scratch, width);
    allgather_keys(dev, plan, keys, scratch, width);
    attention_forward(dev, out, lse, scratch.state, qkv, stride, (const E*)scratch.gathered, width, anchor, plan.own,
                      {true, true}, plan.local, plan.gathered, H, K, D);
}

template <class Dev, class E> void allgather_backward(Dev dev, const Comm& comm, const RingPlan& plan, E* dqkv,
                                                      const E* dout, const E* out, const Acc<E>* lse, const E* qkv,
                                                      RingScratch<E>& scratch, size_t H, size_t K, size_t D) {
    const size_t stride = (H + 2 * K) * D, width = 2 * K * D, T = plan.local.size(), n = plan.size;
    const E* kv = qkv + H * D;
    Acc<E>*dq = scratch.state, *dgathered = scratch.dgathered, *danchor = plan.anchor ? scratch.danchor : nullptr;
    const E* anchor = ring_anchor(dev, comm, plan, scratch.anchor, kv, stride, width);
    std::vector<Shifts> keys = ring_begin_keys(dev, comm, plan, kv, stride, scratch, width), back;
    fill_zero(dev, dgathered, plan.gathered.size() * width * sizeof(*dgathered));
    if (danchor) fill_zero(dev, danchor, plan.local.rows() * width * sizeof(*danchor));
    attention_backward_begin(dev, scratch.delta, dq, danchor, dout, out, lse, qkv, stride, anchor, plan.local, H, K, D);
    allgather_keys(dev, plan, keys, scratch, width);
    attention_backward(dev, dq, dgathered, (E*)nullptr, 0, danchor, dout, qkv, stride, (const E*)scratch.gathered,
                       width, lse, scratch.delta, plan.own, plan.local, plan.gathered, H, K, D);
    auto take = [&](Acc<E>* to, int rank) {
        ring_gather(dev, to, width, (const Acc<E>*)dgathered, width, plan.places[rank], width);
    };
    for (const RingStep& s : plan.steps) {
        take(scratch.dkv_send + s.received_at * width, s.from);
        back.push_back(ring_start_back(dev, comm, s, scratch, width));
    }
    attention_store_dq(dev, dqkv, stride, dq, T, H, D);
    take(scratch.dkv, plan.rank);
    for (Shifts& shifts : back) ring_wait(dev, shifts);
    for (size_t r = 0; r < n; r++) {
        if (r == size_t(plan.rank)) continue;
        const RingStep& s = plan.steps[(r + n - plan.rank) % n - 1]; // that rank saw keys of this one
        ring_add(dev, scratch.dkv, (const Acc<E>*)scratch.dkv_receive + s.sent_at * width, s.send, width);
    }
    ring_store_dkv(dev, comm, plan, dqkv + H * D, stride, scratch, width);
}

// Columns of all heads at the own tokens, of which rank r has those from r * width on; or, on the other side of the
// all-to-all, the own heads at all tokens (n T, width).
template <class E> struct HeadPart {
    E* to;
    size_t to_stride;
    const E* from;
    size_t from_stride, width;
};
// The all-to-all: pack(part, rank, to, width) writes what goes to a rank, place(part, rank, from, width) puts where it
// belongs what came from one, and keep(part) does both for this rank's own; `width` elements from row to row.
template <class Dev, class E, class Pack, class Place, class Keep>
void heads_exchange(Dev dev, const Comm& comm, const RingPlan& plan, const std::vector<HeadPart<E>>& parts, E* send,
                    E* receive, Pack pack, Place place, Keep keep) {
    size_t width = 0;
    for (const HeadPart<E>& p : parts) width += p.width;
    const size_t slot = plan.local.size() * width;
    Shifts shifts;
    for (const RingStep& s : plan.steps) {
        E* const at = send + (&s - plan.steps.data()) * slot;
        E* column = at;
        for (const HeadPart<E>& p : parts) pack(p, s.to, column, width), column += p.width;
        shifts.push_back(shift_start(dev, comm, (const E*)at, slot, s.to, receive + (at - send), slot, s.from));
    }
    for (const HeadPart<E>& p : parts) keep(p);
    ring_wait(dev, shifts);
    for (const RingStep& s : plan.steps) {
        const E* column = receive + (&s - plan.steps.data()) * slot;
        for (const HeadPart<E>& p : parts) place(p, s.from, column, width), column += p.width;
    }
}

// From all heads of the own tokens to the own heads of all tokens.
template <class Dev, class E> void heads_scatter(Dev dev, const Comm& comm, const RingPlan& plan,
                                                 const std::vector<HeadPart<E>>& parts, E* send, E* receive) {
    using Part = HeadPart<E>;
    auto pack = [&](const Part& p, int rank, E* to, size_t width) {
        ring_copy(dev, to, width, p.from + rank * p.width, p.from_stride, plan.local.size(), p.width);
    };
    auto place = [&](const Part& p, int rank, const E* from, size_t width) {
        ring_scatter(dev, p.to, p.to_stride, from, width, plan.places[rank], p.width);
    };
    auto keep = [&](const Part& p) { place(p, plan.rank, p.from + plan.rank * p.width, p.from_stride); };
    heads_exchange(dev, comm, plan, parts, send, receive, pack, place, keep);
}

// From the own heads of all tokens to all heads of the own tokens.
template <class Dev, class E> void heads_gather(Dev dev, const Comm& comm, const RingPlan& plan,
                                                const std::vector<HeadPart<E>>& parts, E* send, E* receive) {
    using Part = HeadPart<E>;
    auto pack = [&](const Part& p, int rank, E* to, size_t width) {
        ring_gather(dev, to, width, p.from, p.from_stride, plan.places[rank], p.width);
    };
    auto place = [&](const Part& p, int rank, const E* from, size_t width) {
        ring_copy(dev, p.to + rank * p.width, p.to_stride, from, width, plan.local.size(), p.width);
    };
    auto keep = [&](const Part& p) { pack(p, plan.rank, p.to + plan.rank * p.width, p.to_stride); };
    heads_exchange(dev, comm, plan, parts, send, receive, pack, place, keep);
}

// Queries, keys and values of rows of (H + 2K) heads; `to` has H / n and K / n of them.
template <class E> std::vector<HeadPart<E>> qkv_parts(E* to, size_t to_heads, size_t to_keys, const E* from,
                                                      size_t from_heads, size_t from_keys, size_t D) {
    const size_t to_stride = (to_heads + 2 * to_keys) * D, from_stride = (from_heads + 2 * from_keys) * D;
    const size_t heads = std::min(to_heads, from_heads) * D, keys = std::min(to_keys, from_keys) * D;
    std::vector<HeadPart<E>> parts = {{to, to_stride, from, from_stride, heads}};
    for (size_t i : {0, 1})
        parts.push_back(
            {to + (to_heads + i * to_keys) * D, to_stride, from + (from_heads + i * from_keys) * D, from_stride, keys});
    return parts;
}

// k0 and v0 of the own heads, which stand in the rows; null without an anchor.
template <class Dev, class E>
const E* ulysses_anchor(Dev dev, const RingPlan& plan, RingScratch<E>& scratch, size_t h, size_t k, size_t D) {
    if (!plan.anchor) return nullptr;
    ring_gather(dev, scratch.anchor, 2 * k * D, (const E*)scratch.gathered + h * D, (h + 2 * k) * D,
                anchor_ranges(plan.gathered), 2 * k * D);
    return scratch.anchor;
}

// scratch.receive takes the messages, then attention's outputs, which are sent from there; scratch.gathered takes its
// inputs, then the messages that answer.
template <class Dev, class E> void ulysses_forward(Dev dev, const Comm& comm, const RingPlan& plan, E* out, Acc<E>* lse,
                                                   const E* qkv, RingScratch<E>& scratch, size_t H, size_t K,
                                                   size_t D) {
    const size_t h = H / plan.size, k = K / plan.size, stride = (h + 2 * k) * D;
    const E *q = scratch.gathered, *kv = q + h * D; // (n T, h + 2k, D)
    E* heads_out = scratch.receive;                 // (n T, h, D)
    heads_scatter(dev, comm, plan, qkv_parts(scratch.gathered, h, k, qkv, H, K, D), scratch.send, scratch.receive);
    const E* anchor = ulysses_anchor(dev, plan, scratch, h, k, D);
    attention_forward(dev, heads_out, lse, scratch.state, q, stride, kv, stride, anchor, plan.own, {true, true},
                      plan.gathered, plan.gathered, h, k, D);
    heads_gather(dev, comm, plan, std::vector<HeadPart<E>>{{out, H * D, heads_out, h * D, h * D}}, scratch.send,
                 scratch.gathered);
}

template <class Dev, class E> void ulysses_backward(Dev dev, const Comm& comm, const RingPlan& plan, E* dqkv,
                                                    const E* dout, const E* out, const Acc<E>* lse, const E* qkv,
                                                    RingScratch<E>& scratch, size_t H, size_t K, size_t D) {
    const size_t h = H / plan.size, k = K / plan.size, stride = (h + 2 * k) * D, width = 2 * k * D;
    const size_t all = plan.gathered.size(), B = plan.local.rows();
    const E *q = scratch.gathered, *kv = q + h * D;                                        // (n T, h + 2k, D)
    E *heads_out = scratch.gathered + all * stride, *heads_dout = heads_out + all * h * D; // (n T, h, D) each
    E* dheads = scratch.receive;                                                           // (n T, h + 2k, D)
    Acc<E>*dq = scratch.state, *dkv = scratch.dkv, *danchor = plan.anchor ? scratch.danchor : nullptr;
    std::vector<HeadPart<E>> parts = qkv_parts(scratch.gathered, h, k, qkv, H, K, D);
    parts.push_back({heads_out, h * D, out, H * D, h * D});
    parts.push_back({heads_dout, h * D, dout, H * D, h * D});
    heads_scatter(dev, comm, plan, parts, scratch.send, scratch.receive);
    const E* anchor = ulysses_anchor(dev, plan, scratch, h, k, D);
    if (dkv) fill_zero(dev, dkv, all * width * sizeof(*dkv));
    if (danchor) fill_zero(dev, danchor, B * width * sizeof(*danchor));
    attention_backward_begin(dev, scratch.delta, dq, danchor, (const E*)heads_dout, (const E*)heads_out, lse, q, stride,
                             anchor, plan.gathered, h, k, D);
    attention_backward(dev, dq, dkv, dheads + h * D, stride, danchor, (const E*)heads_dout, q, stride, kv, stride, lse,
                       scratch.delta, plan.own, plan.gathered, plan.gathered, h, k, D);
    attention_store_dq(dev, dheads, stride, dq, all, h, D);
    heads_gather(dev, comm, plan, qkv_parts(dqkv, H, K, (const E*)dheads, h, k, D), scratch.send, scratch.gathered);
}

inline void ring_require(const Comm& comm, const RingPlan& plan, size_t H, size_t K) {
    REQUIRE(comm.rank == plan.rank && comm.size == plan.size, "build the plan for this rank of this ring");
    REQUIRE(plan.backend != RingBackend::ulysses || (H % plan.size == 0 && K % plan.size == 0),
            "ulysses deals out whole KV heads: their number must be a multiple of the ranks");
}

// out and lse of the local tokens; qkv is rotated (RoPE). lse is for the backward alone: ulysses leaves the own heads
// of all tokens there, (H / n, n T).
template <class Dev, class E> void ring_attention_forward(Dev dev, const Comm& comm, const RingPlan& plan,
                                                          E* out /*(T, H, D)*/, Acc<E>* lse /*(H, T)*/,
                                                          const E* qkv /*(T, H + 2K, D)*/, RingScratch<E>& scratch,
                                                          size_t H, size_t K, size_t D) {
    ring_require(comm, plan, H, K);
    if (plan.backend == RingBackend::allgather)
        return allgather_forward(dev, comm, plan, out, lse, qkv, scratch, H, K, D);
    if (plan.backend == RingBackend::ulysses) return ulysses_forward(dev, comm, plan, out, lse, qkv, scratch, H, K, D);
    const size_t stride = (H + 2 * K) * D, width = 2 * K * D;
    const E* kv = qkv + H * D;
    const size_t steps = plan.steps.size();
    const E* anchor = ring_anchor(dev, comm, plan, scratch.anchor, kv, stride, width);
    std::vector<Shifts> keys = ring_begin_keys(dev, comm, plan, kv, stride, scratch, width);
    attention_forward(dev, out, lse, scratch.state, qkv, stride, kv, stride, anchor, plan.own, {true, steps == 0},
                      plan.local, plan.local, H, K, D);
    for (size_t i = 0; i < steps; i++) {
        const RingStep& step = plan.steps[i];
        ring_wait(dev, keys[i]);
        attention_forward(dev, out, lse, scratch.state, qkv, stride,
                          (const E*)scratch.receive + step.received_at * width, width, anchor, step.map,
                          {false, i + 1 == steps}, plan.local, step.received, H, K, D);
        if (!plan.early) ring_start_keys(dev, comm, plan, i + 2, scratch, width, keys);
    }
}

// dqkv is overwritten. The gradients of step i's keys travel back while later steps are computed.
template <class Dev, class E>
void ring_attention_backward(Dev dev, const Comm& comm, const RingPlan& plan, E* dqkv /*(T, H + 2K, D)*/,
                             const E* dout /*(T, H, D)*/, const E* out /*(T, H, D)*/, const Acc<E>* lse /*(H, T)*/,
                             const E* qkv /*(T, H + 2K, D)*/, RingScratch<E>& scratch, size_t H, size_t K, size_t D) {
    ring_require(comm, plan, H, K);
    if (plan.backend == RingBackend::allgather)
        return allgather_backward(dev, comm, plan, dqkv, dout, out, lse, qkv, scratch, H, K, D);
    if (plan.backend == RingBackend::ulysses)
        return ulysses_backward(dev, comm, plan, dqkv, dout, out, lse, qkv, scratch, H, K, D);
    const size_t stride = (H + 2 * K) * D, width = 2 * K * D, T = plan.local.size(), B = plan.local.rows();
    const size_t steps = plan.steps.size(), unfinished = plan.early ? steps : 1; // steps whose gradients are under way
    const E* kv = qkv + H * D;
    Acc<E>*dq = scratch.state, *dkv = scratch.dkv, *danchor = plan.anchor ? scratch.danchor : nullptr;
    E* const dkv_out = dqkv + H * D;
    const E* anchor = ring_anchor(dev, comm, plan, scratch.anchor, kv, stride, width);
    std::vector<Shifts> keys = ring_begin_keys(dev, comm, plan, kv, stride, scratch, width), back(steps);
    if (dkv) fill_zero(dev, dkv, T * width * sizeof(*dkv));
    if (danchor) fill_zero(dev, danchor, B * width * sizeof(*danchor));
    attention_backward_begin(dev, scratch.delta, dq, danchor, dout, out, lse, qkv, stride, anchor, plan.local, H, K, D);
    attention_backward(dev, dq, dkv, steps == 0 ? dkv_out : nullptr, stride, danchor, dout, qkv, stride, kv, stride,
                       lse, scratch.delta, plan.own, plan.local, plan.local, H, K, D);
    auto finish = [&](size_t i) {
        const RingStep& step = plan.steps[i];
        ring_wait(dev, back[i]);
        ring_add(dev, dkv, (const Acc<E>*)scratch.dkv_receive + step.sent_at * width, step.send, width);
    };
    for (size_t i = 0; i < steps; i++) {
        const RingStep& step = plan.steps[i];
        Acc<E>* partial = scratch.dkv_send + step.received_at * width;
        ring_wait(dev, keys[i]);
        fill_zero(dev, partial, step.received.size() * width * sizeof(*partial));
        attention_backward(dev, dq, partial, (E*)nullptr, 0, danchor, dout, qkv, stride,
                           (const E*)scratch.receive + step.received_at * width, width, lse, scratch.delta, step.map,
                           plan.local, step.received, H, K, D);
        if (i >= unfinished) finish(i - unfinished);
        back[i] = ring_start_back(dev, comm, step, scratch, width);
        if (!plan.early) ring_start_keys(dev, comm, plan, i + 2, scratch, width, keys);
    }
    attention_store_dq(dev, dqkv, stride, dq, T, H, D);
    for (size_t i = steps - std::min(steps, unfinished); i < steps; i++) finish(i);
    if (steps > 0) ring_store_dkv(dev, comm, plan, dkv_out, stride, scratch, width);
}
