// Attention over packed documents and their anchor: mask, tile map, CPU reference. Kernels: layers/attention_*.cuh.
//
// A token has a global index in its row and a document; token 0 of document 0 is the anchor.
//
//   visible(q, k) = index[k] <= index[q]  and  (doc[k] == doc[q]  or  doc[k] == 0)
//   S = Q K^T / sqrt(D) where visible, else -inf     (queries, keys), per head; a KV head serves H / K heads
//   LSE = log sum_k exp(S)    P = exp(S - LSE)       O = P V
//   delta = sum_d dO * O      dP = dO V^T            dS = P * (dP - delta)
//   dV = P^T dO               dQ = dS K / sqrt(D)    dK = dS^T Q / sqrt(D)
//
// Online softmax: with the running state m (largest score), l (sum of exp(S - m)) and O (not yet divided by l), a
// tile of keys updates m' = max(m, max S), l' = l exp(m - m') + sum exp(S - m'), O' = O exp(m - m') + exp(S - m') V.
// Between calls the state is kept as (O / l, LSE), which is the same with m = LSE and l = 1: keys can come in any
// number of portions, from anywhere.
//
// The anchor is one more key that every query of the row sees. With its key k0, its value v0 and
// s0 = q . k0 / sqrt(D) it is the state's start, m = s0, l = 1, O = v0, so column 0 is left out of the tiles, and
// nobody needs the anchor's chunk for it. Its share of the backward needs no tile either:
//
//   P0 = exp(s0 - LSE)    dS0 = P0 (dO . v0 - delta)
//   dQ starts at dS0 k0 / sqrt(D)    dk0 = sum dS0 q / sqrt(D)    dv0 = sum P0 dO    over queries and heads of a group
//
// A row of queries that sees nothing has LSE = -inf and O = 0; this needs a row without an anchor.
#pragma once
#include "core/fastexp.h"
#include "core/types.h"
#include "core/vector.h"
#include <algorithm>
#include <limits>
#include <numeric>
#include <omp.h>
#include <utility>
#include <vector>

// The local tokens of B rows, back to back, of each row in ascending order of index.
struct Tokens {
    std::vector<int32_t> index;     // (T) global index in the row
    std::vector<int32_t> doc;       // (T) document, from 0, small numbers
    std::vector<int32_t> row_begin; // (B + 1) row b is [row_begin[b], row_begin[b + 1])

    size_t size() const { return index.size(); }
    size_t rows() const { return row_begin.size() - 1; }
};

HOST_DEVICE inline bool visible(int32_t q_index, int32_t q_doc, int32_t k_index, int32_t k_doc) {
    return k_index <= q_index && (k_doc == q_doc || k_doc == 0);
}
HOST_DEVICE inline bool is_anchor(int32_t index, int32_t doc) { return index == 0 && doc == 0; }

// Visible pairs of a whole row, by chunks of its queries, the anchor's column included: what the attention costs.
inline std::vector<int64_t> visible_pairs(const int32_t* doc /*(S)*/, size_t S, size_t chunk) {
    std::vector<int64_t> pairs((S + chunk - 1) / chunk), count(S == 0 ? 1 : *std::max_element(doc, doc + S) + 1);
    for (size_t i = 0; i < S; i++) {
        count[doc[i]]++;
        pairs[i / chunk] += count[doc[i]] + (doc[i] == 0 ? 0 : count[0]);
    }
    return pairs;
}
inline int64_t visible_pairs(const int32_t* doc /*(S)*/, size_t S) { return S == 0 ? 0 : visible_pairs(doc, S, S)[0]; }

// What a tile of queries has to visit; in a map by keys, the queries that a tile of keys has to visit. All numbers
// count local tokens, of the query set or of the key set.
struct VisitedRange {
    int32_t begin, end;
    bool masked;      // some of its pairs are not visible: test each
    int32_t turn = 0; // in a map with turns: how many tiles before this one visit the same
};
struct MapTile {
    int32_t row, begin, end;         // queries, or keys
    int32_t first_range, last_range; // ranges [first_range, last_range)
};
// The keys that a query sees, or the queries that see a key.
struct TokenInterval {
    int32_t begin, end;
};
struct TileMap {
    std::vector<MapTile> tiles; // most work first
    std::vector<VisitedRange> ranges;
    std::vector<TokenInterval> seen; // of every query (by keys: key), where it is one interval for all; else empty
    int64_t pairs = 0;               // visible pairs, the anchor's column excluded
    int32_t tile = 0;                // tokens of a tile, but for a row's last one
    int32_t turns = 0;               // counters of turns, see tile_map_take_turns; 0: none
};

// A tile's documents, each with its smallest and largest index, decide exactly whether it sees another tile.
struct TileSpan {
    int32_t doc, first, last;
};
struct TileSummary {
    int32_t begin, end;        // local tokens
    int32_t first, last;       // smallest and largest index
    bool anchor;               // the anchor lies in it
    std::vector<TileSpan> doc; // ascending
};

// The anchor's own span is left out of keys (it is not a key of the map) but kept in queries (it is a query).
inline TileSummary tile_summary(const Tokens& t, int32_t begin, int32_t end, bool keys) {
    TileSummary s{begin, end, t.index[begin], t.index[end - 1], is_anchor(t.index[begin], t.doc[begin]), {}};
    for (int32_t i = begin + (keys && s.anchor); i < end; i++) {
        if (s.doc.empty() || s.doc.back().doc != t.doc[i]) s.doc.push_back({t.doc[i], t.index[i], t.index[i]});
        s.doc.back().last = t.index[i];
    }
    std::stable_sort(s.doc.begin(), s.doc.end(), [](const TileSpan& a, const TileSpan& b) { return a.doc < b.doc; });
    size_t n = 0; // spans of the same document follow each other in ascending order of index
    for (const TileSpan& span : s.doc)
        if (n > 0 && s.doc[n - 1].doc == span.doc) s.doc[n - 1].last = span.last;
        else s.doc[n++] = span;
    s.doc.resize(n);
    return s;
}

inline bool any_visible(const TileSummary& q, const TileSummary& k) {
    auto own = q.doc.begin();
    for (const TileSpan& span : k.doc) {
        if (span.doc == 0 && span.first <= q.last) return true;
        while (own != q.doc.end() && own->doc < span.doc) own++;
        if (own != q.doc.end() && own->doc == span.doc && span.first <= own->last) return true;
    }
    return false;
}

inline bool all_visible(const TileSummary& q, const TileSummary& k) {
    if (k.anchor || k.last > q.first) return false;
    for (const TileSpan& span : k.doc)
        if (span.doc != 0 && (q.doc.size() > 1 || q.doc[0].doc != span.doc)) return false;
    return true;
}

