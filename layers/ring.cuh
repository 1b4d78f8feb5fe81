// Attention across the ranks of one ring: placement of the tokens, exchange plan, forward, backward.
//
// The row of S tokens is cut into equal chunks, and every rank owns the same number of them, in ascending order. Rank r
// attends its queries to its own keys first; in step s = 1..n-1 it sends keys and values to rank r + s and receives
// those of rank r - s (mod n), each time only the chunks of which the receiver sees something. All ranks derive the
// same plan from doc[], so nothing is said about it.
//
//   forward    (O, LSE) in Acc goes on from step to step as the running state of attention_anchor.cuh
//   backward   dK and dV of received keys are summed in Acc, go back to their owner in step s, and are added there in
//              the order of the steps; dQ stays
//   anchor     its k0, v0 (a row's token 0, on rank 0) are broadcast; dk0, dv0 are summed over the ring and added to
//              token 0 on rank 0
//
// Balance: a chunk costs its visible pairs. Under a packed mask 2 chunks a rank leave an imbalance (largest / mean) of
// 1.8 to 2.0 and 16 reach 1.01, but more chunks see more of the other ranks' keys. Of the placements with an imbalance
// of at most 1.05 the one that moves the fewest keys is taken. For packs of 65536 tokens with documents of mean 4096 on
// 8 ranks that is 0.19 of what a plain ring moves (mean 1024: 0.08), for the full mask 0.75.
#pragma once
#include "../attention_anchor.cuh"
#include "../core/comm.h"
#include "../core/kernel.h"

// Where the chunks of one row are.
struct Placement {
    size_t chunk = 0;            // tokens per chunk
    std::vector<int32_t> rank;   // of each chunk
    std::vector<int64_t> load;   // (size) visible pairs of a rank's queries
    std::vector<uint8_t> wanted; // (size, chunks): rank r's queries see a key of the chunk, other than the anchor
    int64_t moved = 0;           // tokens whose keys go to another rank, once for each
};

constexpr size_t ring_chunks_per_rank[] = {2, 4, 8, 16};
constexpr int64_t ring_imbalance_percent = 105;

// The length to which rows are padded: a multiple of ring * 16, so that every number of chunks can be had, but of less
// when the row is so short that chunks would fall below a tile.
inline size_t ring_padded_length(size_t S, size_t ring) {
    if (ring == 1) return S;
    size_t chunks = 16;
    while (chunks > 2 && S < ring * chunks * attention_tile) chunks /= 2;
    return (S + ring * chunks - 1) / (ring * chunks) * (ring * chunks);
}

// The row cut into chunks: what each costs, and which chunks each sees.
struct Chunks {
    size_t length;
    std::vector<int64_t> work; // visible pairs of the chunk's queries
    std::vector<uint8_t> sees; // (chunks, chunks): query chunk i sees a key of chunk j, other than the anchor
    size_t size() const { return work.size(); }
};

inline Chunks cut_row(const Tokens& row, size_t chunks) {
    const size_t length = row.size() / chunks;
    Chunks c{length, visible_pairs(row.doc.data(), row.size(), length), std::vector<uint8_t>(chunks * chunks)};
    TileMap map;
    tile_map_build(map, row, row, int(c.length), int(c.length));
    for (const QueryTile& tile : map.tiles)
        for (int32_t r = tile.first_range; r < tile.last_range; r++)
            for (size_t at = map.ranges[r].begin; at < size_t(map.ranges[r].end); at += c.length)
                c.sees[tile.begin / c.length * chunks + at / c.length] = 1;
    return c;
}

// Three ways to begin. Zigzag balances a full causal mask; runs of neighbours move least; and the longest chunk first
// to the rank with the least work and a free place balances anything.
enum class RingStart { zigzag, runs, longest_first };

inline std::vector<int32_t> ring_start(const Chunks& c, size_t size, RingStart start) {
    const size_t each = c.size() / size;
    std::vector<int32_t> rank(c.size());
    for (size_t j = 0; j < c.size(); j++) {
        const size_t place = j % (2 * size);
        rank[j] = int32_t(start == RingStart::runs ? j / each : place < size ? place : 2 * size - 1 - place);
    }
    if (start != RingStart::longest_first) return rank;
    std::vector<size_t> order(c.size()), held(size);
    std::vector<int64_t> load(size);
    std::iota(order.begin(), order.end(), size_t(0));
    std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) { return c.work[a] > c.work[b]; });
    for (size_t j : order) {
        size_t best = size;
        for (size_t r = 0; r < size; r++)
            if (held[r] < each && (best == size || load[r] < load[best])) best = r;
        rank[j] = int32_t(best), held[best]++, load[best] += c.work[j];
    }
    return rank;
}

