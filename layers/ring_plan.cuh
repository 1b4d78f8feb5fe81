// Placement of a row's tokens on the ranks of one ring, and the plan of what they exchange.
//
// The row of S tokens is cut into equal chunks, and every rank owns the same number of them, in ascending order. All
// ranks derive the same plan from doc[], so nothing is said about it.
//
// Balance: a chunk costs its visible pairs. Under a packed mask 2 chunks a rank leave an imbalance (largest / mean) of
// 1.3 to 3 and 16 reach 1.01, but more chunks see more of the other ranks' keys. Of the placements with an imbalance
// of at most 1.05 one is searched that moves the fewest keys; on up to 32 ranks, whose transfers attention hides, first
// among those of at most 1.02, for waiting is not hidden. For packs of 65536 tokens with documents of mean 4096 on 8
// ranks that is 0.16 of what a plain ring moves (mean 1024: 0.07), for the full mask, by zigzag, 0.75.
#pragma once
#include "../attention_anchor.cuh"
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
constexpr int64_t ring_imbalance_percent[] = {102, 105}; // the first up to ring_hidden_ranks
constexpr size_t ring_hidden_ranks = 32;

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
    for (const MapTile& tile : map.tiles)
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

// The most work that a rank may have, `percent` of the mean.
inline int64_t ring_load_most(const std::vector<int64_t>& load, int64_t percent) {
    const int64_t sum = std::accumulate(load.begin(), load.end(), int64_t(0));
    return percent * sum / (100 * int64_t(load.size()));
}
inline bool balanced(const std::vector<int64_t>& load, int64_t percent) {
    return *std::max_element(load.begin(), load.end()) <= ring_load_most(load, percent);
}