inline std::vector<TileSummary> tile_summaries(const Tokens& t, size_t row, int tile, bool keys) {
    std::vector<TileSummary> all;
    const int32_t end = t.row_begin[row + 1];
    for (int32_t begin = t.row_begin[row]; begin < end; begin += tile)
        all.push_back(tile_summary(t, begin, std::min(begin + tile, end), keys));
    return all;
}

// Visible pairs between two token sets, without the anchor's column: a merge by index that counts keys by document.
inline int64_t pairs_between(const Tokens& q, const Tokens& k, size_t row) {
    int32_t documents = 1;
    for (int32_t i = k.row_begin[row]; i < k.row_begin[row + 1]; i++) documents = std::max(documents, k.doc[i] + 1);
    std::vector<int64_t> count(documents);
    int64_t pairs = 0;
    int32_t j = k.row_begin[row];
    for (int32_t i = q.row_begin[row]; i < q.row_begin[row + 1]; i++) {
        for (; j < k.row_begin[row + 1] && k.index[j] <= q.index[i]; j++)
            if (!is_anchor(k.index[j], k.doc[j])) count[k.doc[j]]++;
        pairs += count[0] + (q.doc[i] > 0 && q.doc[i] < documents ? count[q.doc[i]] : 0);
    }
    return pairs;
}

inline bool tokens_in_order(const Tokens& t) {
    for (size_t b = 0; b < t.rows(); b++)
        for (int32_t i = t.row_begin[b]; i < t.row_begin[b + 1]; i++)
            if (t.doc[i] < 0 || t.index[i] < 0 || (i > t.row_begin[b] && t.index[i] <= t.index[i - 1])) return false;
    return t.row_begin.back() == int32_t(t.size()) && t.doc.size() == t.size();
}

// Where each document of a row stands; false if it stands in pieces.
inline bool document_runs(std::vector<TokenInterval>& runs, const Tokens& t, size_t row) {
    std::fill(runs.begin(), runs.end(), TokenInterval{0, 0});
    for (int32_t i = t.row_begin[row]; i < t.row_begin[row + 1]; i++) {
        if (is_anchor(t.index[i], t.doc[i])) continue;
        if (size_t(t.doc[i]) >= runs.size()) runs.resize(t.doc[i] + 1, {0, 0});
        TokenInterval& run = runs[t.doc[i]];
        if (run.begin == run.end) run.begin = i;
        else if (run.end != i) return false;
        run.end = i + 1;
    }
    return true;
}

constexpr int32_t hidden_doc = -2; // of the anchor among keys: the column that no tile computes

// The keys that each query sees, or with by_keys the queries that see each key (of the anchor: hidden_doc twice), as
// intervals. Empty if some are no interval: documents in pieces, or an anchor of several tokens before other documents.
inline std::vector<TokenInterval> seen_intervals(const Tokens& q, const Tokens& k, bool by_keys) {
    const Tokens &own = by_keys ? k : q, &other = by_keys ? q : k;
    std::vector<TokenInterval> seen(own.size()), runs(1);
    for (size_t row = 0; row < own.rows(); row++) {
        if (!document_runs(runs, other, row)) return {};
        const int32_t end = other.row_begin[row + 1];
        for (int32_t i = own.row_begin[row], j = other.row_begin[row]; i < own.row_begin[row + 1]; i++) {
            const int32_t index = own.index[i], doc = own.doc[i];
            while (j < end && other.index[j] < index + !by_keys) j++;
            TokenInterval run = size_t(doc) < runs.size() ? runs[doc] : TokenInterval{0, 0};
            if (by_keys) {
                if (doc == 0) run = {j, end};
                run.begin = std::max(run.begin, j);
                seen[i] = run.begin < run.end ? run : TokenInterval{0, 0};
                if (is_anchor(index, doc)) seen[i] = {hidden_doc, hidden_doc};
                continue;
            }
            TokenInterval shared = runs[0];
            run.end = std::min(run.end, j), shared.end = std::min(shared.end, j);
            const bool sees = run.begin < run.end, sees_shared = doc != 0 && shared.begin < shared.end;
            if (sees && sees_shared && shared.end != run.begin) return {};
            seen[i] = {sees_shared ? shared.begin : run.begin, sees ? run.end : shared.end};
            if (!sees && !sees_shared) seen[i] = {0, 0};
        }
    }
    return seen;
}

// A tile keeps at most this many ranges, which bounds the memory of a map; turns can cut them into more. The last one
// then reaches to the end of all that is left, and is masked.
constexpr size_t tile_ranges_most = 64;

struct TileMapOptions {
    bool by_keys = false; // tiles of keys that visit queries, for the backward
    bool all = false;     // also the tiles that meet nobody, with no range
};

// Every visible pair but those of the anchor's column lies in exactly one range of its tile. What a tile visits is cut
// into tiles of the other kind; one is left out when none of its pairs is visible (up to tile_ranges_most), and is
// unmasked when all are, for any doc[]. Rows never mix.
inline void tile_map_build(TileMap& map, const Tokens& q, const Tokens& k, int tile_q, int tile_k,
                           TileMapOptions options = {}) {
    REQUIRE(tile_q > 0 && tile_k > 0 && q.rows() == k.rows(), "pass the same rows of queries and keys");
    REQUIRE(tokens_in_order(q) && tokens_in_order(k), "order each row's tokens by index, documents from 0");
    map.tiles.clear(), map.ranges.clear(), map.pairs = 0, map.tile = options.by_keys ? tile_k : tile_q, map.turns = 0;
    map.seen = seen_intervals(q, k, options.by_keys);
    std::vector<int64_t> work;
    for (size_t row = 0; row < q.rows(); row++) {
        map.pairs += pairs_between(q, k, row);
        const std::vector<TileSummary> queries = tile_summaries(q, row, tile_q, false);
        const std::vector<TileSummary> keys = tile_summaries(k, row, tile_k, true);
        for (const TileSummary& t : options.by_keys ? keys : queries) {
            const size_t first = map.ranges.size();
            int64_t visits = 0;
            for (const TileSummary& s : options.by_keys ? queries : keys) {
                const TileSummary &query = options.by_keys ? s : t, &key = options.by_keys ? t : s;
                if (key.first > query.last || !any_visible(query, key)) continue;
                const bool masked = !all_visible(query, key), full = map.ranges.size() - first == tile_ranges_most;
                VisitedRange* last = map.ranges.size() > first ? &map.ranges.back() : nullptr;
                visits += s.end - (full ? last->end : s.begin);
                if (full) last->end = s.end, last->masked = true;
                else if (last && last->end == s.begin && last->masked == masked) last->end = s.end;
                else map.ranges.push_back({s.begin, s.end, masked});
            }
            if (visits == 0 && !options.all) continue;
            map.tiles.push_back({int32_t(row), t.begin, t.end, int32_t(first), int32_t(map.ranges.size())});
            work.push_back(visits * (t.end - t.begin));
        }
    }
    std::vector<size_t> order(work.size());
    std::iota(order.begin(), order.end(), size_t(0));
    std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) { return work[a] > work[b]; });
    std::vector<MapTile> tiles;
    for (size_t i : order) tiles.push_back(map.tiles[i]);
    map.tiles = std::move(tiles);
}

