// attention_anchor.cuh: the tile map against brute force, forward and backward against the definition.
#include "attention_rows.h"

static size_t row_of(const Tokens& t, size_t i) {
    size_t row = 0;
    while (size_t(t.row_begin[row + 1]) <= i) row++;
    return row;
}
static bool sees(const Tokens& q, size_t i, const Tokens& k, size_t j) {
    return row_of(q, i) == row_of(k, j) && visible(q.index[i], q.doc[i], k.index[j], k.doc[j]);
}

static void check_map(const Tokens& q, const Tokens& k, int tile_q, int tile_k) {
    TileMap map;
    tile_map_build(map, q, k, tile_q, tile_k);
    auto pair_seen = [&](size_t i, size_t j) { return sees(q, i, k, j) && !is_anchor(k.index[j], k.doc[j]); };
    std::vector<int> covered(q.size() * k.size());
    int64_t pairs = 0, last_work = std::numeric_limits<int64_t>::max();
    bool right = true;
    for (const MapTile& tile : map.tiles) {
        right &= (tile.begin - q.row_begin[tile.row]) % tile_q == 0 && tile.last_range > tile.first_range;
        right &= tile.end == std::min(tile.begin + tile_q, q.row_begin[tile.row + 1]);
        int64_t work = 0;
        for (int r = tile.first_range; r < tile.last_range; r++) {
            const VisitedRange& range = map.ranges[r];
            right &= (range.begin - k.row_begin[tile.row]) % tile_k == 0;
            if (r > tile.first_range) // ascending, and joined where they could be
                right &= range.begin > map.ranges[r - 1].end ||
                         (range.begin == map.ranges[r - 1].end && range.masked != map.ranges[r - 1].masked);
            for (int begin = range.begin; begin < range.end; begin += tile_k) {
                const int end = std::min(begin + tile_k, range.end);
                int64_t seen = 0, all = int64_t(tile.end - tile.begin) * (end - begin);
                for (int i = tile.begin; i < tile.end; i++)
                    for (int j = begin; j < end; j++) seen += pair_seen(i, j), covered[i * k.size() + j]++;
                right &= seen > 0 && range.masked == (seen < all); // no visible pair: not visited; all: not masked
                work += all;
            }
        }
        right &= work <= last_work;
        last_work = work;
    }
    for (size_t i = 0; i < q.size(); i++)
        for (size_t j = 0; j < k.size(); j++) {
            right &= covered[i * k.size() + j] <= 1 && (covered[i * k.size() + j] == 1 || !pair_seen(i, j));
            pairs += pair_seen(i, j);
        }
    CHECK(right);
    CHECK(map.pairs == pairs);
}

TEST_CASE("attention: the backward's parts keep the threads at work, and are few") {
    const int threads = omp_get_max_threads();
    for (int n : {1, 2, 3, 7, 16, 64})
        for (size_t K : {1, 2, 4, 6, 8, 32}) {
            omp_set_num_threads(n);
            const size_t parts = attention_parts(K), rounds = (K * parts + n - 1) / n;
            CHECK(100 * K * parts >= 85 * n * rounds);
            CHECK(parts <= n / std::gcd(K, size_t(n)));
        }
    omp_set_num_threads(threads);
}

TEST_CASE("the tile map is exact for any documents, tile sizes and sets of queries and keys") {
    for (Mode mode : modes)
        for (size_t S : {1, 17, 65, 200})
            for (int tile : {1, 7, 16, 64}) {
                const uint64_t seed = 10 * S + size_t(mode);
                const Tokens t = make_tokens(mode, 2, S, seed);
                check_map(t, t, tile, tile);
                check_map(t, t, tile, tile == 16 ? 5 : 16);
                auto some = [&](uint64_t salt) {
                    return subset(t, [&, salt](size_t i) { return hash64(seed + salt, i / 9) % 3 == 0; });
                };
                check_map(some(1), some(2), tile, 16);
            }
}

