// The deviation experiment: the figures of the layer-local check, the streamed sums against whole matrices, the shifted
// forward against the trainer's, and exact invariance in exact arithmetic.
#include "check.h"
#include "rope_experiment.h"
#include "rope_local.h"
#include "rope_options.h"

namespace {
// Grouped heads, sizes that are no multiple of a tile; weights large enough that attention is far from uniform.
Config small_config() {
    Config c = make_config(2, 24, 4, 2, 20, 50, 10000, 512);
    c.qkv_bias = true;
    return c;
}

template <class E> struct Small {
    Experiment<Cpu, E> x;
    Arena arena;

    explicit Small(size_t S, const Config& c = small_config()) {
        x.m.config = c, x.m.layout.S = S, x.m.layout.train = false, x.m.layout.head_chunk = 1;
        for (int l = 0; l < c.L; l++) x.layers.push_back(l);
        experiment_place(x, arena, S, 2);
        arena = {device_allocate(Cpu{}, arena.used), 0, {}};
        experiment_place(x, arena, S, 2);
        for (const ParamInfo& p : param_table(c))
            for (size_t i = p.offset; i < p.offset + p.count(); i++)
                x.m.param_flat[i] = E((p.start == Start::ones ? 1.0 : 0.0) + 0.3 * hash_normal(7, i));
    }
    Deviation pair(int d1, int d2, size_t T) const {
        return Deviation(d1, d2, x.layers.size(), size_t(x.m.config.H), T, true);
    }
};

std::vector<int32_t> some_text(size_t T) {
    std::vector<int32_t> text;
    for (size_t i = 0; i < T; i++) text.push_back(int32_t(hash64(3, i) % 50));
    return text;
}
const Rounding rounded_as(char letter) { return rounding_by_letter(letter)->rounding; }
} // namespace

TEST_CASE("the layer-local check gives the literature's figures") {
    const LocalPairs at_zero(20000, 1, false), at_random(20000, 1, true);
    for (const LocalFigure& figure : local_figures) {
        CAPTURE(figure.letter);
        const Rounding r = rounded_as(figure.letter);
        CHECK(std::fabs(local_deviation<float>(at_zero, r) / figure.at_zero - 1) < 0.1);
        CHECK(std::fabs(local_deviation<float>(at_random, r) / figure.at_random - 1) < 0.1);
    }
    // In double angles what is left of F is the rounding of cos, sin and the products, 2^-24 each.
    CHECK(local_deviation<float>(at_zero, rounded_as('E')) < 1e-6);
    // And in double throughout, 2^-53 of angles up to 4111: 4.6e-13 rad.
    CHECK(local_deviation<double>(at_zero, rounded_as('E')) < 1e-11);
}

TEST_CASE("a sink raises its key's logit by what was asked, on average over the queries of its heads") {
    const size_t T = 40, H = 4, K = 2, D = 24, all = (H + 2 * K) * D;
    const Buffer<double> qkv(T * all, 5);
    std::vector<double> inv_freq(D / 2);
    rope_frequencies(inv_freq.data(), RopeConfig(), D, T);
    const std::vector<double> add = sink_addition<double>({3.5, 0}, qkv.data(), inv_freq.data(), T, H, K, D);
    for (size_t k = 0; k < K; k++) {
        double raised = 0;
        for (size_t t = 0; t < T; t++)
            for (size_t h = 0; h < H; h++)
                for (size_t d = 0; d < D && h / (H / K) == k; d++)
                    raised += qkv[t * all + h * D + d] * add[k * D + d] / std::sqrt(double(D));
        CHECK(raised / double(T * H / K) == doctest::Approx(3.5).epsilon(1e-12));
    }
    // A turn of a radian or more over the row would lose it again.
    for (size_t d = 0; d < D; d++) CHECK((add[d] != 0) == (inv_freq[d % (D / 2)] * double(T) < 1));
}

