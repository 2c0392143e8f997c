// grouped_linear on the GPU: one product, with gather on load, bias and activation in the epilogue, scatter on store. Backward reads dy
// where forward stored y; without an activation it is the operand of both products as it lies, else du [T k, O] is made once, in row order.
// A token's k rows of dx are stored side by side and added in their order.

#include "../registration.h"
#include "layers.h"

namespace cmoe::cuda::bindings {

namespace need {  // what the values of `needs` stand for
enum { x, w, b };
}

namespace {

// If the index is not a permutation, rows that it never writes must be zero.
Tensor rows_for(const Tensor& like, int64_t rows, int64_t width, bool indexed) {
  return indexed ? zeros(like, {rows, width}) : empty_tensor(like, {rows, width});
}

Tensor settled(const Tensor& x, const Tensor& offsets, int64_t experts, int64_t rows, Stream stream) {
  STD_TORCH_CHECK(offsets.scalar_type() == ScalarType::Int && offsets.dim() == 1 && offsets.size(0) == experts + 1,
                  "offsets must be int32 of shape (", experts + 1, ",), got shape ", shape(offsets));
  require_rows(rows);
  Tensor ends = empty_tensor(x, {experts + 1}, ScalarType::Int);
  settled_offsets(static_cast<const int32_t*>(offsets.const_data_ptr()), offsets.stride(0), experts, rows, data<int32_t>(ends), stream);
  return ends;
}

}  // namespace

std::tuple<Tensor, Tensor> grouped_linear(Tensor x, Tensor w, std::optional<Tensor> b, Tensor offsets, std::optional<Tensor> gather_idx,
                                          int64_t k, std::optional<Tensor> scatter_idx, std::optional<OwnedString> activation, bool save) {
  const Activation act = activation_of(activation);
  const OnDevice on(x);
  const int64_t rows = x.size(0) * k, experts = w.size(0);
  const Tensor ends = settled(x, offsets, experts, rows, on.stream);
  const std::optional<Tensor> gather = contiguous_or_null(gather_idx), scatter = contiguous_or_null(scatter_idx);
  Tensor y = rows_for(x, rows, w.size(1), scatter.has_value()), u = save ? empty_tensor(x, {rows, w.size(1)}) : empty_placeholder(x);
  const Tensor w_rounded = rounded(w, x);
  GroupedGemm p = grouped_gemm_of(type_of("x", x), {static_cast<const int32_t*>(ends.const_data_ptr()), rows, experts}, w.size(1),
                                  w.size(2), rows_of("x", x, indices_of(gather), k), weights_of("w", w_rounded));
  p.b = table_of("b", b);
  p.activation = act;
  p.y = target_of(y, indices_of(scatter));
  if (save) p.u = target_of(u);
  grouped_gemm("grouped_linear", p, on.stream);
  return {y, u};
}

std::tuple<Tensor, Tensor, Tensor> grouped_linear_backward(Tensor dy, Tensor x, Tensor w, std::optional<Tensor> b, Tensor offsets,
                                                           std::optional<Tensor> gather_idx, std::optional<Tensor> scatter_idx, Tensor u,
                                                           int64_t k, std::optional<OwnedString> activation, std::vector<bool> needs) {
  const Activation act = activation_of(activation);
  const OnDevice on(x);
  const int64_t rows = x.size(0) * k, experts = w.size(0);
  const Type type = type_of("x", x);
  const Tensor ends = settled(x, offsets, experts, rows, on.stream);
  const Groups groups{static_cast<const int32_t*>(ends.const_data_ptr()), rows, experts};
  const std::optional<Tensor> gather = contiguous_or_null(gather_idx), scatter = contiguous_or_null(scatter_idx);
  Tensor dx = gradient_like(x, needs[need::x], x), dw = gradient_like(w, needs[need::w], x), db = gradient_like(b, needs[need::b], x);
  RowOperand du = rows_of("dy", dy, indices_of(scatter));
  Tensor du_rows = empty_placeholder(x);
  if (act != Activation::none) {
    require_shape("u", u, rows, w.size(1), "y");
    du_rows = empty_tensor(x, {rows, w.size(1)});
    const Tensor pre = torch::stable::contiguous(u);
    activation_gradient(type, du, pre.const_data_ptr(), rows, w.size(1), act, du_rows.mutable_data_ptr(), on.stream);
    du = rows_of("du", du_rows);
  }
  if (needs[need::x]) {
    Tensor drows = k == 1 && !gather ? dx : rows_for(x, rows, x.size(1), gather.has_value());
    const Tensor w_rounded = rounded(w, x);
    GroupedGemm p = grouped_gemm_of(type, groups, w.size(2), w.size(1), du, weights_of("w", w_rounded).transposed());
    p.y = target_of(drows, indices_of(gather));
    grouped_gemm("grouped_linear_backward", p, on.stream);
    if (k != 1)
      sum_assignments(type, drows.const_data_ptr(), x.size(0), k, x.size(1), dx.mutable_data_ptr(), on.stream);
    else if (gather)
      dx = drows;
  }
  if (needs[need::w] || (b && needs[need::b])) {
    Wgrad p = wgrad_of(type, groups, w.size(1), w.size(2), du, rows_of("x", x, indices_of(gather), k));
    if (needs[need::w]) p.dw = gradient_of(dw);
    if (b && needs[need::b]) p.db = gradient_of(db);
    wgrad("grouped_linear_backward", p, on.stream);
  }
  return {dx, dw, db};
}

CMOE_IMPLEMENT(CUDA, grouped_linear)
CMOE_IMPLEMENT(CUDA, grouped_linear_backward)

}  // namespace cmoe::cuda::bindings
