// The CPU's matrix products against OpenBLAS: GF/s of each and our share, float; and its attention.
//
//     apt-get install libopenblas-dev
//     make CUDA=0 bench
//     build/bench_cpu [threads, default all] [rounds, default 5]
//
// Each product and its rival take turns and the best of all rounds counts. OpenBLAS knows a processor by
// its model number and takes SSE kernels for one it does not know (0.3.21 on a Sapphire Rapids guest:
// Prescott, 5 times slower), so its kernels are chosen here, to fit the width of our vectors.
#include "../attention_anchor.cuh"
#include "../layers/matmul.cuh"
#include <cblas.h>
#include <omp.h>
#include <unistd.h>
#include <vector>

extern "C" char* openblas_get_corename();

struct Shape {
    const char* name;
    size_t T, M, N;
};

// Training shapes of models of 256 to 1024 channels at 4096 tokens, the head in chunks of 512 tokens, one
// rank's share of a ring of two, and generation.
constexpr Shape shapes[] = {
    {"256 qkv", 4096, 256, 768},       {"256 attention out", 4096, 256, 256}, {"256 gate, up", 4096, 256, 1376},
    {"256 down", 4096, 688, 256},      {"256 gate, up / 2", 2048, 256, 1376}, {"256 head", 512, 256, 32000},
    {"384 qkv", 4096, 384, 1152},      {"384 down", 4096, 1024, 384},         {"384 head", 512, 384, 32000},
    {"768 gate, up", 4096, 768, 4096}, {"768 down", 4096, 2048, 768},         {"1024 qkv", 4096, 1024, 3072},
    {"1024 out", 4096, 1024, 1024},    {"1024 head", 512, 1024, 32000},       {"generate, 1", 1, 1024, 32000},
    {"generate, 8", 8, 1024, 32000},
};

std::vector<float> uniform(size_t count, uint64_t seed) {
    std::vector<float> x(count);
    for (size_t i = 0; i < count; i++) x[i] = float(hash_uniform(seed, i) - 0.5);
    return x;
}

// Three times, since the rival's threads still spin on the cores when the first begins.
template <class F> void keep_best(double& best, F f) {
    for (int turn = 0; turn < 3; turn++) {
        double start = omp_get_wtime();
        f();
        best = std::min(best, omp_get_wtime() - start);
    }
}

// Row-major C(m, n) = A(m, k) B(k, n) + beta C, the operands transposed where said.
void sgemm(float* c, const float* a, bool a_turned, const float* b, bool b_turned, float beta, int m, int n, int k) {
    cblas_sgemm(CblasRowMajor, a_turned ? CblasTrans : CblasNoTrans, b_turned ? CblasTrans : CblasNoTrans, m, n, k, 1,
                a, a_turned ? m : k, b, b_turned ? k : n, beta, c, n);
}

void compare(const Shape& shape, int rounds) {
    const auto [name, T, M, N] = shape;
    const float* none = nullptr;
    std::vector<float> in = uniform(T * M, 1), weight = uniform(N * M, 2), out = uniform(T * N, 3);
    std::vector<float> din = in, dweight = weight, dout = out;
    float *x = in.data(), *w = weight.data(), *y = out.data();
    float *dx = din.data(), *dw = dweight.data(), *dy = dout.data();
    double ours[3] = {1e9, 1e9, 1e9}, theirs[3] = {1e9, 1e9, 1e9};
    for (int round = 0; round < rounds; round++) {
        keep_best(ours[0], [&] { matmul_forward(Cpu{}, y, x, w, none, none, T, M, N); });
        keep_best(theirs[0], [&] { sgemm(y, x, false, w, true, 0, T, N, M); });
        keep_best(ours[1], [&] { matmul_backward_input(Cpu{}, dx, dy, w, T, M, N); });
        keep_best(theirs[1], [&] { sgemm(dx, dy, false, w, false, 0, T, M, N); });
        keep_best(ours[2], [&] { matmul_backward_weight(Cpu{}, dw, (float*)nullptr, dy, x, T, M, N); });
        keep_best(theirs[2], [&] { sgemm(dw, dy, true, x, false, 1, N, M, T); });
    }
    double work = 2e-9 * T * M * N;
    printf("%-18s %5zu %5zu %6zu ", name, T, M, N);
    for (int i = 0; i < 3; i++)
        printf("  | %5.0f %5.0f %4.0f%%", work / ours[i], work / theirs[i], 100 * theirs[i] / ours[i]);
    printf("\n");
}

