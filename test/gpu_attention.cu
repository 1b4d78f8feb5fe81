// Attention on any GPU: the kernels by mma.sync and the plain ones against the CPU reference, in all modes, portions
// and layouts.
#include "../attention_anchor.cuh"
#include "gpu_attention.h"
#include "large.h"

namespace {
// Which kernels: what the trainer takes on a GPU for which none is written, or the plain ones.
enum class Kernels { portable, simt };
struct Portable {
    Portable() { the_gpu().context->portable_attention = true; }
    ~Portable() { the_gpu().context->portable_attention = false; }
};

// The keys of a problem in portions: portion[i] is the call in which token i is a key.
struct Split {
    std::vector<size_t> portion;
    size_t count = 1;
};
struct Keys {
    Tokens tokens;
    std::vector<size_t> from; // numbers of the tokens
};
std::vector<Keys> split_keys(const Tokens& t, const Split& split) {
    std::vector<Keys> keys(split.count);
    for (size_t p = 0; p < split.count; p++)
        keys[p].tokens = subset(
            t, [&](size_t i) { return split.count == 1 || split.portion[i] == p; }, &keys[p].from);
    return keys;
}

template <class E> AttentionTiles tiles_of(Kernels kernels, Gpu gpu, size_t D) {
    return kernels == Kernels::simt ? attention_simt_tiles() : attention_tiles<E>(gpu, D);
}
template <class E> void forward(Kernels kernels, Gpu gpu, const AttentionForward<E>& a) {
    kernels == Kernels::simt ? attention_simt_forward(gpu, a) : attention_forward_launch(gpu, a);
}
template <class E> void backward(Kernels kernels, Gpu gpu, const AttentionBackward<E>& a) {
    kernels == Kernels::simt ? attention_simt_backward(gpu, a) : attention_backward_launch(gpu, a);
}

// One portion: keys and values inside qkv, and gradients stored at once. Several: keys packed, gradients summed in fp32
// (each twice, which must give exactly the double).
template <class E> Result<E> attend_gpu(const Tokens& t, const Buffer<E>& qkv, const Buffer<E>& dout, Sizes z,
                                        Kernels kernels = Kernels::portable, const Split& split = {}) {
    const Portable scope;
    const FreshScratch scratch;
    const Gpu gpu = the_gpu();
    const auto [H, K, D] = z;
    const size_t T = t.size(), W = z.qkv(), B = t.rows();
    const AttentionTiles tiles = tiles_of<E>(kernels, gpu, D);
    const std::vector<Keys> keys = split_keys(t, split);
    DeviceBuffer<E> qkv_gpu(qkv), dout_gpu(dout), anchor(anchors(t, qkv, z)), out(T * H * D);
    DeviceBuffer<E> dqkv(Buffer<E>(T * W)); // of several portions dQ alone is written
    DeviceBuffer<float> lse(H * T), delta(H * T), state(T * H * D), dq(T * H * D), danchor(B * z.kv());
    const E* k0 = anchored(t) ? anchor.data() : nullptr;
    float* dk0 = k0 ? danchor.data() : nullptr;
    fill_zero(gpu, danchor.data(), danchor.count * sizeof(float));

    std::vector<std::unique_ptr<MapOnGpu>> maps;
    std::vector<std::unique_ptr<DeviceBuffer<E>>> packed;
    for (const Keys& part : keys) {
        maps.push_back(std::make_unique<MapOnGpu>(t, part.tokens, tiles));
        Buffer<E> kv(part.from.size() * z.kv());
        for (size_t j = 0; j < part.from.size(); j++)
            for (size_t i = 0; i < z.kv(); i++) kv[j * z.kv() + i] = qkv[part.from[j] * W + H * D + i];
        packed.push_back(std::make_unique<DeviceBuffer<E>>(kv));
    }
    auto kv_of = [&](size_t p) { return split.count == 1 ? qkv_gpu.data() + H * D : packed[p]->data(); };
    const size_t kv_stride = split.count == 1 ? W : z.kv();
    for (size_t p = 0; p < split.count; p++)
        forward<E>(kernels, gpu,
                   {qkv_gpu.data(), kv_of(p), k0, W, kv_stride, maps[p]->q.data, maps[p]->k.data, maps[p]->forward(),
                    p == 0, p + 1 == split.count, out.data(), lse.data(), state.data(), int(T),
                    int(keys[p].from.size()), int(H), int(K), int(D)});
    attention_backward_begin(gpu, delta.data(), dq.data(), dk0, (const E*)dout_gpu.data(), (const E*)out.data(),
                             (const float*)lse.data(), (const E*)qkv_gpu.data(), W, k0, t.row_begin.data(), B, T, H, K,
                             D);
    std::vector<Buffer<float>> sums;
    for (size_t p = 0; p < split.count; p++) {
        const size_t Tk = keys[p].from.size();
        DeviceBuffer<float> dkv(Tk * z.kv());
        fill_zero(gpu, dkv.data(), dkv.count * sizeof(float));
        AttentionBackward<E> a{qkv_gpu.data(),
                               kv_of(p),
                               W,
                               kv_stride,
                               dout_gpu.data(),
                               lse.data(),
                               delta.data(),
                               maps[p]->q.data,
                               maps[p]->k.data,
                               maps[p]->backward(),
                               dq.data(),
                               dkv.data(),
                               nullptr,
                               W,
                               dk0,
                               int(T),
                               int(Tk),
                               int(H),
                               int(K),
                               int(D)};
        if (split.count == 1) a.dkv_out = dqkv.data() + H * D;
        backward<E>(kernels, gpu, a);
        if (split.count == 1) continue;
        sums.push_back(dkv.host());
        DeviceBuffer<float> unused(Buffer<float>(T * H * D));
        a.dq = unused.data();
        backward<E>(kernels, gpu, a);
        const Buffer<float> twice = dkv.host();
        bool doubled = true;
        for (size_t i = 0; i < twice.count; i++) doubled &= twice[i] == 2 * sums[p][i];
        CHECK(doubled);
    }
    attention_backward_end(gpu, dqkv.data(), W, (const float*)dq.data(), T, H, D);
    Result<E> r{out.host(), dqkv.host(), lse.host()};
    const Buffer<float> at_anchor = danchor.host();
    for (size_t p = 0; p < sums.size(); p++)
        for (size_t j = 0; j < keys[p].from.size(); j++)
            for (size_t i = 0, to = keys[p].from[j]; i < z.kv(); i++) {
                const size_t row =
                    std::upper_bound(t.row_begin.begin(), t.row_begin.end(), int(to)) - t.row_begin.begin() - 1;
                const float extra = dk0 && is_anchor(t.index[to], t.doc[to]) ? at_anchor[row * z.kv() + i] : 0;
                r.dqkv[to * W + H * D + i] = E(sums[p][j * z.kv() + i] + extra);
            }
    return r;
}

// Inputs of storage E that all see alike.
template <class E> struct Problem {
    Tokens t;
    Sizes z;
    Buffer<E> qkv, dout;
    Problem(const Tokens& t, Sizes z, uint64_t seed)
        : t(t), z(z), qkv(t.size() * z.qkv(), seed + 1), dout(t.size() * z.H * z.D, seed + 2) {}
    Problem(Mode mode, size_t B, size_t S, Sizes z, uint64_t seed) : Problem(make_tokens(mode, B, S, seed), z, seed) {}
    Result<double> truth() const { return attend_cpu(t, converted<double>(qkv), converted<double>(dout), z); }
    Result<E> yardstick() const { return attend_cpu(t, qkv, dout, z); }
};

template <class E> void part(Buffer<E>& to, const Buffer<E>& dqkv, Sizes z, size_t begin, size_t end) {
    const size_t W = z.qkv(), width = (end - begin) * z.D;
    for (size_t i = 0; i < to.count; i++) to[i] = dqkv[i / width * W + begin * z.D + i % width];
}
// dQ, dK and dV differ in size, so each is held to its own bound.
template <class E>
void check_result(const Problem<E>& p, const Result<E>& r, const Result<E>& yardstick, const Result<double>& truth) {
    const size_t T = p.t.size(), ends[] = {0, p.z.H, p.z.H + p.z.K, p.z.H + 2 * p.z.K};
    const double rounding = score_rounding(T, p.z.D);
    check_2x(r.out, yardstick.out, truth.out);
    CHECK(largest_error(r.lse, truth.lse) <=
          2 * largest_error(yardstick.lse, truth.lse) + 2 * ulp<float>(largest_value(truth.lse)) + rounding);
    for (int i = 0; i < 3; i++) {
        const size_t count = T * (ends[i + 1] - ends[i]) * p.z.D;
        Buffer<E> x(count), y(count);
        Buffer<double> z(count);
        part(x, r.dqkv, p.z, ends[i], ends[i + 1]), part(y, yardstick.dqkv, p.z, ends[i], ends[i + 1]);
        part(z, truth.dqkv, p.z, ends[i], ends[i + 1]);
        const double largest = largest_value(z);
        const double cancelled = i < 2 ? cancelled_sums(p.z.D, largest_value(truth.dqkv)) : 0;
        INFO((i == 0 ? "dQ" : i == 1 ? "dK" : "dV"));
        CHECK(largest_error(x, z) <= 2 * largest_error(y, z) + 2 * ulp<E>(largest) + rounding * largest + cancelled);
    }
}

template <class E> void check(Mode mode, size_t B, size_t S, Sizes z, uint64_t seed,
                              Kernels kernels = Kernels::portable, size_t portions = 1) {
    INFO("mode " << int(mode) << ", B " << B << ", S " << S << ", H " << z.H << ", K " << z.K << ", D " << z.D << ", "
                 << portions << " portions");
    const Problem<E> p(mode, B, S, z, seed);
    const Split split{random_portions(p.t.size(), portions, seed + 3), portions};
    check_result(p, attend_gpu(p.t, p.qkv, p.dout, z, kernels, split), p.yardstick(), p.truth());
}

struct Deterministic { // for a scope
    GpuContext& context = *the_gpu().context;
    Deterministic() { context.deterministic = true; }
    ~Deterministic() { context.deterministic = false; }
};

// For a scope a multiprocessor counts as one with so much shared memory: the portable kernels take the tiles for it.
struct SharedMemory {
    GpuContext& context = *the_gpu().context;
    const size_t kept = context.shared_bytes;
    explicit SharedMemory(size_t bytes) { context.shared_bytes = bytes; }
    SharedMemory(const SharedMemory&) = delete;
    ~SharedMemory() { context.shared_bytes = kept; }
};
// The keys of the tiles that a launch would take now.
struct TileKeys {
    int forward, backward;
    bool operator==(const TileKeys&) const = default;
};
template <int D> TileKeys tile_keys() {
    return {attention_mma_forward_keys<D>(the_gpu()), attention_mma_backward_keys<D>(the_gpu())};
}
TileKeys tile_keys(size_t D) { return D == 128 ? tile_keys<128>() : D == 64 ? tile_keys<64>() : tile_keys<32>(); }

constexpr size_t h100 = size_t(228) << 10, a100 = size_t(164) << 10, sm_86 = size_t(100) << 10;
constexpr TileKeys most_keys{64, 128};
// Where a GPU takes others. (With heads of 64 an A100 takes those of an H100.)
struct SmallerTiles {
    size_t shared, D;
    TileKeys keys;
};
constexpr SmallerTiles smaller_tiles[] = {{a100, 128, {32, 64}}, {sm_86, 128, {32, 64}}, {sm_86, 64, {64, 64}}};

// The same bits in every run.
void check_repeats(size_t S, size_t D) {
    const Sizes z{4, 2, D};
    for (bool deterministic : {false, true}) {
        the_gpu().context->deterministic = deterministic;
        const Problem<bf16> p(Mode::anchor, 1, S, z, 61);
        const Result<bf16> a = attend_gpu(p.t, p.qkv, p.dout, z), b = attend_gpu(p.t, p.qkv, p.dout, z);
        CHECK(same_bits(a.out, b.out));
        CHECK(same_bits(a.lse, b.lse));
        const size_t ends[] = {0, z.H, z.H + 2 * z.K};
        for (int i = deterministic ? 0 : 1; i < 2; i++) { // dQ is summed in a fixed order only if asked for
            Buffer<bf16> x(p.t.size() * (ends[i + 1] - ends[i]) * z.D), y(x.count);
            part(x, a.dqkv, z, ends[i], ends[i + 1]), part(y, b.dqkv, z, ends[i], ends[i + 1]);
            CHECK(same_bits(x, y));
        }
    }
    the_gpu().context->deterministic = false;
}

constexpr Sizes heads[] = {{1, 1, 0}, {2, 2, 0}, {4, 2, 0}, {6, 2, 0}};
} // namespace

