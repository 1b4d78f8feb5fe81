// Attention's backward on Hopper, one idea at a time, from the portable kernel to the trainer's: what
// attention_hopper.cu is for the forward, and best read after it. Every version is checked against double on sampled
// rows of dQ, dK and dV, then timed, with the passes before and after. Needs a Hopper GPU (sm_90a).
//
//     nvcc -std=c++20 -O3 -gencode=arch=compute_90a,code=sm_90a -Xcompiler=-fopenmp -I.
//         dev/cuda/attention_backward.cu core/comm_serial.cpp
//     ./a.out
//
//     S = Q K^T / sqrt(D) where key <= query    P = exp(S - LSE)              delta = sum_d dO * O
//     dP = dO V^T    dS = P * (dP - delta)      dQ = dS K / sqrt(D)    dK = dS^T Q / sqrt(D)    dV = P^T dO
//     qkv and dqkv (T, 3, H, D), O and dO (T, H, D), LSE and delta (H, T)
//
// Five products of 2 D operations a pair, where the forward has two, and sums in two directions: dK and dV over the
// queries, dQ over the keys. A block can keep only what it sums in one direction; the other one's sums it adds in
// memory, in fp32, or all pairs would be computed twice. So it keeps a tile of 128 keys, whose dK and dV are two sums,
// visits tiles of 64 queries from its diagonal on, and adds dQ. A pass before makes delta and a dQ of zeros, one after
// rounds dQ to bf16.
//
// A warpgroup has 64 keys, and its S stands transposed, (keys, queries): S^T = K Q^T, dP^T = V dO^T. A product's
// result, rounded, lies in the registers as a next product wants its left operand, which is summed over its columns.
// Those of P^T and dS^T are queries, so dV += P^T dO and dK += dS^T Q take them from there. Only dS for dQ must go
// through shared memory, which nothing would spare it: dQ sums over the keys of both warpgroups. Were S (queries,
// keys), both P and dS would have to.
//
//   1   layers/attention_mma.cuh     the portable kernel, by mma.sync: warps load all operands into registers, and dQ
//                                    is added by atomics
//   2   wgmma                        a warpgroup's product takes its operands from shared memory by itself. Ordinary
//                                    loads put them there as the descriptors expect them; S, P, dP, dK and dV stay in
//                                    registers. All in turn: the tensor cores wait for every load, for the exponentials
//                                    and for the atomics, 4096 a step of two numbers each
//   3   TMA and mbarrier             one thread asks the copy engine for Q, dO, LSE and delta of a step; of two slots
//                                    one fills while one is multiplied. dQ goes to shared memory, and the engine adds
//                                    it in memory, for which no thread waits. What is computed is still in turn
//   4   roles, under the products    a warp that only loads, and two warpgroups that wait only for what they need of
//                                    each other: one's products run under the other's exponentials. And under its own:
//                                    a warpgroup computes dS while dV is multiplied, and issues S of the next step with
//                                    dK and, a step late, dQ, so that P is computed under these. A step late, because
//                                    then the other warpgroup's dS, which dQ wants too, has long been there
//   5   layers/attention_hopper.cuh  the trainer's: LSE and delta are subtracted by the products, as three more columns
//                                    of their operands, which reads a quarter of what it takes to bring them to every
//                                    thread, and shared memory is what the backward has least of; dQ is sent only when
//                                    the next products have been issued, which hides the wait for its stores. Blocks
//                                    stay and take tiles from a counter, longest first, of as many heads at a time as
//                                    the L2 cache holds; dK and dV leave through the copy engine while the next tile
//                                    comes; from 4096 visited queries on, pairs of blocks that load half of each tile
//                                    for both (multicast). And what documents, KV heads and the anchor want: a map of
//                                    the tiles that are visible, masks by intervals; and a fixed order of dQ's
//                                    additions, if asked for
//
// On an H200 they reach 327, 339, 528, 554 and 604 TF/s (16384 tokens, causal, 32 heads of 128, with the passes before
// and after; commit 38086cc).
#include "attention_backward.h"
#include "hopper.h"

