// soft_experts on the CPU.
//
//     u_e = x W1_e^T + b1_e      h_e = act(u_e)      y = sum_e gate_e (h_e W2_e^T + b2_e)
//
// Memory plan. x is packed once for all experts. The epilogue of the first product adds the bias, writes u where it is to be saved, and
// writes gate_e h_e straight into the panels of the second product, whose k runs over all experts' hidden units: the sum over experts
// happens in its accumulator, and no [T, E, O] exists. Scratch: x and gate h once, packed. Single linear experts are the same with h = x.
// The backward pass is that of experts_backward.cpp, with every token in every expert.

#include "experts.h"

namespace cmoe::cpu {

namespace {

// The gated input of the last layer, gate_e x, in the panels of the last product.
template <class T>
void gated_inputs(const Kernels<T>& kernels, const Experts<T>& op, const Gates<T>& gates, const PackedOperand<T>& into, int64_t threads) {
  const int64_t width = kernels.panel_width(into.side()), row = round_up(op.inputs, 16), conversion = conversion_bytes(kernels);
  const ThreadScratch scratch(threads, conversion + width * row * static_cast<int64_t>(sizeof(T)));
  parallel(threads, [&](int64_t thread) {
    T* const rows = reinterpret_cast<T*>(scratch[thread] + conversion);
    const Share share(into.panels() * op.experts, thread, threads);
    for (int64_t i = share.first; i < share.last; ++i) {
      const int64_t panel = i / op.experts, e = i % op.experts;
      for (int r = 0; r < into.in_panel(panel); ++r) {
        const int64_t token = panel * width + r;
        kernels.rows->load(op.type, op.x + token * op.inputs * size_of(op.type), rows + r * row, op.inputs);
        kernels.rows->scale(gates(token, e), rows + r * row, op.inputs);
      }
      into.write(panel, e, 0, op.inputs, rows, row, into.in_panel(panel), scratch[thread]);
    }
  });
}

}  // namespace

template <class T>
void soft_experts(const Experts<T>& op, const Gates<T>& gates, char* y, char* u) {
  const Kernels<T> kernels = forward_kernels<T>(op.type, op.tokens, op.w1, op.last());
  const RowFunctions<T>& f = *kernels.rows;
  const int64_t threads = thread_count(), value = size_of(op.type);
  const Weight& last = op.last();
  const Bias& last_bias = op.last_bias();
  const Blocking second = blocking(kernels, last.along_inputs(), op.outputs, op.tokens, threads);
  const PackedOperand<T> h(kernels, second.shared, op.tokens, op.experts, op.last_inputs());

  if (op.w2) {
    const Blocking first = blocking(kernels, op.w1.along_inputs(), op.hidden, op.tokens, threads);
    const PackedOperand<T> x(kernels, first.shared, op.tokens, 1, op.inputs);
    pack_operand(kernels, x, {rows_of<T>(op.x, op.type, op.inputs), true}, threads);
    const auto bias = [&](const ColumnBlock<T>& block) { op.b1.load(kernels, block.group, block.first, block.count, block.scratch); };
    const auto gated = [&](const ColumnBlock<T>& block, const FinishedRows<T>& done) {
      const int64_t e = block.group, n = block.count;
      for (int r = 0; r < done.used; ++r) {
        T* const row = done.row(r);
        const int64_t token = done.row0 + r;
        pre_activation(kernels, row, block.scratch, n);
        if (u) f.store(op.type, row, u + ((token * op.experts + e) * op.hidden + block.first) * value, n);
        f.activate(op.activation, row, row, n);
        f.scale(gates(token, e), row, n);
      }
      h.write(done.row0 / kernels.panel_width(first.shared), e, block.first, n, done.data, done.ld, done.used, block.conversion);
    };
    const auto weight = [&](int64_t e, int64_t) { return op.w1.outputs(e); };
    grouped_gemm(kernels, first, x, op.experts, op.hidden, weight, Epilogue{1, bias, gated}, threads);
  } else {
    gated_inputs(kernels, op, gates, h, threads);
  }

  const auto biases = [&](const ColumnBlock<T>& block) {
    for (int64_t e = 0; last_bias && e < op.experts; ++e)
      last_bias.load(kernels, e, block.first, block.count, block.scratch + e * block.count);
  };
  const auto store = [&](const ColumnBlock<T>& block, const FinishedRows<T>& done) {
    for (int r = 0; r < done.used; ++r) {
      T* const row = done.row(r);
      const int64_t token = done.row0 + r;
      for (int64_t e = 0; last_bias && e < op.experts; ++e) f.axpy(gates(token, e), block.scratch + e * block.count, row, block.count);
      f.store(op.type, row, y + (token * op.outputs + block.first) * value, block.count);
    }
  };
  const auto weight = [&](int64_t, int64_t e) { return last.outputs(e); };
  grouped_gemm(kernels, second, h, 1, op.outputs, weight, Epilogue{op.experts, biases, store}, threads);
}

template void soft_experts(const Experts<float>&, const Gates<float>&, char*, char*);
template void soft_experts(const Experts<double>&, const Gates<double>&, char*, char*);

}  // namespace cmoe::cpu
