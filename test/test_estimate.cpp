// The plan's estimate of a step's time: every part by hand at a tiny shape, and LLaMA-2-7B beside what was measured.
#include "../core/estimate.h"
#include "check.h"

namespace {
// L = 2, C = 4, H = 2, K = 1, D = 2, F = 6, V = 10. A layer's matrices: 4 x 8, 4 x 4 and three of 4 x 6: 120 elements.
Config tiny() { return make_config(2, 4, 2, 1, 6, 10, 10000, 64); }

// Round rates: seconds are read off the sizes.
Ceilings round_ceilings(double link) {
    return {"none", 10, 5, 100, {{false, false, 2, {{1, 2.0}, {4, 4.0}}, {{1, 1.0}}}}, {{1, link}}, {{1, link / 2}}};
}
// 3 tokens, causal.
StepWork three_tokens() {
    StepWork w;
    w.T = 3, w.pairs = 6;
    return w;
}
std::vector<StepPart> parts_of(const StepWork& w, double link = 1) {
    const Ceilings c = round_ceilings(link);
    return step_parts(c, c.attention[0], tiny(), w);
}
StepPart part(const std::vector<StepPart>& parts, const std::string& name) {
    for (const StepPart& p : parts)
        if (name == p.name) return p;
    CHECK_MESSAGE(false, "no part ", name);
    return {};
}
bool has(const std::vector<StepPart>& parts, const std::string& name) {
    return std::any_of(parts.begin(), parts.end(), [&](const StepPart& p) { return name == p.name; });
}
} // namespace

TEST_CASE("a rate between two sizes goes by their logarithm, beyond them it stays") {
    const RateCurve curve = {{4, 10}, {16, 30}, {32, 20}};
    CHECK(rate_at(curve, 4) == 10);
    CHECK(rate_at(curve, 8) == doctest::Approx(20));
    CHECK(rate_at(curve, 16) == 30);
    CHECK(rate_at(curve, 32) == doctest::Approx(20));
    CHECK(rate_at(curve, 1) == 10);
    CHECK(rate_at(curve, 1e9) == 20);
    for (const Ceilings& c : known_ceilings) {
        std::vector<RateCurve> all = {c.ipc, c.nccl};
        for (const AttentionCeilings& a : c.attention) all.push_back(a.forward), all.push_back(a.backward);
        for (const RateCurve& curve : all)
            for (size_t i = 1; i < curve.size(); i++) CHECK(curve[i - 1].size < curve[i].size);
    }
}

TEST_CASE("the work of every part is that of a count by hand") {
    const Config c = tiny();
    CHECK(layer_matrices(c) == 120);
    CHECK(matrix_elements(c) == 320);
    CHECK(product_flops(c) == 2 * (240 + 40));
    const std::vector<StepPart> parts = parts_of(three_tokens());
    CHECK(part(parts, "products").flops == 3 * 3 * 560);
    CHECK(part(parts, "products").seconds == doctest::Approx(504));
    Ceilings fixed = round_ceilings(1);
    fixed.attention[0].deterministic = true;
    CHECK(part(step_parts(fixed, fixed.attention[0], c, three_tokens()), "products").seconds == doctest::Approx(1008));
    CHECK(part(parts, "attention, forward").flops == 2 * 6 * 2 * (2 * 2 * 2)); // layers, pairs, heads, Q K^T and P V
    CHECK(part(parts, "attention, backward").flops == 2 * 6 * 2 * (5 * 2 * 2));
    CHECK(part(parts, "attention, forward").seconds == doctest::Approx(192 / 3.0)); // 2 keys a query: between 2 and 4
    CHECK(part(parts, "attention, backward").seconds == doctest::Approx(480));
    // A token in a layer, elements of 2 bytes: two norms (4 in, 4 out), RoPE both ways (3 heads of 2, in and out, and 2
    // floats of angles), SwiGLU (12 in, 6 out), two norms' backward (12 in, 4 out), SwiGLU's (18 in, 12 out).
    CHECK(part(parts, "norms, RoPE, SwiGLU").bytes == 2 * 3 * (32 + 2 * (24 + 8) + 36 + 64 + 60));
    CHECK(part(parts, "embedding, loss").bytes == 3 * (9 * 4 + 2 * 10) * 2);
    CHECK(part(parts, "AdamW, norm, cleared gradients").bytes == 320 * (14 + 2 + 2));
    CHECK(part(parts, "recomputed products").seconds == 0);
    double seconds = 0;
    for (const StepPart& p : parts) {
        seconds += p.counted;
        CHECK(p.counted == p.seconds);
    }
    CHECK(step_seconds(parts) == doctest::Approx(seconds));
    CHECK(!has(parts, "ring, keys and gradients"));
    CHECK(!has(parts, "sums of gradients"));
}

