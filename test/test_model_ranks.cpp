// The whole model over MPI ranks: any split into rings and groups gives the loss and gradients of one rank.
// Run under mpirun with 1 to 4 ranks.
#define DOCTEST_CONFIG_IMPLEMENT
#include "model.h"
#include "rank_main.h"

static Comm world;
constexpr Attention all_modes[] = {Attention::full, Attention::intra, Attention::intra_reset, Attention::anchor};

// How rings of that many ranks can share attention.
static std::vector<RingBackend> exchanges(const Config& c, int ring) {
    std::vector<RingBackend> all = {RingBackend::ring};
    if (ring > 1) all.push_back(RingBackend::allgather);
    if (ring > 1 && c.K % ring == 0) all.push_back(RingBackend::ulysses);
    return all;
}

// Both sides are in double, sums of some 300 terms in another order: 1e-12 is far above that rounding and far
// below what a lost or doubled token would change (1e-3).
TEST_CASE("rings x groups against one rank") {
    const Config c = small_config(true, true);
    for (Attention mode : all_modes)
        for (size_t S : {29, 64})
            for (int ring_size = 1; ring_size <= world.size; ring_size++) {
                if (world.size % ring_size) continue;
                CAPTURE(int(mode));
                CAPTURE(ring_size);
                const int groups = world.size / ring_size;
                std::vector<Row> rows, mine;
                double counted = 0;
                for (int i = 0; i < 12; i++) {
                    rows.push_back(make_row(mode, S, c.V, 100 + i, mode == Attention::anchor && i % 2));
                    if (i % groups == world.rank / ring_size) mine.push_back(rows.back());
                    counted += double(rows.back().counted);
                }
                TestModel<double, double> alone(c, small_layout(S, 3));
                double loss = alone.gradients(rows, mode, Comm{}, counted, 3);

                Layout layout = small_layout(S, 3);
                layout.ring = ring_size, layout.world = world.size;
                Comm ring = comm_split(world, world.rank / ring_size, world.rank);
                for (RingBackend backend : exchanges(c, ring_size)) {
                    CAPTURE(int(backend));
                    layout.exchange.backend = backend;
                    TestModel<double, double> spread(c, layout, world);
                    double sum = spread.gradients(mine, mode, ring, counted, 3);
                    comm_sum(Cpu{}, world, &sum, 1);
                    model_norm(spread.m);
                    double norm = std::sqrt(spread.m.update->norm_squared), squared = 0;
                    for (size_t i = 0; i < alone.m.elements; i++)
                        squared += alone.m.grad_flat[i] * alone.m.grad_flat[i];

                    CHECK(std::fabs(sum - loss) < 1e-12);
                    CHECK(std::fabs(norm - std::sqrt(squared)) < 1e-12 * norm);
                    for (const Part<double, double>& part : spread.m.parts)
                        CHECK(largest_error(part.grads_shard,
                                            alone.m.grad_flat + part.begin + spread.m.shard_begin(part),
                                            spread.m.shard_count(part)) < 1e-12);
                }
            }
}

// Three updates, each of a micro-batch or two; then the weights of the whole model, and the last norm.
template <class E, class G>
static std::vector<double> trained(const Config& c, int zero, size_t micro_batches, std::string* bits) {
    Layout layout = small_layout(29, 2);
    layout.ring = world.size == 4 ? 2 : world.size, layout.world = world.size, layout.zero = zero;
    layout.moments = std::is_same_v<E, double> ? Type::f64 : Type::f32;
    const int groups = layout.world / layout.ring;
    const Comm ring = comm_split(world, world.rank / layout.ring, world.rank);
    TestModel<E, G> t(c, layout, world);
    for (int step = 1; step <= 3; step++) {
        std::vector<Row> mine;
        for (size_t i = 0; i < 2 * micro_batches; i++)
            mine.push_back(
                make_row(Attention::anchor, layout.S, c.V, 10 * step + i * groups + world.rank / layout.ring, i % 2));
        t.gradients(mine, Attention::anchor, ring, 100, 2);
        model_norm(t.m);
        t.m.update->adamw = {step, 0.5, 0};
        model_update(t.m, AdamW{0.01, 0.9, 0.95, 1e-8, 0.1, 1});
    }
    std::vector<double> values;
    for (size_t p = 0; p < t.m.parts.size(); p++) {
        const Part<E, G>& part = t.m.parts[p];
        params_use(t.m, p, p);
        bits->append((const char*)part.params, (part.end - part.begin) * sizeof(E));
        for (size_t i = 0; i < part.end - part.begin; i++) values.push_back(double(part.params[i]));
    }
    values.push_back(t.m.update->norm_squared);
    bits->append((const char*)&t.m.update->norm_squared, sizeof(double));
    return values;
}

