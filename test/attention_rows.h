// What the tests of attention share: rows of documents in every mode, subsets of their tokens.
#pragma once
#include "../attention_anchor.cuh"
#include "check.h"
#include <functional>

enum class Mode { full, intra, anchor, interleaved, random };
constexpr Mode modes[] = {Mode::full, Mode::intra, Mode::anchor, Mode::interleaved, Mode::random};
inline bool has_anchor(Mode m) { return m != Mode::intra; }

// doc[] of one row, pieces of `mean` tokens in the mean. interleaved: pieces of documents in mixed order; random: any
// document at any place.
inline std::vector<int32_t> make_doc(Mode mode, size_t S, uint64_t seed, double mean = 1 / 0.06) {
    std::vector<int32_t> doc(S);
    int32_t current = 1;
    for (size_t i = 0; i < S && mode != Mode::full; i++) {
        if (i > 0 && hash_uniform(seed, 2 * i) < 1 / mean)
            current = mode == Mode::interleaved ? 1 + int32_t(hash64(seed, i) % 5) : current + 1;
        doc[i] = mode == Mode::random ? 1 + int32_t(hash64(seed, i) % 4) : current;
    }
    if (has_anchor(mode)) doc[0] = 0;
    return doc;
}

inline Tokens make_tokens(Mode mode, size_t B, size_t S, uint64_t seed, double mean = 1 / 0.06) {
    Tokens t{{}, {}, {0}};
    for (size_t b = 0; b < B; b++) {
        std::vector<int32_t> doc = make_doc(mode, S, seed + b, mean);
        for (size_t i = 0; i < S; i++) t.index.push_back(int32_t(i)), t.doc.push_back(doc[i]);
        t.row_begin.push_back(int32_t(t.size()));
    }
    return t;
}

// The tokens for which keep(i) holds; `from` receives their numbers.
inline Tokens subset(const Tokens& t, std::function<bool(size_t)> keep, std::vector<size_t>* from = nullptr) {
    Tokens to{{}, {}, {0}};
    for (size_t b = 0; b < t.rows(); b++) {
        for (size_t i = t.row_begin[b]; i < size_t(t.row_begin[b + 1]); i++) {
            if (!keep(i)) continue;
            to.index.push_back(t.index[i]), to.doc.push_back(t.doc[i]);
            if (from) from->push_back(i);
        }
        to.row_begin.push_back(int32_t(to.size()));
    }
    return to;
}

struct Sizes {
    size_t H, K, D;
    size_t qkv() const { return (H + 2 * K) * D; }
    size_t kv() const { return 2 * K * D; }
};
