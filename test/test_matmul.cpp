// The three products of a linear layer: exact sums, finite differences, error bounds, bits, guard words.
#include "../layers/matmul.cuh"
#include "check.h"

template <class E> Buffer<E> copy(const Buffer<E>& x) { return converted<E>(x); }

// Integers in -3..3, exact in every type. The sum of up to 2^24 / 9 products is exact in fp32 in any order.
template <class E> Buffer<E> integers(size_t count, uint64_t seed) {
    Buffer<E> x(count);
    for (size_t i = 0; i < count; i++) x[i] = E(float(int(hash64(seed, i) % 7) - 3));
    return x;
}

// Sums by the definition, in double, and the sums of magnitudes, to which rounding errors are proportional.
struct Sums {
    Buffer<double> value, magnitude;
};

template <class FA, class FB> Sums naive(size_t m, size_t n, size_t k, FA a, FB b) {
    Sums s{Buffer<double>(m * n), Buffer<double>(m * n)};
    for (size_t i = 0; i < m; i++)
        for (size_t j = 0; j < n; j++) {
            double value = 0, magnitude = 0;
            for (size_t p = 0; p < k; p++) {
                double product = double(a(i, p)) * double(b(p, j));
                value += product, magnitude += std::fabs(product);
            }
            s.value[i * n + j] = value, s.magnitude[i * n + j] = magnitude;
        }
    return s;
}

template <class E> Sums naive_forward(const Buffer<E>& in, const Buffer<E>& weight, size_t T, size_t M, size_t N) {
    auto a = [&](size_t t, size_t m) { return in[t * M + m]; };
    return naive(T, N, M, a, [&](size_t m, size_t n) { return weight[n * M + m]; });
}
template <class E> Sums naive_input(const Buffer<E>& dout, const Buffer<E>& weight, size_t T, size_t M, size_t N) {
    auto a = [&](size_t t, size_t n) { return dout[t * N + n]; };
    return naive(T, M, N, a, [&](size_t n, size_t m) { return weight[n * M + m]; });
}
template <class E> Sums naive_weight(const Buffer<E>& dout, const Buffer<E>& in, size_t T, size_t M, size_t N) {
    auto a = [&](size_t n, size_t t) { return dout[t * N + n]; };
    return naive(N, M, T, a, [&](size_t t, size_t m) { return in[t * M + m]; });
}
template <class E> Sums naive_bias(const Buffer<E>& dout, size_t T, size_t N) {
    return naive(
        1, N, T, [](size_t, size_t) { return 1.0; }, [&](size_t t, size_t n) { return dout[t * N + n]; });
}

// Sums of integers are exact, so the result must be the exact sum, rounded once: bit for bit.
template <class E, class G> void check_exact(size_t T, size_t M, size_t N) {
    CAPTURE(T);
    CAPTURE(M);
    CAPTURE(N);
    CAPTURE(sizeof(E));
    CAPTURE(sizeof(G));
    Buffer<E> in = integers<E>(T * M, 1), weight = integers<E>(N * M, 2), bias = integers<E>(N, 3);
    Buffer<E> residual = integers<E>(T * N, 4), dout = integers<E>(T * N, 5), out(T * N), din(T * M), expected(T * N);
    Buffer<G> dweight = integers<G>(N * M, 6), dbias = integers<G>(N, 7);

    Sums y = naive_forward(in, weight, T, M, N);
    for (size_t i = 0; i < T * N; i++) expected[i] = E(y.value[i]);
    matmul_forward(Cpu{}, out.data(), in.data(), weight.data(), (E*)nullptr, (E*)nullptr, T, M, N);
    CHECK(largest_error(out, expected) == 0);
    for (size_t i = 0; i < T * N; i++) expected[i] = E(y.value[i] + double(bias[i % N]) + double(residual[i]));
    matmul_forward(Cpu{}, residual.data(), in.data(), weight.data(), bias.data(), residual.data(), T, M, N);
    CHECK(largest_error(residual, expected) == 0);

    Sums dx = naive_input(dout, weight, T, M, N);
    Buffer<E> expected_din = converted<E>(dx.value);
    matmul_backward_input(Cpu{}, din.data(), dout.data(), weight.data(), T, M, N);
    CHECK(largest_error(din, expected_din) == 0);

    Sums dw = naive_weight(dout, in, T, M, N), db = naive_bias(dout, T, N);
    Buffer<G> expected_dweight(N * M), expected_dbias(N);
    for (size_t i = 0; i < N * M; i++) expected_dweight[i] = G(double(dweight[i]) + dw.value[i]);
    for (size_t i = 0; i < N; i++) expected_dbias[i] = G(double(dbias[i]) + db.value[i]);
    matmul_backward_weight(Cpu{}, dweight.data(), dbias.data(), dout.data(), in.data(), T, M, N);
    CHECK(largest_error(dweight, expected_dweight) == 0);
    CHECK(largest_error(dbias, expected_dbias) == 0);
}

