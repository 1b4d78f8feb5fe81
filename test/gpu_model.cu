// The whole model on the GPU: gradients and a training run against the CPU, recomputation, repeated bits.
#include "gpu.h"
#include "model.h"

// Head size 16 (what no tensor core kernel serves), 64 or 128, grouped heads, sizes that are no multiple of a tile.
static Config gpu_config(int D, bool tied = false, bool bias = false) {
    Config c = make_config(2, 4 * D, 4, 2, 10 * D + 8, 200, 10000, 512);
    c.D = D, c.tied = tied, c.qkv_bias = bias;
    return c;
}
static std::vector<Row> some_rows(Attention mode, size_t S, int V, int count, int seed) {
    std::vector<Row> rows;
    for (int i = 0; i < count; i++) rows.push_back(make_row(mode, S, V, seed + i, i % 2));
    return rows;
}
static double labels(const std::vector<Row>& rows) {
    double counted = 0;
    for (const Row& r : rows) counted += double(r.counted);
    return counted;
}

// The same weights everywhere: rounded to bf16 first, smaller than the CPU tests' so that more channels do not overflow
// the softmax: scores grow with the channels times the weights' squares.
template <class... Models> static void same_weights(Models&... models) {
    const size_t n = std::get<0>(std::tie(models...)).m.elements;
    const Config& c = std::get<0>(std::tie(models...)).m.config;
    std::vector<float> weights(n);
    const double size = 0.08 * std::min(1.0, std::sqrt(64.0 / c.D));
    for (const ParamInfo& p : param_table(c))
        for (size_t i = p.offset; i < p.offset + p.count(); i++)
            weights[i] = bf16(float((p.start == Start::ones ? 1.0 : 0.0) + size * hash_normal(7, i)));
    auto set = [&]<class E>(auto& m, E*) {
        std::vector<E> rounded(n);
        convert(Cpu{}, rounded.data(), weights.data(), n);
        copy_to_device(m.dev, m.param_flat, rounded.data(), n * sizeof(E));
    };
    (set(models.m, models.m.param_flat), ...);
}

template <class M> static Buffer<double> gradient(M& m) {
    Buffer<double> g(m.elements);
    auto host = to_host(m.dev, m.grad_flat, m.elements);
    for (size_t i = 0; i < m.elements; i++) g[i] = double(host[i]);
    return g;
}

// The 2x rule for every parameter tensor of the model by itself.
template <class G> static void check_tensors(const Config& c, const Buffer<double>& gpu, const Buffer<double>& cpu,
                                             const Buffer<double>& truth) {
    for (const ParamInfo& p : param_table(c)) {
        if (p.count() == 0) continue;
        double error = largest_error(gpu.data() + p.offset, truth.data() + p.offset, p.count());
        double allowed = 2 * largest_error(cpu.data() + p.offset, truth.data() + p.offset, p.count()), largest = 0;
        for (size_t i = p.offset; i < p.offset + p.count(); i++) largest = std::max(largest, std::fabs(truth[i]));
        CAPTURE(std::string(p.name));
        CAPTURE(p.layer);
        CHECK(error <= allowed + 2 * ulp<G>(largest));
    }
}

TEST_CASE("gradients of the model on the GPU follow double as the CPU's do, in every attention mode") {
    for (int D : {16, 64, 128})
        for (Attention mode : {Attention::full, Attention::intra, Attention::intra_reset, Attention::anchor}) {
            CAPTURE(D);
            CAPTURE(int(mode));
            const Config c = gpu_config(D, D == 16, mode == Attention::full);
            const std::vector<Row> rows = some_rows(mode, 203, c.V, 2, 50);
            const double counted = labels(rows);
            const Layout layout = [] {
                Layout l = small_layout(203, 2);
                l.head_chunk = 100;
                return l;
            }();
            TestModel<double, double> truth(c, layout);
            TestModel<float, float> cpu_float(c, layout);
            TestModel<bf16, float> cpu_bf16(c, layout);
            TestModel<float, float, Gpu> gpu_float(c, layout, Comm{}, the_gpu());
            TestModel<bf16, float, Gpu> gpu_bf16(c, layout, Comm{}, the_gpu());
            TestModel<bf16, bf16, Gpu> gpu_half(c, layout, Comm{}, the_gpu());
            same_weights(truth, cpu_float, cpu_bf16, gpu_float, gpu_bf16, gpu_half);
            auto loss_of = [&](auto& model) { return model.gradients(rows, mode, Comm{}, counted, 2); };
            const double loss = loss_of(truth);
            CHECK(std::fabs(loss_of(gpu_float) - loss) <= 2 * std::fabs(loss_of(cpu_float) - loss) + 1e-6 * loss);
            const double half = std::fabs(loss_of(cpu_bf16) - loss);
            CHECK(std::fabs(loss_of(gpu_bf16) - loss) <= 2 * half + 1e-3 * loss);
            CHECK(std::fabs(loss_of(gpu_half) - loss) <= 2 * half + 1e-3 * loss);
            const Buffer<double> exact = gradient(truth.m), yardstick = gradient(cpu_bf16.m);
            check_tensors<float>(c, gradient(gpu_float.m), gradient(cpu_float.m), exact);
            check_tensors<float>(c, gradient(gpu_bf16.m), yardstick, exact);
            check_tensors<bf16>(c, gradient(gpu_half.m), yardstick, exact);
        }
}

