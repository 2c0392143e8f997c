// bf16 and fp16 as 16 bits, with the conversions of the GPU: to the nearest, ties to even.
#pragma once

#include <bit>
#include <cstdint>

namespace cmoe::cuda {

struct bf16 {
  uint16_t bits;
};
struct fp16 {
  uint16_t bits;
};

inline float to_float(float x) { return x; }
inline float to_float(bf16 x) { return std::bit_cast<float>(uint32_t{x.bits} << 16); }
inline float to_float(fp16 x) { return static_cast<float>(std::bit_cast<_Float16>(x.bits)); }

template <class T>
T from_float(float x);
template <>
inline float from_float<float>(float x) {
  return x;
}
template <>
inline bf16 from_float<bf16>(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  if ((bits & 0x7fffffff) > 0x7f800000) return {0x7fff};  // as cvt.rn.bf16.f32 makes of any NaN
  return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
template <>
inline fp16 from_float<fp16>(float x) {
  return {std::bit_cast<uint16_t>(static_cast<_Float16>(x))};
}

}  // namespace cmoe::cuda
