// test_rope: the deviation experiment of arXiv 2411.13476, "When Precision Meets Position", reproduced and taken apart.
//
// RoPE is relative: shift all positions by the same amount and, in exact arithmetic, no attention weight changes. With
// bf16 some do. This program measures by how much (rope_experiment.h has the formulas), and which rounding does it:
//
//   local    single pairs of random vectors, no model                                          local.csv
//   shift    D against the shift, per key, per layer and head, single samples (figures 1       shift, key, layer, head,
//            left and middle, 7 left, appendix), for every variant of precision                sample.csv
//   other    with shift: the sweep over D2 (figure 7 right)                                    shift, layer, sample.csv
//   length   the first key's logit against the length (figure 1 right)                         length.csv
//   frozen   queries and keys of an unrounded fp32 run, one place of rounding switched on      shift.csv
//   base     the same weights at larger RoPE bases                                             shift, base.csv
//
// Cost beside the forwards: a run's LSE takes D T^2 FLOPs a head, comparing it with a reference 2 D T^2. LLaMA-2-7B at
// 4096 tokens: 6.6 TFLOP a shift, 11 with the other sweep, and a forward 57.
#include "rope_experiment.h"
#include "rope_local.h"
#include "rope_options.h"
#include <fcntl.h>
#include <filesystem>
#include <sys/file.h>

// A CSV file with one header line; every value checked into the file when it is closed. Without `wanted` there is none,
// and what an earlier run measured stays. Only such a table is replaced, or an older one, of fewer columns.
struct Csv {
    FILE* file = nullptr;
    std::string path;

    Csv(const std::string& folder, const char* name, const std::string& header, bool wanted = true)
        : path(folder + "/" + name) {
        if (!wanted) return;
        if (FILE* old = fopen(path.c_str(), "r")) {
            std::string first(header.size(), 0);
            first.resize(fread(first.data(), 1, first.size(), old));
            fclose(old);
            if (header.rfind(first.substr(0, first.find('\n')), 0) != 0)
                fail("%s: not a table as this program writes it; pass another --out", path.c_str());
        }
        file = fopen(path.c_str(), "w");
        if (!file) fail("%s: %s", path.c_str(), strerror(errno));
        fprintf(file, "%s\n", header.c_str());
    }
    Csv(const Csv&) = delete;
    ~Csv() {
        if (!file) return;
        if (fflush(file) != 0 || ferror(file)) fail("%s: could not be written; is the disk full?", path.c_str());
        fclose(file);
    }
};

std::string measure_header(const char* front) {
    std::string header = front;
    for (const char* name : measure_names) header += std::string(",") + name + "," + name + "_se";
    return header;
}

// What the experiments on a model write to.
struct Tables {
    Csv shift, layer, head, key, length, sample, base; // base: as sample, of its experiment
    static constexpr const char* of_samples =
        "weights,variant,base,length,d1,d2,sequence,sum_abs,column_abs,signed_sum,first_logit,place";

    // deviations: some experiment writes to shift.csv; by_shift: shift is among them; lengths, bases: those are run.
    Tables(const std::string& folder, bool deviations, bool by_shift, bool lengths, bool bases)
        : shift(folder, "shift.csv", measure_header("weights,experiment,variant,base,length,d1,d2,sequences"),
                deviations),
          layer(folder, "layer.csv", measure_header("weights,variant,base,length,d1,d2,layer,sequences"), by_shift),
          head(folder, "head.csv", measure_header("weights,variant,base,length,d1,d2,layer,head,sequences"), by_shift),
          key(folder, "key.csv",
              "weights,variant,base,length,d1,d2,key,sequences,signed,signed_se,abs,abs_se,column_abs,column_abs_se,"
              "mass,mass_se,logit,logit_se,logit_abs,logit_abs_se",
              by_shift),
          length(folder, "length.csv",
                 "weights,variant,base,d1,d2,length,sequences,logit,logit_se,logit_abs,logit_abs_se", lengths),
          sample(folder, "sample.csv", of_samples, by_shift), base(folder, "base.csv", of_samples, bases) {}
};

