// The squared Euclidean norm of a gradient, in double whatever the storage. It stays on the device, where the step that
// it scales is taken (layers/update.cuh).
//
// Blocks of fixed size are summed by themselves and their sums added in order: the bits depend on `count`, on a GPU
// also on how many blocks it holds, but not on the threads.
#pragma once
#include "convert.cuh"
#include <algorithm>
#include <vector>

// squared (1), written or added to; grad (count).
template <class G> void grad_norm_squared(Cpu, double* squared, const G* grad, size_t count, bool add = false) {
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
    double total = add ? *squared : 0;
    for (double sum : sums) total += sum;
    *squared = total;
}

#ifdef __CUDACC__
struct SumOfSquares {
    __device__ double operator()(double x) const { return x * x; }
};

// sum_kernel with squares. The conversions to double, 16 a clock and multiprocessor, take 0.6 of the time of the reads,
// which come to 98% of a copy's bandwidth on H200.
template <class G> void grad_norm_squared(Gpu gpu, double* squared, const G* grad, size_t count, bool add = false) {
    sum_of(gpu, squared, grad, count, SumOfSquares(), add);
}
#endif