// The counter of the visited tile, of a row, that begins there: each has its own.
HOST_DEVICE constexpr int32_t turn_counter(int32_t begin, int32_t row, int32_t tile) { return begin / tile + row; }

// Gives a map by keys turns: all that tiles of keys add to a tile of queries, `tile` of them, is added in the order in
// which the map lists them. A tile waits only for those before it in the list, so all get through if they are begun in
// its order, whatever the order of a tile's own steps. That one is such that they wait little: a tile visits its ranges
// in the order of the map, the queries of each from the last to the first, so that tiles of a document begin together
// with its last queries and follow each other at the distance of a step. A tile in which a document ends and another
// begins visits its own queries first: for the former document these are the last ones.
inline void tile_map_take_turns(TileMap& map, const Tokens& q, const Tokens& k, int tile) {
    std::vector<int32_t> visits(1);
    std::vector<VisitedRange> ranges, own;
    for (MapTile& t : map.tiles) {
        const size_t first = ranges.size();
        const bool several = k.doc[t.begin] != k.doc[t.end - 1];
        own.clear();
        for (int32_t r = t.last_range; r-- > t.first_range;) {
            const VisitedRange& range = map.ranges[r];
            const int32_t steps = (range.end - range.begin + tile - 1) / tile;
            for (int32_t step = steps; step-- > 0;) {
                const int32_t begin = range.begin + step * tile, end = std::min(begin + tile, range.end);
                const size_t counter = turn_counter(begin, t.row, tile);
                if (counter >= visits.size()) visits.resize(counter + 1);
                const int32_t turn = visits[counter]++;
                std::vector<VisitedRange>& to = several && q.index[begin] <= k.index[t.end - 1] ? own : ranges;
                VisitedRange* after = to.size() > (&to == &own ? 0 : first) ? &to.back() : nullptr;
                const bool joins = after && after->begin == end && after->masked == range.masked && after->turn == turn;
                if (joins) after->begin = begin;
                else to.push_back({begin, end, range.masked, turn});
            }
        }
        ranges.insert(ranges.begin() + first, own.begin(), own.end());
        t.first_range = int32_t(first), t.last_range = int32_t(ranges.size());
    }
    map.ranges = std::move(ranges), map.turns = int32_t(visits.size());
}

// Tile sizes that a device's kernels want; backward_k = 0: there is no map by keys. Where a tile visits pairs_from
// tokens or more in the mean, tiles of queries and, in the map by keys, of keys are twice as long, for a pair of blocks
// that shares what it visits; 0: never. `turns`: the map by keys has turns, and no pairs.
struct AttentionTiles {
    int forward_q, forward_k, backward_q, backward_k;
    int pairs_from = 0;
    bool turns = false;
};

// The queries and keys of one portion, as a device wants them. A map is built on the host; a GPU gets a copy of it.
struct TokenLabel {
    int32_t index, doc;
};
struct DeviceMap {
    const MapTile* tiles = nullptr;
    const VisitedRange* ranges = nullptr;
    int32_t count = 0;                   // of tiles
    int32_t tile = 0;                    // as in TileMap
    const TokenInterval* seen = nullptr; // likewise; null: by labels
    int32_t turns = 0;                   // likewise
};
// `put` brings an array to the GPU and says where it is.
template <class Put> DeviceMap device_map(const TileMap& map, Put put) {
    return {put(map.tiles),
            put(map.ranges),
            int32_t(map.tiles.size()),
            map.tile,
            map.seen.empty() ? nullptr : put(map.seen),
            map.turns};
}
struct AttentionMap {
    TileMap forward, backward;           // tiles of queries, tiles of keys
    const TokenLabel* q_label = nullptr; // in the memory of a GPU, as all that follows: (T)
    const TokenLabel* k_label = nullptr; // (Tk)
    DeviceMap device_forward, device_backward;
};

// Index and document of every token; among keys the anchor is hidden.
inline std::vector<TokenLabel> token_labels(const Tokens& t, bool keys) {
    std::vector<TokenLabel> labels(t.size());
    for (size_t i = 0; i < t.size(); i++)
        labels[i] = {t.index[i], keys && is_anchor(t.index[i], t.doc[i]) ? hidden_doc : t.doc[i]};
    return labels;
}

inline void attention_map_build(AttentionMap& map, const Tokens& q, const Tokens& k, const AttentionTiles& tiles) {
    const bool gpu = tiles.backward_k > 0; // its kernels also write the tiles that meet nobody
    auto build = [&](TileMap& to, int tile_q, int tile_k, bool by_keys) {
        tile_map_build(to, q, k, tile_q, tile_k, {by_keys, gpu});
        if (by_keys && tiles.turns) return tile_map_take_turns(to, q, k, tile_q);
        int64_t visits = 0;
        for (const VisitedRange& r : to.ranges) visits += r.end - r.begin;
        if (tiles.pairs_from == 0 || visits < tiles.pairs_from * int64_t(to.tiles.size())) return;
        tile_map_build(to, q, k, by_keys ? tile_q : 2 * tile_q, by_keys ? 2 * tile_k : tile_k, {by_keys, gpu});
    };
    build(map.forward, tiles.forward_q, tiles.forward_k, false);
    if (gpu) build(map.backward, tiles.backward_q, tiles.backward_k, true);
}

// Which portion of the keys a call brings: the first starts from the anchor (or from nothing), the last one leaves the
// output behind instead of the state.
struct Portion {
    bool first = true, last = true;
};

// The CPU reference works on S^T: keys are rows and the 64 queries of a tile are the columns, so that m, l, alpha, LSE
// and delta are plain vectors along the queries, a softmax needs no sum across lanes, and K and V enter every product
// as scalars, from their own layout. Short tiles of queries are padded with zeros, tiles of keys are not.
constexpr int attention_tile = 64;
constexpr AttentionTiles attention_tiles_cpu = {attention_tile, attention_tile, 0, 0};
template <class E> AttentionTiles attention_tiles(Cpu, size_t) { return attention_tiles_cpu; }
template <class A> constexpr A minus_infinity = -std::numeric_limits<A>::infinity();

