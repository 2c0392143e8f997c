// Epilogues of the grouped GEMM. A policy has
//
//     scratch_bytes<Tile>     of shared memory
//     store<Tile>(arguments, tile, known, place, acc, scratch)
//
// called by all threads of a block for one part of a tile after the other; known: the rows have an expert, else zeros are written.
#pragma once

#include "../activation.cuh"
#include "row_gemm.cuh"

namespace cmoe::cuda {

template <class T>
struct BiasTable {
  Elements<T> elements;
  int64_t row, column;

  explicit BiasTable(const Table& t) : elements{t.data, t.type == Type::f32}, row(t.row), column(t.column) {}
  __device__ explicit operator bool() const { return elements.data != nullptr; }
  __device__ float operator()(int64_t r, int64_t n) const { return to_float(elements(r * row + n * column)); }
};

// A place for results: pairs of columns, from an even one, in T or fp32.
template <class T>
struct Stored {
  void* data;
  bool wide, pairs;  // pairs: two columns can be written at once
  int64_t row, expert;
  const int64_t* index;

  explicit Stored(const Target& t)
      : data(t.data), wide(t.type == Type::f32),
        pairs(reinterpret_cast<uintptr_t>(t.data) % (2 * size_of(t.type)) == 0 && t.row % 2 == 0 && t.expert % 2 == 0), row(t.row),
        expert(t.expert), index(t.index) {}
  __host__ __device__ explicit operator bool() const { return data != nullptr; }

  // Where row r of an expert begins; -1: nowhere.
  __device__ int64_t at(int64_t r, int64_t e, int64_t rows) const {
    const int64_t to = source_row(index, 1, r, rows);
    return to < 0 ? -1 : to * row + e * expert;
  }
  // Columns at, at + 1 of those that are left. The second half of gated rows may begin at an odd one.
  __device__ void write(int64_t at, int64_t left, float v0, float v1) const {
    if (sizeof(T) == 4 || wide)
      write_as<float>(at, left, v0, v1);
    else
      write_as<T>(at, left, v0, v1);
  }

 private:
  template <class V>
  __device__ void write_as(int64_t at, int64_t left, float v0, float v1) const {
    struct __align__(2 * sizeof(V)) Pair {
      V first, second;
    };
    V* const to = static_cast<V*>(data) + at;
    if (pairs && left >= 2 && at % 2 == 0) {
      *reinterpret_cast<Pair*>(to) = Pair{from_float<V>(v0), from_float<V>(v1)};
      return;
    }
    if (left >= 1) to[0] = from_float<V>(v0);
    if (left >= 2) to[1] = from_float<V>(v1);
  }
};

template <class T>
__device__ float rounded(float v) {
  return to_float(from_float<T>(v));
}

// The sums of column block j, which is known at run time alone: registers cannot be indexed. With a loop over j the code of an epilogue
// exists once, not once for each of a thread's sums.
template <class Tile>
__device__ void pick(const Accumulator<Tile>& acc, int i, int j, float (&sums)[2][2]) {
#pragma unroll
  for (int at = 0; at < Tile::tiles_n; ++at)
    if (at == j)
#pragma unroll
      for (int c = 0; c < 4; ++c) sums[c / 2][c % 2] = acc[i][at][c];
}

// Bias, activation and weight of a layer's forward pass; see GroupedGemm.
template <class T>
struct ForwardEpilogue {
  BiasTable<T> b;
  RoutingWeights routing_weights;
  bool weigh_bias;
  Activation activation;
  Stored<T> u, y;

  template <class Tile>
  static constexpr int scratch_bytes = 0;

  explicit ForwardEpilogue(const GroupedGemm& p)
      : b(p.b), routing_weights(p.routing_weights), weigh_bias(p.weigh_bias), activation(p.activation), u(p.u), y(p.y) {}

  template <class Tile>
  __device__ void store(const RowArguments& p, const RowTile& tile, bool known, const WarpPlace<Tile>& place, Accumulator<Tile>& acc,
                        float*) const {
#pragma unroll
    for (int i = 0; i < Tile::tiles_m; ++i) columns<Tile>(p, tile, known, place, acc, i);
  }

