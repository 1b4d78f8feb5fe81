// train_llama: trains LLaMA-2-class models on long contexts, every layer written by hand. Read this first.
//
// The way of the data: tokens are packed into rows (core/dataloader.h), a row is spread over the ranks of a
// ring (layers/ring.cuh), model_forward and model_backward carry it through the layers and add the gradients of all
// ranks on the way, model_update moves the weights.
//
//   L layers   B batch (rows a ring works on at once)   T local tokens (of all B rows on this rank)
//   S sequence (global tokens of a row)   C channels   H heads   K KV heads   D head size
//   F feed-forward   V vocabulary   E element type   G of weight gradients   A = Acc<E>, in which sums are formed
#include "attention_anchor.cuh"
#include "core/arena.h"
#include "core/checkpoint.h"
#include "core/comm.h"
#include "core/config.h"
#include "core/dataloader.h"
#include "core/estimate.h"
#include "core/log.h"
#include "core/options.h"
#include "core/types.h"
#include "layers/adamw.cuh"
#include "layers/convert.cuh"
#include "layers/embedding.cuh"
#include "layers/grad_norm.cuh"
#include "layers/loss.cuh"
#include "layers/matmul.cuh"
#include "layers/ring.cuh"
#include "layers/rmsnorm.cuh"
#include "layers/swiglu.cuh"
#include "layers/update.cuh"
#include "rope.cuh"
#include <csignal>
#include <omp.h>
#include <optional>
#include <set>
#include <sys/stat.h>
#include <unistd.h>
#ifdef __SSE__
#include <xmmintrin.h>
#endif

// Parameters, in the order of the weights file. A tensor made of several Hugging Face tensors holds their rows
// one after the other: one product reads the input once. Rows of 0: this model has no such tensor.
//
// clang-format off
//        field        Hugging Face names                                    rows              columns  decay  start
#define PARAMS_FIRST(PARAM)                                                                                            \
    PARAM(embed,       "model.embed_tokens.weight",                          V,                C,       true,  normal)
#define PARAMS_LAYER(PARAM)                                                                                            \
    PARAM(att_norm,    "input_layernorm.weight",                             1,                C,       false, ones)   \
    PARAM(wqkv,        "self_attn.q_proj.weight|self_attn.k_proj.weight|self_attn.v_proj.weight",                      \
                                                                             (H + 2 * K) * D,  C,       true,  normal) \
    PARAM(bqkv,        "self_attn.q_proj.bias|self_attn.k_proj.bias|self_attn.v_proj.bias",                            \
                                                                             bias * (H + 2 * K) * D, 1, false, zeros)  \
    PARAM(wo,          "self_attn.o_proj.weight",                            C,                H * D,   true,  scaled) \
    PARAM(ffn_norm,    "post_attention_layernorm.weight",                    1,                C,       false, ones)   \
    PARAM(wgate_up,    "mlp.gate_proj.weight|mlp.up_proj.weight",            2 * F,            C,       true,  normal) \
    PARAM(wdown,       "mlp.down_proj.weight",                               C,                F,       true,  scaled)
#define PARAMS_LAST(PARAM)                                                                                             \
    PARAM(final_norm,  "model.norm.weight",                                  1,                C,       false, ones)   \
    PARAM(head,        "lm_head.weight",                                     untied * V,       C,       true,  normal)

// Activations of a layer. `kept` holds one for every layer; the others are kept, or, in the layers for which
// --recompute names them, share one place that the backward fills again. What --offload names waits for the backward in
// the host's memory. N: tokens of a feed-forward tile, mostly T.
//
//        field        elements             type  policy
#define ACTIVATIONS(ACT)                                                                                               \
    ACT(x,             T * C,               E,    input)     /* residual stream that enters the layer */               \
    ACT(att_normed,    T * C,               E,    norm)                                                                \
    ACT(att_rstd,      T,                   A,    kept)                                                                \
    ACT(qkv,           T * (H + 2 * K) * D, E,    qkv)       /* after RoPE: (T, H + 2K, D) */                          \
    ACT(att,           T * H * D,           E,    attention)                                                           \
    ACT(lse,           T * H,               A,    attention)                                                           \
    ACT(h,             T * C,               E,    residual)  /* residual stream between attention and feed-forward */  \
    ACT(ffn_normed,    T * C,               E,    norm)                                                                \
    ACT(ffn_rstd,      T,                   A,    kept)                                                                \
    ACT(gate_up,       N * 2 * F,           E,    ffn)                                                                 \
    ACT(act,           N * F,               E,    swiglu)
// clang-format on

#define FIELD(name, ...) E* name;
template <class E> struct LayerParams { PARAMS_LAYER(FIELD) };
template <class E> struct Params {
    PARAMS_FIRST(FIELD)
    PARAMS_LAST(FIELD)
    std::vector<LayerParams<E>> layer;
};
#undef FIELD

#define FIELD(name, elements, type, policy) type* name;
template <class E, class A = Acc<E>> struct LayerActs { ACTIVATIONS(FIELD) E* out; }; // out: the next layer's x
#undef FIELD

// What the backward computes again, from cheap to dear: in how many layers, counted from the first.
struct Recompute {
    int norm = 0, swiglu = 0, residual = 0, qkv = 0, ffn = 0, attention = 0;
    static constexpr int kept = 0, input = 0;
};
// What waits in the host's memory, instead of being kept or computed again.
struct Offload {
    bool input = false, residual = false, qkv = false, attention = false;
    static constexpr bool kept = false, norm = false, swiglu = false, ffn = false;
};
// Which of these policies are of activations that the feed-forward alone uses.
struct FeedForward {
    static constexpr bool kept = false, input = false, norm = false, residual = false, qkv = false, attention = false;
    static constexpr bool swiglu = true, ffn = true;
};

// An activation of a layer that waits in the host's memory: its place on the device, and where it waits.
struct OffloadedAct {
    bool input; // of the layer: the layer before computes it
    void* here;
    size_t bytes, at;
};

enum class Start { zeros, ones, normal, scaled }; // scaled: normal / sqrt(2 L), for what is added to the residual

// One row of the table, for one layer: what sizes, offsets, files, initialisation and decay are derived from.
struct ParamInfo {
    const char *name, *hf;
    int layer; // -1: outside the layers
    size_t rows, columns, offset;
    bool decay;
    Start start;
    size_t count() const { return rows * columns; }
    size_t padded() const { return (count() + param_alignment - 1) / param_alignment * param_alignment; }
};

std::vector<ParamInfo> param_table(const Config& c) {
    const size_t C = c.C, H = c.H, K = c.K, D = c.D, F = c.F, V = c.V, bias = c.qkv_bias, untied = !c.tied;
    std::vector<ParamInfo> table;
    size_t offset = 0;
    auto add = [&](const char* name, const char* hf, int layer, size_t rows, size_t columns, bool decay, Start start) {
        table.push_back({name, hf, layer, rows, columns, offset, decay, start});
        offset += table.back().padded();
    };
#define ADD(name, hf, rows, columns, decay, start) add(#name, hf, layer, rows, columns, decay, Start::start);
    int layer = -1;
    PARAMS_FIRST(ADD)
    for (layer = 0; layer < c.L; layer++) { PARAMS_LAYER(ADD) }
    layer = -1;
    PARAMS_LAST(ADD)
#undef ADD
    return table;
}

// Elements of the flat buffer, padding included.
size_t param_elements(const Config& c) {
    ParamInfo last = param_table(c).back();
    return last.offset + last.padded();
}

size_t param_count(const Config& c) {
    size_t count = 0;
    for (const ParamInfo& p : param_table(c)) count += p.count();
    return count;
}

// What of the model comes and goes as one: part 0 is the embedding, 1 to L are the layers, L + 1 is what follows them.
size_t part_of(const ParamInfo& p, const Config& c) {
    return p.layer >= 0 ? size_t(p.layer) + 1 : p.offset > 0 ? size_t(c.L) + 1 : 0;
}

// where(info): the place of a tensor.
template <class E, class Where> Params<E> params_place(const Config& c, Where where) {
    Params<E> p;
    p.layer.resize(c.L);
    auto next = [&, table = param_table(c), i = size_t(0)]() mutable {
        const ParamInfo& info = table[i++];
        return info.count() ? where(info) : nullptr;
    };
#define PLACE(name, ...) p.name = next();
#define PLACE_LAYER(name, ...) layer.name = next();
    PARAMS_FIRST(PLACE)
    for (LayerParams<E>& layer : p.layer) { PARAMS_LAYER(PLACE_LAYER) }
    PARAMS_LAST(PLACE)
#undef PLACE
#undef PLACE_LAYER
    if (c.tied) p.head = p.embed;
    return p;
}

// How a model is laid out on a rank; with the configuration it determines every byte of memory.
struct Layout {
    size_t S = 0, B = 1;     // tokens of a row, rows
    int ring = 1, world = 1; // ranks of a sequence, ranks in all
    RingExchange exchange;
    size_t head_chunk = 512; // tokens whose logits exist at once
    size_t ffn_tile = 0;     // tokens whose feed-forward activations exist at once; 0: all
    int zero = 1;            // what ranks share: 1 optimizer state, 2 gradients too, 3 weights too
    bool train = true, master = false;
    Type moments = Type::f32;
    Recompute recompute;
    Offload offload;

    int zero_level() const { return world > 1 ? zero : 1; } // one rank has nothing to share

    size_t tokens() const { return B * (ring_padded_length(S, ring) / ring); }               // T
    size_t ffn_tokens() const { return ffn_tile ? std::min(ffn_tile, tokens()) : tokens(); } // N
};

// Where a part of the model is, with its gradients (ZeRO). Each rank updates a slice of every part. Weights and
// gradients that are kept whole lie in one flat array, slices at their places in it; of others the flat array holds
// this rank's slices, one behind the other, and the parts in use take two buffers in turn.
template <class E, class G> struct Part {
    size_t begin = 0, end = 0;      // elements of the model
    std::vector<size_t> shards;     // rank r updates [shards[r], shards[r + 1]) of the part
    size_t at = 0;                  // this rank's slice in all that it has slices of, on every rank alike
    int buffer = 0;                 // which one it takes
    E *params, *params_shard;       // whole while it is in use; this rank's slice
    G *grads, *grads_shard;         // likewise
    size_t held_begin, held_end;    // the weights that this rank always has: elements of the model,
    E* held;                        // from here on
    bool stale = false;             // ZeRO-1, 2: other ranks have new slices that params has not
    std::vector<Shift> fetching;    // slices of other ranks on their way into params
    std::optional<Shift> reduction; // the sum of grads over all ranks, under way
};

template <class Dev, class E, class G> struct Model {
    using A = Acc<E>;
    Dev dev;
    Config config;
    Layout layout;
    Comm world, background; // the world again, for weights and sums of gradients, beside which layers go on
    RopePrecision precision = RopePrecision::exact;

    Params<E> params;
    Params<G> grads;
    E* param_flat;
    G* grad_flat;
    size_t elements;                 // of the model
    size_t grad_elements;            // of grad_flat, which is a shard from ZeRO-2 on
    std::vector<Part<E, G>> parts;   // (L + 2)
    int in_buffer[3] = {-1, -1, -1}; // ZeRO-3: the part whose weights each buffer holds
    void *moment1, *moment2;         // this rank's shard, of layout.moments
    A* master;                       // this rank's shard in full precision, or null
    UpdateState* update;             // sums of the update under way, and what is decided on it
    Readback readback[2];            // copies of it on their way to the host, by the parity of the step

    std::vector<LayerActs<E>> acts;
    std::vector<std::vector<OffloadedAct>> offloaded; // (L), empty if nothing is
    uint8_t* host_memory = nullptr;                   // where they wait, Arena::host bytes
    Aside aside;                                      // on whose stream they travel
    void* token_order;                                // the batch's in device memory
    int32_t *pos, *label, *argmax;                    // (T)
    A* angles;                                        // (T, D / 2, 2) cos and sin
    E *x_last, *final_normed;                         // (T, C)
    A* final_rstd;                                    // (T)
    E* logits;                                        // (head_chunk, V)
    A* loss;                                          // (T)
    E *dx, *datt, *dqkv;                              // (T, C), (T, H D), (T, (H + 2K) D)
    RingScratch<E> scratch;
    void* plan; // the batch's plan in device memory
    size_t plan_bytes;

    size_t shard_begin(const Part<E, G>& part) const { return part.shards[world.rank]; }
    size_t shard_count(const Part<E, G>& part) const { return part.shards[world.rank + 1] - part.shards[world.rank]; }
};

// Cuts the model into parts and every part into slices, and places weights, gradients and the optimizer's state.
template <class Dev, class E, class G> void parts_place(Model<Dev, E, G>& m, Arena& arena) {
    const Config& c = m.config;
    const int level = m.layout.zero_level(), world = m.layout.world;
    const bool train = m.layout.train;
    m.elements = param_elements(c);
    m.parts.assign(c.L + 2, {});
    for (const ParamInfo& p : param_table(c)) {
        Part<E, G>& part = m.parts[part_of(p, c)];
        if (part.end == 0) part.begin = p.offset;
        part.end = p.offset + p.padded();
    }
    size_t shard = 0, largest[3] = {};
    for (Part<E, G>& part : m.parts) {
        const size_t count = part.end - part.begin, index = &part - m.parts.data();
        const size_t share = (count / param_alignment + world - 1) / world * param_alignment;
        part.at = shard, shard += share;
        for (int r = 0; r <= world; r++) part.shards.push_back(std::min(r * share, count));
        part.buffer = c.tied && index == 0 ? 2 : index % 2; // a tied embedding is in use from first to last
        largest[part.buffer] = std::max(largest[part.buffer], count);
    }
    E* params[3] = {};
    G* grads[3] = {};
    m.param_flat = arena.take<E>("weights", level < 3 ? m.elements : shard);
    for (int i = 0; i < 3 && level == 3; i++) params[i] = arena.take<E>("weights in use", largest[i]);
    m.grad_elements = !train ? 0 : level < 2 ? m.elements : shard;
    m.grad_flat = arena.take<G>("gradients", m.grad_elements);
    for (int i = 0; i < 3 && level >= 2 && train; i++) grads[i] = arena.take<G>("gradients in use", largest[i]);
    const size_t mine = train ? shard : 0, moment_bytes = mine * type_size(m.layout.moments); // on every rank alike
    m.moment1 = arena.take<uint8_t>("moments", moment_bytes);
    m.moment2 = arena.take<uint8_t>("moments", moment_bytes);
    m.master = arena.take<Acc<E>>("master weights", m.layout.master ? mine : 0);

    for (Part<E, G>& part : m.parts) {
        const size_t own = m.shard_begin(part);
        part.params = level < 3 ? m.param_flat + part.begin : params[part.buffer];
        part.params_shard = level < 3 ? part.params + own : m.param_flat + part.at;
        part.grads = level < 2 ? m.grad_flat + part.begin : grads[part.buffer];
        part.grads_shard = level < 2 ? part.grads + own : m.grad_flat + part.at;
        part.held_begin = level < 3 ? part.begin : part.begin + own;
        part.held_end = level < 3 ? part.end : part.held_begin + m.shard_count(part);
        part.held = level < 3 ? part.params : part.params_shard;
    }
    auto part = [&](const ParamInfo& p) -> Part<E, G>& { return m.parts[part_of(p, c)]; };
    m.params = params_place<E>(c, [&](const ParamInfo& p) { return part(p).params + (p.offset - part(p).begin); });
    m.grads = params_place<G>(c, [&](const ParamInfo& p) { return part(p).grads + (p.offset - part(p).begin); });
}

