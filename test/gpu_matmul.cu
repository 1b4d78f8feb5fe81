// The GPU's products: exact sums, the 2x rule, bits, offsets beyond 32 bits, and the table of tuned algorithms.
#include "../layers/matmul.cuh"
#include "large.h"

namespace {
struct Size {
    size_t T, M, N;
};
// One channel, one token, rows off every alignment, tiles with a rest, whole tiles, a long sum in each role.
constexpr Size sizes[] = {{1, 1, 1},      {1, 17, 1},      {1, 1, 17},      {17, 1, 33},    {5, 17, 17},
                          {1, 256, 512},  {2, 300, 34},    {33, 8, 16},     {64, 64, 64},   {40, 3000, 48},
                          {40, 52, 3001}, {3003, 17, 40},  {130, 129, 131}, {257, 160, 96}, {264, 512, 136},
                          {2000, 64, 72}, {520, 264, 1032}};

// Integers in -3..3, exact in every type. The sum of up to 2^24 / 9 products is exact in fp32 in any order.
HOST_DEVICE float integer(uint64_t seed, size_t i) { return float(int(hash64(seed, i) % 7) - 3); }
template <class E> Buffer<E> integers(size_t count, uint64_t seed) {
    Buffer<E> x(count);
    for (size_t i = 0; i < count; i++) x[i] = E(integer(seed, i));
    return x;
}

// One linear layer's inputs and, after all(), its results on the Cpu in type R.
template <class E, class G> struct Layer {
    size_t T, M, N;
    Buffer<E> in, weight, bias, residual, dout, plain, out, din;
    Buffer<G> dweight, dbias;

    template <class Fill> Layer(Size s, Fill fill)
        : T(s.T), M(s.M), N(s.N), in(fill(E(), T * M, 1)), weight(fill(E(), N * M, 2)), bias(fill(E(), N, 3)),
          residual(fill(E(), T * N, 4)), dout(fill(E(), T * N, 5)), plain(T * N), out(T * N), din(T * M),
          dweight(fill(G(), N * M, 6)), dbias(fill(G(), N, 7)) {}
    template <class X, class Y> explicit Layer(const Layer<X, Y>& l)
        : T(l.T), M(l.M), N(l.N), in(converted<E>(l.in)), weight(converted<E>(l.weight)), bias(converted<E>(l.bias)),
          residual(converted<E>(l.residual)), dout(converted<E>(l.dout)), plain(T * N), out(T * N), din(T * M),
          dweight(converted<G>(l.dweight)), dbias(converted<G>(l.dbias)) {}
    void all() {
        matmul_forward(Cpu(), plain.data(), in.data(), weight.data(), (E*)nullptr, (E*)nullptr, T, M, N);
        matmul_forward(Cpu(), out.data(), in.data(), weight.data(), bias.data(), residual.data(), T, M, N);
        matmul_backward_input(Cpu(), din.data(), dout.data(), weight.data(), T, M, N);
        matmul_backward_weight(Cpu(), dweight.data(), dbias.data(), dout.data(), in.data(), T, M, N);
    }
};
struct Integers {
    template <class E> Buffer<E> operator()(E, size_t count, uint64_t seed) const { return integers<E>(count, seed); }
};
struct Normal {
    template <class E> Buffer<E> operator()(E, size_t count, uint64_t seed) const { return Buffer<E>(count, seed); }
};

// The same on the GPU.
template <class E, class G> struct GpuLayer {
    size_t T, M, N;
    DeviceBuffer<E> in, weight, bias, residual, dout, plain, with_bias, with_residual, out, aliased, din;
    DeviceBuffer<G> dweight, dbias, alone;

    explicit GpuLayer(const Layer<E, G>& l)
        : T(l.T), M(l.M), N(l.N), in(l.in), weight(l.weight), bias(l.bias), residual(l.residual), dout(l.dout),
          plain(T * N), with_bias(T * N), with_residual(T * N), out(T * N), aliased(l.residual), din(T * M),
          dweight(l.dweight), dbias(l.dbias), alone(l.dweight) {}
    void forward(E* to, const E* b, const E* r) {
        matmul_forward(the_gpu(), to, in.data(), weight.data(), b, r, T, M, N);
    }
    void all() {
        forward(plain, nullptr, nullptr), forward(with_bias, bias, nullptr), forward(with_residual, nullptr, residual);
        forward(out, bias, residual), forward(aliased, bias, aliased);
        matmul_backward_input(the_gpu(), din.data(), dout.data(), weight.data(), T, M, N);
        matmul_backward_weight(the_gpu(), dweight.data(), dbias.data(), dout.data(), in.data(), T, M, N);
        matmul_backward_weight(the_gpu(), alone.data(), (G*)nullptr, dout.data(), in.data(), T, M, N);
    }
};

// Sums of integers are exact, so every result is the exact sum, rounded once: bit for bit the Cpu's.
template <class E, class G> void check_exact(Size size) {
    CAPTURE(size.T);
    CAPTURE(size.M);
    CAPTURE(size.N);
    Layer<E, G> cpu(size, Integers());
    GpuLayer<E, G> gpu(cpu);
    cpu.all(), gpu.all();
    CHECK(largest_error(gpu.plain.host(), cpu.plain) == 0);
    CHECK(largest_error(gpu.out.host(), cpu.out) == 0);
    CHECK(largest_error(gpu.aliased.host(), cpu.out) == 0);
    CHECK(largest_error(gpu.din.host(), cpu.din) == 0);
    CHECK(largest_error(gpu.dweight.host(), cpu.dweight) == 0);
    CHECK(largest_error(gpu.alone.host(), cpu.dweight) == 0);
    CHECK(largest_error(gpu.dbias.host(), cpu.dbias) == 0);
    const E* none = nullptr;
    matmul_forward(Cpu(), cpu.out.data(), cpu.in.data(), cpu.weight.data(), cpu.bias.data(), none, size.T, size.M,
                   size.N);
    CHECK(largest_error(gpu.with_bias.host(), cpu.out) == 0);
    matmul_forward(Cpu(), cpu.out.data(), cpu.in.data(), cpu.weight.data(), none, cpu.residual.data(), size.T, size.M,
                   size.N);
    CHECK(largest_error(gpu.with_residual.host(), cpu.out) == 0);
}

// What the tensor cores make of dweight: 16 products at a time are added to the sum exactly, then what is beyond a
// float's 24 bits is cut off, not rounded. Only a float result is fine enough to show it.
Buffer<float> cut_sums(const Layer<bf16, float>& l) {
    Buffer<float> dweight(l.N * l.M);
    for (size_t n = 0; n < l.N; n++)
        for (size_t m = 0; m < l.M; m++) {
            float sum = 0;
            for (size_t t0 = 0; t0 < l.T; t0 += 16) {
                double exact = sum;
                for (size_t t = t0; t < std::min(l.T, t0 + 16); t++)
                    exact += double(l.dout[t * l.N + n]) * double(l.in[t * l.M + m]);
                sum = float(exact);
                if (std::fabs(sum) > std::fabs(exact)) sum = std::nextafter(sum, 0.f);
            }
            dweight[n * l.M + m] = l.dweight[n * l.M + m] + sum;
        }
    return dweight;
}

template <class E, class G> void check_normal(Size size) {
    CAPTURE(size.T);
    CAPTURE(size.M);
    CAPTURE(size.N);
    Layer<E, G> cpu(size, Normal());
    Layer<double, double> truth(cpu);
    GpuLayer<E, G> gpu(cpu);
    cpu.all(), truth.all(), gpu.all();
    check_2x(gpu.plain.host(), cpu.plain, truth.plain);
    check_2x(gpu.out.host(), cpu.out, truth.out);
    check_2x(gpu.aliased.host(), cpu.out, truth.out);
    check_2x(gpu.din.host(), cpu.din, truth.din);
    if constexpr (std::is_same_v<E, bf16> && std::is_same_v<G, float>)
        check_2x(gpu.dweight.host(), cut_sums(Layer<E, G>(size, Normal())), truth.dweight);
    else check_2x(gpu.dweight.host(), cpu.dweight, truth.dweight);
    check_2x(gpu.dbias.host(), cpu.dbias, truth.dbias);
}

template <class E> __global__ void fill_integers(E* x, size_t count, uint64_t seed) {
    for (size_t i = blockIdx.x * size_t(blockDim.x) + threadIdx.x; i < count; i += size_t(gridDim.x) * blockDim.x)
        x[i] = E(integer(seed, i));
}

// A matrix in the GPU's memory, poisoned, or with a seed at first of integers that the host can compute.
template <class E> struct Hashed {
    LargeBuffer<E> x;
    size_t columns;
    uint64_t seed = 0;
    Hashed(size_t rows, size_t columns) : x(rows * columns), columns(columns) {}
    Hashed(size_t rows, size_t columns, uint64_t seed) : x(rows * columns), columns(columns), seed(seed) {
        fill_integers<<<4096, 256, 0, the_gpu().stream>>>(x.data(), rows * columns, seed);
        CUDA_CHECK(cudaGetLastError());
    }
    E* data() { return x.data(); }
    double at(size_t row, size_t column) const { return integer(seed, row * columns + column); }
    Buffer<E> row(size_t r) { return x.part(r * columns, columns); } // as it is now
};

// Both ends, where an element's number passes 2^31 and 2^32, and some fifty more.
std::vector<size_t> sampled(size_t rows, size_t columns) {
    std::vector<size_t> at = {0, rows / 2, rows - 1};
    for (size_t edge : {size_t(1) << 31, size_t(1) << 32})
        for (size_t row : {edge / columns, edge / columns + 1})
            if (row < rows) at.push_back(row);
    for (size_t i = 0; i < 50; i++) at.push_back(hash64(10, i) % rows);
    return at;
}

// Wrong elements of a row, among the sampled columns; sum(column) is what the element should be, rounded once.
template <class E, class F> size_t wrong_in_row(Hashed<E>& result, size_t row, size_t rows, F sum) {
    const Buffer<E> values = result.row(row);
    size_t wrong = 0;
    for (size_t column : sampled(result.columns, rows)) wrong += float(values[column]) != float(E(float(sum(column))));
    return wrong;
}

// All three products, sampled results against exact sums.
template <class G> void check_large(size_t T, size_t M, size_t N) {
    const Gpu gpu = the_gpu();
    const bf16* none = nullptr;
    Hashed<bf16> in(T, M, 1), weight(N, M, 2), dout(T, N, 5), out(T, N), din(T, M);
    Hashed<G> dweight(N, M, 6), dbias(1, N, 7);
    matmul_forward(gpu, out.data(), in.data(), weight.data(), none, none, T, M, N);
    matmul_backward_input(gpu, din.data(), dout.data(), weight.data(), T, M, N);
    matmul_backward_weight(gpu, dweight.data(), dbias.data(), dout.data(), in.data(), T, M, N);
    const std::vector<size_t> tokens = sampled(T, N), channels = sampled(N, M);
    size_t wrong = 0;
    for (size_t i = 0; i < 10; i++) {
        const size_t t = tokens[i], n = channels[i];
        wrong += wrong_in_row(out, t, T, [&](size_t n) {
            double sum = 0;
            for (size_t m = 0; m < M; m++) sum += in.at(t, m) * weight.at(n, m);
            return sum;
        });
        wrong += wrong_in_row(din, t, T, [&](size_t m) {
            double sum = 0;
            for (size_t n = 0; n < N; n++) sum += dout.at(t, n) * weight.at(n, m);
            return sum;
        });
        if (i >= 5) continue; // a sum over a million tokens takes its time
        wrong += wrong_in_row(dweight, n, N, [&](size_t m) {
            double sum = dweight.at(n, m);
            for (size_t t = 0; t < T; t++) sum += dout.at(t, n) * in.at(t, m);
            return sum;
        });
        double sum = dbias.at(0, n);
        for (size_t t = 0; t < T; t++) sum += dout.at(t, n);
        wrong += float(dbias.row(0)[n]) != float(G(float(sum)));
    }
    CHECK(wrong == 0);
}

// A second table on the same GPU.
struct OtherTable {
    GpuContext context = *the_gpu().context;
    Gpu gpu{the_gpu().stream, &context};
    OtherTable() { context.matmul = nullptr; }
};

int lines(const std::string& text) { return int(std::count(text.begin(), text.end(), '\n')); }
} // namespace