template <class E, class G> void check_exact_sizes() {
    using S = GemmSizes<Acc<E>>;
    const size_t small[] = {1, 2, 7, 9, S::width + 1, S::mr - 1, S::mr, S::mr + 1, S::nr - 1, S::nr, S::nr + 1, 65};
    constexpr size_t count = sizeof small / sizeof *small;
    for (size_t i = 0; i < count; i++) // every pair of sizes in every two roles
        for (size_t j = 0; j < count; j++) check_exact<E, G>(small[i], small[(i + 5 * j) % count], small[j]);
    // Beyond kc in each role of k, beyond a group of A panels, beyond a block of C in either direction.
    for (size_t k : {S::kc - 1, S::kc, S::kc + 1, 2 * S::kc + 3}) {
        check_exact<E, G>(15, k, 33);
        check_exact<E, G>(17, 33, k);
        check_exact<E, G>(k, 17, 15);
    }
    check_exact<E, G>(2 * S::rows + 3, 19, 5);
    check_exact<E, G>(S::group * S::mr + 1, S::cols + 1, 3);
    check_exact<E, G>(10, S::kc + 9, S::rows + 1);
}

TEST_CASE("integers: every sum is exact and rounded once, at every edge of the tiles, panels and blocks") {
    check_exact_sizes<float, float>();
    check_exact_sizes<double, double>();
    check_exact_sizes<bf16, bf16>();
    check_exact<bf16, float>(300, 35, 47);
    check_exact<bf16, double>(300, 35, 47);
    check_exact<float, double>(300, 35, 47);
    check_exact<float, bf16>(300, 35, 47);
    check_exact<double, float>(300, 35, 47);
}

// Rounding errors. A sum that passes through d roundings is off by at most gamma_d = d u / (1 - d u) times
// the sum of magnitudes (Higham 2002, 3.1; u = 2^-24 or 2^-53). Here d is kc within a slice, one for each
// slice, one for each addend after it. Then half an ulp of the storage type, once. `truth` has its own
// gamma_k of double.
template <class A, class Out>
void check_bound(const Buffer<Out>& result, const Buffer<double>& truth, const Buffer<double>& magnitude, size_t k) {
    auto gamma = [](double d, double u) { return d * u / (1 - d * u); };
    size_t kc = GemmSizes<A>::kc;
    double depth = double(std::min(k, kc) + (k + kc - 1) / kc + 2);
    double relative = gamma(depth, sizeof(A) == 4 ? 0x1p-24 : 0x1p-53) + gamma(double(k + 2), 0x1p-53);
    size_t outside = 0;
    for (size_t i = 0; i < truth.count; i++) {
        double sum_error = relative * magnitude[i];
        double allowed = sum_error + 0.5 * ulp<Out>(std::fabs(truth[i]) + sum_error);
        outside += !(std::fabs(double(result[i]) - truth[i]) <= allowed);
    }
    CHECK(outside == 0);
}

