// task_router on the CPU.
//
//     u = W_task task[group] + W x + b1      logits = W2 act(u) + b2
//
// Memory plan. The task's part of the first layer is computed once per task, [G, R], and is the bias of the product over tokens. That
// product's epilogue writes u where it is to be saved and reduces act(u) against W2 at once: the hidden layer goes to memory only to be
// saved. A thread sums the logits of its own hidden units; the sums of all threads are added in their order.
// Backward: a thread takes its hidden units in blocks small enough for its cache. For a block it has u (saved, or computed again), makes
// du = (dlogits W2) act'(u) in the dtype of x, sums dW2 and the bias gradients per task, and multiplies du^T x into dW: du is never
// whole in memory, unless dx is wanted. The task columns of dW are an outer product per task.

#include "task_router.h"

namespace cmoe::cpu {

namespace {

template <class T>
class TaskRouter {
 public:
  TaskRouter(const Router<T>& op, const Kernels<T>& kernels)
      : op_(op), kernels_(kernels), f_(*kernels_.rows), threads_(thread_count()), value_(size_of(op.type)),
        bias_(op.bias_rows ? 0 : bias_count(op)) {}

  static int64_t bias_count(const Router<T>& op) { return op.task_inputs ? op.groups * op.hidden : op.hidden; }

  // The first layer's bias: b1 and the product with each task, [G, R].
  void first_bias(T* to) {
    if (!op_.task_inputs) {
      op_.b1.load(kernels_, 0, 0, op_.hidden, to);
      return;
    }
    const Kernels<T> kernels = forward_kernels<T>(op_.type, op_.groups, op_.w1_task, op_.w1_task);
    const auto b1 = [&](const ColumnBlock<T>& block) { op_.b1.load(kernels_, 0, block.first, block.count, block.scratch); };
    const auto store = [&](const ColumnBlock<T>& block, const FinishedRows<T>& done) {
      for (int r = 0; r < done.used; ++r) {
        f_.add(block.scratch, done.row(r), block.count);
        std::copy(done.row(r), done.row(r) + block.count, to + (done.row0 + r) * op_.hidden + block.first);
      }
    };
    const Matrix task = rows_of<T>(op_.task, op_.type, op_.task_inputs);
    grouped_gemm(kernels, task, op_.groups, op_.task_inputs, op_.w1_task.outputs(0), op_.hidden, Epilogue{1, b1, store}, threads_);
  }

  void forward(T* logits, char* u) {
    if (!op_.bias_rows) first_bias(bias_.get());
    const int64_t rows = op_.rows();
    if (!op_.inputs || !op_.w2) {
      single(logits, u);
      return;
    }
    const Array<T> sums(threads_ * rows * op_.experts);
    std::fill(sums.get(), sums.get() + sums.size(), T(0));
    const auto second = [&](const ColumnBlock<T>& block) { load_w2(block.first, block.count, block.scratch); };
    const auto reduce = [&](const ColumnBlock<T>& block, const FinishedRows<T>& done) {
      T* const sum = sums.get() + (block.thread * rows + done.row0) * op_.experts;
      for (int r = 0; r < done.used; ++r) {
        T* const row = done.row(r);
        const int64_t token = done.row0 + r, n = block.count;
        pre_activation(kernels_, row, bias(token) + block.first, n);
        if (u) f_.store(op_.type, row, u + (token * op_.hidden + block.first) * value_, n);
        f_.activate(op_.activation, row, row, n);
        for (int64_t e = 0; e < op_.experts; ++e) sum[r * op_.experts + e] += f_.dot(row, block.scratch + e * n, n);
      }
    };
    first_layer(Epilogue{op_.experts, second, reduce});
    total(logits, sums);
  }