// Hands out the memory; with an arena that has no base it only measures.
template <class Dev, class E, class G> void model_place(Model<Dev, E, G>& m, Arena& arena) {
    using A = Acc<E>;
    const Config& c = m.config;
    const size_t L = c.L, C = c.C, H = c.H, K = c.K, D = c.D, F = c.F, V = c.V, T = m.layout.tokens();
    const size_t N = m.layout.ffn_tokens();
    const bool train = m.layout.train;
    parts_place(m, arena);
    m.update = arena.take<UpdateState>("inputs", 1);

    // The policy's name is a field of Recompute: that many layers share one place. Without a backward all do, and every
    // layer's x is where the last one's was. The feed-forward's shared place and attention's are never in use together,
    // so they lie over each other. What is offloaded has two places, which layers take in turn; that of the last two
    // layers stays there.
    m.acts.resize(L);
    m.offloaded.clear();
    auto act = [&](auto field, size_t count, int policy, bool away, bool feed_forward, bool in_overlay) {
        using X = std::remove_pointer_t<std::remove_reference_t<decltype(m.acts[0].*field)>>;
        away &= train;
        const size_t shared = train && !away ? size_t(policy) : L;
        for (size_t l = shared; l < L && !in_overlay; l++) m.acts[l].*field = arena.take<X>("activations, kept", count);
        if (feed_forward != in_overlay) return;
        X* place[2] = {};
        for (int i = 0; i < 1 + away && shared; i++) place[i] = arena.take<X>("activations, shared", count);
        for (size_t l = 0; l < shared; l++) m.acts[l].*field = place[away * (l % 2)];
        if (!away) return;
        m.offloaded.resize(L);
        for (size_t l = 0; l + 2 < L; l++) {
            auto* here = m.acts[l].*field;
            m.offloaded[l].push_back({(void*)here == m.acts[l].x, here, count * sizeof(X), arena.host});
            arena.host += count * sizeof(X);
        }
    };
#define PLACE(name, elements, type, policy)                                                                     \
    act(&LayerActs<E>::name, elements, m.layout.recompute.policy, m.layout.offload.policy, FeedForward::policy, \
        in_overlay);
    auto place_acts = [&](bool in_overlay) { ACTIVATIONS(PLACE) };
#undef PLACE
    place_acts(false);
    m.x_last = arena.take<E>("activations, kept", T * C);
    for (size_t l = 0; l < L; l++) m.acts[l].out = l + 1 < L ? m.acts[l + 1].x : m.x_last;
    arena.overlay([&] { place_acts(true); },
                  [&] {
                      m.datt = arena.take<E>("backward", train ? T * H * D : 0);
                      m.dqkv = arena.take<E>("backward", train ? T * (H + 2 * K) * D : 0);
                      const RingScratchSizes n =
                          ring_scratch_sizes(m.dev, m.layout.exchange, T, m.layout.ring, m.layout.B, H, K, D);
                      m.scratch.state = arena.take<A>("ring", n.state);
                      m.scratch.anchor = arena.take<E>("ring", n.anchor);
                      m.scratch.send = arena.take<E>("ring", n.send);
                      m.scratch.receive = arena.take<E>("ring", n.receive);
                      m.scratch.gathered = arena.take<E>("ring", n.gathered);
                      m.scratch.delta = arena.take<A>("ring", train ? n.delta : 0);
                      m.scratch.dkv = arena.take<A>("ring", train ? n.dkv : 0);
                      m.scratch.danchor = arena.take<A>("ring", train ? n.danchor : 0);
                      m.scratch.dgathered = arena.take<A>("ring", train ? n.dgathered : 0);
                      m.scratch.dkv_send = arena.take<A>("ring", train ? n.dkv_send : 0);
                      m.scratch.dkv_receive = arena.take<A>("ring", train ? n.dkv_receive : 0);
                  });

    m.token_order = arena.take<uint8_t>("inputs", token_order_bytes(m.dev, T));
    m.pos = arena.take<int32_t>("inputs", T);
    m.label = arena.take<int32_t>("inputs", T);
    m.argmax = arena.take<int32_t>("inputs", T);
    m.angles = arena.take<A>("inputs", T * D);
    m.final_normed = arena.take<E>("head", T * C);
    m.final_rstd = arena.take<A>("head", T);
    m.logits = arena.take<E>("head", std::min(m.layout.head_chunk, T) * V);
    m.loss = arena.take<A>("head", T);
    m.dx = arena.take<E>("backward", train ? T * C : 0);
    m.plan_bytes = ring_plan_bytes(m.dev, T, m.layout.ring, m.layout.B);
    m.plan = arena.take<uint8_t>("inputs", m.plan_bytes);
}

// Some rows, cut for this rank: the plan says which tokens are ours and how attention meets the others'.
struct Batch {
    Comm ring;
    RingPlan plan;
    size_t T = 0;
    TokenOrder order;                // the tokens, and their places sorted by token, for the embedding's backward
    std::vector<int32_t> pos, label; // (T)
    int64_t counted = 0, pairs = 0;  // labels that count and visible pairs, of the whole rows
};

// Rows shorter than the ring needs are padded: behind everything else, in a document of its own (in full mode causality
// alone hides it) and without labels, so nobody sees it and no gradient comes from it.
Batch batch_make(const std::vector<Row>& rows, Attention attention, const Comm& ring,
                 const AttentionTiles& tiles = attention_tiles_cpu, const RingExchange& exchange = {}) {
    const size_t B = rows.size(), S = rows[0].token.size(), padded = ring_padded_length(S, ring.size);
    Batch b;
    b.ring = ring;
    std::vector<int32_t> doc(B * padded);
    for (size_t r = 0; r < B; r++) {
        const Row& row = rows[r];
        int32_t* d = doc.data() + r * padded;
        std::copy(row.doc.begin(), row.doc.end(), d);
        int32_t last = *std::max_element(row.doc.begin(), row.doc.end());
        std::fill(d + S, d + padded, attention == Attention::full ? 0 : last + 1);
        b.counted += row.counted;
        b.pairs += visible_pairs(row.doc.data(), S);
    }
    ring_plan_build(b.plan, doc.data(), has_anchor(attention), B, padded, ring.rank, ring.size, tiles, exchange);
    b.T = b.plan.local.index.size();
    b.pos.resize(b.T), b.label.resize(b.T);
    std::vector<int32_t> token(b.T);
    for (size_t r = 0, t = 0; r < B; r++)
        for (; t < size_t(b.plan.local.row_begin[r + 1]); t++) {
            size_t i = b.plan.local.index[t];
            bool real = i < S;
            token[t] = real ? rows[r].token[i] : 0;
            b.pos[t] = real ? rows[r].pos[i] : 0;
            b.label[t] = real ? rows[r].label[i] : -1;
        }
    b.order = token_order(token);
    return b;
}

// Brings the batch's arrays to the device, and the angles of its positions: they serve every layer.
template <class Dev, class E, class G> void model_input(Model<Dev, E, G>& m, Batch& b) {
    REQUIRE(b.T <= m.layout.tokens(), "the batch is larger than the layout that was placed");
    token_order_upload(m.dev, b.order, m.token_order);
    copy_to_device(m.dev, m.pos, b.pos.data(), b.T * 4);
    copy_to_device(m.dev, m.label, b.label.data(), b.T * 4);
    ring_plan_upload(m.dev, b.plan, m.plan, m.plan_bytes);
    std::vector<double> frequency(m.config.D / 2);
    double factor = rope_frequencies(frequency.data(), m.config.rope, m.config.D, m.layout.S);
    rope_table<E>(m.dev, m.angles, m.pos, frequency.data(), factor, m.precision, b.T, m.config.D);
}

// Has the slices of a part's weights sent by all ranks: those that an update has changed, with ZeRO-3 whenever another
// part was in its buffer. The transfers go on beside what is computed.
template <class Dev, class E, class G> void params_fetch(Model<Dev, E, G>& m, size_t p) {
    Part<E, G>& part = m.parts[p];
    if (m.layout.zero_level() < 3) {
        if (part.stale)
            part.fetching.push_back(comm_all_gather_start(m.dev, m.background, part.params, part.shards.data()));
        part.stale = false;
        return;
    }
    int& in_buffer = m.in_buffer[part.buffer];
    if (in_buffer == int(p)) return;
    REQUIRE(in_buffer < 0 || m.parts[in_buffer].fetching.empty(), "use what was fetched before its buffer is taken");
    in_buffer = int(p);
    const int rank = m.background.rank, size = m.background.size;
    const size_t mine = m.shard_count(part);
    copy_on_device(m.dev, part.params + m.shard_begin(part), part.params_shard, mine * sizeof(E));
    for (int d = 1; d < size; d++) {
        const int to = (rank + d) % size, from = (rank + size - d) % size;
        part.fetching.push_back(shift_start(m.dev, m.background, part.params_shard, mine, to,
                                            part.params + part.shards[from], part.shards[from + 1] - part.shards[from],
                                            from));
    }
}

// Afterwards the weights of part p are whole, and those of `next`, the part after it, on their way.
template <class Dev, class E, class G> void params_use(Model<Dev, E, G>& m, size_t p, size_t next) {
    params_fetch(m, p);
    for (Shift& shift : m.parts[p].fetching) shift_wait(m.dev, shift);
    m.parts[p].fetching.clear();
    params_fetch(m, next);
}

// What was fetched is out of date.
template <class Dev, class E, class G> void params_changed(Model<Dev, E, G>& m) {
    for (int& part : m.in_buffer) part = -1;
    for (Part<E, G>& part : m.parts) part.stale = true;
}

// Waits for the sum of a part's gradients, if one is under way.
template <class Dev, class E, class G> void grads_wait(Model<Dev, E, G>& m, Part<E, G>& part) {
    if (!part.reduction) return;
    shift_wait(m.dev, *part.reduction);
    part.reduction.reset();
    if (m.layout.zero_level() < 2) return; // it was formed where this rank's slice is
    add(m.dev, part.grads_shard, part.grads + m.shard_begin(part), m.shard_count(part));
}

// Before a part's backward. ZeRO-2: its gradients begin at zero in every micro-batch, in the buffer of the part before
// the last, whose sum had the time of the last one's backward.
template <class Dev, class E, class G> void grads_begin(Model<Dev, E, G>& m, size_t p) {
    const Part<E, G>& part = m.parts[p];
    if (m.layout.zero_level() < 2) return;
    for (Part<E, G>& other : m.parts)
        if (other.buffer == part.buffer) grads_wait(m, other);
    fill_zero(m.dev, part.grads, (part.end - part.begin) * sizeof(G));
}

// After it: has the gradients summed over all ranks, beside what is computed next. ZeRO-1: once, when they are those of
// all micro-batches; ZeRO-2: in each, to be added to this rank's slice.
template <class Dev, class E, class G> void grads_end(Model<Dev, E, G>& m, size_t p, bool last_batch) {
    Part<E, G>& part = m.parts[p];
    if (m.layout.world > 1 && (last_batch || m.layout.zero_level() >= 2))
        part.reduction = comm_reduce_scatter_start(m.dev, m.background, part.grads, part.shards.data());
}

// Afterwards this rank's slices hold the gradients of the whole update.
template <class Dev, class E, class G> void grads_finish(Model<Dev, E, G>& m) {
    for (size_t p = m.parts.size(); p-- > 0;) grads_wait(m, m.parts[p]); // in the order in which they were started
}

// --offload. Behind layer l's forward its activations leave for the host's memory, with the next layer's input, which
// it has computed; behind the embedding (l = -1) the first layer's input.
template <class Dev, class E, class G> void acts_send(Model<Dev, E, G>& m, int l) {
    if (m.offloaded.empty()) return;
    aside_begin(m.dev, m.aside);
    auto send = [&](int of, bool input) {
        for (const OffloadedAct& a : m.offloaded[of])
            if (a.input == input) aside_to_host(m.dev, m.aside, m.host_memory + a.at, a.here, a.bytes);
    };
    if (l >= 0) send(l, false);
    if (l + 1 < m.config.L) send(l + 1, true);
    aside_end(m.dev, m.aside, l & 1);
}
// Afterwards layer l may take its places, and that of the next layer's input: layer l - 2's activations, and the input
// of layer l - 1, have left them.
template <class Dev, class E, class G> void acts_free(Model<Dev, E, G>& m, int l) {
    if (!m.offloaded.empty()) aside_wait(m.dev, m.aside, l & 1);
}
// In the backward: afterwards layer l's activations are back, and those of the layer below on their way, to the places
// that layer l + 1 has left.
template <class Dev, class E, class G> void acts_use(Model<Dev, E, G>& m, int l) {
    if (m.offloaded.empty()) return;
    aside_wait(m.dev, m.aside, l & 1);
    if (l == 0) return;
    aside_begin(m.dev, m.aside);
    for (const OffloadedAct& a : m.offloaded[l - 1])
        aside_to_device(m.dev, m.aside, a.here, m.host_memory + a.at, a.bytes);
    aside_end(m.dev, m.aside, (l - 1) & 1);
}

// Tokens to final_normed. Every line is one layer: outputs, inputs, sizes. `alone`: no backward follows.
template <class Dev, class E, class G> void model_forward(Model<Dev, E, G>& m, Batch& b, bool alone = false) {
    const auto [dev, c, T] = std::tuple(m.dev, m.config, b.T);
    const size_t L = c.L, C = c.C, H = c.H, K = c.K, D = c.D, F = c.F, N = m.layout.ffn_tokens();
    const E* none = nullptr;

    model_input(m, b);
    params_use(m, 0, 1);
    embedding_forward(dev, m.acts[0].x, b.order, m.params.embed, C);
    if (!alone) acts_send(m, -1);
    for (size_t l = 0; l < L; l++) {
        params_use(m, l + 1, l + 2);
        acts_free(m, int(l));
        const LayerParams<E>& w = m.params.layer[l];
        const LayerActs<E>& a = m.acts[l];
        rmsnorm_forward(dev, a.att_normed, a.att_rstd, a.x, w.att_norm, T, C, c.eps);
        matmul_forward(dev, a.qkv, a.att_normed, w.wqkv, w.bqkv, none, T, C, (H + 2 * K) * D);
        rope_forward(dev, a.qkv, m.angles, m.precision, T, H, K, D);
        ring_attention_forward(dev, b.ring, b.plan, a.att, a.lse, a.qkv, m.scratch, H, K, D);
        matmul_forward(dev, a.h, a.att, w.wo, none, a.x, T, H * D, C);
        rmsnorm_forward(dev, a.ffn_normed, a.ffn_rstd, a.h, w.ffn_norm, T, C, c.eps);
        for (size_t t = 0, n; t < T; t += n) { // one turn, unless --ffn_tile cuts the tokens
            n = std::min(N, T - t);
            matmul_forward(dev, a.gate_up, a.ffn_normed + t * C, w.wgate_up, none, none, n, C, 2 * F);
            swiglu_forward(dev, a.act, a.gate_up, n, F);
            matmul_forward(dev, a.out + t * C, a.act, w.wdown, none, a.h + t * C, n, F, C);
        }
        if (!alone) acts_send(m, int(l));
    }
    params_use(m, L + 1, L + 1);
    rmsnorm_forward(dev, m.final_normed, m.final_rstd, m.x_last, m.params.final_norm, T, C, c.eps);
}

