// Instructions of sm_90a: asynchronous copies of tensors, barriers in shared memory, products of warpgroups. One PTX instruction each, with
// the title of its section in the PTX ISA; shared memory goes by its 32-bit addresses. Emulated by tests/emulation/emulator/hopper.h.
#pragma once

#include "ampere.h"
#include "descriptor.h"
#include "tensor_map.h"

#ifdef CMOE_EMULATE_CUDA
#include "emulator/hopper.h"
#else

namespace cmoe::cuda {

// --- barriers in shared memory, "mbarrier"
__device__ inline void mbarrier_init(SharedAddress barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}
// Makes initialised barriers known to the copies' unit ("membar/fence").
__device__ inline void fence_mbarrier_init() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
__device__ inline void mbarrier_arrive(SharedAddress barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
__device__ inline void mbarrier_arrive_expect(SharedAddress barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
// Waits until the phase of this parity is over. try_wait sleeps for a while, so the loop around it is rarely taken twice.
__device__ inline void mbarrier_wait(SharedAddress barrier, uint32_t parity) {
  asm volatile(
      "{\n.reg .pred over;\nagain:\nmbarrier.try_wait.parity.shared::cta.b64 over, [%0], %1;\n@over bra done;\nbra again;\ndone:\n}" ::"r"(
          barrier),
      "r"(parity)
      : "memory");
}
// An arrival once all cp.async that this thread has issued are complete ("cp.async.mbarrier.arrive").
__device__ inline void cp_async_mbarrier_arrive(SharedAddress barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(barrier) : "memory");
}

// Orders this thread's view of shared memory by ordinary accesses with that of tensor copies and warpgroup products ("membar/fence").
__device__ inline void fence_async_proxy() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// --- a barrier of some warps ("bar, barrier")
__device__ inline void barrier_sync(uint32_t id, uint32_t threads) {
  asm volatile("barrier.cta.sync.aligned %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// --- registers per thread of a warpgroup ("setmaxnreg")
template <int N>
__device__ inline void fewer_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N));
}
template <int N>
__device__ inline void more_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N));
}

// --- copies of tensors ("cp.async.bulk.tensor"): the box of the map at these coordinates, the fastest first; what lies outside of
// the tensor is zeros.
__device__ inline void prefetch(const TensorMap& map) { asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory"); }
__device__ inline void tma_load(SharedAddress to, const TensorMap& map, SharedAddress barrier, int c0, int c1, int c2) {
  asm volatile("cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5}], [%2];" ::"r"(to),
               "l"(&map), "r"(barrier), "r"(c0), "r"(c1), "r"(c2)
               : "memory");
}

// --- products of a warpgroup ("wgmma.mma_async")
// Before the first product, and wherever accumulators were touched since the last one.
__device__ inline void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ inline void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int N>
__device__ inline void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
}
// Keeps the compiler from moving reads and writes of accumulators across this point: it knows nothing of products under way.
template <int N>
__device__ inline void pin(float (&d)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

// d [64, N] += a [64, 16] b [N, 16]^T. Thread t of the warpgroup has in d[i]
//   row 16 (t / 32) + t % 32 / 4 + 8 (i / 2 % 2), column 8 (i / 4) + 2 (t % 4) + i % 2.
template <class T, int N, Major A, Major B>
__device__ inline void wgmma(float (&d)[N / 2], uint64_t a, uint64_t b);

#define D4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define D16(i) D4(i), D4(i + 4), D4(i + 8), D4(i + 12)
#define D32(i) D16(i), D16(i + 16)
#define TEN(t) "%" #t "0,%" #t "1,%" #t "2,%" #t "3,%" #t "4,%" #t "5,%" #t "6,%" #t "7,%" #t "8,%" #t "9"
#define FIRST "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9," TEN(1) "," TEN(2) ","
#define TO_31 FIRST "%30,%31"
#define TO_63 FIRST TEN(3) "," TEN(4) "," TEN(5) ",%60,%61,%62,%63"
#define TO_127                                                                                        \
  FIRST TEN(3) "," TEN(4) "," TEN(5) "," TEN(6) "," TEN(7) "," TEN(8) "," TEN(9) "," TEN(10) "," TEN( \
      11) ",%120,%121,%122,%123,%124,%125,%126,%127"
// a and b are operands n and n + 1, their majors n + 2 and n + 3 (trans-a, trans-b); scale-d, scale-a and scale-b are 1.
#define WGMMA(T, type, N, registers, a, b, tA, tB, ...)                                                                                   \
  template <>                                                                                                                             \
  struct Wgmma<T, N> {                                                                                                                    \
    template <Major A, Major B>                                                                                                           \
    __device__ static void run(float (&d)[N / 2], uint64_t da, uint64_t db) {                                                             \
      asm volatile("wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." type "." type " {" registers "}, " a ", " b ", 1, 1, 1, " tA ", " tB \
                   ";"                                                                                                                    \
                   : __VA_ARGS__                                                                                                          \
                   : "l"(da), "l"(db), "n"(int(A)), "n"(int(B)));                                                                         \
    }                                                                                                                                     \
  };
#define WGMMA_OF(T, type)                                                 \
  WGMMA(T, type, 64, TO_31, "%32", "%33", "%34", "%35", D32(0))           \
  WGMMA(T, type, 128, TO_63, "%64", "%65", "%66", "%67", D32(0), D32(32)) \
  WGMMA(T, type, 256, TO_127, "%128", "%129", "%130", "%131", D32(0), D32(32), D32(64), D32(96))

template <class T, int N>
struct Wgmma;
WGMMA_OF(bf16, "bf16")
WGMMA_OF(fp16, "f16")

#undef WGMMA_OF
#undef WGMMA
#undef TO_127
#undef TO_63
#undef TO_31
#undef FIRST
#undef TEN
#undef D32
#undef D16
#undef D4

template <class T, int N, Major A, Major B>
__device__ inline void wgmma(float (&d)[N / 2], uint64_t a, uint64_t b) {
  Wgmma<T, N>::template run<A, B>(d, a, b);
}

}  // namespace cmoe::cuda

#endif
