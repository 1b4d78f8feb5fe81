// Embedding: exact copies forward, exact integer sums backward.
#include "../layers/embedding.cuh"
#include "check.h"
#include <omp.h>

namespace {
struct Size {
    size_t T, V, C;
};
// A single token and channel, channels below, at and above a block of 256, a vocabulary of one, no token at all.
constexpr Size sizes[] = {{1, 1, 1}, {17, 5, 17}, {1000, 7, 3}, {40, 1, 256}, {33, 50, 257}, {9, 4, 600}, {0, 3, 5}};

Buffer<int32_t> random_tokens(size_t T, size_t V) {
    Buffer<int32_t> token(T);
    for (size_t t = 0; t < T; t++) token[t] = int32_t(hash64(7, t) % V);
    return token;
}

template <class E, class G> void check_integer_sums(size_t T, size_t V, size_t C) {
    Buffer<int32_t> token = random_tokens(T, V);
    Buffer<E> dout(T * C);
    Buffer<G> dweight(V * C);
    std::vector<int64_t> expected(V * C, 3);
    dweight.fill(3);
    for (size_t i = 0; i < T * C; i++) {
        int value = int(hash64(8, i) % 5) - 2;
        dout[i] = E(value);
        expected[size_t(token[i / C]) * C + i % C] += value;
    }
    embedding_backward(Cpu(), dweight.data(), dout.data(), token.data(), T, C);
    bool equal = true;
    for (size_t i = 0; i < V * C; i++) equal = equal && double(dweight[i]) == double(G(float(expected[i])));
    CHECK(equal);
}
} // namespace

TEST_CASE("embedding: forward copies the rows") {
    for (auto [T, V, C] : sizes) {
        Buffer<int32_t> token = random_tokens(T, V);
        Buffer<bf16> weight(V * C, 1), out(T * C);
        embedding_forward(Cpu(), out.data(), token.data(), weight.data(), T, C);
        bool equal = true;
        for (size_t i = 0; i < T * C; i++)
            equal = equal && out[i].bits == weight[size_t(token[i / C]) * C + i % C].bits;
        CHECK(equal);
    }
}

TEST_CASE("embedding: backward adds the right integers to what is there") {
    for (auto [T, V, C] : sizes) {
        check_integer_sums<double, double>(T, V, C);
        check_integer_sums<float, float>(T, V, C);
        check_integer_sums<bf16, float>(T, V, C);
        check_integer_sums<bf16, bf16>(T, V, C);
    }
}

TEST_CASE("embedding: the gradient is that of finite differences") {
    const size_t T = 6, V = 3, C = 5;
    Buffer<int32_t> token = random_tokens(T, V);
    Buffer<double> weight(V * C, 1), out(T * C), dout(T * C, 2), dweight(V * C);
    dweight.fill(0);
    embedding_backward(Cpu(), dweight.data(), dout.data(), token.data(), T, C);
    auto f = [&] {
        embedding_forward(Cpu(), out.data(), token.data(), weight.data(), T, C);
        double sum = 0;
        for (size_t i = 0; i < T * C; i++) sum += dout[i] * out[i];
        return sum;
    };
    // The function is linear, so only rounding is left: 1e-16 of a sum of 30 terms, over h = 1e-5.
    for (size_t i = 0; i < V * C; i++) CHECK(std::fabs(finite_difference(f, weight.data(), i) - dweight[i]) < 1e-9);
}

TEST_CASE("embedding: a frequent token loses nothing in bf16") {
    // 1000 = 125 * 8 is a bf16; adding 1 a thousand times to a bf16 stops at 256.
    const size_t T = 1000, C = 3;
    Buffer<int32_t> token(T);
    token.fill(1);
    Buffer<bf16> dout(T * C), dweight(2 * C);
    dout.fill(1), dweight.fill(0);
    embedding_backward(Cpu(), dweight.data(), dout.data(), token.data(), T, C);
    for (size_t c = 0; c < C; c++) {
        CHECK(float(dweight[c]) == 0);
        CHECK(float(dweight[C + c]) == 1000);
    }
}

TEST_CASE("embedding: the threads do not change a bit") {
    const size_t T = 500, V = 11, C = 300;
    Buffer<int32_t> token = random_tokens(T, V);
    Buffer<float> dout(T * C, 1), one(V * C), many(V * C);
    one.fill(0), many.fill(0);
    int threads = omp_get_max_threads();
    omp_set_num_threads(1), embedding_backward(Cpu(), one.data(), dout.data(), token.data(), T, C);
    omp_set_num_threads(3), embedding_backward(Cpu(), many.data(), dout.data(), token.data(), T, C);
    omp_set_num_threads(threads);
    CHECK(largest_error(one, many) == 0);
}