// The command line's meaning.
struct Study {
    RopeOptions o;
    Tables* tables = nullptr;
    Config config;
    size_t T = 0;                             // of the sequences
    std::vector<int> layers, shifts, lengths; // measured
    std::vector<double> bases;
    std::vector<std::vector<int32_t>> sequences; // each as long as the longest run needs
    std::vector<size_t> places; // of their first tokens in the data, by which other runs have the same sequences
    size_t swept = 0;           // of them, the first: those that more than the pair (other, reference) is measured on
    bool gpu = false;

    bool wants(const char* experiment) const {
        return ("," + o.experiments + ",").find("," + std::string(experiment) + ",") != std::string::npos;
    }
    // Those that an experiment is run on, none when it is not wanted.
    std::vector<Variant> variants(const std::string& experiment) const {
        if (!wants(experiment.c_str())) return {};
        if (experiment == "base") return parse_variants("base_variants", o.base_variants, o);
        if (experiment == "length" && o.length_variants.size())
            return parse_variants("length_variants", o.length_variants, o);
        return parse_variants("variants", o.variants, o);
    }
};

void print_means(FILE* file, const Mean* mean) {
    for (int i = 0; i < measures; i++) fprintf(file, ",%.9g,%.9g", mean[i].mean(), mean[i].error());
    fprintf(file, "\n");
}

void write_shift(const Study& s, const char* experiment, const std::string& variant, double base, const Deviation& d) {
    FILE* file = s.tables->shift.file;
    fprintf(file, "%s,%s,%s,%g,%zu,%d,%d,%d", s.o.label.c_str(), experiment, variant.c_str(), base, d.T, d.d1, d.d2,
            d.model[0].count);
    print_means(file, d.model.data());
    fflush(file);
}

// What single sequences have.
void write_samples(const Csv& table, const Study& s, const std::string& front, const Deviation& d) {
    for (size_t i = 0; i < d.sample.size() / measures; i++) {
        const double* x = d.sample.data() + i * measures;
        fprintf(table.file, "%s,%zu,%.9g,%.9g,%.9g,%.9g,%zu\n", front.c_str(), i, x[sum_abs], x[column_abs],
                x[signed_sum], x[first_logit], s.places[i]);
    }
    fflush(table.file);
}
// Names a pair in the tables.
std::string pair_front(const Study& s, const std::string& variant, double base, const Deviation& d) {
    char front[512];
    snprintf(front, sizeof front, "%s,%s,%g,%zu,%d,%d", s.o.label.c_str(), variant.c_str(), base, d.T, d.d1, d.d2);
    return front;
}

// Everything else that the experiment `shift` writes of a pair.
void write_details(const Study& s, const std::string& variant, double base, const Deviation& d) {
    const std::string pair = pair_front(s, variant, base, d);
    const char* front = pair.c_str();
    for (size_t l = 0; l < d.layers; l++) {
        fprintf(s.tables->layer.file, "%s,%d,%d", front, s.layers[l], d.model[0].count);
        print_means(s.tables->layer.file, d.layer.data() + l * measures);
        for (size_t h = 0; h < d.heads && d.with_keys; h++) {
            fprintf(s.tables->head.file, "%s,%d,%zu,%d", front, s.layers[l], h, d.model[0].count);
            print_means(s.tables->head.file, d.head.data() + (l * d.heads + h) * measures);
        }
    }
    for (size_t j = 0; j < d.T && d.with_keys; j++) {
        fprintf(s.tables->key.file, "%s,%zu,%d", front, j, d.model[0].count);
        for (int sum : {int(weight_signed), int(weight_abs), int(key_column_abs), int(weight_mass), int(logit_signed),
                        int(logit_abs)}) {
            const Mean& mean = d.key[size_t(sum) * d.T + j];
            fprintf(s.tables->key.file, ",%.9g,%.9g", mean.mean(), mean.error());
        }
        fprintf(s.tables->key.file, "\n");
    }
    write_samples(s.tables->sample, s, pair, d);
    for (const Csv* table : {&s.tables->layer, &s.tables->head, &s.tables->key}) fflush(table->file);
}

void say(const char* experiment, const std::string& variant, double base, const Deviation& d, double seconds) {
    const Mean &all = d.model[sum_abs], &column = d.model[column_abs], &first = d.model[first_sum_abs];
    printf("%-7s %-18s base %-7g D(%d, %d): %.4g +- %.1g, by columns %.4g +- %.1g, signed %.2g; the first key's part "
           "%.1f%%; "
           "%.1f s\n",
           experiment, variant.c_str(), base, d.d1, d.d2, all.mean(), all.error(), column.mean(), column.error(),
           d.model[signed_sum].mean(), 100 * first.mean() / std::max(all.mean(), 1e-300), seconds);
    fflush(stdout);
}

