// The CPU's vectors: the width to compile for, the vector types, memory on their boundaries.
#pragma once
#include "types.h"
#include <memory>
#include <utility>

#if defined(__AVX512F__)
constexpr size_t vector_bytes = 64, vector_registers = 32;
#elif defined(__AVX2__)
constexpr size_t vector_bytes = 32, vector_registers = 16;
#else
constexpr size_t vector_bytes = 16, vector_registers = 16;
#endif
template <class A> constexpr size_t vector_lanes = vector_bytes / sizeof(A);

// `type` is the widest native vector, `loose` the same at any address of an A. The attribute wants a type that does not
// depend on a template's parameter, hence the two specialisations.
template <class A> struct NativeVector;
template <> struct NativeVector<float> {
    typedef float type __attribute__((vector_size(vector_bytes)));
    typedef float loose __attribute__((vector_size(vector_bytes), aligned(4), may_alias));
};
template <> struct NativeVector<double> {
    typedef double type __attribute__((vector_size(vector_bytes)));
    typedef double loose __attribute__((vector_size(vector_bytes), aligned(8), may_alias));
};

// f(0), f(1), .., unrolled at every optimisation level, so that arrays of vectors become registers.
template <class F, int... I> __attribute__((always_inline)) inline void unroll(F f, std::integer_sequence<int, I...>) {
    (f(I), ...);
}

// Scratch memory on cache line boundaries, so that no vector straddles two of them; not set to anything.
template <class A> struct VectorScratch {
    struct alignas(64) Line {
        A value[64 / sizeof(A)];
    };
    std::unique_ptr<Line[]> line;
    explicit VectorScratch(size_t count) : line(new Line[count * sizeof(A) / 64 + 1]) {}
    A* data() { return line[0].value; }
};