template <class E, class G> void check_bounds(size_t T, size_t M, size_t N) {
    CAPTURE(T);
    CAPTURE(M);
    CAPTURE(N);
    CAPTURE(sizeof(E));
    CAPTURE(sizeof(G));
    Buffer<E> in(T * M, 1), weight(N * M, 2), bias(N, 3, 10), residual(T * N, 4, 10), dout(T * N, 5);
    Buffer<E> out(T * N), din(T * M);
    Buffer<G> dweight(N * M, 6, 10), dbias(N, 7, 10);

    Sums y = naive_forward(in, weight, T, M, N);
    for (size_t i = 0; i < T * N; i++) {
        y.value[i] += double(bias[i % N]) + double(residual[i]);
        y.magnitude[i] += std::fabs(double(bias[i % N])) + std::fabs(double(residual[i]));
    }
    matmul_forward(Cpu{}, out.data(), in.data(), weight.data(), bias.data(), residual.data(), T, M, N);
    check_bound<Acc<E>>(out, y.value, y.magnitude, M);

    Sums dx = naive_input(dout, weight, T, M, N);
    matmul_backward_input(Cpu{}, din.data(), dout.data(), weight.data(), T, M, N);
    check_bound<Acc<E>>(din, dx.value, dx.magnitude, N);

    Sums dw = naive_weight(dout, in, T, M, N), db = naive_bias(dout, T, N);
    auto add = [](Sums& s, const Buffer<G>& old) {
        for (size_t i = 0; i < old.count; i++)
            s.value[i] += double(old[i]), s.magnitude[i] += std::fabs(double(old[i]));
    };
    add(dw, dweight), add(db, dbias);
    matmul_backward_weight(Cpu{}, dweight.data(), dbias.data(), dout.data(), in.data(), T, M, N);
    check_bound<Acc<E>>(dweight, dw.value, dw.magnitude, T);
    check_bound<Acc<E>>(dbias, db.value, db.magnitude, T);
}

TEST_CASE("normal values: within the bound of blocked sums and one rounding to storage") {
    const size_t sizes[][3] = {{1, 600, 33},   {4, 600, 17},   {9, 300, 33},
                               {17, 33, 1030}, {1030, 17, 33}, {130, 129, 131}};
    for (auto [T, M, N] : sizes) {
        check_bounds<float, float>(T, M, N);
        check_bounds<double, double>(T, M, N);
        check_bounds<bf16, bf16>(T, M, N);
        check_bounds<bf16, float>(T, M, N);
        check_bounds<float, bf16>(T, M, N);
    }
}

// The loss is sum(dout * out). It is linear in each input, so a central difference has no truncation
// error and h = 1 leaves only rounding: a few hundred terms of size 10, 1e-16 each.
TEST_CASE("finite differences of the loss in double") {
    for (size_t T : {3, 21}) {
        const size_t M = 11, N = 6;
        Buffer<double> in(T * M, 1), weight(N * M, 2), bias(N, 3), residual(T * N, 4), dout(T * N, 5), out(T * N);
        Buffer<double> din(T * M), dweight(N * M), dbias(N);
        auto loss = [&] {
            matmul_forward(Cpu{}, out.data(), in.data(), weight.data(), bias.data(), residual.data(), T, M, N);
            double sum = 0;
            for (size_t i = 0; i < T * N; i++) sum += dout[i] * out[i];
            return sum;
        };
        dweight.fill(0), dbias.fill(0);
        matmul_backward_input(Cpu{}, din.data(), dout.data(), weight.data(), T, M, N);
        matmul_backward_weight(Cpu{}, dweight.data(), dbias.data(), dout.data(), in.data(), T, M, N);
        auto check = [&](Buffer<double>& x, const Buffer<double>& dx) {
            for (size_t i = 0; i < x.count; i++) CHECK(std::fabs(finite_difference(loss, x, i, 1) - dx[i]) < 1e-12);
        };
        check(in, din), check(weight, dweight), check(bias, dbias), check(residual, dout);
    }
}

template <class E> struct Results { Buffer<E> out, din, dweight, dbias; };

template <class E> Results<E> all_products(int threads, size_t T, size_t M, size_t N) {
    int before = omp_get_max_threads();
    omp_set_num_threads(threads);
    Buffer<E> in(T * M, 1), weight(N * M, 2), bias(N, 3), dout(T * N, 5);
    Results<E> r{Buffer<E>(T * N, 4), Buffer<E>(T * M), Buffer<E>(N * M, 6), Buffer<E>(N, 7)};
    matmul_forward(Cpu{}, r.out.data(), in.data(), weight.data(), bias.data(), r.out.data(), T, M, N);
    matmul_backward_input(Cpu{}, r.din.data(), dout.data(), weight.data(), T, M, N);
    matmul_backward_weight(Cpu{}, r.dweight.data(), r.dbias.data(), dout.data(), in.data(), T, M, N);
    omp_set_num_threads(before);
    return r;
}

