// Binds soft_gate.cu.

#include "soft_gate.h"

#include "../registration.h"
#include "tensors.h"

namespace cmoe::cuda::bindings {

Tensor soft_gate(Tensor logits) {
  require_2d("logits", logits, "[T, E]");
  const OnDevice on(logits);
  Tensor gates = torch::stable::new_empty(logits, {logits.size(0), logits.size(1)}, ScalarType::Float);
  cuda::soft_gate(matrix("logits", logits), data<float>(gates), logits.size(0), logits.size(1), on.stream);
  return gates;
}

Tensor soft_gate_backward(Tensor dgates, Tensor logits) {
  require_2d("logits", logits, "[T, E]");
  require_shape("dgates", dgates, logits.size(0), logits.size(1), "logits");
  const OnDevice on(logits);
  const Tensor exact = torch::stable::to(dgates, ScalarType::Float);
  Tensor dlogits = torch::stable::new_empty(logits, {logits.size(0), logits.size(1)});
  cuda::soft_gate_backward(matrix("dgates", exact), matrix("logits", logits), dlogits.mutable_data_ptr(), logits.size(0), logits.size(1),
                           on.stream);
  return dlogits;
}

CMOE_IMPLEMENT(CUDA, soft_gate)
CMOE_IMPLEMENT(CUDA, soft_gate_backward)

}  // namespace cmoe::cuda::bindings
