// The AVX-512 instructions that these files use, element by element, for tests on machines that lack them: built in with
// -DCMOE_EMULATE_AVX512 (and -DCMOE_EMULATE_AVX512_BF16) and never in a release. AVX2, FMA and F16C are real.
#pragma once

#include <immintrin.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

// Not inline where it is used: the unrolled loops around would take minutes to compile.
#define EMULATED inline __attribute__((noinline))

namespace {

template <class T>
struct Elements {
  static constexpr int count = 64 / sizeof(T);
  T at[count];
};
template <class T, class V>
EMULATED Elements<T> elements_of(const V& v) {
  static_assert(sizeof v == 64);
  Elements<T> x;
  memcpy(&x, &v, 64);
  return x;
}
template <class V = __m512i, class T>
EMULATED V vector_from(const Elements<T>& x) {
  V v;
  memcpy(&v, &x, 64);
  return v;
}

EMULATED __m512i emulated_load(const void* p) {
  __m512i v;
  memcpy(&v, p, 64);
  return v;
}
EMULATED __m512 emulated_load_ps(const void* p) { return (__m512)emulated_load(p); }
template <class V>
EMULATED void emulated_store(void* p, const V& v) {
  static_assert(sizeof v == 64);
  memcpy(p, &v, 64);
}
EMULATED void emulated_stream(void* p, __m512i v) {
  if (reinterpret_cast<uintptr_t>(p) % 64) {
    fputs("a streaming store that is not aligned\n", stderr);
    abort();
  }
  memcpy(p, &v, 64);
}
EMULATED __m512i emulated_masked_load(__mmask32 mask, const void* p) {
  Elements<uint16_t> x = {};
  for (int i = 0; i < x.count; ++i)
    if (mask >> i & 1) memcpy(&x.at[i], static_cast<const char*>(p) + 2 * i, 2);
  return vector_from(x);
}
EMULATED void emulated_masked_store(void* p, __mmask16 mask, __m512i v) {
  const auto x = elements_of<uint32_t>(v);
  for (int i = 0; i < x.count; ++i)
    if (mask >> i & 1) memcpy(static_cast<char*>(p) + 4 * i, &x.at[i], 4);
}

EMULATED __m512i emulated_zero_vector() { return __m512i{}; }
EMULATED __m512 emulated_zero_vector_ps() { return __m512{}; }
template <class T>
EMULATED __m512i emulated_set1(T value) {
  Elements<T> x;
  for (T& at : x.at) at = value;
  return vector_from(x);
}
template <class... Values>
EMULATED __m512i emulated_set_epi16(Values... highest_first) {
  const int16_t values[] = {static_cast<int16_t>(highest_first)...};
  Elements<int16_t> x;
  for (int i = 0; i < x.count; ++i) x.at[i] = values[x.count - 1 - i];
  return vector_from(x);
}
EMULATED __m512i emulated_add_epi16(__m512i a, __m512i b) {
  auto x = elements_of<uint16_t>(a), y = elements_of<uint16_t>(b);
  for (int i = 0; i < x.count; ++i) x.at[i] = static_cast<uint16_t>(x.at[i] + y.at[i]);
  return vector_from(x);
}

// Within each 16 bytes: the low or the high halves of both, in turn.
template <class T, bool high>
EMULATED __m512i emulated_unpack(__m512i a, __m512i b) {
  constexpr int in_part = 16 / sizeof(T);
  const auto x = elements_of<T>(a), y = elements_of<T>(b);
  Elements<T> z;
  for (int part = 0; part < z.count; part += in_part)
    for (int i = 0; i < in_part / 2; ++i) {
      const int from = part + i + (high ? in_part / 2 : 0);
      z.at[part + 2 * i] = x.at[from];
      z.at[part + 2 * i + 1] = y.at[from];
    }
  return vector_from(z);
}
EMULATED __m512i emulated_shuffle_parts(__m512i a, __m512i b, int which) {
  Elements<char> z;
  const auto x = elements_of<char>(a), y = elements_of<char>(b);
  for (int part = 0; part < 4; ++part) memcpy(z.at + 16 * part, (part < 2 ? x : y).at + 16 * (which >> 2 * part & 3), 16);
  return vector_from(z);
}
EMULATED __m512i emulated_permute_two(__m512i a, __m512i index, __m512i b) {
  const auto x = elements_of<uint16_t>(a), at = elements_of<uint16_t>(index), y = elements_of<uint16_t>(b);
  Elements<uint16_t> z;
  for (int i = 0; i < z.count; ++i) z.at[i] = (at.at[i] & 32 ? y : x).at[at.at[i] & 31];
  return vector_from(z);
}

EMULATED __m256i emulated_to_f16(__m512 v, int) {
  __m256 half[2];
  memcpy(half, &v, 64);
  const __m128i low = _mm256_cvtps_ph(half[0], _MM_FROUND_TO_NEAREST_INT), high = _mm256_cvtps_ph(half[1], _MM_FROUND_TO_NEAREST_INT);
  return _mm256_set_m128i(high, low);
}
EMULATED __m512 emulated_from_f16(__m256i v) {
  const __m256 half[2] = {_mm256_cvtph_ps(_mm256_castsi256_si128(v)), _mm256_cvtph_ps(_mm256_extracti128_si256(v, 1))};
  return emulated_load_ps(half);
}

// As the bf16 instructions do: numbers too small for a normal fp32 are zeros, whatever the mode of the processor.
EMULATED uint32_t without_subnormals(uint32_t bits) { return bits & 0x7f800000u ? bits : bits & 0x80000000u; }
EMULATED float flushed(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  bits = without_subnormals(bits);
  memcpy(&x, &bits, 4);
  return x;
}
EMULATED uint16_t emulated_half(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  if (x != x) return static_cast<uint16_t>(bits >> 16 | 0x40u);
  bits = without_subnormals(bits);
  return static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}
EMULATED float emulated_wide(uint16_t half) {
  const uint32_t bits = without_subnormals(static_cast<uint32_t>(half) << 16);
  float x;
  memcpy(&x, &bits, 4);
  return x;
}
EMULATED __m256i emulated_to_bf16(__m512 v) {
  const auto x = elements_of<float>(v);
  uint16_t halves[16];
  for (int i = 0; i < 16; ++i) halves[i] = emulated_half(x.at[i]);
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(halves));
}
EMULATED __m512i emulated_to_bf16_twice(__m512 high, __m512 low) {
  const auto x = elements_of<float>(low), y = elements_of<float>(high);
  Elements<uint16_t> z;
  for (int i = 0; i < 16; ++i) {
    z.at[i] = emulated_half(x.at[i]);
    z.at[16 + i] = emulated_half(y.at[i]);
  }
  return vector_from(z);
}
template <class V>
EMULATED __m512 emulated_dot_pairs(__m512 sums, const V& a, const V& b) {
  auto s = elements_of<float>(sums);
  const auto x = elements_of<uint16_t>(a), y = elements_of<uint16_t>(b);
  for (int i = 0; i < s.count; ++i)
    for (int half = 1; half >= 0; --half)
      s.at[i] = flushed(s.at[i] + emulated_wide(x.at[2 * i + half]) * emulated_wide(y.at[2 * i + half]));
  return vector_from<__m512>(s);
}

