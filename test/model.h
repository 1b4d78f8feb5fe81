// Small models and packed rows for the tests of the whole program.
#pragma once
#define TRAIN_LLAMA_NO_MAIN
#include "../train_llama.cu"
#include "check.h"

constexpr Attention all_modes[] = {Attention::full, Attention::intra, Attention::intra_reset, Attention::anchor};

// Every kind of tensor the families have: grouped heads, and when asked for QKV biases and a tied head.
inline Config small_config(bool tied = false, bool bias = false) {
    Config c = make_config(2, 12, 6, 2, 10, 13, 100, 64);
    c.tied = tied, c.qkv_bias = bias;
    return c;
}

// How rings of that many ranks can share attention.
inline std::vector<RingBackend> exchanges(const Config& c, int ring) {
    std::vector<RingBackend> all = {RingBackend::ring};
    if (ring > 1) all.push_back(RingBackend::allgather);
    if (ring > 1 && c.K % ring == 0) all.push_back(RingBackend::ulysses);
    return all;
}

// A row as the loader would pack it: documents of hashed lengths 1..longest, labels inside the document, and in anchor
// mode the anchor in front.
inline Row make_row(Attention mode, size_t S, int V, uint64_t seed, bool interleaved = false, int longest = 9) {
    Row r;
    int32_t doc = mode == Attention::full ? 0 : 1, left = 0, start = 0;
    for (size_t i = 0; i < S; i++) {
        if (left == 0 && i > 0) {
            left = 1 + int32_t(hash64(seed, i) % longest), start = int32_t(i);
            if (mode != Attention::full && i > 1) doc++;
        }
        bool anchor = mode == Attention::anchor && i == 0;
        r.token.push_back(int32_t(hash64(seed + 1, i) % V));
        r.doc.push_back(anchor ? 0 : doc);
        r.pos.push_back(mode == Attention::intra_reset ? int32_t(i) - start : int32_t(i));
        r.label.push_back(left == 1 ? -1 : int32_t(hash64(seed + 2, i) % V));
        left -= left > 0;
    }
    for (size_t i = 2; interleaved && i < S; i++) // any doc[] is legal: two documents swap a token here and there
        if (hash64(seed + 3, i) % 4 == 0) std::swap(r.doc[i], r.doc[i - 1]);
    for (int32_t l : r.label) r.counted += l >= 0;
    r.inputs = int64_t(S);
    return r;
}