 private:
  struct Row {
    bool live, served;
    float routing_weight;
    int64_t u, y;  // where it is stored; -1: nowhere
  };

  template <class Tile>
  __device__ void columns(const RowArguments& p, const RowTile& tile, bool known, const WarpPlace<Tile>& place,
                          const Accumulator<Tile>& acc, int i) const {
    const int64_t e = tile.expert, expert = p.sum ? 0 : e;
    const int halves = p.gated ? 2 : 1;  // gate (even j) and up (odd j) take turns
    Row rows[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int r = tile.first + place.row(i, h);
      rows[h].live = r < tile.end;
      rows[h].served = rows[h].live && known && source_row(p.x.index, p.x.divisor, r, p.groups.rows) >= 0;
      rows[h].routing_weight = routing_weights.data && rows[h].served && !p.sum
                                   ? routing_weights.data[r * routing_weights.row + e * routing_weights.expert]
                                   : 1.0f;
      rows[h].u = u && rows[h].live ? u.at(r, expert, p.groups.rows) : -1;
      rows[h].y = y && rows[h].live ? y.at(r, expert, p.groups.rows) : -1;
    }
    const bool one_bias = b && known && !p.sum;
    const int64_t column0 = (int64_t{tile.column} * Tile::n + place.warp_n * Tile::warp_n) / halves + 2 * (place.lane % 4);
#pragma unroll 1
    for (int j = 0; j < Tile::tiles_n; j += halves) {
      const int64_t n = column0 + j / halves * 8, left = p.width - n;
      if (left <= 0) continue;
      float sums[2][2], ups[2][2] = {}, bias[2] = {}, up_bias[2] = {};
      pick<Tile>(acc, i, j, sums);
      if (p.gated) pick<Tile>(acc, i, j + 1, ups);
#pragma unroll
      for (int c = 0; c < 2; ++c)
        if (one_bias && c < left) {
          bias[c] = b(e, n + c);
          if (p.gated) up_bias[c] = b(e, p.width + n + c);
        }
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const Row& row = rows[h];
        if (!row.live) continue;
        float v[2], up[2];
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          v[c] = sums[h][c] + (weigh_bias ? row.routing_weight * bias[c] : bias[c]);
          if (b && !one_bias && row.served && c < left) v[c] += summed_bias(p, tile.first + place.row(i, h), n + c);
          up[c] = ups[h][c] + up_bias[c];
        }
        if (activation != Activation::none) {
          // What is saved is what act sees, and what backward will see.
#pragma unroll
          for (int c = 0; c < 2; ++c) {
            v[c] = row.served ? rounded<T>(v[c]) : 0.0f;
            up[c] = row.served ? rounded<T>(up[c]) : 0.0f;
          }
          if (row.u >= 0) {
            u.write(row.u + n, left, v[0], v[1]);
            if (p.gated) u.write(row.u + p.width + n, left, up[0], up[1]);
          }
#pragma unroll
          for (int c = 0; c < 2; ++c) v[c] = activate(activation, v[c]) * (p.gated ? up[c] : 1.0f);
        }
        const float by = weigh_bias ? 1.0f : row.routing_weight;
        if (row.y >= 0) y.write(row.y + n, left, row.served ? v[0] * by : 0.0f, row.served ? v[1] * by : 0.0f);
      }
    }
  }

  // The sum of the experts' biases by the row's weights.
  __device__ float summed_bias(const RowArguments& p, int64_t r, int64_t n) const {
    float total = 0.0f;
    for (int64_t e = 0; e < p.groups.experts; ++e)
      total += (routing_weights.data ? routing_weights.data[r * routing_weights.row + e * routing_weights.expert] : 1.0f) * b(e, n);
    return total;
  }
};

// dh in the accumulator; see DactGemm.
template <class T>
struct DactEpilogue {
  RowOperand u;
  Activation activation;
  RoutingWeights routing_weights;
  Stored<T> du, weighted_hidden;
  float* partials;
  bool gated, dense;

  template <class Tile>
  static constexpr int scratch_bytes = Tile::warps_n * Tile::m * static_cast<int>(sizeof(float));

