// For a build without NCCL: the ranks of one host need none.
#include "comm_nccl.h"

Nccl* nccl_open(const Comm&) {
    fail("this program was built without NCCL, which GPUs need that cannot map each other's memory (those of other "
         "hosts, or --transport nccl): install libnccl-dev and build again");
}
void nccl_exchange(Nccl*, const Message*, size_t, Stream) {}
std::string nccl_fault(Nccl*) { return ""; }