// With one micro-batch every level adds the same numbers in the same order. With two, ZeRO-1 sums the micro-batches
// first and the others the ranks: in double that moves a gradient g by some 1e-16, and a weight, by a step of 0.01 x
// g / (|g| + 1e-8), by 1e-10 where g is as small as 1e-8. Another sum would move it by 0.01.
TEST_CASE("ZeRO 1, 2 and 3 train alike") {
    for (bool tied : {false, true})
        for (size_t micro_batches : {1, 2}) {
            CAPTURE(tied);
            CAPTURE(micro_batches);
            const Config c = small_config(tied, true);
            std::string bits[3], half[3];
            std::vector<double> values[3];
            for (int zero : {1, 2, 3}) {
                values[zero - 1] = trained<double, double>(c, zero, micro_batches, &bits[zero - 1]);
                trained<bf16, float>(c, zero, micro_batches, &half[zero - 1]);
            }
            for (int zero : {2, 3}) {
                CAPTURE(zero);
                CHECK(largest_error(values[zero - 1].data(), values[0].data(), values[0].size()) < 1e-9);
                if (micro_batches == 1) CHECK(bits[zero - 1] == bits[0]);
                if (micro_batches == 1) CHECK(half[zero - 1] == half[0]);
            }
            CHECK(bits[2] == bits[1]); // to gather weights changes nothing
            CHECK(half[2] == half[1]);
        }
}

// Stored in bf16, with several micro-batches: loss and gradients of all ranks against those of one rank in double, by
// the rule for kernels; the yardstick is one rank in bf16 that works on the same rows in micro-batches of two. The
// smallest tensor has 64 elements: the largest error of a few would be a matter of luck.
template <class G> static void check_levels_2x(bool tied, Attention mode) {
    CAPTURE(int(mode));
    Config c = make_config(2, 64, 8, 4, 96, 67, 100, 64);
    c.tied = tied, c.qkv_bias = true;
    const size_t S = 29;
    std::vector<Row> rows;
    for (int i = 0; i < 12; i++) rows.push_back(make_row(mode, S, c.V, 200 + i, mode == Attention::anchor && i % 2));
    double counted = 0;
    for (const Row& row : rows) counted += double(row.counted);
    TestModel<double, double> exact(c, small_layout(S, 2));
    TestModel<bf16, G> alone(c, small_layout(S, 2));
    for (size_t i = 0; i < exact.m.elements; i++) exact.m.param_flat[i] = double(alone.m.param_flat[i]);
    const double loss = exact.gradients(rows, mode, Comm{}, counted, 2);
    alone.gradients(rows, mode, Comm{}, counted, 2);
    // A mean of losses is no further off than the furthest of them, which the last micro-batch stands for.
    const double loss_error = largest_error(alone.m.loss, exact.m.loss, 2 * S);

    auto check = [&](const Layout& layout) {
        const int groups = world.size / layout.ring, group = world.rank / layout.ring;
        std::vector<Row> mine;
        for (size_t i = group; i < rows.size(); i += groups) mine.push_back(rows[i]);
        TestModel<bf16, G> spread(c, layout, world);
        double sum = spread.gradients(mine, mode, comm_split(world, group, world.rank), counted, 2);
        comm_sum(Cpu{}, world, &sum, 1);
        CHECK(std::fabs(sum - loss) <= 2 * loss_error + 2 * ulp<float>(loss));
        for (const ParamInfo& p : param_table(c)) {
            CAPTURE(std::string(p.name) + " " + std::to_string(p.layer));
            const Part<bf16, G>& part = spread.m.parts[part_of(p, c)];
            const size_t begin = part.begin + spread.m.shard_begin(part), end = begin + spread.m.shard_count(part);
            const size_t first = std::max(begin, p.offset), last = std::min(end, p.offset + p.count());
            double largest = 0;
            for (size_t i = 0; i < p.count(); i++)
                largest = std::max(largest, std::fabs(exact.m.grad_flat[p.offset + i]));
            const double yardstick =
                largest_error(alone.m.grad_flat + p.offset, exact.m.grad_flat + p.offset, p.count());
            if (first < last)
                CHECK(largest_error(part.grads_shard + (first - begin), exact.m.grad_flat + first, last - first) <=
                      2 * yardstick + 2 * ulp<G>(largest));
        }
    };
    for (int zero : {1, 2, 3})
        for (int ring_size = 1; ring_size <= world.size; ring_size++) {
            if (world.size % ring_size) continue;
            for (RingBackend backend : exchanges(c, ring_size)) {
                CAPTURE(zero);
                CAPTURE(ring_size);
                CAPTURE(int(backend));
                Layout layout = small_layout(S, 2);
                layout.ring = ring_size, layout.world = world.size, layout.zero = zero;
                layout.exchange.backend = backend;
                check(layout);
            }
        }
}
TEST_CASE("loss and gradients of every level of ZeRO, mode and exchange by the rule for kernels") {
    for (bool tied : {false, true}) {
        CAPTURE(tied);
        check_levels_2x<bf16>(tied, Attention::anchor);
        check_levels_2x<float>(tied, Attention::anchor);
    }
    check_levels_2x<float>(false, Attention::full);
    check_levels_2x<bf16>(true, Attention::intra);
    check_levels_2x<float>(true, Attention::intra_reset);
}

