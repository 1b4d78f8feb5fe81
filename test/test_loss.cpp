// Cross entropy: finite differences, masked labels, logits at the ends of the range.
#include "../layers/loss.cuh"
#include "check.h"

namespace {
struct Size {
    size_t T, V;
};
constexpr Size sizes[] = {{1, 1}, {1, 17}, {5, 33}, {9, 2}};

// Every third label is not counted.
Buffer<int32_t> labels(size_t T, size_t V) {
    Buffer<int32_t> label(T);
    for (size_t t = 0; t < T; t++) label[t] = t % 3 == 2 ? -1 - int32_t(t) : int32_t(hash64(3, t) % V);
    return label;
}

// u = 2^-24. A term of Z carries 2 u from x - m (times the term's exponent, but x - m is exact to u |x - m|, and
// |x - m| e^-(x - m) < 1 by far in sum) and 2 u from the exponential; summing adds V u: Z is off by (V + 8) u of
// itself, hence log Z by as much absolutely; log, m - x and the sum round once more each.
template <class E> void check_against_double(size_t T, size_t V, double spread) {
    Buffer<int32_t> label = labels(T, V);
    Buffer<E> logits(T * V, 1, spread);
    Buffer<double> logits_double = converted<double>(logits), original = converted<double>(logits), loss_double(T);
    Buffer<Acc<E>> loss(T), loss_forward_only(T);
    const double scale = 0.125, u = 0x1p-24, unit = std::is_same_v<E, bf16> ? 0x1p-8 : u;
    loss_forward(Cpu(), loss_forward_only.data(), nullptr, logits.data(), label.data(), T, V);
    loss_forward_backward(Cpu(), loss.data(), logits.data(), label.data(), scale, T, V);
    loss_forward_backward(Cpu(), loss_double.data(), logits_double.data(), label.data(), scale, T, V);
    CHECK(largest_error(loss, loss_forward_only) == 0);
    double worst = 0; // the largest error in units of its bound
    for (size_t t = 0; t < T; t++) {
        double most = 0, allowed = double(V + 8) * u + 4 * u * (loss_double[t] + std::log(double(V)));
        for (size_t v = 0; v < V; v++) most = std::max(most, std::fabs(original[t * V + v]));
        worst = std::max(worst, std::fabs(double(loss[t]) - loss_double[t]) / allowed);
        for (size_t v = 0; v < V; v++) {
            double truth = logits_double[t * V + v], p = truth / scale + (int32_t(v) == label[t]);
            double bound = unit * std::fabs(truth) + scale * (p * (double(V) + 12 + 2 * most) + 1) * u + 0x1p-120;
            worst = std::max(worst, std::fabs(double(logits[t * V + v]) - truth) / bound);
        }
    }
    CHECK(worst <= 1);
}
} // namespace

TEST_CASE("loss: gradients are those of finite differences, of the scaled sum over counted tokens") {
    for (auto [T, V] : sizes) {
        Buffer<int32_t> label = labels(T, V);
        Buffer<double> logits(T * V, 1), dlogits(T * V, 1), loss(T);
        const double scale = 0.3;
        loss_forward_backward(Cpu(), loss.data(), dlogits.data(), label.data(), scale, T, V);
        auto f = [&] {
            loss_forward(Cpu(), loss.data(), nullptr, logits.data(), label.data(), T, V);
            double sum = 0;
            for (size_t t = 0; t < T; t++) sum += loss[t];
            return scale * sum;
        };
        for (size_t i = 0; i < T * V; i++) CHECK(std::fabs(finite_difference(f, logits.data(), i) - dlogits[i]) < 1e-9);
    }
}

