// The time of a training step on GPUs, from what its parts reach alone: --plan prints it.
//
//   products           6 T (weights of the layers and the head) FLOPs at the rate of cuBLASLt's products, tuned
//   attention          4 H D FLOPs a visible pair forward, 10 backward, at the kernels' rate for as many keys a query
//   passes over memory bytes that must be read and written once, at the rate of a plain copy
//   transfers          bytes that a rank receives, at the rate of the link for messages of that size; what is computed
//                      meanwhile hides them, and only the rest is in the step
//
// The ceilings come from benchmarks of the parts, none from a step. Left out: launches, waiting for ranks that are late
// in a single step of the ring, broadcasts of the anchor, multiprocessors that NCCL takes, the memory's bandwidth that
// transfers and sums over ranks take beside the layers. T counts tokens of a micro-batch on one rank.
#pragma once
#include "comm.h"
#include "config.h"
#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

struct RatePoint {
    double size, rate;
};
using RateCurve = std::vector<RatePoint>; // ascending

// Between two points by the logarithm of the size, beyond the ends as at the nearest.
inline double rate_at(const RateCurve& curve, double size) {
    if (size <= curve.front().size) return curve.front().rate;
    for (size_t i = 1; i < curve.size(); i++) {
        const RatePoint &a = curve[i - 1], &b = curve[i];
        if (size <= b.size) return a.rate + (b.rate - a.rate) * std::log(size / a.size) / std::log(b.size / a.size);
    }
    return curve.back().rate;
}

// FLOP/s by visible keys a query, in the mean.
struct AttentionCeilings {
    bool portable, deterministic;
    int32_t D;
    RateCurve forward, backward;
};
struct Ceilings {
    const char* gpu;          // as its driver names it
    double products, untuned; // FLOP/s, bf16; with few tokens they are slower; untuned: with --deterministic
    double copy;              // bytes/s, read and written
    std::vector<AttentionCeilings> attention;
    RateCurve ipc, nccl; // bytes/s that a rank receives, by bytes of a message
};

// Sections of dev/LOG.md. Keys a query are the row's visible pairs over its tokens.
// clang-format off
inline const Ceilings known_ceilings[] = {{
    "NVIDIA H200",
    658e12, 626e12, // "matrix products, H200, commit a7e1569": over all fifteen of 7B, 16384 tokens; first guesses
    4290e9, // "memory-bound kernels, H200, commit b4e3d60": the copy
    {// "Q in registers", commit 3c23a96: 16K anchor 2048, 4K causal, 64K anchor 4096, 8K causal, 64K anchor 16384, then
     // 16K, 32K and 64K causal
     {false, false, 128,
      {{837, 501e12}, {2048, 631e12}, {2587, 651e12}, {4096, 700e12}, {6048, 622e12}, {8192, 738e12}, {16384, 668e12},
       {32768, 680e12}},
      {{837, 416e12}, {2048, 548e12}, {2587, 520e12}, {4096, 616e12}, {6048, 568e12}, {8192, 585e12}, {16384, 613e12},
       {32768, 620e12}}},
     {false, false, 64, {{8192, 469e12}}, {{8192, 469e12}}}, // the same, 16K causal, D = 64
     // `--deterministic`, "with turns", commit bf0d7e7, the same cases; the forward is that of above
     {false, true, 128,
      {{837, 501e12}, {2048, 631e12}, {2587, 651e12}, {4096, 700e12}, {6048, 622e12}, {8192, 738e12}, {16384, 668e12},
       {32768, 680e12}},
      {{837, 353e12}, {2048, 456e12}, {2587, 465e12}, {4096, 550e12}, {6048, 537e12}, {8192, 540e12}, {16384, 572e12},
       {32768, 584e12}}},
     {false, true, 64, {{8192, 469e12}}, {{8192, 397e12}}},
     // "portable attention", commit 9fb9da9: 4K, 16K anchor 2048, 8K, 16K, 64K anchor 4096, 32K, 64K anchor 16384, 64K
     {true, false, 128,
      {{2048, 302e12}, {3587, 357e12}, {4096, 376e12}, {8192, 412e12}, {8955, 389e12}, {16384, 385e12}, {16512, 403e12},
       {32768, 413e12}},
      {{2048, 261e12}, {3587, 288e12}, {4096, 302e12}, {8192, 325e12}, {8955, 321e12}, {16384, 330e12}, {16512, 328e12},
       {32768, 332e12}}},
     {true, false, 64, {{8192, 371e12}}, {{8192, 286e12}}}, // the same, 16K causal, D = 64
     // 16K and 64K causal at 6dc3c3d
     {true, true, 128, {{8192, 412e12}, {32768, 413e12}}, {{8192, 228e12}, {32768, 237e12}}}},
    // "Several GPUs", links of H200s: 8, 32, 128 and 512 MiB
    {{8 << 20, 316e9}, {32 << 20, 358e9}, {128 << 20, 370e9}, {512 << 20, 374e9}},
    {{8 << 20, 174e9}, {32 << 20, 238e9}, {128 << 20, 290e9}, {512 << 20, 355e9}},
}};
// clang-format on

