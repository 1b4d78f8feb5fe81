// RoPE: frequencies of every scaling, the rotation's algebra, and the rounding that each precision variant does.
#include "../rope.cuh"
#include "check.h"
#include "fails.h"

namespace {
struct Frequencies {
    std::vector<double> inv_freq;
    double attention_factor;
};

Frequencies frequencies(const RopeConfig& r, size_t D, size_t S) {
    Buffer<double> guarded(D / 2);
    Frequencies f;
    f.attention_factor = rope_frequencies(guarded.data(), r, D, S);
    f.inv_freq.assign(guarded.data(), guarded.data() + D / 2);
    return f;
}

RopeConfig config(RopeScaling scaling, double base, double factor, int max_context, int original = 0) {
    RopeConfig r;
    r.scaling = scaling, r.base = base, r.factor = factor, r.max_context = max_context, r.original_context = original;
    return r;
}

bool near(double a, double b) { return std::fabs(a - b) <= 1e-14 * std::fabs(b); }

// T tokens of H query, K key and K value heads, and the table of their positions.
template <class E> struct Rotation {
    size_t T, H, K, D;
    Buffer<E> qkv;
    Buffer<Acc<E>> table;
    RopePrecision precision;

    Rotation(size_t T, size_t H, size_t K, size_t D, uint64_t seed, RopePrecision precision, double factor = 1,
             int32_t stride = 37)
        : T(T), H(H), K(K), D(D), qkv(T * (H + 2 * K) * D, seed), table(T * D), precision(precision) {
        Frequencies f = frequencies(RopeConfig(), D, T);
        std::vector<int32_t> pos;
        for (size_t t = 0; t < T; t++) pos.push_back(int32_t(t) * stride);
        rope_table<E>(Cpu(), table.data(), pos.data(), f.inv_freq.data(), factor, precision, T, D);
    }
    void forward() { rope_forward(Cpu(), qkv.data(), table.data(), precision, T, H, K, D); }
    void backward() { rope_backward(Cpu(), qkv.data(), table.data(), precision, T, H, K, D); }
};

double dot(const Buffer<double>& a, const Buffer<double>& b, size_t begin, size_t end) {
    double sum = 0;
    for (size_t i = begin; i < end; i++) sum += a[i] * b[i];
    return sum;
}
} // namespace

TEST_CASE("rope_frequencies: unscaled and linear") {
    Frequencies plain = frequencies(config(RopeScaling::none, 10000, 8, 4096), 128, 1 << 20);
    Frequencies linear = frequencies(config(RopeScaling::linear, 10000, 8, 4096), 128, 1 << 20);
    CHECK(plain.attention_factor == 1);
    CHECK(linear.attention_factor == 1);
    for (size_t i : {0, 16, 32, 48}) CHECK(near(plain.inv_freq[i], std::pow(10.0, -double(i) / 16)));
    for (size_t i = 0; i < 64; i++) CHECK(linear.inv_freq[i] == plain.inv_freq[i] / 8);
    for (size_t i = 1; i < 64; i++)
        CHECK(near(plain.inv_freq[i] / plain.inv_freq[i - 1], std::exp(-std::log(10000.0) / 64)));
    CHECK(frequencies(config(RopeScaling::none, 5e6, 1, 4096), 2, 1).inv_freq[0] == 1);
}

// The numbers here and below: transformers' formulas (modeling_rope_utils.py, 5.17), evaluated in double by Python.
TEST_CASE("rope_frequencies: dynamic NTK depends on the row's length") {
    RopeConfig r = config(RopeScaling::dynamic, 10000, 2, 4096);
    Frequencies plain = frequencies(config(RopeScaling::none, 10000, 1, 4096), 128, 1);
    for (size_t S : {1, 4095, 4096}) CHECK(frequencies(r, 128, S).inv_freq == plain.inv_freq);
    Frequencies f = frequencies(r, 128, 16384);
    CHECK(f.attention_factor == 1);
    CHECK(f.inv_freq[0] == 1);
    CHECK(near(f.inv_freq[1], 0.8396257425643113));
    CHECK(near(f.inv_freq[32], 0.003721721340214912));
    // The base is stretched so that the slowest pair slows down by factor S / max - (factor - 1) = 7 exactly.
    CHECK(near(f.inv_freq[63], 1.649688549556369e-05));
    CHECK(near(f.inv_freq[63] * 7, plain.inv_freq[63]));
    CHECK(fails_with([&] { frequencies(r, 2, 8192); }).find("above 2") != std::string::npos);
}