  void backward(const RouterGradients<T>& grads) {
    const int64_t rows = op_.rows(), size = sizeof(T), groups = op_.task_inputs ? op_.groups : 1;
    const int64_t columns = op_.task_inputs + op_.inputs;
    const bool recompute = op_.w2 && !grads.u;
    if (recompute) first_bias(bias_.get());
    if (grads.db2) {
      const Array<T> sum(op_.experts);
      std::fill(sum.get(), sum.get() + op_.experts, T(0));
      for (int64_t t = 0; t < rows; ++t) f_.add(grads.dlogits + t * op_.experts, sum.get(), op_.experts);
      grads.db2.store(kernels_, 0, sum.get(), op_.experts);
    }
    // Gradients of the first layer's bias, one row per task.
    const Array<T> dbias(groups * op_.hidden);
    const bool whole = grads.dx != nullptr;
    // With one layer du is dlogits, in fp32: operands of every product that is left, so that the logits' gradient is not rounded.
    const Type du_type = op_.w2 ? op_.type : (size == 8 ? Type::f64 : Type::f32);
    Kernels<T> kernels = kernels_;
    if (!op_.w2) kernels = kernels_for<T>(du_type);
    const int64_t du_value = size_of(du_type);
    const Array<char> du(whole ? rows * op_.hidden * du_value : 0);

    // What is computed again is computed by the kernels of the forward pass: the same bits.
    const Kernels<T> first_kernels = forward_kernels<T>(op_.type, rows, op_.w1, op_.w1);
    const Blocking forward = blocking(first_kernels, op_.w1.along_inputs(), op_.hidden, rows, threads_);
    const Blocking p = wgrad_blocking(kernels, op_.hidden, op_.inputs, rows, threads_);
    const PackedOperand<T> x(first_kernels, forward.shared, recompute && op_.inputs ? rows : 0, 1, op_.inputs);
    const PackedOperand<T> x_columns(kernels, p.shared, grads.dw1 ? op_.inputs : 0, 1, rows);
    const Matrix x_rows = rows_of<T>(op_.x, op_.type, op_.inputs);
    pack_operand(first_kernels, x, {x_rows, true}, threads_);
    pack_operand(kernels, x_columns, {x_rows, false}, threads_);

    // A block of hidden units, whose du for all rows stays in a thread's L2 cache, is computed strip by strip, whose rows stay in L1.
    const int64_t unit = first_kernels.panel_width(forward.outer),
                  most = std::max<int64_t>(most_lanes, kernels.l2 / std::max<int64_t>(1, rows * du_value));
    const int64_t width = round_up(std::min({op_.hidden, p.outer_panels * kernels.panel_width(p.outer), most}), unit),
                  strip = std::min(width, round_up(256, unit));
    const int64_t plans = std::max(forward.bytes(), p.bytes()), block_du = round_up(rows * width * du_value, 64),
                  block_u = recompute ? round_up(rows * strip * value_, 64) : 0;
    const ThreadScratch scratch(threads_, plans + block_du + block_u + (2 * op_.experts + 5 + groups) * strip * size);
    const int64_t units = (op_.hidden + unit - 1) / unit, step = width / unit;
    parallel(threads_, [&](int64_t thread) {
      char* const du_block = scratch[thread] + plans;
      char* const u_block = du_block + block_du;
      T* const w2 = reinterpret_cast<T*>(u_block + block_u);
      T *const dw2 = w2 + op_.experts * strip, *const pre = dw2 + op_.experts * strip, *const h = pre + strip, *const slope = h + strip,
               *const dh = slope + strip;
      T* const sums = dh + 2 * strip;
      const Share share(units, thread, threads_);
      for (int64_t at = share.first; at < share.last; at += step) {
        const int64_t block_first = at * unit, block_width = std::min(op_.hidden, std::min(share.last, at + step) * unit) - block_first;
        for (int64_t in = 0; in < block_width; in += strip) {
          const int64_t first = block_first + in, n = std::min(strip, block_width - in);
          if (op_.w2) load_w2(first, n, w2);
          if (recompute) pre_activations(first_kernels, forward, x, {first, n}, scratch[thread], u_block);
          std::fill(dw2, dw2 + op_.experts * n, T(0));
          std::fill(sums, sums + groups * n, T(0));
          for (int64_t t = 0; t < rows; ++t) {
            const T* const dlogits = grads.dlogits + t * op_.experts;
            if (op_.w2) {
              f_.load(op_.type, recompute ? u_block + t * n * value_ : grads.u + (t * op_.hidden + first) * value_, pre, n);
              f_.activate_backward(op_.activation, pre, h, slope, n);
              std::fill(dh, dh + n, T(0));
              for (int64_t e = 0; e < op_.experts; ++e) {
                f_.axpy(dlogits[e], w2 + e * n, dh, n);
                if (grads.dw2) f_.axpy(dlogits[e], h, dw2 + e * n, n);
              }
              f_.multiply(slope, dh, n);
            } else {
              std::copy(dlogits + first, dlogits + first + n, dh);
            }
            f_.add(dh, sums + group_of_row(t) * n, n);
            f_.store(du_type, dh, du_block + (t * block_width + in) * du_value, n);
            if (whole) f_.store(du_type, dh, du.get() + (t * op_.hidden + first) * du_value, n);
          }
          if (grads.dw2)
            for (int64_t e = 0; e < op_.experts; ++e) grads.dw2.store(kernels_, e * op_.hidden + first, dw2 + e * n, n);
          for (int64_t g = 0; g < groups; ++g) std::copy(sums + g * n, sums + (g + 1) * n, dbias.get() + g * op_.hidden + first);
        }
        if (grads.dw1 && op_.inputs) {
          const int64_t lanes = p.outer_panels * kernels.panel_width(p.outer);
          for (int64_t from = 0; from < block_width; from += lanes) {
            const Matrix m{du_block + from * du_value, block_width * du_value, du_type};
            const OuterRange part{0, std::min(lanes, block_width - from)};
            char* const dw1 = grads.dw1.data + ((block_first + from) * columns + op_.task_inputs) * size_of(grads.dw1.type);
            WgradBlock<T>(kernels, p, x_columns, m, part, scratch[thread], grads.dw1.type, dw1, columns * size_of(grads.dw1.type),
                          grads.dw1.add)
                .compute();
          }
        }
      }
    });

    task_gradients(grads, dbias, columns);
    if (grads.dx) inputs_gradient(kernels, rows_of<T>(du.get(), du_type, op_.hidden), grads.dx);
  }

