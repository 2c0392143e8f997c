// What the tiers of 256-bit vectors share: AVX2 with FMA and F16C. Everything runs as fp32: half
// precision is converted while it is packed, and bf16 weights of few tokens are widened as they are read.
#pragma once

#include "panels.h"

namespace {

INLINE void transpose8(__m256* r) {
  __m256 t[8];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    t[2 * i] = _mm256_unpacklo_ps(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm256_unpackhi_ps(r[2 * i], r[2 * i + 1]);
  }
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {
    r[4 * i] = _mm256_shuffle_ps(t[4 * i], t[4 * i + 2], 0x44);
    r[4 * i + 1] = _mm256_shuffle_ps(t[4 * i], t[4 * i + 2], 0xee);
    r[4 * i + 2] = _mm256_shuffle_ps(t[4 * i + 1], t[4 * i + 3], 0x44);
    r[4 * i + 3] = _mm256_shuffle_ps(t[4 * i + 1], t[4 * i + 3], 0xee);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm256_permute2f128_ps(r[i], r[4 + i], 0x20);
    t[4 + i] = _mm256_permute2f128_ps(r[i], r[4 + i], 0x31);
  }
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) r[i] = t[i];
}

template <int lanes_of>
static void pack_rows_f32(const void* const* rows, int lanes, int64_t k, void* panel) {
  const int64_t whole = lanes == lanes_of ? k / 8 * 8 : 0;
  float* to = static_cast<float*>(panel);
  for (int64_t i = 0; i < whole; i += 8)
    for (int lane0 = 0; lane0 < lanes_of; lane0 += 8) {
      const int in_block = lanes_of - lane0 < 8 ? lanes_of - lane0 : 8;
      __m256 r[8];
      for (int lane = 0; lane < 8; ++lane)
        r[lane] = lane < in_block ? _mm256_loadu_ps(static_cast<const float*>(rows[lane0 + lane]) + i) : _mm256_setzero_ps();
      transpose8(r);
      for (int j = 0; j < 8; ++j) {
        if (in_block == 8) {
          _mm256_storeu_ps(to + (i + j) * lanes_of + lane0, r[j]);
        } else {
          float buffer[8];
          _mm256_storeu_ps(buffer, r[j]);
          memcpy(to + (i + j) * lanes_of + lane0, buffer, sizeof(float) * in_block);
        }
      }
    }
  if (whole == k) return;
  const void* rest[lanes_of];
  for (int lane = 0; lane < lanes; ++lane) rest[lane] = static_cast<const float*>(rows[lane]) + whole;
  pack_rows_plain<float, lanes_of>(rest, lanes, k - whole, to + whole * lanes_of);
}

constexpr int mr = 6, b_vectors = 2, nr = 16;
constexpr Microkernel f32 = {Type::f32,
                             mr,
                             nr,
                             1,
                             256,
                             Side::b,
                             {false, false},
                             false,
                             false,
                             {pack_rows_f32<mr>, pack_rows_f32<nr>},
                             {pack_columns_plain<float, mr>, pack_columns_plain<float, nr>},
                             nullptr,
                             nullptr,
                             {multiply_plain<float, b_vectors, mr>, multiply_plain<float, b_vectors, mr>},
                             nullptr};

constexpr Microkernel w8 = w8_microkernel<mr, b_vectors, pack_rows_f32<mr>>;
constexpr Microkernel w8_wide = widened<mr, b_vectors>(w8);

}  // namespace
