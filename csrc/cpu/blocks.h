// Blocks of rows, turned so that 16 rows lie side by side: rows of a router are too short (5 or 8 experts) to fill vectors along
// themselves.
//
// A block is [columns, 16] in the type of the computation. A lane is computed alike wherever it stands, so results depend neither on where
// a thread's rows begin nor on what fills up the last block, which is its last row again.
#pragma once

#include <limits>

#include "dispatch.h"
#include "gemm/pack.h"
#include "rows.h"

namespace cmoe::cpu {

constexpr int64_t lanes = 16;

template <class A>
constexpr A infinity = std::numeric_limits<A>::infinity();

// Vectors that every processor of an architecture has; a block is a few of them wide.
template <class A>
struct Vector {
  using Integer = std::conditional_t<sizeof(A) == 8, int64_t, int32_t>;
  typedef A type __attribute__((vector_size(16)));
  typedef Integer mask __attribute__((vector_size(16)));
  static constexpr int64_t width = 16 / sizeof(A);

  static type load(const A* p) {
    type v;
    __builtin_memcpy(&v, p, sizeof v);
    return v;
  }
  static void store(A* p, type v) { __builtin_memcpy(p, &v, sizeof v); }
  static mask load(const Integer* p) {
    mask v;
    __builtin_memcpy(&v, p, sizeof v);
    return v;
  }
  static void store(Integer* p, mask v) { __builtin_memcpy(p, &v, sizeof v); }
};

// f(lane) for each vector of a block's row.
template <class A, class F>
inline void each_vector(const F& f) {
  for (int64_t lane = 0; lane < lanes; lane += Vector<A>::width) f(lane);
}

// The greatest of each lane's n values; a NaN stays one, so that "nothing but -inf" can be told from "-inf and NaN".
template <class A>
inline typename Vector<A>::type greatest(const A* x, int64_t n) {
  using V = Vector<A>;
  typename V::type top = typename V::type{} - infinity<A>;
  for (int64_t i = 0; i < n; ++i) {
    const auto v = V::load(x + i * lanes);
    top = (v > top) | (v != v) ? v : top;
  }
  return top;
}

// A sum that is plain over 16 terms, and Kahan's over these: over hundreds of experts it is as exact as torch's pairwise one.
template <class A>
class Sum {
 public:
  using V = typename Vector<A>::type;
  void add(V v) {
    few_ += v;
    if (++terms_ % 16 == 0) {
      fold();
      few_ = V{};
    }
  }
  V value() {
    fold();
    few_ = V{};
    return value_;
  }

 private:
  void fold() {
    const V corrected = few_ - lost_, next = value_ + corrected;
    lost_ = (next - value_) - corrected;
    value_ = next;
  }
  V few_{}, value_{}, lost_{};
  int terms_ = 0;
};

// Minimum and maximum of the values. The rounded weighted mean is clamped to them, so that g - mean is exactly 0 where all g are equal.
template <class A>
class Range {
 public:
  using V = typename Vector<A>::type;
  void add(V v) {
    low_ = v < low_ ? v : low_;
    high_ = v > high_ ? v : high_;
  }
  V clamp(V v) const { return v < low_ ? low_ : v > high_ ? high_ : v; }

 private:
  V low_ = V{} + infinity<A>, high_ = V{} - infinity<A>;
};

// Four values out of two vectors, counted through both.
template <int... at>
inline Vector<float>::type picked(Vector<float>::type a, Vector<float>::type b) {
#if __has_builtin(__builtin_shufflevector)
  return __builtin_shufflevector(a, b, at...);
#else
  return __builtin_shuffle(a, b, Vector<float>::mask{at...});
#endif
}

// Four rows of four values, to columns.
inline void turn(Vector<float>::type* r) {
  const auto a = picked<0, 4, 1, 5>(r[0], r[1]), b = picked<2, 6, 3, 7>(r[0], r[1]), c = picked<0, 4, 1, 5>(r[2], r[3]),
             d = picked<2, 6, 3, 7>(r[2], r[3]);
  r[0] = picked<0, 1, 4, 5>(a, c);
  r[1] = picked<2, 3, 6, 7>(a, c);
  r[2] = picked<0, 1, 4, 5>(b, d);
  r[3] = picked<2, 3, 6, 7>(b, d);
}

template <class L>
void read_block(const Rows<L>& rows, int64_t first, int64_t n, int64_t columns, accumulate_t<L>* to) {
  int64_t turned = 0;
  if constexpr (std::is_same_v<L, float>) {
    for (; rows.dense() && n == lanes && turned + 4 <= columns; turned += 4)
      for (int64_t r = 0; r < lanes; r += 4) {
        Vector<float>::type square[4];
        for (int64_t i = 0; i < 4; ++i) square[i] = Vector<float>::load(rows.row(first + r + i) + turned);
        turn(square);
        for (int64_t i = 0; i < 4; ++i) Vector<float>::store(to + (turned + i) * lanes + r, square[i]);
      }
  }
  for (int64_t r = 0; r < lanes; ++r) {
    const int64_t row = first + std::min(r, n - 1);
    for (int64_t c = turned; c < columns; ++c) to[c * lanes + r] = rows(row, c);
  }
}

template <class T, class A>
void write_block(const A* from, int64_t n, int64_t columns, T* to) {
  if (n == lanes) {
    int64_t turned = 0;
    if constexpr (std::is_same_v<T, float> && std::is_same_v<A, float>) {
      for (; turned + 4 <= columns; turned += 4)
        for (int64_t r = 0; r < lanes; r += 4) {
          Vector<float>::type square[4];
          for (int64_t i = 0; i < 4; ++i) square[i] = Vector<float>::load(from + (turned + i) * lanes + r);
          turn(square);
          for (int64_t i = 0; i < 4; ++i) Vector<float>::store(to + (r + i) * columns + turned, square[i]);
        }
    }
    for (int64_t r = 0; r < lanes; ++r)
      for (int64_t c = turned; c < columns; ++c) to[r * columns + c] = static_cast<T>(from[c * lanes + r]);
  } else {
    for (int64_t r = 0; r < n; ++r)
      for (int64_t c = 0; c < columns; ++c) to[r * columns + c] = static_cast<T>(from[c * lanes + r]);
  }
}

// f(first row, rows) of each block in the rows first..last-1.
template <class F>
void each_block(int64_t first, int64_t last, const F& f) {
  for (int64_t t = first; t < last; t += lanes) f(t, std::min(lanes, last - t));
}

template <class A>
const RowFunctions<A>& row_functions_here() {
  require_instruction_set();
  return *kernels_for<A>(sizeof(A) == 8 ? Type::f64 : Type::f32).rows;
}

}  // namespace cmoe::cpu
