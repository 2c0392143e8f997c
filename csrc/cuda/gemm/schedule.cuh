// Persistent kernels: as many blocks as fit on the GPU are launched, and block b processes tiles b, b + gridDim.x, ... Every block counts
// the tiles of each expert for itself, on the device, so the host reads no offsets.
#pragma once

#include "../device/launch.h"
#include "gemm.h"

namespace cmoe::cuda {

// Rows [first, end) of one expert; expert == experts: unrouted rows.
struct RowTile {
  int expert, first, end, column;  // column: of tiles
};

template <int m, int threads>
class RowTiles {
 public:
  // Shared memory for the tiles before each expert.
  static size_t bytes(const Groups& g) { return g.offsets ? (g.experts + 2) * sizeof(int) : 0; }

  // `before` is shared memory of that size.
  __device__ RowTiles(const Groups& groups, bool sum, int columns, int* before)
      : groups_(groups), sum_(sum), before_(before), columns_(columns) {
    const int experts = static_cast<int>(groups.experts);
    if (!groups.offsets) return;
    for (int e = static_cast<int>(threadIdx.x); e <= experts; e += threads) before_[e + 1] = (end(e) - start(e) + m - 1) / m;
    if (threadIdx.x == 0) before_[0] = 0;
    __syncthreads();
    if (threadIdx.x < 32) {  // prefix sums, 32 at a time
      const int lane = static_cast<int>(threadIdx.x);
      int carry = 0;
      for (int e = 0; e <= experts; e += 32) {
        int v = e + lane <= experts ? before_[e + lane + 1] : 0;
        for (int by = 1; by < 32; by *= 2) {
          const int other = __shfl_up_sync(~0u, v, by);
          if (lane >= by) v += other;
        }
        v += carry;
        if (e + lane <= experts) before_[e + lane + 1] = v;
        carry = __shfl_sync(~0u, v, 31);
      }
    }
    __syncthreads();
  }

  // f(RowTile) for each tile of this block. Tiles go down 8 of rows and then along the columns, so that those at work together share
  // operands in L2.
  template <class F>
  __device__ void each(F&& f) const {
    constexpr int together = 8;
    const int rows = row_tiles();
    const int64_t tiles = static_cast<int64_t>(rows) * columns_;
    for (int64_t t = blockIdx.x; t < tiles; t += gridDim.x) {
      const int64_t group = t / (together * columns_);
      const int first = static_cast<int>(group) * together, height = min(together, rows - first);
      const int in_group = static_cast<int>(t - group * together * columns_);
      f(tile(first + in_group % height, in_group / height));
    }
  }

 private:
  // Counted again where they are asked for: registers are scarcer.
  __device__ int row_tiles_of_all() const { return static_cast<int>((groups_.rows + m - 1) / m); }
  __device__ int row_tiles() const {
    return groups_.offsets ? before_[groups_.experts + 1] : row_tiles_of_all() * (sum_ ? 1 : static_cast<int>(groups_.experts));
  }
  __device__ int start(int e) const { return groups_.offsets[e]; }
  __device__ int end(int e) const { return e < groups_.experts ? groups_.offsets[e + 1] : static_cast<int>(groups_.rows); }

  __device__ RowTile tile(int row, int column) const {
    if (!groups_.offsets) {
      const int each = row_tiles_of_all(), e = row / each, first = (row - e * each) * m;
      return {e, first, min(first + m, static_cast<int>(groups_.rows)), column};
    }
    int low = 0, high = static_cast<int>(groups_.experts);  // the last expert with no more tiles before it than this
    while (low < high) {
      const int middle = (low + high + 1) / 2;
      if (before_[middle] <= row)
        low = middle;
      else
        high = middle - 1;
    }
    const int first = start(low) + (row - before_[low]) * m;
    return {low, first, min(first + m, end(low)), column};
  }

  const Groups& groups_;
  bool sum_;
  int* before_;
  int columns_;
};

// Blocks for at most this number of tiles.
template <class Tile>
unsigned persistent_blocks(int64_t tiles) {
  const int64_t most = int64_t{multiprocessors()} * Tile::blocks;
  return static_cast<unsigned>(tiles < most ? tiles : most);
}

inline int64_t most_row_tiles(const Groups& g, bool sum, int64_t m) {
  if (g.offsets) return g.rows / m + g.experts + 1;  // one of each expert may be short
  return (g.rows + m - 1) / m * (sum ? 1 : g.experts);
}

}  // namespace cmoe::cuda
