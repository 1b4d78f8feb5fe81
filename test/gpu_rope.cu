// RoPE on the GPU against the CPU.
#include "../rope.cuh"
#include "large.h"

namespace {
struct Size {
    size_t T, H, K, D;
};
// One pair, halves that do not start on 16 bytes, more heads than a block turns at once, no key heads, large heads.
constexpr Size sizes[] = {{1, 1, 1, 2},    {7, 4, 2, 18},    {9, 3, 1, 34},  {5, 32, 32, 128},
                          {3, 71, 1, 64},  {4, 5, 0, 16},    {2, 1, 1, 576}, {3, 2, 1, 40},
                          {2, 8, 8, 1024}, {33, 32, 8, 128}, {3, 0, 2, 32},  {2, 1, 1, 2050}};

struct Angles {
    std::vector<double> inv_freq;
    double factor;
    Buffer<int32_t> pos;

    Angles(size_t T, size_t D, int32_t stride) : inv_freq(D / 2), pos(T) {
        factor = 1.25 * rope_frequencies(inv_freq.data(), RopeConfig(), D, T);
        for (size_t t = 0; t < T; t++) pos[t] = int32_t(t) * stride;
    }
};

// Tables of the same angles on the GPU, and on the CPU in float and double.
template <class E> void check_table(size_t T, size_t D, int32_t stride, RopePrecision precision) {
    Angles a(T, D, stride);
    const double* f = a.inv_freq.data();
    Buffer<float> cpu(T * D);
    Buffer<double> truth(T * D);
    DeviceBuffer<int32_t> pos(a.pos);
    DeviceBuffer<float> table(T * D);
    rope_table<E>(Cpu(), cpu.data(), a.pos.data(), f, a.factor, precision, T, D);
    rope_table<double>(Cpu(), truth.data(), a.pos.data(), f, a.factor, precision, T, D);
    rope_table<E>(the_gpu(), table.data(), pos.data(), f, a.factor, precision, T, D);
    check_2x(table.host(), cpu, truth);
}

template <class E> void check_rotation(size_t T, size_t H, size_t K, size_t D, RopePrecision precision, size_t shift) {
    CAPTURE(T);
    CAPTURE(H);
    CAPTURE(K);
    CAPTURE(D);
    CAPTURE(rope_precision_name(precision));
    CAPTURE(shift);
    Angles a(T, D, 1237);
    const size_t row = (H + 2 * K) * D;
    Buffer<float> table(T * D);
    rope_table<E>(Cpu(), table.data(), a.pos.data(), a.inv_freq.data(), a.factor, precision, T, D);
    DeviceBuffer<float> table_gpu(table);
    const Buffer<double> table_double = converted<double>(table);
    for (bool backward : {false, true}) {
        Buffer<E> cpu(T * row + shift, 1);
        Buffer<double> truth = converted<double>(cpu);
        DeviceBuffer<E> gpu(cpu);
        if (backward) {
            rope_backward(Cpu(), cpu.data() + shift, table.data(), precision, T, H, K, D);
            rope_backward(Cpu(), truth.data() + shift, table_double.data(), precision, T, H, K, D);
            rope_backward(the_gpu(), gpu.data() + shift, table_gpu.data(), precision, T, H, K, D);
        } else {
            rope_forward(Cpu(), cpu.data() + shift, table.data(), precision, T, H, K, D);
            rope_forward(Cpu(), truth.data() + shift, table_double.data(), precision, T, H, K, D);
            rope_forward(the_gpu(), gpu.data() + shift, table_gpu.data(), precision, T, H, K, D);
        }
        const Buffer<E> result = gpu.host(), start(T * row + shift, 1);
        check_2x(result, cpu, truth);
        // Products and sums that are each rounded to bf16 leave nothing to the device.
        if (precision == RopePrecision::bf16_rotation || precision == RopePrecision::bf16_angle)
            CHECK(largest_error(result, cpu) == 0);
        for (size_t t = 0; t < T; t++) // values pass unturned
            CHECK(largest_error(result.data() + shift + t * row + (H + K) * D,
                                start.data() + shift + t * row + (H + K) * D, K * D) == 0);
    }
}
} // namespace