TEST_CASE("attention: tensor cores agree with the reference at all sizes, masks, heads") {
    size_t number = 0;
    for (size_t D : {32, 64, 128})
        for (size_t S : {1, 17, 63, 64, 65, 129, 200, 300, 1000})
            for (Mode mode : modes) {
                const Sizes h = heads[number % 4]; // every mode meets every number of heads
                check<bf16>(mode, 1 + number / 4 % 2, S, {h.H, h.K, D}, 100 + number);
                number++;
            }
}

TEST_CASE("attention: tensor cores, keys in portions") {
    size_t number = 0;
    for (size_t D : {32, 64, 128})
        for (size_t S : {1, 65, 200, 300})
            for (Mode mode : modes) {
                const Sizes h = heads[(number + 2) % 4];
                check<bf16>(mode, 1 + number / 2 % 2, S, {h.H, h.K, D}, 500 + number, Kernels::portable,
                            2 + number % 2);
                number++;
            }
}

TEST_CASE("attention: tensor cores, dQ in a fixed order") {
    const Deterministic scope;
    size_t number = 0;
    for (size_t D : {32, 64, 128})
        for (size_t S : {1, 65, 129, 300, 1000})
            for (Mode mode : modes) {
                const Sizes h = heads[(number + 1) % 4];
                const size_t portions = S == 129 ? 2 : 1;
                check<bf16>(mode, 1 + number / 3 % 2, S, {h.H, h.K, D}, 800 + number, Kernels::portable, portions);
                number++;
            }
}

