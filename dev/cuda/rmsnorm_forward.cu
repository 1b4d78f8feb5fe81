// RMSNorm's forward, one idea at a time: every version is checked against the CPU reference, then timed.
//
//     nvcc -std=c++20 -O3 -arch=sm_90 -Xcompiler=-fopenmp -I. dev/cuda/rmsnorm_forward.cu core/comm_serial.cpp
//     ./a.out
//
//     rstd_t = 1 / sqrt(mean_c in_tc^2 + eps)    out_tc = in_tc rstd_t weight_c        in, out (T, C); weight (C)
//
// A multiplication or two for each 4 bytes moved: the memory is the only bound, and a plain copy the best there is.
// The share of its speed, on an H200, T = 16384, C = 4096 (ec426ad):
//
//   1   5%  a thread a row                the lanes of a warp are a row apart: each access touches 32 lines
//   2  34%  a warp a row                  neighbouring lanes read neighbouring elements; sums by shuffles
//   3  34%  a block a row                 more threads a row: no gain, the loads of 2 bytes are the bound
//   4  83%  16 bytes a thread             an eighth of the load instructions
//   5  87%  the row waits in registers    in is read once; the second reading came from L1 and L2, so this is little
//   6  83%  a warp a row, in registers    no barrier, but 151 registers a thread leave few warps to hide the loads
//   7  79%  blocks that stay              weights and next row are fetched ahead, but a block's rows follow each other
//   8  86%  layers/rmsnorm.cuh            the trainer's: as 5, for every width and type
#include "../../core/kernel.h"
#include "../../layers/rmsnorm.cuh"
#include "../bench.h"

constexpr size_t T = 16384, C = 4096; // of LLaMA-2-7B
constexpr float eps = 1e-5f;
constexpr int W = 8; // bf16 in 16 bytes

__global__ void version1(bf16* out, float* rstd, const bf16* in, const bf16* weight) {
    const size_t t = blockIdx.x * size_t(blockDim.x) + threadIdx.x;
    if (t >= T) return;
    float squares = 0;
    for (size_t c = 0; c < C; c++) squares += float(in[t * C + c]) * float(in[t * C + c]);
    const float r = 1 / sqrtf(squares / float(C) + eps);
    for (size_t c = 0; c < C; c++) out[t * C + c] = float(in[t * C + c]) * r * float(weight[c]);
    rstd[t] = r;
}

__global__ void version2(bf16* out, float* rstd, const bf16* in, const bf16* weight) {
    const size_t t = (blockIdx.x * size_t(blockDim.x) + threadIdx.x) / 32, lane = threadIdx.x % 32;
    if (t >= T) return;
    float squares = 0;
    for (size_t c = lane; c < C; c += 32) squares += float(in[t * C + c]) * float(in[t * C + c]);
    const float r = 1 / sqrtf(warp_sum(squares) / float(C) + eps);
    for (size_t c = lane; c < C; c += 32) out[t * C + c] = float(in[t * C + c]) * r * float(weight[c]);
    if (lane == 0) rstd[t] = r;
}

__global__ void version3(bf16* out, float* rstd, const bf16* in, const bf16* weight) {
    __shared__ float slot[32]; // a sum of each warp
    const size_t t = blockIdx.x;
    float squares = 0;
    for (size_t c = threadIdx.x; c < C; c += blockDim.x) squares += float(in[t * C + c]) * float(in[t * C + c]);
    const float r = 1 / sqrtf(block_sum(squares, slot) / float(C) + eps);
    for (size_t c = threadIdx.x; c < C; c += blockDim.x) out[t * C + c] = float(in[t * C + c]) * r * float(weight[c]);
    if (threadIdx.x == 0) rstd[t] = r;
}

__device__ float sum_of_squares(const Pack<bf16, W>& x) {
    float sum = 0;
#pragma unroll
    for (int j = 0; j < W; j++) sum += x[j] * x[j];
    return sum;
}
__device__ void write_normed(bf16* out, const Pack<bf16, W>& x, float r, const Pack<bf16, W>& weight) {
    float y[W];
#pragma unroll
    for (int j = 0; j < W; j++) y[j] = x[j] * r * weight[j];
    pack_store(out, y);
}

