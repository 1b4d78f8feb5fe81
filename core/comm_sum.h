// Sums over ranks on a GPU, of data that have come.
#pragma once
#include "kernel.h"

// data (count) = the sum over ranks, in their order: this rank's values stand in data, the others' in `received`, one
// after the other without this rank, `stride` elements apart. Bound by memory.
template <class E, int W> __global__ void __launch_bounds__(256)
    sum_in_order_kernel(E* data, const E* received, size_t stride, size_t count, int rank, int size) {
    using A = std::conditional_t<std::is_integral_v<E>, E, Acc<E>>;
    const size_t i = (blockIdx.x * size_t(256) + threadIdx.x) * W;
    if (i >= count) return;
    A sum[W];
    for (int r = 0; r < size; r++) {
        const E* from = (r == rank ? data : received + (r - (r > rank)) * stride) + i;
        if constexpr (W == 1) {
            sum[0] = r == 0 ? A(*from) : A(sum[0] + A(*from));
        } else {
            const Pack<E, W> x = pack_load<W>(from);
#pragma unroll
            for (int j = 0; j < W; j++) sum[j] = r == 0 ? x[j] : sum[j] + x[j];
        }
    }
    if constexpr (W == 1) data[i] = E(sum[0]);
    else pack_store<E, W>(data + i, sum);
}

template <class E>
void sum_in_order(Gpu gpu, E* data, const E* received, size_t stride, size_t count, int rank, int size) {
    if (count == 0) return;
    auto launch = [&]<int W>() {
        sum_in_order_kernel<E, W>
            <<<grid_blocks((count / W + 255) / 256), 256, 0, gpu.stream>>>(data, received, stride, count, rank, size);
        CUDA_CHECK(cudaGetLastError());
    };
    if constexpr (std::is_same_v<E, bf16> || std::is_same_v<E, float>)
        if (packs_fit<E>(count, data, received)) return launch.template operator()<pack_width<E>>();
    launch.template operator()<1>();
}
