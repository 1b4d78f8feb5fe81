// Tests core/comm.h, with whichever backend is linked: alone, and under mpirun -np 1..4. All expected values are
// exact: integers, or floating-point sums formed here in rank order.
#include "../core/comm.h"
#include "comm_values.h"
#include "fails.h"
#include "world.h"
#include <csignal>

#define ALL_TYPES float, bf16, double, int32_t, int64_t, uint8_t

TEST_CASE("the world") {
    Comm w = world();
    CHECK(w.rank >= 0);
    CHECK(w.rank < w.size);
    CHECK(w.size == comm_launched_ranks());
    CHECK(world_rank() == w.rank);
    comm_barrier(w);
    if (w.rank == 0) MESSAGE("backend ", std::string(comm_backend()), ", ranks ", w.size);
}

TEST_CASE_TEMPLATE("broadcast from every root", E, ALL_TYPES) {
    Comm w = world();
    for (size_t n : counts)
        for (int root = 0; root < w.size; root++) {
            Buffer<E> data(n);
            if (w.rank == root) fill(data, root);
            comm_broadcast(Cpu(), w, data.data(), n, root);
            size_t wrong = 0;
            for (size_t i = 0; i < n; i++) wrong += !same(data[i], value<E>(root, i));
            CHECK(wrong == 0);
        }
}

TEST_CASE_TEMPLATE("sum in rank order, the same bits everywhere", E, ALL_TYPES) {
    Comm w = world();
    for (size_t n : counts) {
        Buffer<E> data(n);
        fill(data, w.rank);
        comm_sum(Cpu(), w, data.data(), n);
        size_t wrong = 0;
        for (size_t i = 0; i < n; i++) wrong += !same(data[i], sum_over_ranks<E>(w.size, i));
        CHECK(wrong == 0);
    }
}

TEST_CASE("the float inputs do tell one order of summation from another") {
    int differ = 0;
    for (size_t i = 0; i < 4099; i++) {
        float forward = 0, backward = 0;
        for (int r = 0; r < 4; r++) forward += value<float>(r, i), backward += value<float>(3 - r, i);
        differ += forward != backward;
    }
    CHECK(differ > 500);
}

TEST_CASE_TEMPLATE("gather", E, ALL_TYPES) {
    Comm w = world();
    for (size_t n : counts)
        for (bool in_place : {false, true}) {
            Buffer<E> all(n * w.size), mine(n);
            fill(mine, w.rank);
            E* from = in_place ? all.data() + n * w.rank : mine.data();
            if (in_place && n > 0) memcpy((void*)from, mine.data(), n * sizeof(E));
            comm_gather(Cpu(), w, all.data(), (const E*)from, n);
            size_t wrong = 0;
            for (int r = 0; r < w.size; r++)
                for (size_t i = 0; i < n; i++) wrong += !same(all[r * n + i], value<E>(r, i));
            CHECK(wrong == 0);
        }
}

TEST_CASE_TEMPLATE("reduce-scatter, then all-gather, of ragged slices", E, ALL_TYPES) {
    Comm w = world();
    for (size_t n : counts)
        for (uint64_t seed = 0; seed < 8; seed++) {
            std::vector<size_t> begin = ragged(seed, w.size, n);
            Buffer<E> data(n);
            fill(data, w.rank);
            comm_reduce_scatter(Cpu(), w, data.data(), begin.data());
            size_t wrong = 0;
            for (size_t i = begin[w.rank]; i < begin[w.rank + 1]; i++)
                wrong += !same(data[i], sum_over_ranks<E>(w.size, i));
            CHECK(wrong == 0);

            fill(data, -1); // what the others must overwrite
            for (size_t i = begin[w.rank]; i < begin[w.rank + 1]; i++) data[i] = value<E>(w.rank, i);
            comm_all_gather(Cpu(), w, data.data(), begin.data());
            wrong = 0;
            for (int r = 0; r < w.size; r++)
                for (size_t i = begin[r]; i < begin[r + 1]; i++) wrong += !same(data[i], value<E>(r, i));
            CHECK(wrong == 0);
        }
}

