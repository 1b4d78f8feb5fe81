// The ranks of this test process, from its first use to its end.
#pragma once
#include "../core/comm.h"

inline const Comm& world() {
    static struct World {
        Comm comm = comm_init(nullptr, nullptr);
        ~World() { comm_finalize(comm); }
    } up;
    return up.comm;
}
