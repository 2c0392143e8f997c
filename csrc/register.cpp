// Defines cmoe_native::<op> and binds the CPU's kernels to it; cuda/register.cpp binds the GPU's. Only
// cmoe_kernels/backends.py and ops/packed.py call these: the operations users meet are cmoe::<op>, whose schemas, fakes and autograd live
// in Python so that they exist without this library.

#include <Python.h>
#include <torch/csrc/stable/library.h>

#include <string>

#include "cpu/dispatch.h"
#include "cpu/ops.h"
#include "signatures.h"

namespace {

namespace cpu = cmoe::cpu;

struct Kernel {
  const char* name;
  void (*boxed)(StableIValue*, uint64_t, uint64_t);
};

constexpr Kernel kernels[] = {
    {"soft_gate", TORCH_BOX(&cpu::soft_gate)},
    {"soft_gate_backward", TORCH_BOX(&cpu::soft_gate_backward)},
    {"topk_gate", TORCH_BOX(&cpu::topk_gate)},
    {"topk_gate_backward", TORCH_BOX(&cpu::topk_gate_backward)},
    {"task_router", TORCH_BOX(&cpu::task_router)},
    {"task_router_backward", TORCH_BOX(&cpu::task_router_backward)},
    {"grouped_linear", TORCH_BOX(&cpu::grouped_linear)},
    {"grouped_linear_backward", TORCH_BOX(&cpu::grouped_linear_backward)},
    {"soft_experts", TORCH_BOX(&cpu::soft_experts)},
    {"soft_experts_backward", TORCH_BOX(&cpu::soft_experts_backward)},
    {"sparse_experts", TORCH_BOX(&cpu::sparse_experts)},
    {"sparse_experts_backward", TORCH_BOX(&cpu::sparse_experts_backward)},
    {"balance_loss", TORCH_BOX(&cpu::balance_loss)},
    {"balance_loss_backward", TORCH_BOX(&cpu::balance_loss_backward)},
    {"prepack", TORCH_BOX(&cpu::prepack)},
    {"packed_router_bias", TORCH_BOX(&cpu::packed_router_bias)},
    {"packed_router", TORCH_BOX(&cpu::packed_router)},
    {"packed_soft_experts", TORCH_BOX(&cpu::packed_soft_experts)},
    {"packed_sparse_experts", TORCH_BOX(&cpu::packed_sparse_experts)},
};

}  // namespace

STABLE_TORCH_LIBRARY(cmoe_native, m) {
  for (const cmoe::Signature& op : cmoe::signatures) m.def((std::string(op.name) + op.arguments).c_str());
}

STABLE_TORCH_LIBRARY_IMPL(cmoe_native, CPU, m) {
  for (const Kernel& kernel : kernels) m.impl(kernel.name, kernel.boxed);
}

namespace {

// The instruction set in use, all that could run here (best first), better ones that failed their self-test, and why none is in use (the
// last two are empty as a rule).
PyObject* instruction_sets(PyObject*, PyObject*) {
  return Py_BuildValue("(ssss)", cpu::isa_name(), cpu::isa_names().c_str(), cpu::isa_left_out().c_str(), cpu::isa_error().c_str());
}

// What the CUDA kernels were compiled for, and why there are none (one of the two is empty).
PyObject* cuda_kernels(PyObject*, PyObject*) { return Py_BuildValue("(ss)", CMOE_CUDA_BUILT, CMOE_CUDA_MISSING); }

}  // namespace

// torch.ops.load_library is what loads this file; as a module it tells the doctor what it runs on.
PyMODINIT_FUNC PyInit__C() {
  static PyMethodDef methods[] = {{"instruction_sets", instruction_sets, METH_NOARGS, nullptr},
                                  {"cuda_kernels", cuda_kernels, METH_NOARGS, nullptr},
                                  {nullptr, nullptr, 0, nullptr}};
  static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&definition);
}
