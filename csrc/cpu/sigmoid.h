// Ratios of sigmoids that survive underflow.
//
// With c = min(max_j l_j, 0), exp(-c) sigmoid(l) = 1 / (exp(c) + exp(c - l)): the factor cancels in sigmoid(l_i) / sum_j sigmoid(l_j), and
// the largest term lies in [1/2, 1], so a row of nothing but tiny sigmoids divides by a normal number, at one exponential per element.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

namespace cmoe::cpu {

template <class A>
A sigmoid(A l) {
  return 1 / (1 + std::exp(-l));
}

// A maximum that keeps a NaN once it has seen one, so that "nothing but -inf" can be told from "-inf and NaN".
template <class A>
class Maximum {
 public:
  void see(A l) { value_ = (l > value_ || l != l) ? l : value_; }
  A value() const { return value_; }
  bool none() const { return value_ == -std::numeric_limits<A>::infinity(); }

 private:
  A value_ = -std::numeric_limits<A>::infinity();
};

template <class A>
class ScaledSigmoid {
 public:
  explicit ScaledSigmoid(A largest) : c_(std::min(largest, A(0))), exp_c_(c_ < 0 ? std::exp(c_) : A(1)) {}

  A tail(A l) const { return std::exp(c_ - l); }
  A value(A tail) const { return 1 / (exp_c_ + tail); }
  A operator()(A l) const { return value(tail(l)); }

  // sigmoid(-l), which is the derivative of log(sigmoid(l)). The product would be inf * 0 for a tail that overflows, hence the branch;
  // neither side cancels.
  A derivative(A l, A tail) const { return l > 0 ? tail * value(tail) : 1 - exp_c_ * value(tail); }

 private:
  A c_, exp_c_;
};

}  // namespace cmoe::cpu
