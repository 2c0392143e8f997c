// topk_gate on the CPU.
//
//     indices[t]       = the k experts that rank first in selection[t] (default: logits[t]); NaN is the greatest, as torch.sort has it, equals
//                        rank by index, and a chosen -inf becomes the index E, "no expert"
//     weights[t, i]    = scale * score(l[t, indices[t, i]]), divided by the sum over the chosen if renormalize
//     dlogits          : weighted_i = dweights_i * weights_i, total = sum_i weighted_i;
//                        renormalize:  dpicked_i = weighted_i - weights_i / scale * total, else dpicked_i = weighted_i;
//                        sigmoid:      dpicked_i *= sigmoid(-l_i);  softmax over all:  dlogits_e = -softmax(l)_e * total, then + dpicked
//
// Memory plan: choosing and weighing are two loops over the rows, each compiled for one dtype (selection and logits may differ) and not for
// every pair of them; logits [T, E] are small beside the tokens they come from, so reading them twice is nothing. The k best are kept as a heap
// inside the row of the output, O(E log k) for any E and k, without scratch; the softmax over all experts takes E values per thread. Counts are
// integers per chunk of rows, summed at the end: no atomics, the same for any number of threads. Backward recomputes the weights from logits and
// indices, so that these two are all it needs saved.

#include <atomic>
#include <limits>

#include <torch/headeronly/util/shim_utils.h>

#include "ops.h"
#include "rows.h"
#include "sigmoid.h"
#include "tensors.h"

namespace cmoe::cpu {
namespace {

enum class Score { softmax, sigmoid };

Score take_score(OwnedString handle) {
  const std::string name = taken(handle);
  STD_TORCH_CHECK(name == "softmax" || name == "sigmoid", "score is '", name, "', must be one of softmax, sigmoid");
  return name == "softmax" ? Score::softmax : Score::sigmoid;
}

template <class S>
void choose(const Rows<S>& rank, int64_t t, int64_t experts, int64_t k, int64_t* best, int32_t* counts) {
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
    if (rank(t, best[i]) == -std::numeric_limits<accumulate_t<S>>::infinity()) {
      best[i] = experts;
    } else {
      ++counts[best[i]];
    }
  }
}

// softmax(l[t]) into p, zeros where every logit is -inf.
template <class L, class A>
void softmax(const Rows<L>& l, int64_t t, int64_t experts, A* p) {
  Maximum<A> largest;
  for (int64_t e = 0; e < experts; ++e) largest.see(l(t, e));
  if (largest.none()) {
    std::fill_n(p, experts, A(0));
    return;
  }
  sum_t sum = 0;
  for (int64_t e = 0; e < experts; ++e) sum += p[e] = std::exp(l(t, e) - largest.value());
  const A total = static_cast<A>(sum);
  for (int64_t e = 0; e < experts; ++e) p[e] /= total;
}

// The weights of the chosen, before the scale. p [E] is scratch, and on return softmax(l[t]) where that is the score.
template <class L, class A>
void weigh(const Rows<L>& l, int64_t t, int64_t experts, const int64_t* chosen, int64_t k, Score score, bool renormalize, A* p, A* weights) {
  if (!renormalize) {
    if (score == Score::softmax) softmax(l, t, experts, p);
    for (int64_t i = 0; i < k; ++i) {
      const int64_t e = chosen[i];
      weights[i] = e == experts ? A(0) : score == Score::softmax ? p[e] : sigmoid(l(t, e));
    }
    return;
  }
  Maximum<A> largest;
  for (int64_t i = 0; i < k; ++i) {
    if (chosen[i] != experts) largest.see(l(t, chosen[i]));
  }
  if (largest.none()) {
    std::fill_n(weights, k, A(0));
    return;
  }
  const ScaledSigmoid<A> scaled(largest.value());
  sum_t sum = 0;
  for (int64_t i = 0; i < k; ++i) {
    const int64_t e = chosen[i];
    weights[i] = e == experts ? A(0) : score == Score::softmax ? std::exp(l(t, e) - largest.value()) : scaled(l(t, e));
    sum += weights[i];
  }
  const A total = static_cast<A>(sum);
  for (int64_t i = 0; i < k; ++i) weights[i] /= total;
}

void require_indices(const Tensor& indices, int64_t experts) {
  const auto* data = static_cast<const int64_t*>(indices.const_data_ptr());
  for (int64_t i = 0; i < indices.numel(); ++i) {
    STD_TORCH_CHECK(data[i] >= 0 && data[i] <= experts, "indices holds ", data[i], ", must be in 0..", experts, " (", experts, " is no expert)");
  }
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> topk_gate(Tensor logits, int64_t k, OwnedString score_name, bool renormalize, double scale, std::optional<Tensor> selection) {
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

  const Tensor& ranking = selection ? *selection : logits;
  dispatch_float(selection ? "selection" : "logits", ranking, [&](auto zero) {
    const Rows<decltype(zero)> rank(ranking);
    chunks.run([&](int64_t chunk, int64_t first, int64_t last) {
      for (int64_t t = first; t < last; ++t) choose(rank, t, experts, k, chosen + t * k, chunk_counts[chunk]);
    });
  });
  dispatch_float("logits", logits, [&](auto zero) {
    using A = accumulate_t<decltype(zero)>;
    const Rows<decltype(zero)> l(logits);
    A* const out = static_cast<A*>(weights.mutable_data_ptr());
    Scratch<A> scratch(chunks, experts);
    chunks.run([&](int64_t chunk, int64_t first, int64_t last) {
      for (int64_t t = first; t < last; ++t) {
        A* const row = out + t * k;
        weigh(l, t, experts, chosen + t * k, k, score, renormalize, scratch[chunk], row);
        for (int64_t i = 0; i < k; ++i) row[i] *= static_cast<A>(scale);
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
  STD_TORCH_CHECK(indices.scalar_type() == ScalarType::Long, "indices must be int64, got ", torch::headeronly::toString(indices.scalar_type()));
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
    const Chunks chunks(tokens, experts + k);
    Scratch<A> scratch(chunks, experts + k);
    chunks.run([&](int64_t chunk, int64_t first, int64_t last) {
      A* const row = scratch[chunk];
      A* const w = row + experts;
      for (int64_t t = first; t < last; ++t) {
        const int64_t* const picked = chosen + t * k;
        if (std::any_of(picked, picked + k, [&](int64_t e) { return e < 0 || e > experts; })) {
          bad_index = true;
          return;
        }
        weigh(l, t, experts, picked, k, score, renormalize, row, w);
        sum_t sum = 0;
        for (int64_t i = 0; i < k; ++i) {
          if (picked[i] != experts) sum += dw(t, i) * static_cast<A>(scale) * w[i];
        }
        const A total = static_cast<A>(sum);
        if (score == Score::softmax && !renormalize) {
          for (int64_t e = 0; e < experts; ++e) row[e] *= -total;
        } else {
          std::fill_n(row, experts, A(0));
        }
        for (int64_t i = 0; i < k; ++i) {
          const int64_t e = picked[i];
          if (e == experts) continue;
          const A weighted = dw(t, i) * static_cast<A>(scale) * w[i];
          const A dpicked = renormalize ? weighted - w[i] * total : weighted;
          row[e] += score == Score::sigmoid ? dpicked * sigmoid(-l(t, e)) : dpicked;
        }
        for (int64_t e = 0; e < experts; ++e) out[t * experts + e] = static_cast<L>(row[e]);
      }
    });
  });
  if (bad_index) require_indices(indices_dense, experts);
  return dlogits;
}

}  // namespace cmoe::cpu
