// The command line of test_rope: one table drives the struct, the parsing and --help. Values are parsed by the
// trainer's core/options.h.
#pragma once
#include "../core/options.h"
#include "rope_study.cuh"
#include <sstream>

// OPTION(type, name, default, range, help), as in core/options.h.
// clang-format off
#define ROPE_OPTIONS(OPTION)                                                                                           \
    OPTION(Text, model, "", "", "weights (.bin); none: the newest of those in rope/run and demo/long")                 \
    OPTION(Text, data, "", "", "token shards: a file, a comma list or a quoted glob; none: those beside that model")   \
    OPTION(Text, out, "", "", "folder for the CSV files and figures; none: rope/result, for the demo's model "         \
           "demo/result")                                                                                              \
    OPTION(Text, label, "trained", "", "name of these weights in the CSV files")                                       \
    OPTION(Text, start, "file", "file|normal|kaiming", "weights: the file's, or random in its shape, drawn as the "    \
           "trainer does or as torch's layers do (the paper's control)")                                               \
    OPTION(Text, experiments, "local,shift,other,length,frozen,base", "", "which of them to run")                      \
    OPTION(Text, variants, "float:E,float:F,bf16:E,bf16:F,bf16:C,bf16:B,bf16:A,bf16:D", "", "network:rounding, the "   \
           "network being float, bf16 or (on the CPU) double; /place=type behind it sets a place alone; see below")    \
    OPTION(Text, base_variants, "float:F,bf16:C,bf16:A", "", "those that are run at every base")                       \
    OPTION(Text, length_variants, "", "", "those that the length is measured of; none: all of `variants`")             \
    OPTION(Text, angles, "variant", "variant|double|float|bf16", "in all variants: pos inv_freq")                      \
    OPTION(Text, input, "variant", "variant|float|bf16", "in all variants: q and k before the rotation")               \
    OPTION(Text, table, "variant", "variant|float|bf16", "in all variants: cos and sin")                               \
    OPTION(Text, rotation, "variant", "variant|float|bf16", "in all variants: products and sums of the rotation")      \
    OPTION(Text, storage, "variant", "variant|float|bf16", "in all variants: rotated q and k")                         \
    OPTION(Text, logits, "variant", "variant|float|bf16", "in all variants: dot products, in the measured weights "    \
           "alone: the attention that feeds the next layer keeps its own in fp32")                                     \
    OPTION(Text, weights, "variant", "variant|float|bf16", "in all variants: P as the operand of P V; a variant's "    \
           "own is bf16 where q and k are in a bf16 network, else float")                                              \
    OPTION(Int, length, 0, "0..16777216", "tokens of a sequence; 0: 4096, at most the model's context")                \
    OPTION(Text, lengths, "", "", "lengths for the first key's logit; none: 64 to 8192 by doubling, at most twice the "\
           "model's context, and those that the data fill four times")                                                \
    OPTION(Text, shifts, "0,2,4,6,8,10,12,14,15,17,18,20,22,50,100,200,500,1000,2000", "", "D1 of the first sweep, "   \
           "D2 of the other")                                                                                          \
    OPTION(Int, reference, 16, "0..1000000", "D2 of the first sweep")                                                  \
    OPTION(Int, other, 0, "0..1000000", "D1 of the other sweep")                                                       \
    OPTION(Int, sequences, 0, "0..1000000", "sequences of text; 0: 50, on the CPU 4, or as many as the data fill")    \
    OPTION(Int, sweep, 0, "0..1000000", "of them, those that also go through other shifts, bases and frozen q and k; " \
           "0: all")                                                                                                   \
    OPTION(Text, layers, "", "", "layers that are measured, as 0,1,5..7; none: all")                                   \
    OPTION(Real, sink, 0, "0..1000", "a sink made by hand: the logit of one key is raised by this in every head, on "  \
           "average over the queries; 0: none")                                                                        \
    OPTION(Int, sink_key, 0, "0..16777215", "that key")                                                                \
    OPTION(Text, bases, "1e4,5e5,1e6,5e6,1e7,5e7", "", "RoPE bases of the experiment `base`")                          \
    OPTION(Int, pairs, 20000, "100..10000000", "random pairs of the experiment `local`")                               \
    OPTION(Int, seed, 1, "0..1000000000", "of random weights and pairs")                                               \
    OPTION(Text, device, "auto", "auto|cpu|gpu", "auto: the GPU if there is one")                                      \
    OPTION(Real, progress, 30, "0..1000000", "seconds after which long work says on stderr how far it is")             \
    OPTION(Flag, plot, true, "", "draw the figures at the end; --plot=0 leaves it")                                    \
    OPTION(Flag, help, false, "", "print this list, and exit")
// clang-format on