TEST_CASE("loss: known values") {
    // Equal logits: ln V, whatever they are. One symbol: 0, and no gradient.
    const size_t V = 32000;
    for (float level : {0.0f, -1e30f, 1e30f, 88.0f}) {
        Buffer<float> logits(V), loss(1);
        Buffer<int32_t> label(1), argmax(1);
        logits.fill(level), label[0] = 31999;
        loss_forward(Cpu(), loss.data(), argmax.data(), logits.data(), label.data(), 1, V);
        CHECK(loss[0] == doctest::Approx(std::log(32000.0)).epsilon(1e-6));
        CHECK(argmax[0] == 0);
    }
    Buffer<bf16> one(1, 4);
    Buffer<float> loss(1);
    Buffer<int32_t> zero(1);
    zero[0] = 0;
    loss_forward_backward(Cpu(), loss.data(), one.data(), zero.data(), 1, 1, 1);
    CHECK(loss[0] == 0);
    CHECK(float(one[0]) == 0);
}

TEST_CASE("loss: tokens that are not counted") {
    const size_t T = 3, V = 19;
    Buffer<float> logits(T * V, 1), loss(T);
    logits[V + 4] = std::numeric_limits<float>::quiet_NaN(); // must not leak out of its row
    Buffer<int32_t> label(T), argmax(T);
    label[0] = 18, label[1] = -1, label[2] = std::numeric_limits<int32_t>::lowest();
    loss_forward(Cpu(), loss.data(), argmax.data(), logits.data(), label.data(), T, V);
    CHECK(loss[0] > 0);
    CHECK(loss[1] == 0);
    CHECK(loss[2] == 0);
    CHECK(argmax[2] == std::max_element(logits.data() + 2 * V, logits.data() + 3 * V) - (logits.data() + 2 * V));
    loss_forward_backward(Cpu(), loss.data(), logits.data(), label.data(), 1, T, V);
    double sum = 0;
    for (size_t v = 0; v < V; v++) sum += logits[v];
    CHECK(std::fabs(sum) < 1e-6); // a row's gradient sums to 0
    CHECK(logits[18] < 0);
    for (size_t i = V; i < T * V; i++) CHECK(logits[i] == 0);
    CHECK(loss[1] == 0);
}

TEST_CASE("loss: huge logits and values that are not finite") {
    const size_t V = 40;
    const float inf = std::numeric_limits<float>::infinity();
    Buffer<int32_t> label(1), argmax(1);
    Buffer<float> loss(1);
    auto row = [&](float at_label, float at_7, int32_t which) {
        Buffer<float> logits(V);
        logits.fill(-1e30), label[0] = which;
        logits[size_t(which)] = at_label, logits[7] = at_7;
        loss_forward(Cpu(), loss.data(), argmax.data(), logits.data(), label.data(), 1, V);
        loss_forward_backward(Cpu(), loss.data(), logits.data(), label.data(), 1, 1, V);
        return logits;
    };
    Buffer<float> sure = row(1e30f, -1e30f, 3);
    CHECK(loss[0] == 0);
    CHECK(argmax[0] == 3);
    CHECK(largest_value(sure) == 0);
    Buffer<float> wrong = row(-5000, 5000, 39); // softmax puts all on 7
    CHECK(loss[0] == 10000);
    CHECK(argmax[0] == 7);
    CHECK(wrong[7] == 1);
    CHECK(wrong[39] == -1);
    row(0, -inf, 3); // a forbidden symbol
    CHECK(loss[0] == 0);
    row(0, inf, 3);
    CHECK(std::isnan(loss[0]));
    row(0, std::numeric_limits<float>::quiet_NaN(), 3);
    CHECK(std::isnan(loss[0]));
}

TEST_CASE("loss: argmax takes the first of equals, at every place") {
    const size_t V = 37;
    for (size_t place = 0; place < V; place++) {
        Buffer<bf16> logits(V);
        logits.fill(-2), logits[place] = bf16(3), logits[V - 1] = bf16(3);
        Buffer<float> loss(1);
        Buffer<int32_t> label(1), argmax(1);
        label[0] = 0;
        loss_forward(Cpu(), loss.data(), argmax.data(), logits.data(), label.data(), 1, V);
        CHECK(argmax[0] == int32_t(place));
    }
}

TEST_CASE("loss: float and bf16 agree with double") {
    for (auto [T, V] : sizes)
        for (double spread : {1.0, 30.0}) {
            check_against_double<float>(T, V, spread);
            check_against_double<bf16>(T, V, spread);
        }
    check_against_double<float>(3, 5000, 4);
}
