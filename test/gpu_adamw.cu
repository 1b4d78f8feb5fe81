// AdamW on the GPU against the CPU: the same random bits, as good as the CPU before they are used.
#include "../layers/adamw.cuh"
#include "large.h"

namespace {
constexpr AdamW defaults = {1e-2, 0.9, 0.95, 1e-8, 0.1, 1234};

// In device memory.
struct Step {
    AdamWStep* place;
    explicit Step(const AdamWStep& step) : place((AdamWStep*)device_allocate(the_gpu(), sizeof step)) {
        copy_to_device(the_gpu(), place, &step, sizeof step);
    }
    ~Step() { CUDA_CHECK(cudaFree(place)); }
};

template <class E> void copy(Buffer<E>& to, const Buffer<E>& from) {
    memcpy((void*)to.data(), from.data(), from.count * sizeof(E));
}

// Parameters with a state as in the middle of a training.
template <class P, class G, class M> struct State {
    size_t count;
    bool with_master;
    Buffer<P> param;
    Buffer<Acc<P>> master;
    Buffer<M> m, v;
    Buffer<G> grad;

    State(size_t count, bool with_master)
        : count(count), with_master(with_master), param(count, 1), master(count, 1), m(count, 2, 0.1), v(count),
          grad(count, 3) {
#pragma omp parallel for
        for (size_t i = 0; i < count; i++) v[i] = M(0.01 * hash_normal(4, i) * hash_normal(4, i));
    }
    Acc<P>* master_or_null(size_t begin) { return with_master ? master.data() + begin : nullptr; }
    void run(const AdamW& a, const AdamWStep& step, size_t begin, size_t end) {
        adamw_update(Cpu(), param.data() + begin, master_or_null(begin), m.data() + begin, v.data() + begin,
                     grad.data() + begin, end - begin, 640 + begin, a, &step);
    }
    // The same on the GPU; the state goes there and comes back.
    void run_gpu(const AdamW& a, const AdamWStep& step, size_t begin, size_t end) {
        DeviceBuffer<P> p(param);
        DeviceBuffer<Acc<P>> w(master);
        DeviceBuffer<M> first(m), second(v);
        DeviceBuffer<G> g(grad);
        Step s(step);
        CUDA_CHECK(cudaDeviceSynchronize());
        adamw_update(the_gpu(), p.data() + begin, with_master ? w.data() + begin : nullptr, first.data() + begin,
                     second.data() + begin, g.data() + begin, end - begin, 640 + begin, a, s.place);
        copy(param, p.host()), copy(master, w.host()), copy(m, first.host()), copy(v, second.host());
    }
};

// Values that are stored as they are: by the 2x rule. Those that are rounded at random to bf16: the two machines' fp32
// differ by at most 4 units in the last place (contracted products, the approximate root and quotient), 2^-14 of the
// spacing of bf16, and this often the same random bits round to the two different neighbours.
template <class S>
void check_stored(const Buffer<S>& result, const Buffer<S>& cpu, const Buffer<double>& truth, bool random) {
    if (!random) return check_2x(result, cpu, truth);
    size_t others = 0;
    bool neighbours = true;
    for (size_t i = 0; i < cpu.count; i++) {
        const double a = double(cpu[i]), b = double(result[i]);
        others += a != b;
        neighbours = neighbours && std::fabs(a - b) <= ulp<bf16>(std::max(std::fabs(a), std::fabs(b)));
    }
    const double expected = double(cpu.count) * 0x1p-14;
    CHECK(neighbours);
    CHECK(double(others) <= expected + 5 * std::sqrt(expected) + 1);
}

template <class P, class G, class M> void check_update(size_t count, bool with_master, size_t begin) {
    CAPTURE(count);
    CAPTURE(with_master);
    CAPTURE(begin);
    const AdamWStep step = {7, 0.37, 0};
    State<P, G, M> cpu(count, with_master), gpu(count, with_master);
    State<double, double, double> truth(count, with_master);
    for (size_t i = 0; i < count; i++) {
        truth.param[i] = double(cpu.param[i]), truth.m[i] = double(cpu.m[i]), truth.v[i] = double(cpu.v[i]);
        truth.grad[i] = double(cpu.grad[i]), truth.master[i] = double(cpu.master[i]);
    }
    cpu.run(defaults, step, begin, count), truth.run(defaults, step, begin, count);
    gpu.run_gpu(defaults, step, begin, count);
    constexpr bool p16 = std::is_same_v<P, bf16>, m16 = std::is_same_v<M, bf16>;
    check_stored(gpu.m, cpu.m, truth.m, m16);
    check_stored(gpu.v, cpu.v, truth.v, m16);
    if (with_master) {
        check_stored(gpu.master, cpu.master, truth.master, false);
        bool rounded = true;
        for (size_t i = begin; i < count; i++) rounded &= float(gpu.param[i]) == float(P(gpu.master[i]));
        CHECK(rounded);
    } else check_stored(gpu.param, cpu.param, truth.param, p16);
    if (!with_master) CHECK(same_bits(gpu.master, cpu.master)); // neither has touched it
}
} // namespace

