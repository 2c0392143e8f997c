// The product of int8 panels by VPDPBUSD, which multiplies unsigned bytes by signed ones and adds four products to an int32.
//
// Operand A is activations + 128, [k / 4][lanes][4]. 128 times the sum of the weights is subtracted: it is a row more of products.
#pragma once

#include "panels.h"

#if defined(CMOE_EMULATE_AVX_VNNI)
#include "avx_vnni_emulation.h"
#endif

namespace {

INLINE vint add_dots(vint sums, uint32_t a, vint b) {
#if defined(HAS_AVX512)
  return (vint)_mm512_dpbusd_epi32((__m512i)sums, _mm512_set1_epi32(static_cast<int32_t>(a)), (__m512i)b);
#else
  return (vint)_mm256_dpbusd_avx_epi32((__m256i)sums, _mm256_set1_epi32(static_cast<int32_t>(a)), (__m256i)b);
#endif
}

template <int mr>
static void pack_rows_i8(const void* const* rows, int lanes, int64_t k, void* panel) {
  char* to = static_cast<char*>(panel);
  for (int64_t i = 0; i < k; i += 4)
    for (int lane = 0; lane < mr; ++lane, to += 4) {
      uint32_t four = 0;
      if (lane < lanes) memcpy(&four, static_cast<const char*>(rows[lane]) + i, k - i < 4 ? k - i : 4);
      four ^= 0x80808080u;
      memcpy(to, &four, 4);
    }
}

template <int mr, int rows = mr>
static void multiply_i8(const void* a, int64_t a_stride, const void* b, void* block, int64_t k, int used, bool add,
                        const Prefetch& prefetch) {
  if constexpr (rows > 1) {
    if (used < rows) return multiply_i8<mr, rows - 1>(a, a_stride, b, block, k, used, add, prefetch);
  }
  constexpr int b_vectors = 2;
  constexpr bool streams = rows < mr;  // one panel of rows: each weight is read once
  const char *row = static_cast<const char*>(a), *column_bytes = static_cast<const char*>(b);
  char* const to = static_cast<char*>(block);
  vint sums[rows][b_vectors], offset[b_vectors] = {};
#pragma GCC unroll 16
  for (int r = 0; r < rows; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < b_vectors; ++v) sums[r][v] = add ? load<vint>(to + (r * b_vectors + v) * vector_bytes) : vint{};
  fetch_beside(streams ? Prefetch{} : prefetch, k / 4, [&](int64_t steps) __attribute__((always_inline)) {
    for (; steps > 0; --steps, row += 4 * mr, column_bytes += b_vectors * vector_bytes) {
      if constexpr (streams)
        for (int v = 0; v < b_vectors; ++v) __builtin_prefetch(column_bytes + v * vector_bytes + ahead_alone);
      vint column[b_vectors];
#pragma GCC unroll 4
      for (int v = 0; v < b_vectors; ++v) {
        column[v] = load<vint>(column_bytes + v * vector_bytes);
        offset[v] = add_dots(offset[v], 0x80808080u, column[v]);
      }
#pragma GCC unroll 16
      for (int r = 0; r < rows; ++r) {
        uint32_t four;
        memcpy(&four, row + 4 * r, 4);
#pragma GCC unroll 4
        for (int v = 0; v < b_vectors; ++v) sums[r][v] = add_dots(sums[r][v], four, column[v]);
      }
    }
  });
#pragma GCC unroll 16
  for (int r = 0; r < rows; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < b_vectors; ++v) store(to + (r * b_vectors + v) * vector_bytes, sums[r][v] - offset[v]);
}

template <int mr>
constexpr Microkernel vnni_microkernel = {Type::i8,
                                          mr,
                                          2 * width,
                                          4,
                                          512,
                                          Side::b,
                                          {false, false},
                                          false,
                                          false,
                                          {pack_rows_i8<mr>, nullptr},
                                          {nullptr, nullptr},
                                          nullptr,
                                          nullptr,
                                          {multiply_i8<mr>, multiply_i8<mr>},
                                          nullptr,
                                          true};

}  // namespace