TEST_CASE("the experiment's rotation gives the trainer's bits where both have the variant") {
    const size_t T = 70, H = 4, K = 2, D = 24;
    const Buffer<bf16> input(T * (H + 2 * K) * D, 11);
    std::vector<int32_t> pos;
    for (size_t t = 0; t < T; t++) pos.push_back(int32_t(61 * t));
    std::vector<double> inv_freq(D / 2);
    rope_frequencies(inv_freq.data(), RopeConfig(), D, T);
    for (char letter : {'C', 'B', 'A', 'D'}) {
        CAPTURE(letter);
        Rounding r = rounded_as(letter);
        if (r.angles == Type::f32) r.angles = Type::f64; // as the trainer
        const auto precision = RopePrecision(std::string("CBAD").find(letter));
        Buffer<float> table(T * D), ours = converted<float>(input);
        Buffer<bf16> trainers = converted<bf16>(input);
        rope_table<bf16>(Cpu(), table.data(), pos.data(), inv_freq.data(), 1, precision, T, D);
        rope_forward(Cpu(), trainers.data(), table.data(), precision, T, H, K, D);
        study_table(Cpu(), table.data(), pos.data(), inv_freq.data(), 1, r, T, D);
        study_rotate(Cpu(), ours.data(), table.data(), r, T, H, K, D);
        CHECK(largest_error(ours, trainers) == 0);
    }
}

// T = 150 is two tiles of queries and a part of one; the keys pass a block of 128.
TEST_CASE("streamed sums are those of the whole matrices") {
    const size_t T = 150, H = 4, K = 2, D = 16, all = H + 2 * K;
    const double scale = 1 / std::sqrt(double(D));
    const Buffer<double> qkv1(T * all * D, 21);
    Buffer<double> qkv2 = converted<double>(qkv1);
    for (size_t i = 0; i < qkv2.count; i++) qkv2[i] += 0.1 * hash_normal(22, i);
    for (Type logits : {Type::f32, Type::bf16}) {
        Rounding r;
        r.logits = logits;
        Buffer<double> want(H * column_sums * T), columns(H * column_sums * T), lse1(H * T), lse2(H * T), first(H * T);
        want.fill(0);
        study_lse(Cpu(), lse1.data(), qkv1.data(), r, T, H, K, D);
        study_lse(Cpu(), lse2.data(), qkv2.data(), r, T, H, K, D);
        study_columns(Cpu(), columns.data(), qkv1.data(), lse1.data(), qkv2.data(), lse2.data(), r, T, H, K, D);
        study_first(Cpu(), first.data(), qkv1.data(), r, T, H, K, D);
        double mass = 0;
        for (size_t h = 0; h < H; h++)
            for (size_t i = 0; i < T; i++) {
                std::vector<double> a[2], p[2];
                for (int run = 0; run < 2; run++) {
                    const double* x = run ? qkv2.data() : qkv1.data();
                    double sum = 0;
                    for (size_t j = 0; j <= i; j++) {
                        double dot = 0;
                        for (size_t d = 0; d < D; d++)
                            dot += x[(i * all + h) * D + d] * x[(j * all + H + h / (H / K)) * D + d];
                        a[run].push_back((logits == Type::bf16 ? double(float(bf16(float(dot)))) : dot) * scale);
                        sum += std::exp(a[run][j]);
                    }
                    for (size_t j = 0; j <= i; j++) p[run].push_back(std::exp(a[run][j]) / sum);
                }
                CHECK(std::fabs(first[h * T + i] - a[0][0]) < 1e-13);
                for (size_t j = 0; j <= i; j++) {
                    auto add = [&](ColumnSum s, double x) { want[(h * column_sums + s) * T + j] += x; };
                    add(weight_signed, p[0][j] - p[1][j]), add(weight_abs, std::fabs(p[0][j] - p[1][j]));
                    add(weight_mass, p[1][j]);
                    add(logit_signed, a[0][j] - a[1][j]), add(logit_abs, std::fabs(a[0][j] - a[1][j]));
                    mass += p[1][j];
                }
            }
        // Sums of up to 150 terms of size 1, each right to some 2^-52 times the 16 terms of a product: 1e-12.
        CHECK(largest_error(columns, want) < 1e-12);
        CHECK(std::fabs(mass - double(H * T)) < 1e-10);
    }
}

template <class E> static void check_forward(Rounding r) {
    const size_t T = 90;
    Small<E> s(T);
    Model<Cpu, E, E>& m = s.x.m;
    const Row row = experiment_row(some_text(T), T, 5);
    Batch b = batch_make({row}, Attention::full, Comm{});
    model_forward(m, b);
    const std::vector<E> want(m.x_last, m.x_last + T * size_t(m.config.C));
    experiment_forward(
        s.x, row, r, [](int) {}, [](int) {});
    CHECK(memcmp(want.data(), m.x_last, want.size() * sizeof(E)) == 0);
}

