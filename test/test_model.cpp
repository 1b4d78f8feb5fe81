// The whole model: gradients against finite differences, recomputation, batching, memory, the update's decision.
#include "model.h"
#include "fails.h"

// A central difference with h = 1e-5 is good to about 1e-9 here (loss of order 3, third derivatives of order 10).
TEST_CASE("model gradients are those of finite differences, in every attention mode") {
    for (Attention mode : all_modes)
        for (int family = 0; family < 3; family++) {
            CAPTURE(int(mode));
            CAPTURE(family);
            const Config c = small_config(family == 1, family == 2);
            const std::vector<Row> rows = {make_row(mode, 19, c.V, 11, family == 2), make_row(mode, 19, c.V, 12)};
            TestModel<double, double> t(c, small_layout(19, 2));
            const double counted = double(rows[0].counted + rows[1].counted);
            t.gradients(rows, mode, Comm{}, counted, 2);
            std::vector<double> grad(t.m.grad_flat, t.m.grad_flat + t.m.elements);
            for (const ParamInfo& p : param_table(c))
                for (int k = 0; k < 3 && p.count(); k++) {
                    size_t i = p.offset + hash64(5, p.offset + k) % p.count();
                    double numeric = finite_difference([&] { return t.loss(rows, mode); }, t.m.param_flat, i);
                    CAPTURE(p.name);
                    CHECK(grad[i] == doctest::Approx(numeric).epsilon(1e-6).scale(1e-3));
                }
        }
}

TEST_CASE("recomputed activations give the same bits") {
    const Config c = small_config(false, true);
    const std::vector<Row> rows = {make_row(Attention::anchor, 23, c.V, 3)};
    TestModel<float, float> kept(c, small_layout(23, 1));
    kept.gradients(rows, Attention::anchor, Comm{}, 20, 1);
    std::vector<Recompute> policies = {recompute_parse("attention", 2), recompute_parse("ffn:1,norm", 2),
                                       recompute_parse("qkv:1,swiglu:1", 2)};
    for (int units = 1; units <= 2 * recompute_kinds; units++) policies.push_back(recompute_first(units, 2));
    for (const Recompute& policy : policies) {
        CAPTURE(recompute_text(policy, 2));
        Layout layout = small_layout(23, 1);
        layout.recompute = policy;
        TestModel<float, float> again(c, layout);
        again.gradients(rows, Attention::anchor, Comm{}, 20, 1);
        CHECK(memcmp(kept.m.grad_flat, again.m.grad_flat, kept.m.elements * sizeof(float)) == 0);
    }
}

// Layers take two places in turn, and the last two never leave. Twice, with a forward alone between: micro-batches.
TEST_CASE("offloaded activations give the same bits, from the host's memory") {
    for (int L : {1, 2, 3, 6}) {
        const Config c = make_config(L, 16, 4, 2, 24, 11, 100, 64);
        const std::vector<Row> rows = {make_row(Attention::anchor, 23, c.V, 3),
                                       make_row(Attention::anchor, 23, c.V, 4)};
        TestModel<float, float> kept(c, small_layout(23, 1));
        kept.gradients(rows, Attention::anchor, Comm{}, 40, 1);
        for (const char* what : {"input", "residual", "qkv", "attention", "input,qkv", "all"})
            for (const char* again : {"none", "norm,swiglu:1,ffn:2"}) {
                CAPTURE(L);
                CAPTURE(what);
                CAPTURE(again);
                Layout layout = small_layout(23, 1);
                layout.offload = offload_parse(what), layout.recompute = recompute_parse(again, L);
                TestModel<float, float> away(c, layout);
                away.gradients(rows, Attention::anchor, Comm{}, 40, 1);
                away.loss({rows[1]}, Attention::anchor);
                away.gradients(rows, Attention::anchor, Comm{}, 40, 1);
                CHECK(memcmp(kept.m.grad_flat, away.m.grad_flat, kept.m.elements * sizeof(float)) == 0);
                for (int l = 0; l < L; l++) // of the last row, which kept has as well
                    for (const OffloadedAct& a : away.m.offloaded[l])
                        if (a.input) CHECK(memcmp(away.m.host_memory + a.at, kept.m.acts[l].x, a.bytes) == 0);
            }
    }
    CHECK(offload_text(offload_parse("qkv,input")) == ", offload input,qkv");
    CHECK(offload_text(offload_parse("none")) == "");
}

