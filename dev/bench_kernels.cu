// The memory-bound kernels at LLaMA-2-7B's shapes against a plain copy, one row a kernel.
//
//     make bench      or      nvcc -std=c++20 -O3 -gencode=arch=compute_90a,code=sm_90a -I. dev/bench_kernels.cu ...
//
// The bytes are what must move at least: every tensor read once and written once, of the embedding only the rows that
// occur. What the kernels move beyond that (partial sums, the order of tokens, weights of norms) is their loss.
#include "../layers/adamw.cuh"
#include "../layers/embedding.cuh"
#include "../layers/grad_norm.cuh"
#include "../layers/loss.cuh"
#include "../layers/matmul.cuh"
#include "../layers/rmsnorm.cuh"
#include "../layers/swiglu.cuh"
#include "../rope.cuh"
#include "bench.h"
#include <chrono>
#include <set>

namespace {
constexpr size_t T = 16384, C = 4096, F = 11008, V = 32000, H = 32, K = 32, D = 128;

template <class E> E* to_device(Gpu gpu, const std::vector<E>& from) {
    E* to = (E*)device_allocate(gpu, from.size() * sizeof(E));
    copy_to_device(gpu, to, from.data(), from.size() * sizeof(E));
    return to;
}

// Normal bf16 values.
bf16* normal(Gpu gpu, size_t count, uint64_t seed, float scale = 1) {
    return bench_normal<bf16>(gpu, count, seed, scale);
}

template <class... P> void release(P*... p) {
    for (void* place : {(void*)p...}) CUDA_CHECK(cudaFree(place));
}

__global__ void busy_kernel(long long clocks) {
    const long long begin = clock64();
    while (clock64() - begin < clocks) {}
}

// Milliseconds of a call among others as in training, where the host runs ahead of the GPU: alone, the launches would
// show. First 0.2 s to settle: behind the allocations, the first 20 ms of a run have been slower. Then the GPU is kept
// busy (2 ms) until the host has given it ten calls; median of 15 times ten.
template <class F> double mean_ms(Gpu gpu, F f) {
    constexpr int calls = 10, rounds = 15;
    cudaEvent_t begin, end;
    CUDA_CHECK(cudaEventCreate(&begin));
    CUDA_CHECK(cudaEventCreate(&end));
    const auto since = std::chrono::steady_clock::now();
    do {
        for (int i = 0; i < calls; i++) f();
        CUDA_CHECK(cudaStreamSynchronize(gpu.stream));
    } while (std::chrono::steady_clock::now() - since < std::chrono::milliseconds(200));
    std::vector<float> times(rounds);
    for (float& ms : times) {
        busy_kernel<<<1, 1, 0, gpu.stream>>>(4000000);
        CUDA_CHECK(cudaEventRecord(begin, gpu.stream));
        for (int i = 0; i < calls; i++) f();
        CUDA_CHECK(cudaEventRecord(end, gpu.stream));
        CUDA_CHECK(cudaEventSynchronize(end));
        CUDA_CHECK(cudaEventElapsedTime(&ms, begin, end));
    }
    cudaEventDestroy(begin), cudaEventDestroy(end);
    std::nth_element(times.begin(), times.begin() + rounds / 2, times.end());
    return times[rounds / 2] / calls;
}

// Tokens as in text: id v about 1 / v as often as the most frequent one, which has about a tenth of all.
void bench_embedding(Gpu gpu, double ceiling) {
    std::vector<int32_t> tokens(T);
    for (size_t t = 0; t < T; t++) tokens[t] = int32_t(std::pow(double(V), hash_uniform(9, t))) - 1;
    const double ids = double(std::set<int32_t>(tokens.begin(), tokens.end()).size()), rows = double(T), row = 2.0 * C;
    TokenOrder order = token_order(tokens);
    uint8_t* memory = device_allocate(gpu, token_order_bytes(gpu, T));
    token_order_upload(gpu, order, memory);
    bf16 *weight = normal(gpu, V * C, 1), *out = normal(gpu, T * C, 2), *dweight = normal(gpu, V * C, 3);
    float* dweight_float = bench_normal<float>(gpu, V * C, 4);
    // Read: the rows of the ids that occur. Written: out. So short, a plain copy does not reach its bandwidth either.
    double ms = mean_ms(gpu, [&] { embedding_forward(gpu, out, order, weight, C); });
    bench_row_bytes("embedding forward", ms, (ids + rows) * row, ceiling);
    ms = mean_ms(gpu, [&] { copy_on_device(gpu, dweight_float, weight, size_t((ids + rows) * row / 2)); });
    bench_row_bytes("  plain copy of this size", ms, (ids + rows) * row, ceiling);
    // Read: dout. Read and written: the rows of the ids that occur.
    ms = mean_ms(gpu, [&] { embedding_backward(gpu, dweight, out, order, C); });
    bench_row_bytes("embedding backward", ms, (2 * ids + rows) * row, ceiling);
    ms = mean_ms(gpu, [&] { embedding_backward(gpu, dweight_float, out, order, C); });
    bench_row_bytes("embedding backward, float dweight", ms, (4 * ids + rows) * row, ceiling);
    release(memory, weight, out, dweight, dweight_float);
}

void bench_rmsnorm(Gpu gpu, double ceiling) {
    bf16 *in = normal(gpu, T * C, 1), *out = normal(gpu, T * C, 2), *weight = normal(gpu, C, 3);
    bf16 *dx = normal(gpu, T * C, 4, 0.01f), *none = nullptr;
    float *rstd = bench_normal<float>(gpu, T, 5), *dweight = bench_normal<float>(gpu, C, 6);
    const double tensor = 2.0 * T * C;
    // Read: in. Written: out.
    double ms = mean_ms(gpu, [&] { rmsnorm_forward(gpu, out, rstd, in, weight, T, C, 1e-5); });
    bench_row_bytes("rmsnorm forward", ms, 2 * tensor, ceiling);
    // Read: dout, in, dresidual. Written: din.
    ms = mean_ms(gpu, [&] { rmsnorm_backward(gpu, dx, dweight, out, in, weight, rstd, dx, T, C); });
    bench_row_bytes("rmsnorm backward", ms, 4 * tensor, ceiling);
    ms = mean_ms(gpu, [&] { rmsnorm_backward(gpu, dx, dweight, out, in, weight, rstd, none, T, C); });
    bench_row_bytes("rmsnorm backward, no residual", ms, 3 * tensor, ceiling);
    release(in, out, weight, dx, rstd, dweight);
}

void bench_rope(Gpu gpu, double ceiling) {
    std::vector<int32_t> positions(T);
    for (size_t t = 0; t < T; t++) positions[t] = int32_t(t);
    std::vector<double> inv_freq(D / 2);
    rope_frequencies(inv_freq.data(), RopeConfig(), D, T);
    int32_t* pos = to_device(gpu, positions);
    bf16* qkv = normal(gpu, T * (H + 2 * K) * D, 1);
    float* table = bench_normal<float>(gpu, T * D, 2);
    // Read and written: the heads of queries and keys. Read: the table.
    const double bytes = 2 * 2.0 * T * (H + K) * D + 4.0 * T * D;
    double ms =
        bench_ms(gpu, [&] { rope_table<bf16>(gpu, table, pos, inv_freq.data(), 1, RopePrecision::exact, T, D); });
    bench_row_bytes("rope table (once a batch)", ms, 4.0 * T * D, ceiling);
    ms = mean_ms(gpu, [&] { rope_forward(gpu, qkv, table, RopePrecision::exact, T, H, K, D); });
    bench_row_bytes("rope forward", ms, bytes, ceiling);
    ms = mean_ms(gpu, [&] { rope_backward(gpu, qkv, table, RopePrecision::exact, T, H, K, D); });
    bench_row_bytes("rope backward", ms, bytes, ceiling);
    ms = mean_ms(gpu, [&] { rope_forward(gpu, qkv, table, RopePrecision::bf16_rotation, T, H, K, D); });
    bench_row_bytes("rope forward, bf16_rotation", ms, bytes, ceiling);
    release(pos, qkv, table);
}

void bench_swiglu(Gpu gpu, double ceiling) {
    bf16 *gate_up = normal(gpu, T * 2 * F, 1), *out = normal(gpu, T * F, 2), *dgate_up = normal(gpu, T * 2 * F, 3);
    const double tensor = 2.0 * T * F;
    // Read: gate, up. Written: out.
    double ms = mean_ms(gpu, [&] { swiglu_forward(gpu, out, gate_up, T, F); });
    bench_row_bytes("swiglu forward", ms, 3 * tensor, ceiling);
    // Read: gate, up, dout. Written: dgate, dup.
    ms = mean_ms(gpu, [&] { swiglu_backward(gpu, dgate_up, out, gate_up, T, F); });
    bench_row_bytes("swiglu backward", ms, 5 * tensor, ceiling);
    release(gate_up, out, dgate_up);
}

// Of Q, K and V. A copy writes as much as it reads; here hardly anything is written.
void bench_bias(Gpu gpu, double ceiling) {
    constexpr size_t N = 3 * C;
    bf16 *dout = normal(gpu, T * N, 1, 0.01f), *dbias = normal(gpu, N, 2);
    float* dbias_float = bench_normal<float>(gpu, N, 3);
    const std::string name = "bias gradient, " + std::to_string(T) + " x " + std::to_string(N);
    // Read: dout.
    double ms = mean_ms(gpu, [&] { matmul_backward_bias(gpu, dbias, dout, T, N); });
    bench_row_bytes(name.c_str(), ms, 2.0 * double(T * N), ceiling);
    ms = mean_ms(gpu, [&] { matmul_backward_bias(gpu, dbias_float, dout, T, N); });
    bench_row_bytes((name + ", float").c_str(), ms, 2.0 * double(T * N), ceiling);
    release(dout, dbias, dbias_float);
}

// In place, so later rounds see the gradients of gradients: the time depends on no value. 512 rows (33 MB) stay in L2
// from one round to the next, so there several sets take turns.
void bench_loss(Gpu gpu, size_t tokens, size_t vocabulary, double ceiling) {
    const size_t sets = std::max(size_t(1), (size_t(1) << 28) / (tokens * vocabulary));
    std::vector<int32_t> labels(tokens);
    for (size_t t = 0; t < tokens; t++) labels[t] = int32_t(hash64(1, t) % vocabulary);
    int32_t* label = to_device(gpu, labels);
    bf16* logits = normal(gpu, sets * tokens * vocabulary, 1, 3);
    float* loss = bench_normal<float>(gpu, tokens, 2);
    size_t turn = 0;
    // Read and written: the logits.
    double ms = mean_ms(gpu, [&] {
        bf16* mine = logits + turn++ % sets * tokens * vocabulary;
        loss_forward_backward(gpu, loss, mine, label, 1e-4, tokens, vocabulary);
    });
    const std::string name = "loss, " + std::to_string(tokens) + " x " + std::to_string(vocabulary);
    const double bytes = 2 * 2.0 * double(tokens * vocabulary);
    bench_row_bytes(name.c_str(), ms, bytes, ceiling);
    if (sets < 2) return release(label, logits, loss);
    ms = mean_ms(gpu, [&] { // so short, a plain copy does not reach its bandwidth either
        const size_t from = turn++ % sets, to = turn % sets, count = tokens * vocabulary;
        copy_on_device(gpu, logits + to * count, logits + from * count, count * sizeof(bf16));
    });
    bench_row_bytes("  plain copy of this size", ms, bytes, ceiling);
    release(label, logits, loss);
}

// Bytes in memory a parameter; those that move: all are read and all but the gradient written.
template <class P, class G, class M> void bench_adamw(Gpu gpu, bool with_master, double ceiling) {
    const size_t count = size_t(1) << 28;
    P* param = bench_normal<P>(gpu, count, 1);
    float* master = with_master ? bench_normal<float>(gpu, count, 1) : nullptr;
    M *m = bench_normal<M>(gpu, count, 2, 0.1f), *v = bench_normal<M>(gpu, count, 3, 0.01f);
    G* grad = bench_normal<G>(gpu, count, 4);
    AdamWStep* step = to_device(gpu, std::vector<AdamWStep>{{10, 0.5, 0}});
    const AdamW a = {1e-4, 0.9, 0.95, 1e-8, 0.1, 1};
    double ms = mean_ms(gpu, [&] { adamw_update(gpu, param, master, m, v, grad, count, 0, a, step); });
    const size_t state = sizeof(P) + 2 * sizeof(M) + (with_master ? 4 : 0), bytes = state + sizeof(G);
    // The parameter is not read where there is a master.
    const size_t moved = 2 * state + sizeof(G) - (with_master ? sizeof(P) : 0);
    const std::string name = "adamw, " + std::to_string(bytes) + " bytes a parameter" + (with_master ? ", master" : "");
    bench_row_bytes(name.c_str(), ms, double(moved) * double(count), ceiling);
    release(param, master, m, v, grad, step);
}

void bench_whole_model(Gpu gpu, double ceiling) {
    const size_t count = size_t(1) << 28;
    bf16* x = normal(gpu, count, 1);
    float* y = bench_normal<float>(gpu, count, 2);
    double* squared = (double*)device_allocate(gpu, 8);
    double ms = mean_ms(gpu, [&] { grad_norm_squared(gpu, squared, x, count); });
    bench_row_bytes("grad_norm, bf16", ms, 2.0 * double(count), ceiling);
    ms = mean_ms(gpu, [&] { grad_norm_squared(gpu, squared, y, count); });
    bench_row_bytes("grad_norm, float", ms, 4.0 * double(count), ceiling);
    ms = mean_ms(gpu, [&] { convert(gpu, y, x, count); });
    bench_row_bytes("convert, bf16 to float", ms, 6.0 * double(count), ceiling);
    ms = mean_ms(gpu, [&] { convert(gpu, x, y, count); });
    bench_row_bytes("convert, float to bf16", ms, 6.0 * double(count), ceiling);
    release(x, y, squared);
}
} // namespace

int main() {
    const Gpu gpu = gpu_open(0);
    for (int i = 0; i < 200; i++) busy_kernel<<<gpu.context->sms, 1024, 0, gpu.stream>>>(4000000); // clocks rise first
    const double copy = bench_copy_bandwidth(gpu);
    printf("%s, plain copy %.0f GB/s; T %zu, C %zu, F %zu, V %zu, H %zu, K %zu, D %zu, bf16\n", gpu.context->name,
           copy / 1e9, T, C, F, V, H, K, D);
    bench_embedding(gpu, copy);
    bench_rmsnorm(gpu, copy);
    bench_rope(gpu, copy);
    bench_swiglu(gpu, copy);
    bench_bias(gpu, copy);
    bench_loss(gpu, 512, V, copy);
    bench_loss(gpu, 2048, V, copy);
    bench_loss(gpu, 512, 128256, copy);
    bench_loss(gpu, 2048, 128256, copy);
    bench_adamw<bf16, bf16, bf16>(gpu, false, copy);
    bench_adamw<bf16, float, bf16>(gpu, true, copy);
    bench_adamw<bf16, float, float>(gpu, false, copy);
    bench_adamw<bf16, float, float>(gpu, true, copy);
    bench_whole_model(gpu, copy);
}
