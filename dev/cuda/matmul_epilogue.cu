// A linear layer with bias and residual, one idea at a time: every version is checked against the CPU reference, then
// timed against cuBLASLt.
//
//     nvcc -std=c++20 -O3 -arch=sm_90 -Xcompiler=-fopenmp -I. dev/cuda/matmul_epilogue.cu
//         core/comm_serial.cpp -lcublasLt
//     ./a.out
//
//     out (T, N) = in (T, M) weight (N, M)^T + bias (N) + residual (T, N)          bf16, sums in fp32
//
// 2 T M N operations on few bytes: what counts is how often a loaded element is used before it is loaded again. TF/s on
// an H200, T = M = N = 4096 (ec426ad):
//
//   1  0.5  a thread a result         each operand comes from memory or cache for each multiplication
//   2   25  tiles in shared memory    128 x 128 results a block, 8 x 8 a thread in registers, by the fp32 units
//   3  371  tensor cores              128 x 256 results a block, mma.sync on 16 x 8 x 16; three stages of cp.async
//                                     fetch ahead; bias and residual by a kernel of their own
//   4  390  the same, fused           bias and residual are added to the sums while they are in registers
//   5  705  cuBLASLt, fused           layers/matmul_gpu.cuh, tuned. It has wgmma and TMA, which 4 does without
#include "../../layers/matmul.cuh"
#include "../bench.h"

constexpr size_t T = 4096, M = 4096, N = 4096;

struct Layer {
    bf16* out;
    const bf16 *in, *weight, *bias, *residual;
};

__global__ void version1(Layer l) {
    const size_t n = blockIdx.x * size_t(blockDim.x) + threadIdx.x, t = blockIdx.y * size_t(blockDim.y) + threadIdx.y;
    float sum = 0;
    for (size_t m = 0; m < M; m++) sum += float(l.in[t * M + m]) * float(l.weight[n * M + m]);
    l.out[t * N + n] = sum + float(l.bias[n]) + float(l.residual[t * N + n]);
}

// A block of 256 threads has 128 rows and columns of the result and walks along M, 16 at a time. The operands lie
// transposed in shared memory, so that a thread's 8 rows and 8 columns of one step are four loads of 16 bytes for 64
// multiplications. Four columns of padding spread the transposing stores over the banks.
__global__ void __launch_bounds__(256) version2(Layer l) {
    constexpr int tile = 128, step = 16;
    __shared__ alignas(16) float a[step][tile + 4], b[step][tile + 4];
    const size_t t0 = blockIdx.y * size_t(tile), n0 = blockIdx.x * size_t(tile);
    const int row = threadIdx.x / 16 * 8, column = threadIdx.x % 16 * 8;     // of this thread's results
    const int load_row = threadIdx.x / 2, load_column = threadIdx.x % 2 * 8; // of what it loads
    float sum[8][8] = {};
    for (size_t m = 0; m < M; m += step) {
        for (int j = 0; j < 8; j++) {
            a[load_column + j][load_row] = l.in[(t0 + load_row) * M + m + load_column + j];
            b[load_column + j][load_row] = l.weight[(n0 + load_row) * M + m + load_column + j];
        }
        __syncthreads();
#pragma unroll
        for (int k = 0; k < step; k++) {
            float x[8], y[8];
#pragma unroll
            for (int j = 0; j < 8; j++) x[j] = a[k][row + j], y[j] = b[k][column + j];
#pragma unroll
            for (int i = 0; i < 64; i++) sum[i / 8][i % 8] += x[i / 8] * y[i % 8];
        }
        __syncthreads();
    }
    for (int i = 0; i < 8; i++)
        for (int j = 0; j < 8; j++) {
            const size_t t = t0 + row + i, n = n0 + column + j;
            l.out[t * N + n] = sum[i][j] + float(l.bias[n]) + float(l.residual[t * N + n]);
        }
}

// The pieces of version 3. A tile in shared memory has rows of 64 elements, 128 bytes: eight pieces of 16 bytes, piece
// p of row r at place p ^ (r % 8). Eight rows' pieces of the same number then lie in different banks, for the writing
// cp.async as for ldmatrix.
constexpr unsigned tile_t = 128, tile_n = 256, tile_m = 64, stages = 3, threads = 256;
constexpr unsigned stage_bytes = (tile_t + tile_n) * tile_m * sizeof(bf16);

__device__ unsigned place(unsigned row, unsigned piece) { return row * 128 + (piece ^ row % 8) * 16; }

