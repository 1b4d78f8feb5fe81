// The deviation experiment on a model: the trainer's forward at shifted positions, and what is made of its columns.
//
//   D(X, D1, D2) = sum over layers, heads, keys j of n_j sum_i [P_ij(X, D1) - P_ij(X, D2)],  n_j = 1 / (T - j)
//
// (Eq. 4 of arXiv 2411.13476; whether bars stand around the difference, and around what, is not said: all three
// readings are kept.) Its sequences are rows of text behind one BOS, every token sees all before it.
#pragma once
#define TRAIN_LLAMA_NO_MAIN
#include "../train_llama.cu"
#include "rope_study.cuh"
#include <functional>

// What is measured of a head, between two shifts; of a layer or a model it is the sum over the heads.
//
// clang-format off
//      name             meaning
#define MEASURES(MEASURE)                                                                        \
    MEASURE(sum_abs)         /* D with bars around every element: sum_j n_j sum_i |dP_ij|    */  \
    MEASURE(column_abs)      /* D with bars around a key's sum:   sum_j n_j |sum_i dP_ij|    */  \
    MEASURE(signed_sum)      /* D as printed:                     sum_j n_j sum_i dP_ij      */  \
    MEASURE(first_sum_abs)   /* what the first key adds to sum_abs                           */  \
    MEASURE(first_signed)    /* and to signed_sum                                            */  \
    MEASURE(first_logit)     /* Eq. 5, with 1 / sqrt(D): mean over i of da_i0                */  \
    MEASURE(first_logit_abs) /* likewise of |da_i0|                                          */  \
    MEASURE(rest_logit_abs)  /* |da_ij| of all other keys: mean over j > 0 of mean over i    */  \
    MEASURE(first_mass)      /* attention that the first key gets: mean over i of P_i0(D2)   */
// clang-format on
#define FIELD(name) name,
enum Measure { MEASURES(FIELD) measures };
#undef FIELD
#define NAME(name) #name,
constexpr const char* measure_names[] = {MEASURES(NAME)};
#undef NAME

// A mean over sequences and its standard error; NAN from one sequence alone.
struct Mean {
    double sum = 0, squares = 0;
    int count = 0;

    void add(double x) { sum += x, squares += x * x, count++; }
    double mean() const { return sum / count; }
    double error() const {
        if (count < 2) return NAN;
        return std::sqrt(std::max(0.0, squares - sum * sum / count) / (double(count) - 1) / count);
    }
};

// One head's measures from its columns (5, T).
template <class A> void measure_head(double* out, const A* columns, size_t T) {
    std::fill_n(out, measures, 0.0);
    for (size_t j = 0; j < T; j++) {
        const double n = 1 / double(T - j);
        auto column = [&](ColumnSum sum) { return n * double(columns[size_t(sum) * T + j]); };
        out[sum_abs] += column(weight_abs);
        out[column_abs] += std::fabs(column(weight_signed));
        out[signed_sum] += column(weight_signed);
        if (j > 0) out[rest_logit_abs] += column(logit_abs) / double(T - 1);
        if (j > 0) continue;
        out[first_sum_abs] = column(weight_abs), out[first_signed] = column(weight_signed);
        out[first_logit] = column(logit_signed), out[first_logit_abs] = column(logit_abs);
        out[first_mass] = column(weight_mass);
    }
}

// What is kept of a key: its columns, and what it adds to column_abs, in which bars stand around every head's sum.
enum KeySum { key_column_abs = column_sums, key_sums };

// All that is kept of one pair of shifts. Layers are those that are measured, in their order.
struct Deviation {
    int d1 = 0, d2 = 0;
    size_t layers = 0, heads = 0, T = 0;
    bool with_keys = false;
    std::vector<Mean> head, layer, model; // (layers, heads, measures), (layers, measures), (measures)
    std::vector<Mean> key;                // (key_sums, T): n_j times the sum, summed over layers and heads
    std::vector<double> sample;           // (sequences, measures): the model's
    std::vector<double> now, key_now;     // of the sequence at hand

    Deviation(int d1, int d2, size_t layers, size_t heads, size_t T, bool with_keys)
        : d1(d1), d2(d2), layers(layers), heads(heads), T(T), with_keys(with_keys), head(layers * heads * measures),
          layer(layers * measures), model(measures), key(with_keys ? key_sums * T : 0), now(head.size()),
          key_now(key.size()) {}

