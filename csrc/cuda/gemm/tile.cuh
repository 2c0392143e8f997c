// A tile of a product: how operands lie in shared memory, how they get there, and how a warp multiplies them.
//
// A stage holds 64 bytes of the reduction for each lane (row of operand A or column of the result) of both operands: 32 halves or 16
// floats. Along k: lane by lane, 64 bytes each; the 16-byte chunk c of lane l lies at c ^ (l / 2 % 4), so that the eight rows that ldmatrix
// reads at once, and the eight that a quarter warp writes, fall on all banks. Along lanes (an operand whose lanes lie next to each other in
// memory): k by k, 2 bytes a lane; chunk c of row k lies at c ^ (k % 8), for ldmatrix.trans. No access has bank conflicts; the tests count
// them.
//
// Halves whose rows start at multiples of 16 bytes come by cp.async; everything else (other strides, fp32 weights under half-precision
// rows, fp32 products) through registers, element by element where need be, and lies along k.
#pragma once

#include "../device/ampere.h"
#include "gemm.h"

namespace cmoe::cuda {

enum class Load { async, elements };

template <int m_, int n_, int warps_m_, int warps_n_, int stages_, int blocks_>
struct Tile {
  static constexpr int m = m_, n = n_, warps_m = warps_m_, warps_n = warps_n_, stages = stages_;
  static constexpr int blocks = blocks_;  // that shall fit on a multiprocessor
  static constexpr int threads = 32 * warps_m * warps_n;
  static constexpr int warp_m = m / warps_m, warp_n = n / warps_n;
  static constexpr int tiles_m = warp_m / 16, tiles_n = warp_n / 8;  // of the instruction
  static constexpr int stage_bytes = 64 * (m + n);
};
// One block of 256 threads has registers for the sums of a row product and for its epilogue; gradients of weights, whose epilogue only
// stores, fit twice.
using LargeTile = Tile<128, 128, 2, 4, 5, 1>;
using LargeWeightTile = Tile<128, 128, 2, 4, 4, 2>;
using SmallTile = Tile<64, 64, 2, 2, 4, 3>;
// Registers fill the next stage while one is read: two are enough.
using ElementTile = Tile<64, 64, 2, 2, 2, 2>;

template <class T>
constexpr int k_step = 64 / sizeof(T);
template <class T>
constexpr int per_chunk = 16 / sizeof(T);

// The part of a tile that an epilogue gets at a time: 16 rows of each warp.
template <class Tile>
struct Slice : Tile {
  static constexpr int tiles_m = 1;
};

// What one thread accumulates: [i][j] are the rows 16 i + lane / 4 (+ 8 for the last two) and columns 8 j + 2 (lane % 4) (+ 1) of its
// warp's part.
template <class Tile>
using Accumulator = float[Tile::tiles_m][Tile::tiles_n][4];

__device__ inline int along_k(int lane, int chunk) { return lane * 64 + ((chunk ^ (lane >> 1 & 3)) << 4); }
template <int lanes>
__device__ int along_lanes(int k, int chunk) {
  return k * lanes * 2 + ((chunk ^ (k & 7)) << 4);
}

// Of the calling thread: where its warp's part of a tile begins, and its own place in it.
template <class Tile>
struct WarpPlace {
  int lane, warp_m, warp_n;
  __device__ WarpPlace() {
    const int warp = static_cast<int>(threadIdx.x) / 32;
    lane = static_cast<int>(threadIdx.x) % 32;
    warp_m = warp % Tile::warps_m;
    warp_n = warp / Tile::warps_m;
  }
  __device__ int row(int i, int half) const { return warp_m * Tile::warp_m + 16 * i + 8 * half + lane / 4; }
  __device__ int column(int j) const { return warp_n * Tile::warp_n + 8 * j + 2 * (lane % 4); }
};

// acc += A B^T over one stage.
template <class T, class Tile, bool a_along_lanes, bool b_along_lanes>
__device__ void multiply(Accumulator<Tile>& acc, const WarpPlace<Tile>& place, SharedAddress stage) {
  const SharedAddress a_at = stage, b_at = stage + 64 * Tile::m;
  const int lane = place.lane, wm = place.warp_m * Tile::warp_m, wn = place.warp_n * Tile::warp_n;
  if constexpr (sizeof(T) == 2) {
#pragma unroll
    for (int kk = 0; kk < 2; ++kk) {
      uint32_t a[Tile::tiles_m][4], b[Tile::tiles_n / 2][4];
#pragma unroll
      for (int i = 0; i < Tile::tiles_m; ++i)
        if constexpr (a_along_lanes)
          ldmatrix_x4_trans(a[i], a_at + along_lanes<Tile::m>(16 * kk + (lane & 7) + (lane >> 4) * 8, (wm + 16 * i) / 8 + (lane >> 3 & 1)));
        else
          ldmatrix_x4(a[i], a_at + along_k(wm + 16 * i + (lane & 15), 2 * kk + (lane >> 4)));
#pragma unroll
      for (int j = 0; j < Tile::tiles_n / 2; ++j)
        if constexpr (b_along_lanes)
          ldmatrix_x4_trans(b[j], b_at + along_lanes<Tile::n>(16 * kk + (lane & 15), (wn + 16 * j) / 8 + (lane >> 4)));
        else
          ldmatrix_x4(b[j], b_at + along_k(wn + 16 * j + (lane & 7) + (lane >> 4) * 8, 2 * kk + (lane >> 3 & 1)));
#pragma unroll
      for (int i = 0; i < Tile::tiles_m; ++i)
#pragma unroll
        for (int j = 0; j < Tile::tiles_n; ++j) mma_16816<T>(acc[i][j], a[i], b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]);
    }
  } else {
    static_assert(!a_along_lanes && !b_along_lanes);
    const auto four = [](SharedAddress at, int row, int chunk, float (&to)[4]) {
      const uint4 v = load_shared_16(at + along_k(row, chunk));
      to[0] = __uint_as_float(v.x), to[1] = __uint_as_float(v.y), to[2] = __uint_as_float(v.z), to[3] = __uint_as_float(v.w);
    };
#pragma unroll
    for (int chunk = 0; chunk < 4; ++chunk) {
      float a[2 * Tile::tiles_m][4];
#pragma unroll
      for (int i = 0; i < 2 * Tile::tiles_m; ++i) four(a_at, wm + 8 * i + lane / 4, chunk, a[i]);
#pragma unroll
      for (int j = 0; j < 2 * Tile::tiles_n; ++j) {
        float b[4];
        four(b_at, wn + j / 2 * 8 + 2 * (lane % 4) + j % 2, chunk, b);
#pragma unroll
        for (int k = 0; k < 4; ++k)
#pragma unroll
          for (int i = 0; i < 2 * Tile::tiles_m; ++i) {
            float& sum = acc[i / 2][j / 2][i % 2 * 2 + j % 2];
            sum = fmaf(a[i][k], b[k], sum);
          }
      }
    }
  }
}

