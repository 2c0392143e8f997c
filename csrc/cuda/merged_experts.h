// Single linear experts whose gates are known before the tokens are: merged into one layer per row of gates, W_g = sum_e gates[g, e] W_e,
// and what that layer's gradient gives each expert and each gate.
#pragma once

#include "gemm/gemm.h"

namespace cmoe::cuda {

// [experts, height, width] by strides.
struct Stack {
  const void* data = nullptr;
  Type type = Type::f32;
  int64_t expert = 0, row = 0, column = 0;
  int64_t experts = 0, height = 0, width = 0;
};

// out [m, height, width] = sum_e c[m, e] stack[e]; c by strides, out without gaps.
void mix(const Stack& stack, const float* c, int64_t c_row, int64_t c_column, int64_t m, Type out_type, void* out, Stream stream);

// out [groups, experts] (+)= <d[g], stack[e]>, d [groups, height, width] fp32 without gaps; in two steps, whose order is fixed.
int64_t dot_partials(const Stack& stack);  // floats of scratch for each element of out
void dots(const Stack& stack, const float* d, int64_t groups, bool add, float* scratch, float* out, Stream stream);

}  // namespace cmoe::cuda