TEST_CASE("what is recomputed, micro-batches and the optimizer's types are counted") {
    StepWork w = three_tokens();
    w.again = {1, 2, 1, 1, 1, 1};
    w.batches = 2;
    const std::vector<StepPart> once = parts_of(three_tokens()), parts = parts_of(w);
    CHECK(part(parts, "recomputed products").flops == 2 * 2 * 3 * (4 * 4 + 4 * 8 + 4 * 12));
    CHECK(part(parts, "recomputed attention").flops == 2 * 96);
    CHECK(part(parts, "recomputed norms, RoPE, SwiGLU").bytes == 2 * 3 * (32 + 32 + 2 * 36));
    for (const char* name : {"products", "attention, forward", "attention, backward", "norms, RoPE, SwiGLU"})
        CHECK(part(parts, name).seconds == doctest::Approx(2 * part(once, name).seconds));
    CHECK(part(parts, "AdamW, norm, cleared gradients").bytes == part(once, "AdamW, norm, cleared gradients").bytes);
    // As dev/bench_kernels counts them, and the norm's pass over the gradient.
    CHECK(optimizer_bytes(w) == 14 + 2);
    w.master = true, w.gradient = 4;
    CHECK(optimizer_bytes(w) == 22 + 4);
    w.moment = 4;
    CHECK(optimizer_bytes(w) == 30 + 4);
}

TEST_CASE("what is offloaded costs what the layers beside it do not hide") {
    const Ceilings ceilings = round_ceilings(1);
    Config c = tiny();
    c.L = 5;
    StepWork w = three_tokens();
    w.batches = 2;
    auto offloaded = [&](double bytes) { // of a token
        w.offloaded = bytes;
        return step_parts(ceilings, ceilings.attention[0], c, w);
    };
    const char* name = "offloaded, to the host and back";
    CHECK(!has(offloaded(0), name));
    CHECK(part(offloaded(1), name).moved == 2 * 3 * 3 * 2); // ways, layers but two, tokens, micro-batches
    CHECK(part(offloaded(1), name).counted == 0);
    const std::vector<StepPart> parts = offloaded(1);
    const double attention = part(parts, "attention, forward").seconds / 2 / c.L;
    const double product = 3 * 2 * layer_matrices(c) / ceilings.products;
    const double backward = part(parts, "attention, backward").seconds / 2 / c.L + 2 * product, time = 1000 * backward;
    CHECK(part(offloaded(time * host_rate / 3), name).seconds == doctest::Approx(2 * 2 * 3 * time));
    CHECK(part(offloaded(time * host_rate / 3), name).counted ==
          doctest::Approx(2 * 3 * (2 * time - backward - product - attention)));
}

TEST_CASE("keys travel behind attention") {
    StepWork w;
    w.ring = w.world = 2, w.T = 8, w.pairs = 56, w.moved = 0.75; // of 8 tokens 6, with 2 x 2 elements
    const double slow[2] = {1000, 1000}, fast[2] = {2, 2};
    const RateCurve link = {{1, 10.0}};
    KeysTime k = keys_time(tiny(), w, link, slow);
    CHECK(k.moved[0] == 6 * 4 * 2);
    CHECK(k.moved[1] == 6 * 4 * (2 + 4)); // and their gradients, float
    CHECK(k.seconds[0] == doctest::Approx(4.8));
    CHECK(k.counted[0] == 0);
    CHECK(k.counted[1] == doctest::Approx(9.6)); // the last gradients have nothing beside them
    k = keys_time(tiny(), w, link, fast);
    CHECK(k.counted[0] == doctest::Approx(4.8 - 1));
    CHECK(k.counted[1] == doctest::Approx(14.4 - 1 + 9.6));
    w.travel = KeysTravel::allgather;
    k = keys_time(tiny(), w, link, slow);
    CHECK(k.counted[0] == doctest::Approx(4.8));
    CHECK(k.counted[1] == doctest::Approx(14.4));
    w.travel = KeysTravel::ulysses; // half of (Q, K, V, O): 12 elements; backward (Q, K, V, O, dO, dQ, dK, dV): 24
    k = keys_time(tiny(), w, link, slow);
    CHECK(k.moved[0] == 4 * 12 * 2);
    CHECK(k.moved[1] == 4 * 24 * 2);
    CHECK(k.counted[1] == doctest::Approx(19.2));
    w.travel = KeysTravel::ring;
    CHECK(keys_a_query(w) == doctest::Approx(7 / 1.75));
    w.ring = 1;
    CHECK(keys_time(tiny(), w, link, fast).seconds[1] == 0);
}

TEST_CASE("imbalance counts the slowest rank") {
    StepWork w = three_tokens();
    w.imbalance = 1.5;
    CHECK(part(parts_of(w), "attention, forward").seconds == doctest::Approx(64 * 1.5));
    CHECK(part(parts_of(w), "attention, backward").seconds == doctest::Approx(480 * 1.5));
    CHECK(part(parts_of(w), "attention, backward").flops == 480);
}

