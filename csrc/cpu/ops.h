// The operations on the CPU, with the signatures that register.cpp binds: those of cmoe_kernels/ops/<op>/reference.py.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <tuple>

namespace cmoe::cpu {

using torch::stable::Tensor;

// A string argument, owned by the callee. torch's own conversion to std::string (2.10 to 2.13) leaks one string per call.
using OwnedString = StringHandle;

Tensor soft_gate(Tensor logits);
Tensor soft_gate_backward(Tensor dgates, Tensor logits);

std::tuple<Tensor, Tensor, Tensor> topk_gate(Tensor logits, int64_t k, OwnedString score, bool renormalize, double scale, std::optional<Tensor> selection);
Tensor topk_gate_backward(Tensor dweights, Tensor logits, Tensor indices, OwnedString score, bool renormalize, double scale);

}  // namespace cmoe::cpu
