// Token embedding: a row of the weight per token.
//
//   out_t = weight_{token_t}                           dweight_v += sum over t with token_t = v of dout_t
//
// out, dout (T, C); token (T), every id in [0, V) (the loader has checked them); weight, dweight (V, C).
#pragma once
#include "../core/types.h"
#include <algorithm>
#include <vector>

template <class E> void embedding_forward(Cpu, E* out, const int32_t* token, const E* weight, size_t T, size_t C) {
#pragma omp parallel for schedule(static)
    for (size_t t = 0; t < T; t++) memcpy((void*)(out + t * C), weight + size_t(token[t]) * C, C * sizeof(E));
}

// A token that comes often is summed in Acc first and added once: a bf16 sum would stop growing after 256 equal
// terms. The positions of one id stand together after sorting (id, position), in the order of the tokens; each
// (id, block of channels) is one thread's work, so there are no atomics and the bits do not depend on the threads.
template <class E, class G>
void embedding_backward(Cpu, G* dweight, const E* dout, const int32_t* token, size_t T, size_t C) {
    using A = Acc<E>;
    constexpr size_t block = 256;
    std::vector<uint64_t> order(T);
    for (size_t t = 0; t < T; t++) order[t] = uint64_t(token[t]) << 32 | t;
    std::sort(order.begin(), order.end());
    std::vector<size_t> first; // where each id begins in `order`, then T
    for (size_t i = 0; i < T; i++)
        if (i == 0 || order[i] >> 32 != order[i - 1] >> 32) first.push_back(i);
    first.push_back(T);

    size_t ids = first.size() - 1, blocks = (C + block - 1) / block;
#pragma omp parallel for schedule(dynamic, 16)
    for (size_t work = 0; work < ids * blocks; work++) {
        size_t id = work / blocks, c0 = work % blocks * block, width = std::min(block, C - c0);
        A sum[block] = {};
        for (size_t i = first[id]; i < first[id + 1]; i++) {
            const E* d = dout + (order[i] & 0xffffffffu) * C + c0;
            for (size_t c = 0; c < width; c++) sum[c] += A(d[c]);
        }
        G* row = dweight + (order[first[id]] >> 32) * C + c0;
        for (size_t c = 0; c < width; c++) row[c] = G(A(row[c]) + sum[c]);
    }
}

#ifdef __CUDACC__
// Gpu: kernels follow.
#endif
