// Products of expert layers on the GPU: what bindings and other operations call. No torch, no CUDA; strides and sizes in elements.
//
//     grouped_gemm       y[r]  = epilogue(W_e x[r])                    rows of their expert, or every row in every expert
//     grouped_gemm, sum  y[r]  = epilogue(sum_e W_e x[r, e])           the sum over experts in the accumulator
//     dact_gemm    dh[r] = W_e^T dy[r], with du, the weighted hidden and the routing weights' gradient in its epilogue
//     wgrad    dW_e  = sum over the rows of e of p[r] q[r]^T, and db
//
// Rows lie in the order of their experts: offsets [experts + 1] on the device, rows past the last are of no expert and get zeros. Without
// offsets every expert has every row. Operands are read through an index (gathered rows never exist) and results stored through one.
#pragma once

#include <cstdint>

#include "../device/stream.h"
#include "../matrix.h"

namespace cmoe::cuda {

// Row r of a product reads row index[r] / divisor of the matrix (r / divisor where there is no index); an index outside 0..rows - 1 reads
// nothing, and the row counts as one of no expert.
struct RowOperand {
  const void* data = nullptr;
  Type type = Type::f32;
  int64_t row = 0, column = 0, expert = 0;  // strides; expert: 0 where all experts read the same
  const int64_t* index = nullptr;
  int64_t divisor = 1;
};

struct WeightOperand {
  const void* data = nullptr;
  Type type = Type::f32;
  int64_t expert = 0, output = 0, input = 0;  // strides

  WeightOperand transposed() const { return {data, type, expert, input, output}; }
};

// A table [experts, n], as biases are; absent without data.
struct Table {
  const void* data = nullptr;
  Type type = Type::f32;
  int64_t row = 0, column = 0;
};

// A number of each row: [rows], or [rows, experts] without offsets.
struct RoutingWeights {
  const float* data = nullptr;
  int64_t row = 0, expert = 0;
};

// Where results go: row r to index[r] (r where there is none), columns next to each other.
struct Target {
  void* data = nullptr;
  Type type = Type::f32;
  int64_t row = 0, expert = 0;
  const int64_t* index = nullptr;
};

// What rows a product has.
struct Groups {
  const int32_t* offsets = nullptr;
  int64_t rows = 0, experts = 0;
};

struct GroupedGemm {
  Type type = Type::f32;  // in which operands are multiplied
  Groups groups;
  int64_t width = 0, depth = 0;
  RowOperand x;
  WeightOperand w;
  bool sum = false;    // no offsets: experts are added, y and the routing weights' use are without them
  bool gated = false;  // w has 2 width outputs, gate rows and then up rows
  // Epilogue: v = W x + b (weigh_bias: + weight b; sum: + sum_e weight_e b_e); u gets it, rounded; v = act(v) (gated: act(gate)
  // up); v *= weight (not with weigh_bias or sum); y gets it.
  Table b;
  RoutingWeights routing_weights;
  bool weigh_bias = false;
  Activation activation = Activation::none;
  Target u, y;
};
void grouped_gemm(const char* operation, const GroupedGemm& p, Stream stream);

struct DactGemm {
  Type type = Type::f32;
  Groups groups;
  int64_t width = 0, depth = 0;  // hidden units, outputs
  RowOperand dy;
  WeightOperand w;  // [experts, width, depth] by strides: those of the layer, transposed
  // u [rows (, experts), width], gated: [.., 2 width]; with Activation::none it is x, read as a row operand.
  RowOperand u;
  bool gated = false;
  Activation activation = Activation::none;
  RoutingWeights routing_weights;
  Target du, weighted_hidden;  // weight dh f'(u), like u; weight f(u), [.., width]
  float* partials = nullptr;   // [dact_partials, rows (, experts)]: sums of dh f(u) over a part of the columns
};
void dact_gemm(const char* operation, const DactGemm& p, Stream stream);
// Partials per row, one for each part of the columns: their number depends on the sizes only.
int64_t dact_partials(const DactGemm& p);

struct Wgrad {
  Type type = Type::f32;
  Groups groups;
  int64_t height = 0, width = 0;  // of dW
  RowOperand p, q;
  Target dw;                       // [experts, height, width]; the row is its stride along height
  Target db;                       // [experts, height], sums of weight p
  RoutingWeights routing_weights;  // of db only
};
void wgrad(const char* operation, const Wgrad& p, Stream stream);

}  // namespace cmoe::cuda