TEST_CASE("at the trainer's precision the experiment's forward gives the trainer's bits") {
    Rounding trainers;
    check_forward<float>(trainers);
    check_forward<double>(trainers);
    trainers.storage = Type::bf16;
    check_forward<bf16>(trainers);
}

namespace {
// Causal attention in double: out (T, H, D) of qkv (T, H + 2K, D), rotated.
Buffer<double> exact_attention(const Buffer<double>& qkv, size_t T, size_t H, size_t K, size_t D) {
    const size_t all = H + 2 * K;
    Buffer<double> out(T * H * D);
    out.fill(0);
    for (size_t i = 0; i < T; i++)
        for (size_t h = 0; h < H; h++) {
            std::vector<double> p;
            double sum = 0;
            for (size_t j = 0; j <= i; j++) {
                double dot = 0;
                for (size_t d = 0; d < D; d++)
                    dot += qkv[(i * all + h) * D + d] * qkv[(j * all + H + h / (H / K)) * D + d];
                p.push_back(std::exp(dot / std::sqrt(double(D))));
                sum += p[j];
            }
            for (size_t j = 0; j <= i; j++)
                for (size_t d = 0; d < D; d++)
                    out[(i * H + h) * D + d] += p[j] / sum * qkv[(j * all + H + K + h / (H / K)) * D + d];
        }
    return out;
}

// Of the last layer's attention in a bf16 network: how many of its values are not the exact one, of the rotated queries
// and keys as they were, rounded to bf16.
double share_not_rounded_once(const Rounding& r) {
    const size_t T = 90;
    Small<bf16> s(T);
    const auto& c = s.x.m.config;
    const size_t H = c.H, K = c.K, D = c.D;
    Buffer<double> qkv(T * (H + 2 * K) * D);
    experiment_forward(
        s.x, experiment_row(some_text(T), T, 5), r, [](int) {},
        [&](int) { std::copy_n(s.x.qkv, qkv.count, qkv.data()); });
    const Buffer<double> truth = exact_attention(qkv, T, H, K, D);
    const bf16* got = s.x.m.acts[c.L - 1].att;
    size_t off = 0;
    for (size_t i = 0; i < truth.count; i++) {
        const double step = ulp<bf16>(truth[i]);
        off += float(got[i]) != float(bf16(float(truth[i])));
        CHECK(std::fabs(double(float(got[i])) - truth[i]) <= 2 * step + ulp<bf16>(largest_value(truth)));
    }
    return double(off) / double(truth.count);
}
} // namespace

TEST_CASE("a bf16 network that stores q and k in fp32 rounds its attention once, behind P V") {
    // Where fp32 errs by some 2^-20 and a step of bf16 is 2^-8, one value in a thousand is rounded to its other
    // neighbour; P rounded to bf16, as the trainer's attention has it, moves 17% of them.
    CHECK(share_not_rounded_once(rounded_as('E')) < 0.01);
    CHECK(share_not_rounded_once(rounded_as('F')) < 0.01);
    CHECK(share_not_rounded_once(rounded_as('C')) > 0.1);
}

TEST_CASE("P rounded to bf16 alone: errors of the trainer's attention, and nothing else of E or C changes") {
    const size_t T = 150, H = 4, K = 2, D = 20, count = T * H * D;
    const Buffer<bf16> input(T * (H + 2 * K) * D, 41);
    const Buffer<float> qkv = converted<float>(input);
    const Buffer<double> exact_qkv = converted<double>(input), truth = exact_attention(exact_qkv, T, H, K, D);
    Buffer<float> rounded(count);
    Buffer<double> exact(count);
    study_attention(Cpu(), rounded.data(), qkv.data(), T, H, K, D);
    study_attention(Cpu(), exact.data(), exact_qkv.data(), T, H, K, D);
    auto error = [&](const auto& x) {
        double squares = 0;
        for (size_t i = 0; i < count; i++) squares += (double(x[i]) - truth[i]) * (double(x[i]) - truth[i]);
        return std::sqrt(squares / double(count));
    };
    // Uniform over half a step of bf16, which is 2^-8 to 2^-9 of the weight: a relative error of 2^-9 / sqrt 3 at most
    // and half of it at least, and a mean over n keys of independent errors has that over sqrt n of a value of 1.
    CHECK(error(rounded) > 0x1p-9 / std::sqrt(3.0) / 2 / std::sqrt(double(T)));
    CHECK(error(rounded) < 0x1p-8);
    CHECK(std::fabs(error(exact) / error(rounded) - 1) < 0.01); // it is the rounding's, whatever the rest is in
    const double trainers = share_not_rounded_once(rounded_as('C'));
    Rounding r = rounded_as('E');
    r.weights = Type::bf16;
    const double e = share_not_rounded_once(r);
    CHECK(std::fabs(e / trainers - 1) < 0.2); // 1860 and 1880 of 10800
    r = rounded_as('C'), r.weights = Type::f32;
    CHECK(share_not_rounded_once(r) < 0.01);
    r.weights = Type::bf16;
    CHECK(share_not_rounded_once(r) == trainers); // C's own
    r = rounded_as('E'), r.weights = Type::f32;
    CHECK(share_not_rounded_once(r) == share_not_rounded_once(rounded_as('E')));
}