// As below: sums over the tokens in another order.
TEST_CASE("the feed-forward in tiles gives the same gradients in less memory") {
    const Config c = small_config();
    const std::vector<Row> rows = {make_row(Attention::anchor, 23, c.V, 3)};
    Layout layout = small_layout(23, 1);
    layout.recompute = recompute_parse("swiglu,ffn", 2);
    TestModel<double, double> whole(c, layout);
    whole.gradients(rows, Attention::anchor, Comm{}, 20, 1);
    for (size_t tile : {1, 8, 22, 23, 100}) {
        layout.ffn_tile = tile;
        TestModel<double, double> tiled(c, layout);
        tiled.gradients(rows, Attention::anchor, Comm{}, 20, 1);
        CHECK(largest_error(whole.m.grad_flat, tiled.m.grad_flat, whole.m.elements) < 1e-13);
    }
    Setup s;
    s.config = named_configs[3].config;
    s.dtype = s.grad_dtype = Type::bf16, s.gpu = true;
    s.layout.S = 65536, s.layout.recompute = recompute_parse("all", 32);
    const size_t before = measure(s, s.layout).used;
    s.layout.ffn_tile = 8192;
    CHECK(measure(s, s.layout).used < before);
    s.layout.offload = offload_parse("input,attention"); // two places instead of 32; attention was recomputed: one more
    const Arena away = measure(s, s.layout);
    const size_t row = size_t(65536) * 4096 * 2, lse = 65536 * 32 * 4;
    CHECK(away.host == 30 * (2 * row + lse));
    s.layout.offload = {};
    CHECK(away.used == measure(s, s.layout).used - 30 * row + row + lse);
}

// The sums have some 60 terms of order 0.1 in double: 1e-13 is a hundred times their rounding.
TEST_CASE("loss and gradients do not depend on how the update is cut in micro-batches") {
    const Config c = small_config();
    std::vector<Row> rows;
    for (int i = 0; i < 4; i++) rows.push_back(make_row(Attention::anchor, 17, c.V, 40 + i));
    rows[2].label.assign(17, -1); // one row without any label: a mean of means would be wrong
    rows[2].counted = 0;
    double counted = 0;
    for (const Row& r : rows) counted += double(r.counted);
    TestModel<double, double> one(c, small_layout(17, 1)), four(c, small_layout(17, 4));
    double a = one.gradients(rows, Attention::anchor, Comm{}, counted, 1);
    double b = four.gradients(rows, Attention::anchor, Comm{}, counted, 4);
    CHECK(std::fabs(a - b) < 1e-13);
    CHECK(largest_error(one.m.grad_flat, four.m.grad_flat, one.m.elements) < 1e-13);
}

// Storage rounds each activation to 8 bits and two layers pass on about ten roundings: 10 x 2^-9 of the largest
// gradient is expected, five times that allowed.
TEST_CASE("float and bf16 gradients follow double") {
    const Config c = small_config();
    const std::vector<Row> rows = {make_row(Attention::anchor, 31, c.V, 8)};
    TestModel<double, double> truth(c, small_layout(31, 1));
    TestModel<float, float> single(c, small_layout(31, 1));
    TestModel<bf16, float> half(c, small_layout(31, 1));
    for (size_t i = 0; i < truth.m.elements; i++)
        half.m.param_flat[i] = bf16(float(truth.m.param_flat[i])), single.m.param_flat[i] = half.m.param_flat[i],
        truth.m.param_flat[i] = half.m.param_flat[i];
    double loss = truth.gradients(rows, Attention::anchor, Comm{}, 25, 1), largest = 0;
    for (size_t i = 0; i < truth.m.elements; i++) largest = std::max(largest, std::fabs(truth.m.grad_flat[i]));
    CHECK(single.gradients(rows, Attention::anchor, Comm{}, 25, 1) == doctest::Approx(loss).epsilon(1e-5));
    CHECK(half.gradients(rows, Attention::anchor, Comm{}, 25, 1) == doctest::Approx(loss).epsilon(0.02));
    CHECK(largest_error(single.m.grad_flat, truth.m.grad_flat, truth.m.elements) < 50 * 0x1p-24 * largest);
    CHECK(largest_error(half.m.grad_flat, truth.m.grad_flat, truth.m.elements) < 50 * 0x1p-9 * largest);
}

