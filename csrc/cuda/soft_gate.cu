// soft_gate on the GPU.
//
//     gates[t, e]   = sigmoid(l[t, e]) / sum_j sigmoid(l[t, j])
//     dlogits[t, e] = gates[t, e] (dgates[t, e] - sum_j gates[t, j] dgates[t, j]) sigmoid(-l[t, e])
//
// With c = min(max_j l_j, 0), exp(-c) sigmoid(l) = 1 / (exp(c) + exp(c - l)): the factor cancels in the ratio and the largest term lies in
// [1/2, 1], so a row whose sigmoids all underflow divides by a normal number, at one exponential per element.
//
// Memory plan: one pass for the maximum, one for the sums (backward: one before for the least gradient), one that writes. A row is read
// from memory once and then from the first-level cache; nothing is kept in shared memory, and E has no limit. The op costs its bytes and a
// launch: backward recomputes the gates, since the logits (half precision as a rule) are the smaller thing to save.

#include "soft_gate.h"

#include "rows/rows.cuh"

namespace cmoe::cuda {
namespace {

// exp(-c) sigmoid(l), the same c along a row.
struct Scaled {
  float c, exp_c;

  template <class T>
  __device__ Scaled(const Place& p, const Rows<T>& logits, int64_t experts) {
    float top = -infinity;
    p.each(experts, [&](int64_t e) { top = fmaxf(top, logits(p.t, e)); });
    c = fminf(p.largest(top), 0.0f);
    exp_c = expf(c);
  }
  __device__ float operator()(float l) const { return 1.0f / (exp_c + expf(c - l)); }
};

template <class T>
__global__ void __launch_bounds__(row_threads, row_residents)
    soft_gate_fwd_kernel(Rows<T> logits, float* gates, int64_t tokens, int64_t experts, int width) {
  const Place p(tokens, width);
  const Scaled score(p, logits, experts);
  float sum = 0.0f;
  p.each(experts, [&](int64_t e) { sum += score(logits(p.t, e)); });
  const float inverse = 1.0f / p.sum(sum);
  if (!p.live) return;
  p.each(experts, [&](int64_t e) { gates[p.t * experts + e] = score(logits(p.t, e)) * inverse; });
}

template <class T>
__global__ void __launch_bounds__(row_threads, row_residents)
    soft_gate_bwd_kernel(Rows<float> dgates, Rows<T> logits, T* dlogits, int64_t tokens, int64_t experts, int width) {
  const Place p(tokens, width);
  const Scaled score(p, logits, experts);
  // What all gradients of a row have in common cancels: taken away first, it leaves no rounding, and where all are equal nothing.
  float sum = 0.0f, product = 0.0f, common = infinity;
  p.each(experts, [&](int64_t e) { common = fminf(common, dgates(p.t, e)); });
  common = p.least(common);
  p.each(experts, [&](int64_t e) {
    const float s = score(logits(p.t, e));
    sum += s;
    product += s * (dgates(p.t, e) - common);
  });
  const float inverse = 1.0f / p.sum(sum);
  const float mean = p.sum(product) * inverse;
  if (!p.live) return;
  p.each(experts, [&](int64_t e) {
    const float l = logits(p.t, e);
    // d log(sigmoid(l)) / d l = sigmoid(-l)
    dlogits[p.t * experts + e] = from_float<T>(score(l) * inverse * (dgates(p.t, e) - common - mean) / (1.0f + expf(l)));
  });
}

}  // namespace

void soft_gate(const Matrix& logits, float* gates, int64_t tokens, int64_t experts, Stream stream) {
  if (!tokens || !experts) return;
  const int width = row_width(experts);
  dispatch("soft_gate", logits.type, [&](auto zero) {
    using T = decltype(zero);
    launch("soft_gate", soft_gate_fwd_kernel<T>, row_blocks(tokens, width), row_threads, 0, stream, Rows<T>(logits), gates, tokens, experts,
           width);
  });
}

void soft_gate_backward(const Matrix& dgates, const Matrix& logits, void* dlogits, int64_t tokens, int64_t experts, Stream stream) {
  if (!tokens || !experts) return;
  const int width = row_width(experts);
  dispatch("soft_gate_backward", logits.type, [&](auto zero) {
    using T = decltype(zero);
    launch("soft_gate_backward", soft_gate_bwd_kernel<T>, row_blocks(tokens, width), row_threads, 0, stream, Rows<float>(dgates),
           Rows<T>(logits), static_cast<T*>(dlogits), tokens, experts, width);
  });
}

}  // namespace cmoe::cuda
