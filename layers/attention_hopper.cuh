// Attention for Hopper (sm_90a): wgmma, TMA, warpgroups with roles. bf16, head sizes 64 and 128.
//
// The mathematics, the mask and the tile map stand in attention_anchor.cuh, the instructions in core/ptx.h. One block a
// multiprocessor stays for the whole launch and takes (tile, head) by (tile, head) from a counter, longest first; the
// heads that are under way at a time are few enough for what they read again and again to stay in the L2 cache.
// Warpgroups 1 and 2 compute, 64 rows of the tile each. Warpgroup 0 gives its registers away and loads: one warp in the
// forward; in the backward a second one brings LSE, delta and labels. Slots of shared memory go round between them,
// each with a barrier "full" and a barrier "empty". The anchor is no step: it is where the forward's softmax starts,
// and attention_backward_begin has computed its share of the gradients.
//
// Forward: a tile of 128 queries visits tiles of 128 keys. Step n of a warpgroup:
//
//   issue S(n) = Q K(n)^T, then O += P(n-1) V(n-1)
//   wait for S(n); mask; m, P(n) = exp(S(n) - m), l
//   wait for O; round P(n), rescale O if m rose much
//
// A tile's first steps in time, for D = 128. A column is as long as one product of one warpgroup, or its exponentials.
// + issues, O0 is O += P(0) V(0), and what has a prime is warpgroup 2's. Full: what warpgroup 1 waits for; empty: what
// both have left, whose slot the loader fills again. Nothing but the slots holds the warpgroups together; without a
// word between them each computes while the tensor cores work for the other:
//
//   loader        Q K0 K1 V0                  K2 V1                   K3      V2                      K4
//   full v                    K0              V0 K1           V1 K2                           V2 K3
//   empty ^                                   K0                      K1      V0                      K2
//   warpgroup 1               +S0     P0      +S1 +O0 P1      +S2 +O1                 P2      +S3 +O2
//   tensor cores              S0      S0'     S1      O0      S1'     O0'     S2      O1      S2'     O1'
//   warpgroup 2               +S0'            P0'     +S1' +O0'       P1'     +S2' +O1'               P2'
//
// Exponentials take half the time of the products, so that with two warpgroups the tensor cores always have work. Q
// stays in registers, which leaves shared memory a fifth less to read.
//
// Backward: a tile of 128 keys of a KV head visits tiles of 64 queries of all heads of its group. The scores stand
// transposed, (keys, queries), so that P^T and dS^T are, rounded in registers, operands of the next products. Only dS
// goes through shared memory, because dQ sums over the keys of both warpgroups; it is computed one step late, so that
// neither has to wait for the other. Step n:
//
//   issue dP(n) = V dO(n)^T - delta, then dV += P(n) dO(n)
//   send dQ(n-2)
//   wait for dP; dS(n) = P(n) dP(n), to shared memory
//   wait for dV; issue S(n+1) = K Q(n+1)^T - LSE, dQ(n-1) = dS(n-1) K, dK += dS(n) Q(n)
//   tell that dS(n) is there
//   wait for S; P(n+1) = exp(S(n+1))
//   wait for dQ; dQ(n-1) to shared memory
//   wait for dK
//
// A step in the midst of others, drawn likewise, from where the tensor cores begin with it; warpgroup 1 has issued its
// dP and dV at the end of the step before:
//
//   loader           Q(n+2)                          dO(n+2)
//   second loader    LSE(n+2)                        delta(n+2)
//   full v                           Q(n+1)                                  dO(n+1)
//   empty ^          Q(n-1)                          dO(n)
//   warpgroup 1              dS      +S +dQ +dK              P       dQ out  +dP +dV, send dQ
//   tensor cores     dP      dV      dP'     dV'     S       dQ      dK      S'      dQ'     dK'
//   warpgroup 2      +dP' +dV', send dQ'     dS'     +S' +dQ' +dK'                   P'      dQ' out
//
// dQ is sent, and added in memory, by the copy engine, in any order. Where the map has turns (tile_map_take_turns) the
// order is fixed: two more warps send it, which wait until all tiles before this one have added to the same queries,
// and then count it. A warp that computes waits only where dQ of the step before still stands in its way. LSE and delta
// are subtracted by the products themselves, which read a quarter of what it takes to bring them to every thread:
// shared memory is what the backward has least of.
//
// Where tiles visit much (pairs_from), blocks work in pairs: neighbouring tiles visit the same, and each block loads
// half the columns of it for both. At full power what the L2 cache must bring is a part of the heat, which sets the
// clock.
#pragma once
#include "../attention_anchor.cuh"
#include "../core/ptx.h"

#ifdef __CUDACC__
namespace hopper {

constexpr int forward_queries = 128, forward_keys = 128; // of a tile
constexpr int block_threads = 384;
constexpr uint32_t fill_arrivals = 33; // that fill a slot: a warp's small copies, and what the copy engine brings
constexpr int rows_of_group = 64, columns_of_half = 64;
constexpr int pairs_from = 4096; // keys, or queries, that a tile visits in the mean, from which blocks work in pairs
constexpr float log2e = 1.44269504088896341f;

// A place in a ring of buffers; `phase` is the parity of the barrier's phase that fills it.
template <int SLOTS> struct Ring {
    int slot = 0;
    uint32_t phase = 0;
    __device__ __forceinline__ void next() {
        if (++slot == SLOTS) slot = 0, phase ^= 1;
    }
};

// The same for two slots that take steps (or items) in turn: of step n.
__device__ __forceinline__ int slot_of(uint32_t n) { return n & 1; }
__device__ __forceinline__ uint32_t phase_of(uint32_t n) { return n >> 1 & 1; }

// How the second block of a pair learns the items.
struct ItemSlots {
    int item[2];
    ptx::Barrier full[2], empty[2];
    __device__ __forceinline__ void init() {
        for (int i = 0; i < 2; i++) ptx::barrier_init(&full[i], 1), ptx::barrier_init(&empty[i], 1);
    }
};

// A token's index and document, or begin and end of the interval that it sees.
using Label = int2;
// Labels of the tokens whose rows a map's tiles are, and of those that the tiles visit.
template <class A> __device__ __forceinline__ const Label* row_labels(const A& a, const TokenLabel* label) {
    return a.map.seen ? (const Label*)a.map.seen : (const Label*)label;
}

// What the loading warp tells the others of a tile, and of one of its steps.
struct ForwardTile {
    int32_t row, begin, end, head; // head < 0: there are no more
    bool any;                      // it has steps
};
struct ForwardStep {
    int32_t begin, keys; // first key; as many of the tile's keys count (more: all)
    bool masked, last;
};

template <int D> struct alignas(1024) ForwardShared {
    static constexpr int slots = 2;
    bf16 q[slots][forward_queries * D]; // and the output on its way out
    bf16 k[slots][forward_keys * D];
    bf16 v[slots][forward_keys * D];
    bf16 anchor_key[slots][D / 64 * 512]; // row 0 of a tile of 8 rows; the others do not matter
    bf16 anchor_value[slots][D];
    Label q_label[slots][forward_queries], k_label[slots][forward_keys];
    ForwardTile tile[slots];
    ForwardStep step[slots];
    ItemSlots items;
    ptx::Barrier q_full[slots], q_empty[slots], k_full[slots], k_empty[slots], v_full[slots], v_empty[slots];
};

struct ForwardMaps {
    CUtensorMap q, k, v, out;
};

// The order of work: all tiles of 2^log2_together heads, longest first, then those of the next heads. The last heads
// are taken 2^log2_at_end together: with few tiles a head, the longest would else begin when little is left to do, and
// all would wait for them. A block, or a pair of blocks, begins with the item of its own index and then takes what the
// counter, which starts at 0, gives it.
struct Schedule {
    int items, tiles, heads, log2_together, log2_at_end;
    int end_head, end_item; // the first of those at the end
    int group;              // query heads of a KV head
    int given;              // items with which blocks, or pairs, begin
    int* counter;
    int* counters; // (query heads, the map's turns): how many tiles have added to the queries; null without turns

