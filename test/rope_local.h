// The layer-local check: how far a logit moves when query and key are both shifted, for single pairs of random vectors.
#pragma once
#include "rope_study.cuh"

// As test_rope.cu's table and the tests use it: d = 128, unit Gaussians rounded to bf16, all from one seed.
struct LocalPairs {
    static constexpr size_t D = 128;
    size_t count;
    std::vector<float> q, k;           // (count, D)
    std::vector<int32_t> q_pos, k_pos; // (count)

    // Queries stand uniformly in [0, 4096), keys at 0 or likewise.
    LocalPairs(size_t count, uint64_t seed, bool random_keys, int32_t positions = 4096)
        : count(count), q(count * D), k(count * D), q_pos(count), k_pos(count) {
        random_normal(Cpu{}, q.data(), count * D, hash64(seed, 1), 0, 1);
        random_normal(Cpu{}, k.data(), count * D, hash64(seed, 2), 0, 1);
        for (size_t i = 0; i < count; i++) {
            q_pos[i] = int32_t(hash_uniform(hash64(seed, 3), i) * positions);
            k_pos[i] = random_keys ? int32_t(hash_uniform(hash64(seed, 4), i) * positions) : 0;
        }
    }
};

// Mean |q.k - q.k when both are shifted by 16|, without 1 / sqrt(D); the dot product is exact (in double) unless the
// logits are to be rounded. A: the type that cosines and the rotation are computed in.
template <class A> double local_deviation(const LocalPairs& pairs, Rounding r, double base = 10000) {
    const size_t D = LocalPairs::D, n = pairs.count;
    std::vector<double> inv_freq(D / 2);
    RopeConfig rope;
    rope.base = base;
    const double factor = rope_frequencies(inv_freq.data(), rope, D, 1);
    r.input = Type::bf16;
    auto rotated = [&](const std::vector<float>& from, std::vector<int32_t> pos, int32_t shift) {
        std::vector<A> x(from.begin(), from.end()), table(n * D);
        for (int32_t& p : pos) p += shift;
        study_table(Cpu{}, table.data(), pos.data(), inv_freq.data(), factor, r, n, D);
        study_rotate(Cpu{}, x.data(), table.data(), r, n, 1, 0, D);
        return x;
    };
    auto logits = [&](int32_t shift) {
        const std::vector<A> q = rotated(pairs.q, pairs.q_pos, shift), k = rotated(pairs.k, pairs.k_pos, shift);
        std::vector<double> dots(n);
#pragma omp parallel for schedule(static)
        for (size_t i = 0; i < n; i++) {
            for (size_t d = 0; d < D; d++) dots[i] += double(q[i * D + d]) * double(k[i * D + d]);
            if (r.logits == Type::bf16) dots[i] = study_rounded(dots[i]);
        }
        return dots;
    };
    const std::vector<double> here = logits(0), there = logits(16);
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
