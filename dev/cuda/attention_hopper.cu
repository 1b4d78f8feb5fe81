// Attention's forward on Hopper, one idea at a time: attention_forward.cu goes on here, from the portable kernel to the
// trainer's. Every version is checked against double on sampled queries, then timed. Needs a Hopper GPU (sm_90a).
//
//     nvcc -std=c++20 -O3 -gencode=arch=compute_90a,code=sm_90a -Xcompiler=-fopenmp -I.
//         dev/cuda/attention_hopper.cu core/comm_serial.cpp
//     ./a.out
//
//     S = Q K^T / sqrt(D) where key <= query, else -inf    P = exp(S - LSE)    O = P V    qkv (T, 3, H, D), O (T, H, D)
//
// The arithmetic is still the bound, and mma.sync reaches little more than half of it (versions 4 and 5 of
// matmul_epilogue.cu). From here on warps ask for products of whole tiles, which the tensor cores do in the background.
// They do nothing while all wait for something else: a load, the exponentials, a last long tile. That each step takes
// away one of these waits is what makes it faster.
//
//   4   layers/attention_mma.cuh      where attention_forward.cu ends; that the state is multiplied only when its
//                                     maximum moves far, and masks come only where needed, is so from here on
//   5   wgmma                         a warpgroup's product takes its operands from shared memory by itself: nothing
//                                     loads fragments any more. 64 queries, tiles of 64 keys; ordinary loads put them
//                                     where the descriptors expect them; S, P and O stay in registers. All in turn
//   6   TMA and mbarrier              one thread asks the copy engine for a tile, which comes without registers or
//                                     instructions of the others; of two slots one fills while one is multiplied
//   7   warps with roles              a warp that only loads, and two warpgroups that meet only where a slot must be
//                                     free of both: one's products run under the other's softmax. Their 128 queries
//                                     share tiles of 128 keys, half the traffic a pair; registers for such tiles are
//                                     those that the loading warps give away
//   8   softmax under the products    a warpgroup issues S of this step and O of the last one, and computes this
//                                     step's exponentials while O is multiplied: products of its own, not only the
//                                     other warpgroup's, run under its softmax
//   9   layers/attention_hopper.cuh   the trainer's: blocks stay and take tiles from a counter, longest first, so that
//                                     none waits for a last long one; Q is kept in registers, which leaves shared
//                                     memory a fifth less to read; the next Q comes while this tile is at work, and O
//                                     leaves through the copy engine; as many heads at a time as the L2 cache holds;
//                                     from 4096 visited keys on, pairs of blocks that load half of each tile for both
//                                     (multicast). And what documents and the anchor want: a map of the tiles that are
//                                     visible, masks by intervals, the anchor as the state's start
//
// On an H200 they reach 402, 391, 561, 621, 730 and 753 TF/s (16384 tokens, causal, 32 heads of 128; commit ec426ad):
// wgmma alone is no gain, what it lets run in the background is. This is the forward; attention_backward.cu is the
// backward.
#include "hopper.h"

constexpr int T = 16384; // long enough for version 9's pairs

// A block's shared memory: tiles of N tokens, as core/ptx.h says. Slot i of K is full when its N keys have come, and
// empty when all warps have multiplied them and said so (from version 7 on); so with V.
template <int N, int slots> struct alignas(1024) Tiles {
    bf16 q[N * D], k[slots][N * D], v[slots][N * D];
    ptx::Barrier q_full, k_full[slots], v_full[slots], k_empty[slots], v_empty[slots];

    // By one thread, before a __syncthreads. One arrival fills, of the thread that asks for the tile.
    __device__ __forceinline__ void init(int warps) {
        ptx::barrier_init(&q_full, 1);
        for (int i = 0; i < slots; i++) {
            ptx::barrier_init(&k_full[i], 1), ptx::barrier_init(&k_empty[i], warps);
            ptx::barrier_init(&v_full[i], 1), ptx::barrier_init(&v_empty[i], warps);
        }
        ptx::barrier_init_fence();
    }
};

