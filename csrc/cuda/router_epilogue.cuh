// The rest of task_router's first layer, where its product lies in the accumulator: u, act(u) and act(u) W2 over the tile's columns.
#pragma once

#include "gemm/epilogue.cuh"
#include "task_router.h"

namespace cmoe::cuda {

template <class T>
struct RouterEpilogue {
  BiasTable<T> b, w2;
  const float* biases;
  const int64_t* group_ids;
  int64_t groups, experts;
  Activation activation;
  Stored<T> u, h;
  float* partials;

  // 16 rows of each warp along m, for each warp along n, and an expert in each column.
  template <class Tile>
  static constexpr int scratch_bytes = Tile::warps_n * Tile::warps_m * 16 * static_cast<int>(most_fused * sizeof(float));

  explicit RouterEpilogue(const RouterProduct& p)
      : b(p.b), w2(p.w2), biases(p.biases), group_ids(p.group_ids), groups(p.groups), experts(p.experts), activation(p.activation), u(p.u),
        h(p.h), partials(p.partials) {}

  template <class Tile>
  __device__ void store(const RowArguments& p, const RowTile& tile, bool, const WarpPlace<Tile>& place, Accumulator<Tile>& acc,
                        float* sums) const {
    static_assert(Tile::tiles_m == 1);
    constexpr int rows = Tile::warps_m * 16;
    const int64_t column0 = int64_t{tile.column} * Tile::n + place.warp_n * Tile::warp_n + 2 * (place.lane % 4);
    float hidden[2][Tile::tiles_n][2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int64_t r = tile.first + place.row(0, i);
      const bool live = r < tile.end;
      const int64_t group = !live || !biases ? -1 : group_ids ? group_ids[r] : 0;
      const float* const bias = group >= 0 && group < groups ? biases + group * p.width : nullptr;
      const int64_t u_at = live && u ? u.at(r, 0, p.groups.rows) : -1, h_at = live && h ? h.at(r, 0, p.groups.rows) : -1;
#pragma unroll
      for (int j = 0; j < Tile::tiles_n; ++j) {
        const int64_t n = column0 + 8 * j, left = p.width - n;
        float v[2];
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          const bool inside = live && c < left;
          v[c] = inside ? acc[0][j][2 * i + c] + (bias ? bias[n + c] : b ? b(0, n + c) : 0.0f) : 0.0f;
          if (activation != Activation::none) v[c] = rounded<T>(v[c]);  // what is saved is what act sees, and what backward will see
        }
        if (u_at >= 0) u.write(u_at + n, left, v[0], v[1]);
#pragma unroll
        for (int c = 0; c < 2; ++c) hidden[i][j][c] = live && c < left ? activate(activation, v[c]) : 0.0f;
        if (h_at >= 0) h.write(h_at + n, left, hidden[i][j][0], hidden[i][j][1]);
      }
    }
    if (!partials) return;
    for (int e = 0; e < experts; ++e) {
      float sum[2] = {};
#pragma unroll
      for (int j = 0; j < Tile::tiles_n; ++j)
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          const int64_t n = column0 + 8 * j + c;
          const float w = n < p.width ? w2(e, n) : 0.0f;
#pragma unroll
          for (int i = 0; i < 2; ++i) sum[i] = fmaf(hidden[i][j][c], w, sum[i]);
        }
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        sum[i] += __shfl_xor_sync(~0u, sum[i], 1);
        sum[i] += __shfl_xor_sync(~0u, sum[i], 2);
        if (place.lane % 4 != 0) continue;
        const int64_t r = tile.first + place.row(0, i);
        if (Tile::warps_n > 1)
          sums[(place.warp_n * rows + place.warp_m * 16 + 8 * i + place.lane / 4) * most_fused + e] = sum[i];
        else if (r < tile.end)
          partials[(tile.column * p.groups.rows + r) * experts + e] = sum[i];
      }
    }
    if (Tile::warps_n == 1) return;
    __syncthreads();
    for (int at = static_cast<int>(threadIdx.x); at < rows * static_cast<int>(experts); at += Tile::threads) {
      const int row = at / static_cast<int>(experts), e = at - row * static_cast<int>(experts);
      const int64_t r = tile.first + row / 16 * Tile::warp_m + row % 16;
      if (r >= tile.end) continue;
      float sum = 0.0f;
      for (int w = 0; w < Tile::warps_n; ++w) sum += sums[(w * rows + row) * most_fused + e];
      partials[(tile.column * p.groups.rows + r) * experts + e] = sum;
    }
    __syncthreads();
  }
};

inline RowArguments arguments(const RouterProduct& p) {
  return {{nullptr, p.rows, 1}, p.width, p.depth, 0, false, false, p.x, p.w, false, false};
}

}  // namespace cmoe::cuda
