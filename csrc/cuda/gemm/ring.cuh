// The loop over the reduction: a ring of stages in shared memory, filled ahead of the one that is multiplied.
#pragma once

#include "tile.cuh"

namespace cmoe::cuda {

// acc += the sum over `steps` stages, which load(stage) fills one after the other; seen(stage, step) may look at each.
//
// Before step s is multiplied every thread waits for its own copies of it and then for the others' (one barrier), after which no thread
// reads stage s - 1 any more: its place is filled with step s + stages - 1. On return no thread reads the ring.
template <class T, class Tile, bool a_along_lanes, bool b_along_lanes, class Fill, class Seen>
__device__ void accumulate(Accumulator<Tile>& acc, const WarpPlace<Tile>& place, SharedAddress ring, int steps, Fill&& load, Seen&& seen) {
  constexpr int ahead = Tile::stages - 1;
#pragma unroll
  for (int s = 0; s < ahead; ++s) {
    if (s < steps) load(ring + s * Tile::stage_bytes);
    cp_async_commit();
  }
  int filling = ahead, reading = 0;
  for (int step = 0; step < steps; ++step) {
    cp_async_wait<Tile::stages - 2>();
    __syncthreads();
    if (step + ahead < steps) load(ring + filling * Tile::stage_bytes);
    cp_async_commit();
    const SharedAddress stage = ring + reading * Tile::stage_bytes;
    seen(stage, step);
    if constexpr (sizeof(T) == 4) {
      // Rounding grows with the number of sums in a row: a stage's products are added up first.
      Accumulator<Tile> part = {};
      multiply<T, Tile, a_along_lanes, b_along_lanes>(part, place, stage);
#pragma unroll
      for (int i = 0; i < Tile::tiles_m; ++i)
#pragma unroll
        for (int j = 0; j < Tile::tiles_n; ++j)
#pragma unroll
          for (int c = 0; c < 4; ++c) acc[i][j][c] += part[i][j][c];
    } else {
      multiply<T, Tile, a_along_lanes, b_along_lanes>(acc, place, stage);
    }
    if (++filling == Tile::stages) filling = 0;
    if (++reading == Tile::stages) reading = 0;
  }
  cp_async_wait<0>();
  __syncthreads();
}

// The row of a matrix that row r reads; -1: none. Rows are fewer than 2^31, as offsets are.
__device__ inline int source_row(const int64_t* index, int64_t divisor, int64_t r, int64_t rows) {
  int64_t i = r;
  if (index) {
    i = index[r];
    if (i < 0 || i >= rows) return -1;
  }
  return divisor == 1 ? static_cast<int>(i) : static_cast<int>(static_cast<uint32_t>(i) / static_cast<uint32_t>(divisor));
}

// --- on the host

// Whether rows of this operand can be read 16 bytes at a time: along `next`, with every other stride a multiple of that.
inline bool in_chunks(const void* data, Type type, int64_t next, int64_t other, int64_t expert) {
  const int64_t size = size_of(type);
  return next == 1 && reinterpret_cast<uintptr_t>(data) % 16 == 0 && other * size % 16 == 0 && expert * size % 16 == 0;
}

}  // namespace cmoe::cuda
