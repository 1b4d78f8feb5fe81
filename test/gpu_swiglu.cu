// SwiGLU on the GPU against the CPU.
#include "../layers/swiglu.cuh"
#include "large.h"

namespace {
struct Size {
    size_t T, F;
};
// Single elements, rows that do not start on 16 bytes, a strip's border (1024 features of bf16), an odd last token.
constexpr Size sizes[] = {{1, 1}, {1, 17}, {3, 5}, {7, 33}, {5, 64}, {3, 1024}, {4, 1032}, {2, 2056}, {5, 1001}};

// `shift` elements into its buffer, every array misses the 16 bytes.
template <class E> void check_layer(size_t T, size_t F, double scale, bool alias, size_t shift) {
    Buffer<E> gate_up(T * 2 * F + shift, 1, scale), dout(T * F + shift, 2), out(T * F + shift),
        dgate_up(T * 2 * F + shift);
    Buffer<double> gate_up_double = converted<double>(gate_up), dout_double = converted<double>(dout);
    Buffer<double> out_double(T * F + shift), dgate_up_double(T * 2 * F + shift);
    DeviceBuffer<E> gate_up_gpu(gate_up), dout_gpu(dout), out_gpu(T * F + shift), dgate_up_gpu(T * 2 * F + shift);
    for (size_t i = 0; i < shift; i++) { // the place before the first row is nobody's
        out[i] = E(0), dgate_up[i] = gate_up[i], out_double[i] = 0, dgate_up_double[i] = gate_up_double[i];
    }
    swiglu_forward(Cpu(), out + shift, gate_up + shift, T, F);
    swiglu_backward(Cpu(), dgate_up + shift, dout + shift, gate_up + shift, T, F);
    swiglu_forward(Cpu(), out_double + shift, gate_up_double + shift, T, F);
    swiglu_backward(Cpu(), dgate_up_double + shift, dout_double + shift, gate_up_double + shift, T, F);

    out_gpu.set_first(out, shift), dgate_up_gpu.set_first(dgate_up, shift);
    swiglu_forward(the_gpu(), out_gpu + shift, gate_up_gpu + shift, T, F);
    DeviceBuffer<E>& result = alias ? gate_up_gpu : dgate_up_gpu;
    swiglu_backward(the_gpu(), result + shift, dout_gpu + shift, gate_up_gpu + shift, T, F);
    check_2x(out_gpu.host(), out, out_double);
    check_2x(result.host(), dgate_up, dgate_up_double);
    CHECK(same_bits(dout_gpu.host(), dout));
}
} // namespace

TEST_CASE("gpu swiglu: as good as the CPU at every size, in place or not, on 16 bytes or not") {
    for (auto [T, F] : sizes)
        for (double scale : {1.0, 8.0})
            for (bool alias : {false, true})
                for (size_t shift : {0, 1}) {
                    CAPTURE(T);
                    CAPTURE(F);
                    CAPTURE(scale);
                    CAPTURE(alias);
                    CAPTURE(shift);
                    check_layer<bf16>(T, F, scale, alias, shift);
                    check_layer<float>(T, F, scale, alias, shift);
                }
    check_layer<bf16>(37, 11008, 2, true, 0);
}

TEST_CASE("gpu swiglu: strips, packs and single elements, in place or not (small)") {
    for (bool alias : {false, true})
        for (size_t shift : {0, 1}) {
            check_layer<bf16>(3, 1032, 1, alias, shift);
            check_layer<float>(2, 520, 1, alias, shift);
        }
}

TEST_CASE("gpu swiglu: the ends of the range (small)") {
    const float inf = std::numeric_limits<float>::infinity(), nan = std::numeric_limits<float>::quiet_NaN();
    const float gate[] = {0, 800, -800, 3e38f, -3e38f, -100, inf, nan};
    auto run = [&](auto element) {
        using E = decltype(element);
        Buffer<E> gate_up(16), dout(8);
        for (size_t f = 0; f < 8; f++)
            gate_up[f] = E(gate[f]), gate_up[8 + f] = E(f == 3 ? 0.5f : 2.0f), dout[f] = E(1.0f);
        DeviceBuffer<E> in(gate_up), d(dout), out(8), din(16);
        swiglu_forward(the_gpu(), out.data(), in.data(), 1, 8);
        swiglu_backward(the_gpu(), din.data(), d.data(), in.data(), 1, 8);
        const Buffer<E> y = out.host(), dx = din.host();
        CHECK(float(y[0]) == 0);
        CHECK(float(y[1]) == 1600);
        CHECK(float(y[2]) == 0);
        CHECK(float(y[3]) == doctest::Approx(1.5e38).epsilon(0.01));
        CHECK(float(y[4]) == 0);
        CHECK(std::fabs(float(y[5])) < 1e-30f);
        CHECK(float(y[6]) == inf);
        CHECK(std::isnan(float(y[7])));
        CHECK(float(dx[0]) == 1);       // silu'(0) = 1/2, times up
        CHECK(float(dx[1]) == 2);       // silu' -> 1
        CHECK(float(dx[2]) == 0);       // silu' -> 0
        CHECK(float(dx[8 + 1]) == 800); // silu
        CHECK(float(dx[8 + 2]) == 0);
        CHECK(std::isnan(float(dx[7])));
    };
    run(bf16(0)), run(float());
}

TEST_CASE("gpu swiglu: no token is no work (small)") {
    DeviceBuffer<bf16> untouched(Buffer<bf16>(8));
    swiglu_forward(the_gpu(), untouched.data(), untouched.data(), 0, 8);
    swiglu_backward(the_gpu(), untouched.data(), untouched.data(), untouched.data(), 0, 8);
    Buffer<bf16> after = untouched.host();
    for (size_t i = 0; i < 8; i++) CHECK(std::isnan(float(after[i])));
}

TEST_CASE("gpu swiglu: beyond 2^32 elements (large)") {
    const size_t F = 11008, T = (size_t(1) << 32) / (2 * F) + 1000;
    LargeBuffer<bf16> gate_up(T * 2 * F, 1, 4), dout(T * F, 2), out(T * F);
    const size_t rows[] = {0, (size_t(1) << 31) / (2 * F), T / 2, T - 2, T - 1};
    std::vector<Buffer<bf16>> in, dy;
    for (size_t t : rows) in.push_back(gate_up.part(t * 2 * F, 2 * F)), dy.push_back(dout.part(t * F, F));
    swiglu_forward(the_gpu(), out.data(), gate_up.data(), T, F);
    swiglu_backward(the_gpu(), gate_up.data(), dout.data(), gate_up.data(), T, F);
    for (size_t r = 0; r < in.size(); r++) {
        Buffer<double> x = converted<double>(in[r]), d = converted<double>(dy[r]), y(F), dx(2 * F);
        Buffer<bf16> y_cpu(F), dx_cpu(2 * F);
        swiglu_forward(Cpu(), y.data(), x.data(), 1, F);
        swiglu_backward(Cpu(), dx.data(), d.data(), x.data(), 1, F);
        swiglu_forward(Cpu(), y_cpu.data(), in[r].data(), 1, F);
        swiglu_backward(Cpu(), dx_cpu.data(), dy[r].data(), in[r].data(), 1, F);
        check_2x(out.part(rows[r] * F, F), y_cpu, y);
        check_2x(gate_up.part(rows[r] * 2 * F, 2 * F), dx_cpu, dx);
    }
}
