// The communicator over MPI, for data in host memory. The one file that includes mpi.h.
//
// Every transfer is started without waiting and then polled, so that a rank whose peer died or hangs leaves in time.
// The few calls that block inside MPI (its start, its end, the making of groups) have a thread beside them that ends
// all ranks. All transfers are built of two pieces, messages between two ranks and broadcasts.
#include "comm.h"
#include "device.h"
#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <csignal>
#include <ctime>
#include <map>
#define OMPI_SKIP_MPICXX 1 // the C interface alone
#define MPICH_SKIP_MPICXX 1
#include <mpi.h>
#include <mutex>
#include <sched.h>
#include <string>
#include <thread>
#include <unistd.h>
#include <vector>

#define MPI_CHECK(call)                                                                              \
    do {                                                                                             \
        int mpi_status = (call);                                                                     \
        if (mpi_status != MPI_SUCCESS)                                                               \
            fail("%s:%d: %s: %s; see whether all hosts and ranks are up", __FILE__, __LINE__, #call, \
                 error_text(mpi_status).c_str());                                                    \
    } while (0)

static std::string error_text(int status) {
    char text[MPI_MAX_ERROR_STRING] = "";
    int length = 0;
    MPI_Error_string(status, text, &length);
    return text;
}

static bool mpi_is_up() {
    int begun = 0, ended = 0;
    MPI_Initialized(&begun);
    MPI_Finalized(&ended);
    return begun && !ended;
}

int world_rank() {
    int rank = 0;
    if (mpi_is_up()) return MPI_Comm_rank(MPI_COMM_WORLD, &rank), rank;
    for (const char* name : {"OMPI_COMM_WORLD_RANK", "PMI_RANK", "SLURM_PROCID"}) // before MPI: as the launcher says
        if (const char* value = getenv(name)) rank = atoi(value);
    return rank;
}

// MPI_Abort itself can hang when a host is gone; the alarm then kills this process, and the launcher the others.
void abort_all_ranks(int status) {
    int size = 1;
    if (mpi_is_up()) MPI_Comm_size(MPI_COMM_WORLD, &size);
    if (size > 1) {
        signal(SIGALRM, SIG_DFL);
        alarm(10);
        MPI_Abort(MPI_COMM_WORLD, status);
    }
    _exit(status);
}

const char* comm_backend() { return "MPI"; }

// A thread that ends all ranks when it lives longer than the timeout: it stands beside a call that blocks inside MPI.
// Where MPI is not up there is no MPI_Abort: this process then ends alone, badly, and the launcher ends the others.
// They end one after another: when several leave at once during their start, mpirun itself can crash or hang (Open MPI
// 4.1.4, in 5 of 32 trials; one after another in 1 of 32).
static std::jthread guard(const char* operation, double timeout) {
    return std::jthread([=](std::stop_token returned) {
        std::mutex mutex;
        std::condition_variable_any wake;
        std::unique_lock<std::mutex> lock(mutex);
        WaitClock clock;
        for (double waited = 0; !returned.stop_requested();) {
            wake.wait_for(lock, returned, std::chrono::milliseconds(100), [] { return false; });
            waited += clock.passed();
            if (waited < timeout || returned.stop_requested()) continue;
            usleep(200000 * std::min(world_rank(), 5));
            comm_give_up(operation, timeout);
        }
    });
}

// Comm::handle is MPI's own integer for a communicator, so no table of them is kept.
static MPI_Comm mpi_comm(const Comm& comm) { return MPI_Comm_f2c(MPI_Fint(comm.handle)); }
static Comm make_comm(MPI_Comm group, double timeout) {
    Comm comm;
    MPI_CHECK(MPI_Comm_set_errhandler(group, MPI_ERRORS_RETURN));
    MPI_CHECK(MPI_Comm_rank(group, &comm.rank));
    MPI_CHECK(MPI_Comm_size(group, &comm.size));
    comm.handle = int(MPI_Comm_c2f(group)), comm.timeout = timeout;
    return comm;
}

// Requests under way. Each message is at most message_bytes long, since MPI counts in int.
enum { data_tag, barrier_tag, alive_tag }; // a barrier may stand beside messages that are under way
struct Transfer {
    Comm comm;
    std::string operation; // for the message when it fails
    int tag = data_tag;
    std::vector<MPI_Request> requests = {};
    std::vector<int> expected = {}; // bytes of a receive, -1 for all else
    std::vector<int> peers = {};    // who must take part, -1 where that is not known

    MPI_Request* add(int peer, int bytes_expected) {
        peers.push_back(peer), expected.push_back(bytes_expected);
        return &requests.emplace_back(MPI_REQUEST_NULL);
    }
};
constexpr size_t message_bytes = size_t(1) << 24;

