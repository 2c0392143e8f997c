// topk_gate on the GPU.
//
//     indices[t]    = the k experts that rank first (NaN is the greatest, as torch.sort has it; equals by index; -inf becomes E,
//                     "no expert")
//     weights[t, i] = scale * score(l[t, indices[t, i]]), divided by the sum over the chosen if renormalize
//     dlogits       : with the weights before the scale and d = scale * dweights, total = sum_i d_i weights_i;
//                     dpicked_i = weights_i (d_i - total) if renormalize else weights_i d_i;
//                     sigmoid:      dpicked_i *= sigmoid(-l_i);  softmax over all:  dlogits_e = -softmax(l)_e * total, then + dpicked
//
// Choosing. Each value becomes an integer that compares as the value does, and the next choice is the greatest of those behind the last one
// in the order (key, lower index first): nothing is marked as taken, so keys stay where they are, in registers for up to 256 experts (32
// lanes of 8), and are computed again from memory beyond or where a selection ranks. A choice costs a scan of a lane's keys and log2(width)
// shuffles. Choices are written as they are made and read back by the lanes that weigh them. Counts are summed per block in shared memory
// and added to memory by an integer atomic, whose result does not depend on the order: one launch makes weights, indices and counts.
//
// Backward writes a row of softmax's part (or zeros) and then, after the warp has met, the chosen elements over it, each by one lane: an
// index outside 0..E-1 reads and receives nothing. The indices of a row differ, as the forward pass makes them.

#include "topk_gate.h"

#include <algorithm>

#include "rows/rows.cuh"

namespace cmoe::cuda {
namespace {

constexpr int64_t most_counted = 4096;  // experts that a block counts in shared memory

// Integers in the order of the numbers: those below zero fall as their bits rise; adding 0 makes -0 equal 0. No key is the least integer.
template <class Integer, class Float>
__device__ Integer key_of(Float x) {
  constexpr auto greatest = static_cast<Integer>(~(Integer{1} << (8 * sizeof(Integer) - 1)));
  Integer bits;
  x += Float(0);
  memcpy(&bits, &x, sizeof x);
  return x != x ? greatest : bits < 0 ? bits ^ greatest : bits;
}

// Logits that rank for themselves: `held` keys of each lane in registers.
template <class T, int held>
struct OwnKeys {
  using Key = int32_t;
  Key keys[held];

  __device__ OwnKeys(const Rows<T>& logits, const Matrix&, const Place& p, int experts) {
#pragma unroll
    for (int i = 0; i < held; ++i) {
      const int e = p.lane + i * p.width;
      keys[i] = e < experts ? key_of<Key>(logits(p.t, e)) : 0;
    }
  }
  // f(expert, key) for each expert of this lane, in their order.
  template <class F>
  __device__ void each(const Place& p, int experts, F&& f) const {
#pragma unroll
    for (int i = 0; i < held; ++i) {
      const int e = p.lane + i * p.width;
      if (e < experts) f(e, keys[i]);
    }
  }
};

// A matrix of any type, which fp64 tells apart as well as its own type does.
template <class T>
struct AnyKeys {
  using Key = int64_t;
  Matrix m;

