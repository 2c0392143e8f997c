// Ratios of sigmoids that survive underflow.
//
// With c = min(max_j l_j, 0), exp(-c) sigmoid(l) = 1 / (exp(c) + exp(c - l)): the factor cancels in sigmoid(l_i) / sum_j sigmoid(l_j), and
// the largest term lies in [1/2, 1], so a row of nothing but tiny sigmoids divides by a normal number, at one exponential per element.
#pragma once

#include "blocks.h"

namespace cmoe::cpu {

// y = sigmoid(sign x) of a block [n, lanes].
template <class A>
void sigmoid(const RowFunctions<A>& f, const A* x, int64_t n, A sign, A* y) {
  for (int64_t i = 0; i < n * lanes; ++i) y[i] = x[i] * -sign;
  f.exp(y, y, n * lanes);
  for (int64_t i = 0; i < n * lanes; ++i) y[i] = 1 / (1 + y[i]);
}

// Of a block x [n, lanes]: the tails exp(c - x), and behind them exp(c), in tails [n + 1, lanes]. Lanes of nothing but -inf take c =
// `none`.
template <class A>
void sigmoid_tails(const RowFunctions<A>& f, const A* x, int64_t n, A none, A* tails) {
  using V = Vector<A>;
  each_vector<A>([&](int64_t lane) {
    const typename V::type zero{}, top = greatest(x + lane, n);
    typename V::type c = top > zero ? zero : top;
    c = c == zero - infinity<A> ? zero + none : c;
    for (int64_t i = 0; i < n; ++i) V::store(tails + i * lanes + lane, c - V::load(x + i * lanes + lane));
    V::store(tails + n * lanes + lane, c);
  });
  f.exp(tails, tails, (n + 1) * lanes);
}

}  // namespace cmoe::cpu