// Null: nothing is known of this GPU.
inline const Ceilings* ceilings_of(const std::string& gpu) {
    for (const Ceilings& c : known_ceilings)
        if (gpu == c.gpu) return &c;
    return nullptr;
}
inline const AttentionCeilings* ceilings_of(const Ceilings& c, int32_t D, bool portable, bool deterministic) {
    for (const AttentionCeilings& a : c.attention)
        if (a.D == D && a.portable == portable && a.deterministic == deterministic) return &a;
    return nullptr;
}

// Layers of which the backward computes again what these policies of --recompute name.
struct LayersAgain {
    int norm = 0, swiglu = 0, residual = 0, qkv = 0, ffn = 0, attention = 0;
};
enum class KeysTravel { ring, allgather, ulysses };

// Bytes a second between a GPU and its host, PCIe 5.0 with 16 lanes: assumed, it was not measured.
constexpr double host_rate = 50e9;

// An update, as one of its ranks sees it.
struct StepWork {
    double batches = 1;              // micro-batches of an update
    double T = 0, pairs = 0;         // of a micro-batch: tokens and visible pairs of a rank, the mean of the ring's
    double imbalance = 1, moved = 0; // largest over mean pairs; keys sent, as a share of what a plain ring sends
    int ring = 1, world = 1, zero = 1;
    KeysTravel travel = KeysTravel::ring;
    bool nccl = false;
    double weight = 2, gradient = 2, moment = 2; // bytes
    bool master = false;
    LayersAgain again;
    double offloaded = 0; // bytes of a token's activations in a layer that wait in the host's memory
};

// `seconds` alone, `counted` in the step: less, where something else goes on meanwhile.
struct StepPart {
    const char* name;
    double flops, bytes, moved; // bytes read and written; bytes from other ranks, or to the host and back
    double seconds, counted;
};

// Elements of a layer's matrices; biases and norms are left out.
inline double layer_matrices(const Config& c) {
    return double(c.C) * double(c.qkv_width()) + double(c.H) * c.D * c.C + 3.0 * c.C * c.F;
}
inline double matrix_elements(const Config& c) {
    return c.L * layer_matrices(c) + (c.tied ? 1.0 : 2.0) * double(c.V) * c.C;
}
// FLOPs, per token, of every product of the forward once; the backward has two of each.
inline double product_flops(const Config& c) { return 2 * (c.L * layer_matrices(c) + double(c.V) * c.C); }

// Bytes that the passes over memory of one layer's token move, elements of `e` bytes.
struct LayerBytes {
    double norms, rope, swiglu, norms_back, swiglu_back; // the residual goes through the norms' backward
};
inline LayerBytes layer_bytes(const Config& c, double e) {
    const double C = c.C, F = c.F, D = c.D;
    return {2 * 2 * C * e, 2 * (c.H + c.K) * D * e + 4 * D, 3 * F * e, 2 * 4 * C * e, 5 * F * e};
}

