// The communicator for GPUs, alone and under mpirun -np 2..4: every function against exact values, as test_comm.cpp has
// them, by both ways that data take. Ranks may share a GPU; NCCL is left out then, which wants one for each.
#define DOCTEST_CONFIG_IMPLEMENT
#include "comm_values.h"
#include "gpu_ranks.h"
#include <csignal>

namespace {
constexpr size_t peer_bytes = size_t(400) << 20;

// Data in the shared memory, between guard words, at the same place on every rank: `most` elements have room, of which
// `count` are used here. Poisoned, or with values.
template <class E> struct Region {
    E* block;
    size_t count;
    Region(size_t offset, const Buffer<E>& from) : block((E*)(peer_memory + offset)), count(from.count) { set(from); }
    Region(size_t offset, size_t n) : Region(offset, Buffer<E>(n)) {}
    E* data() { return block + Buffer<E>::guard; }
    void set(const Buffer<E>& from) {
        CHECK(peer_memory + peer_bytes >= (uint8_t*)(block + from.store.size()));
        copy_to_device(the_gpu(), block, from.store.data(), from.store.size() * sizeof(E));
    }
    Buffer<E> host() { // fails the test when a guard word was touched
        Buffer<E> to(count);
        copy_to_host(the_gpu(), to.store.data(), block, to.store.size() * sizeof(E));
        return to;
    }
};
constexpr size_t half = peer_bytes / 2;

template <class E> Buffer<E> filled(size_t n, int rank) {
    Buffer<E> data(n);
    fill(data, rank);
    return data;
}
template <class E, class F> size_t count_wrong(const Buffer<E>& data, size_t first, size_t last, F expected) {
    size_t wrong = 0;
    for (size_t i = first; i < last; i++) wrong += !same(data[i], expected(i));
    return wrong;
}
} // namespace

#define ALL_TYPES float, bf16, double, int32_t, int64_t, uint8_t

TEST_CASE_TEMPLATE("GPU: broadcast from every root", E, ALL_TYPES) {
    for (const Way& way : ways)
        for (size_t n : counts)
            for (int root = 0; root < world.size; root++) {
                CAPTURE(way.name);
                Region<E> data(0, world.rank == root ? filled<E>(n, root) : Buffer<E>(n));
                comm_broadcast(the_gpu(), way.comm, data.data(), n, root);
                CHECK(count_wrong(data.host(), 0, n, [&](size_t i) { return value<E>(root, i); }) == 0);
            }
}

TEST_CASE_TEMPLATE("GPU: sum in rank order, the same bits everywhere", E, ALL_TYPES) {
    for (const Way& way : ways)
        for (size_t n : counts) {
            CAPTURE(way.name);
            Region<E> data(0, filled<E>(n, world.rank));
            comm_sum(the_gpu(), way.comm, data.data(), n);
            CHECK(count_wrong(data.host(), 0, n, [&](size_t i) { return sum_over_ranks<E>(world.size, i); }) == 0);
        }
}

TEST_CASE_TEMPLATE("GPU: reduce-scatter, then all-gather, of ragged slices", E, ALL_TYPES) {
    for (const Way& way : ways)
        for (size_t n : counts)
            for (uint64_t seed = 0; seed < 8; seed++) {
                CAPTURE(way.name);
                const std::vector<size_t> begin = ragged(seed, world.size, n);
                const size_t first = begin[world.rank], last = begin[world.rank + 1];
                Region<E> data(0, filled<E>(n, world.rank));
                comm_reduce_scatter(the_gpu(), way.comm, data.data(), begin.data());
                auto sum = [&](size_t i) { return sum_over_ranks<E>(world.size, i); };
                CHECK(count_wrong(data.host(), first, last, sum) == 0);

                Buffer<E> mine = filled<E>(n, -1); // what the others must overwrite
                for (size_t i = first; i < last; i++) mine[i] = value<E>(world.rank, i);
                data.set(mine);
                comm_all_gather(the_gpu(), way.comm, data.data(), begin.data());
                const Buffer<E> all = data.host();
                for (int r = 0; r < world.size; r++)
                    CHECK(count_wrong(all, begin[r], begin[r + 1], [&](size_t i) { return value<E>(r, i); }) == 0);
            }
}

