// Small models and packed rows for the tests of the whole program.
#pragma once
#define TRAIN_LLAMA_NO_MAIN
#include "../train_llama.cu"
#include "check.h"

// Every kind of tensor the families have: grouped heads, and when asked for QKV biases and a tied head.
inline Config small_config(bool tied = false, bool bias = false) {
    Config c = make_config(2, 12, 6, 2, 10, 13, 100, 64);
    c.tied = tied, c.qkv_bias = bias;
    return c;
}

// A row as the loader would pack it: documents of hashed lengths 1..9, labels inside the document, and in anchor
// mode the anchor in front.
inline Row make_row(Attention mode, size_t S, int V, uint64_t seed, bool interleaved = false) {
    Row r;
    int32_t doc = mode == Attention::full ? 0 : 1, left = 0, start = 0;
    for (size_t i = 0; i < S; i++) {
        if (left == 0 && i > 0) {
            left = 1 + int32_t(hash64(seed, i) % 9), start = int32_t(i);
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

// A model in memory of its own, with hashed weights large enough that every path matters.
template <class E, class G, class Dev = Cpu> struct TestModel {
    Model<Dev, E, G> m;
    std::vector<uint8_t> memory;

    TestModel(const Config& c, const Layout& layout, const Comm& world = {}, Dev dev = {}) {
        m.dev = dev, m.config = c, m.layout = layout, m.world = m.layers = world;
        Arena arena;
        model_place(m, arena);
        if constexpr (std::is_same_v<Dev, Cpu>) {
            memory.resize(arena.used + Arena::alignment);
            arena = {(uint8_t*)((uintptr_t(memory.data()) + 255) / 256 * 256), 0, {}};
        } else {
            arena = {device_allocate(dev, arena.used), 0, {}}; // until the test program ends
        }
        model_place(m, arena);
        std::vector<E> weights(m.elements);
        for (const ParamInfo& p : param_table(c))
            for (size_t i = p.offset; i < p.offset + p.count(); i++)
                weights[i] = E((p.start == Start::ones ? 1.0 : 0.0) + 0.3 * hash_normal(7, i));
        for (const auto& part : m.parts)
            copy_to_device(dev, part.held, weights.data() + part.held_begin,
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
        model_forward(m, b);
        head_forward(m, b, [](size_t, size_t) {});
        double sum = 0;
        for (size_t t = 0; t < b.T; t++) sum += double(m.loss[t]);
        return sum / double(b.counted);
    }
};

inline Layout small_layout(size_t S, size_t B) {
    Layout layout;
    layout.S = S, layout.B = B, layout.head_chunk = 5;
    return layout;
}
