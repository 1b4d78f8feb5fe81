// AdamW: exact in double, bounded in float, unbiased in bf16.
#include "../layers/adamw.cuh"
#include "check.h"
#include "fails.h"
#include <omp.h>

namespace {
constexpr AdamW defaults = {1e-2, 0.9, 0.95, 1e-8, 0.1, 1234};

// Parameters with their state; the gradient of step s is hash_normal(100 + s, i).
template <class P, class G, class M> struct State {
    size_t count;
    Buffer<P> param;
    Buffer<Acc<P>> master;
    Buffer<M> m, v;
    bool with_master;

    State(size_t count, bool with_master)
        : count(count), param(count, 1), master(count), m(count), v(count), with_master(with_master) {
        m.fill(0), v.fill(0);
        for (size_t i = 0; i < count; i++) master[i] = Acc<P>(param[i]);
    }
    void step(const AdamW& a, AdamWStep step, size_t begin, size_t end) {
        Buffer<G> grad(count, uint64_t(100 + step.step));
        adamw_update(Cpu(), param.data() + begin, with_master ? master.data() + begin : nullptr, m.data() + begin,
                     v.data() + begin, grad.data() + begin, end - begin, 1000 + begin, a, &step);
    }
    void steps(const AdamW& a, int n, double grad_scale = 1) {
        for (int s = 1; s <= n; s++) step(a, {s, grad_scale, 0}, 0, count);
    }
};

// The algorithm as the paper's Algorithm 2 has it, one parameter at a time, the moments' bias by their exact sums.
double adamw_long_hand(double p, size_t i, const AdamW& a, int steps, bool bf16_grad, double grad_scale = 1) {
    double m = 0, v = 0, weight1 = 0, weight2 = 0; // weight: what the averages would be had every gradient been 1
    for (int s = 1; s <= steps; s++) {
        double g = hash_normal(uint64_t(100 + s), i);
        g = (bf16_grad ? double(bf16(float(g))) : g) * grad_scale;
        m += (1 - a.beta1) * (g - m), weight1 += (1 - a.beta1) * (1 - weight1);
        v += (1 - a.beta2) * (g * g - v), weight2 += (1 - a.beta2) * (1 - weight2);
        p -= a.lr * a.weight_decay * p + a.lr * (m / weight1) / (std::sqrt(v / weight2) + a.eps);
    }
    return p;
}

double correlation(const std::vector<double>& x, const std::vector<double>& y) {
    double sum = 0, xx = 0, yy = 0;
    for (size_t i = 0; i < x.size(); i++) sum += x[i] * y[i], xx += x[i] * x[i], yy += y[i] * y[i];
    return sum / std::sqrt(xx * yy);
}
} // namespace

TEST_CASE("adamw: double is the algorithm, at every step, with and without a master") {
    for (bool with_master : {false, true})
        for (size_t count : {0, 1, 17, 1000}) {
            State<double, double, double> s(count, with_master);
            Buffer<double> start = converted<double>(s.param);
            s.steps(defaults, 20, 0.37);
            // The two orders of arithmetic differ by some 2^-53 a step in values of order 1.
            for (size_t i = 0; i < count; i++) {
                CHECK(std::fabs(s.param[i] - adamw_long_hand(start[i], i, defaults, 20, false, 0.37)) < 1e-14);
                if (with_master) CHECK(s.master[i] == s.param[i]);
            }
        }
}

TEST_CASE("adamw: the first step, and none without a gradient but decay") {
    // At step 1 the corrected moments are g and g^2: p -= lr (g / (|g| + eps) + decay p).
    State<double, double, double> s(50, false);
    Buffer<double> start = converted<double>(s.param), grad(50, 101);
    s.steps(defaults, 1);
    for (size_t i = 0; i < 50; i++) {
        double g = grad[i];
        double p = start[i] - 1e-2 * (g / (std::fabs(g) + 1e-8) + 0.1 * start[i]);
        CHECK(s.param[i] == doctest::Approx(p).epsilon(1e-14));
        CHECK(s.m[i] == doctest::Approx(0.1 * g).epsilon(1e-14));
        CHECK(s.v[i] == doctest::Approx(0.05 * g * g).epsilon(1e-14));
    }
    double p[2] = {2, -3}, m[2] = {}, v[2] = {}, none[2] = {};
    const AdamWStep step = {1, 1, 0};
    adamw_update(Cpu(), p, (double*)nullptr, m, v, none, 2, 0, defaults, &step);
    CHECK(p[0] == doctest::Approx(2 * 0.999).epsilon(1e-15));
    CHECK(p[1] == doctest::Approx(-3 * 0.999).epsilon(1e-15));
}

