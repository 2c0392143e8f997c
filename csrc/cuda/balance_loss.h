// balance_loss on the GPU: what the binding calls.
#pragma once

#include "device/stream.h"
#include "matrix.h"

namespace cmoe::cuda {

struct BalanceLoss {
  enum class Kind { switch_, importance, z };

  Matrix scores;  // [T, E]
  int64_t tokens, experts;
  Kind kind;
  Indices indices;  // [T, K], or none
  int64_t k = 1;
  const bool* mask = nullptr;     // [T]
  const float* counts = nullptr;  // [E], in place of the indices
  const float* total = nullptr;   // [1], what counts are a share of; null: their sum
  // With segments: their labels [T], sorted, and the token of each.
  const int64_t* labels = nullptr;
  const int64_t* order = nullptr;
};

// float elements of scratch.
int64_t balance_loss_scratch(const BalanceLoss& op);
// loss [1]; there is a token.
void balance_loss(const BalanceLoss& op, float* loss, float* scratch, Stream stream);
// dscores [T, E] in the type of the scores; dloss [1].
void balance_loss_backward(const BalanceLoss& op, const float* dloss, void* dscores, float* scratch, Stream stream);

}  // namespace cmoe::cuda
