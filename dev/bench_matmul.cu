// The products of LLaMA-2-7B: the tuned algorithm of each against the best that a search finds (below: all tiles and
// options of the kernels that cuBLASLt proposes, and some of its others), the untuned one of --deterministic, and what
// bias and residual cost.
//
//     nvcc -std=c++20 -O3 -arch=sm_90 -Xcompiler=-fopenmp -I. dev/bench_matmul.cu core/comm_serial.cpp -lcublasLt
//     ./a.out [seconds of search for each product, default 8] [tokens, default 16384]
//
// Under a long row of products an H200 is bound by its power: it runs at full clock for milliseconds and then slower,
// by how much depends on the algorithm. So what is compared here always takes turns, without a pause.
#include "../layers/matmul.cuh"
#include "bench.h"
#include <functional>

namespace {
// Median milliseconds of each, taking turns.
std::vector<double> turns(Gpu gpu, const std::vector<std::function<void()>>& each, size_t rounds) {
    const size_t n = each.size();
    std::vector<cudaEvent_t> events((rounds + 1) * n + 1);
    for (cudaEvent_t& event : events) CUDA_CHECK(cudaEventCreate(&event));
    CUDA_CHECK(cudaEventRecord(events[0], gpu.stream));
    for (size_t i = 0; i < (rounds + 1) * n; i++) {
        each[i % n]();
        CUDA_CHECK(cudaEventRecord(events[i + 1], gpu.stream));
    }
    device_wait(gpu);
    std::vector<double> medians;
    for (size_t i = 0; i < n; i++) {
        std::vector<float> ms(rounds); // the first round warms up
        for (size_t r = 0; r < rounds; r++)
            CUDA_CHECK(cudaEventElapsedTime(&ms[r], events[(r + 1) * n + i], events[(r + 1) * n + i + 1]));
        std::nth_element(ms.begin(), ms.begin() + rounds / 2, ms.end());
        medians.push_back(ms[rounds / 2]);
    }
    for (cudaEvent_t& event : events) CUDA_CHECK(cudaEventDestroy(event));
    return medians;
}

// Waves of blocks that an algorithm takes, infinite if it cannot run.
float waves(Gpu gpu, MatmulProduct& x, const cublasLtMatmulAlgo_t& algo) {
    cublasLtMatmulHeuristicResult_t result = {};
    const cublasStatus_t status = cublasLtMatmulAlgoCheck(matmul_cache(gpu).handle, &x.operation, &x.a_layout,
                                                          &x.b_layout, &x.out_layout, &x.out_layout, &algo, &result);
    return status == CUBLAS_STATUS_SUCCESS ? result.wavesCount : std::numeric_limits<float>::infinity();
}

void shuffle(std::vector<MatmulAlgo>& algos) {
    for (size_t i = 0; i < algos.size(); i++) std::swap(algos[i], algos[i + hash64(1, i) % (algos.size() - i)]);
}

// Every tile, option and small cluster of the guesses' kernel family, but for tiles a third of the guesses' or smaller:
// these are far behind. Shuffled, so that a search that is cut short has seen some of each.
std::vector<MatmulAlgo> all_algorithms(Gpu gpu, MatmulProduct& x) {
    std::vector<MatmulAlgo> algos = matmul_guesses(gpu, x);
    float fewest = std::numeric_limits<float>::infinity();
    for (const MatmulAlgo& a : algos) fewest = std::min(fewest, waves(gpu, x, a.algo));
    std::vector<uint32_t> tiles(CUBLASLT_MATMUL_TILE_END);
    size_t bytes = 0;
    const MatmulAlgo base = algos[0];
    CUBLAS_CHECK(cublasLtMatmulAlgoCapGetAttribute(&base.algo, CUBLASLT_ALGO_CAP_TILE_IDS, tiles.data(),
                                                   tiles.size() * sizeof(uint32_t), &bytes));
    tiles.resize(bytes / sizeof(uint32_t));
    uint32_t most_option = 0;
    CUBLAS_CHECK(cublasLtMatmulAlgoCapGetAttribute(&base.algo, CUBLASLT_ALGO_CAP_CUSTOM_OPTION_MAX, &most_option,
                                                   sizeof most_option, &bytes));
    for (uint32_t tile : tiles)
        for (uint32_t option = 0; option <= most_option; option++)
            for (uint16_t cluster :
                 {CUBLASLT_CLUSTER_SHAPE_1x1x1, CUBLASLT_CLUSTER_SHAPE_2x1x1, CUBLASLT_CLUSTER_SHAPE_1x2x1}) {
                MatmulAlgo a = base;
                auto set = [&a](cublasLtMatmulAlgoConfigAttributes_t attribute, auto value) {
                    CUBLAS_CHECK(cublasLtMatmulAlgoConfigSetAttribute(&a.algo, attribute, &value, sizeof value));
                };
                set(CUBLASLT_ALGO_CONFIG_TILE_ID, tile);
                set(CUBLASLT_ALGO_CONFIG_CUSTOM_OPTION, option);
                set(CUBLASLT_ALGO_CONFIG_CLUSTER_SHAPE_ID, cluster);
                if (matmul_can_run(gpu, x, a.algo) && waves(gpu, x, a.algo) <= 3 * fewest) algos.push_back(a);
            }
    shuffle(algos);
    return algos;
}

// Of every kernel family but the guesses', four in all their tiles and stages that keep the GPU's blocks as full as the
// guesses do to within a half.
std::vector<MatmulAlgo> other_families(Gpu gpu, MatmulProduct& x) {
    const std::vector<MatmulAlgo> guesses = matmul_guesses(gpu, x);
    float fewest = std::numeric_limits<float>::infinity();
    std::vector<int> known;
    size_t bytes = 0;
    for (const MatmulAlgo& a : guesses) {
        fewest = std::min(fewest, waves(gpu, x, a.algo));
        CUBLAS_CHECK(cublasLtMatmulAlgoConfigGetAttribute(&a.algo, CUBLASLT_ALGO_CONFIG_ID, &known.emplace_back(),
                                                          sizeof(int), &bytes));
    }
    const cudaDataType_t in = CUDA_R_16BF, out = x.key.out == Type::bf16 ? CUDA_R_16BF : CUDA_R_32F;
    const cublasLtHandle_t handle = matmul_cache(gpu).handle;
    std::vector<int> ids(256);
    int count = 0;
    CUBLAS_CHECK(cublasLtMatmulAlgoGetIds(handle, CUBLAS_COMPUTE_32F, CUDA_R_32F, in, in, out, out, int(ids.size()),
                                          ids.data(), &count));
    ids.resize(count);
    std::vector<MatmulAlgo> found;
    for (int id : ids) {
        MatmulAlgo base = {x.key, {}, MatmulAlgo::guessed};
        if (std::find(known.begin(), known.end(), id) != known.end() ||
            cublasLtMatmulAlgoInit(handle, CUBLAS_COMPUTE_32F, CUDA_R_32F, in, in, out, out, id, &base.algo))
            continue;
        auto all = [&base](cublasLtMatmulAlgoCapAttributes_t attribute,
                           size_t most) { // none: as if there were no choice
            std::vector<uint32_t> values(most);
            size_t written = 0;
            if (cublasLtMatmulAlgoCapGetAttribute(&base.algo, attribute, values.data(), most * sizeof(uint32_t),
                                                  &written))
                written = 0;
            values.resize(std::max(written / sizeof(uint32_t), size_t(1)));
            return values;
        };
        std::vector<MatmulAlgo> family;
        for (uint32_t tile : all(CUBLASLT_ALGO_CAP_TILE_IDS, CUBLASLT_MATMUL_TILE_END))
            for (uint32_t stages : all(CUBLASLT_ALGO_CAP_STAGES_IDS, CUBLASLT_MATMUL_STAGES_END)) {
                MatmulAlgo a = base;
                auto set = [&a](cublasLtMatmulAlgoConfigAttributes_t attribute, auto value) {
                    return !cublasLtMatmulAlgoConfigSetAttribute(&a.algo, attribute, &value, sizeof value);
                };
                if (set(CUBLASLT_ALGO_CONFIG_TILE_ID, tile) && set(CUBLASLT_ALGO_CONFIG_STAGES_ID, stages) &&
                    matmul_can_run(gpu, x, a.algo) && waves(gpu, x, a.algo) <= 1.5f * fewest)
                    family.push_back(a);
            }
        shuffle(family);
        family.resize(std::min(family.size(), size_t(4)));
        found.insert(found.end(), family.begin(), family.end());
    }
    return found;
}

struct Total {
    double flops = 0, guess = 0, best_guess = 0, tuned = 0, best = 0, tuning = 0; // milliseconds, tuning in seconds
};

// One row: the tuned algorithm beside cuBLASLt's first guess, the best of its guesses and the best of all.
void measure(Gpu gpu, const std::string& name, MatmulProduct x, double seconds, Total& total) {
    const double flops = 2.0 * double(x.key.T) * double(x.key.M) * double(x.key.N);
    const double start = omp_get_wtime();
    const MatmulAlgo tuned = matmul_fastest(gpu, x);
    total.tuning += omp_get_wtime() - start;
    matmul_algo(gpu, x.key) = tuned;
    std::vector<MatmulAlgo> guesses = matmul_guesses(gpu, x);
    const MatmulAlgo first = guesses[0];
    matmul_race(gpu, x, guesses, 15, 1);
    std::vector<MatmulAlgo> best = all_algorithms(gpu, x), others = other_families(gpu, x);
    const size_t all = best.size(), timed = std::min(all, size_t(seconds * 1e3 / (2.3 * tuned.ms)));
    best.erase(best.begin() + timed, best.end());
    matmul_race(gpu, x, others, 1, 4);
    best.insert(best.end(), others.begin(), others.end());
    matmul_race(gpu, x, best, 1, 64);
    matmul_race(gpu, x, best, 5, 6);
    best.push_back(first), best.push_back(guesses[0]), best.push_back(tuned);
    std::vector<std::function<void()>> each;
    for (const MatmulAlgo& a : best) each.push_back([&gpu, &x, a] { CUBLAS_CHECK(matmul_launch(gpu, x, a.algo)); });
    const std::vector<double> ms = turns(gpu, each, 31);
    const double least = *std::min_element(ms.begin(), ms.end()), ours = ms.back();
    const double guess = ms[ms.size() - 3], best_guess = ms[ms.size() - 2];
    char of[96];
    snprintf(of, sizeof of, "best | %4zu of %zu | %3.0f, %3.0f TF/s", timed, all, flops / guess / 1e9,
             flops / best_guess / 1e9);
    bench_row_flops(name.c_str(), ours, flops, flops / (least * 1e-3), of);
    total.flops += flops, total.guess += guess, total.best_guess += best_guess;
    total.tuned += ours, total.best += least;
}

struct Shape {
    const char* name;
    size_t T, M, N;
};

struct Buffers {
    bf16 *in, *weight, *dout, *out, *din, *bias, *residual;
    float* dweight;
    const bf16* none = nullptr;
};

// The same product with and without what an epilogue adds, by its own tuned algorithm each.
void compare_epilogues(Gpu gpu, const Buffers& b, const Shape& s) {
    const auto [name, T, M, N] = s;
    const double flops = 2.0 * double(T) * double(M) * double(N);
    std::vector<std::string> names = {" plain", " + bias", " + residual", " + residual in place", " + both"};
    auto forward = [=](bf16* out, const bf16* bias, const bf16* residual) {
        return [=, T = s.T, M = s.M, N = s.N] { matmul_forward(gpu, out, b.in, b.weight, bias, residual, T, M, N); };
    };
    std::vector<std::function<void()>> each = {forward(b.out, b.none, b.none), forward(b.out, b.bias, b.none),
                                               forward(b.out, b.none, b.residual), forward(b.out, b.none, b.out),
                                               forward(b.out, b.bias, b.residual)};
    for (auto& f : each) matmul_tune(gpu, f);
    const std::vector<double> ms = turns(gpu, each, 31);
    for (size_t i = 0; i < each.size(); i++)
        bench_row_flops((name + names[i]).c_str(), ms[i], flops, flops / (ms[0] * 1e-3), "plain");
}

// Gradients of the weight in bf16, in float, and with that of a bias.
void compare_gradients(Gpu gpu, const Buffers& b, const Shape& s) {
    const auto [name, T, M, N] = s;
    const double flops = 2.0 * double(T) * double(M) * double(N);
    bf16* none = nullptr;
    auto weight = [=, T = s.T, M = s.M, N = s.N](auto* dweight, auto* dbias) {
        return [=] { matmul_backward_weight(gpu, dweight, dbias, b.dout, b.in, T, M, N); };
    };
    auto into_out = [=, T = s.T, M = s.M, N = s.N] { // the same product, nothing added
        matmul_run(gpu, matmul_product(MatmulKind::backward_weight, T, M, N, b.out, b.in, b.dout, b.none, b.none));
    };
    std::vector<std::string> names = {" dweight, not added", " dweight", " dweight in float", " dweight and dbias"};
    std::vector<std::function<void()>> each = {into_out, weight(b.out, none), weight(b.dweight, (float*)nullptr),
                                               weight(b.out, b.bias)};
    for (auto& f : each) matmul_tune(gpu, f);
    const std::vector<double> ms = turns(gpu, each, 31);
    for (size_t i = 0; i < each.size(); i++)
        bench_row_flops((name + names[i]).c_str(), ms[i], flops, flops / (ms[0] * 1e-3), "not added");
}
} // namespace