  __device__ AnyKeys(const Rows<T>&, const Matrix& ranking, const Place&, int) : m(ranking) {}
  __device__ double value(int64_t at) const {
    switch (m.type) {
      case Type::f32: return static_cast<const float*>(m.data)[at];
      case Type::bf16: return to_float(static_cast<const bf16*>(m.data)[at]);
      case Type::f16: return to_float(static_cast<const fp16*>(m.data)[at]);
      default: return static_cast<const double*>(m.data)[at];
    }
  }
  template <class F>
  __device__ void each(const Place& p, int experts, F&& f) const {
    for (int e = p.lane; e < experts; e += p.width) f(e, key_of<Key>(value(p.t * m.row + e * m.column)));
  }
};

// Writes the choices of a row, best first, into indices [k]; counts them.
template <class Keys>
__device__ void choose(const Keys& keys, const Place& p, int experts, int k, int64_t* indices, int* counts) {
  using Key = typename Keys::Key;
  constexpr Key lowest = static_cast<Key>(Key{1} << (8 * sizeof(Key) - 1));
  // -inf, whose bits are those of inf and the sign: all but the sign turned over.
  constexpr Key nothing = sizeof(Key) == 8 ? static_cast<Key>(-0x7ff0000000000001) : static_cast<Key>(-0x7f800001);
  Key last = static_cast<Key>(~lowest);
  int at = -1;
  for (int i = 0; i < k; ++i) {
    Key best = lowest;
    int where = experts;
    keys.each(p, experts, [&](int e, Key key) {
      if ((key < last || (key == last && e > at)) && key > best) {
        best = key;
        where = e;
      }
    });
    for (int by = p.width / 2; by; by /= 2) {
      const Key other = __shfl_xor_sync(~0u, best, by);
      const int there = __shfl_xor_sync(~0u, where, by);
      if (other > best || (other == best && there < where)) {
        best = other;
        where = there;
      }
    }
    last = best;
    at = where;
    if (p.lane == 0 && p.live) {
      indices[i] = best == nothing ? experts : where;
      if (best != nothing) atomicAdd(counts + where, 1);
    }
  }
}

// Weights of a row before the scale. The chosen are those of `chosen(i)`, experts for none.
//   softmax   term = exp(l - base), base the greatest      sigmoid   term = 1 / (exp(base) + exp(base - l)), exp(-base) sigmoid(l)
// with a base that keeps the sum of terms a normal number.
template <class T>
struct Weights {
  float base, exp_base, inverse;
  bool sigmoid;

