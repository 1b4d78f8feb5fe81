// The Hopper kernels of attention against the CPU reference: all modes, sizes, heads, portions, layouts, long rows.
#include "../attention_anchor.cuh"
#include "gpu_attention.h"
#include "large.h"

namespace {
// Of one problem: the gradients as dQ (T, H, D), dK and dV (T, K, D) each, for each has its own size of error.
template <class E> struct Parts {
    Buffer<E> out;
    Buffer<Acc<E>> lse; // (H, T)
    Buffer<E> dq, dk, dv;
    Parts(size_t T, Sizes z) : out(T * z.H * z.D), lse(z.H * T), dq(out.count), dk(T * z.K * z.D), dv(dk.count) {}
    // From rows of (2, K, D).
    template <class X> void set_dkv(const X* dkv, size_t stride, Sizes z) {
        const size_t width = z.K * z.D;
        for (size_t i = 0; i < dk.count; i++) {
            const X* row = dkv + i / width * stride + i % width;
            dk[i] = E(row[0]), dv[i] = E(row[width]);
        }
    }
    Parts(const Result<E>& r, size_t T, Sizes z) : Parts(T, z) {
        std::copy_n(r.out.data(), out.count, out.data());
        std::copy_n(r.lse.data(), lse.count, lse.data());
        for (size_t i = 0, width = z.H * z.D; i < dq.count; i++) dq[i] = r.dqkv[i / width * z.qkv() + i % width];
        set_dkv(r.dqkv.data() + z.H * z.D, z.qkv(), z);
    }
};

// Each with a tile of its own, in pairs wherever a tile visits one of the others in the mean, as the trainer has it, or
// as it has it with dQ in a fixed order.
enum class Blocks { alone, pairs, chosen, turns };

// The problem's buffers on the GPU, its keys in portions: portion[i] is the call in which token i is a key. In one
// portion keys and values stand inside qkv and their gradients inside dqkv; in several they are packed, and summed.
struct OnGpu {
    const Gpu gpu = the_gpu();
    const Tokens& t;
    const Sizes z;
    const size_t T, W, portions;
    DeviceBuffer<bf16> qkv, dout, anchor, out, dqkv;
    DeviceBuffer<float> lse, delta, state, dq, danchor;
    const bf16* k0;
    std::vector<std::vector<size_t>> from;
    std::vector<std::unique_ptr<MapOnGpu>> map;
    std::vector<std::unique_ptr<DeviceBuffer<bf16>>> packed;

    OnGpu(const Tokens& t, const Buffer<bf16>& qkv, const Buffer<bf16>& dout, Sizes z,
          const std::vector<size_t>& portion, size_t portions, Blocks blocks)
        : t(t), z(z), T(t.size()), W(z.qkv()), portions(portions), qkv(qkv), dout(dout), anchor(anchors(t, qkv, z)),
          out(dout.count), dqkv(qkv.count), lse(z.H * T), delta(z.H * T), state(dout.count), dq(dout.count),
          danchor(t.rows() * z.kv()), k0(anchored(t) ? anchor.data() : nullptr), from(portions) {
        AttentionTiles tiles = attention_hopper_tiles(z.D);
        if (blocks == Blocks::alone || blocks == Blocks::pairs) tiles.pairs_from = blocks == Blocks::alone ? 0 : 1;
        tiles.turns = blocks == Blocks::turns;
        for (size_t p = 0; p < portions; p++) {
            const Tokens keys = subset(
                t, [&](size_t i) { return portion[i] == p; }, &from[p]);
            map.push_back(std::make_unique<MapOnGpu>(t, keys, tiles));
            Buffer<bf16> kv(from[p].size() * z.kv());
            for (size_t i = 0; i < kv.count; i++) kv[i] = qkv[from[p][i / z.kv()] * W + z.H * z.D + i % z.kv()];
            packed.push_back(std::make_unique<DeviceBuffer<bf16>>(kv));
        }
    }
    const bf16* kv(size_t p) { return portions == 1 ? qkv.data() + z.H * z.D : packed[p]->data(); }
    size_t kv_stride() const { return portions == 1 ? W : z.kv(); }