// Under the full mask of 1000 tokens a tile of 64 visits 542 in the mean.
TEST_CASE("tiles are twice as long for pairs of blocks where they visit enough") {
    const Tokens whole = make_tokens(Mode::full, 1, 1000, 1), documents = make_tokens(Mode::anchor, 1, 1000, 1);
    auto tile = [](const Tokens& t, int pairs_from) {
        AttentionMap map;
        attention_map_build(map, t, t, {64, 64, 32, 64, pairs_from});
        CHECK(map.backward.tile == map.forward.tile);
        for (const TileMap* m : {&map.forward, &map.backward})
            for (const MapTile& q : m->tiles) CHECK((q.begin % m->tile == 0 && q.end - q.begin <= m->tile));
        return map.forward.tile;
    };
    CHECK(tile(whole, 500) == 128);
    CHECK(tile(whole, 600) == 64);
    CHECK(tile(whole, 0) == 64);
    CHECK(tile(documents, 500) == 64);
}

// True if there are intervals; those must be exact.
static bool check_seen(const Tokens& q, const Tokens& k, bool by_keys) {
    const std::vector<TokenInterval> seen = seen_intervals(q, k, by_keys);
    bool right = true;
    for (size_t i = 0; i < q.size() && !seen.empty(); i++)
        for (size_t j = 0; j < k.size(); j++) {
            const bool hidden = is_anchor(k.index[j], k.doc[j]);
            const TokenInterval& x = seen[by_keys ? j : i];
            const int32_t other = int32_t(by_keys ? i : j);
            right &= (sees(q, i, k, j) && !hidden) == (x.begin <= other && other < x.end);
            right &= !by_keys || (x.end == hidden_doc) == hidden;
        }
    CHECK(right);
    return !seen.empty();
}

TEST_CASE("what tokens see stands as intervals where documents stand in one piece, for any sets of queries and keys") {
    for (Mode mode : modes)
        for (size_t S : {1, 17, 65, 200})
            for (bool by_keys : {false, true}) {
                const uint64_t seed = 10 * S + size_t(mode);
                const Tokens t = make_tokens(mode, 2, S, seed);
                const bool whole = mode == Mode::full || mode == Mode::intra || mode == Mode::anchor;
                CHECK((check_seen(t, t, by_keys) || !whole));
                auto some = [&](uint64_t salt) {
                    return subset(t, [&, salt](size_t i) { return hash64(seed + salt, i / 9) % 3 == 0; });
                };
                check_seen(some(1), some(2), by_keys);
            }
}

TEST_CASE("visible pairs of a row are counted exactly") {
    for (Mode mode : modes)
        for (size_t S : {1, 2, 100}) {
            const Tokens t = make_tokens(mode, 1, S, 3 * S);
            int64_t pairs = 0, anchors = 0;
            for (size_t i = 0; i < S; i++)
                for (size_t j = 0; j < S; j++) pairs += sees(t, i, t, j), anchors += sees(t, i, t, j) && j == 0;
            CHECK(visible_pairs(t.doc.data(), S) == pairs);
            TileMap map;
            tile_map_build(map, t, t, 16, 16);
            CHECK(map.pairs == pairs - (has_anchor(mode) ? anchors : 0));
        }
    const int32_t none = 0;
    CHECK(visible_pairs(&none, 0) == 0);
}

