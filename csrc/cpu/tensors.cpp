#include "tensors.h"

#include "pool.h"

// Of torch 2.11 and newer; the library is made for 2.10 and looks whether it is there.
extern "C" [[gnu::weak, gnu::visibility("default")]] AOTITorchError torch_from_blob(
    void* data, int64_t ndim, const int64_t* sizes, const int64_t* strides, int64_t storage_offset, int32_t dtype, int32_t device_type,
    int32_t device_index, AtenTensorHandle* made, int32_t layout, const uint8_t* metadata, int64_t metadata_size,
    void (*deleter)(void* data, void* context), void* context);

namespace cmoe::cpu {

namespace {

int64_t bytes_of_value(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Double:
    case ScalarType::Long: return 8;
    case ScalarType::Float:
    case ScalarType::Int: return 4;
    case ScalarType::BFloat16:
    case ScalarType::Half: return 2;
    case ScalarType::Byte: return 1;
    default: return 0;
  }
}

}  // namespace

void require_instruction_set() {
  STD_TORCH_CHECK(isa_error().empty(), isa_error());
  [[maybe_unused]] static const bool warned = [] {
    const std::string text =
        "cmoe_kernels: CPU kernels run on " + std::string(isa_name()) + "; left out, failed the self-test: " + isa_left_out();
    if (!isa_left_out().empty()) aoti_torch_warn("require_instruction_set", "csrc/cpu/tensors.cpp", __LINE__, text.c_str());
    return true;
  }();
}

std::optional<Tensor> pooled_tensor(const std::vector<int64_t>& sizes, ScalarType dtype) {
  std::vector<int64_t> strides(sizes.size());
  int64_t numel = 1, bytes = 0;
  for (size_t d = sizes.size(); d-- > 0;) {
    strides[d] = numel;
    if (__builtin_mul_overflow(numel, sizes[d], &numel)) return std::nullopt;
  }
  if (__builtin_mul_overflow(numel, bytes_of_value(dtype), &bytes)) return std::nullopt;
  if (bytes < pooled || !torch_from_blob || !pool_serves()) return std::nullopt;
  const Block block = take(bytes);
  if (!block.data) return std::nullopt;
  // What the deleter gets is the block's size: no memory of its own.
  const auto done = [](void* data, void* context) { give_back({data, static_cast<int64_t>(reinterpret_cast<intptr_t>(context))}); };
  const int32_t type = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  AtenTensorHandle made;
  if (torch_from_blob(block.data, static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(), 0, type, aoti_torch_device_type_cpu(),
                      -1, &made, aoti_torch_layout_strided(), nullptr, 0, done,
                      reinterpret_cast<void*>(static_cast<intptr_t>(block.size)))) {
    give_back(block);
    return std::nullopt;
  }
  return Tensor(made);
}

}  // namespace cmoe::cpu
