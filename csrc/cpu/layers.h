// From the tensors of expert layers to what the drivers take.
#pragma once

#include "tensors.h"

namespace cmoe::cpu {

// Arguments of an expert layer, and what keeps their memory.
template <class T>
struct Layers : Experts<T> {
  Tensor x_kept, w1_kept, b1_kept, w2_kept, b2_kept;

  Layers(const Tensor& x, const Tensor& w1_, const std::optional<Tensor>& b1_, const std::optional<Tensor>& w2_,
         const std::optional<Tensor>& b2_, Activation activation, bool gated)
      : Experts<T>{type_of("x", x), x.size(0), x.size(1), 0, w1_.size(1), w1_.size(0), gated, activation, nullptr, {}, {}, {}, {}},
        x_kept(torch::stable::contiguous(x)) {
    this->x = bytes_of(x_kept);
    this->w1 = weight_of("w1", w1_, &w1_kept);
    this->b1 = bias_of("b1", b1_, &b1_kept);
    if (w2_) {
      this->hidden = w2_->size(2);
      this->outputs = w2_->size(1);
      this->w2 = weight_of("w2", *w2_, &w2_kept);
      this->b2 = bias_of("b2", b2_, &b2_kept);
    }
  }
};

// Sums of values [tokens, columns], given by at(token, column), per row of a table.
template <class T, class At>
void sum_rows(const Gates<T>& table, int64_t tokens, int64_t columns, T* to, const At& at) {
  std::fill(to, to + table.rows * columns, T(0));
  for (int64_t t = 0; t < tokens; ++t)
    for (int64_t c = 0; c < columns; ++c) to[table.row(t) * columns + c] += at(t, c);
}

}  // namespace cmoe::cpu