// The lines of the forward up to the feed-forward whose outputs were not kept.
template <class Dev, class E, class G> void recompute_layer(Model<Dev, E, G>& m, const Batch& b, int l) {
    const auto [dev, c, T] = std::tuple(m.dev, m.config, b.T);
    const size_t C = c.C, H = c.H, K = c.K, D = c.D;
    const E* none = nullptr;
    const LayerParams<E>& w = m.params.layer[l];
    const LayerActs<E>& a = m.acts[l];
    const Recompute& again = m.layout.recompute;

    if (l < again.norm) rmsnorm_forward(dev, a.att_normed, a.att_rstd, a.x, w.att_norm, T, C, c.eps);
    if (l < again.qkv) matmul_forward(dev, a.qkv, a.att_normed, w.wqkv, w.bqkv, none, T, C, (H + 2 * K) * D);
    if (l < again.qkv) rope_forward(dev, a.qkv, m.angles, m.precision, T, H, K, D);
    if (l < again.attention) ring_attention_forward(dev, b.ring, b.plan, a.att, a.lse, a.qkv, m.scratch, H, K, D);
    if (l < again.residual) matmul_forward(dev, a.h, a.att, w.wo, none, a.x, T, H * D, C);
    if (l < again.norm) rmsnorm_forward(dev, a.ffn_normed, a.ffn_rstd, a.h, w.ffn_norm, T, C, c.eps);
}

// Tokens [t, t + n) of layer l's feed-forward, from dx to the gradient of its normed input.
template <class Dev, class E, class G>
void feed_forward_backward(Model<Dev, E, G>& m, int l, size_t t, size_t n, const E* dx) {
    const auto [dev, C, F] = std::tuple(m.dev, size_t(m.config.C), size_t(m.config.F));
    const E* none = nullptr;
    G* no_bias = nullptr;
    const LayerParams<E>& w = m.params.layer[l];
    const LayerParams<G>& g = m.grads.layer[l];
    const LayerActs<E>& a = m.acts[l];
    const Recompute& again = m.layout.recompute;
    E *normed = a.ffn_normed + t * C, *dact = a.act, *dgate_up = a.gate_up, *dnormed = normed;

    if (l < again.ffn) matmul_forward(dev, a.gate_up, normed, w.wgate_up, none, none, n, C, 2 * F);
    if (l < again.swiglu) swiglu_forward(dev, a.act, a.gate_up, n, F);
    matmul_backward_weight(dev, g.wdown, no_bias, dx + t * C, a.act, n, F, C);
    matmul_backward_input(dev, dact, dx + t * C, w.wdown, n, F, C);
    swiglu_backward(dev, dgate_up, dact, a.gate_up, n, F);
    matmul_backward_weight(dev, g.wgate_up, no_bias, dgate_up, normed, n, C, 2 * F);
    matmul_backward_input(dev, dnormed, dgate_up, w.wgate_up, n, C, 2 * F);
}

// Logits and losses, a chunk of tokens at a time: (T, V) would be the largest tensor of all. Backward at once,
// while the chunk's logits are there: they become dlogits, final_normed its own gradient, and the head's
// gradient is added. `scale` is 1 / (tokens counted in the whole update).
template <class Dev, class E, class G> void head_forward_backward(Model<Dev, E, G>& m, const Batch& b, double scale) {
    const size_t C = m.config.C, V = m.config.V;
    const E* none = nullptr;
    grads_begin(m, m.config.L + 1);
    if (m.config.tied) grads_begin(m, 0);
    for (size_t t = 0, n; t < b.T; t += n) {
        n = std::min(m.layout.head_chunk, b.T - t);
        E* normed = m.final_normed + t * C;
        matmul_forward(m.dev, m.logits, normed, m.params.head, none, none, n, C, V);
        loss_forward_backward(m.dev, m.loss + t, m.logits, m.label + t, scale, n, V);
        matmul_backward_weight(m.dev, m.grads.head, (G*)nullptr, m.logits, normed, n, C, V);
        matmul_backward_input(m.dev, normed, m.logits, m.params.head, n, C, V);
    }
}

// Losses and likeliest tokens alone. `visit(t, n)` may look at the logits of tokens [t, t + n).
template <class Dev, class E, class G, class Visit>
void head_forward(Model<Dev, E, G>& m, const Batch& b, Visit visit) {
    const size_t C = m.config.C, V = m.config.V;
    const E* none = nullptr;
    for (size_t t = 0, n; t < b.T; t += n) {
        n = std::min(m.layout.head_chunk, b.T - t);
        matmul_forward(m.dev, m.logits, m.final_normed + t * C, m.params.head, none, none, n, C, V);
        loss_forward(m.dev, m.loss + t, m.argmax + t, m.logits, m.label + t, n, V);
        visit(t, n);
    }
}

// The forward's lines in reverse. Weight gradients are added to; the gradient of an activation is written over
// that activation as soon as nothing needs it any more, so the feed-forward takes no memory of its own. last_batch: no
// other micro-batch adds to these gradients; grads_finish then waits for their sums over all ranks.
template <class Dev, class E, class G> void model_backward(Model<Dev, E, G>& m, const Batch& b, bool last_batch) {
    const auto [dev, c, T] = std::tuple(m.dev, m.config, b.T);
    const size_t L = c.L, C = c.C, H = c.H, K = c.K, D = c.D, N = m.layout.ffn_tokens();
    G* no_bias = nullptr;
    E *dx = m.dx, *datt = m.datt, *dqkv = m.dqkv;

    E* dfinal = m.final_normed; // head_forward_backward left it there
    rmsnorm_backward(dev, dx, m.grads.final_norm, dfinal, m.x_last, m.params.final_norm, m.final_rstd,
                     (const E*)nullptr, T, C);
    grads_end(m, L + 1, last_batch);
    for (size_t l = L; l-- > 0;) {
        // Then the layer below, and at the bottom the next micro-batch's embedding, or nothing new: the first layer.
        params_use(m, l + 1, l > 0 ? l : last_batch ? 1 : 0);
        grads_begin(m, l + 1);
        acts_use(m, int(l));
        recompute_layer(m, b, int(l));
        const LayerParams<E>& w = m.params.layer[l];
        const LayerParams<G>& g = m.grads.layer[l];
        const LayerActs<E>& a = m.acts[l];
        E *dffn_normed = a.ffn_normed, *datt_normed = a.att_normed;

        for (size_t t = 0; t < T; t += N) feed_forward_backward(m, int(l), t, std::min(N, T - t), dx);
        rmsnorm_backward(dev, dx, g.ffn_norm, dffn_normed, a.h, w.ffn_norm, a.ffn_rstd, dx, T, C);
        matmul_backward_weight(dev, g.wo, no_bias, dx, a.att, T, H * D, C);
        matmul_backward_input(dev, datt, dx, w.wo, T, H * D, C);
        ring_attention_backward(dev, b.ring, b.plan, dqkv, datt, a.att, a.lse, a.qkv, m.scratch, H, K, D);
        rope_backward(dev, dqkv, m.angles, m.precision, T, H, K, D);
        matmul_backward_weight(dev, g.wqkv, g.bqkv, dqkv, a.att_normed, T, C, (H + 2 * K) * D);
        matmul_backward_input(dev, datt_normed, dqkv, w.wqkv, T, C, (H + 2 * K) * D);
        rmsnorm_backward(dev, dx, g.att_norm, datt_normed, a.x, w.att_norm, a.att_rstd, dx, T, C);
        grads_end(m, l + 1, last_batch);
    }
    if (!c.tied) grads_begin(m, 0);
    embedding_backward(dev, m.grads.embed, dx, b.order, C);
    grads_end(m, 0, last_batch);
}

// The square of the gradients' norm, of the slices of all ranks: part by part at every level of ZeRO, so that all come
// to the same bits.
template <class Dev, class E, class G> void model_norm(Model<Dev, E, G>& m) {
    for (const Part<E, G>& part : m.parts) {
        REQUIRE(!part.reduction, "call grads_finish before");
        grad_norm_squared(m.dev, &m.update->norm_squared, part.grads_shard, m.shard_count(part), &part != &m.parts[0]);
    }
    comm_sum(m.dev, m.world, &m.update->norm_squared, 1);
}

// AdamW on this rank's shard, tensor by tensor because only matrices decay. The next forward fetches the others', part
// by part. Nothing happens when m.update says so.
template <class Dev, class E, class G, class M> void model_update_as(Model<Dev, E, G>& m, AdamW adamw) {
    const double decay = adamw.weight_decay;
    for (const ParamInfo& p : param_table(m.config)) {
        const Part<E, G>& part = m.parts[part_of(p, m.config)];
        const size_t begin = part.begin + m.shard_begin(part), end = begin + m.shard_count(part);
        const size_t first = std::max(begin, p.offset), last = std::min(end, p.offset + p.count());
        if (first >= last) continue;
        adamw.weight_decay = p.decay ? decay : 0;
        const size_t i = first - begin, j = part.at + i;
        adamw_update(m.dev, part.params_shard + i, m.master ? m.master + j : nullptr, (M*)m.moment1 + j,
                     (M*)m.moment2 + j, part.grads_shard + i, last - first, first, adamw, &m.update->adamw);
    }
    params_changed(m);
}

template <class Dev, class E, class G> void model_update(Model<Dev, E, G>& m, const AdamW& adamw) {
    if constexpr (std::is_same_v<E, double>) return model_update_as<Dev, E, G, double>(m, adamw);
    else if (m.layout.moments == Type::bf16) model_update_as<Dev, E, G, bf16>(m, adamw);
    else model_update_as<Dev, E, G, float>(m, adamw);
}

// Random weights: a pure function of the seed and the place in the flat buffer, the same for any number of ranks.
template <class Dev, class E, class G> void model_init(Model<Dev, E, G>& m, uint64_t seed) {
    for (const ParamInfo& p : param_table(m.config)) {
        const double deviation = p.start == Start::scaled ? 0.02 / std::sqrt(2.0 * m.config.L) : 0.02;
        const bool random = p.start == Start::normal || p.start == Start::scaled;
        const Part<E, G>& part = m.parts[part_of(p, m.config)];
        const size_t first = std::max(part.held_begin, p.offset), last = std::min(part.held_end, p.offset + p.count());
        if (first >= last) continue;
        E* x = part.held + (first - part.held_begin);
        if (random) random_normal(m.dev, x, last - first, seed, first, deviation);
        else fill(m.dev, x, last - first, p.start == Start::ones ? 1.0 : 0.0);
        comm_alive(m.world);
    }
}

// What a command line means: the model, its layout in memory, the numbers of the run.
struct Setup {
    Options o;
    Comm world, host, ring, background; // host: those of the world on this machine
    Config config;
    Layout layout;
    std::string weights; // file to start from; empty: random weights
    Type dtype = Type::f32, grad_dtype = Type::f32;
    std::string master = "auto"; // --master, or what the checkpoints have that a run is resumed from
    Attention attention = Attention::anchor;
    Boundary boundary = Boundary::mask;
    RopePrecision precision = RopePrecision::exact;
    bool gpu = false;
    GpuPlace place; // this rank's GPU
    Transport transport = Transport::automatic;
    bool reached = true;          // every host's GPUs fetch from each other
    double memory = 0;            // bytes of a rank, the least of all
    std::vector<int64_t> threads; // (world) of each rank
    std::vector<int32_t> hosts;   // (world) of each rank, each by the first of its ranks
    std::vector<int32_t> prompt;

    int groups() const { return layout.world / layout.ring; } // rings side by side
    int group() const { return world.rank / layout.ring; }
    int64_t rows_per_update() const { return o.total_batch ? o.total_batch / layout.S : layout.B * groups(); }
};

// Index of `value` among the choices "a|b|c"; the parser has checked that it is one.
int choice(const std::string& value, const char* choices) {
    std::string all = choices;
    size_t at = ("|" + all + "|").find("|" + value + "|");
    return int(std::count(all.begin(), all.begin() + at, '|'));
}

PackOptions pack_options(const Setup& s, bool train) {
    PackOptions p;
    p.attention = s.attention, p.boundary = s.boundary;
    p.domain_tags = s.o.domain_tags, p.interleave = s.o.interleave && train, p.shuffle = s.o.shuffle && train;
    p.S = s.layout.S, p.V = s.config.V, p.seed = uint64_t(s.o.seed);
    p.bos = s.config.bos >= 0 ? s.config.bos : s.config.eos;
    p.mean = double(s.o.generator_mean);
    return p;
}

// The configuration: a file's, or a named size with the changes asked for.
Config setup_config(Setup& s) {
    Options& o = s.o;
    if (o.model.empty()) {
        o.model = access("model.bin", R_OK) == 0 ? "model.bin" : s.gpu ? "llama2-7b" : "tiny";
        if (s.world.rank == 0 && o.model != "model.bin" && !o.dump_params)
            printf("no --model and no model.bin here: a random model of size %s\n", o.model.c_str());
    }
    const NamedConfig* named = nullptr;
    std::string names;
    for (const NamedConfig& n : named_configs) {
        if (o.model == n.name) named = &n;
        names += (names.empty() ? "" : ", ") + std::string(n.name);
    }
    if (!named) {
        const auto newest = [](const std::string& dir) { // its weights file, sound or not; none: an empty text
            const std::vector<int64_t> steps = checkpoint_steps(dir);
            return steps.empty() ? "" : checkpoint_path(dir, steps.back()) + "/weights.bin";
        };
        bool there = access(o.model.c_str(), F_OK) == 0;
        if (const std::string own = there || !o.resume ? "" : newest(o.out); !own.empty()) {
            if (s.world.rank == 0)
                printf("no %s here any more: the run's own checkpoint says what it was\n", o.model.c_str());
            o.model = own, there = true;
        }
        if (!there)
            fail("--model %s: there is no such file, nor a size of that name: %s", o.model.c_str(), names.c_str());
        if (struct stat info; stat(o.model.c_str(), &info) == 0 && S_ISDIR(info.st_mode))
            fail("--model %s is a folder: name a weights file, as %s", o.model.c_str(),
                 newest(o.model).empty() ? "run/step_00000100/weights.bin" : newest(o.model).c_str());
        const WeightsFile file = weights_open(o.model, o.dump_params);
        if (o.layers || o.channels || o.heads || o.kv_heads || o.ffn || o.vocab || o.tied)
            fail("%s fixes the model's shape: --layers, --channels, --heads, --kv_heads, --ffn, --vocab and --tied go "
                 "with a named size",
                 o.model.c_str());
        if (file.elements && file.elements != param_elements(file.config))
            fail("%s: %llu elements, its configuration has %zu", o.model.c_str(), (unsigned long long)file.elements,
                 param_elements(file.config));
        s.weights = o.model;
        return file.config;
    }
    Config c = named->config;
    bool width = o.channels || o.heads;
    if (o.layers) c.L = int(o.layers);
    if (o.channels) c.C = int(o.channels);
    if (o.heads) c.H = int(o.heads);
    if (o.heads && !o.kv_heads) c.K = c.H;
    if (o.kv_heads) c.K = int(o.kv_heads);
    if (o.ffn) c.F = int(o.ffn);
    if (width && c.C % c.H) fail("--channels %d is not a multiple of --heads %d", c.C, c.H);
    if (width) c.D = c.C / c.H;
    if (o.tied) c.tied = true;
    if (!o.train_data.empty()) { // from scratch: the data's tokenizer is the model's
        Corpus corpus;
        corpus_open(corpus, o.train_data, INT32_MAX);
        c.V = corpus.shards[0].vocabulary;
        if (corpus.bos >= 0 || corpus.eos >= 0) c.bos = corpus.bos, c.eos = corpus.eos;
    }
    if (o.vocab) c.V = int(o.vocab);
    return c;
}