    void forward() {
        for (size_t p = 0; p < portions; p++)
            attention_hopper_forward(gpu, {qkv.data(), kv(p), k0, W, kv_stride(), map[p]->q.data, map[p]->k.data,
                                           map[p]->forward(), p == 0, p + 1 == portions, out.data(), lse.data(),
                                           state.data(), int(T), int(from[p].size()), int(z.H), int(z.K), int(z.D)});
    }
    void backward(Parts<bf16>& r) {
        fill_zero(gpu, danchor.data(), danchor.count * sizeof(float));
        float* dk0 = k0 ? danchor.data() : nullptr;
        attention_backward_begin<bf16>(gpu, delta, dq, dk0, dout, out, lse, qkv, W, k0, t.row_begin.data(), t.rows(), T,
                                       z.H, z.K, z.D, DqOrder::split);
        Buffer<float> sum(T * z.kv());
        for (size_t p = 0; p < portions; p++) {
            const size_t Tk = from[p].size();
            const Buffer<float> before(Tk * z.kv(), 7 + p); // is added to
            DeviceBuffer<float> dkv(before);
            bf16* dkv_out = portions == 1 ? dqkv.data() + z.H * z.D : nullptr;
            attention_hopper_backward(gpu, {qkv.data(),
                                            kv(p),
                                            W,
                                            kv_stride(),
                                            dout.data(),
                                            lse.data(),
                                            delta.data(),
                                            map[p]->q.data,
                                            map[p]->k.data,
                                            map[p]->backward(),
                                            dq.data(),
                                            dkv.data(),
                                            dkv_out,
                                            W,
                                            dk0,
                                            int(T),
                                            int(Tk),
                                            int(z.H),
                                            int(z.K),
                                            int(z.D)});
            const Buffer<float> part = dkv.host();
            for (size_t i = 0; i < part.count; i++)
                sum[from[p][i / z.kv()] * z.kv() + i % z.kv()] = part[i] - before[i];
        }
        const Buffer<float> dq_host = dq.host(), danchor_host = danchor.host();
        const Buffer<bf16> dqkv_host = dqkv.host();
        const float scale = 1 / std::sqrt(float(z.D));
        for (size_t i = 0; i < dq_host.count; i++) r.dq[i] = bf16(dq_host[dq_place(i)] * scale);
        if (portions == 1) return r.set_dkv(dqkv_host.data() + z.H * z.D, W, z);
        if (k0) attention_add_anchor(Cpu(), sum.data(), danchor_host.data(), t, z.kv());
        r.set_dkv(sum.data(), z.kv(), z);
    }
    Parts<bf16> run() {
        Parts<bf16> r(T, z);
        forward();
        Buffer<bf16> out_host = out.host();
        Buffer<float> lse_host = lse.host();
        std::copy_n(out_host.data(), out_host.count, r.out.data());
        std::copy_n(lse_host.data(), lse_host.count, r.lse.data());
        backward(r);
        return r;
    }
};

// Inputs of storage bf16 that all see alike.
struct Problem {
    Tokens t;
    Sizes z;
    Buffer<bf16> qkv, dout;
    Problem(const Tokens& t, Sizes z, uint64_t seed)
        : t(t), z(z), qkv(t.size() * z.qkv(), seed + 1), dout(t.size() * z.H * z.D, seed + 2) {}
    Parts<double> truth() const {
        return {attend_cpu(t, converted<double>(qkv), converted<double>(dout), z), t.size(), z};
    }
    Parts<bf16> yardstick() const { return {attend_cpu(t, qkv, dout, z), t.size(), z}; }
    Parts<bf16> result(size_t portions = 1, uint64_t seed = 0, Blocks blocks = Blocks::chosen) const {
        std::vector<size_t> portion(t.size());
        for (size_t i = 0; i < portion.size(); i++) portion[i] = hash64(seed, i / 20) % portions;
        return OnGpu(t, qkv, dout, z, portion, portions, blocks).run();
    }
};

// Where a query sees one key alone, dS = P (dP - delta) is 0 but for the roundings of two sums of D products, which are
// allowed on top for dQ and dK: an ulp of fp32 for each product.
void check_result(const Parts<bf16>& r, const Parts<bf16>& yardstick, const Parts<double>& truth, size_t D) {
    check_2x(r.out, yardstick.out, truth.out);
    check_2x(r.lse, yardstick.lse, truth.lse);
    check_2x(r.dv, yardstick.dv, truth.dv);
    const double largest = std::max({largest_value(truth.dq), largest_value(truth.dk), largest_value(truth.dv)});
    const double cancelled = double(D) * ulp<float>(largest);
    auto close = [&](const Buffer<bf16>& x, const Buffer<bf16>& y, const Buffer<double>& exact) {
        return largest_error(x, exact) <= 2 * largest_error(y, exact) + 2 * ulp<bf16>(largest_value(exact)) + cancelled;
    };
    CHECK(close(r.dq, yardstick.dq, truth.dq));
    CHECK(close(r.dk, yardstick.dk, truth.dk));
}

void check(Mode mode, size_t B, size_t S, Sizes z, uint64_t seed, size_t portions = 1) {
    INFO("mode " << int(mode) << ", B " << B << ", S " << S << ", H " << z.H << ", K " << z.K << ", D " << z.D << ", "
                 << portions << " portions");
    const Problem p(make_tokens(mode, B, S, seed), z, seed);
    const Parts<bf16> yardstick = p.yardstick();
    const Parts<double> truth = p.truth();
    check_result(p.result(portions, seed + 3, Blocks::alone), yardstick, truth, z.D);
    check_result(p.result(portions, seed + 3, Blocks::turns), yardstick, truth, z.D);
    if (z.D == 128) check_result(p.result(portions, seed + 3, Blocks::pairs), yardstick, truth, z.D);
}

constexpr Sizes heads[] = {{1, 1, 0}, {2, 2, 0}, {4, 2, 0}, {6, 2, 0}};
bool here() { return the_gpu().context->compute == 90; }
} // namespace