// Attention by its definition, over all tokens with the anchor as an ordinary key, and for every output the sum of the
// absolute values of its terms (terms_*), to which rounding errors are proportional.
struct Naive {
    std::vector<double> out, lse, dqkv, out_terms, dqkv_terms;
    Naive(const Tokens& t, const Buffer<double>& qkv, const Buffer<double>& dout, Sizes z)
        : out(t.size() * z.H * z.D), lse(t.size() * z.H), dqkv(t.size() * z.qkv()), out_terms(out.size()),
          dqkv_terms(dqkv.size()) {
        for (size_t i = 0; i < t.size(); i++)
            for (size_t h = 0; h < z.H; h++) query(t, qkv.data(), dout.data(), z, i, h);
    }
    void query(const Tokens& t, const double* qkv, const double* dout, Sizes z, size_t i, size_t h) {
        const size_t W = z.qkv(), D = z.D, q = i * W + h * D, k = (z.H + h / (z.H / z.K)) * D, v = k + z.K * D;
        const double scale = 1 / std::sqrt(double(D)), *dO = dout + (i * z.H + h) * D;
        std::vector<double> p(t.size()), dp(t.size());
        double sum = 0, delta = 0, delta_terms = 0;
        for (size_t j = 0; j < t.size(); j++) {
            if (!sees(t, i, t, j)) continue;
            double s = 0;
            for (size_t d = 0; d < D; d++) s += qkv[q + d] * qkv[j * W + k + d], dp[j] += dO[d] * qkv[j * W + v + d];
            p[j] = std::exp(scale * s); // the tests' scores are small
            sum += p[j];
        }
        lse[h * t.size() + i] = std::log(sum);
        for (size_t j = 0; j < t.size(); j++) {
            p[j] /= sum, delta += p[j] * dp[j];
            for (size_t d = 0; d < D; d++) {
                out[(i * z.H + h) * D + d] += p[j] * qkv[j * W + v + d];
                out_terms[(i * z.H + h) * D + d] += p[j] * std::fabs(qkv[j * W + v + d]);
            }
        }
        for (size_t d = 0; d < D; d++) delta_terms += std::fabs(dO[d]) * out_terms[(i * z.H + h) * D + d];
        for (size_t j = 0; j < t.size(); j++) {
            const double ds = scale * p[j] * (dp[j] - delta);
            double dp_terms = delta_terms;
            for (size_t d = 0; d < D; d++) dp_terms += std::fabs(dO[d] * qkv[j * W + v + d]);
            for (size_t d = 0; d < D; d++) {
                dqkv[q + d] += ds * qkv[j * W + k + d], dqkv[j * W + k + d] += ds * qkv[q + d];
                dqkv[j * W + v + d] += p[j] * dO[d];
                dqkv_terms[q + d] += scale * p[j] * dp_terms * std::fabs(qkv[j * W + k + d]);
                dqkv_terms[j * W + k + d] += scale * p[j] * dp_terms * std::fabs(qkv[q + d]);
                dqkv_terms[j * W + v + d] += p[j] * std::fabs(dO[d]);
            }
        }
    }
};

template <class E> struct Result {
    Buffer<E> out;
    Buffer<Acc<E>> lse, dqkv; // gradients before their rounding to storage
};

