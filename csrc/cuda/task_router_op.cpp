// task_router on the GPU: the task's part of the first layer once per task, then one product over the tokens whose epilogue is the rest,
// for up to 16 experts; beyond, the hidden layer is stored and multiplied by W2. Backward makes du [T, R] once, in the products' type, and
// its sums per task; dx and dW are products with it, and the task's gradients products with the sums. With one layer du is dlogits.

#include "../registration.h"
#include "layers.h"
#include "task_router.h"

namespace cmoe::cuda::bindings {

namespace need {  // what the values of `needs` stand for
enum { x, task, w1, b1, w2, b2 };
}

namespace {

const char* const forward_name = "task_router";
const char* const backward_name = "task_router_backward";

// The operands of a call; W's columns are the task's, then the tokens'.
struct Router {
  const std::optional<Tensor>&x, &task;
  const Tensor& w1;
  std::optional<Tensor> group_ids;
  Type type;
  int64_t split, hidden, rows;

  Router(const std::optional<Tensor>& x_, const std::optional<Tensor>& task_, const Tensor& w1_, const std::optional<Tensor>& ids)
      : x(x_), task(task_), w1(w1_), group_ids(contiguous_or_null(ids)), type(type_of(x_ ? "x" : "task", x_ ? *x_ : *task_)),
        split(task_ ? task_->size(1) : 0), hidden(w1_.size(0)), rows(input().size(0)) {
    require_rows(rows);
  }

  const Tensor& input() const { return x ? *x : *task; }
  bool both() const { return x && task; }
  int64_t groups() const { return task ? task->size(0) : 1; }
  WeightOperand task_columns() const { return {w1.const_data_ptr(), type_of("w1", w1), 0, w1.stride(0), w1.stride(1)}; }
  WeightOperand input_columns() const {
    WeightOperand w = task_columns();
    if (both()) w.data = static_cast<const char*>(w.data) + split * w1.stride(1) * static_cast<int64_t>(w1.element_size());
    return w;
  }

