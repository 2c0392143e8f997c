// topk_gate on the GPU: what the binding calls.
#pragma once

#include "device/stream.h"
#include "matrix.h"

namespace cmoe::cuda {

struct TopkGate {
  Matrix logits;   // [T, E]
  Matrix ranking;  // [T, E], of any type: the selection, or the logits again
  int64_t tokens, experts, k;
  bool sigmoid, renormalize;  // softmax over all experts else
  float scale;
};

// weights [T, K] fp32, indices [T, K], counts [E].
void topk_gate(const TopkGate& op, float* weights, int64_t* indices, int32_t* counts, Stream stream);
// dlogits [T, E] in the type of the logits, from dweights [T, K] fp32 and the indices [T, K].
void topk_gate_backward(const TopkGate& op, const Matrix& dweights, const Indices& indices, void* dlogits, Stream stream);

}  // namespace cmoe::cuda
