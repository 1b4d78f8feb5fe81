// What the tests of the communicator share, on both machines: values whose sums show their order, ragged slices, and
// runs in which a rank goes wrong.
#pragma once
#include "../core/comm.h"
#include "check.h"
#include <chrono>

// Element i of rank's data. The floats differ in size, so that another order of summation gives other bits.
template <class E> E value(int rank, size_t i) {
    uint64_t h = hash64(1000 + rank, i);
    if constexpr (std::is_integral_v<E>) return E(h % 60);
    else return E(float(double(int64_t(h)) * (i % 3 == 0 ? 1e-16 : 1e-19)));
}
template <class E> E sum_over_ranks(int size, size_t i) {
    using A = std::conditional_t<std::is_integral_v<E>, E, Acc<E>>;
    A sum = A(value<E>(0, i));
    for (int r = 1; r < size; r++) sum = A(sum + A(value<E>(r, i)));
    return E(sum);
}
template <class E> bool same(E a, E b) { return memcmp(&a, &b, sizeof(E)) == 0; }

template <class E> void fill(Buffer<E>& data, int rank) {
    for (size_t i = 0; i < data.count; i++) data[i] = value<E>(rank, i);
}

static const size_t counts[] = {0, 1, 2, 17, 1000, 4099};

// Offsets of ragged slices of n elements, the same on every rank; some slices are empty, some are everything.
static inline std::vector<size_t> ragged(uint64_t seed, int size, size_t n) {
    std::vector<size_t> begin(size + 1);
    begin[size] = n;
    for (int r = 1; r < size; r++) begin[r] = hash64(seed, r) % 4 == 0 ? n : hash64(seed, 100 + r) % (n + 1);
    std::sort(begin.begin(), begin.end());
    return begin;
}

// Runs the case "ends: name" of this program on two ranks, or more: it must end, badly, within 10 s after its timeout
// of 1 s (`start` more for what comes before), and say `message`, or `other` where it is a race who sees it first.
static inline void check_ends(const char* name, const char* message, double start = 0, const char* other = nullptr,
                              int ranks = 2) {
    CAPTURE(name);
    char self[4096] = "";
    CHECK(readlink("/proc/self/exe", self, sizeof self - 1) > 0);
    const std::string command = "env -i PATH=\"$PATH\" LD_LIBRARY_PATH=\"$LD_LIBRARY_PATH\" HOME=/tmp "
                                "${CUDA_VISIBLE_DEVICES+CUDA_VISIBLE_DEVICES=\"$CUDA_VISIBLE_DEVICES\"} "
                                "OMPI_MCA_plm_rsh_agent=true " // not called on one host, and ssh may be missing
                                "OMP_NUM_THREADS=1 OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 "
                                "timeout -s KILL 60 mpirun --oversubscribe -np " +
                                std::to_string(ranks) + " '" + self + "' --no-skip -tc='ends: " + name + "' 2>&1";
    const auto begin = std::chrono::steady_clock::now();
    std::string output;
    FILE* pipe = popen(command.c_str(), "r");
    char buffer[4096];
    while (fgets(buffer, sizeof buffer, pipe)) output += buffer;
    const int status = pclose(pipe);
    const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
    CHECK(status != 0);
    CHECK(seconds < 1 + 10 + start);
    auto says = [&](const char* text) { return output.find(text) != std::string::npos; };
    const bool said = says(message) || (other && says(other));
    CHECK_MESSAGE(said, output);
}
