// SwiGLU: the feed-forward's gate, between the fused gate-and-up product and the down product.
//
//   s = 1 / (1 + e^-gate)
//   out = gate s up                                    silu(gate) = gate s
//   dgate = dout up s (1 + gate (1 - s))               since s' = s (1 - s)
//   dup   = dout gate s
//
// gate_up, dgate_up (T, 2F): gate in [:, :F], up in [:, F:]; out, dout (T, F). Shazeer, arXiv 2002.05202.
#pragma once
#include "../core/fastexp.h"
#include "../core/types.h"

template <class E> void swiglu_forward(Cpu, E* out, const E* gate_up, size_t T, size_t F) {
    using A = Acc<E>;
#pragma omp parallel for schedule(static)
    for (size_t t = 0; t < T; t++) {
        const E *gate = gate_up + t * 2 * F, *up = gate + F;
        E* y = out + t * F;
#pragma GCC ivdep
        for (size_t f = 0; f < F; f++) {
            A g = A(gate[f]), s = A(1) / (A(1) + fast_exp(-g));
            y[f] = E(g * s * A(up[f]));
        }
    }
}

// dgate_up may alias gate_up: an element is read before it is written, and by no other.
template <class E> void swiglu_backward(Cpu, E* dgate_up, const E* dout, const E* gate_up, size_t T, size_t F) {
    using A = Acc<E>;
#pragma omp parallel for schedule(static)
    for (size_t t = 0; t < T; t++) {
        const E *gate = gate_up + t * 2 * F, *up = gate + F, *dy = dout + t * F;
        E *dgate = dgate_up + t * 2 * F, *dup = dgate + F;
#pragma GCC ivdep
        for (size_t f = 0; f < F; f++) {
            A g = A(gate[f]), u = A(up[f]), d = A(dy[f]), s = A(1) / (A(1) + fast_exp(-g));
            dgate[f] = E(d * u * s * (A(1) + g * (A(1) - s)));
            dup[f] = E(d * g * s);
        }
    }
}

#ifdef __CUDACC__
// Gpu: kernels follow.
#endif