template <class F> static void for_each_message(size_t bytes, F f) {
    for (size_t at = 0; at < bytes; at += message_bytes) f(at, int(std::min(message_bytes, bytes - at)));
}
static void add_send(Transfer& t, const void* data, size_t bytes, int to) {
    for_each_message(bytes, [&](size_t at, int length) {
        MPI_CHECK(MPI_Isend((const char*)data + at, length, MPI_BYTE, to, t.tag, mpi_comm(t.comm), t.add(to, -1)));
    });
}
static void add_receive(Transfer& t, void* data, size_t bytes, int from) {
    for_each_message(bytes, [&](size_t at, int length) {
        MPI_CHECK(MPI_Irecv((char*)data + at, length, MPI_BYTE, from, t.tag, mpi_comm(t.comm), t.add(from, length)));
    });
}
// What a root sends goes from rank to rank in MPI's own way: the root does not learn who has not taken it.
static void add_broadcast(Transfer& t, void* data, size_t bytes, int root) {
    const int peer = root == t.comm.rank ? -1 : root;
    for_each_message(bytes, [&](size_t at, int length) {
        MPI_CHECK(MPI_Ibcast((char*)data + at, length, MPI_BYTE, root, mpi_comm(t.comm), t.add(peer, -1)));
    });
}

// The ranks whose part in these requests has not come, by their numbers in the world; a broadcast's may have come to
// the rank that passes it on.
static std::string missing(const Transfer& t, const std::vector<size_t>& requests) {
    MPI_Group group, world;
    MPI_CHECK(MPI_Comm_group(mpi_comm(t.comm), &group));
    MPI_CHECK(MPI_Comm_group(MPI_COMM_WORLD, &world));
    std::set<int> ranks;
    for (size_t i : requests) {
        if (t.peers[i] < 0) continue;
        int rank = 0;
        MPI_CHECK(MPI_Group_translate_ranks(group, 1, &t.peers[i], world, &rank));
        ranks.insert(rank);
    }
    return waiting_for(ranks);
}

// Takes the signs of life that have come and notes the time for their ranks.
static void hear(const Comm& comm, std::vector<double>& heard, double time) {
    for (;;) {
        int there = 0;
        MPI_Status sign;
        MPI_CHECK(MPI_Iprobe(MPI_ANY_SOURCE, alive_tag, mpi_comm(comm), &there, &sign));
        if (!there) return;
        heard[sign.MPI_SOURCE] = time;
        MPI_CHECK(MPI_Recv(nullptr, 0, MPI_BYTE, sign.MPI_SOURCE, alive_tag, mpi_comm(comm), MPI_STATUS_IGNORE));
    }
}

// A sign of life is an empty message. Nobody waits until it is taken; those of others are taken here, too, and with
// them MPI does what it has put off: it sends nothing by itself while no call asks for anything.
void comm_alive(const Comm& comm) {
    using clock = std::chrono::steady_clock;
    static std::map<int, clock::time_point> next; // by group
    if (comm.size == 1 || clock::now() < next[comm.handle]) return;
    next[comm.handle] = clock::now() + std::chrono::milliseconds(int(std::min(1000., comm.timeout * 250)));
    std::vector<double> of_no_use_here(comm.size);
    hear(comm, of_no_use_here, 0);
    for (int r = 0; r < comm.size; r++) {
        if (r == comm.rank) continue;
        MPI_Request sent;
        MPI_CHECK(MPI_Isend(nullptr, 0, MPI_BYTE, r, alive_tag, mpi_comm(comm), &sent));
        MPI_CHECK(MPI_Request_free(&sent));
    }
}

