// Binds sparse_experts.cpp and experts_backward.cpp: rows sorted by expert.

#include "../registration.h"
#include "layers.h"

namespace cmoe::cpu::bindings {

using torch::stable::contiguous;

namespace need {  // what the values of `needs` stand for
enum { x, weights, w1, b1, w2, b2 };
}

std::tuple<Tensor, Tensor, Tensor, Tensor> sparse_experts(Tensor x, std::optional<Tensor> weights, Tensor indices, Tensor w1,
                                                          std::optional<Tensor> b1, std::optional<Tensor> w2, std::optional<Tensor> b2,
                                                          std::optional<Tensor> group_ids, OwnedString activation, bool gated, bool save) {
  const Activation act = activation_of(activation);
  return computing(x, [&](auto zero) {
    using T = decltype(zero);
    const Layers<T> op(x, w1, b1, w2, b2, act, gated);
    Sorted<T> sorted(x, weights, indices, group_ids, op.tokens, op.experts);
    const int64_t rows = op.tokens * indices.size(1), live = sorted.assignments().offsets[op.experts],
                  row_bytes = op.first_outputs() * size_of(op.type);
    Tensor y = empty_tensor(x, {op.tokens, op.outputs}, x.scalar_type()),
           u = save ? empty_tensor(x, {rows, op.first_outputs()}, x.scalar_type()) : empty_placeholder(x);
    if (save && live < rows) std::memset(bytes_of(u) + live * row_bytes, 0, (rows - live) * row_bytes);
    cpu::sparse_experts<T>(op, sorted.assignments(), sorted.weights(), bytes_of(y), save ? bytes_of(u) : nullptr);
    return std::make_tuple(y, u, sorted.gather_idx, sorted.offsets);
  });
}

// Gradients of weights are added to those that are given.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> sparse_experts_backward_into(
    Tensor dy, Tensor x, std::optional<Tensor> weights, Tensor indices, Tensor w1, std::optional<Tensor> b1, std::optional<Tensor> w2,
    std::optional<Tensor> b2, std::optional<Tensor> group_ids, Tensor u, Tensor gather_idx, Tensor offsets, OwnedString activation,
    bool gated, std::vector<bool> needs, std::optional<Tensor> into_w1, std::optional<Tensor> into_b1, std::optional<Tensor> into_w2,
    std::optional<Tensor> into_b2) {
  const Activation act = activation_of(activation);
  return computing(x, [&](auto zero) {
    using T = decltype(zero);
    const Layers<T> op(x, w1, b1, w2, b2, act, gated);
    const Tensor dy_kept = contiguous(dy), u_kept = contiguous(u);
    const std::optional<Tensor> ids = contiguous_or_null(group_ids), w = contiguous_or_null(weights);
    const int64_t k = indices.size(1), rows = op.tokens * k;
    const Gates<T> table{w ? static_cast<const T*>(w->const_data_ptr()) : nullptr, indices.size(0), k,
                         ids ? static_cast<const int64_t*>(ids->const_data_ptr()) : nullptr};
    const int64_t* const order = static_cast<const int64_t*>(gather_idx.const_data_ptr());
    Tensor dx = gradient_like(x, needs[need::x], x), dweights = gradient_like(w, needs[need::weights], x),
           dw1 = gradient_like(w1, needs[need::w1] && !into_w1, x), db1 = gradient_like(b1, needs[need::b1] && !into_b1, x),
           dw2 = gradient_like(w2, needs[need::w2] && !into_w2, x), db2 = gradient_like(b2, needs[need::b2] && !into_b2, x);
    const bool need_weights = w && needs[need::weights];
    const Array<T> row_weights(w ? rows : 0), drows(need_weights ? rows : 0), by_assignment(need_weights ? rows : 0);
    if (w)
      for (int64_t i = 0; i < rows; ++i) row_weights[i] = table.data[table.row(order[i] / k) * k + order[i] % k];
    std::fill(drows.get(), drows.get() + drows.size(), T(0));
    ExpertsBackward<T> grads{};
    grads.offsets = static_cast<const int32_t*>(offsets.const_data_ptr());
    grads.index = grads.dy_index = order;
    grads.divisor = grads.dy_divisor = k;
    grads.routing_weights = w ? row_weights.get() : nullptr;
    grads.dy = bytes_of(dy_kept);
    grads.u = u.numel() ? bytes_of(u_kept) : nullptr;
    grads.u_row = op.first_outputs();
    grads.dx = needs[need::x] ? bytes_of(dx) : nullptr;
    grads.routing_weight_grad = need_weights ? drows.get() : nullptr;
    grads.dw1 = gradient_of(dw1, w1, needs[need::w1], into_w1);
    grads.db1 = gradient_of(db1, b1, needs[need::b1], into_b1);
    grads.dw2 = gradient_of(dw2, w2, needs[need::w2], into_w2);
    grads.db2 = gradient_of(db2, b2, needs[need::b2], into_b2);
    experts_backward<T>(op, grads);
    if (need_weights) {
      for (int64_t i = 0; i < rows; ++i) by_assignment[order[i]] = drows[i];
      sum_rows(table, op.tokens, k, static_cast<T*>(dweights.mutable_data_ptr()),
               [&](int64_t t, int64_t i) { return by_assignment[t * k + i]; });
    }
    return std::make_tuple(dx, dweights, dw1, db1, dw2, db2);
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> sparse_experts_backward(
    Tensor dy, Tensor x, std::optional<Tensor> weights, Tensor indices, Tensor w1, std::optional<Tensor> b1, std::optional<Tensor> w2,
    std::optional<Tensor> b2, std::optional<Tensor> group_ids, Tensor u, Tensor gather_idx, Tensor offsets, OwnedString activation,
    bool gated, std::vector<bool> needs) {
  return sparse_experts_backward_into(dy, x, weights, indices, w1, b1, w2, b2, group_ids, u, gather_idx, offsets, activation, gated, needs,
                                      std::nullopt, std::nullopt, std::nullopt, std::nullopt);
}

CMOE_IMPLEMENT(CPU, sparse_experts)
CMOE_IMPLEMENT(CPU, sparse_experts_backward)
CMOE_IMPLEMENT(CPU, sparse_experts_backward_into)

}  // namespace cmoe::cpu::bindings
