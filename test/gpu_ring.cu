// The ring on GPUs, alone and under mpirun -np 2..4: forward and backward against the CPU's double reference on one
// rank, by the 2x rule, in every mode, by every exchange and by both ways that data take. Ranks may share a GPU; NCCL
// is left out then.
#define DOCTEST_CONFIG_IMPLEMENT
#include "../core/arena.h"
#include "gpu_ranks.h"
#include "ring_case.h"

namespace {
Comm alone;
constexpr size_t peer_bytes = size_t(64) << 20;

// The scratch in the shared memory, at the same places on every rank; between guards, which the destructor looks at.
template <class E> struct SharedScratch : RingScratch<E> {
    static constexpr int poison = 0xff; // NaN in float and bf16
    std::vector<uint8_t*> guards;
    Arena arena{peer_memory, 0, {}};
    explicit SharedScratch(const RingScratchSizes& n) {
        CUDA_CHECK(cudaMemsetAsync(peer_memory, poison, peer_bytes, the_gpu().stream));
        take(this->state, n.state), take(this->anchor, n.anchor), take(this->send, n.send);
        take(this->receive, n.receive), take(this->gathered, n.gathered);
        take(this->delta, n.delta), take(this->dkv, n.dkv), take(this->danchor, n.danchor);
        take(this->dgathered, n.dgathered), take(this->dkv_send, n.dkv_send), take(this->dkv_receive, n.dkv_receive);
        CHECK(arena.used <= peer_bytes);
    }
    template <class X> void take(X*& buffer, size_t count) {
        buffer = arena.take<X>("scratch", count);
        guards.push_back(arena.take<uint8_t>("guard", Arena::alignment));
    }
    ~SharedScratch() {
        bool intact = true;
        std::vector<uint8_t> guard(Arena::alignment);
        for (const uint8_t* at : guards) {
            copy_to_host(the_gpu(), guard.data(), at, guard.size());
            for (uint8_t byte : guard) intact &= byte == poison;
        }
        CHECK_MESSAGE(intact, "a guard was overwritten");
    }
};

template <class E>
Result<E> attend_gpu(const Comm& comm, const Case& c, RingPlan& plan, const Buffer<E>& qkv, const Buffer<E>& dout) {
    const Gpu gpu = the_gpu();
    const Sizes z = c.z;
    const size_t T = plan.local.size(), B = plan.local.rows(), W = z.qkv(), O = z.H * z.D;
    DeviceBuffer<E> local_qkv(local_rows(plan, qkv, c.S, W)), local_dout(local_rows(plan, dout, c.S, O));
    DeviceBuffer<E> out(T * O), dqkv(T * W);
    DeviceBuffer<float> lse(T * z.H);
    DeviceBuffer<uint8_t> memory(ring_plan_bytes(gpu, T, comm.size, B));
    ring_plan_upload(gpu, plan, memory.data(), memory.count);
    SharedScratch<E> scratch(ring_scratch_sizes(gpu, {plan.backend, plan.held}, T, comm.size, B, z.H, z.K, z.D));
    ring_attention_forward(gpu, comm, plan, out.data(), lse.data(), local_qkv.data(), scratch, z.H, z.K, z.D);
    CUDA_CHECK(cudaMemsetAsync(scratch.state, SharedScratch<E>::poison, T * O * sizeof(float), gpu.stream));
    ring_attention_backward(gpu, comm, plan, dqkv.data(), local_dout.data(), out.data(), lse.data(), local_qkv.data(),
                            scratch, z.H, z.K, z.D);
    device_wait(gpu);
    return {out.host(), dqkv.host(), local_lse(comm, plan, lse.host(), z.H)};
}

// Columns [first, last) of rows of `width`.
template <class E> Buffer<E> columns(const Buffer<E>& x, size_t width, size_t first, size_t last) {
    Buffer<E> to(x.count / width * (last - first));
    for (size_t t = 0; t < x.count / width; t++)
        std::copy_n(x.data() + t * width + first, last - first, to.data() + t * (last - first));
    return to;
}

// Each tensor of this rank's part: at most twice the error of the CPU's reference in E on one rank, plus 2 ulp, plus
// what roundings of scores may leave.
template <class X> void check_part(const RingPlan& plan, size_t S, size_t width, const Buffer<X>& ring,
                                   const Buffer<X>& yardstick, const Buffer<double>& truth, double rounding) {
    const double allowed = 2 * largest_error(yardstick, truth) + 2 * ulp<X>(largest_value(truth)) + rounding;
    CHECK(local_error(plan, ring, truth, S, width) <= allowed);
}
template <class E> void check(const Case& c, const RingPlan& plan, const Result<E>& ring, const Result<E>& one,
                              const Result<double>& truth) {
    const Sizes z = c.z;
    const size_t ends[] = {0, z.H * z.D, (z.H + z.K) * z.D, z.qkv()};
    const double rounding = score_rounding(c.S, z.D);
    check_part(plan, c.S, z.H * z.D, ring.out, one.out, truth.out, 0);
    check_part(plan, c.S, z.H, ring.lse, one.lse, truth.lse, rounding);
    for (int i = 0; i < 3; i++) { // dq, dk, dv
        INFO((i == 0 ? "dQ" : i == 1 ? "dK" : "dV"));
        auto part = [&](const auto& x) { return columns(x, z.qkv(), ends[i], ends[i + 1]); };
        const auto exact = part(truth.dqkv);
        const double cancelled = i < 2 ? cancelled_sums(z.D, largest_value(truth.dqkv)) : 0;
        check_part(plan, c.S, ends[i + 1] - ends[i], part(ring.dqkv), part(one.dqkv), exact,
                   rounding * largest_value(exact) + cancelled);
    }
}

template <class E> void check_ways(const Case& c) {
    const Buffer<E> qkv = converted<E>(c.qkv), dout = converted<E>(c.dout);
    const RingPlan single = c.plan(alone);
    const Result<double> truth = attend(alone, single, converted<double>(qkv), converted<double>(dout), c.S, c.z);
    const Result<E> one = attend(alone, single, qkv, dout, c.S, c.z);
    for (const Way& way : ways)
        for (const RingExchange& exchange : exchanges)
            for (bool deterministic : {false, true}) {
                if (exchange.backend == RingBackend::ulysses && c.z.K % world.size) continue;
                if (deterministic && c.z.D < 64) continue; // of kernels that gpu_attention.cu holds to it
                CAPTURE(way.name);
                CAPTURE(int(exchange.backend));
                CAPTURE(exchange.held);
                the_gpu().context->deterministic = deterministic;
                RingPlan plan = c.plan(way.comm, attention_tiles<E>(the_gpu(), c.z.D), exchange);
                check(c, plan, attend_gpu<E>(way.comm, c, plan, qkv, dout), one, truth);
            }
    the_gpu().context->deterministic = false;
}
} // namespace