// More than one round of the reduce-scatter and of the sum, whose scratch takes 48 and 32 MiB at once from all other
// ranks; and the kernel that takes packs. All sums are integers of at most 8 bits.
TEST_CASE_TEMPLATE("GPU: long data (large)", E, bf16, double) {
    const size_t n = (sizeof(E) == 2 ? 68'000'000 : 17'000'000) + 64;
    auto mine = [](int rank, size_t i) { return E(double((rank + 1) * (i % 23))); };
    const double factor = world.size * (world.size + 1) / 2;
    auto sum = [&](size_t i) { return E(factor * double(i % 23)); };
    std::vector<size_t> last_has_all(world.size + 1, 0), even(world.size + 1);
    last_has_all[world.size] = n;
    for (int r = 0; r <= world.size; r++) even[r] = n / 64 * r / world.size * 64;
    for (const Way& way : ways) {
        CAPTURE(way.name);
        Buffer<E> data(n);
        for (size_t i = 0; i < n; i++) data[i] = mine(world.rank, i);
        Region<E> region(0, data);
        comm_reduce_scatter(the_gpu(), way.comm, region.data(), last_has_all.data());
        if (world.rank == world.size - 1) CHECK(count_wrong(region.host(), 0, n, sum) == 0);
        region.set(data);
        comm_reduce_scatter(the_gpu(), way.comm, region.data(), even.data());
        comm_all_gather(the_gpu(), way.comm, region.data(), even.data());
        CHECK(count_wrong(region.host(), 0, n, sum) == 0);
        region.set(data);
        comm_sum(the_gpu(), way.comm, region.data(), n);
        CHECK(count_wrong(region.host(), 0, n, sum) == 0);
    }
}

TEST_CASE("GPU: shift by every distance, with every count") {
    for (const Way& way : ways)
        for (int distance = 1; distance < world.size; distance++)
            for (size_t n : counts) {
                CAPTURE(way.name);
                const int to = (world.rank + distance) % world.size;
                const int from = (world.rank + world.size - distance) % world.size;
                // Ranks send different amounts: n + rank, but rank 0 sends nothing.
                auto amount = [&](int rank) { return rank == 0 ? 0 : n + rank; };
                Region<float> out(0, filled<float>(amount(world.rank), world.rank)), in(half, amount(from));
                Shift shift = shift_start(the_gpu(), way.comm, (const float*)out.data(), out.count, to, in.data(),
                                          in.count, from);
                shift_wait(the_gpu(), shift);
                shift_wait(the_gpu(), shift); // does nothing
                CHECK(count_wrong(in.host(), 0, in.count, [&](size_t i) { return value<float>(from, i); }) == 0);
            }
}

TEST_CASE("GPU: several shifts under way, with collectives in between") {
    if (world.size == 1) return;
    constexpr int rounds = 5;
    const int to = (world.rank + 1) % world.size, from = (world.rank + world.size - 1) % world.size;
    for (const Way& way : ways) {
        CAPTURE(way.name);
        Buffer<int64_t> values(rounds);
        for (int i = 0; i < rounds; i++) values[i] = 100 * world.rank + i;
        Region<int64_t> out(0, values), in(half, size_t(rounds)), ranks(half / 2, size_t(rounds));
        Buffer<int64_t> ones(rounds);
        ones.fill(1);
        ranks.set(ones);
        std::vector<Shift> shifts;
        for (int i = 0; i < rounds; i++) {
            shifts.push_back(
                shift_start(the_gpu(), way.comm, (const int64_t*)out.data() + i, 1, to, in.data() + i, 1, from));
            comm_sum(the_gpu(), way.comm, ranks.data() + i, 1);
        }
        for (int i = rounds - 1; i >= 0; i--) shift_wait(the_gpu(), shifts[i]);
        CHECK(count_wrong(in.host(), 0, rounds, [&](size_t i) { return int64_t(100 * from + i); }) == 0);
        CHECK(count_wrong(ranks.host(), 0, rounds, [&](size_t) { return int64_t(world.size); }) == 0);
    }
}