TEST_CASE("gpu matmul: sums of integers are exact and rounded once") {
    for (Size size : sizes) {
        check_exact<float, float>(size);
        check_exact<bf16, bf16>(size);
        check_exact<bf16, float>(size);
    }
}

TEST_CASE("gpu matmul: normal values by the 2x rule") {
    for (Size size : sizes) {
        check_normal<float, float>(size);
        check_normal<bf16, bf16>(size);
        check_normal<bf16, float>(size);
    }
}

TEST_CASE("gpu matmul: float is float: no TF32, which would keep 11 bits") {
    const size_t T = 128, M = 256, N = 128;
    Layer<float, float> cpu({T, M, N}, Integers());
    for (size_t i = 0; i < T * M; i++) cpu.in[i] *= 1 + 0x1p-13f; // exact in float, lost in TF32
    GpuLayer<float, float> gpu(cpu);
    cpu.all(), gpu.all();
    CHECK(largest_error(gpu.plain.host(), cpu.plain) == 0);
    CHECK(largest_error(gpu.dweight.host(), cpu.dweight) == 0);
}

TEST_CASE("gpu matmul: pointers that are aligned to one element only (small)") {
    const size_t T = 48, M = 64, N = 72;
    Layer<bf16, bf16> cpu({T, M, N}, Integers());
    cpu.all();
    auto shifted = [](const Buffer<bf16>& x) { // one element further on
        Buffer<bf16> to(x.count + 1);
        for (size_t i = 0; i < x.count; i++) to[i + 1] = x[i];
        return to;
    };
    DeviceBuffer<bf16> in(shifted(cpu.in)), weight(shifted(cpu.weight)), bias(shifted(cpu.bias));
    DeviceBuffer<bf16> dout(shifted(cpu.dout)), residual(shifted(cpu.residual));
    DeviceBuffer<bf16> out(Buffer<bf16>(T * N + 1)), din(Buffer<bf16>(T * M + 1));
    Buffer<bf16> zeros(N * M), zero(N);
    zeros.fill(0), zero.fill(0);
    DeviceBuffer<bf16> dweight(shifted(zeros)), dbias(shifted(zero));
    const Gpu gpu = the_gpu();
    matmul_forward(gpu, out + 1, in + 1, weight + 1, bias + 1, residual + 1, T, M, N);
    matmul_backward_input(gpu, din + 1, dout + 1, weight + 1, T, M, N);
    matmul_backward_weight(gpu, dweight + 1, dbias + 1, dout + 1, in + 1, T, M, N);
    matmul_backward_weight(Cpu(), zeros.data(), zero.data(), cpu.dout.data(), cpu.in.data(), T, M, N);
    CHECK(largest_error(out.host().data() + 1, cpu.out.data(), T * N) == 0);
    CHECK(largest_error(din.host().data() + 1, cpu.din.data(), T * M) == 0);
    CHECK(largest_error(dweight.host().data() + 1, zeros.data(), N * M) == 0);
    CHECK(largest_error(dbias.host().data() + 1, zero.data(), N) == 0);
}