// One block of registers of tile_product, R rows by N vectors: unrolled, or at -O2 the sums stay in memory (3x slower).
template <class A, int R, int N, bool add> inline void product_block(A* c, size_t c_row, size_t columns, const A* a,
                                                                     size_t a_row, size_t a_column, const A* b,
                                                                     size_t b_row, size_t depth) {
    using Vector = typename NativeVector<A>::loose;
    constexpr size_t W = vector_lanes<A>;
    constexpr std::make_integer_sequence<int, R * N> all;
    Vector sum[R * N] = {};
    for (size_t d = 0; d < depth; d++, a += a_column, b += b_row)
        unroll(
            [&](int i) __attribute__((always_inline)) { sum[i] += a[i / N * a_row] * *(const Vector*)(b + i % N * W); },
            all);
    unroll(
        [&](int i) __attribute__((always_inline)) {
            const size_t column = i % N * W;
            A* to = c + i / N * c_row + column;
            if (columns >= column + W) *(Vector*)to = add ? *(Vector*)to + sum[i] : sum[i];
            else
                for (size_t j = 0; column + j < columns; j++) to[j] = (add ? to[j] : A(0)) + sum[i][j];
        },
        all);
}

// c (m, n) = a (m, depth) b (depth, n), or += with `add`. Element (i, d) of a is a[i a_row + d a_column], so that
// transposes need no copy. The rows of b can be read up to the next whole vector, c's are written to n exactly.
template <bool add, class A> inline void tile_product(A* c, size_t c_row, size_t m, size_t n, const A* a, size_t a_row,
                                                      size_t a_column, const A* b, size_t b_row, size_t depth) {
    constexpr size_t W = vector_lanes<A>;
    auto strip = [&]<int R, int N>(size_t column) {
        size_t i = 0;
        for (; i + R <= m; i += R)
            product_block<A, R, N, add>(c + i * c_row + column, c_row, n - column, a + i * a_row, a_row, a_column,
                                        b + column, b_row, depth);
        for (; i < m; i++)
            product_block<A, 1, N, add>(c + i * c_row + column, c_row, n - column, a + i * a_row, a_row, a_column,
                                        b + column, b_row, depth);
    };
    constexpr bool wide = vector_registers == 32;
    for (size_t column = 0; column < n;) {
        if (wide && n - column > 3 * W) strip.template operator()<4, 4>(column), column += 4 * W;
        else if (n - column > W) strip.template operator()<wide ? 8 : 4, 2>(column), column += 2 * W;
        else strip.template operator()<8, 1>(column), column += W;
    }
}

// E as a product's operand would hold it: bf16(x) without its branch for NaN, so that loops of it become vector code.
template <class E> inline Acc<E> rounded_operand(Acc<E> x) {
    if constexpr (std::is_same_v<E, bf16>) {
        uint32_t u = std::bit_cast<uint32_t>(x);
        return std::bit_cast<float>((u + 0x7fffu + ((u >> 16) & 1u)) & 0xffff0000u);
    } else {
        return x;
    }
}

// Keys and values as (K, Tk, D) each, in Acc: a tile of one head is then contiguous.
template <class A> struct KeysByHead { VectorScratch<A> key, value; };
template <class E>
inline KeysByHead<Acc<E>> keys_by_head(const E* kv, size_t kv_stride, size_t Tk, size_t K, size_t D) {
    KeysByHead<Acc<E>> to{VectorScratch<Acc<E>>(K * Tk * D), VectorScratch<Acc<E>>(K * Tk * D)};
#pragma omp parallel for schedule(static)
    for (size_t t = 0; t < Tk; t++)
        for (size_t head = 0; head < K; head++)
            for (size_t d = 0; d < D; d++) {
                to.key.data()[(head * Tk + t) * D + d] = Acc<E>(kv[t * kv_stride + head * D + d]);
                to.value.data()[(head * Tk + t) * D + d] = Acc<E>(kv[t * kv_stride + (K + head) * D + d]);
            }
    return to;
}

// to (D, 64) = scale * x^T for the n <= 64 rows of x, zero beyond.
template <class X>
inline void load_transposed(Acc<X>* to, const X* x, size_t stride, size_t n, size_t D, Acc<X> scale) {
    if (n < attention_tile) std::fill_n(to, D * attention_tile, Acc<X>(0));
    for (size_t i = 0; i < n; i++)
        for (size_t d = 0; d < D; d++) to[d * attention_tile + i] = scale * Acc<X>(x[i * stride + d]);
}

// to (n, row) = scale * x, each row padded with zeros: they are read, and chance denormals would be slow.
template <class X>
inline void load_rows(Acc<X>* to, size_t row, const X* x, size_t stride, size_t n, size_t D, Acc<X> scale) {
    for (size_t i = 0; i < n; i++) {
        for (size_t d = 0; d < D; d++) to[i * row + d] = scale * Acc<X>(x[i * stride + d]);
        std::fill_n(to + i * row + D, row - D, Acc<X>(0));
    }
}

// One task: a tile of queries, one head. q, dout, ... point at its first query's head, key and value at its KV head.
template <class A> struct TileTask {
    const TileMap& map;
    const MapTile& tile;
    const Tokens &qt, &kt;
    const A *key, *value; // (Tk, D)
    size_t H, D;
    size_t queries() const { return size_t(tile.end - tile.begin); }
};
template <class A> inline TileTask<A> tile_task(const TileMap& map, size_t tile, const Tokens& qt, const Tokens& kt,
                                                KeysByHead<A>& keys, size_t head, size_t H, size_t D) {
    const size_t at = head * kt.size() * D;
    return {map, map.tiles[tile], qt, kt, keys.key.data() + at, keys.value.data() + at, H, D};
}

// f(first key, number of keys <= 64, masked) for all that the tile visits.
template <class A, class F> inline void for_each_key_tile(const TileTask<A>& task, F f) {
    for (int32_t r = task.tile.first_range; r < task.tile.last_range; r++) {
        const VisitedRange& range = task.map.ranges[r];
        for (int32_t begin = range.begin; begin < range.end; begin += attention_tile)
            f(size_t(begin), size_t(std::min(attention_tile, range.end - begin)), range.masked);
    }
}

// Index and document of a tile's queries; the columns of the padding see nothing.
struct QueryLabels {
    int32_t index[attention_tile], doc[attention_tile];
    template <class A> explicit QueryLabels(const TileTask<A>& task) {
        std::fill_n(index, attention_tile, -1), std::fill_n(doc, attention_tile, -1);
        std::copy_n(task.qt.index.data() + task.tile.begin, task.queries(), index);
        std::copy_n(task.qt.doc.data() + task.tile.begin, task.queries(), doc);
    }
};

