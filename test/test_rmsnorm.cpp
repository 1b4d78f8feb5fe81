// RMSNorm: finite differences, closed forms, and every storage type against double by a derived bound.
#include "../layers/rmsnorm.cuh"
#include "check.h"
#include <omp.h>

namespace {
struct Size {
    size_t T, C;
};
// One channel, odd sizes, more tokens than parts of the weight gradient, more channels than a vector.
constexpr Size sizes[] = {{1, 1}, {1, 17}, {5, 33}, {67, 3}, {130, 17}};
constexpr double eps = 1e-5;

template <class E> struct Norm {
    size_t T, C;
    Buffer<E> in, weight, dout, dresidual, out, din;
    Buffer<Acc<E>> rstd;

    Norm(size_t T, size_t C)
        : T(T), C(C), in(T * C, 1), weight(C, 2), dout(T * C, 3), dresidual(T * C, 4), out(T * C), din(T * C), rstd(T) {
    }
    void forward() { rmsnorm_forward(Cpu(), out.data(), rstd.data(), in.data(), weight.data(), T, C, eps); }
    template <class G> void backward(Buffer<G>& dweight, bool residual) {
        rmsnorm_backward(Cpu(), din.data(), dweight.data(), dout.data(), in.data(), weight.data(), rstd.data(),
                         residual ? dresidual.data() : nullptr, T, C);
    }
};

// Exact inputs of type E, in double.
template <class E> Norm<double> in_double(const Norm<E>& n) {
    Norm<double> d(n.T, n.C);
    for (size_t i = 0; i < n.T * n.C; i++) d.in[i] = n.in[i], d.dout[i] = n.dout[i], d.dresidual[i] = n.dresidual[i];
    for (size_t c = 0; c < n.C; c++) d.weight[c] = n.weight[c];
    d.forward();
    return d;
}

// Bounds to first order, u = 2^-24: a float sum of C terms is off by at most C u of the sum of their magnitudes, and
// rstd by half of that; the few products add u each. Storing in E adds half an ulp of E: at most `unit` of the value.
template <class E, class G> void check_against_double(size_t T, size_t C) {
    Norm<E> n(T, C);
    Norm<double> d = in_double(n);
    Buffer<G> dweight(C, 5);
    Buffer<double> truth = converted<double>(dweight), prior = converted<double>(dweight);
    n.forward(), n.backward(dweight, true), d.backward(truth, true);

    const double u = 0x1p-24;
    auto unit = [](auto* p) { return std::is_same_v<decltype(p), bf16*> ? 0x1p-8 : 0x1p-24; };
    double worst = 0; // the largest error in units of its bound
    for (size_t t = 0; t < T; t++) {
        double magnitude = 0;
        for (size_t c = 0; c < C; c++)
            magnitude += std::fabs(d.dout[t * C + c] * d.weight[c] * d.in[t * C + c] * d.rstd[t]) / double(C);
        for (size_t c = 0; c < C; c++) {
            size_t i = t * C + c;
            double y = std::fabs(d.out[i]), normed = std::fabs(d.in[i] * d.rstd[t]);
            double terms = d.rstd[t] * (std::fabs(d.dout[i] * d.weight[c]) + normed * magnitude);
            terms += std::fabs(d.dresidual[i]);
            double allowed_y = (unit(n.out.data()) + (double(C) / 2 + 6) * u) * y;
            double allowed_dx = unit(n.din.data()) * std::fabs(d.din[i]) + (2.5 * double(C) + 12) * u * terms;
            worst = std::max(worst, std::fabs(double(n.out[i]) - d.out[i]) / allowed_y);
            worst = std::max(worst, std::fabs(double(n.din[i]) - d.din[i]) / allowed_dx);
        }
    }
    CHECK(worst <= 1);
    for (size_t c = 0; c < C; c++) {
        double magnitude = std::fabs(prior[c]);
        for (size_t t = 0; t < T; t++) magnitude += std::fabs(d.dout[t * C + c] * d.in[t * C + c] * d.rstd[t]);
        double allowed = unit(dweight.data()) * std::fabs(truth[c]) + double(T + C / 2 + 8) * u * magnitude;
        CHECK(std::fabs(double(dweight[c]) - truth[c]) <= allowed);
    }
}
} // namespace