// Forward and backward with the keys in `portions` calls: portion[i] is the call in which token i is a key.
template <class E> Result<E> attend(const Tokens& t, const Buffer<E>& qkv, const Buffer<E>& dout, Sizes z,
                                    const std::vector<size_t>& portion, size_t portions) {
    using A = Acc<E>;
    const size_t T = t.size(), B = t.rows(), W = z.qkv(), kv_width = 2 * z.K * z.D;
    const auto [H, K, D] = z;
    bool zero = false;
    for (int32_t d : t.doc) zero |= d == 0;
    Buffer<E> anchor(B * kv_width);
    for (size_t b = 0; b < B; b++)
        for (size_t i = 0; i < kv_width; i++) anchor[b * kv_width + i] = qkv[t.row_begin[b] * W + H * D + i];
    const E* anchor_or_null = zero ? anchor.data() : nullptr;

    Buffer<A> o(T * H * D), delta(T * H), dq(T * H * D), danchor(B * kv_width);
    Result<E> r{Buffer<E>(T * H * D), Buffer<A>(T * H), Buffer<A>(T * W)};
    std::vector<Tokens> keys;
    std::vector<TileMap> maps(portions);
    std::vector<std::vector<size_t>> from(portions);
    std::vector<Buffer<E>> kv;
    for (size_t p = 0; p < portions; p++) {
        keys.push_back(subset(
            t, [&](size_t i) { return portion[i] == p; }, &from[p]));
        tile_map_build(maps[p], t, keys[p], 64, 64);
        kv.emplace_back(from[p].size() * kv_width);
        for (size_t j = 0; j < from[p].size(); j++)
            for (size_t i = 0; i < kv_width; i++) kv[p][j * kv_width + i] = qkv[from[p][j] * W + H * D + i];
    }

    attention_begin(Cpu(), o.data(), r.lse.data(), qkv.data(), W, anchor_or_null, t, H, K, D);
    for (size_t p = 0; p < portions; p++)
        attention_continue(Cpu(), o.data(), r.lse.data(), qkv.data(), W, kv[p].data(), kv_width, maps[p], t, keys[p], H,
                           K, D);
    attention_end(Cpu(), r.out.data(), o.data(), o.count);

    danchor.fill(0);
    attention_backward_begin(Cpu(), delta.data(), dq.data(), zero ? danchor.data() : nullptr, dout.data(), r.out.data(),
                             r.lse.data(), qkv.data(), W, anchor_or_null, t, H, K, D);
    for (size_t p = 0; p < portions; p++) {
        Buffer<A> dkv(from[p].size() * kv_width);
        dkv.fill(0);
        attention_backward_continue(Cpu(), dq.data(), dkv.data(), dout.data(), qkv.data(), W, kv[p].data(), kv_width,
                                    r.lse.data(), delta.data(), maps[p], t, keys[p], H, K, D);
        for (size_t j = 0; j < from[p].size(); j++)
            for (size_t i = 0; i < kv_width; i++) r.dqkv[from[p][j] * W + H * D + i] = dkv[j * kv_width + i];
    }
    for (size_t i = 0; i < T; i++)
        for (size_t d = 0; d < H * D; d++) r.dqkv[i * W + d] = dq[i * H * D + d];
    for (size_t b = 0; zero && b < B; b++)
        for (size_t i = 0; i < kv_width; i++) r.dqkv[t.row_begin[b] * W + H * D + i] += danchor[b * kv_width + i];
    return r;
}
template <class E> Result<E> attend(const Tokens& t, const Buffer<E>& qkv, const Buffer<E>& dout, Sizes z) {
    return attend(t, qkv, dout, z, std::vector<size_t>(t.size(), 0), 1);
}

struct Inputs {
    Buffer<double> qkv, dout;
    Inputs(const Tokens& t, Sizes z, uint64_t seed)
        : qkv(t.size() * z.qkv(), seed), dout(t.size() * z.H * z.D, seed + 1) {}
};

// Double rounds at 1.1e-16; sums here have up to 200 terms of size up to 10, which stays below 1e-12.
constexpr double exact = 1e-12;

TEST_CASE("forward and backward equal the definition in double") {
    const Sizes shapes[] = {{2, 2, 2}, {4, 2, 8}, {3, 1, 34}, {2, 2, 64}};
    for (Mode mode : modes)
        for (const Sizes& z : shapes)
            for (size_t S : {1, 17, 63, 64, 65, 200}) {
                const Tokens t = make_tokens(mode, S == 17 ? 3 : 1, S, S + z.D);
                const Inputs in(t, z, 7 * S + z.D);
                const Naive truth(t, in.qkv, in.dout, z);
                const Result<double> r = attend(t, in.qkv, in.dout, z);
                CHECK(largest_error(r.out.data(), truth.out.data(), r.out.count) <= exact);
                CHECK(largest_error(r.lse.data(), truth.lse.data(), r.lse.count) <= exact);
                CHECK(largest_error(r.dqkv.data(), truth.dqkv.data(), r.dqkv.count) <= exact * 10);
            }
}