// Exchanges chunks between the ranks with the most and the least work, the pair that levels the two best, until the
// ranks are balanced or no exchange helps.
inline void ring_level(std::vector<int32_t>& rank, std::vector<int64_t>& load, const Chunks& c, int64_t percent) {
    while (!balanced(load, percent)) {
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

// A placement in the course of the search, and the chunks that it moves: for each the ranks that see it and do not own
// it. All of it is kept up to date as chunks change their ranks.
struct RingSearch {
    const Chunks& c;
    const size_t chunks, size;
    std::vector<int32_t> rank;
    std::vector<int64_t> load;
    std::vector<std::vector<int32_t>> sees; // (chunks) the chunks that one sees
    std::vector<int32_t> readers;           // (size, chunks) the chunks of rank r that see chunk j
    int64_t moved = 0;

    RingSearch(const Chunks& c, const std::vector<int32_t>& rank, const std::vector<int64_t>& load)
        : c(c), chunks(c.size()), size(load.size()), rank(rank), load(load), sees(chunks), readers(size * chunks) {
        for (size_t i = 0; i < chunks; i++)
            for (size_t j = 0; j < chunks; j++)
                if (c.sees[i * chunks + j]) sees[i].push_back(int32_t(j)), readers[rank[i] * chunks + j]++;
        for (size_t r = 0; r < size; r++)
            for (size_t j = 0; j < chunks; j++) moved += readers[r * chunks + j] > 0 && rank[j] != int32_t(r);
    }
    void give(size_t i, int32_t to) {
        const int32_t from = rank[i];
        for (int32_t j : sees[i]) moved -= --readers[from * chunks + j] == 0 && rank[j] != from;
        moved += (readers[from * chunks + i] > 0) - (readers[to * chunks + i] > 0);
        rank[i] = to;
        for (int32_t j : sees[i]) moved += readers[to * chunks + j]++ == 0 && rank[j] != to;
        load[from] -= c.work[i], load[to] += c.work[i];
    }
    void exchange(size_t i, size_t j) {
        const int32_t a = rank[i], b = rank[j];
        give(i, b), give(j, a);
    }
};

// Exchanges two chunks, drawn at random (by a hash: every rank draws the same), where the ranks stay balanced and no
// more is moved; in the first half of the search also where one chunk more is, which leads out of dead ends. Keeps the
// best it has come across. A full mask is left as it is. 128 chunks take some milliseconds.
inline void ring_spare(std::vector<int32_t>& rank, std::vector<int64_t>& load, const Chunks& c, int64_t percent) {
    const size_t n = c.size(), tries = std::min<size_t>(400 * n, 60000);
    if (size_t(std::accumulate(c.sees.begin(), c.sees.end(), 0)) == n * (n + 1) / 2) return;
    RingSearch s(c, rank, load);
    int64_t least = s.moved;
    const int64_t most = ring_load_most(load, percent);
    for (size_t k = 0; k < tries && least > 0; k++) {
        const uint64_t draw = hash64(n, k);
        const size_t i = uint32_t(draw) % n, j = (draw >> 32) % n;
        const int32_t a = s.rank[i], b = s.rank[j];
        const int64_t more = c.work[j] - c.work[i], before = s.moved; // work of a
        if (a == b || s.load[a] + more > most || s.load[b] - more > most) continue;
        s.exchange(i, j);
        if (s.moved > before + (k < tries / 2)) s.exchange(i, j);
        else if (s.moved < least) least = s.moved, rank = s.rank, load = s.load;
    }
}

inline Placement make_placement(const Chunks& c, size_t size, RingStart start, int64_t percent) {
    Placement p;
    p.chunk = c.length, p.rank = ring_start(c, size, start);
    p.load.resize(size), p.wanted.resize(size * c.size());
    for (size_t j = 0; j < c.size(); j++) p.load[p.rank[j]] += c.work[j];
    ring_level(p.rank, p.load, c, percent);
    if (balanced(p.load, percent)) ring_spare(p.rank, p.load, c, percent);

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
    if (size == 1) return make_placement(cut_row(row, 1), 1, RingStart::runs, 100);
    REQUIRE(S > 0 && S % (2 * size) == 0, "pad the row to ring_padded_length");
    std::vector<Chunks> cuts;
    for (size_t each : ring_chunks_per_rank)
        if (S % (each * size) == 0) cuts.push_back(cut_row(row, each * size));
    auto largest = [](const Placement& p) { return *std::max_element(p.load.begin(), p.load.end()); };
    Placement best;
    for (int64_t percent : ring_imbalance_percent) {
        if (percent == ring_imbalance_percent[0] && size > ring_hidden_ranks) continue;
        auto better = [&](const Placement& a, const Placement& b) {
            const bool a_balanced = balanced(a.load, percent), b_balanced = balanced(b.load, percent);
            if (a_balanced != b_balanced) return a_balanced;
            if (a_balanced) return a.moved != b.moved ? a.moved < b.moved : largest(a) < largest(b);
            return largest(a) != largest(b) ? largest(a) < largest(b) : a.moved < b.moved;
        };
        std::vector<Placement> all(3 * cuts.size());
#pragma omp parallel for schedule(dynamic, 1)
        for (size_t i = all.size(); i > 0; i--) // what takes longest is begun first
            all[i - 1] = make_placement(cuts[(i - 1) / 3], size, RingStart((i - 1) % 3), percent);
        for (Placement& p : all)
            if (best.chunk == 0 || better(p, best)) best = std::move(p);
        if (balanced(best.load, percent)) break;
    }
    return best;
}

// How queries meet keys of other ranks (the exchanges are in ring.cuh). automatic: see below; in a plan, `ring`.
enum class RingBackend { automatic, ring, allgather, ulysses };

// The fastest one, as far as it was measured (dev/LOG.md, "Several GPUs"). With a full mask Ulysses, whose heads attend
// to whole rows in one piece; the ranks must divide the K KV heads, and the `tokens` of whole rows be an int32. With
// documents the ring, which leaves out what the mask hides. Between hosts, where nothing was measured, the ring too:
// its transfers have attention beside them, those of Ulysses nothing.
inline RingBackend ring_backend_for(bool full, size_t ring, size_t K, size_t tokens, bool in_one_host) {
    const bool can = K % ring == 0 && tokens <= size_t(INT32_MAX);
    return full && ring > 1 && can && in_one_host ? RingBackend::ulysses : RingBackend::ring;
}
struct RingExchange {
    RingBackend backend = RingBackend::ring;
    size_t held = 2; // ring: steps whose keys, and gradients of keys, a rank's buffers hold at their largest
};

struct TokenRange {
    int32_t begin, end;
};
// Own tokens [at, at + send) go out, and as many as `receive` come from the same place of another rank.
struct RingMove {
    size_t at, send, receive;
};
// What one rank does in step s of an exchange. Ranges and places count local tokens.
struct RingStep {
    int to, from;
    std::vector<TokenRange> send; // own tokens whose keys `to` sees
    size_t send_tokens = 0;
    Tokens received;            // tokens of `from` whose keys this rank sees
    std::vector<RingMove> keys; // to `to`, from `from`
    std::vector<RingMove> back; // the gradients of those keys: to `from`, from `to`
    size_t received_at = 0, far_at = 0,
           sent_at = 0; // places: of what is received, here and at `to`; of what comes back
    AttentionMap map;   // ring: own queries, received keys
};
struct RingPlan {
    int rank = 0, size = 1;
    bool anchor = false; // document 0 exists: its token 0 is every row's anchor
    RingBackend backend = RingBackend::ring;
    size_t held = 0;             // ring_steps_held
    Tokens local;                // row b's tokens are [row_begin[b], row_begin[b + 1]), S / size each, by global index
    AttentionMap own;            // ring: own queries, own keys; allgather: own queries, gathered; ulysses: all, all
    std::vector<RingStep> steps; // s = 1..size-1
    bool early = true;           // ring: the buffers hold what all steps move, on every rank
    Tokens gathered;             // allgather: own tokens and all received; ulysses: the whole rows
    std::vector<std::vector<TokenRange>> places; // (size) where rank r's tokens stand among those, in its order
    int64_t pairs = 0;                           // visible pairs of the own queries, the anchor's column included
    double imbalance = 1;                        // largest / mean work of a rank
    double moved = 0;                            // keys sent, as a share of what a plain ring sends (all to all)
};

// Two at least, where there are two; allgather holds all.
inline size_t ring_steps_held(const RingExchange& e, size_t ring) {
    return e.backend == RingBackend::allgather ? ring - 1 : std::min(ring - 1, std::max<size_t>(e.held, 2));
}

inline void append_range(std::vector<TokenRange>& ranges, size_t begin, size_t count) {
    if (!ranges.empty() && ranges.back().end == int32_t(begin)) ranges.back().end += int32_t(count);
    else ranges.push_back({int32_t(begin), int32_t(begin + count)});
}

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
            if (ranges) append_range(*ranges, local, p.chunk);
        }
        local += p.chunk;
    }
    to.row_begin.push_back(int32_t(to.size()));
}

