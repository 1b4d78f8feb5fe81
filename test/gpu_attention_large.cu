// Attention over long rows and beyond 2^31 elements: 32-bit indices, counters, many steps. The Hopper kernels against
// the portable ones; what both share, the anchor's part, against double, and so sampled rows of all kernels.
#include "../attention_anchor.cuh"
#include "gpu_attention.h"
#include "large.h"
#include <array>

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
template <class E> struct LargeProblem {
    const Tokens t;
    const Sizes z;
    const size_t T = t.size(), W = z.qkv();
    LargeBuffer<E> qkv, dout, anchor;
    LargeProblem(const Tokens& t, Sizes z) : t(t), z(z), qkv(T * W, 1, 2), dout(T * z.H * z.D, 2), anchor(z.kv()) {
        copy_on_device(the_gpu(), anchor, qkv + z.H * z.D, z.kv() * sizeof(E));
    }
};

// dK and dV (count / width tokens of `width`) to rows of dqkv; danchor (width) is the first token's, unless null.
template <class E> __global__ void store_dkv_kernel(E* to, size_t stride, const float* from, const float* danchor,
                                                    size_t width, size_t count) {
    for (size_t i = blockIdx.x * size_t(blockDim.x) + threadIdx.x; i < count; i += size_t(gridDim.x) * blockDim.x)
        to[i / width * stride + i % width] = E(from[i] + (danchor && i < width ? danchor[i] : 0));
}