TEST_CASE_TEMPLATE("GPU ring: outputs and all gradients against double, in every mode", E, bf16, float) {
    for (Mode mode : modes)
        for (Sizes z : {Sizes{8, 4, 32}, Sizes{4, 4, 128}, Sizes{4, 2, 64}, Sizes{4, 2, 6}})
            for (size_t length : {90, 700}) {
                if (length == 90 && z.D != 128) continue;
                if (z.D == 64 && !std::is_same_v<E, bf16>) continue; // the Hopper kernels' other head size
                CAPTURE(int(mode));
                CAPTURE(length);
                check_ways<E>(Case(world.size, mode, z.D == 32 ? 3 : 1, length, length / 8.0, z, length + z.D));
            }
}

TEST_CASE("GPU ring: a rank that has nothing to learn from, and one whose keys nobody sees") {
    const Case masked(world.size, Mode::masked, 1, 2000, 0, {8, 4, 128}, 3);
    check_ways<bf16>(masked);
    Case apart(world.size, Mode::intra, 1, 2000, 50, {8, 4, 128}, 4);
    for (size_t i = 0; i < apart.S; i++) apart.doc[i] = 1 + int32_t(i / 50); // documents end where chunks do not
    check_ways<bf16>(apart);
    for (size_t i = 0; i < apart.S; i++) apart.doc[i] = 1 + int32_t(i * 16 / apart.S); // nothing moves
    check_ways<bf16>(apart);
}

TEST_CASE("GPU ring: the same run gives the same bits") {
    the_gpu().context->deterministic = true;
    for (Mode mode : {Mode::full, Mode::anchor})
        for (size_t D : {128, 64}) {
            const Case c(world.size, mode, 2, 900, 100, {8, 4, D}, 5);
            const Buffer<bf16> qkv = converted<bf16>(c.qkv), dout = converted<bf16>(c.dout);
            for (const RingExchange& exchange : exchanges) {
                if (exchange.backend == RingBackend::ulysses && c.z.K % world.size) continue;
                for (const Way& way : ways) {
                    CAPTURE(D);
                    CAPTURE(way.name);
                    CAPTURE(int(exchange.backend));
                    CAPTURE(exchange.held);
                    RingPlan plan = c.plan(way.comm, attention_tiles<bf16>(the_gpu(), c.z.D), exchange);
                    const Result<bf16> a = attend_gpu<bf16>(way.comm, c, plan, qkv, dout);
                    const Result<bf16> b = attend_gpu<bf16>(way.comm, c, plan, qkv, dout);
                    CHECK(memcmp(a.out.data(), b.out.data(), a.out.count * 2) == 0);
                    CHECK(memcmp(a.dqkv.data(), b.dqkv.data(), a.dqkv.count * 2) == 0);
                    CHECK(memcmp(a.lse.data(), b.lse.data(), a.lse.count * 4) == 0);
                }
            }
        }
    the_gpu().context->deterministic = false;
}

int main(int argc, char** argv) {
    open_ranks(argc, argv, peer_bytes, [] { return world.size > 1; });
    alone = comm_split(world, world.rank, 0);
    return run_ranks(world, argc, argv, [] { comm_close(the_gpu()); });
}
