// What every file stands on: device tags, bf16, checks that end all ranks, and a counter-based random hash.
#pragma once
#include <cerrno>
#include <cmath>
#include <cstdarg>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <type_traits>
#include <unistd.h>

#ifdef __CUDACC__
#include <cuda_runtime.h>
#define HOST_DEVICE __host__ __device__
using Stream = cudaStream_t;
#else
#define HOST_DEVICE
using Stream = void*;
#endif

// Device tags: the first argument of every layer chooses the machine it runs on. The Gpu tag carries the stream and
// what is known of the GPU (core/device.h); the Cpu tag carries nothing, and OpenMP's threads are taken from the
// environment.
struct Cpu {};
struct GpuContext;
struct Gpu {
    Stream stream = nullptr;
    GpuContext* context = nullptr;
};

// bfloat16: the upper half of a float, rounded to nearest even. A NaN stays a (quiet) NaN.
struct bf16 {
    uint16_t bits;

    bf16() = default;
    HOST_DEVICE bf16(float x) {
        uint32_t u;
        memcpy(&u, &x, 4);
        bool nan = (u & 0x7fffffffu) > 0x7f800000u;
        bits = nan ? uint16_t((u >> 16) | 0x40u) : uint16_t((u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
    }
    HOST_DEVICE operator float() const {
        uint32_t u = uint32_t(bits) << 16;
        float x;
        memcpy(&x, &u, 4);
        return x;
    }
};
static_assert(sizeof(bf16) == 2 && std::is_trivially_copyable_v<bf16>);

// Acc<E>: the type in which sums over elements of type E are formed (double for double, else fp32).
template <class E> using Acc = std::conditional_t<std::is_same_v<E, double>, double, float>;

// Element types by number, as they stand in files and in messages between ranks.
enum class Type : int32_t { f32 = 0, bf16 = 1, f64 = 2, i32 = 3, i64 = 4, u8 = 5 };

template <class E> constexpr Type type_of() {
    if constexpr (std::is_same_v<E, float>) return Type::f32;
    else if constexpr (std::is_same_v<E, bf16>) return Type::bf16;
    else if constexpr (std::is_same_v<E, double>) return Type::f64;
    else if constexpr (std::is_same_v<E, int32_t>) return Type::i32;
    else if constexpr (std::is_same_v<E, int64_t>) return Type::i64;
    else {
        static_assert(std::is_same_v<E, uint8_t>, "this type cannot be sent or stored");
        return Type::u8;
    }
}

constexpr size_t type_size(Type t) {
    constexpr size_t sizes[] = {4, 2, 8, 4, 8, 1};
    return sizes[int(t)];
}

inline const char* type_name(Type t) {
    constexpr const char* names[] = {"float", "bf16", "double", "int32", "int64", "uint8"};
    return names[int(t)];
}

// Calls f.operator()<E>() for the type.
template <class F> void with_type(Type type, F f) {
    switch (type) {
        case Type::f32:
            return f.template operator()<float>();
        case Type::bf16:
            return f.template operator()<bf16>();
        case Type::f64:
            return f.template operator()<double>();
        case Type::i32:
            return f.template operator()<int32_t>();
        case Type::i64:
            return f.template operator()<int64_t>();
        case Type::u8:
            return f.template operator()<uint8_t>();
    }
}

// Ends every rank with this status. Defined by the communicator that is linked in (core/comm_*.cpp).
[[noreturn]] void abort_all_ranks(int status);
// This process's rank in the world, 0 before the communicator is up.
int world_rank();

// How messages begin: the name of the file that runs.
inline const char* program_name() { return program_invocation_short_name; }

// Prints one line, "<program>: rank R: <message>", and ends all ranks. For what a user did or has.
[[noreturn]] __attribute__((format(printf, 1, 2))) inline void fail(const char* format, ...) {
    char message[2048];
    va_list args;
    va_start(args, format);
    vsnprintf(message, sizeof message, format, args);
    va_end(args);
    fflush(stdout);
    if (world_rank() > 0) usleep(300000); // what fails on every rank is said once: rank 0 ends the others meanwhile
    fprintf(stderr, "%s: rank %d: %s\n", program_name(), world_rank(), message);
    fflush(stderr);
    abort_all_ranks(1);
}

// Checks a caller's promise, in release builds too: REQUIRE(T > 0, "pass at least one token").
#define REQUIRE(condition, advice)                                                                       \
    do {                                                                                                 \
        if (!(condition)) fail("%s:%d: '%s' does not hold: %s", __FILE__, __LINE__, #condition, advice); \
    } while (0)

// Counter-based randomness (the finaliser of SplitMix64): the value depends on (seed, index) alone,
// so it is the same in every language, on every device and for every split of the work.
HOST_DEVICE inline uint64_t hash64(uint64_t seed, uint64_t index) {
    uint64_t z = seed * 0x9E3779B97F4A7C15ull + index + 0x632BE59BD9B4E019ull;
    for (int round = 0; round < 2; round++) {
        z += 0x9E3779B97F4A7C15ull;
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
        z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
        z ^= z >> 31;
    }
    return z;
}

// Uniform in [0, 1), with 53 random bits.
HOST_DEVICE inline double hash_uniform(uint64_t seed, uint64_t index) {
    return double(hash64(seed, index) >> 11) * 0x1.0p-53;
}

// Standard normal by Box-Muller, from the uniforms 2 * index and 2 * index + 1.
HOST_DEVICE inline double hash_normal(uint64_t seed, uint64_t index) {
    double u = 1.0 - hash_uniform(seed, 2 * index);
    double v = hash_uniform(seed, 2 * index + 1);
    return sqrt(-2.0 * log(u)) * cos(6.283185307179586476925 * v);
}
