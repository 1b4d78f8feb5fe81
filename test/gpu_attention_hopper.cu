// The Hopper kernels of attention against the CPU reference: all modes, sizes, heads, portions, layouts, long rows.
#include "../attention_anchor.cuh"
#include "gpu_attention.h"
#include <chrono>
#include <thread>

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
    const FreshScratch scratch;
    const Tokens& t;
    const Sizes z;
    const size_t T, W, portions;
    DeviceBuffer<bf16> qkv, dout, anchor, out, dqkv;
    DeviceBuffer<float> lse, delta, state, dq, danchor;
    const bf16* k0;
    std::vector<std::vector<size_t>> from;
    std::vector<std::unique_ptr<MapOnGpu>> map;
    std::vector<std::unique_ptr<DeviceBuffer<bf16>>> packed;
    std::vector<Buffer<float>> before; // what dkv holds and is added to
    std::vector<std::unique_ptr<DeviceBuffer<float>>> dkv;

    OnGpu(const Tokens& t, const Buffer<bf16>& qkv, const Buffer<bf16>& dout, Sizes z,
          const std::vector<size_t>& portion, size_t portions, Blocks blocks)
        : t(t), z(z), T(t.size()), W(z.qkv()), portions(portions), qkv(qkv), dout(dout), anchor(anchors(t, qkv, z)),
          out(Buffer<bf16>(dout.count)), dqkv(Buffer<bf16>(qkv.count)), lse(z.H * T), delta(z.H * T), state(dout.count),
          dq(dout.count), danchor(t.rows() * z.kv()), k0(anchored(t) ? anchor.data() : nullptr), from(portions) {
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
            before.emplace_back(kv.count, 7 + p);
            dkv.push_back(std::make_unique<DeviceBuffer<float>>(before[p]));
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
    void begin_backward() {
        fill_zero(gpu, danchor.data(), danchor.count * sizeof(float));
        attention_backward_begin<bf16>(gpu, delta, dq, k0 ? danchor.data() : nullptr, dout, out, lse, qkv, W, k0,
                                       t.row_begin.data(), t.rows(), T, z.H, z.K, z.D, DqOrder::split);
    }
    void add_portions() {
        for (size_t p = 0; p < portions; p++) {
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
                                            dkv[p]->data(),
                                            dkv_out,
                                            W,
                                            k0 ? danchor.data() : nullptr,
                                            int(T),
                                            int(from[p].size()),
                                            int(z.H),
                                            int(z.K),
                                            int(z.D)});
        }
    }
    void backward(Parts<bf16>& r) {
        begin_backward();
        add_portions();
        Buffer<float> sum(T * z.kv());
        for (size_t p = 0; p < portions; p++) {
            const Buffer<float> part = dkv[p]->host();
            for (size_t i = 0; i < part.count; i++)
                sum[from[p][i / z.kv()] * z.kv() + i % z.kv()] = part[i] - before[p][i];
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
        return OnGpu(t, qkv, dout, z, random_portions(t.size(), portions, seed), portions, blocks).run();
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

// Documents, or pieces of them, of `mean` tokens.
void check(Mode mode, size_t B, size_t S, Sizes z, uint64_t seed, size_t portions = 1, double mean = 1 / 0.06) {
    INFO("mode " << int(mode) << ", B " << B << ", S " << S << ", H " << z.H << ", K " << z.K << ", D " << z.D << ", "
                 << portions << " portions, documents of " << mean);
    const Problem p(make_tokens(mode, B, S, seed, mean), z, seed);
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

// Of what a tile visits some is whole, some masked. Interleaved documents leave, with this seed, tiles that are not
// visited between others that are, for queries and for keys, alone and in pairs.
TEST_CASE("Hopper attention agrees with the reference where documents are longer than tiles") {
    if (!here()) return;
    for (size_t S : {1500, 2049, 4096})
        for (size_t D : {128, 64})
            for (Mode mode : {Mode::anchor, Mode::intra, Mode::full, Mode::interleaved}) {
                check(mode, 1, S, {2, 1, D}, 2001, 1, S / 8.0);
                if (S == 2049) check(mode, 1, S, {2, 1, D}, 2001, 2, S / 8.0);
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
    CHECK(!attention_tiles<bf16>(gpu, 32).turns); // the portable kernels have a fixed order of their own
    CHECK(!attention_tiles<float>(gpu, 128).turns);
    gpu.context->portable_attention = true;
    CHECK(!attention_tiles<bf16>(gpu, 128).turns);
    gpu.context->portable_attention = gpu.context->deterministic = false;
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
    for (size_t D : {128, 64}) {
        const Problem p(make_tokens(Mode::anchor, 1, 3000, 61, 300), {4, 2, D}, 61);
        for (Blocks blocks : {Blocks::alone, Blocks::pairs}) {
            if (blocks == Blocks::pairs && D != 128) continue; // pairs are for D = 128
            INFO("D " << D << ", pairs " << (blocks == Blocks::pairs));
            const Parts<bf16> a = p.result(1, 0, blocks), b = p.result(1, 0, blocks);
            CHECK(same_bits(a.out, b.out));
            CHECK(same_bits(a.lse, b.lse));
            CHECK(same_bits(a.dk, b.dk));
            CHECK(same_bits(a.dv, b.dv));
        }
    }
}

namespace {
// A problem of nearly 8 rounds of all multiprocessors, whose order differs from run to run.
struct Turns {
    const Problem p;
    OnGpu on;
    std::vector<Buffer<float>> lse, dq, dkv, danchor;
    std::vector<Buffer<bf16>> dqkv;
    Turns(Mode mode, size_t D, size_t portions, double mean = 1 / 0.06)
        : p(make_tokens(mode, 2, 4000 * portions, 62, mean), {16, 16, D}, 62),
          on(p.t, p.qkv, p.dout, p.z, random_portions(p.t.size(), portions, 5), portions, Blocks::turns) {
        on.forward();
    }
    void keep() {
        dq.push_back(on.dq.host()), dqkv.push_back(on.dqkv.host()), dkv.push_back(on.dkv.back()->host());
        lse.push_back(on.lse.host()), danchor.push_back(on.danchor.host());
        for (size_t i = 0; i < on.portions; i++) on.dkv[i]->set(on.before[i]);
    }
    void check_bits() const {
        for (size_t i = 1; i < dq.size(); i++) {
            CHECK(same_bits(lse[0], lse[i]));
            CHECK(same_bits(danchor[0], danchor[i]));
            CHECK(same_bits(dq[0], dq[i]));
            CHECK(same_bits(dqkv[0], dqkv[i]));
            CHECK(same_bits(dkv[0], dkv[i]));
        }
    }
};

// Takes a multiprocessor's shared memory until the flag is set, or for two seconds. `seen`: blocks that saw it.
__global__ void hold_kernel(const volatile int* flag, int* seen) {
    if (threadIdx.x > 0) return;
    const long long begin = clock64();
    while (!*flag && clock64() - begin < 4'000'000'000) {}
    if (*flag) atomicAdd(seen, 1);
}
} // namespace

TEST_CASE("Hopper attention: with turns LSE and all gradients have the same bits in every run") {
    if (!here()) return;
    for (Mode mode : {Mode::full, Mode::anchor, Mode::interleaved})
        for (size_t D : {128, 64}) {
            INFO("mode " << int(mode) << ", D " << D);
            const bool anchor = mode == Mode::anchor; // in portions, its documents of several tiles that add in turn
            Turns t(mode, D, anchor ? 2 : 1, anchor ? 500 : 1 / 0.06);
            for (int run = 0; run < 4; run++) {
                t.on.lse.poison();
                t.on.forward(), t.on.begin_backward(), t.on.add_portions(), t.keep();
            }
            t.check_bits();
        }
}

// Half of the multiprocessors are busy until the backward is done, as another stream's kernels may keep them: the other
// half must not wait for items of blocks that cannot begin.
TEST_CASE("Hopper attention: with turns nobody waits for a block that has not begun") {
    if (!here()) return;
    const Gpu gpu = the_gpu();
    Turns t(Mode::anchor, 128, 1);
    t.on.begin_backward(), t.on.add_portions(), t.keep();
    t.on.begin_backward();
    DeviceBuffer<int> flag(1), seen(1);
    fill_zero(gpu, flag.data(), sizeof(int)), fill_zero(gpu, seen.data(), sizeof(int));
    device_wait(gpu);
    cudaStream_t other;
    CUDA_CHECK(cudaStreamCreateWithFlags(&other, cudaStreamNonBlocking));
    constexpr int bytes = 200 << 10;
    CUDA_CHECK(cudaFuncSetAttribute(hold_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
    const int held = gpu.context->sms / 2;
    hold_kernel<<<held, 32, bytes, other>>>(flag.data(), seen.data());
    CUDA_CHECK(cudaGetLastError());
    std::this_thread::sleep_for(std::chrono::milliseconds(100)); // until all of them have begun
    t.on.add_portions();
    CUDA_CHECK(cudaMemsetAsync(flag.data(), 1, sizeof(int), gpu.stream));
    CUDA_CHECK(cudaStreamSynchronize(other));
    CHECK(seen.host()[0] == held);
    t.keep();
    t.check_bits();
    CUDA_CHECK(cudaStreamDestroy(other));
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