TEST_CASE("parameters: no overlap, aligned, and the table names every Hugging Face tensor once") {
    for (int family = 0; family < 4; family++) {
        Config c = small_config(family & 1, family & 2);
        size_t end = 0;
        for (const ParamInfo& p : param_table(c)) {
            CHECK(p.offset >= end);
            CHECK(p.offset % param_alignment == 0);
            end = p.offset + p.count();
        }
        CHECK(param_elements(c) >= end);
    }
    size_t llama = 0;
    for (const ParamInfo& p : param_table(named_configs[3].config)) llama += p.count();
    CHECK(llama == 6738415616); // LLaMA-2-7B
}

static Setup small_setup(const Comm& world) {
    Setup s;
    s.world = s.ring = world;
    s.config = small_config();
    s.layout = small_layout(17, 1);
    s.o.lr = 0.01;
    return s;
}

TEST_CASE("rings within hosts, and NCCL between hosts, by where the ranks are") {
    struct {
        std::vector<int32_t> hosts; // of each rank
        int ring;
        bool within, nccl;
    } cases[] = {{{0, 0, 0, 0}, 4, true, false},      {{0, 0, 2, 2}, 2, true, true},  {{0, 0, 2, 2}, 4, false, true},
                 {{0, 1, 1, 3}, 2, false, true},      {{0, 1, 0, 1}, 2, false, true}, {{0, 1, 0, 1}, 1, true, true},
                 {{0, 0, 2, 2, 2, 2}, 3, false, true}};
    for (const auto& c : cases) {
        CAPTURE(c.ring);
        Setup s;
        s.hosts = c.hosts, s.layout.world = int(c.hosts.size()), s.layout.ring = c.ring;
        CHECK(rings_in_hosts(s, s.layout) == c.within);
        CHECK(takes_nccl(s, s.layout) == c.nccl);
        s.transport = Transport::ipc;
        CHECK(!takes_nccl(s, s.layout));
        s.transport = Transport::nccl;
        CHECK(takes_nccl(s, s.layout));
    }
    Setup apart; // GPUs that do not fetch from each other
    apart.hosts = {0, 0}, apart.layout.world = apart.layout.ring = 2, apart.reached = false;
    CHECK(rings_in_hosts(apart, apart.layout));
    CHECK(takes_nccl(apart, apart.layout));
    apart.hosts = {0}, apart.layout.world = apart.layout.ring = 1;
    CHECK(!takes_nccl(apart, apart.layout));
    Setup plan; // hosts of 8
    plan.o.plan = true, plan.hosts = {0}, plan.layout.world = 16, plan.layout.ring = 8;
    CHECK(rings_in_hosts(plan, plan.layout));
    CHECK(takes_nccl(plan, plan.layout));
    plan.layout.ring = 16;
    CHECK(!rings_in_hosts(plan, plan.layout));
    plan.layout.world = plan.layout.ring = 8;
    CHECK(rings_in_hosts(plan, plan.layout));
    CHECK(!takes_nccl(plan, plan.layout));
}

TEST_CASE("a bad update is decided on before it is made, and leaves weights and moments as they were") {
    Setup s = small_setup(Comm{});
    TestModel<float, float> t(s.config, s.layout);
    TrainState state;
    auto step = [&](double loss, float poison) {
        StepResult r;
        r.counted = 10, t.m.update->loss_sum = 10 * loss;
        for (size_t i = 0; i < t.m.elements; i++) t.m.grad_flat[i] = float(0.01 * hash_normal(state.step, i));
        if (poison != 0) t.m.grad_flat[5] = poison;
        readback_open(t.m.dev, t.m.readback[(state.step + 1) % 2], sizeof(UpdateState));
        step_update(t.m, s, state, r);
        step_finish(t.m, r);
        return r.skipped;
    };
    for (int i = 0; i < 130; i++) CHECK(step(2 + 0.01 * hash_normal(1, i), 0).empty());
    std::vector<float> before(t.m.param_flat, t.m.param_flat + t.m.elements);
    std::vector<float> moments((float*)t.m.moment1, (float*)t.m.moment1 + t.m.elements);
    s.o.max_z_loss = 6, s.o.max_z_grad = 6;
    CHECK(step(NAN, 0) == "the loss is not finite");
    CHECK(step(INFINITY, 0) == "the loss is not finite");
    CHECK(step(2, NAN) == "the gradient norm is not finite");
    CHECK(step(2, INFINITY) == "the gradient norm is not finite");
    CHECK(step(50, 0) == "the loss is an outlier");
    CHECK(step(2, 1000) == "the gradient norm is an outlier");
    CHECK(memcmp(before.data(), t.m.param_flat, before.size() * 4) == 0);
    CHECK(memcmp(moments.data(), t.m.moment1, moments.size() * 4) == 0);
    CHECK(t.m.update->updates == 130);
    CHECK(state.step == 136);
    for (double v : t.m.update->losses.value) CHECK(std::isfinite(v));
    for (double v : t.m.update->norms.value) CHECK(std::isfinite(v));
    CHECK(step(2, 0).empty()); // and the run goes on
    CHECK(memcmp(before.data(), t.m.param_flat, before.size() * 4) != 0);
}

