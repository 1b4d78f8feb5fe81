// What the benchmarks of attention share: the cases, their documents, their arrays.
#pragma once
#include "../attention_anchor.cuh"
#include "bench.h"
#include <cmath>
#include <cstring>

struct AttentionCase {
    const char* name;
    size_t T, mean, H, K, D; // mean length of the documents, exponentially spread; 0: one document
    uint64_t seed = 1;       // of their lengths: as many documents and visible pairs as the peers are timed with
};
constexpr AttentionCase attention_cases[] = {
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
inline Tokens make_row(size_t T, size_t mean, uint64_t seed) {
    Tokens t{{}, {}, {0, int32_t(T)}};
    size_t end = 1;
    for (size_t i = 0, doc = 0; i < T; i++) {
        while (mean > 0 && i == end) end += 16 + size_t(-double(mean) * std::log(1 - hash_uniform(seed, ++doc)));
        t.index.push_back(int32_t(i)), t.doc.push_back(int32_t(doc));
    }
    return t;
}

// The arrays of a case, freed with it.
struct Arrays {
    Gpu gpu;
    std::vector<void*> all;
    template <class X> X* keep(const X* x) {
        all.push_back((void*)x);
        return (X*)x;
    }
    template <class X> X* normal(size_t count) { return keep(bench_normal<X>(gpu, count, 1 + all.size())); }
    template <class X> X* upload(const std::vector<X>& from) {
        X* to = keep((X*)device_allocate(gpu, from.size() * sizeof(X)));
        copy_to_device(gpu, to, from.data(), from.size() * sizeof(X));
        return to;
    }
    DeviceMap upload(const TileMap& map) {
        return device_map(map, [this](const auto& from) { return upload(from); });
    }
    ~Arrays() {
        for (void* x : all) CUDA_CHECK(cudaFree(x));
    }
};