// Says on stderr how far long work is, at most every `every` seconds; short work says nothing.
struct Progress {
    std::string what;
    size_t sequences;
    double every, start = seconds_now(), said = start;
    size_t done = 0;

    void say() {
        const double now = seconds_now();
        if (now - said < every) return;
        said = now;
        fprintf(stderr, "%s: %zu of %zu sequences, %.0f s\n", what.c_str(), done, sequences, now - start);
    }
};

// one(sequence's number) for the first `count` sequences.
template <class Dev, class E, class One>
void for_sequences(Experiment<Dev, E>& x, const Study& s, const std::string& what, size_t count, One one) {
    Progress progress{what, count, s.o.progress};
    x.pass_done = [&] { progress.say(); };
    for (size_t i = 0; i < count; i++) one(i), progress.done++;
    x.pass_done = [] {};
}

// Random weights as torch starts its layers: uniform within 1 / sqrt(fan in), the embedding normal, norms one.
template <class Dev, class E> void start_kaiming(Model<Dev, E, E>& m, uint64_t seed) {
    const size_t piece = size_t(1) << 24;
    std::vector<E> values;
    for (const ParamInfo& p : param_table(m.config))
        for (size_t first = 0; first < p.count(); first += piece) {
            values.resize(std::min(piece, p.count() - first));
            const double bound = 1 / std::sqrt(double(p.columns));
            const bool embedding = std::string(p.name) == "embed", ones = p.start == Start::ones;
#pragma omp parallel for schedule(static)
            for (size_t i = 0; i < values.size(); i++) {
                const uint64_t at = p.offset + first + i;
                values[i] = E(ones        ? 1.0
                              : embedding ? hash_normal(seed, at)
                                          : bound * (2 * hash_uniform(seed, at) - 1));
            }
            copy_to_device(m.dev, m.param_flat + p.offset + first, values.data(), values.size() * sizeof(E));
        }
}

// D of one variant against the shift.
template <class Dev, class E> void run_shifts(Experiment<Dev, E>& x, const Study& s, const Variant& v) {
    const size_t H = x.heads(), layers = s.layers.size();
    const int reference = int(s.o.reference), other = int(s.o.other);
    const double base = s.config.rope.base, start = seconds_now();
    std::vector<Deviation> pairs = {{other, reference, layers, H, s.T, true}};
    std::vector<int> references = {reference};
    if (s.wants("other")) references.push_back(other);
    for (int fixed : references)
        for (int shift : s.shifts) {
            if (shift == reference || shift == other) continue;
            if (fixed == reference) pairs.push_back({shift, reference, layers, H, s.T, false});
            else pairs.push_back({other, shift, layers, H, s.T, false});
        }
    std::vector<Deviation> only_swept;
    for_sequences(x, s, "shift " + v.name, s.sequences.size(), [&](size_t i) {
        if (i == s.swept) {
            only_swept.assign(std::make_move_iterator(pairs.begin() + 1), std::make_move_iterator(pairs.end()));
            pairs.erase(pairs.begin() + 1, pairs.end()), references.resize(1);
        }
        measure_shifts(x, s.sequences[i], references, v.rounding, pairs);
    });
    pairs.insert(pairs.end(), only_swept.begin(), only_swept.end());
    for (const Deviation& d : pairs) write_shift(s, "shift", v.name, base, d), write_details(s, v.name, base, d);
    say("shift", v.name, base, pairs[0], seconds_now() - start);
}

