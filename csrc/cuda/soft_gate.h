// soft_gate on the GPU: what the binding calls.
#pragma once

#include "device/stream.h"
#include "matrix.h"

namespace cmoe::cuda {

// gates [T, E] fp32 of logits [T, E].
void soft_gate(const Matrix& logits, float* gates, int64_t tokens, int64_t experts, Stream stream);
// dlogits [T, E], in the type of the logits; dgates is fp32.
void soft_gate_backward(const Matrix& dgates, const Matrix& logits, void* dlogits, int64_t tokens, int64_t experts, Stream stream);

}  // namespace cmoe::cuda
