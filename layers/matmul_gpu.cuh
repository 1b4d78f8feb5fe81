// The products of the linear layers (layers/matmul.cuh) on the GPU, by cuBLASLt, and the choice of its algorithms.
//
// Bias and residual, or the old gradient, are added in its epilogue: a sum is formed in fp32 (of float products without
// TF32) and rounded once. cuBLASLt counts as Fortran does: a matrix (rows, columns) here is its (columns, rows), so
// that the operands change places:
//
//     forward           out (N, T)      = weight (M, N)^T in (M, T)
//     backward_input    din (M, T)      = weight (M, N) dout (N, T)
//     backward_weight   dweight (M, N) += in (M, T) dout (N, T)^T
//
// Measured on an H200, cublasLt 13.1.1, bf16, the fifteen products of LLaMA-2-7B's layers and head at T = 16384 (head
// 2048), taking turns (dev/bench_matmul.cu): 626 TF/s by cuBLASLt's first guesses, 655 by the best of its guesses, 658
// by matmul_tune, 659 by the best of up to 2500 configurations each; no product is more than 1% behind its best.
#pragma once
#include "../core/checksum.h"
#include "../core/kernel.h"
#include "matmul.cuh"
#include <cublasLt.h>
#include <functional>
#include <limits>
#include <string>
#include <vector>

#define CUBLAS_CHECK(call)                                                                                      \
    do {                                                                                                        \
        cublasStatus_t cublas_status = (call);                                                                  \
        if (cublas_status != CUBLAS_STATUS_SUCCESS)                                                             \
            fail("%s:%d: %s: %s; CUBLASLT_LOG_LEVEL=2 in the environment shows why", __FILE__, __LINE__, #call, \
                 cublasLtGetStatusName(cublas_status));                                                         \
    } while (0)

enum class MatmulKind : int { forward, backward_input, backward_weight };
constexpr const char* matmul_kind_names[] = {"forward", "backward_input", "backward_weight"};

// All that the choice of an algorithm depends on.
struct MatmulKey {
    MatmulKind kind;
    size_t T, M, N;
    Type element, out;
    int bias, residual, alignment; // of all pointers, in bytes, at most 16: no algorithm wants more
    bool operator==(const MatmulKey&) const = default;
};
struct MatmulAlgo {
    MatmulKey key;
    cublasLtMatmulAlgo_t algo;
    enum { none, guessed, tuned } choice = none;
    float ms = 0;
};
struct MatmulCache {
    cublasLtHandle_t handle = nullptr;
    float* one = nullptr;          // 1 in the GPU's memory
    std::vector<MatmulAlgo> algos; // one a key
    bool tuning = false;
    std::function<void()> before_tuning; // of each product, if somebody wants to know
};
inline MatmulCache& matmul_cache(Gpu gpu) {
    MatmulCache*& cache = gpu.context->matmul;
    if (!cache) {
        const float one = 1;
        cache = new MatmulCache;
        CUBLAS_CHECK(cublasLtCreate(&cache->handle));
        CUDA_CHECK(cudaMalloc((void**)&cache->one, sizeof one));
        copy_to_device(gpu, cache->one, &one, sizeof one);
    }
    return *cache;
}
inline MatmulAlgo& matmul_algo(Gpu gpu, const MatmulKey& key) {
    std::vector<MatmulAlgo>& algos = matmul_cache(gpu).algos;
    for (MatmulAlgo& a : algos)
        if (a.key == key) return a;
    return algos.emplace_back(MatmulAlgo{key, {}});
}