TEST_CASE("gpu matmul: no token is no work (small)") {
    Buffer<float> kept(6, 1);
    DeviceBuffer<float> x(kept);
    matmul_forward(the_gpu(), x.data(), x.data(), x.data(), (float*)nullptr, (float*)nullptr, 0, 2, 3);
    matmul_backward_input(the_gpu(), x.data(), x.data(), x.data(), 0, 2, 3);
    matmul_backward_weight(the_gpu(), x.data(), x.data(), x.data(), x.data(), 0, 2, 3);
    CHECK(same_bits(x.host(), kept));
}

TEST_CASE("gpu matmul: the bits are the same in every run, whatever the scratch memory held") {
    for (Size size : {Size{5, 17, 17}, {64, 4096, 64}, {4099, 40, 48}, {130, 129, 131}}) {
        Layer<bf16, float> cpu(size, Normal());
        GpuLayer<bf16, float> first(cpu);
        first.all();
        for (int run = 0; run < 4; run++) {
            CUDA_CHECK(cudaMemsetAsync(the_gpu().context->scratch, 0xff * (run % 2), GpuContext::scratch_bytes,
                                       the_gpu().stream));
            GpuLayer<bf16, float> again(cpu);
            again.all();
            CHECK(same_bits(first.out.host(), again.out.host()));
            CHECK(same_bits(first.din.host(), again.din.host()));
            CHECK(same_bits(first.dweight.host(), again.dweight.host()));
            CHECK(same_bits(first.dbias.host(), again.dbias.host()));
        }
    }
}