// A warpgroup: 64 queries from `first` on, and what it carries from step to step. Registers as core/ptx.h has them:
// this thread's rows are g and g + 8 of its warp's 16, its columns 2 t and 2 t + 1 of every 8.
template <int N> struct Warpgroup {
    const hopper::Place at;
    const int first;
    const uint64_t q; // the descriptor of its rows of Q
    float s[N / 2], o[D / 2], m[2], l[2], alpha[2];
    uint32_t p[N / 4]; // P rounded, in pairs: S's registers are the next product's A fragments
    bool risen;        // m rose in this step, so that l and O count alpha times as much

    __device__ __forceinline__ Warpgroup(const bf16* tile, int tile_first, int group)
        : at(group), first(tile_first + 64 * group), q(ptx::matrix(ptx::address(tile) + 64 * group * 128)) {
        m[0] = m[1] = -INFINITY, l[0] = l[1] = 0;
#pragma unroll
        for (int i = 0; i < D / 2; i++) o[i] = 0;
    }

    // Products run from issue to wait; until then nobody touches their registers, nor what they read in shared memory.
    __device__ __forceinline__ void issue_scores(const bf16* k) { // S = Q K^T
        ptx::settle(s);
        ptx::product_fence();
        hopper::issue_rows<D, N, N, N>(s, q, ptx::matrix(ptx::address(k)));
        ptx::product_commit();
    }
    __device__ __forceinline__ void issue_output(const bf16* v) { // O += P V
        ptx::settle(o), ptx::settle(p);
        ptx::product_fence();
        hopper::issue_columns<D, N>(o, p, ptx::matrix(ptx::address(v), N * 128));
        ptx::product_commit();
    }
    // `later` products may still run: those issued after it.
    template <int later> __device__ __forceinline__ void wait_scores() { ptx::product_wait<later>(), ptx::settle(s); }
    __device__ __forceinline__ void wait_output() { ptx::product_wait<0>(), ptx::settle(o); }

    // S, of the keys from `begin` on, becomes exp(S - m). Touches neither O nor P.
    __device__ __forceinline__ void mask_and_softmax(int begin) {
        if (begin + N > first) { // some key comes after some query
            const int row = first + 16 * at.warp + at.g;
#pragma unroll
            for (int i = 0; i < N / 2; i++)
                if (begin + i / 4 * 8 + 2 * at.t + i % 2 > row + i / 2 % 2 * 8) s[i] = -INFINITY;
        }
        risen = hopper::softmax_step<D>(s, m, l, alpha);
    }
    __device__ __forceinline__ void prepare_output() {
        hopper::round_scores(p, s);
        if (risen) hopper::rescale(o, alpha);
    }

    __device__ __forceinline__ void store(bf16* out, int head) {
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const float inverse = 1 / hopper::quad_sum(l[i]);
            bf16* to = out + (size_t(first + 16 * at.warp + 8 * i + at.g) * H + head) * D + 2 * at.t;
#pragma unroll
            for (int j = 0; j < D / 8; j++)
                *(uint32_t*)(to + 8 * j) = ptx::round_pair(o[4 * j + 2 * i] * inverse, o[4 * j + 2 * i + 1] * inverse);
        }
    }
};

// One warpgroup: load, multiply, softmax, multiply. While one of these goes on, only other blocks do the others.
__global__ void __launch_bounds__(128) version5(bf16* out, const bf16* qkv) {
    auto& tiles = shared_memory<Tiles<64, 1>>();
    const int first = (gridDim.x - 1 - blockIdx.x) * 64, head = blockIdx.y; // the long tiles first
    put_tile<64, 128>(tiles.q, qkv + first * stride + head * D);
    Warpgroup<64> w(tiles.q, first, 0);
    for (int begin = 0; begin <= first; begin += 64) {
        const bf16* key = qkv + begin * stride + (H + head) * D;
        __syncthreads(); // the tiles before have been multiplied
        put_tile<64, 128>(tiles.k[0], key);
        put_tile<64, 128>(tiles.v[0], key + H * D);
        ptx::fence_async(); // the tensor cores read by another way than these stores took
        __syncthreads();
        w.issue_scores(tiles.k[0]);
        w.wait_scores<0>();
        w.mask_and_softmax(begin);
        w.prepare_output();
        w.issue_output(tiles.v[0]);
        w.wait_output();
    }
    w.store(out, head);
}

// By one thread: asks the copy engine for N tokens of one of the 3 H heads of qkv, as the map has been made for. The
// barrier's phase ends when this arrival and all the bytes have come.
template <int N>
__device__ __forceinline__ void ask(bf16* tile, const CUtensorMap& qkv, int token, int head, ptx::Barrier* full) {
    ptx::barrier_arrive_expect(full, N * D * sizeof(bf16));
    ptx::tensor_load(tile, &qkv, 0, token, 0, head, full);
}

