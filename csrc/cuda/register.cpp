// Binds the GPU's kernels as cmoe_native::<op>. Compiled with CMOE_EMULATE_CUDA, for the tests, it makes a library of its own: the same
// kernels, run on the CPU, as cmoe_emulated::<op>.

#include <torch/csrc/stable/library.h>

#include <string>

#include "../signatures.h"
#include "ops.h"

namespace {

namespace cuda = cmoe::cuda;

struct Kernel {
  const char* name;
  void (*boxed)(StableIValue*, uint64_t, uint64_t);
};

constexpr Kernel kernels[] = {
    {"soft_gate", TORCH_BOX(&cuda::soft_gate)},           {"soft_gate_backward", TORCH_BOX(&cuda::soft_gate_backward)},
    {"topk_gate", TORCH_BOX(&cuda::topk_gate)},           {"topk_gate_backward", TORCH_BOX(&cuda::topk_gate_backward)},
    {"task_router", TORCH_BOX(&cuda::task_router)},       {"task_router_backward", TORCH_BOX(&cuda::task_router_backward)},
    {"grouped_linear", TORCH_BOX(&cuda::grouped_linear)}, {"grouped_linear_backward", TORCH_BOX(&cuda::grouped_linear_backward)},
    {"soft_experts", TORCH_BOX(&cuda::soft_experts)},     {"soft_experts_backward", TORCH_BOX(&cuda::soft_experts_backward)},
    {"sparse_experts", TORCH_BOX(&cuda::sparse_experts)}, {"sparse_experts_backward", TORCH_BOX(&cuda::sparse_experts_backward)},
    {"balance_loss", TORCH_BOX(&cuda::balance_loss)},     {"balance_loss_backward", TORCH_BOX(&cuda::balance_loss_backward)},
};

}  // namespace

#ifdef CMOE_EMULATE_CUDA
STABLE_TORCH_LIBRARY(cmoe_emulated, m) {
  for (const Kernel& kernel : kernels)
    for (const cmoe::Signature& op : cmoe::signatures)
      if (op.name == std::string(kernel.name)) m.def((std::string(op.name) + op.arguments).c_str());
}

STABLE_TORCH_LIBRARY_IMPL(cmoe_emulated, CPU, m) {
  for (const Kernel& kernel : kernels) m.impl(kernel.name, kernel.boxed);
}
#else
STABLE_TORCH_LIBRARY_IMPL(cmoe_native, CUDA, m) {
  for (const Kernel& kernel : kernels) m.impl(kernel.name, kernel.boxed);
}
#endif
