// layers/ring.cuh: placement and plan as pure functions; a ring of N ranks against one rank.
// Run as mpirun -np N: every rank runs every case, and a failure on any of them is a failure.
#define DOCTEST_CONFIG_IMPLEMENT
#include "rank_main.h"
#include "ring_case.h"

static Comm world, alone; // set by main: all ranks, and this rank as a ring of its own

// Enough KV heads for ulysses to deal out.
static Sizes sizes(size_t group, size_t D) {
    const size_t K = world.size;
    return {group * K, K, D};
}

TEST_CASE("ranks give what one rank gives, by every exchange: outputs and all gradients, in double") {
    for (const RingExchange& exchange : exchanges)
        for (Mode mode : modes)
            for (size_t B : {1, 3})
                for (size_t length : {8, 90, 500})
                    for (double mean : {5.0, 60.0}) {
                        CAPTURE(int(exchange.backend));
                        CAPTURE(exchange.held);
                        CAPTURE(int(mode));
                        CAPTURE(length);
                        const Sizes z = length == 90 ? sizes(2, 6) : sizes(1, 4);
                        const Case c(world.size, mode, B, length, mean, z, length + B);
                        const RingPlan plan = c.plan(world, attention_tiles_cpu, exchange);
                        if (mode == Mode::masked && length == 500 && world.size > 2 && world.rank == world.size - 1)
                            CHECK(*std::min_element(plan.local.index.begin(), plan.local.index.end()) >=
                                  int32_t(c.S / 3));
                        const Result<double> ring = attend(world, plan, c.qkv, c.dout, c.S, z);
                        const Result<double> one = attend(alone, c.plan(alone), c.qkv, c.dout, c.S, z);
                        // up to 500 terms of size up to 10, rounded at 1.1e-16
                        CHECK(local_error(plan, ring.out, one.out, c.S, z.H * z.D) <= 1e-12);
                        CHECK(local_error(plan, ring.lse, one.lse, c.S, z.H) <= 1e-12);
                        CHECK(local_error(plan, ring.dqkv, one.dqkv, c.S, z.qkv()) <= 1e-11);
                    }
}

TEST_CASE("the same run gives the same bits") {
    for (const RingExchange& exchange : exchanges)
        for (Mode mode : {Mode::full, Mode::anchor}) {
            const Case c(world.size, mode, 2, 300, 40, sizes(2, 8), 5);
            const RingPlan plan = c.plan(world, attention_tiles_cpu, exchange);
            const Buffer<float> qkv = converted<float>(c.qkv), dout = converted<float>(c.dout);
            const Result<float> a = attend(world, plan, qkv, dout, c.S, c.z);
            const Result<float> b = attend(world, plan, qkv, dout, c.S, c.z);
            CHECK(largest_error(a.out, b.out) == 0);
            CHECK(largest_error(a.lse, b.lse) == 0);
            CHECK(largest_error(a.dqkv, b.dqkv) == 0);
        }
}

// Partial results travel in Acc, so the error of bf16 storage does not grow with the ring. The largest one is held to
// that of one rank, times 1.5 for another order of the sums, well below the 2x rule. It says little about roundings
// that should not be, for the last one is as large; the root of the mean square would grow with each of them.
TEST_CASE_TEMPLATE("the error against double is flat in the number of ranks, by every exchange", E, bf16, float) {
    for (Mode mode : modes) {
        const Case c(world.size, mode, 1, 600, 100, sizes(2, 32), 6);
        const Buffer<E> qkv = converted<E>(c.qkv), dout = converted<E>(c.dout);
        const RingPlan single = c.plan(alone);
        const Result<double> truth = attend(alone, single, converted<double>(qkv), converted<double>(dout), c.S, c.z);
        const Result<E> one = attend(alone, single, qkv, dout, c.S, c.z);
        const double one_squares[2] = {local_squares(single, one.out, truth.out, c.S, c.z.H * c.z.D),
                                       local_squares(single, one.dqkv, truth.dqkv, c.S, c.z.qkv())};
        for (const RingExchange& exchange : exchanges) {
            CAPTURE(int(exchange.backend));
            CAPTURE(exchange.held);
            CAPTURE(int(mode));
            const RingPlan plan = c.plan(world, attention_tiles_cpu, exchange);
            const Result<E> ring = attend(world, plan, qkv, dout, c.S, c.z);
            double error[4] = {local_error(plan, ring.out, truth.out, c.S, c.z.H * c.z.D),
                               local_error(plan, ring.dqkv, truth.dqkv, c.S, c.z.qkv()),
                               local_squares(plan, ring.out, truth.out, c.S, c.z.H * c.z.D),
                               local_squares(plan, ring.dqkv, truth.dqkv, c.S, c.z.qkv())};
            std::vector<double> all(4 * world.size);
            comm_gather(Cpu(), world, all.data(), error, 4);
            error[2] = error[3] = 0;
            for (int r = 0; r < world.size; r++)
                for (int i : {0, 1}) error[i] = std::max(error[i], all[4 * r + i]), error[2 + i] += all[4 * r + 2 + i];
            const double most = std::is_same_v<E, bf16> ? 1.04 : 1.25; // 1.025; with bf16 between steps 1.05 to 1.15
            for (int i : {0, 1}) CHECK(std::sqrt(error[2 + i]) <= most * std::sqrt(one_squares[i]));
            CHECK(error[0] <= 1.5 * largest_error(one.out, truth.out) + 2 * ulp<E>(largest_value(truth.out)));
            CHECK(error[1] <= 1.5 * largest_error(one.dqkv, truth.dqkv) + 2 * ulp<E>(largest_value(truth.dqkv)));
        }
    }
}

