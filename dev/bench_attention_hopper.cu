// Speed of the Hopper attention, in TFLOP/s of visible pairs (4 D H a pair forward, 10 D H backward).
//
//     build/bench_attention_hopper            all cases
//     build/bench_attention_hopper 64K        the cases whose name holds this
#include "../layers/attention_hopper.cuh"
#include "../layers/attention_mma.cuh" // begin and end of the backward
#include "bench_attention.h"

namespace {
void run(Gpu gpu, const AttentionCase& c) {
    const auto [name, T, mean, H, K, D, seed] = c;
    const Tokens t = make_row(T, mean, seed);
    AttentionMap map;
    attention_map_build(map, t, t, attention_hopper_tiles(D));
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
    const int rounds = T > 32768 ? 5 : 11;
    const double forward_ms = bench_ms(
        gpu, [&] { attention_hopper_forward(gpu, forward); }, rounds);
    const double main_ms = bench_ms(
        gpu, [&] { attention_hopper_backward(gpu, backward); }, rounds);
    const double backward_ms = bench_ms(
        gpu,
        [&] {
            attention_backward_begin<bf16>(gpu, delta, dq, danchor, dout, out, lse, qkv, W, anchor, t.row_begin.data(),
                                           1, T, H, K, D);
            attention_hopper_backward(gpu, backward);
            attention_backward_end<bf16>(gpu, dqkv, W, dq, T, H, D);
        },
        rounds);
    const double pair_flops = double(visible_pairs(t.doc.data(), T)) * double(D * H) * 1e-9;
    printf("| %-22s | %8.3f ms %4.0f TF/s | %8.3f ms %4.0f TF/s | %8.3f ms %4.0f TF/s |\n", name, forward_ms,
           4 * pair_flops / forward_ms, backward_ms, 10 * pair_flops / backward_ms, main_ms, 10 * pair_flops / main_ms);
    fflush(stdout);
}
} // namespace

int main(int argc, char** argv) {
    const Gpu gpu = gpu_open(0);
    printf("%s\n| case | forward | backward | without begin and end |\n|---|---|---|---|\n", gpu.context->name);
    for (const AttentionCase& c : attention_cases)
        if (argc < 2 || strstr(c.name, argv[1])) run(gpu, c);
}
