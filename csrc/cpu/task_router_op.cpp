// Binds task_router.cpp.

#include "task_router.h"

#include "../registration.h"
#include "tensors.h"

namespace cmoe::cpu::bindings {

using torch::stable::contiguous;

namespace need {  // what the values of `needs` stand for
enum { x, task, w1, b1, w2, b2 };
}

namespace {

template <class T>
struct RouterArguments : Router<T> {
  Tensor x_kept, task_kept, ids_kept, w1_kept, b1_kept, w2_kept, b2_kept;

  RouterArguments(const std::optional<Tensor>& x_, const std::optional<Tensor>& task_, const Tensor& w1_, const std::optional<Tensor>& b1_,
                  const std::optional<Tensor>& w2_, const std::optional<Tensor>& b2_, const std::optional<Tensor>& ids, Activation act)
      : Router<T>{} {
    const Tensor& rows = x_ ? *x_ : *task_;
    this->type = type_of("x", rows);
    if (x_) {
      x_kept = contiguous(*x_);
      this->x = bytes_of(x_kept);
      this->tokens = x_->size(0);
      this->inputs = x_->size(1);
    }
    if (task_) {
      task_kept = contiguous(torch::stable::to(*task_, rows.scalar_type()));
      this->task = bytes_of(task_kept);
      this->groups = task_->size(0);
      this->task_inputs = task_->size(1);
      if (ids) {
        ids_kept = contiguous(*ids);
        require_range("group_ids", ids_kept, this->groups, "rows of task");
        this->group_ids = static_cast<const int64_t*>(ids_kept.const_data_ptr());
      }
    }
    this->hidden = w1_.size(0);
    this->w1 = weight_of("w1", w1_, &w1_kept);
    this->w1_task = this->w1;
    this->w1.data += this->task_inputs * this->w1.input * size_of(this->w1.type);
    this->b1 = bias_of("b1", b1_, &b1_kept);
    this->experts = this->hidden;
    if (w2_) {
      this->experts = w2_->size(0);
      w2_kept = contiguous(*w2_);
      this->w2 = weight_of("w2", w2_kept, &w2_kept);
      this->w2.output = this->hidden;
      this->b2 = bias_of("b2", b2_, &b2_kept);
    }
    this->activation = act;
  }
};

}  // namespace

std::tuple<Tensor, Tensor> task_router(std::optional<Tensor> x, std::optional<Tensor> task, Tensor w1, std::optional<Tensor> b1,
                                       std::optional<Tensor> w2, std::optional<Tensor> b2, std::optional<Tensor> group_ids,
                                       OwnedString activation, bool save) {
  const Activation act = activation_of(activation);
  const Tensor& rows = x ? *x : *task;
  return computing(rows, [&](auto zero) {
    using T = decltype(zero);
    const RouterArguments<T> op(x, task, w1, b1, w2, b2, group_ids, act);
    const bool saves = save && w2;
    Tensor logits = empty_tensor(rows, {op.rows(), op.experts}, accumulate_dtype(rows.scalar_type()));
    Tensor u = saves ? empty_tensor(rows, {op.rows(), op.hidden}, rows.scalar_type()) : empty_placeholder(rows);
    cpu::task_router<T>(op, static_cast<T*>(logits.mutable_data_ptr()), saves ? bytes_of(u) : nullptr);
    return std::make_tuple(logits, u);
  });
}

// Gradients of weights are added to those that are given.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> task_router_backward_into(
    Tensor dlogits, std::optional<Tensor> x, std::optional<Tensor> task, Tensor w1, std::optional<Tensor> b1, std::optional<Tensor> w2,
    std::optional<Tensor> b2, std::optional<Tensor> group_ids, Tensor u, OwnedString activation, std::vector<bool> needs,
    std::optional<Tensor> into_w1, std::optional<Tensor> into_b1, std::optional<Tensor> into_w2, std::optional<Tensor> into_b2) {
  const Activation act = activation_of(activation);
  const Tensor& rows = x ? *x : *task;
  return computing(rows, [&](auto zero) {
    using T = decltype(zero);
    const RouterArguments<T> op(x, task, w1, b1, w2, b2, group_ids, act);
    const Tensor dl = contiguous(dlogits), u_kept = contiguous(u);
    Tensor dx = gradient_like(x, needs[need::x], rows), dtask = gradient_like(task, needs[need::task], rows),
           dw1 = gradient_like(w1, needs[need::w1] && !into_w1, rows), db1 = gradient_like(b1, needs[need::b1] && !into_b1, rows),
           dw2 = gradient_like(w2, needs[need::w2] && !into_w2, rows), db2 = gradient_like(b2, needs[need::b2] && !into_b2, rows);
    RouterGradients<T> grads{};
    grads.dlogits = static_cast<const T*>(dl.const_data_ptr());
    grads.u = u.numel() ? bytes_of(u_kept) : nullptr;
    grads.dx = x && needs[need::x] ? bytes_of(dx) : nullptr;
    grads.dtask = gradient_of(dtask, task, needs[need::task]);
    grads.dw1 = gradient_of(dw1, w1, needs[need::w1], into_w1);
    grads.db1 = gradient_of(db1, b1, needs[need::b1], into_b1);
    grads.dw2 = gradient_of(dw2, w2, needs[need::w2], into_w2);
    grads.db2 = gradient_of(db2, b2, needs[need::b2], into_b2);
    cpu::task_router_backward<T>(op, grads);
    return std::make_tuple(dx, dtask, dw1, db1, dw2, db2);
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> task_router_backward(Tensor dlogits, std::optional<Tensor> x,
                                                                                std::optional<Tensor> task, Tensor w1,
                                                                                std::optional<Tensor> b1, std::optional<Tensor> w2,
                                                                                std::optional<Tensor> b2, std::optional<Tensor> group_ids,
                                                                                Tensor u, OwnedString activation, std::vector<bool> needs) {
  return task_router_backward_into(dlogits, x, task, w1, b1, w2, b2, group_ids, u, activation, needs, std::nullopt, std::nullopt,
                                   std::nullopt, std::nullopt);
}

CMOE_IMPLEMENT(CPU, task_router)
CMOE_IMPLEMENT(CPU, task_router_backward)
CMOE_IMPLEMENT(CPU, task_router_backward_into)

}  // namespace cmoe::cpu::bindings
