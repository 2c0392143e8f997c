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
  int32_t* const to = static_cast<int32_t*>(block);
  vint sums[rows][b_vectors], offset[b_vectors] = {};
#pragma GCC unroll 16
  for (int r = 0; r < rows; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < b_vectors; ++v) sums[r][v] = vint{};
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
    for (int v = 0; v < b_vectors; ++v) store_sums(to + (r * b_vectors + v) * width, sums[r][v] - offset[v], add);
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

// --- few rows: fp32 activations as fixed point ----------------------------------------------------------------------------------------------
// x = scale (u - 2^23): u has 24 bits, and the scale, a power of two, is that of `stretch` values of a row, so that the largest of them keeps
// 22 bits behind its first. The three bytes of u are multiplied as int8 activations are: five instructions for the four weights of a vector's
// lanes, where their conversion to fp32 takes eleven, and a row's products four. A panel is, for each stretch, [stretch / 4][lanes][3 bytes of
// u, the high one first][4], and a scale for each lane.
constexpr int stretch = 2 * width, fixed_offset = 1 << 23;

template <int mr>
static void pack_rows_fixed(const void* const* rows, int lanes, int64_t k, void* panel) {
  uint8_t* to = static_cast<uint8_t*>(panel);
  for (int64_t k0 = 0; k0 < k; k0 += stretch, to += stretch * mr * 4)
    for (int lane = 0; lane < lanes; ++lane) {
      float x[stretch] = {};
      memcpy(x, static_cast<const float*>(rows[lane]) + k0, sizeof(float) * (k - k0 < stretch ? k - k0 : stretch));
      int32_t bits[stretch], largest = 22 << 23;  // from there on 2^(148 - exponent) and its inverse are floats
      memcpy(bits, x, sizeof x);
      for (int i = 0; i < stretch; ++i) largest = (bits[i] & 0x7fffffff) > largest ? bits[i] & 0x7fffffff : largest;
      const int32_t exponent = largest >> 23, inverse_bits = (275 - exponent) << 23,
                    scale_bits = exponent == 255 ? 0x7fc00000 : (exponent - 21) << 23;  // not finite: NaN
      float inverse;
      memcpy(&inverse, &inverse_bits, 4);
      memcpy(to + stretch * mr * 3 + lane * 4, &scale_bits, 4);
      for (int i = 0; i < stretch; ++i) x[i] = x[i] * inverse + 12582912.f;  // 1.5 * 2^23: below 2^22, the nearest integer in the low bits
      memcpy(bits, x, sizeof x);
      for (int i = 0; i < stretch; ++i) {
        const int32_t u = bits[i] - 0x4b400000 + fixed_offset;
        uint8_t* const at = to + (i / 4 * mr + lane) * 12 + i % 4;
        at[0] = static_cast<uint8_t>(u >> 16), at[4] = static_cast<uint8_t>(u >> 8), at[8] = static_cast<uint8_t>(u);
      }
    }
}

template <int mr, int rows = mr>
static void multiply_fixed(const void* a, int64_t a_stride, const void* b, void* block, int64_t k, int used, bool add,
                           const Prefetch& prefetch) {
  if constexpr (rows > 1) {
    if (used < rows) return multiply_fixed<mr, rows - 1>(a, a_stride, b, block, k, used, add, prefetch);
  }
  constexpr int b_vectors = 2;
  const char *row = static_cast<const char*>(a), *column_bytes = static_cast<const char*>(b);
  vfloat sums[rows][b_vectors] = {};
  for (; k > 0; k -= stretch, row += stretch * mr) {
    vint products[rows][3][b_vectors] = {}, offset[b_vectors] = {};
    for (int step = 0; step < stretch / 4; ++step, row += mr * 12, column_bytes += b_vectors * vector_bytes) {
      vint column[b_vectors];
#pragma GCC unroll 4
      for (int v = 0; v < b_vectors; ++v) {
        __builtin_prefetch(column_bytes + v * vector_bytes + ahead_alone);
        column[v] = load<vint>(column_bytes + v * vector_bytes);
        offset[v] = add_dots(offset[v], 0x80808080u, column[v]);
      }
#pragma GCC unroll 16
      for (int r = 0; r < rows; ++r)
#pragma GCC unroll 3
        for (int byte = 0; byte < 3; ++byte) {
          uint32_t four;
          memcpy(&four, row + (r * 3 + byte) * 4, 4);
#pragma GCC unroll 4
          for (int v = 0; v < b_vectors; ++v) products[r][byte][v] = add_dots(products[r][byte][v], four, column[v]);
        }
    }
#pragma GCC unroll 16
    for (int r = 0; r < rows; ++r) {
      float scale;
      memcpy(&scale, row + r * 4, 4);
#pragma GCC unroll 4
      for (int v = 0; v < b_vectors; ++v) {
        const vint high = ((products[r][0][v] - offset[v]) << 8) + products[r][1][v];
        const vfloat sum = multiply_add(256.f, __builtin_convertvector(high, vfloat), __builtin_convertvector(products[r][2][v], vfloat));
        sums[r][v] = multiply_add(scale, sum, sums[r][v]);
      }
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < rows; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < b_vectors; ++v) store_sums(static_cast<float*>(block) + (r * b_vectors + v) * width, sums[r][v], add);
}

template <int mr>
constexpr Microkernel fixed_microkernel = {Type::f32,
                                           mr,
                                           2 * width,
                                           stretch,
                                           512,
                                           Side::b,
                                           {false, false},
                                           false,
                                           false,
                                           {pack_rows_fixed<mr>, nullptr},
                                           {nullptr, nullptr},
                                           nullptr,
                                           nullptr,
                                           {multiply_fixed<mr>, multiply_fixed<mr>},
                                           nullptr,
                                           true};

}  // namespace