inline bool balanced(const std::vector<int64_t>& load) {
    const int64_t sum = std::accumulate(load.begin(), load.end(), int64_t(0));
    return *std::max_element(load.begin(), load.end()) * int64_t(load.size()) * 100 <= ring_imbalance_percent * sum;
}

// Exchanges chunks between the ranks with the most and the least work, the pair that levels the two best, until the
// ranks are balanced or no exchange helps.
inline void ring_level(std::vector<int32_t>& rank, std::vector<int64_t>& load, const Chunks& c) {
    while (!balanced(load)) {
        const int32_t most = int32_t(std::max_element(load.begin(), load.end()) - load.begin());
        const int32_t least = int32_t(std::min_element(load.begin(), load.end()) - load.begin());
        int64_t best = load[most];
        size_t give = 0, take = 0;
        for (size_t i = 0; i < c.size(); i++)
            for (size_t j = 0; rank[i] == most && j < c.size(); j++) {
                if (rank[j] != least) continue;
                const int64_t change = c.work[i] - c.work[j];
                const int64_t larger = std::max(load[most] - change, load[least] + change);
                if (larger < best) best = larger, give = i, take = j;
            }
        if (best == load[most]) return;
        load[most] -= c.work[give] - c.work[take], load[least] += c.work[give] - c.work[take];
        std::swap(rank[give], rank[take]);
    }
}

inline Placement make_placement(const Chunks& c, size_t size, RingStart start) {
    Placement p;
    p.chunk = c.length, p.rank = ring_start(c, size, start);
    p.load.resize(size), p.wanted.resize(size * c.size());
    for (size_t j = 0; j < c.size(); j++) p.load[p.rank[j]] += c.work[j];
    ring_level(p.rank, p.load, c);

    const int32_t first = p.rank[0]; // the anchor's owner becomes rank 0
    std::swap(p.load[0], p.load[first]);
    for (int32_t& r : p.rank) r = r == first ? 0 : r == 0 ? first : r;

    for (size_t i = 0; i < c.size(); i++)
        for (size_t j = 0; j < c.size(); j++) p.wanted[p.rank[i] * c.size() + j] |= c.sees[i * c.size() + j];
    for (size_t r = 0; r < size; r++)
        for (size_t j = 0; j < c.size(); j++)
            if (p.wanted[r * c.size() + j] && p.rank[j] != int32_t(r)) p.moved += int64_t(c.length);
    return p;
}

// The placement of one row: a function of doc[] alone, in integers, so that all ranks come to the same.
inline Placement ring_placement(const int32_t* doc /*(S)*/, size_t S, size_t size) {
    Tokens row{std::vector<int32_t>(S), std::vector<int32_t>(doc, doc + S), {0, int32_t(S)}};
    std::iota(row.index.begin(), row.index.end(), 0);
    if (size == 1) return make_placement(cut_row(row, 1), 1, RingStart::runs);
    REQUIRE(S > 0 && S % (2 * size) == 0, "pad the row to ring_padded_length");
    auto largest = [](const Placement& p) { return *std::max_element(p.load.begin(), p.load.end()); };
    auto better = [&](const Placement& a, const Placement& b) {
        const bool a_balanced = balanced(a.load), b_balanced = balanced(b.load);
        if (a_balanced != b_balanced) return a_balanced;
        if (a_balanced) return a.moved != b.moved ? a.moved < b.moved : largest(a) < largest(b);
        return largest(a) != largest(b) ? largest(a) < largest(b) : a.moved < b.moved;
    };
    Placement best;
    for (size_t each : ring_chunks_per_rank) {
        if (S % (each * size) != 0) continue;
        const Chunks chunks = cut_row(row, each * size);
        for (RingStart start : {RingStart::zigzag, RingStart::runs, RingStart::longest_first}) {
            Placement p = make_placement(chunks, size, start);
            if (best.chunk == 0 || better(p, best)) best = std::move(p);
        }
    }
    return best;
}

