// What the tests of ranks on GPUs share: memory that all of them have alike, and a group for each way that data take.
// Ranks may share a GPU; NCCL is left out then, which wants one for each. Define DOCTEST_CONFIG_IMPLEMENT first.
#pragma once
#include "gpu.h"
#include "rank_main.h"

// A group with all ranks, for each way.
struct Way {
    const char* name;
    Comm comm;
    Transport transport;
};

inline Comm world;
inline std::vector<Way> ways;
inline uint8_t* peer_memory = nullptr;

// `nccl` says, when the world is known, whether NCCL is wanted where there is a GPU a rank.
template <class F> void open_ranks(int argc, char** argv, size_t peer_bytes, F nccl) {
    world = comm_init(&argc, &argv);
    world.timeout = 60;
    int count = 0;
    peer_memory = device_allocate(the_gpu(), peer_bytes);
    CUDA_CHECK(cudaGetDeviceCount(&count));
    const char* names[] = {"auto", "ipc", "nccl"}; // of Transport's values
    std::vector<Transport> transports = {Transport::ipc};
    if (count >= world.size && nccl()) transports.push_back(Transport::nccl);
    if (getenv("TEST_TRANSPORT_AUTO")) transports = {Transport::automatic};
    for (Transport transport : transports) {
        const Comm comm = comm_split(world, 0, world.rank);
        comm_open(the_gpu(), comm, peer_memory, peer_bytes, transport);
        ways.push_back({names[int(transport)], comm, transport});
        if (world.rank == 0 && world.size > 1)
            printf("%d ranks, %s%s\n", world.size, comm_transport(the_gpu(), comm).c_str(),
                   count < world.size ? "; NCCL is skipped, it wants a GPU a rank" : "");
    }
}
