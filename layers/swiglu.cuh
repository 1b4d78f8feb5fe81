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
#include "../core/kernel.h"

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
template <class E> __device__ float sigmoid_for(float x) {
    if constexpr (sizeof(E) == 2) return reciprocal_approximate(1 + exp_approximate(-x));
    else return 1 / (1 + expf(-x));
}

// A thread takes W neighbouring features of `rows` tokens, all its loads in flight at once; the blocks of a token cut
// its features into strips. Bound by memory, 100% of a copy's bandwidth on H200: an exponential and a reciprocal an
// element are half of what the special function units could do meanwhile.
template <class E, int W, int rows> __global__ void __launch_bounds__(128)
    swiglu_forward_kernel(E* out, const E* gate_up, size_t T, size_t F, unsigned strips) {
    const size_t f = (size_t(blockIdx.x % strips) * blockDim.x + threadIdx.x) * W;
    const size_t t = size_t(blockIdx.x / strips) * rows;
    if (f >= F) return;
    Pack<E, W> gate[rows], up[rows];
#pragma unroll
    for (int r = 0; r < rows; r++)
        if (t + r < T) {
            gate[r] = pack_load<W>(gate_up + (t + r) * 2 * F + f);
            up[r] = pack_load<W>(gate_up + (t + r) * 2 * F + F + f);
        }
#pragma unroll
    for (int r = 0; r < rows; r++)
        if (t + r < T) {
            float y[W];
#pragma unroll
            for (int j = 0; j < W; j++) y[j] = gate[r][j] * sigmoid_for<E>(gate[r][j]) * up[r][j];
            pack_store(out + (t + r) * F + f, y);
        }
}

// As the forward's; gate_up is read before dgate_up, perhaps the same memory, is written.
template <class E, int W, int rows> __global__ void __launch_bounds__(128)
    swiglu_backward_kernel(E* dgate_up, const E* dout, const E* gate_up, size_t T, size_t F, unsigned strips) {
    const size_t f = (size_t(blockIdx.x % strips) * blockDim.x + threadIdx.x) * W;
    const size_t t = size_t(blockIdx.x / strips) * rows;
    if (f >= F) return;
    Pack<E, W> gate[rows], up[rows], dy[rows];
#pragma unroll
    for (int r = 0; r < rows; r++)
        if (t + r < T) {
            gate[r] = pack_load<W>(gate_up + (t + r) * 2 * F + f);
            up[r] = pack_load<W>(gate_up + (t + r) * 2 * F + F + f);
            dy[r] = pack_load<W>(dout + (t + r) * F + f);
        }
#pragma unroll
    for (int r = 0; r < rows; r++)
        if (t + r < T) {
            float dgate[W], dup[W];
#pragma unroll
            for (int j = 0; j < W; j++) {
                const float g = gate[r][j], d = dy[r][j], s = sigmoid_for<E>(g);
                dgate[j] = d * up[r][j] * s * (1 + g * (1 - s));
                dup[j] = d * g * s;
            }
            pack_store(dgate_up + (t + r) * 2 * F + f, dgate);
            pack_store(dgate_up + (t + r) * 2 * F + F + f, dup);
        }
}

template <class E> void swiglu_forward(Gpu gpu, E* out, const E* gate_up, size_t T, size_t F) {
    constexpr int threads = 128, rows = 2;
    if (T == 0 || F == 0) return;
    auto launch = [&](auto width) {
        constexpr int W = decltype(width)::value;
        const size_t strips = (F + threads * W - 1) / (threads * W);
        const unsigned blocks = grid_blocks((T + rows - 1) / rows * strips);
        swiglu_forward_kernel<E, W, rows><<<blocks, threads, 0, gpu.stream>>>(out, gate_up, T, F, unsigned(strips));
    };
    if (packs_fit<E>(F, out, gate_up)) launch(std::integral_constant<int, pack_width<E>>());
    else launch(std::integral_constant<int, 1>());
    CUDA_CHECK(cudaGetLastError());
}

template <class E> void swiglu_backward(Gpu gpu, E* dgate_up, const E* dout, const E* gate_up, size_t T, size_t F) {
    constexpr int threads = 128, rows = 2;
    if (T == 0 || F == 0) return;
    auto launch = [&](auto width) {
        constexpr int W = decltype(width)::value;
        const size_t strips = (F + threads * W - 1) / (threads * W);
        const unsigned blocks = grid_blocks((T + rows - 1) / rows * strips);
        swiglu_backward_kernel<E, W, rows>
            <<<blocks, threads, 0, gpu.stream>>>(dgate_up, dout, gate_up, T, F, unsigned(strips));
    };
    if (packs_fit<E>(F, dgate_up, dout, gate_up)) launch(std::integral_constant<int, pack_width<E>>());
    else launch(std::integral_constant<int, 1>());
    CUDA_CHECK(cudaGetLastError());
}
#endif