// Polls until all is done; any completion counts as progress, and in a barrier a sign of life, for its rank. After a
// short spin it sleeps between polls, so that ranks which wait leave their core to those which compute.
static void wait_all(Transfer& t) {
    std::vector<int> done(t.requests.size());
    std::vector<MPI_Status> status(t.requests.size());
    const bool hears = t.tag == barrier_tag && t.comm.size > 1;
    std::vector<double> heard(t.comm.size, 0); // seconds of this wait, as the next two
    WaitClock clock;
    double time = 0, progress = 0;
    auto late = [&](double since) { return time - since > t.comm.timeout; };
    for (int idle = 0;; idle++) {
        int count = 0;
        if (hears) hear(t.comm, heard, time);
        int result = MPI_Testsome(int(t.requests.size()), t.requests.data(), &count, done.data(), status.data());
        if (result == MPI_ERR_IN_STATUS) // one of them carries the reason
            for (int i = 0; i < count; i++) MPI_CHECK(status[i].MPI_ERROR);
        MPI_CHECK(result);
        if (count == MPI_UNDEFINED) return; // none is left
        for (int i = 0; i < count; i++) {
            int bytes = t.expected[done[i]];
            if (bytes >= 0) MPI_CHECK(MPI_Get_count(&status[i], MPI_BYTE, &bytes));
            if (bytes != t.expected[done[i]])
                fail("%s: %d bytes came from rank %d of the group, %d were expected: the ranks disagree on a size",
                     t.operation.c_str(), bytes, status[i].MPI_SOURCE, t.expected[done[i]]);
        }
        time += clock.passed();
        if (count > 0) progress = time, idle = 0;
        if (late(progress)) {
            std::vector<size_t> missed; // requests that nothing excuses
            for (size_t i = 0; i < t.requests.size(); i++)
                if (t.requests[i] != MPI_REQUEST_NULL && (!hears || late(heard[t.peers[i]]))) missed.push_back(i);
            if (!missed.empty()) comm_give_up(t.operation + missing(t, missed), t.comm.timeout);
        }
        constexpr timespec pause = {0, 50000};
        if (idle < 2000) sched_yield();
        else nanosleep(&pause, nullptr);
    }
}

// UCX, which MPI may load, takes SIGHUP for itself, even where nohup has it ignored: it stays as it was.
static void mpi_start(int* argc, char*** argv, double timeout) {
    const std::jthread guarded = guard("start of MPI", timeout);
    struct sigaction hangup;
    int threads = 0;
    cuda_queues();
    sigaction(SIGHUP, nullptr, &hangup);
    MPI_CHECK(MPI_Init_thread(argc, argv, MPI_THREAD_FUNNELED, &threads));
    sigaction(SIGHUP, &hangup, nullptr);
}

Comm comm_init(int* argc, char*** argv, double timeout) {
    if (!mpi_is_up()) mpi_start(argc, argv, timeout);
    Comm world = make_comm(MPI_COMM_WORLD, timeout);
    if (world.size < comm_launched_ranks())
        fail("started as one of %d ranks, but MPI sees %d: the launcher and this MPI do not know each other; use the "
             "mpirun of the MPI it was built with, or srun --mpi=pmix",
             comm_launched_ranks(), world.size);
    return world;
}

// The barrier finds missing ranks and names them; what follows it blocks, here and in the two below.
void comm_finalize(const Comm& world) {
    if (!mpi_is_up()) return;
    comm_barrier(world);
    const std::jthread guarded = guard("end of MPI", world.timeout);
    MPI_CHECK(MPI_Finalize());
}

Comm comm_split(const Comm& comm, int color, int key) {
    REQUIRE(color >= 0, "pass a color of at least 0");
    comm_barrier(comm);
    const std::jthread guarded = guard("split", comm.timeout);
    MPI_Comm group;
    MPI_CHECK(MPI_Comm_split(mpi_comm(comm), color, key, &group));
    return make_comm(group, comm.timeout);
}

Comm comm_host(const Comm& comm) {
    comm_barrier(comm);
    const std::jthread guarded = guard("split by host", comm.timeout);
    MPI_Comm group;
    MPI_CHECK(MPI_Comm_split_type(mpi_comm(comm), MPI_COMM_TYPE_SHARED, comm.rank, MPI_INFO_NULL, &group));
    return make_comm(group, comm.timeout);
}

// A byte from each rank to each, and not MPI's own barrier: so it is known who is missing.
void comm_barrier(const Comm& comm) {
    Transfer t{comm, "barrier", barrier_tag};
    const char mine = 0;
    std::vector<char> theirs(comm.size);
    for (int r = 0; r < comm.size; r++) {
        if (r == comm.rank) continue;
        add_receive(t, &theirs[r], 1, r);
        add_send(t, &mine, 1, r);
    }
    wait_all(t);
}

void comm_broadcast(Cpu, const Comm& comm, Type type, void* data, size_t count, int root) {
    REQUIRE(root >= 0 && root < comm.size, "the root must be a rank of the group");
    if (comm.size == 1) return; // Comm{} is no group of MPI's
    Transfer t{comm, "broadcast"};
    add_broadcast(t, data, count * type_size(type), root);
    wait_all(t);
}

// By messages: of broadcasts a rank that was lost behind its own one would be named by nobody.
void comm_all_gather(Cpu, const Comm& comm, Type type, void* data, const size_t* begin) {
    Transfer t{comm, "all-gather"};
    auto place = [&](int r) { return (char*)data + begin[r] * type_size(type); };
    auto bytes = [&](int r) { return (begin[r + 1] - begin[r]) * type_size(type); };
    for (int r = 0; r < comm.size; r++) {
        REQUIRE(begin[r] <= begin[r + 1], "slices must not run backwards");
        if (r == comm.rank) continue;
        add_receive(t, place(r), bytes(r), r);
        add_send(t, place(comm.rank), bytes(comm.rank), r);
    }
    wait_all(t);
}