TEST_CASE("Hopper attention agrees with the reference at all sizes, masks, heads") {
    if (!here()) return;
    size_t number = 0;
    for (size_t D : {128, 64})
        for (size_t S : {1, 17, 63, 64, 65, 127, 129, 200, 300, 513, 1000})
            for (Mode mode : modes) {
                const Sizes h = heads[number % 4];
                check(mode, 1 + number / 4 % 2, S, {h.H, h.K, D}, 100 + number);
                number++;
            }
}

// Steps by the dozen, blocks in pairs, whole tiles between masked ones.
TEST_CASE("Hopper attention agrees with the reference up to 4096 tokens") {
    if (!here()) return;
    size_t number = 0;
    for (size_t S : {2049, 4095, 4096})
        for (size_t D : {128, 64})
            for (size_t portions : {1, 2}) {
                check(modes[number % std::size(modes)], 1, S, {2, 1, D}, 900 + number, portions);
                number++;
            }
}

TEST_CASE("Hopper attention: keys in portions") {
    if (!here()) return;
    size_t number = 0;
    for (size_t D : {128, 64})
        for (size_t S : {1, 65, 200, 300, 700})
            for (Mode mode : modes) {
                const Sizes h = heads[(number + 2) % 4];
                check(mode, 1 + number / 2 % 2, S, {h.H, h.K, D}, 500 + number, 2 + number % 2);
                number++;
            }
}

// Every branch of the kernels, at sizes that a sanitizer can follow.
TEST_CASE("Hopper attention: masked and whole tiles, portions, several rows (small)") {
    if (!here()) return;
    for (size_t D : {64, 128}) {
        check(Mode::anchor, 2, 140, {2, 1, D}, 700 + D);
        check(Mode::interleaved, 1, 400, {2, 1, D}, 701 + D, 2);
        check(Mode::full, 1, 300, {1, 1, D}, 702 + D);
    }
}

