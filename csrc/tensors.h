// Tensors as the operations of both devices take and return them: strings, checks of shapes, outputs.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "types.h"

namespace cmoe {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// A string argument, owned by the callee. torch's own conversion to std::string (2.10 to 2.13) leaks one string per call.
using OwnedString = StringHandle;

inline std::string consume_string(OwnedString handle) {
  const char* text = nullptr;
  size_t length = 0;
  TORCH_ERROR_CODE_CHECK(torch_string_c_str(handle, &text));
  TORCH_ERROR_CODE_CHECK(torch_string_length(handle, &length));
  const std::string value(text, length);
  TORCH_ERROR_CODE_CHECK(torch_delete_string(handle));
  return value;
}

inline Activation activation_of(OwnedString handle) {
  const std::string name = consume_string(handle);
  if (name == "gelu") return Activation::gelu;
  if (name == "gelu_tanh") return Activation::gelu_tanh;
  if (name == "silu") return Activation::silu;
  if (name == "relu") return Activation::relu;
  STD_TORCH_CHECK(name == "relu2", "activation is '", name, "', must be one of gelu, gelu_tanh, silu, relu, relu2");
  return Activation::relu2;
}

inline Activation activation_of(const std::optional<OwnedString>& handle) { return handle ? activation_of(*handle) : Activation::none; }

inline std::string shape(const Tensor& t) {
  std::string text = "(";
  for (int64_t d = 0; d < t.dim(); ++d) text += (d ? ", " : "") + std::to_string(t.size(d));
  return text + ")";
}

inline void require_2d(const char* name, const Tensor& t, const char* letters) {
  STD_TORCH_CHECK(t.dim() == 2, name, " must have the dimensions ", letters, ", got shape ", shape(t));
}

inline void require_shape(const char* name, const Tensor& t, int64_t rows, int64_t columns, const char* like) {
  STD_TORCH_CHECK(t.dim() == 2 && t.size(0) == rows && t.size(1) == columns, name, " has shape ", shape(t), ", must be (", rows, ", ",
                  columns, ") like ", like);
}

inline std::vector<int64_t> sizes_of(const Tensor& t) {
  std::vector<int64_t> sizes;
  for (int64_t d = 0; d < t.dim(); ++d) sizes.push_back(t.size(d));
  return sizes;
}

// For a gradient that was not requested or a tensor that was not saved.
inline Tensor empty_placeholder(const Tensor& like) { return torch::stable::new_empty(like, {0}, ScalarType::Float); }

// A contiguous copy where the tensor is given and has gaps.
inline std::optional<Tensor> contiguous_or_null(const std::optional<Tensor>& t) {
  return t ? std::optional<Tensor>(torch::stable::contiguous(*t)) : std::nullopt;
}

}  // namespace cmoe
