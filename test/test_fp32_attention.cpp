#include "fp32_attention.h"
#include "ring_case.h"

namespace {
constexpr size_t S = 150;
const Sizes z{4, 2, 32};

template <class E> std::vector<Acc<E>> angles_of() {
    std::vector<int32_t> pos(S);
    for (size_t t = 0; t < S; t++) pos[t] = int32_t(t);
    std::vector<double> frequency(z.D / 2);
    rope_frequencies(frequency.data(), RopeConfig(), z.D, S);
    std::vector<Acc<E>> table(S * z.D);
    rope_table<E>(Cpu(), table.data(), pos.data(), frequency.data(), 1, RopePrecision::exact, S, z.D);
    return table;
}

// Forward and backward as the trainer does it, with its functions or those of the control.
template <class E> Result<E> trainer(const RingPlan& plan, const Buffer<E>& qkv, const Buffer<E>& dout) {
    const std::vector<Acc<E>> angles = angles_of<E>();
    Buffer<E> rotated = converted<E>(qkv);
    rope_forward(Cpu(), rotated.data(), angles.data(), RopePrecision::exact, S, z.H, z.K, z.D);
    Result<E> r = attend(Comm{}, plan, rotated, dout, S, z);
    rope_backward(Cpu(), r.dqkv.data(), angles.data(), RopePrecision::exact, S, z.H, z.K, z.D);
    return r;
}
Result<bf16> control(const RingPlan& plan, const Buffer<bf16>& qkv, const Buffer<bf16>& dout) {
    const std::vector<float> angles = angles_of<bf16>();
    Buffer<bf16> in = converted<bf16>(qkv);
    Result<bf16> r{Buffer<bf16>(S * z.H * z.D), Buffer<bf16>(S * z.qkv()), Buffer<float>(S * z.H)};
    RingScratch<bf16> unused;
    fp32::rope_forward(Cpu(), in.data(), angles.data(), RopePrecision::exact, S, z.H, z.K, z.D);
    fp32::ring_attention_forward(Cpu(), Comm{}, plan, r.out.data(), r.lse.data(), in.data(), unused, z.H, z.K, z.D);
    fp32::ring_attention_backward(Cpu(), Comm{}, plan, r.dqkv.data(), dout.data(), r.out.data(), r.lse.data(),
                                  in.data(), unused, z.H, z.K, z.D);
    fp32::rope_backward(Cpu(), r.dqkv.data(), angles.data(), RopePrecision::exact, S, z.H, z.K, z.D);
    return r;
}

// Part of the elements that are the truth, rounded once. An fp32 error of some 2^-18 moves the rounding of one in 2^9.
double rounded_once(const Buffer<bf16>& x, const Buffer<double>& truth) {
    size_t right = 0;
    for (size_t i = 0; i < x.count; i++) right += float(x[i]) == float(bf16(truth[i]));
    return double(right) / double(x.count);
}
} // namespace

TEST_CASE("fp32 attention in a bf16 network rounds once") {
    for (Mode mode : {Mode::full, Mode::anchor, Mode::intra}) {
        const Case c(1, mode, 1, S, 20, z, 7);
        const RingPlan plan = c.plan(Comm{});
        const Buffer<bf16> qkv = converted<bf16>(c.qkv), dout = converted<bf16>(c.dout);
        const Result<double> truth = trainer<double>(plan, converted<double>(qkv), converted<double>(dout));
        const Result<bf16> once = control(plan, qkv, dout), usual = trainer<bf16>(plan, qkv, dout);
        CHECK(rounded_once(once.out, truth.out) > 0.99);
        CHECK(rounded_once(once.dqkv, truth.dqkv) > 0.99);
        CHECK(rounded_once(usual.out, truth.out) < 0.95);
        CHECK(rounded_once(usual.dqkv, truth.dqkv) < 0.95);
    }
}
