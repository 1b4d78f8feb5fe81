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
    for (Attention mode : {Attention::full, Attention::intra, Attention::intra_reset, Attention::anchor})
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
                // every exchange in turn; the model has 2 KV heads
                layout.exchange.backend = S == 29          ? RingBackend::allgather
                                          : ring_size == 2 ? RingBackend::ulysses
                                                           : RingBackend::ring;
                TestModel<double, double> spread(c, layout, world);
                double sum = spread.gradients(mine, mode, ring, counted, 3);
                comm_sum(Cpu{}, world, &sum, 1);
                model_reduce(spread.m);
                double norm = std::sqrt(spread.m.update->norm_squared), squared = 0;
                for (size_t i = 0; i < alone.m.elements; i++) squared += alone.m.grad_flat[i] * alone.m.grad_flat[i];

                size_t begin = spread.m.shard_begin();
                CHECK(std::fabs(sum - loss) < 1e-12);
                CHECK(std::fabs(norm - std::sqrt(squared)) < 1e-12 * norm);
                CHECK(largest_error(spread.m.grad_flat + begin, alone.m.grad_flat + begin, spread.m.shard_count()) <
                      1e-12);
            }
}

TEST_CASE("after an update every rank holds the weights that one rank would hold") {
    const Config c = small_config();
    Layout layout = small_layout(16, 1);
    TestModel<double, double> alone(c, layout);
    layout.world = layout.ring = world.size;
    TestModel<double, double> spread(c, layout, world);
    alone.m.layout.moments = spread.m.layout.moments = Type::f64;
    TestModel<double, double>* both[] = {&alone, &spread};
    std::vector<double> moments(4 * alone.m.elements); // the layout asked for float moments
    for (int k = 0; k < 2; k++) {
        Model<Cpu, double, double>& m = both[k]->m;
        m.moment1 = moments.data() + 2 * k * alone.m.elements, m.moment2 = (double*)m.moment1 + alone.m.elements;
        for (int step = 1; step <= 3; step++) {
            for (size_t i = 0; i < m.elements; i++) m.grad_flat[i] = hash_normal(step, i) / (k ? world.size : 1);
            model_reduce(m);
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
