// What ranks exchange: a handful of typed functions that count elements, never bytes. The backend is chosen at
// link time (core/comm_serial.cpp, core/comm_mpi.cpp), so callers hold no #ifdef.
//
// Every function but shift_start and shift_wait is collective: all ranks of the group call it, in the same order,
// with the same sizes. A wait that sees no progress for `timeout` seconds ends all ranks and names the operation.
// Sums are formed in rank order, ((x0 + x1) + x2) + ..., in Acc<E> and rounded once (integers: in themselves), so
// every rank gets the same bits in every run.
#pragma once
#include "types.h"
#include <initializer_list>

// A group of ranks. A plain value: copies are the same group, and none needs to be freed.
struct Comm {
    int rank = 0, size = 1;
    int handle = 0;       // the backend's own
    double timeout = 300; // seconds; groups split from this one inherit it
};

// The world. Call first (again: the same world). Fails when a launcher started more ranks than the backend sees.
Comm comm_init(int* argc, char*** argv);
void comm_finalize(const Comm& world); // a second call does nothing
const char* comm_backend();            // "serial" or "MPI"

// The ranks that pass the same color >= 0, ordered by (key, rank).
Comm comm_split(const Comm& comm, int color, int key);
// The ranks of comm that share this host: rank chooses the device, size divides the memory.
Comm comm_host(const Comm& comm);

void comm_barrier(const Comm& comm);

// The root's data everywhere.
template <class E> void comm_broadcast(Cpu, const Comm& comm, E* data /*(count)*/, size_t count, int root);
// Sum over ranks, in place, everywhere.
template <class E> void comm_sum(Cpu, const Comm& comm, E* data /*(count)*/, size_t count);
// all[r] = rank r's `mine`, everywhere. `mine` may lie at its place in `all`.
template <class E> void comm_gather(Cpu, const Comm& comm, E* all /*(size, count)*/, const E* mine, size_t count);
// Rank r ends with the sum over ranks in data[begin[r] .. begin[r+1]); what lies outside that slice is unspecified
// afterwards. Extra memory is bounded (16 MiB or so) whatever the sizes.
template <class E> void comm_reduce_scatter(Cpu, const Comm& comm, E* data, const size_t* begin /*(size + 1)*/);
// Rank r's data[begin[r] .. begin[r+1]) everywhere, in place.
template <class E> void comm_all_gather(Cpu, const Comm& comm, E* data, const size_t* begin /*(size + 1)*/);

// A transfer under way: both buffers belong to it until shift_wait. Either count may be 0, then nothing is sent
// (or received) and that rank number is not looked at; both ends must know. The far end must not be this rank.
// Several may be under way; between two ranks they match in the order in which they were started.
struct Shift {
    Comm comm;
    void* backend = nullptr; // null: nothing under way
};
template <class E> Shift shift_start(Cpu, const Comm& comm, const E* send, size_t send_count, int to, E* receive,
                                     size_t receive_count, int from);
void shift_wait(Shift& shift); // afterwards `receive` is filled, `send` is free, and a second wait does nothing

// How many ranks the launcher says it started (mpirun, srun): a backend that sees fewer would train the same model
// several times over, into the same files. In Slurm the step's count is meant: a batch script itself is one task.
inline int comm_launched_ranks() {
    for (const char* name : {"OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS"})
        if (const char* value = getenv(name)) return atoi(value);
    return 1;
}

// The same, by element number: what a backend defines.
void comm_broadcast(Cpu, const Comm& comm, Type type, void* data, size_t count, int root);
void comm_gather(Cpu, const Comm& comm, Type type, void* all, const void* mine, size_t count);
void comm_sum(Cpu, const Comm& comm, Type type, void* data, size_t count);
void comm_reduce_scatter(Cpu, const Comm& comm, Type type, void* data, const size_t* begin);
void comm_all_gather(Cpu, const Comm& comm, Type type, void* data, const size_t* begin);
Shift shift_start(Cpu, const Comm& comm, Type type, const void* send, size_t send_count, int to, void* receive,
                  size_t receive_count, int from);

// Data in the memory of GPUs: so far of one rank alone.
inline void comm_alone(const Comm& comm) { REQUIRE(comm.size == 1, "ranks on GPUs cannot talk yet: --device cpu"); }
template <class E> void comm_broadcast(Gpu, const Comm& comm, E*, size_t, int) { comm_alone(comm); }
template <class E> void comm_sum(Gpu, const Comm& comm, E*, size_t) { comm_alone(comm); }
template <class E> void comm_reduce_scatter(Gpu, const Comm& comm, E*, const size_t*) { comm_alone(comm); }
template <class E> void comm_all_gather(Gpu, const Comm& comm, E*, const size_t*) { comm_alone(comm); }
template <class E> Shift shift_start(Gpu, const Comm& comm, const E*, size_t, int, E*, size_t, int) {
    comm_alone(comm);
    return {};
}

template <class E> void comm_broadcast(Cpu cpu, const Comm& comm, E* data, size_t count, int root) {
    comm_broadcast(cpu, comm, type_of<E>(), data, count, root);
}
template <class E> void comm_sum(Cpu cpu, const Comm& comm, E* data, size_t count) {
    comm_sum(cpu, comm, type_of<E>(), data, count);
}
template <class E> void comm_gather(Cpu cpu, const Comm& comm, E* all, const E* mine, size_t count) {
    comm_gather(cpu, comm, type_of<E>(), all, mine, count);
}
template <class E> void comm_reduce_scatter(Cpu cpu, const Comm& comm, E* data, const size_t* begin) {
    comm_reduce_scatter(cpu, comm, type_of<E>(), data, begin);
}
template <class E> void comm_all_gather(Cpu cpu, const Comm& comm, E* data, const size_t* begin) {
    comm_all_gather(cpu, comm, type_of<E>(), data, begin);
}
template <class E> Shift shift_start(Cpu cpu, const Comm& comm, const E* send, size_t send_count, int to, E* receive,
                                     size_t receive_count, int from) {
    return shift_start(cpu, comm, type_of<E>(), send, send_count, to, receive, receive_count, from);
}