static void check_every_mix(size_t count, size_t begin) {
    for (bool with_master : {false, true}) {
        check_update<bf16, bf16, bf16>(count, with_master, begin);
        check_update<bf16, float, bf16>(count, with_master, begin);
        check_update<bf16, bf16, float>(count, with_master, begin);
        check_update<bf16, float, float>(count, with_master, begin);
        check_update<float, float, bf16>(count, with_master, begin);
        check_update<float, float, float>(count, with_master, begin);
    }
}
TEST_CASE("gpu adamw: every mix of storage types, packs and single elements (small)") {
    for (size_t begin : {0, 1}) check_every_mix(75, begin);
}
TEST_CASE("gpu adamw: every mix of storage types, at every size, on 16 bytes or not") {
    for (size_t count : {0, 1, 7, 8, 9, 17, 1003, 200001})
        for (size_t begin : {0, 1, 64})
            if (begin <= count) check_every_mix(count, begin);
    check_update<bf16, bf16, bf16>(3000001, false, 1); // more than the grid takes at once
    check_update<bf16, float, float>(4000001, true, 64);
}

TEST_CASE("gpu adamw: the same fp32 value is rounded to the CPU's bits") {
    // m and v are multiples of 2^-6, the gradient of 2^-10, all below 2: with both beta 1/2 the new m and v are exact
    // in fp32, however their sums are contracted, and have 11 and 21 bits, of which bf16 keeps 8.
    const size_t count = 100000;
    State<bf16, bf16, bf16> cpu(count, false), gpu(count, false);
    for (size_t i = 0; i < count; i++) {
        auto value = [&](uint64_t seed) { return float(int(hash64(seed, i) % 255) - 127); };
        for (auto* s : {&cpu, &gpu}) {
            s->m[i] = bf16(value(1) / 64), s->grad[i] = bf16(value(2) / 1024);
            s->v[i] = bf16(std::fabs(value(3)) / 64);
        }
    }
    AdamW a = defaults;
    a.beta1 = a.beta2 = 0.5;
    cpu.run(a, {3, 1, 0}, 0, count), gpu.run_gpu(a, {3, 1, 0}, 0, count);
    CHECK(same_bits(gpu.m, cpu.m));
    CHECK(same_bits(gpu.v, cpu.v));
}