TEST_CASE("Hopper attention is what the trainer takes, unless told otherwise") {
    if (!here()) return;
    const Gpu gpu = the_gpu();
    const AttentionTiles hopper = attention_hopper_tiles(128), portable = attention_mma_tiles(128);
    CHECK(hopper.forward_k != portable.forward_k);
    CHECK(attention_tiles<bf16>(gpu, 128).forward_k == hopper.forward_k);
    CHECK(attention_tiles<bf16>(gpu, 32).forward_k == portable.forward_k);
    gpu.context->portable_attention = true;
    CHECK(attention_tiles<bf16>(gpu, 128).forward_k == portable.forward_k);
    gpu.context->portable_attention = false;
    CHECK(!attention_tiles<bf16>(gpu, 128).turns);
    gpu.context->deterministic = true;
    CHECK(attention_tiles<bf16>(gpu, 128).turns);
    CHECK(attention_dq_order<bf16>(gpu, 128) == DqOrder::split);
    gpu.context->deterministic = false;
}

TEST_CASE("Hopper attention: queries that see nothing give zeros, not NaN (small)") {
    if (!here()) return;
    for (bool deterministic : {false, true}) {
        the_gpu().context->deterministic = deterministic;
        for (size_t D : {128, 64}) check_blind_queries(300, D);
    }
    the_gpu().context->deterministic = false;
}

TEST_CASE("Hopper attention: large scores neither overflow nor lose the softmax (small)") {
    if (!here()) return;
    const Sizes z{1, 1, 64}; // scores to +-1e4, whose exponentials have no float; the maximum moves far and often
    for (Mode mode : {Mode::full, Mode::anchor}) {
        Problem p(make_tokens(mode, 1, 300, 41), z, 41);
        for (size_t i = 0; i < p.t.size(); i++)
            for (size_t d = 0; d < 2 * z.D; d++)
                p.qkv[i * z.qkv() + d] = 32 * std::round(float(p.qkv[i * z.qkv() + d]));
        const Parts<bf16> r = p.result();
        const Parts<double> truth = p.truth();
        // Scores are integers times 1/8, exact to a half ulp of 2^15: 2^-10; O is off by that share of V, and stored in
        // bf16. A tie between keys is exact.
        CHECK(largest_error(r.out, truth.out) <= largest_value(truth.out) * 0x1p-9 + 2 * ulp<bf16>(4));
        CHECK(std::isfinite(largest_value(r.dq)));
        CHECK(std::isfinite(largest_value(r.dk)));
    }
}

TEST_CASE("Hopper attention: a query that sees one key gives it dV = dO, exactly (small)") {
    if (!here()) return;
    for (size_t D : {128, 64}) {
        Tokens t{{}, {}, {0, 200}};
        for (int32_t i = 0; i < 200; i++) t.index.push_back(i), t.doc.push_back(1 + i);
        const Problem p(t, {2, 2, D}, 51);
        const Parts<bf16> r = p.result();
        for (size_t i = 0; i < p.dout.count; i++) CHECK(float(r.dv[i]) == float(p.dout[i]));
        for (size_t i = 0, width = 2 * D; i < r.out.count; i++)
            CHECK(float(r.out[i]) == float(p.qkv[i / width * p.z.qkv() + 2 * width + i % width]));
    }
}

TEST_CASE("Hopper attention: the same bits in every run, but for dQ") {
    if (!here()) return;
    const Problem p(make_tokens(Mode::anchor, 1, 3000, 61), {4, 2, 128}, 61);
    for (Blocks blocks : {Blocks::alone, Blocks::pairs}) {
        const Parts<bf16> a = p.result(1, 0, blocks), b = p.result(1, 0, blocks);
        CHECK(same_bits(a.out, b.out));
        CHECK(same_bits(a.lse, b.lse));
        CHECK(same_bits(a.dk, b.dk));
        CHECK(same_bits(a.dv, b.dv));
    }
}