// RoPE as asked for on the command line; a longer context is written into the model that is saved.
void setup_rope(Setup& s) {
    RopeConfig& r = s.config.rope;
    const int S = int(s.layout.S);
    if (s.o.rope_base > 0) r.base = s.o.rope_base;
    if (s.o.rope_factor > 0) r.factor = s.o.rope_factor;
    if (s.o.rope_scaling != "model") {
        r.scaling = RopeScaling(choice(s.o.rope_scaling, "none|linear|dynamic|yarn|longrope|llama3"));
        if (r.scaling == RopeScaling::longrope && r.long_factor[0] == 0)
            fail("--rope_scaling longrope needs the factors of a converted model; these weights hold none");
        const bool by_factor =
            r.scaling == RopeScaling::linear || r.scaling == RopeScaling::yarn || r.scaling == RopeScaling::llama3;
        if (by_factor && r.factor == 1)
            fail("--rope_scaling %s needs --rope_factor: by 1 it changes nothing", s.o.rope_scaling.c_str());
        if (r.scaling == RopeScaling::none && s.o.rope_factor > 0) fail("--rope_factor goes with a --rope_scaling");
    }
    if (S > r.max_context && s.o.rope_base == 0 && s.o.rope_scaling == "model" && r.scaling == RopeScaling::none &&
        s.world.rank == 0 && !s.weights.empty())
        printf("context %d is beyond the model's %d at RoPE base %g: consider --rope_base\n", S, r.max_context, r.base);
    if (r.original_context == 0 && r.scaling != RopeScaling::none) r.original_context = r.max_context;
    if (r.scaling != RopeScaling::dynamic) r.max_context = std::max(r.max_context, S);
}

struct RecomputePart {
    const char* name;
    int Recompute::*layers;
};
// Cheapest first: the order in which `auto` gives up memory. Norms and SwiGLU cost a pass over memory; the three
// products cost the same for the bytes they free; attention is the dearest by far.
constexpr RecomputePart recompute_parts[] = {{"norm", &Recompute::norm},         {"swiglu", &Recompute::swiglu},
                                             {"residual", &Recompute::residual}, {"qkv", &Recompute::qkv},
                                             {"ffn", &Recompute::ffn},           {"attention", &Recompute::attention}};
constexpr int recompute_kinds = 6;
constexpr size_t auto_tile = 16384; // tokens of --ffn_tile that `auto` takes before it gives up attention

// The first `units` of parts x layers: whole parts, then some layers of the next one.
Recompute recompute_first(int units, int L) {
    Recompute r;
    for (auto& part : recompute_parts) r.*part.layers = std::clamp(units, 0, L), units -= L;
    return r;
}

std::string recompute_text(const Recompute& r, int L) {
    std::string text;
    for (auto& part : recompute_parts) {
        if (r.*part.layers == 0) continue;
        text += (text.empty() ? "" : ",") + std::string(part.name);
        if (r.*part.layers < L) text += ":" + std::to_string(r.*part.layers);
    }
    return text.empty() ? "none" : text;
}

Recompute recompute_parse(const std::string& text, int L) {
    if (text == "none") return {};
    if (text == "all") return recompute_first(recompute_kinds * L, L);
    Recompute r;
    for (const std::string& item : list_items(text)) {
        const std::string name = item.substr(0, item.find(':'));
        auto part = std::find_if(std::begin(recompute_parts), std::end(recompute_parts),
                                 [&](const RecomputePart& p) { return name == p.name; });
        Int layers = L;
        if (part == std::end(recompute_parts) ||
            (item != name && !option_parse(layers, item.c_str() + name.size() + 1, "1..1024")))
            fail("option --recompute takes none, all, auto or a list of norm,swiglu,residual,qkv,ffn,attention, each "
                 "with :layers if not for all, not '%s'",
                 text.c_str());
        r.*part->layers = int(std::min<Int>(layers, L));
    }
    return r;
}

struct OffloadPart {
    const char* name;
    bool Offload::*away;
    int Recompute::*layers; // null: it is never computed again
};
constexpr OffloadPart offload_parts[] = {{"input", &Offload::input, nullptr},
                                         {"residual", &Offload::residual, &Recompute::residual},
                                         {"qkv", &Offload::qkv, &Recompute::qkv},
                                         {"attention", &Offload::attention, &Recompute::attention}};

std::string offload_text(const Offload& offload) { // behind that of recompute
    std::string text;
    for (auto& part : offload_parts)
        if (offload.*part.away) text += (text.empty() ? ", offload " : ",") + std::string(part.name);
    return text;
}
// What is not kept of the forward, and what becomes of it.
std::string activations_text(const Layout& l, int L) {
    const std::string tiles = l.ffn_tile ? ", ffn_tile " + std::to_string(l.ffn_tile) : "";
    return "recompute " + recompute_text(l.recompute, L) + tiles + offload_text(l.offload);
}

Offload offload_parse(const std::string& text) {
    Offload offload;
    if (text == "none") return offload;
    for (const std::string& name : list_items(text)) {
        bool known = false;
        for (auto& part : offload_parts)
            if (name == part.name || text == "all") offload.*part.away = known = true;
        if (!known)
            fail("option --offload takes none, all or a list of input,residual,qkv,attention, not '%s'", text.c_str());
    }
    return offload;
}

// Calls f.operator()<E, G>() for the element types of weights and gradients.
template <class F> auto with_types(Type dtype, Type grad, F f) {
    if (dtype == Type::f64) return f.template operator()<double, double>();
    if (dtype == Type::f32) return f.template operator()<float, float>();
    if (grad == Type::f32) return f.template operator()<bf16, float>();
    return f.template operator()<bf16, bf16>();
}

// The memory that a layout takes, part by part, without taking it.
Arena measure(const Setup& s, const Layout& layout) {
    return with_types(s.dtype, s.grad_dtype, [&]<class E, class G>() {
        auto measure_on = [&](auto dev) {
            Model<decltype(dev), E, G> m;
            m.config = s.config, m.layout = layout;
            m.world.size = layout.world;
            Arena arena;
            model_place(m, arena);
            return arena;
        };
        return s.gpu ? measure_on(Gpu{}) : measure_on(Cpu{});
    });
}

// The host of a rank; where it is not known, a plan's or that of another number of ranks, hosts have 8 GPUs.
int host_of(const Setup& s, const Layout& layout, int rank) {
    return s.o.plan || size_t(layout.world) != s.hosts.size() ? rank / 8 : s.hosts[size_t(rank)];
}

// Whether each group of so many neighbouring ranks is within a host.
bool groups_in_hosts(const Setup& s, const Layout& layout, int ranks) {
    for (int rank = 0; rank < layout.world; rank++)
        if (host_of(s, layout, rank) != host_of(s, layout, rank - rank % ranks)) return false;
    return true;
}
bool rings_in_hosts(const Setup& s, const Layout& layout) { return groups_in_hosts(s, layout, layout.ring); }

// Whether data of some ranks will travel by NCCL: between hosts, and in a host whose GPUs do not reach each other.
bool takes_nccl(const Setup& s, const Layout& layout) {
    if (s.transport != Transport::automatic) return s.transport == Transport::nccl;
    return layout.world > 1 && (!s.reached || !groups_in_hosts(s, layout, layout.world));
}

// GPU memory of the communicator's groups: the world, the layers', which has the same ranks, and the ring, which may.
double transfer_bytes(const Setup& s, const Layout& layout) {
    if (layout.world == 1) return 0;
    const int smaller = layout.ring < layout.world ? layout.ring : 1; // a ring of all ranks connects nobody else
    return comm_gpu_bytes(layout.ring > 1 ? 3 : 2, takes_nccl(s, layout), {layout.world, smaller});
}

// What the CPU's attention takes beside the arena, of the rank whose threads want the most: copies of the keys, the
// values and their gradients.
double threads_bytes(const Setup& s, const Layout& layout) {
    const bool all = layout.ring > 1 && layout.exchange.backend != RingBackend::ring;
    const bool heads = all && layout.exchange.backend == RingBackend::ulysses;
    const size_t K = s.config.K / (heads ? layout.ring : 1), Tk = layout.tokens() * (all ? layout.ring : 1);
    size_t parts = 1;
    for (int64_t threads : s.threads) parts = std::max(parts, attention_parts(K, size_t(threads)));
    return double(parts * Tk * 2 * K * s.config.D) * (s.dtype == Type::f64 ? 8 : 4);
}

// What a rank's memory must hold: the arena, and what lies beside it.
double memory_needed(const Setup& s, const Layout& layout) {
    const double beside = s.gpu ? gpu_overhead_bytes + transfer_bytes(s, layout) : threads_bytes(s, layout);
    const Arena arena = measure(s, layout);
    const double host = double(arena.host); // of which a GPU has a table, 8 bytes for a page of 4096
    return double(arena.used) + (s.gpu ? host / 512 : host) + beside;
}
// What of it a run may take. A GPU's is ours; a machine's is also the system's and the messages'.
double memory_usable(const Setup& s) { return (s.gpu ? 0.998 : 0.92) * s.memory; }

double host_memory() { return double(sysconf(_SC_PHYS_PAGES)) * double(sysconf(_SC_PAGESIZE)); }

double machine_memory(const Setup& s) {
    constexpr double h200 = 139.8 * (1 << 30); // as its driver says
    if (s.gpu) return s.o.plan && !gpu_fault(s.place.device).empty() ? h200 : gpu_memory(s.place);
    int sharers = s.o.plan && s.o.ranks ? int(s.o.ranks) : s.host.size;
    return host_memory() / sharers;
}

bool layout_fits(const Setup& s, const Layout& l) {
    if (l.ffn_tile && (l.recompute.ffn < s.config.L || l.recompute.swiglu < s.config.L))
        return false; // tiles keep none
    return memory_needed(s, l) < memory_usable(s);
}

// Element types, master weights and recomputation: what was asked for, else the most precise that fits; what is
// recomputed is as little as fits, the cheapest first. False when nothing does.
bool choose_layout(Setup& s) {
    const Options& o = s.o;
    Layout& layout = s.layout;
    auto type = [](const std::string& name, Type other) {
        return name == "float" ? Type::f32 : name == "bf16" ? Type::bf16 : name == "double" ? Type::f64 : other;
    };
    s.dtype = type(o.dtype, s.gpu ? Type::bf16 : Type::f32);
    s.grad_dtype = type(o.grad_dtype, s.dtype);
    layout.moments = type(o.opt_dtype, s.dtype);
    layout.offload = offload_parse(o.offload);
    if (s.dtype == Type::f64 && s.gpu) fail("--dtype double is for the CPU: add --device cpu");
    if (s.dtype == Type::f64 && (s.grad_dtype != Type::f64 || layout.moments != Type::f64))
        fail("--dtype double keeps gradients and moments in double: leave --grad_dtype and --opt_dtype away");
    if (s.dtype == Type::f32 && s.grad_dtype == Type::bf16) fail("--grad_dtype bf16 goes with --dtype bf16");
    if (s.dtype != Type::bf16 && s.master == "float") {
        if (o.master == "auto") fail("%s holds a run in bf16 with master weights: pass --dtype bf16", o.out.c_str());
        fail("--master float goes with --dtype bf16");
    }

    const int L = s.config.L;
    auto fits = [&](bool master, int units) {
        layout.master = master;
        layout.recompute = o.recompute == "auto" ? recompute_first(units, L) : recompute_parse(o.recompute, L);
        for (auto& part : offload_parts)
            if (part.layers && layout.offload.*part.away) layout.recompute.*part.layers = 0;
        return layout_fits(s, layout);
    };
    layout.ffn_tile = size_t(o.ffn_tile), layout.exchange.held = RingExchange().held;
    if (layout.ffn_tile && o.recompute != "auto")
        if (const Recompute again = recompute_parse(o.recompute, L); again.ffn < L || again.swiglu < L)
            fail("--ffn_tile keeps no feed-forward: add swiglu and ffn to --recompute");
    // A master copy with as little recomputation as fits, all but attention at most; then without the master; and only
    // when neither fits, attention as well, with the feed-forward in tiles, which leave room to keep it in more layers.
    const bool may = s.dtype == Type::bf16 && s.master != "none", must = s.master == "float";
    for (int most : {recompute_kinds - 1, recompute_kinds}) {
        if (most == recompute_kinds && o.recompute == "auto" && !layout.ffn_tile && layout.tokens() > auto_tile)
            layout.ffn_tile = auto_tile;
        for (int master = may; master >= must; master--)
            for (int units = 0; units <= most * L; units++)
                if (fits(master, units)) return true;
    }
    return false;
}

// Memory that a layout leaves over lets more steps of the ring start early, as many as fit.
void use_what_is_left(Setup& s) {
    for (size_t low = s.layout.exchange.held + 1, high = size_t(s.layout.ring); low < high;) {
        Layout more = s.layout;
        more.exchange.held = (low + high) / 2;
        if (layout_fits(s, more)) s.layout = more, low = more.exchange.held + 1;
        else high = more.exchange.held;
    }
    // And what is left then keeps more of single layers, what is dearer to compute first.
    for (int i = recompute_kinds - 1; i >= 0 && s.o.recompute == "auto"; i--) {
        int Recompute::*layers = recompute_parts[i].layers;
        for (Layout more = s.layout; (more.recompute.*layers)-- > 0 && layout_fits(s, more);) s.layout = more;
    }
}

// A run that is resumed has a master copy if its checkpoints have one: the newest that tells.
void keep_master(Setup& s) {
    int64_t has = -1; // unknown: there is no checkpoint
    std::vector<int64_t> steps;
    if (s.world.rank == 0) steps = checkpoint_steps(s.o.out);
    for (; !steps.empty() && has < 0; steps.pop_back()) {
        ShardHeader header;
        FILE* file = fopen((checkpoint_path(s.o.out, steps.back()) + "/" + shard_name(0)).c_str(), "r");
        if (file && fread(&header, sizeof header, 1, file) == 1 && header.magic == shard_magic)
            has = header.type[int(ShardField::master)] >= 0;
        if (file) fclose(file);
    }
    comm_broadcast(Cpu{}, s.world, &has, 1, 0);
    if (has >= 0) s.master = has ? "float" : "none";
}

void setup_memory(Setup& s) {
    s.master = s.o.master;
    if (s.o.resume && s.master == "auto") keep_master(s);
    s.memory = s.o.memory > 0 ? s.o.memory * (1 << 30) : machine_memory(s);
    // All ranks must come to the same layout, so each knows what all have.
    std::vector<double> all(s.world.size);
    comm_gather(Cpu{}, s.world, all.data(), &s.memory, 1);
    s.memory = *std::min_element(all.begin(), all.end());
    const int64_t threads = omp_get_max_threads();
    s.threads.resize(s.world.size);
    comm_gather(Cpu{}, s.world, s.threads.data(), &threads, 1);
    if (choose_layout(s)) use_what_is_left(s);
}

// How the ranks of a ring share attention: as asked for, else as is fastest. False when they cannot.
bool choose_exchange(Setup& s) {
    RingBackend& backend = s.layout.exchange.backend;
    backend = RingBackend(choice(s.o.ring_backend, "auto|ring|allgather|ulysses"));
    if (backend == RingBackend::automatic)
        backend = ring_backend_for(s.attention == Attention::full, s.layout.ring, s.config.K,
                                   s.layout.tokens() * size_t(s.layout.ring), rings_in_hosts(s, s.layout));
    return backend != RingBackend::ulysses || s.config.K % s.layout.ring == 0;
}