    __device__ __forceinline__ int2 tile_and_head(int item) const {
        const bool end = item >= end_item;
        const int n = end ? item - end_item : item, log2_heads = end ? log2_at_end : log2_together;
        const int round = (n >> log2_heads) / tiles, tile = (n >> log2_heads) - round * tiles;
        return {tile, (end ? end_head : round << log2_heads) + (n & ((1 << log2_heads) - 1))};
    }
    __device__ __forceinline__ int next(int lane) const { // for a whole warp
        return given + __shfl_sync(~0u, lane == 0 ? atomicAdd(counter, 1) : 0, 0);
    }
};

// A block alone, or one of two neighbours whose tiles follow each other and visit the same tiles: each then loads 64 of
// their 128 columns, for both, which halves what the L2 cache must bring. So a slot is empty when both blocks have
// released it, and the first block tells the second one the items.
template <bool PAIR> struct Worker {
    const uint32_t rank = PAIR ? ptx::cluster_rank() : 0; // in the pair
    __device__ __forceinline__ int index() const { return PAIR ? blockIdx.x / 2 : blockIdx.x; }
    static constexpr uint32_t releases = PAIR ? 16 : 8; // that empty a slot: of every computing warp
    // By a whole warp.
    __device__ __forceinline__ void release(ptx::Barrier* empty, int lane) const {
        if constexpr (PAIR) {
            if (lane < 2) ptx::barrier_arrive_in(empty, lane);
        } else if (lane == 0) ptx::barrier_arrive(empty);
    }
    // A tile that the pair shares, `rows` of 128 columns (or what D is, for a block alone). Its map is made by head_map
    // with 1 part for a pair.
    __device__ __forceinline__ void load(bf16* to, const CUtensorMap& map, int rows, int token, int head,
                                         ptx::Barrier* full) const {
        if constexpr (PAIR) ptx::tensor_load_both(to + rank * rows * 64, &map, 0, token, rank, head, full);
        else ptx::tensor_load(to, &map, 0, token, 0, head, full);
    }
};

// By the loading warp, at its item `items_done`, counted from 0: the next one.
template <bool PAIR> __device__ __forceinline__ int next_item(const Worker<PAIR>& worker, const Schedule& schedule,
                                                              ItemSlots& slots, uint32_t items_done, int lane) {
    if constexpr (!PAIR) return schedule.next(lane);
    int item, &slot = slots.item[slot_of(items_done)];
    ptx::Barrier &full = slots.full[slot_of(items_done)], &empty = slots.empty[slot_of(items_done)];
    if (worker.rank == 0) {
        item = schedule.next(lane);
        ptx::barrier_wait(&empty, phase_of(items_done) ^ 1);
        if (lane == 0) ptx::store_in(&slot, 1, item, &full);
    } else {
        if (lane == 0) ptx::barrier_arrive_expect(&full, sizeof item);
        ptx::barrier_wait(&full, phase_of(items_done));
        item = slot;
        __syncwarp();
        if (lane == 0) ptx::barrier_arrive_in(&empty, 0);
    }
    return item;
}

// `count` neighbouring values into shared memory by a warp, zeros from the array's `end` on.
template <int count, class X>
__device__ __forceinline__ void copy_row(X* to, const X* from, int first, int end, int lane) {
#pragma unroll
    for (int i = 0; i < count; i += 32) ptx::copy_async(to + i + lane, from + first + i + lane, first + i + lane < end);
}

// The loading warp; its lane 0 commands the copy engine. Keys run one step ahead of values, as the products want them.
template <int D, bool PAIR> __device__ __forceinline__ void forward_load(const AttentionForward<bf16>& a,
                                                                         const ForwardMaps& maps, ForwardShared<D>& s,
                                                                         const Schedule& schedule, int lane) {
    const Worker<PAIR> worker;
    Ring<2> q, k, v;
    auto load_values = [&](int token, int head) {
        ptx::barrier_wait(&s.v_empty[v.slot], v.phase ^ 1);
        if (lane == 0) {
            ptx::barrier_arrive_expect(&s.v_full[v.slot], sizeof s.v[0]);
            worker.load(s.v[v.slot], maps.v, forward_keys, token, head, &s.v_full[v.slot]);
        }
        v.next();
    };
    int item = worker.index();
    for (uint32_t items_done = 0; item < schedule.items; items_done++) {
        const auto [tile_index, head] = schedule.tile_and_head(item);
        MapTile tile = a.map.tiles[tile_index];
        tile.begin += worker.rank * forward_queries;
        const int kv_head = head / schedule.group;
        item = next_item(worker, schedule, s.items, items_done, lane);
        ptx::Barrier* full = &s.q_full[q.slot];
        ptx::barrier_wait(&s.q_empty[q.slot], q.phase ^ 1);
        copy_row<forward_queries>(s.q_label[q.slot], row_labels(a, a.q_label), tile.begin, a.T, lane);
        ptx::barrier_arrive_copies(full);
        if (lane == 0) {
            s.tile[q.slot] = {tile.row, tile.begin, tile.end, head, tile.first_range < tile.last_range};
            const bool anchor = a.first && a.anchor;
            ptx::barrier_arrive_expect(full, sizeof s.q[0] + (anchor ? 2 * D * sizeof(bf16) : 0));
            ptx::tensor_load(s.q[q.slot], &maps.q, 0, tile.begin, 0, head, full);
            if (anchor) {
                const bf16* k0 = a.anchor + (size_t(tile.row) * 2 * a.K + kv_head) * D;
                for (int half = 0; half < D / 64; half++)
                    ptx::bulk_load(s.anchor_key[q.slot] + half * 512, k0 + half * 64, 128, full);
                ptx::bulk_load(s.anchor_value[q.slot], k0 + a.K * D, D * sizeof(bf16), full);
            }
        }
        q.next();

        int before = -1; // the keys whose values are still to be loaded
        for (int r = tile.first_range; r < tile.last_range; r++) {
            const VisitedRange range = a.map.ranges[r];
            for (int begin = range.begin; begin < range.end; begin += forward_keys) {
                const bool masked = range.masked || begin + forward_keys > range.end;
                full = &s.k_full[k.slot];
                ptx::barrier_wait(&s.k_empty[k.slot], k.phase ^ 1);
                if (masked && !a.map.seen)
                    copy_row<forward_keys>(s.k_label[k.slot], (const Label*)a.k_label, begin, a.Tk, lane);
                ptx::barrier_arrive_copies(full);
                if (lane == 0) {
                    s.step[k.slot] = {begin, range.end - begin, masked,
                                      r + 1 == tile.last_range && begin + forward_keys >= range.end};
                    ptx::barrier_arrive_expect(full, sizeof s.k[0]);
                    worker.load(s.k[k.slot], maps.k, forward_keys, begin, kv_head, full);
                }
                k.next();
                if (before >= 0) load_values(before, kv_head);
                before = begin;
            }
        }
        if (before >= 0) load_values(before, kv_head);
    }
    ptx::barrier_wait(&s.q_empty[q.slot], q.phase ^ 1);
    if (lane == 0) s.tile[q.slot].head = -1;
    ptx::barrier_arrive_copies(&s.q_full[q.slot]);
    if (lane == 0) ptx::barrier_arrive(&s.q_full[q.slot]);
}

template <bool PAIR> __device__ __forceinline__ void block_sync() {
    if constexpr (PAIR) ptx::cluster_sync();
    else __syncthreads();
}

// Where a thread stands: the rows g and g + 8 of its warp's 16, the columns 2 t and 2 t + 1 of every 8.
struct Place {
    int group, warp, lane, g, t;
    __device__ __forceinline__ explicit Place(int group)
        : group(group), warp(__shfl_sync(~0u, threadIdx.x / 32 % 4, 0)), lane(threadIdx.x % 32), g(lane / 4),
          t(lane % 4) {}
};

__device__ __forceinline__ float quad_max(float x) {
    x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
    return fmaxf(x, __shfl_xor_sync(~0u, x, 2));
}
__device__ __forceinline__ float quad_sum(float x) {
    x += __shfl_xor_sync(~0u, x, 1);
    return x + __shfl_xor_sync(~0u, x, 2);
}
__device__ __forceinline__ float2 bf16_values(uint32_t pair) {
    return {__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u)};
}

// Issues sum (64, N) = x y^T, or += with `add`, of rows of two tiles of D columns that have x_rows and y_rows.
template <int D, int N, int x_rows, int y_rows>
__device__ __forceinline__ void issue_rows(float (&sum)[N / 2], uint64_t x, uint64_t y, bool add = false) {
#pragma unroll
    for (int i = 0; i < D / 16; i++)
        ptx::product<N>(sum, x + i / 4 * x_rows * 8 + i % 4 * 2, y + i / 4 * y_rows * 8 + i % 4 * 2, add || i > 0);
}

// Issues sum (64, D) += p y, where p (64, R) is rounded and in registers, and y a tile of R rows by columns.
template <int D, int R>
__device__ __forceinline__ void issue_columns(float (&sum)[D / 2], const uint32_t (&p)[R / 4], uint64_t y) {
#pragma unroll
    for (int i = 0; i < R / 16; i++) ptx::product<D>(sum, p + 4 * i, y + i * 128, true);
}

// The anchor's scores by a product of 8 columns, of which the first one counts: in lane t = 0 of each quad.
template <int D> __device__ __forceinline__ void anchor_scores(float (&s0)[2], uint64_t q, const bf16* key, int lane) {
    float sum[4];
    ptx::product_fence();
    issue_rows<D, 8, forward_queries, 8>(sum, q, ptx::matrix(ptx::address(key)));
    ptx::product_commit();
    ptx::product_wait<0>();
    ptx::settle(sum);
    for (int i = 0; i < 2; i++) s0[i] = __shfl_sync(~0u, sum[2 * i], lane & ~3);
}

// The state before these keys: from the anchor, from what earlier portions left, or from nothing. m counts in units of
// q.k, not yet divided by sqrt(D). l is summed over the quad at the end, so one lane of it starts with the sum so far.
template <int D> __device__ __forceinline__ void forward_start(const AttentionForward<bf16>& a, ForwardShared<D>& s,
                                                               int slot, const Place& at, uint64_t q, float (&m)[2],
                                                               float (&l)[2], float (&o)[D / 2]) {
    const float none = minus_infinity<float>;
    const ForwardTile tile = s.tile[slot];
    m[0] = m[1] = none, l[0] = l[1] = 0;
    if (a.first && a.anchor) {
        anchor_scores<D>(m, q, s.anchor_key[slot], at.lane);
        l[0] = l[1] = at.t == 0;
#pragma unroll
        for (int j = 0; j < D / 8; j++) {
            const float2 v0 = bf16_values(((const uint32_t*)s.anchor_value[slot])[4 * j + at.t]);
            o[4 * j] = o[4 * j + 2] = v0.x, o[4 * j + 1] = o[4 * j + 3] = v0.y;
        }
    } else if (a.first) {
#pragma unroll
        for (int i = 0; i < D / 2; i++) o[i] = 0;
    } else {
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const int token = tile.begin + rows_of_group * at.group + 16 * at.warp + 8 * i + at.g;
            const bool valid = token < tile.end;
            const float lse = valid ? a.lse[size_t(tile.head) * a.T + token] : none;
            const float* from = a.state + (size_t(token) * a.H + tile.head) * D + 2 * at.t;
            m[i] = lse * sqrtf(float(D));
            l[i] = lse != none && at.t == 0;
#pragma unroll
            for (int j = 0; j < D / 8; j++) {
                const float2 x = valid ? *(const float2*)(from + 8 * j) : float2{0, 0};
                o[4 * j + 2 * i] = x.x, o[4 * j + 2 * i + 1] = x.y;
            }
        }
    }
}

