// Embedding on the GPU: exact copies forward, exact integer sums backward.
#include "../layers/embedding.cuh"
#include "large.h"

namespace {
struct Size {
    size_t T, V, C;
};
// A single token and channel, rows that do not start on 16 bytes, strips of channels, a vocabulary of one, runs around
// the longest of a warp and such as are cut into parts, no token at all.
constexpr Size sizes[] = {{1, 1, 1},     {17, 5, 17},     {1000, 7, 3},   {40, 1, 256},    {33, 50, 257},
                          {9, 4, 600},   {0, 3, 5},       {32, 1, 8},     {64, 2, 1},      {5000, 3, 72},
                          {96, 40, 8},   {1, 9, 4096},    {20, 3, 4104},  {3000, 1, 1032}, {777, 2, 40},
                          {50000, 9, 8}, {2600, 80, 264}, {9000, 5, 2080}};

std::vector<int32_t> random_tokens(size_t T, size_t V) {
    std::vector<int32_t> token(T);
    for (size_t t = 0; t < T; t++) token[t] = int32_t(hash64(7, t) % V);
    return token;
}

// As in text: id v about 1 / v as often as the most frequent one.
std::vector<int32_t> text_tokens(size_t T, size_t V) {
    std::vector<int32_t> token(T);
    for (size_t t = 0; t < T; t++) token[t] = int32_t(std::pow(double(V), hash_uniform(9, t))) - 1;
    return token;
}

// An order in device memory too.
struct DeviceOrder : TokenOrder {
    DeviceBuffer<uint8_t> memory;

    explicit DeviceOrder(const std::vector<int32_t>& token)
        : TokenOrder(token_order(token)), memory(token_order_bytes(Gpu(), token.size())) {
        token_order_upload(the_gpu(), *this, memory.data());
    }
};

template <class E, class G> void check_integer_sums(size_t T, size_t V, size_t C, const std::vector<int32_t>& token) {
    CAPTURE(T);
    CAPTURE(V);
    CAPTURE(C);
    Buffer<E> dout(T * C);
    Buffer<G> dweight(V * C);
    std::vector<int64_t> expected(V * C, 3);
    dweight.fill(3);
    for (size_t i = 0; i < T * C; i++) {
        int value = int(hash64(8, i) % 5) - 2;
        dout[i] = E(float(value));
        expected[size_t(token[i / C]) * C + i % C] += value;
    }
    DeviceBuffer<E> dout_gpu(dout);
    DeviceBuffer<G> dweight_gpu(dweight);
    const DeviceOrder order(token);
    embedding_backward(the_gpu(), dweight_gpu.data(), dout_gpu.data(), order, C);
    Buffer<G> result = dweight_gpu.host();
    bool equal = true;
    for (size_t i = 0; i < V * C; i++) equal = equal && float(result[i]) == float(G(float(expected[i])));
    CHECK(equal);
}
} // namespace

TEST_CASE("gpu embedding: forward copies the rows") {
    auto check = [](auto element, size_t T, size_t V, size_t C, size_t shift) {
        using E = decltype(element);
        CAPTURE(T);
        CAPTURE(V);
        CAPTURE(C);
        CAPTURE(shift);
        const DeviceOrder order(random_tokens(T, V));
        Buffer<E> weight(V * C, 1), out(T * C + shift);
        DeviceBuffer<E> weight_gpu(weight), out_gpu(out);
        embedding_forward(Cpu(), out.data() + shift, order, weight.data(), C);
        embedding_forward(the_gpu(), out_gpu.data() + shift, order, weight_gpu.data(), C);
        CHECK(same_bits(out_gpu.host(), out));
    };
    for (auto [T, V, C] : sizes)
        for (size_t shift : {0, 1}) check(bf16(0), T, V, C, shift), check(float(), T, V, C, shift);
}

// Each forward reads what the one before wrote and overwrites what it read, and every second order comes just before
// it: a kernel that starts early must wait for all of that.
TEST_CASE("gpu embedding: forward comes after the kernel and the copy before it (small)") {
    const size_t T = 3000, C = 520, orders = 5;
    Buffer<bf16> x[2] = {Buffer<bf16>(T * C, 1), Buffer<bf16>(T * C)};
    DeviceBuffer<bf16> first(x[0]), second(x[1]);
    bf16* x_gpu[2] = {first, second};
    DeviceBuffer<uint8_t> memory(token_order_bytes(Gpu(), T));
    std::vector<TokenOrder> order;
    for (size_t k = 0; k < orders; k++) {
        std::vector<int32_t> token(T);
        for (size_t t = 0; t < T; t++) token[t] = int32_t(hash64(20 + k, t) % T);
        order.push_back(token_order(token));
    }
    for (size_t i = 0; i < 2 * orders; i++) {
        if (i % 2 == 0) token_order_upload(the_gpu(), order[i / 2], memory.data());
        embedding_forward(the_gpu(), x_gpu[(i + 1) % 2], order[i / 2], x_gpu[i % 2], C);
    }
    for (size_t i = 0; i < 2 * orders; i++)
        embedding_forward(Cpu(), x[(i + 1) % 2].data(), order[i / 2], x[i % 2].data(), C);
    CHECK(same_bits(first.host(), x[0]));
    CHECK(same_bits(second.host(), x[1]));
}