TEST_CASE("attention: a GPU's shared memory chooses the tiles") {
    const GpuContext& context = *the_gpu().context;
    int multiprocessor = 0, block = 0;
    CUDA_CHECK(cudaDeviceGetAttribute(&multiprocessor, cudaDevAttrMaxSharedMemoryPerMultiprocessor, context.device));
    CUDA_CHECK(cudaDeviceGetAttribute(&block, cudaDevAttrMaxSharedMemoryPerBlockOptin, context.device));
    CHECK(context.shared_bytes == size_t(multiprocessor));
    CHECK(block == multiprocessor - 1024);
    for (size_t shared : {h100, a100, sm_86})
        for (size_t D : {32, 64, 128}) {
            CAPTURE(shared);
            CAPTURE(D);
            TileKeys keys = most_keys;
            for (const SmallerTiles& s : smaller_tiles)
                if (s.shared == shared && s.D == D) keys = s.keys;
            const SharedMemory scope(shared);
            CHECK(tile_keys(D) == keys);
        }
}

// 32 keys in the forward; 64 keys, half a tile of the map, and 32 queries in the backward: sizes around these.
TEST_CASE("attention: tensor cores, the tiles of GPUs with less shared memory") {
    size_t number = 0;
    for (const SmallerTiles& s : smaller_tiles) {
        if (s.shared > the_gpu().context->shared_bytes) continue; // an A100's tiles on sm_86
        const SharedMemory scope(s.shared);
        CHECK(tile_keys(s.D) == s.keys);
        CHECK(tile_keys(s.D) != most_keys);
        for (size_t S : {1, 31, 33, 64, 65, 97, 129, 193, 300})
            for (Mode mode : modes) {
                const Sizes h = heads[number % 4];
                the_gpu().context->deterministic = number % 3 == 2;
                check<bf16>(mode, 1 + number / 4 % 2, S, {h.H, h.K, s.D}, 1200 + number, Kernels::portable,
                            1 + number / 8 % 2);
                the_gpu().context->deterministic = false;
                number++;
            }
        check_repeats(700, s.D);
    }
}