// Of the columns 8 j + 2 t + e, counted by 2 j + e: bits of those in [begin, end).
__device__ __forceinline__ uint32_t columns_between(int begin, int end, int t) {
    auto count = [t](int columns) { // of those below
        const int x = min(max(columns - 2 * t, 0), 128);
        return 2 * (x / 8) + min(x % 8, 2);
    };
    return ptx::bits_below(count(end)) & ~ptx::bits_below(count(begin));
}

// s = hidden where rows g and g + 8 do not see the column. Rows see intervals of tokens; column 0 is token `begin`, and
// `columns` of them count.
template <int N> __device__ __forceinline__ void interval_mask(float (&s)[N], const Label* seen, int begin, int columns,
                                                               int t, float hidden) {
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const Label row = seen[8 * i];
        const uint32_t bits = columns_between(row.x - begin, min(row.y - begin, columns), t);
#pragma unroll
        for (int j = 0; j < N / 4; j++)
#pragma unroll
            for (int e = 0; e < 2; e++)
                if (!(bits >> (2 * j + e) & 1)) s[4 * j + 2 * i + e] = hidden;
    }
}

// s = -inf where the query does not see the key, and from column `keys` on.
__device__ __forceinline__ void forward_mask(float (&s)[forward_keys / 2], const Label* q_label, const Label* k_label,
                                             int keys, int t) {
    const Label q[2] = {q_label[0], q_label[8]};
#pragma unroll
    for (int j = 0; j < forward_keys / 8; j++) {
        const int4 two = ((const int4*)k_label)[4 * j + t];
#pragma unroll
        for (int e = 0; e < 2; e++) {
            const int index = e ? two.z : two.x, doc = 8 * j + 2 * t + e < keys ? (e ? two.w : two.y) : hidden_doc;
#pragma unroll
            for (int i = 0; i < 2; i++)
                if (!visible(q[i].x, q[i].y, index, doc)) s[4 * j + 2 * i + e] = minus_infinity<float>;
        }
    }
}

// s becomes exp((s - m) / sqrt(D)), where m follows the largest score only when that leaves it behind by a factor of
// 2^8: P, l and O may all be that much larger until then, and most steps need not rescale O. True if some row does,
// by alpha.
template <int D, int N>
__device__ __forceinline__ bool softmax_step(float (&s)[N], float (&m)[2], float (&l)[2], float (&alpha)[2]) {
    const float scale = log2e / sqrtf(float(D));
    float offset[2];
#pragma unroll
    for (int i = 0; i < 2; i++) {
        float top[4] = {s[2 * i], s[2 * i + 1], s[2 * i + 4], s[2 * i + 5]};
#pragma unroll
        for (int j = 8; j < N; j += 8) {
            top[0] = fmaxf(top[0], s[j + 2 * i]), top[1] = fmaxf(top[1], s[j + 2 * i + 1]);
            top[2] = fmaxf(top[2], s[j + 2 * i + 4]), top[3] = fmaxf(top[3], s[j + 2 * i + 5]);
        }
        const float row_top = quad_max(fmaxf(fmaxf(top[0], top[1]), fmaxf(top[2], top[3])));
        const float now = (row_top - m[i]) * scale > 8 ? row_top : m[i];
        offset[i] = now == minus_infinity<float> ? 0 : now * scale;
        alpha[i] = now == m[i] ? 1 : ptx::exp2(m[i] * scale - offset[i]);
        m[i] = now, l[i] *= alpha[i];
    }
    float sum[2][2] = {};
#pragma unroll
    for (int j = 0; j < N; j += 4)
#pragma unroll
        for (int i = 0; i < 2; i++)
#pragma unroll
            for (int e = 0; e < 2; e++) {
                float& x = s[j + 2 * i + e];
                x = ptx::exp2(x * scale - offset[i]);
                sum[i][e] += x;
            }
    l[0] += sum[0][0] + sum[0][1], l[1] += sum[1][0] + sum[1][1];
    return __any_sync(~0u, alpha[0] != 1 || alpha[1] != 1);
}

template <int N> __device__ __forceinline__ void round_scores(uint32_t (&p)[N / 2], const float (&s)[N]) {
#pragma unroll
    for (int i = 0; i < N / 2; i++) p[i] = ptx::round_pair(s[2 * i], s[2 * i + 1]);
}
template <int N> __device__ __forceinline__ void rescale(float (&o)[N], const float (&alpha)[2]) {
#pragma unroll
    for (int i = 0; i < N; i++) o[i] *= alpha[i / 2 % 2];
}

// A warp's 16 rows of x (16, D), rounded, in the rows of a tile of `rows` that starts at `to`.
template <int D>
__device__ __forceinline__ void store_rows(uint32_t to, int rows, int first_row, const float (&x)[D / 2], int lane) {
    const int row = first_row + lane % 16;
#pragma unroll
    for (int j = 0; j < D / 8; j += 2) {
        const int chunk = j % 8 + lane / 16;
        ptx::store_matrices(to + j / 8 * rows * 128 + row * 128 + ((chunk ^ row % 8) << 4),
                            ptx::round_pair(x[4 * j], x[4 * j + 1]), ptx::round_pair(x[4 * j + 2], x[4 * j + 3]),
                            ptx::round_pair(x[4 * j + 4], x[4 * j + 5]), ptx::round_pair(x[4 * j + 6], x[4 * j + 7]));
    }
}

// Divides by l and writes the output or the state, and LSE. A warp whose 16 rows are all the tile's own goes through
// shared memory, where Q stood, and the copy engine; one at the end of a short tile writes row by row.
template <int D> __device__ __forceinline__ void forward_finish(const AttentionForward<bf16>& a,
                                                                const ForwardMaps& maps, ForwardShared<D>& s, int slot,
                                                                const Place& at, const float (&m)[2], float (&l)[2],
                                                                float (&o)[D / 2]) {
    const ForwardTile tile = s.tile[slot];
    const int row = rows_of_group * at.group + 16 * at.warp, first = tile.begin + row;
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const int token = first + 8 * i + at.g;
        l[i] = quad_sum(l[i]);
        const float inverse = l[i] > 0 ? 1 / l[i] : 0;
#pragma unroll
        for (int j = 0; j < D / 8; j++) o[4 * j + 2 * i] *= inverse, o[4 * j + 2 * i + 1] *= inverse;
        if (at.t == 0 && token < tile.end)
            a.lse[size_t(tile.head) * a.T + token] = m[i] * (1 / sqrtf(float(D))) + logf(l[i]);
    }
    if (a.last && first + 16 <= tile.end) {
        store_rows<D>(ptx::address(s.q[slot]), forward_queries, row, o, at.lane);
        ptx::fence_async();
        __syncwarp();
        if (at.lane == 0) {
            for (int half = 0; half < D / 64; half++)
                ptx::tensor_store(&maps.out, 0, first, half, tile.head,
                                  s.q[slot] + (half * forward_queries + row) * columns_of_half);
            ptx::bulk_commit();
        }
        return;
    }
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const int token = first + 8 * i + at.g;
        const size_t to = (size_t(token) * a.H + tile.head) * D + 2 * at.t;
        if (token >= tile.end) continue;
#pragma unroll
        for (int j = 0; j < D / 8; j++) {
            const float x = o[4 * j + 2 * i], y = o[4 * j + 2 * i + 1];
            if (a.last) *(uint32_t*)(a.out + to + 8 * j) = ptx::round_pair(x, y);
            else *(float2*)(a.state + to + 8 * j) = {x, y};
        }
    }
}