// Enough tiles for several rounds of all multiprocessors, whose order differs from run to run.
TEST_CASE("Hopper attention: with turns dQ has the same bits in every run") {
    if (!here()) return;
    for (Mode mode : {Mode::full, Mode::anchor, Mode::interleaved})
        for (size_t D : {128, 64}) {
            CAPTURE(int(mode));
            const size_t portions = mode == Mode::anchor ? 3 : 1;
            const Problem p(make_tokens(mode, 2, 4000, 62), {8, 4, D}, 62);
            const Parts<bf16> first = p.result(portions, 5, Blocks::turns);
            for (int run = 0; run < 3; run++) {
                const Parts<bf16> again = p.result(portions, 5, Blocks::turns);
                CHECK(same_bits(first.dq, again.dq));
                CHECK(same_bits(first.dk, again.dk));
                CHECK(same_bits(first.dv, again.dv));
            }
        }
}

namespace {
// One query, or one key, of a long row, by the definition; `rounded` with P and dS rounded to bf16 before their
// products.
struct Sample {
    const Problem& p;
    const Parts<bf16>& r; // LSE and O of the other queries, which are samples themselves
    template <class X> static std::vector<double> row(const X* from, size_t D) { return {from, from + D}; }
    const bf16* q(size_t i, size_t h) const { return p.qkv.data() + i * p.z.qkv() + h * p.z.D; }
    const bf16* k(size_t i) const { return q(i, p.z.H); }
    const bf16* v(size_t i) const { return q(i, p.z.H + p.z.K); }
    bool sees(size_t i, size_t j) const { return visible(p.t.index[i], p.t.doc[i], p.t.index[j], p.t.doc[j]); }
    double dot(const bf16* a, const bf16* b) const {
        double sum = 0;
        for (size_t d = 0; d < p.z.D; d++) sum += double(a[d]) * double(b[d]);
        return sum;
    }
    static double round_to(bool rounded, double x) { return rounded ? double(bf16(float(x))) : x; }

    // lse, then O (D), then dQ (D) of query i and head 0.
    std::vector<double> query(size_t i, bool rounded) const {
        const size_t D = p.z.D, S = p.t.size();
        const double scale = 1 / std::sqrt(double(D));
        const bf16* dout = p.dout.data() + i * p.z.H * D;
        std::vector<double> s(S), to(1 + 2 * D);
        double top = -1e300, sum = 0, delta = 0;
        for (size_t j = 0; j < S; j++)
            if (sees(i, j)) top = std::max(top, s[j] = scale * dot(q(i, 0), k(j)));
        for (size_t j = 0; j < S; j++)
            if (sees(i, j)) {
                const double e = std::exp(s[j] - top), weight = round_to(rounded, e);
                sum += e;
                for (size_t d = 0; d < D; d++) to[1 + d] += weight * double(v(j)[d]);
            }
        to[0] = top + std::log(sum);
        for (size_t d = 0; d < D; d++) to[1 + d] = round_to(rounded, to[1 + d] / sum), delta += to[1 + d] * dout[d];
        for (size_t j = 0; j < S; j++)
            if (sees(i, j)) {
                const double ds = round_to(rounded, std::exp(s[j] - to[0]) * (dot(dout, v(j)) - delta));
                for (size_t d = 0; d < D; d++) to[1 + D + d] += scale * ds * double(k(j)[d]);
            }
        for (size_t d = 0; d < D; d++) to[1 + D + d] = round_to(rounded, to[1 + D + d]);
        return to;
    }
    // dK (D), then dV (D) of key j, which is not the anchor, with one query head.
    std::vector<double> key(size_t j, bool rounded) const {
        const size_t D = p.z.D, S = p.t.size();
        const double scale = 1 / std::sqrt(double(D));
        std::vector<double> to(2 * D);
        for (size_t i = 0; i < S; i++)
            if (sees(i, j)) {
                const bf16* dout = p.dout.data() + i * D;
                const double weight = std::exp(scale * dot(q(i, 0), k(j)) - r.lse[i]);
                const double ds = round_to(rounded, weight * (dot(dout, v(j)) - dot(dout, r.out.data() + i * D)));
                for (size_t d = 0; d < D; d++) {
                    to[d] += scale * ds * double(q(i, 0)[d]);
                    to[D + d] += round_to(rounded, weight) * double(dout[d]);
                }
            }
        for (double& x : to) x = round_to(rounded, x);
        return to;
    }
};
} // namespace