TEST_CASE("adamw: float follows double") {
    // A step rounds p (below 4 here) by 2^-23 at most, and its update, of at most 1.5 lr, by 20 roundings of 2^-24.
    const double allowed = 20 * (0x1p-23 + 1.5 * defaults.lr * 20 * 0x1p-24);
    State<float, float, float> s(1000, false);
    Buffer<double> start = converted<double>(s.param);
    s.steps(defaults, 20);
    CHECK(largest_value(start) < 4);
    for (size_t i = 0; i < 1000; i++)
        CHECK(std::fabs(double(s.param[i]) - adamw_long_hand(start[i], i, defaults, 20, false)) < allowed);
}

TEST_CASE("adamw: a bf16 parameter with a master is its nearest value") {
    const double allowed = 20 * (0x1p-23 + 1.5 * defaults.lr * 20 * 0x1p-24); // as above
    State<bf16, bf16, float> s(1000, true);
    Buffer<double> start = converted<double>(s.param);
    s.steps(defaults, 20);
    for (size_t i = 0; i < 1000; i++) {
        CHECK(s.param[i].bits == bf16(s.master[i]).bits);
        CHECK(std::fabs(double(s.master[i]) - adamw_long_hand(start[i], i, defaults, 20, true)) < allowed);
    }
}

TEST_CASE("stochastic_round: only the two neighbours, the mean kept, exact values and non-finite ones kept") {
    // Over all 65536 random values the mean is x itself, exactly.
    for (float x : {1.0f, 1.001f, -1.001f, 0.9999f, 1.9999999f, -3.14159f, 1e-30f, 1e-40f, 255.99f, 0.0f}) {
        float low = 1e38f, high = -1e38f;
        double sum = 0;
        for (uint32_t r = 0; r < 65536; r++) {
            float y = stochastic_round(x, r);
            low = std::min(low, y), high = std::max(high, y), sum += double(y);
        }
        CHECK(sum / 65536 == doctest::Approx(double(x)).epsilon(1e-14));
        CHECK(low <= x);
        CHECK(high >= x);
        CHECK(double(high) - double(low) <= std::max(ulp<bf16>(x), 0x1p-133)); // 2^-133: the smallest denormal
    }
    const float inf = std::numeric_limits<float>::infinity();
    CHECK(float(stochastic_round(inf, 65535)) == inf);
    CHECK(float(stochastic_round(-inf, 65535)) == -inf);
    CHECK(std::isnan(float(stochastic_round(std::numeric_limits<float>::quiet_NaN(), 65535))));
    uint32_t pattern = 0x7f800001u; // a NaN whose upper half alone would read as infinity
    float nan;
    memcpy(&nan, &pattern, 4);
    CHECK(std::isnan(float(stochastic_round(nan, 0))));
}

TEST_CASE("adamw: bf16 parameters drift by the right mean, where the nearest value would stand still") {
    // A constant gradient moves p by lr a step: 2^-12 from 1, a sixteenth of the spacing below 1 (2^-8). Rounding has
    // variance at most spacing^2 / 4 a step.
    const size_t count = 20000;
    const int steps = 8;
    AdamW a = defaults;
    a.lr = 0x1p-12, a.weight_decay = 0, a.eps = 0;
    Buffer<bf16> param(count), grad(count);
    Buffer<float> m(count), v(count);
    param.fill(1), grad.fill(1), m.fill(0), v.fill(0);
    for (AdamWStep step = {1, 1, 0}; step.step <= steps; step.step++)
        adamw_update(Cpu(), param.data(), (float*)nullptr, m.data(), v.data(), grad.data(), count, 0, a, &step);
    double sum = 0;
    for (size_t i = 0; i < count; i++) sum += double(param[i]);
    double sigma = 0x1p-8 / 2 * std::sqrt(double(steps) / double(count));
    CHECK(std::fabs(sum / double(count) - (1 - steps * 0x1p-12)) < 5 * sigma);
}