    template <class A> void add_layer(size_t l, const A* columns /*(heads, 5, T)*/) {
#pragma omp parallel for schedule(static)
        for (size_t h = 0; h < heads; h++)
            measure_head(now.data() + (l * heads + h) * measures, columns + h * column_sums * T, T);
        for (size_t h = 0; h < heads && with_keys; h++)
            for (size_t i = 0; i < column_sums * T; i++) {
                const double x = double(columns[h * column_sums * T + i]) / double(T - i % T);
                key_now[i] += x;
                if (i / T == weight_signed) key_now[key_column_abs * T + i % T] += std::fabs(x);
            }
    }
    void finish_sequence() {
        std::vector<double> by_layer(layer.size()), all(measures);
        for (size_t i = 0; i < now.size(); i++) {
            head[i].add(now[i]);
            by_layer[i / (heads * measures) * measures + i % measures] += now[i];
            all[i % measures] += now[i];
        }
        for (size_t i = 0; i < layer.size(); i++) layer[i].add(by_layer[i]);
        for (size_t i = 0; i < model.size(); i++) model[i].add(all[i]);
        for (size_t i = 0; i < key.size(); i++) key[i].add(key_now[i]);
        sample.insert(sample.end(), all.begin(), all.end());
        std::fill(key_now.begin(), key_now.end(), 0.0);
    }
};

// An attention sink made by hand: what every query's logit of one key is raised by, on average over the queries.
struct Sink {
    double raise = 0;
    size_t key = 0;
};

// A model of element type E with the buffers of the experiment, for rows of up to S tokens.
template <class Dev, class E> struct Experiment {
    using A = Acc<E>;
    Model<Dev, E, E> m;
    std::vector<int> layers; // that are measured
    double* inv_freq;        // (D / 2)
    A* table;                // (S, D / 2, 2)
    A *qkv, *att;            // (S, H + 2K, D), (S, H, D): the layer at hand, in A
    A *lse, *trainer_lse;    // (H, S) of qkv; (S, H) as the trainer's attention writes it
    A* columns;              // (H, 5, S)
    A* first;                // (H, S)
    A *again, *again_lse;    // (S, H + 2K, D), (H, S): qkv once more, where frozen ones are compared
    // Called after every forward.
    std::function<void()> pass_done = [] {};
    Sink sink;
    std::vector<std::vector<A>> sink_add; // (layers; K, D): to its key, the same in all runs of a sequence
    RingScratch<A> scratch;               // of the attention in A
    void* plan;
    struct Kept {
        std::vector<A*> qkv, lse; // (layers)
    } kept[2];                    // reference shifts' rotated queries and keys, layer by layer

    size_t heads() const { return size_t(m.config.H); }
};

// Hands out the memory, or measures it. T: tokens of the rows whose queries and keys are kept for `references` shifts.
template <class Dev, class E> void experiment_place(Experiment<Dev, E>& x, Arena& arena, size_t T, size_t references) {
    using A = Acc<E>;
    model_place(x.m, arena);
    const Config& c = x.m.config;
    const size_t S = x.m.layout.S, H = c.H, K = c.K, D = c.D, all = (H + 2 * K) * D;
    x.inv_freq = arena.take<double>("experiment", D / 2);
    x.table = arena.take<A>("experiment", S * D);
    x.qkv = arena.take<A>("experiment", S * all);
    x.att = arena.take<A>("experiment", S * H * D);
    x.lse = arena.take<A>("experiment", S * H);
    x.trainer_lse = arena.take<A>("experiment", S * H);
    x.columns = arena.take<A>("experiment", H * column_sums * S);
    x.first = arena.take<A>("experiment", H * S);
    x.again = arena.take<A>("experiment", T * all);
    x.again_lse = arena.take<A>("experiment", H * T);
    const RingScratchSizes n = ring_scratch_sizes(x.m.dev, {}, S, 1, 1, H, K, D);
    x.scratch.state = arena.take<A>("experiment", n.state);
    x.scratch.anchor = arena.take<A>("experiment", n.anchor);
    x.plan = arena.take<uint8_t>("experiment", ring_plan_bytes(x.m.dev, S, 1, 1));
    for (size_t r = 0; r < references; r++) {
        x.kept[r].qkv.clear(), x.kept[r].lse.clear();
        for (size_t l = 0; l < x.layers.size(); l++) {
            x.kept[r].qkv.push_back(arena.take<A>("experiment", T * all));
            x.kept[r].lse.push_back(arena.take<A>("experiment", T * H));
        }
    }
}

// One sequence of T tokens at one shift.
inline Row experiment_row(const std::vector<int32_t>& text, size_t T, int shift) {
    REQUIRE(text.size() >= T, "take a sequence of at least T tokens");
    Row row;
    row.token.assign(text.begin(), text.begin() + T);
    row.doc.assign(T, 0), row.label.assign(T, -1), row.pos.resize(T);
    for (size_t i = 0; i < T; i++) row.pos[i] = int32_t(i) + shift;
    return row;
}