// A warpgroup's place in the rings, and what it carries from step to step.
template <int D, bool PAIR> struct ForwardGroup {
    const AttentionForward<bf16>& a;
    ForwardShared<D>& s;
    const Worker<PAIR> worker;
    const Place at;
    Ring<2> q, k, v;
    uint32_t query[D / 4]; // its rows of Q
    float o[D / 2], scores[forward_keys / 2], m[2], l[2], alpha[2];
    uint32_t p[forward_keys / 4]; // the scores' exponentials, rounded
    bool risen, last;             // the step's m rose, by alpha; the step was the tile's last

    __device__ __forceinline__ ForwardGroup(const AttentionForward<bf16>& a, ForwardShared<D>& s, int group)
        : a(a), s(s), at(group) {}

    __device__ __forceinline__ void load_queries() {
        const int row = rows_of_group * at.group + 16 * at.warp + at.lane % 16;
        const uint32_t from = ptx::address(s.q[q.slot]) + row * 128;
#pragma unroll
        for (int i = 0; i < D / 16; i++) {
            const int chunk = i % 4 * 2 + at.lane / 16;
            ptx::load_matrices(query + 4 * i, from + i / 4 * forward_queries * 128 + ((chunk ^ row % 8) << 4));
        }
    }
    __device__ __forceinline__ void issue_scores() {
        const uint64_t keys = ptx::matrix(ptx::address(s.k[k.slot]));
        ptx::settle(query);
#pragma unroll
        for (int i = 0; i < D / 16; i++)
            ptx::product<forward_keys, false>(scores, query + 4 * i, keys + i / 4 * forward_keys * 8 + i % 4 * 2,
                                              i > 0);
        ptx::product_commit();
    }
    __device__ __forceinline__ void issue_output() {
        ptx::settle(o), ptx::settle(p);
        issue_columns<D, forward_keys>(o, p, ptx::matrix(ptx::address(s.v[v.slot]), forward_keys * 128));
        ptx::product_commit();
    }
    // The scores have come: they become P.
    __device__ __forceinline__ void mask_and_softmax() {
        const ForwardStep step = s.step[k.slot];
        ptx::settle(scores);
        if (step.masked) {
            const Label* q_label = s.q_label[q.slot] + rows_of_group * at.group + 16 * at.warp + at.g;
            if (a.map.seen) interval_mask(scores, q_label, step.begin, step.keys, at.t, minus_infinity<float>);
            else forward_mask(scores, q_label, s.k_label[k.slot], step.keys, at.t);
            __syncwarp();
        }
        worker.release(&s.k_empty[k.slot], at.lane);
        k.next();
        last = step.last;
        risen = softmax_step<D>(scores, m, l, alpha);
    }
    // The output has come.
    __device__ __forceinline__ void finish_output() {
        ptx::product_wait<0>();
        ptx::settle(o), ptx::settle(p), ptx::settle(scores);
        worker.release(&s.v_empty[v.slot], at.lane);
        v.next();
    }
    // P of the tile's first step.
    __device__ __forceinline__ void start_steps() {
        ptx::barrier_wait(&s.k_full[k.slot], k.phase);
        ptx::product_fence();
        issue_scores();
        ptx::product_wait<0>();
        mask_and_softmax();
        round_scores(p, scores);
        ptx::barrier_wait(&s.v_full[v.slot], v.phase);
        if (risen) rescale(o, alpha);
    }
    // P of the next step; meanwhile the output by the P before.
    __device__ __forceinline__ void step() {
        ptx::barrier_wait(&s.k_full[k.slot], k.phase);
        ptx::settle(o), ptx::settle(p);
        ptx::product_fence();
        issue_scores();
        issue_output();
        ptx::product_wait<1>();
        mask_and_softmax();
        // ptxas puts most exponentials off until the output has come. That is faster with D = 128 (2% at 64K), slower
        // with D = 64 (5% at 16K), where they take as long as the products.
        if (D == 64) ptx::need(l[0] + l[1]);
        ptx::barrier_wait(&s.v_full[v.slot ^ 1], v.slot ? v.phase ^ 1 : v.phase);
        finish_output();
        round_scores(p, scores);
        if (risen) rescale(o, alpha);
    }
    // The output by the P of the tile's last step.
    __device__ __forceinline__ void finish_steps() {
        ptx::settle(o), ptx::settle(p);
        ptx::product_fence();
        issue_output();
        finish_output();
    }
};

// A warpgroup of queries.
template <int D, bool PAIR> __device__ __forceinline__ void
forward_compute(const AttentionForward<bf16>& a, const ForwardMaps& maps, ForwardShared<D>& s, int group) {
    ForwardGroup<D, PAIR> w(a, s, group);
    bool storing = false; // Q of the tile before still has its output, which may be on its way out
    for (;; w.q.next()) {
        ptx::barrier_wait(&s.q_full[w.q.slot], w.q.phase);
        if (w.at.lane == 0 && storing) {
            ptx::bulk_wait_read<0>();
            ptx::barrier_arrive(&s.q_empty[w.q.slot ^ 1]);
        }
        if (s.tile[w.q.slot].head < 0) return;
        storing = true;

        w.load_queries();
        const uint64_t queries = ptx::matrix(ptx::address(s.q[w.q.slot]) + group * rows_of_group * 128);
        forward_start(a, s, w.q.slot, w.at, queries, w.m, w.l, w.o);
        if (s.tile[w.q.slot].any) {
            w.start_steps();
            while (!w.last) w.step();
            w.finish_steps();
        }
        forward_finish(a, maps, s, w.q.slot, w.at, w.m, w.l, w.o);
    }
}

// Block: 128 queries of one head at a time; warpgroups as above; shared memory: two slots each of Q (and O on its way
// out), K and V, the anchor's key and value, labels, 201 KiB. Bound by the tensor cores (4 D FLOP a pair of query and
// key), with the exponentials, half as long, under them, and by power, which takes a sixth of the clock. On an H200:
// 738 TFLOP/s at 16384 causal tokens, D = 128, 75% of the tensor cores' peak, and 680 at 65536 (3c23a96).
template <int D, bool PAIR> __global__ void __launch_bounds__(block_threads, 1)
    attention_hopper_forward_kernel(const __grid_constant__ AttentionForward<bf16> a,
                                    const __grid_constant__ ForwardMaps maps,
                                    const __grid_constant__ Schedule schedule) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    extern __shared__ __align__(1024) uint8_t memory[];
    ForwardShared<D>& s = *(ForwardShared<D>*)memory;
    const int group = __shfl_sync(~0u, threadIdx.x / 128, 0);
    if (threadIdx.x == 0) {
        for (int i = 0; i < 2; i++) {
            ptx::barrier_init(&s.q_full[i], fill_arrivals), ptx::barrier_init(&s.q_empty[i], 8);
            ptx::barrier_init(&s.k_full[i], fill_arrivals);
            ptx::barrier_init(&s.v_full[i], 1);
            for (ptx::Barrier* empty : {&s.k_empty[i], &s.v_empty[i]}) ptx::barrier_init(empty, Worker<PAIR>::releases);
        }
        s.items.init();
        ptx::barrier_init_fence();
    }
    block_sync<PAIR>();
    if (group == 0) {
        ptx::registers_give<40>();
        if (threadIdx.x < 32) forward_load<D, PAIR>(a, maps, s, schedule, threadIdx.x);
    } else {
        ptx::registers_take<232>();
        forward_compute<D, PAIR>(a, maps, s, group - 1);
    }
    if (PAIR) ptx::cluster_sync(); // nobody leaves while the other block may still reach into its memory
#else
    __trap(); // built for another GPU than this one's sm_90a
#endif
}

constexpr int backward_queries = 64, backward_keys = 128; // of a tile

struct BackwardItem {
    int32_t row, begin, end, head; // a tile of keys, a KV head; head < 0: there are no more
    bool any;                      // it has steps
};
struct BackwardStep {
    int32_t begin, head, queries; // first query, query head; as many of the tile's queries count (more: all)
    bool masked, last;
    int32_t turn; // with turns
};

// A value for each query that a product adds to all its sums of that query: an operand by columns whose first three
// rows, in bf16, sum up to it, to 2^-24, and whose other rows are 0. In the operand that goes with it, from registers,
// the first three columns are 1.
struct alignas(1024) QueryOffset {
    static constexpr int words = 16 * backward_queries / 2;
    uint32_t pair[words];

    // Of queries 2 i and 2 i + 1.
    __device__ __forceinline__ void set(int i, float x, float y) {
#pragma unroll
        for (int row = 0; row < 3; row++) {
            const uint32_t rounded = ptx::round_pair(x, y);
            pair[row * backward_queries / 2 + ((i / 4 ^ row) * 4) + i % 4] = rounded;
            x -= bf16_values(rounded).x, y -= bf16_values(rounded).y;
        }
    }
};

template <int D> struct alignas(1024) BackwardShared {
    static constexpr int q_slots = 3;
    bf16 k[backward_keys * D];
    bf16 v[backward_keys * D];
    bf16 q[q_slots][backward_queries * D];
    bf16 dout[2][backward_queries * D];
    bf16 ds[2][backward_queries * backward_keys];    // (queries, keys): the halves are the two warpgroups' keys
    float out[8][16 * 64];                           // a warp's part of dQ, later of dK and dV, on its way out
    QueryOffset score_offset[q_slots], dp_offset[2]; // -sqrt(D) LSE, -delta
    Label q_label[q_slots][backward_queries], k_label[backward_keys];
    BackwardItem item;
    BackwardStep step[q_slots];
    int2 dq_target[8]; // where dQ of the last steps goes: first query and head, of step n at n % 8
    int2 turn[8];      // likewise, with turns: the turn, and its counter among those of the head
    ptx::Barrier kv_full, kv_empty, q_full[q_slots], q_empty[q_slots], dout_full[2], dout_empty[2];
    ptx::Barrier posted[q_slots], ds_full[2];
    ptx::Barrier dq_target_full[8], out_full[2], out_empty[2]; // with turns
    ItemSlots items;
};

struct BackwardMaps {
    CUtensorMap q, k, v, dout, dq, dkv, dkv_out;
};