// One product as cuBLASLt takes it.
struct MatmulProduct {
    MatmulKey key;
    void* out;
    const void *a, *b, *bias, *residual; // bias and residual may be null
    cublasLtMatmulDescOpaque_t operation;
    cublasLtMatrixLayoutOpaque_t a_layout, b_layout, out_layout;
};
// Where cuBLASLt sees that the residual's factor is 1 and the residual is the output, it rounds the sum and has it
// added to the output in memory, which rounds again. That is harmless in float; for bf16 the factor is kept in the
// GPU's memory, where the library cannot look at it. (Adding takes 1.5% of a weight's gradient, 1.3% in float.
// A residual of 16384 x 4096 takes 0.05 ms; a kernel of its own would move 400 MB in 0.1 ms. A bias takes 1% at most.)
inline bool matmul_hides_factor(const MatmulKey& k) { return k.residual && k.out == Type::bf16; }
inline MatmulProduct matmul_product(const MatmulKey& k, void* out, const void* a, const void* b, const void* bias,
                                    const void* residual) {
    MatmulProduct x = {k, out, a, b, bias, residual, {}, {}, {}, {}};
    auto layout = [](cublasLtMatrixLayout_t to, Type type, size_t rows, size_t columns) {
        const cudaDataType_t t = type == Type::bf16 ? CUDA_R_16BF : CUDA_R_32F;
        CUBLAS_CHECK(cublasLtMatrixLayoutInit(to, t, rows, columns, int64_t(rows)));
    };
    auto set = [&x](cublasLtMatmulDescAttributes_t attribute, auto value) {
        CUBLAS_CHECK(cublasLtMatmulDescSetAttribute(&x.operation, attribute, &value, sizeof value));
    };
    const bool forward = k.kind == MatmulKind::forward, weight = k.kind == MatmulKind::backward_weight;
    layout(&x.a_layout, k.element, k.M, weight ? k.T : k.N);
    layout(&x.b_layout, k.element, forward ? k.M : k.N, k.T);
    layout(&x.out_layout, k.out, forward ? k.N : k.M, weight ? k.N : k.T);
    CUBLAS_CHECK(cublasLtMatmulDescInit(&x.operation, CUBLAS_COMPUTE_32F, CUDA_R_32F));
    set(CUBLASLT_MATMUL_DESC_TRANSA, forward ? CUBLAS_OP_T : CUBLAS_OP_N);
    set(CUBLASLT_MATMUL_DESC_TRANSB, weight ? CUBLAS_OP_T : CUBLAS_OP_N);
    set(CUBLASLT_MATMUL_DESC_EPILOGUE, k.bias ? CUBLASLT_EPILOGUE_BIAS : CUBLASLT_EPILOGUE_DEFAULT);
    set(CUBLASLT_MATMUL_DESC_BIAS_POINTER, bias);
    if (matmul_hides_factor(k)) set(CUBLASLT_MATMUL_DESC_POINTER_MODE, CUBLASLT_POINTER_MODE_DEVICE);
    return x;
}
template <class E, class G> MatmulProduct matmul_product(MatmulKind kind, size_t T, size_t M, size_t N, G* out,
                                                         const E* a, const E* b, const E* bias, const G* residual) {
    const uintptr_t address = uintptr_t(out) | uintptr_t(a) | uintptr_t(b) | uintptr_t(bias) | uintptr_t(residual) | 16;
    const MatmulKey key = {kind, T, M, N, type_of<E>(), type_of<G>(), !!bias, !!residual, int(address & -address)};
    return matmul_product(key, out, a, b, bias, residual);
}

// Blocks that share a sum over k add their parts. Allowed is only the way of fp32 parts in the workspace that a step of
// its own adds: in a fixed order, and with no rounding before. The other ways add in the output's type.
constexpr uint32_t matmul_reductions = CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE;
constexpr size_t matmul_workspace = size_t(32) << 20; // what NVIDIA advises for Hopper
static_assert(matmul_workspace <= GpuContext::scratch_bytes);

inline cublasStatus_t matmul_launch(Gpu gpu, MatmulProduct& x, const cublasLtMatmulAlgo_t& algo) {
    const MatmulCache& cache = matmul_cache(gpu);
    const float host[] = {1, x.residual ? 1.f : 0.f};
    const bool hidden = matmul_hides_factor(x.key);
    return cublasLtMatmul(cache.handle, &x.operation, hidden ? cache.one : &host[0], x.a, &x.a_layout, x.b, &x.b_layout,
                          hidden ? cache.one : &host[1], x.residual ? x.residual : x.out, &x.out_layout, x.out,
                          &x.out_layout, &algo, gpu.context->scratch, matmul_workspace, gpu.stream);
}