TEST_CASE("gpu matmul: tuned algorithms give right results, and serve what comes after") {
    const Size size = {264, 512, 136};
    const Layer<bf16, float> start(size, Integers());
    Layer<bf16, float> cpu(size, Integers());
    cpu.all();
    OtherTable table;
    CHECK(matmul_algos_text(table.gpu).empty());
    std::swap(table.context.matmul, the_gpu().context->matmul); // from here on, GpuLayer works on the new table
    const Gpu gpu = the_gpu();
    matmul_tune(gpu, [&] { GpuLayer<bf16, float>(start).all(); });
    const std::string text = matmul_algos_text(gpu);
    CHECK(lines(text) == 6); // four kinds of forward, the two gradients
    GpuLayer<bf16, float> again(start);
    again.all();
    CHECK(matmul_algos_text(gpu) == text);
    CHECK(largest_error(again.out.host(), cpu.out) == 0);
    CHECK(largest_error(again.aliased.host(), cpu.out) == 0);
    CHECK(largest_error(again.din.host(), cpu.din) == 0);
    CHECK(largest_error(again.dweight.host(), cpu.dweight) == 0);
    std::swap(table.context.matmul, the_gpu().context->matmul);

    CHECK(matmul_algos_read(table.gpu, "") == 0);
    OtherTable fresh;
    CHECK(matmul_algos_read(fresh.gpu, text) == 6);
    CHECK(matmul_algos_text(fresh.gpu) == text);
    CHECK(matmul_algos_read(fresh.gpu, text) == 6); // the same once more
    CHECK(matmul_algos_text(fresh.gpu) == text);
}

