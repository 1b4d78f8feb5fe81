// The whole model over MPI ranks: any split into rings and groups gives the loss and gradients of one rank.
// Run under mpirun with 1 to 4 ranks.
#define DOCTEST_CONFIG_IMPLEMENT
#include "model.h"
#include "rank_main.h"

static Comm world;

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
    const Bounds bounds = bounds_2x(exact.m, alone.m, loss, 2 * S);

    auto check = [&](const Layout& layout) {
        const int groups = world.size / layout.ring, group = world.rank / layout.ring;
        std::vector<Row> mine;
        for (size_t i = group; i < rows.size(); i += groups) mine.push_back(rows[i]);
        TestModel<bf16, G> spread(c, layout, world);
        double sum = spread.gradients(mine, mode, comm_split(world, group, world.rank), counted, 2);
        comm_sum(Cpu{}, world, &sum, 1);
        CHECK(std::fabs(sum - loss) <= bounds.loss);
        check_gradients(spread.m, exact.m, bounds);
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

// Visible pairs of a micro-batch, counted one by one: of each rank in each step of the ring, which brings the keys of
// one other rank, the anchor's in the first; of each rank in all.
struct Counted {
    std::vector<double> by_step, whole; // (n, n) step, rank; (n)
    double moved = 0, mean = 0, most = 0;
};
static Counted count_pairs(const std::vector<Row>& rows, Attention mode, int n, const RingExchange& exchange) {
    const size_t S = rows[0].token.size();
    REQUIRE(ring_padded_length(S, n) == S, "padding has pairs, too");
    Counted c{std::vector<double>(n * n), std::vector<double>(n)};
    std::vector<int> owner(rows.size() * S);
    for (int rank = 0; rank < n; rank++) {
        Comm ring;
        ring.rank = rank, ring.size = n;
        const RingPlan plan = batch_make(rows, mode, ring, attention_tiles_cpu, exchange).plan;
        const Tokens& local = plan.local;
        for (size_t row = 0; row < rows.size(); row++)
            for (int32_t i = local.row_begin[row]; i < local.row_begin[row + 1]; i++)
                owner[row * S + local.index[i]] = rank;
        c.moved = plan.moved;
    }
    for (size_t row = 0; row < rows.size(); row++)
        for (int32_t q = 0; q < int32_t(S); q++)
            for (int32_t k = 0; k <= q; k++) {
                if (!visible(q, rows[row].doc[q], k, rows[row].doc[k])) continue;
                const int a = owner[row * S + q], b = owner[row * S + k];
                const int step = is_anchor(k, rows[row].doc[k]) ? 0 : (a - b + n) % n;
                c.by_step[step * n + a]++, c.whole[a]++;
            }
    c.mean = std::accumulate(c.whole.begin(), c.whole.end(), 0.0) / n;
    c.most = *std::max_element(c.whole.begin(), c.whole.end());
    return c;
}

// Each micro-batch waits for its slowest rank; what is told is of the worst ring.
TEST_CASE("the slowest ranks of a step, over micro-batches and rings") {
    auto check = [](const Setup& s, int micro_batches) {
        const int n = s.layout.ring, groups = s.groups();
        const RingBackend backend = s.layout.exchange.backend;
        TestModel<double, double> t(s.config, s.layout, world);
        Loader loader;
        loader_open(loader, "", pack_options(s, true));
        const StepResult r = step_gradients(t.m, s, TrainState{}, loader);

        loader_seek(loader, {});
        std::vector<Row> rows(2 * groups * micro_batches);
        for (Row& row : rows) loader_next(loader, row);
        double all = 0, imbalance = 1, by_steps = 1, moved = 0;
        for (int g = 0; g < groups; g++) {
            double slowest = 0, mean = 0;
            for (int i = 0; i < micro_batches; i++) {
                const Counted c = count_pairs({rows[2 * i * groups + g], rows[(2 * i + 1) * groups + g]}, s.attention,
                                              n, s.layout.exchange);
                all += c.mean * n, mean += c.mean, moved = std::max(moved, c.moved);
                for (int step = 0; step < n && backend == RingBackend::ring; step++)
                    slowest += *std::max_element(&c.by_step[step * n], &c.by_step[step * n] + n);
                if (backend == RingBackend::allgather) slowest += c.most;
                if (backend == RingBackend::ulysses) slowest += c.mean; // each rank has its heads of everything
                else imbalance = std::max(imbalance, c.most / c.mean);
            }
            by_steps = std::max(by_steps, slowest / mean);
        }
        CHECK(r.pairs == doctest::Approx(all).epsilon(1e-12));
        CHECK(r.imbalance == doctest::Approx(imbalance).epsilon(1e-12));
        CHECK(r.step_imbalance == doctest::Approx(by_steps).epsilon(1e-12));
        CHECK(r.moved == moved);
    };
    for (Attention mode : all_modes)
        for (int n = 1; n <= world.size; n++) {
            if (world.size % n) continue;
            Setup s;
            s.config = small_config(), s.attention = mode, s.world = world;
            s.ring = comm_split(world, world.rank / n, world.rank);
            s.layout = small_layout(96, 2); // cut into chunks for 1 to 4 ranks without padding
            s.layout.ring = n, s.layout.world = world.size;
            s.o.total_batch = 96 * 2 * s.groups() * 3, s.o.generator_mean = 16;
            for (RingBackend backend : exchanges(s.config, n)) {
                CAPTURE(int(mode));
                CAPTURE(n);
                CAPTURE(int(backend));
                s.layout.exchange.backend = backend;
                check(s, 3);
            }
        }
}

TEST_CASE("the shares of a step are those of the rank that lost the most") {
    const int most = world.size / 2;
    StepResult r;
    r.moving = 0.5 - 0.1 * world.rank, r.waiting = world.rank == most ? 1 : 0, r.optimizer = world.rank;
    shares_gather(world, r);
    CHECK(r.shares_of == most);
    CHECK(r.moving == 0.5 - 0.1 * most);
    CHECK(r.waiting == 1);
    CHECK(r.optimizer == most);
}

TEST_CASE("ranks that share GPUs take them in turn, each with its part of the memory") {
    auto places = [](bool shared, int ranks, int gpus) {
        std::string text;
        for (int rank = 0; rank < ranks; rank++) {
            const GpuPlace place = gpu_place(shared, rank, ranks, gpus);
            text += std::to_string(place.device) + "/" + std::to_string(place.ranks) + " ";
        }
        return text;
    };
    CHECK(places(false, 3, 2) == "0/1 1/1 2/1 "); // the third is refused by its number
    CHECK(places(true, 2, 4) == "0/1 1/1 ");
    CHECK(places(true, 4, 1) == "0/4 0/4 0/4 0/4 ");
    CHECK(places(true, 5, 2) == "0/3 1/2 0/3 1/2 0/3 ");
    CHECK(places(true, 2, 0) == "0/1 1/1 "); // refused: there is no GPU

    // What is free when each has its context: a rank that has one for itself is given it all.
    const double all = 140, free = all - 1; // GiB, of which another program has half a one
    CHECK(gpu_memory_share(free * (1 << 30), all * (1 << 30), 1) == (free + 0.65) * (1 << 30));
    CHECK(gpu_memory_share((free - 2) * (1 << 30), all * (1 << 30), 4) == (free - 2 + 4 * 0.65) / 4 * (1 << 30));
    CHECK(gpu_memory_share(all * (1 << 30), all * (1 << 30), 4) == all / 4 * (1 << 30)); // not more than there is
}

TEST_CASE("sharing GPUs is asked for by 1") {
    for (const char* value : {"0", ""}) {
        setenv("TRAIN_LLAMA_SHARE_GPUS", value, 1);
        CHECK(!gpus_are_shared());
    }
    setenv("TRAIN_LLAMA_SHARE_GPUS", "1", 1);
    CHECK(gpus_are_shared());
    unsetenv("TRAIN_LLAMA_SHARE_GPUS");
    CHECK(!gpus_are_shared());
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
    for (size_t p = 0; p < spread.m.parts.size(); p++) params_use(spread.m, p, p);
    CHECK(largest_error(alone.m.param_flat, spread.m.param_flat, alone.m.elements) < 1e-13);
}

int main(int argc, char** argv) {
    world = comm_init(&argc, &argv);
    return run_ranks(world, argc, argv);
}
