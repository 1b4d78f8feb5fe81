// The Hopper kernels of attention over long rows, against the portable ones: 32-bit indices, counters, many steps.
#include "../attention_anchor.cuh"
#include "gpu_attention.h"
#include "large.h"

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
enum class Large { portable, any_order, turns };
struct LargeResult {
    LargeBuffer<bf16> out, dqkv;
    LargeBuffer<float> lse, danchor;
    LargeResult(LargeProblem& p, Large kind, size_t cut = 0)
        : out(p.dout.count), dqkv(p.qkv.count), lse(p.z.H * p.T), danchor(p.z.kv()) {
        const Gpu gpu = the_gpu();
        const auto [H, K, D] = p.z;
        const size_t T = p.T, W = p.W, kv = p.z.kv(), portions = cut ? 2 : 1;
        const size_t ends[] = {0, cut ? cut : T, T};
        gpu.context->portable_attention = kind == Large::portable, gpu.context->deterministic = kind == Large::turns;
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
        gpu.context->portable_attention = gpu.context->deterministic = false;
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
    LargeResult portable(p, Large::portable);
    for (size_t at : {size_t(0), cut}) {
        INFO("T " << t.size() << ", H " << z.H << ", D " << z.D << ", second portion from " << at);
        LargeResult ours(p, Large::any_order, at);
        check_against(ours, portable, p);
    }
    INFO("T " << t.size() << ", H " << z.H << ", D " << z.D << ", with turns");
    LargeResult ours(p, Large::turns);
    check_against(ours, portable, p);
    LargeResult again(p, Large::turns);
    CHECK(largest_difference(again.out, ours.out, p.T, z.H * z.D, 1024) == 0);
    CHECK(largest_difference(again.dqkv, ours.dqkv, p.T, p.W, 1024) == 0);
}
} // namespace

TEST_CASE("Hopper attention over 65536 and 262144 tokens in every mode (large)") {
    if (the_gpu().context->compute != 90) return;
    for (size_t T : {65536, 262144})
        for (size_t D : {128, 64})
            for (Mode mode : modes) {
                INFO("mode " << int(mode));
                check_against_portable(make_tokens(mode, 1, T, 84, 3000), {2, 1, D}, T * 5 / 8 + 17);
            }
}

// Offsets beyond 2^31 elements in every array, in one portion and with O, dK and dV in fp32.
TEST_CASE("Hopper attention: more than 2^31 elements (large)") {
    if (the_gpu().context->compute != 90) return;
    const Sizes z{68, 34, 128};
    const size_t T = 262144, cut = T - 4096;
    CHECK(T * z.H * z.D > size_t(1) << 31);
    CHECK(cut * z.kv() > size_t(1) << 31);
    Tokens t{{}, {}, {0, int32_t(T)}};
    for (size_t i = 0; i < T; i++) t.index.push_back(int32_t(i)), t.doc.push_back(i == 0 ? 0 : int32_t(1 + i / 9999));
    check_against_portable(t, z, cut);
}
