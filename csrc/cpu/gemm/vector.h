// Vectors of the width that the compiler's flags allow, and the functions of RowFunctions over them. One source for every instruction
// set: the extension of GCC and Clang writes the instructions.
//
// exp: 2^n times a polynomial in the rest, error below 1 ulp in fp32. erf: erfc(z) = exp(-z^2) t P(t) with t = 1 / (1 + 0.3 z), the
// coefficients fitted to 2e-8 relative; the exponential is the normal density that GELU's derivative needs anyway.
#pragma once

#include "isa.h"

#include <math.h>
#include <string.h>

#if defined(CMOE_EMULATE_AVX512)
#include "avx512_emulation.h"
#elif defined(__AVX512F__) || defined(__F16C__)
#include <immintrin.h>
#endif
#if defined(__AVX512F__) || defined(CMOE_EMULATE_AVX512)
#define HAS_AVX512
#endif
#if defined(__AVX512BF16__) || defined(CMOE_EMULATE_AVX512_BF16)
#define HAS_AVX512_BF16
#endif

namespace {

using namespace cmoe::cpu;

#if defined(HAS_AVX512)
constexpr int vector_bytes = 64;
#elif defined(__AVX2__)
constexpr int vector_bytes = 32;
#else
constexpr int vector_bytes = 16;
#endif

#define INLINE static inline __attribute__((always_inline))

template <class T>
struct vector_of;
template <>
struct vector_of<float> {
  typedef float type __attribute__((vector_size(vector_bytes)));
  typedef int32_t bits __attribute__((vector_size(vector_bytes)));
};
template <>
struct vector_of<double> {
  typedef double type __attribute__((vector_size(vector_bytes)));
  typedef int64_t bits __attribute__((vector_size(vector_bytes)));
};

using vfloat = vector_of<float>::type;
using vint = vector_of<float>::bits;
typedef uint32_t vuint __attribute__((vector_size(vector_bytes)));
typedef uint16_t vhalf __attribute__((vector_size(vector_bytes / 2)));
constexpr int width = vector_bytes / 4;

template <class V>
INLINE V load(const void* p) {
  V v;
  memcpy(&v, p, sizeof v);
  return v;
}
template <class V>
INLINE void store(void* p, V v) {
  memcpy(p, &v, sizeof v);
}
INLINE vfloat splat(float x) { return x - vfloat{}; }
INLINE vfloat select(vint mask, vfloat yes, vfloat no) { return (vfloat)((mask & (vint)yes) | (~mask & (vint)no)); }
INLINE vfloat least(vfloat x, float high) { return select((vint)(x < splat(high)), x, splat(high)); }
// a b + c, rounded once where the instruction set has such an instruction: nothing else is contracted (-ffp-contract=off), so that the
// bits do not depend on how an expression is written.
template <class V>
INLINE V multiply_add(V a, V b, V c) {
#if defined(__AVX512F__)
  if constexpr (sizeof(a[0]) == 4) return (V)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__) && defined(CMOE_EMULATE_AVX512)
  if constexpr (sizeof(a[0]) == 4) {
    __m256 x[2], y[2], z[2];
    memcpy(x, &a, sizeof a), memcpy(y, &b, sizeof b), memcpy(z, &c, sizeof c);
    for (int i = 0; i < 2; ++i) z[i] = _mm256_fmadd_ps(x[i], y[i], z[i]);
    return load<V>(z);
  }
#elif defined(__FMA__)
  if constexpr (sizeof(a[0]) == 4) return (V)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__FP_FAST_FMAF) && defined(__FP_FAST_FMA)
  for (unsigned i = 0; i < sizeof a / sizeof a[0]; ++i)
    c[i] = sizeof a[0] == 4 ? __builtin_fmaf(a[i], b[i], c[i]) : __builtin_fma(a[i], b[i], c[i]);
  return c;
