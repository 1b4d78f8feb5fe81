// Speed of attention on this GPU, in TFLOP/s of visible pairs (4 D H a pair forward, 10 D H backward).
//
//     build/bench_attention            all cases
//     build/bench_attention 64K        the cases whose name holds this
#include "../layers/attention_mma.cuh"
#include "bench.h"

namespace {
struct Case {
    const char* name;
    size_t T, mean, H, K, D; // mean length of the documents, exponentially spread; 0: one document
    uint64_t seed = 1;       // of their lengths: as many documents and visible pairs as the peers are timed with
};
constexpr Case cases[] = {
    {"4K causal", 4096, 0, 32, 32, 128},
    {"8K causal", 8192, 0, 32, 32, 128},
    {"16K causal", 16384, 0, 32, 32, 128},
    {"32K causal", 32768, 0, 32, 32, 128},
    {"64K causal", 65536, 0, 32, 32, 128},
    {"64K anchor, mean 4096", 65536, 4096, 32, 32, 128, 27175},
    {"64K anchor, mean 16384", 65536, 16384, 32, 32, 128, 194401},
    {"16K anchor, mean 2048", 16384, 2048, 32, 32, 128, 80941},
    {"16K causal, D 64", 16384, 0, 32, 32, 64},
    {"16K causal, 8 KV heads", 16384, 0, 32, 8, 128},
};

// One row: the anchor and documents, or one causal document of which token 0 is the anchor.
Tokens make_row(size_t T, size_t mean, uint64_t seed) {
    Tokens t{{}, {}, {0, int32_t(T)}};
    size_t end = 1;
    for (size_t i = 0, doc = 0; i < T; i++) {
        while (mean > 0 && i == end) end += 16 + size_t(-double(mean) * std::log(1 - hash_uniform(seed, ++doc)));
        t.index.push_back(int32_t(i)), t.doc.push_back(int32_t(doc));
    }
    return t;
}

template <class X> const X* upload(Gpu gpu, const std::vector<X>& from) {
    X* to = (X*)device_allocate(gpu, from.size() * sizeof(X));
    copy_to_device(gpu, to, from.data(), from.size() * sizeof(X));
    return to;
}
DeviceMap upload(Gpu gpu, const TileMap& map) {
    return {upload(gpu, map.tiles), upload(gpu, map.ranges), int32_t(map.tiles.size())};
}

void run(Gpu gpu, const Case& c) {
    const auto [name, T, mean, H, K, D, seed] = c;
    const Tokens t = make_row(T, mean, seed);
    AttentionMap map;
    attention_map_build(map, t, t, attention_tiles<bf16>(gpu, D));
    const TokenLabel *q_label = upload(gpu, token_labels(t, false)), *k_label = upload(gpu, token_labels(t, true));
    const DeviceMap by_queries = upload(gpu, map.forward), by_keys = upload(gpu, map.backward);
    const size_t W = (H + 2 * K) * D;
    bf16 *qkv = bench_normal<bf16>(gpu, T * W, 1), *dout = bench_normal<bf16>(gpu, T * H * D, 2);
    bf16 *out = bench_normal<bf16>(gpu, T * H * D, 3), *dqkv = bench_normal<bf16>(gpu, T * W, 4);
    bf16* anchor = bench_normal<bf16>(gpu, 2 * K * D, 5);
    copy_on_device(gpu, anchor, qkv + H * D, 2 * K * D * sizeof(bf16));
    float *lse = bench_normal<float>(gpu, H * T, 6), *delta = bench_normal<float>(gpu, H * T, 7);
    float *dq = bench_normal<float>(gpu, T * H * D, 8), *danchor = bench_normal<float>(gpu, 2 * K * D, 9);
    const AttentionForward<bf16> forward{qkv,     qkv + H * D, anchor, W,      W,      q_label,
                                         k_label, by_queries,  true,   true,   out,    lse,
                                         nullptr, int(T),      int(T), int(H), int(K), int(D)};
    const AttentionBackward<bf16> backward{qkv,     qkv + H * D, W,       W,      dout,    lse,          delta,
                                           q_label, k_label,     by_keys, dq,     nullptr, dqkv + H * D, W,
                                           danchor, int(T),      int(T),  int(H), int(K),  int(D)};
    auto begin = [&] {
        attention_backward_begin<bf16>(gpu, delta, dq, danchor, dout, out, lse, qkv, W, anchor, t.row_begin.data(), 1,
                                       T, H, K, D);
    };
    auto end = [&] { attention_backward_end<bf16>(gpu, dqkv, W, dq, T, H, D); };
    const int rounds = T > 32768 ? 5 : 11;
    const double forward_ms = bench_ms(
        gpu, [&] { attention_forward_launch(gpu, forward); }, rounds);
    const double begin_ms = bench_ms(gpu, begin, rounds), end_ms = bench_ms(gpu, end, rounds);
    const double main_ms = bench_ms(
        gpu, [&] { attention_backward_launch(gpu, backward); }, rounds);
    const double backward_ms = bench_ms(
        gpu, [&] { begin(), attention_backward_launch(gpu, backward), end(); }, rounds);
    const double pair_flops = double(visible_pairs(t.doc.data(), T)) * double(D * H);
    const double elements = double(T * H * D), copy = 4.28e12; // bytes a second, what a plain copy reaches on an H200
    printf("| %-22s | %8.3f ms %4.0f TF/s | %8.3f ms %4.0f TF/s | main %8.3f, begin %6.3f (%3.0f%%), end %6.3f "
           "(%3.0f%%) |\n",
           name, forward_ms, 4 * pair_flops / forward_ms / 1e9, backward_ms, 10 * pair_flops / backward_ms / 1e9,
           main_ms, begin_ms, 100 * 10 * elements / copy / begin_ms * 1e3, end_ms,
           100 * 6 * elements / copy / end_ms * 1e3);
    fflush(stdout);
    const void* all[] = {qkv,
                         dout,
                         out,
                         dqkv,
                         anchor,
                         lse,
                         delta,
                         dq,
                         danchor,
                         q_label,
                         k_label,
                         by_queries.tiles,
                         by_queries.ranges,
                         by_keys.tiles,
                         by_keys.ranges};
    for (const void* x : all) CUDA_CHECK(cudaFree((void*)x));
}
} // namespace

int main(int argc, char** argv) {
    const Gpu gpu = gpu_open(0);
    printf("%s\n| case | forward | backward | of it: ms (share of copy bandwidth) |\n|---|---|---|---|\n",
           gpu.context->name);
    for (const Case& c : cases)
        if (argc < 2 || strstr(c.name, argv[1])) run(gpu, c);
}