// Visible keys a query in the mean of one call of attention. A ring has a call for own keys, and one for each other
// rank's that the mask does not hide.
inline double keys_a_query(const StepWork& w) {
    return w.pairs / w.T / (w.travel == KeysTravel::ring ? 1 + (w.ring - 1) * w.moved : 1);
}

// What one layer's attention moves between the ranks of a ring, forward and backward, and what of it nothing hides.
// `attention`: its own seconds.
struct KeysTime {
    double moved[2] = {}, seconds[2] = {}, counted[2] = {}; // bytes, seconds
    double bytes[2] = {};                                   // read and written, to pack and to add
};
inline KeysTime keys_time(const Config& c, const StepWork& w, const RateCurve& link, const double* attention /*(2)*/) {
    KeysTime k;
    const double n = w.ring, steps = n - 1, heads = c.H * double(c.D), keys = 2.0 * c.K * c.D;
    if (w.ring == 1) return k;
    if (w.travel == KeysTravel::ulysses) { // there: Q, K, V, in the backward O and dO as well; back: O, or dQ, dK, dV
        const double width[2] = {2 * heads + keys, 4 * heads + 2 * keys};
        for (int i : {0, 1}) {
            k.moved[i] = steps / n * w.T * width[i] * w.weight;
            k.seconds[i] = k.counted[i] = k.moved[i] / rate_at(link, k.moved[i] / steps / 2);
            k.bytes[i] = 4 * w.T * width[i] * w.weight; // packed and unpacked
        }
        return k;
    }
    const double tokens = w.moved * w.T, sums = 4; // of a step; the gradients of keys are float
    const double fetch = tokens * keys * w.weight, give = tokens * keys * sums;
    const double fetching = fetch / rate_at(link, fetch), giving = give / rate_at(link, give);
    for (int i : {0, 1}) {
        k.moved[i] = steps * (fetch + i * give);
        k.seconds[i] = steps * (fetching + i * giving);
        k.bytes[i] = 2 * w.T * keys * w.weight; // the own keys, packed
    }
    // The output so far, read and written by the queries that see some of a step's keys: about as many as these keys.
    if (w.travel == KeysTravel::ring) k.bytes[0] += steps * tokens * heads * 2 * sums;
    k.bytes[1] += w.T * keys * (2 * sums + w.weight) + steps * tokens * keys * 4 * sums; // cleared, added, rounded
    if (w.travel == KeysTravel::allgather) {
        std::copy(k.seconds, k.seconds + 2, k.counted);
        return k;
    }
    // A step's transfers have the attention of the step before; the last step's gradients have nothing.
    for (int i : {0, 1}) k.counted[i] = steps * std::max(0.0, k.seconds[i] / steps - attention[i] / n);
    k.counted[1] += giving;
    return k;
}