constexpr int T = 16384; // long enough for version 5's pairs
// Of a tile: 64 and 128.
constexpr int queries = hopper::backward_queries, keys = hopper::backward_keys;

// What versions 2 to 4 take and give, and maps of it for the copy engine: q for tiles of queries of the 3 H heads of
// qkv, kv for tiles of keys; dq for 16 queries, the 64 columns of a warpgroup.
struct Arguments {
    const bf16 *qkv, *dout;
    const float *lse, *delta;
    float* dq; // (T, H, D)
    bf16* dqkv;
    CUtensorMap q_map, kv_map, dout_map, dq_map;
};

// A block's shared memory, 210 KiB; tiles as core/ptx.h says. Version 2 uses one slot of each kind, version 3 two of
// Q and dO; in version 4 Q has three, because two steps multiply with it at a time. A slot is full when what it holds
// has come, and empty when all warps have multiplied it and said so.
struct alignas(1024) Tiles {
    bf16 k[keys * D], v[keys * D];
    bf16 q[3][queries * D], dout[2][queries * D];
    bf16 ds[2][queries * keys]; // (queries, keys): the halves are the two warpgroups' keys
    float out[8][16 * 64];      // a warp's part of dQ on its way out
    alignas(16) float lse[3][queries];
    alignas(16) float delta[2][queries];
    ptx::Barrier kv_full, q_full[3], q_empty[3], dout_full[2], dout_empty[2], ds_full[2], ds_empty[2];

    // By one thread, before a __syncthreads. What comes by the copy engine is filled by one arrival, of the thread that
    // asks for it; all else is told by each of the 8 computing warps.
    __device__ __forceinline__ void init() {
        ptx::barrier_init(&kv_full, 1);
        for (int i = 0; i < 3; i++) ptx::barrier_init(&q_full[i], 1), ptx::barrier_init(&q_empty[i], 8);
        for (int i = 0; i < 2; i++) {
            ptx::barrier_init(&dout_full[i], 1), ptx::barrier_init(&dout_empty[i], 8);
            ptx::barrier_init(&ds_full[i], 8), ptx::barrier_init(&ds_empty[i], 8);
        }
        ptx::barrier_init_fence();
    }
};

// Until at most the last `later` groups of products are under way; these sums are of the others.
template <int later, class... Sums> __device__ __forceinline__ void wait_products(Sums&... sums) {
    ptx::product_wait<later>();
    (ptx::settle(sums), ...);
}

// A warpgroup: 64 keys from `first` on, and what it carries from step to step. Registers as core/ptx.h has them: this
// thread's rows, keys of P^T and queries of dQ, are g and g + 8 of its warp's 16, its columns 2 t and 2 t + 1 of every
// 8. Products run from issue to wait; until then nobody touches their registers, nor what they read in shared memory.
struct Warpgroup {
    using Dq = float[64 / 2]; // of the 64 queries, 64 columns: the warpgroups share dQ out by columns
    Tiles& tiles;
    const hopper::Place at;
    const int first;
    float dk[D / 2], dv[D / 2];
    float p[queries / 2], ds[queries / 2]; // S^T, then P^T; dP^T, then dS^T
    uint32_t rounded[queries / 4];         // P^T, later dS^T, as the left operand of dV and dK

    __device__ __forceinline__ Warpgroup(Tiles& tiles, int tile_first, int group)
        : tiles(tiles), at(group), first(tile_first + 64 * group) {
#pragma unroll
        for (int i = 0; i < D / 2; i++) dk[i] = dv[i] = 0;
    }

