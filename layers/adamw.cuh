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
#include "../core/kernel.h"
#include <algorithm>

struct AdamW {
    double lr, beta1, beta2, eps, weight_decay;
    uint64_t seed;
};

// What only the gradient's norm decides, and so the device: in its memory.
struct AdamWStep {
    int64_t step;      // counts from 1
    double grad_scale; // multiplies the gradient first
    int32_t skip;      // not 0: leave everything as it is
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
template <class S, class A> HOST_DEVICE inline S adamw_store(A x, uint32_t random16) {
    if constexpr (std::is_same_v<S, bf16>) return stochastic_round(float(x), random16);
    else return S(x);
}

// One call's scalars, in the type of the arithmetic.
template <class A> struct AdamWScalars {
    A lr, beta1, beta2, rest1, rest2, correction1, correction2, eps, weight_decay, grad_scale;
};
template <class A> HOST_DEVICE inline AdamWScalars<A> adamw_scalars(const AdamW& a, const AdamWStep& s) {
    const double correction1 = 1 / (1 - pow(a.beta1, double(s.step)));
    const double correction2 = 1 / (1 - pow(a.beta2, double(s.step)));
    return {A(a.lr),        A(a.beta1),     A(a.beta2), A(1 - a.beta1),    A(1 - a.beta2),
            A(correction1), A(correction2), A(a.eps),   A(a.weight_decay), A(s.grad_scale)};
}

// Updates one m and v; returns the new parameter.
template <class M, class A> inline A adamw_element(A p, A grad, M& m, M& v, const AdamWScalars<A>& s, uint64_t random) {
    A g = grad * s.grad_scale;
    A m1 = s.beta1 * A(m) + s.rest1 * g;
    A v1 = s.beta2 * A(v) + s.rest2 * g * g;
    m = adamw_store<M>(m1, uint32_t(random >> 16) & 0xffffu);
    v = adamw_store<M>(v1, uint32_t(random >> 32) & 0xffffu);
    return p - s.lr * (m1 * s.correction1 / (std::sqrt(v1 * s.correction2) + s.eps) + s.weight_decay * p);
}

// param, m, v, grad (count); master (count) or null; `first`: the index in the whole model of element 0; step (1).
template <class P, class G, class M> void adamw_update(Cpu, P* param, Acc<P>* master, M* m, M* v, const G* grad,
                                                       size_t count, size_t first, const AdamW& a,
                                                       const AdamWStep* step) {
    using A = std::conditional_t<(sizeof(P) == 8 || sizeof(G) == 8 || sizeof(M) == 8), double, float>;
    if (step->skip) return;
    REQUIRE(step->step >= 1, "the first update is step 1, where the bias correction starts");
    const AdamWScalars<A> s = adamw_scalars<A>(a, *step);
    const uint64_t stream = hash64(a.seed, uint64_t(step->step));
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
// x as it is stored, with the random bits as in stochastic_round; they must be 0 for a NaN, which is cut off then:
// arithmetic makes it 0x7fffffff here. An infinity is left by adding to it.
template <class S, int W> __device__ void adamw_store_pack(S* to, const float (&x)[W], const uint32_t (&random16)[W]) {
    if constexpr (std::is_same_v<S, bf16>) {
        Pack<bf16, W> packed;
        auto sum = [&](int j) { return __float_as_uint(x[j]) + random16[j]; };
        if constexpr (W == 1) packed.word[0] = sum(0) >> 16;
        else
#pragma unroll
            for (int j = 0; j < W; j += 2) packed.word[j / 2] = __byte_perm(sum(j), sum(j + 1), 0x7632);
        pack_store(to, packed);
    } else pack_store(to, x);
}

// W neighbours, the index in the model of the first being `index`. Root and quotient are approximate, to 2^-21 of the
// step.
template <bool with_master, int W, class P, class G, class M>
__device__ void adamw_pack(P* param, float* master, M* m, M* v, const G* grad, const AdamWScalars<float>& s,
                           uint64_t stream, uint64_t index) {
    constexpr bool needs_random = std::is_same_v<M, bf16> || (std::is_same_v<P, bf16> && !with_master);
    Pack<G, W> g = pack_load<W>(grad);
    Pack<M, W> old_m = pack_load<W>(m), old_v = pack_load<W>(v);
    Pack<std::conditional_t<with_master, float, P>, W> old_p;
    if constexpr (with_master) old_p = pack_load<W>(master);
    else old_p = pack_load<W>(param);
    float new_m[W], new_v[W], new_p[W];
    uint32_t random_p[W], random_m[W], random_v[W];
#pragma unroll
    for (int j = 0; j < W; j++) {
        const float gradient = g[j] * s.grad_scale;
        new_m[j] = s.beta1 * old_m[j] + s.rest1 * gradient;
        new_v[j] = s.beta2 * old_v[j] + s.rest2 * gradient * gradient;
        float root;
        asm("sqrt.approx.ftz.f32 %0, %1;" : "=f"(root) : "f"(new_v[j] * s.correction2));
        const float step = new_m[j] * s.correction1 * reciprocal_approximate(root + s.eps);
        new_p[j] = old_p[j] - s.lr * (step + s.weight_decay * old_p[j]);
        const uint64_t random = needs_random ? hash64(stream, index + j) : 0;
        const uint32_t not_nan = new_p[j] == new_p[j] ? 0xffffu : 0; // a NaN in m or v is one in p too
        random_p[j] = uint32_t(random) & not_nan, random_m[j] = uint32_t(random) >> 16 & not_nan;
        random_v[j] = uint32_t(random >> 32) & not_nan;
    }
    adamw_store_pack(m, new_m, random_m);
    adamw_store_pack(v, new_v, random_v);
    if constexpr (with_master) pack_store(master, new_p), pack_store(param, new_p);
    else adamw_store_pack(param, new_p, random_p);
}

// The threads that fit on the GPU at once share the parameters, W neighbours at a time, so that the widest type takes
// 16 bytes, or one where an address is not on 16 bytes; what is left of the last W goes to the grid's first thread. The
// scalars are computed once a block, in double. Bound by memory, 90 to 94% of a copy's bandwidth on H200; with
// everything in bf16 (14 bytes of traffic) the 75 instructions an element, 40 of them the hash, take nearly as long.
template <bool with_master, int W, class P, class G, class M> __global__ void __launch_bounds__(256)
    adamw_kernel(P* param, float* master, M* m, M* v, const G* grad, size_t count, size_t first, AdamW a,
                 const AdamWStep* step) {
    __shared__ AdamWScalars<float> shared;
    if (step->skip) return;
    if (threadIdx.x == 0) {
        if (step->step < 1) __trap(); // the first update is step 1, where the bias correction starts
        shared = adamw_scalars<float>(a, *step);
    }
    __syncthreads();
    const AdamWScalars<float> s = shared;
    const uint64_t stream = hash64(a.seed, uint64_t(step->step));
    const size_t thread = size_t(blockIdx.x) * blockDim.x + threadIdx.x, stride = size_t(gridDim.x) * blockDim.x * W;
    for (size_t i = thread * W; i + W <= count; i += stride)
        adamw_pack<with_master, W>(param + i, master + i, m + i, v + i, grad + i, s, stream, first + i);
    if (thread == 0)
        for (size_t i = count - count % W; i < count; i++)
            adamw_pack<with_master, 1>(param + i, master + i, m + i, v + i, grad + i, s, stream, first + i);
}

template <class P, class G, class M> void adamw_update(Gpu gpu, P* param, float* master, M* m, M* v, const G* grad,
                                                       size_t count, size_t first, const AdamW& a,
                                                       const AdamWStep* step) {
    constexpr unsigned threads = 256;
    if (count == 0) return;
    auto launch = [&](auto with_master, auto width) {
        constexpr int W = decltype(width)::value;
        auto kernel = adamw_kernel<decltype(with_master)::value, W, P, G, M>;
        const size_t enough = (count + threads * W - 1) / (threads * W);
        const unsigned blocks = unsigned(std::min<size_t>(enough, resident_blocks(gpu, kernel, threads)));
        kernel<<<blocks, threads, 0, gpu.stream>>>(param, master, m, v, grad, count, first, a, step);
    };
    auto launch_for = [&](auto with_master) {
        constexpr size_t widest = with_master.value ? 4 : std::max({sizeof(P), sizeof(G), sizeof(M)});
        const bool fit = packs_fit<P>(0, param, master, m, v, grad);
        if (fit) launch(with_master, std::integral_constant<int, int(16 / widest)>());
        else launch(with_master, std::integral_constant<int, 1>());
    };
    if (master) launch_for(std::true_type());
    else launch_for(std::false_type());
    CUDA_CHECK(cudaGetLastError());
}
#endif
