// grouped_linear on the CPU: the drivers in grouped_linear.cpp. Single linear layers of `op` (w2 empty).
#pragma once

#include "experts.h"

namespace cmoe::cpu {

// y [rows, outputs], at scatter_idx where given; u, the pre-activations in the order of the rows, is written where given.
template <class T>
void grouped_linear(const Experts<T>& op, const Assignments& rows, const int64_t* scatter_idx, bool activated, char* y, char* u);

// du [rows, outputs] = dy act'(u), dy read through an index where given.
template <class T>
void activation_backward(const Experts<T>& op, const char* dy, const int64_t* dy_index, const char* u, int64_t rows, char* du);

}  // namespace cmoe::cpu
