// The layouts by which the emulator reads and writes, against those that CuTe defines for the same instructions. Needs the headers of
// nvidia-cutlass; nothing of it runs on a GPU. Prints the number of differences by layout.
#include <cute/tensor.hpp>

#include <cute/atom/mma_traits_sm80.hpp>
#include <cute/atom/mma_traits_sm90_gmma.hpp>

#include <cstdio>

#include "device/descriptor.h"
#include "emulator/layouts.h"

namespace gmma = cute::SM90::GMMA;
using cute::Int;
using cute::Shape;

namespace {

template <int N>
int accumulators() {
  int wrong = 0;
  const gmma::CLayout_64xN<N> layout;
  for (int t = 0; t < 128; ++t)
    for (int i = 0; i < N / 2; ++i) wrong += int(layout(t, i)) != emulator::fragment_row(t, i) + 64 * emulator::fragment_column(t, i);
  return wrong;
}

// A tile of `rows` by 64 of k, as the copies write it: what a descriptor finds in it, what the swizzle makes of a box, and the descriptor's
// bits.
template <int rows, bool k_major>
int operands() {
  using T = cute::bfloat16_t;
  constexpr auto major = k_major ? gmma::Major::K : gmma::Major::MN;
  using Atom = gmma::Layout_SW128_Atom<T, major>;
  const auto flagged = cute::tile_to_shape(Atom{}, Shape<Int<rows>, Int<64>>{}, cute::Step<cute::_2, cute::_1>{});
  const auto along_rows = cute::tile_to_shape(Atom{}, Shape<Int<rows>, Int<64>>{});
  const auto layout = cute::as_position_independent_swizzle_layout(cute::conditional_return<k_major>(along_rows, flagged));
  int wrong = 0;
  for (int m = 0; m < rows; ++m)
    for (int k = 0; k < 64; ++k) {
      const uint32_t bytes = uint32_t(layout(m, k)) * 2;
      const uint32_t box = k_major ? emulator::swizzled(m * 128 + k * 2) : emulator::swizzled(m / 64 * 64 * 128 + k * 128 + m % 64 * 2);
      const uint64_t descriptor = k_major ? cmoe::cuda::descriptor(0) + k / 16 * cmoe::cuda::k16_along_k
                                          : cmoe::cuda::descriptor(0, 64 * 128) + k / 16 * cmoe::cuda::k16_along_mn;
      wrong += bytes != box;
      wrong += bytes != emulator::operand_address(descriptor, k_major, m, k % 16);
    }
  alignas(1024) static T memory[rows * 64];
  const auto tile = cute::make_tensor(cute::make_smem_ptr(memory), cute::conditional_return<k_major>(along_rows, flagged));
  const auto step = cute::local_tile(tile, Shape<Int<rows>, Int<16>>{}, cute::make_coord(0, 0));
  // On the host the address in it is 0; of 64 rows there is no next block.
  wrong += uint64_t(gmma::make_gmma_desc<major>(step)) != cmoe::cuda::descriptor(0, k_major ? 16 : rows == 64 ? 0 : 64 * 128);
  return wrong;
}

// mma.m16n8k16: the lanes' registers of a, b and d, as emulator/ampere.h reads them.
int fragments() {
  using Traits = cute::MMA_Traits<cute::SM80_16x8x16_F32BF16BF16F32_TN>;
  int wrong = 0;
  for (int t = 0; t < 32; ++t) {
    const int g = t / 4, c = t % 4 * 2;
    for (int h = 0; h < 2; ++h) {
      for (int i = 0; i < 4; ++i) wrong += int(Traits::ALayout{}(t, i * 2 + h)) != (g + i % 2 * 8) + 16 * (c + i / 2 * 8 + h);
      for (int i = 0; i < 2; ++i) wrong += int(Traits::BLayout{}(t, i * 2 + h)) != g + 8 * (c + i * 8 + h);
      for (int i = 0; i < 2; ++i) wrong += int(Traits::CLayout{}(t, i * 2 + h)) != (g + i * 8) + 16 * (c + h);
    }
  }
  return wrong;
}

}  // namespace

int main() {
  printf("\n");  // after what CuTe says about addresses
  printf("fragments %d\n", fragments());
  printf("accumulators %d %d %d\n", accumulators<64>(), accumulators<128>(), accumulators<256>());
  printf("k-major %d %d %d\n", operands<64, true>(), operands<128, true>(), operands<256, true>());
  printf("mn-major %d %d %d\n", operands<64, false>(), operands<128, false>(), operands<256, false>());
}
