// Whether to update: decided where the numbers are and before anything is touched, so that a GPU waits for no host.
//
//   loss = loss_sum / counted          norm = sqrt(norm_squared)
//   skip, when nothing was counted, when loss or norm is not finite, or, if asked for, when one of them is an outlier:
//   more than so many standard deviations above the mean of its last 128 finite values
//   grad_scale = min(1, clip / norm)
//
// A skipped update leaves weights and moments as they were and does not count for AdamW's bias correction.
#pragma once
#include "adamw.cuh"

// The last values of one quantity.
struct Outliers {
    static constexpr int window = 128;
    double value[window] = {};
    int64_t count = 0;
};

HOST_DEVICE inline bool is_finite(double x) { return x - x == 0; }

HOST_DEVICE inline void outliers_add(Outliers& o, double x) {
    if (is_finite(x)) o.value[o.count++ % Outliers::window] = x;
}

// Standard deviations of x above the mean of the window; 0 until the window is full.
HOST_DEVICE inline double outliers_z(const Outliers& o, double x) {
    if (o.count < Outliers::window) return 0;
    double mean = 0, variance = 0;
    for (double v : o.value) mean += v / Outliers::window;
    for (double v : o.value) variance += (v - mean) * (v - mean) / Outliers::window;
    return variance > 0 ? (x - mean) / sqrt(variance) : 0;
}

enum class Verdict : int32_t { update, no_labels, bad_loss, bad_norm, outlier_loss, outlier_norm };

inline const char* verdict_text(Verdict v) {
    constexpr const char* texts[] = {"",
                                     "no token of this update has a label",
                                     "the loss is not finite",
                                     "the gradient norm is not finite",
                                     "the loss is an outlier",
                                     "the gradient norm is an outlier"};
    return texts[int(v)];
}

struct UpdateRule {
    double counted;                // labels of the update
    double clip;                   // largest norm; 0: no clipping
    double max_z_loss, max_z_norm; // 0: off
};

// Lives in device memory, and in the checkpoint.
struct UpdateState {
    int64_t updates = 0; // done
    Outliers losses, norms;
    double loss_sum = 0, norm_squared = 0; // of this update, over all ranks: what is decided on
    double loss = 0, norm = 0;             // what came of it
    Verdict verdict = Verdict::update;
    AdamWStep adamw = {};
};

HOST_DEVICE inline void update_decide(UpdateState& s, const UpdateRule& rule) {
    s.loss = s.loss_sum / rule.counted, s.norm = sqrt(s.norm_squared);
    const double z_loss = outliers_z(s.losses, s.loss), z_norm = outliers_z(s.norms, s.norm);
    s.verdict = Verdict::update;
    if (rule.counted == 0) s.verdict = Verdict::no_labels;
    else if (!is_finite(s.loss)) s.verdict = Verdict::bad_loss;
    else if (!is_finite(s.norm)) s.verdict = Verdict::bad_norm;
    else if (rule.max_z_loss > 0 && z_loss > rule.max_z_loss) s.verdict = Verdict::outlier_loss;
    else if (rule.max_z_norm > 0 && z_norm > rule.max_z_norm) s.verdict = Verdict::outlier_norm;
    if (rule.counted > 0) outliers_add(s.losses, s.loss), outliers_add(s.norms, s.norm);
    if (s.verdict == Verdict::update) s.updates++;
    const double scale = rule.clip > 0 && s.norm > rule.clip ? rule.clip / s.norm : 1;
    s.adamw = {s.updates, scale, s.verdict != Verdict::update};
}

inline void update_decide(Cpu, UpdateState* s, const UpdateRule& rule) { update_decide(*s, rule); }

#ifdef __CUDACC__
// One thread: a few hundred additions, once an update.
template <class Rule> __global__ void update_decide_kernel(UpdateState* s, Rule rule) { update_decide(*s, rule); }

inline void update_decide(Gpu gpu, UpdateState* s, const UpdateRule& rule) {
    update_decide_kernel<<<1, 1, 0, gpu.stream>>>(s, rule);
    CUDA_CHECK(cudaGetLastError());
}
#endif