// s (n keys, 64 queries) = -inf where the query does not see the key, and in the anchor's column.
template <class A> inline void mask_scores(A* s, const QueryLabels& q, const Tokens& kt, size_t begin, size_t n) {
    for (size_t k = 0; k < n; k++) {
        const int32_t index = kt.index[begin + k], doc = kt.doc[begin + k];
        const bool key = !is_anchor(index, doc);
        A* row = s + k * attention_tile;
#pragma omp simd
        for (int i = 0; i < attention_tile; i++)
            row[i] = key & visible(q.index[i], q.doc[i], index, doc) ? row[i] : minus_infinity<A>;
    }
}

// One step of the online softmax: s (n, 64) becomes exp(s - m), rounded to E as an operand of P V; m and l go on, and
// alpha = exp(old m - m) is the factor for O. A column that has seen nothing keeps m = -inf and gets zeros.
template <class E> inline void softmax_step(Acc<E>* s, Acc<E>* m, Acc<E>* l, Acc<E>* alpha, size_t n) {
    using A = Acc<E>;
    A old[attention_tile], from[attention_tile];
    std::copy_n(m, attention_tile, old);
    for (size_t k = 0; k < n; k++)
#pragma omp simd
        for (int i = 0; i < attention_tile; i++) m[i] = std::max(m[i], s[k * attention_tile + i]);
#pragma omp simd
    for (int i = 0; i < attention_tile; i++) {
        from[i] = m[i] == minus_infinity<A> ? A(0) : m[i];
        alpha[i] = fast_exp(old[i] - from[i]);
        l[i] *= alpha[i];
    }
    for (size_t k = 0; k < n; k++)
#pragma omp simd
        for (int i = 0; i < attention_tile; i++) {
            const A p = fast_exp(s[k * attention_tile + i] - from[i]);
            l[i] += p;
            s[k * attention_tile + i] = rounded_operand<E>(p);
        }
}

// A row of D elements in whole vectors, as the rows of tile_product's b must be.
template <class A> constexpr size_t padded_row(size_t D) {
    return (D + vector_lanes<A> - 1) / vector_lanes<A> * vector_lanes<A>;
}

template <class A> inline A attention_scale(size_t D) { return A(1 / std::sqrt(double(D))); }

inline void attention_require(const TileMap& map, size_t H, size_t K, size_t D) {
    REQUIRE(K > 0 && H > 0 && H % K == 0 && D > 0, "the heads must be a multiple of the KV heads");
    for (const MapTile& tile : map.tiles)
        REQUIRE(tile.end - tile.begin <= attention_tile, "build the map with tiles of at most 64 queries");
}

// The state before any key: the anchor's score and value, or nothing.
template <class E> void attention_begin(Cpu, Acc<E>* o /*(T, H, D)*/, Acc<E>* lse /*(H, T)*/,
                                        const E* q /*(T, H, D), q_stride apart*/, size_t q_stride,
                                        const E* anchor /*(B, 2, K, D): k0, v0; or null*/, const Tokens& qt, size_t H,
                                        size_t K, size_t D) {
    using A = Acc<E>;
    attention_require({}, H, K, D);
    const A scale = attention_scale<A>(D);
    for (size_t b = 0; b < qt.rows(); b++) {
        const E* k0 = anchor ? anchor + b * 2 * K * D : nullptr;
#pragma omp parallel for schedule(static)
        for (size_t t = qt.row_begin[b]; t < size_t(qt.row_begin[b + 1]); t++)
            for (size_t h = 0; h < H; h++) {
                A* to = o + (t * H + h) * D;
                lse[h * qt.size() + t] = minus_infinity<A>;
                std::fill_n(to, D, A(0));
                if (!anchor) continue;
                const E *query = q + t * q_stride + h * D, *key = k0 + h / (H / K) * D, *value = key + K * D;
                A score = 0;
                for (size_t d = 0; d < D; d++) score += A(query[d]) * A(key[d]), to[d] = A(value[d]);
                lse[h * qt.size() + t] = scale * score;
            }
    }
}

// From the tile's state to its state.
template <class E> inline void forward_tile(const TileTask<Acc<E>>& task, Acc<E>* o, Acc<E>* lse, const E* q,
                                            size_t q_stride, VectorScratch<Acc<E>>& scratch) {
    using A = Acc<E>;
    constexpr size_t N = attention_tile;
    const size_t n = task.queries(), H = task.H, D = task.D;
    A *s = scratch.data(), *m = s + N * N, *l = m + N, *alpha = l + N, *qT = alpha + N, *oT = qT + N * D;
    const QueryLabels labels(task);
    load_transposed(qT, q, q_stride, n, D, attention_scale<A>(D));
    load_transposed(oT, o, H * D, n, D, A(1));
    std::fill_n(m, N, A(0));
    std::copy_n(lse, n, m);
    for (size_t i = 0; i < N; i++) l[i] = m[i] == minus_infinity<A> ? A(0) : A(1);

    for_each_key_tile(task, [&](size_t begin, size_t keys, bool masked) {
        tile_product<false>(s, N, keys, N, task.key + begin * D, D, 1, qT, N, D); // S^T = K Q^T
        if (masked) mask_scores(s, labels, task.kt, begin, keys);
        softmax_step<E>(s, m, l, alpha, keys);
        for (size_t d = 0; d < D; d++)
#pragma omp simd
            for (size_t i = 0; i < N; i++) oT[d * N + i] *= alpha[i];
        tile_product<true>(oT, N, D, N, task.value + begin * D, 1, D, s, N, keys); // O^T += V^T P^T
    });

    for (size_t i = 0; i < n; i++) {
        if (l[i] == 0) continue; // has seen nothing: LSE = -inf and O = 0 as they came
        lse[i] = m[i] + std::log(l[i]);
        for (size_t d = 0; d < D; d++) o[i * H * D + d] = oT[d * N + i] / l[i];
    }
}

// Goes on from the state (o, lse) with the keys of kt: token t's K heads of key, then K heads of value, stand at
// kv + t kv_stride. Every (tile, head) is computed alone, so the bits do not depend on the threads.
template <class E> void attention_continue(Cpu, Acc<E>* o /*(T, H, D)*/, Acc<E>* lse /*(H, T)*/, const E* q,
                                           size_t q_stride, const E* kv, size_t kv_stride, const TileMap& map,
                                           const Tokens& qt, const Tokens& kt, size_t H, size_t K, size_t D) {
    attention_require(map, H, K, D);
    if (map.tiles.empty()) return;
    const size_t tiles = map.tiles.size();
    KeysByHead<Acc<E>> keys = keys_by_head(kv, kv_stride, kt.size(), K, D);
#pragma omp parallel
    {
        VectorScratch<Acc<E>> scratch(attention_tile * (attention_tile + 3 + 2 * D));
#pragma omp for schedule(dynamic, 1)
        for (size_t i = 0; i < H * tiles; i++) {
            const size_t h = i / tiles, t = map.tiles[i % tiles].begin, at = t * H + h;
            forward_tile(tile_task(map, i % tiles, qt, kt, keys, h / (H / K), H, D), o + at * D,
                         lse + h * qt.size() + t, q + t * q_stride + h * D, q_stride, scratch);
        }
    }
}

