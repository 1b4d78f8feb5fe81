// Hopper's instructions that C++ has no word for: barriers in shared memory, the bulk copy engine (TMA), the tensor
// cores' warpgroup products (wgmma), registers handed from warpgroup to warpgroup. One wrapper an instruction; the
// rules for their use stand in the PTX manual, sections "mbarrier", "cp.async.bulk", "wgmma".
//
// A tile of bf16 lies in shared memory as the copy engine writes it with 128-byte swizzle: halves of 64 columns one
// after the other, each (rows, 64), a row 128 bytes, its eight 16-byte chunks permuted by xor with row % 8. Tiles start
// on 1024 bytes. Both operands of a product can lie so, and be read as they stand or transposed:
//
//   by rows      the product sums along the columns  (PTX: K-major)     the next 16 columns: 32 bytes further
//   by columns   the product sums along the rows     (PTX: MN-major)    the next 16 rows: 2048 bytes further
//
// The 64 x N sum of a warpgroup lies in registers: d[4 j + 2 i + e] of lane 4 g + t in warp w is row 16 w + 8 i + g,
// column 8 j + 2 t + e. Rounded to bf16 in pairs along e, columns 16 k to 16 k + 15 are the next product's A fragment
// k.
#pragma once
#include "device.h"

#ifdef __CUDACC__
#include <cuda.h>

namespace ptx {

// An address of shared memory as instructions take it.
__device__ __forceinline__ uint32_t address(const void* shared) { return uint32_t(__cvta_generic_to_shared(shared)); }

// A barrier in shared memory. Its phase ends when `count` arrivals and all announced bytes have come; waiting for
// parity p returns when the phase of parity p has ended (so waiting for parity 1 on a fresh barrier returns at once).
using Barrier = uint64_t;
__device__ __forceinline__ void barrier_init(Barrier* bar, uint32_t count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(address(bar)), "r"(count) : "memory");
}
// Makes initialised barriers known to the copy engine.
__device__ __forceinline__ void barrier_init_fence() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
__device__ __forceinline__ void barrier_arrive(Barrier* bar) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(address(bar)) : "memory");
}
// Arrives and announces bytes that the copy engine will bring.
__device__ __forceinline__ void barrier_arrive_expect(Barrier* bar, uint32_t bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(address(bar)), "r"(bytes) : "memory");
}
// Arrives when this thread's copies by copy_async before it have come.
__device__ __forceinline__ void barrier_arrive_copies(Barrier* bar) {
    asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(address(bar)) : "memory");
}
__device__ __forceinline__ bool barrier_try_wait(Barrier* bar, uint32_t parity) {
    uint32_t done;
    asm volatile("{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
                 : "=r"(done)
                 : "r"(address(bar)), "r"(parity)
                 : "memory");
    return done;
}
__device__ __forceinline__ void barrier_wait(Barrier* bar, uint32_t parity) {
    while (!barrier_try_wait(bar, parity)) {}
}

// Blocks of a cluster: this block's number in it; a barrier of all their threads; the same variable of another block's
// shared memory, which has it at the same place; a store and an arrival there.
__device__ __forceinline__ uint32_t cluster_rank() {
    uint32_t rank;
    asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}
__device__ __forceinline__ void cluster_sync() {
    asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;" ::: "memory");
}
__device__ __forceinline__ uint32_t address_in(const void* shared, uint32_t rank) {
    uint32_t there;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(address(shared)), "r"(rank));
    return there;
}
__device__ __forceinline__ void barrier_arrive_in(Barrier* bar, uint32_t rank) {
    asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(address_in(bar, rank)) : "memory");
}
// Stores four bytes, which the barrier there awaits.
__device__ __forceinline__ void store_in(int* shared, uint32_t rank, int x, Barrier* bar) {
    asm volatile(
        "st.async.shared::cluster.mbarrier::complete_tx::bytes.u32 [%0], %1, [%2];" ::"r"(address_in(shared, rank)),
        "r"(x), "r"(address_in(bar, rank))
        : "memory");
}