// As a backward does it: two buffers in turn, a sum under way in one while the other is filled and other things are
// exchanged, waited for when its buffer is needed again.
TEST_CASE_TEMPLATE("sums of slices, several under way", E, float, bf16, double) {
    Comm w = world();
    const size_t n = 4099;
    Buffer<E> buffer[2] = {Buffer<E>(n), Buffer<E>(n)}, other(n);
    std::vector<size_t> begin[2];
    Shift sum[2];
    size_t wrong = 0;
    for (uint64_t round = 0; round < 8; round++) {
        const int b = round % 2;
        shift_wait(Cpu(), sum[b]); // the first ones: nothing is under way
        if (round > 1)
            for (size_t i = begin[b][w.rank]; i < begin[b][w.rank + 1]; i++)
                wrong += !same(buffer[b][i], sum_over_ranks<E>(w.size, i));
        fill(buffer[b], w.rank);
        begin[b] = ragged(round, w.size, n);
        sum[b] = comm_reduce_scatter_start(Cpu(), w, buffer[b].data(), begin[b].data());
        fill(other, w.rank);
        comm_sum(Cpu(), w, other.data(), n);
        for (size_t i = 0; i < n; i++) wrong += !same(other[i], sum_over_ranks<E>(w.size, i));
    }
    for (Shift& s : sum) shift_wait(Cpu(), s);
    CHECK(wrong == 0);
}

// More than one message (16 MiB) and more than one round of the reduce-scatter (4M elements over the ranks).
TEST_CASE("long data") {
    Comm w = world();
    const size_t n = 4'500'017;
    Buffer<double> data(n);
    auto reset = [&] {
        for (size_t i = 0; i < n; i++) data[i] = double((w.rank + 1) * (i % 1009));
    };
    auto count_wrong = [&](double factor) {
        size_t wrong = 0;
        for (size_t i = 0; i < n; i++) wrong += data[i] != factor * double(i % 1009);
        return wrong;
    };
    reset();
    comm_sum(Cpu(), w, data.data(), n);
    CHECK(count_wrong(w.size * (w.size + 1) / 2) == 0);
    reset();
    comm_broadcast(Cpu(), w, data.data(), n, w.size - 1);
    CHECK(count_wrong(w.size) == 0);
    reset();
    std::vector<size_t> last_has_all(w.size + 1, 0);
    last_has_all[w.size] = n;
    comm_reduce_scatter(Cpu(), w, data.data(), last_has_all.data());
    if (w.rank == w.size - 1) CHECK(count_wrong(w.size * (w.size + 1) / 2) == 0);
    if (w.size == 1) return;
    reset();
    Buffer<double> sent(n);
    memcpy(sent.data(), data.data(), n * sizeof(double));
    int next = (w.rank + 1) % w.size, before = (w.rank + w.size - 1) % w.size;
    Shift shift = shift_start(Cpu(), w, (const double*)sent.data(), n, next, data.data(), n, before);
    shift_wait(Cpu(), shift);
    CHECK(count_wrong(before + 1) == 0);
}

TEST_CASE("split") {
    Comm w = world();
    // Even and odd ranks, in reverse order.
    Comm half = comm_split(w, w.rank % 2, -w.rank);
    int members = (w.size + 1 - w.rank % 2) / 2;
    CHECK(half.size == members);
    CHECK(half.rank == members - 1 - w.rank / 2);
    std::vector<int32_t> all(half.size);
    int32_t mine = w.rank;
    comm_gather(Cpu(), half, all.data(), (const int32_t*)&mine, 1);
    for (int r = 0; r < half.size; r++) CHECK(all[r] == w.rank % 2 + 2 * (members - 1 - r));
    // Each alone, and a copy of the world: groups are independent of each other.
    Comm alone = comm_split(half, half.rank, 0), copy = comm_split(w, 0, w.rank);
    CHECK(alone.size == 1);
    CHECK(copy.size == w.size);
    CHECK(copy.rank == w.rank);
    int64_t one = 1;
    comm_sum(Cpu(), alone, &one, 1);
    CHECK(one == 1);
    comm_sum(Cpu(), copy, &one, 1);
    CHECK(one == w.size);
    // This test runs on one host.
    Comm host = comm_host(w);
    CHECK(host.size == w.size);
    CHECK(host.rank == w.rank);
    w.timeout = 12;
    CHECK(comm_split(w, 0, 0).timeout == 12);
}

TEST_CASE("shift by every distance, with every count") {
    Comm w = world();
    for (int distance = 1; distance < w.size; distance++)
        for (size_t n : counts) {
            int to = (w.rank + distance) % w.size, from = (w.rank + w.size - distance) % w.size;
            // Ranks send different amounts: n + rank, but rank 0 sends nothing.
            auto amount = [&](int rank) { return rank == 0 ? 0 : n + rank; };
            Buffer<float> out(amount(w.rank)), in(amount(from));
            fill(out, w.rank);
            Shift shift = shift_start(Cpu(), w, (const float*)out.data(), out.count, to, in.data(), in.count, from);
            shift_wait(Cpu(), shift);
            shift_wait(Cpu(), shift); // does nothing
            size_t wrong = 0;
            for (size_t i = 0; i < in.count; i++) wrong += !same(in[i], value<float>(from, i));
            CHECK(wrong == 0);
        }
}

