// soft_experts on the GPU.
//
//     u_e = x W1_e^T + b1_e      h_e = act(u_e)      y = sum_e gate_e (h_e W2_e^T + b2_e)
//
// Forward: one product with N = E H, whose epilogue writes gate_e h_e [T, E, H] (and u where it is saved), and one with K = E H, in whose
// accumulator the experts are added, with gates b2 in the epilogue. Backward: one product makes dh in registers and leaves du,
// gate_e h_e and the gate's partial sums; dx is one product with K = E H, the weights' gradients one each. No [E, T, O] exists.
// Single linear experts are the same with h = x, weighted in a pass of its own: gate_e x, and gate_e dy on the way back. Where their gates
// have fewer rows than there are tokens (a row per task, or one), they merge into one layer per row of gates: E times fewer products over
// tokens, which are then the rows of their group as sparse tokens are of their expert. More groups than experts are not merged: their
// weights would outgrow the experts' own.

#include "../registration.h"
#include "layers.h"
#include "merged_experts.h"
#include "rows/sort_by_expert.h"

namespace cmoe::cuda::bindings {

namespace need {  // what the values of `needs` stand for
enum { x, gates, w1, b1, w2, b2 };
}

namespace {

// The gates of each token, spread out only where tokens share rows by group.
struct Gates {
  Tensor spread;
  RoutingWeights routing_weights;

  Gates(const Tensor& gates, const std::optional<Tensor>& group_ids, int64_t tokens, Stream stream) {
    if (group_ids) {
      const Tensor ids = torch::stable::contiguous(*group_ids);
      spread = empty_tensor(gates, {tokens, gates.size(1)});
      per_token(static_cast<const float*>(gates.const_data_ptr()), gates.stride(0), gates.stride(1), gates.size(0),
                static_cast<const int64_t*>(ids.const_data_ptr()), tokens, gates.size(1), data<float>(spread), stream);
    } else {
      spread = gates;
    }
    routing_weights = {static_cast<const float*>(spread.const_data_ptr()), spread.size(0) == tokens ? spread.stride(0) : 0,
                       spread.stride(1)};
  }
};

void require(const Tensor& x, const Tensor& gates, const Tensor& w1, const std::optional<Tensor>& group_ids) {
  STD_TORCH_CHECK(gates.scalar_type() == ScalarType::Float, "gates must be float32, got ",
                  torch::headeronly::toString(gates.scalar_type()));
  STD_TORCH_CHECK(gates.dim() == 2 && gates.size(1) == w1.size(0) && (group_ids || gates.size(0) == 1 || gates.size(0) == x.size(0)),
                  "gates has shape ", shape(gates), ", must have one row per token, one, or one per group, and ", w1.size(0), " columns");
  require_rows(x.size(0));
}

bool merges(const Tensor& x, const Tensor& gates, const std::optional<Tensor>& w2) {
  return !w2 && gates.size(0) < x.size(0) && gates.size(0) <= gates.size(1);
}

Stack stack_of(const char* name, const Tensor& t) {
  if (t.dim() == 3) return {t.const_data_ptr(), type_of(name, t), t.stride(0), t.stride(1), t.stride(2), t.size(0), t.size(1), t.size(2)};
  return {t.const_data_ptr(), type_of(name, t), t.stride(0), 0, t.stride(1), t.size(0), 1, t.size(1)};
}

// sum_e gates[m, e] t[e], or by the gates' columns.
Tensor mixed(const Tensor& t, const Tensor& gates, bool by_columns, ScalarType dtype, Stream stream) {
  const int64_t m = gates.size(by_columns ? 1 : 0);
  Tensor out = t.dim() == 3 ? empty_tensor(t, {m, t.size(1), t.size(2)}, dtype) : empty_tensor(t, {m, t.size(1)}, dtype);
  mix(stack_of("w1", t), static_cast<const float*>(gates.const_data_ptr()), gates.stride(by_columns ? 1 : 0),
      gates.stride(by_columns ? 0 : 1), m, type_of("a result", out), out.mutable_data_ptr(), stream);
  return out;
}

// Tokens in the order of their groups.
struct TokensByGroup {
  Tensor order, offsets;
  Groups groups;
  const int64_t* index = nullptr;

