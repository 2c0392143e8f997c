// sparse_experts on the CPU.
//
//     y[t] = sum over the rows i of token t of weight_i (W2_e h_i + b2_e),   h_i = act(W1_e x[t] + b1_e)   (gated: act(gate) up)
//
// Memory plan. Rows are sorted by expert; each expert's rows of x are packed once, straight out of x: no gathered copy. The epilogue of the
// first product writes u where it is to be saved and h into the panels of the second product, whose epilogue adds the weighted row to an
// fp32 y [T, O]. A thread has the same columns of y for all experts and takes them in order, so a token's rows are added in the order
// of their experts, without locks. Columns are shared out by the widest panels: experts of few rows have kernels with narrower ones.
// Scratch: the packed rows of x and of h, and y in fp32.

#include <memory>
#include <vector>

#include "experts.h"

namespace cmoe::cpu {

template <class T>
void sparse_experts(const Experts<T>& op, const Assignments& rows, const T* routing_weights, char* y, char* u) {
  const RowFunctions<T>& f = *kernels_for<T>(op.type).rows;
  const int64_t threads = thread_count(), value = size_of(op.type), size = sizeof(T);
  const Weight& last = op.last();

  struct Expert {
    int64_t e, first, n;
    Kernels<T> kernels;
    Blocking in, out;
    std::unique_ptr<PackedOperand<T>> x, h;
  };
  std::vector<Expert> active;
  int64_t bytes = 0, row_ld = 0, widest = 1;
  for (int64_t e = 0; e < op.experts; ++e) {
    const int64_t first = rows.offsets[e], n = rows.offsets[e + 1] - first;
    if (n == 0) continue;
    const Kernels<T> kernels = forward_kernels<T>(op.type, n, op.w1, last);
    Expert a{e,
             first,
             n,
             kernels,
             blocking(kernels, op.w1.along_inputs(), op.first_outputs(), n, threads, op.gated ? 2 : 1),
             blocking(kernels, last.along_inputs(), op.outputs, n, threads),
             nullptr,
             nullptr};
    a.x = std::make_unique<PackedOperand<T>>(kernels, op.w2 ? a.in.shared : a.out.shared, n, 1, op.inputs);
    if (op.w2) a.h = std::make_unique<PackedOperand<T>>(kernels, a.out.shared, n, 1, op.hidden);
    bytes = std::max({bytes, conversion_bytes(kernels), a.in.bytes(), a.out.bytes()});
    row_ld = std::max({row_ld, a.in.row_ld, a.out.row_ld});
    widest = std::max<int64_t>(widest, kernels.panel_width(a.out.outer));
    active.push_back(std::move(a));
  }
  const ThreadScratch scratch(threads, bytes + row_ld * size);
  const Array<T> sums(op.tokens * op.outputs);

  parallel(threads, [&](int64_t thread) {
    for (const Expert& a : active) {
      const Operand from{rows_of<T>(op.x, op.type, op.inputs, rows.index + a.first, rows.divisor), true};
      const Share share(a.x->panels(), thread, threads);
      a.x->pack(share.first, share.last, 0, from, scratch[thread]);
    }
    const Share share(op.tokens * op.outputs, thread, threads);
    std::fill(sums.get() + share.first, sums.get() + share.last, T(0));
  });

  if (op.w2)
    parallel(threads, [&](int64_t thread) {
      T* const bias = reinterpret_cast<T*>(scratch[thread] + bytes);
      for (const Expert& a : active) {
        char* const conversion = scratch[thread] + a.in.outer_bytes + a.in.block_bytes + a.in.row_bytes;
        const int64_t width = a.kernels.panel_width(a.in.outer), panels = (op.hidden + width - 1) / width,
                      step = op.gated ? a.in.outer_panels / 2 : a.in.outer_panels;
        const Share share(panels, thread, threads);
        for (int64_t at = share.first; at < share.last; at += step) {
          OuterRange lanes{at * width, std::min(op.hidden - at * width, std::min(step, share.last - at) * width)};
          const int64_t second = round_up(lanes.count, width);  // where the up part of a row begins
          if (op.gated) lanes.second = op.hidden + lanes.first;
          op.b1.load(a.kernels, a.e, lanes.first, lanes.count, bias);
          if (op.gated) op.b1.load(a.kernels, a.e, lanes.second, lanes.count, bias + second);
          grouped_gemm_block(
              a.kernels, a.in, *a.x, [&](int64_t) { return op.w1.outputs(a.e); }, lanes, scratch[thread],
              [&](T* block, int64_t ld, int64_t row0, int used, int64_t n) {
                for (int r = 0; r < used; ++r) {
                  T* const row = block + r * ld;
                  char* const saved = u ? u + ((a.first + row0 + r) * op.first_outputs() + lanes.first) * value : nullptr;
                  pre_activation(a.kernels, row, bias, n);
                  if (saved) f.store(op.type, row, saved, n);
                  f.activate(op.activation, row, row, n);
                  if (op.gated) {
                    pre_activation(a.kernels, row + second, bias + second, n);
                    if (saved) f.store(op.type, row + second, saved + op.hidden * value, n);
                    f.multiply(row + second, row, n);
                  }
                }
                a.h->write(row0 / a.kernels.panel_width(a.in.shared), 0, lanes.first, n, block, ld, used, conversion);
              });
        }
      }
    });

  parallel(threads, [&](int64_t thread) {
    T* const bias = reinterpret_cast<T*>(scratch[thread] + bytes);
    const Share share((op.outputs + widest - 1) / widest, thread, threads);
    const int64_t end = std::min(op.outputs, share.last * widest);
    for (const Expert& a : active) {
      const int64_t step = a.out.outer_panels * a.kernels.panel_width(a.out.outer);
      for (int64_t first = share.first * widest; first < end; first += step) {
        const OuterRange lanes{first, std::min(end - first, step)};
        op.last_bias().load(a.kernels, a.e, lanes.first, lanes.count, bias);
        grouped_gemm_block(
            a.kernels, a.out, op.w2 ? *a.h : *a.x, [&](int64_t) { return last.outputs(a.e); }, lanes, scratch[thread],
            [&](T* block, int64_t ld, int64_t row0, int used, int64_t n) {
              for (int r = 0; r < used; ++r) {
                const int64_t i = a.first + row0 + r;
                f.add(bias, block + r * ld, n);
                f.axpy(routing_weights ? routing_weights[i] : T(1), block + r * ld,
                       sums.get() + rows.index[i] / rows.divisor * op.outputs + lanes.first, n);
              }
            });
      }
    }
  });

  parallel(threads, [&](int64_t thread) {
    const Share share(op.tokens * op.outputs, thread, threads);
    f.store(op.type, sums.get() + share.first, y + share.first * value, share.last - share.first);
  });
}

template void sparse_experts(const Experts<float>&, const Assignments&, const float*, char*, char*);
template void sparse_experts(const Experts<double>&, const Assignments&, const double*, char*, char*);

}  // namespace cmoe::cpu
