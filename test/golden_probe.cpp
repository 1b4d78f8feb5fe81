// Lets test_golden.py ask the C++ code for what has no option: RoPE frequencies, and gradients in double.
//   golden_probe rope HEADER D S              attention factor and D/2 frequencies, a line
//   golden_probe gradients MODEL TOKENS OUT   loss on stdout; OUT: the gradients (double) in the file's layout
#define DOCTEST_CONFIG_IMPLEMENT
#include "model.h"

static int print_rope(const char* header, size_t D, size_t S) {
    const WeightsFile file = weights_open(header, true);
    std::vector<double> inv_freq(D / 2);
    printf("%.17g\n", rope_frequencies(inv_freq.data(), file.config.rope, D, S));
    for (double f : inv_freq) printf("%.17g\n", f);
    return 0;
}

// One document, attended to in full: what transformers computes for a plain sequence.
static int write_gradients(const char* model, const char* tokens, const char* out) {
    Row row;
    FILE* file = fopen(tokens, "r");
    for (int id; file && fscanf(file, "%d", &id) == 1;) row.token.push_back(id);
    size_t S = row.token.size();
    if (file) fclose(file);
    for (size_t i = 0; i < S; i++) {
        row.doc.push_back(0), row.pos.push_back(int32_t(i));
        row.label.push_back(i + 1 < S ? row.token[i + 1] : -1);
    }
    row.counted = int64_t(S) - 1, row.inputs = int64_t(S);
    const Config config = weights_open(model).config;
    Layout layout = small_layout(S, 1);
    TestModel<double, double> t(config, layout);
    weights_load(t.m, weights_open(model));
    printf("%.12g\n", t.gradients({row}, Attention::full, Comm{}, double(row.counted), 1));
    FILE* f = fopen(out, "wb");
    bool written = f && fwrite(t.m.grad_flat, 8, t.m.elements, f) == t.m.elements;
    return !written || fclose(f) != 0;
}

int main(int argc, char** argv) {
    if (argc == 5 && !strcmp(argv[1], "rope"))
        return print_rope(argv[2], atoi(argv[3]), strtoull(argv[4], nullptr, 10));
    if (argc == 5 && !strcmp(argv[1], "gradients")) return write_gradients(argv[2], argv[3], argv[4]);
    return 2;
}