    __device__ __forceinline__ uint64_t own_rows(const bf16* tile) const { // of K or V
        return ptx::matrix(ptx::address(tile) + 64 * at.group * 128);
    }
    __device__ __forceinline__ void issue_scores(int slot) { // S^T = K Q^T
        ptx::product_fence();
        hopper::issue_rows<D, queries, keys, queries>(p, own_rows(tiles.k), ptx::matrix(ptx::address(tiles.q[slot])));
        ptx::product_commit();
    }
    __device__ __forceinline__ void issue_dp(int slot) { // dP^T = V dO^T
        ptx::product_fence();
        hopper::issue_rows<D, queries, keys, queries>(ds, own_rows(tiles.v),
                                                      ptx::matrix(ptx::address(tiles.dout[slot])));
        ptx::product_commit();
    }
    // sum (keys, D) += x y: first x (keys, queries) is rounded, then it is multiplied with a tile y (queries, D).
    __device__ __forceinline__ void round_for(float (&sum)[D / 2], const float (&x)[queries / 2]) {
        hopper::round_scores(rounded, x);
        ptx::settle(sum), ptx::settle(rounded);
        ptx::product_fence();
    }
    __device__ __forceinline__ void issue_sum(float (&sum)[D / 2], const bf16* y) {
        hopper::issue_columns<D, queries>(sum, rounded, ptx::matrix(ptx::address(y), queries * 128));
        ptx::product_commit();
    }
    __device__ __forceinline__ void issue_dv(int slot) { // dV += P^T dO
        round_for(dv, p);
        issue_sum(dv, tiles.dout[slot]);
    }
    // dK += dS^T Q. Rounded first of all, as dS and a dQ that is issued before dK do not fit into the registers.
    __device__ __forceinline__ void round_for_dk() { round_for(dk, ds); }
    __device__ __forceinline__ void issue_dk(int slot) { issue_sum(dk, tiles.q[slot]); }
    // dQ = dS K, of both warpgroups' keys. In dS, by rows, the next 16 keys are 32 bytes further, those of the other
    // warpgroup in the other half; in K, by columns, they are the next 16 rows.
    __device__ __forceinline__ void issue_dq(Dq& dq, int slot) {
        ptx::product_fence();
        const uint64_t x = ptx::matrix(ptx::address(tiles.ds[slot]));
        const uint64_t y = ptx::matrix(ptx::address(tiles.k) + at.group * keys * 128);
#pragma unroll
        for (int i = 0; i < keys / 16; i++)
            ptx::product<64, true>(dq, x + i / 4 * queries * 8 + i % 4 * 2, y + i * 128, i > 0);
        ptx::product_commit();
    }

    // S^T, of the queries from `begin` on, becomes P^T. A query is a column, so a thread needs LSE of 16 of them.
    __device__ __forceinline__ void probabilities(int slot, int begin) {
        const float scale = hopper::log2e / sqrtf(float(D));
#pragma unroll
        for (int j = 0; j < queries / 8; j++) {
            const float2 lse = *(const float2*)(tiles.lse[slot] + 8 * j + 2 * at.t);
#pragma unroll
            for (int i = 0; i < 4; i++) {
                float& x = p[4 * j + i];
                x = ptx::exp2(x * scale - hopper::log2e * (i % 2 ? lse.y : lse.x));
            }
        }
        if (begin >= first + 64) return;                                    // all these queries come after all keys
        const int ahead = first + 16 * at.warp + at.g - (begin + 2 * at.t); // of its first query, its first key
#pragma unroll
        for (int i = 0; i < queries / 2; i++)
            if (ahead > i / 4 * 8 + i % 2 - i / 2 % 2 * 8) p[i] = 0;
    }
    // dP^T becomes dS^T. It lacks the factor 1 / sqrt(D), which dQ and dK get once, at their end.
    __device__ __forceinline__ void score_gradients(int slot) {
#pragma unroll
        for (int j = 0; j < queries / 8; j++) {
            const float2 delta = *(const float2*)(tiles.delta[slot] + 8 * j + 2 * at.t);
#pragma unroll
            for (int i = 0; i < 4; i++) ds[4 * j + i] = p[4 * j + i] * (ds[4 * j + i] - (i % 2 ? delta.y : delta.x));
        }
    }
    // dS, rounded, to shared memory as (queries, keys): stmatrix transposes blocks of 8 x 8, four at a time, of 16 keys
    // and 16 queries. Lanes give the addresses of their rows.
    __device__ __forceinline__ void store_ds(int slot) {
        const int key_block = at.lane / 8 % 2, query_block = at.lane / 16, query = at.lane % 8;
        const uint32_t to = ptx::address(tiles.ds[slot]) + at.group * queries * 128 + query_block * 1024 + query * 128 +
                            (((2 * at.warp + key_block) ^ query) << 4);
#pragma unroll
        for (int j = 0; j < queries / 8; j += 2)
            ptx::store_matrices_transposed(
                to + j * 1024, ptx::round_pair(ds[4 * j], ds[4 * j + 1]), ptx::round_pair(ds[4 * j + 2], ds[4 * j + 3]),
                ptx::round_pair(ds[4 * j + 4], ds[4 * j + 5]), ptx::round_pair(ds[4 * j + 6], ds[4 * j + 7]));
    }