namespace {
__device__ void be_late(int64_t clocks) {
    const int64_t begin = clock64();
    while (clock64() - begin < clocks) {}
}
// How many of so many elements are taken where threads stand in for the GPU (test/cuda_threads.h).
size_t fewer(size_t count) { return the_gpu().context->name == std::string("threads") ? count / 64 : count; }
// Up to half a millisecond, twice in three times none.
int64_t lateness(uint64_t what, size_t step) {
    const uint64_t h = hash64(1000 * what + world.rank, step);
    return h % 3 ? int64_t(0) : int64_t(h % 1000000);
}
// Values of round `round` from rank `rank`, written after `clocks`; and how many of them are not there.
__global__ void late_write(int32_t* to, size_t count, uint32_t rank, uint32_t round, int64_t clocks) {
    be_late(clocks);
    for (size_t i = blockIdx.x * blockDim.x + threadIdx.x; i < count; i += size_t(gridDim.x) * blockDim.x)
        to[i] = int32_t(rank * 1000003u + round * 7919u + uint32_t(i));
}
__global__ void late_check(unsigned long long* wrong, const int32_t* from, size_t count, uint32_t rank, uint32_t round,
                           int64_t clocks) {
    be_late(clocks);
    for (size_t i = blockIdx.x * blockDim.x + threadIdx.x; i < count; i += size_t(gridDim.x) * blockDim.x)
        if (uint32_t(from[i]) != rank * 1000003u + round * 7919u + uint32_t(i)) atomicAdd(wrong, 1ull);
}
} // namespace

// The ring's pattern, many times, without the host ever waiting: one buffer sent again and again, two received into in
// turn, another shift the opposite way under way meanwhile, and ranks that are late at random. Data sent too early,
// fetched too late or overwritten would be counted.
TEST_CASE("GPU: buffers are neither sent early nor overwritten late") {
    if (world.size == 1) return;
    constexpr size_t steps = 60;
    const Gpu gpu = the_gpu();
    const size_t count = fewer(size_t(1) << 20);
    auto* memory = (int32_t*)peer_memory;
    int32_t *send = memory, *back_send = memory + count, *receive[2] = {memory + 2 * count, memory + 3 * count};
    int32_t* back_receive = memory + 4 * count;
    auto* wrong = (unsigned long long*)(memory + 5 * count);
    for (const Way& way : ways) {
        CAPTURE(way.name);
        fill_zero(gpu, wrong, sizeof *wrong);
        auto distance = [&](size_t step) { return int(1 + step % size_t(world.size - 1)); };
        auto rank_at = [&](int d) { return (world.rank + d + 2 * world.size) % world.size; };
        auto amount = [&](size_t step, int rank) { return hash64(step, rank) % 4 == 0 ? 0 : count - step; };
        auto start = [&](size_t step) {
            const int to = rank_at(distance(step)), from = rank_at(-distance(step));
            late_write<<<64, 256, 0, gpu.stream>>>(send, count, world.rank, step, lateness(1, step));
            return shift_start(gpu, way.comm, (const int32_t*)send, amount(step, world.rank), to, receive[step % 2],
                               amount(step, from), from);
        };
        Shift keys = start(0), back;
        for (size_t step = 0; step < steps; step++) {
            const int to = rank_at(-distance(step)), from = rank_at(distance(step));
            shift_wait(gpu, keys);
            if (step + 1 < steps) keys = start(step + 1);
            late_check<<<64, 256, 0, gpu.stream>>>(wrong, receive[step % 2], amount(step, to), to, step,
                                                   lateness(2, step));
            shift_wait(gpu, back);
            if (step > 0) {
                const int was = rank_at(distance(step - 1));
                late_check<<<64, 256, 0, gpu.stream>>>(wrong, back_receive, count, was, 1000 + step - 1, 0);
            }
            late_write<<<64, 256, 0, gpu.stream>>>(back_send, count, world.rank, 1000 + step, lateness(3, step));
            back = shift_start(gpu, way.comm, (const int32_t*)back_send, count, to, back_receive, count, from);
        }
        shift_wait(gpu, back);
        unsigned long long found = 1;
        copy_to_host(gpu, &found, wrong, sizeof found);
        CHECK(found == 0);
    }
}

namespace {
// Of the sum over `size` ranks of what late_write gives, element first + i: how many are not there.
__global__ void late_check_sum(unsigned long long* wrong, const int32_t* from, size_t first, size_t count,
                               uint32_t size, uint32_t round, int64_t clocks) {
    be_late(clocks);
    const uint32_t ranks = size * (size - 1) / 2 * 1000003u;
    for (size_t i = blockIdx.x * blockDim.x + threadIdx.x; i < count; i += size_t(gridDim.x) * blockDim.x)
        if (uint32_t(from[i]) != ranks + size * (round * 7919u + uint32_t(first + i))) atomicAdd(wrong, 1ull);
}
} // namespace