TEST_CASE("rope_frequencies: YaRN") {
    // LLaMA-2 to 64K: the ramp runs from pair 20 to pair 46.
    RopeConfig r = config(RopeScaling::yarn, 10000, 16, 65536, 4096);
    Frequencies f = frequencies(r, 128, 65536), plain = frequencies(config(RopeScaling::none, 10000, 1, 4096), 128, 1);
    CHECK(near(f.attention_factor, 1.2772588722239782));
    for (size_t i = 0; i <= 20; i++) CHECK(near(f.inv_freq[i], plain.inv_freq[i]));
    for (size_t i = 46; i < 64; i++) CHECK(near(f.inv_freq[i], plain.inv_freq[i] / 16));
    CHECK(near(f.inv_freq[21], 0.046940859997959404));
    CHECK(near(f.inv_freq[33], 0.004600435467850347));
    CHECK(near(f.inv_freq[45], 0.00015177160473182487));
    CHECK(frequencies(r, 128, 100).inv_freq == f.inv_freq); // the same at every length
    r.original_context = 0, r.max_context = 4096;           // then max_context is the original one
    CHECK(frequencies(r, 128, 65536).inv_freq == f.inv_freq);

    r = config(RopeScaling::yarn, 50000, 40, 163840, 4096);
    r.mscale = 0.707, r.mscale_all_dim = 1;
    f = frequencies(r, 64, 1);
    CHECK(near(f.attention_factor, 0.9210423553163399));
    CHECK(near(f.inv_freq[8], 0.0668740304976422));
    CHECK(near(f.inv_freq[15], 0.0027044995813404697));
    CHECK(near(f.inv_freq[20], 2.8912374188581044e-05));
    r.mscale_all_dim = 0; // one of the two alone does not count
    CHECK(near(frequencies(r, 64, 1).attention_factor, 0.1 * std::log(40.0) + 1));
    r.mscale = 0, r.mscale_all_dim = 1;
    CHECK(near(frequencies(r, 64, 1).attention_factor, 0.1 * std::log(40.0) + 1));
    r.attention_factor = 0.75;
    CHECK(frequencies(r, 64, 1).attention_factor == 0.75);
    r.attention_factor = 0, r.factor = 1;
    CHECK(frequencies(r, 64, 1).attention_factor == 1);
}

TEST_CASE("rope_frequencies: LongRoPE") {
    RopeConfig r = config(RopeScaling::longrope, 10000, 1, 131072, 4096);
    for (int i = 0; i < 48; i++) r.short_factor[i] = 1 + float(i) / 64, r.long_factor[i] = 1 + float(i);
    Frequencies plain = frequencies(config(RopeScaling::none, 10000, 1, 4096), 96, 1);
    Frequencies few = frequencies(r, 96, 4096), many = frequencies(r, 96, 4097);
    for (size_t i = 0; i < 48; i++) {
        CHECK(near(few.inv_freq[i], plain.inv_freq[i] / (1 + double(i) / 64)));
        CHECK(near(many.inv_freq[i], plain.inv_freq[i] / (1 + double(i))));
    }
    // Without a factor it is 131072 / 4096 = 2^5, and 4096 = 2^12: sqrt(1 + 5/12), at every length.
    CHECK(near(few.attention_factor, std::sqrt(17.0 / 12)));
    CHECK(near(many.attention_factor, std::sqrt(17.0 / 12)));
    r.factor = 8;
    CHECK(near(frequencies(r, 96, 1).attention_factor, std::sqrt(15.0 / 12)));
    r.attention_factor = 1.5;
    CHECK(frequencies(r, 96, 1).attention_factor == 1.5);
    r.factor = 1, r.attention_factor = 0, r.original_context = 0;
    CHECK(frequencies(r, 96, 1).attention_factor == 1);
}

TEST_CASE("rope_frequencies: Llama 3") {
    RopeConfig r = config(RopeScaling::llama3, 500000, 8, 131072, 8192);
    Frequencies f = frequencies(r, 128, 131072), plain = frequencies(config(RopeScaling::none, 500000, 1, 1), 128, 1);
    CHECK(f.attention_factor == 1);
    for (size_t i = 0; i <= 28; i++) CHECK(f.inv_freq[i] == plain.inv_freq[i]); // wavelengths up to 1956 < 8192 / 4
    CHECK(near(f.inv_freq[29], 0.002166570763503359));
    CHECK(near(f.inv_freq[32], 0.0005248461609929547));
    CHECK(near(f.inv_freq[34], 0.00017850781276799638));
    for (size_t i = 35; i < 64; i++) CHECK(near(f.inv_freq[i], plain.inv_freq[i] / 8)); // from 8218 > 8192
    r.factor = 32;
    f = frequencies(r, 64, 131072);
    CHECK(near(f.inv_freq[14], 0.0032114459947525913));
    CHECK(near(f.inv_freq[16], 0.00042955679655936815));
    CHECK(near(f.inv_freq[31], 9.418306725434909e-08));
}

