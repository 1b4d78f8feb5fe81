// The squared gradient norm on the GPU: exact integers, the range of double, the same bits every time.
#include "../layers/grad_norm.cuh"
#include "large.h"

namespace {
template <class G> double squared_norm(const Buffer<G>& grad, size_t shift = 0) {
    const FreshScratch scratch;
    DeviceBuffer<G> grad_gpu(grad);
    DeviceBuffer<double> squared(1);
    CUDA_CHECK(cudaDeviceSynchronize());
    grad_norm_squared(the_gpu(), squared.data(), grad_gpu.data() + shift, grad.count - shift);
    return squared.host()[0];
}

template <class G> void check_integers(size_t count) {
    Buffer<G> grad(count);
    double expected = 0, first = 0;
    for (size_t i = 0; i < count; i++) {
        int value = int(hash64(1, i) % 9) - 4;
        grad[i] = G(float(value)), expected += value * value;
        if (i == 0) first = value * value;
    }
    CHECK(squared_norm(grad) == expected);
    if (count > 0) CHECK(squared_norm(grad, 1) == expected - first);
}
} // namespace

TEST_CASE("gpu grad_norm: sums of squared integers are exact at every size, on 16 bytes or not") {
    for (size_t count : {0, 1, 7, 8, 9, 17, 2047, 2048, 2049, 65537, 1000003, 10000001}) {
        CAPTURE(count);
        check_integers<float>(count);
        check_integers<bf16>(count);
    }
}

TEST_CASE("gpu grad_norm: squares beyond the range of float, and lost beside large ones in float") {
    Buffer<float> grad(100001);
    grad.fill(1), grad[50000] = 1e30f;
    double large = double(1e30f) * double(1e30f);
    CHECK(squared_norm(grad) == doctest::Approx(large).epsilon(1e-15));
    grad[50000] = 4096 * 4096; // its square is 2^48: fp32 would lose each of the 100000 ones
    CHECK(squared_norm(grad) == 0x1p48 + 100000);
}

TEST_CASE("gpu grad_norm: a value that is not finite shows, wherever it stands") {
    for (size_t place : {0, 16, 65535, 65536, 70000}) {
        Buffer<bf16> grad(70001, 2);
        grad[place] = bf16(std::numeric_limits<float>::quiet_NaN());
        CHECK(std::isnan(squared_norm(grad)));
        grad[place] = bf16(-std::numeric_limits<float>::infinity());
        CHECK(squared_norm(grad) == std::numeric_limits<double>::infinity());
    }
}

TEST_CASE("gpu grad_norm: close to the CPU's, and the same bits every time (small)") {
    Buffer<float> grad(3000001, 3);
    Buffer<double> cpu(1);
    grad_norm_squared(Cpu(), cpu.data(), grad.data(), grad.count);
    const double first = squared_norm(grad);
    CHECK(first == doctest::Approx(cpu[0]).epsilon(3e6 * 0x1p-53)); // all terms are positive
    for (int i = 0; i < 5; i++) CHECK(squared_norm(grad) == first);
}

TEST_CASE("gpu grad_norm: beyond 2^32 elements (large)") {
    const size_t count = (size_t(1) << 32) + 77;
    LargeBuffer<bf16> grad(count);
    CUDA_CHECK(cudaMemset(grad, 0x3e, count * sizeof(bf16))); // 95/512
    Buffer<bf16> two(1);
    two[0] = bf16(2.0f);
    for (size_t i : {size_t(0), size_t(1) << 31, count - 1}) grad.set(i, two);
    DeviceBuffer<double> squared(1);
    grad_norm_squared(the_gpu(), squared.data(), grad.data(), count);
    CHECK(squared.host()[0] == (double(count) - 3) * 95 * 95 / (512 * 512) + 3 * 4);
}

TEST_CASE("gpu grad_norm: added to what is there") {
    Buffer<float> grad(70001);
    grad.fill(2);
    DeviceBuffer<float> grad_gpu(grad);
    DeviceBuffer<double> squared(1);
    grad_norm_squared(the_gpu(), squared.data(), grad_gpu.data(), grad.count);
    grad_norm_squared(the_gpu(), squared.data(), grad_gpu.data(), 0, true);
    grad_norm_squared(the_gpu(), squared.data(), grad_gpu.data(), 1000, true);
    CHECK(squared.host()[0] == 4 * 71001.0);
}