struct RopeOptions {
#define FIELD(type, name, value, range, help) type name = value;
    ROPE_OPTIONS(FIELD)
#undef FIELD
};

// As the trainer's, with neither letters nor sections.
template <class F, class S> void options_visit(RopeOptions& o, F f, S) {
#define VISIT(type, name, value, range, help) f(o.name, #name, '\0', range, help);
    ROPE_OPTIONS(VISIT)
#undef VISIT
}

inline void rope_options_help() {
    printf("test_rope: how far attention moves when all positions are shifted, and where bf16 makes it move.\n\n"
           "  ./test_rope                                               the model of `make demo`, or of run_rope.sh\n"
           "  ./test_rope --model llama2-7b.bin --data 'books_*.bin'    the paper's setting\n\n");
    RopeOptions defaults;
    auto line = [](auto& field, const char* name, char, const char* range, const char* help) {
        const std::string value = option_text(field);
        printf("  --%-14s %s%s%s%s\n", name, help, strchr(range, '|') ? (" [" + std::string(range) + "]").c_str() : "",
               value.empty() ? "" : "; default ", value.c_str());
    };
    options_visit(defaults, line, [](const char*) {});
    printf("\nroundings of a variant:\n");
    for (const NamedRounding& named : named_roundings) printf("  %c  %s\n", named.letter, named.meaning);
    printf("and single places of it: bf16:E/weights=bf16 is E, but P rounded to bf16 ahead of P V, as it is in C, B, A "
           "and D,\nand bf16:C/weights=float is C with P in fp32, so that the four tell RoPE and q k^T from P V\n");
}

// The pieces of a comma list; every option that is one refuses an empty piece, and one that is there twice.
inline std::vector<std::string> split_list(const char* option, const std::string& list) {
    std::vector<std::string> items;
    for (const std::string& item : list_items(list)) {
        if (item.empty()) fail("option --%s: '%s' has an empty item", option, list.c_str());
        if (std::find(items.begin(), items.end(), item) != items.end())
            fail("option --%s: '%s' has %s twice", option, list.c_str(), item.c_str());
        items.push_back(item);
    }
    return items;
}

// X: int or double.
template <class X> std::vector<X> parse_numbers(const char* option, const std::string& list, const char* range) {
    std::vector<X> values;
    for (const std::string& item : split_list(option, list)) {
        std::conditional_t<std::is_integral_v<X>, Int, Real> value = 0;
        if (!option_parse(value, item.c_str(), range))
            fail("option --%s takes %s in %s with commas between, not '%s'", option,
                 std::is_integral_v<X> ? "integers" : "numbers", range, item.c_str());
        if (std::find(values.begin(), values.end(), X(value)) != values.end())
            fail("option --%s: '%s' has %s twice", option, list.c_str(), option_text(value).c_str());
        values.push_back(X(value));
    }
    return values;
}

// "0,2,5..7" of a model with L layers, in rising order; empty: all.
inline std::vector<int> parse_layers(const std::string& list, int L) {
    std::vector<int> layers;
    for (const std::string& item : split_list("layers", list.empty() ? "0.." + std::to_string(L - 1) : list)) {
        const size_t dots = item.find("..");
        Int first = 0, last = 0;
        const std::string range = "0.." + std::to_string(L - 1);
        const std::string low = item.substr(0, dots), high = dots == std::string::npos ? low : item.substr(dots + 2);
        if (!option_parse(first, low.c_str(), range.c_str()) || !option_parse(last, high.c_str(), range.c_str()) ||
            last < first)
            fail("option --layers takes layers in %s, as 0,2,5..7, not '%s'", range.c_str(), item.c_str());
        for (Int l = first; l <= last; l++) layers.push_back(int(l));
    }
    std::sort(layers.begin(), layers.end());
    layers.erase(std::unique(layers.begin(), layers.end()), layers.end());
    return layers;
}

inline Type parse_type(const std::string& name) {
    return name == "double" ? Type::f64 : name == "bf16" ? Type::bf16 : Type::f32;
}

// "bf16:C": the element type of the network, and where its rotation rounds; behind it places that are
// changed, "bf16:C/weights=float".
struct Variant {
    std::string name;
    Type network = Type::f32;
    Rounding rounding;
};

// Sets one place of rounding, as the option of that name does; false when there is no such place or type.
inline bool set_place(Rounding& r, const std::string& place, const std::string& type) {
    if (type != "float" && type != "bf16" && !(type == "double" && place == "angles")) return false;
    if (place == "weights") return r.weights = parse_type(type), true;
    const std::pair<const char*, Type Rounding::*> places[] = {
        {"angles", &Rounding::angles},     {"input", &Rounding::input},     {"table", &Rounding::table},
        {"rotation", &Rounding::rotation}, {"storage", &Rounding::storage}, {"logits", &Rounding::logits}};
    for (auto [name, field] : places)
        if (place == name) return r.*field = parse_type(type), true;
    return false;
}

