// Attention's forward, one idea at a time: every version is checked against double on sampled queries, then timed.
//
//     nvcc -std=c++20 -O3 -arch=sm_90 -Xcompiler=-fopenmp -I. dev/cuda/attention_forward.cu core/comm_serial.cpp
//     ./a.out
//
//     S = Q K^T / sqrt(D) where key <= query, else -inf    P = exp(S - LSE)    O = P V    qkv (T, 3, H, D), O (T, H, D)
//
// 4 D multiply-adds' operations a pair, and of the memory only qkv once and O once: the arithmetic is the bound, if
// everything between stays on the chip. That is what the online softmax is for: with the running state m (largest
// score), l (sum of exp(S - m)) and O (not yet divided by l), keys can come in any number of portions.
//
//   1   a thread a query            its state in registers; all threads of a warp read the same key
//   2   a tile of 64 x 64 a block   Q, K, V and P in shared memory, 4 x 4 pairs a thread: each value is used 4 times
//   3   tensor cores                a warp 16 queries: S, P and O never leave the registers, as P's fragment is S's
//   4   layers/attention_mma.cuh    the trainer's: 32 queries a warp, so that each key from shared memory serves twice
//                                   as many; keys copied a step ahead; exponentials between the products; the state
//                                   multiplied only when the maximum moves far; a mask only where it is needed
//
// On an H200 they reach 0.7, 8.6, 251 and 278 TF/s (4096 tokens, causal, 32 heads of 128; ec426ad). attention_hopper.cu
// goes on from there. Both are the forward's: the backward is explained in layers/attention_mma.cuh and, Hopper's, in
// attention_backward.cu.
#include "attention.h"

constexpr int T = 4096;
constexpr int queries = 64, keys = 64;               // of a tile, in versions 2 and 3
__device__ const float scale = 0.08838834764831845f; // 1 / sqrt(D)

__global__ void __launch_bounds__(64) version1(bf16* out, const bf16* qkv) {
    const int t = blockIdx.x * blockDim.x + threadIdx.x, head = blockIdx.y;
    if (t >= T) return;
    const bf16 *q = qkv + t * stride + head * D, *k = qkv + (H + head) * D, *v = k + H * D;
    float o[D] = {}, m = -INFINITY, l = 0;
    for (int key = 0; key <= t; key++, k += stride, v += stride) {
        float s = 0;
        for (int d = 0; d < D; d++) s += float(q[d]) * float(k[d]);
        const float old = m;
        m = fmaxf(m, s * scale);
        const float factor = expf(old - m), p = expf(s * scale - m);
        l = l * factor + p;
#pragma unroll
        for (int d = 0; d < D; d++) o[d] = o[d] * factor + p * float(v[d]);
    }
#pragma unroll
    for (int d = 0; d < D; d++) out[(size_t(t) * H + head) * D + d] = o[d] / l;
}

// Rows as floats, four apart from a multiple of 32: 8 rows read at the same column share no bank.
struct FloatTiles {
    static constexpr int row = D + 4;
    float q[queries * row], k[keys * row], v[keys * row], p[queries * (keys + 1)];
    __device__ static void load(float* tile, const bf16* from) {
        for (int i = threadIdx.x; i < 64 * D; i += blockDim.x) tile[i / D * row + i % D] = from[i / D * stride + i % D];
    }
};

// Thread (y, x) of 16 by 16 has the queries y + 16 i, of them the keys x + 16 j and the channels 4 x + 64 j + 0..3.
__global__ void __launch_bounds__(256) version2(bf16* out, const bf16* qkv) {
    extern __shared__ __align__(1024) uint8_t memory[];
    FloatTiles& tiles = *(FloatTiles*)memory;
    const int first = (gridDim.x - 1 - blockIdx.x) * queries, head = blockIdx.y; // the long tiles first
    const int x = threadIdx.x % 16, y = threadIdx.x / 16;
    tiles.load(tiles.q, qkv + first * stride + head * D);
    float o[4][2][4] = {}, m[4], l[4];
    for (int i = 0; i < 4; i++) m[i] = -INFINITY, l[i] = 0;
    for (int begin = 0; begin <= first; begin += keys) {
        __syncthreads();
        tiles.load(tiles.k, qkv + begin * stride + (H + head) * D);
        tiles.load(tiles.v, qkv + begin * stride + (2 * H + head) * D);
        __syncthreads();
        float s[4][4] = {};
        for (int d = 0; d < D; d += 4)
#pragma unroll
            for (int i = 0; i < 4; i++)
#pragma unroll
                for (int j = 0; j < 4; j++) {
                    const float4 a = *(const float4*)&tiles.q[(y + 16 * i) * tiles.row + d];
                    const float4 b = *(const float4*)&tiles.k[(x + 16 * j) * tiles.row + d];
                    s[i][j] += a.x * b.x + a.y * b.y + a.z * b.z + a.w * b.w;
                }
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const float old = m[i];
#pragma unroll
            for (int j = 0; j < 4; j++) {
                s[i][j] = begin + x + 16 * j <= first + y + 16 * i ? s[i][j] * scale : -INFINITY;
                m[i] = fmaxf(m[i], s[i][j]);
            }
#pragma unroll
            for (int other = 8; other > 0; other /= 2) m[i] = fmaxf(m[i], __shfl_xor_sync(~0u, m[i], other));
            const float factor = expf(old - m[i]);
            l[i] *= factor; // of this thread's keys alone
#pragma unroll
            for (int j = 0; j < 4; j++) {
                const float p = expf(s[i][j] - m[i]);
                l[i] += p, tiles.p[(y + 16 * i) * (keys + 1) + x + 16 * j] = p;
                for (int c = 0; c < 2; c++) o[i][c][j] *= factor;
            }
        }
        __syncthreads();
        for (int key = 0; key < keys; key++)
#pragma unroll
            for (int c = 0; c < 2; c++) {
                const float4 v = *(const float4*)&tiles.v[key * tiles.row + 4 * x + 64 * c];
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    const float p = tiles.p[(y + 16 * i) * (keys + 1) + key];
                    o[i][c][0] += p * v.x, o[i][c][1] += p * v.y, o[i][c][2] += p * v.z, o[i][c][3] += p * v.w;
                }
            }
    }
    for (int i = 0; i < 4; i++) {
        for (int other = 8; other > 0; other /= 2) l[i] += __shfl_xor_sync(~0u, l[i], other);
        for (int c = 0; c < 2; c++)
            for (int j = 0; j < 4; j++)
                out[(size_t(first + y + 16 * i) * H + head) * D + 4 * x + 64 * c + j] = o[i][c][j] / l[i];
    }
}

