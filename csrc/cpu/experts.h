// What the drivers of expert layers share: views of weights and biases, gates, and the parts of a step that several drivers take.
#pragma once

#include "gemm/grouped_gemm.h"

namespace cmoe::cpu {

// Weights [experts, outputs, inputs]; either outputs or inputs lie next to each other.
struct Weight {
  const char* data = nullptr;
  Type type = Type::f32;
  int64_t expert = 0, output = 0, input = 0;  // strides, in elements
  int64_t packed_expert = 0;                  // bytes from expert to expert, of weights that were packed before
  int64_t packed_panel = 0;                   // and from panel to panel

  explicit operator bool() const { return data != nullptr; }
  bool along_inputs() const { return input == 1; }
  Matrix matrix(int64_t e) const { return {data + e * expert * size_of(type), (along_inputs() ? output : input) * size_of(type), type}; }
  // Lanes are outputs: y = x W^T.
  Operand outputs(int64_t e) const { return {matrix(e), along_inputs(), packed_expert ? data + e * packed_expert : nullptr, packed_panel}; }
  // Lanes are inputs: dx = dy W.
  Operand inputs(int64_t e) const { return {matrix(e), !along_inputs()}; }
};

// Biases [experts, n], or none.
struct Bias {
  const char* data = nullptr;
  Type type = Type::f32;
  int64_t n = 0;

  explicit operator bool() const { return data != nullptr; }
  template <class T>
  void load(const Kernels<T>& kernels, int64_t e, int64_t first, int64_t count, T* to) const {
    if (data)
      kernels.rows->load(type, data + (e * n + first) * size_of(type), to, count);
    else
      std::fill(to, to + count, T(0));
  }
};

// The kernels of a forward pass: dot products where tokens are few and every weight lies along its inputs, as it is stored.
template <class T>
Kernels<T> forward_kernels(Type type, int64_t tokens, const Weight& first, const Weight& last) {
  const bool few = tokens <= small_m(type) && first.along_inputs() && last.along_inputs() && !first.packed_expert;
  return few ? kernels_for_small_m<T>(type) : kernels_for<T>(type);
}

// A gradient [experts, rows, columns], contiguous; or not wanted. add: to what is there, in T, rounded once.
struct Gradient {
  char* data = nullptr;
  Type type = Type::f32;
  bool add = false;

  explicit operator bool() const { return data != nullptr; }
  template <class T>
  void store(const Kernels<T>& kernels, int64_t at, const T* from, int64_t n) const {
    if (!add) return kernels.rows->store(type, from, data + at * size_of(type), n);
    T sums[256];
    for (int64_t i = 0; i < n; i += 256) {
      char* const to = data + (at + i) * size_of(type);
      const int64_t count = std::min<int64_t>(256, n - i);
      kernels.rows->load(type, to, sums, count);
      kernels.rows->add(from + i, sums, count);
      kernels.rows->store(type, sums, to, count);
    }
  }
};

// Gates of all experts: one row per token, one row for all, or one per group.
template <class T>
struct Gates {
  const T* data;
  int64_t rows, experts;
  const int64_t* group_ids;

  int64_t row(int64_t token) const { return group_ids ? group_ids[token] : rows == 1 ? 0 : token; }
  T operator()(int64_t token, int64_t e) const { return data[row(token) * experts + e]; }
};

// The layers of all experts, and the tokens they work on.
template <class T>
struct Experts {
  Type type;                                         // of x, y and what is saved
  int64_t tokens, inputs, hidden, outputs, experts;  // hidden: 0 for single linear layers; not doubled where gated
  bool gated;
  Activation activation;
  const char* x;
  Weight w1, w2;  // w2 empty: w1 maps inputs to outputs
  Bias b1, b2;

  const Weight& last() const { return w2 ? w2 : w1; }
  const Bias& last_bias() const { return w2 ? b2 : b1; }
  int64_t last_inputs() const { return w2 ? hidden : inputs; }
  int64_t first_outputs() const { return gated ? 2 * hidden : hidden; }
};

// Rows of x in the order of the experts they go to.
struct Assignments {
  const int32_t* offsets;  // [experts + 1]
  const int64_t* index;    // row i is of token index[i] / divisor
  int64_t divisor;
};

// soft_experts.cpp: y [tokens, outputs]; u [tokens, experts, hidden] is written where given.
template <class T>
void soft_experts(const Experts<T>& op, const Gates<T>& gates, char* y, char* u);

// sparse_experts.cpp: routing_weights [rows] in the order of the experts, or null for ones; u [rows, first outputs] is written where given.
template <class T>
void sparse_experts(const Experts<T>& op, const Assignments& rows, const T* routing_weights, char* y, char* u);

// experts_backward.cpp, for all of them. Row i of expert e reads x at index[offsets[e] + i] / divisor, or at i where there is no index,
// and dy likewise by an index of its own.
template <class T>
struct ExpertsBackward {
  const int32_t* offsets;  // null: every expert has every token
  const int64_t *index, *dy_index;
  int64_t divisor, dy_divisor;
  const T* routing_weights;  // [rows] in the order of the experts, or null for ones
  const char *dy, *u;        // u null: computed again
  int64_t u_expert, u_row;   // elements from expert to expert (with no offsets), and from row to row
  char* dx;                  // wanted where given, as all of the following
  T* routing_weight_grad;    // [rows]
  Gradient dw1, db1, dw2, db2;
};
template <class T>
void experts_backward(const Experts<T>& op, const ExpertsBackward<T>& grads);

template <class T>
Matrix rows_of(const void* data, Type type, int64_t columns, const int64_t* index = nullptr, int64_t divisor = 1) {
  return {data, columns * size_of(type), type, index, divisor};
}

// A row of sums of the first layer becomes pre-activations, as they are saved.
template <class T>
void pre_activation(const Kernels<T>& kernels, T* row, const T* bias, int64_t n) {
  kernels.rows->add(bias, row, n);
  kernels.rows->round(kernels.type, row, n);
}

}  // namespace cmoe::cpu