// For a layout that does not fit: changes after which it does, each kept while the next is tried, the mildest first.
std::string what_fits(Setup s) {
    std::string changes;
    auto change = [&](const std::string& text) {
        changes += (changes.empty() ? "" : " ") + text;
        return choose_layout(s);
    };
    if (s.o.recompute != "auto" && (s.o.recompute = "auto", change("--recompute auto"))) return changes;
    for (int level : {2, 3})
        if (s.layout.zero_level() == level - 1 && s.layout.world > 1) {
            s.layout.zero = level;
            const std::string before = changes;
            if (change("--zero " + std::to_string(level))) return changes;
            if (level == 2) changes = before; // --zero 3 goes further
        }
    if (s.master == "float" && !s.o.resume && (s.master = "none", change("--master none"))) return changes;
    if (s.dtype == Type::bf16 && (s.grad_dtype == Type::f32 || s.layout.moments == Type::f32)) {
        s.o.grad_dtype = s.o.opt_dtype = "bf16";
        if (change("--grad_dtype bf16 --opt_dtype bf16")) return changes;
    }
    if (s.layout.B > 1 && (s.layout.B = 1, change("--batch 1"))) return changes;
    if (s.gpu && s.o.offload == "none") {
        const std::string before = changes;
        s.o.offload = "input,attention"; // the others of these share a place anyway
        if (change("--offload " + s.o.offload)) return changes;
        s.o.offload = "none", changes = before;
    }
    if (s.layout.tokens() > 8192 && s.o.ffn_tile != 8192) {
        s.o.ffn_tile = 8192;
        if (change("--ffn_tile 8192")) return changes;
    }
    const std::string before = changes;
    for (int ranks = 2 * s.layout.world; ranks <= 1024; ranks *= 2) {
        s.layout.world = ranks;
        if (!s.o.ring) s.layout.ring = ranks;
        if (!choose_exchange(s)) break; // nor with more of them
        const std::string on = "on " + std::to_string(ranks) + " ranks";
        const int zero = s.layout.zero;
        if (changes = before, change(on)) return changes;
        if (s.layout.zero = 3, changes = before, zero < 3 && change("--zero 3 " + on)) return changes;
        s.layout.zero = zero;
    }
    return "a smaller model or --context";
}

// Model FLOPs of some rows: 6 N per token (N: parameters but the input embedding), and per layer 12 H D per visible
// pair; nothing for recomputation. A tied embedding counts, as the head.
double model_flops(const Config& c, double tokens, double pairs) {
    double parameters = double(param_count(c));
    if (!c.tied) parameters -= double(c.V) * c.C;
    return 6 * parameters * tokens + 12.0 * c.L * c.H * c.D * pairs;
}

// Of an update as the estimate sees it what memory decides.
void step_memory(StepWork& w, const Setup& s) {
    const Recompute& r = s.layout.recompute;
    w.master = s.layout.master;
    w.again = {r.norm, r.swiglu, r.residual, r.qkv, r.ffn, r.attention};
    w.offloaded = double(measure(s, s.layout).host) / w.T / std::max(s.config.L - 2, 1);
}

// And all of it, with visible pairs and the ring's plan as in the first rows of the data: of a full mask one
// micro-batch, of packs some 2^20 tokens in 64 at most.
StepWork step_work(const Setup& s) {
    const Layout& l = s.layout;
    StepWork w;
    w.batches = double(s.rows_per_update()) / double(l.B * s.groups());
    w.T = double(l.tokens()), w.ring = l.ring, w.world = l.world, w.zero = l.zero_level();
    w.travel = l.exchange.backend == RingBackend::ulysses     ? KeysTravel::ulysses
               : l.exchange.backend == RingBackend::allgather ? KeysTravel::allgather
                                                              : KeysTravel::ring;
    w.nccl = takes_nccl(s, l);
    w.weight = double(type_size(s.dtype)), w.gradient = double(type_size(s.grad_dtype));
    w.moment = double(type_size(l.moments));
    step_memory(w, s);
    const size_t packs = std::clamp<size_t>((size_t(1) << 20) / (l.S * l.B), 1, 64);
    const size_t count = s.attention == Attention::full ? 1 : packs;
    Comm ring;
    ring.size = l.ring, w.imbalance = 0;
    Loader loader;
    loader_open(loader, s.o.train_data, pack_options(s, true));
    for (size_t i = 0; i < count; i++) {
        std::vector<Row> rows(l.B);
        for (Row& row : rows) loader_next(loader, row);
        const Batch b = batch_make(rows, s.attention, ring, attention_tiles_cpu, l.exchange);
        w.pairs += double(b.pairs) / double(l.ring * count);
        w.imbalance += b.plan.imbalance / double(count), w.moved += b.plan.moved / double(count);
    }
    return w;
}

void print_estimate(const Setup& s) {
    const bool here = s.gpu && gpu_fault(s.place.device).empty();
    const std::string name = here ? gpu_name(s.place.device) : "NVIDIA H200";
    const Ceilings* ceilings = s.gpu ? ceilings_of(name) : nullptr;
    const AttentionCeilings* attention =
        ceilings ? ceilings_of(*ceilings, s.config.D, s.o.portable_attention, s.o.deterministic) : nullptr;
    if (!attention || s.dtype != Type::bf16) {
        const std::string of = !s.gpu ? "CPUs" : !ceilings ? name : name + " with these heads, types and kernels";
        printf("\n  no estimate of the time: no ceilings of %s are known\n", of.c_str());
        return;
    }
    if (constexpr int most = 256; s.layout.ring > most) { // its plan alone would take many seconds
        printf("\n  no estimate of the time of rings of more than %d ranks\n", most);
        return;
    }
    const StepWork w = step_work(s);
    const double tokens = double(s.rows_per_update()) * double(s.layout.S);
    const std::string made_up = "made-up documents of " + std::to_string(s.o.generator_mean) + " tokens in the mean";
    const std::string rows = s.attention == Attention::full ? "a full mask"
                             : s.o.train_data.empty()       ? made_up
                                                            : "the first rows of " + s.o.train_data;
    printf("\n  On %s%s, with %.0f visible keys a token as in %s:\n", name.c_str(),
           here ? "" : " (there is no GPU here)", w.pairs / w.T, rows.c_str());
    step_print(*ceilings, *attention, s.config, w, tokens,
               model_flops(s.config, tokens, w.batches * w.pairs * w.world));

    // What waiting in the host's memory would save is said and not done: that memory is not the run's own.
    Setup away = s;
    away.o.offload = "qkv,residual";
    if (s.o.offload != "none" || s.o.recompute != "auto" || !choose_layout(away)) return;
    use_what_is_left(away);
    StepWork faster = w;
    step_memory(faster, away);
    auto step_ms = [&](const StepWork& work) {
        return 1e3 * step_seconds(step_parts(*ceilings, *attention, s.config, work));
    };
    if (const double ms = step_ms(faster); ms < 0.98 * step_ms(w) && away.layout.master == s.layout.master)
        printf("  %.0f ms with --offload %s, for %.0f GiB of the host's memory a rank\n", ms, away.o.offload.c_str(),
               double(measure(away, away.layout).host) / (1 << 30));
}

// How large rings are, and how their ranks share attention.
std::string ring_text(const Layout& l) {
    const char* names[] = {"auto", "ring", "allgather", "ulysses"};
    return std::to_string(l.ring) + (l.ring > 1 ? std::string(" by ") + names[int(l.exchange.backend)] : "");
}

void print_plan(const Setup& s) {
    Arena arena = measure(s, s.layout);
    const Config& c = s.config;
    printf("%s: %.2fB parameters, context %zu, %zu x %d rank%s in rings of %s, ZeRO-%d, %s, %s\n\n", s.o.model.c_str(),
           double(param_count(c)) / 1e9, s.layout.S, s.layout.B, s.layout.world, s.layout.world > 1 ? "s" : "",
           ring_text(s.layout).c_str(), s.layout.zero_level(), type_name(s.dtype),
           activations_text(s.layout, c.L).c_str());
    printf("  memory of a rank         GiB\n");
    for (const Arena::Part& part : arena.parts)
        printf("  %-20s %8.3f\n", part.name.c_str(), double(part.bytes) / (1 << 30));
    if (s.gpu) printf("  %-20s %8.3f\n", "CUDA, cuBLASLt", gpu_overhead_bytes / (1 << 30));
    if (const double transfers = transfer_bytes(s, s.layout); s.gpu && transfers > 0)
        printf("  %-20s %8.3f\n", "transfers", transfers / (1 << 30));
    if (!s.gpu) printf("  %-20s %8.3f\n", "attention's threads", threads_bytes(s, s.layout) / (1 << 30));
    const double needed = memory_needed(s, s.layout);
    printf("  %-20s %8.3f of %.1f\n", "all", needed / (1 << 30), s.memory / (1 << 30));
    if (arena.host)
        printf("  %-20s %8.3f\n", s.gpu ? "of the host, besides" : "of it: offloaded", double(arena.host) / (1 << 30));
    if (needed >= memory_usable(s)) printf("\n  does not fit; this would: %s\n", what_fits(s).c_str());
    else if (s.layout.train) print_estimate(s);
}

// --prompt's token ids, or BOS alone.
std::vector<int32_t> prompt_read(const Setup& s) {
    std::vector<int32_t> tokens;
    const char* at = s.o.prompt.c_str();
    while (*at) {
        char* end;
        long id = strtol(at, &end, 10);
        if (end == at || (*end && *end != ',') || id < 0 || id >= s.config.V)
            fail("option --prompt takes token ids below %d with commas between, not '%s'", s.config.V,
                 s.o.prompt.c_str());
        tokens.push_back(int32_t(id));
        at = *end ? end + 1 : end;
    }
    if (tokens.empty()) tokens.push_back(std::max(0, s.config.bos >= 0 ? s.config.bos : s.config.eos));
    return tokens;
}

// The device: as asked for, else GPUs, if there are any that can be used: then every rank must have one. Ranks that
// share GPUs are those of one host, which fetch from each other: NCCL wants a GPU for each.
void setup_device(Setup& s) {
    const Options& o = s.o;
    const bool shared = o.device != "cpu" && gpus_are_shared();
    const int ranks = o.plan && o.ranks ? int(o.ranks) : s.host.size;
    s.place = gpu_place(shared, s.host.rank, ranks, shared ? gpu_count() : 0);
    const std::string fault = o.device == "cpu" ? "" : gpu_fault(s.place.device); // looking takes memory of the GPU
    const uint8_t faulty = o.device == "cpu" || !fault.empty();
    std::vector<uint8_t> all(s.world.size);
    comm_gather(Cpu{}, s.world, all.data(), &faulty, 1);
    s.gpu = o.device == "gpu" || (o.device == "auto" && std::count(all.begin(), all.end(), 0) > 0);
    s.transport = Transport(choice(o.transport, "auto|ipc|nccl"));
    if (s.gpu && shared) {
        if (s.transport == Transport::nccl)
            fail("--transport nccl wants a GPU for every rank: leave TRAIN_LLAMA_SHARE_GPUS away, or pass another one");
        if (s.world.size > s.host.size) fail("TRAIN_LLAMA_SHARE_GPUS is for the ranks of one host");
        s.transport = Transport::ipc;
    }
    if (o.plan) return;
    if (s.gpu && !fault.empty()) fail("%s; --device cpu runs without a GPU", fault.c_str());
    const uint8_t reached = !s.gpu || shared || gpu_reaches_all(s.place.device, s.host.size);
    comm_gather(Cpu{}, s.world, all.data(), &reached, 1);
    s.reached = std::count(all.begin(), all.end(), 0) == 0;
    if (o.device == "auto" && !s.gpu && s.world.rank == 0 && access("/dev/nvidiactl", F_OK) == 0)
        printf("on the CPU, though this machine has an NVIDIA driver: %s\n", fault.c_str());
}

constexpr const char* eval_title = "row,index,doc,label,correct,loss\n";

// An option that names a file to write must not cost a model, data or a text; `begins`: how its own files begin.
void check_output(const char* option, const std::string& path, const std::string& begins) {
    int32_t magic = 0;
    char first[64] = "";
    FILE* file = path.empty() ? nullptr : fopen(path.c_str(), "rb");
    const size_t there = file ? fread(first, 1, sizeof first, file) : 0;
    if (file) fclose(file);
    memcpy(&magic, first, sizeof magic);
    if (magic == weights_magic || tokens_are(magic) ||
        (there && begins.compare(0, begins.size(), first, begins.size())))
        fail("--%s would overwrite %s, which holds %s: name a new file", option, path.c_str(),
             magic == weights_magic ? "weights"
             : tokens_are(magic)    ? "tokens"
                                    : "something else");
}

// As asked for; else what suits weights that are given, or random ones.
double peak_learning_rate(const Setup& s) { return s.o.lr > 0 ? s.o.lr : s.weights.empty() ? 3e-4 : 2e-5; }

// Reads the command line's meaning; bad combinations end here, before any work.
Setup setup_read(const Options& options, const Comm& world) {
    Setup s;
    s.o = options, s.world = world, s.host = comm_host(world), s.hosts.resize(world.size);
    const Options& o = s.o;
    int32_t first = world.rank; // of this host's
    comm_broadcast(Cpu{}, s.host, &first, 1, 0);
    comm_gather(Cpu{}, world, s.hosts.data(), &first, 1);
    if (o.out.empty() && (o.resume || o.save_every)) fail("--resume and --save_every need --out, the run's folder");
    if (!o.dump_logits.empty() && world.size > 1) fail("--dump_logits runs on one rank");
    if ((o.generate > 0) + !o.eval.empty() + !o.dump_logits.empty() > 1)
        fail("--generate, --eval and --dump_logits are a run each");
    if (o.ranks && !o.plan) fail("--ranks goes with --plan; ranks are started by mpirun -np %lld", (long long)o.ranks);
    if (!o.eval.empty() && o.val_data.empty() && o.train_data.empty())
        fail("--eval scores the tokens of --val_data, else of --train_data: pass one of them");
    if (!o.prompt.empty() && !o.generate && !o.sample_every)
        fail("--prompt is for --generate, or for --sample_every while it trains: pass one of them");
    check_output("eval", o.eval, eval_title), check_output("dump_logits", o.dump_logits, "");
    s.gpu = o.device == "gpu"; // it is looked at last, which takes a second: what can be refused before, is
    if (o.device != "gpu") setup_device(s);
    s.attention = Attention(choice(o.attention, "full|intra|intra_reset|anchor"));
    s.boundary = Boundary(choice(o.boundary_loss, "mask|next|bos"));
    s.precision = RopePrecision(choice(o.rope_precision, "exact|bf16_table|bf16_rotation|bf16_angle"));
    s.config = setup_config(s);
    std::string fault = config_fault(s.config);
    if (!fault.empty()) fail("%s", fault.c_str());
    s.o.lr = peak_learning_rate(s);
    s.layout.world = o.plan && o.ranks ? int(o.ranks) : world.size;
    s.layout.ring = o.ring ? int(o.ring) : s.layout.world;
    if (s.layout.world % s.layout.ring) fail("--ring %d does not divide the %d ranks", s.layout.ring, s.layout.world);
    s.layout.S = o.context ? size_t(o.context) : size_t(s.config.rope.max_context);
    if (s.layout.S < 2) fail("--context must be at least 2: a row holds the anchor and something to predict");
    s.layout.B = size_t(o.batch), s.layout.head_chunk = o.head_chunk ? size_t(o.head_chunk) : s.gpu ? 2048 : 512;
    if (!choose_exchange(s))
        fail(
            "--ring_backend ulysses gives each rank of a ring whole KV heads: %d of them do not go over %d ranks; pass "
            "another --ring or --ring_backend",
            s.config.K, s.layout.ring);
    s.layout.zero = int(o.zero);
    s.layout.train = o.eval.empty() && o.dump_logits.empty() && o.generate == 0;
    setup_rope(s);
    fault = config_fault(s.config);
    if (!fault.empty()) fail("%s", fault.c_str());
    if (s.o.rope_scaling == "model" && o.rope_factor > 0 && s.config.rope.scaling == RopeScaling::none)
        fail("--rope_factor needs --rope_scaling: these weights have none");
    int64_t step_tokens = int64_t(s.layout.S * s.layout.B) * s.groups();
    if (o.total_batch % step_tokens)
        fail("--total_batch %lld is not a multiple of context x batch x rings = %lld", (long long)o.total_batch,
             (long long)step_tokens);
    const double rows = double(sizeof(int32_t) * 4) * double(s.rows_per_update() / s.groups()) * double(s.layout.S);
    if (rows > host_memory() / 2)
        fail("--total_batch: the tokens of an update take %.0f GiB, and this machine has %.0f", rows / (1 << 30),
             host_memory() / (1 << 30));
    s.prompt = prompt_read(s);
    s.ring = comm_split(world, o.plan ? 0 : s.group(), world.rank);
    s.background = comm_split(world, 0, world.rank);
    if (o.device == "gpu") setup_device(s);
    setup_memory(s);
    return s;
}

