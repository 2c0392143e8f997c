// Internals of the CPU kernels for pytest (test_internals.py), which builds this module where it needs it; no wheel has it.

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cstring>
#include <map>
#include <stdexcept>
#include <string>
#include <vector>

#include "gemm/isa.h"
#include "memory.h"
#include "pool.h"
#include "self_test.h"
#include "threads.h"

namespace cmoe::cpu {

namespace {

namespace py = pybind11;

const Isa& tier(const std::string& name) {
  static const Isa* const built[] = {
      &isa_generic,
#ifdef CMOE_HAS_AVX2
      &isa_avx2,
#endif
#ifdef CMOE_HAS_AVX_VNNI
      &isa_avx_vnni,
#endif
#ifdef CMOE_HAS_AVX512
      &isa_avx512,
#endif
#ifdef CMOE_HAS_AVX512_VNNI
      &isa_avx512_vnni,
#endif
#ifdef CMOE_HAS_AVX512_BF16
      &isa_avx512_bf16,
#endif
#ifdef CMOE_HAS_AMX
      &isa_amx,
#endif
  };
  for (const Isa* const isa : built)
    if (name == isa->name) return *isa;
  throw std::invalid_argument(name + " was not built");
}

Type type_of(const std::string& name) {
  static const std::map<std::string, Type> types{{"float32", Type::f32}, {"bfloat16", Type::bf16}, {"float16", Type::f16}};
  return types.at(name);
}

// One kernel of a tier; values of bf16 are uint16 in Python.
struct Kernel {
  const Microkernel* gemm;

  Kernel(const std::string& of, const std::string& type) : gemm(type == "float32" ? tier(of).f32 : tier(of).bf16) {
    if (!gemm) throw std::invalid_argument(of + " multiplies " + type + " as fp32");
  }

  int width(int side) const { return side ? gemm->nr : gemm->mr; }
  int64_t padded(int64_t k) const { return round_up(k, gemm->k_step); }
  int64_t element() const { return size_of(gemm->panel); }

  // The panel of `matrix`: [lanes, k], or with lanes along memory [k, lanes]. Where a kernel pads, poison was before.
  py::bytes pack(int side, const py::array& matrix, bool along_lanes) const {
    const int64_t lanes = matrix.shape(along_lanes ? 1 : 0), k = matrix.shape(along_lanes ? 0 : 1);
    if (lanes > width(side) || matrix.itemsize() != element()) throw std::invalid_argument("more lanes than a panel, or another type");
    const Buffer panel(padded(k) * width(side) * element());
    std::memset(panel.get(), gemm->row_major[side] ? 0 : 0xa5, padded(k) * width(side) * element());
    std::vector<const void*> rows;
    for (int64_t i = 0; i < matrix.shape(0); ++i) rows.push_back(static_cast<const char*>(matrix.data()) + i * matrix.strides(0));
    if (along_lanes)
      gemm->pack_columns[side](rows.data(), lanes, 0, k, panel.get(), 0);
    else
      gemm->pack_rows[side](rows.data(), static_cast<int>(lanes), k, panel.get());
    return py::bytes(panel.get(), padded(k) * width(side) * element());
  }

  // The block of sums [mr, nr] of two panels, with A resident (0) or B; `times` times, the first without adding.
  py::array_t<float> multiply(const std::string& a, const std::string& b, int64_t k, int used, int resident, int times) const {
    const Buffer left(a.size()), right(b.size()), block(gemm->mr * gemm->nr * 4);
    std::memcpy(left.get(), a.data(), a.size());
    std::memcpy(right.get(), b.data(), b.size());
    const int64_t stride = (gemm->row_major[0] ? padded(k) : gemm->k_step) * element();
    if (gemm->begin) gemm->begin();
    for (int i = 0; i < times; ++i) gemm->multiply[resident](left.get(), stride, right.get(), block.get(), padded(k), used, i > 0, {});
    if (gemm->end) gemm->end();
    py::array_t<float> sums({gemm->mr, gemm->nr});
    std::memcpy(sums.mutable_data(), block.get(), gemm->mr * gemm->nr * 4);
    return sums;
  }
};

py::array convert(const std::string& of, const std::string& from, const py::array& values, const std::string& to) {
  const int64_t n = values.size();
  py::array result(py::dtype(to == "float32" ? "float32" : "uint16"), n);
  tier(of).convert(type_of(from), values.data(), type_of(to), result.mutable_data(), n);
  return result;
}

// f(u), and by the function of the backward pass f(u) and f'(u).
py::tuple activate(const std::string& of, int activation, const py::array_t<float>& u) {
  const int64_t n = u.size();
  py::array_t<float> h(n), again(n), slope(n);
  tier(of).rows->activate(static_cast<Activation>(activation), u.data(), h.mutable_data(), n);
  tier(of).rows->activate_backward(static_cast<Activation>(activation), u.data(), again.mutable_data(), slope.mutable_data(), n);
  return py::make_tuple(h, again, slope);
}

PYBIND11_MODULE(internals, m) {
  py::class_<Kernel>(m, "Kernel")
      .def(py::init<const std::string&, const std::string&>())
      .def("width", &Kernel::width)
      .def("padded", &Kernel::padded)
      .def("pack", &Kernel::pack)
      .def("multiply", &Kernel::multiply)
      .def_property_readonly("element", &Kernel::element)
      .def_property_readonly("k_step", [](const Kernel& k) { return k.gemm->k_step; })
      .def_property_readonly("row_major", [](const Kernel& k) { return std::vector<bool>{k.gemm->row_major[0], k.gemm->row_major[1]}; });
  m.def("convert", &convert);
  m.def("activate", &activate);
  m.def("self_test", [](const std::string& of) { return self_test(tier(of)); });
  m.def("pool_serves", &pool_serves);
  m.def("take", [](int64_t bytes) {
    const Block block = take(bytes);
    return py::make_tuple(reinterpret_cast<uintptr_t>(block.data), block.size);
  });
  m.def("give_back", [](uintptr_t data, int64_t size) { give_back({reinterpret_cast<void*>(data), size}); });
  m.def("share", [](int64_t n, int64_t i, int64_t threads) {
    const Share share(n, i, threads);
    return py::make_tuple(share.first, share.last);
  });
}

}  // namespace
}  // namespace cmoe::cpu
