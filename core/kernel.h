// What kernels share: accesses of 16 bytes, bf16 by pairs, sums over warps and blocks, the size of a grid.
#pragma once
#include "device.h"

#ifdef __CUDACC__
// Elements in 16 bytes, the widest access of a thread.
template <class E> constexpr int pack_width = 16 / int(sizeof(E));

// W neighbouring elements as they stand in memory, converted to float where they are used: a row that waits in
// registers takes half as many of them in bf16. Their bytes are 8 or a multiple of 16, or W is 1 where rows do not
// start on 16 bytes. Beyond 16 the accesses of a warp have gaps, which stores do not bear well: where types mix, W is
// best the widest type's pack_width.
template <class E, int W> struct alignas(W == 1 ? 4 : W * sizeof(E) == 8 ? 8 : 16) Pack {
    static_assert(std::is_same_v<E, float> || std::is_same_v<E, bf16>);
    static constexpr int words = (W * int(sizeof(E)) + 3) / 4;
    uint32_t word[words];

    __device__ float operator[](int i) const {
        if constexpr (sizeof(E) == 4) return __uint_as_float(word[i]);
        else return __uint_as_float(i % 2 ? word[i / 2] & 0xffff0000u : word[i / 2] << 16);
    }
};

// Once: what is not read again soon leaves the caches to the rest (ld.cs, st.cs).
enum class Access { plain, once };

template <int W, Access access = Access::plain, class E> __device__ Pack<E, W> pack_load(const E* from) {
    auto load = [](auto* p) {
        if constexpr (access == Access::once) return __ldcs(p);
        else return *p;
    };
    Pack<E, W> x;
    if constexpr (W == 1) {
        if constexpr (sizeof(E) == 4) x.word[0] = load((const uint32_t*)from);
        else x.word[0] = load((const uint16_t*)from);
    } else if constexpr (x.words == 2) {
        uint2 v = load((const uint2*)from);
        x.word[0] = v.x, x.word[1] = v.y;
    } else {
        static_assert(W % pack_width<E> == 0);
#pragma unroll
        for (int i = 0; i < x.words; i += 4) {
            uint4 v = load((const uint4*)(from) + i / 4);
            x.word[i] = v.x, x.word[i + 1] = v.y, x.word[i + 2] = v.z, x.word[i + 3] = v.w;
        }
    }
    return x;
}

template <class E, int W, Access access = Access::plain> __device__ void pack_store(E* to, const Pack<E, W>& x) {
    auto store = [](auto* p, auto value) {
        if constexpr (access == Access::once) __stcs(p, value);
        else *p = value;
    };
    if constexpr (W == 1) {
        if constexpr (sizeof(E) == 4) store((uint32_t*)to, x.word[0]);
        else store((uint16_t*)to, uint16_t(x.word[0]));
    } else if constexpr (x.words == 2) {
        store((uint2*)to, make_uint2(x.word[0], x.word[1]));
    } else {
#pragma unroll
        for (int i = 0; i < x.words; i += 4)
            store((uint4*)to + i / 4, make_uint4(x.word[i], x.word[i + 1], x.word[i + 2], x.word[i + 3]));
    }
}

// Both to the nearest bf16, ties to even: one instruction, where the type's own conversion takes six each.
__device__ inline uint32_t bf16_pair(float low, float high) {
    uint32_t pair;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
}

template <class E, int W> __device__ Pack<E, W> pack_from(const float (&x)[W]) {
    Pack<E, W> packed;
    if constexpr (sizeof(E) == 4) {
#pragma unroll
        for (int i = 0; i < W; i++) packed.word[i] = __float_as_uint(x[i]);
    } else if constexpr (W == 1) {
        packed.word[0] = bf16_pair(x[0], 0);
    } else {
#pragma unroll
        for (int i = 0; i < W; i += 2) packed.word[i / 2] = bf16_pair(x[i], x[i + 1]);
    }
    return packed;
}
template <class E, int W, Access access = Access::plain> __device__ void pack_store(E* to, const float (&x)[W]) {
    pack_store<E, W, access>(to, pack_from<E, W>(x));
}

// Into shared memory, without waiting unless W is 1. The thread's copies since the last commit become a group; wait
// until at most N groups are still on their way. What a thread has copied itself it may then read without a barrier.
template <class E, int W> __device__ void pack_copy_async(Pack<E, W>* to, const E* from) {
    if constexpr (W == 1) *to = pack_load<1>(from);
    else
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(unsigned(__cvta_generic_to_shared(to))),
                     "l"(from)
                     : "memory");
}
__device__ inline void copies_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int N> __device__ void copies_wait() { asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory"); }

// Whether rows of `width` elements at these addresses (null: absent) can be taken in packs.
template <class E, class... P> bool packs_fit(size_t width, const P*... row) {
    return width % pack_width<E> == 0 && ((uintptr_t(row) % 16 == 0) && ...);
}

// One instruction of the special function units each: e^x to 2^-22 and what rounding x / ln 2 makes of it (|x| 2^-24),
// 1 / x to 2^-23. Results below 2^-126 are 0.
__device__ inline float exp_approximate(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x * 1.44269504088896341f));
    return y;
}
__device__ inline float reciprocal_approximate(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
// e^x, exact enough for what is stored as E.
template <class E> __device__ float exp_for(float x) {
    if constexpr (sizeof(E) == 2) return exp_approximate(x);
    else return expf(x);
}

// Every lane gets the sum of the warp's values, or the largest that is not NaN.
template <class A> __device__ A warp_sum(A x) {
#pragma unroll
    for (int lane = 16; lane > 0; lane /= 2) x += __shfl_xor_sync(~0u, x, lane);
    return x;
}
__device__ inline float warp_max(float x) {
#pragma unroll
    for (int lane = 16; lane > 0; lane /= 2) x = fmaxf(x, __shfl_xor_sync(~0u, x, lane));
    return x;
}

// Every thread gets the sum over the block, of whole warps, always in the same order. `slot` is shared memory that no
// warp still reads from a sum before: let two take turns.
template <class A> __device__ A block_sum(A x, A (&slot)[32]) {
    x = warp_sum(x);
    const unsigned warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    if (lane == 0) slot[warp] = x;
    __syncthreads();
    return warp_sum(lane < blockDim.x / 32 ? slot[lane] : A(0));
}

// As many blocks as the GPU holds at once; `shared`: bytes of dynamic shared memory a block.
template <class Kernel> unsigned resident_blocks(Gpu gpu, Kernel kernel, unsigned threads, size_t shared = 0) {
    int each = 0;
    CUDA_CHECK(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&each, kernel, int(threads), shared));
    return unsigned(each * gpu.context->sms);
}

// Threads, in whole warps, for `work` pieces of which each thread takes up to `each`.
inline unsigned block_threads(size_t work, unsigned each, unsigned most) {
    const size_t warps = (work + 32 * each - 1) / (32 * each);
    return warps * 32 < most ? unsigned(warps * 32) : most;
}

inline unsigned grid_blocks(size_t blocks) {
    REQUIRE(blocks < size_t(1) << 31, "one launch takes fewer than 2^31 blocks: take fewer tokens at once");
    return unsigned(blocks);
}
#endif
