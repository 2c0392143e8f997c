// Binds topk_gate.cu.

#include "topk_gate.h"

#include "../registration.h"
#include "tensors.h"

namespace cmoe::cuda::bindings {

namespace {

TopkGate operation(const Tensor& logits, int64_t k, OwnedString score_name, bool renormalize, double scale) {
  const std::string score = consume_string(score_name);
  STD_TORCH_CHECK(score == "softmax" || score == "sigmoid", "score is '", score, "', must be one of softmax, sigmoid");
  require_2d("logits", logits, "[T, E]");
  const Matrix l = matrix("logits", logits);
  return {l, l, logits.size(0), logits.size(1), k, score == "sigmoid", renormalize, static_cast<float>(scale)};
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> topk_gate(Tensor logits, int64_t k, OwnedString score, bool renormalize, double scale,
                                             std::optional<Tensor> selection) {
  TopkGate op = operation(logits, k, score, renormalize, scale);
  STD_TORCH_CHECK(k >= 1 && k <= op.experts, "k is ", k, ", must be in 1..", op.experts, " (the experts in logits)");
  if (selection) {
    require_shape("selection", *selection, op.tokens, op.experts, "logits");
    op.ranking = any_matrix("selection", *selection);
  }
  const OnDevice on(logits);
  Tensor weights = torch::stable::new_empty(logits, {op.tokens, k}, ScalarType::Float);
  Tensor indices = torch::stable::new_empty(logits, {op.tokens, k}, ScalarType::Long);
  Tensor counts = torch::stable::new_zeros(logits, {op.experts}, ScalarType::Int);
  cuda::topk_gate(op, data<float>(weights), data<int64_t>(indices), data<int32_t>(counts), on.stream);
  return {weights, indices, counts};
}

Tensor topk_gate_backward(Tensor dweights, Tensor logits, Tensor indices, OwnedString score, bool renormalize, double scale) {
  require_2d("indices", indices, "[T, K]");
  const TopkGate op = operation(logits, indices.size(1), score, renormalize, scale);
  require_shape("dweights", dweights, op.tokens, op.k, "indices");
  const OnDevice on(logits);
  const Tensor exact = torch::stable::to(dweights, ScalarType::Float);
  Tensor dlogits = torch::stable::new_empty(logits, {op.tokens, op.experts});
  cuda::topk_gate_backward(op, matrix("dweights", exact), index_matrix("indices", indices), dlogits.mutable_data_ptr(), on.stream);
  return dlogits;
}

CMOE_IMPLEMENT(CUDA, topk_gate)
CMOE_IMPLEMENT(CUDA, topk_gate_backward)

}  // namespace cmoe::cuda::bindings