TEST_CASE("several shifts under way, with collectives in between") {
    Comm w = world();
    if (w.size == 1) return;
    const int rounds = 5;
    int to = (w.rank + 1) % w.size, from = (w.rank + w.size - 1) % w.size;
    std::vector<int64_t> out(rounds), in(rounds, -1);
    std::vector<Shift> shifts;
    int64_t ranks = 0;
    for (int i = 0; i < rounds; i++) {
        out[i] = 100 * w.rank + i;
        shifts.push_back(shift_start(Cpu(), w, (const int64_t*)&out[i], 1, to, &in[i], 1, from));
        ranks = 1;
        comm_sum(Cpu(), w, &ranks, 1);
        CHECK(ranks == w.size);
    }
    for (int i = rounds - 1; i >= 0; i--) shift_wait(Cpu(), shifts[i]);
    for (int i = 0; i < rounds; i++) CHECK(in[i] == 100 * from + i);
}

TEST_CASE("nothing to shift needs no other rank") {
    Shift shift = shift_start(Cpu(), world(), (const float*)nullptr, 0, 0, (float*)nullptr, 0, 0);
    CHECK(shift.backend == nullptr);
    shift_wait(Cpu(), shift);
}

TEST_CASE("who is waited for") {
    CHECK(waiting_for({}) == "");
    CHECK(waiting_for({3}) == ", waiting for rank 3 of the world");
    CHECK(waiting_for({7, 1, 3}) == ", waiting for ranks 1, 3 and 7 of the world");
    CHECK(waiting_for({}, {1, 2, 3}) == ", waiting for rank 1, 2 or 3 of the world");
    CHECK(waiting_for({}, {2}) == ", waiting for rank 2 of the world");
    CHECK(waiting_for({1}, {1, 2}) == ", waiting for ranks 1 and 2 of the world");
    CHECK(waiting_for({1}, {1, 4, 5}) == ", waiting for rank 1 and for 4 or 5 of the world");
    std::set<int> many;
    for (int r = 0; r < 1000; r++) many.insert(r);
    CHECK(waiting_for(many).find(", 14, 15 and 984 others of the world") != std::string::npos);
}

// Twice as long as the timeout, and again, where signs of the first wait may have been left over.
TEST_CASE("a barrier waits for a rank that gives signs of life") {
    Comm w = world();
    if (w.size != 3) return; // once is enough: it takes its time
    comm_barrier(w);
    w.timeout = 2;
    for (int late = 0; late < 2; late++) {
        for (int i = 0; w.rank == late && i < 40; i++) usleep(100000), comm_alive(w);
        comm_barrier(w);
    }
    // Nor does it matter that the others took no sign for a while, more of them than MPI has places for.
    Comm often = w;
    often.timeout = 0.02;
    for (int i = 0; w.rank == 0 && i < 1000; i++) usleep(5000), comm_alive(often);
    if (w.rank > 0) usleep(1500000);
    comm_barrier(w);
}

TEST_CASE("broken promises end with a line") {
    Comm w = world();
    if (w.size > 1) return; // fails_with forks
    float x = 0;
    size_t backwards[] = {1, 0};
    auto check = [](const std::string& line, const char* part) {
        CHECK_MESSAGE(line.find(part) != std::string::npos, line);
    };
    check(fails_with([&] { shift_start(Cpu(), w, (const float*)&x, 1, 0, &x, 1, 0); }), "other rank");
    check(fails_with([&] { comm_broadcast(Cpu(), w, &x, 1, 1); }), "root");
    check(fails_with([&] { comm_reduce_scatter(Cpu(), w, &x, backwards); }), "backwards");
    check(fails_with([&] { comm_all_gather(Cpu(), w, &x, backwards); }), "backwards");
    check(fails_with([&] { comm_split(w, -1, 0); }), "color");
    std::string line = fails_with([&] { setenv("OMPI_COMM_WORLD_SIZE", "2", 1), comm_init(nullptr, nullptr); });
    check(line, "started as one of 2 ranks");
    CHECK(std::count(line.begin(), line.end(), '\n') == 1);
}