// Draws the attention of all heads to one key, as models do that have grown a sink: along their mean query, in the
// dimensions that turn by less than one radian over the row. qkv (T, H + 2K, D), not rotated yet.
//   key += raise sqrt(D) u / |u|^2,   u (D): mean query of the heads of this key, in those dimensions
template <class A> std::vector<A> sink_addition(const Sink& sink, const A* qkv, const double* inv_freq, size_t T,
                                                size_t H, size_t K, size_t D) {
    std::vector<A> add(K * D);
#pragma omp parallel for schedule(static)
    for (size_t k = 0; k < K; k++) {
        std::vector<double> u(D);
        for (size_t t = 0; t < T; t++)
            for (size_t h = k * (H / K); h < (k + 1) * (H / K); h++)
                for (size_t d = 0; d < D; d++) u[d] += double(qkv[(t * (H + 2 * K) + h) * D + d]);
        double square = 0;
        for (size_t d = 0; d < D; d++) {
            u[d] *= inv_freq[d % (D / 2)] * double(T) < 1 ? double(K) / double(T * H) : 0;
            square += u[d] * u[d];
        }
        for (size_t d = 0; d < D; d++)
            add[k * D + d] = A(sink.raise * std::sqrt(double(D)) * u[d] / std::max(square, 1e-30));
    }
    return add;
}
template <class Dev, class E>
void sink_apply(Experiment<Dev, E>& x, size_t l, const double* inv_freq, size_t T, size_t H, size_t K, size_t D) {
    using A = Acc<E>;
    const size_t all = (H + 2 * K) * D;
    if (x.sink_add.size() <= l) {
        std::vector<A> qkv(T * all);
        copy_to_host(x.m.dev, qkv.data(), x.qkv, qkv.size() * sizeof(A));
        x.sink_add.push_back(sink_addition(x.sink, qkv.data(), inv_freq, T, H, K, D));
    }
    std::vector<A> keys(K * D);
    A* place = x.qkv + x.sink.key * all + H * D;
    copy_to_host(x.m.dev, keys.data(), place, keys.size() * sizeof(A));
    for (size_t i = 0; i < K * D; i++) keys[i] = A(E(keys[i] + x.sink_add[l][i])); // as the network stores its keys
    copy_to_device(x.m.dev, place, keys.data(), keys.size() * sizeof(A));
}

// model_forward, line by line, but for the rotation and the type that the attention computes in: E as in training when
// q, k and P are rounded to E, else A, where P alone may be rounded. `before(l)` may look at x.qkv as the projections
// left it, `after(l)` at the rotated one. Rounded logits are what the measured weights are made from; the attention
// that feeds the next layer keeps its logits in fp32, as flash attention does. Goes through the layers up to the last
// that is measured.
template <class Dev, class E, class Before, class After>
void experiment_forward(Experiment<Dev, E>& x, const Row& row, const Rounding& r, Before before, After after) {
    using A = Acc<E>;
    Model<Dev, E, E>& m = x.m;
    const auto [dev, c, T] = std::tuple(m.dev, m.config, row.token.size());
    const size_t C = c.C, H = c.H, K = c.K, D = c.D, F = c.F;
    constexpr bool narrow = !std::is_same_v<E, A>;
    const bool stored = narrow && r.storage == Type::bf16;
    const bool rounded_weights = r.weights.value_or(stored ? Type::bf16 : Type::f32) == Type::bf16;
    const E* none = nullptr;

    Batch b = batch_make({row}, Attention::full, Comm{}, attention_tiles<E>(dev, D));
    Batch wide = batch_make({row}, Attention::full, Comm{}, attention_tiles<A>(dev, D));
    model_input(m, b);
    ring_plan_upload(dev, wide.plan, x.plan, ring_plan_bytes(dev, m.layout.S, 1, 1));
    std::vector<double> frequency(D / 2);
    const double factor = rope_frequencies(frequency.data(), c.rope, D, T);
    copy_to_device(dev, x.inv_freq, frequency.data(), D / 2 * sizeof(double));
    study_table(dev, x.table, m.pos, x.inv_freq, factor, r, T, D);

    embedding_forward(dev, m.acts[0].x, b.order, m.params.embed, C);
    for (int l = 0; l <= x.layers.back(); l++) {
        const LayerParams<E>& w = m.params.layer[l];
        const LayerActs<E>& a = m.acts[l];
        rmsnorm_forward(dev, a.att_normed, a.att_rstd, a.x, w.att_norm, T, C, c.eps);
        matmul_forward(dev, a.qkv, a.att_normed, w.wqkv, w.bqkv, none, T, C, (H + 2 * K) * D);
        convert(dev, x.qkv, a.qkv, T * (H + 2 * K) * D);
        if (x.sink.raise > 0) sink_apply(x, size_t(l), frequency.data(), T, H, K, D);
        before(l);
        study_rotate(dev, x.qkv, x.table, r, T, H, K, D);
        after(l);
        if (rounded_weights && !stored) {
            study_attention(dev, x.att, x.qkv, T, H, K, D);
            convert(dev, a.att, x.att, T * H * D);
        } else if (narrow && !rounded_weights) {
            ring_attention_forward(dev, Comm{}, wide.plan, x.att, x.trainer_lse, x.qkv, x.scratch, H, K, D);
            convert(dev, a.att, x.att, T * H * D);
        } else {
            convert(dev, a.qkv, x.qkv, T * (H + 2 * K) * D);
            ring_attention_forward(dev, Comm{}, b.plan, a.att, a.lse, a.qkv, m.scratch, H, K, D);
        }
        matmul_forward(dev, a.h, a.att, w.wo, none, a.x, T, H * D, C);
        rmsnorm_forward(dev, a.ffn_normed, a.ffn_rstd, a.h, w.ffn_norm, T, C, c.eps);
        matmul_forward(dev, a.gate_up, a.ffn_normed, w.wgate_up, none, none, T, C, 2 * F);
        swiglu_forward(dev, a.act, a.gate_up, T, F);
        matmul_forward(dev, a.out, a.act, w.wdown, none, a.h, T, F, C);
    }
    x.pass_done();
}

