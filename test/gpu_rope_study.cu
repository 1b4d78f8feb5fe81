// The deviation experiment's kernels on the GPU against the CPU in float and double.
#include "gpu.h"
#include "rope_study.cuh"

namespace {
struct Size {
    size_t T, H, K, D;
};
// One token, a tile less one, a tile, tiles and a part of one; grouped heads; head sizes beside the chunks of 16.
constexpr Size sizes[] = {{1, 1, 1, 2}, {63, 2, 1, 18}, {64, 4, 4, 64}, {150, 4, 2, 128}, {257, 3, 1, 40}};

Buffer<float> rounded_once(const Buffer<float>& x) {
    Buffer<float> y(x.count);
    for (size_t i = 0; i < x.count; i++) y[i] = study_rounded(x[i]);
    return y;
}

// What both devices make of the same two runs.
template <class Dev, class A> struct Sums { Buffer<A> lse, columns, first; };
template <class A> Sums<Cpu, A> sums_on_cpu(const Buffer<A>& a, const Buffer<A>& b, const Rounding& r, const Size& n) {
    Sums<Cpu, A> s{Buffer<A>(n.H * n.T), Buffer<A>(n.H * column_sums * n.T), Buffer<A>(n.H * n.T)};
    Buffer<A> lse(n.H * n.T);
    study_lse(Cpu(), lse.data(), b.data(), r, n.T, n.H, n.K, n.D);
    study_lse(Cpu(), s.lse.data(), a.data(), r, n.T, n.H, n.K, n.D);
    study_columns(Cpu(), s.columns.data(), a.data(), s.lse.data(), b.data(), lse.data(), r, n.T, n.H, n.K, n.D);
    study_first(Cpu(), s.first.data(), a.data(), r, n.T, n.H, n.K, n.D);
    return s;
}
Sums<Gpu, float> sums_on_gpu(const Buffer<float>& a, const Buffer<float>& b, const Rounding& r, const Size& n) {
    DeviceBuffer<float> qkv1(a), qkv2(b), lse1(n.H * n.T), lse2(n.H * n.T), first(n.H * n.T);
    DeviceBuffer<float> columns(n.H * column_sums * n.T);
    study_lse(the_gpu(), lse1.data(), qkv1.data(), r, n.T, n.H, n.K, n.D);
    study_lse(the_gpu(), lse2.data(), qkv2.data(), r, n.T, n.H, n.K, n.D);
    study_columns(the_gpu(), columns.data(), qkv1.data(), lse1.data(), qkv2.data(), lse2.data(), r, n.T, n.H, n.K, n.D);
    study_first(the_gpu(), first.data(), qkv1.data(), r, n.T, n.H, n.K, n.D);
    return {lse1.host(), columns.host(), first.host()};
}

// One of the five sums by itself: they differ in scale.
template <class A> Buffer<A> one_sum(const Buffer<A>& columns, const Size& n, size_t sum) {
    Buffer<A> out(n.H * n.T);
    for (size_t h = 0; h < n.H; h++)
        std::copy_n(columns.data() + (h * column_sums + sum) * n.T, n.T, out.data() + h * n.T);
    return out;
}
} // namespace

TEST_CASE("the experiment's column sums on the GPU follow double as the CPU's do (small)") {
    for (const Size& n : sizes)
        for (bool round_logits : {false, true}) {
            CAPTURE(n.T);
            CAPTURE(n.D);
            CAPTURE(round_logits);
            Rounding r;
            r.logits = round_logits ? Type::bf16 : Type::f32;
            const size_t count = n.T * (n.H + 2 * n.K) * n.D;
            Buffer<float> a(count, 31), b(count);
            for (size_t i = 0; i < count; i++) b[i] = a[i] + float(0.1 * hash_normal(32, i));
            // Quarters of small integers: their products are exact in any order, so that all round the same logits.
            for (Buffer<float>* x : {&a, &b})
                for (size_t i = 0; i < count && round_logits; i++) (*x)[i] = std::round(4 * (*x)[i]) / 4;
            const Sums<Cpu, float> cpu = sums_on_cpu(a, b, r, n);
            const Sums<Cpu, double> truth = sums_on_cpu(converted<double>(a), converted<double>(b), r, n);
            const Sums<Gpu, float> gpu = sums_on_gpu(a, b, r, n);
            check_2x(gpu.lse, cpu.lse, truth.lse);
            check_2x(gpu.first, cpu.first, truth.first);
            for (size_t s = 0; s < column_sums; s++) {
                CAPTURE(s);
                check_2x(one_sum(gpu.columns, n, s), one_sum(cpu.columns, n, s), one_sum(truth.columns, n, s));
            }
            // The same bits again: no sum depends on which block comes first.
            CHECK(largest_error(sums_on_gpu(a, b, r, n).columns, gpu.columns) == 0);
        }
}

