// The Hopper kernels of attention over long rows, against the portable ones, and what both share, the anchor's part,
// against double: 32-bit indices, counters, many steps.
#include "../attention_anchor.cuh"
#include "gpu_attention.h"
#include "large.h"

namespace {
// Block (x, y): the rows [x tokens, (x + 1) tokens) of the columns [y D, (y + 1) D).
__global__ void difference_kernel(double* sums, const bf16* a, const bf16* b, size_t tokens, size_t width, size_t D) {
    double difference = 0, size = 0;
    for (size_t i = threadIdx.x; i < tokens * D; i += blockDim.x) {
        const size_t at = (blockIdx.x * tokens + i / D) * width + blockIdx.y * D + i % D;
        const double x = float(a[at]), y = float(b[at]);
        difference += (x - y) * (x - y), size += y * y;
    }
    double* to = sums + 2 * (size_t(blockIdx.y) * gridDim.x + blockIdx.x);
    atomicAdd(to, difference), atomicAdd(to + 1, size);
}
// The largest relative difference of `tokens` tokens of a head, by the root of the sum of squares.
double largest_difference(const bf16* a, const bf16* b, size_t T, size_t width, size_t D, size_t tokens) {
    const dim3 blocks(unsigned(T / tokens), unsigned(width / D));
    DeviceBuffer<double> sums(size_t(2) * blocks.x * blocks.y);
    fill_zero(the_gpu(), sums.data(), sums.count * sizeof(double));
    device_wait(the_gpu());
    difference_kernel<<<blocks, 256>>>(sums.data(), a, b, tokens, width, D);
    const Buffer<double> host = sums.host();
    double largest = 0;
    for (size_t i = 0; i < host.count; i += 2) {
        const double relative = std::sqrt(host[i] / host[i + 1]);
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

// By heads and blocks of 1024 tokens. Each kernel rounds P, dS and its result to bf16, by 2^-9 at most: six roundings
// lie between them. LSE has those of fp32 alone, once in each.
void check_against(LargeResult& ours, LargeResult& portable, const LargeProblem& p) {
    const auto [H, K, D] = p.z;
    const double bound = 6 * 0x1p-9;
    CHECK(largest_difference(ours.out, portable.out, p.T, H * D, D, 1024) < bound);
    CHECK(largest_difference(ours.dqkv, portable.dqkv, p.T, p.W, D, 1024) < bound);
    const Buffer<float> a = ours.lse.part(0, ours.lse.count), b = portable.lse.part(0, portable.lse.count);
    CHECK(largest_error(a, b) <= 2 * (score_rounding(p.T, D) + ulp<float>(largest_value(b))));
    const Buffer<float> x = ours.danchor.part(0, p.z.kv()), y = portable.danchor.part(0, p.z.kv());
    double difference = 0, size = 0;
    for (size_t i = 0; i < x.count; i++)
        difference += std::pow(double(x[i]) - double(y[i]), 2), size += std::pow(double(y[i]), 2);
    CHECK(std::sqrt(difference) <= bound * std::sqrt(size));
    CHECK((size > 0) == anchored(p.t));
}

// Columns [first, first + n) of rows of `width`, on the host.
struct Columns {
    size_t n;
    std::vector<bf16> x;
    Columns(const bf16* from, size_t T, size_t width, size_t first, size_t n) : n(n), x(T * n) {
        CUDA_CHECK(cudaMemcpy2D(x.data(), n * sizeof(bf16), from + first, width * sizeof(bf16), n * sizeof(bf16), T,
                                cudaMemcpyDeviceToHost));
    }
    const bf16* row(size_t t) const { return x.data() + t * n; }
};
// What the kernels against each other do not show, for they share it: the anchor's part, of the last KV head and its
// query heads, in double from the GPU's own O and LSE. dK0 and dV0 are sums over all queries, in fp32. dQ is of the
// first two tokens of late documents, which see the anchor and one or two keys: a missing anchor would be most of it.
void check_anchor(LargeResult& r, LargeProblem& p) {
    const auto [H, K, D] = p.z;
    const size_t T = p.T, W = p.W, group = H / K;
    const double scale = 1 / std::sqrt(double(D));
    const Columns q(p.qkv, T, W, (H - group) * D, group * D), k(p.qkv, T, W, (H + K - 1) * D, D);
    const Columns v(p.qkv, T, W, (H + 2 * K - 1) * D, D), dq(r.dqkv, T, W, (H - group) * D, group * D);
    const Columns out(r.out, T, H * D, (H - group) * D, group * D), dout(p.dout, T, H * D, (H - group) * D, group * D);
    const Buffer<float> lse = r.lse.part((H - group) * T, group * T);
    const Buffer<float> dk0 = r.danchor.part((K - 1) * D, D), dv0 = r.danchor.part((2 * K - 1) * D, D);
    auto dot = [D](const bf16* a, const bf16* b, bool absolute = false) {
        double sum = 0;
        for (size_t d = 0; d < D; d++)
            sum += absolute ? std::fabs(double(a[d]) * double(b[d])) : double(a[d]) * double(b[d]);
        return sum;
    };
    // Query t of head h and key j: P, dS / sqrt(D), and this with all terms of dP and delta taken as positive.
    struct Seen {
        double weight, ds, most;
    };
    auto seen = [&](size_t t, size_t h, size_t j) {
        const bf16 *di = dout.row(t) + h * D, *oi = out.row(t) + h * D;
        const double weight = std::exp(scale * dot(q.row(t) + h * D, k.row(j)) - lse[h * T + t]);
        return Seen{weight, scale * weight * (dot(di, v.row(j)) - dot(di, oi)),
                    scale * weight * (dot(di, v.row(j), true) + dot(di, oi, true))};
    };
    std::vector<double> sum(2 * D), size(2 * D); // dK0, then dV0; size: of the terms' absolute values
#pragma omp parallel
    {
        std::vector<double> mine(2 * D), terms(2 * D);
#pragma omp for
        for (size_t i = 0; i < T * group; i++) {
            const size_t t = i / group, h = i % group;
            const bf16 *qi = q.row(t) + h * D, *di = dout.row(t) + h * D;
            const auto [weight, ds, most] = seen(t, h, 0);
            for (size_t d = 0; d < D; d++) {
                mine[d] += ds * double(qi[d]), terms[d] += most * std::fabs(double(qi[d]));
                mine[D + d] += weight * double(di[d]), terms[D + d] += weight * std::fabs(double(di[d]));
            }
        }
#pragma omp critical
        for (size_t d = 0; d < 2 * D; d++) sum[d] += mine[d], size[d] += terms[d];
    }
    bool right = true;
    for (size_t d = 0; d < 2 * D; d++)
        right &= std::fabs(double(d < D ? dk0[d] : dv0[d - D]) - sum[d]) <= score_rounding(T, D) * size[d];
    CHECK(right);

    size_t found = 0;
    for (size_t i = T - 1; i > 1 && found < 8; i--) {
        if (p.t.doc[i] == p.t.doc[i - 1]) continue;
        found++;
        for (size_t t : {i, std::min(i + 1, T - 1)})
            for (size_t h = 0; h < group; h++) {
                std::vector<double> exact(D), terms(D);
                double weights = 0;
                for (size_t j = 0; j <= t; j++) {
                    if (!visible(p.t.index[t], p.t.doc[t], p.t.index[j], p.t.doc[j])) continue;
                    const auto [weight, ds, most] = seen(t, h, j);
                    for (size_t d = 0; d < D; d++)
                        exact[d] += ds * double(k.row(j)[d]), terms[d] += most * std::fabs(double(k.row(j)[d]));
                    weights += weight;
                }
                CHECK(std::fabs(weights - 1) <= 2 * score_rounding(T, D)); // LSE counts the anchor
                double error = 0, bound = 0;
                for (size_t d = 0; d < D; d++)
                    error += std::pow(double(dq.row(t)[h * D + d]) - exact[d], 2), bound += terms[d] * terms[d];
                CHECK(std::sqrt(error) <= 3 * 0x1p-9 * std::sqrt(bound)); // dS, O and the result are rounded
            }
    }
}
void check_against_portable(const Tokens& t, Sizes z, size_t cut) {
    LargeProblem p(t, z);
    LargeResult portable(p, Large::portable);
    for (size_t at : {size_t(0), cut}) {
        INFO("T " << t.size() << ", H " << z.H << ", D " << z.D << ", second portion from " << at);
        LargeResult ours(p, Large::any_order, at);
        check_against(ours, portable, p);
        if (anchored(t) && at == 0) check_anchor(ours, p);
    }
    INFO("T " << t.size() << ", H " << z.H << ", D " << z.D << ", with turns");
    LargeResult ours(p, Large::turns);
    check_against(ours, portable, p);
    LargeResult again(p, Large::turns);
    CHECK(largest_difference(again.out, ours.out, p.T, z.H * z.D, z.D, 1024) == 0);
    CHECK(largest_difference(again.dqkv, ours.dqkv, p.T, p.W, z.D, 1024) == 0);
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
