// The shape of a model, the sizes known by name, and the header of a weights file.
#pragma once
#include "types.h"
#include <string>

enum class RopeScaling : int32_t { none = 0, linear = 1, dynamic = 2, yarn = 3, longrope = 4, llama3 = 5 };

// Rotary embedding, as Hugging Face's config.json describes it (rope_theta, rope_scaling, rope_parameters).
struct RopeConfig {
    double base = 10000;
    RopeScaling scaling = RopeScaling::none;
    double factor = 1;
    double low_freq_factor = 1, high_freq_factor = 4; // llama3
    double beta_fast = 32, beta_slow = 1;             // yarn
    double attention_factor = 0;           // yarn, longrope: scale of cos and sin; 0: by the method's formula
    double mscale = 0, mscale_all_dim = 0; // yarn, when attention_factor is 0
    int32_t max_context = 4096;            // max_position_embeddings
    int32_t original_context = 0;          // context before scaling; 0: max_context
    float short_factor[64] = {}, long_factor[64] = {}; // longrope, one per frequency
};

// A LLaMA-class model. D may differ from C / H.
struct Config {
    int32_t L = 0, C = 0, H = 0, K = 0, D = 0, F = 0, V = 0;
    bool tied = false;     // the head is the embedding
    bool qkv_bias = false; // Qwen2
    double eps = 1e-5;
    int32_t bos = 1, eos = 2; // -1: the model has none
    RopeConfig rope;

    size_t qkv_width() const { return size_t(H + 2 * K) * D; }
};

struct NamedConfig {
    const char* name;
    Config config;
};

inline Config make_config(int L, int C, int H, int K, int F, int V, double base, int context, double eps = 1e-5) {
    Config c;
    c.L = L, c.C = C, c.H = H, c.K = K, c.D = C / H, c.F = F, c.V = V, c.eps = eps;
    c.rope.base = base, c.rope.max_context = context;
    return c;
}

inline Config make_llama3() {
    Config c = make_config(32, 4096, 32, 8, 14336, 128256, 500000, 8192);
    c.bos = 128000, c.eos = 128001;
    return c;
}

inline Config make_qwen2() {
    Config c = make_config(28, 1536, 12, 2, 8960, 151936, 1000000, 32768, 1e-6);
    c.tied = c.qkv_bias = true, c.bos = -1, c.eos = 151643;
    return c;
}

// clang-format off
//                                          L    C    H   K   F      V      base   context
inline const NamedConfig named_configs[] = {
    {"tiny",        make_config(            2,   64,  2,  2,  192,   512,   10000, 512)},
    {"30M",         make_config(            6,   384, 6,  6,  1024,  32000, 10000, 4096)},
    {"120M",        make_config(            12,  768, 12, 12, 2048,  32000, 10000, 4096)},
    {"llama2-7b",   make_config(            32, 4096, 32, 32, 11008, 32000, 10000, 4096)},
    {"llama2-13b",  make_config(            40, 5120, 40, 40, 13824, 32000, 10000, 4096)},
    {"llama3-8b",   make_llama3()},
    {"mistral-7b",  make_config(            32, 4096, 32, 8,  14336, 32768, 1000000, 32768)},
    {"qwen2-1.5b",  make_qwen2()},
};
// clang-format on

// A weights file is this header, then the parameters in PARAM order, each padded to param_alignment
// elements. Numbers are little-endian; a double takes two words.
constexpr int32_t weights_magic = 0x4D414C4C; // "LLAM"
constexpr int32_t weights_version = 1;
constexpr size_t weights_header_bytes = 256 * 4;
constexpr size_t param_alignment = 64;

//   word  0 magic        1 version     2 dtype (Type)   3 L   4 C   5 H   6 K   7 D   8 F   9 V
//        10 tied        11 qkv_bias   12 bos           13 eos
//        14 max_context 15 original_context            16 scaling (RopeScaling)
//        18 (64 bits) elements that follow the header, padding included
//        20 eps   22 base   24 factor   26 low_freq_factor   28 high_freq_factor   30 beta_fast
//        32 beta_slow   34 attention_factor   36 mscale   38 mscale_all_dim          (double each)
//        64..127 short_factor   128..191 long_factor                                 (float each)
struct WeightsHeader {
    int32_t word[256] = {};
};
static_assert(sizeof(WeightsHeader) == weights_header_bytes);

inline WeightsHeader header_from_config(const Config& c, Type dtype, uint64_t elements) {
    WeightsHeader h;
    const int32_t ints[] = {weights_magic,
                            weights_version,
                            int32_t(dtype),
                            c.L,
                            c.C,
                            c.H,
                            c.K,
                            c.D,
                            c.F,
                            c.V,
                            c.tied,
                            c.qkv_bias,
                            c.bos,
                            c.eos,
                            c.rope.max_context,
                            c.rope.original_context,
                            int32_t(c.rope.scaling)};
    const double reals[] = {c.eps,
                            c.rope.base,
                            c.rope.factor,
                            c.rope.low_freq_factor,
                            c.rope.high_freq_factor,
                            c.rope.beta_fast,
                            c.rope.beta_slow,
                            c.rope.attention_factor,
                            c.rope.mscale,
                            c.rope.mscale_all_dim};
    memcpy(h.word, ints, sizeof ints);
    memcpy(h.word + 18, &elements, 8);
    memcpy(h.word + 20, reals, sizeof reals);
    memcpy(h.word + 64, c.rope.short_factor, 256);
    memcpy(h.word + 128, c.rope.long_factor, 256);
    return h;
}