// Sums of gradients and weights that are fetched (ZeRO), for an update. `spare`: how long the link of a rank is idle in
// the forward and in the backward of one layer.
inline void shared_parts(std::vector<StepPart>& parts, const Config& c, const StepWork& w, const RateCurve& link,
                         const double* spare /*(2)*/) {
    if (w.world == 1) return;
    const double others = (w.world - 1.0) / w.world, L = c.L, layer = layer_matrices(c), ends = double(c.V) * c.C;
    const double all = matrix_elements(c);
    auto seconds = [&](double elements, double bytes, double message) {
        return others * elements * bytes / rate_at(link, message);
    };
    // Sums go through a scratch of which pieces from all others take 3/8. Those of the lowest layer and the embedding
    // have nothing beside them, or the next micro-batch.
    const double piece = 0.375 * comm_scratch_bytes / (w.world - 1), sums = w.zero >= 2 ? w.batches : 1;
    const double sum = seconds(layer, w.gradient, std::min(piece, layer * w.gradient / w.world));
    const double sum_ends = sum * ends / layer;
    parts.push_back({"sums of gradients", 0, 0, sums * others * all * w.gradient, sums * sum * all / layer,
                     sums * (L - 1) * std::max(0.0, sum - spare[1]) + sum + sum_ends});
    auto fetch = [&](double elements) { return seconds(elements, w.weight, elements * w.weight / w.world); };
    // A layer ahead, in the update's first forward, or with ZeRO-3 in every forward and backward; the embedding and the
    // first layer have nothing before them.
    const double left = std::max(0.0, spare[1] - sum);
    const double forward = L * fetch(layer) + fetch(ends) * (c.tied ? 1 : 2);
    const double late_forward = fetch(ends) + fetch(layer) + (L - 1) * std::max(0.0, fetch(layer) - spare[0]);
    if (w.zero < 3) {
        parts.push_back({"weights gathered", 0, 0, others * all * w.weight, forward, late_forward});
        return;
    }
    const double time = w.batches * (forward + L * fetch(layer));
    const double late = late_forward + L * std::max(0.0, fetch(layer) - left);
    parts.push_back(
        {"weights fetched", 0, 0, w.batches * others * (all + L * layer) * w.weight, time, w.batches * late});
}

// Bytes a parameter of this rank's: AdamW reads and writes weight (or master, then the weight is written), moments, and
// reads the gradient, as the norm does before.
inline double optimizer_bytes(const StepWork& w) {
    return (w.master ? w.weight + 2 * 4 : 2 * w.weight) + 4 * w.moment + 2 * w.gradient;
}

// The parts of an update on one rank, in the order of the table that --plan prints.
inline std::vector<StepPart> step_parts(const Ceilings& ceilings, const AttentionCeilings& attention, const Config& c,
                                        const StepWork& w) {
    const double L = c.L, T = w.T, C = c.C, pair = w.pairs * c.H * c.D;
    const double product_rate = attention.deterministic ? ceilings.untuned : ceilings.products;
    const LayerBytes b = layer_bytes(c, w.weight);
    std::vector<StepPart> parts;
    auto add = [&](const char* name, double flops, double flop_rate, double bytes) -> StepPart& {
        const double seconds = w.batches * (flops / flop_rate + bytes / ceilings.copy);
        return parts.emplace_back(StepPart{name, w.batches * flops, w.batches * bytes, 0, seconds, seconds});
    };
    const double keys = keys_a_query(w);
    const double rate[2] = {rate_at(attention.forward, keys) / w.imbalance,
                            rate_at(attention.backward, keys) / w.imbalance};
    const double pass[2] = {4 * pair / rate[0], 10 * pair / rate[1]}; // one layer's attention
    add("products", 3 * T * product_flops(c), product_rate, 0);
    add("attention, forward", 4 * L * pair, rate[0], 0);
    add("attention, backward", 10 * L * pair, rate[1], 0);
    add("norms, RoPE, SwiGLU", 0, 1, L * T * (b.norms + 2 * b.rope + b.swiglu + b.norms_back + b.swiglu_back));
    add("embedding, loss", 0, 1, T * (4 + 5) * C * w.weight + 2 * T * c.V * w.weight); // with the last norm

    const LayersAgain& again = w.again;
    const double again_flops =
        2 * T *
        (again.residual * double(c.H) * c.D * C + again.qkv * C * double(c.qkv_width()) + again.ffn * 2.0 * C * c.F);
    add("recomputed products", again_flops, product_rate, 0);
    add("recomputed attention", 4 * again.attention * pair, rate[0], 0);
    add("recomputed norms, RoPE, SwiGLU", 0, 1,
        T * (again.norm * b.norms + again.qkv * b.rope + again.swiglu * b.swiglu));

    const double elements = matrix_elements(c), mine = elements / w.world;
    const double sums = w.zero >= 2 && w.world > 1 ? w.batches * (elements + 3 * mine) : 0; // cleared, added
    const double bytes = mine * optimizer_bytes(w) + (sums + (w.zero >= 2 ? mine : elements)) * w.gradient;
    parts.push_back({"AdamW, norm, cleared gradients", 0, bytes, 0, bytes / ceilings.copy, bytes / ceilings.copy});

    const RateCurve& link = w.nccl ? ceilings.nccl : ceilings.ipc;
    const KeysTime k = keys_time(c, w, link, pass);
    const double forwards = w.batches * (L + again.attention), backwards = w.batches * L;
    if (w.ring > 1) {
        const double copies = forwards * k.bytes[0] + backwards * k.bytes[1];
        parts.push_back({"ring, copies and sums", 0, copies, 0, copies / ceilings.copy, copies / ceilings.copy});
        parts.push_back({"ring, keys and gradients", 0, 0, forwards * k.moved[0] + backwards * k.moved[1],
                         forwards * k.seconds[0] + backwards * k.seconds[1],
                         forwards * k.counted[0] + backwards * k.counted[1]});
    }
    const double product = 2 * T * layer_matrices(c) / product_rate; // one layer, forward
    const double recomputed = (again_flops / product_rate + 4 * again.attention * pair / rate[0]) / L;
    const double spare[2] = {std::max(0.0, product + pass[0] - k.seconds[0]),
                             std::max(0.0, 2 * product + pass[1] + recomputed - k.seconds[1])};
    if (w.offloaded > 0) { // a layer's leave beside the next one's forward, and come back beside its backward
        const double layers = w.batches * (L - 2), bytes = T * w.offloaded, seconds = bytes / host_rate;
        const double forward = product + pass[0], backward = 2 * product + pass[1] + recomputed;
        parts.push_back({"offloaded, to the host and back", 0, 0, 2 * layers * bytes, 2 * layers * seconds,
                         layers * (std::max(0.0, seconds - forward) + std::max(0.0, seconds - backward))});
    }
    shared_parts(parts, c, w, link, spare);
    return parts;
}

