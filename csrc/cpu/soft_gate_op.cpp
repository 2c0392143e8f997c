// soft_gate on the CPU.
//
//     gates[t, e]   = sigmoid(l[t, e]) / sum_j sigmoid(l[t, j])
//     dlogits[t, e] = gates[t, e] * (dgates[t, e] - sum_j gates[t, j] dgates[t, j]) * sigmoid(-l[t, e])
//
// Memory plan: E is small (5 in Uni-Med), so 16 rows are computed side by side, in a block that stays in the first-level cache: a few
// blocks of [E, 16] values per thread are all the scratch. Forward reads each logit from memory once and writes each gate once. Backward
// recomputes the gates: logits are the smaller thing to save (half precision as a rule) and one exponential costs less than reading gates
// back. Inputs are read through their strides: an expanded gradient (y.sum().backward()) is never copied out.

#include "../registration.h"
#include "blocks.h"
#include "sigmoid.h"

namespace cmoe::cpu::bindings {

Tensor soft_gate(Tensor logits) {
  require_2d("logits", logits, "[T, E]");
  const int64_t tokens = logits.size(0), experts = logits.size(1);
  Tensor gates = torch::stable::new_empty(logits, {tokens, experts}, accumulate_dtype(logits.scalar_type()));
  dispatch_float("logits", logits, [&](auto zero) {
    using A = accumulate_t<decltype(zero)>;
    using V = Vector<A>;
    const RowFunctions<A>& f = row_functions_here<A>();
    const Rows<decltype(zero)> l(logits);
    A* const out = static_cast<A*>(gates.mutable_data_ptr());
    const Chunks chunks(tokens, experts);
    Scratch<A> scratch(chunks, (2 * experts + 1) * lanes);
    chunks.run([&](int64_t chunk, int64_t first, int64_t last) {
      A *const x = scratch[chunk], *const tails = x + experts * lanes, *const exp_c = tails + experts * lanes;
      each_block(first, last, [&](int64_t t, int64_t rows) {
        read_block(l, t, rows, experts, x);
        sigmoid_tails(f, x, experts, -infinity<A>, tails);
        each_vector<A>([&](int64_t lane) {
          Sum<A> sum;
          for (int64_t e = 0; e < experts; ++e) {
            const auto s = 1 / (V::load(exp_c + lane) + V::load(tails + e * lanes + lane));
            sum.add(s);
            V::store(x + e * lanes + lane, s);
          }
          const auto whole = sum.value();
          for (int64_t e = 0; e < experts; ++e) V::store(x + e * lanes + lane, V::load(x + e * lanes + lane) / whole);
        });
        write_block(x, rows, experts, out + t * experts);
      });
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
    using V = Vector<A>;
    const RowFunctions<A>& f = row_functions_here<A>();
    const Rows<L> l(logits);
    const Rows<A> dg(dgates_exact);
    L* const out = static_cast<L*>(dlogits.mutable_data_ptr());
    const Chunks chunks(tokens, experts);
    Scratch<A> scratch(chunks, (4 * experts + 1) * lanes);
    chunks.run([&](int64_t chunk, int64_t first, int64_t last) {
      A *const x = scratch[chunk], *const d = x + experts * lanes, *const terms = d + experts * lanes,
               *const tails = terms + experts * lanes;
      A* const exp_c = tails + experts * lanes;
      each_block(first, last, [&](int64_t t, int64_t rows) {
        read_block(l, t, rows, experts, x);
        read_block(dg, t, rows, experts, d);
        sigmoid_tails(f, x, experts, -infinity<A>, tails);
        each_vector<A>([&](int64_t lane) {
          const auto c = V::load(exp_c + lane);
          Sum<A> sum, product;
          Range<A> range;
          for (int64_t e = 0; e < experts; ++e) {
            const auto s = 1 / (c + V::load(tails + e * lanes + lane)), de = V::load(d + e * lanes + lane);
            V::store(terms + e * lanes + lane, s);
            sum.add(s);
            product.add(s * de);
            range.add(de);
          }
          const auto share = 1 / sum.value(), dot = range.clamp(product.value() * share);
          for (int64_t e = 0; e < experts; ++e) {
            const auto tail = V::load(tails + e * lanes + lane), s = V::load(terms + e * lanes + lane);
            // sigmoid(-l), which is the derivative of log(sigmoid(l)). The product would be inf * 0 for a tail that overflows, hence the
            // choice; neither side cancels.
            const auto derivative = V::load(x + e * lanes + lane) > typename V::type{} ? tail * s : 1 - c * s;
            V::store(x + e * lanes + lane, s * share * (V::load(d + e * lanes + lane) - dot) * derivative);
          }
        });
        write_block(x, rows, experts, out + t * experts);
      });
    });
  });
  return dlogits;
}

CMOE_IMPLEMENT(CPU, soft_gate)
CMOE_IMPLEMENT(CPU, soft_gate_backward)

}  // namespace cmoe::cpu::bindings