// Whether this GPU and library can run the algorithm for the product.
inline bool matmul_can_run(Gpu gpu, MatmulProduct& x, const cublasLtMatmulAlgo_t& algo) {
    cublasLtMatmulHeuristicResult_t result = {};
    return cublasLtMatmulAlgoCheck(matmul_cache(gpu).handle, &x.operation, &x.a_layout, &x.b_layout, &x.out_layout,
                                   &x.out_layout, &algo, &result) == CUBLAS_STATUS_SUCCESS &&
           result.workspaceSize <= matmul_workspace;
}

// cuBLASLt's own guesses, the most promising first.
inline std::vector<MatmulAlgo> matmul_guesses(Gpu gpu, MatmulProduct& x) {
    cublasLtMatmulPreferenceOpaque_t preference;
    CUBLAS_CHECK(cublasLtMatmulPreferenceInit(&preference));
    auto set = [&](cublasLtMatmulPreferenceAttributes_t attribute, auto value) {
        CUBLAS_CHECK(cublasLtMatmulPreferenceSetAttribute(&preference, attribute, &value, sizeof value));
    };
    set(CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, uint64_t(matmul_workspace));
    set(CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, matmul_reductions);
    for (auto operand : {CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES,
                         CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES})
        set(operand, uint32_t(x.key.alignment));
    constexpr int most = 32; // there were never more than 8
    cublasLtMatmulHeuristicResult_t found[most];
    int count = 0;
    cublasLtMatmulAlgoGetHeuristic(matmul_cache(gpu).handle, &x.operation, &x.a_layout, &x.b_layout, &x.out_layout,
                                   &x.out_layout, &preference, most, found, &count);
    std::vector<MatmulAlgo> algos;
    for (int i = 0; i < count; i++)
        if (found[i].state == CUBLAS_STATUS_SUCCESS) algos.push_back({x.key, found[i].algo, MatmulAlgo::guessed});
    const MatmulKey& k = x.key;
    if (algos.empty())
        fail(
            "cuBLASLt has no algorithm for %s, T %zu, M %zu, N %zu, %s, pointers aligned to %d bytes: align them to 16",
            matmul_kind_names[int(k.kind)], k.T, k.M, k.N, type_name(k.element), k.alignment);
    return algos;
}

// The guesses seem made for a GPU at full clock. In a long row of products an H200 is bound by its power, and then the
// fastest of all configurations were tiles of about 128 x 160 with options 0 to 3, in clusters of one or two: they are
// candidates too, and up to 1.5% faster than the best guess.
inline std::vector<MatmulAlgo> matmul_candidates(Gpu gpu, MatmulProduct& x) {
    std::vector<MatmulAlgo> algos = matmul_guesses(gpu, x);
    for (uint32_t tile : {CUBLASLT_MATMUL_TILE_128x128, CUBLASLT_MATMUL_TILE_128x160, CUBLASLT_MATMUL_TILE_128x176,
                          CUBLASLT_MATMUL_TILE_176x128, CUBLASLT_MATMUL_TILE_112x128, CUBLASLT_MATMUL_TILE_128x152,
                          CUBLASLT_MATMUL_TILE_160x128, CUBLASLT_MATMUL_TILE_136x128, CUBLASLT_MATMUL_TILE_152x128,
                          CUBLASLT_MATMUL_TILE_128x144, CUBLASLT_MATMUL_TILE_128x168})
        for (uint32_t option = 0; option < 4; option++)
            for (uint16_t cluster :
                 {CUBLASLT_CLUSTER_SHAPE_1x1x1, CUBLASLT_CLUSTER_SHAPE_2x1x1, CUBLASLT_CLUSTER_SHAPE_1x2x1}) {
                MatmulAlgo a = algos[0];
                auto set = [&](cublasLtMatmulAlgoConfigAttributes_t attribute, auto value) {
                    return !cublasLtMatmulAlgoConfigSetAttribute(&a.algo, attribute, &value, sizeof value);
                };
                if (set(CUBLASLT_ALGO_CONFIG_TILE_ID, tile) && set(CUBLASLT_ALGO_CONFIG_CUSTOM_OPTION, option) &&
                    set(CUBLASLT_ALGO_CONFIG_CLUSTER_SHAPE_ID, cluster) && matmul_can_run(gpu, x, a.algo))
                    algos.push_back(a);
            }
    return algos;
}