// The first key's logit of one variant against the length.
template <class Dev, class E> void run_lengths(Experiment<Dev, E>& x, const Study& s, const Variant& v) {
    const int reference = int(s.o.reference), other = int(s.o.other);
    const double base = s.config.rope.base, start = seconds_now();
    LengthDeviation d{s.lengths, std::vector<Mean>(s.lengths.size()), std::vector<Mean>(s.lengths.size())};
    for_sequences(x, s, "length " + v.name, s.sequences.size(),
                  [&](size_t i) { measure_lengths(x, s.sequences[i], other, reference, v.rounding, d); });
    for (size_t i = 0; i < d.lengths.size(); i++)
        fprintf(s.tables->length.file, "%s,%s,%g,%d,%d,%d,%zu,%.9g,%.9g,%.9g,%.9g\n", s.o.label.c_str(), v.name.c_str(),
                base, other, reference, d.lengths[i], s.sequences.size(), d.logit[i].mean(), d.logit[i].error(),
                d.logit_abs[i].mean(), d.logit_abs[i].error());
    printf("length  %-18s base %-7g the first key's logit at %d tokens: %.4g +- %.1g, absolute %.4g +- %.1g; %.1f s\n",
           v.name.c_str(), base, d.lengths.back(), d.logit.back().mean(), d.logit.back().error(),
           d.logit_abs.back().mean(), d.logit_abs.back().error(), seconds_now() - start);
    fflush(stdout);
}

// The same weights at other RoPE bases.
template <class Dev, class E> void run_bases(Experiment<Dev, E>& x, const Study& s, const Variant& v) {
    const int reference = int(s.o.reference), other = int(s.o.other);
    for (double base : s.bases) {
        x.m.config.rope.base = base;
        std::vector<Deviation> pairs = {{other, reference, s.layers.size(), x.heads(), s.T, false}};
        const double start = seconds_now();
        char what[64];
        snprintf(what, sizeof what, "base %g ", base);
        for_sequences(x, s, what + v.name, s.swept,
                      [&](size_t i) { measure_shifts(x, s.sequences[i], {reference}, v.rounding, pairs); });
        write_shift(s, "base", v.name, base, pairs[0]);
        write_samples(s.tables->base, s, pair_front(s, v.name, base, pairs[0]), pairs[0]);
        say("base", v.name, base, pairs[0], seconds_now() - start);
    }
    x.m.config.rope.base = s.config.rope.base;
}

// Frozen queries and keys under every letter, and with one place of rounding each.
template <class Dev, class E> void run_frozen(Experiment<Dev, E>& x, const Study& s) {
    std::vector<std::string> names;
    std::vector<Rounding> roundings;
    for (const NamedRounding& named : named_roundings)
        names.push_back(std::string("letter:") + named.letter), roundings.push_back(named.rounding);
    auto add = [&](const char* name, Type Rounding::*place, Type type) {
        Rounding r;
        r.*place = type;
        names.push_back(name), roundings.push_back(r);
    };
    add("angles=float", &Rounding::angles, Type::f32), add("angles=bf16", &Rounding::angles, Type::bf16);
    add("input=bf16", &Rounding::input, Type::bf16), add("table=bf16", &Rounding::table, Type::bf16);
    add("rotation=bf16", &Rounding::rotation, Type::bf16), add("storage=bf16", &Rounding::storage, Type::bf16);
    add("logits=bf16", &Rounding::logits, Type::bf16);
    std::vector<Deviation> pairs(roundings.size(),
                                 {int(s.o.other), int(s.o.reference), s.layers.size(), x.heads(), s.T, false});
    const double start = seconds_now(), base = s.config.rope.base;
    for_sequences(x, s, "frozen", s.swept, [&](size_t i) { measure_frozen(x, s.sequences[i], roundings, pairs); });
    for (size_t i = 0; i < pairs.size(); i++) {
        write_shift(s, "frozen", names[i], base, pairs[i]);
        say("frozen", names[i], base, pairs[i], seconds_now() - start);
    }
}