TEST_CASE("rope: the rotation of known angles") {
    // D = 2 has the one frequency 1: position t turns by t radians. Values pass unturned.
    Rotation<double> r(5, 1, 1, 2, 1, RopePrecision::exact, 1, 1);
    for (size_t t = 0; t < 5; t++) {
        const double x[] = {3, -1, 1, 0, 7, 11};
        for (size_t i = 0; i < 6; i++) r.qkv[t * 6 + i] = x[i];
    }
    r.forward();
    for (size_t t = 0; t < 5; t++) {
        double angle = double(t), *x = r.qkv.data() + t * 6;
        CHECK(near(x[0], 3 * std::cos(angle) + std::sin(angle)));
        CHECK(near(x[1], 3 * std::sin(angle) - std::cos(angle)));
        CHECK(near(x[2], std::cos(angle)));
        CHECK(std::fabs(x[3] - std::sin(angle)) < 1e-15);
        CHECK(x[4] == 7);
        CHECK(x[5] == 11);
    }
    // The pairs are (i, i + D/2), as in Hugging Face's rotate_half.
    Rotation<double> pair(2, 1, 0, 8, 1, RopePrecision::exact, 1, 1);
    pair.qkv.fill(0), pair.qkv[8 + 1] = 1;
    pair.forward();
    double angle = std::pow(10000.0, -2.0 / 8);
    for (size_t i = 0; i < 8; i++)
        CHECK(std::fabs(pair.qkv[8 + i] - (i == 1 ? std::cos(angle) : i == 5 ? std::sin(angle) : 0)) < 1e-15);
}

TEST_CASE("rope: norms are kept, backward is the transpose, values are not touched") {
    for (size_t D : {2, 18, 64})
        for (double factor : {1.0, 1.25}) {
            const size_t T = 7, H = 4, K = 2;
            Rotation<double> x(T, H, K, D, 1, RopePrecision::exact, factor);
            Rotation<double> y(T, H, K, D, 2, RopePrecision::exact, factor);
            Buffer<double> x0 = converted<double>(x.qkv), y0 = converted<double>(y.qkv);
            x.forward(), y.backward();
            for (size_t head = 0; head < T * (H + 2 * K); head++) {
                size_t begin = head * D, end = begin + D;
                bool value = head % (H + 2 * K) >= H + K;
                double squares = dot(x0, x0, begin, end) * (value ? 1 : factor * factor);
                CHECK(dot(x.qkv, x.qkv, begin, end) == doctest::Approx(squares).epsilon(1e-14));
                CHECK(std::fabs(dot(y0, x.qkv, begin, end) - dot(y.qkv, x0, begin, end)) < 1e-15 * 10 * double(D));
                if (value) CHECK(largest_error(x.qkv.data() + begin, x0.data() + begin, D) == 0);
            }
            if (factor == 1) {
                x.backward();
                CHECK(largest_error(x.qkv, x0) < 1e-14);
            }
        }
}

TEST_CASE("rope: the gradient is that of finite differences") {
    Rotation<double> x(3, 2, 1, 6, 1, RopePrecision::exact, 1.1), d(3, 2, 1, 6, 2, RopePrecision::exact, 1.1);
    Buffer<double> x0 = converted<double>(x.qkv), dout = converted<double>(d.qkv);
    auto f = [&] {
        memcpy(x.qkv.data(), x0.data(), x0.count * sizeof(double));
        x.forward();
        return dot(dout, x.qkv, 0, dout.count);
    };
    d.backward();
    // A linear function: only rounding is left, 1e-16 of a sum of 72 terms, over h = 1e-5.
    for (size_t i = 0; i < x0.count; i++) CHECK(std::fabs(finite_difference(f, x0.data(), i) - d.qkv[i]) < 1e-9);
}