TEST_CASE("an update without labels is skipped and said") {
    Setup s = small_setup(Comm{});
    TestModel<float, float> t(s.config, s.layout);
    TrainState state;
    StepResult r;
    memset((void*)t.m.grad_flat, 0, t.m.elements * 4);
    readback_open(t.m.dev, t.m.readback[(state.step + 1) % 2], sizeof(UpdateState));
    step_update(t.m, s, state, r);
    step_finish(t.m, r);
    CHECK(r.skipped == "no token of this update has a label");
}

TEST_CASE("learning rate schedules") {
    Setup s;
    s.o.lr = 1, s.o.steps = 110, s.o.warmup = 10, s.o.final_lr = 0.1;
    CHECK(learning_rate(s, 0) == doctest::Approx(0.1));
    CHECK(learning_rate(s, 9) == doctest::Approx(1));
    CHECK(learning_rate(s, 60) == 1); // constant
    s.o.schedule = "linear";
    CHECK(learning_rate(s, 60) == doctest::Approx(0.55));
    s.o.schedule = "cosine";
    CHECK(learning_rate(s, 60) == doctest::Approx(0.55));
    CHECK(learning_rate(s, 35) == doctest::Approx(0.1 + 0.9 * (0.5 + std::sqrt(0.125))));
    CHECK(learning_rate(s, 110) == doctest::Approx(0.1));
    s.o.lr = 0;
    CHECK(peak_learning_rate(s) == 3e-4);
    s.weights = "model.bin";
    CHECK(peak_learning_rate(s) == 2e-5);
    s.o.lr = 1e-4;
    CHECK(peak_learning_rate(s) == 1e-4);
}

TEST_CASE("memory: recomputation takes less, the states cost what the design says") {
    Setup s;
    s.config = named_configs[3].config; // llama2-7b
    s.dtype = s.grad_dtype = Type::bf16;
    s.layout.S = 65536, s.layout.moments = Type::bf16;
    auto part = [&](const Layout& layout, const char* name) {
        for (auto& p : measure(s, layout).parts)
            if (p.name == name) return double(p.bytes);
        return 0.0;
    };
    const double parameters = 6738415616;
    auto states = [&](const Layout& l) {
        return part(l, "weights") + part(l, "gradients") + part(l, "moments") + part(l, "master weights");
    };
    CHECK(states(s.layout) / parameters == doctest::Approx(8).epsilon(1e-4));
    s.layout.master = true;
    CHECK(states(s.layout) / parameters == doctest::Approx(12).epsilon(1e-4));
    s.layout.world = s.layout.ring = 4;
    CHECK(part(s.layout, "moments") == doctest::Approx(parameters).epsilon(1e-4));
    size_t before = measure(s, s.layout).used;
    for (int units = 1; units <= recompute_kinds * 32; units++) {
        s.layout.recompute = recompute_first(units, 32);
        size_t now = measure(s, s.layout).used;
        CHECK((units % 32 == 1 || now < before)); // the first layer of a part only moves to the shared place
        before = now;
    }
}

TEST_CASE("sampling: temperature 0 takes the largest, top_k its share") {
    const float logits[] = {0, 3, 1, 2.5f};
    CHECK(sample_token(logits, 4, 0, 0, 0.99) == 1);
    int counts[4] = {};
    for (int i = 0; i < 4000; i++) counts[sample_token(logits, 4, 1, 2, hash_uniform(9, i))]++;
    CHECK(counts[0] + counts[2] == 0);
    // p = 1 / (1 + e^-0.5) = 0.622; five standard deviations of 4000 draws are 0.038
    CHECK(std::fabs(counts[1] / 4000.0 - 0.6225) < 0.038);
}

