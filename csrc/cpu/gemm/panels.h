// Packing and the product of panels for elements that are multiplied as they are (fp32, fp64): a panel is [k][lanes].
#pragma once

#include "vector.h"

namespace {

template <int n>
struct Constant {
  static constexpr int value = n;
};

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

// steps(n): the next n steps of k. A line is prefetched between some steps and the next: a burst of them fills the processor's line
// buffers, and the product waits for its operands.
template <class Steps>
INLINE void fetch_beside(const Prefetch& prefetch, int64_t k, Steps&& steps) {
  const int64_t lines = int64_t{prefetch.rows} * prefetch.lines, apart = lines ? k / lines : 0;
  for (int row = 0; row < prefetch.rows; ++row)
    for (int line = 0; line < prefetch.lines; ++line) {
      __builtin_prefetch(prefetch.data + row * prefetch.stride + line * 64, 0, 2);
      steps(apart);
    }
  steps(k - lines * apart);
}

// A chunk's sums, which begin at zero, with those of the chunks before: in one running sum over all of k, rounding errors were seven times as
// large at k = 20,480 in fp32.
template <class V, class T>
INLINE void store_sums(T* block, V sums, bool add) {
  store(block, add ? load<V>(block) + sums : sums);
}

template <class T, int b_vectors, int rows>
INLINE void multiply_rows(const T* a, int mr, const T* b, T* block, int64_t k, bool add, const Prefetch& prefetch) {
  using V = typename vector_of<T>::type;
  constexpr int n = vector_bytes / sizeof(T);
  V sums[rows][b_vectors];  // zeroed in loops: with `= {}` GCC made one function of all numbers of rows, at 0.95 of the speed
#pragma GCC unroll 16
  for (int r = 0; r < rows; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < b_vectors; ++v) sums[r][v] = V{};
  fetch_beside(prefetch, k, [&](int64_t steps) __attribute__((always_inline)) {
#pragma GCC unroll 2
    for (; steps > 0; --steps, a += mr, b += b_vectors * n) {
      V column[b_vectors];
#pragma GCC unroll 4
      for (int v = 0; v < b_vectors; ++v) column[v] = load<V>(b + v * n);
#pragma GCC unroll 16
      for (int r = 0; r < rows; ++r)
#pragma GCC unroll 4
        for (int v = 0; v < b_vectors; ++v) sums[r][v] = multiply_add(a[r] - V{}, column[v], sums[r][v]);
    }
  });
#pragma GCC unroll 16
  for (int r = 0; r < rows; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < b_vectors; ++v) store_sums(block + (r * b_vectors + v) * n, sums[r][v], add);
}

// One instance per number of rows in use: a short panel costs no products with its padding.
template <class T, int b_vectors, int mr, int rows = mr>
static void multiply_plain(const void* a, int64_t a_stride, const void* b, void* block, int64_t k, int used, bool add,
                           const Prefetch& prefetch) {
  if constexpr (rows > 1) {
    if (used < rows) return multiply_plain<T, b_vectors, mr, rows - 1>(a, a_stride, b, block, k, used, add, prefetch);
  }
  multiply_rows<T, b_vectors, rows>(static_cast<const T*>(a), mr, static_cast<const T*>(b), static_cast<T*>(block), k, add, prefetch);
}

// --- few tokens: dot products of rows ---------------------------------------------------------------------------------------------------
constexpr int small_m_width = 4;

// Rows of `size` bytes a value, padded with zeros to a multiple of `step` values.
template <int size, int step>
static void pack_rows_small_m(const void* const* rows, int lanes, int64_t k, void* panel) {
  const int64_t stride = (k + step - 1) / step * step * size;
  char* to = static_cast<char*>(panel);
  for (int lane = 0; lane < small_m_width; ++lane, to += stride) {
    const int64_t used = lane < lanes ? k * size : 0;
    if (used) memcpy(to, rows[lane], used);
    memset(to + used, 0, stride - used);
  }
}

// Values: how a vector of them is read, and multiplied into sums. Four rows of A with `columns` rows of B; where these are too few to hide
// what a product takes, the even and the odd steps of k are summed apart. A weight's rows come from memory, each line just ahead of its use:
// prefetched a chunk at a time, as panels that serve many tokens are, they took 1.3 to 1.6 times as long. Near its end a row prefetches the
// start of the one four rows on, which follows it here.
constexpr int64_t ahead = 512, ahead_alone = 4 * ahead;  // bytes, in each of four rows that are read at a time; in one panel
template <class Values, int columns>
INLINE void dot_products(const char* rows, int64_t stride, const char* others, float* to, int64_t k, bool add) {
  constexpr int sets = columns > 2 ? 1 : 2;
  vfloat sums[sets][small_m_width][columns] = {};
  const auto steps = [&](int64_t from_k, int64_t to_k, int64_t prefetched) __attribute__((always_inline)) {
    for (int64_t i = from_k; i < to_k; i += Values::step * sets)
#pragma GCC unroll 2
      for (int set = 0; set < sets; ++set) {
        const int64_t at = i + Values::step * set;
        if (set && at >= k) break;
        decltype(Values::load(others)) column[columns];
#pragma GCC unroll 4
        for (int c = 0; c < columns; ++c) column[c] = Values::load(others + (c * k + at) * Values::size);
#pragma GCC unroll 4
        for (int r = 0; r < small_m_width; ++r) {
          const char* const from = rows + r * stride + at * Values::size;
          __builtin_prefetch(from + prefetched);
          const auto row = Values::load(from);
#pragma GCC unroll 4
          for (int c = 0; c < columns; ++c) Values::add_product(sums[set][r][c], row, column[c]);
        }
      }
  };
  constexpr int64_t end = ahead / Values::size;
  static_assert(end % (Values::step * sets) == 0);
  const int64_t last = k > end ? (k - end) / (Values::step * sets) * (Values::step * sets) : 0;
  steps(0, last, ahead);
  steps(last, k, ahead + small_m_width * stride - k * Values::size);
  for (int r = 0; r < small_m_width; ++r)
    for (int c = 0; c < columns; ++c) {
      const vfloat sum = sets > 1 ? sums[0][r][c] + sums[sets - 1][r][c] : sums[0][r][c];
      to[r * small_m_width + c] = total(sum) + (add ? to[r * small_m_width + c] : 0.f);
    }
}
template <class Values>
static void multiply_small_m(const void* a, int64_t a_stride, const void* b, void* block, int64_t k, int used, bool add, const Prefetch&) {
  const auto products = used == 1   ? dot_products<Values, 1>
                        : used == 2 ? dot_products<Values, 2>
                        : used == 3 ? dot_products<Values, 3>
                                    : dot_products<Values, 4>;
  products(static_cast<const char*>(a), a_stride, static_cast<const char*>(b), static_cast<float*>(block), k, add);
}

template <class Values>
constexpr Microkernel small_m_of(Type panel) {
  return {panel,
          small_m_width,
          small_m_width,
          Values::step,
          4096,
          Side::a,
          {true, true},
          true,
          true,
          {pack_rows_small_m<Values::size, Values::step>, pack_rows_small_m<Values::size, Values::step>},
          {nullptr, nullptr},
          nullptr,
          nullptr,
          {multiply_small_m<Values>, multiply_small_m<Values>},
          nullptr};
}

struct ValuesOfF32 {
  static constexpr int step = width, size = 4;
  static vfloat load(const void* p) { return ::load<vfloat>(p); }
  static void add_product(vfloat& sum, vfloat a, vfloat b) { sum = multiply_add(a, b, sum); }
};
// Read where they are and widened on the way: the same sums as of fp32 copies.
struct ValuesOfBf16 : ValuesOfF32 {
  static constexpr int size = 2;
  static vfloat load(const void* p) { return from_bf16(::load<vhalf>(p)); }
};
[[maybe_unused]] constexpr Microkernel f32_small_m = small_m_of<ValuesOfF32>(Type::f32);
[[maybe_unused]] constexpr Microkernel widened_small_m = small_m_of<ValuesOfBf16>(Type::bf16);

[[maybe_unused]] static void transpose_plain(const float* from, int64_t from_ld, float* to, int64_t to_ld, int rows, int columns) {
  for (int r = 0; r < rows; ++r)
    for (int c = 0; c < columns; ++c) to[c * to_ld + r] = from[r * from_ld + c];
}

// --- int8 weights: [k / 4][lanes][4] ------------------------------------------------------------------------------------------------------
// A lane's four weights are the bytes of one element, the first in the low byte.
template <int at>
INLINE vfloat weights_at(vint four) {
  return __builtin_convertvector(at == 3 ? four >> 24 : (four << (24 - 8 * at)) >> 24, vfloat);
}

template <int b_vectors, int rows, bool streams>
INLINE void multiply_rows_w8(const float* a, int mr, const char* b, float* block, int64_t k, bool add, const Prefetch& prefetch) {
  // Few rows hide too little of what a product takes: steps of k are summed apart.
  constexpr int sets = rows == 1 ? 4 : rows == 2 ? 2 : 1;
  vfloat sums[sets][rows][b_vectors] = {};
  const auto step = [&](auto at) __attribute__((always_inline)) {
    constexpr int set = decltype(at)::value % sets;
#pragma GCC unroll 4
    for (int v = 0; v < b_vectors; ++v) {
      const vfloat column = weights_at<decltype(at)::value>(load<vint>(b + v * vector_bytes));
#pragma GCC unroll 16
      for (int r = 0; r < rows; ++r) sums[set][r][v] = multiply_add(a[decltype(at)::value * mr + r] - vfloat{}, column, sums[set][r][v]);
    }
  };
  fetch_beside(streams ? Prefetch{} : prefetch, k / 4, [&](int64_t steps) __attribute__((always_inline)) {
    for (; steps > 0; --steps, a += 4 * mr, b += b_vectors * vector_bytes) {
      if constexpr (streams)
        for (int v = 0; v < b_vectors; ++v) __builtin_prefetch(b + v * vector_bytes + ahead_alone);
      step(Constant<0>());
      step(Constant<1>());
      step(Constant<2>());
      step(Constant<3>());
    }
  });
#pragma GCC unroll 16
  for (int r = 0; r < rows; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < b_vectors; ++v) {
#pragma GCC unroll 4
      for (int set = 1; set < sets; ++set) sums[0][r][v] += sums[set][r][v];
      store_sums(block + (r * b_vectors + v) * width, sums[0][r][v], add);
    }
}

template <int b_vectors, int mr, int rows = mr>
static void multiply_w8(const void* a, int64_t a_stride, const void* b, void* block, int64_t k, int used, bool add,
                        const Prefetch& prefetch) {
  if constexpr (rows > 1) {
    if (used < rows) return multiply_w8<b_vectors, mr, rows - 1>(a, a_stride, b, block, k, used, add, prefetch);
  }
  constexpr bool streams = rows < mr;  // one panel of rows: each weight is read once
  multiply_rows_w8<b_vectors, rows, streams>(static_cast<const float*>(a), mr, static_cast<const char*>(b), static_cast<float*>(block), k,
                                             add, prefetch);
}

template <int mr, void (*pack)(const void* const*, int, int64_t, void*)>
static void pack_rows_by_four(const void* const* rows, int lanes, int64_t k, void* panel) {
  pack(rows, lanes, k, panel);
  memset(static_cast<float*>(panel) + k * mr, 0, sizeof(float) * mr * ((4 - k % 4) % 4));
}

template <int mr, int b_vectors, void (*pack)(const void* const*, int, int64_t, void*)>
constexpr Microkernel w8_microkernel = {Type::f32,
                                        mr,
                                        b_vectors * width,
                                        4,
                                        512,
                                        Side::b,
                                        {false, false},
                                        false,
                                        false,
                                        {pack_rows_by_four<mr, pack>, nullptr},
                                        {nullptr, nullptr},
                                        nullptr,
                                        nullptr,
                                        {multiply_w8<b_vectors, mr>, multiply_w8<b_vectors, mr>},
                                        nullptr,
                                        true};

template <int b_vectors>
static void widen_w8(const void* packed, int64_t k, void* panel) {
  const char* from = static_cast<const char*>(packed);
  float* to = static_cast<float*>(panel);
  for (int64_t i = 0; i < k; i += 4, to += 4 * b_vectors * width)
    for (int v = 0; v < b_vectors; ++v, from += vector_bytes) {
      const vint four = load<vint>(from);
      store(to + v * width, weights_at<0>(four));
      store(to + (b_vectors + v) * width, weights_at<1>(four));
      store(to + (2 * b_vectors + v) * width, weights_at<2>(four));
      store(to + (3 * b_vectors + v) * width, weights_at<3>(four));
    }
}

template <int mr, int b_vectors>
constexpr Microkernel widened(Microkernel kernel) {
  kernel.kc = 256;  // of fp32
  kernel.multiply[0] = kernel.multiply[1] = multiply_plain<float, b_vectors, mr>;
  kernel.widen = widen_w8<b_vectors>;
  return kernel;
}

template <class T, int mr, int b_vectors>
constexpr Microkernel plain_microkernel(Type panel, int kc) {
  constexpr int nr = b_vectors * vector_bytes / sizeof(T);
  return {panel,
          mr,
          nr,
          1,
          kc,
          Side::b,
          {false, false},
          false,
          false,
          {pack_rows_plain<T, mr>, pack_rows_plain<T, nr>},
          {pack_columns_plain<T, mr>, pack_columns_plain<T, nr>},
          nullptr,
          nullptr,
          {multiply_plain<T, b_vectors, mr>, multiply_plain<T, b_vectors, mr>},
          nullptr};
}

}  // namespace
