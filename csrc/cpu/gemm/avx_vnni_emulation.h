// VPDPBUSD of AVX-VNNI in plain C++, for tests on machines that lack it: built in with -DCMOE_EMULATE_AVX_VNNI and never in a release.
#pragma once

#include <immintrin.h>
#include <stdint.h>
#include <string.h>

namespace {

inline __attribute__((noinline)) __m256i emulated_dot_bytes(__m256i sums, __m256i a, __m256i b) {
  int32_t sum[8];
  uint8_t x[32];
  int8_t y[32];
  memcpy(sum, &sums, 32), memcpy(x, &a, 32), memcpy(y, &b, 32);
  for (int i = 0; i < 32; ++i) sum[i / 4] += x[i] * y[i];
  memcpy(&sums, sum, 32);
  return sums;
}

}  // namespace

#undef _mm256_dpbusd_avx_epi32
#define _mm256_dpbusd_avx_epi32 emulated_dot_bytes