    // The step of versions 2 and 3, up to dQ of the queries from `begin` on.
    __device__ __forceinline__ void step_in_turn(Dq& dq, int slot, int begin) {
        issue_scores(slot);
        wait_products<0>(p);
        probabilities(slot, begin);
        issue_dp(slot), issue_dv(slot);
        wait_products<0>(ds, dv);
        score_gradients(slot);
        store_ds(0);
        ptx::fence_async(); // the tensor cores read by another way than these stores took
        __syncthreads();    // the other warpgroup's dS is there too
        round_for_dk();
        issue_dk(slot), issue_dq(dq, 0);
        wait_products<0>(dk, dq);
    }

    // Version 2: dQ to memory by atomics, two neighbours at a time.
    __device__ __forceinline__ void add_dq(const Dq& dq, float* to, int begin, int head) const {
        const float scale = 1 / sqrtf(float(D));
#pragma unroll
        for (int i = 0; i < 2; i++) {
            float* row = to + (size_t(begin + 16 * at.warp + 8 * i + at.g) * H + head) * D + 64 * at.group + 2 * at.t;
#pragma unroll
            for (int j = 0; j < 8; j++)
                atomicAdd((float2*)(row + 8 * j), float2{dq[4 * j + 2 * i] * scale, dq[4 * j + 2 * i + 1] * scale});
        }
    }
    // From version 3 on: through the warp's part of `out`, by the copy engine, in the order of DqOrder::split and not
    // scaled, which the pass after sets right. So a register of a row's four lanes is 16 neighbouring bytes, and one
    // stmatrix stores four registers.
    __device__ __forceinline__ void send_dq(const Dq& dq, const CUtensorMap& map, int begin, int head) const {
        const int row = at.lane % 8, odd = at.lane / 8 % 2, half = at.lane / 16; // of the address that the lane gives
        float* out = tiles.out[4 * at.group + at.warp];
        const uint32_t to = ptx::address(out) + half * 1024 + row * 128 + ((odd ^ row) << 4);
        if (at.lane == 0) ptx::bulk_wait_read<0>(); // the dQ before has been read
        __syncwarp();
#pragma unroll
        for (int j = 0; j < 8; j++)
            ptx::store_matrices((to ^ j % 4 * 32) + j / 4 * 2048, __float_as_uint(dq[4 * j]),
                                __float_as_uint(dq[4 * j + 1]), __float_as_uint(dq[4 * j + 2]),
                                __float_as_uint(dq[4 * j + 3]));
        ptx::fence_async(); // the copy engine reads by another way, too
        __syncwarp();
        if (at.lane != 0) return;
        ptx::tensor_add(&map, 0, begin + 16 * at.warp, 2 * at.group, head, out);
        ptx::bulk_commit();
    }

    // dK and dV to memory. Nobody leaves before the copy engine has read its dQ.
    __device__ __forceinline__ void finish(bf16* dqkv, int head) const {
        const float scale = 1 / sqrtf(float(D));
#pragma unroll
        for (int i = 0; i < 2; i++) {
            bf16* to = dqkv + size_t(first + 16 * at.warp + 8 * i + at.g) * stride + (H + head) * D + 2 * at.t;
#pragma unroll
            for (int j = 0; j < D / 8; j++) {
                const int n = 4 * j + 2 * i;
                *(uint32_t*)(to + 8 * j) = ptx::round_pair(dk[n] * scale, dk[n + 1] * scale);
                *(uint32_t*)(to + H * D + 8 * j) = ptx::round_pair(dv[n], dv[n + 1]);
            }
        }
        if (at.lane == 0) ptx::bulk_wait_read<0>();
    }
};