// Place of layer l among the measured ones, or -1.
inline int measured_place(const std::vector<int>& layers, int l) {
    auto at = std::find(layers.begin(), layers.end(), l);
    return at == layers.end() ? -1 : int(at - layers.begin());
}

// Adds one sequence to every pair. Each shift runs once; those in `references` (up to two, and one of them in every
// pair) keep their queries and keys, and all that come later are compared with them.
template <class Dev, class E> void measure_shifts(Experiment<Dev, E>& x, const std::vector<int32_t>& text,
                                                  const std::vector<int>& references, const Rounding& r,
                                                  std::vector<Deviation>& pairs) {
    using A = Acc<E>;
    const auto [dev, c, T] = std::tuple(x.m.dev, x.m.config, pairs.at(0).T);
    const size_t H = c.H, K = c.K, D = c.D;
    std::vector<int> shifts = references;
    for (const Deviation& pair : pairs)
        for (int shift : {pair.d1, pair.d2})
            if (std::find(shifts.begin(), shifts.end(), shift) == shifts.end()) shifts.push_back(shift);
    std::vector<A> columns(H * column_sums * T);
    x.sink_add.clear();
    for (size_t i = 0; i < shifts.size(); i++) {
        auto after = [&](int l) {
            const int place = measured_place(x.layers, l);
            if (place < 0) return;
            study_lse(dev, x.lse, x.qkv, r, T, H, K, D);
            for (size_t k = 0; k < std::min(i, references.size()); k++)
                for (Deviation& pair : pairs) {
                    const bool first = pair.d1 == shifts[i] && pair.d2 == shifts[k];
                    if (!first && !(pair.d1 == shifts[k] && pair.d2 == shifts[i])) continue;
                    const A *qkv[] = {x.qkv, x.kept[k].qkv[place]}, *lse[] = {x.lse, x.kept[k].lse[place]};
                    study_columns(dev, x.columns, qkv[!first], lse[!first], qkv[first], lse[first], r, T, H, K, D);
                    copy_to_host(dev, columns.data(), x.columns, columns.size() * sizeof(A));
                    pair.add_layer(size_t(place), columns.data());
                }
            if (i >= references.size()) return;
            copy_on_device(dev, x.kept[i].qkv[place], x.qkv, T * (H + 2 * K) * D * sizeof(A));
            copy_on_device(dev, x.kept[i].lse[place], x.lse, T * H * sizeof(A));
        };
        experiment_forward(
            x, experiment_row(text, T, shifts[i]), r, [](int) {}, after);
    }
    for (Deviation& pair : pairs) pair.finish_sequence();
}