// What one rank does in an exchange. Ranges count local tokens.
struct TokenRange {
    int32_t begin, end;
};
struct RingStep {
    int to, from;
    std::vector<TokenRange> send; // own tokens whose keys `to` sees
    size_t send_tokens = 0;
    Tokens received;  // tokens of `from` whose keys this rank sees
    AttentionMap map; // own queries, received keys
};
struct RingPlan {
    int rank = 0, size = 1;
    bool anchor = false;         // document 0 exists: its token 0 is every row's anchor
    Tokens local;                // row b's tokens are [row_begin[b], row_begin[b + 1]), S / size each, by global index
    AttentionMap own;            // own queries, own keys
    std::vector<RingStep> steps; // s = 1..size-1
    int64_t pairs = 0;           // visible pairs of the own queries, the anchor's column included
    double imbalance = 1;        // largest / mean work of a rank
    double moved = 0;            // keys sent, as a share of what a plain ring sends (all to all)
};

// The tokens of the chunks that `owner` has and, if told, that `reader` sees; and where they lie among the owner's own.
inline void append_chunks(Tokens& to, std::vector<TokenRange>* ranges, const Placement& p, const int32_t* doc,
                          size_t row, int owner, int reader) {
    const size_t chunks = p.rank.size(), per_row = chunks / p.load.size() * p.chunk;
    size_t local = row * per_row;
    for (size_t j = 0; j < chunks; j++) {
        if (p.rank[j] != owner) continue;
        if (reader < 0 || p.wanted[reader * chunks + j]) {
            for (size_t i = j * p.chunk; i < (j + 1) * p.chunk; i++)
                to.index.push_back(int32_t(i)), to.doc.push_back(doc[i]);
            if (ranges && !ranges->empty() && ranges->back().end == int32_t(local))
                ranges->back().end += int32_t(p.chunk);
            else if (ranges) ranges->push_back({int32_t(local), int32_t(local + p.chunk)});
        }
        local += p.chunk;
    }
    to.row_begin.push_back(int32_t(to.size()));
}

// S as ring_padded_length gives it, the padding being documents of their own (in full mode more of document 0).
// `anchor`: document 0 exists (modes full and anchor). The same doc[] must be passed on all ranks.
inline void ring_plan_build(RingPlan& plan, const int32_t* doc /*(B, S)*/, bool anchor, size_t B, size_t S, int rank,
                            int size, const AttentionTiles& tiles = attention_tiles_cpu) {
    REQUIRE(B > 0 && S > 0 && rank >= 0 && rank < size, "pass at least one token, and a rank of the ring");
    REQUIRE(B * S / size <= size_t(INT32_MAX), "use more ranks or shorter rows");
    plan = RingPlan{rank, size, anchor, {{}, {}, {0}}, {}, {}};
    for (int s = 1; s < size; s++) {
        plan.steps.push_back({(rank + s) % size, (rank - s + size) % size, {}, 0, {{}, {}, {0}}, {}});
    }
    std::vector<int64_t> load(size);
    int64_t moved = 0;
    for (size_t b = 0; b < B; b++) {
        const int32_t* row = doc + b * S;
        const bool has_zero = std::find(row, row + S, 0) != row + S;
        REQUIRE(has_zero == anchor && (row[0] == 0) == anchor, "document 0 begins each row, or there is no anchor");
        const Placement p = ring_placement(row, S, size);
        append_chunks(plan.local, nullptr, p, row, b, rank, -1);
        for (RingStep& step : plan.steps) {
            Tokens sent{{}, {}, {0}};
            append_chunks(sent, &step.send, p, row, b, rank, step.to);
            append_chunks(step.received, nullptr, p, row, b, step.from, rank);
            step.send_tokens += sent.size();
        }
        for (int r = 0; r < size; r++) load[r] += p.load[r];
        moved += p.moved;
    }
    attention_map_build(plan.own, plan.local, plan.local, tiles);
    for (RingStep& step : plan.steps) attention_map_build(step.map, plan.local, step.received, tiles);
    plan.pairs = load[rank];
    const double mean = double(std::accumulate(load.begin(), load.end(), int64_t(0))) / size;
    plan.imbalance = double(*std::max_element(load.begin(), load.end())) / mean;
    plan.moved = size == 1 ? 0 : double(moved) / double(B * S * (size - 1));
}