// The estimate counts products with matrices and 4 + 10 FLOPs a visible pair; the formula of the log takes norms and
// biases as products and counts 12 a pair.
TEST_CASE("the estimate's work is what the log's formula counts") {
    for (const NamedConfig& named : named_configs) {
        CAPTURE(named.name);
        const Config& c = named.config;
        StepWork w;
        w.T = 300, w.pairs = 7000;
        const Ceilings& h200 = *ceilings_of("NVIDIA H200");
        const std::vector<StepPart> parts = step_parts(h200, h200.attention[0], c, w);
        const double vectors = (2.0 * c.L + 1) * c.C + (c.qkv_bias ? c.L * double(c.qkv_width()) : 0);
        const double counted = parts[0].flops + (parts[1].flops + parts[2].flops) * 12 / 14;
        CHECK(counted == doctest::Approx(model_flops(c, w.T, w.pairs) - 6 * w.T * vectors).epsilon(1e-12));
        CHECK(matrix_elements(c) == double(param_count(c)) - vectors);
    }
}

// Every part in none, some, nearly all and all of the layers, the feed-forward in tiles or not. The estimate is good
// to half a percent at best.
TEST_CASE("memory: by the estimate no other recomputation that fits is faster than that of auto") {
    const int counts[] = {0, 16, 28, 30, 31, 32};
    for (const auto& [grad, opt, master] : {std::tuple("bf16", "bf16", "none"), std::tuple("float", "bf16", "float"),
                                            std::tuple("float", "float", "float")}) {
        CAPTURE(grad);
        CAPTURE(opt);
        Setup s;
        s.config = named_configs[3].config; // llama2-7b
        s.gpu = true, s.attention = Attention::full, s.layout.S = 65536, s.layout.head_chunk = 2048;
        s.o.grad_dtype = grad, s.o.opt_dtype = opt, s.o.master = master, s.o.memory = 139.8;
        setup_memory(s);
        CHECK(layout_fits(s, s.layout));
        const Ceilings& h200 = *ceilings_of("NVIDIA H200");
        StepWork w = step_work(s);
        auto seconds = [&](const Recompute& r) {
            w.again = {r.norm, r.swiglu, r.residual, r.qkv, r.ffn, r.attention};
            return step_seconds(step_parts(h200, h200.attention[0], s.config, w));
        };
        const double ours = seconds(s.layout.recompute);
        double fastest = INFINITY;
        Layout other = s.layout;
        for (int i = 0; i < 6 * 6 * 6 * 6 * 6 * 6; i++) {
            int digits = i;
            for (auto& part : recompute_parts) other.recompute.*part.layers = counts[digits % 6], digits /= 6;
            const double time = seconds(other.recompute);
            for (size_t tile : {0, 8192, 16384, 32768}) {
                other.ffn_tile = tile;
                if (time < fastest && layout_fits(s, other)) fastest = time;
            }
        }
        CHECK(fastest < 1.02 * ours);
        CHECK(ours < 1.005 * fastest);
    }
}

TEST_CASE("the estimate takes its visible pairs from the rows of the data") {
    for (Attention mode : all_modes)
        for (int ring : {1, 4}) {
            CAPTURE(int(mode));
            CAPTURE(ring);
            Setup s;
            s.config = small_config(), s.attention = mode;
            s.layout.S = 64, s.layout.B = 2, s.layout.ring = ring, s.layout.world = 2 * ring;
            s.o.total_batch = 64 * 2 * 2 * 3, s.o.generator_mean = 16;
            s.layout.recompute.qkv = 1;
            const StepWork w = step_work(s);
            Loader loader;
            loader_open(loader, "", pack_options(s, true));
            const int rows = mode == Attention::full ? 2 : 128; // 64 micro-batches
            double pairs = 0;
            for (int i = 0; i < rows; i++) {
                Row row;
                loader_next(loader, row);
                for (int32_t q = 0; q < 64; q++)
                    for (int32_t k = 0; k < 64; k++) pairs += visible(q, row.doc[q], k, row.doc[k]);
            }
            CHECK(w.pairs == doctest::Approx(pairs * 2 / rows / ring).epsilon(1e-12));
            if (mode == Attention::full) CHECK(w.pairs * ring == 2 * 64 * 65 / 2);
            CHECK(w.T == 2 * 64 / ring);
            CHECK(w.batches == 3);
            CHECK(w.again.qkv == 1);
            CHECK((ring == 1 ? w.imbalance == 1 && w.moved == 0 : w.imbalance >= 1 && w.moved > 0));
        }
}
