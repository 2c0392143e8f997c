// How operations are registered. A file that binds some ends with a line for each of them:
//
//     CMOE_IMPLEMENT(CPU, soft_gate)
//
// Python owns the schemas (cmoe_kernels/ops/registration.py) and defines them after this library was loaded: the dispatcher takes the two in
// any order. It registers the operations that operations() lists, and a test compares their types with the schemas.
#pragma once

#include <torch/csrc/stable/library.h>

#include <string>
#include <tuple>
#include <type_traits>
#include <vector>

#include "tensors.h"

namespace cmoe {

// A line an operation: its device, its name, the types of its arguments and results as torch prints a schema's.
inline std::string& operations() {
  static std::string lines;
  return lines;
}

template <class T>
std::string type_name() {
  if constexpr (std::is_same_v<T, Tensor>)
    return "Tensor";
  else if constexpr (std::is_same_v<T, int64_t>)
    return "int";
  else if constexpr (std::is_same_v<T, double>)
    return "float";
  else if constexpr (std::is_same_v<T, bool>)
    return "bool";
  else if constexpr (std::is_same_v<T, OwnedString>)
    return "str";
  else if constexpr (std::is_same_v<T, std::vector<bool>>)
    return "List[bool]";
  else
    return "Optional[" + type_name<typename T::value_type>() + "]";
}

template <class... T>
std::string type_names(std::tuple<T...>*) {
  std::string names;
  ((names += (names.empty() ? "" : ", ") + type_name<T>()), ...);
  return names;
}

template <class Result, class... Arguments>
std::string types_of(Result (*)(Arguments...)) {
  std::string results;
  if constexpr (std::is_same_v<Result, Tensor>)
    results = type_name<Result>();
  else
    results = type_names(static_cast<Result*>(nullptr));
  return type_names(static_cast<std::tuple<Arguments...>*>(nullptr)) + " -> " + results;
}

}  // namespace cmoe

// Compiled with CMOE_EMULATE_CUDA, csrc/cuda makes a library of the tests: the same kernels, run on the CPU, as cmoe_emulated::<op>.
#ifdef CMOE_EMULATE_CUDA
#define CMOE_LIBRARY(device, m) STABLE_TORCH_LIBRARY_IMPL(cmoe_emulated, CPU, m)
#else
#define CMOE_LIBRARY(device, m) STABLE_TORCH_LIBRARY_IMPL(cmoe_native, device, m)
#endif

#define CMOE_IMPLEMENT(device, operation)                                                   \
  CMOE_LIBRARY(device, m) {                                                                 \
    m.impl(#operation, TORCH_BOX(&operation));                                              \
    cmoe::operations() += #device "; " #operation "; " + cmoe::types_of(&operation) + "\n"; \
  }