// Bytes of device memory that a plan takes at most, with tiles of at least 32 tokens; the CPU reads the plan itself.
template <class Dev> size_t ring_plan_bytes(Dev, size_t T, size_t ring, size_t B) {
    const size_t map = (T / 32 + B) * (sizeof(QueryTile) + tile_ranges_most * sizeof(KeyRange));
    return std::is_same_v<Dev, Gpu> ? ring * (2 * map + T * sizeof(TokenLabel) + 1024) + T * sizeof(TokenLabel) : 0;
}
inline void ring_plan_upload(Cpu, RingPlan&, void*, size_t) {}

// Buffers of one layer's attention; a layer leaves nothing in them for another call. Sizes in elements.
template <class E> struct RingScratch {
    Acc<E>* state = nullptr;       // (T, H, D) o in the forward, dq in the backward
    Acc<E>* delta = nullptr;       // (T, H)
    Acc<E>* dkv = nullptr;         // (T, 2, K, D) of the own tokens
    E* anchor = nullptr;           // (B, 2, K, D) k0, v0
    Acc<E>* danchor = nullptr;     // (B, 2, K, D)
    E* send = nullptr;             // (<= T, 2, K, D)
    E* receive[2] = {};            // (<= T, 2, K, D) each, by the parity of the step
    Acc<E>* dkv_send[2] = {};      // likewise, of received tokens
    Acc<E>* dkv_receive = nullptr; // likewise, of sent tokens
};
struct RingScratchSizes {
    size_t state, delta, dkv, anchor, danchor, send, receive, dkv_send, dkv_receive;
};
template <class Dev>
RingScratchSizes ring_scratch_sizes(Dev, size_t T, size_t ring, size_t B, size_t H, size_t K, size_t D) {
    const size_t own = T * 2 * K * D, moving = ring == 1 ? 0 : own, anchor = B * 2 * K * D;
    const size_t dkv = std::is_same_v<Dev, Gpu> && ring == 1 ? 0 : own; // a GPU alone stores dK and dV at once
    return {T * H * D, T * H, dkv, anchor, anchor, moving, moving, moving, moving};
}

// packed (tokens, width) from the tokens in `ranges`, which lie `stride` apart.
template <class E>
void ring_pack(Cpu, E* packed, const E* from, size_t stride, const std::vector<TokenRange>& ranges, size_t width) {
    for (const TokenRange& range : ranges) {
#pragma omp parallel for schedule(static)
        for (int32_t t = range.begin; t < range.end; t++)
            std::copy_n(from + t * stride, width, packed + (t - range.begin) * width);
        packed += (range.end - range.begin) * width;
    }
}

// The tokens in `ranges` (rows of `width` elements) += packed.
template <class A> void ring_add(Cpu, A* to, const A* packed, const std::vector<TokenRange>& ranges, size_t width) {
    for (const TokenRange& range : ranges) {
        const size_t count = (range.end - range.begin) * width;
#pragma omp parallel for schedule(static)
        for (size_t i = 0; i < count; i++) to[range.begin * width + i] += packed[i];
        packed += count;
    }
}

// Where rank 0 has the rows' token 0.
inline std::vector<TokenRange> anchor_ranges(const RingPlan& plan) {
    std::vector<TokenRange> ranges;
    for (size_t b = 0; b < plan.local.rows(); b++)
        ranges.push_back({plan.local.row_begin[b], plan.local.row_begin[b] + 1});
    return ranges;
}

// The rows' k0 and v0 from rank 0 to all; null without an anchor.
template <class Dev, class E> const E* ring_anchor(Dev dev, const Comm& comm, const RingPlan& plan, E* anchor,
                                                   const E* kv, size_t stride, size_t width) {
    if (!plan.anchor) return nullptr;
    if (plan.rank == 0) ring_pack(dev, anchor, kv, stride, anchor_ranges(plan), width);
    comm_broadcast(dev, comm, anchor, plan.local.rows() * width, 0);
    return anchor;
}

// Starts the exchange of keys and values of one step; beyond the last step: nothing.
template <class Dev, class E> Shift ring_send_keys(Dev dev, const Comm& comm, const RingPlan& plan, size_t step,
                                                   RingScratch<E>& scratch, const E* kv, size_t stride, size_t width) {
    if (step >= plan.steps.size()) return {};
    const RingStep& s = plan.steps[step];
    ring_pack(dev, scratch.send, kv, stride, s.send, width);
    return shift_start(dev, comm, scratch.send, s.send_tokens * width, s.to, scratch.receive[step % 2],
                       s.received.size() * width, s.from);
}

