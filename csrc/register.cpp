// Binds the kernels as cmoe_native::<op>. Only cmoe_kernels/backends.py calls these; the operations users meet are cmoe::<op>, whose
// schemas, fakes and autograd live in Python so that they exist without this library.

#include <Python.h>
#include <torch/csrc/stable/library.h>

#include <string>

#include "cpu/dispatch.h"
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
    {"task_router",
     "(Tensor? x, Tensor? task, Tensor w1, Tensor? b1, Tensor? w2, Tensor? b2, Tensor? group_ids, str activation, bool save) -> (Tensor, Tensor)",
     TORCH_BOX(&cpu::task_router)},
    {"task_router_backward",
     "(Tensor dlogits, Tensor? x, Tensor? task, Tensor w1, Tensor? b1, Tensor? w2, Tensor? b2, Tensor? group_ids, Tensor u, str activation, "
     "bool[] needs) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
     TORCH_BOX(&cpu::task_router_backward)},
    {"grouped_linear",
     "(Tensor x, Tensor w, Tensor? b, Tensor offsets, Tensor? gather_idx, int k, Tensor? scatter_idx, str? activation, bool save) -> (Tensor, Tensor)",
     TORCH_BOX(&cpu::grouped_linear)},
    {"grouped_linear_backward",
     "(Tensor dy, Tensor x, Tensor w, Tensor? b, Tensor offsets, Tensor? gather_idx, Tensor? scatter_idx, Tensor u, int k, str? activation, "
     "bool[] needs) -> (Tensor, Tensor, Tensor)",
     TORCH_BOX(&cpu::grouped_linear_backward)},
    {"soft_experts",
     "(Tensor x, Tensor gates, Tensor w1, Tensor? b1, Tensor? w2, Tensor? b2, Tensor? group_ids, str activation, bool save) -> (Tensor, Tensor)",
     TORCH_BOX(&cpu::soft_experts)},
    {"soft_experts_backward",
     "(Tensor dy, Tensor x, Tensor gates, Tensor w1, Tensor? b1, Tensor? w2, Tensor? b2, Tensor? group_ids, Tensor u, str activation, "
     "bool[] needs) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
     TORCH_BOX(&cpu::soft_experts_backward)},
    {"sparse_experts",
     "(Tensor x, Tensor? weights, Tensor indices, Tensor w1, Tensor? b1, Tensor? w2, Tensor? b2, Tensor? group_ids, str activation, bool gated, "
     "bool save) -> (Tensor, Tensor, Tensor, Tensor)",
     TORCH_BOX(&cpu::sparse_experts)},
    {"sparse_experts_backward",
     "(Tensor dy, Tensor x, Tensor? weights, Tensor indices, Tensor w1, Tensor? b1, Tensor? w2, Tensor? b2, Tensor? group_ids, Tensor u, "
     "Tensor gather_idx, Tensor offsets, str activation, bool gated, bool[] needs) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
     TORCH_BOX(&cpu::sparse_experts_backward)},
    {"balance_loss", "(Tensor scores, Tensor? indices, Tensor? mask, str kind, Tensor? segments, Tensor? counts, Tensor? total) -> Tensor",
     TORCH_BOX(&cpu::balance_loss)},
    {"balance_loss_backward",
     "(Tensor dloss, Tensor scores, Tensor? indices, Tensor? mask, str kind, Tensor? segments, Tensor? counts, Tensor? total) -> Tensor",
     TORCH_BOX(&cpu::balance_loss_backward)},
    {"prepack", "(Tensor w, Tensor like) -> Tensor", TORCH_BOX(&cpu::prepack)},
    {"packed_router_bias", "(Tensor task, Tensor w1, Tensor? b1) -> Tensor", TORCH_BOX(&cpu::packed_router_bias)},
    {"packed_router", "(Tensor x, Tensor bias, Tensor w1, Tensor? w2, Tensor? b2, Tensor? group_ids, str activation) -> Tensor",
     TORCH_BOX(&cpu::packed_router)},
    {"packed_soft_experts",
     "(Tensor x, Tensor gates, Tensor w1, Tensor? b1, Tensor? w2, Tensor? b2, Tensor? group_ids, str activation, int hidden, int outputs) -> Tensor",
     TORCH_BOX(&cpu::packed_soft_experts)},
    {"packed_sparse_experts",
     "(Tensor x, Tensor? weights, Tensor indices, Tensor w1, Tensor? b1, Tensor? w2, Tensor? b2, Tensor? group_ids, str activation, "
     "int experts, int hidden, int outputs) -> Tensor",
     TORCH_BOX(&cpu::packed_sparse_experts)},
};

}  // namespace

STABLE_TORCH_LIBRARY(cmoe_native, m) {
  for (const Operation& op : operations) m.def((std::string(op.name) + op.signature).c_str());
}

STABLE_TORCH_LIBRARY_IMPL(cmoe_native, CPU, m) {
  for (const Operation& op : operations) m.impl(op.name, op.cpu);
}

namespace {

// The instruction set in use, all that could run here (best first), and why none is in use (empty as a rule).
PyObject* instruction_sets(PyObject*, PyObject*) { return Py_BuildValue("(sss)", cpu::isa_name(), cpu::isa_names().c_str(), cpu::isa_error().c_str()); }

}  // namespace

// torch.ops.load_library is what loads this file; as a module it tells the doctor what it runs on.
PyMODINIT_FUNC PyInit__C() {
  static PyMethodDef methods[] = {{"instruction_sets", instruction_sets, METH_NOARGS, nullptr}, {nullptr, nullptr, 0, nullptr}};
  static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&definition);
}