// The first loading warp: the item's keys and values, then queries and dO of all its steps, head by head of the group;
// with turns, each range from its end. An item waits for those before it, which must have begun: with turns all items
// come from the counter, for a block may begin late, when its multiprocessor was busy with other work.
template <int D, bool PAIR, bool TURNS>
__device__ __forceinline__ void backward_load(const AttentionBackward<bf16>& a, const BackwardMaps& maps,
                                              BackwardShared<D>& s, const Schedule& schedule, int lane) {
    const Worker<PAIR> worker;
    Ring<BackwardShared<D>::q_slots> q;
    uint32_t n = 0, items_done = 0; // the step, counted over all items
    int item = TURNS ? schedule.next(lane) : worker.index();
    for (;; item = next_item(worker, schedule, s.items, items_done++, lane)) {
        ptx::barrier_wait(&s.kv_empty, (items_done & 1) ^ 1);
        if (item >= schedule.items) break;
        const auto [tile_index, kv_head] = schedule.tile_and_head(item);
        MapTile tile = a.map.tiles[tile_index];
        tile.begin += worker.rank * backward_keys;
        const int heads_end = (kv_head + 1) * schedule.group;
        copy_row<backward_keys>(s.k_label, row_labels(a, a.k_label), tile.begin, a.Tk, lane);
        ptx::barrier_arrive_copies(&s.kv_full);
        if (lane != 0) continue;
        s.item = {tile.row, tile.begin, tile.end, kv_head, tile.first_range < tile.last_range};
        ptx::barrier_arrive_expect(&s.kv_full, 2 * sizeof s.k);
        ptx::tensor_load(s.k, &maps.k, 0, tile.begin, 0, kv_head, &s.kv_full);
        ptx::tensor_load(s.v, &maps.v, 0, tile.begin, 0, kv_head, &s.kv_full);
        for (int head = heads_end - schedule.group; head < heads_end; head++)
            for (int r = tile.first_range; r < tile.last_range; r++) {
                const VisitedRange range = a.map.ranges[r];
                const bool all_masked = range.masked || s.item.end - s.item.begin < backward_keys;
                const bool last_range = r + 1 == tile.last_range && head + 1 == heads_end;
                int begin = TURNS ? range.end - 1 - (range.end - 1 - range.begin) % backward_queries : range.begin;
                for (; TURNS ? begin >= range.begin : begin < range.end;
                     begin += TURNS ? -backward_queries : backward_queries) {
                    const int next = begin + backward_queries;
                    ptx::barrier_wait(&s.q_empty[q.slot], q.phase ^ 1);
                    s.step[q.slot] = {begin,
                                      head,
                                      range.end - begin,
                                      all_masked || next > range.end,
                                      last_range && (TURNS ? begin == range.begin : next >= range.end),
                                      TURNS ? range.turn : 0};
                    ptx::barrier_arrive(&s.posted[q.slot]);
                    ptx::barrier_arrive_expect(&s.q_full[q.slot], sizeof s.q[0]);
                    worker.load(s.q[q.slot], maps.q, backward_queries, begin, head, &s.q_full[q.slot]);
                    q.next();
                    ptx::barrier_wait(&s.dout_empty[slot_of(n)], phase_of(n) ^ 1);
                    ptx::barrier_arrive_expect(&s.dout_full[slot_of(n)], sizeof s.dout[0]);
                    worker.load(s.dout[slot_of(n)], maps.dout, backward_queries, begin, head, &s.dout_full[slot_of(n)]);
                    n++;
                }
            }
    }
    if (lane == 0) s.item.head = -1;
    ptx::barrier_arrive_copies(&s.kv_full);
    if (lane != 0) return;
    ptx::barrier_arrive(&s.kv_full);
    s.step[q.slot].head = -1;
    ptx::barrier_arrive(&s.posted[q.slot]);
}

// The second loading warp: LSE, delta and labels of the steps that the first one posts. A query that sees nothing has
// LSE = -inf and no visible pair: any number does.
template <int D, bool TURNS>
__device__ __forceinline__ void backward_load_rows(const AttentionBackward<bf16>& a, BackwardShared<D>& s, int lane) {
    auto set_target = [&](uint32_t n, const BackwardStep& step) {
        s.dq_target[n % 8] = {step.begin, step.head};
        if (!TURNS) return;
        s.turn[n % 8] = {step.turn, turn_counter(step.begin, s.item.row, backward_queries)};
        ptx::barrier_arrive(&s.dq_target_full[n % 8]);
    };
    Ring<BackwardShared<D>::q_slots> q;
    for (uint32_t n = 0;; n++, q.next()) {
        const int dout = slot_of(n);
        ptx::barrier_wait(&s.posted[q.slot], q.phase);
        const BackwardStep step = s.step[q.slot];
        if (step.head < 0) {
            if (lane < 2) set_target(n + lane, step); // for both of backward_add's warps
            return;
        }
        if (lane == 0) set_target(n, step);
        if (step.masked && !a.map.seen)
            copy_row<backward_queries>(s.q_label[q.slot], (const Label*)a.q_label, step.begin, a.T, lane);
        ptx::barrier_arrive_copies(&s.q_full[q.slot]);
        float lse[2], delta[2]; // of queries 2 lane and 2 lane + 1
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const int token = step.begin + 2 * lane + i;
            const size_t from = size_t(step.head) * a.T + token;
            lse[i] = token < a.T ? a.lse[from] : 0, delta[i] = token < a.T ? a.delta[from] : 0;
            lse[i] = lse[i] == minus_infinity<float> ? 0 : -sqrtf(float(D)) * lse[i];
        }
        s.score_offset[q.slot].set(lane, lse[0], lse[1]);
        ptx::fence_async();
        ptx::barrier_arrive(&s.q_full[q.slot]);
        ptx::barrier_wait(&s.dout_empty[dout], phase_of(n) ^ 1);
        s.dp_offset[dout].set(lane, -delta[0], -delta[1]);
        ptx::fence_async();
        ptx::barrier_arrive(&s.dout_full[dout]);
    }
}

// With turns, the other two loading warps, one for the even steps, one for the odd ones: dQ of a step is added when all
// tiles before this one have added to its queries, and the next tile may when memory has it. `n`: the warp's first.
template <int D> __device__ __forceinline__ void backward_add(const AttentionBackward<bf16>& a,
                                                              const BackwardMaps& maps, BackwardShared<D>& s,
                                                              const Schedule& schedule, uint32_t n, int lane) {
    for (;; n += 2) {
        ptx::barrier_wait(&s.dq_target_full[n % 8], n / 8 & 1);
        const int2 target = s.dq_target[n % 8], turn = s.turn[n % 8];
        if (target.y < 0) return;
        int* counter = schedule.counters + target.y * a.map.turns + turn.y;
        if (lane == 0) ptx::counter_wait(counter, turn.x);
        __syncwarp();
        ptx::fence_async_global();
        ptx::barrier_wait(&s.out_full[slot_of(n)], phase_of(n));
        if (lane < 8) { // a part for each computing warp
            ptx::tensor_add(&maps.dq, 0, target.x + 16 * (lane % 4), lane / 4 * (D / 64), target.y, s.out[lane]);
            ptx::bulk_commit();
            ptx::bulk_wait_read<0>();
        }
        __syncwarp();
        if (lane == 0) ptx::barrier_arrive(&s.out_empty[slot_of(n)]);
        if (lane < 8) ptx::bulk_wait<0>();
        __syncwarp();
        if (lane == 0) ptx::counter_add(counter);
    }
}

// s^T (keys, queries) with its offset becomes P^T. dS lacks its 1 / sqrt(D), which dQ and dK get once, at their end.
template <int D> __device__ __forceinline__ void probabilities(float (&s)[backward_queries / 2]) {
    const float scale = log2e / sqrtf(float(D));
#pragma unroll
    for (int i = 0; i < backward_queries / 2; i++) s[i] = ptx::exp2(s[i] * scale);
}

// P^T = 0 where the query does not see the key, for keys from number `keys` on, and from column `queries` on. What
// stood there may be infinite: the LSE of a query that sees nothing bounds no score.
__device__ __forceinline__ void backward_mask(float (&p)[backward_queries / 2], const Label* q_label, int queries,
                                              const Label* k_label, int first_key, int keys, int t) {
    Label k[2];
#pragma unroll
    for (int i = 0; i < 2; i++) {
        k[i] = k_label[first_key + 8 * i];
        if (first_key + 8 * i >= keys) k[i].y = hidden_doc;
    }
#pragma unroll
    for (int j = 0; j < backward_queries / 8; j++) {
        const int4 two = ((const int4*)q_label)[4 * j + t];
#pragma unroll
        for (int e = 0; e < 2; e++) {
            const int index = 8 * j + 2 * t + e < queries ? (e ? two.z : two.x) : -1, doc = e ? two.w : two.y;
#pragma unroll
            for (int i = 0; i < 2; i++)
                if (!visible(index, doc, k[i].x, k[i].y)) p[4 * j + 2 * i + e] = 0;
        }
    }
}