// The chunks, of all owners, that this rank has or sees; for ulysses all chunks.
inline void append_gathered(RingPlan& plan, const Placement& p, const int32_t* doc) {
    const size_t chunks = p.rank.size();
    for (size_t j = 0; j < chunks; j++) {
        const int owner = p.rank[j];
        if (plan.backend != RingBackend::ulysses && owner != plan.rank && !p.wanted[plan.rank * chunks + j]) continue;
        append_range(plan.places[owner], plan.gathered.size(), p.chunk);
        for (size_t i = j * p.chunk; i < (j + 1) * p.chunk; i++)
            plan.gathered.index.push_back(int32_t(i)), plan.gathered.doc.push_back(doc[i]);
    }
    plan.gathered.row_begin.push_back(int32_t(plan.gathered.size()));
}

// Both ways in the order of the places, on every rank: so the far end of the first message that is not through has
// nothing before it, also where a send waits for its receive (NCCL).
inline std::vector<RingMove> ring_moves(const std::vector<TokenRange>& send, const std::vector<TokenRange>& receive) {
    std::vector<RingMove> moves;
    for (size_t i = 0, j = 0; i < send.size() || j < receive.size();) {
        const int32_t out = i < send.size() ? send[i].begin : INT32_MAX;
        const int32_t in = j < receive.size() ? receive[j].begin : INT32_MAX;
        RingMove move{size_t(std::min(out, in)), 0, 0};
        if (out <= in) move.send = size_t(send[i].end - out), i++;
        if (in <= out) move.receive = size_t(receive[j].end - in), j++;
        moves.push_back(move);
    }
    return moves;
}