// All experiments on a model for the variants whose network is of type E.
template <class Dev, class E> void run_network(Dev dev, const Study& s) {
    Experiment<Dev, E> x;
    x.m.dev = dev, x.m.config = s.config, x.layers = s.layers;
    x.sink = {s.o.sink, size_t(s.o.sink_key)};
    x.m.layout.S = std::max(s.T, size_t(*std::max_element(s.lengths.begin(), s.lengths.end())));
    x.m.layout.train = false, x.m.layout.head_chunk = 1;
    const size_t references = s.wants("other") || s.wants("frozen") ? 2 : 1;
    const double start = seconds_now();
    Arena arena;
    experiment_place(x, arena, s.T, references);
    printf("%s network: %.2f GiB", type_name(type_of<E>()), double(arena.used) / (1 << 30));
    arena = {device_allocate(dev, arena.used), 0, {}};
    experiment_place(x, arena, s.T, references);
    if (s.o.start == "file") weights_load(x.m, weights_open(s.o.model));
    else if (s.o.start == "normal") model_init(x.m, uint64_t(s.o.seed));
    else start_kaiming(x.m, uint64_t(s.o.seed));
    printf(", weights there after %.1f s\n", seconds_now() - start);
    fflush(stdout);

    auto run = [&](const char* experiment, void (*one)(Experiment<Dev, E>&, const Study&, const Variant&)) {
        for (const Variant& v : s.variants(experiment))
            if (v.network == type_of<E>()) one(x, s, v);
    };
    run("shift", run_shifts<Dev, E>), run("length", run_lengths<Dev, E>), run("base", run_bases<Dev, E>);
    if (type_of<E>() == Type::f32 && s.wants("frozen")) run_frozen(x, s);
}

template <class Dev> void run_device(Dev dev, const Study& s) {
    bool wanted[3] = {s.wants("frozen")}; // by Type: f32, bf16, f64
    for (const char* experiment : {"shift", "length", "base"})
        for (const Variant& v : s.variants(experiment)) wanted[int(v.network)] = true;
    if (wanted[int(Type::f32)]) run_network<Dev, float>(dev, s);
    if (wanted[int(Type::bf16)]) run_network<Dev, bf16>(dev, s);
    if constexpr (std::is_same_v<Dev, Cpu>) {
        if (wanted[int(Type::f64)]) run_network<Dev, double>(dev, s);
    } else if (wanted[int(Type::f64)]) fail("a double network runs on the CPU: add --device cpu");
}

// The layer-local check: every variant beside what paper and our own notes say of it, at all bases.
void run_local(const RopeOptions& o, const std::vector<double>& bases) {
    Csv csv(o.out, "local.csv", "variant,angles,base,keys,pairs,mean_abs,expected");
    printf("one logit, shifted by 16: d = 128, %lld random pairs, key at 0, query in 0..4095, no 1/sqrt(d)\n",
           (long long)o.pairs);
    for (bool random_keys : {false, true}) {
        const LocalPairs pairs(size_t(o.pairs), uint64_t(o.seed), random_keys);
        for (double base : bases)
            for (const NamedRounding& named : named_roundings) {
                if (random_keys && base != 10000) continue;
                const double value = local_deviation<float>(pairs, named.rounding, base);
                double expected = NAN;
                for (const LocalFigure& f : local_figures)
                    if (f.letter == named.letter && base == 10000) expected = random_keys ? f.at_random : f.at_zero;
                fprintf(csv.file, "%c,%s,%g,%s,%lld,%.9g,%.9g\n", named.letter, type_name(named.rounding.angles), base,
                        random_keys ? "random" : "first", (long long)o.pairs, value, expected);
                if (base != 10000 || random_keys) continue;
                printf("  %c  %-44s %.3g", named.letter, named.meaning, value);
                if (std::isfinite(expected))
                    printf("   (expected %.3g, %+.1f%%)", expected, 100 * (value / expected - 1));
                printf("\n");
            }
    }
    fflush(stdout);
}

// The data, for sequences of s.T tokens.
Loader open_text(const Study& s) {
    PackOptions pack;
    pack.attention = Attention::anchor, pack.S = s.T, pack.V = s.config.V;
    pack.bos = s.config.bos >= 0 ? s.config.bos : s.config.eos;
    Loader loader;
    loader_open(loader, s.o.data, pack);
    return loader;
}

// Sequences spread evenly over the data, and so are the first s.swept: one BOS, then `length` - 1 tokens of text.
void read_sequences(Study& s, Loader& loader, size_t count, size_t length) {
    loader.options.S = length;
    const size_t rows = size_t(loader.corpus.text) / (length - 1);
    if (rows == 0)
        fail("%s: %lld tokens do not fill one sequence of %zu: pass a smaller %s", s.o.data.c_str(),
             (long long)loader.corpus.text, length, length > s.T ? "--lengths" : "--length");
    if (rows < count)
        fail("%s: %lld tokens are %zu sequences of %zu, not %zu: pass fewer --sequences or a smaller %s",
             s.o.data.c_str(), (long long)loader.corpus.text, rows, length, count,
             length > s.T ? "--lengths" : "--length");
    for (size_t i = 0, at = 0, first = 0; i < count; i++) {
        for (; at < i * rows / count; at++) loader_skip(loader);
        Row row;
        loader_next(loader, row);
        const bool sweep = i * s.swept / count != (i + 1) * s.swept / count;
        const size_t where = sweep ? first++ : i;
        s.sequences.insert(s.sequences.begin() + where, row.token);
        s.places.insert(s.places.begin() + where, at++ * (length - 1));
    }
}

