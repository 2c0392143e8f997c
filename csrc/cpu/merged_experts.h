// soft_experts on the CPU where its gates merge the experts.
#pragma once

#include <numeric>

#include "experts.h"

namespace cmoe::cpu {

// Single linear experts whose gates have fewer rows than there are tokens become one linear layer per row of gates: W_g = sum_e gates[g, e]
// W_e. W_e must lie along its inputs.
template <class T>
struct Merged {
  Experts<T> op;
  const Gates<T>& gates;
  Array<char> w;  // [groups, outputs, inputs]
  Array<T> b;     // [groups, outputs]
  Array<int64_t> order;
  std::vector<int32_t> offsets;

  Merged(const Experts<T>& experts, const Gates<T>& g)
      : op(experts), gates(g), w(g.rows * op.outputs * op.inputs * size_of(op.type)), b(op.b1 ? g.rows * op.outputs : 0), order(op.tokens),
        offsets(g.rows + 1, 0) {
    for (int64_t t = 0; t < op.tokens; ++t) ++offsets[gates.row(t) + 1];
    std::partial_sum(offsets.begin(), offsets.end(), offsets.begin());
    std::vector<int32_t> at = offsets;
    for (int64_t t = 0; t < op.tokens; ++t) order[at[gates.row(t)]++] = t;

    const Kernels<T> kernels = kernels_for<T>(op.type);
    const int64_t threads = thread_count();
    const Array<T> scratch(threads * 2 * op.inputs);
    parallel(threads, [&](int64_t thread) {
      T *const sum = scratch.get() + thread * 2 * op.inputs, *const row = sum + op.inputs;
      const Share share(gates.rows * op.outputs, thread, threads);
      for (int64_t i = share.first; i < share.last; ++i) {
        const int64_t g = i / op.outputs, o = i % op.outputs;
        std::fill(sum, sum + op.inputs, T(0));
        for (int64_t e = 0; e < op.experts; ++e) {
          kernels.rows->load(op.w1.type, op.w1.matrix(e).row(o), row, op.inputs);
          kernels.rows->axpy(gates.data[g * op.experts + e], row, sum, op.inputs);
        }
        kernels.rows->store(op.type, sum, w.get() + i * op.inputs * size_of(op.type), op.inputs);
      }
    });
    if (op.b1) {
      const Array<T> row(op.outputs);
      for (int64_t g = 0; g < gates.rows; ++g) {
        std::fill(b.get() + g * op.outputs, b.get() + (g + 1) * op.outputs, T(0));
        for (int64_t e = 0; e < op.experts; ++e) {
          op.b1.load(kernels, e, 0, op.outputs, row.get());
          kernels.rows->axpy(gates.data[g * op.experts + e], row.get(), b.get() + g * op.outputs, op.outputs);
        }
      }
    }
  }

  // The layers of the groups, as experts.
  Experts<T> layers() const {
    Experts<T> merged = op;
    merged.experts = gates.rows;
    merged.w1 = {w.get(), op.type, op.outputs * op.inputs, op.inputs, 1};
    merged.b1 = op.b1 ? Bias{reinterpret_cast<const char*>(b.get()), sizeof(T) == 8 ? Type::f64 : Type::f32, op.outputs} : Bias{};
    return merged;
  }

  void backward(const char* dy, char* dx, T* dgates, const Gradient& dw, const Gradient& db) const {
    const Kernels<T> kernels = kernels_for<T>(op.type);
    const int64_t threads = thread_count(), groups = gates.rows;
    const bool weights = dgates || dw || db;
    const Type exact = sizeof(T) == 8 ? Type::f64 : Type::f32;
    const Array<T> dmerged(weights ? groups * op.outputs * op.inputs : 0), dbias(weights && op.b1 ? groups * op.outputs : 0);
    ExpertsBackward<T> grads{};
    grads.offsets = offsets.data();
    grads.index = grads.dy_index = order.get();
    grads.divisor = grads.dy_divisor = 1;
    grads.dy = dy;
    grads.dx = dx;
    if (weights) grads.dw1 = {reinterpret_cast<char*>(dmerged.get()), exact};
    if (dbias.size()) grads.db1 = {reinterpret_cast<char*>(dbias.get()), exact};
    experts_backward(layers(), grads);
    if (!weights) return;

    // What a merged layer gets is shared out to its experts by their gates.
    const Array<T> scratch(threads * 2 * op.inputs), dots(threads * groups * op.experts);
    parallel(threads, [&](int64_t thread) {
      T *const sum = scratch.get() + thread * 2 * op.inputs, *const row = sum + op.inputs,
               *const dot = dots.get() + thread * groups * op.experts;
      std::fill(dot, dot + groups * op.experts, T(0));
      const Share share(op.outputs, thread, threads);
      for (int64_t o = share.first; o < share.last; ++o)
        for (int64_t e = 0; e < op.experts; ++e) {
          if (dw) {
            std::fill(sum, sum + op.inputs, T(0));
            for (int64_t g = 0; g < groups; ++g)
              kernels.rows->axpy(gates.data[g * op.experts + e], dmerged.get() + (g * op.outputs + o) * op.inputs, sum, op.inputs);
            dw.store(kernels, (e * op.outputs + o) * op.inputs, sum, op.inputs);
          }
          if (dgates) {
            kernels.rows->load(op.w1.type, op.w1.matrix(e).row(o), row, op.inputs);
            for (int64_t g = 0; g < groups; ++g)
              dot[g * op.experts + e] += kernels.rows->dot(dmerged.get() + (g * op.outputs + o) * op.inputs, row, op.inputs);
          }
        }
    });
    const Array<T> row(op.outputs), sum(op.outputs);
    for (int64_t e = 0; e < op.experts; ++e) {
      if (op.b1) op.b1.load(kernels, e, 0, op.outputs, row.get());
      std::fill(sum.get(), sum.get() + op.outputs, T(0));
      for (int64_t g = 0; g < groups; ++g) {
        if (dgates) {
          T total = op.b1 ? kernels.rows->dot(dbias.get() + g * op.outputs, row.get(), op.outputs) : T(0);
          for (int64_t thread = 0; thread < threads; ++thread) total += dots[(thread * groups + g) * op.experts + e];
          dgates[g * op.experts + e] = total;
        }
        if (db) kernels.rows->axpy(gates.data[g * op.experts + e], dbias.get() + g * op.outputs, sum.get(), op.outputs);
      }
      if (db) db.store(kernels, e * op.outputs, sum.get(), op.outputs);
    }
  }
};

}  // namespace cmoe::cpu
