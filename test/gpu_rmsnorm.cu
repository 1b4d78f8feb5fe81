// RMSNorm on the GPU against the CPU.
#include "../layers/rmsnorm.cuh"
#include "large.h"

namespace {
struct Size {
    size_t T, C;
};
// Single channels, rows that do not start on 16 bytes, fewer channels than a warp, a few packs short of full threads,
// more tokens than blocks, rows that do not fit into the registers of a block (16384 channels of bf16 in the backward,
// 32768 in the forward; 2048 and 4096 one by one).
constexpr Size sizes[] = {{1, 1},    {1, 17},     {5, 33},      {67, 3},    {130, 17},  {9, 1000},  {3, 4096}, {5, 8},
                          {2, 4104}, {5000, 264}, {1000, 4096}, {33, 2056}, {3, 20000}, {2, 40008}, {3, 5003}};
constexpr double eps = 1e-5;

// Both directions on the CPU, in E or in double.
template <class E, class G> struct Reference {
    Buffer<E> in, weight, dout, dresidual, out, din;
    Buffer<Acc<E>> rstd;
    Buffer<G> dweight;

    Reference(size_t T, size_t C)
        : in(T * C, 1), weight(C, 2), dout(T * C, 3), dresidual(T * C, 4), out(T * C), din(T * C), rstd(T),
          dweight(C, 5) {}
    void run(size_t T, size_t C, bool residual) {
        rmsnorm_forward(Cpu(), out.data(), rstd.data(), in.data(), weight.data(), T, C, eps);
        rmsnorm_backward(Cpu(), din.data(), dweight.data(), dout.data(), in.data(), weight.data(), rstd.data(),
                         residual ? dresidual.data() : nullptr, T, C);
    }
};

template <class E, class G> void check_layer(size_t T, size_t C, bool residual, bool alias) {
    CAPTURE(T);
    CAPTURE(C);
    CAPTURE(residual);
    CAPTURE(alias);
    Reference<E, G> cpu(T, C);
    Reference<double, double> truth(T, C);
    convert_to(truth.in, cpu.in), convert_to(truth.weight, cpu.weight), convert_to(truth.dout, cpu.dout);
    convert_to(truth.dresidual, cpu.dresidual), convert_to(truth.dweight, cpu.dweight);
    DeviceBuffer<E> in(cpu.in), weight(cpu.weight), dout(cpu.dout), dresidual(cpu.dresidual), out(T * C), din(T * C);
    DeviceBuffer<float> rstd(T);
    DeviceBuffer<G> dweight(cpu.dweight);
    cpu.run(T, C, residual), truth.run(T, C, residual);

    rmsnorm_forward(the_gpu(), out.data(), rstd.data(), in.data(), weight.data(), T, C, eps);
    DeviceBuffer<E>& result = alias ? dresidual : din;
    rmsnorm_backward(the_gpu(), result.data(), dweight.data(), dout.data(), in.data(), weight.data(), rstd.data(),
                     residual ? dresidual.data() : nullptr, T, C);
    check_2x(out.host(), cpu.out, truth.out);
    check_2x(rstd.host(), cpu.rstd, truth.rstd);
    check_2x(dweight.host(), cpu.dweight, truth.dweight);
    if (C > 1 || residual) return check_2x(result.host(), cpu.din, truth.din);
    // One channel: g - n mean(g n) cancels but for eps, and what is left are the roundings of some 12 operations.
    const Buffer<E> dx = result.host();
    for (size_t t = 0; t < T; t++) {
        const double terms = std::fabs(truth.rstd[t] * truth.dout[t] * truth.weight[0]);
        CHECK(std::fabs(double(dx[t]) - truth.din[t]) <= 12 * 0x1p-24 * terms + ulp<E>(truth.din[t]));
    }
}
} // namespace

TEST_CASE("gpu rmsnorm: as good as the CPU at every size, with and without residual, in place or not") {
    for (auto [T, C] : sizes)
        for (int way : {0, 1, 2}) {
            check_layer<bf16, bf16>(T, C, way > 0, way == 2);
            check_layer<bf16, float>(T, C, way > 0, way == 2);
            check_layer<float, float>(T, C, way > 0, way == 2);
        }
}

TEST_CASE("gpu rmsnorm: rows that miss the 16 bytes are taken one by one (small)") {
    const size_t T = 9, C = 72;
    Reference<bf16, float> cpu(T, C), shifted(T, C);
    cpu.run(T, C, true);
    DeviceBuffer<bf16> in(T * C + 1), out(T * C + 1), weight(cpu.weight);
    out.set_first(Buffer<bf16>(1), 1); // nobody's
    CUDA_CHECK(cudaMemcpy(in + 1, cpu.in.data(), T * C * 2, cudaMemcpyHostToDevice));
    CUDA_CHECK(cudaDeviceSynchronize());
    DeviceBuffer<float> rstd(T);
    rmsnorm_forward(the_gpu(), out + 1, rstd.data(), in + 1, weight.data(), T, C, eps);
    const Buffer<bf16> result = out.host();
    CHECK(std::isnan(float(result[0])));
    // rstd may differ in its last bit, and so a bf16 at the border between two.
    for (size_t i = 0; i < T * C; i++) {
        const double y = double(float(cpu.out[i]));
        CHECK(std::fabs(double(float(result[i + 1])) - y) <= ulp<bf16>(y));
    }
    Reference<double, double> truth(T, C);
    convert_to(truth.in, cpu.in), convert_to(truth.weight, cpu.weight), convert_to(truth.dout, cpu.dout);
    convert_to(truth.dresidual, cpu.dresidual), convert_to(truth.dweight, shifted.dweight);
    truth.run(T, C, true);
    DeviceBuffer<bf16> dout(T * C + 1), dresidual(T * C + 1), din(T * C + 1);
    din.set_first(Buffer<bf16>(1), 1);
    DeviceBuffer<float> dweight(shifted.dweight);
    CUDA_CHECK(cudaMemcpy(dout + 1, cpu.dout.data(), T * C * 2, cudaMemcpyHostToDevice));
    CUDA_CHECK(cudaMemcpy(dresidual + 1, cpu.dresidual.data(), T * C * 2, cudaMemcpyHostToDevice));
    CUDA_CHECK(cudaDeviceSynchronize());
    rmsnorm_backward(the_gpu(), din + 1, dweight.data(), dout + 1, in + 1, weight.data(), rstd.data(), dresidual + 1, T,
                     C);
    const Buffer<bf16> written = din.host();
    Buffer<bf16> rows(T * C);
    std::copy_n(written.data() + 1, T * C, rows.data());
    CHECK(std::isnan(float(written[0])));
    check_2x(rows, cpu.din, truth.din);
    check_2x(dweight.host(), cpu.dweight, truth.dweight);
}

