// The options: one table drives the struct, strict parsing, --help, the log's header and the README.
#pragma once
#include "types.h"
#include <algorithm>
#include <cerrno>
#include <string>
#include <vector>

using Int = int64_t;
using Real = double;
using Text = std::string;
using Flag = bool;

// OPTION(type, name, short, default, range, help). Range: "low..high", "a|b|c", or "" for any text.
// SECTION(title) starts a paragraph of --help.
// clang-format off
#define OPTIONS(OPTION, SECTION)                                                                                       \
    SECTION("Model")                                                                                                   \
    OPTION(Text, model, 'e', "", "", "weights (.bin), or a size to start from scratch: tiny, 30M, 120M, llama2-7b, "   \
           "llama2-13b, llama3-8b, mistral-7b, qwen2-1.5b. Default: model.bin if it is there, else llama2-7b "         \
           "(on the CPU: tiny)")                                                                                       \
    OPTION(Int, layers, 0, 0, "0..1024", "change a named size: layers; 0 leaves it, so for the next five")             \
    OPTION(Int, channels, 0, 0, "0..1048576", "model width")                                                           \
    OPTION(Int, heads, 0, 0, "0..16384", "query heads")                                                                \
    OPTION(Int, kv_heads, 0, 0, "0..16384", "key/value heads; heads must be a multiple")                               \
    OPTION(Int, ffn, 0, 0, "0..4194304", "width of the feed-forward layer")                                            \
    OPTION(Int, vocab, 0, 0, "0..16777216", "vocabulary size; from scratch: the training data's")                      \
    OPTION(Flag, tied, 0, false, "", "from scratch: the head shares the embedding's weights")                          \
    SECTION("Data")                                                                                                    \
    OPTION(Text, train_data, 'i', "", "", "token shards: a file, a comma list or a quoted glob; none: a built-in "     \
           "generator")                                                                                                \
    OPTION(Text, val_data, 'j', "", "", "token shards for the validation loss")                                        \
    OPTION(Int, context, 'c', 0, "0..16777216", "tokens in a row (one sequence); 0: the model's own context")          \
    OPTION(Int, batch, 'b', 1, "1..65536", "rows per ring and micro-step")                                             \
    OPTION(Int, total_batch, 0, 0, "0..1000000000000", "tokens per update, over all ranks and micro-steps; "           \
           "0: one micro-step")                                                                                        \
    OPTION(Flag, shuffle, 0, true, "", "a new document order every epoch; --shuffle=0 keeps the file's")               \
    OPTION(Int, generator_mean, 0, 256, "2..1000000", "mean document length of the built-in generator, in tokens")     \
    SECTION("Attention and positions")                                                                                 \
    OPTION(Text, attention, 0, "anchor", "full|intra|intra_reset|anchor", "who sees whom in a packed row: everything " \
           "before; the own document; the same with positions restarted; the own document and one shared first token") \
    OPTION(Text, boundary_loss, 0, "mask", "mask|next|bos", "label of a document's last token: none, the next token "  \
           "in the row, BOS")                                                                                          \
    OPTION(Flag, domain_tags, 0, false, "", "start each document with its source's tag tokens (their loss is masked)") \
    OPTION(Flag, interleave, 0, false, "", "cut documents of 64..2048 tokens in 2 or 3 chunks and shuffle them")       \
    OPTION(Real, rope_base, 0, 0, "0..1e15", "RoPE base; 0: the model's. The paper's: 32K 1e6, 64K 5e6, 128K 1e7, "    \
           "256K 5e7")                                                                                                 \
    OPTION(Text, rope_scaling, 0, "model", "model|none|linear|dynamic|yarn|longrope|llama3", "RoPE scaling; model: "   \
           "as the weights say")                                                                                       \
    OPTION(Real, rope_factor, 0, 0, "0..1e6", "factor of the RoPE scaling; 0: the model's")                            \
    OPTION(Text, rope_precision, 0, "exact", "exact|bf16_table|bf16_rotation|bf16_angle", "where the rotation rounds " \
           "to bf16; all but exact are faults to study")                                                               \
    SECTION("Optimisation")                                                                                            \
    OPTION(Int, steps, 0, 2000, "0..1000000000", "updates, counted from the start of the run")                         \
    OPTION(Real, lr, 'l', 0, "0..10", "peak learning rate; 0: 2e-5 when weights are given, 3e-4 from scratch")         \
    OPTION(Text, schedule, 0, "constant", "constant|cosine|linear", "learning rate after the warmup")                  \
    OPTION(Int, warmup, 0, 0, "0..1000000000", "updates of linear warmup")                                             \
    OPTION(Real, final_lr, 0, 0.1, "0..1", "where cosine and linear end, as a fraction of the peak")                   \
    OPTION(Real, weight_decay, 0, 0.1, "0..10", "decoupled weight decay of the matrices")                              \
    OPTION(Real, beta1, 0, 0.9, "0..0.999999", "AdamW, first moment")                                                  \
    OPTION(Real, beta2, 0, 0.95, "0..0.999999", "AdamW, second moment")                                                \
    OPTION(Real, adam_eps, 0, 1e-8, "1e-20..1", "AdamW, added to the root of the second moment")                       \
    OPTION(Real, clip, 0, 1, "0..1e9", "largest gradient norm; 0: no clipping")                                        \
    OPTION(Text, on_bad, 0, "skip", "skip|stop", "on a non-finite or outlying loss or gradient: skip the update, or "  \
           "save and stop")                                                                                            \
    OPTION(Real, max_z_loss, 0, 0, "0..1e9", "outlier: loss this many standard deviations above the last 128; 0: off") \
    OPTION(Real, max_z_grad, 0, 0, "0..1e9", "outlier: gradient norm, likewise; 0: off")                               \
    SECTION("Run")                                                                                                     \
    OPTION(Text, out, 'o', "", "", "folder for checkpoints and log.jsonl; none: nothing is written")                   \
    OPTION(Flag, resume, 0, false, "", "go on from the newest sound checkpoint in --out")                              \
    OPTION(Int, save_every, 0, 0, "0..1000000000", "updates between checkpoints; 0: only the last")                    \
    OPTION(Int, keep, 0, 2, "0..1000000", "checkpoints kept; 0: all")                                                  \
    OPTION(Int, log_every, 0, 1, "1..1000000000", "updates between lines on the terminal; the log has every one")      \
    OPTION(Int, val_every, 0, 100, "1..1000000000", "updates between validation losses")                               \
    OPTION(Int, val_rows, 0, 16, "1..1000000000", "rows of a validation loss")                                         \
    OPTION(Int, sample_every, 0, 0, "0..1000000000", "updates between samples; 0: none")                               \
    OPTION(Int, generate, 0, 0, "0..16777216", "no training: continue --prompt by this many tokens")                   \
    OPTION(Text, prompt, 0, "", "", "token ids to continue, as 1,15043,3186; none: BOS")                               \
    OPTION(Text, vocab_file, 0, "", "", "pieces to print samples as text (data/prepare.py writes it)")                 \
    OPTION(Real, temperature, 0, 0.8, "0..100", "of sampling; 0: the likeliest token")                                 \
    OPTION(Int, top_k, 0, 50, "0..16777216", "sample among this many; 0: all")                                         \
    OPTION(Text, eval, 0, "", "", "no training: score --val_data (else --train_data), one CSV line a token, here")     \
    OPTION(Text, dump_logits, 0, "", "", "no training: logits of the first row, float32 (context, vocab), here")       \
    OPTION(Int, seed, 0, 1337, "0..9223372036854775807", "of weights, data order, sampling and stochastic rounding")   \
    SECTION("Machine")                                                                                                 \
    OPTION(Text, device, 0, "auto", "auto|cpu|gpu", "auto: GPUs, one a rank, if there is any, else the CPU")           \
    OPTION(Int, ring, 0, 0, "0..65536", "ranks that share a sequence; 0: all. World size / ring sequences run side "   \
           "by side")                                                                                                  \
    OPTION(Text, ring_backend, 0, "auto", "auto|ring|allgather|ulysses", "how the ranks of a ring share attention: "   \
           "keys go round; all keys at once; all-to-all of heads, when the ranks divide the KV heads. auto: ring, of " \
           "a full mask ulysses if it can")                                                                            \
    OPTION(Int, zero, 0, 1, "1..3", "ZeRO: ranks share out the optimizer's state; 2: gradients too; 3: weights too")   \
    OPTION(Text, transport, 0, "auto", "auto|ipc|nccl", "how data travel between GPUs; auto: CUDA IPC where two "  \
           "ranks can map each other's memory, else NCCL")                                                             \
    OPTION(Text, dtype, 0, "auto", "auto|float|bf16|double", "storage of weights and activations; auto: float on the " \
           "CPU, bf16 on the GPU")                                                                                     \
    OPTION(Text, grad_dtype, 0, "auto", "auto|float|bf16", "storage of gradients; auto: as --dtype")                   \
    OPTION(Text, opt_dtype, 0, "auto", "auto|float|bf16", "storage of AdamW's moments; auto: as --dtype")              \
    OPTION(Text, master, 0, "auto", "auto|none|float", "fp32 copy of bf16 weights; none: stochastic rounding; auto: "  \
           "float when it fits")                                                                                       \
    OPTION(Text, recompute, 0, "auto", "", "activations recomputed in the backward: none, all, auto (the fewest that " \
           "fit) or a list of norm,swiglu,residual,qkv,ffn,attention, each for all layers or, as ffn:8, for the first "\
           "8")                                                                                                        \
    OPTION(Text, offload, 0, "none", "", "for GPUs: activations that wait for the backward in the host's memory, "     \
           "whatever --recompute says of them: none, all or a list of input,residual,qkv,attention")                   \
    OPTION(Int, head_chunk, 0, 0, "0..16777216", "tokens whose logits exist at once; 0: 512, on a GPU 2048")           \
    OPTION(Int, ffn_tile, 0, 0, "0..16777216", "tokens that pass through the feed-forward at once when it is all "     \
           "recomputed, to save memory; 0: all, or 16384 where --recompute auto would else give up more of attention") \
    OPTION(Flag, deterministic, 0, false, "", "same bits on every run with the same ranks and threads (the CPU "       \
           "always does)")                                                                                             \
    OPTION(Flag, portable_attention, 0, false, "", "on a Hopper GPU: attention by the kernels for any GPU from sm_80 " \
           "on, to compare")                                                                                           \
    OPTION(Int, timeout, 0, 300, "1..1000000", "seconds that a rank waits for another before all are ended")           \
    SECTION("Questions")                                                                                               \
    OPTION(Flag, plan, 0, false, "", "print the memory a run needs and what a step should take; needs no GPU")         \
    OPTION(Int, ranks, 0, 0, "0..1000000", "with --plan: number of ranks; 0: as started")                              \
    OPTION(Real, memory, 0, 0, "0..1e6", "memory of a rank in GiB, for auto and --plan; 0: asked of the machine")      \
    OPTION(Flag, dump_params, 0, false, "", "print offset, shape and Hugging Face name of every tensor, and exit")     \
    OPTION(Flag, options_table, 0, false, "", "print this list as Markdown, and exit")                                 \
    OPTION(Flag, help, 'h', false, "", "print this list, and exit")