// A backward's pattern, many times, without the host ever waiting: gradients in two buffers in turn, summed beside what
// follows; beside that a ring's shifts of another group, weights fetched in the sums' own group, and the anchor's small
// sums on the device's stream; ranks that are late at random. A sum is waited for when its buffer is needed again.
TEST_CASE("GPU: sums go on beside the ring and the weights") {
    if (world.size == 1) return;
    constexpr size_t steps = 40;
    const Gpu gpu = the_gpu();
    const size_t count = fewer(size_t(1) << 22);
    auto* memory = (int32_t*)peer_memory;
    int32_t* grads[2] = {memory, memory + count};
    int32_t *send = memory + 2 * count, *receive = memory + 3 * count, *weights = memory + 4 * count;
    int32_t* fetched[2] = {memory + 5 * count, memory + 6 * count};
    int32_t* small = memory + 7 * count;
    auto* wrong = (unsigned long long*)(memory + 8 * count);
    const int to = (world.rank + 1) % world.size, from = (world.rank + world.size - 1) % world.size;
    for (const Way& way : ways) {
        CAPTURE(way.name);
        const Comm ring = comm_split(world, 0, world.rank);
        comm_open(gpu, ring, peer_memory, peer_bytes, way.transport);
        fill_zero(gpu, wrong, sizeof *wrong);
        std::vector<size_t> begin[2];
        Shift sum[2];
        auto finish = [&](size_t step) { // of the sum that began in this step
            const std::vector<size_t>& slices = begin[step % 2];
            const size_t first = slices[world.rank], n = slices[world.rank + 1] - first;
            shift_wait(gpu, sum[step % 2]);
            late_check_sum<<<64, 256, 0, gpu.stream>>>(wrong, grads[step % 2] + first, first, n, world.size, step,
                                                       lateness(1, step));
        };
        auto fetch = [&](size_t step) {
            return shift_start(gpu, way.comm, (const int32_t*)weights, count, to, fetched[step % 2], count, from);
        };
        late_write<<<64, 256, 0, gpu.stream>>>(weights, count, world.rank, 5000, 0);
        Shift next = fetch(0);
        for (size_t step = 0; step < steps; step++) {
            shift_wait(gpu, next);
            late_check<<<64, 256, 0, gpu.stream>>>(wrong, fetched[step % 2], count, from, 5000, 0);
            if (step + 1 < steps) next = fetch(step + 1);
            if (step > 1) finish(step - 2);
            late_write<<<64, 256, 0, gpu.stream>>>(send, count, world.rank, 1000 + step, lateness(2, step));
            Shift keys = shift_start(gpu, ring, (const int32_t*)send, count, to, receive, count, from);
            late_write<<<64, 256, 0, gpu.stream>>>(grads[step % 2], count, world.rank, step, lateness(3, step));
            shift_wait(gpu, keys);
            late_check<<<64, 256, 0, gpu.stream>>>(wrong, receive, count, from, 1000 + step, 0);
            late_write<<<1, 256, 0, gpu.stream>>>(small, 1000, world.rank, 2000 + step, 0);
            comm_sum(gpu, ring, small, 1000);
            late_check_sum<<<1, 256, 0, gpu.stream>>>(wrong, small, 0, 1000, world.size, 2000 + step, 0);
            begin[step % 2] = ragged(step, world.size, count);
            sum[step % 2] = comm_reduce_scatter_start(gpu, way.comm, grads[step % 2], begin[step % 2].data());
        }
        finish(steps - 2), finish(steps - 1);
        unsigned long long found = 1;
        copy_to_host(gpu, &found, wrong, sizeof found);
        CHECK(found == 0);
    }
}