 private:
  int64_t group_of_row(int64_t row) const { return op_.task_inputs ? (op_.inputs ? op_.group(row) : row) : 0; }
  const T* bias(int64_t token) const {
    return (op_.bias_rows ? op_.bias_rows : bias_.get()) + (op_.task_inputs || op_.bias_rows ? op_.group(token) * op_.hidden : 0);
  }
  template <class E>
  void first_layer(const E& epilogue) const {
    grouped_gemm(kernels_, rows_of<T>(op_.x, op_.type, op_.inputs), op_.rows(), op_.inputs, op_.w1.outputs(0), op_.hidden, epilogue,
                 threads_);
  }

  void load_w2(int64_t first, int64_t n, T* to) const {
    for (int64_t e = 0; e < op_.experts; ++e) {
      f_.load(op_.w2.type, op_.w2.data + (e * op_.w2.output + first) * size_of(op_.w2.type), to + e * n, n);
      f_.round(op_.type, to + e * n, n);
    }
  }

  // Routers of one layer, and those that see the task alone: rows are few or R is.
  void single(T* logits, char* u) {
    const int64_t rows = op_.rows();
    if (op_.inputs) {  // one layer: logits are the first layer's sums
      const auto store = [&](const ColumnBlock<T>& block, const FinishedRows<T>& done) {
        for (int r = 0; r < done.used; ++r) {
          f_.add(bias(done.row0 + r) + block.first, done.row(r), block.count);
          std::copy(done.row(r), done.row(r) + block.count, logits + (done.row0 + r) * op_.hidden + block.first);
        }
      };
      first_layer(epilogue_of(store));
      return;
    }
    if (!op_.w2) {
      std::copy(bias_.get(), bias_.get() + rows * op_.hidden, logits);
      return;
    }
    const Array<T> sums(threads_ * rows * op_.experts);
    parallel(threads_, [&](int64_t thread) {
      const Share share(op_.hidden, thread, threads_);
      T* const sum = sums.get() + thread * rows * op_.experts;
      std::fill(sum, sum + rows * op_.experts, T(0));
      constexpr int64_t step = 256;
      T row[step], w2[step];
      for (int64_t first = share.first; first < share.last; first += step) {
        const int64_t n = std::min(step, share.last - first);
        for (int64_t g = 0; g < rows; ++g) {
          std::copy(bias_.get() + g * op_.hidden + first, bias_.get() + g * op_.hidden + first + n, row);
          f_.round(op_.type, row, n);
          if (u) f_.store(op_.type, row, u + (g * op_.hidden + first) * value_, n);
          f_.activate(op_.activation, row, row, n);
          for (int64_t e = 0; e < op_.experts; ++e) {
            f_.load(op_.w2.type, op_.w2.data + (e * op_.w2.output + first) * size_of(op_.w2.type), w2, n);
            f_.round(op_.type, w2, n);
            sum[g * op_.experts + e] += f_.dot(row, w2, n);
          }
        }
      }
    });
    total(logits, sums);
  }

