// Cross entropy on the GPU against the CPU.
#include "../layers/loss.cuh"
#include "large.h"

namespace {
struct Size {
    size_t T, V;
};
// One symbol, rows that do not start on 16 bytes, a warp's and a block's borders, vocabularies whose rows do not fit
// into the registers of a block (65536 bf16, 32768 float, 8192 one by one), more tokens than blocks.
constexpr Size sizes[] = {{1, 1},      {1, 17},    {5, 33},     {9, 2},       {4, 8},
                          {7, 256},    {3, 2056},  {3, 32000},  {2, 50257},   {2, 128256},
                          {2, 151936}, {3, 16383}, {300, 1000}, {400, 32000}, {2, 40000}};

// Every third label is not counted; the first two are the row's ends.
Buffer<int32_t> labels(size_t T, size_t V) {
    Buffer<int32_t> label(T);
    for (size_t t = 0; t < T; t++) label[t] = t % 3 == 2 ? -1 - int32_t(t) : int32_t(hash64(3, t) % V);
    label[0] = int32_t(V - 1);
    if (T > 1) label[1] = 0;
    return label;
}

template <class E> void check_layer(size_t T, size_t V, double spread) {
    CAPTURE(T);
    CAPTURE(V);
    CAPTURE(spread);
    const double scale = 0.125;
    const Buffer<int32_t> label = labels(T, V);
    Buffer<E> logits(T * V, 1, spread);
    Buffer<double> logits_double = converted<double>(logits), loss_double(T);
    Buffer<float> loss(T);
    Buffer<int32_t> argmax(T);
    DeviceBuffer<E> logits_gpu(logits);
    DeviceBuffer<float> loss_gpu(T), loss_alone(T);
    DeviceBuffer<int32_t> label_gpu(label), argmax_gpu(T);

    loss_forward(Cpu(), loss.data(), argmax.data(), logits.data(), label.data(), T, V);
    loss_forward_backward(Cpu(), loss.data(), logits.data(), label.data(), scale, T, V);
    loss_forward_backward(Cpu(), loss_double.data(), logits_double.data(), label.data(), scale, T, V);
    loss_forward(the_gpu(), loss_alone.data(), argmax_gpu.data(), logits_gpu.data(), label_gpu.data(), T, V);
    loss_forward_backward(the_gpu(), loss_gpu.data(), logits_gpu.data(), label_gpu.data(), scale, T, V);
    check_2x(loss_gpu.host(), loss, loss_double);
    check_2x(loss_alone.host(), loss, loss_double);
    CHECK(same_bits(argmax_gpu.host(), argmax));
    const Buffer<E> dlogits = logits_gpu.host();
    check_2x(dlogits, logits, logits_double);
    // The largest value of all hides the small ones, so each by itself. The exponential's argument and, in bf16, its
    // product with 1 / ln 2 round to |x - m| 2^-24, x - m being below 2^8 here; the sum adds far less. What is below
    // 2^-120 may be 0. At the label p - 1 cancels.
    const double unit = std::is_same_v<E, bf16> ? 0x1p-8 : 0x1p-23;
    for (size_t t = 0; t < T; t++)
        for (size_t v = 0; v < V; v += 1 + V / 50) {
            const double truth = logits_double[t * V + v], cancelled = int32_t(v) == label[t] ? 0x1p-20 : 0;
            const double allowed = (unit + 0x1p-14) * std::fabs(truth) + cancelled + 0x1p-120;
            CHECK(std::fabs(double(dlogits[t * V + v]) - truth) <= allowed);
        }
}
} // namespace

TEST_CASE("gpu loss: as good as the CPU at every size") {
    for (auto [T, V] : sizes)
        for (double spread : {1.0, 30.0}) check_layer<bf16>(T, V, spread), check_layer<float>(T, V, spread);
}

