// Cross entropy of the softmax, fused with its gradient, one row of logits per token.
//
//   m = max_v logits_tv     Z = sum_v e^(logits_tv - m)
//   loss_t     = log Z + m - logits_{t, label_t}
//   dlogits_tv = (e^(logits_tv - m) / Z - [v = label_t]) scale
//
// The largest term of Z is 1, so neither overflow nor a Z of 0 can happen with finite logits. A NaN or an infinite
// logit gives a NaN loss. label_t < 0: the token is not counted, its loss is 0 and its row of dlogits is 0.
//
// logits, dlogits (T, V); label (T), below V; loss (T); argmax (T): the first of the largest logits (0 if all are NaN).
#pragma once
#include "../core/fastexp.h"
#include "../core/types.h"
#include <limits>

template <class A> struct SoftmaxRow {
    A max, sum; // m and Z
};

template <class E> SoftmaxRow<Acc<E>> softmax_row(const E* x, size_t V) {
    using A = Acc<E>;
    A m = -std::numeric_limits<A>::infinity(), sum = 0;
#pragma omp simd reduction(max : m)
    for (size_t v = 0; v < V; v++) m = A(x[v]) > m ? A(x[v]) : m;
#pragma omp simd reduction(+ : sum)
    for (size_t v = 0; v < V; v++) sum += fast_exp(A(x[v]) - m);
    return {m, sum};
}

// argmax may be null; it is also given for tokens that are not counted.
template <class E>
void loss_forward(Cpu, Acc<E>* loss, int32_t* argmax, const E* logits, const int32_t* label, size_t T, size_t V) {
    using A = Acc<E>;
    REQUIRE(V > 0, "the vocabulary is empty");
#pragma omp parallel for schedule(static)
    for (size_t t = 0; t < T; t++) {
        const E* x = logits + t * V;
        SoftmaxRow<A> row = softmax_row(x, V);
        loss[t] = label[t] < 0 ? A(0) : std::log(row.sum) + (row.max - A(x[label[t]]));
        if (argmax) {
            size_t v = 0;
            while (v < V && !(A(x[v]) == row.max)) v++;
            argmax[t] = int32_t(v < V ? v : 0);
        }
    }
}

// Overwrites the logits with their gradient.
template <class E>
void loss_forward_backward(Cpu, Acc<E>* loss, E* logits, const int32_t* label, double scale, size_t T, size_t V) {
    using A = Acc<E>;
    REQUIRE(V > 0, "the vocabulary is empty");
#pragma omp parallel for schedule(static)
    for (size_t t = 0; t < T; t++) {
        E* x = logits + t * V;
        if (label[t] < 0) {
            loss[t] = 0;
            memset((void*)x, 0, V * sizeof(E));
            continue;
        }
        SoftmaxRow<A> row = softmax_row(x, V);
        A at_label = A(x[label[t]]), each = A(scale) / row.sum;
        loss[t] = std::log(row.sum) + (row.max - at_label);
#pragma GCC ivdep
        for (size_t v = 0; v < V; v++) x[v] = E(fast_exp(A(x[v]) - row.max) * each);
        x[label[t]] = E((fast_exp(at_label - row.max) / row.sum - A(1)) * A(scale));
    }
}

#ifdef __CUDACC__
// Gpu: kernels follow.
#endif