TEST_CASE_TEMPLATE("attention: plain kernels agree with the reference", E, float, bf16) {
    size_t number = 0;
    for (size_t D : {2, 6, 34, 64, 80, 128, 200, 256})
        for (size_t S : {1, 17, 33, 65, 200})
            for (Mode mode : modes) {
                const Sizes h = heads[number % 4];
                check<E>(mode, 1 + number / 4 % 2, S, {h.H, h.K, D}, 2000 + number, Kernels::simt, S == 65 ? 3 : 1);
                number++;
            }
}

// Every kernel with every branch it has, at sizes that a sanitizer can follow.
TEST_CASE("attention: masked and whole tiles, portions, a fixed order (small)") {
    for (size_t D : {32, 64, 128}) {
        check<bf16>(Mode::anchor, 2, 140, {2, 1, D}, 3000 + D, Kernels::portable, 2);
        const Deterministic scope;
        check<bf16>(Mode::interleaved, 1, 260, {2, 1, D}, 3001 + D, Kernels::portable, 1);
    }
    check<float>(Mode::random, 1, 70, {2, 1, 34}, 3002, Kernels::simt, 2);
    check<bf16>(Mode::anchor, 2, 70, {2, 1, 40}, 3003, Kernels::simt, 1);
}

TEST_CASE("attention: the tiles of sm_86 (small)") {
    const SharedMemory scope(sm_86);
    for (size_t D : {64, 128}) {
        CHECK(tile_keys(D) != most_keys);
        check<bf16>(Mode::anchor, 2, 140, {2, 1, D}, 3100 + D, Kernels::portable, 2);
        {
            const Portable portable;
            check_blind_queries(100, D);
        }
        const Deterministic in_order;
        check<bf16>(Mode::full, 1, 200, {2, 1, D}, 3101 + D);
    }
}

