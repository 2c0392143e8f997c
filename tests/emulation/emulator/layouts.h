// Where sm_90a's instructions find things, checked against CuTe's definitions by cute_layouts.cpp.
#pragma once

#include <cstdint>

namespace emulator {

constexpr uint32_t row_bytes = 128;  // of a tile, and of the swizzle

// Where byte `address` of a tile lies: the 16-byte piece of its 128-byte row goes by the row's number modulo 8, all by address bits.
constexpr uint32_t swizzled(uint32_t address) { return address ^ (address >> 7 & 7) << 4; }

// The element of a product's accumulator that register i of thread t of the warpgroup holds.
constexpr int fragment_row(int t, int i) { return t / 32 * 16 + t % 32 / 4 + i / 2 % 2 * 8; }
constexpr int fragment_column(int t, int i) { return i / 4 * 8 + t % 4 * 2 + i % 2; }

// Only the swizzle of 128 bytes is known here, from atoms at multiples of 1024 bytes.
constexpr bool known(uint64_t descriptor) { return descriptor >> 62 == 1 && (descriptor >> 49 & 7) == 0; }

// Where a descriptor finds element k (0 .. 15) of row (or column) m.
constexpr uint32_t operand_address(uint64_t descriptor, bool k_major, int m, int k) {
  const uint32_t start = (descriptor & 0x3fff) << 4, leading = (descriptor >> 16 & 0x3fff) << 4, stride = (descriptor >> 32 & 0x3fff) << 4;
  const uint32_t offset =
      k_major ? m / 8 * stride + m % 8 * row_bytes + k * 2 : m / 64 * leading + k / 8 * stride + k % 8 * row_bytes + m % 64 * 2;
  return swizzled(start + offset);
}

}  // namespace emulator