#endif
  return a * b + c;
}
INLINE vfloat multiply_add(vfloat a, vfloat b, float c) { return multiply_add(a, b, splat(c)); }
INLINE vfloat multiply_add(float a, vfloat b, vfloat c) { return multiply_add(splat(a), b, c); }
INLINE vfloat absolute(vfloat x) { return (vfloat)((vint)x & 0x7fffffff); }

// Zero below `lowest`; from -104 on results are the subnormal numbers, which cost time where they are many.
INLINE vfloat exponential(vfloat x, float lowest = -87.3f) {
  // A NaN passes: every comparison with it is false.
  const vfloat clamped = least(select((vint)(x < splat(lowest)), splat(lowest), x), 88.72f);
  const vfloat shift = splat(12582912.f);  // 1.5 * 2^23: adding it leaves the nearest integer in the low bits
  const vfloat shifted = multiply_add(1.44269504f, clamped, shift);
  const vfloat n = shifted - shift;
  const vfloat r = multiply_add(2.12194440e-4f, n, multiply_add(-0.693359375f, n, clamped));
  vfloat p = splat(1.9875691500e-4f);
  p = multiply_add(p, r, 1.3981999507e-3f);
  p = multiply_add(p, r, 8.3334519073e-3f);
  p = multiply_add(p, r, 4.1665795894e-2f);
  p = multiply_add(p, r, 1.6666665459e-1f);
  p = multiply_add(p, r, 5.0000001201e-1f);
  p = multiply_add(p, r * r, r) + 1.f;
  // 2^n in two factors: 2^128 is no float, and the largest results need it.
  const vint half = ((vint)shifted - (vint)shift) >> 1, rest = ((vint)shifted - (vint)shift) - half;
  const vfloat e = p * (vfloat)((half + 127) << 23) * (vfloat)((rest + 127) << 23);
  const vfloat in_range = select((vint)(x < splat(lowest)), splat(0.f), e);
  return select((vint)(x != x), x, select((vint)(x > splat(88.72f)), splat(INFINITY), in_range));
}

// sigmoid(x), and 1 - sigmoid(x) without cancellation where it is small.
struct Sigmoid {
  vfloat value, lacks;
};
INLINE Sigmoid sigmoid(vfloat x) {
  const vfloat e = exponential(-x), s = 1.f / (1.f + e);
  return {s, select((vint)(e < splat(1.f)), e * s, 1.f - s)};
}

// The distribution function of the normal law, and its density.
struct Normal {
  vfloat below, density;
};
INLINE Normal normal(vfloat x) {
  const vfloat z = absolute(x) * 0.70710678f, t = 1.f / multiply_add(0.3f, z, splat(1.f));
  const vfloat e = exponential(-0.5f * x * x);
  vfloat p = splat(-0.129523620044717f);
  p = multiply_add(p, t, 0.48556677546260796f);
  p = multiply_add(p, t, -0.5122856527790435f);
  p = multiply_add(p, t, 0.5477289268714516f);
  p = multiply_add(p, t, -0.09465705583352903f);
  p = multiply_add(p, t, 0.2149288384121407f);
  p = multiply_add(p, t, 0.14833843647062805f);
  p = multiply_add(p, t, 0.1707153330518198f);
  p = multiply_add(p, t, 0.16918799880104737f);
  const vfloat tail = 0.5f * e * t * p;
  return {select((vint)(x < splat(0.f)), tail, 1.f - tail), e * 0.39894228f};
}