// A warpgroup's place in the rings, and what it carries from step to step.
template <int D, bool PAIR, bool TURNS> struct BackwardGroup {
    static constexpr int dq_columns = D / 2; // of dQ, which the two warpgroups share out by columns
    const AttentionBackward<bf16>& a;
    const BackwardMaps& maps;
    BackwardShared<D>& s;
    const Worker<PAIR> worker;
    const Place at;
    Ring<BackwardShared<D>::q_slots> q;
    uint32_t n = 0;    // the step, counted over all items
    uint32_t first;    // the item's first step
    bool masked, last; // of the step
    uint32_t ones[4];  // the operand for a QueryOffset
    float dk[D / 2], dv[D / 2];
    uint32_t rounded[backward_queries / 4]; // P, then dS

    __device__ __forceinline__ BackwardGroup(const AttentionBackward<bf16>& a, const BackwardMaps& maps,
                                             BackwardShared<D>& s, int group)
        : a(a), maps(maps), s(s), at(group) {
        constexpr uint32_t one = 0x3f80; // in bf16
        ones[0] = ones[1] = at.t == 0 ? one << 16 | one : at.t == 1 ? one : 0;
        ones[2] = ones[3] = 0;
    }

    // The named barrier at which a warpgroup waits to overwrite a buffer of dS: the other one is done with it.
    static __device__ __forceinline__ int ds_free(int slot, int group) { return 1 + 2 * slot + group; }

    // Waits until what stands in the warp's part of `out` is on its way; the last dQ in it is that of step `before`.
    __device__ __forceinline__ void wait_out(uint32_t before) {
        if (TURNS) ptx::barrier_wait(&s.out_empty[slot_of(before)], phase_of(before));
        if (at.lane == 0) ptx::bulk_wait_read<0>();
        __syncwarp();
    }

    // A warp's 16 rows of C columns, from fragments, to its part of `out`. Rows g and g + 1 would write to the same
    // banks, so odd rows write their columns in another order.
    template <int C> __device__ __forceinline__ void write_rows(const float (&x)[C / 2]) {
        const bool odd = at.g & 1;
        const uint32_t to =
            (ptx::address(s.out[4 * at.group + at.warp]) + at.g * 128 + ((at.t / 2 ^ at.g) << 4) + at.t % 2 * 8) ^
            (odd ? 64 : 0);
        wait_out(n - 1);
#pragma unroll
        for (int j = 0; j < C / 8; j++) // blocks j and j + 2 of every four
            if (j % 4 < 2)
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    const uint32_t rows = j / 4 * 2048 + i * 1024, block = j % 2 * 32;
                    const float *low = x + 4 * j + 2 * i, *high = low + 8;
                    ptx::store_pair((to ^ block) + rows, odd ? high[0] : low[0], odd ? high[1] : low[1]);
                    ptx::store_pair((to ^ block ^ 64) + rows, odd ? low[0] : high[0], odd ? low[1] : high[1]);
                }
    }
    // The same for dQ, in the order of DqOrder::split: the four lanes of a row have the even columns of eight in one
    // register and the odd ones in the next, 16 bytes each.
    template <int C> __device__ __forceinline__ void write_split(const float (&x)[C / 2], uint32_t of) {
        const int row = at.lane % 8, odd = at.lane / 8 % 2, half = at.lane / 16; // of the address that the lane gives
        const uint32_t to = ptx::address(s.out[4 * at.group + at.warp]) + half * 1024 + row * 128 + ((odd ^ row) << 4);
        wait_out(of - 1);
#pragma unroll
        for (int j = 0; j < C / 8; j++)
            ptx::store_matrices((to ^ j % 4 * 32) + j / 4 * 2048, __float_as_uint(x[4 * j]),
                                __float_as_uint(x[4 * j + 1]), __float_as_uint(x[4 * j + 2]),
                                __float_as_uint(x[4 * j + 3]));
    }
    // From the warp's part of `out`, after a fence, added to memory by the copy engine; token, part and head as in
    // head_map.
    __device__ __forceinline__ void send_rows(const CUtensorMap& map, int token, int part, int head) {
        ptx::tensor_add(&map, 0, token, part, head, s.out[4 * at.group + at.warp]);
        ptx::bulk_commit();
    }

    __device__ __forceinline__ void issue_scores(float (&p)[backward_queries / 2]) {
        const uint64_t keys = ptx::matrix(ptx::address(s.k) + at.group * rows_of_group * 128);
        const uint64_t offset = ptx::matrix(ptx::address(&s.score_offset[q.slot]));
        ptx::product<backward_queries>(p, ones, offset, false);
        issue_rows<D, backward_queries, backward_keys, backward_queries>(p, keys,
                                                                         ptx::matrix(ptx::address(s.q[q.slot])), true);
        ptx::product_commit();
    }
    __device__ __forceinline__ void issue_dp(float (&dp)[backward_queries / 2]) {
        const uint64_t values = ptx::matrix(ptx::address(s.v) + at.group * rows_of_group * 128);
        const uint64_t offset = ptx::matrix(ptx::address(&s.dp_offset[slot_of(n)]));
        ptx::product<backward_queries>(dp, ones, offset, false);
        issue_rows<D, backward_queries, backward_keys, backward_queries>(
            dp, values, ptx::matrix(ptx::address(s.dout[slot_of(n)])), true);
        ptx::product_commit();
    }
    __device__ __forceinline__ void issue_dv() {
        issue_columns<D, backward_queries>(dv, rounded,
                                           ptx::matrix(ptx::address(s.dout[slot_of(n)]), backward_queries * 128));
        ptx::product_commit();
    }
    __device__ __forceinline__ void issue_dk(int q_slot) {
        issue_columns<D, backward_queries>(dk, rounded, ptx::matrix(ptx::address(s.q[q_slot]), backward_queries * 128));
        ptx::product_commit();
    }
    // dQ of step `of`, once both warpgroups have written its dS. An item's first step has none before it and makes the
    // product of anything: products under a condition would be made one by one.
    __device__ __forceinline__ void issue_dq(float (&dq)[dq_columns / 2], uint32_t of) {
        ptx::barrier_wait(&s.ds_full[slot_of(of)], phase_of(of));
        ptx::product_fence();
        const uint64_t x = ptx::matrix(ptx::address(s.ds[slot_of(of)]));
        const int half = at.group * dq_columns / 64, rest = at.group * dq_columns % 64;
        const uint64_t y = ptx::matrix(ptx::address(s.k) + half * backward_keys * 128 + rest * 2);
#pragma unroll
        for (int i = 0; i < backward_keys / 16; i++)
            ptx::product<dq_columns, true>(dq, x + i / 4 * backward_queries * 8 + i % 4 * 2, y + i * 128, i > 0);
        ptx::product_commit();
    }
    // dQ of step `of`, if the item has it, to shared memory, and leave for the other warpgroup to overwrite its dS.
    __device__ __forceinline__ void write_dq(float (&dq)[dq_columns / 2], uint32_t of) {
        ptx::settle(dq);
        if (int32_t(of - first) < 0) return;
        ptx::named_arrive(ds_free(slot_of(of), at.group ^ 1), 256);
        write_split<dq_columns>(dq, of);
    }
    __device__ __forceinline__ void send_dq(uint32_t of) {
        if (int32_t(of - first) < 0) return;
        const int2 target = s.dq_target[of % 8];
        ptx::fence_async();
        __syncwarp();
        if (at.lane != 0) return;
        if (TURNS) ptx::barrier_arrive(&s.out_full[slot_of(of)]);
        else send_rows(maps.dq, target.x + 16 * at.warp, at.group * (D / 64), target.y);
    }

    // Waits for the queries of the step, and looks at what it is before it is needed.
    __device__ __forceinline__ void wait_queries() {
        ptx::barrier_wait(&s.q_full[q.slot], q.phase);
        masked = s.step[q.slot].masked, last = s.step[q.slot].last;
    }
    // P of the item's first step.
    __device__ __forceinline__ void start_steps(float (&p)[backward_queries / 2]) {
        first = n;
        wait_queries();
        ptx::product_fence();
        issue_scores(p);
        ptx::product_wait<0>();
        masked_probabilities(p);
    }
    // dV and dS, from P.
    __device__ __forceinline__ void step_values(float (&x)[backward_queries / 2],
                                                const float (&p)[backward_queries / 2]) {
        ptx::barrier_wait(&s.dout_full[slot_of(n)], phase_of(n));
        ptx::product_fence();
        issue_dp(x);
        round_scores(rounded, p);
        ptx::settle(dv), ptx::settle(rounded);
        ptx::product_fence();
        issue_dv();
        send_dq(n - 2);
        ptx::product_wait<1>(); // dP
        ptx::settle(x);
        ptx::named_sync(ds_free(slot_of(n), at.group), 256);
#pragma unroll
        for (int i = 0; i < backward_queries / 2; i++) x[i] *= p[i];
        store_ds(x);
        ptx::product_wait<0>(); // dV
        ptx::settle(dv), ptx::settle(rounded);
        worker.release(&s.dout_empty[slot_of(n)], at.lane);
    }
    // dK, from dS, and dQ of the step before; meanwhile P of the next step.
    __device__ __forceinline__ void step_keys(float (&p)[backward_queries / 2],
                                              const float (&x)[backward_queries / 2]) {
        float dq[dq_columns / 2];
        const int q_slot = q.slot;
        q.next();
        wait_queries();
        ptx::product_fence();
        issue_scores(p);
        round_scores(rounded, x);
        ptx::settle(dk), ptx::settle(rounded);
        issue_dq(dq, n - 1);
        issue_dk(q_slot);
        post_ds();
        ptx::product_wait<2>(); // S
        masked_probabilities(p);
        ptx::product_wait<1>(); // dQ
        write_dq(dq, n - 1);
        ptx::product_wait<0>(); // dK
        ptx::settle(dk), ptx::settle(rounded);
        worker.release(&s.q_empty[q_slot], at.lane);
        n++;
    }
    // What the item's last step left to do.
    __device__ __forceinline__ void finish_steps(const float (&x)[backward_queries / 2]) {
        float dq[dq_columns / 2];
        round_scores(rounded, x);
        ptx::settle(dk), ptx::settle(rounded);
        ptx::product_fence();
        issue_dk(q.slot);
        issue_dq(dq, n - 1);
        post_ds();
        ptx::product_wait<0>();
        ptx::settle(dk), ptx::settle(rounded);
        write_dq(dq, n - 1);
        send_dq(n - 1);
        issue_dq(dq, n);
        ptx::product_wait<0>();
        worker.release(&s.q_empty[q.slot], at.lane);
        write_dq(dq, n);
        send_dq(n);
        q.next();
        n++;
    }
    __device__ __forceinline__ void masked_probabilities(float (&p)[backward_queries / 2]) {
        ptx::settle(p);
        const BackwardStep& step = s.step[q.slot];
        probabilities<D>(p);
        const int row = rows_of_group * at.group + 16 * at.warp + at.g;
        if (masked && a.map.seen) interval_mask(p, s.k_label + row, step.begin, step.queries, at.t, 0.f);
        else if (masked)
            backward_mask(p, s.q_label[q.slot], step.queries, s.k_label, row, s.item.end - s.item.begin, at.t);
    }
    // dS^T of this step, rounded, to shared memory as (queries, keys).
    __device__ __forceinline__ void store_ds(const float (&x)[backward_queries / 2]) {
        const int key_block = at.lane / 8 % 2, query_block = at.lane / 16, query = at.lane % 8;
        const uint32_t to = ptx::address(s.ds[slot_of(n)]) + at.group * backward_queries * 128 + query_block * 1024 +
                            query * 128 + (((2 * at.warp + key_block) ^ query) << 4);
#pragma unroll
        for (int j = 0; j < backward_queries / 8; j += 2)
            ptx::store_matrices_transposed(
                to + j * 1024, ptx::round_pair(x[4 * j], x[4 * j + 1]), ptx::round_pair(x[4 * j + 2], x[4 * j + 3]),
                ptx::round_pair(x[4 * j + 4], x[4 * j + 5]), ptx::round_pair(x[4 * j + 6], x[4 * j + 7]));
    }
    // Tells both warpgroups that dS is there.
    __device__ __forceinline__ void post_ds() {
        ptx::fence_async();
        __syncwarp();
        if (at.lane == 0) ptx::barrier_arrive(&s.ds_full[slot_of(n)]);
    }

    // A warp's 16 rows of dK or dV, rounded, to dkv_out; rows from `rows` on are not the tile's.
    __device__ __forceinline__ void store_gradient(const float (&x)[D / 2], int token, int rows, int head) {
        float* out = s.out[4 * at.group + at.warp];
        if (rows >= 16) {
            wait_out(n - 1);
            store_rows<D>(ptx::address(out), 16, 0, x, at.lane);
            ptx::fence_async();
            __syncwarp();
            if (at.lane == 0) {
                for (int half = 0; half < D / 64; half++)
                    ptx::tensor_store(&maps.dkv_out, 0, token, half, head, (bf16*)out + half * 16 * columns_of_half);
                ptx::bulk_commit();
            }
            return;
        }
#pragma unroll
        for (int i = 0; i < 2; i++) {
            bf16* to = a.dkv_out + size_t(token + 8 * i + at.g) * a.dkv_out_stride + head * D + 2 * at.t;
            if (8 * i + at.g < rows)
#pragma unroll
                for (int j = 0; j < D / 8; j++)
                    *(uint32_t*)(to + 8 * j) = ptx::round_pair(x[4 * j + 2 * i], x[4 * j + 2 * i + 1]);
        }
    }
    // The same to dkv, where it is added; what is not the tile's is 0.
    template <int C> __device__ __forceinline__ void add_rows(const float (&x)[C / 2], int token, int part, int head) {
        write_rows<C>(x);
        ptx::fence_async();
        __syncwarp();
        if (at.lane == 0) send_rows(maps.dkv, token, part, head);
    }
    __device__ __forceinline__ void add_anchor(float (&x)[D / 2], const bool (&is_anchor_row)[2],
                                               const float* danchor) {
#pragma unroll
        for (int i = 0; i < 2; i++)
            if (is_anchor_row[i])
#pragma unroll
                for (int j = 0; j < D / 8; j++)
#pragma unroll
                    for (int e = 0; e < 2; e++) x[4 * j + 2 * i + e] += danchor[8 * j + 2 * at.t + e];
    }
    // K and V are free for the next item before dK and dV are on their way.
    __device__ __forceinline__ void finish_item() {
        const BackwardItem item = s.item;
        const int row = rows_of_group * at.group + 16 * at.warp, token = item.begin + row;
        bool is_anchor_row[2];
#pragma unroll
        for (int i = 0; i < 2; i++)
            is_anchor_row[i] = s.k_label[row + 8 * i + at.g].y == hidden_doc && token + 8 * i + at.g < item.end;
        __syncwarp();
        if (at.lane == 0) ptx::barrier_arrive(&s.kv_empty);
#pragma unroll
        for (int i = 0; i < D / 2; i++) dk[i] *= 1 / sqrtf(float(D));
        if (!a.dkv_out) {
#pragma unroll
            for (int part = 0; part < D / 64; part++) {
                add_rows<64>(*(float(*)[32]) & dk[32 * part], token, 2 * part, item.head);
                add_rows<64>(*(float(*)[32]) & dv[32 * part], token, 2 * part, a.K + item.head);
            }
            return;
        }
        if (a.danchor && __any_sync(~0u, is_anchor_row[0] || is_anchor_row[1])) {
            const float* danchor = a.danchor + (size_t(item.row) * 2 * a.K + item.head) * D;
            add_anchor(dk, is_anchor_row, danchor);
            add_anchor(dv, is_anchor_row, danchor + a.K * D);
        }
        store_gradient(dk, token, item.end - token, item.head);
        store_gradient(dv, token, item.end - token, a.K + item.head);
    }
};