// What a checkpoint holds beside weights and moments.
struct TrainState {
    int64_t step = 0;   // updates done or skipped
    int64_t tokens = 0; // inputs seen
    Cursor cursor;
    UpdateState update; // its place while training is the device
};

// Reads weights of any element type into the model's, and the slice of the master copy, which keeps all their bits.
template <class Dev, class E, class G> void weights_load(Model<Dev, E, G>& m, const WeightsFile& file) {
    if (file.elements != m.elements)
        fail("%s: %llu elements, the model has %zu", file.file.path.c_str(), (unsigned long long)file.elements,
             m.elements);
    auto read_as = [&]<class X>() {
        const size_t piece = 1 << 22;
        std::vector<X> buffer(std::min(piece, m.elements));
        std::vector<E> rounded(buffer.size());
        std::vector<Acc<E>> exact(m.master ? buffer.size() : 0);
        for (const Part<E, G>& part : m.parts) {
            const size_t first = part.begin + m.shard_begin(part), last = first + m.shard_count(part);
            for (size_t i = part.held_begin, n; i < part.held_end; i += n) {
                n = std::min(piece, part.held_end - i);
                weights_read(file, i, n, buffer.data());
                comm_alive(m.world);
                convert(Cpu{}, rounded.data(), buffer.data(), n);
                copy_to_device(m.dev, part.held + (i - part.held_begin), rounded.data(), n * sizeof(E));
                const size_t from = std::max(i, first), to = std::min(i + n, last);
                if (!m.master || from >= to) continue;
                convert(Cpu{}, exact.data(), buffer.data() + (from - i), to - from);
                copy_to_device(m.dev, m.master + part.at + (from - first), exact.data(), (to - from) * sizeof(Acc<E>));
            }
        }
    };
    if (file.dtype == Type::f32) read_as.template operator()<float>();
    if (file.dtype == Type::bf16) read_as.template operator()<bf16>();
    if (file.dtype == Type::f64) read_as.template operator()<double>();
}

template <class Dev, class E, class G> void master_from_params(Model<Dev, E, G>& m) {
    for (const Part<E, G>& part : m.parts)
        if (m.master) convert(m.dev, m.master + part.at, part.params_shard, m.shard_count(part));
}

// Every rank writes its optimizer shard, rank 0 the weights and the state as well. The others walk through the weights
// with it: with ZeRO-3 rank 0 fetches each part from all of them.
template <class Dev, class E, class G> void save(Model<Dev, E, G>& m, const Setup& s, TrainState& state) {
    if (s.o.out.empty()) return;
    if (m.layout.zero_level() < 3) // before a disk is at work: a transfer would not hear that its rank is alive
        for (size_t p = 0; p < m.parts.size(); p++) params_use(m, p, p);
    const Fetch fetch = [&](void* to, const void* from, size_t bytes) { copy_to_host(m.dev, to, from, bytes); };
    fetch(&state.update, m.update, sizeof state.update);
    WeightsHeader header = header_from_config(m.config, type_of<E>(), m.elements);
    std::vector<ShardHeader> shards;
    for (const Part<E, G>& part : m.parts)
        shards.push_back(shard_header(part.begin + m.shard_begin(part),
                                      part.begin + m.shard_begin(part) + m.shard_count(part), m.layout.moments,
                                      m.layout.moments, m.master));
    CheckpointFile weights{m.world.rank == 0 ? "weights.bin" : "", {{&header, sizeof header}}};
    CheckpointFile shard{shard_name(m.world.rank), {}};
    for (size_t p = 0; p < m.parts.size(); p++) {
        const Part<E, G>& part = m.parts[p];
        auto fetch_weights = [&m, p, fetch](void* to, const void* from, size_t bytes) {
            // Rank 0 comes when its disk has taken the part before; a transfer would not hear that it is alive.
            if (m.layout.zero_level() == 3 && from == m.parts[p].params) comm_barrier(m.world);
            params_use(m, p, std::min(p + 1, m.parts.size() - 1));
            if (m.world.rank == 0) fetch(to, from, bytes);
        };
        weights.pieces.push_back({part.params, (part.end - part.begin) * sizeof(E), fetch_weights});
        const size_t moment = part.at * type_size(m.layout.moments);
        shard_add(shard, shards[p], (uint8_t*)m.moment1 + moment, (uint8_t*)m.moment2 + moment,
                  m.master ? m.master + part.at : nullptr, fetch);
    }
    std::vector<CheckpointFile> files = {weights, shard};
    if (m.world.rank == 0) files.push_back({"state.bin", {{&state, sizeof state}}});
    checkpoint_save(m.world, s.o.out, state.step, files, int(s.o.keep));
}

// Goes on from the newest sound checkpoint, whatever number of ranks wrote it; false when there is none.
template <class Dev, class E, class G> bool resume(Model<Dev, E, G>& m, const Setup& s, TrainState& state) {
    Checkpoint from = checkpoint_newest(m.world, s.o.out);
    if (from.step < 0) {
        if (s.world.rank == 0 && !checkpoint_steps(s.o.out).empty())
            fail("no checkpoint in %s can be used (why stands above): they are left as they are; begin anew with "
                 "another --out",
                 s.o.out.c_str());
        return false;
    }
    const WeightsFile weights = weights_open(from.path + "/weights.bin");
    if (const std::string text = config_difference(weights.config, m.config); !text.empty())
        fail("%s and this command line differ in %s: resume with the options of the run, or start another with -e "
             "%s/weights.bin",
             from.path.c_str(), text.c_str(), from.path.c_str());
    if (weights.dtype != type_of<E>())
        fail("%s has weights in %s, this run in %s: resume with --dtype %s", from.path.c_str(),
             type_name(weights.dtype), type_name(type_of<E>()), type_name(weights.dtype));
    weights_load(m, weights);
    checkpoint_read(from, "state.bin", 0, &state, sizeof state);
    copy_to_device(m.dev, m.update, &state.update, sizeof state.update);
    const std::vector<OptimizerShard> shards = shards_open(from, m.world);
    auto read = [&](ShardField field, Type type, void* to) {
        const size_t piece = 1 << 24, bytes = type_size(type);
        std::vector<uint8_t> buffer;
        for (const Part<E, G>& part : m.parts)
            for (size_t i = 0, n; i < m.shard_count(part); i += n) {
                n = std::min(piece, m.shard_count(part) - i);
                buffer.resize(n * bytes);
                const size_t first = part.begin + m.shard_begin(part) + i;
                shard_read(shards, field, type, first, first + n, buffer.data());
                copy_to_device(m.dev, (uint8_t*)to + (part.at + i) * bytes, buffer.data(), n * bytes);
                comm_alive(m.world);
            }
    };
    read(ShardField::m, m.layout.moments, m.moment1);
    read(ShardField::v, m.layout.moments, m.moment2);
    const bool had_master = shards[0].header.type[2] >= 0;
    if (had_master && !m.master) fail("%s has master weights: resume with --master float", from.path.c_str());
    if (m.master) read(ShardField::master, type_of<Acc<E>>(), m.master);
    comm_barrier(m.world);
    return true;
}

// What a run begins with unless it resumes: random weights, or those of a file.
template <class Dev, class E, class G> void weights_start(Model<Dev, E, G>& m, const Setup& s) {
    if (s.weights.empty()) model_init(m, uint64_t(s.o.seed)), master_from_params(m);
    else weights_load(m, weights_open(s.weights));
    comm_barrier(s.world); // a disk may be slower than the others'
}

// Ids of one tokenizer mean nothing to a model, or beside text, of another; and what is trained on validates nothing.
void check_corpora(const Setup& s, const Corpus& training, const Corpus& validation) {
    auto hash = [](const Corpus& c) { return c.shards.empty() ? 0 : c.shards[0].tokenizer; };
    if (hash(training) && hash(validation) && hash(training) != hash(validation))
        fail("--train_data and --val_data were made with different tokenizers");
    for (const Corpus* c : {&training, &validation})
        if (s.world.rank == 0 && c->bos >= 0 && c->bos != s.config.bos)
            printf("%s begins documents with token %d, the model with %d: is it another tokenizer's?\n",
                   c->shards[0].path.c_str(), c->bos, s.config.bos);
    if (s.world.rank > 0 || validation.shards.empty()) return;
    auto file = [](const Shard& shard) { // whatever path leads to it
        struct stat info = {};
        stat(shard.path.c_str(), &info);
        return std::pair(info.st_dev, info.st_ino);
    };
    std::set<std::pair<dev_t, ino_t>> trained_on;
    for (const Shard& shard : training.shards) trained_on.insert(file(shard));
    for (const Shard& shard : validation.shards)
        if (trained_on.count(file(shard)))
            printf("%s is in --train_data and in --val_data: it does not tell how other text fares\n",
                   shard.path.c_str());
}

// This ring's rows among the next `count`, or `once` among those up to the data's end: row j goes to ring j mod rings.
// The others are stepped over, so that every rank's cursor is the same.
std::vector<Row> take_rows(Loader& loader, const Setup& s, int64_t count, bool once = false) {
    std::vector<Row> mine;
    for (int64_t j = 0; j < count && !(once && loader_ended(loader)); j++)
        if (j % s.groups() == s.group()) loader_next(loader, mine.emplace_back());
        else loader_skip(loader);
    return mine;
}

// The text of a file, empty when there is none.
std::string text_read(const std::string& path) {
    std::string text;
    char buffer[1 << 12];
    FILE* file = fopen(path.c_str(), "r");
    for (size_t n; file && (n = fread(buffer, 1, sizeof buffer, file)) > 0;) text.append(buffer, n);
    if (file) fclose(file);
    return text;
}

// On a GPU there are many algorithms for a matrix product. Rank 0 times them once, in a step whose results are thrown
// away, all ranks take its choice, and it stays with the run. With --deterministic no bit may hang on what was faster
// today: nothing is timed, and what the run's file does not name takes cuBLASLt's first guess.
template <class E, class G> void model_tune(Model<Cpu, E, G>&, const Setup&, Loader&, const Log&) {}
template <class E, class G> void model_tune(Model<Gpu, E, G>& m, const Setup& s, Loader& loader, const Log& log) {
    const bool timed = !s.o.deterministic;
    const std::string path = s.o.out.empty() ? "" : s.o.out + "/matmul.txt";
    const int known = s.world.rank == 0 ? matmul_algos_read(m.dev, text_read(path)) : 0;
    if (known) log_note(log, "%d matrix products take the algorithms of %s", known, path.c_str());
    else if (timed) log_note(log, "timing the algorithms of the matrix products, once, for up to a minute");
    if (timed) {
        const Cursor start = loader.cursor;
        std::vector<Row> rows = take_rows(loader, s, int64_t(s.layout.B) * s.groups());
        loader_seek(loader, start);
        Batch b = batch_make(rows, s.attention, s.ring, attention_tiles<E>(m.dev, m.config.D), s.layout.exchange);
        auto step = [&] {
            model_forward(m, b);
            head_forward_backward(m, b, 1.0 / double(std::max<int64_t>(b.counted, 1)));
            model_backward(m, b, true);
            grads_finish(m);
        };
        if (s.world.rank == 0) matmul_tune(m.dev, step, [&] { comm_alive(s.world); });
        else step();
        comm_barrier(s.world); // it hears that rank 0 gets on
    }
    std::string text = matmul_algos_text(m.dev);
    int64_t size = int64_t(text.size());
    comm_broadcast(Cpu{}, s.world, &size, 1, 0);
    text.resize(size_t(size));
    comm_broadcast(Cpu{}, s.world, (uint8_t*)text.data(), text.size(), 0);
    if (s.world.rank > 0) matmul_algos_read(m.dev, text);
    if (timed && !path.empty() && s.world.rank == 0) {
        FILE* file = fopen(path.c_str(), "w");
        if (!file || fwrite(text.data(), 1, text.size(), file) != text.size() || fclose(file) != 0)
            fail("%s: %s", path.c_str(), strerror(errno));
    }
    device_wait(m.dev); // no step is charged with it
}

double learning_rate(const Setup& s, int64_t step) {
    const Options& o = s.o;
    if (step < o.warmup) return o.lr * double(step + 1) / double(o.warmup);
    double left = o.steps > o.warmup ? 1 - double(step - o.warmup) / double(o.steps - o.warmup) : 0;
    double shape = o.schedule == "cosine" ? 0.5 - 0.5 * std::cos(M_PI * left) : o.schedule == "linear" ? left : 1;
    return o.lr * (o.final_lr + (1 - o.final_lr) * shape);
}

// What an update did, the same on every rank. loss, norm and skipped come from the device, when it has got there.
struct StepResult {
    int64_t step = 0, tokens = 0; // the state's after it
    double loss = 0, norm = 0, lr = 0, seconds = 0;
    double moving = 0, waiting = 0, optimizer = 0; // of the seconds, on GPUs: data that nothing hid, others, the update
    int shares_of = 0;                             // whose these are: the rank's that lost the most to the first two
    int64_t counted = 0, inputs = 0;               // labels and data tokens, over all ranks
    double pairs = 0;
    double imbalance = 1, moved = 0; // of the worst micro-batch of the worst ring
    double step_imbalance = 1;       // of the worst ring: the slowest rank of every ring step, summed, over the mean
    bool stop = false;               // a signal asks to save and leave
    std::string skipped;             // why; empty: the update was done
};

volatile sig_atomic_t signal_caught = 0;

// Of the visible pairs that this rank has in each step of its ring, of all micro-batches: the most that a rank has,
// summed over the steps, over the mean of a rank's sum.
double slowest_over_mean(const Comm& ring, const std::vector<double>& pairs /*(steps)*/) {
    const size_t steps = pairs.size();
    std::vector<double> all(steps * ring.size);
    comm_gather(Cpu{}, ring, all.data(), pairs.data(), steps);
    double slowest = 0, sum = 0;
    for (size_t step = 0; step < steps; step++) {
        double most = 0;
        for (int r = 0; r < ring.size; r++) most = std::max(most, all[r * steps + step]), sum += all[r * steps + step];
        slowest += most;
    }
    return sum > 0 ? slowest * ring.size / sum : 1;
}

// Adds what this rank has in each step of a micro-batch. The anchor's column is part of the first.
void pairs_by_step(std::vector<double>& pairs, const RingPlan& plan) {
    const size_t first = pairs.size();
    pairs.push_back(double(plan.backend == RingBackend::ulysses ? plan.own.forward.pairs : plan.pairs));
    for (const RingStep& step : plan.steps) {
        pairs.push_back(double(step.map.forward.pairs));
        pairs[first] -= pairs.back();
    }
}

