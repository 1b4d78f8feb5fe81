// The whole model on GPUs, alone and under mpirun -np 2..4: loss and all gradients against double on one rank of the
// CPU by the 2x rule, however many ranks there are: in every mode, by every exchange and by both ways that data take,
// at every level of ZeRO; and the forward after an update. Ranks may share a GPU; NCCL is left out then.
#define DOCTEST_CONFIG_IMPLEMENT
#include "gpu_ranks.h"
#include "model.h"

namespace {
constexpr size_t peer_bytes = size_t(128) << 20;

// The groups of a model for one of the ways, and how its ranks share attention: a ring of all of them, or smaller ones
// side by side.
struct Groups {
    const char* way;
    Comm world, background;
    std::vector<Comm> ring; // (world + 1) by their number of ranks
};
std::vector<Groups> groups;

struct Shared {
    int ring;
    RingBackend backend;
};
std::vector<Shared> all_shared(const Config& c) {
    std::vector<Shared> all;
    for (int ring = 1; ring <= world.size; ring++)
        for (RingBackend backend : exchanges(c, ring))
            if (world.size % ring == 0) all.push_back({ring, backend});
    return all;
}

// Head sizes with special kernels of attention, and rows enough for two micro-batches or more in a ring of all ranks.
struct Case {
    Attention mode;
    int D;
    Config c;
    size_t S = 203; // no multiple of a tile, and padded for 3 and 4 ranks
    std::vector<Row> rows;
    double counted = 0;
    Case(Attention mode, int D) : mode(mode), D(D), c(make_config(2, 128, 8, 4, 200, 200, 10000, 512)) {
        c.D = D, c.tied = D == 128, c.qkv_bias = D == 64;
        for (int i = 0; i < 2 * std::max(2, world.size); i++) {
            const bool interleaved = mode == Attention::anchor && i % 2;
            rows.push_back(make_row(mode, S, c.V, 300 + 10 * i, interleaved, i % 4 < 2 ? 9 : 150));
            counted += double(rows.back().counted);
        }
    }
    Layout layout() const {
        Layout l = small_layout(S, 2);
        l.head_chunk = 100;
        return l;
    }
};

// On one rank of the CPU.
template <class E, class G> struct Alone : TestModel<E, G> {
    double loss;
    explicit Alone(const Case& x) : TestModel<E, G>(x.c, x.layout()) {
        this->set_weights(0.1, true);
        loss = this->gradients(x.rows, x.mode, Comm{}, x.counted, 2);
    }
};
// Each by one rank, side by side; then all have all.
struct AllBounds {
    Bounds half, mixed, single;
    AllBounds(const Case& x, const Alone<double, double>& exact) {
        find<bf16, bf16>(half, x, exact, 0), find<bf16, float>(mixed, x, exact, 1);
        find<float, float>(single, x, exact, 2);
        for (Bounds* b : {&half, &mixed, &single}) {
            comm_sum(Cpu{}, world, &b->loss, 1);
            comm_sum(Cpu{}, world, b->tensor.data(), b->tensor.size());
        }
    }
    template <class E, class G>
    static void find(Bounds& b, const Case& x, const Alone<double, double>& exact, int finder) {
        b = {0, std::vector<double>(param_table(x.c).size())};
        if (world.rank == finder % world.size)
            b = bounds_2x(exact.m, Alone<E, G>(x).m, exact.loss, 2 * x.S, score_rounding(x.S, size_t(x.D)));
    }
};

// An update, then two forwards. While the first goes on, other ranks' new weights come; behind it all have all.
template <class E, class G> void check_update(TestModel<E, G, Gpu>& spread, const std::vector<Row>& rows, const Case& x,
                                              const Groups& g, const Layout& layout, double loss_before) {
    Model<Gpu, E, G>& m = spread.m;
    Setup s;
    s.config = x.c, s.layout = layout, s.world = g.world, s.o.lr = 1e-2, s.o.steps = 10;
    TrainState state;
    StepResult r;
    r.counted = int64_t(x.counted);
    fill_zero(m.dev, &m.update->loss_sum, sizeof m.update->loss_sum);
    readback_open(m.dev, m.readback[1], sizeof *m.update);
    step_update(m, s, state, r);
    step_finish(m, r);
    CHECK(r.skipped.empty());
    const double loss = spread.gradients(rows, x.mode, g.ring[layout.ring], x.counted, 2);
    CHECK(loss != loss_before);
    CHECK(spread.gradients(rows, x.mode, g.ring[layout.ring], x.counted, 2) == loss);
    for (size_t p = 0; p < m.parts.size(); p++) {
        params_use(m, p, p);
        const std::vector<E> here = to_host(m.dev, m.parts[p].params, m.parts[p].end - m.parts[p].begin);
        std::vector<E> of_rank_0 = here;
        comm_broadcast(Cpu{}, world, (uint8_t*)of_rank_0.data(), of_rank_0.size() * sizeof(E), 0);
        CHECK(memcmp(here.data(), of_rank_0.data(), here.size() * sizeof(E)) == 0);
    }
}

template <class E, class G> void check(const Case& x, const Groups& g, const Layout& layout,
                                       const Alone<double, double>& exact, const Bounds& bounds) {
    TestModel<E, G, Gpu> spread(x.c, layout, g.world, the_gpu(), peer_memory);
    CHECK(spread.bytes <= peer_bytes);
    spread.m.background = g.background;
    spread.set_weights(0.1, true);
    std::vector<Row> mine;
    const size_t rings = size_t(layout.world / layout.ring), ring = size_t(world.rank / layout.ring);
    for (size_t i = ring; i < x.rows.size(); i += rings) mine.push_back(x.rows[i]);
    const double loss = spread.gradients(mine, x.mode, g.ring[layout.ring], x.counted, 2);
    double sum = loss;
    comm_sum(Cpu{}, world, &sum, 1);
    CHECK(std::fabs(sum - exact.loss) <= bounds.loss);
    check_gradients(spread.m, exact.m, bounds);
    if (x.mode == Attention::anchor) check_update(spread, mine, x, g, layout, loss);
    device_wait(the_gpu());
    comm_barrier(world); // the next model takes the same memory
}
} // namespace