// clang-format on

struct Options {
#define FIELD(type, name, letter, value, range, help) type name = value;
#define NO_FIELD(title)
    OPTIONS(FIELD, NO_FIELD)
#undef FIELD
#undef NO_FIELD
};

inline std::string option_text(const Int& v) { return std::to_string(v); }
inline std::string option_text(const Text& v) { return v; }
inline std::string option_text(const Flag& v) { return v ? "1" : "0"; }
inline std::string option_text(const Real& v) {
    char s[32];
    snprintf(s, sizeof s, "%.12g", v);
    return s;
}

inline bool in_range(double v, const char* range) {
    std::string text = range;
    size_t dots = text.find("..");
    return v >= std::stod(text.substr(0, dots)) && v <= std::stod(text.substr(dots + 2));
}

// What stands between the commas of an option that takes a list; one empty item if there is nothing.
inline std::vector<std::string> list_items(const std::string& list) {
    std::vector<std::string> items;
    for (size_t at = 0, end; at <= list.size(); at = end + 1) {
        end = std::min(list.find(',', at), list.size());
        items.push_back(list.substr(at, end - at));
    }
    return items;
}

// Each returns whether the text is a value of the option; the whole text must be one.
inline bool option_parse(Int& v, const char* text, const char* range) {
    char* end;
    errno = 0;
    v = strtoll(text, &end, 10);
    return *text && !*end && !errno && in_range(double(v), range);
}
inline bool option_parse(Real& v, const char* text, const char* range) {
    char* end;
    v = strtod(text, &end);
    return *text && !*end && std::isfinite(v) && in_range(v, range);
}
inline bool option_parse(Text& v, const char* text, const char* range) {
    v = text;
    std::string choices = "|" + std::string(range) + "|";
    return !*range || (*text && !strchr(text, '|') && choices.find("|" + v + "|") != std::string::npos);
}
inline bool option_parse(Flag& v, const char* text, const char*) {
    v = text[0] == '1';
    return (text[0] == '0' || text[0] == '1') && !text[1];
}