// The newest weights of all runs, the data that belong to them and a folder for what is measured; false when there are
// none. Says which it took when there was a choice.
bool find_model(RopeOptions& o) {
    const struct Place {
        const char *run, *data, *out;
    } places[] = {{"rope/run", "rope/books_val*.bin", "rope/result"}, {"demo/long", "demo/test.bin", "demo/result"}};
    const Place* taken = nullptr;
    std::string others;
    std::filesystem::file_time_type newest;
    for (const Place& place : places) {
        const Checkpoint last = checkpoint_newest(Comm{}, place.run);
        if (last.step < 0) continue;
        const std::string weights = last.path + "/weights.bin";
        std::error_code fault;
        const auto time = std::filesystem::last_write_time(weights, fault);
        if (fault) fail("%s: %s", weights.c_str(), fault.message().c_str());
        if (!o.model.empty()) others = time > newest ? o.model : weights;
        if (taken && time <= newest) continue;
        taken = &place, o.model = weights, newest = time;
    }
    if (!taken) return false;
    if (!others.empty())
        printf("%s is taken, the newest; %s is older: --model and --data would take it\n", o.model.c_str(),
               others.c_str());
    if (o.data.empty()) o.data = taken->data;
    if (o.out.empty()) o.out = taken->out;
    return true;
}

void say_no_model() {
    printf("\nNo --model, and neither rope/run nor demo/long holds one: nothing is measured on a model. To train one,\n"
           "  make demo                                            (a small one, two minutes on two cores)\n"
           "  sh scripts/run_rope.sh books.jsonl tokenizer.model   (110M parameters on text, one GPU)\n"
           "and start ./test_rope again, or convert one with scripts/convert_hf.py and pass\n"
           "  ./test_rope --model weights.bin --data tokens.bin\n");
}

// False when there is no model to look at.
bool read_study(Study& s) {
    RopeOptions& o = s.o;
    if (o.model.empty() && !find_model(o)) return false;
    if (o.data.empty()) fail("--model needs --data, token shards of its tokenizer: data/prepare.py makes them");
    const WeightsFile file = weights_open(o.model);
    s.config = file.config;
    if (file.elements != param_elements(s.config))
        fail("%s: %llu elements, its configuration has %zu", o.model.c_str(), (unsigned long long)file.elements,
             param_elements(s.config));
    const size_t context = size_t(s.config.rope.max_context);
    s.T = o.length ? size_t(o.length) : std::min<size_t>(4096, context);
    if (s.T < 2) fail("option --length takes at least 2");
    s.layers = parse_layers(o.layers, s.config.L);
    Loader loader = open_text(s);
    const Extent extent = choose_extent(o, s.gpu, s.wants("length"), s.T, context, size_t(loader.corpus.text));
    if (!extent.said.empty() && extent.sequences) printf("%s\n", extent.said.c_str());
    s.lengths = extent.lengths;
    if (size_t(o.sink_key) >= s.T) fail("option --sink_key takes a key of the sequence, less than %zu", s.T);
    s.swept = o.sweep ? std::min(size_t(o.sweep), extent.sequences) : extent.sequences;
    read_sequences(s, loader, extent.sequences, extent.longest);
    return true;
}

// True when there are figures.
bool draw(const RopeOptions& o) {
    if (!o.plot || access("scripts/plot_rope.py", R_OK) != 0) return false;
    const std::string python = access(".venv/bin/python", X_OK) == 0 ? ".venv/bin/python" : "python3";
    const std::string command = python + " scripts/plot_rope.py '" + o.out + "'";
    const bool done = std::system(command.c_str()) == 0;
    if (!done) printf("no figures: this did not run: %s\n", command.c_str());
    return done;
}

