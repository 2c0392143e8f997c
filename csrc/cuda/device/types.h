// Half-precision types of device code, and their conversions.
#pragma once

#ifdef CMOE_EMULATE_CUDA
#include "emulator/cuda.h"
#include "emulator/types.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace cmoe::cuda {

using bf16 = __nv_bfloat16;
using fp16 = __half;

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(bf16 x) { return __bfloat162float(x); }
__device__ inline float to_float(fp16 x) { return __half2float(x); }

template <class T>
__device__ T from_float(float x);
template <>
__device__ inline float from_float<float>(float x) {
  return x;
}
template <>
__device__ inline bf16 from_float<bf16>(float x) {
  return __float2bfloat16_rn(x);
}
template <>
__device__ inline fp16 from_float<fp16>(float x) {
  return __float2half_rn(x);
}

}  // namespace cmoe::cuda

// Shared memory: CU_SHARED(float, sums, 32) declares an array, CU_DYNAMIC_SHARED(memory) names what the launch asked for.
#define CU_SHARED(T, name, n) __shared__ T name[n]
#define CU_DYNAMIC_SHARED(name) extern __shared__ __align__(1024) unsigned char name[]
#endif