struct Value {
  vfloat h, slope;
};
template <Activation f>
INLINE Value activated(vfloat u) {
  if constexpr (f == Activation::gelu) {
    const Normal n = normal(u);
    // At minus infinity: 0 times infinity.
    const vfloat product = u * n.density;
    return {select((vint)(n.below == splat(0.f)), splat(0.f), u * n.below),
            n.below + select((vint)(n.density == splat(0.f)), splat(0.f), product)};
  } else if constexpr (f == Activation::gelu_tanh) {
    const float a = 0.7978845608f, b = 0.044715f;
    const vfloat inner = a * u * multiply_add(b * u, u, 1.f);
    const auto [s, lacks] = sigmoid(2.f * inner);
    const vfloat slope = multiply_add(2.f * u * s * lacks * a, multiply_add(3.f * b * u, u, 1.f), s);
    const vint saturated = (vint)(absolute(u) > splat(20.f));
    return {select((vint)(s == splat(0.f)), splat(0.f), u * s), select(saturated, s, slope)};
  } else if constexpr (f == Activation::silu) {
    const auto [s, lacks] = sigmoid(u);
    const vfloat slope = s * multiply_add(u, lacks, 1.f);
    return {select((vint)(s == splat(0.f)), splat(0.f), u * s), select((vint)(absolute(u) > splat(100.f)), s, slope)};
  } else {
    const vint positive = (vint)(u > splat(0.f));
    const vfloat part = select((vint)(u != u), u, select(positive, u, splat(0.f)));
    if constexpr (f == Activation::relu2) return {part * part, part + part};
    return {part, select(positive, splat(1.f), splat(0.f))};
  }
}

// f(offset, count) over vectors; the last one, when short, through a buffer that f reads and writes as if it were whole.
template <class F>
INLINE void each(int64_t n, F&& f) {
  int64_t i = 0;
  for (; i + width <= n; i += width) f(i, width);
  if (i < n) f(i, static_cast<int>(n - i));
}
INLINE vfloat load_part(const float* p, int count) {
  if (count == width) return load<vfloat>(p);
  float buffer[width] = {};
  memcpy(buffer, p, sizeof(float) * count);
  return load<vfloat>(buffer);
}
INLINE void store_part(float* p, vfloat v, int count) {
  if (count == width) return store(p, v);
  float buffer[width];
  store(buffer, v);
  memcpy(p, buffer, sizeof(float) * count);
}

// --- conversions --------------------------------------------------------------------------------------------------------------------
INLINE vhalf to_bf16(vfloat x) {
#if defined(HAS_AVX512_BF16)
  return (vhalf)_mm512_cvtneps_pbh((__m512)x);
#else
  // To nearest, ties to even; a NaN stays one.
  const vuint bits = (vuint)x, rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16, quiet = (bits >> 16) | 0x40u;
  const vuint nan = (vuint)(x != x);
  return __builtin_convertvector((nan & quiet) | (~nan & rounded), vhalf);
#endif
}
INLINE vfloat from_bf16(vhalf x) { return (vfloat)(__builtin_convertvector(x, vuint) << 16); }