// A hardware barrier by number (0 is __syncthreads): `threads` arrivals end it; sync waits for them, arrive does not.
__device__ __forceinline__ void named_sync(int number, int threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(number), "r"(threads) : "memory");
}
__device__ __forceinline__ void named_arrive(int number, int threads) {
    asm volatile("bar.arrive %0, %1;" ::"r"(number), "r"(threads) : "memory");
}

// Registers a thread may use from here on, for whole warpgroups: given back to the block, or taken from it.
template <int N> __device__ __forceinline__ void registers_give() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N));
}
template <int N> __device__ __forceinline__ void registers_take() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N));
}

// Makes this thread's stores to shared memory visible to the copy engine and to wgmma (the "async proxy").
__device__ __forceinline__ void fence_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
// The same for the GPU's memory.
__device__ __forceinline__ void fence_async_global() { asm volatile("fence.proxy.async.global;" ::: "memory"); }

// A small copy of one thread, 4 or 8 bytes; without `valid` they become zero, and `from` is not read.
template <class X> __device__ __forceinline__ void copy_async(X* to, const X* from, bool valid) {
    static_assert(sizeof(X) == 4 || sizeof(X) == 8);
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(address(to)), "l"(from), "n"(sizeof(X)),
                 "r"(valid ? int(sizeof(X)) : 0)
                 : "memory");
}

// Copies of `bytes` in one piece; addresses and bytes are multiples of 16.
__device__ __forceinline__ void bulk_load(void* to, const void* from, uint32_t bytes, Barrier* bar) {
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(address(to)),
        "l"(from), "r"(bytes), "r"(address(bar))
        : "memory");
}
// Copies of the box of a tensor map at these coordinates, the innermost first. What lies outside the tensor is zero
// when loaded, and left out when stored or added.
__device__ __forceinline__ void tensor_load(void* to, const CUtensorMap* map, int x, int y, int z, int w,
                                            Barrier* bar) {
    asm volatile("cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], "
                 "[%1, {%2, %3, %4, %5}], [%6];" ::"r"(address(to)),
                 "l"(map), "r"(x), "r"(y), "r"(z), "r"(w), "r"(address(bar))
                 : "memory");
}
// To the same place in both blocks of a pair, where it completes the same barrier.
__device__ __forceinline__ void tensor_load_both(void* to, const CUtensorMap* map, int x, int y, int z, int w,
                                                 Barrier* bar) {
    asm volatile("cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], "
                 "[%1, {%2, %3, %4, %5}], [%6], %7;" ::"r"(address(to)),
                 "l"(map), "r"(x), "r"(y), "r"(z), "r"(w), "r"(address(bar)), "h"(uint16_t(3))
                 : "memory");
}
__device__ __forceinline__ void tensor_store(const CUtensorMap* map, int x, int y, int z, int w, const void* from) {
    asm volatile("cp.async.bulk.tensor.4d.global.shared::cta.bulk_group [%0, {%1, %2, %3, %4}], [%5];" ::"l"(map),
                 "r"(x), "r"(y), "r"(z), "r"(w), "r"(address(from))
                 : "memory");
}
__device__ __forceinline__ void tensor_add(const CUtensorMap* map, int x, int y, int z, int w, const void* from) {
    asm volatile(
        "cp.reduce.async.bulk.tensor.4d.global.shared::cta.add.bulk_group [%0, {%1, %2, %3, %4}], [%5];" ::"l"(map),
        "r"(x), "r"(y), "r"(z), "r"(w), "r"(address(from))
        : "memory");
}
// This thread's stores and adds since the last commit become a group; wait until at most N groups still read the shared
// memory they come from.
__device__ __forceinline__ void bulk_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
template <int N> __device__ __forceinline__ void bulk_wait_read() {
    asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(N) : "memory");
}
// Until they are done: this thread sees what they wrote.
template <int N> __device__ __forceinline__ void bulk_wait() {
    asm volatile("cp.async.bulk.wait_group %0;" ::"n"(N) : "memory");
}

// A counter in the GPU's memory. Who sees what a thread has added to it sees all that this thread saw before.
__device__ __forceinline__ void counter_add(int* counter) {
    asm volatile("red.release.gpu.global.add.s32 [%0], 1;" ::"l"(counter) : "memory");
}
__device__ __forceinline__ void counter_wait(const int* counter, int least) {
    int count;
    do asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(count) : "l"(counter) : "memory");
    while (count < least);
}

