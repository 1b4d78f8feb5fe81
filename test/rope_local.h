// The layer-local check: how far a logit moves when query and key are both shifted, for single pairs of random vectors.
#pragma once
#include "rope_study.cuh"

// As test_rope.cu's table and the tests use it: d = 128, unit Gaussians that are rounded to bf16 first.
struct LocalCheck {
    double base = 10000;
    size_t D = 128, pairs = 20000;
    int32_t positions = 4096, shift = 16; // queries stand uniformly in [0, positions)
    bool random_keys = false;             // keys likewise; else at 0
    uint64_t seed = 1;
};

// Mean |q.k before - q.k after the shift|, without 1 / sqrt(D); the dot product is exact (in double) unless the logits
// are to be rounded. A: the type that cosines and the rotation are computed in.
template <class A> double local_deviation(const LocalCheck& c, Rounding r) {
    const size_t D = c.D, n = c.pairs;
    std::vector<double> inv_freq(D / 2);
    RopeConfig rope;
    rope.base = c.base;
    const double factor = rope_frequencies(inv_freq.data(), rope, D, 1);
    r.input = Type::bf16;
    auto rotated = [&](uint64_t stream, bool at_zero, int32_t shift) {
        std::vector<A> x(n * D), table(n * D);
        std::vector<int32_t> pos(n);
        for (size_t i = 0; i < n; i++) {
            const double place = hash_uniform(hash64(c.seed, stream), i) * c.positions;
            pos[i] = shift + (at_zero ? 0 : int32_t(place));
        }
        random_normal(Cpu{}, x.data(), n * D, hash64(c.seed, stream + 2), 0, 1);
        study_table(Cpu{}, table.data(), pos.data(), inv_freq.data(), factor, r, n, D);
        study_rotate(Cpu{}, x.data(), table.data(), r, n, 1, 0, D);
        return x;
    };
    auto logits = [&](int32_t shift) {
        const std::vector<A> q = rotated(1, false, shift), k = rotated(2, !c.random_keys, shift);
        std::vector<double> dots(n);
        for (size_t i = 0; i < n; i++) {
            for (size_t d = 0; d < D; d++) dots[i] += double(q[i * D + d]) * double(k[i * D + d]);
            if (r.logits == Type::bf16) dots[i] = study_rounded(dots[i]);
        }
        return dots;
    };
    const std::vector<double> here = logits(0), there = logits(c.shift);
    double sum = 0;
    for (size_t i = 0; i < n; i++) sum += std::fabs(here[i] - there[i]);
    return sum / double(n);
}

// What the literature's set-up gives at base 10000, shift 16, keys at 0 (and random).
struct LocalFigure {
    char letter;
    double at_zero, at_random;
};
constexpr LocalFigure local_figures[] = {
    {'F', 1.25e-4, 1.9e-4}, {'C', 0.0254, 0.030}, {'B', 0.0325, 0.038}, {'A', 0.0399, 0.048}, {'D', 4.33, 5.1}};
