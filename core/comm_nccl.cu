// NCCL's part of the communicator for GPUs. The one file that includes nccl.h.
//
// Only sends and receives are taken from it: its own sums of bf16 are rounded at every rank that they pass.
#include "comm_nccl.h"
#include "device.h"
#include <nccl.h>

#define NCCL_CHECK(call)                                                                      \
    do {                                                                                      \
        ncclResult_t nccl_status = (call);                                                    \
        if (nccl_status != ncclSuccess)                                                       \
            fail("%s:%d: %s: %s (%s); NCCL_DEBUG=WARN shows more", __FILE__, __LINE__, #call, \
                 ncclGetErrorString(nccl_status), ncclGetLastError(nullptr));                 \
    } while (0)

struct Nccl {
    ncclComm_t comm;
};

// MPI carries the id that the ranks find each other by. NVLink's multicast is left off unless somebody asks for it:
// sends and receives do not use it, and it takes memory.
Nccl* nccl_open(const Comm& comm) {
    setenv("NCCL_NVLS_ENABLE", "0", 0);
    ncclUniqueId id;
    if (comm.rank == 0) NCCL_CHECK(ncclGetUniqueId(&id));
    comm_broadcast(Cpu(), comm, (uint8_t*)&id, sizeof id, 0);
    auto* nccl = new Nccl;
    NCCL_CHECK(ncclCommInitRank(&nccl->comm, comm.size, id, comm.rank));
    return nccl;
}

void nccl_exchange(Nccl* nccl, const Message* message, size_t count, Stream stream) {
    NCCL_CHECK(ncclGroupStart());
    for (size_t i = 0; i < count; i++) {
        const Message& m = message[i];
        if (m.send_bytes) NCCL_CHECK(ncclSend(m.send, m.send_bytes, ncclUint8, m.peer, nccl->comm, stream));
        if (m.receive_bytes) NCCL_CHECK(ncclRecv(m.receive, m.receive_bytes, ncclUint8, m.peer, nccl->comm, stream));
    }
    NCCL_CHECK(ncclGroupEnd());
}

std::string nccl_fault(Nccl* nccl) {
    ncclResult_t status = ncclSuccess;
    if (ncclCommGetAsyncError(nccl->comm, &status) != ncclSuccess) return "NCCL cannot be asked";
    if (status == ncclSuccess || status == ncclInProgress) return "";
    return std::string(ncclGetErrorString(status)) + " (" + ncclGetLastError(nccl->comm) + ")";
}
