// Experts and router on int8 weights: arguments of the drivers in int8_layers.cpp. Forward only.
#pragma once

#include "experts.h"

namespace cmoe::cpu {

// Weights [experts, outputs, inputs] in panels, with a scale and perhaps a bias per output.
struct Int8Weight {
  const char* panels = nullptr;
  int64_t panel_bytes = 0, expert_bytes = 0;
  const float *scale = nullptr, *bias = nullptr;  // [experts, outputs]; no bias: null
  int64_t outputs = 0, inputs = 0;

  explicit operator bool() const { return panels != nullptr; }
  Operand expert(int64_t e) const { return {{nullptr, 0, Type::i8}, true, panels + e * expert_bytes, panel_bytes}; }
};

// Up to float_rows rows of an expert stay fp32; more of them are quantised, a scale per row.
struct Int8Experts {
  Type type;  // of x and y
  int64_t tokens, inputs, hidden, outputs, experts;
  bool gated;  // the up rows of w1 begin a panel of their own
  Activation activation;
  const char* x;
  Int8Weight w1, w2;  // w2 empty: w1 maps inputs to outputs
  int64_t float_rows;

  const Int8Weight& last() const { return w2 ? w2 : w1; }
};

// All tokens to every expert, weighted by gates; or rows in the order of the experts, with their weights (null: ones).
struct Int8Rows {
  const Gates<float>* gates;
  Assignments sorted;
  const float* weights;

  int64_t first(int64_t e) const { return gates ? 0 : sorted.offsets[e]; }
  int64_t count(int64_t e, int64_t tokens) const { return gates ? tokens : sorted.offsets[e + 1] - sorted.offsets[e]; }
  int64_t token(int64_t row) const { return gates ? row : sorted.index[row] / sorted.divisor; }
  float weight(int64_t e, int64_t row) const { return gates ? (*gates)(row, e) : weights ? weights[row] : 1.f; }
};

void int8_experts(const Int8Experts& op, const Int8Rows& rows, char* y);

struct Int8Router {
  Type type;
  int64_t tokens, inputs, hidden, experts;
  const char* x;
  Int8Weight w1;             // one expert
  const float* bias;         // [groups, hidden]
  const int64_t* group_ids;  // null: the first group
  Weight w2;
  Bias b2;
  Activation activation;
  int64_t float_rows;
};

void int8_router(const Int8Router& op, float* logits);

}  // namespace cmoe::cpu
