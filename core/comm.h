// What ranks exchange: a handful of typed functions that count elements, never bytes. The backend is chosen at
// link time (core/comm_serial.cpp, core/comm_mpi.cpp; for GPUs core/comm_gpu.cu besides), so callers hold no #ifdef.
//
// The device comes first. Cpu: data in host memory; the functions return when they are done. Gpu: data in the memory of
// this rank's GPU, in order with its stream; only the stream waits, never the host. Call comm_open before.
//
// Every function but comm_alive, comm_times, shift_start and shift_wait is collective: all ranks of the group call it,
// in the same order, with the same sizes; ranks that are together in several groups, one order for all of these. A
// wait that sees no progress for `timeout` seconds ends all ranks and names the operation and, where it is known, the
// missing ranks. Sums are formed in rank order, ((x0 + x1) + x2) + ..., in Acc<E> and rounded once (integers: in
// themselves), so every rank gets the same bits in every run.
#pragma once
#include "types.h"
#include <algorithm>
#include <chrono>
#include <initializer_list>
#include <set>
#include <string>

// A group of ranks. A plain value: copies are the same group, and none needs to be freed.
struct Comm {
    int rank = 0, size = 1;
    int handle = 0;       // the backend's own
    double timeout = 300; // seconds; groups split from this one inherit it
};

// For a wait that has seen no progress for so long.
[[noreturn]] inline void comm_give_up(const std::string& operation, double timeout) {
    fail("%s: no progress for %g s: another rank has died, hangs or is late; see its output (--timeout sets the limit)",
         operation.c_str(), timeout);
}

// What follows the operation's name there: the ranks that are missing, and those of which one at least is, by their
// numbers in the world; nothing where neither is known.
inline std::string waiting_for(std::set<int> missing, std::set<int> among = {}) {
    auto list = [](const std::set<int>& ranks, const char* last) {
        std::string text;
        size_t left = ranks.size();
        for (int rank : ranks) {
            if (left > 1 && ranks.size() - left == 16) return text + last + std::to_string(left) + " others";
            text += (text.empty() ? "" : left == 1 ? last : ", ") + std::to_string(rank);
            left--;
        }
        return text;
    };
    for (int rank : missing) among.erase(rank);
    if (among.size() == 1) missing.merge(among);
    if (missing.empty() && among.empty()) return "";
    std::string text = missing.size() > 1 ? ", waiting for ranks " : ", waiting for rank ";
    text += list(missing, " and ") + (!missing.empty() && !among.empty() ? " and for " : "") + list(among, " or ");
    return text + " of the world";
}

// Seconds since the look before, 1 at most: a job that was stopped and continued has not waited.
struct WaitClock {
    std::chrono::steady_clock::time_point last = std::chrono::steady_clock::now();
    double passed() {
        const auto before = last;
        last = std::chrono::steady_clock::now();
        return std::min(std::chrono::duration<double>(last - before).count(), 1.0);
    }
};

// The world. Call first (again: the same world); its timeout holds for the start already. Fails when a launcher started
// more ranks than the backend sees.
Comm comm_init(int* argc, char*** argv, double timeout = Comm().timeout);
void comm_finalize(const Comm& world); // a second call does nothing
const char* comm_backend();            // "serial" or "MPI"

// The ranks that pass the same color >= 0, ordered by (key, rank).
Comm comm_split(const Comm& comm, int color, int key);
// The ranks of comm that share this host: rank chooses the device, size divides the memory.
Comm comm_host(const Comm& comm);

// A rank that says by comm_alive, in the same group, that it gets on is not late: a disk may be slower than others.
void comm_barrier(const Comm& comm);
// Tells the group's ranks, which may wait in its barrier, that this one gets on; no other wait listens. For loops over
// the blocks of a file: they may call it as often as they like, messages go out once a second, or four times a timeout.
void comm_alive(const Comm& comm);

