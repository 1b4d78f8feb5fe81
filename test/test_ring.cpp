// layers/ring.cuh: placement and plan as pure functions; a ring of N ranks against one rank.
// Run as mpirun -np N: every rank runs every case, and a failure on any of them is a failure.
#define DOCTEST_CONFIG_IMPLEMENT
#include "../layers/ring.cuh"
#include "check.h"

static Comm world, alone; // set by main: all ranks, and this rank as a ring of its own

enum class Mode { full, intra, anchor, interleaved, padded, masked };
static const Mode modes[] = {Mode::full, Mode::intra, Mode::anchor, Mode::interleaved, Mode::padded, Mode::masked};
static bool has_anchor(Mode m) { return m != Mode::intra; }

// doc[] of B rows with documents of `mean` tokens. interleaved: pieces in mixed order; padded: two thirds of a row are
// padding, a document of its own (rows differ); masked: equal documents, of which those beyond a third have no label,
// so that the last rank has nothing to learn from.
static std::vector<int32_t> make_docs(Mode mode, size_t B, size_t S, double mean, uint64_t seed) {
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

// One rank's results in the order of its local tokens, from inputs of the whole batch.
template <class E> struct Result {
    Buffer<E> out, dqkv;
    Buffer<Acc<E>> lse;
};

template <class E> struct Scratch {
    Buffer<Acc<E>> state, delta, dkv, danchor, dkv_send0, dkv_send1, dkv_receive;
    Buffer<E> anchor, send, receive0, receive1;
    explicit Scratch(const RingScratchSizes& n)
        : state(n.state), delta(n.delta), dkv(n.dkv), danchor(n.danchor), dkv_send0(n.dkv_send), dkv_send1(n.dkv_send),
          dkv_receive(n.dkv_receive), anchor(n.anchor), send(n.send), receive0(n.receive), receive1(n.receive) {}
    RingScratch<E> pointers() {
        return {state, delta, dkv, anchor, danchor, send, {receive0, receive1}, {dkv_send0, dkv_send1}, dkv_receive};
    }
};

template <class E> Result<E> attend(const Comm& comm, const RingPlan& plan, const Buffer<E>& qkv, const Buffer<E>& dout,
                                    size_t S, Sizes z) {
    const size_t T = plan.local.size(), B = plan.local.rows(), W = z.qkv(), O = z.H * z.D;
    Buffer<E> local_qkv(T * W), local_dout(T * O);
    for (size_t b = 0; b < B; b++)
        for (size_t t = plan.local.row_begin[b]; t < size_t(plan.local.row_begin[b + 1]); t++) {
            std::copy_n(qkv.data() + (b * S + plan.local.index[t]) * W, W, local_qkv.data() + t * W);
            std::copy_n(dout.data() + (b * S + plan.local.index[t]) * O, O, local_dout.data() + t * O);
        }
    Scratch<E> scratch(ring_scratch_sizes(Cpu(), T, comm.size, B, z.H, z.K, z.D));
    RingScratch<E> pointers = scratch.pointers();
    Result<E> r{Buffer<E>(T * O), Buffer<E>(T * W), Buffer<Acc<E>>(T * z.H)};
    ring_attention_forward(Cpu(), comm, plan, r.out.data(), r.lse.data(), local_qkv.data(), pointers, z.H, z.K, z.D);
    for (Buffer<E>* x : {&scratch.anchor, &scratch.send, &scratch.receive0, &scratch.receive1}) x->poison();
    for (auto* x : {&scratch.state, &scratch.delta, &scratch.dkv}) x->poison();
    ring_attention_backward(Cpu(), comm, plan, r.dqkv.data(), local_dout.data(), r.out.data(), r.lse.data(),
                            local_qkv.data(), pointers, z.H, z.K, z.D);
    const Buffer<Acc<E>> by_head = converted<Acc<E>>(r.lse); // to (T, H), the order of all other results
    for (size_t t = 0; t < T; t++)
        for (size_t h = 0; h < z.H; h++) r.lse[t * z.H + h] = by_head[h * T + t];
    return r;
}

struct Case {
    size_t B, S;
    Sizes z;
    std::vector<int32_t> doc;
    bool anchor;
    Buffer<double> qkv, dout;
    Case(Mode mode, size_t B, size_t length, double mean, Sizes z, uint64_t seed)
        : B(B), S(ring_padded_length(length, world.size)), z(z), doc(make_docs(mode, B, S, mean, seed)),
          anchor(has_anchor(mode)), qkv(B * S * z.qkv(), seed), dout(B * S * z.H * z.D, seed + 1) {
        if (mode != Mode::padded && mode != Mode::masked) return;
        for (size_t b = 0; b < B; b++) // what has no label has no gradient
            for (size_t i = (S / 3 + b) * z.H * z.D; i < S * z.H * z.D; i++) dout[b * S * z.H * z.D + i] = 0;
    }
    RingPlan plan(const Comm& comm) const {
        RingPlan p;
        ring_plan_build(p, doc.data(), anchor, B, S, comm.rank, comm.size);
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

TEST_CASE("a ring gives what one rank gives: outputs and all gradients, in double") {
    for (Mode mode : modes)
        for (size_t B : {1, 3})
            for (size_t length : {8, 90, 500})
                for (double mean : {5.0, 60.0}) {
                    const Sizes z = length == 90 ? Sizes{4, 2, 6} : Sizes{2, 2, 4};
                    const Case c(mode, B, length, mean, z, length + B);
                    const RingPlan plan = c.plan(world);
                    if (mode == Mode::masked && length == 500 && world.size > 2 && world.rank == world.size - 1)
                        CHECK(*std::min_element(plan.local.index.begin(), plan.local.index.end()) >= int32_t(c.S / 3));
                    const Result<double> ring = attend(world, plan, c.qkv, c.dout, c.S, z);
                    const Result<double> one = attend(alone, c.plan(alone), c.qkv, c.dout, c.S, z);
                    // up to 500 terms of size up to 10, rounded at 1.1e-16
                    CHECK(local_error(plan, ring.out, one.out, c.S, z.H * z.D) <= 1e-12);
                    CHECK(local_error(plan, ring.lse, one.lse, c.S, z.H) <= 1e-12);
                    CHECK(local_error(plan, ring.dqkv, one.dqkv, c.S, z.qkv()) <= 1e-11);
                }
}

TEST_CASE("the same run gives the same bits") {
    const Case c(Mode::anchor, 2, 300, 40, {4, 2, 8}, 5);
    const RingPlan plan = c.plan(world);
    const Buffer<float> qkv = converted<float>(c.qkv), dout = converted<float>(c.dout);
    const Result<float> a = attend(world, plan, qkv, dout, c.S, c.z), b = attend(world, plan, qkv, dout, c.S, c.z);
    CHECK(largest_error(a.out, b.out) == 0);
    CHECK(largest_error(a.dqkv, b.dqkv) == 0);
}

// Partial results travel in Acc, so the error of bf16 storage does not grow with the ring.
TEST_CASE_TEMPLATE("the error against double is flat in the number of ranks", E, bf16, float) {
    for (Mode mode : {Mode::full, Mode::anchor, Mode::interleaved}) {
        const Case c(mode, 1, 600, 100, {2, 1, 32}, 6);
        const Buffer<E> qkv = converted<E>(c.qkv), dout = converted<E>(c.dout);
        const RingPlan plan = c.plan(world), single = c.plan(alone);
        const Result<double> truth = attend(alone, single, converted<double>(qkv), converted<double>(dout), c.S, c.z);
        const Result<E> one = attend(alone, single, qkv, dout, c.S, c.z);
        const Result<E> ring = attend(world, plan, qkv, dout, c.S, c.z);
        double error[2] = {local_error(plan, ring.out, truth.out, c.S, c.z.H * c.z.D),
                           local_error(plan, ring.dqkv, truth.dqkv, c.S, c.z.qkv())};
        std::vector<double> all(2 * world.size);
        comm_gather(Cpu(), world, all.data(), error, 2);
        for (int r = 0; r < world.size; r++)
            for (int i : {0, 1}) error[i] = std::max(error[i], all[2 * r + i]);
        CHECK(error[0] <= 1.5 * largest_error(one.out, truth.out) + 2 * ulp<E>(largest_value(truth.out)));
        CHECK(error[1] <= 1.5 * largest_error(one.dqkv, truth.dqkv) + 2 * ulp<E>(largest_value(truth.dqkv)));
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

TEST_CASE("placement balances packs of 20 documents and more, and the full mask by zigzag") {
    const size_t S = 65536;
    for (int size : {2, 4, 8}) {
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
                CHECK(balanced(p.load));
                CHECK(p.rank[0] == 0);
                for (int r = 0; r < size; r++)
                    CHECK(std::count(p.rank.begin(), p.rank.end(), r) == int64_t(p.rank.size()) / size);
            }
    }
}

TEST_CASE("exchanges level the ranks and keep their numbers of chunks") {
    Chunks c{1, {9, 8, 7, 6, 5, 4, 3, 2}, std::vector<uint8_t>(64)};
    std::vector<int32_t> rank = ring_start(c, 2, RingStart::runs);
    std::vector<int64_t> load = {30, 14};
    ring_level(rank, load, c);
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
    CHECK(balanced(p.load));
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
    doctest::Context context(argc, argv);
    int64_t failed = context.run();
    comm_sum(Cpu(), world, &failed, 1);
    comm_finalize(world);
    return failed > 0;
}