// Updates and the forwards behind them, without the host ever waiting: each rank changes its slice of every part, and a
// part is gathered beside the work on the one before it; ranks that are late at random.
TEST_CASE("GPU: weights are gathered a layer ahead") {
    if (world.size == 1) return;
    constexpr size_t steps = 12, parts = 4;
    const Gpu gpu = the_gpu();
    const size_t count = fewer(size_t(1) << 22);
    auto* memory = (int32_t*)peer_memory;
    auto* wrong = (unsigned long long*)(memory + parts * count);
    for (const Way& way : ways) {
        CAPTURE(way.name);
        fill_zero(gpu, wrong, sizeof *wrong);
        for (size_t step = 0; step < steps; step++) {
            std::vector<size_t> begin[parts];
            Shift gather[parts];
            auto slice = [&](size_t p, int r) { return memory + p * count + begin[p][r]; };
            auto length = [&](size_t p, int r) { return begin[p][r + 1] - begin[p][r]; };
            auto start = [&](size_t p) {
                gather[p] = comm_all_gather_start(gpu, way.comm, memory + p * count, begin[p].data());
            };
            for (size_t p = 0; p < parts; p++) {
                begin[p] = ragged(step * parts + p, world.size, count);
                late_write<<<64, 256, 0, gpu.stream>>>(slice(p, world.rank), length(p, world.rank), world.rank,
                                                       step * parts + p, lateness(p, step));
            }
            start(0);
            for (size_t p = 0; p < parts; p++) {
                shift_wait(gpu, gather[p]);
                if (p + 1 < parts) start(p + 1);
                for (int r = 0; r < world.size; r++)
                    late_check<<<64, 256, 0, gpu.stream>>>(wrong, slice(p, r), length(p, r), r, step * parts + p,
                                                           lateness(p, step + steps));
            }
        }
        unsigned long long found = 1;
        copy_to_host(gpu, &found, wrong, sizeof found);
        CHECK(found == 0);
    }
}

// Twice the same sum: waited for at once it is exposed, and behind work that takes longer it is not.
TEST_CASE("GPU: a sum that is hidden costs nothing") {
    if (world.size == 1) return;
    constexpr size_t count = size_t(1) << 24;
    const Gpu gpu = the_gpu();
    auto* data = (int32_t*)peer_memory;
    std::vector<size_t> begin(world.size + 1);
    for (int r = 0; r <= world.size; r++) begin[r] = count / world.size * r;
    for (const Way& way : ways) {
        CAPTURE(way.name);
        auto cost = [&](int64_t clocks) {
            device_wait(gpu);
            comm_barrier(world);
            const CommTimes before = comm_times(gpu, way.comm);
            Shift sum = comm_reduce_scatter_start(gpu, way.comm, data, begin.data());
            late_write<<<1, 1, 0, gpu.stream>>>(data + count, 1, 0, 0, clocks);
            shift_wait(gpu, sum);
            device_wait(gpu);
            const CommTimes after = comm_times(gpu, way.comm);
            return after.moving - before.moving + after.waiting - before.waiting;
        };
        cost(0);                                                         // NCCL connects the ranks
        const double exposed = cost(0), hidden = cost(int64_t(1) << 31); // a second or so
        CHECK(exposed > 0);
        CHECK(hidden < exposed / 2);
    }
}

TEST_CASE("GPU: what transfers cost is told") {
    for (const Way& way : ways) {
        CAPTURE(way.name);
        device_wait(the_gpu());
        const CommTimes before = comm_times(the_gpu(), way.comm);
        const size_t n = 1 << 24;
        std::vector<size_t> begin(world.size + 1);
        for (int r = 0; r <= world.size; r++) begin[r] = n / world.size * r;
        comm_barrier(world);
        comm_all_gather(the_gpu(), way.comm, (float*)peer_memory, begin.data());
        device_wait(the_gpu());
        const CommTimes after = comm_times(the_gpu(), way.comm);
        const double moving = after.moving - before.moving, waiting = after.waiting - before.waiting;
        if (world.size == 1) CHECK(moving + waiting == 0);
        else CHECK((moving > 0 && moving < 1 && waiting >= 0 && waiting < 1)); // 64 MiB, at 64 MB/s and more
    }
}

TEST_CASE("GPU: nothing to shift needs no other rank") {
    Shift shift = shift_start(the_gpu(), world, (const float*)nullptr, 0, 0, (float*)nullptr, 0, 0);
    CHECK(shift.backend == nullptr);
    shift_wait(the_gpu(), shift);
}