TEST_CASE("before anything else of a bf16 network has been rounded differently, E leaves RoPE as exact as fp32 does") {
    const size_t T = 150;
    Small<bf16> s(T);
    std::vector<Deviation> e = {s.pair(0, 16, T)}, f = e, c = e;
    measure_shifts(s.x, some_text(T), {16}, rounded_as('E'), e);
    measure_shifts(s.x, some_text(T), {16}, rounded_as('F'), f);
    measure_shifts(s.x, some_text(T), {16}, rounded_as('C'), c);
    auto layer = [](const Deviation& d, size_t l) { return d.layer[l * measures + sum_abs].mean(); };
    // A step of fp32 for one of bf16, 2^-16, and 64 for what else rounds there: cos, sin, products and sums.
    CHECK(layer(e[0], 0) < 1e-3 * layer(c[0], 0));
    CHECK(layer(e[0], 0) <= layer(f[0], 0));
    CHECK(layer(e[0], 0) > 0);
}

TEST_CASE("in exact arithmetic every shift leaves the attention of the whole network as it is") {
    const size_t T = 150;
    const std::vector<int32_t> text = some_text(T);
    const std::vector<int> shifts = parse_numbers<int>("shifts", RopeOptions().shifts, "0..1000000");
    auto deviations = [&]<class E>(E, const Rounding& r) {
        Small<E> s(T);
        std::vector<Deviation> pairs;
        for (int shift : shifts) pairs.push_back(s.pair(shift, 16, T));
        measure_shifts(s.x, text, {16}, r, pairs);
        std::vector<double> all;
        for (const Deviation& d : pairs) all.push_back(d.model[sum_abs].mean());
        return all;
    };
    const std::vector<double> exact = deviations(double(), rounded_as('E'));
    const std::vector<double> single = deviations(float(), rounded_as('F')),
                              angle = deviations(double(), rounded_as('D'));
    for (size_t i = 0; i < shifts.size(); i++) {
        CAPTURE(shifts[i]);
        // The same operations with 29 more bits; 8 for the luck of either.
        CHECK(exact[i] <= 8 * std::ldexp(single[i], -29));
        CHECK(exact[i] < 1e-9);
        CHECK(single[i] > 1e-6);
        CHECK(single[i] < 0.1);
        CHECK(angle[i] > 0.1);
    }
}

