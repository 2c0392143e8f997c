// topk_gate on the CPU.
//
//     indices[t]       = the k experts that rank first in selection[t] (default: logits[t]); NaN is the greatest, as torch.sort has it,
//                        equals rank by index, and a chosen -inf becomes the index E, "no expert"
//     weights[t, i]    = scale * score(l[t, indices[t, i]]), divided by the sum over the chosen if renormalize
//     dlogits          : with the weights before the scale and d = scale * dweights, total = sum_i d_i weights_i;
//                        dpicked_i = weights_i (d_i - total) if renormalize else weights_i d_i;
//                        sigmoid:      dpicked_i *= sigmoid(-l_i);  softmax over all:  dlogits_e = -softmax(l)_e * total, then + dpicked
//
// Memory plan: 16 rows are computed side by side, in a block that stays in the first-level cache; some blocks of [E, 16] and [K, 16] values
// per thread are all the scratch. With a selection, choosing and weighing are two loops over the rows, each compiled for one dtype
// (selection and logits may differ) and not for every pair of them. Choosing takes k scans of a block; for a large k a heap inside the row
// of the output, O(E log k). Counts are integers per chunk of rows, summed at the end: no atomics, the same for any number of threads.
// Backward recomputes the weights from logits and indices, so that these two are all it needs saved.

#include <atomic>
#include <limits>

#include <torch/headeronly/util/shim_utils.h>

#include "../registration.h"
#include "blocks.h"
#include "sigmoid.h"
#include "tensors.h"

namespace cmoe::cpu::bindings {
namespace {

enum class Score { softmax, sigmoid };

Score take_score(OwnedString handle) {
  const std::string name = consume_string(handle);
  STD_TORCH_CHECK(name == "softmax" || name == "sigmoid", "score is '", name, "', must be one of softmax, sigmoid");
  return name == "softmax" ? Score::softmax : Score::sigmoid;
}

template <class S>
void choose_by_heap(const Rows<S>& rank, int64_t t, int64_t experts, int64_t k, int64_t* best) {
  // A total order: the k first are the same whatever order they are met in.
  const auto before = [&](int64_t a, int64_t b) {
    const auto x = rank(t, a), y = rank(t, b);
    const bool x_greater = x > y || (x != x && y == y), y_greater = y > x || (y != y && x == x);
    return x_greater || (!y_greater && a < b);
  };
  for (int64_t e = 0; e < k; ++e) best[e] = e;
  std::make_heap(best, best + k, before);
  for (int64_t e = k; e < experts; ++e) {
    if (!before(e, best[0])) continue;
    std::pop_heap(best, best + k, before);
    best[k - 1] = e;
    std::push_heap(best, best + k, before);
  }
  std::sort_heap(best, best + k, before);
  for (int64_t i = 0; i < k; ++i) {
    if (rank(t, best[i]) == -infinity<accumulate_t<S>>) best[i] = experts;
  }
}

// Scans with which choosing among E experts still beats the heap.
constexpr int64_t most_scans = 16;

// The k experts of each lane into best [k, 16]; keys [E, 16] are scratch.
template <class A>
void choose_by_scans(const A* rank, int64_t experts, int64_t k, typename Vector<A>::Integer* keys, typename Vector<A>::Integer* best) {
  using V = Vector<A>;
  using I = typename V::Integer;
  using Keys = typename V::mask;
  constexpr I sign = std::numeric_limits<I>::min(), rest = std::numeric_limits<I>::max();
  each_vector<A>([&](int64_t lane) {
    for (int64_t e = 0; e < experts; ++e) {
      // Integers in the order of the numbers: those below zero fall as their bits rise; adding 0 makes -0 equal 0.
      const auto v = V::load(rank + e * lanes + lane) + A(0);
      Keys bits;
      __builtin_memcpy(&bits, &v, sizeof bits);
      const Keys key = bits < 0 ? bits ^ rest : bits;
      V::store(keys + e * lanes + lane, v != v ? Keys{} + rest : key);
    }
    const typename V::type least = typename V::type{} - infinity<A>;
    Keys none;
    __builtin_memcpy(&none, &least, sizeof none);
    none ^= rest;
    Keys taken = Keys{} - 1;
    for (int64_t i = 0; i < k; ++i) {
      Keys top = Keys{} + sign, at = Keys{};
      for (int64_t e = 0; e < experts; ++e) {
        Keys key = V::load(keys + e * lanes + lane);
        key = taken == static_cast<I>(e) ? Keys{} + sign : key;
        V::store(keys + e * lanes + lane, key);
        const Keys better = key > top;
        top = better ? key : top;
        at = better ? Keys{} + static_cast<I>(e) : at;
      }
      V::store(best + i * lanes + lane, top == none ? Keys{} + static_cast<I>(experts) : at);
      taken = at;
    }
  });
}

// What weighing needs of a block, and where: picked, weights [K, 16]; all [E, 16] and tails [E + K + 1, 16] are scratch.
template <class A>
struct Weighing {
  const RowFunctions<A>& f;
  Score score;
  bool renormalize;
  int64_t experts, k;
  A *picked, *weights, *all, *tails;