TEST_CASE("gradients are finite differences, the anchor's included") {
    const Sizes z{4, 2, 4};
    for (Mode mode : modes) {
        const Tokens t = make_tokens(mode, 1, 9, 5);
        Inputs in(t, z, 11);
        const Result<double> r = attend(t, in.qkv, in.dout, z);
        TileMap map;
        tile_map_build(map, t, t, 64, 64);
        const size_t W = z.qkv();
        double *q = in.qkv.data(), *kv = q + z.H * z.D, *anchor = has_anchor(mode) ? kv : nullptr; // token 0's own
        auto loss = [&] {
            Buffer<double> o(in.dout.count), lse(t.size() * z.H);
            attention_begin(Cpu(), o.data(), lse.data(), q, W, anchor, t, z.H, z.K, z.D);
            attention_continue(Cpu(), o.data(), lse.data(), q, W, kv, W, map, t, t, z.H, z.K, z.D);
            double sum = 0;
            for (size_t i = 0; i < o.count; i++) sum += o[i] * in.dout[i];
            return sum;
        };
        double worst = 0;
        for (size_t i = 0; i < in.qkv.count; i++)
            worst = std::max(worst, std::fabs(finite_difference(loss, q, i) - r.dqkv[i]));
        CHECK(worst < 1e-8); // truncation h^2 f'''/6 with h = 1e-5, third derivatives up to some 10
    }
}

// The equivalent form: every document with its own copy of the anchor in front, attention within documents only.
TEST_CASE("an anchor is what a copy of it in every document is") {
    const Sizes z{4, 2, 16};
    for (Mode mode : {Mode::anchor, Mode::interleaved}) {
        const Tokens t = make_tokens(mode, 1, 150, 21);
        const Inputs in(t, z, 22);
        const int32_t documents = *std::max_element(t.doc.begin(), t.doc.end());
        std::vector<size_t> from; // the copies' row: anchor, tokens of document 1, anchor, tokens of document 2, ...
        Tokens copies{{}, {}, {0}};
        for (int32_t d = 1; d <= documents; d++)
            for (size_t i = 0; i < t.size(); i++)
                if (i == 0 || t.doc[i] == d) {
                    copies.index.push_back(int32_t(from.size())), copies.doc.push_back(d);
                    from.push_back(i);
                }
        copies.row_begin.push_back(int32_t(copies.size()));
        Buffer<double> qkv(from.size() * z.qkv()), dout(from.size() * z.H * z.D);
        for (size_t i = 0; i < from.size(); i++) {
            for (size_t d = 0; d < z.qkv(); d++) qkv[i * z.qkv() + d] = in.qkv[from[i] * z.qkv() + d];
            for (size_t d = 0; d < z.H * z.D; d++) // only the first copy carries a label
                dout[i * z.H * z.D + d] = from[i] == 0 && i > 0 ? 0 : in.dout[from[i] * z.H * z.D + d];
        }
        const Result<double> anchored = attend(t, in.qkv, in.dout, z), copied = attend(copies, qkv, dout, z);
        Buffer<double> gradient(t.size() * z.qkv());
        gradient.fill(0);
        double worst = 0;
        for (size_t i = 0; i < from.size(); i++) {
            worst = std::max(worst, largest_error(copied.out.data() + i * z.H * z.D,
                                                  anchored.out.data() + from[i] * z.H * z.D, z.H * z.D));
            for (size_t d = 0; d < z.qkv(); d++) gradient[from[i] * z.qkv() + d] += copied.dqkv[i * z.qkv() + d];
        }
        CHECK(worst <= exact);
        CHECK(largest_error(gradient, anchored.dqkv) <= exact * 10);
    }
}

TEST_CASE("keys in several portions give what they give at once") {
    const Sizes z{4, 2, 8};
    for (Mode mode : modes) {
        const Tokens t = make_tokens(mode, 2, 150, 31);
        const Inputs in(t, z, 32);
        std::vector<size_t> portion(t.size()); // in intra modes some queries see nothing of the first portions
        for (size_t i = 0; i < t.size(); i++) portion[i] = hash64(33, i / 20) % 3;
        const Result<double> once = attend(t, in.qkv, in.dout, z), split = attend(t, in.qkv, in.dout, z, portion, 3);
        CHECK(largest_error(once.out, split.out) <= exact);
        CHECK(largest_error(once.lse, split.lse) <= exact);
        CHECK(largest_error(once.dqkv, split.dqkv) <= exact * 10);
    }
}