// Long sums: tiles, ranges and the online softmax go through hundreds of steps. Sampled queries and keys by the 2x
// rule.
TEST_CASE("Hopper attention over 65536 tokens (large)") {
    if (!here()) return;
    const size_t S = 65536, D = 128, samples = 48;
    for (bool documents : {false, true}) {
        Tokens t{{}, {}, {0, int32_t(S)}};
        for (size_t i = 0, doc = 0; i < S; i++) { // the anchor, a short, a long document, one that comes back
            if (documents && (i == 1 || i == 3000 || i == 40000 || i == 60001)) doc = i == 60001 ? 1 : doc + 1;
            t.index.push_back(int32_t(i)), t.doc.push_back(int32_t(doc));
        }
        const Problem p(t, {1, 1, D}, 81);
        const Parts<bf16> r = p.result();
        const Sample sample{p, r};
        Buffer<float> lse(samples), lse_rounded(samples);
        Buffer<double> lse_exact(samples);
        Buffer<bf16> result[4] = {Buffer<bf16>(samples * D), Buffer<bf16>(samples * D), Buffer<bf16>(samples * D),
                                  Buffer<bf16>(samples * D)};
        std::vector<std::vector<double>> exact(2 * samples), rounded(2 * samples);
        auto place = [&](size_t n) { return n < 4 ? 1 + n * (S - 2) / 3 : 1 + size_t(hash64(82, n) % (S - 1)); };
#pragma omp parallel for schedule(dynamic, 1)
        for (size_t n = 0; n < samples; n++) {
            exact[n] = sample.query(place(n), false), rounded[n] = sample.query(place(n), true);
            exact[samples + n] = sample.key(place(n), false), rounded[samples + n] = sample.key(place(n), true);
        }
        const Buffer<bf16>* whole[] = {&r.out, &r.dq, &r.dk, &r.dv};
        for (size_t n = 0; n < samples; n++) {
            lse[n] = r.lse[place(n)], lse_exact[n] = exact[n][0], lse_rounded[n] = float(rounded[n][0]);
            for (int x = 0; x < 4; x++)
                for (size_t d = 0; d < D; d++) result[x][n * D + d] = (*whole[x])[place(n) * D + d];
        }
        check_2x(lse, lse_rounded, lse_exact);
        for (int x = 0; x < 4; x++) {
            Buffer<double> truth(samples * D), yardstick(samples * D);
            for (size_t i = 0; i < truth.count; i++) {
                const size_t n = (x < 2 ? 0 : samples) + i / D, at = (x < 2 ? 1 : 0) + (x % 2) * D + i % D;
                truth[i] = exact[n][at], yardstick[i] = rounded[n][at];
            }
            INFO("tensor " << x << ", documents " << documents);
            check_2x(result[x], yardstick, truth);
        }
    }
}