TEST_CASE("a difference has the sign of D1 against D2, whichever of them is the reference") {
    const size_t T = 80;
    Small<bf16> s(T);
    std::vector<Deviation> pairs = {s.pair(0, 16, T), s.pair(16, 0, T), s.pair(50, 16, T), s.pair(16, 50, T),
                                    s.pair(0, 50, T)};
    measure_shifts(s.x, some_text(T), {16, 0}, rounded_as('C'), pairs);
    auto value = [&](int pair, Measure m) { return pairs[pair].model[m].mean(); };
    CHECK(value(0, first_logit) != 0);
    for (int pair : {0, 2}) {
        CHECK(value(pair, first_logit) == -value(pair + 1, first_logit));
        CHECK(value(pair, first_signed) == -value(pair + 1, first_signed));
        CHECK(value(pair, sum_abs) == value(pair + 1, sum_abs));
        CHECK(value(pair, sum_abs) >= value(pair, column_abs));
        CHECK(value(pair, column_abs) >= std::fabs(value(pair, signed_sum)));
        CHECK(value(pair, first_sum_abs) > 0);
    }
    // 50 against 16 and 16 against 0 add up to 50 against 0, key by key.
    const Mean *a = pairs[3].key.data(), *b = pairs[0].key.data(), *c = pairs[4].key.data();
    for (size_t j = 0; j < T; j++) CHECK(std::fabs(a[j].mean() + b[j].mean() - c[j].mean()) < 1e-5);
    // Keys add up to the model in every reading.
    double keys[key_sums] = {};
    for (size_t i = 0; i < key_sums * T; i++) keys[i / T] += a[i].mean();
    CHECK(std::fabs(keys[weight_abs] - value(3, sum_abs)) < 1e-12);
    CHECK(std::fabs(keys[key_column_abs] - value(3, column_abs)) < 1e-12);
    CHECK(std::fabs(keys[weight_signed] - value(3, signed_sum)) < 1e-12);
    // Heads add up to layers, layers to the model.
    double heads = 0, layers = 0;
    for (size_t i = 0; i < 8; i++) heads += pairs[0].head[i * measures + sum_abs].mean();
    for (size_t l = 0; l < 2; l++) layers += pairs[0].layer[l * measures + sum_abs].mean();
    CHECK(std::fabs(heads - value(0, sum_abs)) < 1e-12);
    CHECK(std::fabs(layers - value(0, sum_abs)) < 1e-12);
}

TEST_CASE("one long run gives the first key's logits of all shorter ones") {
    const size_t T = 120;
    Small<double> s(T);
    const std::vector<int32_t> text = some_text(T);
    LengthDeviation all{{30, 64, 120}, std::vector<Mean>(3), std::vector<Mean>(3)};
    measure_lengths(s.x, text, 0, 16, rounded_as('C'), all);
    for (size_t n = 0; n < 3; n++) {
        std::vector<Deviation> pairs = {s.pair(0, 16, size_t(all.lengths[n]))};
        measure_shifts(s.x, text, {16}, rounded_as('C'), pairs);
        // Sums of 120 logits of size 10 in double.
        CHECK(std::fabs(pairs[0].model[first_logit].mean() - all.logit[n].mean()) < 1e-11);
        CHECK(std::fabs(pairs[0].model[first_logit_abs].mean() - all.logit_abs[n].mean()) < 1e-11);
        CHECK(all.logit_abs[n].mean() > 1e-4);
    }
}

TEST_CASE("frozen queries and keys: the first layer moves as in the network, no layer inherits") {
    const size_t T = 100;
    Small<float> s(T);
    const std::vector<int32_t> text = some_text(T);
    Rounding input;
    input.input = Type::bf16;
    std::vector<Deviation> frozen = {s.pair(0, 16, T), s.pair(0, 16, T), s.pair(0, 16, T)},
                           network = {s.pair(0, 16, T)};
    std::vector<Deviation> again = frozen;
    measure_frozen(s.x, text, {rounded_as('C'), rounded_as('E'), input}, frozen);
    measure_shifts(s.x, text, {16, 0}, rounded_as('C'), network);
    auto layer = [](const Deviation& d, size_t l) { return d.layer[l * measures + sum_abs].mean(); };
    // What follows is the unrounded run's, whatever was compared last.
    measure_frozen(s.x, text, {rounded_as('C'), rounded_as('E'), rounded_as('D')}, again);
    const float* end = s.x.m.x_last;
    const std::vector<float> left(end, end + T * size_t(s.x.m.config.C));
    experiment_forward(
        s.x, experiment_row(text, T, 0), Rounding{}, [](int) {}, [](int) {});
    CHECK(memcmp(left.data(), end, left.size() * sizeof(float)) == 0);
    CHECK(layer(frozen[0], 0) == layer(network[0], 0));
    CHECK(layer(frozen[0], 1) != layer(network[0], 1));
    CHECK(frozen[1].model[sum_abs].mean() < 1e-3 * frozen[0].model[sum_abs].mean());
    // What is rounded alike in both runs makes no difference between them.
    CHECK(frozen[2].model[sum_abs].mean() < 1e-3 * frozen[0].model[sum_abs].mean());
}