  static int64_t size(int64_t experts, int64_t k) { return (3 * k + 2 * experts + 1) * lanes; }
  Weighing(const RowFunctions<A>& functions, Score s, bool divide, int64_t e, int64_t chosen, A* scratch)
      : f(functions), score(s), renormalize(divide), experts(e), k(chosen), picked(scratch), weights(picked + k * lanes),
        all(weights + k * lanes), tails(all + experts * lanes) {}

  // x [n, 16] to its softmax over n; zeros in the lanes of nothing but -inf.
  void softmax(const A* x, int64_t n, A* y) const {
    using V = Vector<A>;
    each_vector<A>([&](int64_t lane) {
      const auto largest = greatest(x + lane, n);
      const auto shift = largest == typename V::type{} - infinity<A> ? typename V::type{} : largest;
      for (int64_t i = 0; i < n; ++i) V::store(y + i * lanes + lane, V::load(x + i * lanes + lane) - shift);
    });
    f.exp(y, y, n * lanes);
    divide(n, y);
  }

  // The weights of the chosen before the scale, in `weights`; softmax without renormalizing also leaves that of all experts in `all`.
  template <class L>
  void operator()(const Rows<L>& l, int64_t first, int64_t rows, const int64_t* chosen) const {
    using V = Vector<A>;
    for (int64_t r = 0; r < lanes; ++r) {
      const int64_t row = std::min(r, rows - 1);
      for (int64_t i = 0; i < k; ++i) {
        const int64_t e = chosen[row * k + i];
        picked[i * lanes + r] = e == experts ? -infinity<A> : l(first + row, e);
      }
    }
    if (score == Score::sigmoid && !renormalize) {
      sigmoid(f, picked, k, A(1), weights);
    } else if (score == Score::sigmoid) {
      sigmoid_tails(f, picked, k, A(0), tails);
      each_vector<A>([&](int64_t lane) {
        for (int64_t i = 0; i < k; ++i)
          V::store(weights + i * lanes + lane, 1 / (V::load(tails + k * lanes + lane) + V::load(tails + i * lanes + lane)));
      });
      divide(k, weights);
    } else if (renormalize) {
      softmax(picked, k, weights);
    } else {
      read_block(l, first, rows, experts, tails);
      softmax(tails, experts, all);
      for (int64_t r = 0; r < lanes; ++r)
        for (int64_t i = 0; i < k; ++i) {
          const int64_t e = chosen[std::min(r, rows - 1) * k + i];
          weights[i * lanes + r] = e == experts ? A(0) : all[e * lanes + r];
        }
    }
  }