// What a rank meets when another one goes wrong. Run by the case below, on two ranks; rank 1 goes wrong.
static void meet(void (*wrong)(const Comm&), void (*right)(const Comm&)) {
    Comm w = world();
    if (w.size != 2) return;
    comm_barrier(w);
    w.timeout = 1;
    w.rank == 1 ? wrong(w) : right(w);
    comm_barrier(w);
}
static float many[1001];
static void broadcast(const Comm& w) { comm_broadcast(Cpu(), w, many, 1000, 0); }
static void sum(const Comm& w) { comm_sum(Cpu(), w, many, 1000); }
static void receive(const Comm& w) {
    Shift shift = shift_start(Cpu(), w, (const float*)nullptr, 0, 0, many, 1000, 1);
    shift_wait(Cpu(), shift);
}
static void send(const Comm& w, size_t count) {
    Shift shift = shift_start(Cpu(), w, (const float*)many, count, 0, (float*)nullptr, 0, 0);
    shift_wait(Cpu(), shift);
}
TEST_CASE("ends: killed" * doctest::skip()) {
    meet([](const Comm&) { raise(SIGKILL); }, broadcast);
}
TEST_CASE("ends: stopped" * doctest::skip()) {
    meet([](const Comm&) { raise(SIGSTOP); }, sum);
}
TEST_CASE("ends: absent" * doctest::skip()) {
    meet([](const Comm&) { sleep(30); }, receive);
}
TEST_CASE("ends: shorter" * doctest::skip()) {
    meet([](const Comm& w) { send(w, 999); }, receive);
}
TEST_CASE("ends: longer" * doctest::skip()) {
    meet([](const Comm& w) { send(w, 1001); }, receive);
}
TEST_CASE("ends: early" * doctest::skip()) {
    meet([](const Comm&) { fail("this rank gives up"); }, sum);
}
static void stop_after_barrier(const Comm& w) { comm_barrier(w), raise(SIGSTOP); } // by which a split begins
TEST_CASE("ends: barred" * doctest::skip()) {
    meet([](const Comm&) { raise(SIGSTOP); }, comm_barrier);
}
// Rank 1 gives signs of life and then none; those of rank 2, which are many, are not taken for it.
TEST_CASE("ends: silent" * doctest::skip()) {
    Comm w = world();
    if (w.size != 3) return;
    w.timeout = 2;
    for (int i = 0; w.rank > 0 && i < (w.rank == 1 ? 20 : 300); i++) usleep(100000), comm_alive(w);
    if (w.rank == 1) raise(SIGSTOP);
    comm_barrier(w);
}
TEST_CASE("ends: unsplit" * doctest::skip()) {
    meet(stop_after_barrier, [](const Comm& w) { comm_split(w, 0, 0); });
}
TEST_CASE("ends: unhosted" * doctest::skip()) {
    meet(stop_after_barrier, [](const Comm& w) { comm_host(w); });
}
TEST_CASE("ends: unfinished" * doctest::skip()) { meet(stop_after_barrier, comm_finalize); }
// In a group that counts backwards.
TEST_CASE("ends: renumbered" * doctest::skip()) {
    if (world().size != 2) return;
    Comm flipped = comm_split(world(), 0, -world().rank);
    flipped.timeout = 1;
    if (flipped.rank == 0) raise(SIGSTOP);
    comm_broadcast(Cpu(), flipped, many, 1000, 0);
}
// Before MPI is up, a rank has its number from the launcher.
TEST_CASE("ends: unstarted" * doctest::skip()) {
    if (comm_launched_ranks() != 2) return;
    if (world_rank() == 1) raise(SIGSTOP);
    comm_init(nullptr, nullptr, 1);
}

TEST_CASE("a rank that dies, hangs or disagrees ends all ranks in time") {
    if (world().size > 1 || std::string(comm_backend()) != "MPI" || system("command -v mpirun > /dev/null") != 0) {
        if (world().rank == 0) MESSAGE("skipped: this starts mpirun itself, from one process built with MPI");
        return;
    }
    check_ends("killed", "signal 9");
    check_ends("stopped", "rank 0: sum, waiting for rank 1 of the world: no progress for 1 s");
    check_ends("absent", "rank 0: shift from rank 1, waiting for rank 1 of the world: no progress for 1 s");
    check_ends("shorter", "rank 0: shift from rank 1: 3996 bytes came from rank 1 of the group, 4000 were expected");
    check_ends("longer", "MPI_ERR_TRUNCATE");
    check_ends("early", "rank 1: this rank gives up");
    check_ends("barred", "rank 0: barrier, waiting for rank 1 of the world: no progress for 1 s");
    check_ends("silent", "rank 0: barrier, waiting for rank 1 of the world: no progress for 2 s", 3, nullptr, 3);
    check_ends("renumbered", "rank 0: broadcast, waiting for rank 1 of the world: no progress for 1 s");
    check_ends("unstarted", "rank 0: start of MPI: no progress for 1 s");
    check_ends("unsplit", "rank 0: split: no progress for 1 s");
    check_ends("unhosted", "rank 0: split by host: no progress for 1 s");
    check_ends("unfinished", "rank 0: end of MPI: no progress for 1 s");
}
