// From tensors to what the launchers take.
#pragma once

#include <torch/csrc/stable/accelerator.h>

#include "../tensors.h"
#include "device/stream.h"
#include "matrix.h"

#ifndef CMOE_EMULATE_CUDA
// In libtorch_cuda alone; null under a torch without CUDA, where nothing calls a CUDA kernel.
extern "C" __attribute__((weak)) int32_t aoti_torch_get_current_cuda_stream(int32_t device, void** stream);
#endif

namespace cmoe::cuda {

// Makes a tensor's device the current one, and names the stream that torch works on there.
class OnDevice {
 public:
#ifdef CMOE_EMULATE_CUDA
  explicit OnDevice(const Tensor&) {}
#else
  explicit OnDevice(const Tensor& t) : guard_(t.get_device_index()) {
    STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream != nullptr, "this torch was built without CUDA");
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream));
  }
#endif
  Stream stream = nullptr;

#ifndef CMOE_EMULATE_CUDA
 private:
  torch::stable::accelerator::DeviceGuard guard_;
#endif
};

inline Type type_of(const char* name, const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return Type::f32;
    case ScalarType::BFloat16: return Type::bf16;
    case ScalarType::Half: return Type::f16;
    default:
      STD_TORCH_CHECK(false, name, " must be float32, bfloat16 or float16 for the CUDA kernels, got ",
                      torch::headeronly::toString(t.scalar_type()));
  }
}

inline Matrix matrix(const char* name, const Tensor& t) { return {t.const_data_ptr(), type_of(name, t), t.stride(0), t.stride(1)}; }

// Also fp64, where values are compared and nothing is computed.
inline Matrix any_matrix(const char* name, const Tensor& t) {
  return {t.const_data_ptr(), t.scalar_type() == ScalarType::Double ? Type::f64 : type_of(name, t), t.stride(0), t.stride(1)};
}

inline Indices index_matrix(const char* name, const Tensor& t) {
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Long && t.dim() == 2, name, " must be int64 with two dimensions, got shape ", shape(t));
  return {static_cast<const int64_t*>(t.const_data_ptr()), t.stride(0), t.stride(1)};
}

template <class T>
T* data(Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}

}  // namespace cmoe::cuda
