// The communicator of a program built without MPI: one rank, which is the world.
#include "comm.h"
#include <unistd.h>

void abort_all_ranks(int status) { _exit(status); }
int world_rank() { return 0; }
const char* comm_backend() { return "serial"; }

Comm comm_init(int*, char***, double timeout) {
    int launched = comm_launched_ranks();
    if (launched > 1)
        fail("started as one of %d ranks, but built without MPI: every rank would train alone; install MPI "
             "(Debian: libopenmpi-dev) and build again, or start it without mpirun or srun",
             launched);
    Comm world;
    world.timeout = timeout;
    return world;
}
void comm_finalize(const Comm&) {}

Comm comm_split(const Comm& comm, int color, int) {
    REQUIRE(color >= 0, "pass a color of at least 0");
    return comm;
}
Comm comm_host(const Comm& comm) { return comm; }
void comm_alive(const Comm&) {}
void comm_barrier(const Comm&) {}

void comm_broadcast(Cpu, const Comm&, Type, void*, size_t, int root) {
    REQUIRE(root == 0, "there is one rank, number 0");
}
void comm_sum(Cpu, const Comm&, Type, void*, size_t) {}
void comm_gather(Cpu, const Comm&, Type type, void* all, const void* mine, size_t count) {
    if (all != mine && count > 0) memmove(all, mine, count * type_size(type));
}
void comm_reduce_scatter(Cpu, const Comm&, Type, void*, const size_t* begin) {
    REQUIRE(begin[0] <= begin[1], "slices must not run backwards");
}
void comm_all_gather(Cpu, const Comm&, Type, void*, const size_t* begin) {
    REQUIRE(begin[0] <= begin[1], "slices must not run backwards");
}

Shift shift_start(Cpu, const Comm& comm, Type, const void*, size_t send_count, int, void*, size_t receive_count, int) {
    REQUIRE(send_count == 0 && receive_count == 0, "there is no other rank to send to or receive from");
    return {comm, nullptr};
}
void shift_wait(Cpu, Shift&) {}