// The same queries and keys, those of an unrounded run, rotated at both shifts of each pair under its own rounding:
// what one place does by itself, with nothing carried from layer to layer. Needs room for two references.
template <class Dev, class E> void measure_frozen(Experiment<Dev, E>& x, const std::vector<int32_t>& text,
                                                  const std::vector<Rounding>& roundings,
                                                  std::vector<Deviation>& pairs) {
    using A = Acc<E>;
    const auto [dev, c, T] = std::tuple(x.m.dev, x.m.config, pairs.at(0).T);
    const size_t H = c.H, K = c.K, D = c.D, bytes = T * (H + 2 * K) * D * sizeof(A);
    std::vector<A> columns(H * column_sums * T);
    std::vector<double> frequency(D / 2);
    const double factor = rope_frequencies(frequency.data(), c.rope, D, T);
    A *qkv[] = {x.kept[0].qkv[0], x.again}, *lse[] = {x.kept[0].lse[0], x.again_lse}, *frozen = x.kept[1].qkv[0];
    auto before = [&](int l) {
        const int place = measured_place(x.layers, l);
        if (place < 0) return;
        copy_on_device(dev, frozen, x.qkv, bytes);
        for (size_t p = 0; p < pairs.size(); p++) {
            const int shifts[] = {pairs[p].d1, pairs[p].d2};
            for (int side = 0; side < 2; side++) {
                const Row row = experiment_row(text, T, shifts[side]);
                copy_to_device(dev, x.m.pos, row.pos.data(), T * 4);
                copy_on_device(dev, qkv[side], frozen, bytes);
                study_table(dev, x.table, x.m.pos, x.inv_freq, factor, roundings[p], T, D);
                study_rotate(dev, qkv[side], x.table, roundings[p], T, H, K, D);
                study_lse(dev, lse[side], qkv[side], roundings[p], T, H, K, D);
            }
            study_columns(dev, x.columns, qkv[0], lse[0], qkv[1], lse[1], roundings[p], T, H, K, D);
            copy_to_host(dev, columns.data(), x.columns, columns.size() * sizeof(A));
            pairs[p].add_layer(size_t(place), columns.data());
        }
        const Row row = experiment_row(text, T, 0); // what the layer itself goes on with
        copy_to_device(dev, x.m.pos, row.pos.data(), T * 4);
        study_table(dev, x.table, x.m.pos, x.inv_freq, factor, Rounding{}, T, D);
    };
    x.sink_add.clear();
    experiment_forward(x, experiment_row(text, T, 0), Rounding{}, before, [](int) {});
    for (Deviation& pair : pairs) pair.finish_sequence();
}

// Logit of the first key against the length (Eq. 5, with 1 / sqrt(D)): a query sees nothing behind it, so the first
// `length` queries of one long run are those of a run of that length. (With a RoPE scaling that depends on the length,
// all see the longest one's.) Mean over the queries, summed over layers and heads.
struct LengthDeviation {
    std::vector<int> lengths;
    std::vector<Mean> logit, logit_abs; // (lengths)
};
template <class Dev, class E> void measure_lengths(Experiment<Dev, E>& x, const std::vector<int32_t>& text, int d1,
                                                   int d2, const Rounding& r, LengthDeviation& out) {
    using A = Acc<E>;
    const size_t T = size_t(*std::max_element(out.lengths.begin(), out.lengths.end()));
    const size_t H = x.m.config.H, K = x.m.config.K, D = x.m.config.D, lines = x.layers.size() * H;
    std::vector<A> first[2];
    x.sink_add.clear();
    for (int side = 0; side < 2; side++) {
        first[side].resize(lines * T);
        auto after = [&](int l) {
            const int place = measured_place(x.layers, l);
            if (place < 0) return;
            study_first(x.m.dev, x.first, x.qkv, r, T, H, K, D);
            copy_to_host(x.m.dev, first[side].data() + place * H * T, x.first, H * T * sizeof(A));
        };
        experiment_forward(
            x, experiment_row(text, T, side ? d2 : d1), r, [](int) {}, after);
    }
    for (size_t n = 0; n < out.lengths.size(); n++) {
        const size_t length = size_t(out.lengths[n]);
        std::vector<double> sums(2 * lines); // a line's own: the bits do not depend on the threads
#pragma omp parallel for schedule(static)
        for (size_t line = 0; line < lines; line++)
            for (size_t i = 0; i < length; i++) {
                const double d = double(first[0][line * T + i]) - double(first[1][line * T + i]);
                sums[2 * line] += d, sums[2 * line + 1] += std::fabs(d);
            }
        double sum = 0, sum_abs = 0;
        for (size_t line = 0; line < lines; line++) sum += sums[2 * line], sum_abs += sums[2 * line + 1];
        out.logit[n].add(sum / double(length)), out.logit_abs[n].add(sum_abs / double(length));
    }
}