// What the options say together, once each is right by itself; the lists among them go into the study.
void check_options(Study& s) {
    const RopeOptions& o = s.o;
    for (const std::string& name : split_list("experiments", o.experiments))
        if (std::string("|local|shift|other|length|frozen|base|").find("|" + name + "|") == std::string::npos)
            fail("option --experiments takes some of local,shift,other,length,frozen,base, not '%s'", name.c_str());
    if (s.wants("other") && !s.wants("shift")) fail("--experiments other goes with shift");
    for (const char* mark : {",", "\"", "'"})
        if (o.label.find(mark) != std::string::npos || o.out.find(mark) != std::string::npos)
            fail("options --label and --out go without commas and quotes");
    parse_variants("variants", o.variants, o);
    parse_variants("base_variants", o.base_variants, o);
    if (o.length_variants.size()) parse_variants("length_variants", o.length_variants, o);
    s.shifts = parse_numbers<int>("shifts", o.shifts, "0..1000000");
    s.bases = parse_numbers<double>("bases", o.bases, "2..1e15");
    if (!o.lengths.empty()) parse_numbers<int>("lengths", o.lengths, "1..16777216");
    if (o.reference == o.other) fail("--reference and --other are to be two shifts");
    const std::string fault = o.device == "cpu" ? "" : gpu_fault(0);
    if (o.device == "gpu" && !fault.empty()) fail("%s; --device cpu runs without a GPU", fault.c_str());
    s.gpu = o.device != "cpu" && fault.empty();
}

void make_folder(const std::string& path) {
    std::error_code fault;
    std::filesystem::create_directories(path, fault);
    if (fault) fail("%s: cannot be made: %s; pass another --out", path.c_str(), fault.message().c_str());
}

// Two programs at once would overwrite each other's tables, so the first holds the folder until it ends. A file system
// without locks goes without.
void lock_folder(const std::string& path) {
    const std::string file = path + "/lock";
    const int lock = open(file.c_str(), O_CREAT | O_RDWR | O_CLOEXEC, 0666);
    if (lock < 0) fail("%s: %s; pass another --out", file.c_str(), strerror(errno));
    if (flock(lock, LOCK_EX | LOCK_NB) != 0 && errno == EWOULDBLOCK)
        fail("%s: another test_rope writes its tables there; wait for it, or pass another --out", path.c_str());
}

int main(int argc, char** argv) {
    Study s;
    s.o = options_parse<RopeOptions>(argc, argv);
    if (s.o.help) return rope_options_help(), 0;
    Comm world = comm_init(&argc, &argv);
    set_threads(world);
    check_options(s);

    const bool local_alone = s.o.experiments == "local", on_model = !local_alone && read_study(s);
    if (const std::string unused = option_for_a_model(s.o); !on_model && !unused.empty())
        fail("option --%s is for a model, %s", unused.c_str(),
             local_alone ? "and --experiments local looks at none"
                         : "and neither rope/run nor demo/long holds one: pass --model, or train one (make demo)");
    if (s.o.out.empty()) s.o.out = "rope/result";
    make_folder(s.o.out);
    lock_folder(s.o.out);
    if (s.wants("local")) run_local(s.o, s.bases);
    if (!on_model && !local_alone) say_no_model();
    if (on_model) {
        printf(
            "\n%s: %.2fM parameters, %d layers, %d heads, RoPE base %g, weights %s; %s: %zu sequences of %zu tokens\n",
            s.o.model.c_str(), double(param_count(s.config)) / 1e6, s.config.L, s.config.H, s.config.rope.base,
            s.o.start.c_str(), s.o.data.c_str(), s.sequences.size(), s.T);
        const bool by_shift = s.wants("shift");
        const bool bases = s.wants("base");
        Tables tables(s.o.out, by_shift || s.wants("frozen") || bases, by_shift, s.wants("length"), bases);
        s.tables = &tables;
#ifdef __CUDACC__
        if (s.gpu) run_device(gpu_open(0), s);
        else run_device(Cpu{}, s);
#else
        run_device(Cpu{}, s);
#endif
    }
    if (on_model || s.wants("local")) {
        const bool drawn = draw(s.o);
        printf("%s: CSV files%s\n", s.o.out.c_str(), drawn ? " and figures" : "");
    }
    comm_finalize(world);
    return 0;
}