// Over the six cases each way to share attention meets each pair of types with ZeRO-3 and with a lower level.
TEST_CASE("GPU model: loss and all gradients of ranks against double, in every mode") {
    int number = 0;
    for (const auto& [mode, D] : {std::pair(Attention::full, 64), std::pair(Attention::full, 128),
                                  std::pair(Attention::intra, 64), std::pair(Attention::intra_reset, 128),
                                  std::pair(Attention::anchor, 64), std::pair(Attention::anchor, 128)}) {
        CAPTURE(int(mode));
        CAPTURE(D);
        const Case x(mode, D);
        const Alone<double, double> exact(x);
        const AllBounds bounds(x, exact);
        int kind = number++;
        for (const Shared& shared : all_shared(x.c)) {
            Layout layout = x.layout();
            layout.world = world.size, layout.ring = shared.ring, layout.zero = kind % 2 ? 3 : 1 + number % 2;
            layout.exchange = {shared.backend, size_t(number % 2 ? 2 : 100)};
            for (const Groups& g : groups) {
                CAPTURE(g.way);
                CAPTURE(shared.ring);
                CAPTURE(int(shared.backend));
                CAPTURE(kind % 6);
                if (kind % 6 < 2) check<bf16, bf16>(x, g, layout, exact, bounds.half);
                else if (kind % 6 < 4) check<bf16, float>(x, g, layout, exact, bounds.mixed);
                else check<float, float>(x, g, layout, exact, bounds.single);
            }
            kind++;
        }
    }
}

int main(int argc, char** argv) {
    open_ranks(argc, argv, peer_bytes, [] { return world.size > 1; });
    for (const Way& way : ways) {
        Groups g{way.name, way.comm, comm_split(world, 0, world.rank), std::vector<Comm>(world.size + 1)};
        for (int size = 1; size <= world.size; size++)
            if (world.size % size == 0) g.ring[size] = comm_split(world, world.rank / size, world.rank);
        comm_open(the_gpu(), g.background, peer_memory, peer_bytes, way.transport);
        for (const Comm& ring : g.ring) comm_open(the_gpu(), ring, peer_memory, peer_bytes, way.transport);
        groups.push_back(g);
    }
    return run_ranks(world, argc, argv, [] { comm_close(the_gpu()); });
}