void comm_gather(Cpu cpu, const Comm& comm, Type type, void* all, const void* mine, size_t count) {
    void* place = (char*)all + comm.rank * count * type_size(type);
    if (place != mine && count > 0) memmove(place, mine, count * type_size(type));
    std::vector<size_t> begin(comm.size + 1);
    for (int r = 0; r <= comm.size; r++) begin[r] = r * count;
    comm_all_gather(cpu, comm, type, all, begin.data());
}

// out[i] = source[0][i] + source[1][i] + ..., in that order. `out` may be one of the sources.
template <class E> static void sum_in_order(E* out, const std::vector<const E*>& source, size_t count) {
    using A = std::conditional_t<std::is_integral_v<E>, E, Acc<E>>;
    constexpr size_t block = 512; // partial sums stay in the first-level cache
#pragma omp parallel for schedule(static)
    for (size_t first = 0; first < count; first += block) {
        A sum[block];
        size_t n = std::min(block, count - first);
        for (size_t i = 0; i < n; i++) sum[i] = A(source[0][first + i]);
        for (size_t r = 1; r < source.size(); r++)
            for (size_t i = 0; i < n; i++) sum[i] = A(sum[i] + A(source[r][first + i]));
        for (size_t i = 0; i < n; i++) out[first + i] = E(sum[i]);
    }
}

// Each rank collects its own slice from all others, `part` elements at a time, and sums it.
template <class E> static void reduce_scatter(const Comm& comm, E* data, const size_t* begin, const char* operation) {
    constexpr size_t scratch_elements = size_t(1) << 22;
    const size_t part = std::max(scratch_elements / comm.size, size_t(1));
    auto length_at = [&](int rank, size_t at) { // how much of a rank's slice is handled in the round that begins here
        size_t length = begin[rank + 1] - begin[rank];
        return length > at ? std::min(part, length - at) : 0;
    };
    size_t longest = 0;
    for (int r = 0; r < comm.size; r++) {
        REQUIRE(begin[r] <= begin[r + 1], "slices must not run backwards");
        longest = std::max(longest, begin[r + 1] - begin[r]);
    }
    std::vector<E> received(comm.size * length_at(comm.rank, 0));
    for (size_t at = 0; at < longest; at += part) {
        const size_t mine = length_at(comm.rank, at);
        std::vector<const E*> source(comm.size);
        Transfer t{comm, operation};
        for (int r = 0; r < comm.size; r++) {
            E* slot = r == comm.rank ? data + begin[r] + at : received.data() + r * mine;
            source[r] = slot;
            if (r == comm.rank) continue;
            add_receive(t, slot, mine * sizeof(E), r);
            add_send(t, data + begin[r] + at, length_at(r, at) * sizeof(E), r);
        }
        wait_all(t);
        sum_in_order(data + begin[comm.rank] + at, source, mine);
    }
}

static void reduce_scatter(const Comm& comm, Type type, void* data, const size_t* begin, const char* operation) {
    with_type(type, [&]<class E>() { reduce_scatter(comm, (E*)data, begin, operation); });
}

void comm_reduce_scatter(Cpu, const Comm& comm, Type type, void* data, const size_t* begin) {
    reduce_scatter(comm, type, data, begin, "reduce-scatter");
}

// Every rank sums an equal share, then all shares go to everyone: each element moves twice, whatever the ranks.
void comm_sum(Cpu cpu, const Comm& comm, Type type, void* data, size_t count) {
    std::vector<size_t> begin(comm.size + 1);
    for (int r = 0; r <= comm.size; r++) begin[r] = count * r / comm.size;
    reduce_scatter(comm, type, data, begin.data(), "sum");
    comm_all_gather(cpu, comm, type, data, begin.data());
}

Shift shift_start(Cpu, const Comm& comm, Type type, const void* send, size_t send_count, int to, void* receive,
                  size_t receive_count, int from) {
    const std::string operation = shift_operation(comm, send_count, to, receive_count, from);
    if (send_count == 0 && receive_count == 0) return {comm, nullptr};
    auto* t = new Transfer{comm, operation};
    add_receive(*t, receive, receive_count * type_size(type), from);
    add_send(*t, send, send_count * type_size(type), to);
    return {comm, t};
}

void shift_wait(Cpu, Shift& shift) {
    auto* t = (Transfer*)shift.backend;
    if (!t) return;
    wait_all(*t);
    delete t;
    shift.backend = nullptr;
}