TEST_CASE("ZeRO takes from every rank what it says it does not keep") {
    const Config c = make_config(8, 64, 4, 2, 96, 300, 10000, 64);
    auto part = [&](int zero, const std::string& name) {
        Model<Cpu, float, float> m;
        m.config = c, m.layout = small_layout(64, 1);
        m.layout.world = m.layout.ring = 4, m.layout.zero = zero;
        Arena arena;
        model_place(m, arena);
        for (const Arena::Part& p : arena.parts)
            if (p.name == name) return double(p.bytes);
        return 0.0;
    };
    const double all = 4 * double(param_elements(c)), embed = 4 * 300 * 64;
    const double layer = 4 * double(param_elements(c) - 2 * 300 * 64 - 64) / 8;
    const double cut = 10 * 4 * param_alignment / (all / 4); // ten parts are cut at multiples of param_alignment
    for (int zero : {1, 2, 3}) {
        CHECK(part(zero, "weights") == (zero < 3 ? doctest::Approx(all) : doctest::Approx(all / 4).epsilon(cut)));
        CHECK(part(zero, "gradients") == (zero < 2 ? doctest::Approx(all) : doctest::Approx(all / 4).epsilon(cut)));
        CHECK(part(zero, "moments") == doctest::Approx(all / 2).epsilon(cut));
        // Part 0 is the larger one of the even buffer, the odd one's is part 9, the head with the last norm.
        const double in_use = std::max(embed, layer) + std::max(embed + 4 * 64, layer);
        CHECK(part(zero, "weights in use") == doctest::Approx(zero < 3 ? 0 : in_use));
        CHECK(part(zero, "gradients in use") == doctest::Approx(zero < 2 ? 0 : in_use));
    }
}

TEST_CASE("after an update every rank holds the weights that one rank would hold") {
    const Config c = small_config();
    Layout layout = small_layout(16, 1);
    layout.moments = Type::f64;
    TestModel<double, double> alone(c, layout);
    layout.world = layout.ring = world.size;
    TestModel<double, double> spread(c, layout, world);
    TestModel<double, double>* both[] = {&alone, &spread};
    for (int k = 0; k < 2; k++) {
        Model<Cpu, double, double>& m = both[k]->m;
        for (int step = 1; step <= 3; step++) {
            for (size_t i = 0; i < m.elements; i++) m.grad_flat[i] = hash_normal(step, i) / (k ? world.size : 1);
            for (size_t p = m.parts.size(); p-- > 0;) grads_end(m, p, true);
            grads_finish(m);
            model_norm(m);
            m.update->adamw = {step, 1.0, 0};
            model_update(m, AdamW{0.01, 0.9, 0.95, 1e-8, 0.1, 1});
        }
    }
    CHECK(largest_error(alone.m.param_flat, spread.m.param_flat, alone.m.elements) < 1e-13);
}

int main(int argc, char** argv) {
    world = comm_init(&argc, &argv);
    return run_ranks(world, argc, argv);
}
