// Binds grouped_linear.cpp and experts_backward.cpp.

#include "grouped_linear.h"

#include <numeric>

#include "../registration.h"
#include "layers.h"

namespace cmoe::cpu::bindings {

using torch::stable::contiguous;

namespace need {  // what the values of `needs` stand for
enum { x, w, b };
}

namespace {

// The rows of grouped_linear: offsets checked, index and scatter as they are or the identity.
struct GroupedRows {
  Tensor offsets, index, scatter;
  std::vector<int64_t> identity;

  GroupedRows(const Tensor& ends, int64_t rows, const std::optional<Tensor>& gather_idx, const std::optional<Tensor>& scatter_idx,
              bool check)
      : offsets(contiguous(ends)), identity(gather_idx && scatter_idx ? 0 : rows) {
    std::iota(identity.begin(), identity.end(), int64_t{0});
    if (gather_idx) index = contiguous(*gather_idx);
    if (scatter_idx) scatter = contiguous(*scatter_idx);
    if (!check) return;
    const int32_t* const e = static_cast<const int32_t*>(offsets.const_data_ptr());
    bool valid = offsets.numel() > 0 && e[0] == 0 && e[offsets.numel() - 1] <= rows;
    for (int64_t i = 1; i < offsets.numel(); ++i) valid = valid && e[i - 1] <= e[i];
    STD_TORCH_CHECK(valid, "offsets must start at 0, not decrease and end at ", rows, " rows or before");
    for (const auto& [name, given, t] : {std::make_tuple("gather_idx", gather_idx.has_value(), &index),
                                         std::make_tuple("scatter_idx", scatter_idx.has_value(), &scatter)}) {
      if (!given) continue;
      std::vector<bool> seen(rows, false);
      const int64_t* const values = static_cast<const int64_t*>(t->const_data_ptr());
      for (int64_t i = 0; i < rows; ++i) {
        STD_TORCH_CHECK(values[i] >= 0 && values[i] < rows && !seen[values[i]], name, " must be a permutation of range(", rows, ")");
        seen[values[i]] = true;
      }
    }
  }
  const int32_t* ends() const { return static_cast<const int32_t*>(offsets.const_data_ptr()); }
  const int64_t* gather() const { return index.defined() ? static_cast<const int64_t*>(index.const_data_ptr()) : identity.data(); }
  const int64_t* scattered() const { return scatter.defined() ? static_cast<const int64_t*>(scatter.const_data_ptr()) : identity.data(); }
};

}  // namespace

std::tuple<Tensor, Tensor> grouped_linear(Tensor x, Tensor w, std::optional<Tensor> b, Tensor offsets, std::optional<Tensor> gather_idx,
                                          int64_t k, std::optional<Tensor> scatter_idx, std::optional<OwnedString> activation, bool save) {
  const Activation act = activation_of(activation);
  const bool activated = act != Activation::none;
  return computing(x, [&](auto zero) {
    using T = decltype(zero);
    const Layers<T> op(x, w, b, std::nullopt, std::nullopt, act, false);
    const int64_t rows = op.tokens * k, row_bytes = op.outputs * size_of(op.type);
    const GroupedRows layout(offsets, rows, gather_idx, scatter_idx, true);
    Tensor y = empty_tensor(x, {rows, op.outputs}, x.scalar_type()),
           u = save ? empty_tensor(x, {rows, op.outputs}, x.scalar_type()) : empty_placeholder(x);
    const int64_t live = layout.ends()[op.experts];
    for (int64_t i = live; i < rows; ++i) {
      std::memset(bytes_of(y) + layout.scattered()[i] * row_bytes, 0, row_bytes);
      if (save) std::memset(bytes_of(u) + i * row_bytes, 0, row_bytes);
    }
    cpu::grouped_linear<T>(op, {layout.ends(), layout.gather(), k}, layout.scattered(), activated, bytes_of(y),
                           save ? bytes_of(u) : nullptr);
    return std::make_tuple(y, u);
  });
}

// Gradients of weights are added to those that are given.
std::tuple<Tensor, Tensor, Tensor> grouped_linear_backward_into(Tensor dy, Tensor x, Tensor w, std::optional<Tensor> b, Tensor offsets,
                                                                std::optional<Tensor> gather_idx, std::optional<Tensor> scatter_idx,
                                                                Tensor u, int64_t k, std::optional<OwnedString> activation,
                                                                std::vector<bool> needs, std::optional<Tensor> into_w,
                                                                std::optional<Tensor> into_b) {
  const Activation act = activation_of(activation);
  const bool activated = act != Activation::none;
  return computing(x, [&](auto zero) {
    using T = decltype(zero);
    const Layers<T> op(x, w, b, std::nullopt, std::nullopt, act, false);
    const int64_t rows = op.tokens * k;
    const GroupedRows layout(offsets, rows, gather_idx, scatter_idx, false);
    const Tensor dy_kept = contiguous(dy), u_kept = contiguous(u);
    Tensor dx = gradient_like(x, needs[need::x], x), dw = gradient_like(w, needs[need::w] && !into_w, x),
           db = gradient_like(b, needs[need::b] && !into_b, x);
    const std::vector<int64_t>& identity = layout.identity;
    std::vector<int64_t> own;
    const Array<char> du(activated ? rows * op.outputs * size_of(op.type) : 0);
    ExpertsBackward<T> grads{};
    grads.offsets = layout.ends();
    grads.index = layout.gather();
    grads.divisor = k;
    grads.dy_index = layout.scattered();
    grads.dy_divisor = 1;
    grads.dy = bytes_of(dy_kept);
    if (activated) {
      require_shape("u", u, rows, op.outputs, "y");
      activation_backward<T>(op, bytes_of(dy_kept), layout.scattered(), bytes_of(u_kept), rows, du.get());
      if (identity.empty()) {
        own.resize(rows);
        std::iota(own.begin(), own.end(), int64_t{0});
      }
      grads.dy = du.get();
      grads.dy_index = identity.empty() ? own.data() : identity.data();
    }
    grads.dx = needs[need::x] ? bytes_of(dx) : nullptr;
    grads.dw1 = gradient_of(dw, w, needs[need::w], into_w);
    grads.db1 = gradient_of(db, b, needs[need::b], into_b);
    experts_backward<T>(op, grads);
    return std::make_tuple(dx, dw, db);
  });
}

std::tuple<Tensor, Tensor, Tensor> grouped_linear_backward(Tensor dy, Tensor x, Tensor w, std::optional<Tensor> b, Tensor offsets,
                                                           std::optional<Tensor> gather_idx, std::optional<Tensor> scatter_idx, Tensor u,
                                                           int64_t k, std::optional<OwnedString> activation, std::vector<bool> needs) {
  return grouped_linear_backward_into(dy, x, w, b, offsets, gather_idx, scatter_idx, u, k, activation, needs, std::nullopt, std::nullopt);
}

CMOE_IMPLEMENT(CPU, grouped_linear)
CMOE_IMPLEMENT(CPU, grouped_linear_backward)
CMOE_IMPLEMENT(CPU, grouped_linear_backward_into)

}  // namespace cmoe::cpu::bindings