struct Bf16Tiles {
    bf16 q[queries * D], k[keys * D], v[keys * D]; // chunks of 16 bytes permuted, see tile_address
};

// Warp w has the queries 16 w on; a lane holds rows lane / 4 and lane / 4 + 8, of them every fourth pair of columns.
__global__ void __launch_bounds__(128) version3(bf16* out, const bf16* qkv) {
    extern __shared__ __align__(1024) uint8_t memory[];
    Bf16Tiles& tiles = *(Bf16Tiles*)memory;
    const int first = (gridDim.x - 1 - blockIdx.x) * queries, head = blockIdx.y;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, row = warp * 16 + lane / 4;
    const TileCopy<D, 128> copy;
    copy.tile<queries>(shared_address(tiles.q), qkv + first * stride + head * D, stride, queries);
    float o[1][D / 8][4] = {}, m[2] = {-INFINITY, -INFINITY}, l[2] = {};
    for (int begin = 0; begin <= first; begin += keys) {
        __syncthreads();
        const bf16* key = qkv + begin * stride + (H + head) * D;
        copy.tile<keys>(shared_address(tiles.k), key, stride, keys);
        copy.tile<keys>(shared_address(tiles.v), key + H * D, stride, keys);
        copies_commit(), copies_wait<0>();
        __syncthreads();
        float s[1][keys / 8][4] = {};
        scores<D>(s, shared_address(tiles.q) + warp * 16 * 2 * D + lane_along<D>(lane),
                  shared_address(tiles.k) + lane_across<D>(lane), nothing_aside);
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const float old = m[half];
#pragma unroll
            for (int i = 0; i < keys / 4; i++) {
                float& x = s[0][i / 2][2 * half + i % 2];
                const int column = i / 2 * 8 + lane % 4 * 2 + i % 2;
                x = begin + column <= first + row + 8 * half ? x * scale : -INFINITY;
                m[half] = fmaxf(m[half], x);
            }
            m[half] = fmaxf(m[half], __shfl_xor_sync(~0u, m[half], 1)); // the row's other lanes
            m[half] = fmaxf(m[half], __shfl_xor_sync(~0u, m[half], 2));
            const float factor = exp_approximate(old - m[half]);
            l[half] *= factor;
#pragma unroll
            for (int i = 0; i < D / 4; i++) o[0][i / 2][2 * half + i % 2] *= factor;
#pragma unroll
            for (int i = 0; i < keys / 4; i++) {
                float& x = s[0][i / 2][2 * half + i % 2];
                x = exp_approximate(x - m[half]), l[half] += x;
            }
        }
        multiply_chunks<D, 1, keys / 16>(
            o, shared_address(tiles.v) + lane_along<D>(lane),
            [&](int chunk, int, int r) {
                const float* p = &s[0][2 * chunk + r / 2][r % 2 * 2];
                return bf16_pair(p[0], p[1]);
            },
            no_preparation);
    }
#pragma unroll
    for (int half = 0; half < 2; half++) {
        l[half] += __shfl_xor_sync(~0u, l[half], 1), l[half] += __shfl_xor_sync(~0u, l[half], 2);
        bf16* to = out + (size_t(first + row + 8 * half) * H + head) * D + lane % 4 * 2;
#pragma unroll
        for (int n = 0; n < D / 8; n++)
            *(uint32_t*)(to + n * 8) = bf16_pair(o[0][n][2 * half] / l[half], o[0][n][2 * half + 1] / l[half]);
    }
}

int main() {
    static_assert(T % queries == 0 && H > 0);
    Ladder ladder(T);
    const Gpu gpu = ladder.gpu;
    bf16 *const out = ladder.out, *const qkv = ladder.qkv;
    allow_shared_memory(gpu, version2, sizeof(FloatTiles)), allow_shared_memory(gpu, version3, sizeof(Bf16Tiles));
    const dim3 grid(T / queries, H);
    ladder.run("1 a thread a query", [&] { version1<<<dim3(T / 64, H), 64, 0, gpu.stream>>>(out, qkv); });
    ladder.run("2 tiles in shared memory", [&] { version2<<<grid, 256, sizeof(FloatTiles), gpu.stream>>>(out, qkv); });
    ladder.run("3 tensor cores", [&] { version3<<<grid, 128, sizeof(Bf16Tiles), gpu.stream>>>(out, qkv); });
    const AttentionForward<bf16> arguments = ladder.trainer(attention_mma_tiles(D));
    ladder.run("4 layers/attention_mma.cuh", [&] { attention_mma_forward(gpu, arguments); });
    return ladder.right ? 0 : 1;
}