// Two warpgroups, which wait for everything: loads, exponentials, atomics.
__global__ void __launch_bounds__(256, 1) version2(const __grid_constant__ Arguments a) {
    auto& tiles = shared_memory<Tiles>();
    const int first = blockIdx.x * keys, head = blockIdx.y; // tile 0 has most queries to visit: the long ones first
    const bf16* key = a.qkv + first * stride + (H + head) * D;
    put_tile<keys, 256>(tiles.k, key);
    put_tile<keys, 256>(tiles.v, key + H * D);
    Warpgroup w(tiles, first, __shfl_sync(~0u, threadIdx.x / 128, 0));
    for (int begin = first; begin < T; begin += queries) {
        __syncthreads(); // the tiles before have been multiplied
        put_tile<queries, 256>(tiles.q[0], a.qkv + begin * stride + head * D);
        put_tile<queries, 256>(tiles.dout[0], a.dout + (size_t(begin) * H + head) * D, H * D);
        if (threadIdx.x < queries) {
            tiles.lse[0][threadIdx.x] = a.lse[head * T + begin + threadIdx.x];
            tiles.delta[0][threadIdx.x] = a.delta[head * T + begin + threadIdx.x];
        }
        ptx::fence_async();
        __syncthreads();
        Warpgroup::Dq dq;
        w.step_in_turn(dq, 0, begin);
        w.add_dq(dq, a.dq, begin, head);
    }
    w.finish(a.dqkv, head);
}

// By one thread: asks the copy engine for the tiles of keys, for queries with their LSE, for dO with its delta. The
// barrier's phase ends when this arrival and all the bytes have come.
__device__ __forceinline__ void ask_keys(Tiles& tiles, const Arguments& a, int token, int head) {
    ptx::barrier_arrive_expect(&tiles.kv_full, sizeof tiles.k + sizeof tiles.v);
    ptx::tensor_load(tiles.k, &a.kv_map, 0, token, 0, H + head, &tiles.kv_full);
    ptx::tensor_load(tiles.v, &a.kv_map, 0, token, 0, 2 * H + head, &tiles.kv_full);
}
__device__ __forceinline__ void ask_queries(Tiles& tiles, const Arguments& a, int slot, int token, int head) {
    ptx::Barrier* full = &tiles.q_full[slot];
    ptx::barrier_arrive_expect(full, sizeof tiles.q[0] + sizeof tiles.lse[0]);
    ptx::tensor_load(tiles.q[slot], &a.q_map, 0, token, 0, head, full);
    ptx::bulk_load(tiles.lse[slot], a.lse + head * T + token, sizeof tiles.lse[0], full);
}
__device__ __forceinline__ void ask_dout(Tiles& tiles, const Arguments& a, int slot, int token, int head) {
    ptx::Barrier* full = &tiles.dout_full[slot];
    ptx::barrier_arrive_expect(full, sizeof tiles.dout[0] + sizeof tiles.delta[0]);
    ptx::tensor_load(tiles.dout[slot], &a.dout_map, 0, token, 0, head, full);
    ptx::bulk_load(tiles.delta[slot], a.delta + head * T + token, sizeof tiles.delta[0], full);
}