// Leaves the `keep` fastest, the fastest first, by the median of `rounds` after one that does not count. The algorithms
// take turns and the stream does not drain, so that all of them meet the clocks of a GPU at work.
inline void matmul_race(Gpu gpu, MatmulProduct& x, std::vector<MatmulAlgo>& algos, size_t rounds, size_t keep) {
    const size_t n = algos.size();
    std::vector<cudaEvent_t> events((rounds + 1) * n + 1);
    std::vector<float> times(rounds);
    for (MatmulAlgo& a : algos) a.ms = 0;
    for (cudaEvent_t& event : events) CUDA_CHECK(cudaEventCreate(&event));
    CUDA_CHECK(cudaEventRecord(events[0], gpu.stream));
    for (size_t i = 0; i < (rounds + 1) * n; i++) {
        MatmulAlgo& a = algos[i % n];
        if (a.ms == 0 && matmul_launch(gpu, x, a.algo) != CUBLAS_STATUS_SUCCESS)
            a.ms = std::numeric_limits<float>::infinity();
        CUDA_CHECK(cudaEventRecord(events[i + 1], gpu.stream));
    }
    device_wait(gpu);
    for (size_t i = 0; i < n; i++) {
        for (size_t round = 0, at = i + n; round < rounds; round++, at += n)
            CUDA_CHECK(cudaEventElapsedTime(&times[round], events[at], events[at + 1]));
        std::nth_element(times.begin(), times.begin() + rounds / 2, times.end());
        algos[i].ms = std::max(algos[i].ms, times[rounds / 2]);
    }
    for (cudaEvent_t& event : events) CUDA_CHECK(cudaEventDestroy(event));
    std::stable_sort(algos.begin(), algos.end(), [](const auto& a, const auto& b) { return a.ms < b.ms; });
    algos.erase(algos.begin() + std::min(keep, n), algos.end());
}
// The product on its first tokens alone.
inline MatmulProduct matmul_part(const MatmulProduct& x, size_t tokens) {
    MatmulKey key = x.key;
    key.T = std::min(key.T, tokens);
    return matmul_product(key, x.out, x.a, x.b, x.bias, x.residual);
}
// All candidates race over 16384 tokens, which are enough to fill any GPU many times; the last six over all of them.
inline MatmulAlgo matmul_fastest(Gpu gpu, MatmulProduct& x) {
    MatmulProduct part = matmul_part(x, 16384);
    std::vector<MatmulAlgo> algos = matmul_candidates(gpu, x), first(1, algos[0]);
    matmul_race(gpu, part, first, 1, 1);
    const size_t most = 8 + size_t(1000 / first[0].ms); // two seconds or so
    algos.erase(algos.begin() + std::min(most, algos.size()), algos.end());
    matmul_race(gpu, part, algos, 1, 24);
    matmul_race(gpu, part, algos, 5, 6);
    matmul_race(gpu, x, algos, x.key.T > part.key.T ? 9 : 25, 1); // the longer a product, the less its times differ
    algos[0].choice = MatmulAlgo::tuned;
    return algos[0];
}

// The product by the algorithm that was tuned or read for its key, else by cuBLASLt's first guess.
inline void matmul_run(Gpu gpu, MatmulProduct x) {
    MatmulAlgo& a = matmul_algo(gpu, x.key);
    if (a.choice == MatmulAlgo::none) a = matmul_guesses(gpu, x)[0];
    if (MatmulCache& cache = matmul_cache(gpu); cache.tuning && a.choice != MatmulAlgo::tuned) {
        if (cache.before_tuning) cache.before_tuning();
        a = matmul_fastest(gpu, x);
    }
    CUBLAS_CHECK(matmul_launch(gpu, x, a.algo));
}