TEST_CASE("attention: queries that see nothing give zeros, not NaN (small)") {
    const Portable scope;
    for (size_t D : {32, 64, 128, 40})
        for (bool deterministic : {false, true}) {
            INFO("deterministic " << deterministic);
            the_gpu().context->deterministic = deterministic;
            check_blind_queries(180, D);
            the_gpu().context->deterministic = false;
        }
}

TEST_CASE("attention: large scores neither overflow nor lose the softmax (small)") {
    const Sizes z{1, 1, 64}; // scores to +-1e4, whose exponentials have no float; the maximum moves far and often
    for (Mode mode : {Mode::full, Mode::anchor}) {
        Problem<bf16> p(mode, 1, 300, z, 41);
        for (size_t i = 0; i < p.t.size(); i++)
            for (size_t d = 0; d < 2 * z.D; d++)
                p.qkv[i * z.qkv() + d] = 32 * std::round(float(p.qkv[i * z.qkv() + d]));
        const Result<bf16> r = attend_gpu(p.t, p.qkv, p.dout, z);
        const Result<double> truth = p.truth();
        // Scores are integers times 1/8, exact to a half ulp of 2^15: 2^-10; O is off by that share of V, and stored in
        // bf16. A tie between keys is exact.
        CHECK(largest_error(r.out, truth.out) <= largest_value(truth.out) * 0x1p-9 + 2 * ulp<bf16>(4));
        CHECK(std::isfinite(largest_value(r.dqkv)));
    }
}

TEST_CASE("attention: the same bits in every run (small)") { check_repeats(1500, 128); }

TEST_CASE("attention: many short rows, more than one launch of the anchor's sums takes") {
    check<bf16>(Mode::anchor, 150, 9, {2, 1, 32}, 71);
    check<float>(Mode::anchor, 150, 9, {2, 2, 6}, 72);
}