// One warpgroup again; step n finds its tiles in slot n % 2, of which it is use n / 2, so the parity to wait for is
// that of n / 2: hopper::slot_of(n) and phase_of(n). A slot is asked for again only when all threads have waited for
// its tile and multiplied it: no phase can pass unseen.
__global__ void __launch_bounds__(128) version6(bf16* out, const __grid_constant__ CUtensorMap qkv) {
    auto& tiles = shared_memory<Tiles<64, 2>>();
    const int first = (gridDim.x - 1 - blockIdx.x) * 64, head = blockIdx.y, steps = first / 64 + 1;
    auto ask_step = [&](int n) {
        if (threadIdx.x == 0 && n < steps) {
            const int slot = hopper::slot_of(n);
            ask<64>(tiles.k[slot], qkv, n * 64, H + head, &tiles.k_full[slot]);
            ask<64>(tiles.v[slot], qkv, n * 64, 2 * H + head, &tiles.v_full[slot]);
        }
        __syncwarp();
    };
    if (threadIdx.x == 0) tiles.init(4);
    __syncthreads();
    if (threadIdx.x == 0) ask<64>(tiles.q, qkv, first, head, &tiles.q_full);
    ask_step(0), ask_step(1);
    Warpgroup<64> w(tiles.q, first, 0);
    ptx::barrier_wait(&tiles.q_full, 0);
    for (int n = 0; n < steps; n++) {
        const int slot = hopper::slot_of(n);
        ptx::barrier_wait(&tiles.k_full[slot], hopper::phase_of(n));
        w.issue_scores(tiles.k[slot]);
        w.wait_scores<0>();
        w.mask_and_softmax(n * 64);
        w.prepare_output();
        ptx::barrier_wait(&tiles.v_full[slot], hopper::phase_of(n));
        w.issue_output(tiles.v[slot]);
        w.wait_output();
        __syncthreads(); // all warps have: the slot is empty
        ask_step(n + 2);
    }
    w.store(out, head);
}

using RoleTiles = Tiles<128, 2>;

// The loading thread of versions 7 and 8. Use n / 2 of a slot must wait until use n / 2 - 1 has been released, which is
// the phase of the other parity; on a fresh barrier that counts as past, so the first use does not wait.
__device__ __forceinline__ void load_steps(RoleTiles& tiles, const CUtensorMap& qkv, int first, int head, int steps) {
    ask<128>(tiles.q, qkv, first, head, &tiles.q_full);
    for (int n = 0; n < steps; n++) {
        const int slot = hopper::slot_of(n);
        const uint32_t before = hopper::phase_of(n) ^ 1;
        ptx::barrier_wait(&tiles.k_empty[slot], before);
        ask<128>(tiles.k[slot], qkv, n * 128, H + head, &tiles.k_full[slot]);
        ptx::barrier_wait(&tiles.v_empty[slot], before);
        ask<128>(tiles.v[slot], qkv, n * 128, 2 * H + head, &tiles.v_full[slot]);
    }
}

// Version 7: version 6's steps, which say by barriers alone what they are done with.
__device__ __forceinline__ void steps_in_turn(Warpgroup<128>& w, RoleTiles& tiles, int steps) {
    for (int n = 0; n < steps; n++) {
        const int slot = hopper::slot_of(n);
        ptx::barrier_wait(&tiles.k_full[slot], hopper::phase_of(n));
        w.issue_scores(tiles.k[slot]);
        w.wait_scores<0>();
        tell(&tiles.k_empty[slot], w.at.lane);
        w.mask_and_softmax(n * 128);
        w.prepare_output();
        ptx::barrier_wait(&tiles.v_full[slot], hopper::phase_of(n));
        w.issue_output(tiles.v[slot]);
        w.wait_output();
        tell(&tiles.v_empty[slot], w.at.lane);
    }
}