// At a size that a sanitizer can follow.
static void check_small(int D, bool bias = false) {
    const Config c = gpu_config(D, false, bias);
    const Layout layout = small_layout(70, 1);
    const std::vector<Row> rows = some_rows(Attention::anchor, 70, c.V, 1, 90);
    TestModel<double, double> truth(c, layout);
    TestModel<bf16, float> cpu(c, layout);
    TestModel<bf16, float, Gpu> gpu(c, layout, Comm{}, the_gpu());
    same_weights(truth, cpu, gpu);
    auto run = [&](auto& model) { model.gradients(rows, Attention::anchor, Comm{}, labels(rows), 1); };
    run(truth), run(cpu), run(gpu);
    check_tensors<float>(c, gradient(gpu.m), gradient(cpu.m), gradient(truth.m));
}
TEST_CASE("forward and backward of a model on the GPU (small)") { check_small(16, true); }
TEST_CASE("forward and backward of a model on the GPU, attention by tensor cores (small)") { check_small(64); }

// The gradients of a model that is laid out so; the weights are those of same_weights.
static Buffer<double> gradient_in(const Layout& layout, const Config& c, const std::vector<Row>& rows) {
    TestModel<bf16, float, Gpu> t(c, layout, Comm{}, the_gpu());
    same_weights(t);
    t.gradients(rows, Attention::anchor, Comm{}, 100, layout.B);
    return gradient(t.m);
}

TEST_CASE("recomputed and tiled activations give the GPU's gradients again") {
    const Config c = gpu_config(64);
    const std::vector<Row> rows = some_rows(Attention::anchor, 203, c.V, 2, 60);
    Gpu gpu = the_gpu();
    gpu.context->deterministic = true;
    const Buffer<double> want = gradient_in(small_layout(203, 2), c, rows);
    for (int units = 1; units <= 2 * recompute_kinds; units++) {
        CAPTURE(units);
        Layout layout = small_layout(203, 2);
        layout.recompute = recompute_first(units, 2);
        CHECK(largest_error(gradient_in(layout, c, rows), want) == 0);
    }
    Layout layout = small_layout(203, 2);
    layout.recompute = recompute_parse("swiglu,ffn", 2), layout.ffn_tile = 100;
    // The weights' gradients are the sum of five tiles': each addition rounds a float.
    CHECK(largest_error(gradient_in(layout, c, rows), want) <= 20 * ulp<float>(largest_value(want)));
    gpu.context->deterministic = false;
}

// In rows that are long enough for copies to be under way when their places are wanted again.
TEST_CASE("offloaded activations give the GPU's gradients again") {
    Config c = gpu_config(64);
    c.L = 7;
    const std::vector<Row> rows = some_rows(Attention::anchor, 4096, c.V, 2, 60);
    Gpu gpu = the_gpu();
    gpu.context->deterministic = true;
    const Buffer<double> want = gradient_in(small_layout(4096, 1), c, rows);
    for (const char* what : {"input", "qkv", "input,residual", "residual,attention", "all"}) {
        CAPTURE(what);
        Layout layout = small_layout(4096, 1);
        layout.offload = offload_parse(what), layout.recompute = recompute_parse("norm,swiglu", c.L);
        TestModel<bf16, float, Gpu> away(c, layout, Comm{}, gpu);
        same_weights(away);
        Batch b = batch_make({rows[1]}, Attention::anchor, Comm{}, attention_tiles<bf16>(gpu, c.D));
        for (int i = 0; i < 3; i++) {
            if (i == 2) model_forward(away.m, b, true);
            away.gradients(rows, Attention::anchor, Comm{}, 100, 1);
            CHECK(largest_error(gradient(away.m), want) == 0);
        }
    }
    gpu.context->deterministic = false;
}

// Ten updates of the same small model on one fixed batch: the GPU's losses stay as near to double's as twice the CPU's
// run of the same types does. Where parameters are rounded at random, the yardstick is the worst of eight such runs.
template <class E, class G, class Dev> static std::vector<double>
losses(TestModel<E, G, Dev>& model, const std::vector<Row>& rows, double counted, int seed = 0) {
    std::vector<double> values;
    Setup s;
    s.config = model.m.config, s.layout = model.m.layout;
    s.o.lr = 1e-2, s.o.steps = 10, s.o.seed = seed;
    TrainState state;
    for (int i = 0; i < 10; i++) {
        StepResult r;
        r.counted = int64_t(counted);
        model.gradients(rows, Attention::anchor, Comm{}, counted, 2);
        fill_zero(model.m.dev, &model.m.update->loss_sum, 8);
        sum(model.m.dev, &model.m.update->loss_sum, model.m.loss, rows.size() * rows[0].token.size(), true);
        readback_open(model.m.dev, model.m.readback[(state.step + 1) % 2], sizeof(UpdateState));
        step_update(model.m, s, state, r);
        step_finish(model.m, r);
        values.push_back(r.loss);
        CHECK(r.skipped.empty());
    }
    return values;
}