TEST_CASE("gpu rmsnorm: no token is no work; the same bits every time (small)") {
    const size_t T = 1500, C = 520;
    Reference<bf16, float> cpu(T, C);
    DeviceBuffer<bf16> in(cpu.in), weight(cpu.weight), dout(cpu.dout), din(Buffer<bf16>(T * C));
    DeviceBuffer<bf16> out(Buffer<bf16>(T * C));
    DeviceBuffer<float> rstd(T), dweight(cpu.dweight);
    const bf16* none = nullptr;
    rmsnorm_forward(the_gpu(), out.data(), rstd.data(), in.data(), weight.data(), 0, C, eps);
    rmsnorm_backward(the_gpu(), din.data(), dweight.data(), dout.data(), in.data(), weight.data(), rstd.data(), none, 0,
                     C);
    CHECK(same_bits(dweight.host(), cpu.dweight));
    CHECK(std::isnan(float(out.host()[0])));
    CHECK(std::isnan(float(din.host()[0])));

    auto run = [&](Buffer<bf16>* dx) {
        dweight.set(cpu.dweight);
        rmsnorm_forward(the_gpu(), out.data(), rstd.data(), in.data(), weight.data(), T, C, eps);
        rmsnorm_backward(the_gpu(), din.data(), dweight.data(), dout.data(), in.data(), weight.data(), rstd.data(),
                         none, T, C);
        convert_to(*dx, din.host());
        return dweight.host();
    };
    Buffer<bf16> dx(T * C), dx_again(T * C);
    Buffer<float> first = run(&dx);
    for (int i = 0; i < 5; i++) {
        CHECK(same_bits(first, run(&dx_again)));
        CHECK(same_bits(dx, dx_again));
    }
}

TEST_CASE("gpu rmsnorm: beyond 2^32 elements (large)") {
    const size_t C = 16384, T = (size_t(1) << 32) / C + 999;
    const std::vector<size_t> rows = {0, 1, (size_t(1) << 31) / C, T / 2 + 1, T - 2, T - 1};
    LargeBuffer<bf16> in(T * C, 1), dout(T * C), dx(T * C, 2);
    CUDA_CHECK(cudaMemset(dout, 0, T * C * 2)); // but for these rows: they alone make dweight
    LargeBuffer<float> rstd(T), dweight(C, 6);
    Reference<bf16, float> cpu(rows.size(), C);
    Reference<double, double> truth(rows.size(), C);
    for (size_t r = 0; r < rows.size(); r++) {
        Buffer<bf16> x = in.part(rows[r] * C, C), residual = dx.part(rows[r] * C, C), dy(C, 10 + r);
        dout.set(rows[r] * C, dy);
        for (size_t c = 0; c < C; c++)
            cpu.in[r * C + c] = x[c], cpu.dout[r * C + c] = dy[c], cpu.dresidual[r * C + c] = residual[c];
    }
    convert_to(cpu.dweight, dweight.part(0, C));
    convert_to(truth.in, cpu.in), convert_to(truth.weight, cpu.weight), convert_to(truth.dout, cpu.dout);
    convert_to(truth.dresidual, cpu.dresidual), convert_to(truth.dweight, cpu.dweight);
    DeviceBuffer<bf16> weight(cpu.weight);
    cpu.run(rows.size(), C, true), truth.run(rows.size(), C, true);

    LargeBuffer<bf16> out(T * C);
    rmsnorm_forward(the_gpu(), out.data(), rstd.data(), in.data(), weight.data(), T, C, eps);
    rmsnorm_backward(the_gpu(), dx.data(), dweight.data(), dout.data(), in.data(), weight.data(), rstd.data(),
                     dx.data(), T, C);
    Buffer<bf16> out_rows(rows.size() * C), din_rows(rows.size() * C);
    for (size_t r = 0; r < rows.size(); r++) {
        Buffer<bf16> y = out.part(rows[r] * C, C), d = dx.part(rows[r] * C, C);
        for (size_t c = 0; c < C; c++) out_rows[r * C + c] = y[c], din_rows[r * C + c] = d[c];
    }
    check_2x(out_rows, cpu.out, truth.out);
    check_2x(din_rows, cpu.din, truth.din);
    check_2x(dweight.part(0, C), cpu.dweight, truth.dweight);
}