// Four 8 x 8 matrices of bf16 from the registers of a warp; lane i gives the address of row i % 8 of matrix i / 8.
__device__ __forceinline__ void store_matrices(uint32_t to, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(a), "r"(b), "r"(c),
                 "r"(d)
                 : "memory");
}
__device__ __forceinline__ void store_matrices_transposed(uint32_t to, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(a), "r"(b),
                 "r"(c), "r"(d)
                 : "memory");
}

// And back into registers.
__device__ __forceinline__ void load_matrices(uint32_t* x, uint32_t from) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
                 : "r"(from)
                 : "memory");
}

__device__ __forceinline__ void store_pair(uint32_t to, float x, float y) {
    asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(to), "f"(x), "f"(y) : "memory");
}

// Keeps ptxas from putting off what x is made of; x is never negative, so that nothing is ever stored.
__device__ __forceinline__ void need(float x) {
    asm volatile("{ .reg .pred p; setp.lt.f32 p, %0, 0f00000000; @p st.shared.u32 [%1], 0; }" ::"f"(x), "r"(0)
                 : "memory");
}
// 2^x, with 2^-inf = 0.
__device__ __forceinline__ float exp2(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
// The lowest `count` bits, 0 to 32 of them.
__device__ __forceinline__ uint32_t bits_below(int count) {
    uint32_t bits;
    asm("bmsk.clamp.b32 %0, 0, %1;" : "=r"(bits) : "r"(count));
    return bits;
}
// Two numbers rounded to bf16, the first one in the lower half.
__device__ __forceinline__ uint32_t round_pair(float low, float high) {
    uint32_t both;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
    return both;
}

// Products run in the background, in the order of their issue. fence: before the first one, and after registers of
// theirs (sums, or A) were touched. commit makes a group of those issued since; wait until at most N groups are under
// way. Between issue and wait their registers must not be touched.
__device__ __forceinline__ void product_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void product_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int N> __device__ __forceinline__ void product_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
}

// Keeps the compiler from moving what it does with these registers across this point: at a fence and after a wait.
template <class R, int N> __device__ __forceinline__ void settle(R (&x)[N]) {
#pragma unroll
    for (int i = 0; i < N; i++)
        if constexpr (std::is_same_v<R, float>) asm volatile("" : "+f"(x[i])::"memory");
        else asm volatile("" : "+r"(x[i])::"memory");
}

// The descriptor of an operand that starts here: 1024 bytes from 8 rows to the next 8, 128-byte swizzle. half_bytes,
// from one half of 64 columns to the next, counts by columns alone. What starts some bytes further: + bytes / 16.
__device__ __forceinline__ uint64_t matrix(uint32_t start, uint32_t half_bytes = 16) {
    // The same in all lanes, for descriptors live in the warp's uniform registers; without the bits that name the block
    // in a cluster.
    start = __shfl_sync(~0u, start, 0) & 0x3ffff;
    return uint64_t(start >> 4) | uint64_t(half_bytes >> 4) << 16 | uint64_t(1024 >> 4) << 32 | uint64_t(1) << 62;
}

#define PTX_SUM_4(d, i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define PTX_SUM_16(d, i) PTX_SUM_4(d, i), PTX_SUM_4(d, i + 4), PTX_SUM_4(d, i + 8), PTX_SUM_4(d, i + 12)
#define PTX_SUM_32(d, i) PTX_SUM_16(d, i), PTX_SUM_16(d, i + 16)
#define PTX_SUM_64(d) PTX_SUM_32(d, 0), PTX_SUM_32(d, 32)
#define PTX_LIST_4 "%0, %1, %2, %3"
#define PTX_LIST_16 PTX_LIST_4 ", %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define PTX_LIST_32 PTX_LIST_16 ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define PTX_LIST_64                                                                                                    \
    PTX_LIST_32 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51" \
                ", %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define PTX_PRODUCT(N, sums, operands, predicate, end)                                                                \
    "{ .reg .pred p; setp.ne.b32 p, " predicate ", 0; wgmma.mma_async.sync.aligned.m64n" N "k16.f32.bf16.bf16 {" sums \
    "}, " operands ", p, 1, 1, " end "; }"