// Half of 320 elements of 2 bytes come from the other rank; a layer's 120 in 120 bytes, the head's and embedding's 40.
TEST_CASE("gradients and weights are shared by the level of ZeRO") {
    StepWork w = three_tokens();
    w.world = 2;
    const double fast = 1e12;
    for (int zero : {1, 2, 3}) {
        CAPTURE(zero);
        w.zero = zero, w.batches = 1;
        const std::vector<StepPart> parts = parts_of(w);
        CHECK(part(parts, "sums of gradients").moved == 320);
        CHECK(part(parts, "sums of gradients").seconds == doctest::Approx(320));
        CHECK(part(parts, "sums of gradients").counted == doctest::Approx(120 + 40)); // the other layer's are hidden
        CHECK(has(parts, "weights gathered") == (zero < 3));
        const double again = zero == 1 ? 320 : 160 + 320 + 3 * 160; // cleared and added
        CHECK(part(parts, "AdamW, norm, cleared gradients").bytes == 160 * (14 + 2) + again * 2);
        if (zero < 3) CHECK(part(parts, "weights gathered").moved == 320);
        if (zero < 3) CHECK(part(parts, "weights gathered").seconds == doctest::Approx(320));
        // Beside the second layer's is the first one's forward, 72 s of products and 32 of attention.
        if (zero < 3) CHECK(part(parts, "weights gathered").counted == doctest::Approx(40 + 120 + 120 - (72 + 32)));
        if (zero == 3) CHECK(part(parts, "weights fetched").moved == 320 + 240); // the layers in the backward, too
        if (zero == 3) CHECK(part(parts, "weights fetched").seconds == doctest::Approx(560));
        w.batches = 3;
        CHECK(part(parts_of(w), "sums of gradients").moved == (zero == 1 ? 320 : 3 * 320));
        // Over a link that takes no time, two ranks side by side are one but for the optimizer.
        w.batches = 1;
        double seconds = 0;
        for (const StepPart& p : parts) seconds += p.moved > 0 ? 0 : p.seconds;
        const double shared = part(parts, zero == 3 ? "weights fetched" : "weights gathered").counted;
        CHECK(step_seconds(parts) == doctest::Approx(seconds + 120 + 40 + shared));
        const double other = part(parts_of(w), "AdamW, norm, cleared gradients").seconds;
        const std::vector<StepPart> one = parts_of(three_tokens());
        CHECK(step_seconds(parts_of(w, fast)) - other ==
              doctest::Approx(step_seconds(one) - part(one, "AdamW, norm, cleared gradients").seconds));
    }
    // Nothing hides what takes longer than a layer's backward: 2 x 72 s of products and 240 s of attention.
    w.zero = 1;
    CHECK(part(parts_of(w, 0.25), "sums of gradients").counted == doctest::Approx(4 * 120 - 384 + 4 * (120 + 40)));
    w.nccl = true;
    CHECK(part(parts_of(w, 2), "weights gathered").seconds == doctest::Approx(320));
}

// dev/LOG.md, "the whole step", commits 3c23a96, f474594 and 59040f8 (64K, full); with the portable attention cd91bf1.
// One kernel's rate moves by some percent with the temperature, and most of a step is bound by power as it is.
TEST_CASE("the steps of LLaMA-2-7B measured on an H200 are within 5% of the estimate") {
    const Config c = make_config(32, 4096, 32, 32, 11008, 32000, 10000, 4096);
    const Ceilings& h200 = *ceilings_of("NVIDIA H200");
    struct Measured {
        double rows, S, keys; // visible keys a token
        LayersAgain again;
        double ms;
        bool portable = false;
    };
    const LayersAgain most = {32, 32, 32, 32, 15, 0};
    for (const Measured& m : {Measured{4, 4096, 2048.5, {}, 1173},
                              {1, 32768, 16384.5, {32, 32, 23}, 3701},
                              {1, 65536, 32768.5, most, 11107},
                              {1, 65536, 3539, most, 5541},
                              {1, 65536, 32768.5, most, 16192, true}}) {
        CAPTURE(m.ms);
        StepWork w;
        w.T = m.rows * m.S, w.pairs = w.T * m.keys, w.again = m.again;
        const AttentionCeilings* attention = ceilings_of(h200, c.D, m.portable, false);
        CHECK(attention != nullptr);
        const double ms = 1e3 * step_seconds(step_parts(h200, *attention, c, w));
        CAPTURE(ms);
        CHECK(ms == doctest::Approx(m.ms).epsilon(0.05));
    }
}

TEST_CASE("there is no estimate for what was not measured") {
    CHECK(ceilings_of("NVIDIA H100 80GB HBM3") == nullptr);
    CHECK(ceilings_of("NVIDIA H200 NVL") == nullptr);
    CHECK(ceilings_of(*ceilings_of("NVIDIA H200"), 96, false, false) == nullptr);
    CHECK(ceilings_of(*ceilings_of("NVIDIA H200"), 64, true, true) == nullptr);
}