TEST_CASE("adamw: bf16 moments are unbiased, and the errors of p, m and v independent") {
    const size_t count = 50000;
    State<bf16, bf16, bf16> rounded(count, false);
    State<bf16, bf16, float> exact(count, true);
    rounded.steps(defaults, 1), exact.steps(defaults, 1);
    std::vector<double> error[3], shifted;
    for (size_t i = 0; i < count; i++) {
        auto units = [](double rounded, double exact) { return (rounded - exact) / ulp<bf16>(exact); };
        error[0].push_back(units(double(rounded.param[i]), double(exact.master[i])));
        error[1].push_back(units(double(rounded.m[i]), double(exact.m[i])));
        error[2].push_back(units(double(rounded.v[i]), double(exact.v[i])));
    }
    // An error lies within (-1, 1) ulp with variance f (1 - f) <= 1/4, f being the fraction that is cut off.
    for (auto& e : error) {
        double sum = 0, largest = 0;
        for (double x : e) sum += x, largest = std::max(largest, std::fabs(x));
        CHECK(std::fabs(sum / double(count)) < 5 * 0.5 / std::sqrt(double(count)));
        CHECK(largest < 1);
        CHECK(largest > 0.7); // a first m is bf16 / 10: its fractions are near fifths, so 4/5 is the most it errs
    }
    double most = 5 / std::sqrt(double(count));
    CHECK(std::fabs(correlation(error[0], error[1])) < most);
    CHECK(std::fabs(correlation(error[0], error[2])) < most);
    CHECK(std::fabs(correlation(error[1], error[2])) < most);
    for (auto& e : error) {
        shifted = e;
        std::rotate(shifted.begin(), shifted.begin() + 1, shifted.end());
        CHECK(std::fabs(correlation(e, shifted)) < most); // neighbouring elements
    }
}

TEST_CASE("adamw: step and seed each choose other random bits") {
    auto run = [](uint64_t seed, int number) {
        State<bf16, bf16, bf16> s(500, false);
        AdamW a = defaults;
        a.seed = seed, a.beta1 = a.beta2 = 0; // then the step changes nothing but the random bits
        Buffer<bf16> grad(500, 9);
        const AdamWStep step = {number, 1, 0};
        adamw_update(Cpu(), s.param.data(), (float*)nullptr, s.m.data(), s.v.data(), grad.data(), 500, 0, a, &step);
        return converted<double>(s.param);
    };
    Buffer<double> p = run(1, 1);
    CHECK(largest_error(p, run(1, 1)) == 0);
    CHECK(largest_error(p, run(1, 2)) > 0);
    CHECK(largest_error(p, run(2, 1)) > 0);
}

TEST_CASE("adamw: neither the split of the parameters nor the threads change a bit") {
    const size_t count = 1003;
    State<bf16, bf16, bf16> whole(count, false), parts(count, false);
    int threads = omp_get_max_threads();
    for (int s = 1; s <= 3; s++) {
        const AdamWStep step = {s, 1, 0};
        omp_set_num_threads(1), whole.step(defaults, step, 0, count);
        omp_set_num_threads(3), parts.step(defaults, step, 0, 400), parts.step(defaults, step, 400, count);
    }
    omp_set_num_threads(threads);
    CHECK(largest_error(whole.param, parts.param) == 0);
    CHECK(largest_error(whole.m, parts.m) == 0);
    CHECK(largest_error(whole.v, parts.v) == 0);
}

TEST_CASE("adamw: a step that is to be skipped leaves every bit, whatever its gradient") {
    State<bf16, float, bf16> skipped(1000, true), kept(1000, true);
    skipped.steps(defaults, 2), kept.steps(defaults, 2);
    Buffer<float> grad(1000);
    grad.poison();
    const AdamWStep skip = {3, std::numeric_limits<double>::quiet_NaN(), 1};
    adamw_update(Cpu(), skipped.param.data(), skipped.master.data(), skipped.m.data(), skipped.v.data(), grad.data(),
                 1000, 1000, defaults, &skip);
    CHECK(largest_error(skipped.param, kept.param) == 0);
    CHECK(largest_error(skipped.master, kept.master) == 0);
    CHECK(largest_error(skipped.m, kept.m) == 0);
    CHECK(largest_error(skipped.v, kept.v) == 0);
    skipped.step(defaults, {3, 1, 0}, 0, 1000);
    CHECK(largest_error(skipped.param, kept.param) > 0);
}

TEST_CASE("adamw: step 0 is refused") {
    const AdamWStep step = {0, 1, 0};
    double p = 1, m = 0, v = 0, g = 1;
    std::string message =
        fails_with([&] { adamw_update(Cpu(), &p, (double*)nullptr, &m, &v, &g, 1, 0, defaults, &step); });
    CHECK(message.find("step") != std::string::npos);
}