// Calls products(): a product in it whose key was not tuned yet is first run by every candidate, on its own buffers,
// and the fastest serves all later products of that key. The buffers want values as in training, since zeros run
// faster. A gradient, or a residual that is the output, is added many times over. before_each() is called before a
// product is timed, which takes some seconds.
template <class F> void matmul_tune(Gpu gpu, F products, std::function<void()> before_each = {}) {
    matmul_cache(gpu).tuning = true, matmul_cache(gpu).before_tuning = before_each;
    products();
    matmul_cache(gpu).tuning = false;
}

inline std::string matmul_algo_line(Gpu gpu, const MatmulAlgo& a) {
    const MatmulKey& k = a.key;
    char line[640];
    int n = snprintf(line, sizeof line, "matmul %s %zu %zu %zu %d %d %d %d %d ", matmul_kind_names[int(k.kind)], k.T,
                     k.M, k.N, int(k.element), int(k.out), k.bias, k.residual, k.alignment);
    for (uint64_t word : a.algo.data) n += snprintf(line + n, sizeof line - n, "%016lx", word);
    n += snprintf(line + n, sizeof line - n, " cublasLt %zu %s", cublasLtGetVersion(), gpu.context->name);
    snprintf(line + n, sizeof line - n, " %08x\n", crc32c(0, line, n));
    return line;
}

// The tuned algorithms, a line each: kind, T, M, N, types of elements and result, bias, residual, alignment, the
// algorithm, library, GPU, checksum.
inline std::string matmul_algos_text(Gpu gpu) {
    std::string text;
    for (const MatmulAlgo& a : matmul_cache(gpu).algos)
        if (a.choice == MatmulAlgo::tuned) text += matmul_algo_line(gpu, a);
    return text;
}

// Takes the lines of such a text and says how many it took: left out is what another GPU or library wrote, what was
// altered, and what cannot run here.
inline int matmul_algos_read(Gpu gpu, const std::string& text) {
    int taken = 0;
    for (size_t begin = 0, end; begin < text.size(); begin = end) {
        end = std::min(text.find('\n', begin), text.size() - 1) + 1;
        const std::string line = text.substr(begin, end - begin);
        MatmulAlgo a = {{}, {}, MatmulAlgo::tuned};
        MatmulKey& k = a.key;
        char kind[32] = "", hex[129] = "";
        sscanf(line.c_str(), "matmul %31s %zu %zu %zu %d %d %d %d %d %128s", kind, &k.T, &k.M, &k.N, (int*)&k.element,
               (int*)&k.out, &k.bias, &k.residual, &k.alignment, hex);
        for (int i = 0; i < 3; i++)
            if (strcmp(kind, matmul_kind_names[i]) == 0) k.kind = MatmulKind(i);
        for (int i = 0; i < 8; i++) sscanf(hex + 16 * i, "%16lx", &a.algo.data[i]);
        if (line != matmul_algo_line(gpu, a)) continue;
        MatmulProduct x = matmul_product(k, nullptr, nullptr, nullptr, nullptr, nullptr);
        if (!matmul_can_run(gpu, x, a.algo)) continue;
        matmul_algo(gpu, k) = a;
        taken++;
    }
    return taken;
}

template <class E> void matmul_forward(Gpu gpu, E* out, const E* in, const E* weight, const E* bias, const E* residual,
                                       size_t T, size_t M, size_t N) {
    REQUIRE(M > 0 && N > 0, "a linear layer has at least one channel in and out");
    if (T > 0) matmul_run(gpu, matmul_product(MatmulKind::forward, T, M, N, out, weight, in, bias, residual));
}

template <class E>
void matmul_backward_input(Gpu gpu, E* din, const E* dout, const E* weight, size_t T, size_t M, size_t N) {
    const E* none = nullptr;
    REQUIRE(M > 0 && N > 0, "a linear layer has at least one channel in and out");
    if (T > 0) matmul_run(gpu, matmul_product(MatmulKind::backward_input, T, M, N, din, weight, dout, none, none));
}

