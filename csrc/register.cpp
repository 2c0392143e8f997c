// Binds the kernels as cmoe_native::<op>. Only cmoe_kernels/backends.py calls these; the operations users meet are cmoe::<op>, whose
// schemas, fakes and autograd live in Python so that they exist without this library.

#include <Python.h>
#include <torch/csrc/stable/library.h>

#include <string>

#include "cpu/ops.h"

namespace {

struct Operation {
  const char* name;
  const char* signature;
  void (*cpu)(StableIValue*, uint64_t, uint64_t);
};

namespace cpu = cmoe::cpu;

constexpr Operation operations[] = {
    {"soft_gate", "(Tensor logits) -> Tensor", TORCH_BOX(&cpu::soft_gate)},
    {"soft_gate_backward", "(Tensor dgates, Tensor logits) -> Tensor", TORCH_BOX(&cpu::soft_gate_backward)},
    {"topk_gate", "(Tensor logits, int k, str score, bool renormalize, float scale, Tensor? selection) -> (Tensor, Tensor, Tensor)",
     TORCH_BOX(&cpu::topk_gate)},
    {"topk_gate_backward", "(Tensor dweights, Tensor logits, Tensor indices, str score, bool renormalize, float scale) -> Tensor",
     TORCH_BOX(&cpu::topk_gate_backward)},
};

}  // namespace

STABLE_TORCH_LIBRARY(cmoe_native, m) {
  for (const Operation& op : operations) m.def((std::string(op.name) + op.signature).c_str());
}

STABLE_TORCH_LIBRARY_IMPL(cmoe_native, CPU, m) {
  for (const Operation& op : operations) m.impl(op.name, op.cpu);
}

// torch.ops.load_library is what loads this file; an empty module lets Python import it too, as it may do with any extension module.
PyMODINIT_FUNC PyInit__C() {
  static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&definition);
}