TEST_CASE("rope: in double the dot product depends on the difference of positions only") {
    const size_t D = 64, T = 2;
    Frequencies f = frequencies(RopeConfig(), D, 4096);
    double reference = 0, change = 0, other = 0;
    for (int32_t shift : {0, 1, 16, 1000, 3000, 4000}) {
        Buffer<double> x(T * D, 3, 1 / std::sqrt(double(D))), table(T * D); // |q| and |k| near 1
        for (int32_t distance : {77, 78}) {
            int32_t pos[] = {distance + shift, shift};
            Buffer<double> rotated = converted<double>(x);
            rope_table<double>(Cpu(), table.data(), pos, f.inv_freq.data(), 1, RopePrecision::exact, T, D);
            rope_forward(Cpu(), rotated.data(), table.data(), RopePrecision::exact, T, 1, 0, D);
            double logit = 0;
            for (size_t i = 0; i < D; i++) logit += rotated[i] * rotated[D + i];
            if (shift == 0 && distance == 77) reference = logit;
            if (distance == 77) change = std::max(change, std::fabs(logit - reference));
            else other = std::max(other, std::fabs(logit - reference));
        }
    }
    // Four angles below 4096 are rounded by 2^-53 of themselves: at most 1.8e-12 |q| |k|, were all pairs the fastest.
    CHECK(change < 1e-12);
    CHECK(other > 1e-3);
}

TEST_CASE("rope: float and bf16 agree with double") {
    // Each output is a sum of two products: cos and sin are off by 2^-24, products and sum round by 2^-24 each, which
    // makes 4 of the magnitudes (cos and sin being at most 1), and storing adds half an ulp of E.
    auto check = [](auto element) {
        using E = decltype(element);
        const size_t T = 9, H = 3, K = 1, D = 34;
        Rotation<E> e(T, H, K, D, 4, RopePrecision::exact);
        Rotation<double> d(T, H, K, D, 4, RopePrecision::exact);
        for (size_t i = 0; i < d.qkv.count; i++) d.qkv[i] = e.qkv[i];
        Buffer<double> x = converted<double>(e.qkv);
        e.forward(), d.forward();
        double worst = 0, unit = std::is_same_v<E, bf16> ? 0x1p-8 : 0x1p-24;
        for (size_t i = 0; i < x.count; i++) {
            size_t partner = i % D < D / 2 ? i + D / 2 : i - D / 2;
            double allowed = 4 * 0x1p-24 * (std::fabs(x[i]) + std::fabs(x[partner])) + unit * std::fabs(d.qkv[i]);
            worst = std::max(worst, std::fabs(double(e.qkv[i]) - d.qkv[i]) / allowed);
        }
        CHECK(worst <= 1);
    };
    check(float()), check(bf16(0));
}

TEST_CASE("rope: each precision rounds where it says, and nowhere else") {
    auto round = [](double x) { return double(float(bf16(float(x)))); };
    const size_t D = 128;
    Frequencies f = frequencies(RopeConfig(), D, 4096);
    const int32_t pos = 3001;
    for (const RopePrecisionName& variant : rope_precision_names) {
        RopePrecision precision = variant.precision;
        Buffer<float> table(D);
        rope_table<bf16>(Cpu(), table.data(), &pos, f.inv_freq.data(), 1, precision, 1, D);
        Buffer<bf16> x(D, 5), y = converted<bf16>(x);
        rope_forward(Cpu(), y.data(), table.data(), precision, 1, 1, 0, D);
        bool table_rounded = precision != RopePrecision::exact;
        bool three = precision == RopePrecision::bf16_rotation || precision == RopePrecision::bf16_angle;
        for (size_t i = 0; i < D / 2; i++) {
            double angle = pos * f.inv_freq[i]; // bf16(3001) is 3008
            if (precision == RopePrecision::bf16_angle) angle = round(3008 * round(f.inv_freq[i]));
            double c = float(std::cos(angle)), s = float(std::sin(angle)), x1 = float(x[i]), x2 = float(x[i + D / 2]);
            if (table_rounded) c = round(c), s = round(s);
            CHECK(double(table[2 * i]) == c);
            CHECK(double(table[2 * i + 1]) == s);
            if (three) {
                CHECK(double(y[i]) == round(round(x1 * c) - round(x2 * s)));
                CHECK(double(y[i + D / 2]) == round(round(x2 * c) + round(x1 * s)));
            } else { // fp32 products and sums: what they round may turn over the last bit of bf16
                double y1 = double(y[i]), y2 = double(y[i + D / 2]);
                CHECK(std::fabs(y1 - (x1 * c - x2 * s)) <= 0.501 * ulp<bf16>(y1) + 1e-6);
                CHECK(std::fabs(y2 - (x2 * c + x1 * s)) <= 0.501 * ulp<bf16>(y2) + 1e-6);
            }
        }
    }
}

