// Binds balance_loss.cu. Labels of segments are sorted by torch.

#include "balance_loss.h"

#include <array>

#include "../registration.h"
#include "tensors.h"

namespace cmoe::cuda::bindings {

namespace {

// torch.sort(labels, stable=True)
std::pair<Tensor, Tensor> sorted(const Tensor& labels) {
  std::array<StableIValue, 4> stack{torch::stable::detail::from(labels), torch::stable::detail::from(std::optional<bool>(true)),
                                    torch::stable::detail::from(int64_t{0}), torch::stable::detail::from(false)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::sort", "stable", stack.data(), TORCH_ABI_VERSION));
  return {torch::stable::detail::to<Tensor>(stack[0]), torch::stable::detail::to<Tensor>(stack[1])};
}

// What the launchers take, and the tensors that it points into.
struct Call {
  BalanceLoss op;
  std::optional<Tensor> mask, labels, order, counts, total;
  Tensor scratch;

  Call(const Tensor& scores, const std::optional<Tensor>& indices, const std::optional<Tensor>& mask_, OwnedString kind_name,
       const std::optional<Tensor>& segments, const std::optional<Tensor>& counts_, const std::optional<Tensor>& total_) {
    const std::string kind = consume_string(kind_name);
    STD_TORCH_CHECK(kind == "switch" || kind == "importance" || kind == "z", "kind is '", kind, "', must be one of switch, importance, z");
    require_2d("scores", scores, "[T, E]");
    op.scores = matrix("scores", scores);
    op.tokens = scores.size(0);
    op.experts = scores.size(1);
    op.kind = kind == "switch" ? BalanceLoss::Kind::switch_ : kind == "importance" ? BalanceLoss::Kind::importance : BalanceLoss::Kind::z;
    if (indices) {
      op.indices = index_matrix("indices", *indices);
      op.k = indices->size(1);
    }
    STD_TORCH_CHECK(kind != "switch" || indices || counts_, "kind='switch' needs either indices or counts");
    if (mask_) op.mask = pointer<bool>(mask = torch::stable::contiguous(*mask_));
    if (counts_) op.counts = pointer<float>(counts = torch::stable::contiguous(torch::stable::to(*counts_, ScalarType::Float)));
    if (total_) op.total = pointer<float>(total = torch::stable::to(*total_, ScalarType::Float));
    if (segments && op.tokens) {
      std::tie(labels, order) = sorted(*segments);
      op.labels = pointer<int64_t>(labels);
      op.order = pointer<int64_t>(order);
    }
    scratch = torch::stable::new_empty(scores, {balance_loss_scratch(op)}, ScalarType::Float);
  }

 private:
  template <class T>
  static const T* pointer(const std::optional<Tensor>& t) {
    return static_cast<const T*>(t->const_data_ptr());
  }
};

}  // namespace

Tensor balance_loss(Tensor scores, std::optional<Tensor> indices, std::optional<Tensor> mask, OwnedString kind,
                    std::optional<Tensor> segments, std::optional<Tensor> counts, std::optional<Tensor> total) {
  const OnDevice on(scores);
  Call call(scores, indices, mask, kind, segments, counts, total);
  Tensor loss =
      call.op.tokens ? torch::stable::new_empty(scores, {}, ScalarType::Float) : torch::stable::new_zeros(scores, {}, ScalarType::Float);
  if (call.op.tokens) cuda::balance_loss(call.op, data<float>(loss), data<float>(call.scratch), on.stream);
  return loss;
}

Tensor balance_loss_backward(Tensor dloss, Tensor scores, std::optional<Tensor> indices, std::optional<Tensor> mask, OwnedString kind,
                             std::optional<Tensor> segments, std::optional<Tensor> counts, std::optional<Tensor> total) {
  const OnDevice on(scores);
  Call call(scores, indices, mask, kind, segments, counts, total);
  const Tensor exact = torch::stable::to(dloss, ScalarType::Float);
  Tensor dscores = torch::stable::new_empty(scores, {call.op.tokens, call.op.experts});
  if (call.op.tokens)
    cuda::balance_loss_backward(call.op, static_cast<const float*>(exact.const_data_ptr()), dscores.mutable_data_ptr(),
                                data<float>(call.scratch), on.stream);
  return dscores;
}

CMOE_IMPLEMENT(CUDA, balance_loss)
CMOE_IMPLEMENT(CUDA, balance_loss_backward)

}  // namespace cmoe::cuda::bindings