TEST_CASE_TEMPLATE("the bits depend neither on the threads nor on the run", E, float, double, bf16) {
    for (size_t T : {5, 300}) {
        Results<E> one = all_products<E>(1, T, 270, 130);
        for (int threads : {1, 2, 2, 3, 7, 16}) {
            Results<E> other = all_products<E>(threads, T, 270, 130);
            CAPTURE(threads);
            CHECK(same_bits(one.out, other.out));
            CHECK(same_bits(one.din, other.din));
            CHECK(same_bits(one.dweight, other.dweight));
            CHECK(same_bits(one.dbias, other.dbias));
        }
    }
}

TEST_CASE_TEMPLATE("a residual may be the output itself, and null means none", E, float, double, bf16) {
    for (size_t T : {4, 40}) {
        const size_t M = 300, N = 37;
        Buffer<E> in(T * M, 1), weight(N * M, 2), bias(N, 3), residual(T * N, 4), zero(T * N);
        Buffer<E> apart(T * N), plain(T * N), zeros(T * N);
        zero.fill(0);
        matmul_forward(Cpu{}, apart.data(), in.data(), weight.data(), bias.data(), residual.data(), T, M, N);
        matmul_forward(Cpu{}, residual.data(), in.data(), weight.data(), bias.data(), residual.data(), T, M, N);
        CHECK(same_bits(apart, residual));
        matmul_forward(Cpu{}, plain.data(), in.data(), weight.data(), (E*)nullptr, (E*)nullptr, T, M, N);
        matmul_forward(Cpu{}, zeros.data(), in.data(), weight.data(), zero.data(), zero.data(), T, M, N);
        CHECK(same_bits(plain, zeros));
    }
}

TEST_CASE("weight gradients add: two halves of the tokens give the whole") {
    const size_t T = 100, M = 35, N = 18, half = 41;
    Buffer<double> in(T * M, 1), dout(T * N, 2), whole(N * M, 3), parts(N * M, 3), dbias(N, 4), dbias_parts(N, 4);
    matmul_backward_weight(Cpu{}, whole.data(), dbias.data(), dout.data(), in.data(), T, M, N);
    matmul_backward_weight(Cpu{}, parts.data(), dbias_parts.data(), dout.data(), in.data(), half, M, N);
    const double *second_dout = dout.data() + half * N, *second_in = in.data() + half * M;
    matmul_backward_weight(Cpu{}, parts.data(), dbias_parts.data(), second_dout, second_in, T - half, M, N);
    // Each is a sum of T terms and the old value, in at most T + 2 additions.
    double largest_sum = largest_value(naive_weight(dout, in, T, M, N).magnitude) + largest_value(whole);
    CHECK(largest_error(whole, parts) < 2 * (T + 2) * 0x1p-53 * largest_sum);
    CHECK(largest_error(dbias, dbias_parts) < 2 * (T + 2) * 0x1p-53 * largest_sum);
    Buffer<double> before = copy(parts);
    matmul_backward_weight(Cpu{}, parts.data(), (double*)nullptr, dout.data(), in.data(), 0, M, N);
    CHECK(same_bits(parts, before));
    matmul_forward(Cpu{}, before.data(), in.data(), in.data(), (double*)nullptr, (double*)nullptr, 0, M, N);
    CHECK(same_bits(parts, before));
}

// Padding and neighbours multiply only zeros or nothing: one infinity reaches one row, or one column.
TEST_CASE("a value that is not finite stays in its row") {
    const size_t T = 50, M = 40, N = 70, bad = 29;
    Buffer<float> in(T * M, 1), weight(N * M, 2), dout(T * N, 3), out(T * N), din(T * M), dweight(N * M);
    in[bad * M + 7] = std::numeric_limits<float>::infinity();
    dout[bad * N + 3] = std::numeric_limits<float>::infinity();
    dweight.fill(0);
    matmul_forward(Cpu{}, out.data(), in.data(), weight.data(), (float*)nullptr, (float*)nullptr, T, M, N);
    matmul_backward_input(Cpu{}, din.data(), dout.data(), weight.data(), T, M, N);
    matmul_backward_weight(Cpu{}, dweight.data(), (float*)nullptr, dout.data(), in.data(), T, M, N);
    size_t wrong = 0;
    for (size_t i = 0; i < T * N; i++) wrong += std::isfinite(out[i]) == (i / N == bad);
    for (size_t i = 0; i < T * M; i++) wrong += std::isfinite(din[i]) == (i / M == bad);
    for (size_t i = 0; i < N * M; i++) wrong += std::isfinite(dweight[i]) == (i / M == 3 || i % M == 7);
    CHECK(wrong == 0);
}