// out and lse of the local tokens; qkv is rotated (RoPE).
template <class Dev, class E> void ring_attention_forward(Dev dev, const Comm& comm, const RingPlan& plan,
                                                          E* out /*(T, H, D)*/, Acc<E>* lse /*(T, H)*/,
                                                          const E* qkv /*(T, H + 2K, D)*/, RingScratch<E>& scratch,
                                                          size_t H, size_t K, size_t D) {
    REQUIRE(comm.rank == plan.rank && comm.size == plan.size, "build the plan for this rank of this ring");
    const size_t stride = (H + 2 * K) * D, width = 2 * K * D;
    const E* kv = qkv + H * D;
    const E* anchor = ring_anchor(dev, comm, plan, scratch.anchor, kv, stride, width);
    const size_t steps = plan.steps.size();
    Shift keys = ring_send_keys(dev, comm, plan, 0, scratch, kv, stride, width);
    attention_forward(dev, out, lse, scratch.state, qkv, stride, kv, stride, anchor, plan.own, {true, steps == 0},
                      plan.local, plan.local, H, K, D);
    for (size_t i = 0; i < steps; i++) {
        shift_wait(dev, keys);
        keys = ring_send_keys(dev, comm, plan, i + 1, scratch, kv, stride, width);
        const RingStep& step = plan.steps[i];
        attention_forward(dev, out, lse, scratch.state, qkv, stride, (const E*)scratch.receive[i % 2], width, anchor,
                          step.map, {false, i + 1 == steps}, plan.local, step.received, H, K, D);
    }
}

// dqkv is overwritten. The gradients of step i's keys travel back while step i + 1 is computed.
template <class Dev, class E>
void ring_attention_backward(Dev dev, const Comm& comm, const RingPlan& plan, E* dqkv /*(T, H + 2K, D)*/,
                             const E* dout /*(T, H, D)*/, const E* out /*(T, H, D)*/, const Acc<E>* lse /*(T, H)*/,
                             const E* qkv /*(T, H + 2K, D)*/, RingScratch<E>& scratch, size_t H, size_t K, size_t D) {
    REQUIRE(comm.rank == plan.rank && comm.size == plan.size, "build the plan for this rank of this ring");
    const size_t stride = (H + 2 * K) * D, width = 2 * K * D, T = plan.local.size(), B = plan.local.rows();
    const E* kv = qkv + H * D;
    Acc<E>*dq = scratch.state, *dkv = scratch.dkv, *danchor = plan.anchor ? scratch.danchor : nullptr;
    const E* anchor = ring_anchor(dev, comm, plan, scratch.anchor, kv, stride, width);
    E* const dkv_out = dqkv + H * D;
    Shift keys = ring_send_keys(dev, comm, plan, 0, scratch, kv, stride, width);
    if (dkv) fill_zero(dev, dkv, T * width * sizeof(*dkv));
    if (danchor) fill_zero(dev, danchor, B * width * sizeof(*danchor));
    attention_backward_begin(dev, scratch.delta, dq, danchor, dout, out, lse, qkv, stride, anchor, plan.local, H, K, D);
    attention_backward(dev, dq, dkv, plan.steps.empty() ? dkv_out : nullptr, stride, danchor, dout, qkv, stride, kv,
                       stride, lse, scratch.delta, plan.own, plan.local, plan.local, H, K, D);
    Shift back;
    for (size_t i = 0; i < plan.steps.size(); i++) {
        const RingStep& step = plan.steps[i];
        const size_t received = step.received.size() * width;
        Acc<E>* partial = scratch.dkv_send[i % 2];
        shift_wait(dev, keys);
        keys = ring_send_keys(dev, comm, plan, i + 1, scratch, kv, stride, width);
        fill_zero(dev, partial, received * sizeof(*partial));
        attention_backward(dev, dq, partial, (E*)nullptr, 0, danchor, dout, qkv, stride,
                           (const E*)scratch.receive[i % 2], width, lse, scratch.delta, step.map, plan.local,
                           step.received, H, K, D);
        shift_wait(dev, back);
        if (i > 0) ring_add(dev, dkv, scratch.dkv_receive, plan.steps[i - 1].send, width);
        back = shift_start(dev, comm, partial, received, step.from, scratch.dkv_receive, step.send_tokens * width,
                           step.to);
    }
    attention_store(dev, dqkv, stride, dq, T, H * D);
    shift_wait(dev, back);
    if (plan.steps.empty()) return;
    ring_add(dev, dkv, scratch.dkv_receive, plan.steps.back().send, width);
    if (danchor) comm_sum(dev, comm, danchor, B * width);
    if (danchor && plan.rank == 0) ring_add(dev, dkv, danchor, anchor_ranges(plan), width);
    attention_store(dev, dkv_out, stride, dkv, T, width);
}