  template <class Chosen>
  __device__ Weights(const Place& p, const Rows<T>& logits, int experts, int k, bool sigmoid_, bool renormalize, const Chosen& chosen)
      : sigmoid(sigmoid_) {
    const auto each = [&](auto&& f) {
      if (renormalize) {
        for (int i = p.lane; i < k; i += p.width)
          if (const int e = chosen(i); e < experts) f(logits(p.t, e));
      } else if (!sigmoid) {
        p.each(experts, [&](int64_t e) { f(logits(p.t, e)); });
      }
    };
    float top = -infinity, sum = 0.0f;
    each([&](float l) { top = fmaxf(top, l); });
    top = p.largest(top);
    base = top == -infinity ? 0.0f : sigmoid ? fminf(top, 0.0f) : top;
    exp_base = expf(base);
    each([&](float l) { sum += term(l); });
    sum = p.sum(sum);
    inverse = sum == 0.0f ? 1.0f : 1.0f / sum;
  }
  __device__ float term(float l) const { return sigmoid ? 1.0f / (exp_base + expf(base - l)) : expf(l - base); }
  __device__ float operator()(float l) const { return term(l) * inverse; }
};

template <class T, class Keys>
__global__ void __launch_bounds__(row_threads, row_residents)
    topk_gate_fwd_kernel(Rows<T> logits, Matrix ranking, float* weights, int64_t* indices, int32_t* counts, int64_t tokens, int experts,
                         int k, int width, bool sigmoid, bool renormalize, float scale) {
  CU_DYNAMIC_SHARED(memory);
  const bool counted = experts <= most_counted;
  int* const held = reinterpret_cast<int*>(memory);
  for (int e = static_cast<int>(threadIdx.x); counted && e < experts; e += row_threads) held[e] = 0;
  __syncthreads();
  const Place p(tokens, width);
  int64_t* const own = indices + p.t * k;
  choose(Keys(logits, ranking, p, experts), p, experts, k, own, counted ? held : counts);
  __syncwarp();
  const auto chosen = [&](int i) { return p.live ? static_cast<int>(own[i]) : experts; };
  const Weights<T> weight(p, logits, experts, k, sigmoid, renormalize, chosen);
  for (int i = p.lane; i < k && p.live; i += p.width) {
    const int e = chosen(i);
    weights[p.t * k + i] = e < experts ? weight(logits(p.t, e)) * scale : 0.0f;
  }
  __syncthreads();
  for (int e = static_cast<int>(threadIdx.x); counted && e < experts; e += row_threads)
    if (held[e]) atomicAdd(counts + e, held[e]);
}

template <class T>
__global__ void __launch_bounds__(row_threads, row_residents)
    topk_gate_bwd_kernel(Rows<T> logits, Rows<float> dweights, Indices indices, T* dlogits, int64_t tokens, int experts, int k, int width,
                         bool sigmoid, bool renormalize, float scale) {
  const Place p(tokens, width);
  const auto chosen = [&](int i) {
    const int64_t e = indices.data[p.t * indices.row + i * indices.column];
    return e >= 0 && e < experts ? static_cast<int>(e) : experts;
  };
  const Weights<T> weight(p, logits, experts, k, sigmoid, renormalize, chosen);
  // What all gradients of a row have in common cancels: taken away first, it leaves no rounding, and where all are equal nothing. Each is
  // rounded for itself: a fused multiply and subtract would leave what the rounding took.
  const auto gradient = [&](int i) { return __fmul_rn(dweights(p.t, i), scale); };
  float total = 0.0f, common = infinity;
  for (int i = p.lane; i < k; i += p.width)
    if (chosen(i) < experts) common = fminf(common, gradient(i));
  common = renormalize ? p.least(common) : 0.0f;
  for (int i = p.lane; i < k; i += p.width)
    if (const int e = chosen(i); e < experts) total += (gradient(i) - common) * weight(logits(p.t, e));
  total = p.sum(total);
  const bool all = !sigmoid && !renormalize;
  T* const row = dlogits + p.t * experts;
  if (p.live) p.each(experts, [&](int64_t e) { row[e] = from_float<T>(all ? -weight(logits(p.t, e)) * total : 0.0f); });
  __syncwarp();
  if (!p.live) return;
  for (int i = p.lane; i < k; i += p.width) {
    const int e = chosen(i);
    if (e == experts) continue;
    const float l = logits(p.t, e), w = weight(l);
    float d = w * (gradient(i) - common - (renormalize ? total : 0.0f));
    if (all) d -= w * total;
    // d log(sigmoid(l)) / d l = sigmoid(-l)
    row[e] = from_float<T>(sigmoid ? d / (1.0f + expf(l)) : d);
  }
}

template <class T, class Keys>
void forward(const TopkGate& op, float* weights, int64_t* indices, int32_t* counts, Stream stream) {
  const int width = row_width(op.experts);
  const size_t shared = op.experts <= most_counted ? op.experts * sizeof(int) : 0;
  launch("topk_gate", topk_gate_fwd_kernel<T, Keys>, row_blocks(op.tokens, width), row_threads, shared, stream, Rows<T>(op.logits),
         op.ranking, weights, indices, counts, op.tokens, static_cast<int>(op.experts), static_cast<int>(op.k), width, op.sigmoid,
         op.renormalize, op.scale);
}

}  // namespace

void topk_gate(const TopkGate& op, float* weights, int64_t* indices, int32_t* counts, Stream stream) {
  if (!op.tokens) return;
  dispatch("topk_gate", op.logits.type, [&](auto zero) {
    using T = decltype(zero);
    if (op.ranking.data != op.logits.data || op.experts > 256) return forward<T, AnyKeys<T>>(op, weights, indices, counts, stream);
    if (op.experts > 32) return forward<T, OwnKeys<T, 8>>(op, weights, indices, counts, stream);
    forward<T, OwnKeys<T, 1>>(op, weights, indices, counts, stream);
  });
}

void topk_gate_backward(const TopkGate& op, const Matrix& dweights, const Indices& indices, void* dlogits, Stream stream) {
  if (!op.tokens) return;
  const int width = row_width(op.experts);
  dispatch("topk_gate_backward", op.logits.type, [&](auto zero) {
    using T = decltype(zero);
    launch("topk_gate_backward", topk_gate_bwd_kernel<T>, row_blocks(op.tokens, width), row_threads, 0, stream, Rows<T>(op.logits),
           Rows<float>(dweights), indices, static_cast<T*>(dlogits), op.tokens, static_cast<int>(op.experts), static_cast<int>(op.k), width,
           op.sigmoid, op.renormalize, op.scale);
  });
}

}  // namespace cmoe::cuda
