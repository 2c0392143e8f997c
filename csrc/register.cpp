// The module cmoe_kernels._C: what the library holds and what it runs on. torch.ops.load_library loads it, and each file that binds
// operations registers them (registration.h).

#include <Python.h>

#include "cpu/dispatch.h"
#include "registration.h"

namespace cpu = cmoe::cpu;

namespace {

// The instruction set in use, all that could run here (best first), better ones that failed their self-test, and why none is in use (the
// last two are empty as a rule).
PyObject* instruction_sets(PyObject*, PyObject*) {
  return Py_BuildValue("(ssss)", cpu::isa_name(), cpu::isa_names().c_str(), cpu::isa_left_out().c_str(), cpu::isa_error().c_str());
}

// How int8 weights are read: outputs of a panel, inputs of an output that lie together, what inputs are padded to a multiple of; and
// whether there are products of int8.
PyObject* int8_kernels(PyObject*, PyObject*) {
  const cpu::Int8Layout layout = cpu::int8_layout();
  return Py_BuildValue("(iiii)", layout.lanes, layout.step, layout.depth, layout.products);
}

// What the CUDA kernels were compiled for, and why there are none (one of the two is empty).
PyObject* cuda_kernels(PyObject*, PyObject*) { return Py_BuildValue("(ss)", CMOE_CUDA_BUILT, CMOE_CUDA_MISSING); }

// A line an operation: device; name; types.
PyObject* operations(PyObject*, PyObject*) { return PyUnicode_FromString(cmoe::operations().c_str()); }

}  // namespace

PyMODINIT_FUNC PyInit__C() {
  static PyMethodDef methods[] = {{"instruction_sets", instruction_sets, METH_NOARGS, nullptr},
                                  {"int8_kernels", int8_kernels, METH_NOARGS, nullptr},
                                  {"cuda_kernels", cuda_kernels, METH_NOARGS, nullptr},
                                  {"operations", operations, METH_NOARGS, nullptr},
                                  {nullptr, nullptr, 0, nullptr}};
  static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&definition);
}
