// Products of expert layers on the GPU: what bindings and other operations call. No torch, no CUDA; strides and sizes in elements.
//
//     row_product       y[r]  = epilogue(W_e x[r])                    rows of their expert, or every row in every expert
//     row_product, sum  y[r]  = epilogue(sum_e W_e x[r, e])           the sum over experts in the accumulator
//     hidden_product    dh[r] = W_e^T dy[r], and all that hangs on it: du, the weighted h, the weights' own gradient
//     weight_product    dW_e  = sum over the rows of e of p[r] q[r]^T, and db
//
// Rows lie in the order of their experts: offsets [experts + 1] on the device, rows past the last are of no expert and get zeros. Without
// offsets every expert has every row. Operands are read through an index (gathered rows never exist) and results stored through one.
#pragma once

#include <cstdint>

#include "activation.h"
#include "device/stream.h"
#include "matrix.h"

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
struct Scale {
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

struct RowProduct {
  Type type = Type::f32;  // in which operands are multiplied
  Groups groups;
  int64_t width = 0, depth = 0;
  RowOperand x;
  WeightOperand w;
  bool sum = false;    // no offsets: experts are added, y and the scale's use are without them
  bool gated = false;  // w has 2 width outputs, gate rows and then up rows
  // Epilogue: v = W x + b (scale_bias: + scale b; sum: + sum_e scale_e b_e); u gets it, rounded; v = act(v) (gated: act(gate) up); v *=
  // scale (not with scale_bias or sum); y gets it.
  Table b;
  const int64_t* bias_index =
      nullptr;  // the row of b for each row of the product, in place of its expert's; outside 0..bias_rows - 1: no bias
  int64_t bias_rows = 0;
  Scale scale;
  bool scale_bias = false;
  Activation activation = Activation::none;
  Target u, y;
};
void row_product(const char* operation, const RowProduct& p, Stream stream);

struct HiddenProduct {
  Type type = Type::f32;
  Groups groups;
  int64_t width = 0, depth = 0;  // hidden units, outputs
  RowOperand dy;
  WeightOperand w;  // [experts, width, depth] by strides: those of the layer, transposed
  // u [rows (, experts), width], gated: [.., 2 width]; with Activation::none it is x, read as a row operand.
  RowOperand u;
  bool gated = false;
  Activation activation = Activation::none;
  Scale scale;
  Target du, h;            // scale dh f'(u), like u; scale f(u), [.., width]
  float* parts = nullptr;  // [hidden_parts, rows (, experts)]: sums of dh f(u) over a part of the columns
};
void hidden_product(const char* operation, const HiddenProduct& p, Stream stream);
// How many parts the columns are cut into: it depends on the sizes alone.
int64_t hidden_parts(const HiddenProduct& p);

struct WeightProduct {
  Type type = Type::f32;
  Groups groups;
  int64_t height = 0, width = 0;  // of dW
  RowOperand p, q;
  Target dw;    // [experts, height, width]; the row is its stride along height
  Target db;    // [experts, height], sums of scale p
  Scale scale;  // of db alone
};
void weight_product(const char* operation, const WeightProduct& p, Stream stream);

}  // namespace cmoe::cuda
