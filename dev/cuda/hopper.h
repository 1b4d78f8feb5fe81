// What the ladders of attention on Hopper share in their kernels.
#pragma once
#include "attention.h"
#include "../../core/ptx.h"

// A block's shared memory, where swizzled tiles may begin.
template <class X> __device__ __forceinline__ X& shared_memory() {
    extern __shared__ __align__(1024) uint8_t memory[];
    return *(X*)memory;
}

// `rows` tokens of one head, `apart` elements from one to the next, by all threads of the block, to where the copy
// engine would put them: the halves of 64 columns one after the other, in each row of 128 bytes the chunks of 16
// permuted.
template <int rows, int threads>
__device__ __forceinline__ void put_tile(bf16* tile, const bf16* from, size_t apart = stride) {
#pragma unroll
    for (int i = 0; i < rows * D / 8; i += threads) {
        const int row = (i + threadIdx.x) / 16, chunk = threadIdx.x % 16, half = chunk / 8;
        const int place = (half * rows + row) * 8 + (chunk % 8 ^ row % 8);
        ((uint4*)tile)[place] = ((const uint4*)(from + row * apart))[chunk];
    }
}

// By a whole warp: its part of what the barrier stands for is done.
__device__ __forceinline__ void tell(ptx::Barrier* bar, int lane) {
    if (lane == 0) ptx::barrier_arrive(bar);
}