TEST_CASE("ten training steps on the GPU follow the CPU in double") {
    const Config c = gpu_config(64);
    const std::vector<Row> rows = some_rows(Attention::anchor, 203, c.V, 2, 70);
    const double counted = labels(rows);
    Layout layout = small_layout(203, 2), with_master = layout, in_double = layout, smallest = layout;
    layout.moments = Type::f32, with_master.moments = Type::f32, with_master.master = true;
    in_double.moments = Type::f64, smallest.moments = Type::bf16; // 8 bytes a parameter
    TestModel<double, double> truth(c, in_double);
    TestModel<float, float> cpu_float(c, layout);
    TestModel<bf16, float> cpu_master(c, with_master);
    TestModel<float, float, Gpu> gpu_float(c, layout, Comm{}, the_gpu());
    TestModel<bf16, float, Gpu> gpu_master(c, with_master, Comm{}, the_gpu());
    TestModel<bf16, bf16, Gpu> gpu_smallest(c, smallest, Comm{}, the_gpu());
    same_weights(truth, cpu_float, cpu_master, gpu_float, gpu_master, gpu_smallest);
    master_from_params(cpu_master.m), master_from_params(gpu_master.m);
    const std::vector<double> want = losses(truth, rows, counted);
    CHECK(want[9] < want[0] - 0.5); // it learns
    auto worst = [&](auto& model, int seed = 0) {
        const std::vector<double> loss = losses(model, rows, counted, seed);
        double error = 0;
        for (int i = 0; i < 10; i++) error = std::max(error, std::fabs(loss[i] - want[i]));
        return error;
    };
    CHECK(worst(gpu_float) <= 2 * worst(cpu_float) + 1e-5);
    CHECK(worst(gpu_master) <= 2 * worst(cpu_master) + 1e-3);
    double rounded_at_random = 0;
    for (int seed = 0; seed < 8; seed++) {
        TestModel<bf16, bf16> cpu_smallest(c, smallest);
        same_weights(cpu_smallest);
        rounded_at_random = std::max(rounded_at_random, worst(cpu_smallest, seed));
    }
    CHECK(rounded_at_random < 0.02 * (want[0] - want[9])); // the yardstick is near, too
    CHECK(worst(gpu_smallest) <= 2 * rounded_at_random);
}

TEST_CASE("a skipped update on the GPU touches nothing, and the next one goes on (small)") {
    const Config c = gpu_config(16);
    Layout layout = small_layout(64, 1);
    layout.moments = Type::bf16;
    TestModel<bf16, bf16, Gpu> t(c, layout, Comm{}, the_gpu());
    Setup s;
    s.config = c, s.layout = layout, s.o.lr = 0.01;
    TrainState state;
    auto step = [&](double loss_sum, float poison) {
        StepResult r;
        r.counted = 10;
        std::vector<bf16> gradient(t.m.elements);
        for (size_t i = 0; i < gradient.size(); i++) gradient[i] = bf16(float(0.01 * hash_normal(state.step, i)));
        if (poison != 0) gradient[5] = bf16(poison);
        copy_to_device(t.m.dev, t.m.grad_flat, gradient.data(), gradient.size() * 2);
        copy_to_device(t.m.dev, &t.m.update->loss_sum, &loss_sum, 8);
        readback_open(t.m.dev, t.m.readback[(state.step + 1) % 2], sizeof(UpdateState));
        step_update(t.m, s, state, r);
        step_finish(t.m, r);
        return r.skipped;
    };
    auto bits = [&] {
        std::vector<bf16> all = to_host(t.m.dev, t.m.param_flat, t.m.elements);
        const std::vector<bf16> moment = to_host(t.m.dev, (bf16*)t.m.moment2, t.m.elements);
        all.insert(all.end(), moment.begin(), moment.end());
        return all;
    };
    CHECK(step(20, 0).empty());
    const std::vector<bf16> before = bits();
    CHECK(step(NAN, 0) == "the loss is not finite");
    CHECK(step(20, INFINITY) == "the gradient norm is not finite");
    std::vector<bf16> after = bits();
    CHECK(memcmp(before.data(), after.data(), before.size() * 2) == 0);
    CHECK(step(20, 0).empty());
    after = bits();
    CHECK(memcmp(before.data(), after.data(), before.size() * 2) != 0);
}
