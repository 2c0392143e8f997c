// sparse_experts on the GPU.
//
//     y[t] = sum over the rows i of token t of weight_i (W2_e h_i + b2_e),   h_i = act(W1_e x[t] + b1_e)   (gated: act(gate) up)
//
// Rows are assignments (a token and an expert) in the order of their experts. Forward: the first product gathers x as it is loaded and
// writes weight_i h_i [T K, H] (and u where it is saved); the second adds weight_i b2 and scatters to [T, K, O], whose K rows are added in
// the order of the assignments; with K = 1 it stores y itself. Backward: one product makes dh in registers and leaves du, weight_i h_i and
// the weight's partial sums; dx scatters as y does. Neither gathered rows of x nor expert outputs in fp32 exist. Rows of no expert lie past
// offsets[E]: their tiles read no weights and write zeros.

#include "../registration.h"
#include "layers.h"
#include "rows/sort_by_expert.h"

namespace cmoe::cuda::bindings {

namespace need {  // what the values of `needs` stand for
enum { x, weights, w1, b1, w2, b2 };
}

namespace {

struct Sorted {
  Tensor gather_idx, offsets, weights;

  Sorted(const Tensor& x, const std::optional<Tensor>& w, const Tensor& indices, const std::optional<Tensor>& group_ids, int64_t experts,
         Stream stream) {
    const int64_t tokens = x.size(0), k = indices.size(1);
    const std::optional<Tensor> ids = contiguous_or_null(group_ids);
    const Assignments s{index_matrix("indices", indices), indices.size(0), indices_of(ids), tokens, k, experts};
    gather_idx = empty_tensor(x, {tokens * k}, ScalarType::Long);
    offsets = empty_tensor(x, {experts + 1}, ScalarType::Int);
    weights = w ? empty_tensor(x, {tokens * k}, ScalarType::Float) : empty_placeholder(x);
    Tensor scratch = empty_tensor(x, {sort_scratch(s)}, ScalarType::Int);
    sort_by_expert(s, w ? matrix("weights", *w) : Matrix{}, data<int64_t>(gather_idx), data<int32_t>(offsets),
                   w ? data<float>(weights) : nullptr, data<int32_t>(scratch), stream);
  }
};

void require(const Tensor& x, const std::optional<Tensor>& weights, const Tensor& indices, const std::optional<Tensor>& group_ids) {
  STD_TORCH_CHECK(indices.dim() == 2 && (group_ids || indices.size(0) == 1 || indices.size(0) == x.size(0)), "indices has shape ",
                  shape(indices), ", must have one row per token, one, or one per group");
  if (weights) {
    STD_TORCH_CHECK(weights->scalar_type() == ScalarType::Float, "weights must be float32, got ",
                    torch::headeronly::toString(weights->scalar_type()));
    require_shape("weights", *weights, indices.size(0), indices.size(1), "indices");
  }
  require_rows(x.size(0) * indices.size(1));
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor> sparse_experts(Tensor x, std::optional<Tensor> weights, Tensor indices, Tensor w1,
                                                          std::optional<Tensor> b1, std::optional<Tensor> w2, std::optional<Tensor> b2,
                                                          std::optional<Tensor> group_ids, OwnedString activation, bool gated, bool save) {
  const Activation act = activation_of(activation);
  require(x, weights, indices, group_ids);
  const OnDevice on(x);
  const int64_t tokens = x.size(0), k = indices.size(1), rows = tokens * k, experts = w1.size(0), outputs = w2 ? w2->size(1) : w1.size(1);
  const Sorted sorted(x, weights, indices, group_ids, experts, on.stream);
  const int64_t* const order = static_cast<const int64_t*>(sorted.gather_idx.const_data_ptr());
  const Groups groups{static_cast<const int32_t*>(sorted.offsets.const_data_ptr()), rows, experts};
  const RoutingWeights routing_weights{weights ? static_cast<const float*>(sorted.weights.const_data_ptr()) : nullptr, 1, 0};
  const Type type = type_of("x", x);
  Tensor y = empty_tensor(x, {tokens, outputs}), u = save ? empty_tensor(x, {rows, w1.size(1)}) : empty_placeholder(x);
  Tensor by_assignment = k == 1 ? y : empty_tensor(x, {rows, outputs});
  const Tensor w1_rounded = rounded(w1, x);
  GroupedGemm first =
      grouped_gemm_of(type, groups, w2 ? w2->size(2) : outputs, x.size(1), rows_of("x", x, order, k), weights_of("w1", w1_rounded));
  first.gated = gated;
  first.b = table_of("b1", b1);
  first.routing_weights = routing_weights;
  if (!w2) {
    first.y = target_of(by_assignment, order);
    grouped_gemm("sparse_experts", first, on.stream);
  } else {
    Tensor weighted_hidden = empty_tensor(x, {rows, w2->size(2)});
    first.activation = act;
    first.y = target_of(weighted_hidden);
    if (save) first.u = target_of(u);
    grouped_gemm("sparse_experts", first, on.stream);
    const Tensor w2_rounded = rounded(*w2, x);
    GroupedGemm second =
        grouped_gemm_of(type, groups, outputs, w2->size(2), rows_of("weighted_hidden", weighted_hidden), weights_of("w2", w2_rounded));
    second.b = table_of("b2", b2);
    second.routing_weights = routing_weights;
    second.weigh_bias = true;  // its input is weighted already
    second.y = target_of(by_assignment, order);
    grouped_gemm("sparse_experts", second, on.stream);
  }
  if (k != 1) sum_assignments(type, by_assignment.const_data_ptr(), tokens, k, outputs, y.mutable_data_ptr(), on.stream);
  return {y, u, sorted.gather_idx, sorted.offsets};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> sparse_experts_backward(
    Tensor dy, Tensor x, std::optional<Tensor> weights, Tensor indices, Tensor w1, std::optional<Tensor> b1, std::optional<Tensor> w2,
    std::optional<Tensor> b2, std::optional<Tensor> group_ids, Tensor u, Tensor gather_idx, Tensor offsets, OwnedString activation,
    bool gated, std::vector<bool> needs) {
  const Activation act = activation_of(activation);
  require(x, weights, indices, group_ids);
  const OnDevice on(x);
  const int64_t tokens = x.size(0), k = indices.size(1), rows = tokens * k, experts = w1.size(0);
  const int64_t* const order = static_cast<const int64_t*>(gather_idx.const_data_ptr());
  const Groups groups{static_cast<const int32_t*>(offsets.const_data_ptr()), rows, experts};
  const Type type = type_of("x", x);
  const std::optional<Tensor> ids = contiguous_or_null(group_ids);
  Tensor row_weights = weights ? empty_tensor(x, {rows}, ScalarType::Float) : empty_placeholder(x);
  const RoutingWeights routing_weights{weights ? data<float>(row_weights) : nullptr, 1, 0};
  if (weights)
    per_row(static_cast<const float*>(weights->const_data_ptr()), weights->stride(0), weights->stride(1), weights->size(0), indices_of(ids),
            order, rows, k, data<float>(row_weights), on.stream);
  const Tensor w1_rounded = rounded(w1, x), last = w2 ? rounded(*w2, x) : w1_rounded;
  const std::optional<Tensor>& last_bias = w2 ? b2 : b1;
  const RowOperand dy_rows = rows_of("dy", dy, order, k), x_rows = rows_of("x", x, order, k);
  Tensor dx = gradient_like(x, needs[need::x], x), dweights = gradient_like(weights, needs[need::weights], x),
         dw1 = gradient_like(w1, needs[need::w1], x), db1 = gradient_like(b1, needs[need::b1], x),
         dw2 = gradient_like(w2, needs[need::w2], x), db2 = gradient_like(b2, needs[need::b2], x);
  const bool want_weights = weights && needs[need::weights], want_db1 = w2 && b1 && needs[need::b1],
             want_du = w2 && (needs[need::x] || needs[need::w1] || want_db1);
  Tensor &dw_last = w2 ? dw2 : dw1, &db_last = w2 ? db2 : db1;
  const bool want_dw_last = w2 ? needs[need::w2] : needs[need::w1], want_db_last = last_bias && (w2 ? needs[need::b2] : needs[need::b1]);
  Tensor drows = !needs[need::x] ? empty_placeholder(x) : k == 1 ? dx : empty_tensor(x, {rows, x.size(1)});

  DactGemm hidden = dact_gemm_of(type, groups, last.size(2), last.size(1), dy_rows, weights_of("w2", last).transposed());
  hidden.routing_weights = routing_weights;
  Tensor du = want_du ? empty_tensor(x, {rows, w1.size(1)}) : empty_placeholder(x),
         weighted_hidden = w2 && want_dw_last ? empty_tensor(x, {rows, w2->size(2)}) : empty_placeholder(x);
  if (w2) {
    if (!u.numel() && rows) {
      u = empty_tensor(x, {rows, w1.size(1)});
      GroupedGemm first = grouped_gemm_of(type, groups, w2->size(2), x.size(1), x_rows, weights_of("w1", w1_rounded));
      first.gated = gated;
      first.b = table_of("b1", b1);
      first.activation = act;
      first.u = target_of(u);
      grouped_gemm("sparse_experts_backward", first, on.stream);
    }
    hidden.activation = act;
    hidden.gated = gated;
    hidden.u = rows ? rows_of("u", u) : RowOperand{};
    if (want_du) hidden.du = target_of(du);
    if (want_dw_last) hidden.weighted_hidden = target_of(weighted_hidden);
  } else {  // one product gives both: its rows are dx, and their products with x the weights' gradients
    hidden.u = x_rows;
    if (needs[need::x]) hidden.du = target_of(drows, order);
  }
  Tensor partials = want_weights ? empty_tensor(x, {dact_partials(hidden), rows}, ScalarType::Float) : empty_placeholder(x);
  if (want_weights) hidden.partials = data<float>(partials);
  if (want_du || (w2 && want_dw_last) || want_weights || (!w2 && needs[need::x])) dact_gemm("sparse_experts_backward", hidden, on.stream);
  if (want_weights) {
    const bool own = !group_ids && indices.size(0) == tokens;
    Tensor by_token = own ? dweights : empty_tensor(x, {tokens, k}, ScalarType::Float);
    routing_weight_grad(hidden.partials, dact_partials(hidden), dy_rows, type, table_of("b2", last_bias), last.size(1), groups,
                        data<float>(by_token), on.stream);
    if (!own) sum_per_group(data<float>(by_token), indices_of(ids), tokens, indices.size(0), k, data<float>(dweights), on.stream);
  }
  if (w2 && needs[need::x]) {
    GroupedGemm back = grouped_gemm_of(type, groups, w1.size(2), w1.size(1), rows_of("du", du), weights_of("w1", w1_rounded).transposed());
    back.y = target_of(drows, order);
    grouped_gemm("sparse_experts_backward", back, on.stream);
  }
  if (needs[need::x] && k != 1) sum_assignments(type, drows.const_data_ptr(), tokens, k, x.size(1), dx.mutable_data_ptr(), on.stream);

  if (w2 && (needs[need::w1] || want_db1)) {
    Wgrad w = wgrad_of(type, groups, w1.size(1), w1.size(2), rows_of("du", du), x_rows);
    if (needs[need::w1]) w.dw = gradient_of(dw1);
    if (want_db1) w.db = gradient_of(db1);
    wgrad("sparse_experts_backward", w, on.stream);
  }
  Tensor weighted = empty_placeholder(x);
  if (want_dw_last) {
    Wgrad w = wgrad_of(type, groups, last.size(1), last.size(2), dy_rows, w2 ? rows_of("weighted_hidden", weighted_hidden) : x_rows);
    if (!w2 && routing_weights.data) {
      weighted = empty_tensor(x, {rows, last.size(1)});
      weighted_rows(type, dy_rows, groups, routing_weights, last.size(1), weighted.mutable_data_ptr(), on.stream);
      w.p = rows_of("dy", weighted);
    }
    w.dw = gradient_of(dw_last);
    if (w2 && want_db_last) w.db = gradient_of(db_last), w.routing_weights = routing_weights;
    wgrad("sparse_experts_backward", w, on.stream);
  }
  if (want_db_last && (!w2 || !want_dw_last)) {  // from dy itself, not from what was rounded for the product
    Wgrad w = wgrad_of(type, groups, last.size(1), 1, dy_rows, dy_rows);
    w.db = gradient_of(db_last), w.routing_weights = routing_weights;
    wgrad("sparse_experts_backward", w, on.stream);
  }
  return {dx, dweights, dw1, db1, dw2, db2};
}

CMOE_IMPLEMENT(CUDA, sparse_experts)
CMOE_IMPLEMENT(CUDA, sparse_experts_backward)

}  // namespace cmoe::cuda::bindings
