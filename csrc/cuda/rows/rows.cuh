// What kernels over the rows of a small matrix [T, E] share: a row is served by `width` neighbouring lanes of a warp, a power of two, so
// that a warp holds 32 / width rows and a reduction over a row is a few shuffles, in an order that the shape alone decides.
#pragma once

#include "../device/launch.h"
#include "../matrix.h"

namespace cmoe::cuda {

// Blocks that a multiprocessor is to hold: told less, ptxas spills a few registers for the sake of more.
constexpr int row_threads = 256, row_residents = 4;
constexpr float infinity = __builtin_huge_valf();

// The lanes for a row of n elements.
inline int row_width(int64_t n) {
  int width = 1;
  while (width < n && width < 32) width *= 2;
  return width;
}

inline dim3 row_blocks(int64_t rows, int width) {
  return dim3(static_cast<unsigned>((rows + row_threads / width - 1) / (row_threads / width)));
}

template <class T>
struct Rows {
  const T* data;
  int64_t row, column;

  explicit Rows(const Matrix& m) : data(static_cast<const T*>(m.data)), row(m.row), column(m.column) {}
  __device__ T at(int64_t t, int64_t e) const { return data[t * row + e * column]; }
  __device__ float operator()(int64_t t, int64_t e) const { return to_float(at(t, e)); }
};

// Of the calling thread: its row, and its place among the lanes of that row. Threads past the last row repeat it and must not write, since
// every lane takes part in the shuffles.
struct Place {
  int64_t t;
  int lane, width;
  bool live;

  __device__ Place(int64_t rows, int width_) : lane(static_cast<int>(threadIdx.x) & (width_ - 1)), width(width_) {
    const int shift = __ffs(width) - 1;
    t = (static_cast<int64_t>(blockIdx.x) * row_threads >> shift) + (threadIdx.x >> shift);
    live = t < rows;
    if (!live) t = rows - 1;
  }
  template <class F>
  __device__ void each(int64_t n, F&& f) const {
    for (int64_t e = lane; e < n; e += width) f(e);
  }
  __device__ float sum(float x) const {
    for (int by = width / 2; by; by /= 2) x += __shfl_xor_sync(~0u, x, by);
    return x;
  }
  // NaN where no lane has a number.
  __device__ float largest(float x) const {
    for (int by = width / 2; by; by /= 2) x = fmaxf(x, __shfl_xor_sync(~0u, x, by));
    return x;
  }
  __device__ float least(float x) const { return -largest(-x); }
};

// Calls f with a value of the C++ type.
template <class F>
void dispatch(const char* operation, Type type, F&& f) {
  switch (type) {
    case Type::f32: return f(float{});
    case Type::bf16: return f(bf16{});
    case Type::f16: return f(fp16{});
    default: throw std::runtime_error(std::string(operation) + ": fp64 has no CUDA kernel");
  }
}

}  // namespace cmoe::cuda