// The one rounding of the output to its storage.
template <class E> void attention_end(Cpu, E* out /*(count)*/, const Acc<E>* o, size_t count) {
#pragma omp parallel for schedule(static)
    for (size_t i = 0; i < count; i++) out[i] = E(o[i]);
}

// One portion of the keys for all queries: what a ring step does, and with one rank all there is.
template <class E> void attention_forward(Cpu cpu, E* out /*(T, H, D)*/, Acc<E>* lse /*(H, T)*/,
                                          Acc<E>* state /*(T, H, D)*/, const E* q, size_t q_stride, const E* kv,
                                          size_t kv_stride, const E* anchor /*(B, 2, K, D) or null*/,
                                          const AttentionMap& map, Portion portion, const Tokens& qt, const Tokens& kt,
                                          size_t H, size_t K, size_t D) {
    if (portion.first) attention_begin(cpu, state, lse, q, q_stride, anchor, qt, H, K, D);
    attention_continue(cpu, state, lse, q, q_stride, kv, kv_stride, map.forward, qt, kt, H, K, D);
    if (portion.last) attention_end(cpu, out, state, qt.size() * H * D);
}

// One query of one head: delta, the start of dq, and what the anchor receives. Without an anchor k0 is null.
template <class E> inline void backward_begin_query(Acc<E>* delta, Acc<E>* dq, Acc<E>* dk0, const E* dout, const E* out,
                                                    Acc<E> lse, const E* q, const E* k0, size_t key_to_value,
                                                    size_t D) {
    using A = Acc<E>;
    A sum = 0, score = 0, dp0 = 0;
    for (size_t d = 0; d < D; d++) sum += A(dout[d]) * A(out[d]);
    *delta = sum;
    std::fill_n(dq, D, A(0));
    if (!k0) return;
    const E* v0 = k0 + key_to_value;
    A* dv0 = dk0 + key_to_value;
    for (size_t d = 0; d < D; d++) score += A(q[d]) * A(k0[d]), dp0 += A(dout[d]) * A(v0[d]);
    const A scale = attention_scale<A>(D), p0 = std::exp(scale * score - lse), ds0 = scale * p0 * (dp0 - sum);
    for (size_t d = 0; d < D; d++) {
        dq[d] = ds0 * A(k0[d]);
        dk0[d] += ds0 * A(q[d]);
        dv0[d] += p0 * A(dout[d]);
    }
}

// delta, the anchor's share of dQ (or 0) as its start, and dk0, dv0 added to danchor. Tokens are taken in blocks whose
// sums are then added in order, so that the bits do not depend on the threads.
template <class E> void attention_backward_begin(Cpu, Acc<E>* delta /*(H, T)*/, Acc<E>* dq /*(T, H, D)*/,
                                                 Acc<E>* danchor /*(B, 2, K, D), added to; or null*/,
                                                 const E* dout /*(T, H, D)*/, const E* out /*(T, H, D)*/,
                                                 const Acc<E>* lse /*(H, T)*/, const E* q, size_t q_stride,
                                                 const E* anchor /*(B, 2, K, D) or null*/, const Tokens& qt, size_t H,
                                                 size_t K, size_t D) {
    using A = Acc<E>;
    attention_require({}, H, K, D);
    REQUIRE(!anchor == !danchor, "pass the anchor's gradient with the anchor");
    constexpr size_t block = 256;
    const size_t G = H / K, width = 2 * K * D;
    for (size_t b = 0; b < qt.rows(); b++) {
        const size_t first = qt.row_begin[b], n = qt.row_begin[b + 1] - first, blocks = (n + block - 1) / block;
        std::vector<A> partial(anchor ? blocks * width : 0);
#pragma omp parallel for collapse(2) schedule(static)
        for (size_t part = 0; part < blocks; part++)
            for (size_t head = 0; head < K; head++) {
                const E* k0 = anchor ? anchor + b * width + head * D : nullptr;
                A* dk0 = anchor ? partial.data() + part * width + head * D : nullptr;
                for (size_t t = first + part * block; t < first + std::min(n, (part + 1) * block); t++)
                    for (size_t h = head * G, at = t * H + h; h < (head + 1) * G; h++, at++) {
                        const size_t row = h * qt.size() + t;
                        backward_begin_query(delta + row, dq + at * D, dk0, dout + at * D, out + at * D, lse[row],
                                             q + t * q_stride + h * D, k0, K * D, D);
                    }
            }
        for (size_t part = 0; anchor && part < blocks; part++)
            for (size_t i = 0; i < width; i++) danchor[b * width + i] += partial[part * width + i];
    }
}

// What the task adds to its rows of dq, and to dkv (Tk, 2, K, D) of its KV head.
template <class E> inline void backward_tile(const TileTask<Acc<E>>& task, Acc<E>* dq, Acc<E>* dkey, Acc<E>* dvalue,
                                             size_t dkv_row, const E* dout, const E* q, size_t q_stride,
                                             const Acc<E>* lse, const Acc<E>* delta, VectorScratch<Acc<E>>& scratch) {
    using A = Acc<E>;
    constexpr size_t N = attention_tile;
    const size_t n = task.queries(), H = task.H, D = task.D, row = padded_row<A>(D);
    A *p = scratch.data(), *ds = p + N * N, *qT = ds + N * N, *doutT = qT + N * D, *dqT = doutT + N * D;
    A *q_rows = dqT + N * D, *dout_rows = q_rows + N * row;
    const A scale = attention_scale<A>(D);
    const QueryLabels labels(task);
    load_transposed(qT, q, q_stride, n, D, scale);
    load_transposed(doutT, dout, H * D, n, D, A(1));
    load_rows(q_rows, row, q, q_stride, n, D, scale);
    load_rows(dout_rows, row, dout, H * D, n, D, A(1));
    std::fill_n(dqT, N * D, A(0));

    // With LSE = +inf, the columns of the padding and queries that see nothing get P = 0.
    A tile_lse[N], tile_delta[N];
    std::fill_n(tile_lse, N, -minus_infinity<A>);
    std::fill_n(tile_delta, N, A(0));
    for (size_t i = 0; i < n; i++) {
        if (lse[i] != minus_infinity<A>) tile_lse[i] = lse[i];
        tile_delta[i] = delta[i];
    }

    for_each_key_tile(task, [&](size_t begin, size_t keys, bool masked) {
        const A *key = task.key + begin * D, *value = task.value + begin * D;
        A *dk = dkey + begin * dkv_row, *dv = dvalue + begin * dkv_row;
        tile_product<false>(p, N, keys, N, key, D, 1, qT, N, D);       // S^T = K Q^T
        tile_product<false>(ds, N, keys, N, value, D, 1, doutT, N, D); // dP^T = V dO^T
        if (masked) mask_scores(p, labels, task.kt, begin, keys);
        for (size_t k = 0; k < keys; k++)
#pragma omp simd
            for (size_t i = 0; i < N; i++) {
                const A probability = fast_exp(p[k * N + i] - tile_lse[i]);
                p[k * N + i] = rounded_operand<E>(probability);
                ds[k * N + i] = rounded_operand<E>(probability * (ds[k * N + i] - tile_delta[i]));
            }
        tile_product<true>(dv, dkv_row, keys, D, p, N, 1, dout_rows, row, n); // dV += P^T dO
        tile_product<true>(dk, dkv_row, keys, D, ds, N, 1, q_rows, row, n);   // dK += dS^T Q
        tile_product<true>(dqT, N, D, N, key, 1, D, ds, N, keys);             // dQ^T += K^T dS^T
    });

    for (size_t i = 0; i < n; i++)
        for (size_t d = 0; d < D; d++) dq[i * H * D + d] += scale * dqT[d * N + i];
}

