// AdamW (Loshchilov and Hutter, arXiv 1711.05101) over any mix of storage types.
//
//   g = grad grad_scale                               the clipping factor, or 1
//   m = beta1 m + (1 - beta1) g                       v = beta2 v + (1 - beta2) g^2
//   p = p - lr (m / (1 - beta1^step) / (sqrt(v / (1 - beta2^step)) + eps) + weight_decay p)
//
// The arithmetic is fp32, or double if a storage type is. What is stored as bf16 between updates would lose every
// change below half an ulp (up to 2^-8 of its value), so it is rounded up or down at random with its mean kept: m and
// v always, p unless there is an fp32 master, of which p is then the nearest bf16. The random bits are a hash of
// (seed, step, index in the model): the same for every split of the parameters over threads and ranks.
#pragma once
#include "../core/types.h"

struct AdamW {
    double lr, beta1, beta2, eps, weight_decay;
    int64_t step;      // counts from 1
    double grad_scale; // multiplies the gradient first
    uint64_t seed;
};

// bf16 above or below x with the chances that make the mean x: the 16 bits that are cut off carry into the kept ones
// when random16, uniform in [0, 65536), is added. Infinities and NaN stay what they are.
HOST_DEVICE inline bf16 stochastic_round(float x, uint32_t random16) {
    uint32_t u;
    memcpy(&u, &x, 4);
    bool finite = (u & 0x7f800000u) != 0x7f800000u;
    bf16 rounded, nearest = bf16(x);
    rounded.bits = uint16_t((u + random16) >> 16);
    rounded.bits = finite ? rounded.bits : nearest.bits;
    return rounded;
}

// x as it is stored: exact, or stochastically rounded if S is bf16.
template <class S, class A> inline S adamw_store(A x, uint32_t random16) {
    if constexpr (std::is_same_v<S, bf16>) return stochastic_round(float(x), random16);
    else return S(x);
}

// One call's scalars, in the type of the arithmetic.
template <class A> struct AdamWScalars {
    A lr, beta1, beta2, rest1, rest2, correction1, correction2, eps, weight_decay, grad_scale;

    explicit AdamWScalars(const AdamW& a)
        : lr(A(a.lr)), beta1(A(a.beta1)), beta2(A(a.beta2)), rest1(A(1 - a.beta1)), rest2(A(1 - a.beta2)),
          correction1(A(1 / (1 - std::pow(a.beta1, double(a.step))))),
          correction2(A(1 / (1 - std::pow(a.beta2, double(a.step))))), eps(A(a.eps)), weight_decay(A(a.weight_decay)),
          grad_scale(A(a.grad_scale)) {}
};

// Updates one m and v; returns the new parameter.
template <class M, class A> inline A adamw_element(A p, A grad, M& m, M& v, const AdamWScalars<A>& s, uint64_t random) {
    A g = grad * s.grad_scale;
    A m1 = s.beta1 * A(m) + s.rest1 * g;
    A v1 = s.beta2 * A(v) + s.rest2 * g * g;
    m = adamw_store<M>(m1, uint32_t(random >> 16) & 0xffffu);
    v = adamw_store<M>(v1, uint32_t(random >> 32) & 0xffffu);
    return p - s.lr * (m1 * s.correction1 / (std::sqrt(v1 * s.correction2) + s.eps) + s.weight_decay * p);
}

// param, m, v, grad (count); master (count) or null; `first`: the index in the whole model of element 0.
template <class P, class G, class M> void adamw_update(Cpu, P* param, Acc<P>* master, M* m, M* v, const G* grad,
                                                       size_t count, size_t first, const AdamW& a) {
    using A = std::conditional_t<(sizeof(P) == 8 || sizeof(G) == 8 || sizeof(M) == 8), double, float>;
    REQUIRE(a.step >= 1, "the first update is step 1, where the bias correction starts");
    const AdamWScalars<A> s(a);
    const uint64_t stream = hash64(a.seed, uint64_t(a.step));
    if (master) {
#pragma omp parallel for schedule(static)
        for (size_t i = 0; i < count; i++) {
            A p = adamw_element(A(master[i]), A(grad[i]), m[i], v[i], s, hash64(stream, first + i));
            master[i] = Acc<P>(p);
            param[i] = P(Acc<P>(p));
        }
    } else {
#pragma omp parallel for schedule(static)
        for (size_t i = 0; i < count; i++) {
            uint64_t random = hash64(stream, first + i);
            A p = adamw_element(A(param[i]), A(grad[i]), m[i], v[i], s, random);
            param[i] = adamw_store<P>(p, uint32_t(random) & 0xffffu);
        }
    }
}

#ifdef __CUDACC__
// Gpu: kernels follow.
#endif