  RouterProduct product(const Tensor& over, const WeightOperand& w) const {
    RouterProduct p;
    p.type = type, p.rows = over.size(0), p.width = hidden, p.depth = over.size(1), p.x = rows_of("x", over), p.w = w;
    return p;
  }
  // b1, or the task's part with it: kept alive by `biases`.
  RouterProduct first_layer(const std::optional<Tensor>& b1, std::optional<Tensor>* biases, Stream stream) const {
    RouterProduct p = product(input(), input_columns());
    const Table b = b1 ? Table{b1->const_data_ptr(), type_of("b1", *b1), 0, b1->stride(0)} : Table{};
    if (!both()) {
      p.b = b;
      return p;
    }
    *biases = empty_tensor(*task, {groups(), hidden}, ScalarType::Float);
    RouterProduct per_task = product(*task, task_columns());
    per_task.b = b;
    per_task.h = target_of(**biases);
    router_product(forward_name, per_task, stream);
    p.biases = static_cast<const float*>((*biases)->const_data_ptr());
    p.group_ids = indices_of(group_ids);
    p.groups = groups();
    return p;
  }
};

Table rows_table(const char* name, const Tensor& w) { return {w.const_data_ptr(), type_of(name, w), w.stride(0), w.stride(1)}; }
const float* floats(const Tensor& t) { return static_cast<const float*>(t.const_data_ptr()); }
Target place(Tensor& t, int64_t column) {
  return {static_cast<char*>(t.mutable_data_ptr()) + column * static_cast<int64_t>(t.element_size()), type_of("a gradient", t),
          t.stride(0)};
}

}  // namespace

std::tuple<Tensor, Tensor> task_router(std::optional<Tensor> x, std::optional<Tensor> task, Tensor w1, std::optional<Tensor> b1,
                                       std::optional<Tensor> w2, std::optional<Tensor> b2, std::optional<Tensor> group_ids,
                                       OwnedString activation, bool save) {
  const Activation act = activation_of(activation);
  const Router router(x, task, w1, group_ids);
  const Tensor& input = router.input();
  const OnDevice on(input);
  std::optional<Tensor> biases;
  RouterProduct p = router.first_layer(b1, &biases, on.stream);
  if (!w2) {
    Tensor logits = empty_tensor(input, {router.rows, router.hidden}, ScalarType::Float);
    p.h = target_of(logits);
    router_product(forward_name, p, on.stream);
    return {logits, empty_placeholder(input)};
  }
  const int64_t experts = w2->size(0), rows = router.rows;
  Tensor logits = empty_tensor(input, {rows, experts}, ScalarType::Float),
         u = save ? empty_tensor(input, {rows, router.hidden}) : empty_placeholder(input);
  const std::optional<Tensor> exact =
      b2 ? std::optional<Tensor>(torch::stable::contiguous(torch::stable::to(*b2, ScalarType::Float))) : std::nullopt;
  p.activation = act;
  if (save) p.u = target_of(u);
  if (experts <= most_fused) {
    p.w2 = rows_table("w2", *w2);
    p.experts = experts;
    const int64_t count = router_partials(p);
    Tensor partials = empty_tensor(input, {count, rows, experts}, ScalarType::Float);
    p.partials = data<float>(partials);
    router_product(forward_name, p, on.stream);
    add_partials(floats(partials), count, rows * experts, exact ? floats(*exact) : nullptr, experts, logits.mutable_data_ptr(), Type::f32,
                 on.stream);
    return {logits, u};
  }
  Tensor h = empty_tensor(input, {rows, router.hidden});
  p.h = target_of(h);
  router_product(forward_name, p, on.stream);
  RouterProduct second = router.product(h, {w2->const_data_ptr(), type_of("w2", *w2), 0, w2->stride(0), w2->stride(1)});
  second.width = experts;
  if (exact) second.biases = floats(*exact), second.groups = 1;
  second.h = target_of(logits);
  router_product(forward_name, second, on.stream);
  return {logits, u};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> task_router_backward(Tensor dlogits, std::optional<Tensor> x,
                                                                                std::optional<Tensor> task, Tensor w1,
                                                                                std::optional<Tensor> b1, std::optional<Tensor> w2,
                                                                                std::optional<Tensor> b2, std::optional<Tensor> group_ids,
                                                                                Tensor u, OwnedString activation, std::vector<bool> needs) {
  const Activation act = activation_of(activation);
  const Router router(x, task, w1, group_ids);
  const Tensor& input = router.input();
  const OnDevice on(input);
  const int64_t rows = router.rows, hidden = router.hidden, groups = router.groups();
  const bool needs_b1 = b1 && needs[need::b1], needs_task = task && (needs[need::task] || needs[need::w1]);
  Tensor dx = gradient_like(x, needs[need::x], input), dtask = gradient_like(task, needs[need::task], input),
         dw1 = gradient_like(w1, needs[need::w1], input), db1 = empty_placeholder(input), dw2 = gradient_like(w2, needs[need::w2], input),
         db2 = empty_placeholder(input);
  const Tensor exact = torch::stable::contiguous(torch::stable::to(dlogits, ScalarType::Float));
  const auto column_sums = [&](const Tensor& table, int64_t count, int64_t columns, ScalarType dtype) {
    Tensor sums = empty_tensor(input, {columns}, ScalarType::Float);
    sum_per_group(floats(table), nullptr, count, 1, columns, data<float>(sums), on.stream);
    return torch::stable::to(sums, dtype);
  };

  // What follows from the hidden layer: du, and its sums per task.
  Tensor du = exact, dbias = empty_placeholder(input), saved = u;
  const bool summed = (router.both() && needs_task) || needs_b1;
  if (w2) {
    if (!u.numel()) {
      saved = empty_tensor(input, {rows, hidden});
      std::optional<Tensor> biases;
      RouterProduct p = router.first_layer(b1, &biases, on.stream);
      p.activation = act;
      p.u = target_of(saved);
      router_product(backward_name, p, on.stream);
    }
    RouterGradient g{router.type, rows,    hidden, w2->size(0), matrix("dlogits", exact), rows_table("w2", *w2), saved.const_data_ptr(),
                     act,         nullptr, 1};
    const int64_t ranges = router_ranges(rows);
    if (needs[need::w2]) {
      Tensor partials = empty_tensor(input, {ranges, g.experts, hidden}, ScalarType::Float);
      router_weight_gradient(g, data<float>(partials), on.stream);
      add_partials(floats(partials), ranges, g.experts * hidden, nullptr, 1, dw2.mutable_data_ptr(), type_of("w2", *w2), on.stream);
    }
    if (b2 && needs[need::b2]) db2 = column_sums(exact, rows, g.experts, b2->scalar_type());
    if (needs[need::x] || needs[need::task] || needs[need::w1] || needs[need::b1]) {
      du = empty_tensor(input, {rows, hidden});
      Tensor partials = empty_placeholder(input);
      if (router.both()) g.group_ids = indices_of(router.group_ids), g.groups = groups;
      if (summed) partials = torch::stable::new_zeros(input, {ranges, g.groups, hidden}, ScalarType::Float);
      router_hidden_gradient(g, du.mutable_data_ptr(), summed ? data<float>(partials) : nullptr, on.stream);
      if (summed) {
        dbias = empty_tensor(input, {g.groups, hidden}, ScalarType::Float);
        add_partials(floats(partials), ranges, g.groups * hidden, nullptr, 1, dbias.mutable_data_ptr(), Type::f32, on.stream);
      }
    }
  } else if (summed) {
    const int64_t own = router.both() ? groups : 1;
    dbias = empty_tensor(input, {own, hidden}, ScalarType::Float);
    sum_per_group(floats(exact), router.both() ? indices_of(router.group_ids) : nullptr, rows, own, hidden, data<float>(dbias), on.stream);
  }

  // d input = d W, into its gradient; dW = d^T input, into some columns of W's.
  const auto input_gradient = [&](const Tensor& d, const WeightOperand& w, Tensor& to) {
    GroupedGemm p = grouped_gemm_of(router.type, {nullptr, d.size(0), 1}, to.size(1), hidden, rows_of("d", d), w.transposed());
    p.y = target_of(to);
    grouped_gemm(backward_name, p, on.stream);
  };
  const auto weight_gradient = [&](const Tensor& d, const Tensor& of, int64_t column) {
    Wgrad p = wgrad_of(router.type, {nullptr, of.size(0), 1}, hidden, of.size(1), rows_of("d", d), rows_of("x", of));
    p.dw = place(dw1, column);
    wgrad(backward_name, p, on.stream);
  };
  if (x && needs[need::x]) input_gradient(du, router.input_columns(), dx);
  if (x && needs[need::w1]) weight_gradient(du, *x, router.split);
  if (task && needs[need::task]) input_gradient(router.both() ? dbias : du, router.task_columns(), dtask);
  if (task && needs[need::w1]) weight_gradient(router.both() ? dbias : du, *task, 0);
  if (needs_b1) db1 = column_sums(dbias, dbias.size(0), hidden, b1->scalar_type());
  return {dx, dtask, dw1, db1, dw2, db2};
}

CMOE_IMPLEMENT(CUDA, task_router)
CMOE_IMPLEMENT(CUDA, task_router_backward)

}  // namespace cmoe::cuda::bindings
