// What the tests share: hashed inputs, guarded and poisoned buffers, comparison by a derived bound.
#pragma once
#include "../core/types.h"
#include <algorithm>
#define DOCTEST_CONFIG_NO_SHORT_MACRO_NAMES // doctest has a REQUIRE too; ours must stay
#include <doctest/doctest.h>
#include <limits>
#include <string>
#include <vector>

#define TEST_CASE DOCTEST_TEST_CASE
#define TEST_CASE_TEMPLATE DOCTEST_TEST_CASE_TEMPLATE
#define SUBCASE DOCTEST_SUBCASE
#define CAPTURE DOCTEST_CAPTURE
#define INFO DOCTEST_INFO
#define MESSAGE DOCTEST_MESSAGE
#define CHECK DOCTEST_CHECK
#define CHECK_FALSE DOCTEST_CHECK_FALSE
#define CHECK_MESSAGE DOCTEST_CHECK_MESSAGE

constexpr size_t worth_threads = 1 << 16; // elements that are worth threads

// A buffer between guard words, poisoned with NaN (integers: a huge negative) until it is written.
// The destructor fails the test when a guard word was touched.
template <class E> struct Buffer {
    static constexpr size_t guard = 64;
    static constexpr uint8_t guard_byte = 0xA5;
    std::vector<E> store;
    size_t count;

    explicit Buffer(size_t n) : store(n + 2 * guard), count(n) {
        memset((void*)store.data(), guard_byte, store.size() * sizeof(E));
        poison();
    }
    // Standard normal values times `scale`, rounded to E: element i is hash_normal(seed, i).
    Buffer(size_t n, uint64_t seed, double scale = 1) : Buffer(n) {
#pragma omp parallel for if (n >= worth_threads)
        for (size_t i = 0; i < n; i++) data()[i] = E(scale * hash_normal(seed, i));
    }
    Buffer(const Buffer&) = delete;
    Buffer(Buffer&& other) : store(std::move(other.store)), count(other.count) { other.store.clear(); }
    ~Buffer() {
        if (!store.empty()) CHECK_MESSAGE(intact(), "a guard word was overwritten");
    }

    E* data() { return store.data() + guard; }
    const E* data() const { return store.data() + guard; }
    operator E*() { return data(); }
    E& operator[](size_t i) { return data()[i]; }
    const E& operator[](size_t i) const { return data()[i]; }
    void poison() {
#pragma omp parallel for if (count >= worth_threads)
        for (size_t i = 0; i < count; i++)
            if constexpr (std::is_integral_v<E>) data()[i] = std::numeric_limits<E>::lowest();
            else data()[i] = E(std::numeric_limits<float>::quiet_NaN());
    }
    void fill(double value) {
        for (size_t i = 0; i < count; i++) data()[i] = E(value);
    }
    bool intact() const {
        auto* low = (const uint8_t*)store.data();
        auto* high = (const uint8_t*)(store.data() + guard + count);
        auto whole = [](const uint8_t* p) {
            return std::all_of(p, p + guard * sizeof(E), [](uint8_t b) { return b == guard_byte; });
        };
        return whole(low) && whole(high);
    }
};

// Bits, not values: a NaN equals itself and -0 differs from 0.
template <class E> bool same_bits(const Buffer<E>& a, const Buffer<E>& b) {
    return a.count == b.count && memcmp(a.data(), b.data(), a.count * sizeof(E)) == 0;
}

template <class To, class From> void convert_to(Buffer<To>& to, const Buffer<From>& from) {
#pragma omp parallel for if (from.count >= worth_threads)
    for (size_t i = 0; i < from.count; i++) to[i] = To(from[i]);
}
template <class To, class From> Buffer<To> converted(const Buffer<From>& from) {
    Buffer<To> to(from.count);
    convert_to(to, from);
    return to;
}

// Largest |a - b|; infinite when a value is not finite.
template <class A, class B> double largest_error(const A* a, const B* b, size_t n) {
    double worst = 0;
#pragma omp parallel for reduction(max : worst) if (n >= worth_threads)
    for (size_t i = 0; i < n; i++) {
        const double e = std::fabs(double(a[i]) - double(b[i]));
        worst = std::max(worst, std::isfinite(e) ? e : std::numeric_limits<double>::infinity());
    }
    return worst;
}
template <class A, class B> double largest_error(const Buffer<A>& a, const Buffer<B>& b) {
    CHECK(a.count == b.count);
    return largest_error(a.data(), b.data(), a.count);
}

template <class E> double largest_value(const Buffer<E>& a) {
    double m = 0;
#pragma omp parallel for reduction(max : m) if (a.count >= worth_threads)
    for (size_t i = 0; i < a.count; i++) m = std::max(m, std::fabs(double(a[i])));
    return m;
}

// Distance between neighbouring values of type E at magnitude x.
template <class E> double ulp(double x) {
    int mantissa = std::is_same_v<E, double> ? 53 : std::is_same_v<E, float> ? 24 : 8;
    return x == 0 ? 0 : std::ldexp(1.0, std::ilogb(x) + 1 - mantissa);
}

// The rule for kernels: the largest error against the double reference is at most twice that of the
// bf16 (or float) reference, plus 2 ulp of the output type at the tensor's largest value.
template <class E, class Y>
void check_2x(const Buffer<E>& result, const Buffer<Y>& yardstick, const Buffer<double>& truth) {
    double allowed = 2 * largest_error(yardstick, truth) + 2 * ulp<E>(largest_value(truth));
    CHECK(largest_error(result, truth) <= allowed);
}

// What roundings in fp32 must be expected to leave of attention's results, beyond the 2x rule: a yardstick can be
// exact by chance. Of LSE, absolute, and with it of P and the gradients, relative: half an ulp of 1 for each of the D
// products of a score, and of a sum over T tokens what T roundings of random sign add up to, twice.
inline double score_rounding(size_t T, size_t D) { return (double(D) + 2 * std::sqrt(double(T))) * 0x1p-24; }
// Of dQ and dK, absolute: where a query sees one key alone, dS = P (dP - delta) is the difference of two equal sums of
// D products, an ulp for each. `largest`: of all gradients.
inline double cancelled_sums(size_t D, double largest) { return double(D) * ulp<float>(largest); }

// Central difference of a scalar function of x[i], in double. With step h the truncation error is
// O(h^2) and the rounding error O(eps / h): h = 1e-5 balances them at about 1e-10 relative.
template <class F> double finite_difference(F f, double* x, size_t i, double h = 1e-5) {
    double kept = x[i];
    x[i] = kept + h;
    double up = f();
    x[i] = kept - h;
    double down = f();
    x[i] = kept;
    return (up - down) / (2 * h);
}