TEST_CASE("what the options leave open follows the data, and what is less than by default is said") {
    RopeOptions o;
    o.data = "test.bin";
    const std::vector<int> all = {64, 128, 256, 512, 1024, 2048, 4096, 8192}, short_of_8192(all.begin(), all.end() - 1),
                           short_of_4096(all.begin(), all.end() - 2);
    // The demo's validation data, 32 rows of 2048, on a GPU, on the CPU, and without the experiment on lengths.
    Extent e = choose_extent(o, true, true, 2048, 2048, 65504);
    CHECK((e.lengths == short_of_8192 && e.longest == 4096 && e.sequences == 15));
    CHECK(e.said == "test.bin: 65504 tokens fill 15 sequences of 4096: so many are measured, not 50");
    e = choose_extent(o, false, true, 2048, 2048, 65504);
    CHECK((e.lengths == short_of_8192 && e.longest == 4096 && e.sequences == 4 && e.said.empty()));
    e = choose_extent(o, true, false, 2048, 2048, 65504);
    CHECK((e.longest == 2048 && e.sequences == 32 && e.lengths == std::vector<int>{2048}));
    // Enough text; then too little for a length; then too little for four sequences, and for one.
    e = choose_extent(o, true, true, 4096, 4096, 50 * 8191);
    CHECK((e.lengths == all && e.longest == 8192 && e.sequences == 50 && e.said.empty()));
    e = choose_extent(o, true, true, 4096, 4096, 3 * 8191);
    CHECK((e.lengths == short_of_8192 && e.longest == 4096 && e.sequences == 6));
    CHECK(e.said == "test.bin: 24573 tokens fill 6 sequences of 4096: so many are measured, not 50; and 3 of 8192, so "
                    "--lengths ends at 4096");
    e = choose_extent(o, false, true, 4096, 4096, 2 * 4095);
    CHECK((e.lengths == short_of_8192 && e.sequences == 2));
    e = choose_extent(o, false, true, 4096, 4096, 4094);
    CHECK((e.longest == 4096 && e.sequences == 0));
    // What is asked for is not made less: the caller refuses it.
    o.sequences = 50;
    CHECK(choose_extent(o, true, true, 2048, 2048, 65504).sequences == 50);
    o.sequences = 20;
    e = choose_extent(o, true, true, 2048, 2048, 65504);
    CHECK((e.lengths == short_of_4096 && e.longest == 2048 && e.sequences == 20));
    CHECK(e.said == "test.bin: 65504 tokens fill 15 of 4096, so --lengths ends at 2048");
    o.lengths = "100,5000", o.sequences = 0;
    e = choose_extent(o, true, true, 2048, 2048, 65504);
    CHECK((e.lengths == std::vector<int>{100, 5000} && e.longest == 5000 && e.sequences == 13));
}

TEST_CASE("a variant's places can be set one by one") {
    RopeOptions o;
    const std::vector<Variant> v = parse_variants(
        "variants", "bf16:E,bf16:E/weights=bf16,bf16:C/weights=float/angles=double,float:F/table=bf16", o);
    CHECK((v[0].name == "bf16:E" && !v[0].rounding.weights));
    CHECK((v[1].name == "bf16:E/weights=bf16" && v[1].rounding.weights == Type::bf16));
    CHECK((v[2].rounding.weights == Type::f32 && v[2].rounding.angles == Type::f64 &&
           v[2].rounding.storage == Type::bf16));
    CHECK((v[3].network == Type::f32 && v[3].rounding.table == Type::bf16 && v[3].rounding.angles == Type::f32));
    o.weights = "bf16"; // in all of them, behind what they say themselves
    const std::vector<Variant> all = parse_variants("variants", "bf16:C,bf16:C/weights=float", o);
    CHECK((all[0].name == "bf16:C/weights=bf16" && all[1].name == "bf16:C/weights=float/weights=bf16"));
    CHECK((all[0].rounding.weights == Type::bf16 && all[1].rounding.weights == Type::bf16));
}

TEST_CASE("mean and standard error over sequences") {
    Mean mean;
    mean.add(1);
    CHECK(mean.mean() == 1);
    CHECK(std::isnan(mean.error()));
    mean.add(2), mean.add(6);
    CHECK(mean.mean() == 3);
    CHECK(std::fabs(mean.error() - std::sqrt(7.0 / 3)) < 1e-15); // deviations -2, -1, 3: 14 / 2 / 3
}