// The same warpgroups; step n finds its tiles in slot n % 2, of which it is use n / 2, so the parity to wait for is
// that of n / 2. A slot is asked for again only when all threads have waited for its tile and multiplied it.
__global__ void __launch_bounds__(256, 1) version3(const __grid_constant__ Arguments a) {
    auto& tiles = shared_memory<Tiles>();
    const int first = blockIdx.x * keys, head = blockIdx.y, steps = (T - first) / queries;
    auto ask_step = [&](int n) {
        if (threadIdx.x == 0 && n < steps) {
            ask_queries(tiles, a, hopper::slot_of(n), first + n * queries, head);
            ask_dout(tiles, a, hopper::slot_of(n), first + n * queries, head);
        }
        __syncwarp();
    };
    if (threadIdx.x == 0) tiles.init();
    __syncthreads();
    if (threadIdx.x == 0) ask_keys(tiles, a, first, head);
    ask_step(0), ask_step(1);
    Warpgroup w(tiles, first, __shfl_sync(~0u, threadIdx.x / 128, 0));
    ptx::barrier_wait(&tiles.kv_full, 0);
    for (int n = 0; n < steps; n++) {
        const int slot = hopper::slot_of(n), begin = first + n * queries;
        ptx::barrier_wait(&tiles.q_full[slot], hopper::phase_of(n));
        ptx::barrier_wait(&tiles.dout_full[slot], hopper::phase_of(n));
        Warpgroup::Dq dq;
        w.step_in_turn(dq, slot, begin);
        __syncthreads(); // all warps have multiplied: the slot is empty, and dS may be overwritten
        ask_step(n + 2);
        w.send_dq(dq, a.dq_map, begin, head);
    }
    w.finish(a.dqkv, head);
}

// The loading thread of version 4. A slot's use must wait until the use before has been released, which is the phase of
// the other parity; on a fresh barrier that counts as past, so the first use does not wait.
__device__ __forceinline__ void load_steps(Tiles& tiles, const Arguments& a, int first, int head, int steps) {
    ask_keys(tiles, a, first, head);
    hopper::Ring<3> q;
    for (int n = 0; n < steps; n++, q.next()) {
        const int slot = hopper::slot_of(n), token = first + n * queries;
        ptx::barrier_wait(&tiles.q_empty[q.slot], q.phase ^ 1);
        ask_queries(tiles, a, q.slot, token, head);
        ptx::barrier_wait(&tiles.dout_empty[slot], hopper::phase_of(n) ^ 1);
        ask_dout(tiles, a, slot, token, head);
    }
}

// Version 4. While a warpgroup computes, a product of its own is under way: dV under dS, dQ and dK under the next P, dK
// under dQ's way out. dS has two slots: this step's is written while the last one's may still be read for dQ. The first
// step has no last one and multiplies whatever stands there, for nobody: products under a condition would be made one
// by one.
__device__ __forceinline__ void steps_overlapped(Warpgroup& w, Tiles& tiles, const Arguments& a, int first, int head,
                                                 int steps) {
    hopper::Ring<3> q;
    auto post_ds = [&](int n) { // of step n; the fence waits for its stores, under products that have been issued
        ptx::fence_async();
        __syncwarp();
        tell(&tiles.ds_full[hopper::slot_of(n)], w.at.lane);
    };
    auto issue_dq = [&](Warpgroup::Dq& dq, int n) { // of step n, once both warpgroups have posted its dS
        ptx::barrier_wait(&tiles.ds_full[hopper::slot_of(n)], hopper::phase_of(n));
        w.issue_dq(dq, hopper::slot_of(n));
    };
    auto send_dq = [&](const Warpgroup::Dq& dq, int n) { w.send_dq(dq, a.dq_map, first + n * queries, head); };

    ptx::barrier_wait(&tiles.kv_full, 0);
    ptx::barrier_wait(&tiles.q_full[0], 0);
    w.issue_scores(0);
    wait_products<0>(w.p);
    w.probabilities(0, first);
    for (int n = 0;; n++) {
        const int slot = hopper::slot_of(n), q_slot = q.slot;
        ptx::barrier_wait(&tiles.dout_full[slot], hopper::phase_of(n));
        w.issue_dp(slot), w.issue_dv(slot);
        wait_products<1>(w.ds);
        ptx::barrier_wait(&tiles.ds_empty[slot], hopper::phase_of(n) ^ 1); // behind dS it would cost registers
        w.score_gradients(slot);
        w.store_ds(slot);
        wait_products<0>(w.dv, w.rounded);
        tell(&tiles.dout_empty[slot], w.at.lane);
        if (n + 1 == steps) break;

        Warpgroup::Dq dq;
        q.next();
        ptx::barrier_wait(&tiles.q_full[q.slot], q.phase);
        w.issue_scores(q.slot);
        w.round_for_dk();
        issue_dq(dq, n - 1), w.issue_dk(q_slot);
        post_ds(n);
        wait_products<2>(w.p);
        w.probabilities(q.slot, first + (n + 1) * queries);
        wait_products<1>(dq);
        if (n > 0) {
            tell(&tiles.ds_empty[slot ^ 1], w.at.lane);
            send_dq(dq, n - 1);
        }
        wait_products<0>(w.dk, w.rounded);
        tell(&tiles.q_empty[q_slot], w.at.lane);
    }
    // The last dK, and the two dQ that are left.
    Warpgroup::Dq dq;
    w.round_for_dk();
    w.issue_dk(q.slot), issue_dq(dq, steps - 2);
    post_ds(steps - 1);
    wait_products<0>(w.dk, dq);
    send_dq(dq, steps - 2);
    issue_dq(dq, steps - 1);
    wait_products<0>(dq);
    send_dq(dq, steps - 1);
}