 private:
  // y by its sum over n, where it has one.
  static void divide(int64_t n, A* y) {
    using V = Vector<A>;
    each_vector<A>([&](int64_t lane) {
      Sum<A> sum;
      for (int64_t i = 0; i < n; ++i) sum.add(V::load(y + i * lanes + lane));
      const auto total = sum.value() == typename V::type{} ? typename V::type{} + 1 : sum.value();
      for (int64_t i = 0; i < n; ++i) V::store(y + i * lanes + lane, V::load(y + i * lanes + lane) / total);
    });
  }
};

void require_indices(const Tensor& indices, int64_t experts) {
  const auto* data = static_cast<const int64_t*>(indices.const_data_ptr());
  for (int64_t i = 0; i < indices.numel(); ++i) {
    STD_TORCH_CHECK(data[i] >= 0 && data[i] <= experts, "indices holds ", data[i], ", must be in 0..", experts, " (", experts,
                    " is no expert)");
  }
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> topk_gate(Tensor logits, int64_t k, OwnedString score_name, bool renormalize, double scale,
                                             std::optional<Tensor> selection) {
  const Score score = take_score(score_name);
  require_2d("logits", logits, "[T, E]");
  const int64_t tokens = logits.size(0), experts = logits.size(1);
  STD_TORCH_CHECK(k >= 1 && k <= experts, "k is ", k, ", must be in 1..", experts, " (the experts in logits)");
  STD_TORCH_CHECK(tokens <= std::numeric_limits<int32_t>::max(), "logits has ", tokens, " rows, more than int32 counts can hold");
  if (selection) require_shape("selection", *selection, tokens, experts, "logits");

  Tensor weights = torch::stable::new_empty(logits, {tokens, k}, accumulate_dtype(logits.scalar_type()));
  Tensor indices = torch::stable::new_empty(logits, {tokens, k}, ScalarType::Long);
  Tensor counts = torch::stable::new_empty(logits, {experts}, ScalarType::Int);
  auto* const chosen = static_cast<int64_t*>(indices.mutable_data_ptr());
  const Chunks chunks(tokens, experts);
  Scratch<int32_t> chunk_counts(chunks, experts);

  // The rows first..last-1 of a ranking, block by block; then(first row, rows) follows each block.
  const auto choose = [&](auto zero, const Tensor& ranking, int64_t chunk, int64_t first, int64_t last, const auto& then) {
    using A = accumulate_t<decltype(zero)>;
    using I = typename Vector<A>::Integer;
    const Rows<decltype(zero)> rank(ranking);
    const bool scans = k <= most_scans;
    std::vector<A> x(scans ? experts * lanes : 0);
    std::vector<I> keys(x.size()), best(scans ? k * lanes : 0);
    each_block(first, last, [&](int64_t t, int64_t rows) {
      if (scans) {
        read_block(rank, t, rows, experts, x.data());
        choose_by_scans(x.data(), experts, k, keys.data(), best.data());
        write_block(best.data(), rows, k, chosen + t * k);
      } else {
        for (int64_t r = 0; r < rows; ++r) choose_by_heap(rank, t + r, experts, k, chosen + (t + r) * k);
      }
      for (int64_t i = t * k; i < (t + rows) * k; ++i) {
        if (chosen[i] != experts) ++chunk_counts[chunk][chosen[i]];
      }
      then(t, rows);
    });
  };
  if (selection) {
    dispatch_float("selection", *selection, [&](auto zero) {
      chunks.run(
          [&](int64_t chunk, int64_t first, int64_t last) { choose(zero, *selection, chunk, first, last, [](int64_t, int64_t) {}); });
    });
  }
  dispatch_float("logits", logits, [&](auto zero) {
    using A = accumulate_t<decltype(zero)>;
    const Rows<decltype(zero)> l(logits);
    A* const out = static_cast<A*>(weights.mutable_data_ptr());
    const RowFunctions<A>& f = row_functions_here<A>();
    Scratch<A> scratch(chunks, Weighing<A>::size(experts, k));
    chunks.run([&](int64_t chunk, int64_t first, int64_t last) {
      const Weighing<A> weighing(f, score, renormalize, experts, k, scratch[chunk]);
      const auto weigh = [&](int64_t t, int64_t rows) {
        weighing(l, t, rows, chosen + t * k);
        for (int64_t i = 0; i < k * lanes; ++i) weighing.weights[i] *= static_cast<A>(scale);
        write_block(weighing.weights, rows, k, out + t * k);
      };
      if (selection) {
        each_block(first, last, weigh);
      } else {
        choose(zero, logits, chunk, first, last, weigh);
      }
    });
  });

  auto* const sums = static_cast<int32_t*>(counts.mutable_data_ptr());
  std::fill_n(sums, experts, 0);
  for (int64_t chunk = 0; chunk < chunks.count; ++chunk) {
    for (int64_t e = 0; e < experts; ++e) sums[e] += chunk_counts[chunk][e];
  }
  return {weights, indices, counts};
}

Tensor topk_gate_backward(Tensor dweights, Tensor logits, Tensor indices, OwnedString score_name, bool renormalize, double scale) {
  const Score score = take_score(score_name);
  require_2d("logits", logits, "[T, E]");
  require_2d("indices", indices, "[T, K]");
  const int64_t tokens = logits.size(0), experts = logits.size(1), k = indices.size(1);
  STD_TORCH_CHECK(indices.scalar_type() == ScalarType::Long, "indices must be int64, got ",
                  torch::headeronly::toString(indices.scalar_type()));
  require_shape("indices", indices, tokens, k, "logits in its rows");
  require_shape("dweights", dweights, tokens, k, "indices");

  const Tensor dweights_exact = torch::stable::to(dweights, accumulate_dtype(logits.scalar_type()));
  const Tensor indices_dense = torch::stable::contiguous(indices);
  const auto* const chosen = static_cast<const int64_t*>(indices_dense.const_data_ptr());
  Tensor dlogits = torch::stable::new_empty(logits, {tokens, experts});
  std::atomic<bool> bad_index = false;

  dispatch_float("logits", logits, [&](auto zero) {
    using L = decltype(zero);
    using A = accumulate_t<L>;
    const Rows<L> l(logits);
    const Rows<A> dw(dweights_exact);
    L* const out = static_cast<L*>(dlogits.mutable_data_ptr());
    using V = Vector<A>;
    const RowFunctions<A>& f = row_functions_here<A>();
    const Chunks chunks(tokens, experts + k);
    Scratch<A> scratch(chunks, Weighing<A>::size(experts, k) + (k + 1) * lanes);
    chunks.run([&](int64_t chunk, int64_t first, int64_t last) {
      const Weighing<A> weigh(f, score, renormalize, experts, k, scratch[chunk]);
      A *const d = scratch[chunk] + Weighing<A>::size(experts, k), *const totals = d + k * lanes;
      if (std::any_of(chosen + first * k, chosen + last * k, [&](int64_t e) { return e < 0 || e > experts; })) {
        bad_index = true;
        return;
      }
      each_block(first, last, [&](int64_t t, int64_t rows) {
        const int64_t* const picked = chosen + t * k;
        weigh(l, t, rows, picked);
        read_block(dw, t, rows, k, d);
        for (int64_t r = 0; r < rows; ++r)
          for (int64_t i = 0; i < k; ++i) {
            if (picked[r * k + i] == experts) d[i * lanes + r] = 0;
          }
        each_vector<A>([&](int64_t lane) {
          Sum<A> sum;
          Range<A> range;
          for (int64_t i = 0; i < k; ++i) {
            const auto scaled = V::load(d + i * lanes + lane) * static_cast<A>(scale);
            sum.add(scaled * V::load(weigh.weights + i * lanes + lane));
            range.add(scaled);
          }
          V::store(totals + lane, sum.value());
          const auto mean = renormalize ? range.clamp(sum.value()) : typename V::type{};
          for (int64_t i = 0; i < k; ++i) {
            const auto scaled = V::load(d + i * lanes + lane) * static_cast<A>(scale);
            V::store(d + i * lanes + lane, (scaled - mean) * V::load(weigh.weights + i * lanes + lane));
          }
        });
        if (score == Score::sigmoid) {
          sigmoid(f, weigh.picked, k, A(-1), weigh.tails);
          for (int64_t i = 0; i < k * lanes; ++i) d[i] *= weigh.tails[i];
        }
        const bool all = score == Score::softmax && !renormalize;
        for (int64_t e = 0; e < experts; ++e)
          for (int64_t r = 0; r < lanes; ++r) weigh.all[e * lanes + r] = all ? weigh.all[e * lanes + r] * -totals[r] : A(0);
        for (int64_t r = 0; r < rows; ++r)
          for (int64_t i = 0; i < k; ++i) {
            if (picked[r * k + i] != experts) weigh.all[picked[r * k + i] * lanes + r] += d[i * lanes + r];
          }
        write_block(weigh.all, rows, experts, out + t * experts);
      });
    });
  });
  if (bad_index) require_indices(indices_dense, experts);
  return dlogits;
}

CMOE_IMPLEMENT(CPU, topk_gate)
CMOE_IMPLEMENT(CPU, topk_gate_backward)

}  // namespace cmoe::cpu::bindings