TEST_CASE("gpu loss: known values") {
    const size_t V = 32000;
    for (float level : {0.0f, -1e30f, 1e30f, 88.0f}) {
        Buffer<float> row(V);
        row.fill(level);
        Buffer<int32_t> last(1);
        last[0] = 31999;
        DeviceBuffer<float> logits(row), loss(1);
        DeviceBuffer<int32_t> label(last), argmax(1);
        loss_forward(the_gpu(), loss.data(), argmax.data(), logits.data(), label.data(), 1, V);
        CHECK(loss.host()[0] == doctest::Approx(std::log(32000.0)).epsilon(1e-6));
        CHECK(argmax.host()[0] == 0);
        loss_forward_backward(the_gpu(), loss.data(), logits.data(), label.data(), 1, 1, V);
        CHECK(loss.host()[0] == doctest::Approx(std::log(32000.0)).epsilon(1e-6));
        CHECK(logits.host()[5] == doctest::Approx(1 / 32000.0).epsilon(1e-5));
    }
}

TEST_CASE("gpu loss: tokens that are not counted, huge logits, values that are not finite (small)") {
    const size_t V = 40;
    const float inf = std::numeric_limits<float>::infinity(), nan = std::numeric_limits<float>::quiet_NaN();
    struct Case {
        float rest, at_label, at_7;
        int32_t label;
        float loss; // NaN: NaN
        int32_t argmax;
    };
    const Case cases[] = {
        {-1e30f, 1e30f, -1e30f, 3, 0, 3}, {-1e30f, -5000, 5000, 39, 10000, 7}, {-1e30f, 0, -inf, 3, 0, 3},
        {-inf, 0, -inf, 3, 0, 3},         {-1e30f, 0, inf, 3, nan, 7},         {-1e30f, 0, nan, 3, nan, 3},
        {-inf, -inf, -inf, 3, nan, 0},    {nan, nan, nan, 3, nan, 0},          {nan, -1, nan, -1, 0, 7}};
    auto check = [&](auto element) {
        using E = decltype(element);
        const size_t T = std::size(cases);
        Buffer<E> rows(T * V);
        Buffer<int32_t> label(T);
        for (size_t t = 0; t < T; t++) {
            for (size_t v = 0; v < V; v++) rows[t * V + v] = E(cases[t].rest);
            if (cases[t].label >= 0) rows[t * V + size_t(cases[t].label)] = E(cases[t].at_label);
            rows[t * V + 7] = E(cases[t].label == -1 ? 2.0f : cases[t].at_7);
            label[t] = cases[t].label;
        }
        DeviceBuffer<E> logits(rows);
        DeviceBuffer<int32_t> label_gpu(label), argmax(T);
        DeviceBuffer<float> loss(T), loss_both(T);
        loss_forward(the_gpu(), loss.data(), argmax.data(), logits.data(), label_gpu.data(), T, V);
        loss_forward_backward(the_gpu(), loss_both.data(), logits.data(), label_gpu.data(), 1, T, V);
        Buffer<E> d = logits.host();
        for (size_t t = 0; t < T; t++) {
            CAPTURE(t);
            for (const Buffer<float>& result : {loss.host(), loss_both.host()}) {
                if (std::isnan(cases[t].loss)) CHECK(std::isnan(result[t]));
                else CHECK(result[t] == doctest::Approx(cases[t].loss).epsilon(0.002)); // bf16(5000) is 4992
            }
            CHECK(argmax.host()[t] == cases[t].argmax);
        }
        for (size_t v = 0; v < V; v++) {
            CHECK(float(d[V + v]) == (v == 7 ? 1 : v == 39 ? -1 : 0)); // the softmax puts all on 7
            CHECK(float(d[8 * V + v]) == 0);                           // not counted
        }
    };
    check(float()), check(bf16(0));
    // No argmax wanted, and no token.
    DeviceBuffer<float> logits(Buffer<float>(V, 1)), loss(Buffer<float>(1));
    DeviceBuffer<int32_t> label(labels(1, V));
    loss_forward(the_gpu(), loss.data(), nullptr, logits.data(), label.data(), 0, V);
    loss_forward_backward(the_gpu(), loss.data(), logits.data(), label.data(), 1, 0, V);
    CHECK(std::isnan(loss.host()[0]));
    loss_forward(the_gpu(), loss.data(), nullptr, logits.data(), label.data(), 1, V);
    CHECK(loss.host()[0] > 0);
}