static bool same_tokens(const Tokens& a, const Tokens& b) {
    return a.index == b.index && a.doc == b.doc && a.row_begin == b.row_begin;
}

// The local tokens in `ranges` (one may reach into the next row), as the far end must list them.
static Tokens picked(const Tokens& local, const std::vector<TokenRange>& ranges) {
    Tokens t{{}, {}, {0}};
    std::vector<bool> sent(local.size());
    for (const TokenRange& range : ranges) std::fill(sent.begin() + range.begin, sent.begin() + range.end, true);
    for (size_t b = 0; b < local.rows(); b++) {
        for (int32_t i = local.row_begin[b]; i < local.row_begin[b + 1]; i++)
            if (sent[i]) t.index.push_back(local.index[i]), t.doc.push_back(local.doc[i]);
        t.row_begin.push_back(int32_t(t.size()));
    }
    return t;
}

TEST_CASE("plans: all tokens placed, both ends agree, every visible pair once, nothing moved for nothing") {
    const size_t B = 2;
    for (int size : {1, 2, 3, 4, 6, 8})
        for (Mode mode : modes)
            for (size_t length : {16, 1000, 4096}) {
                const size_t S = ring_padded_length(length, size);
                const std::vector<int32_t> doc = make_docs(mode, B, S, 50, length);
                std::vector<RingPlan> plans(size);
                for (int r = 0; r < size; r++) ring_plan_build(plans[r], doc.data(), has_anchor(mode), B, S, r, size);
                std::vector<int> owners(B * S);
                int64_t pairs = 0, visible = 0, moved = 0;
                bool right = true;
                for (const RingPlan& p : plans) {
                    right &= p.imbalance == plans[0].imbalance && p.moved == plans[0].moved;
                    for (size_t b = 0; b < B; b++) {
                        right &= p.local.row_begin[b + 1] == int32_t((b + 1) * S / size);
                        for (int32_t t = p.local.row_begin[b]; t < p.local.row_begin[b + 1]; t++) {
                            owners[b * S + p.local.index[t]]++;
                            right &= p.local.doc[t] == doc[b * S + p.local.index[t]];
                        }
                        right &= p.rank > 0 || p.local.index[p.local.row_begin[b]] == 0; // the anchor's rank is 0
                    }
                    int64_t own_pairs = p.own.forward.pairs + (p.anchor ? int64_t(p.local.size()) : 0);
                    for (const RingStep& step : p.steps) {
                        const RingStep& far = plans[step.to].steps[&step - p.steps.data()];
                        right &= far.from == p.rank && same_tokens(picked(p.local, step.send), far.received);
                        right &= step.send_tokens == far.received.size() && step.send_tokens <= p.local.size();
                        right &= (step.map.forward.pairs == 0) == (step.received.size() == 0);
                        own_pairs += step.map.forward.pairs, moved += int64_t(step.send_tokens);
                    }
                    right &= own_pairs == p.pairs;
                    pairs += p.pairs;
                }
                for (size_t b = 0; b < B; b++) visible += visible_pairs(doc.data() + b * S, S);
                for (int n : owners) right &= n == 1;
                CHECK(right);
                CHECK(pairs == visible);
                if (size > 1) CHECK(std::fabs(plans[0].moved - double(moved) / double(B * S * (size - 1))) < 1e-12);
            }
}

// What one rank sends from where, another one takes from there: keys and, back, their gradients.
static bool moves_agree(const std::vector<RingMove>& a, const std::vector<RingMove>& b) {
    std::vector<std::pair<size_t, size_t>> sent, received;
    for (const RingMove& m : a)
        if (m.send) sent.push_back({m.at, m.send});
    for (const RingMove& m : b)
        if (m.receive) received.push_back({m.at, m.receive});
    return sent == received;
}
static bool moves_ascend(const std::vector<RingMove>& moves) {
    for (size_t i = 1; i < moves.size(); i++)
        if (moves[i].at <= moves[i - 1].at) return false;
    return true;
}