// What a rank meets when another one goes wrong; run by the case below, on two ranks, of which rank 1 goes wrong. Both
// are in a group that counts as the world does, or backwards.
namespace {
template <class Wrong>
void meet(Wrong wrong, void (*right)(const Comm&), Transport transport = Transport::automatic, bool backwards = false) {
    if (world.size != 2) return;
    Comm comm = comm_split(world, 0, backwards ? -world.rank : world.rank);
    comm.timeout = 1;
    comm_open(the_gpu(), comm, peer_memory, peer_bytes, transport);
    comm_sum(the_gpu(), comm, (float*)peer_memory, 1000);
    device_wait(the_gpu());
    comm_barrier(world);
    if (world.rank == 0) right(comm);
    else if constexpr (std::is_invocable_v<Wrong, const Comm&>) wrong(comm);
    else wrong();
    comm_barrier(world);
}
void sum_and_wait(const Comm& comm) {
    comm_sum(the_gpu(), comm, (float*)peer_memory, 1000);
    device_wait(the_gpu());
}
void receive_and_wait(const Comm& comm) {
    Shift shift = shift_start(the_gpu(), comm, (const float*)peer_memory, 0, 0, (float*)peer_memory, 1000, 1);
    shift_wait(the_gpu(), shift);
    device_wait(the_gpu());
}
void send_and_wait(const Comm& comm) {
    Shift shift = shift_start(the_gpu(), comm, (const float*)peer_memory, 1000, 1, (float*)nullptr, 0, 0);
    shift_wait(the_gpu(), shift);
    device_wait(the_gpu());
}
void exchange_and_wait(const Comm& comm) {
    Shift shift = shift_start(the_gpu(), comm, (const float*)peer_memory, 1000, 1, (float*)peer_memory + 1000, 1000, 1);
    shift_wait(the_gpu(), shift);
    device_wait(the_gpu());
}
void send_and_sleep(const Comm& comm) { // what it would receive in an exchange is not fetched
    shift_start(the_gpu(), comm, (const float*)peer_memory, 1000, 0, (float*)nullptr, 0, 0);
    sleep(30);
}
// A sum of several parts, of which the last ones are not announced before the first are summed.
void reduce_and_wait(const Comm& comm) {
    const size_t begin[] = {0, peer_bytes / 8, peer_bytes / 4};
    comm_reduce_scatter(the_gpu(), comm, (float*)peer_memory, begin);
    device_wait(the_gpu());
}
void stop() { raise(SIGSTOP); }
} // namespace
TEST_CASE("ends: killed" * doctest::skip()) {
    meet([] { raise(SIGKILL); }, sum_and_wait);
}
TEST_CASE("ends: stopped" * doctest::skip()) { meet(stop, sum_and_wait); }
TEST_CASE("ends: renumbered" * doctest::skip()) { meet(stop, sum_and_wait, Transport::automatic, true); }
TEST_CASE("ends: unsummed" * doctest::skip()) { meet(stop, reduce_and_wait); }
TEST_CASE("ends: unfetched" * doctest::skip()) { meet(send_and_sleep, exchange_and_wait, Transport::ipc); }
TEST_CASE("ends: stopped by NCCL" * doctest::skip()) { meet(stop, sum_and_wait, Transport::nccl); }
TEST_CASE("ends: unsummed by NCCL" * doctest::skip()) { meet(stop, reduce_and_wait, Transport::nccl, true); }
TEST_CASE("ends: absent" * doctest::skip()) {
    meet([] { sleep(30); }, receive_and_wait);
}
TEST_CASE("ends: deaf" * doctest::skip()) {
    meet([] { sleep(30); }, send_and_wait);
}

TEST_CASE("GPU: a rank that dies or hangs ends all ranks in time") {
    if (world.size > 1 || system("command -v mpirun > /dev/null") != 0) return; // this starts mpirun itself
    const double start = 20;                                                    // to start two processes with a GPU
    const char* late = "rank 0: sum, waiting for rank 1 of the world: no progress for 1 s";
    const char* late_sum = "rank 0: reduce-scatter, waiting for rank 1 of the world: no progress for 1 s";
    check_ends("killed", "signal 9", start, late); // on a busy host mpirun may be the later one to see it
    check_ends("stopped", late, start);
    check_ends("renumbered", late, start);
    check_ends("unsummed", late_sum, start);
    check_ends("absent", "rank 0: shift from rank 1, waiting for rank 1 of the world: no progress for 1 s", start);
    check_ends("deaf", "rank 0: shift to rank 1, waiting for rank 1 of the world: no progress for 1 s", start);
    check_ends("unfetched", "rank 0: shift to rank 1 from rank 1, waiting for rank 1 of the world: no progress for 1 s",
               start);
    int gpus = 0;
    CUDA_CHECK(cudaGetDeviceCount(&gpus));
    if (gpus < 2 || getenv("WITHOUT_NCCL")) return; // which wants one for each rank
    check_ends("stopped by NCCL", late, start);
    check_ends("unsummed by NCCL", late_sum, start);
}

int main(int argc, char** argv) {
    open_ranks(argc, argv, peer_bytes, [] { return !getenv("WITHOUT_NCCL"); });
    return run_ranks(world, argc, argv, [] { comm_close(the_gpu()); });
}
