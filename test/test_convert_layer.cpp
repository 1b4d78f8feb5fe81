// Conversions, random and constant values, sums.
#include "../layers/convert.cuh"
#include "check.h"
#include <omp.h>

TEST_CASE("convert: to the nearest value, exact where the type can hold it") {
    Buffer<float> x(70001, 1);
    x[0] = 1 + 0x1p-8f, x[1] = 1 + 0x3p-8f, x[2] = std::numeric_limits<float>::infinity(), x[3] = -0.0f;
    Buffer<bf16> y(x.count);
    Buffer<double> wide(x.count);
    convert(Cpu(), y.data(), x.data(), x.count);
    convert(Cpu(), wide.data(), x.data(), x.count);
    CHECK(float(y[0]) == 1);           // the tie goes to the even one
    CHECK(float(y[1]) == 1 + 0x1p-6f); // up or down
    CHECK(std::isinf(float(y[2])));
    CHECK(std::signbit(float(y[3])));
    for (size_t i = 4; i < x.count; i++) {
        CHECK(std::fabs(double(float(y[i])) - double(x[i])) <= ulp<bf16>(x[i]) / 2);
        CHECK(wide[i] == double(x[i]));
    }
    Buffer<float> back(x.count);
    convert(Cpu(), back.data(), y.data(), x.count);
    for (size_t i = 0; i < x.count; i++) CHECK(back[i] == float(y[i]));
    convert(Cpu(), back.data(), y.data(), 0);
}

TEST_CASE("add: rounded once, at every size") {
    for (size_t count : {0, 1, 17, 4097}) {
        Buffer<float> x(count, 1), y(count, 2);
        Buffer<bf16> a = converted<bf16>(x), b = converted<bf16>(y), sum = converted<bf16>(x);
        add(Cpu(), sum.data(), b.data(), count);
        for (size_t i = 0; i < count; i++) CHECK(float(sum[i]) == float(bf16(float(a[i]) + float(b[i]))));
    }
}

TEST_CASE("random_normal: a function of seed and place alone, with the deviation that was asked for") {
    const size_t count = 40000;
    Buffer<double> whole(count), parts(count), other(count);
    int threads = omp_get_max_threads();
    omp_set_num_threads(1), random_normal(Cpu(), whole.data(), count, 7, 100, 0.02);
    omp_set_num_threads(3), random_normal(Cpu(), parts.data(), 999, 7, 100, 0.02);
    random_normal(Cpu(), parts.data() + 999, count - 999, 7, 1099, 0.02);
    omp_set_num_threads(threads);
    random_normal(Cpu(), other.data(), count, 8, 100, 0.02);
    CHECK(largest_error(whole, parts) == 0);
    CHECK(largest_error(whole, other) > 0);
    double mean = 0, square = 0;
    for (size_t i = 0; i < count; i++) mean += whole[i] / count, square += whole[i] * whole[i] / count;
    // The mean's deviation is 0.02 / sqrt(count), that of the mean square sqrt(2) 0.02^2 / sqrt(count).
    CHECK(std::fabs(mean) < 5 * 0.02 / std::sqrt(double(count)));
    CHECK(std::fabs(square / (0.02 * 0.02) - 1) < 5 * std::sqrt(2.0 / double(count)));
    Buffer<bf16> rounded(count);
    random_normal(Cpu(), rounded.data(), count, 7, 100, 0.02);
    for (size_t i = 0; i < count; i++) CHECK(float(rounded[i]) == float(bf16(float(whole[i]))));
}

TEST_CASE("fill and sum: exact") {
    Buffer<float> x(1001);
    fill(Cpu(), x.data(), x.count, 0.75);
    Buffer<double> total(1);
    sum(Cpu(), total.data(), x.data(), x.count, false);
    CHECK(total[0] == 0.75 * 1001);
    sum(Cpu(), total.data(), x.data(), 1, true);
    CHECK(total[0] == 0.75 * 1002);
    sum(Cpu(), total.data(), x.data(), 0, true);
    CHECK(total[0] == 0.75 * 1002);
    x[0] = 0x1p30f; // beside this fp32 would lose every 0.75
    sum(Cpu(), total.data(), x.data(), x.count, false);
    CHECK(total[0] == 0x1p30 + 750);
    Buffer<bf16> y(17);
    fill(Cpu(), y.data(), 16, 3);
    CHECK(float(y[15]) == 3);
    CHECK(std::isnan(float(y[16])));
    sum(Cpu(), total.data(), x.data(), 0, false);
    CHECK(total[0] == 0);
}