TEST_CASE("plans: both ends know the places, and buffers are large enough and not shared too early") {
    int early = 0, late = 0;
    for (int size : {2, 3, 4, 8})
        for (Mode mode : modes)
            for (const RingExchange& exchange : exchanges) {
                if (exchange.backend == RingBackend::ulysses) continue;
                const size_t B = 2, S = ring_padded_length(2000, size), T = B * S / size;
                const std::vector<int32_t> doc = make_docs(mode, B, S, 100, 7);
                std::vector<RingPlan> plans(size);
                for (int r = 0; r < size; r++)
                    ring_plan_build(plans[r], doc.data(), has_anchor(mode), B, S, r, size, attention_tiles_cpu,
                                    exchange);
                const size_t held = ring_steps_held(exchange, size) * T;
                bool right = true;
                for (const RingPlan& p : plans) {
                    size_t received = 0, sent = 0;
                    right &= p.early == plans[0].early && (p.early || (exchange.held < size_t(size) - 1 && size > 3));
                    for (size_t i = 0; i < p.steps.size(); i++) {
                        const RingStep& step = p.steps[i];
                        const RingStep &to = plans[step.to].steps[i], &from = plans[step.from].steps[i];
                        right &= moves_agree(step.keys, to.keys) && moves_agree(step.back, from.back);
                        right &= moves_ascend(step.keys) && moves_ascend(step.back);
                        right &= step.received_at + step.received.size() <= held && to.received_at == step.far_at;
                        right &= step.sent_at + step.send_tokens <= held;
                        if (p.early) right &= step.received_at == received && step.sent_at == sent;
                        received += step.received.size(), sent += step.send_tokens;
                    }
                    (p.early ? early : late)++;
                    if (exchange.backend == RingBackend::allgather) {
                        right &= p.early && p.gathered.size() == received + T;
                        right &= same_tokens(picked(p.gathered, p.places[p.rank]), p.local);
                        for (const RingStep& step : p.steps)
                            right &= same_tokens(picked(p.gathered, p.places[step.from]), step.received);
                    }
                }
                CHECK(right);
            }
    CHECK((early > 0 && late > 0));
}

TEST_CASE("placement balances packs of 20 documents and more, and the full mask by zigzag") {
    for (int size : {2, 3, 4, 6, 8, 16}) {
        const size_t S = ring_padded_length(65536, size);
        const std::vector<int32_t> zeros(S, 0);
        const Placement zigzag = ring_placement(zeros.data(), S, size);
        CHECK(zigzag.rank.size() == size_t(2 * size));
        for (int r = 0; r < size; r++) CHECK(zigzag.rank[r] == zigzag.rank[2 * size - 1 - r]);
        for (uint64_t seed = 0; seed < 12; seed++)
            for (Mode mode : {Mode::anchor, Mode::intra, Mode::interleaved}) {
                const double means[] = {600, 1500, 2200};
                std::vector<int32_t> doc = make_docs(mode, 1, S, means[seed % 3], seed);
                for (size_t i = 0; seed % 4 == 3 && i < S / 3; i++) doc[S / 2 + i] = doc[S / 2]; // one is very long
                CHECK(*std::max_element(doc.begin(), doc.end()) >= 20);
                const Placement p = ring_placement(doc.data(), S, size);
                CHECK(balanced(p.load, 105));
                CHECK(p.rank[0] == 0);
                for (int r = 0; r < size; r++)
                    CHECK(std::count(p.rank.begin(), p.rank.end(), r) == int64_t(p.rank.size()) / size);
            }
    }
}

// Chunks that go to another rank, by the definition; -1 when the ranks are not balanced.
static int64_t moved_by(const Chunks& c, const std::vector<int32_t>& rank, size_t size) {
    std::vector<int64_t> load(size);
    int64_t moved = 0;
    for (size_t i = 0; i < c.size(); i++) load[rank[i]] += c.work[i];
    for (size_t j = 0; j < c.size(); j++)
        for (int r = 0; r < int(size); r++) {
            bool sees = false;
            for (size_t i = 0; i < c.size(); i++) sees |= rank[i] == r && c.sees[i * c.size() + j];
            moved += sees && rank[j] != r;
        }
    return balanced(load, 105) ? moved : -1;
}

