// grouped_linear on the CPU: one product per expert over its rows of x, gathered while they are packed; the epilogue adds the bias, writes
// the pre-activation where it is to be saved, and stores the row where it belongs. Scratch: the packed rows of one expert.
// The backward pass is that of experts_backward.cpp for single linear layers.

#include "grouped_linear.h"

namespace cmoe::cpu {

template <class T>
void grouped_linear(const Experts<T>& op, const Assignments& rows, const int64_t* scatter_idx, bool activated, char* y, char* u) {
  const int64_t threads = thread_count(), value = size_of(op.type);
  for (int64_t e = 0; e < op.experts; ++e) {
    const int64_t first = rows.offsets[e], n = rows.offsets[e + 1] - first;
    if (n == 0) continue;
    const Kernels<T> kernels = forward_kernels<T>(op.type, n, op.w1, op.w1);
    const RowFunctions<T>& f = *kernels.rows;
    const auto bias = [&](const ColumnBlock<T>& block) { op.b1.load(kernels, e, block.first, block.count, block.scratch); };
    const auto store = [&](const ColumnBlock<T>& block, const FinishedRows<T>& done) {
      for (int r = 0; r < done.used; ++r) {
        T* const row = done.row(r);
        const int64_t i = first + done.row0 + r;
        if (activated) {
          pre_activation(kernels, row, block.scratch, block.count);
          if (u) f.store(op.type, row, u + (i * op.outputs + block.first) * value, block.count);
          f.activate(op.activation, row, row, block.count);
        } else {
          f.add(block.scratch, row, block.count);
        }
        f.store(op.type, row, y + ((scatter_idx ? scatter_idx[i] : i) * op.outputs + block.first) * value, block.count);
      }
    };
    const Matrix x = rows_of<T>(op.x, op.type, op.inputs, rows.index + first, rows.divisor);
    grouped_gemm(kernels, x, n, op.inputs, op.w1.outputs(e), op.outputs, Epilogue{1, bias, store}, threads);
  }
}

template <class T>
void activation_backward(const Experts<T>& op, const char* dy, const int64_t* dy_index, const char* u, int64_t rows, char* du) {
  const Kernels<T> kernels = kernels_for<T>(op.type);
  const RowFunctions<T>& f = *kernels.rows;
  const int64_t threads = thread_count(), row_bytes = op.outputs * size_of(op.type);
  const Array<T> buffers(threads * 4 * op.outputs);
  parallel(threads, [&](int64_t thread) {
    const Share share(rows, thread, threads);
    T *const pre = buffers.get() + thread * 4 * op.outputs, *const h = pre + op.outputs, *const slope = h + op.outputs,
             *const row = slope + op.outputs;
    for (int64_t i = share.first; i < share.last; ++i) {
      f.load(op.type, u + i * row_bytes, pre, op.outputs);
      f.activate_backward(op.activation, pre, h, slope, op.outputs);
      f.load(op.type, dy + (dy_index ? dy_index[i] : i) * row_bytes, row, op.outputs);
      f.multiply(slope, row, op.outputs);
      f.store(op.type, row, du + i * row_bytes, op.outputs);
    }
  });
}

template void grouped_linear(const Experts<float>&, const Assignments&, const int64_t*, bool, char*, char*);
template void grouped_linear(const Experts<double>&, const Assignments&, const int64_t*, bool, char*, char*);
template void activation_backward(const Experts<float>&, const char*, const int64_t*, const char*, int64_t, char*);
template void activation_backward(const Experts<double>&, const char*, const int64_t*, const char*, int64_t, char*);

}  // namespace cmoe::cpu