// Version 8: step n has O of step n - 1 under its softmax; the first has none, and the last one's O comes after all.
// S is rounded to P only when O no longer reads the P before. K's slot is free a product earlier than V's: hence the
// barriers of their own. The loop's wait for this step's values stands where it does for ptxas too: without a branch
// between, it would move wait_output up, before the exponentials.
__device__ __forceinline__ void steps_overlapped(Warpgroup<128>& w, RoleTiles& tiles, int steps) {
    ptx::barrier_wait(&tiles.k_full[0], 0);
    w.issue_scores(tiles.k[0]);
    w.wait_scores<0>();
    tell(&tiles.k_empty[0], w.at.lane);
    w.mask_and_softmax(0);
    ptx::barrier_wait(&tiles.v_full[0], 0);
    w.prepare_output();
    for (int n = 1; n < steps; n++) {
        const int slot = hopper::slot_of(n);
        ptx::barrier_wait(&tiles.k_full[slot], hopper::phase_of(n));
        w.issue_scores(tiles.k[slot]);
        w.issue_output(tiles.v[slot ^ 1]);
        w.wait_scores<1>();
        tell(&tiles.k_empty[slot], w.at.lane);
        w.mask_and_softmax(n * 128);
        ptx::barrier_wait(&tiles.v_full[slot], hopper::phase_of(n));
        w.wait_output();
        tell(&tiles.v_empty[slot ^ 1], w.at.lane);
        w.prepare_output();
    }
    w.issue_output(tiles.v[hopper::slot_of(steps - 1)]);
    w.wait_output();
}

// Warpgroup 0 loads, by one thread; 1 and 2 compute, 64 queries each. The block starts with 168 registers a thread:
// 40 + 2 x 232 share them out anew.
template <int version> __global__ void __launch_bounds__(384, 1)
    roles(bf16* out, const __grid_constant__ CUtensorMap qkv) {
    auto& tiles = shared_memory<RoleTiles>();
    const int first = (gridDim.x - 1 - blockIdx.x) * 128, head = blockIdx.y, steps = first / 128 + 1;
    const int group = __shfl_sync(~0u, threadIdx.x / 128, 0);
    if (threadIdx.x == 0) tiles.init(8);
    __syncthreads();
    if (group == 0) {
        ptx::registers_give<40>();
        if (threadIdx.x == 0) load_steps(tiles, qkv, first, head, steps);
        return;
    }
    ptx::registers_take<232>();
    Warpgroup<128> w(tiles.q, first, group - 1);
    ptx::barrier_wait(&tiles.q_full, 0);
    if constexpr (version == 7) steps_in_turn(w, tiles, steps);
    else steps_overlapped(w, tiles, steps);
    w.store(out, head);
}

int main() {
    static_assert(T % 128 == 0);
    Ladder ladder(T);
    const Gpu gpu = ladder.gpu;
    REQUIRE(gpu.context->compute == 90, "take a Hopper GPU; attention_forward.cu runs on others");
    bf16 *const out = ladder.out, *const qkv = ladder.qkv;
    auto map = [&](uint32_t rows) { return hopper::head_map(qkv, false, stride, T, 3 * H, D, rows, D / 64); };
    const CUtensorMap by_64 = map(64), by_128 = map(128);
    constexpr size_t one = sizeof(Tiles<64, 1>), two = sizeof(Tiles<64, 2>), large = sizeof(RoleTiles);
    allow_shared_memory(gpu, version5, one), allow_shared_memory(gpu, version6, two);
    allow_shared_memory(gpu, roles<7>, large), allow_shared_memory(gpu, roles<8>, large);

    const AttentionForward<bf16> portable = ladder.trainer(attention_mma_tiles(D));
    const AttentionForward<bf16> trainer = ladder.trainer(attention_hopper_tiles(D));
    const dim3 grid_64(T / 64, H), grid_128(T / 128, H);
    ladder.run("4 layers/attention_mma.cuh", [&] { attention_mma_forward(gpu, portable); });
    ladder.run("5 wgmma", [&] { version5<<<grid_64, 128, one, gpu.stream>>>(out, qkv); });
    ladder.run("6 TMA and mbarrier", [&] { version6<<<grid_64, 128, two, gpu.stream>>>(out, by_64); });
    ladder.run("7 warps with roles", [&] { roles<7><<<grid_128, 384, large, gpu.stream>>>(out, by_128); });
    ladder.run("8 softmax under the products", [&] { roles<8><<<grid_128, 384, large, gpu.stream>>>(out, by_128); });
    ladder.run("9 layers/attention_hopper.cuh", [&] { attention_hopper_forward(gpu, trainer); });
    return ladder.right ? 0 : 1;
}
