// The end of main in tests that are a program of several ranks; define DOCTEST_CONFIG_IMPLEMENT first.
#pragma once
#include "../core/comm.h"
#include "check.h"

// Runs the cases on every rank, of which rank 0 reports; not 0 when one failed on any. `close` comes after all have.
template <class F> int run_ranks(const Comm& world, int argc, char** argv, F close) {
    doctest::Context context(argc, argv);
    if (world.rank != 0) context.setOption("minimal", true);
    int64_t failed = context.run();
    comm_sum(Cpu(), world, &failed, 1);
    close();
    comm_finalize(world);
    return failed > 0;
}
inline int run_ranks(const Comm& world, int argc, char** argv) {
    return run_ranks(world, argc, argv, [] {});
}