TEST_CASE("gpu adamw: bf16 parameters drift by the right mean, where the nearest value would stand still") {
    // As on the CPU: lr is 2^-12, the spacing below 1 is 2^-8, and rounding has variance at most spacing^2 / 4 a step.
    const size_t count = 20000;
    const int steps = 8;
    AdamW a = defaults;
    a.lr = 0x1p-12, a.weight_decay = 0, a.eps = 0;
    Buffer<bf16> ones(count);
    Buffer<float> zeros(count);
    ones.fill(1), zeros.fill(0);
    DeviceBuffer<bf16> param(ones), grad(ones);
    DeviceBuffer<float> m(zeros), v(zeros);
    CUDA_CHECK(cudaDeviceSynchronize());
    float* no_master = nullptr;
    for (int64_t step = 1; step <= steps; step++) {
        Step s({step, 1, 0});
        adamw_update(the_gpu(), param.data(), no_master, m.data(), v.data(), grad.data(), count, 0, a, s.place);
        device_wait(the_gpu());
    }
    const Buffer<bf16> p = param.host();
    double sum = 0;
    for (size_t i = 0; i < count; i++) sum += double(float(p[i]));
    const double sigma = 0x1p-8 / 2 * std::sqrt(double(steps) / double(count));
    CHECK(std::fabs(sum / double(count) - (1 - steps * 0x1p-12)) < 5 * sigma);
}

TEST_CASE("gpu adamw: bf16 moments are unbiased") {
    const size_t count = 50000;
    State<bf16, bf16, bf16> rounded(count, false);
    State<bf16, bf16, float> exact(count, true);
    for (size_t i = 0; i < count; i++) exact.m[i] = rounded.m[i], exact.v[i] = rounded.v[i];
    for (size_t i = 0; i < count; i++) exact.master[i] = rounded.param[i];
    rounded.run_gpu(defaults, {1, 1, 0}, 0, count), exact.run_gpu(defaults, {1, 1, 0}, 0, count);
    double sum[3] = {}, most = 0; // in ulp: an error's variance is f (1 - f) <= 1/4, f the fraction that is cut off
    for (size_t i = 0; i < count; i++) {
        auto error = [&](double stored, double value) {
            const double e = (stored - value) / ulp<bf16>(value);
            most = std::max(most, std::fabs(e));
            return e;
        };
        sum[0] += error(float(rounded.param[i]), exact.master[i]);
        sum[1] += error(float(rounded.m[i]), exact.m[i]), sum[2] += error(float(rounded.v[i]), exact.v[i]);
    }
    for (double s : sum) CHECK(std::fabs(s / double(count)) < 5 * 0.5 / std::sqrt(double(count)));
    CHECK(most < 1.001); // the fp32 values themselves may differ in their last bit
    CHECK(most > 0.7);
}

TEST_CASE("gpu adamw: neither the split of the parameters nor the run changes a bit (small)") {
    const size_t count = 5003;
    State<bf16, float, bf16> whole(count, false), parts(count, false), again(count, false);
    const AdamWStep step = {3, 0.5, 0};
    whole.run_gpu(defaults, step, 0, count), again.run_gpu(defaults, step, 0, count);
    parts.run_gpu(defaults, step, 0, 64), parts.run_gpu(defaults, step, 64, 1216);
    parts.run_gpu(defaults, step, 1216, count);
    for (auto* other : {&parts, &again}) {
        CHECK(same_bits(whole.param, other->param));
        CHECK(same_bits(whole.m, other->m));
        CHECK(same_bits(whole.v, other->v));
    }
}

TEST_CASE("gpu adamw: a step that is to be skipped leaves every bit") {
    const size_t count = 3001;
    State<bf16, float, bf16> kept(count, true), skipped(count, true);
    skipped.grad.poison();
    skipped.run_gpu(defaults, {3, std::numeric_limits<double>::quiet_NaN(), 1}, 0, count);
    CHECK(same_bits(kept.param, skipped.param));
    CHECK(same_bits(kept.master, skipped.master));
    CHECK(same_bits(kept.m, skipped.m));
    CHECK(same_bits(kept.v, skipped.v));
}

TEST_CASE("gpu adamw: values that are not finite stay so in bf16") {
    const float inf = std::numeric_limits<float>::infinity();
    State<bf16, bf16, bf16> s(4096, false);
    for (size_t i = 0; i < s.count; i += 2) s.grad[i] = bf16(i % 4 ? inf : std::numeric_limits<float>::quiet_NaN());
    s.run_gpu(defaults, {5, 1, 0}, 0, s.count);
    for (size_t i = 0; i < s.count; i++) {
        const float p = s.param[i], m = s.m[i], v = s.v[i];
        CHECK(std::isnan(p) == (i % 2 == 0)); // inf / sqrt(inf) is NaN too
        if (i % 4 == 0) CHECK((std::isnan(m) && std::isnan(v)));
        if (i % 4 == 2) CHECK((std::isinf(v) || std::isnan(v)));
        if (i % 4 == 2) CHECK(!std::isfinite(m));
        if (i % 2) CHECK((std::isfinite(m) && std::isfinite(v)));
    }
}

