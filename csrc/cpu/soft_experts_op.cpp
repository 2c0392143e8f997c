// Binds soft_experts.cpp, experts_backward.cpp and merged_experts.h.

#include "grouped_linear.h"
#include "../registration.h"
#include "layers.h"
#include "merged_experts.h"

namespace cmoe::cpu::bindings {

using torch::stable::contiguous;

namespace need {  // what the values of `needs` stand for
enum { x, gates, w1, b1, w2, b2 };
}

namespace {

// Layers whose weights lie along their inputs, as merging reads them.
template <class T>
Experts<T> along_inputs(const Layers<T>& layers, const Tensor& w1, Tensor* kept) {
  STD_TORCH_CHECK(layers.tokens <= INT32_MAX, "x has ", layers.tokens, " tokens, must have at most ", INT32_MAX);
  *kept = contiguous(w1);
  Experts<T> op = layers;
  op.w1 = {bytes_of(*kept), type_of("w1", w1), op.outputs * op.inputs, op.inputs, 1};
  return op;
}

}  // namespace

std::tuple<Tensor, Tensor> soft_experts(Tensor x, Tensor gates, Tensor w1, std::optional<Tensor> b1, std::optional<Tensor> w2,
                                        std::optional<Tensor> b2, std::optional<Tensor> group_ids, OwnedString activation, bool save) {
  const Activation act = activation_of(activation);
  return computing(x, [&](auto zero) {
    using T = decltype(zero);
    const Layers<T> op(x, w1, b1, w2, b2, act, false);
    const Tensor g = contiguous(gates);
    const std::optional<Tensor> ids = contiguous_or_null(group_ids);
    const Gates<T> table = gates_of<T>(g, ids, "rows of gates");
    Tensor y = empty_tensor(x, {op.tokens, op.outputs}, x.scalar_type()),
           u = save ? empty_tensor(x, {op.tokens, op.experts, op.hidden}, x.scalar_type()) : empty_placeholder(x);
    Tensor w1_kept;
    if (!w2 && table.rows < op.tokens) {
      const Merged<T> merged(along_inputs(op, w1, &w1_kept), table);
      cpu::grouped_linear(merged.layers(), {merged.offsets.data(), merged.order.get(), 1}, merged.order.get(), false, bytes_of(y), nullptr);
    } else {
      cpu::soft_experts<T>(op, table, bytes_of(y), save ? bytes_of(u) : nullptr);
    }
    return std::make_tuple(y, u);
  });
}

// Gradients of weights are added to those that are given.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> soft_experts_backward_into(
    Tensor dy, Tensor x, Tensor gates, Tensor w1, std::optional<Tensor> b1, std::optional<Tensor> w2, std::optional<Tensor> b2,
    std::optional<Tensor> group_ids, Tensor u, OwnedString activation, std::vector<bool> needs, std::optional<Tensor> into_w1,
    std::optional<Tensor> into_b1, std::optional<Tensor> into_w2, std::optional<Tensor> into_b2) {
  const Activation act = activation_of(activation);
  return computing(x, [&](auto zero) {
    using T = decltype(zero);
    const Layers<T> op(x, w1, b1, w2, b2, act, false);
    const Tensor g = contiguous(gates), dy_kept = contiguous(dy), u_kept = contiguous(u);
    const std::optional<Tensor> ids = contiguous_or_null(group_ids);
    const Gates<T> table = gates_of<T>(g, ids, "rows of gates");
    Tensor dx = gradient_like(x, needs[need::x], x), dgates = gradient_like(g, needs[need::gates], x),
           dw1 = gradient_like(w1, needs[need::w1] && !into_w1, x), db1 = gradient_like(b1, needs[need::b1] && !into_b1, x),
           dw2 = gradient_like(w2, needs[need::w2] && !into_w2, x), db2 = gradient_like(b2, needs[need::b2] && !into_b2, x);
    T* const dgates_data = needs[need::gates] ? static_cast<T*>(dgates.mutable_data_ptr()) : nullptr;
    Tensor w1_kept;
    if (!w2 && table.rows < op.tokens) {
      const Merged<T> merged(along_inputs(op, w1, &w1_kept), table);
      merged.backward(bytes_of(dy_kept), needs[need::x] ? bytes_of(dx) : nullptr, dgates_data,
                      gradient_of(dw1, w1, needs[need::w1], into_w1), gradient_of(db1, b1, needs[need::b1], into_b1));
    } else {
      const Array<T> weights(op.experts * op.tokens), dweights(needs[need::gates] ? op.experts * op.tokens : 0);
      for (int64_t e = 0; e < op.experts; ++e)
        for (int64_t t = 0; t < op.tokens; ++t) weights[e * op.tokens + t] = table(t, e);
      ExpertsBackward<T> grads{};
      grads.divisor = grads.dy_divisor = 1;
      grads.routing_weights = weights.get();
      grads.dy = bytes_of(dy_kept);
      grads.u = u.numel() ? bytes_of(u_kept) : nullptr;
      grads.u_expert = op.hidden;
      grads.u_row = op.experts * op.hidden;
      grads.dx = needs[need::x] ? bytes_of(dx) : nullptr;
      grads.routing_weight_grad = needs[need::gates] ? dweights.get() : nullptr;
      grads.dw1 = gradient_of(dw1, w1, needs[need::w1], into_w1);
      grads.db1 = gradient_of(db1, b1, needs[need::b1], into_b1);
      grads.dw2 = gradient_of(dw2, w2, needs[need::w2], into_w2);
      grads.db2 = gradient_of(db2, b2, needs[need::b2], into_b2);
      experts_backward<T>(op, grads);
      if (needs[need::gates])
        sum_rows(table, op.tokens, op.experts, dgates_data, [&](int64_t t, int64_t e) { return dweights[e * op.tokens + t]; });
    }
    return std::make_tuple(dx, dgates, dw1, db1, dw2, db2);
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> soft_experts_backward(Tensor dy, Tensor x, Tensor gates, Tensor w1,
                                                                                 std::optional<Tensor> b1, std::optional<Tensor> w2,
                                                                                 std::optional<Tensor> b2, std::optional<Tensor> group_ids,
                                                                                 Tensor u, OwnedString activation,
                                                                                 std::vector<bool> needs) {
  return soft_experts_backward_into(dy, x, gates, w1, b1, w2, b2, group_ids, u, activation, needs, std::nullopt, std::nullopt, std::nullopt,
                                    std::nullopt);
}

CMOE_IMPLEMENT(CPU, soft_experts)
CMOE_IMPLEMENT(CPU, soft_experts_backward)
CMOE_IMPLEMENT(CPU, soft_experts_backward_into)

}  // namespace cmoe::cpu::bindings