EMULATED __m512i emulated_dot_bytes(__m512i sums, __m512i a, __m512i b) {
  auto sum = elements_of<int32_t>(sums);
  const auto x = elements_of<uint8_t>(a);
  const auto y = elements_of<int8_t>(b);
  for (int i = 0; i < x.count; ++i) sum.at[i / 4] += x.at[i] * y.at[i];
  return vector_from(sum);
}

}  // namespace

#undef _mm512_cvtps_ph
#undef _mm512_shuffle_i32x4
#define _mm512_loadu_si512 emulated_load
#define _mm512_loadu_ps emulated_load_ps
#define _mm512_storeu_si512 emulated_store
#define _mm512_storeu_ps emulated_store
#define _mm512_stream_si512 emulated_stream
#define _mm512_maskz_loadu_epi16 emulated_masked_load
#define _mm512_mask_storeu_epi32 emulated_masked_store
#define _mm512_setzero_si512 emulated_zero_vector
#define _mm512_setzero_ps emulated_zero_vector_ps
#define _mm512_set1_epi16 emulated_set1<int16_t>
#define _mm512_set1_epi32 emulated_set1<int32_t>
#define _mm512_set_epi16 emulated_set_epi16
#define _mm512_add_epi16 emulated_add_epi16
#define _mm512_unpacklo_epi32 emulated_unpack<int32_t, false>
#define _mm512_unpackhi_epi32 emulated_unpack<int32_t, true>
#define _mm512_unpacklo_epi64 emulated_unpack<int64_t, false>
#define _mm512_unpackhi_epi64 emulated_unpack<int64_t, true>
#define _mm512_shuffle_i32x4 emulated_shuffle_parts
#define _mm512_permutex2var_epi16 emulated_permute_two
#define _mm512_cvtps_ph emulated_to_f16
#define _mm512_cvtph_ps emulated_from_f16
#define _mm512_cvtneps_pbh emulated_to_bf16
#define _mm512_cvtne2ps_pbh emulated_to_bf16_twice
#define _mm512_dpbf16_ps emulated_dot_pairs
#define _mm512_dpbusd_epi32 emulated_dot_bytes
