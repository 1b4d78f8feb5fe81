// The squared gradient norm: exact integers, the range of double, the same bits for all threads.
#include "../layers/grad_norm.cuh"
#include "check.h"
#include <omp.h>

namespace {
template <class G> void check_integers(size_t count) {
    Buffer<G> grad(count);
    double expected = 0;
    for (size_t i = 0; i < count; i++) {
        int value = int(hash64(1, i) % 9) - 4;
        grad[i] = G(value), expected += value * value;
    }
    CHECK(grad_norm_squared(Cpu(), grad.data(), count) == expected);
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
    CHECK(grad_norm_squared(Cpu(), grad.data(), grad.count) == doctest::Approx(large).epsilon(1e-15));
    grad[50000] = 4096 * 4096; // its square is 2^48: fp32 would lose each of the 100000 ones
    CHECK(grad_norm_squared(Cpu(), grad.data(), grad.count) == 0x1p48 + 100000);
}

TEST_CASE("grad_norm: a value that is not finite shows, wherever it stands") {
    for (size_t place : {0, 16, 65535, 65536, 70000}) {
        Buffer<bf16> grad(70001, 2);
        grad[place] = bf16(std::numeric_limits<float>::quiet_NaN());
        CHECK(std::isnan(grad_norm_squared(Cpu(), grad.data(), grad.count)));
        grad[place] = bf16(-std::numeric_limits<float>::infinity());
        CHECK(grad_norm_squared(Cpu(), grad.data(), grad.count) == std::numeric_limits<double>::infinity());
    }
}

TEST_CASE("grad_norm: the threads do not change a bit") {
    Buffer<float> grad(300001, 3);
    int threads = omp_get_max_threads();
    omp_set_num_threads(1);
    double one = grad_norm_squared(Cpu(), grad.data(), grad.count);
    omp_set_num_threads(3);
    double many = grad_norm_squared(Cpu(), grad.data(), grad.count);
    omp_set_num_threads(threads);
    CHECK(one == many);
    CHECK(one == doctest::Approx(300001).epsilon(0.02)); // chi squared: 300001 +- 775
}
