// RMSNorm: every token's channels divided by their root mean square, times a weight per channel.
//
//   rstd_t = 1 / sqrt(mean_c in_tc^2 + eps)            n_tc = in_tc rstd_t
//   out_tc = n_tc weight_c
//
// Backward, with g_tc = dout_tc weight_c; rstd depends on every channel of its token, hence the mean:
//   din_tc      = rstd_t (g_tc - n_tc mean_c(g_tc n_tc)) + dresidual_tc
//   dweight_c  += sum_t dout_tc n_tc
//
// in, out, dout, din, dresidual (T, C); weight, dweight (C); rstd (T). Zhang and Sennrich, arXiv 1910.07467.
#pragma once
#include "../core/types.h"
#include <algorithm>
#include <cmath>
#include <vector>

template <class E>
void rmsnorm_forward(Cpu, E* out, Acc<E>* rstd, const E* in, const E* weight, size_t T, size_t C, double eps) {
    using A = Acc<E>;
    REQUIRE(C > 0, "RMSNorm needs at least one channel");
#pragma omp parallel for schedule(static)
    for (size_t t = 0; t < T; t++) {
        const E* x = in + t * C;
        E* y = out + t * C;
        A squares = 0;
#pragma omp simd reduction(+ : squares)
        for (size_t c = 0; c < C; c++) squares += A(x[c]) * A(x[c]);
        A r = A(1) / std::sqrt(squares / A(C) + A(eps));
        rstd[t] = r;
#pragma GCC ivdep
        for (size_t c = 0; c < C; c++) y[c] = E(A(x[c]) * r * A(weight[c]));
    }
}

// The tokens are cut into at most this many parts, each with its own sum for dweight; the parts are then added in
// order. Their number does not depend on the threads, so neither do the bits of dweight.
constexpr size_t rmsnorm_parts = 64;

// One part's tokens: writes their din and adds to the part's dweight sum (C). din may alias dresidual.
template <class E> void rmsnorm_backward_part(E* din, Acc<E>* dweight_sum, const E* dout, const E* in, const E* weight,
                                              const Acc<E>* rstd, const E* dresidual, size_t t_begin, size_t t_end,
                                              size_t C) {
    using A = Acc<E>;
    for (size_t t = t_begin; t < t_end; t++) {
        const E *x = in + t * C, *dy = dout + t * C, *residual = dresidual ? dresidual + t * C : nullptr;
        E* dx = din + t * C;
        A r = rstd[t], dot = 0;
#pragma omp simd reduction(+ : dot)
        for (size_t c = 0; c < C; c++) {
            A n = A(x[c]) * r, d = A(dy[c]);
            dot += d * A(weight[c]) * n;
            dweight_sum[c] += d * n;
        }
        A mean = dot / A(C);
#pragma GCC ivdep
        for (size_t c = 0; c < C; c++) {
            A d = r * (A(dy[c]) * A(weight[c]) - A(x[c]) * r * mean);
            dx[c] = E(residual ? d + A(residual[c]) : d);
        }
    }
}

// dresidual: the gradient that reaches `in` past the norm, or null; it may alias din.
template <class E, class G> void rmsnorm_backward(Cpu, E* din, G* dweight, const E* dout, const E* in, const E* weight,
                                                  const Acc<E>* rstd, const E* dresidual, size_t T, size_t C) {
    using A = Acc<E>;
    REQUIRE(C > 0, "RMSNorm needs at least one channel");
    size_t parts = std::min(T, rmsnorm_parts);
    std::vector<A> sums(parts * C);
#pragma omp parallel for schedule(static)
    for (size_t p = 0; p < parts; p++)
        rmsnorm_backward_part(din, sums.data() + p * C, dout, in, weight, rstd, dresidual, T * p / parts,
                              T * (p + 1) / parts, C);
#pragma omp parallel for schedule(static)
    for (size_t c = 0; c < C; c++) {
        A sum = A(dweight[c]);
        for (size_t p = 0; p < parts; p++) sum += sums[p * C + c];
        dweight[c] = G(sum);
    }
}

#ifdef __CUDACC__
// Gpu: kernels follow.
#endif
