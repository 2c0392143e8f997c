// The shared memory operand of a warpgroup's product, PTX ISA "Matrix Descriptor Format": every offset in units of 16 bytes. Tiles are rows
// of 128 bytes, swizzled as the tensor copies swizzle them, at a multiple of 1024 bytes; 8 rows are an atom.
//   K-major: a row is 64 elements of k of one m (or n); atom follows atom along m. 16 elements of k further is 32 bytes further.
//   MN-major: a row is 64 elements of m of one k; atom follows atom along k,
//             and `blocks` bytes lie between 64 elements of m and the next 64.
//   16 elements of k further is two atoms further.
#pragma once

#include <cstdint>

namespace cmoe::cuda {

enum class Major : int { k, mn };

constexpr uint32_t k16_along_k = 32 >> 4, k16_along_mn = 2048 >> 4;  // added to a descriptor: the next 16 elements of k

__device__ inline uint64_t descriptor(uint32_t address, uint32_t blocks = 16) {
  constexpr uint64_t swizzle_128 = 1, atom = 1024;
  return uint64_t{(address & 0x3ffff) >> 4} | uint64_t{blocks >> 4} << 16 | (atom >> 4) << 32 | swizzle_128 << 62;
}

}  // namespace cmoe::cuda
