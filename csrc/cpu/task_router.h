// task_router on the CPU: arguments of the drivers in task_router.cpp.
#pragma once

#include "experts.h"

namespace cmoe::cpu {

template <class T>
struct Router {
  Type type;                                                     // of the rows
  int64_t tokens, inputs, groups, task_inputs, hidden, experts;  // inputs 0: no x; task_inputs 0: no task; hidden: R
  const char *x, *task;
  const int64_t* group_ids;
  Weight w1_task, w1;  // the columns of w1 that see the task, and those that see x; each [1, R, columns]
  Bias b1;
  Weight w2;  // empty: one layer, and R is the number of experts
  Bias b2;
  Activation activation;
  const T* bias_rows = nullptr;  // [groups or 1, R]: the first layer's bias with the tasks' part, where it was computed before

  int64_t rows() const { return inputs ? tokens : groups; }
  int64_t group(int64_t token) const { return group_ids ? group_ids[token] : 0; }
};

// logits [rows, experts]; u [rows, R] is written where given.
template <class T>
void task_router(const Router<T>& op, T* logits, char* u);

// The first layer's bias, b1 and the product with each task: [groups, R], or [1, R] without tasks.
template <class T>
void task_router_bias(const Router<T>& op, T* bias);

template <class T>
struct RouterGradients {
  const T* dlogits;
  const char* u;                       // null: computed again
  char* dx;                            // wanted where given, as all of the following
  Gradient dtask, dw1, db1, dw2, db2;  // dw1 [R, task inputs + inputs]
};
template <class T>
void task_router_backward(const Router<T>& op, const RouterGradients<T>& grads);

}  // namespace cmoe::cpu