inline const char* option_wants(const Int&) { return "an integer in "; }
inline const char* option_wants(const Real&) { return "a number in "; }
inline const char* option_wants(const Text&) { return "one of "; }
inline const char* option_wants(const Flag&) { return "0 or 1"; }

// Visits every option as f(field, name, letter, range, help), and every section as section(title).
template <class O, class F, class S> void options_visit(O& o, F f, S section) {
#define VISIT(type, name, letter, value, range, help) f(o.name, #name, char(letter), range, help);
#define VISIT_SECTION(title) section(title);
    OPTIONS(VISIT, VISIT_SECTION)
#undef VISIT
#undef VISIT_SECTION
}

// Sets one option by its long name or letter; false when there is none of that name. `text` is null
// when the command line ends: a flag then is set, anything else is an error that names the option.
template <class O> bool option_set(O& o, const std::string& name, const char* text, bool* took_text) {
    bool found = false;
    auto set = [&](auto& field, const char* long_name, char letter, const char* range, const char*) {
        bool mine = name == long_name || (letter && name == std::string(1, letter));
        if (!mine) return;
        found = true;
        constexpr bool flag = std::is_same_v<std::decay_t<decltype(field)>, Flag>;
        if (flag && !*took_text) text = "1";
        else *took_text = true;
        if (!text || !*text) // an empty one is a script's unset variable
            fail("option --%s wants a value%s%s%s", long_name, *range ? ": " : "", *range ? option_wants(field) : "",
                 range);
        if (!option_parse(field, text, range))
            fail("option --%s takes %s%s, not '%s'", long_name, option_wants(field), range, text);
    };
    options_visit(o, set, [](const char*) {});
    return found;
}