// Tasks of a KV head in the backward. Each but the first takes a copy of dK and dV: the fewest with which the threads
// have work for 85% of the time or more.
inline size_t attention_parts(size_t K, size_t threads = size_t(omp_get_max_threads())) {
    size_t parts = 1;
    while (100 * K * parts < 85 * threads * ((K * parts + threads - 1) / threads)) parts++;
    return parts;
}

// Adds what the queries of qt and the keys of kt give each other. Each KV head's tiles are dealt to `parts` tasks of
// nearly equal work; a task owns its dq rows, and a copy of dkv unless it is the first. The copies are added in order,
// so the bits depend on the number of threads (through `parts`), but not on their timing.
template <class E> void attention_backward_continue(Cpu, Acc<E>* dq /*(T, H, D)*/, Acc<E>* dkv /*(Tk, 2, K, D)*/,
                                                    const E* dout /*(T, H, D)*/, const E* q, size_t q_stride,
                                                    const E* kv, size_t kv_stride, const Acc<E>* lse,
                                                    const Acc<E>* delta, const TileMap& map, const Tokens& qt,
                                                    const Tokens& kt, size_t H, size_t K, size_t D) {
    using A = Acc<E>;
    attention_require(map, H, K, D);
    if (map.tiles.empty()) return;
    const size_t Tk = kt.size(), tiles = map.tiles.size(), G = H / K, width = 2 * K * D;
    const size_t parts = std::min(attention_parts(K), tiles);
    KeysByHead<A> keys = keys_by_head(kv, kv_stride, Tk, K, D);
    std::vector<A> copies((parts - 1) * Tk * width);
#pragma omp parallel
    {
        VectorScratch<A> scratch(attention_tile * (2 * attention_tile + 3 * D + 2 * padded_row<A>(D)));
#pragma omp for schedule(dynamic, 1)
        for (size_t i = 0; i < K * parts; i++) {
            const size_t head = i / parts, part = i % parts;
            A* dkey = (part == 0 ? dkv : copies.data() + (part - 1) * Tk * width) + head * D;
            for (size_t j = part; j < tiles; j += parts)
                for (size_t h = head * G; h < (head + 1) * G; h++) {
                    const size_t t = map.tiles[j].begin, at = t * H + h;
                    backward_tile(tile_task(map, j, qt, kt, keys, head, H, D), dq + at * D, dkey, dkey + K * D, width,
                                  dout + at * D, q + t * q_stride + h * D, q_stride, lse + h * qt.size() + t,
                                  delta + h * qt.size() + t, scratch);
                }
        }
#pragma omp for schedule(static)
        for (size_t i = 0; i < Tk * width; i++)
            for (size_t part = 1; part < parts; part++) dkv[i] += copies[(part - 1) * Tk * width + i];
    }
}

// The rows of kt's anchors += danchor.
template <class A> void attention_add_anchor(Cpu, A* dkv /*(Tk, width)*/, const A* danchor /*(B, width)*/,
                                             const Tokens& kt, size_t width) {
    for (size_t b = 0; b < kt.rows(); b++) {
        const size_t t = kt.row_begin[b];
        if (t == size_t(kt.row_begin[b + 1]) || !is_anchor(kt.index[t], kt.doc[t])) continue;
        for (size_t i = 0; i < width; i++) dkv[t * width + i] += danchor[b * width + i];
    }
}

// The one rounding of gradients to their storage: rows of `width`, `stride` apart.
template <class E> void attention_store(Cpu, E* to, size_t stride, const Acc<E>* from, size_t T, size_t width) {
#pragma omp parallel for schedule(static)
    for (size_t t = 0; t < T; t++)
        for (size_t i = 0; i < width; i++) to[t * stride + i] = E(from[t * width + i]);
}

// The same for dQ, whose columns a GPU's kernel may have in an order of its own.
template <class E>
void attention_store_dq(Cpu cpu, E* to, size_t stride, const Acc<E>* dq, size_t T, size_t H, size_t D) {
    attention_store(cpu, to, stride, dq, T, H * D);
}

// What the queries of qt and the keys of kt give each other: added to dq and to dkv. With dkv_out these are all the
// queries there are, so that dkv (which must hold zeros) and danchor's share are stored there at once.
template <class E> void attention_backward(Cpu cpu, Acc<E>* dq /*(T, H, D)*/, Acc<E>* dkv /*(Tk, 2, K, D)*/,
                                           E* dkv_out /*(Tk, 2, K, D), or null*/, size_t dkv_out_stride,
                                           const Acc<E>* danchor /*(B, 2, K, D) or null*/, const E* dout /*(T, H, D)*/,
                                           const E* q, size_t q_stride, const E* kv, size_t kv_stride,
                                           const Acc<E>* lse, const Acc<E>* delta, const AttentionMap& map,
                                           const Tokens& qt, const Tokens& kt, size_t H, size_t K, size_t D) {
    attention_backward_continue(cpu, dq, dkv, dout, q, q_stride, kv, kv_stride, lse, delta, map.forward, qt, kt, H, K,
                                D);
    if (!dkv_out) return;
    if (danchor) attention_add_anchor(cpu, dkv, danchor, kt, 2 * K * D);
    attention_store(cpu, dkv_out, dkv_out_stride, dkv, kt.size(), 2 * K * D);
}