namespace {
template <class M> __global__ void squares_kernel(M* v, size_t count) {
    const size_t stride = size_t(gridDim.x) * blockDim.x;
    for (size_t i = size_t(blockIdx.x) * blockDim.x + threadIdx.x; i < count; i += stride)
        v[i] = M(0.001f + float(v[i]) * float(v[i])); // far enough from 0 that no step is larger than a parameter
}

// Samples about 2^31, 2^32 and the ends: as good as the CPU by the 2x rule, and bf16 rounded by its random bits.
template <class P, class G, class M> void check_large(bool with_master) {
    const size_t count = (size_t(1) << 32) + 77, sample = 4096, index = 1 << 20;
    LargeBuffer<P> param(count, 1);
    LargeBuffer<float> master(with_master ? count : 0, 1);
    LargeBuffer<M> m(count, 2, 0.1f), v(count, 3, 0.1f);
    LargeBuffer<G> grad(count, 4);
    squares_kernel<<<2048, 256>>>(v.data(), count);
    CUDA_CHECK(cudaDeviceSynchronize());
    struct Sample {
        size_t first;
        Buffer<P> param;
        Buffer<float> master;
        Buffer<M> m, v;
        Buffer<G> grad;
    };
    std::vector<Sample> samples;
    const size_t masters = with_master ? sample : 0;
    for (size_t first : {size_t(0), (size_t(1) << 31) - 2000, (size_t(1) << 32) - sample + 50, count - sample})
        samples.push_back({first, param.part(first, sample), master.part(with_master ? first : 0, masters),
                           m.part(first, sample), v.part(first, sample), grad.part(first, sample)});
    const AdamWStep step = {11, 0.8, 0};
    Step s(step);
    adamw_update(the_gpu(), param.data(), with_master ? master.data() : nullptr, m.data(), v.data(), grad.data(), count,
                 index, defaults, s.place);
    for (Sample& x : samples) {
        CAPTURE(x.first);
        Buffer<double> p = converted<double>(x.param), w = converted<double>(x.master), m1 = converted<double>(x.m),
                       v1 = converted<double>(x.v), g = converted<double>(x.grad);
        adamw_update(Cpu(), p.data(), with_master ? w.data() : nullptr, m1.data(), v1.data(), g.data(), sample,
                     index + x.first, defaults, &step);
        adamw_update(Cpu(), x.param.data(), with_master ? x.master.data() : nullptr, x.m.data(), x.v.data(),
                     x.grad.data(), sample, index + x.first, defaults, &step);
        auto check = [&](const auto& result, const auto& cpu, const Buffer<double>& truth, bool random) {
            check_2x(result, cpu, truth);
            if (random) check_stored(result, cpu, truth, true);
        };
        check(m.part(x.first, sample), x.m, m1, std::is_same_v<M, bf16>);
        check(v.part(x.first, sample), x.v, v1, std::is_same_v<M, bf16>);
        const Buffer<P> stored = param.part(x.first, sample);
        if (with_master) {
            const Buffer<float> exact = master.part(x.first, sample);
            check(exact, x.master, w, false);
            CHECK(same_bits(stored, converted<P>(exact)));
        } else check(stored, x.param, p, std::is_same_v<P, bf16>);
    }
}
} // namespace

TEST_CASE("gpu adamw: beyond 2^32 elements, everything in bf16 (large)") { check_large<bf16, bf16, bf16>(false); }
TEST_CASE("gpu adamw: beyond 2^32 elements, with a master and moments in float (large)") {
    check_large<bf16, bf16, float>(true);
}