TEST_CASE("gpu embedding: backward adds the right integers to what is there") {
    for (auto [T, V, C] : sizes) {
        check_integer_sums<float, float>(T, V, C, random_tokens(T, V));
        check_integer_sums<bf16, float>(T, V, C, random_tokens(T, V));
        check_integer_sums<bf16, bf16>(T, V, C, random_tokens(T, V));
    }
    check_integer_sums<bf16, float>(16384, 32000, 136, text_tokens(16384, 32000));
    check_integer_sums<bf16, bf16>(16384, 32000, 136, text_tokens(16384, 32000));
}

TEST_CASE("gpu embedding: a frequent token loses nothing in bf16 (small)") {
    const FreshScratch scratch;
    const size_t T = 1000, C = 3;
    Buffer<bf16> dout(T * C), dweight(2 * C);
    dout.fill(1), dweight.fill(0);
    DeviceBuffer<bf16> dout_gpu(dout), dweight_gpu(dweight);
    const DeviceOrder order(std::vector<int32_t>(T, 1));
    embedding_backward(the_gpu(), dweight_gpu.data(), dout_gpu.data(), order, C);
    Buffer<bf16> result = dweight_gpu.host();
    for (size_t c = 0; c < C; c++) {
        CHECK(float(result[c]) == 0);
        CHECK(float(result[C + c]) == 1000);
    }
}

TEST_CASE("gpu embedding: as good as the CPU, and the same bits every time (small)") {
    const FreshScratch scratch;
    const size_t T = 4000, V = 300, C = 520;
    const DeviceOrder order(text_tokens(T, V));
    Buffer<bf16> dout(T * C, 1), cpu(V * C, 2);
    const Buffer<bf16> before(V * C, 2);
    Buffer<double> dout_double = converted<double>(dout), truth = converted<double>(before);
    embedding_backward(Cpu(), cpu.data(), dout.data(), order, C);
    embedding_backward(Cpu(), truth.data(), dout_double.data(), order, C);
    DeviceBuffer<bf16> dout_gpu(dout), dweight(before);
    embedding_backward(the_gpu(), dweight.data(), dout_gpu.data(), order, C);
    const Buffer<bf16> first = dweight.host();
    check_2x(first, cpu, truth);
    for (int i = 0; i < 5; i++) {
        dweight.set(before);
        embedding_backward(the_gpu(), dweight.data(), dout_gpu.data(), order, C);
        CHECK(same_bits(dweight.host(), first));
    }
}

TEST_CASE("gpu embedding: beyond 2^32 elements (large)") {
    const size_t C = 16384, T = (size_t(1) << 32) / C + 1000, V = (size_t(1) << 31) / C + 2000;
    std::vector<int32_t> token(T);
    for (size_t t = 0; t < T; t++) token[t] = int32_t(hash64(7, t) % 3 ? hash64(8, t) % V : V - 1);
    token[0] = token[T - 1] = int32_t(V - 2);
    const DeviceOrder order(token);
    LargeBuffer<bf16> weight(V * C, 1), out(T * C);
    embedding_forward(the_gpu(), out.data(), order, weight.data(), C);
    for (size_t t : {size_t(0), (size_t(1) << 31) / C, T / 2, T - 1})
        CHECK(same_bits(out.part(t * C, C), weight.part(size_t(token[t]) * C, C)));

    // Some rare ids: a sample of the channels of every row that has the id.
    const size_t sample = 64;
    size_t middle = T / 2;
    while (size_t(token[middle]) == V - 1) middle++;
    for (size_t id : {size_t(token[0]), size_t(token[middle])})
        for (size_t c : {size_t(0), C / 2, C - sample}) {
            const Buffer<double> old = converted<double>(weight.part(id * C + c, sample));
            std::vector<double> truth(old.data(), old.data() + sample), magnitude(sample);
            double terms = 1;
            for (size_t i = 0; i < sample; i++) magnitude[i] = std::fabs(truth[i]);
            for (size_t t = 0; t < T; t++) {
                if (size_t(token[t]) != id) continue;
                const Buffer<double> row = converted<double>(out.part(t * C + c, sample));
                for (size_t i = 0; i < sample; i++) truth[i] += row[i], magnitude[i] += std::fabs(row[i]);
                terms++;
            }
            embedding_backward(the_gpu(), weight.data(), out.data(), order, C);
            const Buffer<double> result = converted<double>(weight.part(id * C + c, sample));
            for (size_t i = 0; i < sample; i++) // sums in fp32, one rounding to bf16
                CHECK(std::fabs(result[i] - truth[i]) <= terms * 0x1p-24 * magnitude[i] + ulp<bf16>(truth[i]) / 2);
        }

    // The frequent one: every gradient 95/512 (0x3e3e), so that fp32 sums of them are exact up to 2^24 / 95 terms.
    CUDA_CHECK(cudaMemset(out, 0x3e, T * C * sizeof(bf16)));
    Buffer<bf16> zero(C);
    zero.fill(0);
    weight.set((V - 1) * C, zero);
    const size_t count = size_t(std::count(token.data(), token.data() + T, int32_t(V - 1)));
    CHECK(count > 80000);
    CHECK(count < (1 << 24) / 95);
    embedding_backward(the_gpu(), weight.data(), out.data(), order, C);
    const Buffer<bf16> result = weight.part((V - 1) * C, C);
    bool equal = true;
    for (size_t c = 0; c < C; c++) equal = equal && float(result[c]) == float(bf16(float(count) * 95 / 512));
    CHECK(equal);
}