struct AttentionCase {
    const char* name;
    size_t H, K, D;
    size_t document; // tokens; 0: full attention
};
constexpr AttentionCase attention_cases[] = {
    {"D 32, full", 8, 8, 32, 0},       {"D 64, full", 8, 8, 64, 0},        {"D 128, full", 8, 8, 128, 0},
    {"D 64, 4 KV heads", 8, 4, 64, 0}, {"D 64, documents", 8, 8, 64, 400},
};

// 4096 tokens. FLOPs of visible pairs: 4 D a pair and head forward, 10 D backward.
template <class E> void attention(const AttentionCase& c, const char* type, int rounds) {
    const size_t T = 4096, H = c.H, K = c.K, D = c.D, stride = (H + 2 * K) * D, width = 2 * K * D;
    Tokens t{{}, {}, {0, int32_t(T)}};
    for (size_t i = 0; i < T; i++) {
        t.index.push_back(int32_t(i));
        t.doc.push_back(c.document && i > 0 ? int32_t(1 + (i - 1) / c.document) : 0);
    }
    AttentionMap map;
    attention_map_build(map, t, t, attention_tiles_cpu);
    auto random = [](size_t count, uint64_t seed) {
        std::vector<E> x(count);
        for (size_t i = 0; i < count; i++) x[i] = E(float(hash_normal(seed, i)));
        return x;
    };
    const std::vector<E> qkv = random(T * stride, 1), dout = random(T * H * D, 2);
    std::vector<E> out(T * H * D), dqkv(T * stride), anchor(qkv.begin() + H * D, qkv.begin() + H * D + width);
    std::vector<Acc<E>> lse(H * T), state(T * H * D), delta(H * T), dkv(T * width), danchor(width);
    double forward = 1e9, backward = 1e9;
    const E *q = qkv.data(), *kv = q + H * D;
    for (int round = 0; round < rounds; round++) {
        keep_best(forward, [&] {
            attention_forward(Cpu{}, out.data(), lse.data(), state.data(), q, stride, kv, stride, anchor.data(), map,
                              {}, t, t, H, K, D);
        });
        keep_best(backward, [&] {
            std::fill(dkv.begin(), dkv.end(), 0);
            attention_backward_begin(Cpu{}, delta.data(), state.data(), danchor.data(), dout.data(), out.data(),
                                     lse.data(), q, stride, anchor.data(), t, H, K, D);
            attention_backward(Cpu{}, state.data(), dkv.data(), dqkv.data() + H * D, stride, danchor.data(),
                               dout.data(), q, stride, kv, stride, lse.data(), delta.data(), map, t, t, H, K, D);
            attention_store(Cpu{}, dqkv.data(), stride, state.data(), T, H * D);
        });
    }
    const double work = 4e-9 * double(visible_pairs(t.doc.data(), T)) * H * D;
    printf("%-18s %-6s | %6.0f ms %5.0f GF/s | %6.0f ms %5.0f GF/s\n", c.name, type, 1e3 * forward, work / forward,
           1e3 * backward, 2.5 * work / backward);
}

int main(int argc, char** argv) {
    // OpenBLAS chooses its kernels when it is loaded.
    if (!getenv("OPENBLAS_CORETYPE") && vector_bytes > 16) {
        setenv("OPENBLAS_CORETYPE", vector_bytes == 64 ? "SkylakeX" : "Haswell", 1);
        execv("/proc/self/exe", argv);
    }
    if (argc > 1) omp_set_num_threads(atoi(argv[1]));
    openblas_set_num_threads(omp_get_max_threads());
    printf("%d threads, OpenBLAS kernels for %s\n", omp_get_max_threads(), openblas_get_corename());
    printf("%18s %5s %5s %6s   | %-18s| %-18s| %-18s (GF/s: ours, OpenBLAS, share)\n", "", "T", "M", "N", "forward",
           "backward input", "backward weight");
    const int rounds = argc > 2 ? atoi(argv[2]) : 5;
    for (const Shape& shape : shapes) compare(shape, rounds);
    printf("\n%-25s | %-20s | %-20s (4096 tokens, 8 heads)\n", "attention", "forward", "backward");
    for (const AttentionCase& c : attention_cases) attention<float>(c, "float", rounds);
    attention<bf16>(attention_cases[3], "bf16", rounds);
}