TEST_CASE("attention with P rounded alone: the GPU errs as the CPU does (small)") {
    for (const Size& n : sizes) {
        CAPTURE(n.T);
        CAPTURE(n.D);
        const size_t all = n.H + 2 * n.K;
        const Buffer<float> qkv(n.T * all * n.D, 35);
        Buffer<float> cpu(n.T * n.H * n.D);
        Buffer<double> lse(n.H * n.T), truth(cpu.count);
        const Buffer<double> exact = converted<double>(qkv);
        study_lse(Cpu(), lse.data(), exact.data(), {}, n.T, n.H, n.K, n.D);
        truth.fill(0);
        for (size_t i = 0; i < n.T; i++)
            for (size_t h = 0; h < n.H; h++)
                for (size_t j = 0; j <= i; j++) {
                    const double *q = exact.data() + (i * all + h) * n.D, *token = exact.data() + j * all * n.D;
                    const double *k = token + (n.H + h * n.K / n.H) * n.D, *v = k + n.K * n.D;
                    double dot = 0;
                    for (size_t d = 0; d < n.D; d++) dot += q[d] * k[d];
                    const double p = std::exp(dot / std::sqrt(double(n.D)) - lse[h * n.T + i]);
                    for (size_t d = 0; d < n.D; d++) truth[(i * n.H + h) * n.D + d] += p * v[d];
                }
        study_attention(Cpu(), cpu.data(), qkv.data(), n.T, n.H, n.K, n.D);
        DeviceBuffer<float> device_qkv(qkv), gpu(cpu.count);
        study_attention(the_gpu(), gpu.data(), device_qkv.data(), n.T, n.H, n.K, n.D);
        check_2x(gpu.host(), cpu, truth);
    }
}

TEST_CASE("the experiment's rotation on the GPU gives the CPU's values (small)") {
    const Size n = {70, 4, 2, 24};
    const size_t count = n.T * (n.H + 2 * n.K) * n.D;
    Buffer<int32_t> pos(n.T);
    for (size_t t = 0; t < n.T; t++) pos[t] = int32_t(61 * t);
    Buffer<double> inv_freq(n.D / 2);
    rope_frequencies(inv_freq.data(), RopeConfig(), n.D, n.T);
    DeviceBuffer<int32_t> device_pos(pos);
    DeviceBuffer<double> device_freq(inv_freq);
    for (const NamedRounding& named : named_roundings) {
        CAPTURE(named.letter);
        const Rounding r = named.rounding;
        const Buffer<float> input = rounded_once(Buffer<float>(count, 33));
        Buffer<float> table(n.T * n.D), cpu = converted<float>(input);
        Buffer<double> exact_table(n.T * n.D), truth = converted<double>(input);
        DeviceBuffer<float> device_table(n.T * n.D), gpu(input);
        study_table(Cpu(), table.data(), pos.data(), inv_freq.data(), 1, r, n.T, n.D);
        study_table(Cpu(), exact_table.data(), pos.data(), inv_freq.data(), 1, r, n.T, n.D);
        study_table(the_gpu(), device_table.data(), device_pos.data(), device_freq.data(), 1, r, n.T, n.D);
        check_2x(device_table.host(), table, exact_table);
        study_rotate(Cpu(), cpu.data(), table.data(), r, n.T, n.H, n.K, n.D);
        study_rotate(Cpu(), truth.data(), exact_table.data(), r, n.T, n.H, n.K, n.D);
        study_rotate(the_gpu(), gpu.data(), device_table.data(), r, n.T, n.H, n.K, n.D);
        const bool rounded = r.storage == Type::bf16;
        const Buffer<float> result = gpu.host();
        // A value beside the middle of two bf16 may be rounded to either: a step of bf16 at most, and seldom.
        CHECK(largest_error(result, truth) <= (rounded ? 1 : 0) * ulp<bf16>(largest_value(truth)) +
                                                  2 * largest_error(cpu, truth) + 2 * ulp<float>(largest_value(truth)));
        size_t differ = 0;
        for (size_t i = 0; i < count; i++) differ += rounded && result[i] != cpu[i];
        CHECK(differ <= count / 1000);
        for (size_t i = 0; i < count; i++) // values pass through untouched
            if (i / n.D % (n.H + 2 * n.K) >= n.H + n.K) CHECK(result[i] == input[i]);
    }
}
