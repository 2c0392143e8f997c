// What CUDA C++ has beyond C++, for g++: keywords, built-in variables, vector types, and the intrinsics that kernels here use.
#pragma once

#include <atomic>
#include <bit>
#include <cmath>

#include "launch.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __noinline__ [[gnu::noinline]]
#define __restrict__ __restrict
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(n) __attribute__((aligned(n)))

#define threadIdx (emulator::self().index)
#define blockIdx (emulator::block().index)
#define blockDim (emulator::grid->block)
#define gridDim (emulator::grid->grid)

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
using std::max;
using std::min;

inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

inline void __syncthreads(emulator::Where where = emulator::Where::current()) { emulator::barrier(0, 0, true, where); }
inline void __syncwarp(uint32_t mask = ~0u, emulator::Where where = emulator::Where::current()) {
  int nothing = 0;
  emulator::collective(mask, nothing, "__syncwarp", where, [](int**) {});
}

namespace emulator {

// Each lane gets the value of the lane that `source` names for it; its own where that is not in the mask or not in the warp.
template <class T, class Source>
T shuffle(uint32_t mask, T value, const char* what, const Where& where, Source source) {
  struct Argument {
    T value, result;
    int source;
  } argument{value, value, source(static_cast<int>(self().lane()))};
  collective(mask, argument, what, where, [mask](Argument** lane) {
    for (int i = 0; i < 32; ++i)
      if (mask >> i & 1) {
        const int from = lane[i]->source;
        lane[i]->result = from >= 0 && from < 32 && (mask >> from & 1) ? lane[from]->value : lane[i]->value;
      }
  });
  return argument.result;
}

}  // namespace emulator

// `width` divides the warp into parts of that many lanes, as in CUDA.
template <class T>
T __shfl_sync(uint32_t mask, T value, int source, int width = 32, emulator::Where where = emulator::Where::current()) {
  return emulator::shuffle(mask, value, "__shfl_sync", where, [=](int lane) { return (lane & -width) | (source & (width - 1)); });
}
template <class T>
T __shfl_xor_sync(uint32_t mask, T value, int bits, int width = 32, emulator::Where where = emulator::Where::current()) {
  return emulator::shuffle(mask, value, "__shfl_xor_sync", where,
                           [=](int lane) { return (lane ^ bits) < (lane & -width) + width ? lane ^ bits : lane; });
}
template <class T>
T __shfl_up_sync(uint32_t mask, T value, unsigned by, int width = 32, emulator::Where where = emulator::Where::current()) {
  return emulator::shuffle(mask, value, "__shfl_up_sync", where,
                           [=](int lane) { return lane - static_cast<int>(by) >= (lane & -width) ? lane - static_cast<int>(by) : lane; });
}
template <class T>
T __shfl_down_sync(uint32_t mask, T value, unsigned by, int width = 32, emulator::Where where = emulator::Where::current()) {
  return emulator::shuffle(mask, value, "__shfl_down_sync", where, [=](int lane) {
    return lane + static_cast<int>(by) < (lane & -width) + width ? lane + static_cast<int>(by) : lane;
  });
}

namespace emulator {

template <class Of>
uint32_t vote(uint32_t mask, uint32_t value, const char* what, const Where& where, Of of) {
  struct Argument {
    uint32_t value, result;
  } argument{value, 0};
  collective(mask, argument, what, where, [&](Argument** lane) {
    for (int i = 0; i < 32; ++i)
      if (mask >> i & 1) {
        lane[i]->result = 0;
        for (int j = 0; j < 32; ++j)
          if ((mask >> j & 1) && of(lane[i]->value, lane[j]->value)) lane[i]->result |= 1u << j;
      }
  });
  return argument.result;
}

}  // namespace emulator

inline uint32_t __ballot_sync(uint32_t mask, int predicate, emulator::Where where = emulator::Where::current()) {
  return emulator::vote(mask, predicate != 0, "__ballot_sync", where, [](uint32_t, uint32_t other) { return other != 0; });
}
inline int __any_sync(uint32_t mask, int predicate, emulator::Where where = emulator::Where::current()) {
  return emulator::vote(mask, predicate != 0, "__any_sync", where, [](uint32_t, uint32_t other) { return other != 0; }) != 0;
}
inline int __all_sync(uint32_t mask, int predicate, emulator::Where where = emulator::Where::current()) {
  return emulator::vote(mask, predicate != 0, "__all_sync", where, [](uint32_t, uint32_t other) { return other != 0; }) == mask;
}
inline uint32_t __match_any_sync(uint32_t mask, uint32_t value, emulator::Where where = emulator::Where::current()) {
  return emulator::vote(mask, value, "__match_any_sync", where, [](uint32_t own, uint32_t other) { return own == other; });
}

inline int __popc(uint32_t x) { return std::popcount(x); }
inline int __ffs(uint32_t x) { return x ? std::countr_zero(x) + 1 : 0; }
inline int __clz(uint32_t x) { return std::countl_zero(x); }
inline float __int_as_float(int x) { return std::bit_cast<float>(x); }
inline float __uint_as_float(uint32_t x) { return std::bit_cast<float>(x); }
inline float __fmul_rn(float a, float b) { return a * b; }
inline uint32_t __float_as_uint(float x) { return std::bit_cast<uint32_t>(x); }
template <class T>
T __ldg(const T* p) {
  return *p;
}

// Integers only: a sum of floats would depend on the order. Other threads may run before each, as they may on a GPU.
template <class T>
  requires std::is_integral_v<T>
T atomicAdd(T* p, T value) {
  emulator::yield();
  return __atomic_fetch_add(p, value, __ATOMIC_RELAXED);
}
inline int atomicCAS(int* p, int expected, int value) {
  emulator::yield();
  __atomic_compare_exchange_n(p, &expected, value, false, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE);
  return expected;
}
inline void __threadfence() { std::atomic_thread_fence(std::memory_order_seq_cst); }

#define CU_SHARED(T, name, n)       \
  static const char name##_key = 0; \
  T* const name = emulator::shared_array<T>(n, &name##_key)
#define CU_DYNAMIC_SHARED(name) unsigned char* const name = reinterpret_cast<unsigned char*>(emulator::block().shared)