TEST_CASE("queries that see nothing give zeros, not NaN") {
    const Sizes z{2, 1, 8};
    Tokens q{{}, {}, {0, 80}}, k = q;
    for (int32_t i = 0; i < 80; i++) q.index.push_back(i + 5), q.doc.push_back(1 + i % 2);
    for (int32_t i = 0; i < 80; i++) k.index.push_back(i), k.doc.push_back(1 + 2 * (i % 2)); // none of document 2
    Buffer<double> x(80 * z.H * z.D, 1), kv(80 * 2 * z.D, 2), dout(80 * z.H * z.D, 3);
    Buffer<double> o(x.count), lse(80 * z.H), dq(x.count), delta(80 * z.H), dkv(kv.count);
    TileMap map;
    tile_map_build(map, q, k, 64, 64);
    attention_begin<double>(Cpu(), o, lse, x, z.H * z.D, nullptr, q, z.H, z.K, z.D);
    attention_continue<double>(Cpu(), o, lse, x, z.H * z.D, kv, 2 * z.D, map, q, k, z.H, z.K, z.D);
    dkv.fill(0);
    attention_backward_begin<double>(Cpu(), delta, dq, nullptr, dout, o, lse, x, z.H * z.D, nullptr, q, z.H, z.K, z.D);
    attention_backward_continue<double>(Cpu(), dq, dkv, dout, x, z.H * z.D, kv, 2 * z.D, lse, delta, map, q, k, z.H,
                                        z.K, z.D);
    for (size_t i = 0; i < 80; i++)
        for (size_t h = 0; h < z.H; h++) {
            const bool blind = q.doc[i] == 2;
            CHECK(std::isinf(lse[h * 80 + i]) == blind);
            for (size_t d = 0; d < z.D; d++) {
                CHECK((o[(i * z.H + h) * z.D + d] == 0) == blind);
                CHECK((dq[(i * z.H + h) * z.D + d] == 0) == blind);
            }
        }
    for (size_t i = 0; i < 80; i++) CHECK((dkv[i * 2 * z.D] != 0) == (k.doc[i] == 1)); // document 3 is seen by nobody
}

TEST_CASE("large scores neither overflow nor lose the softmax") {
    const Sizes z{1, 1, 2}; // scores of +-1e4, whose exponentials have no float
    const Tokens t = make_tokens(Mode::anchor, 1, 70, 41);
    Inputs in(t, z, 42);
    for (size_t i = 0; i < t.size(); i++)
        for (size_t d = 0; d < 4; d++) in.qkv[i * 6 + d] = 120 * std::round(in.qkv[i * 6 + d]);
    const Result<float> r = attend(t, converted<float>(in.qkv), converted<float>(in.dout), z);
    const Result<double> truth = attend(t, in.qkv, in.dout, z);
    // scores are exact to a half ulp of 4e4 in float, 2e-3; ties between keys are exact in both
    CHECK(largest_error(r.out, truth.out) < 1e-2);
    CHECK(std::isfinite(largest_value(r.dqkv)));
}

