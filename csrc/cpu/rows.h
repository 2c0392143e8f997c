// What row-wise operations on the CPU share: strided views, dtype dispatch, and the loop over rows.
//
// Work is cut into at most one chunk of rows per thread. Each row is computed by the same code wherever a chunk begins, and chunks
// exchange integers only, so results do not depend on the number of threads.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <type_traits>

#include "../tensors.h"

namespace cmoe::cpu {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;

// The type in which values of type T are computed, and in which gates and weights are returned.
template <class T>
using accumulate_t = std::conditional_t<std::is_same_v<T, double>, double, float>;

// Sums over a row. An addition in double costs nothing beside an exponential, and over hundreds of experts it keeps plain summation as
// exact as torch's pairwise one.
using sum_t = double;

inline ScalarType accumulate_dtype(ScalarType dtype) { return dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float; }

// An error where there is no instruction set to run on (tensors.cpp); one warning in a process where a better one failed its self-test.
void require_instruction_set();

// A tensor [T, columns] with any strides, zero among them, read in the type of the computation.
template <class T>
class Rows {
 public:
  explicit Rows(const Tensor& t) : data_(static_cast<const T*>(t.const_data_ptr())), row_(t.stride(0)), column_(t.stride(1)) {}
  bool dense() const { return column_ == 1; }
  const T* row(int64_t i) const { return data_ + i * row_; }
  accumulate_t<T> operator()(int64_t row, int64_t column) const {
    return static_cast<accumulate_t<T>>(data_[row * row_ + column * column_]);
  }

 private:
  const T* data_;
  int64_t row_, column_;
};

// Calls f with a value of the C++ type of t's dtype.
template <class F>
void dispatch_float(const char* name, const Tensor& t, F&& f) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return f(float{});
    case ScalarType::Double: return f(double{});
    case ScalarType::BFloat16: return f(BFloat16{});
    case ScalarType::Half: return f(Half{});
    default:
      STD_TORCH_CHECK(false, name, " must be float32, bfloat16, float16 or float64, got ", torch::headeronly::toString(t.scalar_type()));
  }
}

struct Chunks {
  int64_t rows, size, count;

  Chunks(int64_t rows_, int64_t elements_per_row) : rows(rows_) {
    // Below a few thousand elements a chunk costs less than waking a thread.
    const int64_t least = std::max<int64_t>(1, 4096 / std::max<int64_t>(1, elements_per_row));
    const int64_t threads = torch::stable::get_num_threads();
    size = std::max(least, (rows + threads - 1) / threads);
    count = (rows + size - 1) / size;
  }

  // f(chunk, first, last). An exception must not leave f: torch's C interface would lose its message.
  template <class F>
  void run(const F& f) const {
    torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
      for (int64_t chunk = begin; chunk < end; ++chunk) f(chunk, chunk * size, std::min(rows, (chunk + 1) * size));
    });
  }
};

// One block of n values per chunk, on cache lines that no other chunk writes.
template <class T>
class Scratch {
 public:
  Scratch(const Chunks& chunks, int64_t n) : stride_(n + static_cast<int64_t>(64 / sizeof(T))), values_(chunks.count * stride_) {}
  T* operator[](int64_t chunk) { return values_.data() + chunk * stride_; }

 private:
  int64_t stride_;
  std::vector<T> values_;
};

}  // namespace cmoe::cpu
