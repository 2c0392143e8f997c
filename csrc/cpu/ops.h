// The operations on the CPU, with the signatures that register.cpp binds: those of cmoe_kernels/ops/<op>/reference.py.
#pragma once

#include <tuple>

#include "../tensors.h"

namespace cmoe::cpu {

Tensor soft_gate(Tensor logits);
Tensor soft_gate_backward(Tensor dgates, Tensor logits);

std::tuple<Tensor, Tensor, Tensor> topk_gate(Tensor logits, int64_t k, OwnedString score, bool renormalize, double scale,
                                             std::optional<Tensor> selection);
Tensor topk_gate_backward(Tensor dweights, Tensor logits, Tensor indices, OwnedString score, bool renormalize, double scale);

std::tuple<Tensor, Tensor> task_router(std::optional<Tensor> x, std::optional<Tensor> task, Tensor w1, std::optional<Tensor> b1,
                                       std::optional<Tensor> w2, std::optional<Tensor> b2, std::optional<Tensor> group_ids,
                                       OwnedString activation, bool save);
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> task_router_backward(Tensor dlogits, std::optional<Tensor> x,
                                                                                std::optional<Tensor> task, Tensor w1,
                                                                                std::optional<Tensor> b1, std::optional<Tensor> w2,
                                                                                std::optional<Tensor> b2, std::optional<Tensor> group_ids,
                                                                                Tensor u, OwnedString activation, std::vector<bool> needs);

std::tuple<Tensor, Tensor> grouped_linear(Tensor x, Tensor w, std::optional<Tensor> b, Tensor offsets, std::optional<Tensor> gather_idx,
                                          int64_t k, std::optional<Tensor> scatter_idx, std::optional<OwnedString> activation, bool save);
std::tuple<Tensor, Tensor, Tensor> grouped_linear_backward(Tensor dy, Tensor x, Tensor w, std::optional<Tensor> b, Tensor offsets,
                                                           std::optional<Tensor> gather_idx, std::optional<Tensor> scatter_idx, Tensor u,
                                                           int64_t k, std::optional<OwnedString> activation, std::vector<bool> needs);

std::tuple<Tensor, Tensor> soft_experts(Tensor x, Tensor gates, Tensor w1, std::optional<Tensor> b1, std::optional<Tensor> w2,
                                        std::optional<Tensor> b2, std::optional<Tensor> group_ids, OwnedString activation, bool save);
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> soft_experts_backward(Tensor dy, Tensor x, Tensor gates, Tensor w1,
                                                                                 std::optional<Tensor> b1, std::optional<Tensor> w2,
                                                                                 std::optional<Tensor> b2, std::optional<Tensor> group_ids,
                                                                                 Tensor u, OwnedString activation, std::vector<bool> needs);

std::tuple<Tensor, Tensor, Tensor, Tensor> sparse_experts(Tensor x, std::optional<Tensor> weights, Tensor indices, Tensor w1,
                                                          std::optional<Tensor> b1, std::optional<Tensor> w2, std::optional<Tensor> b2,
                                                          std::optional<Tensor> group_ids, OwnedString activation, bool gated, bool save);
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> sparse_experts_backward(
    Tensor dy, Tensor x, std::optional<Tensor> weights, Tensor indices, Tensor w1, std::optional<Tensor> b1, std::optional<Tensor> w2,
    std::optional<Tensor> b2, std::optional<Tensor> group_ids, Tensor u, Tensor gather_idx, Tensor offsets, OwnedString activation,
    bool gated, std::vector<bool> needs);

Tensor balance_loss(Tensor scores, std::optional<Tensor> indices, std::optional<Tensor> mask, OwnedString kind,
                    std::optional<Tensor> segments, std::optional<Tensor> counts, std::optional<Tensor> total);
Tensor balance_loss_backward(Tensor dloss, Tensor scores, std::optional<Tensor> indices, std::optional<Tensor> mask, OwnedString kind,
                             std::optional<Tensor> segments, std::optional<Tensor> counts, std::optional<Tensor> total);

// packed_ops.cpp: weights packed once for inference.
Tensor prepack(Tensor w, Tensor like);
Tensor packed_router_bias(Tensor task, Tensor w1, std::optional<Tensor> b1);
Tensor packed_router(Tensor x, Tensor bias, Tensor w1, std::optional<Tensor> w2, std::optional<Tensor> b2, std::optional<Tensor> group_ids,
                     OwnedString activation);
Tensor packed_soft_experts(Tensor x, Tensor gates, Tensor w1, std::optional<Tensor> b1, std::optional<Tensor> w2, std::optional<Tensor> b2,
                           std::optional<Tensor> group_ids, OwnedString activation, int64_t hidden, int64_t outputs);
Tensor packed_sparse_experts(Tensor x, std::optional<Tensor> weights, Tensor indices, Tensor w1, std::optional<Tensor> b1,
                             std::optional<Tensor> w2, std::optional<Tensor> b2, std::optional<Tensor> group_ids, OwnedString activation,
                             int64_t experts, int64_t hidden, int64_t outputs);

}  // namespace cmoe::cpu