// What the hosts tell each other once in a step: all is known before their GPUs get there.
void step_gather(const Setup& s, StepResult& r, const std::vector<double>& by_step) {
    const double mine[5] = {r.pairs, double(signal_caught), r.imbalance, slowest_over_mean(s.ring, by_step), r.moved};
    std::vector<double> all(5 * s.world.size);
    comm_gather(Cpu{}, s.world, all.data(), mine, 5);
    r.pairs = 0;
    for (const double* x = all.data(); x < all.data() + all.size(); x += 5) {
        r.pairs += x[0], r.stop |= x[1] > 0;
        r.imbalance = std::max(r.imbalance, x[2]), r.step_imbalance = std::max(r.step_imbalance, x[3]);
        r.moved = std::max(r.moved, x[4]);
    }
}

// Gradients of one update: all micro-batches forward and backward. The count of labels is known first, so every
// micro-batch weighs its tokens alike, however the update is cut.
template <class Dev, class E, class G>
StepResult step_gradients(Model<Dev, E, G>& m, const Setup& s, const TrainState& state, Loader& loader) {
    readback_open(m.dev, m.readback[(state.step + 1) % 2], sizeof *m.update);
    std::vector<Row> rows = take_rows(loader, s, s.rows_per_update());
    StepResult r;
    for (const Row& row : rows) r.counted += row.counted, r.inputs += row.inputs;
    int64_t counts[2] = {r.counted, r.inputs};
    comm_sum(Cpu{}, s.world, counts, 2);
    r.counted = counts[0] / s.layout.ring, r.inputs = counts[1] / s.layout.ring;

    std::vector<double> by_step;
    fill_zero(m.dev, m.grad_flat, m.grad_elements * sizeof(G));
    fill_zero(m.dev, &m.update->loss_sum, sizeof m.update->loss_sum);
    for (size_t first = 0; first < rows.size() && r.counted; first += s.layout.B) {
        Batch b = batch_make({rows.begin() + first, rows.begin() + first + s.layout.B}, s.attention, s.ring,
                             attention_tiles<E>(m.dev, m.config.D), s.layout.exchange);
        model_forward(m, b);
        head_forward_backward(m, b, 1.0 / double(r.counted));
        model_backward(m, b, first + s.layout.B >= rows.size());
        sum(m.dev, &m.update->loss_sum, m.loss, b.T, true);
        r.pairs += double(b.pairs) / s.layout.ring;
        r.imbalance = std::max(r.imbalance, b.plan.imbalance), r.moved = std::max(r.moved, b.plan.moved);
        pairs_by_step(by_step, b.plan);
    }
    grads_finish(m);
    step_gather(s, r, by_step);
    return r;
}

// Decides on the update and does it, all on the device; step_finish tells what came of it.
template <class Dev, class E, class G>
void step_update(Model<Dev, E, G>& m, const Setup& s, TrainState& state, StepResult& r) {
    const Options& o = s.o;
    readback_mark(m.dev, m.readback[(state.step + 1) % 2]);
    model_norm(m);
    comm_sum(m.dev, s.world, &m.update->loss_sum, 1);
    update_decide(m.dev, m.update, {double(r.counted), o.clip, o.max_z_loss, o.max_z_grad});
    r.lr = learning_rate(s, state.step);
    model_update(m, {r.lr, o.beta1, o.beta2, o.adam_eps, o.weight_decay, uint64_t(o.seed)});
    r.step = ++state.step, r.tokens = state.tokens += r.inputs;
    readback_send(m.dev, m.readback[r.step % 2], m.update, sizeof *m.update);
}

// Waits until the update is done, and reads what was decided.
template <class Dev, class E, class G> void step_finish(Model<Dev, E, G>& m, StepResult& r) {
    Readback& readback = m.readback[r.step % 2];
    const UpdateState& u = *(const UpdateState*)readback_wait(m.dev, readback);
    r.loss = u.loss, r.norm = u.norm, r.skipped = verdict_text(u.verdict);
    r.seconds = readback.seconds, r.optimizer = readback.since_mark;
}

// What this rank's transfers have cost so far, while layers were computed and in the update.
struct Spent {
    CommTimes layers, update;
};
template <class Dev> Spent spent_so_far(Dev dev, const Setup& s) {
    Spent spent{comm_times(dev, s.ring), comm_times(dev, s.world)};
    const CommTimes shards = comm_times(dev, s.background);
    spent.layers.moving += shards.moving, spent.layers.waiting += shards.waiting;
    return spent;
}

// The shares of transfers in a finished step, those since the last one that nothing hid. What is over already of the
// next step counts for this one. The world talks during the update, and only then.
void step_shares(StepResult& r, Spent& last, const Spent& now) {
    const double moving = now.update.moving - last.update.moving, waiting = now.update.waiting - last.update.waiting;
    r.moving = now.layers.moving - last.layers.moving + moving;
    r.waiting = now.layers.waiting - last.layers.waiting + waiting;
    r.optimizer -= moving + waiting;
    last = now;
}

// Takes the shares of the rank that lost the most: one that is late itself does not wait. The hosts meet here, as they
// do in step_gather; their GPUs are through with this step and mostly have the next one's work already.
void shares_gather(const Comm& world, StepResult& r) {
    const double mine[4] = {r.moving, r.waiting, r.optimizer, r.seconds};
    std::vector<double> all(4 * world.size);
    comm_gather(Cpu{}, world, all.data(), mine, 4);
    for (int rank = 0; rank < world.size; rank++) {
        const double* x = &all[4 * rank];
        if (rank == 0 || x[0] + x[1] > r.moving + r.waiting)
            r.moving = x[0], r.waiting = x[1], r.optimizer = x[2], r.seconds = x[3], r.shares_of = rank;
    }
}

template <class Dev, class X> std::vector<X> to_host(Dev dev, const X* from, size_t count) {
    std::vector<X> to(count);
    copy_to_host(dev, to.data(), from, count * sizeof(X));
    return to;
}

// A scored token of the validation data.
struct Score {
    int32_t row, index, doc, label, correct;
    float loss;
};

// One document without a label; document 0 where the mask has an anchor.
Row blank_row(size_t S, Attention attention) {
    Row row;
    row.token.assign(S, 0), row.doc.assign(S, has_anchor(attention) ? 0 : 1), row.pos.assign(S, 0),
        row.label.assign(S, -1);
    return row;
}

// Scores up to `count` rows of the loader, fewer when the data ends before (its last row is filled up from the
// beginning), spread over the rings; each rank returns its own tokens.
template <class Dev, class E, class G>
std::vector<Score> score_rows(Model<Dev, E, G>& m, const Setup& s, Loader& loader, int64_t count) {
    const int64_t at_once = int64_t(s.layout.B) * s.groups();
    std::vector<Score> scores;
    for (int64_t first = 0; first < count && !loader_ended(loader); first += at_once) {
        const int64_t start = loader.cursor.rows;
        std::vector<Row> rows = take_rows(loader, s, std::min(at_once, count - first), true);
        const bool none = rows.empty(); // at the data's end: then a blank row, since all rings fetch weights together
        if (none) rows.push_back(blank_row(s.layout.S, s.attention));
        Batch b = batch_make(rows, s.attention, s.ring, attention_tiles<E>(m.dev, m.config.D), s.layout.exchange);
        model_forward(m, b, true);
        head_forward(m, b, [](size_t, size_t) {});
        std::vector<int32_t> argmax = to_host(m.dev, m.argmax, b.T);
        std::vector<Acc<E>> loss = to_host(m.dev, m.loss, b.T);
        const Tokens& local = b.plan.local;
        for (size_t r = 0; r < rows.size() && !none; r++) {
            const int64_t number = start + int64_t(r) * s.groups() + s.group(); // as take_rows deals them
            for (size_t t = local.row_begin[r]; t < size_t(local.row_begin[r + 1]); t++)
                if (b.label[t] >= 0)
                    scores.push_back({int32_t(number), local.index[t], local.doc[t], b.label[t],
                                      argmax[t] == b.label[t], float(loss[t])});
        }
    }
    return scores;
}

// Mean loss over the first --val_rows rows of the validation data, in the file's order.
template <class Dev, class E, class G> double validation_loss(Model<Dev, E, G>& m, const Setup& s, Loader& loader) {
    loader_seek(loader, {});
    double sums[2] = {};
    for (const Score& score : score_rows(m, s, loader, s.o.val_rows)) sums[0] += score.loss, sums[1] += 1;
    comm_sum(Cpu{}, s.world, sums, 2);
    if (sums[1] == 0) fail("--val_data: its first %lld rows have no token to predict", (long long)s.o.val_rows);
    return sums[0] / sums[1];
}

// Writes the scores of all ranks, in row order, as CSV.
template <class Dev, class E, class G> void evaluate(Model<Dev, E, G>& m, const Setup& s, Loader& loader) {
    FILE* file = s.world.rank == 0 ? fopen(s.o.eval.c_str(), "w") : nullptr;
    if (s.world.rank == 0 && !file) fail("%s: %s", s.o.eval.c_str(), strerror(errno));
    std::vector<Score> mine = score_rows(m, s, loader, s.o.val_rows), all;
    std::vector<int64_t> counts(s.world.size);
    int64_t count = int64_t(mine.size());
    comm_gather(Cpu{}, s.world, counts.data(), &count, 1);
    size_t most = size_t(*std::max_element(counts.begin(), counts.end()));
    mine.resize(most);
    all.resize(most * counts.size());
    comm_gather(Cpu{}, s.world, (uint8_t*)all.data(), (uint8_t*)mine.data(), most * sizeof(Score));
    if (s.world.rank != 0) return;
    std::vector<Score> scores;
    for (size_t r = 0; r < counts.size(); r++)
        scores.insert(scores.end(), all.begin() + r * most, all.begin() + r * most + counts[r]);
    std::sort(scores.begin(), scores.end(),
              [](const Score& a, const Score& b) { return std::pair(a.row, a.index) < std::pair(b.row, b.index); });
    if (scores.empty()) fail("--eval: the first %lld rows have no token to predict", (long long)s.o.val_rows);
    fprintf(file, "%s", eval_title);
    double loss = 0, correct = 0;
    for (const Score& x : scores) {
        fprintf(file, "%d,%d,%d,%d,%d,%.6f\n", x.row, x.index, x.doc, x.label, x.correct, x.loss);
        loss += x.loss, correct += x.correct;
    }
    if (fclose(file) != 0) fail("%s: %s", s.o.eval.c_str(), strerror(errno));
    double n = double(std::max<size_t>(scores.size(), 1));
    printf("%zu tokens: loss %.4f, perplexity %.3f, correct %.2f%% -> %s\n", scores.size(), loss / n,
           std::exp(loss / n), 100 * correct / n, s.o.eval.c_str());
}

// Writes the logits of the first row, float32 (S, V), and prints its loss.
template <class Dev, class E, class G> void dump_logits(Model<Dev, E, G>& m, const Setup& s, Loader& loader) {
    Row row;
    loader_next(loader, row);
    Batch b = batch_make({row}, s.attention, s.ring, attention_tiles<E>(m.dev, m.config.D), s.layout.exchange);
    FILE* file = fopen(s.o.dump_logits.c_str(), "wb");
    if (!file) fail("%s: %s", s.o.dump_logits.c_str(), strerror(errno));
    std::vector<float> line(m.config.V);
    double loss = 0;
    model_forward(m, b, true);
    head_forward(m, b, [&](size_t t, size_t n) {
        const std::vector<E> logits = to_host(m.dev, m.logits, n * line.size());
        const std::vector<Acc<E>> losses = to_host(m.dev, m.loss + t, n);
        for (size_t i = 0; i < n; i++) {
            std::copy_n(logits.begin() + i * line.size(), line.size(), line.begin());
            if (fwrite(line.data(), 4, line.size(), file) != line.size())
                fail("%s: %s", s.o.dump_logits.c_str(), strerror(errno));
            loss += double(losses[i]);
        }
    });
    if (fclose(file) != 0) fail("%s: %s", s.o.dump_logits.c_str(), strerror(errno));
    printf("loss %.6f over %lld tokens, logits (%zu, %d) -> %s\n", loss / double(row.counted), (long long)row.counted,
           b.T, m.config.V, s.o.dump_logits.c_str());
}

// A token drawn from softmax(logits / temperature) among the top_k likeliest; temperature 0: the likeliest.
template <class E> int32_t sample_token(const E* logits, size_t V, double temperature, size_t top_k, double uniform) {
    std::vector<int32_t> order(V);
    for (size_t i = 0; i < V; i++) order[i] = int32_t(i);
    size_t k = temperature == 0 ? 1 : top_k == 0 ? V : std::min(top_k, V);
    std::partial_sort(order.begin(), order.begin() + k, order.end(), [&](int32_t a, int32_t b) {
        return std::pair(-double(logits[a]), a) < std::pair(-double(logits[b]), b);
    });
    std::vector<double> weight(k);
    double sum = 0;
    for (size_t i = 0; i < k; i++)
        sum += weight[i] = k == 1 ? 1 : std::exp((double(logits[order[i]]) - double(logits[order[0]])) / temperature);
    double left = uniform * sum;
    for (size_t i = 0; i < k; i++)
        if ((left -= weight[i]) < 0) return order[i];
    return order[k - 1];
}

// Continues `tokens` to `length`. Every rank computes the same on its own, without the ring; each token runs the
// whole prefix again, which needs no cache of keys and is right for every setting of the model.
template <class Dev, class E, class G>
void generate(Model<Dev, E, G>& m, const Setup& s, std::vector<int32_t>& tokens, size_t length, uint64_t stream) {
    const size_t C = m.config.C, V = m.config.V;
    const E* none = nullptr;
    while (tokens.size() < length) {
        const size_t n = tokens.size();
        Row row;
        row.token = tokens;
        row.doc.assign(n, 1), row.label.assign(n, -1), row.pos.resize(n);
        for (size_t i = 0; i < n; i++) row.pos[i] = int32_t(i);
        row.doc[0] = 0; // one document behind the anchor: plain causal attention
        Batch b = batch_make({row}, Attention::anchor, Comm{}, attention_tiles<E>(m.dev, m.config.D));
        model_forward(m, b, true);
        matmul_forward(m.dev, m.logits, m.final_normed + (n - 1) * C, m.params.head, none, none, 1, C, V);
        double uniform = hash_uniform(hash64(uint64_t(s.o.seed), stream), n);
        const std::vector<E> logits = to_host(m.dev, m.logits, V);
        tokens.push_back(sample_token(logits.data(), V, s.o.temperature, size_t(s.o.top_k), uniform));
        if (tokens.back() == m.config.eos) break;
    }
}

// Pieces of a vocabulary file, by token id: one a line, with \n, \\ and \xNN as escapes.
std::vector<std::string> pieces_read(const std::string& path) {
    std::vector<std::string> pieces;
    if (path.empty()) return pieces;
    FILE* file = fopen(path.c_str(), "rb");
    if (!file) fail("%s: %s", path.c_str(), strerror(errno));
    std::string piece;
    for (int c; (c = fgetc(file)) != EOF;) {
        unsigned byte = 0;
        if (c == '\n') pieces.push_back(piece), piece.clear();
        else if (c != '\\') piece += char(c);
        else if ((c = fgetc(file)) == 'n') piece += '\n';
        else if (c == 'x' && fscanf(file, "%2x", &byte) == 1) piece += char(byte);
        else piece += char(c);
    }
    fclose(file);
    return pieces;
}

void print_tokens(const std::vector<int32_t>& tokens, const std::vector<std::string>& pieces) {
    for (int32_t t : tokens)
        if (size_t(t) < pieces.size()) printf("%s", pieces[t].c_str());
        else printf("%d ", t);
    printf("\n");
    fflush(stdout);
}