inline std::vector<Variant> parse_variants(const char* option, const std::string& list, const RopeOptions& o) {
    std::vector<Variant> variants;
    for (const std::string& item : split_list(option, list)) {
        std::stringstream places(item);
        std::string front, place;
        std::getline(places, front, '/');
        const size_t colon = front.find(':');
        const std::string network = front.substr(0, colon);
        const bool known = network == "float" || network == "bf16" || network == "double";
        const NamedRounding* named = colon + 2 == front.size() ? rounding_by_letter(front[colon + 1]) : nullptr;
        if (!known || !named || item.back() == '/')
            fail("option --%s takes float, bf16 or double, a colon and one of E, F, C, B, A, D, not '%s'", option,
                 item.c_str());
        Variant v{item, parse_type(network), named->rounding};
        while (std::getline(places, place, '/')) {
            const size_t equal = std::min(place.find('='), place.size());
            if (!set_place(v.rounding, place.substr(0, equal), place.substr(std::min(equal + 1, place.size()))))
                fail("option --%s takes angles, input, table, rotation, storage, logits or weights, each =float or "
                     "=bf16 (angles =double too), behind a /, not '%s'",
                     option, item.c_str());
        }
        for (auto [name, type] :
             {std::pair("angles", &o.angles), std::pair("input", &o.input), std::pair("table", &o.table),
              std::pair("rotation", &o.rotation), std::pair("storage", &o.storage), std::pair("logits", &o.logits),
              std::pair("weights", &o.weights)})
            if (*type != "variant" && set_place(v.rounding, name, *type))
                v.name += "/" + std::string(name) + "=" + *type;
        variants.push_back(v);
    }
    return variants;
}

// The name of an option that only a model could use and that is not as by default; empty: none.
inline std::string option_for_a_model(RopeOptions o) {
    const std::string others = "|out|bases|pairs|seed|device|progress|plot|help|";
    RopeOptions defaults;
    if (o.experiments == "local") o.experiments = defaults.experiments;
    std::vector<std::string> values;
    options_visit(
        defaults, [&](auto& field, auto...) { values.push_back(option_text(field)); }, [](const char*) {});
    std::string first;
    size_t at = 0;
    auto compare = [&](auto& field, const char* name, auto...) {
        const bool changed = option_text(field) != values[at++];
        if (changed && first.empty() && others.find("|" + std::string(name) + "|") == std::string::npos) first = name;
    };
    options_visit(o, compare, [](const char*) {});
    return first;
}

// How much is measured where the options leave it open.
struct Extent {
    std::vector<int> lengths; // for the first key's logit
    size_t longest = 0;       // tokens that a sequence must have
    size_t sequences = 0;     // 0: the data do not fill one
    std::string said;         // what is less than by default, and why; empty: nothing
};

// T: tokens of a sequence; context: the model's; text: tokens of the data, of which a row has one less than its length,
// behind its BOS. A length that nobody asked for stays when the data fill four sequences of it, so that its errors say
// something, or as many as are asked for, or as they do of T.
inline Extent choose_extent(const RopeOptions& o, bool gpu, bool by_length, size_t T, size_t context, size_t text) {
    auto rows = [&](size_t length) { return text / (length - 1); };
    const size_t wanted = o.sequences ? size_t(o.sequences) : gpu ? 50 : 4;
    const size_t least = std::max<size_t>(1, std::min<size_t>(o.sequences ? wanted : 4, rows(T)));
    Extent e;
    size_t missing = 0;
    if (!by_length) e.lengths = {int(T)};
    else if (!o.lengths.empty()) e.lengths = parse_numbers<int>("lengths", o.lengths, "1..16777216");
    else
        for (size_t n = 64; n <= std::min<size_t>(8192, 2 * context); n *= 2)
            if (n <= T || rows(n) >= least) e.lengths.push_back(int(n));
            else if (!missing) missing = n;
    if (e.lengths.empty()) e.lengths = {int(T)};
    e.longest = std::max(T, by_length ? size_t(*std::max_element(e.lengths.begin(), e.lengths.end())) : 0);
    e.sequences = o.sequences ? wanted : std::min(wanted, rows(e.longest));
    const std::string data = o.data + ": " + std::to_string(text) + " tokens fill ";
    if (e.sequences < wanted)
        e.said = data + std::to_string(e.sequences) + " sequences of " + std::to_string(e.longest) +
                 ": so many are measured, not " + std::to_string(wanted);
    if (missing)
        e.said += (e.said.empty() ? data : "; and ") + std::to_string(rows(missing)) + " of " +
                  std::to_string(missing) + ", so --lengths ends at " + std::to_string(e.lengths.back());
    return e;
}