// Why a configuration cannot be run, or an empty string.
inline std::string config_fault(const Config& c) {
    const struct {
        const char* name;
        int64_t value, most;
    } sizes[] = {{"layers", c.L, 1024},      {"channels", c.C, 1 << 20}, {"heads", c.H, 1 << 14},
                 {"kv_heads", c.K, 1 << 14}, {"head size", c.D, 1024},   {"ffn", c.F, 1 << 22},
                 {"vocab", c.V, 1 << 24}};
    for (auto& s : sizes)
        if (s.value < 1 || s.value > s.most)
            return std::string(s.name) + " is " + std::to_string(s.value) + ", outside 1.." + std::to_string(s.most);
    for (int32_t id : {c.bos, c.eos})
        if (id < -1 || id >= c.V)
            return "bos or eos is " + std::to_string(id) + ", outside the vocabulary of " + std::to_string(c.V);
    if (c.H % c.K) return "heads must be a multiple of kv_heads";
    if (c.D % 2) return "the head size must be even: RoPE rotates pairs";
    if (!(c.eps > 0 && c.eps < 1)) return "eps is outside (0, 1)";
    if (!(c.rope.base > 1 && c.rope.base < 1e15)) return "rope base is outside (1, 1e15)";
    if (c.rope.max_context < 1) return "max_context is below 1";
    if (!(c.rope.factor >= 1 && c.rope.factor <= 1e6)) return "rope factor is outside 1..1e6";
    if (int(c.rope.scaling) < 0 || int(c.rope.scaling) > 5) return "unknown rope scaling";
    if (c.rope.scaling == RopeScaling::longrope && c.D > 128) return "longrope takes head sizes up to 128";
    return "";
}

// In what two configurations of a model differ, as "RoPE base 10000 and 500000 (--rope_base), ..."; empty: in nothing.
inline std::string config_difference(const Config& a, const Config& b) {
    const struct {
        const char *name, *option;
        double a, b;
    } fields[] = {{"layers", "--layers", double(a.L), double(b.L)},
                  {"channels", "--channels", double(a.C), double(b.C)},
                  {"heads", "--heads", double(a.H), double(b.H)},
                  {"KV heads", "--kv_heads", double(a.K), double(b.K)},
                  {"head size", "--channels, --heads", double(a.D), double(b.D)},
                  {"feed-forward width", "--ffn", double(a.F), double(b.F)},
                  {"vocabulary", "--vocab, or the training data's", double(a.V), double(b.V)},
                  {"tied", "--tied", double(a.tied), double(b.tied)},
                  {"context", "--context", double(a.rope.max_context), double(b.rope.max_context)},
                  {"RoPE base", "--rope_base", a.rope.base, b.rope.base},
                  {"RoPE scaling", "--rope_scaling", double(a.rope.scaling), double(b.rope.scaling)},
                  {"RoPE factor", "--rope_factor", a.rope.factor, b.rope.factor}};
    std::string text;
    for (auto& f : fields) {
        char line[160];
        snprintf(line, sizeof line, "%s%s %.10g and %.10g (%s)", text.empty() ? "" : ", ", f.name, f.a, f.b, f.option);
        if (f.a != f.b) text += line;
    }
    const WeightsHeader x = header_from_config(a, Type::f32, 0), y = header_from_config(b, Type::f32, 0);
    if (text.empty() && memcmp(&x, &y, sizeof x) != 0) text = "what no option sets, so it is another model (--model)";
    return text;
}

// The configuration and element type in a header; `path` is for the messages.
inline Config config_from_header(const WeightsHeader& h, const char* path, Type* dtype, uint64_t* elements) {
    const int32_t* w = h.word;
    if (w[0] != weights_magic)
        fail("%s: not a weights file (magic %08x, expected %08x); convert it with scripts/convert_hf.py", path, w[0],
             weights_magic);
    if (w[1] != weights_version)
        fail("%s: version %d of the format, this program reads %d; convert it again", path, w[1], weights_version);
    if (w[2] < 0 || w[2] > 2) fail("%s: unknown element type %d", path, w[2]);
    Config c;
    c.L = w[3], c.C = w[4], c.H = w[5], c.K = w[6], c.D = w[7], c.F = w[8], c.V = w[9];
    c.tied = w[10] != 0, c.qkv_bias = w[11] != 0, c.bos = w[12], c.eos = w[13];
    c.rope.max_context = w[14], c.rope.original_context = w[15], c.rope.scaling = RopeScaling(w[16]);
    double reals[10];
    memcpy(reals, w + 20, sizeof reals);
    c.eps = reals[0], c.rope.base = reals[1], c.rope.factor = reals[2];
    c.rope.low_freq_factor = reals[3], c.rope.high_freq_factor = reals[4];
    c.rope.beta_fast = reals[5], c.rope.beta_slow = reals[6], c.rope.attention_factor = reals[7];
    c.rope.mscale = reals[8], c.rope.mscale_all_dim = reals[9];
    memcpy(c.rope.short_factor, w + 64, 256);
    memcpy(c.rope.long_factor, w + 128, 256);
    std::string fault = config_fault(c);
    if (!fault.empty()) fail("%s: %s", path, fault.c_str());
    *dtype = Type(w[2]);
    memcpy(elements, w + 18, 8);
    return c;
}