double memory_gib(Cpu) { // the largest so far
    FILE* file = fopen("/proc/self/status", "r");
    char line[256];
    double kib = 0;
    while (file && fgets(line, sizeof line, file)) sscanf(line, "VmHWM: %lf kB", &kib);
    if (file) fclose(file);
    return kib / (1 << 20);
}

void log_step(Log& log, const Setup& s, const StepResult& r, double memory) {
    double tokens = double(s.rows_per_update()) * double(s.layout.S), seconds = r.seconds;
    double flops = model_flops(s.config, tokens, r.pairs) / seconds / s.world.size;
    const bool shown = r.step % s.o.log_every == 0 || r.step == s.o.steps || r.step <= 3;
    const bool apart = s.gpu && s.world.size > 1;
    char shares[64] = "", work[64] = "";
    if (apart)
        snprintf(shares, sizeof shares, " | moving %.1f%% waiting %.1f%%", 100 * r.moving / seconds,
                 100 * r.waiting / seconds);
    if (s.layout.ring > 1) snprintf(work, sizeof work, " | work %.2f steps %.2f", r.imbalance, r.step_imbalance);
    if (r.skipped.empty() && shown)
        log_note(log,
                 "step %lld/%lld | loss %.4f | norm %.3f | lr %.2e | %.0f ms | %.0f tok/s | %.1f %s/rank | "
                 "%.2f GiB%s%s",
                 (long long)r.step, (long long)s.o.steps, r.loss, r.norm, r.lr, seconds * 1e3, tokens / seconds,
                 flops / (s.gpu ? 1e12 : 1e9), s.gpu ? "TFLOP/s" : "GFLOP/s", memory, shares, work);
    if (!r.skipped.empty())
        log_note(log, "step %lld/%lld | loss %.4f | norm %.3f | skipped: %s", (long long)r.step, (long long)s.o.steps,
                 r.loss, r.norm, r.skipped.c_str());
    if (apart)
        log_values(log, "time",
                   {{"step", double(r.step)},
                    {"rank", double(r.shares_of)},
                    {"compute", seconds - r.moving - r.waiting - r.optimizer},
                    {"moving", r.moving},
                    {"waiting", r.waiting},
                    {"optimizer", r.optimizer}});
    log_values(log, r.skipped.empty() ? "step" : "skip",
               {{"step", double(r.step)},
                {"loss", r.loss},
                {"norm", r.norm},
                {"lr", r.lr},
                {"seconds", seconds},
                {"tokens", double(r.tokens)},
                {"counted", double(r.counted)},
                {"tokens_per_second", tokens / seconds},
                {"flops_per_second_per_rank", flops},
                {"memory_gib", memory},
                {"imbalance", r.imbalance},
                {"step_imbalance", r.step_imbalance},
                {"moved", r.moved}});
}

void announce(const Log& log, const Setup& s, const Loader& loader, const std::string& transport) {
    const Layout& l = s.layout;
    log_note(log, "%s: %.2fM parameters in %s, RoPE base %g; %d rank%s (%s), %d thread%s each, rings of %s",
             s.o.model.c_str(), double(param_count(s.config)) / 1e6, type_name(s.dtype), s.config.rope.base, l.world,
             l.world > 1 ? "s" : "", comm_backend(), omp_get_max_threads(), omp_get_max_threads() > 1 ? "s" : "",
             ring_text(l).c_str());
    if (s.gpu && l.world > 1) log_note(log, "data travel between GPUs by %s", transport.c_str());
    if (s.gpu && s.place.ranks > 1)
        log_note(log, "%d ranks share a GPU: times are not those of a GPU a rank, and the memory taken is that of all",
                 s.place.ranks);
    if (s.o.out.empty()) log_note(log, "no --out: nothing is saved");
    else if (!s.o.save_every) log_note(log, "no --save_every: only the end is saved, or where a signal ends the run");
    if (int share = int(sysconf(_SC_NPROCESSORS_ONLN)) / s.host.size; omp_get_num_procs() < share)
        log_note(log, "bound to %d of %d cores a rank: mpirun --bind-to none lets it use them", omp_get_num_procs(),
                 share);
    if (s.o.train_data.empty())
        log_note(log, "no --train_data: made-up documents of %lld tokens in the mean", (long long)s.o.generator_mean);
    else
        log_note(log, "%s: %lld documents, %lld tokens, %.3g times through them in %lld steps", s.o.train_data.c_str(),
                 (long long)loader.corpus.documents, (long long)loader.corpus.text,
                 double(s.o.steps) * double(s.rows_per_update() * l.S) / double(loader.corpus.text),
                 (long long)s.o.steps);
    log_note(log, "%s attention, context %zu, %lld tokens an update, memory %.2f GiB a rank, %s, master %s",
             s.o.attention.c_str(), l.S, (long long)(s.rows_per_update() * l.S), memory_needed(s, l) / (1 << 30),
             activations_text(l, s.config.L).c_str(), l.master ? "float" : "none");
}

template <class Dev, class E, class G> int train(Model<Dev, E, G>& m, const Setup& s) {
    const Options& o = s.o;
    constexpr int most_skips = 50; // in a row: the run is lost
    if (!o.out.empty() && s.world.rank == 0) {
        directory_make(o.out);
        for (const std::string& name : directory_list(o.out))
            if (!o.resume && step_from_name(name) >= 0)
                fail("%s holds %s of another run: pass --resume to go on, or another --out", o.out.c_str(),
                     name.c_str());
    }
    Loader loader, validation;
    loader_open(loader, o.train_data, pack_options(s, true));
    if (!o.val_data.empty()) loader_open(validation, o.val_data, pack_options(s, false));
    check_corpora(s, loader.corpus, validation.corpus);
    const std::vector<std::string> pieces = pieces_read(o.vocab_file);
    const std::string data = s.world.rank == 0 && !o.out.empty() ? corpus_fingerprint(loader.corpus, s.world) : "";
    TrainState state;
    const bool resumed = o.resume && resume(m, s, state);
    if (!resumed) weights_start(m, s);
    const std::string changes = resumed && s.world.rank == 0 ? log_changes(o, o.out, data) : "";
    Log log = log_open(o, o.out, s.world.rank, data, !resumed);
    if (o.resume && !resumed) log_note(log, "no checkpoint in '%s': a new run", o.out.c_str());
    if (resumed) log_note(log, "going on from step %lld", (long long)state.step);
    if (!changes.empty()) log_note(log, "changed since the last start: %s", changes.c_str());

    loader_seek(loader, state.cursor);
    if (o.domain_tags && loader.corpus.max_tags == 0) log_note(log, "--domain_tags: no source of this data has tags");
    announce(log, s, loader, comm_transport(m.dev, s.world));

    auto take = [](int number, void (*handler)(int)) { // but what is ignored stays so, as nohup wants it
        if (signal(number, handler) == SIG_IGN) signal(number, SIG_IGN);
    };
    for (int number : {SIGTERM, SIGUSR1, SIGHUP}) take(number, [](int) { signal_caught = 1; });
    auto interrupted = [](int) {
        constexpr char text[] = " saving after this step; Ctrl-C again ends at once\n";
        signal_caught = 1, signal(SIGINT, SIG_DFL);
        if (write(STDERR_FILENO, text, sizeof text - 1) < 0) return;
    };
    if (!o.out.empty()) take(SIGINT, interrupted);
    if (state.step < o.steps) model_tune(m, s, loader, log);
    const size_t longest = std::min(m.layout.tokens(), s.layout.S); // that a sample can be
    if (state.step >= o.steps) log_note(log, "nothing to do: --steps is %lld", (long long)o.steps);
    int skips = 0;
    Spent spent = spent_so_far(m.dev, s);
    auto finish = [&](StepResult& r) { // false: the run is lost
        step_finish(m, r);
        step_shares(r, spent, spent_so_far(m.dev, s));
        if (s.gpu) shares_gather(s.world, r);
        log_step(log, s, r, memory_gib(m.dev));
        skips = r.skipped.empty() ? 0 : skips + 1;
        return r.skipped.empty() || (skips < most_skips && (o.on_bad == "skip" || r.counted == 0));
    };
    // A GPU goes on with the next update while the host reads what came of the last one, unless somebody waits for it.
    const bool may_wait = std::is_same_v<Dev, Gpu> && o.on_bad == "skip";
    auto due = [&](int64_t every) { return every && state.step % every == 0; };
    std::optional<StepResult> under_way;
    while (state.step < o.steps) {
        StepResult r = step_gradients(m, s, state, loader);
        step_update(m, s, state, r);
        state.cursor = loader.cursor;
        const bool lost_before = under_way && !finish(*under_way);
        under_way.reset();
        bool val_due = !o.val_data.empty() && due(o.val_every), leave = r.stop || lost_before;
        if (may_wait && !leave && state.step < o.steps && !val_due && !due(o.save_every) && !due(o.sample_every)) {
            under_way = r;
            continue;
        }
        const bool lost = !finish(r); // a good update after the last bad one: the run is not
        leave = r.stop || lost;
        const bool last = leave || state.step == o.steps;
        if (last || due(o.save_every)) save(m, s, state); // first: what follows may fail
        if (!o.val_data.empty() && !leave && (last || val_due)) {
            double loss = validation_loss(m, s, validation);
            log_note(log, "step %lld | validation loss %.4f | perplexity %.2f", (long long)state.step, loss,
                     std::exp(loss));
            log_values(log, "validation", {{"step", double(state.step)}, {"loss", loss}});
        }
        if (o.sample_every && !leave && (last || due(o.sample_every))) {
            std::vector<int32_t> tokens = s.prompt;
            generate(m, s, tokens, std::min(tokens.size() + 64, longest), uint64_t(state.step));
            if (s.world.rank == 0) print_tokens(tokens, pieces);
        }
        if (lost)
            fail("stopped after step %lld: %s; weights are those before it", (long long)state.step, r.skipped.c_str());
        if (r.stop) {
            log_note(log, "a signal came at step %lld: %s, leaving", (long long)state.step,
                     o.out.empty() ? "nothing is saved without --out" : "saved");
            break;
        }
    }
    log_close(log);
    return 0;
}

template <class Dev, class E, class G> int run(Dev dev, Setup& s) {
    Model<Dev, E, G> m;
    m.dev = dev, m.config = s.config, m.layout = s.layout, m.precision = s.precision;
    m.world = s.world, m.background = s.background;
    Arena arena = measure(s, s.layout);
    if (memory_needed(s, s.layout) >= memory_usable(s)) {
        if (s.world.rank == 0) print_plan(s);
        fflush(stdout);
        comm_barrier(s.world); // the others would end rank 0 before it has said what fits
        fail("%.2f GiB are needed and a rank has %.2f, of which it can use %.2f",
             memory_needed(s, s.layout) / (1 << 30), s.memory / (1 << 30), memory_usable(s) / (1 << 30));
    }
    // Not refused: a virtual machine may tell less than it can have.
    const double offloaded = double(arena.host) * s.host.size, there = host_memory();
    if (s.gpu && s.world.rank == 0 && offloaded >= 0.9 * there)
        fprintf(stderr, "--offload takes %.2f GiB of this host's memory, which says that it has %.2f\n",
                offloaded / (1 << 30), there / (1 << 30));
    const size_t planned = arena.used;
    arena = {device_allocate(dev, planned), 0, {}};
    model_place(m, arena);
    REQUIRE(arena.used == planned, "every rank must place what was measured");
    m.host_memory = host_allocate(dev, arena.host);
    for (const Comm& group : {s.world, s.ring, s.background}) comm_open(dev, group, arena.base, planned, s.transport);
    if (s.layout.train) return train(m, s);

    if (s.o.generate) {
        std::vector<int32_t> tokens = s.prompt;
        const std::vector<std::string> pieces = pieces_read(s.o.vocab_file);
        size_t length = tokens.size() + size_t(s.o.generate);
        if (length > std::min(m.layout.tokens(), s.layout.S))
            fail("prompt and continuation are %zu tokens: pass --context %zu or more", length, length * s.layout.ring);
        weights_start(m, s);
        generate(m, s, tokens, length, 0);
        if (s.world.rank == 0) print_tokens(tokens, pieces);
        return 0;
    }
    Loader loader;
    loader_open(loader, s.o.val_data.empty() ? s.o.train_data : s.o.val_data, pack_options(s, false));
    check_corpora(s, loader.corpus, {});
    weights_start(m, s);
    if (!s.o.eval.empty()) evaluate(m, s, loader);
    else dump_logits(m, s, loader);
    return 0;
}

// One line for every Hugging Face tensor: offset in elements, shape, name. The converters read this.
void dump_params(const Config& c) {
    for (const ParamInfo& p : param_table(c)) {
        if (p.count() == 0) continue;
        std::string names = p.hf;
        size_t pieces = 1 + std::count(names.begin(), names.end(), '|'), row = 0;
        for (size_t i = 0, at = 0; i < pieces; i++) {
            size_t rows = pieces == 1 ? p.rows : pieces == 2 ? p.rows / 2 : size_t(i == 0 ? c.H : c.K) * c.D;
            size_t end = std::min(names.find('|', at), names.size());
            std::string name = names.substr(at, end - at);
            if (p.layer >= 0) name = "model.layers." + std::to_string(p.layer) + "." + name;
            bool vector = p.rows == 1 || p.columns == 1;
            printf("%zu\t", p.offset + row * p.columns);
            if (vector) printf("%zu\t%s\n", p.rows == 1 ? p.columns : rows, name.c_str());
            else printf("%zux%zu\t%s\n", rows, p.columns, name.c_str());
            row += rows, at = end + 1;
        }
    }
}

// Threads share the host's cores with the ranks beside this one, unless the user has said how many. They inherit
// from the first one that denormals count as zero: below 1e-38 an addition would take a hundred times as long.
void set_threads(const Comm& world) {
#ifdef __SSE__
    _mm_setcsr(_mm_getcsr() | 0x8040); // flush to zero, denormals are zero
#endif
    int share = int(sysconf(_SC_NPROCESSORS_ONLN)) / comm_host(world).size;
    if (!getenv("OMP_NUM_THREADS")) omp_set_num_threads(std::max(1, std::min(omp_get_num_procs(), share)));
}

#ifdef __CUDACC__
double memory_gib(Gpu) { return gpu_memory_used() / (1 << 30); }

int run_gpu(Setup& setup) {
    Gpu gpu = gpu_open(setup.place.device, setup.o.deterministic, setup.o.portable_attention);
    const int status = setup.dtype == Type::f32        ? run<Gpu, float, float>(gpu, setup)
                       : setup.grad_dtype == Type::f32 ? run<Gpu, bf16, float>(gpu, setup)
                                                       : run<Gpu, bf16, bf16>(gpu, setup);
    comm_close(gpu);
    return status;
}
#else
int run_gpu(Setup&) { fail("%s", gpu_fault(0).c_str()); }
#endif

#ifndef TRAIN_LLAMA_NO_MAIN
int main(int argc, char** argv) {
    const Options options = options_parse(argc, argv);
    if (options.help) return options_help(), 0;
    if (options.options_table) return options_markdown(), 0;
    Comm world = comm_init(&argc, &argv, double(options.timeout));
    signal(SIGPIPE, SIG_IGN); // when nobody reads what is printed any more, the run goes on, and so does log.jsonl
    set_threads(world);

    Setup setup = setup_read(options, world);
    int status = 0;
    if (options.dump_params && world.rank == 0) dump_params(setup.config);
    if (options.plan && world.rank == 0) print_plan(setup);
    if (!options.dump_params && !options.plan)
        status = setup.gpu ? run_gpu(setup) : with_types(setup.dtype, setup.grad_dtype, [&]<class E, class G>() {
            return run<Cpu, E, G>(Cpu{}, setup);
        });
    comm_finalize(world);
    return status;
}
#endif