// d (64, N) = a (64, 16) b (16, N), or += with `add`. Both in shared memory, a by rows, b by rows or, with `columns`,
// by columns.
template <int N, bool columns = false>
__device__ __forceinline__ void product(float (&d)[N / 2], uint64_t a, uint64_t b, bool add) {
    static_assert(N == 8 || N == 32 || N == 64 || N == 128);
    if constexpr (N == 8)
        asm volatile(PTX_PRODUCT("8", PTX_LIST_4, "%4, %5", "%6", "0, %7")
                     : PTX_SUM_4(d, 0)
                     : "l"(a), "l"(b), "r"(int(add)), "n"(int(columns)));
    if constexpr (N == 32)
        asm volatile(PTX_PRODUCT("32", PTX_LIST_16, "%16, %17", "%18", "0, %19")
                     : PTX_SUM_16(d, 0)
                     : "l"(a), "l"(b), "r"(int(add)), "n"(int(columns)));
    if constexpr (N == 64)
        asm volatile(PTX_PRODUCT("64", PTX_LIST_32, "%32, %33", "%34", "0, %35")
                     : PTX_SUM_32(d, 0)
                     : "l"(a), "l"(b), "r"(int(add)), "n"(int(columns)));
    if constexpr (N == 128)
        asm volatile(PTX_PRODUCT("128", PTX_LIST_64, "%64, %65", "%66", "0, %67")
                     : PTX_SUM_64(d)
                     : "l"(a), "l"(b), "r"(int(add)), "n"(int(columns)));
}

// The same with a from registers, four to a thread, and b by columns or, without `columns`, by rows.
template <int N, bool columns = true>
__device__ __forceinline__ void product(float (&d)[N / 2], const uint32_t* a, uint64_t b, bool add) {
    static_assert(N == 64 || N == 128);
    if constexpr (N == 64)
        asm volatile(PTX_PRODUCT("64", PTX_LIST_32, "{%32, %33, %34, %35}, %36", "%37", "%38")
                     : PTX_SUM_32(d, 0)
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int(add)), "n"(int(columns)));
    if constexpr (N == 128)
        asm volatile(PTX_PRODUCT("128", PTX_LIST_64, "{%64, %65, %66, %67}, %68", "%69", "%70")
                     : PTX_SUM_64(d)
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int(add)), "n"(int(columns)));
}

#undef PTX_SUM_4
#undef PTX_SUM_16
#undef PTX_SUM_32
#undef PTX_SUM_64
#undef PTX_LIST_4
#undef PTX_LIST_16
#undef PTX_LIST_32
#undef PTX_LIST_64
#undef PTX_PRODUCT

// A tensor for the copy engine: sizes and box innermost first, strides in bytes of all dimensions but the innermost,
// which is dense; boxes lie in shared memory with 128-byte swizzle. The driver's function is asked for at run time, so
// that nothing links to libcuda.
struct TensorShape {
    cuuint64_t size[4], stride[3];
    cuuint32_t box[4];
};
inline CUtensorMap tensor_map(CUtensorMapDataType type, const void* base, const TensorShape& s) {
    using Encode = decltype(&cuTensorMapEncodeTiled);
    static const Encode encode = [] {
        void* function = nullptr;
        cudaDriverEntryPointQueryResult found;
        CUDA_CHECK(
            cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found));
        REQUIRE(found == cudaDriverEntryPointSuccess, "update the NVIDIA driver: it has no cuTensorMapEncodeTiled");
        return Encode(function);
    }();
    const cuuint32_t dense[4] = {1, 1, 1, 1};
    CUtensorMap map;
    const CUresult status =
        encode(&map, type, 4, const_cast<void*>(base), s.size, s.stride, s.box, dense, CU_TENSOR_MAP_INTERLEAVE_NONE,
               CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    REQUIRE(status == CUDA_SUCCESS, "pass tensors on 16 bytes, with strides of a multiple of 16 bytes");
    return map;
}

} // namespace ptx
#endif