  TokensByGroup(const Tensor& x, const Tensor& gates, const std::optional<Tensor>& group_ids, Stream stream) {
    const int64_t tokens = x.size(0), count = gates.size(0);
    groups = {nullptr, tokens, count};
    if (!group_ids) return;  // one group, which has every token
    order = empty_tensor(x, {tokens}, ScalarType::Long);
    offsets = empty_tensor(x, {count + 1}, ScalarType::Int);
    const Assignments s{
        {static_cast<const int64_t*>(group_ids->const_data_ptr()), group_ids->stride(0), 1}, tokens, nullptr, tokens, 1, count};
    Tensor scratch = empty_tensor(x, {sort_scratch(s)}, ScalarType::Int);
    sort_by_expert(s, {}, data<int64_t>(order), data<int32_t>(offsets), nullptr, data<int32_t>(scratch), stream);
    groups.offsets = data<int32_t>(offsets);
    index = data<int64_t>(order);
  }
};

Tensor merged(const Tensor& x, const Tensor& gates, const Tensor& w, const std::optional<Tensor>& b, const std::optional<Tensor>& group_ids,
              Stream stream) {
  const TokensByGroup by(x, gates, group_ids, stream);
  const Tensor layer = mixed(w, gates, false, x.scalar_type(), stream);
  const std::optional<Tensor> bias = b ? std::optional<Tensor>(mixed(*b, gates, false, ScalarType::Float, stream)) : std::nullopt;
  Tensor y = empty_tensor(x, {x.size(0), w.size(1)});
  GroupedGemm p = grouped_gemm_of(type_of("x", x), by.groups, w.size(1), w.size(2), rows_of("x", x, by.index), weights_of("w1", layer));
  p.b = table_of("b1", bias);
  p.y = target_of(y, by.index);
  grouped_gemm("soft_experts", p, stream);
  return y;
}

void merged_backward(const Tensor& dy, const Tensor& x, const Tensor& gates, const Tensor& w, const std::optional<Tensor>& b,
                     const std::optional<Tensor>& group_ids, const std::vector<bool>& needs, Tensor& dx, Tensor& dgates, Tensor& dw,
                     Tensor& db, Stream stream) {
  const TokensByGroup by(x, gates, group_ids, stream);
  const Type type = type_of("x", x);
  const int64_t groups = gates.size(0);
  if (needs[need::x]) {
    const Tensor layer = mixed(w, gates, false, x.scalar_type(), stream);
    GroupedGemm p =
        grouped_gemm_of(type, by.groups, w.size(2), w.size(1), rows_of("dy", dy, by.index), weights_of("w1", layer).transposed());
    p.y = target_of(dx, by.index);
    grouped_gemm("soft_experts_backward", p, stream);
  }
  const bool want_db = b && needs[need::b1], by_bias = b && (needs[need::gates] || needs[need::b1]);
  if (!needs[need::gates] && !needs[need::w1] && !want_db) return;
  // What a merged layer gets is shared out to its experts by their gates.
  Tensor dlayer = empty_tensor(x, {groups, w.size(1), w.size(2)}, ScalarType::Float),
         dbias = by_bias ? empty_tensor(x, {groups, w.size(1)}, ScalarType::Float) : empty_placeholder(x);
  Wgrad p = wgrad_of(type, by.groups, w.size(1), w.size(2), rows_of("dy", dy, by.index), rows_of("x", x, by.index));
  if (needs[need::gates] || needs[need::w1]) p.dw = gradient_of(dlayer);
  if (by_bias) p.db = gradient_of(dbias);
  wgrad("soft_experts_backward", p, stream);
  if (needs[need::gates]) {
    const Stack stack = stack_of("w1", w);
    Tensor scratch = empty_tensor(x, {std::max<int64_t>(dot_partials(stack), 1) * groups * w.size(0)}, ScalarType::Float);
    dots(stack, data<float>(dlayer), groups, false, data<float>(scratch), data<float>(dgates), stream);
    if (b) dots(stack_of("b1", *b), data<float>(dbias), groups, true, data<float>(scratch), data<float>(dgates), stream);
  }
  if (needs[need::w1]) dw = mixed(dlayer, gates, true, w.scalar_type(), stream);
  if (want_db) db = mixed(dbias, gates, true, b->scalar_type(), stream);
}

}  // namespace

std::tuple<Tensor, Tensor> soft_experts(Tensor x, Tensor gates, Tensor w1, std::optional<Tensor> b1, std::optional<Tensor> w2,
                                        std::optional<Tensor> b2, std::optional<Tensor> group_ids, OwnedString activation, bool save) {
  const Activation act = activation_of(activation);
  require(x, gates, w1, group_ids);
  const OnDevice on(x);
  if (merges(x, gates, w2)) return {merged(x, gates, w1, b1, group_ids, on.stream), empty_placeholder(x)};
  const int64_t tokens = x.size(0), experts = w1.size(0), outputs = w2 ? w2->size(1) : w1.size(1);
  const Gates g(gates, group_ids, tokens, on.stream);
  const Type type = type_of("x", x);
  const Groups groups{nullptr, tokens, experts};
  Tensor y = empty_tensor(x, {tokens, outputs}), u = save ? empty_tensor(x, {tokens, experts, w1.size(1)}) : empty_placeholder(x);
  const Tensor w1_rounded = rounded(w1, x), last = w2 ? rounded(*w2, x) : w1_rounded;
  Tensor weighted_hidden = empty_tensor(x, {tokens, experts, w2 ? w1.size(1) : w1.size(2)});
  if (w2) {
    GroupedGemm first = grouped_gemm_of(type, groups, w1.size(1), w1.size(2), rows_of("x", x), weights_of("w1", w1_rounded));
    first.b = table_of("b1", b1);
    first.activation = act;
    first.routing_weights = g.routing_weights;
    first.y = target_of(weighted_hidden);
    if (save) first.u = target_of(u);
    grouped_gemm("soft_experts", first, on.stream);
  } else {
    weighted_rows(type, rows_of("x", x), groups, g.routing_weights, x.size(1), weighted_hidden.mutable_data_ptr(), on.stream);
  }
  GroupedGemm second =
      grouped_gemm_of(type, groups, outputs, last.size(2), expert_rows_of("weighted_hidden", weighted_hidden), weights_of("w2", last));
  second.sum = true;
  second.b = table_of("b2", w2 ? b2 : b1);
  second.routing_weights = g.routing_weights;
  second.y = target_of(y);
  grouped_gemm("soft_experts", second, on.stream);
  return {y, u};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> soft_experts_backward(Tensor dy, Tensor x, Tensor gates, Tensor w1,
                                                                                 std::optional<Tensor> b1, std::optional<Tensor> w2,
                                                                                 std::optional<Tensor> b2, std::optional<Tensor> group_ids,
                                                                                 Tensor u, OwnedString activation,
                                                                                 std::vector<bool> needs) {
  const Activation act = activation_of(activation);
  require(x, gates, w1, group_ids);
  const OnDevice on(x);
  const int64_t tokens = x.size(0), experts = w1.size(0);
  const Gates g(gates, group_ids, tokens, on.stream);
  const Type type = type_of("x", x);
  const Groups groups{nullptr, tokens, experts};
  const Tensor w1_rounded = rounded(w1, x), last = w2 ? rounded(*w2, x) : w1_rounded;
  const std::optional<Tensor>& last_bias = w2 ? b2 : b1;
  const RowOperand dy_rows = rows_of("dy", dy), x_rows = rows_of("x", x);
  Tensor dx = gradient_like(x, needs[need::x], x), dgates = gradient_like(gates, needs[need::gates], x),
         dw1 = gradient_like(w1, needs[need::w1], x), db1 = gradient_like(b1, needs[need::b1], x),
         dw2 = gradient_like(w2, needs[need::w2], x), db2 = gradient_like(b2, needs[need::b2], x);
  if (merges(x, gates, w2)) {
    merged_backward(dy, x, gates, w1, b1, group_ids, needs, dx, dgates, dw1, db1, on.stream);
    return {dx, dgates, dw1, db1, dw2, db2};
  }
  Tensor &dw_last = w2 ? dw2 : dw1, &db_last = w2 ? db2 : db1;
  const bool want_dw_last = w2 ? needs[need::w2] : needs[need::w1], want_db_last = last_bias && (w2 ? needs[need::b2] : needs[need::b1]),
             want_db1 = w2 && b1 && needs[need::b1];
  const bool want_du = w2 && (needs[need::x] || needs[need::w1] || want_db1);

  DactGemm hidden = dact_gemm_of(type, groups, last.size(2), last.size(1), dy_rows, weights_of("w2", last).transposed());
  hidden.routing_weights = g.routing_weights;
  Tensor du = want_du ? empty_tensor(x, {tokens, experts, w1.size(1)}) : empty_placeholder(x),
         weighted_hidden = w2 && want_dw_last ? empty_tensor(x, {tokens, experts, w1.size(1)}) : empty_placeholder(x);
  if (w2) {
    if (!u.numel() && tokens) {  // the first layer again, by the kernels of the forward pass
      u = empty_tensor(x, {tokens, experts, w1.size(1)});
      GroupedGemm first = grouped_gemm_of(type, groups, w1.size(1), w1.size(2), x_rows, weights_of("w1", w1_rounded));
      first.b = table_of("b1", b1);
      first.activation = act;
      first.u = target_of(u);
      grouped_gemm("soft_experts_backward", first, on.stream);
    }
    hidden.activation = act;
    hidden.u = tokens ? expert_rows_of("u", u) : RowOperand{};
    if (want_du) hidden.du = target_of(du);
    if (want_dw_last) hidden.weighted_hidden = target_of(weighted_hidden);
  } else {
    hidden.u = x_rows;
  }
  Tensor partials =
      needs[need::gates] ? empty_tensor(x, {dact_partials(hidden), tokens, experts}, ScalarType::Float) : empty_placeholder(x);
  if (needs[need::gates]) hidden.partials = data<float>(partials);
  if (want_du || (w2 && want_dw_last) || needs[need::gates]) dact_gemm("soft_experts_backward", hidden, on.stream);
  if (needs[need::gates]) {
    const bool own = !group_ids && gates.size(0) == tokens;
    Tensor per_row = own ? dgates : empty_tensor(x, {tokens, experts}, ScalarType::Float);
    routing_weight_grad(hidden.partials, dact_partials(hidden), dy_rows, type, table_of("b2", last_bias), last.size(1), groups,
                        data<float>(per_row), on.stream);
    if (!own) {
      const std::optional<Tensor> ids = contiguous_or_null(group_ids);
      sum_per_group(data<float>(per_row), indices_of(ids), tokens, gates.size(0), experts, data<float>(dgates), on.stream);
    }
  }

  // Single linear experts: gate_e dy is what du is to two layers, and what their own weights multiply.
  Tensor weighted = empty_placeholder(x);
  if (!w2 && (needs[need::x] || want_dw_last)) {
    weighted = empty_tensor(x, {tokens, experts, last.size(1)});
    weighted_rows(type, dy_rows, groups, g.routing_weights, last.size(1), weighted.mutable_data_ptr(), on.stream);
  }
  if (needs[need::x]) {
    GroupedGemm back = grouped_gemm_of(type, groups, w1.size(2), w1.size(1), expert_rows_of("du", w2 ? du : weighted),
                                       weights_of("w1", w1_rounded).transposed());
    back.sum = true;
    back.y = target_of(dx);
    grouped_gemm("soft_experts_backward", back, on.stream);
  }
  if (w2 && (needs[need::w1] || want_db1)) {
    Wgrad w = wgrad_of(type, groups, w1.size(1), w1.size(2), expert_rows_of("du", du), x_rows);
    if (needs[need::w1]) w.dw = gradient_of(dw1);
    if (want_db1) w.db = gradient_of(db1);
    wgrad("soft_experts_backward", w, on.stream);
  }
  if (want_dw_last) {
    Wgrad w = wgrad_of(type, groups, last.size(1), last.size(2), w2 ? dy_rows : expert_rows_of("dy", weighted),
                       w2 ? expert_rows_of("weighted_hidden", weighted_hidden) : x_rows);
    w.dw = gradient_of(dw_last);
    if (w2 && want_db_last) w.db = gradient_of(db_last), w.routing_weights = g.routing_weights;
    wgrad("soft_experts_backward", w, on.stream);
  }
  if (want_db_last && (!w2 || !want_dw_last)) {  // from dy itself, not from what was rounded for the product
    Wgrad w = wgrad_of(type, groups, last.size(1), 1, dy_rows, dy_rows);
    w.db = gradient_of(db_last), w.routing_weights = g.routing_weights;
    wgrad("soft_experts_backward", w, on.stream);
  }
  return {dx, dgates, dw1, db1, dw2, db2};
}

CMOE_IMPLEMENT(CUDA, soft_experts)
CMOE_IMPLEMENT(CUDA, soft_experts_backward)

}  // namespace cmoe::cuda::bindings