TEST_CASE("rmsnorm: one channel and a constant row have a closed form") {
    Norm<double> one(7, 1);
    one.forward();
    for (size_t t = 0; t < 7; t++) {
        double x = one.in[t];
        CHECK(one.out[t] == doctest::Approx(one.weight[0] * x / std::sqrt(x * x + eps)).epsilon(1e-14));
    }

    Norm<float> constant(1, 4096);
    constant.in.fill(-3), constant.weight.fill(0.5);
    constant.forward();
    CHECK(constant.rstd[0] == doctest::Approx(1 / std::sqrt(9 + eps)).epsilon(1e-6));
    for (size_t c = 0; c < 4096; c++) CHECK(constant.out[c] == doctest::Approx(-0.5).epsilon(1e-5));

    Norm<float> zero(2, 17);
    zero.in.fill(0);
    zero.forward();
    for (size_t i = 0; i < 2 * 17; i++) CHECK(zero.out[i] == 0);
}

TEST_CASE("rmsnorm: gradients are those of finite differences") {
    for (auto [T, C] : sizes)
        for (bool residual : {false, true}) {
            Norm<double> n(T, C);
            Buffer<double> dweight(C);
            dweight.fill(0);
            n.forward(), n.backward(dweight, residual);
            auto f = [&] {
                n.forward();
                double sum = 0;
                for (size_t i = 0; i < T * C; i++) sum += n.dout[i] * n.out[i];
                for (size_t i = 0; residual && i < T * C; i++) sum += n.dresidual[i] * n.in[i];
                return sum;
            };
            // One channel makes out = sign(in) weight but for eps, so the third derivative may reach 1/in^3 of what
            // finite_difference's 1e-10 supposes; 1e-6 of the largest gradient holds for the smallest |in| here, 0.03.
            double allowed = 1e-6 * std::max(1.0, largest_value(n.din));
            for (size_t i = 0; i < T * C; i += 1 + T * C / 100)
                CHECK(std::fabs(finite_difference(f, n.in.data(), i) - n.din[i]) < allowed);
            for (size_t c = 0; c < C; c++)
                CHECK(std::fabs(finite_difference(f, n.weight.data(), c) - dweight[c]) < 1e-8 * double(T));
        }
}

TEST_CASE("rmsnorm: float and bf16 agree with double") {
    for (auto [T, C] : sizes) {
        check_against_double<float, float>(T, C);
        check_against_double<bf16, float>(T, C);
        check_against_double<bf16, bf16>(T, C);
    }
    check_against_double<bf16, float>(9, 1000);
}

TEST_CASE("rmsnorm: the weight's gradient is added, the input's overwritten, and din may be dresidual") {
    Norm<float> n(70, 33);
    Buffer<float> once(33), twice(33);
    once.fill(0), twice.fill(0);
    n.forward();
    n.backward(once, true);
    Buffer<float> apart = converted<float>(n.din);
    n.backward(twice, true), n.backward(twice, true);
    CHECK(largest_error(apart, n.din) == 0);
    for (size_t c = 0; c < 33; c++) CHECK(twice[c] == doctest::Approx(2 * once[c]).epsilon(1e-5));

    rmsnorm_backward(Cpu(), n.dresidual.data(), once.data(), n.dout.data(), n.in.data(), n.weight.data(), n.rstd.data(),
                     n.dresidual.data(), n.T, n.C);
    CHECK(largest_error(apart, n.dresidual) == 0);
}

TEST_CASE("rmsnorm: no token is no work, and the threads do not change a bit") {
    Norm<bf16> none(0, 5);
    Buffer<float> kept(5, 6), same(5, 6);
    none.forward(), none.backward(kept, true);
    CHECK(largest_error(kept, same) == 0);

    int threads = omp_get_max_threads();
    Norm<float> n(200, 40);
    Buffer<float> one(40), many(40);
    one.fill(0), many.fill(0);
    omp_set_num_threads(1), n.forward(), n.backward(one, false);
    omp_set_num_threads(3), n.forward(), n.backward(many, false);
    omp_set_num_threads(threads);
    CHECK(largest_error(one, many) == 0);
}