  // Logits of all threads' hidden units, in the order of the threads, and the bias.
  void total(T* logits, const Array<T>& sums) {
    const int64_t n = op_.rows() * op_.experts;
    const Array<T> b2(op_.experts);
    op_.b2.load(kernels_, 0, 0, op_.experts, b2.get());
    std::copy(sums.get(), sums.get() + n, logits);
    for (int64_t thread = 1; thread < threads_; ++thread) f_.add(sums.get() + thread * n, logits, n);
    for (int64_t t = 0; t < op_.rows(); ++t) f_.add(b2.get(), logits + t * op_.experts, op_.experts);
  }

  // u of a block of hidden units for all rows, [rows, n], by one thread.
  void pre_activations(const Kernels<T>& kernels, const Blocking& p, const PackedOperand<T>& x, const OuterRange& lanes, char* scratch,
                       char* u) {
    if (!op_.inputs) {
      for (int64_t g = 0; g < op_.groups; ++g)
        f_.store(op_.type, bias_.get() + g * op_.hidden + lanes.first, u + g * lanes.count * value_, lanes.count);
      return;
    }
    const int64_t width = kernels.panel_width(p.outer), most = p.outer_panels * width;
    for (int64_t from = 0; from < lanes.count; from += most)
      grouped_gemm_block(
          kernels, p, x, [&](int64_t) { return op_.w1.outputs(0); }, OuterRange{lanes.first + from, std::min(most, lanes.count - from)},
          scratch,
          [&](T* block, int64_t ld, int64_t token0, int used, int64_t n) {
            for (int r = 0; r < used; ++r) {
              pre_activation(kernels, block + r * ld, bias(token0 + r) + lanes.first + from, n);
              f_.store(op_.type, block + r * ld, u + ((token0 + r) * lanes.count + from) * value_, n);
            }
          });
  }