// Rows of M elements in memory: the 256 threads take 32 rows at a time, so a thread's pieces lie at constant distances.
template <unsigned rows> __device__ void fetch(unsigned tile, const bf16* from) {
    const unsigned row = threadIdx.x / 8, piece = threadIdx.x % 8;
#pragma unroll
    for (unsigned i = 0; i < rows / 32; i++)
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(tile + place(row, piece) + i * 32 * 128),
                     "l"(from + row * M + piece * 8 + i * 32 * M));
}
__device__ void load_four(uint32_t (&x)[4], unsigned address) { // 8 x 8 matrices, one a register
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
                 : "r"(address));
}
__device__ void multiply(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) { // c(16, 8) += a b(16, 8)
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// A block of 8 warps has 128 rows and 256 columns of the result, a warp 64 by 64 of them, in 128 registers a thread.
// Blocks that run together share rows and columns: 8 blocks down, then the next column of blocks, so that what they
// load meets in L2.
template <bool fused> __global__ void __launch_bounds__(threads, 1) version3(Layer l) {
    extern __shared__ __align__(128) uint8_t shared[];
    const unsigned base = unsigned(__cvta_generic_to_shared(shared));
    constexpr unsigned across = N / tile_n, group = 8;
    const unsigned in_group = blockIdx.x % (group * across);
    const size_t t0 = (blockIdx.x / (group * across) * group + in_group % group) * size_t(tile_t);
    const size_t n0 = in_group / group * size_t(tile_n);
    const unsigned lane = threadIdx.x % 32, warp = threadIdx.x / 32, row0 = warp / 4 * 64, column0 = warp % 4 * 64;

    auto fetch_stage = [&](unsigned step) {
        const unsigned a = base + step % stages * stage_bytes, b = a + tile_t * 128;
        if (step < M / tile_m) {
            fetch<tile_t>(a, l.in + t0 * M + step * tile_m);
            fetch<tile_n>(b, l.weight + n0 * M + step * tile_m);
        }
        asm volatile("cp.async.commit_group;"); // an empty group too: the count of groups is the count of steps
    };
    // The operands of one k, 16 wide, in registers; two sets take turns, so that one loads while the other multiplies.
    uint32_t a[2][4][4], b[2][4][4];
    auto load_operands = [&](unsigned step, unsigned k) {
        const unsigned a_tile = base + step % stages * stage_bytes, b_tile = a_tile + tile_t * 128;
#pragma unroll
        for (unsigned i = 0; i < 4; i++) {
            const unsigned row = i * 16 + lane % 16, column = i * 16 + lane % 8 + lane / 16 * 8;
            load_four(a[k % 2][i], a_tile + place(row0 + row, 2 * k + lane / 16));
            load_four(b[k % 2][i], b_tile + place(column0 + column, 2 * k + lane / 8 % 2));
        }
    };
    auto next_stage = [&] { // the next step's stage has come for all threads, and none still reads this one's
        asm volatile("cp.async.wait_group %0;" ::"n"(stages - 2));
        __syncthreads();
    };
    for (unsigned step = 0; step < stages - 1; step++) fetch_stage(step);
    next_stage();
    load_operands(0, 0);

    float sum[4][8][4] = {}; // 16 rows, 8 columns, what one mma leaves in a thread
    constexpr unsigned last = tile_m / 16 - 1;
    for (unsigned step = 0; step < M / tile_m; step++) {
#pragma unroll
        for (unsigned k = 0; k <= last; k++) {
            if (k == last) next_stage();
            load_operands(k == last ? step + 1 : step, (k + 1) % (last + 1));
            if (k == 0) fetch_stage(step + stages - 1);
#pragma unroll
            for (int i = 0; i < 32; i++)
                multiply(sum[i / 8][i % 8], a[k % 2][i / 8], b[k % 2][i % 8 / 2][i % 2 * 2],
                         b[k % 2][i % 8 / 2][i % 2 * 2 + 1]);
        }
    }

    // A thread has two neighbouring columns of two rows from each mma.
#pragma unroll
    for (int i = 0; i < 64; i++) {
        const float* s = &sum[i / 16][i / 2 % 8][i % 2 * 2];
        const size_t t = t0 + row0 + i / 16 * 16 + i % 2 * 8 + lane / 4,
                     n = n0 + column0 + i / 2 % 8 * 8 + lane % 4 * 2;
        struct alignas(4) Pair {
            bf16 x, y;
        } add[2];
        float x = s[0], y = s[1];
        if (fused) {
            add[0] = *(const Pair*)(l.bias + n), add[1] = *(const Pair*)(l.residual + t * N + n);
            x += float(add[0].x) + float(add[1].x), y += float(add[0].y) + float(add[1].y);
        }
        *(Pair*)(l.out + t * N + n) = {bf16(x), bf16(y)};
    }
}

// out += bias + residual, where a product without them has been rounded already.
__global__ void add_kernel(Layer l) {
    for (size_t i = blockIdx.x * size_t(blockDim.x) + threadIdx.x; i < T * N; i += size_t(gridDim.x) * blockDim.x)
        l.out[i] = float(l.out[i]) + float(l.bias[i % N]) + float(l.residual[i]);
}

// The last rows against the reference in double: twice the error of the reference in bf16, and twice half an ulp more
// for the sum that version 3 rounds once more than the others.
void check(Gpu gpu, const Layer& l, const char* name) {
    constexpr size_t rows = 128, first = T - rows;
    static std::vector<double> truth;
    static double allowed = 0, largest = 0;
    std::vector<bf16> out(rows * N);
    if (truth.empty()) {
        std::vector<bf16> in(rows * M), weight(N * M), bias(N), residual(rows * N);
        copy_to_host(gpu, in.data(), l.in + first * M, in.size() * sizeof(bf16));
        copy_to_host(gpu, weight.data(), l.weight, weight.size() * sizeof(bf16));
        copy_to_host(gpu, bias.data(), l.bias, bias.size() * sizeof(bf16));
        copy_to_host(gpu, residual.data(), l.residual + first * N, residual.size() * sizeof(bf16));
        auto widened = [](const std::vector<bf16>& x) {
            std::vector<double> y(x.size());
            for (size_t i = 0; i < x.size(); i++) y[i] = float(x[i]);
            return y;
        };
        std::vector<double> in_d = widened(in), weight_d = widened(weight), bias_d = widened(bias);
        truth = widened(residual);
        matmul_forward(Cpu(), truth.data(), in_d.data(), weight_d.data(), bias_d.data(), truth.data(), rows, M, N);
        matmul_forward(Cpu(), out.data(), in.data(), weight.data(), bias.data(), residual.data(), rows, M, N);
        for (size_t i = 0; i < out.size(); i++) {
            allowed = std::max(allowed, 2 * std::fabs(float(out[i]) - truth[i]));
            largest = std::max(largest, std::fabs(truth[i]));
        }
        allowed += largest * 0x1p-7;
    }
    copy_to_host(gpu, out.data(), l.out + first * N, out.size() * sizeof(bf16));
    for (size_t i = 0; i < out.size(); i++)
        if (!(std::fabs(float(out[i]) - truth[i]) <= allowed))
            fail("%s: row %zu, column %zu is %g, should be %g", name, first + i / N, i % N, float(out[i]), truth[i]);
}

int main() {
    const Gpu gpu = gpu_open(0);
    const Layer l = {bench_normal<bf16>(gpu, T * N, 1), bench_normal<bf16>(gpu, T * M, 2),
                     bench_normal<bf16>(gpu, N * M, 3, 1 / 64.f), bench_normal<bf16>(gpu, N, 4),
                     bench_normal<bf16>(gpu, T * N, 5)};
    const double flops = 2.0 * T * M * N;
    auto product = [&] { matmul_forward(gpu, l.out, l.in, l.weight, l.bias, l.residual, T, M, N); };
    matmul_tune(gpu, product);
    std::vector<std::pair<const char*, double>> rows;
    printf("Linear layer with bias and residual, bf16, T = %zu, M = %zu, N = %zu, %s\n", T, M, N, gpu.context->name);
    auto measure = [&](const char* name, auto launch, int rounds = 201) {
        CUDA_CHECK(cudaMemsetAsync(l.out, 0xff, T * N * sizeof(bf16), gpu.stream)); // NaN
        launch();
        CUDA_CHECK(cudaGetLastError());
        check(gpu, l, name);
        rows.push_back({name, bench_ms(gpu, launch, rounds)});
    };
    for (auto kernel : {version3<false>, version3<true>})
        CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, stages * stage_bytes));
    constexpr unsigned blocks = T / tile_t * (N / tile_n);
    static_assert(T % (8 * tile_t) == 0 && N % tile_n == 0 && M % tile_m == 0, "the kernels take whole tiles only");
    auto version1_launch = [&] { version1<<<dim3(N / 32, T / 8), dim3(32, 8), 0, gpu.stream>>>(l); };
    measure("1 a thread a result", version1_launch, 3);
    measure(
        "2 tiles in shared memory", [&] { version2<<<dim3(N / 128, T / 128), 256, 0, gpu.stream>>>(l); }, 11);
    measure("3 tensor cores, then a kernel to add", [&] {
        version3<false><<<blocks, threads, stages * stage_bytes, gpu.stream>>>(l);
        add_kernel<<<gpu.context->sms * 8, 256, 0, gpu.stream>>>(l);
    });
    measure("4 tensor cores, fused", [&] { version3<true><<<blocks, threads, stages * stage_bytes, gpu.stream>>>(l); });
    measure("5 cuBLASLt, fused", product);
    for (auto [name, ms] : rows) bench_row_flops(name, ms, flops, flops / (rows.back().second * 1e-3), "cuBLASLt");
}
