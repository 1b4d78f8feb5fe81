// Conversions, random and constant values, and sums on the GPU against the CPU.
#include "../layers/convert.cuh"
#include "large.h"

namespace {
constexpr size_t counts[] = {0, 1, 7, 8, 9, 17, 4095, 4096, 4097, 100003};

// Every exponent, ties to even, denormals, infinities.
Buffer<float> all_kinds(size_t count) {
    Buffer<float> x(count);
    for (size_t i = 0; i < count; i++) {
        uint32_t bits = uint32_t(hash64(1, i));
        if (i % 5 == 0) bits = (bits & 0xffff0000u) | 0x8000u; // between two bf16
        if ((bits & 0x7f800000u) == 0x7f800000u) bits &= 0xff800000u;
        memcpy(&x[i], &bits, 4);
    }
    return x;
}

template <class To, class From> void check_convert(const Buffer<From>& from, size_t shift) {
    Buffer<To> cpu(from.count);
    convert(Cpu(), cpu.data() + shift, from.data() + shift, from.count - shift);
    DeviceBuffer<From> from_gpu(from);
    DeviceBuffer<To> to(from.count);
    to.set_first(cpu, shift);
    convert(the_gpu(), to.data() + shift, from_gpu.data() + shift, from.count - shift);
    CHECK(same_bits(to.host(), cpu));
}
} // namespace

TEST_CASE("gpu convert: the CPU's bits at every size, on 16 bytes or not (small)") {
    for (size_t count : counts)
        for (size_t shift : {0, 1}) {
            if (count < shift) continue;
            CAPTURE(count);
            CAPTURE(shift);
            const Buffer<float> x = all_kinds(count);
            const Buffer<bf16> y = converted<bf16>(x);
            check_convert<bf16>(x, shift), check_convert<float>(x, shift);
            check_convert<float>(y, shift), check_convert<bf16>(y, shift);
        }
}

template <class E> static void check_add(const Buffer<E>& x, const Buffer<E>& y, size_t shift) {
    Buffer<E> cpu = converted<E>(x);
    add(Cpu(), cpu.data() + shift, y.data() + shift, x.count - shift);
    DeviceBuffer<E> sum(x), from(y);
    add(the_gpu(), sum.data() + shift, from.data() + shift, x.count - shift);
    CHECK(same_bits(sum.host(), cpu));
}

TEST_CASE("gpu add: the CPU's bits at every size, on 16 bytes or not (small)") {
    for (size_t count : counts)
        for (size_t shift : {0, 1}) {
            if (count < shift) continue;
            CAPTURE(count);
            CAPTURE(shift);
            const Buffer<float> x(count, 1), y(count, 2);
            check_add(x, y, shift), check_add(converted<bf16>(x), converted<bf16>(y), shift);
        }
}

TEST_CASE("gpu convert: a NaN stays one") {
    Buffer<float> x(16);
    for (size_t i = 0; i < 16; i++) {
        const uint32_t bits = 0x7f800001u | uint32_t(i % 2) << 31; // its upper half alone reads as infinity
        memcpy(&x[i], &bits, 4);
    }
    DeviceBuffer<float> from(x);
    DeviceBuffer<bf16> to(16);
    convert(the_gpu(), to.data(), from.data(), 16);
    const Buffer<bf16> result = to.host();
    for (size_t i = 0; i < 16; i++) CHECK(std::isnan(float(result[i])));
}

TEST_CASE("gpu random_normal: the CPU's values (small)") {
    // The two machines' logarithms and cosines differ by some 2^-52, which turns over the last bit of one float in
    // 2^28.
    auto check = [](auto element) {
        using E = decltype(element);
        for (size_t count : {0, 1, 17, 300001}) {
            Buffer<E> cpu(count);
            DeviceBuffer<E> gpu(count);
            random_normal(Cpu(), cpu.data(), count, 5, 1ull << 40, 0.02);
            random_normal(the_gpu(), gpu.data(), count, 5, 1ull << 40, 0.02);
            const Buffer<E> result = gpu.host();
            size_t others = 0;
            for (size_t i = 0; i < count; i++) {
                const double a = float(cpu[i]), b = float(result[i]);
                CHECK_MESSAGE(std::fabs(a - b) <= ulp<E>(a), i);
                others += a != b;
            }
            CHECK(others <= 2);
        }
    };
    check(float()), check(bf16(0));
}

TEST_CASE("gpu fill: one value (small)") {
    for (size_t count : counts) {
        Buffer<bf16> expected(count);
        expected.fill(0.3);
        DeviceBuffer<bf16> x(count);
        DeviceBuffer<float> y(count);
        fill(the_gpu(), x.data(), count, 0.3);
        fill(the_gpu(), y.data(), count, 0.3);
        CHECK(same_bits(x.host(), expected));
        const Buffer<float> result = y.host();
        bool equal = true;
        for (size_t i = 0; i < count; i++) equal = equal && result[i] == float(0.3);
        CHECK(equal);
    }
}

TEST_CASE("gpu sum: exact integers at every size, written or added; the same bits every time (small)") {
    const FreshScratch scratch;
    for (size_t count : counts)
        for (size_t shift : {0, 1}) {
            if (count < shift) continue;
            Buffer<float> x(count);
            double expected = 0;
            for (size_t i = 0; i < count; i++) {
                x[i] = float(int(hash64(1, i) % 2001) - 1000);
                if (i >= shift) expected += x[i];
            }
            DeviceBuffer<float> gpu(x);
            DeviceBuffer<double> total(1);
            sum(the_gpu(), total.data(), gpu.data() + shift, count - shift, false);
            CHECK(total.host()[0] == expected);
            sum(the_gpu(), total.data(), gpu.data() + shift, count - shift, true);
            CHECK(total.host()[0] == 2 * expected);
        }
    DeviceBuffer<float> x(Buffer<float>(1000003, 2));
    DeviceBuffer<double> total(1);
    sum(the_gpu(), total.data(), x.data(), x.count, false);
    const double first = total.host()[0];
    for (int i = 0; i < 5; i++) {
        sum(the_gpu(), total.data(), x.data(), x.count, false);
        CHECK(total.host()[0] == first);
    }
}

TEST_CASE("gpu convert, fill, sum, random_normal: beyond 2^32 elements (large)") {
    const size_t count = (size_t(1) << 32) + 77;
    LargeBuffer<float> x(count);
    LargeBuffer<bf16> y(count);
    DeviceBuffer<double> total(1);
    fill(the_gpu(), x.data(), count, 0.75);
    sum(the_gpu(), total.data(), x.data(), count, false);
    CHECK(total.host()[0] == 0.75 * double(count));
    random_normal(the_gpu(), x.data(), count, 3, 1000, 2);
    convert(the_gpu(), y.data(), x.data(), count);
    for (size_t first : {size_t(0), (size_t(1) << 31) - 50, (size_t(1) << 32) - 50, count - 100}) {
        Buffer<float> cpu(100);
        random_normal(Cpu(), cpu.data(), 100, 3, 1000 + first, 2);
        const Buffer<float> part = x.part(first, 100);
        for (size_t i = 0; i < 100; i++) CHECK(std::fabs(double(part[i] - cpu[i])) <= ulp<float>(cpu[i]));
        CHECK(same_bits(y.part(first, 100), converted<bf16>(part)));
    }
    convert(the_gpu(), x.data(), y.data(), count);
    for (size_t first : {size_t(0), (size_t(1) << 31) - 50, count - 100})
        CHECK(same_bits(x.part(first, 100), converted<float>(y.part(first, 100))));
}