// A warpgroup of keys.
template <int D, bool PAIR, bool TURNS> __device__ __forceinline__ void
backward_compute(const AttentionBackward<bf16>& a, const BackwardMaps& maps, BackwardShared<D>& s, int group) {
    BackwardGroup<D, PAIR, TURNS> w(a, maps, s, group);
    for (int slot = 0; slot < 2; slot++) ptx::named_arrive(w.ds_free(slot, group ^ 1), 256);
    for (uint32_t phase = 0;; phase ^= 1) {
        ptx::barrier_wait(&s.kv_full, phase);
        if (s.item.head < 0) break;
#pragma unroll
        for (int i = 0; i < D / 2; i++) w.dk[i] = w.dv[i] = 0;
        if (s.item.any) {
            float p[backward_queries / 2], x[backward_queries / 2];
            w.start_steps(p);
            for (;;) {
                w.step_values(x, p);
                if (w.last) break;
                w.step_keys(p, x);
            }
            w.finish_steps(x);
        }
        w.finish_item();
    }
    if (w.at.lane == 0) ptx::bulk_wait_read<0>();
}

// Block: 128 keys of one KV head at a time, which visit tiles of 64 queries; dK and dV stay in registers, dQ is added
// in memory, 32 KiB a step. Shared memory: K, V, three slots of Q, two of dO and dS, dQ on its way out, LSE, delta,
// labels, 221 KiB. Bound by shared memory: a step's products read 264 KiB of it and all else moves 112 KiB, 3008 cycles
// at 128 bytes a cycle (measured: 3360), in which its 10 D FLOP a pair keep the tensor cores busy for 2560, and LSE and
// delta for 128 more; and by power. On an H200: 585 to 596 TFLOP/s at 16384 causal tokens, D = 128, with the passes
// before and after, 59 to 60% of the peak, and 618 to 630 at 65536 (3c23a96).
template <int D, bool PAIR, bool TURNS> __global__ void __launch_bounds__(block_threads, 1)
    attention_hopper_backward_kernel(const __grid_constant__ AttentionBackward<bf16> a,
                                     const __grid_constant__ BackwardMaps maps,
                                     const __grid_constant__ Schedule schedule) {
    static_assert(!PAIR || !TURNS);
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    extern __shared__ __align__(1024) uint8_t memory[];
    BackwardShared<D>& s = *(BackwardShared<D>*)memory;
    const int group = __shfl_sync(~0u, threadIdx.x / 128, 0);
    if (threadIdx.x == 0) {
        ptx::barrier_init(&s.kv_full, fill_arrivals), ptx::barrier_init(&s.kv_empty, 8);
        for (int i = 0; i < s.q_slots; i++)
            ptx::barrier_init(&s.q_full[i], fill_arrivals + 32), ptx::barrier_init(&s.posted[i], 1),
                ptx::barrier_init(&s.q_empty[i], Worker<PAIR>::releases);
        for (int i = 0; i < 2; i++) {
            ptx::barrier_init(&s.dout_full[i], fill_arrivals), ptx::barrier_init(&s.ds_full[i], 8);
            ptx::barrier_init(&s.out_full[i], 8), ptx::barrier_init(&s.out_empty[i], 1);
            ptx::barrier_init(&s.dout_empty[i], Worker<PAIR>::releases);
        }
        for (ptx::Barrier& full : s.dq_target_full) ptx::barrier_init(&full, 1);
        s.items.init();
        ptx::barrier_init_fence();
    }
    for (int i = threadIdx.x; i < QueryOffset::words; i += block_threads) {
        for (QueryOffset& offset : s.score_offset) offset.pair[i] = 0;
        for (QueryOffset& offset : s.dp_offset) offset.pair[i] = 0;
    }
    ptx::fence_async();
    block_sync<PAIR>();
    if (group == 0) {
        ptx::registers_give<24>();
        if (threadIdx.x < 32) backward_load<D, PAIR, TURNS>(a, maps, s, schedule, threadIdx.x);
        else if (threadIdx.x < 64) backward_load_rows<D, TURNS>(a, s, threadIdx.x - 32);
        else if (TURNS) backward_add<D>(a, maps, s, schedule, threadIdx.x / 32 - 2, threadIdx.x % 32);
    } else {
        ptx::registers_take<240>();
        backward_compute<D, PAIR, TURNS>(a, maps, s, group - 1);
    }
    if (PAIR) ptx::cluster_sync();
#else
    __trap();
#endif
}

