// SwiGLU and the exponential under it.
#include "../layers/swiglu.cuh"
#include "check.h"

namespace {
struct Size {
    size_t T, F;
};
constexpr Size sizes[] = {{1, 1}, {1, 17}, {3, 5}, {7, 33}};

template <class E> struct Gate {
    size_t T, F;
    Buffer<E> gate_up, dout, out, dgate_up;

    Gate(size_t T, size_t F, double scale = 1)
        : T(T), F(F), gate_up(T * 2 * F, 1, scale), dout(T * F, 2), out(T * F), dgate_up(T * 2 * F) {}
    void run() {
        swiglu_forward(Cpu(), out.data(), gate_up.data(), T, F);
        swiglu_backward(Cpu(), dgate_up.data(), dout.data(), gate_up.data(), T, F);
    }
};

// u = 2^-24. s is off by the exponential's ulp (2 u of it), an addition and a division: 4 u of s; 2^-126 where e^-gate
// or s leaves the range of normal floats. Two products add u each. In dgate 1 - s is off by the same absolutely, which
// gate multiplies, so twice that covers its two places. Storing adds half an ulp of E, at most `unit` of the value.
template <class E> void check_against_double(size_t T, size_t F, double scale) {
    Gate<E> e(T, F, scale);
    Gate<double> d(T, F);
    for (size_t i = 0; i < T * 2 * F; i++) d.gate_up[i] = e.gate_up[i];
    for (size_t i = 0; i < T * F; i++) d.dout[i] = e.dout[i];
    e.run(), d.run();
    const double u = 0x1p-24, unit = std::is_same_v<E, bf16> ? 0x1p-8 : u;
    double worst = 0; // the largest error in units of its bound
    auto check = [&](E result, double truth, double rest) {
        worst = std::max(worst, std::fabs(double(result) - truth) / (unit * std::fabs(truth) + rest));
    };
    for (size_t t = 0; t < T; t++)
        for (size_t f = 0; f < F; f++) {
            size_t g = t * 2 * F + f, up = g + F, i = t * F + f;
            double gate = std::fabs(d.gate_up[g]), up_ = std::fabs(d.gate_up[up]), dout = std::fabs(d.dout[i]);
            double ds = 6 * u / (1 + std::exp(-d.gate_up[g])) + 0x1p-126;
            check(e.out[i], d.out[i], ds * gate * up_ + 0x1p-149);
            check(e.dgate_up[g], d.dgate_up[g], 2 * ds * dout * up_ * (1 + gate) + 0x1p-149);
            check(e.dgate_up[up], d.dgate_up[up], ds * dout * gate + 0x1p-149);
        }
    CHECK(worst <= 1);
}
} // namespace

TEST_CASE("fast_exp: below 1 ulp over all floats, and the ends of the range") {
    double worst = 0;
    for (uint64_t pattern = 0; pattern < 1ull << 32; pattern += 251) {
        float x = std::bit_cast<float>(uint32_t(pattern));
        if (!(x >= -86.98f && x <= 88.72283f)) continue;
        double truth = std::exp(double(x));
        worst = std::max(worst, std::fabs(double(fast_exp(x)) - truth) / ulp<float>(truth));
    }
    CHECK(worst < 1);

    const float inf = std::numeric_limits<float>::infinity(), nan = std::numeric_limits<float>::quiet_NaN();
    CHECK(fast_exp(0.0f) == 1);
    CHECK(fast_exp(-0.0f) == 1);
    CHECK(fast_exp(1e-30f) == 1);
    CHECK(fast_exp(-inf) == 0);
    CHECK(fast_exp(-1e30f) == 0);
    CHECK(fast_exp(-87.0f) == 0);
    CHECK(fast_exp(inf) == inf);
    CHECK(fast_exp(1e30f) == inf);
    CHECK(fast_exp(88.73f) == inf);
    CHECK(std::isnan(fast_exp(nan)));
    CHECK(std::isnan(fast_exp(-nan)));
    CHECK(std::isnan(fast_exp(std::bit_cast<float>(0x7f800001u))));
    CHECK(std::isnan(fast_exp(std::bit_cast<float>(0xff800001u))));
}

TEST_CASE("swiglu: known values") {
    // silu(0) = 0 with slope 1/2; silu(1) = 1 / (1 + 1/e); silu(x) -> x, silu(-x) -> 0.
    Gate<double> g(1, 4);
    const double gate[] = {0, 1, 800, -800}, up[] = {3, 2, 5, 7};
    for (size_t f = 0; f < 4; f++) g.gate_up[f] = gate[f], g.gate_up[4 + f] = up[f], g.dout[f] = 1;
    g.run();
    CHECK(g.out[0] == 0);
    CHECK(g.dgate_up[0] == 1.5);
    CHECK(g.out[1] == doctest::Approx(2 * 0.7310585786300049).epsilon(1e-15));
    CHECK(g.out[2] == 4000);
    CHECK(g.dgate_up[2] == 5);
    CHECK(g.dgate_up[6] == 800);
    CHECK(g.out[3] == 0);
    CHECK(g.dgate_up[3] == 0);
}

TEST_CASE("swiglu: gradients are those of finite differences") {
    for (auto [T, F] : sizes) {
        Gate<double> g(T, F, 2);
        g.run();
        auto f = [&] {
            swiglu_forward(Cpu(), g.out.data(), g.gate_up.data(), T, F);
            double sum = 0;
            for (size_t i = 0; i < T * F; i++) sum += g.dout[i] * g.out[i];
            return sum;
        };
        // finite_difference is good to about 1e-10 of f, which is a sum of up to 231 terms of order 1.
        for (size_t i = 0; i < T * 2 * F; i++)
            CHECK(std::fabs(finite_difference(f, g.gate_up.data(), i) - g.dgate_up[i]) < 1e-8);
    }
}

TEST_CASE("swiglu: float and bf16 agree with double, at extreme gates too") {
    for (auto [T, F] : sizes)
        for (double scale : {0.01, 2.0, 40.0, 1000.0}) {
            check_against_double<float>(T, F, scale);
            check_against_double<bf16>(T, F, scale);
        }
    check_against_double<float>(2, 5000, 30);
}

TEST_CASE("swiglu: dgate_up may be gate_up") {
    Gate<bf16> g(5, 37);
    g.run();
    swiglu_backward(Cpu(), g.gate_up.data(), g.dout.data(), g.gate_up.data(), 5, 37);
    CHECK(largest_error(g.gate_up, g.dgate_up) == 0);
    Gate<double> d(5, 37);
    d.run();
    swiglu_backward(Cpu(), d.gate_up.data(), d.dout.data(), d.gate_up.data(), 5, 37);
    CHECK(largest_error(d.gate_up, d.dgate_up) == 0);
}