// Warpgroup 0 loads, by one thread; 1 and 2 compute. The block starts with 168 registers a thread: 24 + 2 x 240 share
// them out anew.
__global__ void __launch_bounds__(384, 1) version4(const __grid_constant__ Arguments a) {
    auto& tiles = shared_memory<Tiles>();
    const int first = blockIdx.x * keys, head = blockIdx.y, steps = (T - first) / queries;
    const int group = __shfl_sync(~0u, threadIdx.x / 128, 0);
    if (threadIdx.x == 0) tiles.init();
    __syncthreads();
    if (group == 0) {
        ptx::registers_give<24>();
        if (threadIdx.x == 0) load_steps(tiles, a, first, head, steps);
        return;
    }
    ptx::registers_take<240>();
    Warpgroup w(tiles, first, group - 1);
    steps_overlapped(w, tiles, a, first, head, steps);
    w.finish(a.dqkv, head);
}

Arguments arguments(const BackwardLadder& l) {
    auto map = [&](const void* base, bool fp32, size_t apart, size_t heads, uint32_t rows) {
        return hopper::head_map(base, fp32, apart, T, heads, D, rows, D / 64);
    };
    return {l.forward.qkv,
            l.dout,
            l.forward.lse,
            l.delta,
            l.dq,
            l.dqkv,
            map(l.forward.qkv, false, stride, 3 * H, queries),
            map(l.forward.qkv, false, stride, 3 * H, keys),
            map(l.dout, false, H * D, H, queries),
            map(l.dq, true, H * D, H, 16)};
}

int main() {
    static_assert(T % keys == 0);
    BackwardLadder ladder(T);
    const Gpu gpu = ladder.gpu;
    const Arguments a = arguments(ladder);
    const AttentionBackward<bf16> portable = ladder.trainer(attention_mma_tiles(D));
    const AttentionBackward<bf16> trainer = ladder.trainer(attention_hopper_tiles(D));
    constexpr size_t shared = sizeof(Tiles);
    for (auto* kernel : {version2, version3, version4}) allow_shared_memory(gpu, kernel, shared);

    const dim3 grid(T / keys, H);
    const DqOrder plain = DqOrder::plain, split = DqOrder::split;
    ladder.run("1 layers/attention_mma.cuh", plain, [&] { attention_mma_backward(gpu, portable); });
    ladder.run("2 wgmma", plain, [&] { version2<<<grid, 256, shared, gpu.stream>>>(a); });
    ladder.run("3 TMA and mbarrier", split, [&] { version3<<<grid, 256, shared, gpu.stream>>>(a); });
    ladder.run("4 roles, under the products", split, [&] { version4<<<grid, 384, shared, gpu.stream>>>(a); });
    ladder.run("5 layers/attention_hopper.cuh", split, [&] { attention_hopper_backward(gpu, trainer); });
    return ladder.right ? 0 : 1;
}