#if defined(HAS_AVX512)
INLINE vhalf to_f16(vfloat x) { return (vhalf)_mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
INLINE vfloat from_f16(vhalf x) { return (vfloat)_mm512_cvtph_ps((__m256i)x); }
#elif defined(__F16C__)
INLINE vhalf to_f16(vfloat x) { return (vhalf)_mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
INLINE vfloat from_f16(vhalf x) { return (vfloat)_mm256_cvtph_ps((__m128i)x); }
#else
INLINE vfloat from_f16(vhalf x) {
  const vuint wide = __builtin_convertvector(x, vuint), magnitude = wide & 0x7fffu, sign = (wide & 0x8000u) << 16;
  // The exponent is rebased by a product, which also makes subnormals right; infinities and NaNs get the largest exponent.
  const vfloat scaled = (vfloat)(magnitude << 13) * 5.192296858534828e33f;  // 2^112
  const vuint special = (vuint)(magnitude > 0x7bffu);
  return (vfloat)((special & (magnitude << 13 | 0x7f800000u)) | (~special & (vuint)scaled) | sign);
}
INLINE vhalf to_f16(vfloat x) {
  const vuint bits = (vuint)x, sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7fffffffu;
  const vuint rebased = magnitude - (112u << 23), normal = (rebased + 0xfffu + (rebased >> 13 & 1u)) >> 13;
  // Below 2^-14 an addition aligns the bits to multiples of 2^-24 and rounds.
  const vuint subnormal = (vuint)((vfloat)magnitude + 0.5f) - 0x3f000000u;
  const vuint small = (vuint)(magnitude < 0x38800000u), huge = (vuint)(magnitude > 0x477fefffu), nan = (vuint)(magnitude > 0x7f800000u);
  vuint half = (small & subnormal) | (~small & normal);
  half = (huge & 0x7c00u) | (~huge & half);
  half = (nan & (0x7e00u | (magnitude >> 13 & 0x3ffu))) | (~nan & half);
  return __builtin_convertvector(half | sign, vhalf);
}
#endif

INLINE vhalf load_half(const uint16_t* p, int count) {
  if (count == width) return load<vhalf>(p);
  uint16_t buffer[width] = {};
  memcpy(buffer, p, sizeof(uint16_t) * count);
  return load<vhalf>(buffer);
}
INLINE void store_half(uint16_t* p, vhalf v, int count) {
  if (count == width) return store(p, v);
  uint16_t buffer[width];
  store(buffer, v);
  memcpy(p, buffer, sizeof(uint16_t) * count);
}
INLINE vfloat load_as(Type type, const void* from, int64_t i, int count) {
  switch (type) {
    case Type::bf16: return from_bf16(load_half((const uint16_t*)from + i, count));
    case Type::f16: return from_f16(load_half((const uint16_t*)from + i, count));
    default: return load_part((const float*)from + i, count);
  }
}
INLINE void store_as(Type type, vfloat v, void* to, int64_t i, int count) {
  switch (type) {
    case Type::bf16: return store_half((uint16_t*)to + i, to_bf16(v), count);
    case Type::f16: return store_half((uint16_t*)to + i, to_f16(v), count);
    default: return store_part((float*)to + i, v, count);
  }
}
template <Type from, Type to>
INLINE void convert_row(const void* source, void* target, int64_t n) {
  each(n, [&](int64_t i, int count) { store_as(to, load_as(from, source, i, count), target, i, count); });
}
template <Type from>
INLINE void convert_from(const void* source, Type to, void* target, int64_t n) {
  if (from == to) {
    if (n > 0) memcpy(target, source, size_of(from) * n);
  } else if (to == Type::f32) {
    convert_row<from, Type::f32>(source, target, n);
  } else if (to == Type::bf16) {
    convert_row<from, Type::bf16>(source, target, n);
  } else {
    convert_row<from, Type::f16>(source, target, n);
  }
}
static void convert(Type from, const void* source, Type to, void* target, int64_t n) {
  switch (from) {
    case Type::bf16: return convert_from<Type::bf16>(source, to, target, n);
    case Type::f16: return convert_from<Type::f16>(source, to, target, n);
    default: return convert_from<Type::f32>(source, to, target, n);
  }
}

// --- RowFunctions -------------------------------------------------------------------------------------------------------------------
static void load_row(Type type, const void* from, float* to, int64_t n) { convert(type, from, Type::f32, to, n); }
static void store_row(Type type, const float* from, void* to, int64_t n) { convert(Type::f32, from, type, to, n); }
static void round_row(Type type, float* x, int64_t n) {
  if (type == Type::bf16) each(n, [&](int64_t i, int count) { store_part(x + i, from_bf16(to_bf16(load_part(x + i, count))), count); });
  if (type == Type::f16) each(n, [&](int64_t i, int count) { store_part(x + i, from_f16(to_f16(load_part(x + i, count))), count); });
}

template <Activation f>
INLINE void activate_as(const float* u, float* h, float* slope, int64_t n) {
  each(n, [&](int64_t i, int count) {
    const Value v = activated<f>(load_part(u + i, count));
    store_part(h + i, v.h, count);
    if (slope) store_part(slope + i, v.slope, count);
  });
}
INLINE void activate_any(Activation f, const float* u, float* h, float* slope, int64_t n) {
  switch (f) {
    case Activation::none: return;
    case Activation::gelu: return activate_as<Activation::gelu>(u, h, slope, n);
    case Activation::gelu_tanh: return activate_as<Activation::gelu_tanh>(u, h, slope, n);
    case Activation::silu: return activate_as<Activation::silu>(u, h, slope, n);
    case Activation::relu: return activate_as<Activation::relu>(u, h, slope, n);
    case Activation::relu2: return activate_as<Activation::relu2>(u, h, slope, n);
  }
}
static void activate_row(Activation f, const float* u, float* h, int64_t n) { activate_any(f, u, h, nullptr, n); }
static void activate_backward_row(Activation f, const float* u, float* h, float* slope, int64_t n) { activate_any(f, u, h, slope, n); }

static void add_row(const float* x, float* y, int64_t n) {
  each(n, [&](int64_t i, int count) { store_part(y + i, load_part(y + i, count) + load_part(x + i, count), count); });
}
static void multiply_row(const float* x, float* y, int64_t n) {
  each(n, [&](int64_t i, int count) { store_part(y + i, load_part(y + i, count) * load_part(x + i, count), count); });
}
static void scale_row(float s, float* y, int64_t n) {
  each(n, [&](int64_t i, int count) { store_part(y + i, load_part(y + i, count) * s, count); });
}
static void axpy_row(float s, const float* x, float* y, int64_t n) {
  each(n, [&](int64_t i, int count) { store_part(y + i, multiply_add(s, load_part(x + i, count), load_part(y + i, count)), count); });
}
INLINE float total(vfloat v) {
  float parts[width];
  store(parts, v);
  for (int half = width / 2; half; half /= 2)
    for (int i = 0; i < half; ++i) parts[i] += parts[i + half];
  return parts[0];
}
static float dot_row(const float* x, const float* y, int64_t n) {
  // Four sums: one would wait for itself at every step.
  vfloat s[4] = {};
  int64_t i = 0;
  for (; i + 4 * width <= n; i += 4 * width)
    for (int j = 0; j < 4; ++j) s[j] = multiply_add(load<vfloat>(x + i + j * width), load<vfloat>(y + i + j * width), s[j]);
  each(n - i, [&](int64_t j, int count) { s[0] = multiply_add(load_part(x + i + j, count), load_part(y + i + j, count), s[0]); });
  return total((s[0] + s[1]) + (s[2] + s[3]));
}
static void exp_row(const float* x, float* y, int64_t n) {
  each(n, [&](int64_t i, int count) { store_part(y + i, exponential(load_part(x + i, count), -104.f), count); });
}

static void store_block(Type type, const float* from, int64_t from_ld, char* to, int64_t to_stride, int64_t rows, int64_t n) {
#if defined(HAS_AVX512_BF16)
  // Long runs, what follows without a gap, go past the caches, by whole lines, so that nothing is read first.
  const bool past_caches = type == Type::bf16 && (to_stride == n * size_of(type) ? rows * n : n) >= 256;
#endif
  for (int64_t r = 0; r < rows; ++r, from += from_ld, to += to_stride) {
    int64_t done = 0;
#if defined(HAS_AVX512_BF16)
    if (past_caches && reinterpret_cast<uintptr_t>(to) % 64 == 0)
      for (; done + 32 <= n; done += 32)
        _mm512_stream_si512(reinterpret_cast<__m512i*>(to + 2 * done),
                            (__m512i)_mm512_cvtne2ps_pbh(_mm512_loadu_ps(from + done + 16), _mm512_loadu_ps(from + done)));
#endif
    each(n - done, [&](int64_t i, int count) { store_as(type, load_part(from + done + i, count), to, done + i, count); });
  }
#if defined(HAS_AVX512_BF16)
  if (past_caches) _mm_sfence();
#endif
}

constexpr RowFunctions<float> row_functions = {load_row, store_row,    round_row, activate_row, activate_backward_row,
                                               add_row,  multiply_row, scale_row, axpy_row,     dot_row,
                                               exp_row,  store_block};

}  // namespace