// The root's data everywhere.
template <class Dev, class E> void comm_broadcast(Dev, const Comm& comm, E* data /*(count)*/, size_t count, int root);
// Sum over ranks, in place, everywhere.
template <class Dev, class E> void comm_sum(Dev, const Comm& comm, E* data /*(count)*/, size_t count);
// all[r] = rank r's `mine`, everywhere. `mine` may lie at its place in `all`.
template <class E> void comm_gather(Cpu, const Comm& comm, E* all /*(size, count)*/, const E* mine, size_t count);
// Rank r ends with the sum over ranks in data[begin[r] .. begin[r+1]); what lies outside that slice is unspecified
// afterwards. Extra memory is bounded (16 MiB or so, on a GPU comm_scratch_bytes) whatever the sizes.
template <class Dev, class E>
void comm_reduce_scatter(Dev, const Comm& comm, E* data, const size_t* begin /*(size+1)*/);
// Rank r's data[begin[r] .. begin[r+1]) everywhere, in place.
template <class Dev, class E> void comm_all_gather(Dev, const Comm& comm, E* data, const size_t* begin /*(size + 1)*/);

// A transfer under way.
struct Shift {
    Comm comm;
    void* backend = nullptr; // null: nothing under way
};
// Sends and receives: both buffers belong to the transfer until shift_wait. Either count may be 0, then nothing is sent
// (or received) and that rank number is not looked at; both ends must know. The far end must not be this rank.
// Several may be under way; between two ranks they match in the order in which they were started.
template <class Dev, class E> Shift shift_start(Dev, const Comm& comm, const E* send, size_t send_count, int to,
                                                E* receive, size_t receive_count, int from);
// comm_reduce_scatter behind the work that was given so far and beside what is computed next; `data` belongs to it
// until shift_wait. Several may be under way. This group's later transfers go behind it, by NCCL those of all groups.
// The CPU's is over when it returns.
template <class Dev, class E>
Shift comm_reduce_scatter_start(Dev, const Comm& comm, E* data, const size_t* begin /*(size + 1)*/);
// comm_all_gather in the same way; this rank's slice may be read meanwhile.
template <class Dev, class E>
Shift comm_all_gather_start(Dev, const Comm& comm, E* data, const size_t* begin /*(size + 1)*/);
// Afterwards `receive` is filled or the sum is formed, what was sent is free, and a second wait does nothing.
void shift_wait(Cpu, Shift& shift);
void shift_wait(Gpu, Shift& shift);

// How data travel between GPUs. ipc: within a host a rank fetches what another one has, through a mapping of its memory
// and with the copy engine, which takes no multiprocessor. nccl: NCCL sends and receives. automatic: ipc wherever two
// ranks can map each other's memory, else nccl.
enum class Transport { automatic, ipc, nccl };

// Makes a group ready for Gpu calls; all its ranks call it, with `bytes` alike. All data of later calls must lie in
// `memory`, one allocation of this rank's, and at the same place in it on every rank: a rank that fetches from another
// one takes the addresses from its own call, also those of what it does not send itself.
void comm_open(Gpu, const Comm& comm, void* memory, size_t bytes, Transport transport);
inline void comm_open(Cpu, const Comm&, void*, size_t, Transport) {}
void comm_close(Gpu); // waits for the stream, then ends what comm_open has begun
inline void comm_close(Cpu) {}

// What transfers of this group have cost the stream since comm_open, in seconds that it stood still: while data moved,
// and while they had not begun to, since another rank was late. NCCL does not tell the two apart: there all counts as
// moving. What went on beside the stream's work has cost nothing.
struct CommTimes {
    double moving = 0, waiting = 0;
};
CommTimes comm_times(Gpu, const Comm& comm);
inline CommTimes comm_times(Cpu, const Comm&) { return {}; }
std::string comm_transport(Gpu, const Comm& comm); // in words
inline std::string comm_transport(Cpu, const Comm&) { return comm_backend(); }

// GPU memory that transfers take beside the data, for so many groups. NCCL connects groups of the same ranks once:
// `sets` has the number of ranks of each such set. To a peer it takes up to 32 channels with buffers of 12 MiB (its
// issue 1685); the rest of the 976 MiB that it took between two H200s (2.28, dev/LOG.md) is for itself.
constexpr size_t comm_scratch_bytes = size_t(128) << 20, comm_flag_bytes = size_t(2) << 20;
constexpr size_t comm_nccl_peer_bytes = size_t(384) << 20, comm_nccl_own_bytes = size_t(976 - 384) << 20;
inline double comm_gpu_bytes(int groups, bool nccl, std::initializer_list<int> sets) {
    size_t bytes = 0;
    for (int ranks : sets)
        if (nccl && ranks > 1) bytes += comm_nccl_own_bytes + size_t(ranks - 1) * comm_nccl_peer_bytes;
    return double(comm_scratch_bytes + size_t(groups) * comm_flag_bytes + bytes);
}