// A long sum cut into different numbers of parts gives different bits: those of each algorithm must come back when it
// is read.
TEST_CASE("gpu matmul: the algorithm that was read is the one that runs") {
    const size_t T = 8192, M = 64, N = 64;
    Buffer<float> zero(N * M);
    zero.fill(0);
    DeviceBuffer<bf16> in(Buffer<bf16>(T * M, 1)), dout(Buffer<bf16>(T * N, 2));
    DeviceBuffer<float> direct(zero), through(zero);
    const bf16* none = nullptr;
    MatmulProduct x = matmul_product(MatmulKind::backward_weight, T, M, N, direct.data(), in.data(), dout.data(), none,
                                     (const float*)direct.data());
    OtherTable table;
    std::vector<Buffer<float>> results;
    const MatmulAlgo guess = matmul_guesses(table.gpu, x)[0];
    for (int32_t parts : {1, 2, 4, 8}) {
        MatmulAlgo a = guess;
        const uint32_t reduction = parts == 1 ? uint32_t(CUBLASLT_REDUCTION_SCHEME_NONE) : matmul_reductions;
        CUBLAS_CHECK(
            cublasLtMatmulAlgoConfigSetAttribute(&a.algo, CUBLASLT_ALGO_CONFIG_SPLITK_NUM, &parts, sizeof parts));
        CUBLAS_CHECK(cublasLtMatmulAlgoConfigSetAttribute(&a.algo, CUBLASLT_ALGO_CONFIG_REDUCTION_SCHEME, &reduction,
                                                          sizeof reduction));
        if (!matmul_can_run(table.gpu, x, a.algo)) continue;
        direct.set(zero), through.set(zero);
        CUBLAS_CHECK(matmul_launch(table.gpu, x, a.algo));
        CHECK(matmul_algos_read(table.gpu, matmul_algo_line(table.gpu, a)) == 1);
        matmul_backward_weight(table.gpu, through.data(), (float*)nullptr, dout.data(), in.data(), T, M, N);
        CHECK(same_bits(direct.host(), through.host()));
        bool seen = false;
        for (const Buffer<float>& r : results) seen = seen || same_bits(r, direct.host());
        if (!seen) results.push_back(direct.host());
    }
    CHECK(results.size() > 1); // else the comparison could not fail
}

TEST_CASE("gpu matmul: text that was altered, or is of another GPU or library, is refused") {
    const size_t T = 16, M = 32, N = 24;
    DeviceBuffer<bf16> in(Buffer<bf16>(T * M, 1)), weight(Buffer<bf16>(N * M, 2)), out(T * N);
    const bf16* none = nullptr;
    OtherTable table, fresh, other;
    matmul_tune(table.gpu,
                [&] { matmul_forward(table.gpu, out.data(), in.data(), weight.data(), none, none, T, M, N); });
    const std::string text = matmul_algos_text(table.gpu);
    CHECK(lines(text) == 1);
    for (size_t i = 0; i < text.size(); i++) {
        std::string altered = text;
        altered[i] = altered[i] == '1' ? '2' : '1';
        CHECK(matmul_algos_read(fresh.gpu, altered) == 0);
        CHECK(matmul_algos_read(fresh.gpu, text.substr(0, i)) == 0);
    }
    CHECK(matmul_algos_read(fresh.gpu, "matmul\n\n\nnot a line\n" + std::string(1000, 'f') + "\n") == 0);
    snprintf(other.context.name, sizeof other.context.name, "another GPU");
    CHECK(matmul_algos_read(other.gpu, text) == 0);
    MatmulAlgo nonsense = {};
    nonsense.key = {MatmulKind::forward, T, M, N, Type::bf16, Type::bf16, 0, 0, 16};
    CHECK(matmul_algos_read(fresh.gpu, matmul_algo_line(fresh.gpu, nonsense)) == 0);
    CHECK(matmul_algos_text(fresh.gpu).empty());
    CHECK(matmul_algos_read(fresh.gpu, "rubbish\n" + text + text.substr(0, 40)) == 1);
}

TEST_CASE("gpu matmul: more than 2^32 results, of a million tokens (large)") {
    check_large<float>(size_t(1) << 20, 40, 4104);
}
TEST_CASE("gpu matmul: a weight of more than 2^31 elements (large)") { check_large<bf16>(8, 16384, 152064); }