#ifdef __CUDACC__
// Hands out pieces of the plan's memory and fills them.
struct RingUpload {
    Gpu gpu;
    uint8_t* memory;
    size_t left;
    template <class X> const X* put(const std::vector<X>& from) {
        const size_t bytes = from.size() * sizeof(X), padded = (bytes + 63) / 64 * 64;
        REQUIRE(padded <= left, "give the plan the memory that ring_plan_bytes says");
        X* to = (X*)memory;
        copy_to_device(gpu, to, from.data(), bytes);
        memory += padded, left -= padded;
        return to;
    }
    DeviceMap put(const TileMap& map) { return {put(map.tiles), put(map.ranges), int32_t(map.tiles.size()), map.tile}; }
};

// Brings the plan to the GPU: `bytes` of its memory, as ring_plan_bytes says.
inline void ring_plan_upload(Gpu gpu, RingPlan& plan, void* memory, size_t bytes) {
    RingUpload upload{gpu, (uint8_t*)memory, bytes};
    const TokenLabel* q_label = upload.put(token_labels(plan.local, false));
    auto put = [&](AttentionMap& map, const Tokens& keys) {
        map.q_label = q_label, map.k_label = upload.put(token_labels(keys, true));
        map.device_forward = upload.put(map.forward), map.device_backward = upload.put(map.backward);
    };
    put(plan.own, plan.local);
    for (RingStep& step : plan.steps) put(step.map, step.received);
}

// Gpu: one block a token, W elements at once a thread; the ranges are few. Bound by memory.
template <class E, int W> __global__ void __launch_bounds__(256)
    ring_pack_kernel(E* packed, const E* from, size_t stride, size_t width) {
#pragma unroll 4
    for (size_t i = threadIdx.x * W; i < width; i += 256 * W)
        pack_store<E, W>(packed + blockIdx.x * width + i, pack_load<W>(from + blockIdx.x * stride + i));
}
template <class E>
void ring_pack(Gpu gpu, E* packed, const E* from, size_t stride, const std::vector<TokenRange>& ranges, size_t width) {
    for (const TokenRange& range : ranges) {
        const size_t tokens = range.end - range.begin;
        if (tokens == 0) continue;
        const E* first = from + range.begin * stride;
        const bool packs = packs_fit<E>(width, packed, first) && stride % pack_width<E> == 0;
        auto kernel = packs ? ring_pack_kernel<E, pack_width<E>> : ring_pack_kernel<E, 1>;
        kernel<<<grid_blocks(tokens), 256, 0, gpu.stream>>>(packed, first, stride, width);
        CUDA_CHECK(cudaGetLastError());
        packed += tokens * width;
    }
}

template <class A, int W> __global__ void __launch_bounds__(256) ring_add_kernel(A* to, const A* packed, size_t width) {
    to += blockIdx.x * width, packed += blockIdx.x * width;
#pragma unroll 4
    for (size_t i = threadIdx.x * W; i < width; i += 256 * W) {
        const Pack<A, W> x = pack_load<W>(to + i), y = pack_load<W>(packed + i);
        A sum[W];
#pragma unroll
        for (int j = 0; j < W; j++) sum[j] = x[j] + y[j];
        pack_store<A, W>(to + i, sum);
    }
}
template <class A> void ring_add(Gpu gpu, A* to, const A* packed, const std::vector<TokenRange>& ranges, size_t width) {
    for (const TokenRange& range : ranges) {
        const size_t tokens = range.end - range.begin;
        if (tokens == 0) continue;
        A* first = to + range.begin * width;
        auto kernel = packs_fit<A>(width, first, packed) ? ring_add_kernel<A, pack_width<A>> : ring_add_kernel<A, 1>;
        kernel<<<grid_blocks(tokens), 256, 0, gpu.stream>>>(first, packed, width);
        CUDA_CHECK(cudaGetLastError());
        packed += tokens * width;
    }
}
#endif