// partial (parts, N): sums of dout (T, N) over `rows` rows each. A thread has W neighbouring columns, loaded as one,
// and all rows of its part. Bound by the one reading of dout: both kernels, T = 16384, N = 12288, 0.11 ms on an H200,
// 87% of the speed of a copy.
template <class E, int W> __global__ void __launch_bounds__(256)
    matmul_dbias_kernel(float* partial, const E* dout, size_t T, size_t N, size_t rows) {
    const size_t column = (blockIdx.x * size_t(256) + threadIdx.x) * W;
    const size_t begin = blockIdx.y * rows, end = begin + rows < T ? begin + rows : T;
    if (column >= N) return;
    float sum[W] = {};
#pragma unroll 8
    for (size_t t = begin; t < end; t++) {
        const Pack<E, W> x = pack_load<W>(dout + t * N + column);
        for (int j = 0; j < W; j++) sum[j] += x[j];
    }
    for (int j = 0; j < W; j++) partial[blockIdx.y * N + column + j] = sum[j];
}

// dbias (N) += the sum of the parts (parts, N), always in the same order: a block has 32 columns, each of its 8 warps
// adds every eighth part of them, and the first warp adds the eight sums.
template <class G> __global__ void __launch_bounds__(256)
    matmul_dbias_add_kernel(G* dbias, const float* partial, size_t parts, size_t N) {
    __shared__ float sums[8][32];
    const size_t lane = threadIdx.x % 32, warp = threadIdx.x / 32, n = blockIdx.x * size_t(32) + lane;
    const size_t end = n < N ? parts : 0;
    float sum = 0;
#pragma unroll 8 // loads in flight: a warp has few parts
    for (size_t part = warp; part < end; part += 8) sum += partial[part * N + n];
    sums[warp][lane] = sum;
    __syncthreads();
    if (warp > 0 || n >= N) return;
    for (int i = 1; i < 8; i++) sum += sums[i][lane];
    dbias[n] = G(float(dbias[n]) + sum);
}

// dbias (N) += the columns' sums of dout (T, N).
template <class E, class G> void matmul_backward_bias(Gpu gpu, G* dbias, const E* dout, size_t T, size_t N) {
    const size_t width = packs_fit<E>(N, dout) ? pack_width<E> : 1, blocks = gemm_pieces(N, 256 * width);
    // About a thousand blocks fill the GPU; 32 rows or more keep the partial sums small against dout.
    const size_t most = std::min(gemm_pieces(T, 32), GpuContext::scratch_bytes / (N * sizeof(float)));
    REQUIRE(most > 0, "a bias of this width needs more scratch memory");
    const size_t rows = gemm_pieces(T, std::min(most, 1 + 1024 / blocks)), parts = gemm_pieces(T, rows);
    float* partial = (float*)gpu.context->scratch;
    auto kernel = width == 1 ? matmul_dbias_kernel<E, 1> : matmul_dbias_kernel<E, pack_width<E>>;
    kernel<<<dim3(unsigned(blocks), unsigned(parts)), 256, 0, gpu.stream>>>(partial, dout, T, N, rows);
    CUDA_CHECK(cudaGetLastError());
    matmul_dbias_add_kernel<<<grid_blocks(gemm_pieces(N, 32)), 256, 0, gpu.stream>>>(dbias, partial, parts, N);
    CUDA_CHECK(cudaGetLastError());
}

template <class E, class G>
void matmul_backward_weight(Gpu gpu, G* dweight, G* dbias, const E* dout, const E* in, size_t T, size_t M, size_t N) {
    REQUIRE(M > 0 && N > 0, "a linear layer has at least one channel in and out");
    if (T == 0) return;
    const E* none = nullptr;
    const G* old = dweight;
    matmul_run(gpu, matmul_product(MatmulKind::backward_weight, T, M, N, dweight, in, dout, none, old));
    if (dbias) matmul_backward_bias(gpu, dbias, dout, T, N);
}