  // What the first layer's bias gradients [G, R] give: db1, the task columns of dw1, the tasks' own gradient.
  void task_gradients(const RouterGradients<T>& grads, const Array<T>& dbias, int64_t columns) {
    const int64_t groups = op_.task_inputs ? op_.groups : 1;
    if (grads.db1) {
      const Array<T> sum(op_.hidden);
      std::copy(dbias.get(), dbias.get() + op_.hidden, sum.get());
      for (int64_t g = 1; g < groups; ++g) f_.add(dbias.get() + g * op_.hidden, sum.get(), op_.hidden);
      grads.db1.store(kernels_, 0, sum.get(), op_.hidden);
    }
    if (!op_.task_inputs) return;
    if (grads.dw1) {
      const Array<T> tasks(op_.groups * op_.task_inputs), rows(threads_ * op_.task_inputs);
      for (int64_t g = 0; g < op_.groups; ++g)
        f_.load(op_.type, op_.task + g * op_.task_inputs * value_, tasks.get() + g * op_.task_inputs, op_.task_inputs);
      parallel(threads_, [&](int64_t thread) {
        const Share share(op_.hidden, thread, threads_);
        T* const row = rows.get() + thread * op_.task_inputs;
        for (int64_t r = share.first; r < share.last; ++r) {
          std::fill(row, row + op_.task_inputs, T(0));
          for (int64_t g = 0; g < op_.groups; ++g)
            f_.axpy(dbias[g * op_.hidden + r], tasks.get() + g * op_.task_inputs, row, op_.task_inputs);
          grads.dw1.store(kernels_, r * columns, row, op_.task_inputs);
        }
      });
    }
    if (grads.dtask) {
      // Few rows against a large weight: the threads share the reduction over R, so that the weight is read once, in order.
      const Array<T> sums(threads_ * op_.groups * op_.task_inputs);
      if (op_.w1_task.along_inputs()) {
        // In two steps: thousands of values added one by one to fp32 sums would lose what sums of a few keep.
        constexpr int64_t step = 64;
        const int64_t count = op_.groups * op_.task_inputs;
        const Array<T> rows(threads_ * (op_.task_inputs + count));
        parallel(threads_, [&](int64_t thread) {
          const Share share(op_.hidden, thread, threads_);
          T *const sum = sums.get() + thread * count, *const row = rows.get() + thread * (op_.task_inputs + count),
                   *const part = row + op_.task_inputs;
          std::fill(sum, sum + count, T(0));
          const Matrix w = op_.w1_task.matrix(0);
          for (int64_t first = share.first; first < share.last; first += step) {
            std::fill(part, part + count, T(0));
            for (int64_t r = first; r < std::min(share.last, first + step); ++r) {
              f_.load(w.type, w.row(r), row, op_.task_inputs);
              if (w.type != op_.type) f_.round(op_.type, row, op_.task_inputs);
              for (int64_t g = 0; g < op_.groups; ++g) f_.axpy(dbias[g * op_.hidden + r], row, part + g * op_.task_inputs, op_.task_inputs);
            }
            f_.add(part, sum, count);
          }
        });
        for (int64_t thread = 1; thread < threads_; ++thread) f_.add(sums.get() + thread * count, sums.get(), count);
      } else {
        const Array<T> rows(op_.hidden);
        const Matrix w = op_.w1_task.matrix(0);
        for (int64_t s = 0; s < op_.task_inputs; ++s) {
          f_.load(w.type, w.row(s), rows.get(), op_.hidden);
          f_.round(op_.type, rows.get(), op_.hidden);
          for (int64_t g = 0; g < op_.groups; ++g)
            sums[g * op_.task_inputs + s] = f_.dot(dbias.get() + g * op_.hidden, rows.get(), op_.hidden);
        }
      }
      grads.dtask.store(kernels_, 0, sums.get(), op_.groups * op_.task_inputs);
    }
  }

  void inputs_gradient(const Kernels<T>& kernels, const Matrix& du, char* dx) {
    const auto store = [&](const ColumnBlock<T>& block, const FinishedRows<T>& done) {
      for (int r = 0; r < done.used; ++r)
        f_.store(op_.type, done.row(r), dx + ((done.row0 + r) * op_.inputs + block.first) * value_, block.count);
    };
    grouped_gemm(kernels, du, op_.rows(), op_.hidden, op_.w1.inputs(0), op_.inputs, epilogue_of(store), threads_);
  }

  const Router<T>& op_;
  const Kernels<T> kernels_;
  const RowFunctions<T>& f_;
  const int64_t threads_, value_;
  const Array<T> bias_;
};

}  // namespace

template <class T>
void task_router(const Router<T>& op, T* logits, char* u) {
  TaskRouter<T>(op, op.inputs ? forward_kernels<T>(op.type, op.tokens, op.w1, op.w1) : kernels_for<T>(op.type)).forward(logits, u);
}

template <class T>
void task_router_backward(const Router<T>& op, const RouterGradients<T>& grads) {
  TaskRouter<T>(op, kernels_for<T>(op.type)).backward(grads);
}

template <class T>
void task_router_bias(const Router<T>& op, T* bias) {
  TaskRouter<T>(op, forward_kernels<T>(op.type, op.groups, op.w1_task, op.w1_task)).first_bias(bias);
}

template void task_router_bias(const Router<float>&, float*);
template void task_router_bias(const Router<double>&, double*);
template void task_router(const Router<float>&, float*, char*);
template void task_router(const Router<double>&, double*, char*);
template void task_router_backward(const Router<float>&, const RouterGradients<float>&);
template void task_router_backward(const Router<double>&, const RouterGradients<double>&);

}  // namespace cmoe::cpu