TEST_CASE("of all balanced placements of a few chunks one that moves least is found, or one chunk more") {
    size_t possible = 0, rows = 0, least_of_all = 0, spared = 0;
    for (size_t size : {2, 3})
        for (uint64_t seed = 0; seed < 60; seed++) {
            const size_t n = size == 2 ? 8 : 9, S = n * 128; // 70 and 1680 placements
            const Mode mode = seed % 3 == 0 ? Mode::interleaved : Mode::intra;
            const std::vector<int32_t> doc = make_docs(mode, 1, S, 40 + 10 * double(seed % 20), 900 + seed);
            Tokens row{std::vector<int32_t>(S), doc, {0, int32_t(S)}};
            std::iota(row.index.begin(), row.index.end(), 0);
            const Chunks c = cut_row(row, n);
            std::vector<int32_t> rank(n);
            for (size_t j = 0; j < n; j++) rank[j] = int32_t(j * size / n);
            int64_t least = -1;
            do {
                const int64_t moved = moved_by(c, rank, size);
                if (moved >= 0 && (least < 0 || moved < least)) least = moved;
            } while (std::next_permutation(rank.begin(), rank.end()));
            int64_t found = -1, unspared = -1;
            for (RingStart start : {RingStart::zigzag, RingStart::runs, RingStart::longest_first}) {
                const Placement p = make_placement(c, size, start, 105);
                const int64_t moved = moved_by(c, p.rank, size);
                if (moved >= 0) CHECK(moved * int64_t(c.length) == p.moved);
                if (moved >= 0 && (found < 0 || moved < found)) found = moved;
                std::vector<int32_t> first = ring_start(c, size, start);
                std::vector<int64_t> load(size);
                for (size_t j = 0; j < n; j++) load[first[j]] += c.work[j];
                ring_level(first, load, c, 105);
                const int64_t levelled = moved_by(c, first, size);
                if (levelled >= 0 && (unspared < 0 || levelled < unspared)) unspared = levelled;
            }
            INFO("seed " << seed << ", " << size << " ranks");
            possible += least >= 0;
            if (found < 0) continue; // exchanges of two do not level every row that can be
            rows++;
            CHECK((found >= least && found <= least + 1));
            least_of_all += found == least, spared += found < unspared;
        }
    CHECK((possible >= 90 && 100 * rows >= 97 * possible)); // 98 of 99
    CHECK(10 * least_of_all >= 9 * rows);
    CHECK(4 * spared >= rows); // the search has something to do
}

TEST_CASE("packs are balanced to 2%, and move less than a seventh of what a plain ring moves") {
    const size_t S = 65536;
    for (int size : {4, 8}) {
        double moved = 0;
        for (uint64_t seed = 0; seed < 6; seed++) {
            const std::vector<int32_t> doc = make_docs(Mode::anchor, 1, S, 4096, seed);
            const Placement p = ring_placement(doc.data(), S, size);
            CHECK(balanced(p.load, 102));
            moved += double(p.moved) / double(S * (size - 1)) / 6;
        }
        CHECK(moved < 1.0 / 7); // 0.140 and 0.124; without the search 0.20 and 0.19
    }
}

TEST_CASE("exchanges level the ranks and keep their numbers of chunks") {
    Chunks c{1, {9, 8, 7, 6, 5, 4, 3, 2}, std::vector<uint8_t>(64)};
    std::vector<int32_t> rank = ring_start(c, 2, RingStart::runs);
    std::vector<int64_t> load = {30, 14};
    ring_level(rank, load, c, 105);
    CHECK(load == std::vector<int64_t>{23, 21}); // 9 against 2: 23 / 22 is within 1.05
    int64_t sum[2] = {}, count[2] = {};
    for (size_t j = 0; j < c.size(); j++) sum[rank[j]] += c.work[j], count[rank[j]]++;
    CHECK((sum[0] == 23 && sum[1] == 21 && count[0] == 4 && count[1] == 4));
}

TEST_CASE("documents that fit a rank stay on it, and the anchor moves no chunk") {
    std::vector<int32_t> doc(4096);
    for (size_t i = 0; i < doc.size(); i++) doc[i] = 1 + int32_t(i / 128);
    CHECK(ring_placement(doc.data(), doc.size(), 4).moved == 0);
    doc[0] = 0;
    const Placement p = ring_placement(doc.data(), doc.size(), 4);
    CHECK(p.moved == 0);
    CHECK(balanced(p.load, 105));
}

TEST_CASE("padded lengths divide, and add little") {
    for (size_t ring = 1; ring <= 16; ring++)
        for (size_t S : {1, 31, 4096, 5000, 65536, 100001}) {
            const size_t padded = ring_padded_length(S, ring);
            CHECK((ring == 1 ? padded == S : padded % (2 * ring) == 0));
            CHECK(padded >= S);
            CHECK(padded - S < std::max(2 * ring, S / attention_tile + 1)); // a tile's share, or the least there is
        }
}

int main(int argc, char** argv) {
    world = comm_init(&argc, &argv);
    alone = comm_split(world, world.rank, 0);
    return run_ranks(world, argc, argv);
}
