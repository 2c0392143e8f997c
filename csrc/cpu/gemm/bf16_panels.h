// Packing of bf16 into pairs along k, and the product of such panels by VDPBF16PS: a panel is [k / 2][lanes] pairs.
#pragma once

#include "avx512.h"

namespace {

// The pairs (a0 b0 a1 b1 ...) of two rows of 32.
INLINE void interleave(__m512i a, __m512i b, __m512i* low, __m512i* high) {
  const __m512i first = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6, 37, 5, 36, 4, 35, 3,
                                         34, 2, 33, 1, 32, 0);
  *low = _mm512_permutex2var_epi16(a, first, b);
  *high = _mm512_permutex2var_epi16(a, _mm512_add_epi16(first, _mm512_set1_epi16(16)), b);
}

template <int lanes_of>
static void pack_rows_bf16(const void* const* rows, int lanes, int64_t k, void* panel) {
  pack_double_words<lanes_of>(rows, lanes, k, (k + 1) / 2, panel);
}
template <int lanes_of>
static void pack_columns_bf16(const void* const* rows, int64_t lanes, int64_t k0, int64_t k, void* panels, int64_t panel_bytes) {
  static_assert(lanes_of <= 32);
  constexpr __mmask16 kept_low = lanes_of >= 16 ? 0xffff : (1u << lanes_of) - 1, kept_high = lanes_of >= 32  ? 0xffff
                                                                                             : lanes_of > 16 ? (1u << (lanes_of - 16)) - 1
                                                                                                             : 0;
  const __m512i zero = _mm512_setzero_si512();
  for (int64_t i = 0; i < k; i += 2) {
    const uint16_t *const a = static_cast<const uint16_t*>(rows[i]), *const b =
                                                                         i + 1 < k ? static_cast<const uint16_t*>(rows[i + 1]) : nullptr;
    char* to = static_cast<char*>(panels) + (k0 + i) * lanes_of * 2;
    for (int64_t lane = 0; lane < lanes; lane += lanes_of, to += panel_bytes) {
      const __mmask32 mask = low_halves(lanes - lane < lanes_of ? lanes - lane : lanes_of);
      __m512i low, high;
      interleave(_mm512_maskz_loadu_epi16(mask, a + lane), b ? _mm512_maskz_loadu_epi16(mask, b + lane) : zero, &low, &high);
      _mm512_mask_storeu_epi32(to, kept_low, low);
      if (lanes_of > 16) _mm512_mask_storeu_epi32(to + 64, kept_high, high);
    }
  }
}

template <int rows>
INLINE void multiply_pairs(const int32_t* a, const int32_t* b, float* block, int64_t pairs, bool add, const Prefetch& prefetch) {
  __m512 sums[rows][b_vectors];
#pragma GCC unroll 16
  for (int r = 0; r < rows; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < b_vectors; ++v) sums[r][v] = _mm512_setzero_ps();
  fetch_beside(prefetch, pairs, [&](int64_t steps) __attribute__((always_inline)) {
#pragma GCC unroll 2
    for (; steps > 0; --steps, a += mr, b += nr) {
      __m512i column[b_vectors];
#pragma GCC unroll 4
      for (int v = 0; v < b_vectors; ++v) column[v] = _mm512_loadu_si512(b + v * 16);
#pragma GCC unroll 16
      for (int r = 0; r < rows; ++r) {
        const __m512bh row = (__m512bh)_mm512_set1_epi32(a[r]);
#pragma GCC unroll 4
        for (int v = 0; v < b_vectors; ++v) sums[r][v] = _mm512_dpbf16_ps(sums[r][v], row, (__m512bh)column[v]);
      }
    }
  });
#pragma GCC unroll 16
  for (int r = 0; r < rows; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < b_vectors; ++v) store_sums(block + r * nr + v * 16, (vfloat)sums[r][v], add);
}

template <int rows = mr>
static void multiply_bf16(const void* a, int64_t a_stride, const void* b, void* block, int64_t k, int used, bool add,
                          const Prefetch& prefetch) {
  if constexpr (rows > 1) {
    if (used < rows) return multiply_bf16<rows - 1>(a, a_stride, b, block, k, used, add, prefetch);
  }
  multiply_pairs<rows>(static_cast<const int32_t*>(a), static_cast<const int32_t*>(b), static_cast<float*>(block), k / 2, add, prefetch);
}

struct PairsOfBf16 {
  static constexpr int step = 32, size = 2;
  static __m512i load(const void* p) { return _mm512_loadu_si512(p); }
  static void add_product(vfloat& sum, __m512i a, __m512i b) { sum = (vfloat)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b); }
};
constexpr Microkernel bf16_small_m = small_m_of<PairsOfBf16>(Type::bf16);

constexpr Microkernel bf16_pairs = {Type::bf16,
                                    mr,
                                    nr,
                                    2,
                                    256,
                                    Side::b,
                                    {false, false},
                                    false,
                                    false,
                                    {pack_rows_bf16<mr>, pack_rows_bf16<nr>},
                                    {pack_columns_bf16<mr>, pack_columns_bf16<nr>},
                                    nullptr,
                                    nullptr,
                                    {multiply_bf16<>, multiply_bf16<>},
                                    nullptr};

}  // namespace