// Every error is a rounding of a term, so it is at most epsilon times the sum of the terms' absolute values. fp32: a
// score has D products and reaches 10 at most, so P is off by 10 (D + 3) units, and a sum over S keys by S more;
// bf16: P or dS is rounded once more before its product, and the output once when it is stored (2^-8 each).
template <class E> void check_storage(Mode mode, size_t S, Sizes z) {
    const Tokens t = make_tokens(mode, S == 17 ? 3 : 1, S, 51);
    const Inputs in(t, z, 52);
    const Buffer<E> qkv = converted<E>(in.qkv), dout = converted<E>(in.dout);
    const Naive truth(t, converted<double>(qkv), converted<double>(dout), z);
    const Result<E> r = attend(t, qkv, dout, z);
    const double units = 10 * (z.D + 3.0) + double(S);
    const double epsilon = units * std::ldexp(1, -24) + (std::is_same_v<E, bf16> ? std::ldexp(1, -7) : 0);
    double worst_out = 0, worst_gradient = 0;
    for (size_t i = 0; i < r.out.count; i++)
        worst_out = std::max(worst_out, std::fabs(r.out[i] - truth.out[i]) / truth.out_terms[i]);
    for (size_t i = 0; i < r.dqkv.count; i++)
        worst_gradient = std::max(worst_gradient, std::fabs(r.dqkv[i] - truth.dqkv[i]) / truth.dqkv_terms[i]);
    CHECK(worst_out <= epsilon);
    CHECK(worst_gradient <= epsilon);
}

TEST_CASE_TEMPLATE("storage in float and bf16 stays within its rounding", E, float, bf16) {
    for (Mode mode : modes)
        for (size_t S : {17, 65, 200}) check_storage<E>(mode, S, {2, 1, S == 65 ? size_t(34) : size_t(64)});
}

TEST_CASE("P is rounded to bf16 before its product") {
    Tokens t{{0, 1}, {1, 1}, {0, 2}};
    TileMap map;
    tile_map_build(map, t, t, 64, 64);
    // Query 1 sees the scores 0 and 1.5 / sqrt(2); only key 0 has a value, so O = p0 / (p0 + 1).
    const bf16 q[] = {0.0f, 0.0f, 1.0f, 0.0f}, kv[] = {0.0f, 0.0f, 1.0f, 0.0f, 1.5f, 0.0f, 0.0f, 0.0f};
    float o[4], lse[2];
    attention_begin<bf16>(Cpu(), o, lse, q, 2, nullptr, t, 1, 1, 2);
    attention_continue<bf16>(Cpu(), o, lse, q, 2, kv, 4, map, t, t, 1, 1, 2);
    const double p = std::exp(-1.5 / std::sqrt(2.0)), rounded = float(bf16(float(p)));
    CHECK(std::fabs(rounded - p) > 1e-4);              // or the next line could not tell
    CHECK(std::fabs(o[2] - rounded / (p + 1)) < 1e-6); // the sum takes P before its rounding
    bool same = true;
    for (uint32_t i = 0; i < 0x7f80; i++) // every bf16 from 0 to inf, the tie above it, and one value between
        for (uint32_t low : {0u, 0x8000u, uint32_t(hash64(61, i) & 0xffff)}) {
            const float x = std::bit_cast<float>(i << 16 | low);
            same &= rounded_operand<bf16>(x) == float(bf16(x)) && rounded_operand<bf16>(-x) == float(bf16(-x));
        }
    CHECK(same);
}

#ifdef _OPENMP
TEST_CASE("threads: the forward's bits do not depend on them, the backward's not on their timing") {
    const Sizes z{6, 3, 16};
    const Tokens t = make_tokens(Mode::anchor, 1, 700, 71);
    const Inputs in(t, z, 72);
    const Buffer<float> qkv = converted<float>(in.qkv), dout = converted<float>(in.dout);
    const Result<double> truth = attend(t, in.qkv, in.dout, z);
    const int kept = omp_get_max_threads();
    omp_set_num_threads(1);
    const Result<float> alone = attend(t, qkv, dout, z);
    for (int threads : {2, 3, 4, 7}) {
        omp_set_num_threads(threads);
        const Result<float> a = attend(t, qkv, dout, z), b = attend(t, qkv, dout, z);
        CHECK(largest_error(a.out, alone.out) == 0);
        CHECK(largest_error(a.lse, alone.lse) == 0);
        CHECK(largest_error(a.dqkv, b.dqkv) == 0);
        check_2x(a.dqkv, alone.dqkv, truth.dqkv);
    }
    omp_set_num_threads(kept);
}
#endif