// Long sums: 65536 keys, so that tiles, ranges and the online softmax go through thousands of steps.
TEST_CASE("attention: tensor cores against the plain kernels over 65536 tokens (large)") {
    const Sizes z{2, 1, 128};
    Tokens t{{}, {}, {0, 65536}};
    for (int i = 0, doc = 0; i < 65536; i++) { // the anchor, a short, a long document, one that comes back
        if (i == 1 || i == 3000 || i == 40000 || i == 60001) doc = i == 60001 ? 1 : doc + 1;
        t.index.push_back(i), t.doc.push_back(doc);
    }
    const Problem<bf16> p(t, z, 81);
    const Result<bf16> r = attend_gpu(p.t, p.qkv, p.dout, z);
    const Result<bf16> yardstick = attend_gpu(p.t, p.qkv, p.dout, z, Kernels::simt);
    const Result<float> exact = attend_gpu(p.t, converted<float>(p.qkv), converted<float>(p.dout), z);
    const Result<double> truth{converted<double>(exact.out), converted<double>(exact.dqkv),
                               converted<double>(exact.lse)};
    check_result(p, r, yardstick, truth);
}

// Offsets beyond 2^31 elements, in q, dO, O and dQ: the last document of the last row, which is a problem of its own.
TEST_CASE("attention: more than 2^31 elements (large)") {
    const Portable scope;
    const Gpu gpu = the_gpu();
    const Sizes z{264, 4, 128};
    const auto [H, K, D] = z;
    const int T = 65600, length = 200;
    Tokens t{{}, {}, {0, T}};
    for (int i = 0; i < T; i++) t.index.push_back(i), t.doc.push_back(1 + i / length);
    const size_t width = z.qkv(), elements = size_t(T) * H * D;
    CHECK(elements > size_t(1) << 31);
    LargeBuffer<bf16> qkv(T * width, 91, 2), dout(elements, 92), out(elements), dqkv(T * width);
    LargeBuffer<float> lse(H * T), delta(H * T), dq(elements);
    {
        const MapOnGpu map(t, t, attention_tiles<bf16>(gpu, D));
        attention_forward_launch<bf16>(gpu,
                                       {qkv, qkv + H * D, nullptr, width, width, map.q.data, map.k.data, map.forward(),
                                        true, true, out, lse, nullptr, T, T, int(H), int(K), int(D)});
        attention_backward_begin<bf16>(gpu, delta, dq, nullptr, dout, out, lse, qkv, width, nullptr, t, H, K, D);
        attention_backward_launch<bf16>(
            gpu, {qkv, qkv + H * D, width,        width, dout,    lse, delta, map.q.data, map.k.data, map.backward(),
                  dq,  nullptr,     dqkv + H * D, width, nullptr, T,   T,     int(H),     int(K),     int(D)});
        attention_store_dq<bf16>(gpu, dqkv, width, dq, T, H, D);
        device_wait(gpu);
    }
    Problem<bf16> p(Mode::intra, 1, length, z, 95);
    std::fill(p.t.doc.begin(), p.t.doc.end(), 1);
    auto fetch = [&](auto& to, const auto* from, size_t row) {
        CUDA_CHECK(cudaMemcpy(to.data(), from + (T - length) * row, to.count * sizeof(to[0]), cudaMemcpyDeviceToHost));
    };
    Result<bf16> r{Buffer<bf16>(length * H * D), Buffer<bf16>(length * width), Buffer<float>(H * length)};
    fetch(p.qkv, qkv.data(), width), fetch(p.dout, dout.data(), H * D);
    fetch(r.out, out.data(), H * D), fetch(r.dqkv, dqkv.data(), width);
    for (size_t h = 0; h < H; h++)
        CUDA_CHECK(
            cudaMemcpy(r.lse.data() + h * length, lse + (h + 1) * T - length, length * 4, cudaMemcpyDeviceToHost));
    check_result(p, r, p.yardstick(), p.truth());
}