namespace {
__global__ void difference_kernel(double* sums, const bf16* a, const bf16* b, size_t count) {
    double difference = 0, size = 0;
    const size_t first = blockIdx.x * count;
    for (size_t i = threadIdx.x; i < count; i += blockDim.x) {
        const double x = float(a[first + i]), y = float(b[first + i]);
        difference += (x - y) * (x - y), size += y * y;
    }
    atomicAdd(sums + 2 * blockIdx.x, difference), atomicAdd(sums + 2 * blockIdx.x + 1, size);
}
// The largest relative difference of a block of `tokens`, by the root of the sum of squares.
double largest_difference(const bf16* a, const bf16* b, size_t T, size_t width, size_t tokens) {
    const size_t blocks = T / tokens;
    DeviceBuffer<double> sums(2 * blocks);
    fill_zero(the_gpu(), sums.data(), 2 * blocks * sizeof(double));
    device_wait(the_gpu());
    difference_kernel<<<unsigned(blocks), 256>>>(sums.data(), a, b, tokens * width);
    const Buffer<double> host = sums.host();
    double largest = 0;
    for (size_t i = 0; i < blocks; i++) {
        const double relative = std::sqrt(host[2 * i] / host[2 * i + 1]);
        largest = relative < largest ? largest : relative; // NaN stays
    }
    return largest;
}
} // namespace

