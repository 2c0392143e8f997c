// Matrices with strides, as the launchers take them from the bindings and hand them to the kernels: no torch, no CUDA.
#pragma once

#include <cstdint>

#include "../types.h"

namespace cmoe::cuda {

using cmoe::Activation, cmoe::Type, cmoe::size_of;

// Read through its strides, zero among them: an expanded gradient is never copied out.
struct Matrix {
  const void* data = nullptr;
  Type type = Type::f32;
  int64_t row = 0, column = 0;  // strides, in elements
};

// int64 [rows, columns], likewise.
struct Indices {
  const int64_t* data = nullptr;
  int64_t row = 0, column = 0;
};

}  // namespace cmoe::cuda