// (T, heads, D) of bf16 or fp32, tokens `stride` elements apart, in boxes of `rows` tokens and `parts` times 128 bytes
// of one head. Coordinates: column of the 128 bytes, token, 128-byte part, head.
inline CUtensorMap head_map(const void* base, bool fp32, size_t stride, size_t T, size_t heads, size_t D, uint32_t rows,
                            uint32_t parts) {
    const size_t bytes = fp32 ? 4 : 2, width = 128 / bytes;
    return ptx::tensor_map(
        fp32 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT32 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, base,
        {{width, T, D / width, heads}, {stride * bytes, 128, D * bytes}, {uint32_t(width), rows, parts, 1}});
}
// As many heads together as have their rows, of `bytes` a head, in half of the L2 cache. With turns, `turns` counters
// of all heads, and 4 together if they are a multiple of it: tiles of a head follow each other at the distance of a
// step or two, so that many of one head would wait at its beginning, and few rows are in use at a time.
inline Schedule schedule_of(Gpu gpu, int tiles, int heads, int group, size_t bytes, size_t turns = 0) {
    auto fits = [&](int n) { return (bytes << n) <= gpu.context->l2_bytes / 2 || (turns > 0 && n <= 2); };
    int log2_together = 0;
    while (heads % (2 << log2_together) == 0 && fits(log2_together + 1)) log2_together++;
    const size_t counters = 32 + turns; // the schedule's has a line of the cache for itself
    REQUIRE(counters * sizeof(int) <= GpuContext::scratch_bytes, "so many queries need a larger scratch");
    int* counter = (int*)gpu.context->scratch;
    CUDA_CHECK(cudaMemsetAsync(counter, 0, counters * sizeof(int), gpu.stream));
    int* of_turns = turns > 0 ? counter + 32 : nullptr;
    return {tiles * heads, tiles, heads, log2_together, log2_together, 0, 0, group, 0, counter, of_turns};
}

template <bool PAIR, class Kernel, class Arguments, class Maps>
void launch(Gpu gpu, Kernel kernel, size_t shared, const Arguments& a, const Maps& maps, Schedule schedule) {
    CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared)));
    const int workers = std::min(gpu.context->sms / (PAIR ? 2 : 1), schedule.items); // blocks, or pairs
    constexpr int each = 3; // items of a worker at the end, where a longest one lasts as long as two
    while (2 << schedule.log2_at_end <= schedule.heads && schedule.tiles << schedule.log2_at_end < each * workers)
        schedule.log2_at_end++;
    schedule.end_head = schedule.heads - (1 << schedule.log2_at_end);
    schedule.end_item = schedule.end_head * schedule.tiles;
    schedule.given = schedule.counters ? 0 : workers;
    cudaLaunchAttribute cluster;
    cluster.id = cudaLaunchAttributeClusterDimension, cluster.val.clusterDim = {PAIR ? 2u : 1u, 1, 1};
    cudaLaunchConfig_t config{};
    config.gridDim = workers * (PAIR ? 2 : 1), config.blockDim = block_threads;
    config.dynamicSmemBytes = shared, config.stream = gpu.stream, config.attrs = &cluster, config.numAttrs = 1;
    CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, a, maps, schedule));
}

template <int D, bool PAIR> void forward_launch(Gpu gpu, const AttentionForward<bf16>& a) {
    const auto* keys = a.Tk > 0 ? a.kv : a.q; // a map of no keys is never used, but must be one
    const size_t Tk = std::max(a.Tk, 1), kv_stride = a.Tk > 0 ? a.kv_stride : a.q_stride;
    constexpr uint32_t parts = PAIR ? 1 : D / 64; // of what a pair shares each block loads one
    ForwardMaps maps;
    maps.q = head_map(a.q, false, a.q_stride, a.T, a.H, D, forward_queries, D / 64);
    maps.k = head_map(keys, false, kv_stride, Tk, a.K, D, forward_keys, parts);
    maps.v = head_map(a.Tk > 0 ? a.kv + size_t(a.K) * D : a.q, false, kv_stride, Tk, a.K, D, forward_keys, parts);
    maps.out = head_map(a.last ? a.out : a.q, false, a.last ? size_t(a.H) * D : a.q_stride, a.T, a.H, D, 16, 1);
    const Schedule schedule = schedule_of(gpu, a.map.count, a.H, a.H / a.K, Tk * 2 * D * sizeof(bf16) / (a.H / a.K));
    launch<PAIR>(gpu, attention_hopper_forward_kernel<D, PAIR>, sizeof(ForwardShared<D>), a, maps, schedule);
}

template <int D, bool PAIR, bool TURNS> void backward_launch(Gpu gpu, const AttentionBackward<bf16>& a) {
    const bool queries = a.T > 0; // maps of no queries are never used, but must be some
    const size_t T = queries ? a.T : a.Tk, H = queries ? a.H : a.K, q_stride = queries ? a.q_stride : a.kv_stride;
    const bf16* q = queries ? a.q : a.kv;
    constexpr uint32_t parts = PAIR ? 1 : D / 64;
    BackwardMaps maps;
    maps.q = head_map(q, false, q_stride, T, H, D, backward_queries, parts);
    maps.dout = queries ? head_map(a.dout, false, H * D, T, H, D, backward_queries, parts) : maps.q;
    maps.k = head_map(a.kv, false, a.kv_stride, a.Tk, a.K, D, backward_keys, D / 64);
    maps.v = head_map(a.kv + size_t(a.K) * D, false, a.kv_stride, a.Tk, a.K, D, backward_keys, D / 64);
    maps.dq = queries ? head_map(a.dq, true, H * D, T, H, D, 16, D / 64) : maps.q;
    if (a.dkv_out) maps.dkv_out = head_map(a.dkv_out, false, a.dkv_out_stride, a.Tk, 2 * a.K, D, 16, 1);
    else maps.dkv = head_map(a.dkv, true, size_t(2) * a.K * D, a.Tk, 2 * a.K, D, 16, 2);
    const int group = a.H / a.K;
    const size_t bytes = size_t(a.T) * group * D * (2 * sizeof(bf16) + sizeof(float));
    const Schedule schedule = schedule_of(gpu, a.map.count, a.K, group, bytes, TURNS ? size_t(a.H) * a.map.turns : 0);
    launch<PAIR>(gpu, attention_hopper_backward_kernel<D, PAIR, TURNS>, sizeof(BackwardShared<D>), a, maps, schedule);
}

} // namespace hopper

constexpr bool attention_hopper_takes(size_t D) { return D == 64 || D == 128; }
inline AttentionTiles attention_hopper_tiles(size_t D) {
    REQUIRE(attention_hopper_takes(D), "the Hopper attention has kernels for head sizes 64 and 128");
    return {hopper::forward_queries, hopper::forward_keys, hopper::backward_queries, hopper::backward_keys,
            D == 128 ? hopper::pairs_from : 0};
}

// `tile`: of the map, of a block alone.
template <class A> void attention_hopper_require(Gpu gpu, const A& a, int tile) {
    REQUIRE(gpu.context->compute == 90, "use the portable kernel on a GPU that is not Hopper");
    REQUIRE(attention_hopper_takes(a.D), "use the portable kernel for head sizes other than 64 and 128");
    REQUIRE(a.K > 0 && a.H % a.K == 0, "the heads must be a multiple of the KV heads");
    REQUIRE(a.q_stride % 8 == 0 && a.kv_stride % 8 == 0, "tokens must be a multiple of 16 bytes apart");
    REQUIRE(a.map.count == 0 || a.map.tile == tile || (a.D == 128 && a.map.tile == 2 * tile),
            "build the map with attention_hopper_tiles");
}

// See AttentionForward in attention_anchor.cuh; the map is built with attention_hopper_tiles.
inline void attention_hopper_forward(Gpu gpu, const AttentionForward<bf16>& a) {
    attention_hopper_require(gpu, a, hopper::forward_queries);
    REQUIRE(uintptr_t(a.anchor) % 16 == 0, "the anchor must start on 16 bytes");
    if (a.map.count == 0) return;
    if (a.D == 64) hopper::forward_launch<64, false>(gpu, a);
    else if (a.map.tile == hopper::forward_queries) hopper::forward_launch<128, false>(gpu, a);
    else hopper::forward_launch<128, true>(gpu, a);
}

// See AttentionBackward; dq, in the order of DqOrder::split, delta and danchor come from attention_backward_begin. The
// order of the additions to dq is fixed where the map has turns.
inline void attention_hopper_backward(Gpu gpu, const AttentionBackward<bf16>& a) {
    attention_hopper_require(gpu, a, hopper::backward_keys);
    REQUIRE(!a.dkv_out || a.dkv_out_stride % 8 == 0, "tokens must be a multiple of 16 bytes apart");
    if (a.map.count == 0) return;
    const bool alone = a.map.tile == hopper::backward_keys, turns = a.map.turns > 0;
    REQUIRE(alone || !turns, "a map with turns has no pairs");
    REQUIRE(turns || !gpu.context->deterministic, "dQ in a fixed order wants a map with turns");
    if (a.D == 64 && turns) hopper::backward_launch<64, false, true>(gpu, a);
    else if (a.D == 64) hopper::backward_launch<64, false, false>(gpu, a);
    else if (turns) hopper::backward_launch<128, false, true>(gpu, a);
    else if (alone) hopper::backward_launch<128, false, false>(gpu, a);
    else hopper::backward_launch<128, true, false>(gpu, a);
}
#endif
