// task_router on the GPU: its own product and the sums of its backward pass; what else it takes is in gemm/gemm.h.
#pragma once

#include "gemm/gemm.h"

namespace cmoe::cuda {

// u = W x + bias, h = act(u), and h times each expert's row of w2, summed over a part of the columns.
struct RouterProduct {
  Type type = Type::f32;
  int64_t rows = 0, width = 0, depth = 0;
  RowOperand x;
  WeightOperand w;
  Table b;  // [1, width]; or, of each row's group, biases [groups, width] in fp32:
  const float* biases = nullptr;
  const int64_t* group_ids = nullptr;  // [rows]; without them the rows have one bias
  int64_t groups = 0;
  Activation activation = Activation::none;
  Target u, h;  // [rows, width] before and after the activation; what has no place is not stored
  Table w2;     // [experts, width], experts <= most_fused
  int64_t experts = 0;
  float* partials = nullptr;  // [router_partials, rows, experts]
};
constexpr int64_t most_fused = 16;
void router_product(const char* operation, const RouterProduct& p, Stream stream);
// Partials per row, one for each part of the columns: their number depends on the sizes and on how operands lie.
int64_t router_partials(const RouterProduct& p);
// The same by sm_90a's instructions: whether they serve (gemm/sm90.h), and the partials that they leave, 0 where they do not.
bool router_product_sm90(const char* operation, const RouterProduct& p, Stream stream);
int64_t router_partials_sm90(const RouterProduct& p);

// The hidden layer's gradients, from dlogits [rows, experts] and u [rows, width] without gaps.
struct RouterGradient {
  Type type = Type::f32;
  int64_t rows = 0, width = 0, experts = 0;
  Matrix dlogits;
  Table w2;
  const void* u = nullptr;
  Activation activation = Activation::none;
  const int64_t* group_ids = nullptr;
  int64_t groups = 1;
};
// Into how many ranges the rows are cut; each leaves a part of the sums over rows.
int64_t router_ranges(int64_t rows);
// du = (dlogits W2) act'(u), [rows, width]; and its sums over the rows of each group, added to dbias [router_ranges, groups, width], unless
// null.
void router_hidden_gradient(const RouterGradient& g, void* du, float* dbias, Stream stream);
// dlogits^T act(u): partials [router_ranges, experts, width].
void router_weight_gradient(const RouterGradient& g, float* partials, Stream stream);

// out [n] = the sum of partials [count, n], in their order, and of b [columns], which is repeated, unless it is null.
void add_partials(const float* partials, int64_t count, int64_t n, const float* b, int64_t columns, void* out, Type out_type,
                  Stream stream);

}  // namespace cmoe::cuda
