// int8_experts and int8_router of ops/int8: the bindings. Weights are panels [experts, panels, k / 4, lanes, 4] (ops/int8/quantise.py).

#include "../registration.h"
#include "int8_layers.h"
#include "tensors.h"

namespace cmoe::cpu::bindings {

using torch::stable::contiguous;

namespace {

const float* floats(const char* name, const std::optional<Tensor>& t, int64_t rows, int64_t columns, Tensor* kept) {
  if (!t) return nullptr;
  STD_TORCH_CHECK(t->scalar_type() == ScalarType::Float && t->dim() == 2 && t->size(0) == rows && t->size(1) == columns, name,
                  " has shape ", shape(*t), ", must be float32 (", rows, ", ", columns, ")");
  *kept = contiguous(*t);
  return static_cast<const float*>(kept->const_data_ptr());
}

// parts: of the outputs, each of which begins a panel.
Int8Weight int8_weight(const char* name, const Tensor& w, const Tensor& scale, const std::optional<Tensor>& b, int64_t inputs,
                       int64_t parts, Tensor kept[3]) {
  const Int8Layout layout = int8_layout();
  STD_TORCH_CHECK(w.scalar_type() == ScalarType::Char && w.dim() == 5 && w.size(3) == layout.lanes && w.size(4) == layout.step, name,
                  " has shape ", shape(w), ", must be int8 panels [E, panels, k / ", layout.step, ", ", layout.lanes, ", ", layout.step,
                  "] of this instruction set");
  STD_TORCH_CHECK(scale.dim() == 2 && scale.size(1) % parts == 0, name, "'s scale has shape ", shape(scale), ", must be [E, outputs]");
  const int64_t experts = w.size(0), outputs = scale.size(1), panels = parts * ((outputs / parts + layout.lanes - 1) / layout.lanes),
                steps = round_up(inputs, layout.depth) / layout.step;
  STD_TORCH_CHECK(w.size(1) == panels && w.size(2) == steps, name, " has shape ", shape(w), ", must have ", panels, " panels of ", steps,
                  " for ", outputs, " outputs and ", inputs, " inputs");
  kept[0] = contiguous(w);
  const int64_t panel_bytes = steps * layout.step * layout.lanes;
  return {bytes_of(kept[0]),
          panel_bytes,
          panels * panel_bytes,
          floats("scale", scale, experts, outputs, &kept[1]),
          floats("bias", b, experts, outputs, &kept[2]),
          outputs,
          inputs};
}

int64_t allowed(int64_t float_rows, int64_t rows) {
  STD_TORCH_CHECK(has_int8_products() || float_rows >= rows, "float_rows is ", float_rows, ", must be at least ", rows,
                  ": the instruction set ", isa_name(), " has no int8 products");
  return float_rows;
}

template <class F>
Tensor with_int8(const Tensor& x, F&& f) {
  STD_TORCH_CHECK(x.scalar_type() != ScalarType::Double, "x is float64; int8 weights take float32, bfloat16 or float16");
  return computing(x, [&](auto zero) {
    if constexpr (sizeof(zero) == 4) return f();
    return Tensor();
  });
}

}  // namespace

Tensor int8_experts(Tensor x, std::optional<Tensor> weights, std::optional<Tensor> indices, Tensor w1, Tensor scale1,
                    std::optional<Tensor> b1, std::optional<Tensor> w2, std::optional<Tensor> scale2, std::optional<Tensor> b2,
                    std::optional<Tensor> group_ids, OwnedString activation, bool gated, int64_t float_rows) {
  const Activation act = activation_of(activation);
  STD_TORCH_CHECK(w2.has_value() == scale2.has_value() && (w2 || !gated), "w2 and scale2 come together, and a gated layer has them");
  STD_TORCH_CHECK(weights || indices, "weights and indices are missing; one of them must be given");
  return with_int8(x, [&] {
    const Tensor x_kept = contiguous(x);
    Tensor kept[2][3];
    Int8Experts op{type_of("x", x), x.size(0), x.size(1), 0, scale1.size(1), w1.size(0), gated, act, bytes_of(x_kept), {}, {}, 0};
    op.float_rows = allowed(float_rows, op.tokens * (indices ? indices->size(1) : 1));
    op.w1 = int8_weight("w1", w1, scale1, b1, op.inputs, gated ? 2 : 1, kept[0]);
    if (w2) {
      op.hidden = gated ? op.outputs / 2 : op.outputs;
      op.outputs = scale2->size(1);
      STD_TORCH_CHECK(w2->size(0) == op.experts, "w2 has ", w2->size(0), " experts, must have ", op.experts, " like w1");
      op.w2 = int8_weight("w2", *w2, *scale2, b2, op.hidden, 1, kept[1]);
    }
    Tensor y = empty_tensor(x, {op.tokens, op.outputs}, x.scalar_type());
    if (!indices) {
      const Tensor table = contiguous(*weights);
      const std::optional<Tensor> ids = contiguous_or_null(group_ids);
      STD_TORCH_CHECK(table.dim() == 2 && table.size(1) == op.experts, "weights has shape ", shape(table), ", must be [.., ", op.experts,
                      "]");
      STD_TORCH_CHECK(ids || table.size(0) == 1 || table.size(0) == op.tokens, "weights has ", table.size(0), " rows, must have 1 or ",
                      op.tokens);
      const Gates<float> gates = gates_of<float>(table, ids, "rows of weights");
      cpu::int8_experts(op, {&gates, {}, nullptr}, bytes_of(y));
      return y;
    }
    const Sorted<float> rows(x, weights, *indices, group_ids, op.tokens, op.experts);
    cpu::int8_experts(op, {nullptr, rows.assignments(), rows.weights()}, bytes_of(y));
    return y;
  });
}

Tensor int8_router(Tensor x, Tensor w1, Tensor scale1, Tensor bias, Tensor w2, std::optional<Tensor> b2, std::optional<Tensor> group_ids,
                   OwnedString activation, int64_t float_rows) {
  const Activation act = activation_of(activation);
  return with_int8(x, [&] {
    const Tensor x_kept = contiguous(x);
    const std::optional<Tensor> ids = contiguous_or_null(group_ids);
    Tensor kept[3], others[3];
    Int8Router op{
        type_of("x", x), x.size(0), x.size(1), scale1.size(1), w2.size(0), bytes_of(x_kept), {}, nullptr, nullptr, {}, {}, act, 0};
    op.float_rows = allowed(float_rows, op.tokens);
    STD_TORCH_CHECK(w1.size(0) == 1, "w1 has ", w1.size(0), " experts, must have 1");
    op.w1 = int8_weight("w1", w1, scale1, std::nullopt, op.inputs, 1, kept);
    op.bias = floats("bias", bias, bias.size(0), op.hidden, &others[0]);
    if (ids) {
      require_range("group_ids", *ids, bias.size(0), "rows of the router's bias");
      op.group_ids = static_cast<const int64_t*>(ids->const_data_ptr());
    }
    others[1] = contiguous(w2);
    STD_TORCH_CHECK(w2.scalar_type() != ScalarType::Double && !(b2 && b2->scalar_type() == ScalarType::Double),
                    "w2 and b2 must not be float64");
    STD_TORCH_CHECK(!b2 || b2->numel() == op.experts, "b2 has ", b2 ? b2->numel() : 0, " values, must have ", op.experts);
    STD_TORCH_CHECK(w2.dim() == 2 && w2.size(1) == op.hidden, "w2 has shape ", shape(w2), ", must be [E, ", op.hidden, "]");
    op.w2 = {bytes_of(others[1]), type_of("w2", w2), 0, op.hidden, 1};
    op.b2 = bias_of("b2", b2, &others[2]);
    Tensor logits = empty_tensor(x, {op.tokens, op.experts}, ScalarType::Float);
    cpu::int8_router(op, static_cast<float*>(logits.mutable_data_ptr()));
    return logits;
  });
}

CMOE_IMPLEMENT(CPU, int8_experts)
CMOE_IMPLEMENT(CPU, int8_router)

}  // namespace cmoe::cpu::bindings