// A model in memory of its own, or on a GPU at `place`, with hashed weights large enough that every path matters.
template <class E, class G, class Dev = Cpu> struct TestModel {
    Model<Dev, E, G> m;
    std::vector<uint8_t> memory;
    size_t bytes = 0; // that it takes

    TestModel(const Config& c, const Layout& layout, const Comm& world = {}, Dev dev = {}, uint8_t* place = nullptr) {
        m.dev = dev, m.config = c, m.layout = layout, m.world = m.background = world;
        Arena arena;
        model_place(m, arena);
        bytes = arena.used;
        if constexpr (std::is_same_v<Dev, Cpu>) {
            memory.resize(arena.used + Arena::alignment);
            arena = {(uint8_t*)((uintptr_t(memory.data()) + 255) / 256 * 256), 0, {}};
        } else {
            if (place) fill_zero(dev, place, arena.used);
            arena = {place ? place : device_allocate(dev, arena.used), 0, {}}; // until the test program ends
        }
        model_place(m, arena);
        m.host_memory = host_allocate(dev, arena.host); // likewise
        set_weights(0.3);
    }

    // `same`: rounded to bf16 first, so that models of all types have the same.
    void set_weights(double size, bool same = false) {
        std::vector<E> weights(m.elements);
        for (const ParamInfo& p : param_table(m.config))
            for (size_t i = p.offset; i < p.offset + p.count(); i++) {
                const double x = (p.start == Start::ones ? 1.0 : 0.0) + size * hash_normal(7, i);
                weights[i] = E(same ? float(bf16(float(x))) : x);
            }
        for (const auto& part : m.parts)
            copy_to_device(m.dev, part.held, weights.data() + part.held_begin,
                           (part.held_end - part.held_begin) * sizeof(E));
    }

    // Summed loss over `counted`, gradients in m.grads, of several ranks in their slices.
    double gradients(const std::vector<Row>& rows, Attention mode, const Comm& ring, double counted, size_t batch) {
        double loss = 0;
        fill_zero(m.dev, m.grad_flat, m.grad_elements * sizeof(G));
        for (size_t first = 0; first < rows.size(); first += batch) {
            const size_t last = std::min(first + batch, rows.size());
            Batch b = batch_make({rows.begin() + first, rows.begin() + last}, mode, ring,
                                 attention_tiles<E>(m.dev, m.config.D), m.layout.exchange);
            model_forward(m, b);
            head_forward_backward(m, b, 1 / counted);
            model_backward(m, b, last == rows.size());
            for (Acc<E> x : to_host(m.dev, m.loss, b.T)) loss += double(x);
        }
        grads_finish(m);
        return loss / counted;
    }
    double loss(const std::vector<Row>& rows, Attention mode) {
        Batch b = batch_make(rows, mode, Comm{});
        model_forward(m, b, true);
        head_forward(m, b, [](size_t, size_t) {});
        double sum = 0;
        for (size_t t = 0; t < b.T; t++) sum += double(m.loss[t]);
        return sum / double(b.counted);
    }
};

// How far from double's the loss and each tensor's gradient may be by the rule for kernels; `alone`, the yardstick, is
// one rank on the CPU. `rounding`: of a tensor's largest gradient, what a yardstick that is exact by chance lacks.
struct Bounds {
    double loss;
    std::vector<double> tensor; // as in param_table
};
template <class E, class G> Bounds bounds_2x(const Model<Cpu, double, double>& exact, const Model<Cpu, E, G>& alone,
                                             double loss, size_t batch_tokens, double rounding = 0) {
    // A mean of losses is no further off than the furthest of them, which the last micro-batch stands for.
    Bounds bounds{2 * largest_error(alone.loss, exact.loss, batch_tokens) + 2 * ulp<float>(loss), {}};
    for (const ParamInfo& p : param_table(exact.config)) {
        double largest = 0;
        for (size_t i = p.offset; i < p.offset + p.count(); i++)
            largest = std::max(largest, std::fabs(exact.grad_flat[i]));
        const double yardstick = largest_error(alone.grad_flat + p.offset, exact.grad_flat + p.offset, p.count());
        bounds.tensor.push_back(2 * yardstick + 2 * ulp<G>(largest) + rounding * largest);
    }
    return bounds;
}

// The gradients that this rank has of every tensor.
template <class Dev, class E, class G>
void check_gradients(const Model<Dev, E, G>& m, const Model<Cpu, double, double>& exact, const Bounds& bounds) {
    const std::vector<ParamInfo> table = param_table(m.config);
    for (size_t t = 0; t < table.size(); t++) {
        const ParamInfo& p = table[t];
        CAPTURE(std::string(p.name) + " " + std::to_string(p.layer));
        const Part<E, G>& part = m.parts[part_of(p, m.config)];
        const size_t begin = part.begin + m.shard_begin(part), end = begin + m.shard_count(part);
        const size_t first = std::max(begin, p.offset), last = std::min(end, p.offset + p.count());
        if (first >= last) continue;
        const std::vector<G> mine = to_host(m.dev, part.grads_shard + (first - begin), last - first);
        CHECK(largest_error(mine.data(), exact.grad_flat + first, last - first) <= bounds.tensor[t]);
    }
}

inline Layout small_layout(size_t S, size_t B) {
    Layout layout;
    layout.S = S, layout.B = B, layout.head_chunk = 5;
    return layout;
}