int main(int argc, char** argv) {
    const Gpu gpu = gpu_open(0);
    const double seconds = argc > 1 ? atof(argv[1]) : 8;
    const size_t T = argc > 2 ? size_t(atoll(argv[2])) : 16384, F = 22016;
    const Shape shapes[] = {{"qkv", T, 4096, 12288},
                            {"out", T, 4096, 4096},
                            {"gate_up", T, 4096, 22016},
                            {"down", T, 11008, 4096},
                            {"head", std::min(T, size_t(2048)), 4096, 32000}};
    Buffers b = {bench_normal<bf16>(gpu, T * 11008, 1),    bench_normal<bf16>(gpu, size_t(32000) * 4096, 2, 0.02f),
                 bench_normal<bf16>(gpu, T * F, 3, 1e-3f), bench_normal<bf16>(gpu, T * F, 4),
                 bench_normal<bf16>(gpu, T * 11008, 5),    bench_normal<bf16>(gpu, F, 6),
                 bench_normal<bf16>(gpu, T * F, 7),        bench_normal<float>(gpu, size_t(12288) * 4096, 8)};
    printf("LLaMA-2-7B, T = %zu (head: %zu), bf16, cublasLt %zu, %s\n", T, shapes[4].T, cublasLtGetVersion(),
           gpu.context->name);
    printf("tuned | share of the best of those timed | timed | first guess, best of the guesses\n");
    Total total, residual;
    for (const auto& [name, T, M, N] : shapes) {
        const std::string s = name;
        const bf16* old = b.out;
        const MatmulKind weight = MatmulKind::backward_weight;
        measure(gpu, s + " forward",
                matmul_product(MatmulKind::forward, T, M, N, b.out, b.weight, b.in, b.none, b.none), seconds, total);
        measure(gpu, s + " input",
                matmul_product(MatmulKind::backward_input, T, M, N, b.din, b.weight, b.dout, b.none, b.none), seconds,
                total);
        measure(gpu, s + " weight", matmul_product(weight, T, M, N, b.out, b.in, b.dout, b.none, old), seconds, total);
        if (s == "out" || s == "down") // as a layer has them
            measure(gpu, s + " forward + residual",
                    matmul_product(MatmulKind::forward, T, M, N, b.out, b.weight, b.in, b.none, old), seconds,
                    residual);
    }
    auto sum = [&total](const char* by, double ms) {
        printf("total by %s: %.2f ms, %.1f TF/s\n", by, ms, total.flops / ms / 1e9);
    };
    sum("first guesses", total.guess), sum("the best guesses", total.best_guess);
    sum("tuned algorithms", total.tuned), sum("the best of all", total.best);
    printf("tuning took %.1f s\n", total.tuning);
    Total one;
    const float* old = b.dweight;
    measure(gpu, "qkv weight, float gradients",
            matmul_product(MatmulKind::backward_weight, T, 4096, 12288, b.dweight, b.in, b.dout, b.none, old), seconds,
            one);
    compare_epilogues(gpu, b, shapes[0]);
    compare_epilogues(gpu, b, shapes[1]);
    compare_epilogues(gpu, b, shapes[3]);
    compare_gradients(gpu, b, shapes[0]);
}