__global__ void version4(bf16* out, float* rstd, const bf16* in, const bf16* weight) {
    __shared__ float slot[32];
    const size_t row = blockIdx.x * C;
    float squares = 0;
    for (size_t c = threadIdx.x * W; c < C; c += blockDim.x * W) squares += sum_of_squares(pack_load<W>(in + row + c));
    const float r = 1 / sqrtf(block_sum(squares, slot) / float(C) + eps);
    for (size_t c = threadIdx.x * W; c < C; c += blockDim.x * W)
        write_normed(out + row + c, pack_load<W>(in + row + c), r, pack_load<W>(weight + c));
    if (threadIdx.x == 0) rstd[blockIdx.x] = r;
}

// Arrays must be indexed by constants to become registers, so the number of packs a thread holds is a template's.
template <int threads> __global__ void version5(bf16* out, float* rstd, const bf16* in, const bf16* weight) {
    constexpr int packs = C / W / threads;
    __shared__ float slot[32];
    const size_t row = blockIdx.x * C, first = threadIdx.x * W;
    Pack<bf16, W> x[packs];
    float squares = 0;
#pragma unroll
    for (int i = 0; i < packs; i++) x[i] = pack_load<W>(in + row + first + i * threads * W);
#pragma unroll
    for (int i = 0; i < packs; i++) squares += sum_of_squares(x[i]);
    const float r = 1 / sqrtf(block_sum(squares, slot) / float(C) + eps);
#pragma unroll
    for (int i = 0; i < packs; i++) {
        const size_t c = first + i * threads * W;
        write_normed(out + row + c, x[i], r, pack_load<W>(weight + c));
    }
    if (threadIdx.x == 0) rstd[blockIdx.x] = r;
}

__global__ void version6(bf16* out, float* rstd, const bf16* in, const bf16* weight) {
    constexpr int packs = C / W / 32; // 16 of 4 registers
    const size_t t = (blockIdx.x * size_t(blockDim.x) + threadIdx.x) / 32, first = threadIdx.x % 32 * W;
    if (t >= T) return;
    Pack<bf16, W> x[packs];
    float squares = 0;
#pragma unroll
    for (int i = 0; i < packs; i++) x[i] = pack_load<W>(in + t * C + first + i * 32 * W);
#pragma unroll
    for (int i = 0; i < packs; i++) squares += sum_of_squares(x[i]);
    const float r = 1 / sqrtf(warp_sum(squares) / float(C) + eps);
#pragma unroll
    for (int i = 0; i < packs; i++) {
        const size_t c = first + i * 32 * W;
        write_normed(out + t * C + c, x[i], r, pack_load<W>(weight + c));
    }
    if (first == 0) rstd[t] = r;
}

// The next row is loaded before this one's sum is known, so that the barrier is waited for with loads in flight.
template <int threads> __global__ void __launch_bounds__(threads)
    version7(bf16* out, float* rstd, const bf16* in, const bf16* weight) {
    constexpr int packs = C / W / threads;
    __shared__ float slot[2][32]; // taking turns, so that one barrier a row is enough
    const size_t first = threadIdx.x * W;
    Pack<bf16, W> x[packs], next[packs], scale[packs];
#pragma unroll
    for (int i = 0; i < packs; i++) {
        scale[i] = pack_load<W>(weight + first + i * threads * W);
        x[i] = pack_load<W>(in + blockIdx.x * C + first + i * threads * W);
    }
    int turn = 0;
    for (size_t t = blockIdx.x; t < T; t += gridDim.x, turn ^= 1) {
        float squares = 0;
#pragma unroll
        for (int i = 0; i < packs; i++)
            if (t + gridDim.x < T) next[i] = pack_load<W>(in + (t + gridDim.x) * C + first + i * threads * W);
#pragma unroll
        for (int i = 0; i < packs; i++) squares += sum_of_squares(x[i]);
        const float r = 1 / sqrtf(block_sum(squares, slot[turn]) / float(C) + eps);
#pragma unroll
        for (int i = 0; i < packs; i++) write_normed(out + t * C + first + i * threads * W, x[i], r, scale[i]);
        if (threadIdx.x == 0) rstd[t] = r;
#pragma unroll
        for (int i = 0; i < packs; i++) x[i] = next[i];
    }
}

struct Buffers {
    bf16 *out, *in, *weight;
    float* rstd;
};

