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
  const int64_t threads = thread_count(), value = size_of(op.type);
  const Weight& last = op.last();
  const Bias& last_bias = op.last_bias();
  const Blocking second = blocking(kernels, last.along_inputs(), op.outputs, op.tokens, threads);
  const PackedOperand<T> h(kernels, second.shared, op.tokens, op.experts, op.last_inputs());

  if (op.w2) {
    const Blocking first = blocking(kernels, op.w1.along_inputs(), op.hidden, op.tokens, threads);
    const PackedOperand<T> x(kernels, first.shared, op.tokens, 1, op.inputs);
    pack_operand(kernels, x, {rows_of<T>(op.x, op.type, op.inputs), true}, threads);
    const ThreadScratch scratch(threads, first.bytes() + first.row_ld * static_cast<int64_t>(sizeof(T)));
    parallel(threads, [&](int64_t thread) {
      T* const bias = reinterpret_cast<T*>(scratch[thread] + first.bytes());
      char* const conversion = scratch[thread] + first.outer_bytes + first.block_bytes + first.row_bytes;
      blocks_of(kernels, first, op.experts, op.hidden, thread, threads, [&](int64_t e, const OuterRange& lanes) {
        op.b1.load(kernels, e, lanes.first, lanes.count, bias);
        grouped_gemm_block(
            kernels, first, x, [&](int64_t) { return op.w1.outputs(e); }, lanes, scratch[thread],
            [&](T* rows, int64_t ld, int64_t token0, int used, int64_t n) {
              for (int r = 0; r < used; ++r) {
                T* const row = rows + r * ld;
                const int64_t token = token0 + r;
                pre_activation(kernels, row, bias, n);
                if (u) kernels.rows->store(op.type, row, u + ((token * op.experts + e) * op.hidden + lanes.first) * value, n);
                kernels.rows->activate(op.activation, row, row, n);
                kernels.rows->scale(gates(token, e), row, n);
              }
              h.write(token0 / kernels.panel_width(first.shared), e, lanes.first, n, rows, ld, used, conversion);
            });
      });
    });
  } else {
    gated_inputs(kernels, op, gates, h, threads);
  }

  const ThreadScratch scratch(threads, second.bytes() + op.experts * second.row_ld * static_cast<int64_t>(sizeof(T)));
  parallel(threads, [&](int64_t thread) {
    T* const bias = reinterpret_cast<T*>(scratch[thread] + second.bytes());
    blocks_of(kernels, second, 1, op.outputs, thread, threads, [&](int64_t, const OuterRange& lanes) {
      if (last_bias)
        for (int64_t e = 0; e < op.experts; ++e) last_bias.load(kernels, e, lanes.first, lanes.count, bias + e * lanes.count);
      grouped_gemm_block(
          kernels, second, h, [&](int64_t e) { return last.outputs(e); }, lanes, scratch[thread],
          [&](T* rows, int64_t ld, int64_t token0, int used, int64_t n) {
            for (int r = 0; r < used; ++r) {
              T* const row = rows + r * ld;
              if (last_bias)
                for (int64_t e = 0; e < op.experts; ++e) kernels.rows->axpy(gates(token0 + r, e), bias + e * n, row, n);
              kernels.rows->store(op.type, row, y + ((token0 + r) * op.outputs + lanes.first) * value, n);
            }
          });
    });
  });
}

template void soft_experts(const Experts<float>&, const Gates<float>&, char*, char*);
template void soft_experts(const Experts<double>&, const Gates<double>&, char*, char*);

}  // namespace cmoe::cpu