TEST_CASE("gpu rope: the table, at every precision, up to positions of millions") {
    for (const RopePrecisionName& variant : rope_precision_names)
        for (int32_t stride : {1, 37, 40000})
            for (size_t D : {2, 128, 576, 1030, 2050}) {
                check_table<bf16>(100, D, stride, variant.precision);
                check_table<float>(100, D, stride, variant.precision);
            }
}

TEST_CASE("gpu rope: as good as the CPU, forward and backward, at every precision and size, on 16 bytes or not") {
    for (auto [T, H, K, D] : sizes)
        for (const RopePrecisionName& variant : rope_precision_names)
            for (size_t shift : {0, 1}) {
                check_rotation<bf16>(T, H, K, D, variant.precision, shift);
                check_rotation<float>(T, H, K, D, variant.precision, shift);
            }
}

TEST_CASE("gpu rope: packs and single elements (small)") {
    check_table<bf16>(20, 64, 37, RopePrecision::exact);
    for (size_t shift : {0, 1}) {
        check_rotation<bf16>(5, 3, 1, 64, RopePrecision::exact, shift);
        check_rotation<float>(5, 3, 1, 64, RopePrecision::bf16_rotation, shift);
    }
}

TEST_CASE("gpu rope: no token is no work (small)") {
    DeviceBuffer<bf16> untouched(Buffer<bf16>(8));
    DeviceBuffer<float> table(Buffer<float>(8));
    DeviceBuffer<int32_t> pos(1);
    const double f[] = {1, 1};
    rope_table<bf16>(the_gpu(), table.data(), pos.data(), f, 1, RopePrecision::exact, 0, 4);
    rope_forward(the_gpu(), untouched.data(), table.data(), RopePrecision::exact, 0, 1, 1, 4);
    CHECK(std::isnan(table.host()[0]));
    CHECK(std::isnan(float(untouched.host()[0])));
}

TEST_CASE("gpu rope: beyond 2^32 elements (large)") {
    const size_t H = 32, K = 32, D = 128, row = (H + 2 * K) * D, T = (size_t(1) << 32) / row + 1000;
    Angles a(T, D, 3);
    LargeBuffer<bf16> qkv(T * row, 1);
    LargeBuffer<float> table(T * D);
    DeviceBuffer<int32_t> pos(a.pos);
    CUDA_CHECK(cudaDeviceSynchronize());
    const size_t rows[] = {0, 1, (size_t(1) << 31) / row, T / 2 + 1, T - 1};
    rope_table<bf16>(the_gpu(), table.data(), pos.data(), a.inv_freq.data(), a.factor, RopePrecision::exact, T, D);
    auto rotate = [&](bool backward, auto dev, auto* x, const auto* angles, size_t tokens) {
        backward ? rope_backward(dev, x, angles, RopePrecision::exact, tokens, H, K, D)
                 : rope_forward(dev, x, angles, RopePrecision::exact, tokens, H, K, D);
    };
    for (bool backward : {false, true}) {
        CAPTURE(backward);
        std::vector<Buffer<bf16>> before;
        for (size_t t : rows) before.push_back(qkv.part(t * row, row));
        rotate(backward, the_gpu(), qkv.data(), table.data(), T);
        for (size_t r = 0; r < before.size(); r++) {
            const int32_t* p = a.pos.data() + rows[r];
            Buffer<float> angles(D);
            Buffer<double> angles_double(D), truth = converted<double>(before[r]);
            rope_table<bf16>(Cpu(), angles.data(), p, a.inv_freq.data(), a.factor, RopePrecision::exact, 1, D);
            rope_table<double>(Cpu(), angles_double.data(), p, a.inv_freq.data(), a.factor, RopePrecision::exact, 1, D);
            check_2x(table.part(rows[r] * D, D), angles, angles_double);
            rotate(backward, Cpu(), before[r].data(), angles.data(), 1);
            rotate(backward, Cpu(), truth.data(), angles_double.data(), 1);
            check_2x(qkv.part(rows[r] * row, row), before[r], truth);
        }
    }
}
