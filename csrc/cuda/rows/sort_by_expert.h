// The order of assignments by expert: what a grouped product needs before its first tile.
#pragma once

#include "../device/stream.h"
#include "../matrix.h"

namespace cmoe::cuda {

// What tokens select: indices [T, K]; or [1, K] for all of them; or [G, K] with group_ids [T].
struct Assignments {
  Indices indices;
  int64_t rows = 0;
  const int64_t* group_ids = nullptr;
  int64_t tokens = 0, k = 0, experts = 0;
};

// int32 elements of scratch that this sort needs.
int64_t sort_scratch(const Assignments& s);

// gather_idx [T * K]: the assignments in the order of their experts, stable, those of "no expert" last; offsets [E + 1]: where each expert
// begins, and the last one ends. row_weights [T * K] fp32, unless null: weights (shaped as the indices), in that order.
void sort_by_expert(const Assignments& s, const Matrix& weights, int64_t* gather_idx, int32_t* offsets, float* row_weights,
                    int32_t* scratch, Stream stream);

}  // namespace cmoe::cuda