// Reads the command line: --name value, --name=value, -x value, and flags alone or as --flag=0. Another table of
// options than the trainer's has an options_visit of its own.
template <class O = Options> O options_parse(int argc, char** argv) {
    O o;
    for (int i = 1; i < argc; i++) {
        std::string word = argv[i];
        size_t dashes = word.rfind("--", 0) == 0 ? 2 : 1;
        if (word.size() < 2 || word[0] != '-') fail("'%s' is not an option; see --help", argv[i]);
        size_t equals = word.find('=');
        bool joined = equals != std::string::npos;
        std::string name = word.substr(dashes, joined ? equals - dashes : std::string::npos);
        bool well_formed = dashes == 2 ? name.size() > 1 : name.size() == 1;
        const char* text = joined ? argv[i] + equals + 1 : i + 1 < argc ? argv[i + 1] : nullptr;
        bool took_text = joined;
        if (!well_formed || !option_set(o, name, text, &took_text)) fail("unknown option '%s'; see --help", argv[i]);
        if (took_text && !joined) i++;
    }
    return o;
}

// --help: every option with its range, default and meaning, folded at 100 columns.
inline void options_help() {
    printf("train_llama: trains LLaMA-2-class models on long contexts with AnchorAttention.\n\n"
           "  ./train_llama                                     a first look: random model, built-in data\n"
           "  mpirun -np 8 ./train_llama -e model.bin -i 'data/books_0*.bin' -c 65536 --rope_base 5e6 -o run\n"
           "  ./train_llama -e llama2-7b -c 65536 --device gpu --plan    the memory that would take\n");
    Options defaults;
    auto line = [](auto& field, const char* name, char letter, const char* range, const char* help) {
        std::string left = letter ? std::string("  -") + letter + ", --" + name : std::string("      --") + name;
        std::string text = help, value = option_text(field);
        if (strchr(range, '|')) text += std::string(" [") + range + "]";
        if (!std::is_same_v<std::decay_t<decltype(field)>, Flag> && !value.empty()) text += " (default " + value + ")";
        printf("%-25s", left.c_str());
        for (size_t at = 0, width = 74; at < text.size();) {
            size_t end = text.size() - at <= width ? text.size() : text.rfind(' ', at + width);
            if (end == std::string::npos || end <= at) end = std::min(at + width, text.size());
            printf("%s%s\n", at ? "                         " : "", text.substr(at, end - at).c_str());
            at = end + (end < text.size() && text[end] == ' ');
        }
    };
    options_visit(defaults, line, [](const char* title) { printf("\n%s\n", title); });
}

// The README's table.
inline void options_markdown() {
    Options defaults;
    auto row = [](auto& field, const char* name, char letter, const char* range, const char* help) {
        std::string bars;
        for (const char* c = range; *c; c++) bars += *c == '|' ? std::string("\\|") : std::string(1, *c);
        std::string shown = letter ? std::string("`-") + letter + "`, " : "";
        std::string value = option_text(field);
        printf("| %s`--%s` | %s | %s | %s |\n", shown.c_str(), name, value.empty() ? "" : ("`" + value + "`").c_str(),
               bars.c_str(), help);
    };
    auto section = [](const char* title) {
        printf("\n**%s**\n\n| option | default | range | meaning |\n|---|---|---|---|\n", title);
    };
    options_visit(defaults, row, section);
}
