// Weights packed once for inference, in the order in which the kernels read them, and the operations on them. Forward only.

#include "../registration.h"
#include "task_router.h"
#include "tensors.h"

namespace cmoe::cpu::bindings {

using torch::stable::contiguous;

namespace {

// Bytes of one expert's panels.
template <class T>
int64_t packed_bytes(const Kernels<T>& kernels, int64_t outputs, int64_t inputs) {
  const int64_t width = kernels.panel_width(kernels.gemm->weights);
  return (outputs + width - 1) / width * packed_panel_bytes(kernels, kernels.gemm->weights, inputs);
}

template <class T>
Weight packed_weight(const Kernels<T>& kernels, const Tensor& packed, int64_t outputs, int64_t inputs) {
  const int64_t bytes = packed_bytes(kernels, outputs, inputs);
  STD_TORCH_CHECK(bytes == 0 || packed.numel() % bytes == 0, "packed weights have ", packed.numel(), " bytes, must be a multiple of ",
                  bytes, " for ", outputs, " outputs and ", inputs, " inputs");
  return {bytes_of(packed), kernels.gemm->panel, 0, inputs, 1, bytes, packed_panel_bytes(kernels, kernels.gemm->weights, inputs)};
}

template <class T>
Experts<T> packed_experts(const Kernels<T>& kernels, const Tensor& x, const Tensor& w1, const std::optional<Tensor>& b1,
                          const std::optional<Tensor>& w2, const std::optional<Tensor>& b2, int64_t experts, int64_t hidden,
                          int64_t outputs, Activation activation, Tensor kept[2]) {
  Experts<T> op{kernels.type, x.size(0), x.size(1), w2 ? hidden : 0, outputs, experts, false, activation, bytes_of(x), {}, {}, {}, {}};
  op.w1 = packed_weight(kernels, w1, w2 ? hidden : outputs, op.inputs);
  op.b1 = bias_of("b1", b1, &kept[0]);
  if (w2) op.w2 = packed_weight(kernels, *w2, outputs, hidden);
  op.b2 = bias_of("b2", b2, &kept[1]);
  return op;
}

// No kernel converts between fp64 and the other dtypes.
void require_same_width(const char* name, const Tensor& w, const Tensor& x) {
  STD_TORCH_CHECK((w.scalar_type() == ScalarType::Double) == (x.scalar_type() == ScalarType::Double), name,
                  " must be float64 where products are, and only there");
}

}  // namespace

Tensor prepack(Tensor w, Tensor like) {
  require_same_width("w", w, like);
  return computing(like, [&](auto zero) {
    using T = decltype(zero);
    const Kernels<T> kernels = kernels_for<T>(type_of("like", like));
    const Side side = kernels.gemm->weights;
    const int64_t last = w.dim() - 1, experts = w.dim() == 3 ? w.size(0) : 1, outputs = w.size(last - 1), inputs = w.size(last),
                  threads = thread_count();
    const int64_t bytes = packed_bytes(kernels, outputs, inputs), width = kernels.panel_width(side),
                  panel_bytes = packed_panel_bytes(kernels, side, inputs);
    Tensor kept, packed = empty_tensor(w, {experts * bytes}, ScalarType::Byte);
    const Weight weight = weight_of("w", w, &kept);
    const std::vector<Chunk> chunks = chunks_of(*kernels.gemm, 1, inputs);
    const ThreadScratch scratch(threads, conversion_bytes(kernels));
    const int64_t panels = (outputs + width - 1) / width;
    char* const to = bytes_of(packed);
    parallel(threads, [&](int64_t thread) {
      const Share share(experts * panels, thread, threads);
      for (int64_t i = share.first; i < share.last; ++i) {
        const int64_t e = i / panels, panel = i % panels;
        for (const Chunk& chunk : chunks)
          pack_panels(kernels, side, weight.outputs(e), panel * width, std::min(width, outputs - panel * width), chunk.k0, chunk.k,
                      to + i * panel_bytes + chunk.k0 * width * kernels.element(), chunk.padded * width * kernels.element(),
                      scratch[thread]);
      }
    });
    return packed;
  });
}

Tensor packed_router_bias(Tensor task, Tensor w1, std::optional<Tensor> b1) {
  require_same_width("w1", w1, task);
  return computing(task, [&](auto zero) {
    using T = decltype(zero);
    const Tensor task_kept = contiguous(task);
    Tensor kept[2];
    Router<T> op{};
    op.type = type_of("task", task);
    op.task = bytes_of(task_kept);
    op.groups = task.size(0);
    op.task_inputs = task.size(1);
    op.hidden = w1.size(0);
    op.w1_task = weight_of("w1", w1, &kept[0]);
    op.b1 = bias_of("b1", b1, &kept[1]);
    Tensor bias = empty_tensor(task, {op.groups, op.hidden}, accumulate_dtype(task.scalar_type()));
    task_router_bias<T>(op, static_cast<T*>(bias.mutable_data_ptr()));
    return bias;
  });
}

Tensor packed_router(Tensor x, Tensor bias, Tensor w1, std::optional<Tensor> w2, std::optional<Tensor> b2, std::optional<Tensor> group_ids,
                     OwnedString activation) {
  const Activation act = activation_of(activation);
  return computing(x, [&](auto zero) {
    using T = decltype(zero);
    const Kernels<T> kernels = kernels_for<T>(type_of("x", x));
    const Tensor x_kept = contiguous(x), bias_kept = contiguous(bias);
    const std::optional<Tensor> ids = contiguous_or_null(group_ids);
    Tensor kept[2];
    Router<T> op{};
    op.type = kernels.type;
    op.tokens = x.size(0);
    op.inputs = x.size(1);
    op.groups = bias.size(0);
    op.hidden = bias.size(1);
    op.experts = w2 ? w2->size(0) : op.hidden;
    op.x = bytes_of(x_kept);
    op.bias_rows = static_cast<const T*>(bias_kept.const_data_ptr());
    if (ids) {
      require_range("group_ids", *ids, op.groups, "rows of the router's bias");
      op.group_ids = static_cast<const int64_t*>(ids->const_data_ptr());
    }
    op.w1 = packed_weight(kernels, w1, op.hidden, op.inputs);
    if (w2) {
      kept[0] = contiguous(*w2);
      op.w2 = {bytes_of(kept[0]), type_of("w2", *w2), 0, op.hidden, 1};
      op.b2 = bias_of("b2", b2, &kept[1]);
    }
    op.activation = act;
    Tensor logits = empty_tensor(x, {op.tokens, op.experts}, accumulate_dtype(x.scalar_type()));
    cpu::task_router<T>(op, static_cast<T*>(logits.mutable_data_ptr()), nullptr);
    return logits;
  });
}

Tensor packed_soft_experts(Tensor x, Tensor gates, Tensor w1, std::optional<Tensor> b1, std::optional<Tensor> w2, std::optional<Tensor> b2,
                           std::optional<Tensor> group_ids, OwnedString activation, int64_t hidden, int64_t outputs) {
  const Activation act = activation_of(activation);
  return computing(x, [&](auto zero) {
    using T = decltype(zero);
    const Kernels<T> kernels = kernels_for<T>(type_of("x", x));
    const Tensor x_kept = contiguous(x), table = contiguous(gates);
    const std::optional<Tensor> ids = contiguous_or_null(group_ids);
    Tensor kept[2];
    const Experts<T> op = packed_experts(kernels, x_kept, w1, b1, w2, b2, table.size(1), hidden, outputs, act, kept);
    Tensor y = empty_tensor(x, {op.tokens, op.outputs}, x.scalar_type());
    cpu::soft_experts<T>(op, gates_of<T>(table, ids, "rows of gates"), bytes_of(y), nullptr);
    return y;
  });
}

Tensor packed_sparse_experts(Tensor x, std::optional<Tensor> weights, Tensor indices, Tensor w1, std::optional<Tensor> b1,
                             std::optional<Tensor> w2, std::optional<Tensor> b2, std::optional<Tensor> group_ids, OwnedString activation,
                             int64_t experts, int64_t hidden, int64_t outputs) {
  const Activation act = activation_of(activation);
  return computing(x, [&](auto zero) {
    using T = decltype(zero);
    const Kernels<T> kernels = kernels_for<T>(type_of("x", x));
    const Tensor x_kept = contiguous(x);
    Tensor kept[2];
    const Experts<T> op = packed_experts(kernels, x_kept, w1, b1, w2, b2, experts, hidden, outputs, act, kept);
    const Sorted<T> rows(x, weights, indices, group_ids, op.tokens, op.experts);
    Tensor y = empty_tensor(x, {op.tokens, op.outputs}, x.scalar_type());
    cpu::sparse_experts<T>(op, rows.assignments(), rows.weights(), bytes_of(y), nullptr);
    return y;
  });
}

CMOE_IMPLEMENT(CPU, prepack)
CMOE_IMPLEMENT(CPU, packed_router_bias)
CMOE_IMPLEMENT(CPU, packed_router)
CMOE_IMPLEMENT(CPU, packed_soft_experts)
CMOE_IMPLEMENT(CPU, packed_sparse_experts)

}  // namespace cmoe::cpu::bindings
