// What core/comm_gpu.cu asks of NCCL: messages between ranks that cannot map each other's memory. Chosen at link time:
// core/comm_nccl.cu, or core/comm_no_nccl.cu where there is none.
#pragma once
#include "comm.h"

// One way or both between this rank and another, in bytes.
struct Message {
    int peer;
    const void* send;
    size_t send_bytes;
    void* receive;
    size_t receive_bytes;
    const void* source; // where the peer has what is received, as an address of this rank: memory is laid out alike
};

struct Nccl;
Nccl* nccl_open(const Comm& comm); // all ranks of the group call it
// Behind the stream's work. All ranks start their exchanges in the same order.
void nccl_exchange(Nccl* nccl, const Message* message, size_t count, Stream stream);
std::string nccl_fault(Nccl* nccl); // what went wrong since, or an empty string; from any thread