TEST_CASE("rope: angles at 4M positions need double") {
    // Against long double, whose 64 bits leave 2^22 * 2^-64: double is off by 2^22 * 2^-53 at most, float by 0.25.
    Frequencies f = frequencies(config(RopeScaling::none, 5e7, 1, 4096), 128, 1 << 22);
    double worst = 0, worst_float = 0;
    for (int32_t pos = (1 << 22) - 1; pos > (1 << 22) - 2000; pos -= 7)
        for (double inv_freq : f.inv_freq) {
            long double angle = (long double)pos * (long double)inv_freq;
            double exact = rope_angle(pos, inv_freq, RopePrecision::exact);
            float in_float = float(pos) * float(inv_freq);
            worst = std::max(worst, std::fabs(double(exact - angle)));
            worst_float = std::max(worst_float, std::fabs(double(in_float - angle)));
        }
    CHECK(worst <= 0x1p-31);
    CHECK(worst_float > 0.15);
}

namespace {
// Mean over 20000 pairs of |logit(both shifted by 16) - logit|: unit-Gaussian q and k of size 128 that are bf16 before
// the rotation, key at 0, query at 0..4095, exact dot product without 1/sqrt(D).
template <class E>
double mean_logit_change(const Buffer<bf16>& q0, const Buffer<bf16>& k0, RopePrecision precision, bool float_angles) {
    const size_t D = 128, pairs = q0.count / D;
    Frequencies f = frequencies(RopeConfig(), D, 4096);
    std::vector<double> logit(pairs), row(D);
    auto entry = [&](Acc<E>* table, int32_t pos, size_t i) {
        double angle = rope_angle(pos, f.inv_freq[i], precision);
        if (float_angles && precision != RopePrecision::bf16_angle) angle = double(float(pos) * float(f.inv_freq[i]));
        rope_cos_sin<E>(table + 2 * i, angle, 1, precision);
    };
    double sum = 0;
    for (int32_t shift : {0, 16}) {
        Buffer<E> q = converted<E>(q0), k = converted<E>(k0);
        Buffer<Acc<E>> query_table(pairs * D), key_table(D);
        for (size_t i = 0; i < D / 2; i++) entry(key_table.data(), shift, i);
        for (size_t t = 0; t < pairs; t++)
            for (size_t i = 0; i < D / 2; i++)
                entry(query_table.data() + t * D, int32_t(hash64(13, t) % 4096) + shift, i);
        rope_forward(Cpu(), q.data(), query_table.data(), precision, pairs, 1, 0, D);
        rope_forward(Cpu(), k.data(), key_table.data(), precision, 1, pairs, 0, D);
        for (size_t t = 0; t < pairs; t++) {
            double l = 0;
            for (size_t i = 0; i < D; i++) l += double(q[t * D + i]) * double(k[t * D + i]);
            if (shift) sum += std::fabs(l - logit[t]);
            logit[t] = l;
        }
    }
    return sum / double(pairs);
}
} // namespace

TEST_CASE("rope: what each precision does to the relative property of one logit") {
    const Buffer<bf16> q(20000 * 128, 11), k(20000 * 128, 12);
    struct {
        RopePrecision precision;
        double expected;
    } in_bf16[] = {{RopePrecision::exact, 0.0254},         // C
                   {RopePrecision::bf16_table, 0.0325},    // B
                   {RopePrecision::bf16_rotation, 0.0399}, // A
                   {RopePrecision::bf16_angle, 4.33}};     // D
    for (auto [precision, expected] : in_bf16)
        CHECK(std::fabs(mean_logit_change<bf16>(q, k, precision, true) / expected - 1) < 0.1);
    CHECK(std::fabs(mean_logit_change<float>(q, k, RopePrecision::exact, true) / 1.25e-4 - 1) < 0.1); // F
    CHECK(mean_logit_change<float>(q, k, RopePrecision::exact, false) < 1e-6); // F with double angles
    CHECK(mean_logit_change<double>(q, k, RopePrecision::exact, false) < 1e-11);
}

TEST_CASE("rope: precisions by name") {
    for (const RopePrecisionName& variant : rope_precision_names) {
        RopePrecision parsed = RopePrecision(99);
        CHECK(rope_precision_parse(variant.name, &parsed));
        CHECK(parsed == variant.precision);
        CHECK(std::string(rope_precision_name(parsed)) == variant.name);
    }
    RopePrecision kept = RopePrecision::bf16_table;
    for (const char* name : {"", "Exact", "exact ", "bf16"}) CHECK(!rope_precision_parse(name, &kept));
    CHECK(kept == RopePrecision::bf16_table);
    CHECK(fails_with([] { frequencies(RopeConfig(), 3, 1); }).find("even") != std::string::npos);
}