TEST_CASE("gpu loss: argmax takes the first of equals, at every place") {
    for (size_t V : {37, 2056}) {
        Buffer<bf16> logits(V * V);
        logits.fill(-2);
        for (size_t t = 0; t < V; t++) logits[t * V + t] = bf16(3), logits[t * V + V - 1] = bf16(3);
        Buffer<int32_t> label(V);
        label.fill(0);
        DeviceBuffer<bf16> logits_gpu(logits);
        DeviceBuffer<int32_t> label_gpu(label), argmax(V);
        DeviceBuffer<float> loss(V);
        loss_forward(the_gpu(), loss.data(), argmax.data(), logits_gpu.data(), label_gpu.data(), V, V);
        Buffer<int32_t> found = argmax.host();
        bool right = true;
        for (size_t t = 0; t < V; t++) right = right && found[t] == int32_t(t);
        CHECK(right);
    }
}

TEST_CASE("gpu loss: the same bits every time (small)") {
    const size_t T = 200, V = 32000;
    const Buffer<bf16> logits(T * V, 1, 3);
    DeviceBuffer<int32_t> label(labels(T, V));
    auto run = [&] {
        DeviceBuffer<bf16> x(logits);
        DeviceBuffer<float> loss(T);
        loss_forward_backward(the_gpu(), loss.data(), x.data(), label.data(), 1e-4, T, V);
        return std::pair(x.host(), loss.host());
    };
    auto [d, loss] = run();
    for (int i = 0; i < 3; i++) {
        auto [d_again, loss_again] = run();
        CHECK(same_bits(d, d_again));
        CHECK(same_bits(loss, loss_again));
    }
}

TEST_CASE("gpu loss: beyond 2^32 elements (large)") {
    const size_t V = 32000, T = (size_t(1) << 32) / V + 500;
    LargeBuffer<bf16> logits(T * V, 1, 5);
    LargeBuffer<float> loss(T), loss_alone(T);
    DeviceBuffer<int32_t> label(labels(T, V)), argmax(T);
    const Buffer<int32_t> label_host = labels(T, V);
    for (size_t t : {size_t(0), (size_t(1) << 31) / V, T / 2, T - 2, T - 1}) {
        Buffer<bf16> before = logits.part(t * V, V);
        Buffer<double> truth = converted<double>(before), loss_truth(1);
        Buffer<float> loss_cpu(1);
        Buffer<int32_t> argmax_cpu(1);
        loss_forward(the_gpu(), loss_alone.data(), argmax.data(), logits.data(), label.data(), T, V);
        loss_forward(Cpu(), loss_cpu.data(), argmax_cpu.data(), before.data(), label_host.data() + t, 1, V);
        CHECK(argmax.host()[t] == argmax_cpu[0]);
        loss_forward_backward(Cpu(), loss_cpu.data(), before.data(), label_host.data() + t, 1, 1, V);
        loss_forward_backward(Cpu(), loss_truth.data(), truth.data(), label_host.data() + t, 1, 1, V);
        check_2x(loss_alone.part(t, 1), loss_cpu, loss_truth);
        large_fill_kernel<<<2048, 256>>>(logits.data(), T * V, 1, 5.0f);
        CUDA_CHECK(cudaDeviceSynchronize());
        loss_forward_backward(the_gpu(), loss.data(), logits.data(), label.data(), 1, T, V);
        check_2x(loss.part(t, 1), loss_cpu, loss_truth);
        check_2x(logits.part(t * V, V), before, truth);
        large_fill_kernel<<<2048, 256>>>(logits.data(), T * V, 1, 5.0f);
        CUDA_CHECK(cudaDeviceSynchronize());
    }
}
