// The squared Euclidean norm of a gradient, in double whatever the storage.
//
// Blocks of fixed size are summed by themselves and their sums added in order: the bits depend on `count`
// alone, not on the threads.
#pragma once
#include "../core/types.h"
#include <algorithm>
#include <vector>

template <class G> double grad_norm_squared(Cpu, const G* grad, size_t count) {
    constexpr size_t block = 1 << 16;
    size_t blocks = (count + block - 1) / block;
    std::vector<double> sums(blocks);
#pragma omp parallel for schedule(static)
    for (size_t b = 0; b < blocks; b++) {
        size_t begin = b * block, end = std::min(count, begin + block);
        double sum = 0;
#pragma omp simd reduction(+ : sum)
        for (size_t i = begin; i < end; i++) sum += double(grad[i]) * double(grad[i]);
        sums[b] = sum;
    }
    double total = 0;
    for (double sum : sums) total += sum;
    return total;
}

#ifdef __CUDACC__
// Gpu: kernels follow.
#endif