// Where the buffers have what each step moves: one behind the other when all of it fits on all ranks, else by parity.
inline void ring_places(RingPlan& plan, const std::vector<size_t>& moved /*(size, size) owner, reader*/) {
    const size_t n = plan.size, T = plan.local.size(), most = plan.held * T;
    auto received = [&](size_t reader, size_t steps) { // in the first steps
        size_t sum = 0;
        for (size_t s = 1; s <= steps; s++) sum += moved[(reader + n - s) % n * n + reader];
        return sum;
    };
    auto sent = [&](size_t owner, size_t steps) {
        size_t sum = 0;
        for (size_t s = 1; s <= steps; s++) sum += moved[owner * n + (owner + s) % n];
        return sum;
    };
    plan.early = true;
    for (size_t r = 0; r < n; r++) plan.early &= received(r, n - 1) <= most && sent(r, n - 1) <= most;
    for (size_t i = 0; i < plan.steps.size(); i++) {
        RingStep& step = plan.steps[i];
        step.received_at = plan.early ? received(plan.rank, i) : i % 2 * T;
        step.far_at = plan.early ? received(step.to, i) : i % 2 * T;
        step.sent_at = plan.early ? sent(plan.rank, i) : 0;
        std::vector<TokenRange> out, in;
        if (!step.received.index.empty()) append_range(out, step.received_at, step.received.size());
        if (step.send_tokens) append_range(in, step.far_at, step.send_tokens);
        step.back = ring_moves(out, in);
    }
}

