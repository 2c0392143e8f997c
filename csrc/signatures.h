// The signature of every native operation, by name: the CPU's kernels, the GPU's and the emulated ones are bound to the same.
#pragma once

namespace cmoe {

struct Signature {
  const char* name;
  const char* arguments;
};

constexpr Signature signatures[] = {
    {"soft_gate", "(Tensor logits) -> Tensor"},
    {"soft_gate_backward", "(Tensor dgates, Tensor logits) -> Tensor"},
    {"topk_gate", "(Tensor logits, int k, str score, bool renormalize, float scale, Tensor? selection) -> (Tensor, Tensor, Tensor)"},
    {"topk_gate_backward", "(Tensor dweights, Tensor logits, Tensor indices, str score, bool renormalize, float scale) -> Tensor"},
    {"task_router",
     "(Tensor? x, Tensor? task, Tensor w1, Tensor? b1, Tensor? w2, Tensor? b2, Tensor? group_ids, str activation, bool save) -> (Tensor, "
     "Tensor)"},
    {"task_router_backward",
     "(Tensor dlogits, Tensor? x, Tensor? task, Tensor w1, Tensor? b1, Tensor? w2, Tensor? b2, Tensor? group_ids, Tensor u, str "
     "activation, "
     "bool[] needs) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"},
    {"grouped_linear",
     "(Tensor x, Tensor w, Tensor? b, Tensor offsets, Tensor? gather_idx, int k, Tensor? scatter_idx, str? activation, bool save) -> "
     "(Tensor, Tensor)"},
    {"grouped_linear_backward",
     "(Tensor dy, Tensor x, Tensor w, Tensor? b, Tensor offsets, Tensor? gather_idx, Tensor? scatter_idx, Tensor u, int k, str? "
     "activation, "
     "bool[] needs) -> (Tensor, Tensor, Tensor)"},
    {"soft_experts",
     "(Tensor x, Tensor gates, Tensor w1, Tensor? b1, Tensor? w2, Tensor? b2, Tensor? group_ids, str activation, bool save) -> (Tensor, "
     "Tensor)"},
    {"soft_experts_backward",
     "(Tensor dy, Tensor x, Tensor gates, Tensor w1, Tensor? b1, Tensor? w2, Tensor? b2, Tensor? group_ids, Tensor u, str activation, "
     "bool[] needs) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"},
    {"sparse_experts",
     "(Tensor x, Tensor? weights, Tensor indices, Tensor w1, Tensor? b1, Tensor? w2, Tensor? b2, Tensor? group_ids, str activation, bool "
     "gated, "
     "bool save) -> (Tensor, Tensor, Tensor, Tensor)"},
    {"sparse_experts_backward",
     "(Tensor dy, Tensor x, Tensor? weights, Tensor indices, Tensor w1, Tensor? b1, Tensor? w2, Tensor? b2, Tensor? group_ids, Tensor u, "
     "Tensor gather_idx, Tensor offsets, str activation, bool gated, bool[] needs) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"},
    {"balance_loss", "(Tensor scores, Tensor? indices, Tensor? mask, str kind, Tensor? segments, Tensor? counts, Tensor? total) -> Tensor"},
    {"balance_loss_backward",
     "(Tensor dloss, Tensor scores, Tensor? indices, Tensor? mask, str kind, Tensor? segments, Tensor? counts, Tensor? total) -> Tensor"},
    {"prepack", "(Tensor w, Tensor like) -> Tensor"},
    {"packed_router_bias", "(Tensor task, Tensor w1, Tensor? b1) -> Tensor"},
    {"packed_router", "(Tensor x, Tensor bias, Tensor w1, Tensor? w2, Tensor? b2, Tensor? group_ids, str activation) -> Tensor"},
    {"packed_soft_experts",
     "(Tensor x, Tensor gates, Tensor w1, Tensor? b1, Tensor? w2, Tensor? b2, Tensor? group_ids, str activation, int hidden, int outputs) "
     "-> Tensor"},
    {"packed_sparse_experts",
     "(Tensor x, Tensor? weights, Tensor indices, Tensor w1, Tensor? b1, Tensor? w2, Tensor? b2, Tensor? group_ids, str activation, "
     "int experts, int hidden, int outputs) -> Tensor"},
};

}  // namespace cmoe