// Bytes that a chunk has of what is left.
template <class T>
__device__ int chunk_bytes(int64_t left) {
  return left >= per_chunk<T> ? 16 : left <= 0 ? 0 : static_cast<int>(left) * static_cast<int>(sizeof(T));
}

// An element of an operand that is stored as T, or as fp32 to be rounded to it.
template <class T>
struct Elements {
  const void* data;
  bool wide;  // fp32

  __device__ T operator()(int64_t at) const {
    return sizeof(T) == 4 || !wide ? static_cast<const T*>(data)[at] : from_float<T>(static_cast<const float*>(data)[at]);
  }
};

template <class T>
__device__ uint4 packed(const T (&v)[per_chunk<T>]) {
  uint4 bits;
  memcpy(&bits, v, 16);
  return bits;
}

// A chunk of elements that lie next to each other from `at`; both addresses are multiples of 16 bytes.
template <class T>
__device__ uint4 chunk_of(const Elements<T>& from, int64_t at) {
  if (sizeof(T) == 4 || !from.wide) return *reinterpret_cast<const uint4*>(static_cast<const T*>(from.data) + at);
  T v[per_chunk<T>];
  const float4* const p = reinterpret_cast<const float4*>(static_cast<const float*>(from.data) + at);
#pragma unroll
  for (int i = 0; i < per_chunk<T> / 4; ++i) {
    const float4 f = p[i];
    v[4 * i] = from_float<T>(f.x), v[4 * i + 1] = from_float<T>(f.y), v[4 * i + 2] = from_float<T>(f.z), v[4 * i + 3] = from_float<T>(f.w);
  }
  return packed(v);
}

}  // namespace cmoe::cuda
