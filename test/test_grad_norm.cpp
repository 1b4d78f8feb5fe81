// The squared gradient norm: exact integers, the range of double, the same bits for all threads.
#include "../layers/grad_norm.cuh"
#include "check.h"
#include <omp.h>

namespace {
template <class G> double squared_norm(const Buffer<G>& grad) {
    Buffer<double> squared(1);
    grad_norm_squared(Cpu(), squared.data(), grad.data(), grad.count);
    return squared[0];
}

template <class G> void check_integers(size_t count) {
    Buffer<G> grad(count);
    double expected = 0;
    for (size_t i = 0; i < count; i++) {
        int value = int(hash64(1, i) % 9) - 4;
        grad[i] = G(value), expected += value * value;
    }
    CHECK(squared_norm(grad) == expected);
}
} // namespace

TEST_CASE("grad_norm: sums of squared integers are exact at every size") {
    for (size_t count : {0, 1, 17, 65535, 65536, 65537, 200003}) {
        check_integers<double>(count);
        check_integers<float>(count);
        check_integers<bf16>(count);
    }
}

TEST_CASE("grad_norm: squares beyond the range of float, and lost beside large ones in float") {
    Buffer<float> grad(100001);
    grad.fill(1), grad[50000] = 1e30f;
    double large = double(1e30f) * double(1e30f);
    CHECK(squared_norm(grad) == doctest::Approx(large).epsilon(1e-15));
    grad[50000] = 4096 * 4096; // its square is 2^48: fp32 would lose each of the 100000 ones
    CHECK(squared_norm(grad) == 0x1p48 + 100000);
}

TEST_CASE("grad_norm: a value that is not finite shows, wherever it stands") {
    for (size_t place : {0, 16, 65535, 65536, 70000}) {
        Buffer<bf16> grad(70001, 2);
        grad[place] = bf16(std::numeric_limits<float>::quiet_NaN());
        CHECK(std::isnan(squared_norm(grad)));
        grad[place] = bf16(-std::numeric_limits<float>::infinity());
        CHECK(squared_norm(grad) == std::numeric_limits<double>::infinity());
    }
}

TEST_CASE("grad_norm: the threads do not change a bit") {
    Buffer<float> grad(300001, 3);
    int threads = omp_get_max_threads();
    omp_set_num_threads(1);
    double one = squared_norm(grad);
    omp_set_num_threads(3);
    double many = squared_norm(grad);
    omp_set_num_threads(threads);
    CHECK(one == many);
    CHECK(one == doctest::Approx(300001).epsilon(0.02)); // chi squared: 300001 +- 775
}

TEST_CASE("grad_norm: added to what is there") {
    Buffer<float> grad(70001);
    grad.fill(2);
    Buffer<double> squared(1);
    grad_norm_squared(Cpu(), squared.data(), grad.data(), grad.count);
    grad_norm_squared(Cpu(), squared.data(), grad.data(), 0, true);
    grad_norm_squared(Cpu(), squared.data(), grad.data(), 1000, true);
    CHECK(squared[0] == 4 * 71001.0);
}
