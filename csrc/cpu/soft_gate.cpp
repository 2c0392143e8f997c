// soft_gate on the CPU.
//
//     gates[t, e]   = sigmoid(l[t, e]) / sum_j sigmoid(l[t, j])
//     dlogits[t, e] = gates[t, e] * (dgates[t, e] - sum_j gates[t, j] dgates[t, j]) * sigmoid(-l[t, e])
//
// Memory plan: E is small (5 in Uni-Med), so a row stays in the first-level cache and both passes over it are free. Forward reads each
// logit from memory once and writes each gate once; it needs no scratch, because gates are written in the type of the computation.
// Backward recomputes the gates: logits are the smaller thing to save (half precision as a rule) and one exponential costs less than
// reading gates back. Its dlogits may be half precision, so the exponentials of a row wait in scratch, E values per thread.
// Inputs are read through their strides: an expanded gradient (y.sum().backward()) is never copied out.

#include "ops.h"
#include "rows.h"
#include "sigmoid.h"

namespace cmoe::cpu {

Tensor soft_gate(Tensor logits) {
  require_2d("logits", logits, "[T, E]");
  const int64_t tokens = logits.size(0), experts = logits.size(1);
  Tensor gates = torch::stable::new_empty(logits, {tokens, experts}, accumulate_dtype(logits.scalar_type()));
  dispatch_float("logits", logits, [&](auto zero) {
    using A = accumulate_t<decltype(zero)>;
    const Rows<decltype(zero)> l(logits);
    A* const out = static_cast<A*>(gates.mutable_data_ptr());
    Chunks(tokens, experts).run([&](int64_t, int64_t first, int64_t last) {
      for (int64_t t = first; t < last; ++t) {
        A* const row = out + t * experts;
        Maximum<A> largest;
        for (int64_t e = 0; e < experts; ++e) largest.see(l(t, e));
        const ScaledSigmoid<A> scaled(largest.value());
        sum_t sum = 0;
        for (int64_t e = 0; e < experts; ++e) sum += row[e] = scaled(l(t, e));
        const A total = static_cast<A>(sum);
        for (int64_t e = 0; e < experts; ++e) row[e] /= total;
      }
    });
  });
  return gates;
}

Tensor soft_gate_backward(Tensor dgates, Tensor logits) {
  require_2d("logits", logits, "[T, E]");
  const int64_t tokens = logits.size(0), experts = logits.size(1);
  require_shape("dgates", dgates, tokens, experts, "logits");
  const Tensor dgates_exact = torch::stable::to(dgates, accumulate_dtype(logits.scalar_type()));
  Tensor dlogits = torch::stable::new_empty(logits, {tokens, experts});
  dispatch_float("logits", logits, [&](auto zero) {
    using L = decltype(zero);
    using A = accumulate_t<L>;
    const Rows<L> l(logits);
    const Rows<A> dg(dgates_exact);
    L* const out = static_cast<L*>(dlogits.mutable_data_ptr());
    const Chunks chunks(tokens, experts);
    Scratch<A> scratch(chunks, experts);
    chunks.run([&](int64_t chunk, int64_t first, int64_t last) {
      A* const tails = scratch[chunk];
      for (int64_t t = first; t < last; ++t) {
        Maximum<A> largest;
        for (int64_t e = 0; e < experts; ++e) largest.see(l(t, e));
        const ScaledSigmoid<A> scaled(largest.value());
        sum_t sum = 0, product = 0;
        for (int64_t e = 0; e < experts; ++e) {
          tails[e] = scaled.tail(l(t, e));
          const A s = scaled.value(tails[e]);
          sum += s;
          product += s * dg(t, e);
        }
        const A total = static_cast<A>(sum), dot = static_cast<A>(product / sum);
        for (int64_t e = 0; e < experts; ++e) {
          const A gate = scaled.value(tails[e]) / total;
          out[t * experts + e] = static_cast<L>(gate * (dg(t, e) - dot) * scaled.derivative(l(t, e), tails[e]));
        }
      }
    });
  });
  return dlogits;
}

}  // namespace cmoe::cpu