// Rounding to bf16 is off by at most 2^-8 of the value, the float sum of C squares by C 2^-24 of it, rstd by half that.
void check(Gpu gpu, const Buffers& b, const char* name) {
    constexpr size_t rows = 512, first = T - rows;
    std::vector<bf16> in(rows * C), weight(C), out(rows * C);
    std::vector<double> in_d(rows * C), weight_d(C), truth(rows * C), rstd(rows);
    copy_to_host(gpu, in.data(), b.in + first * C, in.size() * sizeof(bf16));
    copy_to_host(gpu, weight.data(), b.weight, C * sizeof(bf16));
    copy_to_host(gpu, out.data(), b.out + first * C, out.size() * sizeof(bf16));
    for (size_t i = 0; i < rows * C; i++) in_d[i] = float(in[i]);
    for (size_t c = 0; c < C; c++) weight_d[c] = float(weight[c]);
    rmsnorm_forward(Cpu(), truth.data(), rstd.data(), in_d.data(), weight_d.data(), rows, C, double(eps));
    for (size_t i = 0; i < rows * C; i++)
        if (!(std::fabs(float(out[i]) - truth[i]) <= (0x1p-8 + C * 0x1p-24) * std::fabs(truth[i])))
            fail("%s: row %zu, channel %zu is %g, should be %g", name, first + i / C, i % C, float(out[i]), truth[i]);
}

// Launches by each block size, checks, prints the best.
template <class F> void measure(Gpu gpu, const Buffers& b, const char* name, double ceiling,
                                std::initializer_list<unsigned> block_sizes, F launch) {
    double best = 1e30;
    unsigned best_size = 0;
    for (unsigned threads : block_sizes) {
        CUDA_CHECK(cudaMemsetAsync(b.out, 0xff, T * C * sizeof(bf16), gpu.stream)); // NaN
        launch(threads);
        CUDA_CHECK(cudaGetLastError());
        check(gpu, b, name);
        const double ms = bench_ms(gpu, [&] { launch(threads); });
        if (ms < best) best = ms, best_size = threads;
    }
    char label[80];
    snprintf(label, sizeof label, best_size ? "%s (%u)" : "%s", name, best_size);
    bench_row_bytes(label, best, 2.0 * T * C * sizeof(bf16), ceiling);
}

int main() {
    const Gpu gpu = gpu_open(0);
    const Buffers b = {bench_normal<bf16>(gpu, T * C, 1), bench_normal<bf16>(gpu, T * C, 2),
                       bench_normal<bf16>(gpu, C, 3), bench_normal<float>(gpu, T, 4)};
    const double ceiling = bench_copy_bandwidth(gpu);
    printf("RMSNorm forward, bf16, T = %zu, C = %zu, %s; in brackets the best block size\n", T, C, gpu.context->name);
    auto grid = [](size_t blocks) { return unsigned(blocks); };
    auto run = [&](auto kernel, unsigned blocks, unsigned threads) {
        kernel<<<blocks, threads, 0, gpu.stream>>>(b.out, b.rstd, b.in, b.weight);
    };
    measure(gpu, b, "1 a thread a row", ceiling, {32, 64, 128},
            [&](unsigned n) { run(version1, grid((T + n - 1) / n), n); });
    measure(gpu, b, "2 a warp a row", ceiling, {32, 64, 128, 256},
            [&](unsigned n) { run(version2, grid(T / (n / 32)), n); });
    measure(gpu, b, "3 a block a row", ceiling, {128, 256, 512, 1024}, [&](unsigned n) { run(version3, T, n); });
    measure(gpu, b, "4 16 bytes a thread", ceiling, {64, 128, 256, 512}, [&](unsigned n) { run(version4, T, n); });
    measure(gpu, b, "5 the row in registers", ceiling, {64, 128, 256, 512}, [&](unsigned n) {
        run(n == 64 ? version5<64> : n == 128 ? version5<128> : n == 256 ? version5<256> : version5<512>, T, n);
    });
    measure(gpu, b, "6 a warp a row, in registers", ceiling, {32, 64, 128, 256},
            [&](unsigned n) { run(version6, grid(T / (n / 32)), n); });
    measure(gpu, b, "7 blocks that stay", ceiling, {128, 256, 512}, [&](unsigned n) {
        auto kernel = n == 128 ? version7<128> : n == 256 ? version7<256> : version7<512>;
        run(kernel, resident_blocks(gpu, kernel, n), n);
    });
    measure(gpu, b, "8 layers/rmsnorm.cuh", ceiling, {0},
            [&](unsigned) { rmsnorm_forward(gpu, b.out, b.rstd, b.in, b.weight, T, C, double(eps)); });
}