#ifdef __CUDACC__
// One portion of the keys for all queries. A first portion starts from the anchor (or from nothing), a later one from
// the state; the last one writes `out`, an earlier one the state. lse is always written. Every query lies in one tile
// of the map, also when it sees none of these keys.
template <class E> struct AttentionForward {
    const E* q;      // (T, H, D), tokens q_stride apart
    const E* kv;     // (Tk, 2, K, D), tokens kv_stride apart
    const E* anchor; // (B, 2, K, D): k0, v0 of every row; or null
    size_t q_stride, kv_stride;
    const TokenLabel *q_label, *k_label; // (T), (Tk)
    DeviceMap map;                       // tiles of queries, ranges of keys
    bool first, last;
    E* out;       // (T, H, D)
    float* lse;   // (H, T)
    float* state; // (T, H, D): O so far, divided by the sum so far
    int T, Tk, H, K, D;
};

// The gradients that queries and keys give each other. dq is added to. With dkv_out these are all the queries there
// are: the sum is rounded and stored there, danchor's share (if not null) added to the anchor's own row. Without it the
// sum is added to dkv. Every key lies in one tile of the map.
template <class E> struct AttentionBackward {
    const E* q;
    const E* kv;
    size_t q_stride, kv_stride;
    const E* dout;                       // (T, H, D)
    const float *lse, *delta;            // (H, T)
    const TokenLabel *q_label, *k_label; // (T), (Tk)
    DeviceMap map;                       // tiles of keys, ranges of queries
    float* dq;                           // (T, H, D), columns in the order of attention_dq_order
    float* dkv;                          // (Tk, 2, K, D)
    E* dkv_out;                          // (Tk, 2, K, D), tokens dkv_out_stride apart
    size_t dkv_out_stride;
    const float* danchor; // (B, 2, K, D)
    int T, Tk, H, K, D;
};

// How a head's columns of dQ lie in memory while it is summed. Split: of every eight the even ones, then the odd ones,
// which the Hopper kernel can bring out of its registers as they stand there, and not yet divided by sqrt(D). dq_place:
// where split has a column.
enum class DqOrder { plain, split };
HOST_DEVICE constexpr size_t dq_place(size_t column) { return column / 8 * 8 + column % 2 * 4 + column % 8 / 2; }

#include "layers/attention_hopper.cuh"
#include "layers/attention_mma.cuh"

// Which kernels a type and a head size get on this GPU; maps must be built for these tiles.
inline bool attention_is_hopper(Gpu gpu, size_t D) {
    return gpu.context->compute == 90 && !gpu.context->portable_attention && attention_hopper_takes(D);
}
template <class E> DqOrder attention_dq_order(Gpu gpu, size_t D) {
    return std::is_same_v<E, bf16> && attention_is_hopper(gpu, D) ? DqOrder::split : DqOrder::plain;
}
template <class E> AttentionTiles attention_tiles(Gpu gpu, size_t D) {
    if (!std::is_same_v<E, bf16> || !attention_mma_takes(D)) return attention_simt_tiles();
    if (!attention_is_hopper(gpu, D)) return attention_mma_tiles(D);
    AttentionTiles tiles = attention_hopper_tiles(D);
    tiles.turns = gpu.context->deterministic;
    return tiles;
}
template <class E> void attention_forward_launch(Gpu gpu, const AttentionForward<E>& a) {
    if constexpr (std::is_same_v<E, bf16>) {
        if (attention_is_hopper(gpu, a.D)) return attention_hopper_forward(gpu, a);
        if (attention_mma_takes(a.D)) return attention_mma_forward(gpu, a);
    }
    attention_simt_forward(gpu, a);
}
template <class E> void attention_backward_launch(Gpu gpu, const AttentionBackward<E>& a) {
    if constexpr (std::is_same_v<E, bf16>) {
        if (attention_dq_order<E>(gpu, a.D) == DqOrder::split) return attention_hopper_backward(gpu, a);
        if (attention_mma_takes(a.D)) return attention_mma_backward(gpu, a);
    }
    attention_simt_backward(gpu, a);
}

template <class E> void attention_forward(Gpu gpu, E* out, float* lse, float* state, const E* q, size_t q_stride,
                                          const E* kv, size_t kv_stride, const E* anchor, const AttentionMap& map,
                                          Portion portion, const Tokens& qt, const Tokens& kt, size_t H, size_t K,
                                          size_t D) {
    attention_forward_launch<E>(gpu, {q, kv, anchor, q_stride, kv_stride, map.q_label, map.k_label, map.device_forward,
                                      portion.first, portion.last, out, lse, state, int(qt.size()), int(kt.size()),
                                      int(H), int(K), int(D)});
}

template <class E> void attention_backward_begin(Gpu gpu, float* delta, float* dq, float* danchor, const E* dout,
                                                 const E* out, const float* lse, const E* q, size_t q_stride,
                                                 const E* anchor, const Tokens& qt, size_t H, size_t K, size_t D) {
    attention_backward_begin(gpu, delta, dq, danchor, dout, out, lse, q, q_stride, anchor, qt.row_begin.data(),
                             qt.rows(), qt.size(), H, K, D, attention_dq_order<E>(gpu, D));
}

template <class E> void attention_backward(Gpu gpu, float* dq, float* dkv, E* dkv_out, size_t dkv_out_stride,
                                           const float* danchor, const E* dout, const E* q, size_t q_stride,
                                           const E* kv, size_t kv_stride, const float* lse, const float* delta,
                                           const AttentionMap& map, const Tokens& qt, const Tokens& kt, size_t H,
                                           size_t K, size_t D) {
    attention_backward_launch<E>(gpu, {q,
                                       kv,
                                       q_stride,
                                       kv_stride,
                                       dout,
                                       lse,
                                       delta,
                                       map.q_label,
                                       map.k_label,
                                       map.device_backward,
                                       dq,
                                       dkv,
                                       dkv_out,
                                       dkv_out_stride,
                                       danchor,
                                       int(qt.size()),
                                       int(kt.size()),
                                       int(H),
                                       int(K),
                                       int(D)});
}

template <class E> void attention_store(Gpu gpu, E* to, size_t stride, const float* from, size_t T, size_t width) {
    attention_backward_end(gpu, to, stride, from, T, 1, width);
}
template <class E>
void attention_store_dq(Gpu gpu, E* to, size_t stride, const float* dq, size_t T, size_t H, size_t D) {
    attention_backward_end(gpu, to, stride, dq, T, H, D, attention_dq_order<E>(gpu, D));
}
#endif