// How many ranks the launcher says it started (mpirun, srun): a backend that sees fewer would train the same model
// several times over, into the same files. In Slurm the step's count is meant: a batch script itself is one task.
inline int comm_launched_ranks() {
    for (const char* name : {"OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS"})
        if (const char* value = getenv(name)) return atoi(value);
    return 1;
}

// Checks the ends of a shift; what it is, for the watchdog.
inline std::string shift_operation(const Comm& comm, size_t send_count, int to, size_t receive_count, int from) {
    auto other_rank = [&](int rank) { return rank >= 0 && rank < comm.size && rank != comm.rank; };
    REQUIRE(send_count == 0 || other_rank(to), "send to some other rank of the group");
    REQUIRE(receive_count == 0 || other_rank(from), "receive from some other rank of the group");
    std::string operation = "shift";
    if (send_count > 0) operation += " to rank " + std::to_string(to);
    if (receive_count > 0) operation += " from rank " + std::to_string(from);
    return operation;
}

// The same, by element number: what a backend defines.
void comm_broadcast(Cpu, const Comm& comm, Type type, void* data, size_t count, int root);
void comm_broadcast(Gpu, const Comm& comm, Type type, void* data, size_t count, int root);
void comm_gather(Cpu, const Comm& comm, Type type, void* all, const void* mine, size_t count);
void comm_sum(Cpu, const Comm& comm, Type type, void* data, size_t count);
void comm_sum(Gpu, const Comm& comm, Type type, void* data, size_t count);
void comm_reduce_scatter(Cpu, const Comm& comm, Type type, void* data, const size_t* begin);
Shift comm_reduce_scatter_start(Gpu, const Comm& comm, Type type, void* data, const size_t* begin);
void comm_all_gather(Cpu, const Comm& comm, Type type, void* data, const size_t* begin);
Shift comm_all_gather_start(Gpu, const Comm& comm, Type type, void* data, const size_t* begin);
Shift shift_start(Cpu, const Comm& comm, Type type, const void* send, size_t send_count, int to, void* receive,
                  size_t receive_count, int from);
Shift shift_start(Gpu, const Comm& comm, Type type, const void* send, size_t send_count, int to, void* receive,
                  size_t receive_count, int from);

inline Shift comm_reduce_scatter_start(Cpu cpu, const Comm& comm, Type type, void* data, const size_t* begin) {
    comm_reduce_scatter(cpu, comm, type, data, begin);
    return {comm, nullptr};
}
inline Shift comm_all_gather_start(Cpu cpu, const Comm& comm, Type type, void* data, const size_t* begin) {
    comm_all_gather(cpu, comm, type, data, begin);
    return {comm, nullptr};
}

template <class Dev, class E> void comm_broadcast(Dev dev, const Comm& comm, E* data, size_t count, int root) {
    comm_broadcast(dev, comm, type_of<E>(), data, count, root);
}
template <class Dev, class E> void comm_sum(Dev dev, const Comm& comm, E* data, size_t count) {
    comm_sum(dev, comm, type_of<E>(), data, count);
}
template <class E> void comm_gather(Cpu cpu, const Comm& comm, E* all, const E* mine, size_t count) {
    comm_gather(cpu, comm, type_of<E>(), all, mine, count);
}
template <class Dev, class E> void comm_reduce_scatter(Dev dev, const Comm& comm, E* data, const size_t* begin) {
    Shift sum = comm_reduce_scatter_start(dev, comm, data, begin);
    shift_wait(dev, sum);
}
template <class Dev, class E> Shift comm_reduce_scatter_start(Dev dev, const Comm& comm, E* data, const size_t* begin) {
    return comm_reduce_scatter_start(dev, comm, type_of<E>(), data, begin);
}
template <class Dev, class E> void comm_all_gather(Dev dev, const Comm& comm, E* data, const size_t* begin) {
    Shift gather = comm_all_gather_start(dev, comm, data, begin);
    shift_wait(dev, gather);
}
template <class Dev, class E> Shift comm_all_gather_start(Dev dev, const Comm& comm, E* data, const size_t* begin) {
    return comm_all_gather_start(dev, comm, type_of<E>(), data, begin);
}
template <class Dev, class E> Shift shift_start(Dev dev, const Comm& comm, const E* send, size_t send_count, int to,
                                                E* receive, size_t receive_count, int from) {
    return shift_start(dev, comm, type_of<E>(), send, send_count, to, receive, receive_count, from);
}