// Forward and backward, by the kernels for any GPU, also with dQ in a fixed order, or by those for this one, also with
// turns. With a cut the keys from it on are a second portion: O, dK and dV then pass through fp32.
enum class Large { portable, portable_in_order, any_order, turns };
bool is_portable(Large kind) { return kind == Large::portable || kind == Large::portable_in_order; }
template <class E> struct LargeResult {
    LargeBuffer<E> out, dqkv;
    LargeBuffer<float> lse, danchor;
    LargeResult(LargeProblem<E>& p, Large kind, size_t cut = 0)
        : out(p.dout.count), dqkv(p.qkv.count), lse(p.z.H * p.T), danchor(p.z.kv()) {
        const Gpu gpu = the_gpu();
        const auto [H, K, D] = p.z;
        const size_t T = p.T, W = p.W, kv = p.z.kv(), portions = cut ? 2 : 1;
        const size_t ends[] = {0, cut ? cut : T, T};
        gpu.context->portable_attention = is_portable(kind);
        gpu.context->deterministic = kind == Large::turns || kind == Large::portable_in_order;
        LargeBuffer<float> delta(H * T), dq(T * H * D), state(cut ? T * H * D : 0), dkv(cut ? T * kv : 0);
        const E* k0 = anchored(p.t) ? p.anchor.data() : nullptr;
        float* dk0 = k0 ? danchor.data() : nullptr;
        fill_zero(gpu, danchor, danchor.count * sizeof(float));
        fill_zero(gpu, dkv, dkv.count * sizeof(float));
        std::vector<std::unique_ptr<MapOnGpu>> map;
        for (size_t n = 0; n < portions; n++) {
            const Tokens keys = subset(p.t, [&](size_t i) { return ends[n] <= i && i < ends[n + 1]; });
            map.push_back(std::make_unique<MapOnGpu>(p.t, keys, attention_tiles<E>(gpu, D)));
        }
        auto keys_of = [&](size_t n) { return p.qkv + H * D + ends[n] * W; };
        for (size_t n = 0; n < portions; n++)
            attention_forward_launch<E>(gpu, {p.qkv, keys_of(n), k0, W, W, map[n]->q.data, map[n]->k.data,
                                              map[n]->forward(), n == 0, n + 1 == portions, out, lse, state, int(T),
                                              int(ends[n + 1] - ends[n]), int(H), int(K), int(D)});
        attention_backward_begin<E>(gpu, delta, dq, dk0, p.dout, out, lse, p.qkv, W, k0, p.t, H, K, D);
        for (size_t n = 0; n < portions; n++)
            attention_backward_launch<E>(gpu, {p.qkv,
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
        attention_store_dq<E>(gpu, dqkv, W, dq, T, H, D);
        if (cut) store_dkv_kernel<E><<<4096, 256, 0, gpu.stream>>>(dqkv + H * D, W, dkv, dk0, kv, T * kv);
        device_wait(gpu);
        gpu.context->portable_attention = gpu.context->deterministic = false;
    }
};

// By heads and blocks of 1024 tokens. Each kernel rounds P, dS and its result to bf16, by 2^-9 at most: six roundings
// lie between them. LSE has those of fp32 alone, once in each.
void check_against(LargeResult<bf16>& ours, LargeResult<bf16>& portable, const LargeProblem<bf16>& p) {
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
template <class E> struct Columns {
    size_t n;
    std::vector<E> x;
    Columns(const E* from, size_t T, size_t width, size_t first, size_t n) : n(n), x(T * n) {
        CUDA_CHECK(cudaMemcpy2D(x.data(), n * sizeof(E), from + first, width * sizeof(E), n * sizeof(E), T,
                                cudaMemcpyDeviceToHost));
    }
    const E* row(size_t t) const { return x.data() + t * n; }
};
// What the kernels against each other do not show, for they share it: the anchor's part, of the last KV head and its
// query heads, in double from the GPU's own O and LSE. dK0 and dV0 are sums over all queries, in fp32. dQ is of the
// first two tokens of late documents, which see the anchor and one or two keys: a missing anchor would be most of it.
void check_anchor(LargeResult<bf16>& r, LargeProblem<bf16>& p) {
    const auto [H, K, D] = p.z;
    const size_t T = p.T, W = p.W, group = H / K;
    const double scale = 1 / std::sqrt(double(D));
    const Columns<bf16> q(p.qkv, T, W, (H - group) * D, group * D), k(p.qkv, T, W, (H + K - 1) * D, D);
    const Columns<bf16> v(p.qkv, T, W, (H + 2 * K - 1) * D, D), dq(r.dqkv, T, W, (H - group) * D, group * D);
    const Columns<bf16> out(r.out, T, H * D, (H - group) * D, group * D),
        dout(p.dout, T, H * D, (H - group) * D, group * D);
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
    LargeProblem<bf16> p(t, z);
    LargeResult<bf16> portable(p, Large::portable);
    for (size_t at : {size_t(0), cut}) {
        INFO("T " << t.size() << ", H " << z.H << ", D " << z.D << ", second portion from " << at);
        LargeResult<bf16> ours(p, Large::any_order, at);
        check_against(ours, portable, p);
        if (anchored(t) && at == 0) check_anchor(ours, p);
    }
    INFO("T " << t.size() << ", H " << z.H << ", D " << z.D << ", with turns");
    LargeResult<bf16> ours(p, Large::turns);
    check_against(ours, portable, p);
    LargeResult<bf16> again(p, Large::turns);
    CHECK(largest_difference(again.out, ours.out, p.T, z.H * z.D, z.D, 1024) == 0);
    CHECK(largest_difference(again.dqkv, ours.dqkv, p.T, p.W, z.D, 1024) == 0);
}

// Rows of the definition are sums of rounded terms. In the Euclidean norm of a row, so that no larger row hides it:
// `rounded` and the result may err by a half ulp of E in each P or dS and in what is stored, and scores, P and dP by
// fp32's roundings of `terms`, the sums of absolute values.
template <class E> struct RowSum {
    std::vector<double> exact, rounded, terms;
    explicit RowSum(size_t D) : exact(D), rounded(D), terms(D) {}
    static double stored(double x) { return double(E(float(x))); }
    void add(double weight, const E* x, double term, double scale = 1) {
        const double operand = scale * stored(weight);
#pragma omp simd
        for (size_t d = 0; d < exact.size(); d++) {
            exact[d] += scale * weight * double(x[d]), rounded[d] += operand * double(x[d]);
            terms[d] += scale * term * std::fabs(double(x[d]));
        }
    }
    // The error of `result`, of a sum over n tokens, over what is allowed.
    double error(const E* result, size_t n, double divisor = 1) const {
        double sums[4] = {}; // squares: of both errors, the exact values, the terms
        for (size_t d = 0; d < exact.size(); d++) {
            const double x = exact[d] / divisor;
            const double all[] = {double(result[d]) - x, stored(rounded[d] / divisor) - x, x, terms[d] / divisor};
            for (int i = 0; i < 4; i++) sums[i] += all[i] * all[i];
        }
        constexpr double half_ulp = std::is_same_v<E, float> ? 0x1p-24 : 0x1p-9;
        return std::sqrt(sums[0]) / (2 * std::sqrt(sums[1]) + 2 * half_ulp * std::sqrt(sums[2]) +
                                     2 * score_rounding(n, exact.size()) * std::sqrt(sums[3]));
    }
};

// A document's tokens, from 1, with all heads of one KV head, and the anchor as key 0.
template <class E> struct LargeDocument {
    const size_t D, group, begin, n;
    const Columns<E> k0, v0, q, k, v, dout, out, dq, dk, dv;
    std::vector<Buffer<float>> lse;
    LargeDocument(LargeProblem<E>& p, LargeResult<E>& r, size_t kv_head, size_t begin, size_t n)
        : LargeDocument(p.qkv, p.dout, r.out, r.dqkv, p.z, p.W, kv_head, begin, n) {
        for (size_t h = 0; h < group; h++) lse.push_back(r.lse.part((kv_head * group + h) * p.T + begin, n));
    }
    LargeDocument(const E* qkv, const E* dout, const E* out, const E* dqkv, Sizes z, size_t W, size_t kv_head,
                  size_t begin, size_t n)
        : D(z.D), group(z.H / z.K), begin(begin), n(n), k0(qkv, 1, W, (z.H + kv_head) * D, D),
          v0(qkv, 1, W, (z.H + z.K + kv_head) * D, D), q(qkv + begin * W, n, W, kv_head * group * D, group * D),
          k(qkv + begin * W, n, W, (z.H + kv_head) * D, D), v(qkv + begin * W, n, W, (z.H + z.K + kv_head) * D, D),
          dout(dout + begin * z.H * D, n, z.H * D, kv_head * group * D, group * D),
          out(out + begin * z.H * D, n, z.H * D, kv_head * group * D, group * D),
          dq(dqkv + begin * W, n, W, kv_head * group * D, group * D),
          dk(dqkv + begin * W, n, W, (z.H + kv_head) * D, D), dv(dqkv + begin * W, n, W, (z.H + z.K + kv_head) * D, D) {
    }
    const E* key(size_t j) const { return j ? k.row(j - 1) : k0.row(0); }
    const E* value(size_t j) const { return j ? v.row(j - 1) : v0.row(0); }
    double scale() const { return 1 / std::sqrt(double(D)); }
    struct Dot {
        double sum, terms; // terms: of absolute values
    };
    Dot dot(const E* a, const E* b) const {
        double sum = 0, terms = 0;
#pragma omp simd reduction(+ : sum, terms)
        for (size_t d = 0; d < D; d++) {
            const double product = double(a[d]) * double(b[d]);
            sum += product, terms += std::fabs(product);
        }
        return {sum, terms};
    }

    // Errors over what is allowed, of O, LSE and dQ of token i and head h of the group. The gradient is that of the
    // GPU's own O and LSE, which are samples themselves.
    std::array<double, 3> query(size_t i, size_t h) const {
        const E *qi = q.row(i - 1) + h * D, *oi = out.row(i - 1) + h * D, *di = dout.row(i - 1) + h * D;
        const double lse_gpu = lse[h][i - 1];
        std::vector<double> s(i + 1);
        for (size_t j = 0; j <= i; j++) s[j] = scale() * dot(qi, key(j)).sum;
        const double top = *std::max_element(s.begin(), s.end());
        const Dot delta = dot(di, oi);
        double sum = 0;
        RowSum<E> o(D), gradient(D);
        for (size_t j = 0; j <= i; j++) {
            const double p = std::exp(s[j] - top), weight = std::exp(s[j] - lse_gpu);
            const Dot dp = dot(di, value(j));
            sum += p;
            o.add(p, value(j), p);
            gradient.add(weight * (dp.sum - delta.sum), key(j), weight * (dp.terms + delta.terms), scale());
        }
        const double exact = top + std::log(sum), most = 2 * (score_rounding(i, D) + ulp<float>(exact));
        return {o.error(oi, i, sum), std::fabs(lse_gpu - exact) / most, gradient.error(dq.row(i - 1) + h * D, i)};
    }
    // The same of dK and dV of token j.
    std::array<double, 2> key_gradients(size_t j) const {
        RowSum<E> to_key(D), to_value(D);
        for (size_t h = 0; h < group; h++)
            for (size_t i = j; i <= n; i++) {
                const E *qi = q.row(i - 1) + h * D, *oi = out.row(i - 1) + h * D, *di = dout.row(i - 1) + h * D;
                const double weight = std::exp(scale() * dot(qi, key(j)).sum - lse[h][i - 1]);
                const Dot dp = dot(di, value(j)), delta = dot(di, oi);
                to_key.add(weight * (dp.sum - delta.sum), qi, weight * (dp.terms + delta.terms), scale());
                to_value.add(weight, di, weight);
            }
        const size_t terms = group * (n - j + 1);
        return {to_key.error(dk.row(j - 1), terms), to_value.error(dv.row(j - 1), terms)};
    }
};

// Sampled tokens of the documents at which q's and qkv's elements pass 2^31, of the first and of the last one, with the
// first and the last KV head, and the first and the last head of each. A row without an anchor has no token 0 to see.
template <class E> void check_rows(LargeProblem<E>& p, LargeResult<E>& r) {
    CHECK(anchored(p.t));
    const size_t H = p.z.H, K = p.z.K, edge = size_t(1) << 31;
    double worst[5] = {}; // of O, LSE, dQ, dK, dV
    auto take = [&](int tensor, double error) { worst[tensor] = error <= worst[tensor] ? worst[tensor] : error; };
    for (size_t token : {size_t(1), edge / p.W, edge / (H * p.z.D), p.T - 1})
        for (size_t kv_head : {size_t(0), K - 1}) {
            size_t begin = token, end = token + 1;
            while (p.t.doc[begin - 1] == p.t.doc[token]) begin--;
            while (end < p.T && p.t.doc[end] == p.t.doc[token]) end++;
            const LargeDocument<E> document(p, r, kv_head, begin, end - begin);
            const size_t n = document.n;
            std::vector<size_t> places = {1, 2, n / 2, n, token - begin + 1};
            for (size_t i = 0; i < 5; i++) places.push_back(1 + size_t(hash64(token, i) % n));
            std::vector<std::array<double, 3>> first(places.size()), last(places.size());
            std::vector<std::array<double, 2>> keys(places.size());
#pragma omp parallel for schedule(dynamic, 1)
            for (size_t i = 0; i < 3 * places.size(); i++) {
                const size_t place = places[i / 3];
                if (i % 3 == 0) first[i / 3] = document.query(place, 0);
                else if (i % 3 == 1) last[i / 3] = document.query(place, document.group - 1);
                else keys[i / 3] = document.key_gradients(place);
            }
            for (size_t i = 0; i < places.size(); i++) {
                for (int x = 0; x < 3; x++) take(x, first[i][x]), take(x, last[i][x]);
                for (int x = 0; x < 2; x++) take(3 + x, keys[i][x]);
            }
        }
    const std::string names[] = {"O", "LSE", "dQ", "dK", "dV"};
    for (int x = 0; x < 5; x++) {
        INFO(names[x]);
        CHECK(worst[x] > 0);
        CHECK(worst[x] <= 1);
    }
}

// Documents of `length` tokens behind an anchor.
Tokens anchored_documents(size_t T, size_t length) {
    Tokens t{{}, {}, {0, int32_t(T)}};
    for (size_t i = 0; i < T; i++) t.index.push_back(int32_t(i)), t.doc.push_back(i == 0 ? 0 : int32_t(1 + i / length));
    return t;
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
    check_against_portable(anchored_documents(T, 9999), z, cut);
}

TEST_CASE("attention: sampled rows against double, beyond 2^31 elements (large)") {
    LargeProblem<bf16> p(anchored_documents(262144, 9999), {68, 34, 128});
    CHECK(p.dout.count > size_t(1) << 31);
    for (Large kind : {Large::portable, Large::portable_in_order, Large::any_order, Large::turns}) {
        if (!is_portable(kind) && the_gpu().context->compute != 90) continue;
        INFO("kind " << int(kind));
        LargeResult<bf16> r(p, kind);
        check_rows(p, r);
    }
}
TEST_CASE("attention: sampled rows of the plain kernels in float against double, beyond 2^31 elements (large)") {
    LargeProblem<float> p(anchored_documents(65600, 333), {264, 4, 128});
    CHECK(p.dout.count > size_t(1) << 31);
    LargeResult<float> r(p, Large::portable);
    check_rows(p, r);
}
