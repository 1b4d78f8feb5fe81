// Speed of attention on this GPU, in TFLOP/s of visible pairs (4 D H a pair forward, 10 D H backward), and its share of
// the tensor cores' peak.
//
//     build/bench_attention               all cases, by the kernels that the trainer takes
//     build/bench_attention 64K           the cases whose name holds this
//     build/bench_attention "" hot        without a rest, on a GPU that comes from other work, as the peers
//     build/bench_attention "" warm       each measurement behind a second of products, as in training
//     build/bench_attention 64K portable  by mma.sync, as on a GPU for which no kernel is written
//     build/bench_attention "" fixed      the backward in a fixed order, as with --deterministic
//     build/bench_attention 64K alone     Hopper's, each block with a tile of its own; pairs: always in pairs
//     build/bench_attention 4K plain      by the kernels for any type and head size
#include "../attention_anchor.cuh"
#include "../layers/matmul.cuh"
#include "bench_attention.h"
#include <chrono>
#include <thread>

namespace {
// What the data sheets call the tensor cores' peak, dense bf16, FLOP per second: of H100 and H200 SXM 132 SMs, 4096
// FLOP a clock, 1.83 GHz; of A100 108, 2048, 1.41 GHz. The clock may be above, and under load is below. 0: not known.
double nominal_peak(Gpu gpu) {
    const int compute = gpu.context->compute;
    return gpu.context->sms * (compute == 90 ? 4096 * 1.83e9 : compute == 80 ? 2048 * 1.41e9 : 0);
}

// Products of 8192 x 8192 x 8192 for a second: a GPU at work has the clock that its power allows.
void heat(Gpu gpu) {
    constexpr size_t n = 8192;
    static bf16 *const a = bench_normal<bf16>(gpu, n * n, 1), *const b = bench_normal<bf16>(gpu, n * n, 2);
    static bf16* const product = bench_normal<bf16>(gpu, n * n, 3);
    const bf16* none = nullptr;
    const auto end = std::chrono::steady_clock::now() + std::chrono::seconds(1);
    while (std::chrono::steady_clock::now() < end) {
        for (int i = 0; i < 16; i++) matmul_forward(gpu, product, a, b, none, none, n, n, n);
        device_wait(gpu);
    }
}

// `copy`: bytes a second of a plain copy.
void run(Gpu gpu, const AttentionCase& c, const char* kernels, double copy) {
    const auto [name, T, mean, H, K, D, seed] = c;
    const Tokens t = make_row(T, mean, seed);
    AttentionMap map;
    const bool plain = !strcmp(kernels, "plain");
    AttentionTiles tiles = plain ? attention_simt_tiles() : attention_tiles<bf16>(gpu, D);
    if (!strcmp(kernels, "alone")) tiles.pairs_from = 0;
    if (!strcmp(kernels, "pairs")) tiles.pairs_from = 1;
    attention_map_build(map, t, t, tiles);
    Arrays m{gpu, {}};
    const TokenLabel *q_label = m.upload(token_labels(t, false)), *k_label = m.upload(token_labels(t, true));
    const DeviceMap by_queries = m.upload(map.forward), by_keys = m.upload(map.backward);
    const size_t W = (H + 2 * K) * D;
    bf16 *qkv = m.normal<bf16>(T * W), *dout = m.normal<bf16>(T * H * D), *out = m.normal<bf16>(T * H * D);
    bf16 *dqkv = m.normal<bf16>(T * W), *anchor = m.normal<bf16>(2 * K * D);
    float *lse = m.normal<float>(H * T), *delta = m.normal<float>(H * T), *dq = m.normal<float>(T * H * D);
    float* danchor = m.normal<float>(2 * K * D);
    copy_on_device(gpu, anchor, qkv + H * D, 2 * K * D * sizeof(bf16));
    const AttentionForward<bf16> forward{qkv,     qkv + H * D, anchor, W,      W,      q_label,
                                         k_label, by_queries,  true,   true,   out,    lse,
                                         nullptr, int(T),      int(T), int(H), int(K), int(D)};
    const AttentionBackward<bf16> backward{qkv,     qkv + H * D, W,       W,      dout,    lse,          delta,
                                           q_label, k_label,     by_keys, dq,     nullptr, dqkv + H * D, W,
                                           danchor, int(T),      int(T),  int(H), int(K),  int(D)};
    auto begin = [&] {
        attention_backward_begin<bf16>(gpu, delta, dq, danchor, dout, out, lse, qkv, W, anchor, t.row_begin.data(), 1,
                                       T, H, K, D, attention_dq_order<bf16>(gpu, D));
    };
    auto end = [&] { attention_store_dq<bf16>(gpu, dqkv, W, dq, T, H, D); };
    auto run_forward = [&] { plain ? attention_simt_forward(gpu, forward) : attention_forward_launch(gpu, forward); };
    auto run_backward = [&] {
        plain ? attention_simt_backward(gpu, backward) : attention_backward_launch(gpu, backward);
    };
    const int rounds = T > 32768 ? 5 : 11;
    // Forward, then backward, as the peers do it: a GPU that has been busy for longer is slower. Its parts come last.
    const bool warm = !strcmp(kernels, "warm");
    if (warm) heat(gpu);
    const double forward_ms = bench_ms(gpu, run_forward, rounds);
    if (warm) heat(gpu);
    const double backward_ms = bench_ms(
        gpu, [&] { begin(), run_backward(), end(); }, rounds);
    const double begin_ms = bench_ms(gpu, begin, rounds), end_ms = bench_ms(gpu, end, rounds);
    const double main_ms = bench_ms(gpu, run_backward, rounds);
    const double pair_flops = double(visible_pairs(t.doc.data(), T)) * double(D * H);
    const double elements = double(T * H * D), peak = nominal_peak(gpu);
    auto print_rate = [&](double ms, double flops) {
        printf(" %8.3f ms %4.0f TF/s", ms, flops / ms / 1e9);
        if (peak > 0) printf(" %4.1f%%", 100 * flops / (ms * 1e-3) / peak);
        printf(" |");
    };
    printf("| %-22s |", name);
    print_rate(forward_ms, 4 * pair_flops), print_rate(backward_ms, 10 * pair_flops);
    printf(" main %8.3f, begin %6.3f (%3.0f%%), end %6.3f (%3.0f%%) |\n", main_ms, begin_ms,
           100 * 10 * elements / copy / begin_ms * 1e3, end_ms, 100 * 6 * elements / copy / end_ms * 1e3);
    fflush(stdout);
}
} // namespace

int main(int argc, char** argv) {
    const char *only = argc > 1 ? argv[1] : "", *kernels = argc > 2 ? argv[2] : "";
    const Gpu gpu = gpu_open(0, !strcmp(kernels, "fixed"), !strcmp(kernels, "portable"));
    const double copy = bench_copy_bandwidth(gpu), peak = nominal_peak(gpu);
    printf("%s %s, plain copy %.0f GB/s, tensor cores' nominal peak ", gpu.context->name, kernels, copy / 1e9);
    if (peak > 0) printf("%.0f TF/s (dense bf16)\n", peak / 1e12);
    else printf("not known\n");
    printf("| case | forward, share of peak | backward | of it: ms (share of a copy) |\n|---|---|---|---|\n");
    const bool hot = !strcmp(kernels, "hot"), rests = !hot && strcmp(kernels, "warm");
    if (hot) run(gpu, {"64K causal, to heat", 65536, 0, 32, 32, 128}, kernels, copy);
    for (const AttentionCase& c : attention_cases) {
        if (!strstr(c.name, only)) continue;
        // A rest: behind a long case a short one is slower by up to a sixth.
        if (rests) std::this_thread::sleep_for(std::chrono::seconds(2));
        run(gpu, c, kernels, copy);
    }
}
