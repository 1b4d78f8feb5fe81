// Embedding: exact copies forward, exact integer sums backward.
#include "../layers/embedding.cuh"
#include "check.h"
#include <omp.h>
#include <tuple>

namespace {
struct Size {
    size_t T, V, C;
};
// A single token and channel, channels below, at and above a block of 256, a vocabulary of one, no token at all.
constexpr Size sizes[] = {{1, 1, 1}, {17, 5, 17}, {1000, 7, 3}, {40, 1, 256}, {33, 50, 257}, {9, 4, 600}, {0, 3, 5}};

std::vector<int32_t> random_tokens(size_t T, size_t V) {
    std::vector<int32_t> token(T);
    for (size_t t = 0; t < T; t++) token[t] = int32_t(hash64(7, t) % V);
    return token;
}

template <class E, class G> void check_integer_sums(size_t T, size_t V, size_t C) {
    std::vector<int32_t> token = random_tokens(T, V);
    Buffer<E> dout(T * C);
    Buffer<G> dweight(V * C);
    std::vector<int64_t> expected(V * C, 3);
    dweight.fill(3);
    for (size_t i = 0; i < T * C; i++) {
        int value = int(hash64(8, i) % 5) - 2;
        dout[i] = E(value);
        expected[size_t(token[i / C]) * C + i % C] += value;
    }
    embedding_backward(Cpu(), dweight.data(), dout.data(), token_order(token), C);
    bool equal = true;
    for (size_t i = 0; i < V * C; i++) equal = equal && double(dweight[i]) == double(G(float(expected[i])));
    CHECK(equal);
}
} // namespace

TEST_CASE("embedding: the order holds every token once, in pieces of even work that fit their memory") {
    // Runs of every length around a piece's and a warp's, and ids that stand in a 20th, a third and all of the tokens.
    std::vector<std::vector<int32_t>> batches = {{}, {5}, std::vector<int32_t>(20000, 3)};
    for (auto [T, V] : {std::pair<size_t, size_t>{1000, 7}, {1000, 1000}, {5000, 300}, {40000, 4}, {70000, 2000}})
        batches.push_back(random_tokens(T, V));
    std::vector<int32_t>& lengths = batches.emplace_back();
    for (int32_t id = 0; id < 70; id++) lengths.insert(lengths.end(), size_t(id), id);
    std::vector<int32_t>& text = batches.emplace_back(random_tokens(30000, 20000));
    for (size_t t = 0; t < text.size(); t++) text[t] = t % 3 == 0 ? 7 : t % 20 == 1 ? 12345 : text[t];

    for (const std::vector<int32_t>& token : batches) {
        const size_t T = token.size();
        CAPTURE(T);
        const TokenOrder o = token_order(token);
        CHECK(o.token.size() == T);
        std::vector<int32_t> count(20001), seen(T);
        for (int32_t id : token) count[id]++;
        bool sorted = true;
        for (size_t i = 0; i < T; i++) {
            const TokenAt a = o.token[i], b = o.token[i + 1 < T ? i + 1 : i];
            seen[a.position]++;
            sorted = sorted && token[a.position] == a.id;
            sorted = sorted && std::tuple(-count[a.id], a.id, a.position) <= std::tuple(-count[b.id], b.id, b.position);
        }
        CHECK(sorted);
        CHECK(seen == std::vector<int32_t>(T, 1));

        const size_t pieces = o.piece.size() - 1;
        CHECK(o.piece.back() == int32_t(T));
        CHECK(o.parts <= TokenOrder::parts_most);
        CHECK(token_order_bytes(Gpu(), T) >= T * sizeof(TokenAt) + o.piece.size() * sizeof(int32_t));
        bool even = true;
        for (size_t k = 0; k < pieces; k++) {
            const int32_t begin = o.piece[k], end = o.piece[k + 1], n = end - begin, run = count[o.token[begin].id];
            const bool whole = (begin == 0 || o.token[begin - 1].id != o.token[begin].id) &&
                               (end == int32_t(T) || o.token[end].id != o.token[end - 1].id);
            const bool single = o.token[begin].id == o.token[end - 1].id;
            even = even && n > 0 && (single || n <= TokenOrder::together) && whole == (k >= o.parts);
            even = even && (k < o.longs) == (run > TokenOrder::alone);
            if (k < o.longs) even = even && n <= std::max(1024, int32_t(T / 8));
        }
        CHECK(even);
    }
}

TEST_CASE("embedding: forward copies the rows") {
    for (auto [T, V, C] : sizes) {
        std::vector<int32_t> token = random_tokens(T, V);
        Buffer<bf16> weight(V * C, 1), out(T * C);
        embedding_forward(Cpu(), out.data(), token_order(token), weight.data(), C);
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
    const TokenOrder order = token_order(random_tokens(T, V));
    Buffer<double> weight(V * C, 1), out(T * C), dout(T * C, 2), dweight(V * C);
    dweight.fill(0);
    embedding_backward(Cpu(), dweight.data(), dout.data(), order, C);
    auto f = [&] {
        embedding_forward(Cpu(), out.data(), order, weight.data(), C);
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
    Buffer<bf16> dout(T * C), dweight(2 * C);
    dout.fill(1), dweight.fill(0);
    embedding_backward(Cpu(), dweight.data(), dout.data(), token_order(std::vector<int32_t>(T, 1)), C);
    for (size_t c = 0; c < C; c++) {
        CHECK(float(dweight[c]) == 0);
        CHECK(float(dweight[C + c]) == 1000);
    }
}

TEST_CASE("embedding: the threads do not change a bit") {
    const size_t T = 500, V = 11, C = 300;
    const TokenOrder order = token_order(random_tokens(T, V));
    Buffer<float> dout(T * C, 1), one(V * C), many(V * C);
    one.fill(0), many.fill(0);
    int threads = omp_get_max_threads();
    omp_set_num_threads(1), embedding_backward(Cpu(), one.data(), dout.data(), order, C);
    omp_set_num_threads(3), embedding_backward(Cpu(), many.data(), dout.data(), order, C);
    omp_set_num_threads(threads);
    CHECK(largest_error(one, many) == 0);
}