inline double step_seconds(const std::vector<StepPart>& parts) {
    double seconds = 0;
    for (const StepPart& p : parts) seconds += p.counted;
    return seconds;
}

// tokens and model FLOPs of the update, over all ranks.
inline void step_print(const Ceilings& ceilings, const AttentionCeilings& attention, const Config& c, const StepWork& w,
                       double tokens, double flops) {
    const std::vector<StepPart> parts = step_parts(ceilings, attention, c, w);
    const double seconds = step_seconds(parts), least = attention.forward.front().size;
    double open = 0; // transfers that nothing hides
    if (keys_a_query(w) < least)
        printf("  attention to fewer than %.0f keys a call is not measured: at that rate\n", least);
    if (w.world > 1)
        printf("  transfers as between two GPUs of a host by %s%s\n", w.nccl ? "NCCL" : "CUDA IPC",
               w.world > 8 ? "; hosts of 8 GPUs, links between them are not measured" : "");
    printf("  %-32s %9s %9s %9s %9s %9s\n", "a step of a rank", "TFLOP", "GB", "GB moved", "ms", "counted");
    for (const StepPart& p : parts) {
        if (p.seconds == 0) continue;
        printf("  %-32s %9.1f %9.1f %9.1f %9.1f %9.1f\n", p.name, p.flops / 1e12, p.bytes / 1e9, p.moved / 1e9,
               1e3 * p.seconds, 1e3 * p.counted);
        if (p.moved > 0) open += p.counted;
    }
    printf("  %.0f ms a step, %.0f tokens/s, %.1f TFLOP/s per GPU", 1e3 * seconds, tokens / seconds,
           flops / seconds / w.world / 1e12);
    if (w.world > 1) printf(", %.1f%% of it transfers that nothing hides", 100 * open / seconds);
    printf("\n");
}
