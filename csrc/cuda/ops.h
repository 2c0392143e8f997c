// The operations on the GPU, with the signatures of ../signatures.h.
#pragma once

#include "../cpu/ops.h"

namespace cmoe::cuda {

using cpu::OwnedString;
using torch::stable::Tensor;

Tensor soft_gate(Tensor logits);
Tensor soft_gate_backward(Tensor dgates, Tensor logits);

std::tuple<Tensor, Tensor, Tensor> topk_gate(Tensor logits, int64_t k, OwnedString score, bool renormalize, double scale, std::optional<Tensor> selection);
Tensor topk_gate_backward(Tensor dweights, Tensor logits, Tensor indices, OwnedString score, bool renormalize, double scale);

Tensor balance_loss(Tensor scores, std::optional<Tensor> indices, std::optional<Tensor> mask, OwnedString kind, std::optional<Tensor> segments, std::optional<Tensor> counts,
                    std::optional<Tensor> total);
Tensor balance_loss_backward(Tensor dloss, Tensor scores, std::optional<Tensor> indices, std::optional<Tensor> mask, OwnedString kind, std::optional<Tensor> segments,
                             std::optional<Tensor> counts, std::optional<Tensor> total);

}  // namespace cmoe::cuda