  explicit DactEpilogue(const DactGemm& p)
      : u(p.u), activation(p.activation), routing_weights(p.routing_weights), du(p.du), weighted_hidden(p.weighted_hidden),
        partials(p.partials), gated(p.gated), dense(!p.groups.offsets) {}

  template <class Tile>
  __device__ void store(const RowArguments& p, const RowTile& tile, bool known, const WarpPlace<Tile>& place, Accumulator<Tile>& acc,
                        float* sums) const {
    const int64_t e = tile.expert, rows = p.groups.rows;
    const int64_t column0 = int64_t{tile.column} * Tile::n + place.warp_n * Tile::warp_n + 2 * (place.lane % 4);
    const Elements<T> values{u.data, u.type == Type::f32};
#pragma unroll
    for (int i = 0; i < Tile::tiles_m; ++i) {
      Row at[2];
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        const int r = tile.first + place.row(i, k);
        const bool live = r < tile.end;
        at[k].served = live && known && source_row(p.x.index, p.x.divisor, r, rows) >= 0;
        at[k].routing_weight =
            at[k].served && routing_weights.data ? routing_weights.data[r * routing_weights.row + e * routing_weights.expert] : 1.0f;
        at[k].u = at[k].served ? source_row(u.index, u.divisor, r, rows) * u.row + e * u.expert : 0;
        at[k].du = live && du ? du.at(r, e, rows) : -1;
        at[k].h = live && weighted_hidden ? weighted_hidden.at(r, e, rows) : -1;
        at[k].sum = 0.0f;
      }
#pragma unroll 1
      for (int j = 0; j < Tile::tiles_n; ++j) {
        const int64_t n = column0 + 8 * j, left = p.width - n;
        if (left <= 0) continue;
        float dh[2][2];
        pick<Tile>(acc, i, j, dh);
#pragma unroll
        for (int k = 0; k < 2; ++k) {
          Row& row = at[k];
          float gate[2] = {}, second[2] = {}, all[2] = {};
#pragma unroll
          for (int c = 0; c < 2; ++c) {
            if (!row.served || c >= left) continue;
            const Slope f = slope(activation, to_float(values(row.u + (n + c) * u.column)));
            const float up = gated ? to_float(values(row.u + (n + c + p.width) * u.column)) : 1.0f;
            row.sum += dh[k][c] * f.value * up;
            all[c] = row.routing_weight * f.value * up;
            gate[c] = row.routing_weight * dh[k][c] * up * f.derivative;
            second[c] = row.routing_weight * dh[k][c] * f.value;
          }
          if (row.h >= 0) weighted_hidden.write(row.h + n, left, all[0], all[1]);
          if (row.du >= 0) {
            du.write(row.du + n, left, gate[0], gate[1]);
            if (gated) du.write(row.du + p.width + n, left, second[0], second[1]);
          }
        }
      }
      if (!partials) continue;
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        float sum = at[k].sum;
        sum += __shfl_xor_sync(~0u, sum, 1);
        sum += __shfl_xor_sync(~0u, sum, 2);
        if (place.lane % 4 != 0) continue;
        const int r = tile.first + place.row(i, k);
        if (Tile::warps_n > 1)
          sums[place.warp_n * Tile::m + place.row(i, k)] = sum;
        else if (r < tile.end)
          partials[(tile.column * rows + r) * (dense ? p.groups.experts : 1) + (dense ? e : 0)] = sum;
      }
    }
    if (!partials || Tile::warps_n == 1) return;
    __syncthreads();
    const int row = static_cast<int>(threadIdx.x), r = tile.first + row;
    if (row < Tile::m && row % Tile::warp_m < 16 * Tile::tiles_m && r < tile.end) {
      float sum = 0.0f;
      for (int w = 0; w < Tile::warps_n; ++w) sum += sums[w * Tile::m + row];
      partials[(tile.column * rows + r) * (dense ? p.groups.experts : 1) + (dense ? e : 0)] = sum;
    }
    __syncthreads();
  }

 private:
  struct Row {
    bool served;
    float routing_weight, sum;
    int64_t u, du, h;  // where it is read and stored; -1: nowhere
  };
};

}  // namespace cmoe::cuda
