// What the AVX-512 tiers share: packing through transposes of 16 x 16 double words, in registers. A double word is an fp32 value, or two
// bf16 values that follow each other along k.
#pragma once

#include "panels.h"

namespace {

INLINE void transpose16(__m512i* r) {
  __m512i t[16];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    r[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
    r[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
    r[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
    r[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
  }
#pragma GCC unroll 2
  for (int h = 0; h < 2; ++h)
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      t[8 * h + i] = _mm512_shuffle_i32x4(r[8 * h + i], r[8 * h + 4 + i], 0x88);
      t[8 * h + 4 + i] = _mm512_shuffle_i32x4(r[8 * h + i], r[8 * h + 4 + i], 0xdd);
    }
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    r[i] = _mm512_shuffle_i32x4(t[i], t[8 + i], 0x88);
    r[8 + i] = _mm512_shuffle_i32x4(t[i], t[8 + i], 0xdd);
  }
}

INLINE __mmask32 low_halves(int64_t count) { return count >= 32 ? ~0u : (1u << count) - 1; }

// [lanes][k] to [double words of k][lanes_of]; `halves` counts 16-bit units along k, `padded` the double words to write.
template <int lanes_of>
INLINE void pack_double_words(const void* const* rows, int lanes, int64_t halves, int64_t padded, void* panel) {
  int32_t* to = static_cast<int32_t*>(panel);
  for (int lane0 = 0; lane0 < lanes_of; lane0 += 16) {
    const int in_block = lanes_of - lane0 < 16 ? lanes_of - lane0 : 16;
    const __mmask16 kept = static_cast<__mmask16>((1u << in_block) - 1);
    for (int64_t i = 0; i < padded; i += 16) {
      __m512i r[16];
      const __mmask32 mask = halves > 2 * i ? low_halves(halves - 2 * i) : 0;
#pragma GCC unroll 16
      for (int lane = 0; lane < 16; ++lane)
        r[lane] = lane0 + lane < lanes ? _mm512_maskz_loadu_epi16(mask, static_cast<const int32_t*>(rows[lane0 + lane]) + i)
                                       : _mm512_setzero_si512();
      transpose16(r);
      const int count = static_cast<int>(padded - i < 16 ? padded - i : 16);
      for (int j = 0; j < count; ++j) _mm512_mask_storeu_epi32(to + (i + j) * lanes_of + lane0, kept, r[j]);
    }
  }
}
template <int lanes_of>
static void pack_rows_f32(const void* const* rows, int lanes, int64_t k, void* panel) {
  pack_double_words<lanes_of>(rows, lanes, 2 * k, k, panel);
}

static void transpose_avx512(const float* from, int64_t from_ld, float* to, int64_t to_ld, int rows, int columns) {
  for (int r0 = 0; r0 < rows; r0 += 16)
    for (int c0 = 0; c0 < columns; c0 += 16) {
      __m512i r[16];
      for (int i = 0; i < 16; ++i) r[i] = _mm512_loadu_si512(from + (r0 + i) * from_ld + c0);
      transpose16(r);
      for (int i = 0; i < 16; ++i) _mm512_storeu_si512(to + (c0 + i) * to_ld + r0, r[i]);
    }
}

constexpr int mr = 14, b_vectors = 2, nr = 32;

constexpr Microkernel w8 = w8_microkernel<mr, b_vectors, pack_rows_f32<mr>>;
constexpr Microkernel w8_wide = widened<mr, b_vectors>(w8);
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

}  // namespace