namespace {
// Inputs that stay on the GPU.
struct LargeProblem {
    const Tokens t;
    const Sizes z;
    const size_t T = t.size(), W = z.qkv();
    LargeBuffer<bf16> qkv, dout, anchor;
    LargeProblem(const Tokens& t, Sizes z) : t(t), z(z), qkv(T * W, 1, 2), dout(T * z.H * z.D, 2), anchor(z.kv()) {
        copy_on_device(the_gpu(), anchor, qkv + z.H * z.D, z.kv() * sizeof(bf16));
    }
};

// dK and dV (count / width tokens of `width`) to rows of dqkv; danchor (width) is the first token's, unless null.
__global__ void store_dkv_kernel(bf16* to, size_t stride, const float* from, const float* danchor, size_t width,
                                 size_t count) {
    for (size_t i = blockIdx.x * size_t(blockDim.x) + threadIdx.x; i < count; i += size_t(gridDim.x) * blockDim.x)
        to[i / width * stride + i % width] = bf16(from[i] + (danchor && i < width ? danchor[i] : 0));
}

// Forward and backward. With a cut the keys from it on are a second portion: O, dK and dV then pass through fp32.
struct LargeResult {
    LargeBuffer<bf16> out, dqkv;
    LargeBuffer<float> lse, danchor;
    LargeResult(LargeProblem& p, bool portable, size_t cut = 0)
        : out(p.dout.count), dqkv(p.qkv.count), lse(p.z.H * p.T), danchor(p.z.kv()) {
        const Gpu gpu = the_gpu();
        const auto [H, K, D] = p.z;
        const size_t T = p.T, W = p.W, kv = p.z.kv(), portions = cut ? 2 : 1;
        const size_t ends[] = {0, cut ? cut : T, T};
        gpu.context->portable_attention = portable;
        LargeBuffer<float> delta(H * T), dq(T * H * D), state(cut ? T * H * D : 0), dkv(cut ? T * kv : 0);
        const bf16* k0 = anchored(p.t) ? p.anchor.data() : nullptr;
        float* dk0 = k0 ? danchor.data() : nullptr;
        fill_zero(gpu, danchor, danchor.count * sizeof(float));
        fill_zero(gpu, dkv, dkv.count * sizeof(float));
        std::vector<std::unique_ptr<MapOnGpu>> map;
        for (size_t n = 0; n < portions; n++) {
            const Tokens keys = subset(p.t, [&](size_t i) { return ends[n] <= i && i < ends[n + 1]; });
            map.push_back(std::make_unique<MapOnGpu>(p.t, keys, attention_tiles<bf16>(gpu, D)));
        }
        auto keys_of = [&](size_t n) { return p.qkv + H * D + ends[n] * W; };
        for (size_t n = 0; n < portions; n++)
            attention_forward_launch<bf16>(gpu, {p.qkv, keys_of(n), k0, W, W, map[n]->q.data, map[n]->k.data,
                                                 map[n]->forward(), n == 0, n + 1 == portions, out, lse, state, int(T),
                                                 int(ends[n + 1] - ends[n]), int(H), int(K), int(D)});
        attention_backward_begin<bf16>(gpu, delta, dq, dk0, p.dout, out, lse, p.qkv, W, k0, p.t, H, K, D);
        for (size_t n = 0; n < portions; n++)
            attention_backward_launch<bf16>(gpu, {p.qkv,
                                                  keys_of(n),
                                                  W,
                                                  W,
                                                  p.dout,
                                                  lse,
                                                  delta,
                                                  map[n]->q.data,
                                                  map[n]->k.data,
                                                  map[n]->backward(),
                                                  dq,
                                                  cut ? dkv + ends[n] * kv : nullptr,
                                                  cut ? nullptr : dqkv + H * D,
                                                  W,
                                                  dk0,
                                                  int(T),
                                                  int(ends[n + 1] - ends[n]),
                                                  int(H),
                                                  int(K),
                                                  int(D)});
        attention_store_dq<bf16>(gpu, dqkv, W, dq, T, H, D);
        if (cut) store_dkv_kernel<<<4096, 256, 0, gpu.stream>>>(dqkv + H * D, W, dkv, dk0, kv, T * kv);
        device_wait(gpu);
        gpu.context->portable_attention = false;
    }
};

// By blocks of 1024 tokens. Each kernel rounds P, dS and its result to bf16, by 2^-9 at most: six roundings lie between
// them. LSE has those of fp32 alone, once in each.
void check_against(LargeResult& ours, LargeResult& portable, const LargeProblem& p) {
    const auto [H, K, D] = p.z;
    const double bound = 6 * 0x1p-9;
    CHECK(largest_difference(ours.out, portable.out, p.T, H * D, 1024) < bound);
    CHECK(largest_difference(ours.dqkv, portable.dqkv, p.T, p.W, 1024) < bound);
    const Buffer<float> a = ours.lse.part(0, ours.lse.count), b = portable.lse.part(0, portable.lse.count);
    CHECK(largest_error(a, b) <= 2 * (score_rounding(p.T, D) + ulp<float>(largest_value(b))));
    const Buffer<float> x = ours.danchor.part(0, p.z.kv()), y = portable.danchor.part(0, p.z.kv());
    double difference = 0, size = 0;
    for (size_t i = 0; i < x.count; i++)
        difference += std::pow(double(x[i]) - double(y[i]), 2), size += std::pow(double(y[i]), 2);
    CHECK(std::sqrt(difference) <= bound * std::sqrt(size));
    CHECK((size > 0) == anchored(p.t));
}
void check_against_portable(const Tokens& t, Sizes z, size_t cut) {
    LargeProblem p(t, z);
    LargeResult portable(p, true);
    for (size_t at : {size_t(0), cut}) {
        INFO("T " << t.size() << ", H " << z.H << ", D " << z.D << ", second portion from " << at);
        LargeResult ours(p, false, at);
        check_against(ours, portable, p);
    }
}
} // namespace

TEST_CASE("Hopper attention over 65536 and 262144 tokens in every mode (large)") {
    if (!here()) return;
    for (size_t T : {65536, 262144})
        for (size_t D : {128, 64})
            for (Mode mode : modes) {
                INFO("mode " << int(mode));
                check_against_portable(make_tokens(mode, 1, T, 84, 3000), {2, 1, D}, T * 5 / 8 + 17);
            }
}

// Offsets beyond 2^31 elements in every array, in one portion and with O, dK and dV in fp32.
TEST_CASE("Hopper attention: more than 2^31 elements (large)") {
    if (!here()) return;
    const Sizes z{68, 34, 128};
    const size_t T = 262144, cut = T - 4096;
    CHECK(T * z.H * z.D > size_t(1) << 31);
    CHECK(cut * z.kv() > size_t(1) << 31);
    Tokens t{{}, {}, {0, int32_t(T)}};
    for (size_t i = 0; i < T; i++) t.index.push_back(int32_t(i)), t.doc.push_back(i == 0 ? 0 : int32_t(1 + i / 9999));
    check_against_portable(t, z, cut);
}