// S as ring_padded_length gives it, the padding being documents of their own (in full mode more of document 0).
// `anchor`: document 0 exists (modes full and anchor). The same doc[] must be passed on all ranks.
inline void ring_plan_build(RingPlan& plan, const int32_t* doc /*(B, S)*/, bool anchor, size_t B, size_t S, int rank,
                            int size, const AttentionTiles& tiles = attention_tiles_cpu,
                            const RingExchange& exchange = {}) {
    REQUIRE(B > 0 && S > 0 && rank >= 0 && rank < size, "pass at least one token, and a rank of the ring");
    REQUIRE(B * S / size <= size_t(INT32_MAX), "use more ranks or shorter rows");
    const bool ring = size == 1 || exchange.backend == RingBackend::automatic || exchange.backend == RingBackend::ring;
    const RingBackend backend = ring ? RingBackend::ring : exchange.backend;
    REQUIRE(ring || B * S <= size_t(INT32_MAX), "rows this long take the backend ring");
    plan = RingPlan{};
    plan.rank = rank, plan.size = size, plan.anchor = anchor, plan.backend = backend,
    plan.held = ring_steps_held(exchange, size);
    plan.local.row_begin = plan.gathered.row_begin = {0}, plan.places.resize(size);
    for (int s = 1; s < size; s++) {
        RingStep& step = plan.steps.emplace_back();
        step.to = (rank + s) % size, step.from = (rank - s + size) % size, step.received.row_begin = {0};
    }
    std::vector<int64_t> load(size);
    std::vector<size_t> moved(size_t(size) * size);
    std::vector<std::vector<TokenRange>> far(size); // own ranges of step.from that this rank sees
    for (size_t b = 0; b < B; b++) {
        const int32_t* row = doc + b * S;
        const bool has_zero = std::find(row, row + S, 0) != row + S;
        REQUIRE(has_zero == anchor && (row[0] == 0) == anchor, "document 0 begins each row, or there is no anchor");
        const Placement p = ring_placement(row, S, size);
        append_chunks(plan.local, nullptr, p, row, b, rank, -1);
        for (RingStep& step : plan.steps) {
            Tokens sent{{}, {}, {0}};
            append_chunks(sent, &step.send, p, row, b, rank, step.to);
            append_chunks(step.received, &far[step.from], p, row, b, step.from, rank);
            step.send_tokens += sent.size();
        }
        if (!ring) append_gathered(plan, p, row);
        for (int r = 0; r < size; r++) load[r] += p.load[r];
        for (size_t j = 0; j < p.rank.size(); j++)
            for (int r = 0; r < size; r++)
                if (p.rank[j] != r && p.wanted[r * p.rank.size() + j]) moved[p.rank[j] * size + r] += p.chunk;
    }
    for (RingStep& step : plan.steps) step.keys = ring_moves(step.send, far[step.from]);
    ring_places(plan, moved);
    attention_map_build(plan.own, backend == RingBackend::ulysses ? plan.gathered : plan.local,
                        ring ? plan.local : plan.gathered, tiles);
    for (RingStep& step : plan.steps)
        if (ring) attention_map_build(step.map, plan.local, step.received, tiles);
    plan.pairs = load[rank];
    const double mean = double(std::accumulate(load.begin(), load.end(), int64_t(0))) / size;
    plan.imbalance = double(*std::max_element(load.begin(), load.end())) / mean;
    const double all = double(std::accumulate(moved.begin(), moved.end(), size_t(0)));
    plan.moved = size == 1 ? 0 : all / double(B * S * (size - 1));
    if (backend == RingBackend::ulysses)
        plan.imbalance = 1, plan.moved = 1.0 / size; // queries and outputs move besides
}

// Bytes of device memory that a plan takes at most, with tiles of at least 32 tokens; the CPU reads the plan itself.
// Turns are for tiles of 128 keys, which may have four times as many ranges in the mean; of the masks that were looked
// at, documents in pieces of 100 tokens come nearest, with a quarter of that.
template <class Dev> size_t ring_plan_bytes(Dev, size_t T, size_t ring, size_t B) {
    const size_t map = (T / 32 + B) * (sizeof(MapTile) + tile_ranges_most * sizeof(VisitedRange));
    const size_t step = 2 * map + 2 * T * (sizeof(TokenLabel) + sizeof(TokenInterval)) + 1024;
    return std::is_same_v<Dev, Gpu> ? ring * step : 0;
}
inline void ring_plan_upload(Cpu, RingPlan&, void*, size_t) {}

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
    DeviceMap put(const TileMap& map) {
        return device_map(map, [this](const auto& from) { return put(from); });
    }
};

// Brings the plan to the GPU: `bytes` of its memory, as ring_plan_bytes says.
inline void ring_plan_upload(Gpu gpu, RingPlan& plan, void* memory, size_t bytes) {
    RingUpload upload{gpu, (uint8_t*)memory, bytes};
    const bool ring = plan.backend == RingBackend::ring;
    const Tokens& queries = plan.backend == RingBackend::ulysses ? plan.gathered : plan.local;
    const TokenLabel* q_label = upload.put(token_labels(queries, false));
    auto put = [&](AttentionMap& map, const Tokens& keys) {
        map.q_label = q_label, map.k_label = upload.put(token_labels(keys, true));
        map.device_forward = upload.put(map.forward), map.device_backward = upload.put(map.backward);
    };
    put(plan.own, ring ? plan.local : plan.gathered);
    for (RingStep& step : plan.steps)
        if (ring) put(step.map, step.received);
}
#endif
