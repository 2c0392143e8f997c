// Packing and the product of panels for elements that are multiplied as they are (fp32, fp64): a panel is [k][lanes].
#pragma once

#include "vector.h"

namespace {

// Two lanes-by-k layouts into [k][lanes]. A row that is missing is zeros.
template <class T, int lanes_of>
static void pack_rows_plain(const void* const* rows, int lanes, int64_t k, void* panel) {
  T* to = static_cast<T*>(panel);
  // Eight steps of k at a time, so that each source row is read by whole sectors while the panel's lines are in L1.
  for (int64_t k0 = 0; k0 < k; k0 += 8) {
    const int64_t k1 = k0 + 8 < k ? k0 + 8 : k;
    for (int lane = 0; lane < lanes_of; ++lane) {
      const T* from = lane < lanes ? static_cast<const T*>(rows[lane]) : nullptr;
      for (int64_t i = k0; i < k1; ++i) to[i * lanes_of + lane] = from ? from[i] : T(0);
    }
  }
}
template <class T, int lanes_of>
static void pack_columns_plain(const void* const* rows, int64_t lanes, int64_t k0, int64_t k, void* panels, int64_t panel_bytes) {
  for (int64_t i = 0; i < k; ++i) {
    const T* from = static_cast<const T*>(rows[i]);
    char* to = static_cast<char*>(panels) + (k0 + i) * lanes_of * sizeof(T);
    int64_t lane = 0;
    for (; lane + lanes_of <= lanes; lane += lanes_of, to += panel_bytes) memcpy(to, from + lane, sizeof(T) * lanes_of);
    if (lane < lanes) {
      memcpy(to, from + lane, sizeof(T) * (lanes - lane));
      memset(to + sizeof(T) * (lanes - lane), 0, sizeof(T) * (lanes_of - (lanes - lane)));
    }
  }
}

template <class T, int b_vectors, int rows>
INLINE void multiply_rows(const T* a, int a_lanes, const T* b, T* block, int64_t k, bool add) {
  using V = typename vector_of<T>::type;
  constexpr int n = vector_bytes / sizeof(T);
  V sums[rows][b_vectors];
#pragma GCC unroll 16
  for (int r = 0; r < rows; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < b_vectors; ++v) sums[r][v] = add ? load<V>(block + (r * b_vectors + v) * n) : V{};
  for (int64_t i = 0; i < k; ++i, a += a_lanes, b += b_vectors * n) {
    V column[b_vectors];
#pragma GCC unroll 4
    for (int v = 0; v < b_vectors; ++v) column[v] = load<V>(b + v * n);
#pragma GCC unroll 16
    for (int r = 0; r < rows; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < b_vectors; ++v) sums[r][v] += a[r] * column[v];
  }
#pragma GCC unroll 16
  for (int r = 0; r < rows; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < b_vectors; ++v) store(block + (r * b_vectors + v) * n, sums[r][v]);
}

// One instance per number of rows in use: a short panel costs no products with its padding.
template <class T, int b_vectors, int a_lanes, int rows = a_lanes>
static void multiply_plain(const void* a, int64_t a_stride, const void* b, void* block, int64_t k, int used, bool add) {
  if constexpr (rows > 1) {
    if (used < rows) return multiply_plain<T, b_vectors, a_lanes, rows - 1>(a, a_stride, b, block, k, used, add);
  }
  multiply_rows<T, b_vectors, rows>(static_cast<const T*>(a), a_lanes, static_cast<const T*>(b), static_cast<T*>(block), k, add);
}

[[maybe_unused]] static void transpose_plain(const float* from, int64_t from_ld, float* to, int64_t to_ld, int rows, int columns) {
  for (int r = 0; r < rows; ++r)
    for (int c = 0; c < columns; ++c) to[c * to_ld + r] = from[r * from_ld + c];
}

template <class T, int a_lanes, int b_vectors>
constexpr Microkernel plain_microkernel(Type panel, int k_chunk) {
  constexpr int b_lanes = b_vectors * vector_bytes / sizeof(T);
  return {panel, a_lanes, b_lanes, 1, k_chunk, Side::b, false, false,
          {pack_rows_plain<T, a_lanes>, pack_rows_plain<T, b_lanes>}, {pack_columns_plain<T, a_lanes>, pack_columns_plain<T, b_lanes>},
          nullptr, nullptr, {multiply_plain<T, b_vectors, a_lanes>, multiply_plain<T, b_vectors, a_lanes>}};
}

}  // namespace
