// The backward pass of expert layers on the CPU: soft_experts, sparse_experts, grouped_linear.
//
//     y[t] += weight_i (W2_e h_i + b2_e),   h_i = act(u_i),   u_i = W1_e x[t] + b1_e        (gated: h = act(gate) up)
//
// Memory plan, expert by expert: dh = dy W2_e; the epilogue of that product reads u and leaves du and weight h, [rows, H] each in the dtype
// of x; then dW2 = dy^T (weight h), dW1 = du^T x, dx += du W1_e in fp32. The weight's own gradient, dh . h + dy . b2_e, is a dot product in
// the same epilogue: expert outputs never exist. Each gradient of a weight is summed in fp32 blocks and written once. Scratch: packed rows
// of x and dy, two or three [rows, H] of one expert, an fp32 [T, D] where dx is wanted.
// A thread has the same columns of dx for all experts, and the same hidden units for all rows: sums have one order, without locks.

#include "experts.h"

namespace cmoe::cpu {

namespace {

template <class T>
class Backward {
 public:
  Backward(const Experts<T>& op, const ExpertsBackward<T>& grads)
      : op_(op), grads_(grads), kernels_(kernels_for<T>(op.type)), f_(*kernels_.rows), threads_(thread_count()), value_(size_of(op.type)),
        dw_last_(op.w2 ? grads.dw2 : grads.dw1), db_last_(op.w2 ? grads.db2 : grads.db1), dx_(grads.dx ? op.tokens * op.inputs : 0) {}

  void run() {
    parallel(threads_, [&](int64_t thread) {
      const Share share(dx_.size(), thread, threads_);
      std::fill(dx_.get() + share.first, dx_.get() + share.last, T(0));
    });
    for (int64_t e = 0; e < op_.experts; ++e) {
      first_ = grads_.offsets ? grads_.offsets[e] : e * op_.tokens;
      n_ = grads_.offsets ? grads_.offsets[e + 1] - first_ : op_.tokens;
      if (n_ == 0)
        zero(e);
      else
        expert(e);
    }
    if (grads_.dx)
      parallel(threads_, [&](int64_t thread) {
        const Share share(op_.tokens * op_.inputs, thread, threads_);
        f_.store(op_.type, dx_.get() + share.first, grads_.dx + share.first * value_, share.last - share.first);
      });
  }

 private:
  void zero(int64_t e) {
    const auto fill = [&](const Gradient& g, int64_t n) {
      if (g && !g.add) std::memset(g.data + e * n * size_of(g.type), 0, n * size_of(g.type));
    };
    fill(grads_.dw1, op_.w2 ? op_.first_outputs() * op_.inputs : op_.outputs * op_.inputs);
    fill(grads_.db1, op_.w2 ? op_.first_outputs() : op_.outputs);
    fill(grads_.dw2, op_.outputs * op_.hidden);
    fill(grads_.db2, op_.outputs);
  }

  Matrix x_rows() const { return rows_of<T>(op_.x, op_.type, op_.inputs, grads_.index ? grads_.index + first_ : nullptr, grads_.divisor); }
  Matrix dy_rows() const {
    return rows_of<T>(grads_.dy, op_.type, op_.outputs, grads_.dy_index ? grads_.dy_index + first_ : nullptr, grads_.dy_divisor);
  }
  int64_t token(int64_t row) const { return grads_.index ? grads_.index[first_ + row] / grads_.divisor : row; }
  T weight(int64_t row) const { return grads_.routing_weights ? grads_.routing_weights[first_ + row] : T(1); }

  void expert(int64_t e) {
    bias_of_last(e);
    const bool layers = static_cast<bool>(op_.w2);
    const bool need_du = layers && (grads_.dx || grads_.dw1 || grads_.db1),
               need_dh = need_du || grads_.routing_weight_grad || (!layers && grads_.dx);
    if (!need_dh && !dw_last_) return;
    const bool weighted_inputs = layers || grads_.routing_weights;  // else the last layer's inputs are x itself
    const Array<char> pre(layers && !grads_.u ? n_ * op_.first_outputs() * value_ : 0);
    const char* u = layers && grads_.u ? grads_.u + (grads_.offsets ? first_ * grads_.u_row : e * grads_.u_expert) * value_ : nullptr;
    int64_t u_row = grads_.u_row;
    if (layers && !u) {
      first_layer(e, pre.get());
      u = pre.get();
      u_row = op_.first_outputs();
    }
    const Array<char> du(need_du ? n_ * op_.first_outputs() * value_ : 0),
        weighted_hidden(dw_last_ && weighted_inputs ? n_ * op_.last_inputs() * value_ : 0);
    if (need_dh)
      dact_gemm(e, u, u_row, need_du ? du.get() : nullptr, weighted_hidden.size() ? weighted_hidden.get() : nullptr);
    else if (weighted_hidden.size())
      weighted(u, u_row, weighted_hidden.get());
    if (dw_last_)
      wgrad(dy_rows(), op_.outputs, weighted_inputs ? rows_of<T>(weighted_hidden.get(), op_.type, op_.last_inputs()) : x_rows(),
            op_.last_inputs(), dw_last_, e);
    if (layers && grads_.dw1)
      wgrad(rows_of<T>(du.get(), op_.type, op_.first_outputs()), op_.first_outputs(), x_rows(), op_.inputs, grads_.dw1, e);
    if (layers && grads_.dx) inputs(e, du.get());
  }

  // db of the last layer, sums of weight dy; and dy . b, a part of the weights' gradient.
  void bias_of_last(int64_t e) {
    const bool dot = grads_.routing_weight_grad && op_.last_bias();
    if (grads_.routing_weight_grad) std::fill(grads_.routing_weight_grad + first_, grads_.routing_weight_grad + first_ + n_, T(0));
    if (!db_last_ && !dot) return;
    const Matrix dy = dy_rows();
    const Array<T> sums(op_.outputs), bias(op_.outputs), rows(threads_ * op_.outputs);
    op_.last_bias().load(kernels_, e, 0, op_.outputs, bias.get());
    if (dot)
      parallel(threads_, [&](int64_t thread) {
        const Share share(n_, thread, threads_);
        T* const row = rows.get() + thread * op_.outputs;
        for (int64_t r = share.first; r < share.last; ++r) {
          f_.load(op_.type, dy.row(r), row, op_.outputs);
          grads_.routing_weight_grad[first_ + r] = f_.dot(row, bias.get(), op_.outputs);
        }
      });
    if (db_last_)
      parallel(threads_, [&](int64_t thread) {
        const Share share(op_.outputs, thread, threads_);  // columns, so that sums run over the rows in order
        const int64_t n = share.last - share.first;
        T *const row = rows.get() + share.first, *const sum = sums.get() + share.first;
        std::fill(sum, sum + n, T(0));
        for (int64_t r = 0; r < n_; ++r) {
          f_.load(op_.type, dy.row(r) + share.first * value_, row, n);
          f_.axpy(weight(r), row, sum, n);
        }
        db_last_.store(kernels_, e * op_.outputs + share.first, sum, n);
      });
  }

  // u of one expert, computed again by the kernels of the forward pass: the same bits.
  void first_layer(int64_t e, char* u) {
    const Kernels<T> kernels = forward_kernels<T>(op_.type, n_, op_.w1, op_.last());
    const auto bias = [&](const ColumnBlock<T>& block) { op_.b1.load(kernels, e, block.first, block.count, block.scratch); };
    const auto store = [&](const ColumnBlock<T>& block, const FinishedRows<T>& done) {
      for (int r = 0; r < done.used; ++r) {
        pre_activation(kernels, done.row(r), block.scratch, block.count);
        f_.store(op_.type, done.row(r), u + ((done.row0 + r) * op_.first_outputs() + block.first) * value_, block.count);
      }
    };
    grouped_gemm(kernels, x_rows(), n_, op_.inputs, op_.w1.outputs(e), op_.first_outputs(), Epilogue{1, bias, store}, threads_);
  }

  // dh = dy W of the last layer, and all that follows from it row by row.
  void dact_gemm(int64_t e, const char* u, int64_t u_row, char* du, char* weighted_hidden) {
    const bool layers = static_cast<bool>(op_.w2);
    const Array<T> partials(grads_.routing_weight_grad ? threads_ * n_ : 0), db(layers ? op_.first_outputs() : 0);
    std::fill(partials.get(), partials.get() + partials.size(), T(0));
    const Matrix x = x_rows();
    const auto begin = [&](const ColumnBlock<T>& block) {
      T *const db_gate = db.get() + block.first, *const db_up = db_gate + op_.hidden;
      if (du) std::fill(db_gate, db_gate + block.count, T(0));
      if (du && op_.gated) std::fill(db_up, db_up + block.count, T(0));
    };
    const auto rows = [&](const ColumnBlock<T>& block, const FinishedRows<T>& done) {
      const int64_t n = block.count, ld = block.ld;
      T *const pre = block.scratch, *const h = pre + ld, *const slope = h + ld, *const up = slope + ld, *const dup = up + ld;
      T *const db_gate = db.get() + block.first, *const db_up = db_gate + op_.hidden;
      for (int r = 0; r < done.used; ++r) {
        T* const dh = done.row(r);
        const int64_t row = done.row0 + r;
        if (!layers) {
          f_.load(op_.type, x.row(row) + block.first * value_, h, n);
        } else {
          const char* const saved = u + (row * u_row + block.first) * value_;
          f_.load(op_.type, saved, pre, n);
          f_.activate_backward(op_.activation, pre, h, slope, n);
          if (op_.gated) {
            f_.load(op_.type, saved + op_.hidden * value_, up, n);
            std::memcpy(dup, h, sizeof(T) * n);
            f_.multiply(up, slope, n);
            f_.multiply(up, h, n);
          }
        }
        if (grads_.routing_weight_grad) partials[block.thread * n_ + row] += f_.dot(dh, h, n);
        if (weighted_hidden) {
          f_.scale(weight(row), h, n);
          f_.store(op_.type, h, weighted_hidden + (row * op_.last_inputs() + block.first) * value_, n);
        }
        f_.scale(weight(row), dh, n);
        if (du) {
          char* const to = du + (row * op_.first_outputs() + block.first) * value_;
          if (op_.gated) {
            f_.multiply(dh, dup, n);
            f_.add(dup, db_up, n);
            f_.store(op_.type, dup, to + op_.hidden * value_, n);
          }
          f_.multiply(slope, dh, n);
          f_.add(dh, db_gate, n);
          f_.store(op_.type, dh, to, n);
        } else if (!layers && grads_.dx) {
          f_.add(dh, dx_.get() + token(row) * op_.inputs + block.first, n);
        }
      }
    };
    grouped_gemm(kernels_, dy_rows(), n_, op_.outputs, op_.last().inputs(e), op_.last_inputs(), Epilogue{5, begin, rows}, threads_);
    if (grads_.routing_weight_grad)
      for (int64_t thread = 0; thread < threads_; ++thread)
        for (int64_t r = 0; r < n_; ++r) grads_.routing_weight_grad[first_ + r] += partials[thread * n_ + r];
    if (layers && grads_.db1) grads_.db1.store(kernels_, e * op_.first_outputs(), db.get(), op_.first_outputs());
  }

  // weight times the last layer's inputs, where its weights alone want a gradient.
  void weighted(const char* u, int64_t u_row, char* weighted_hidden) {
    const int64_t inputs = op_.last_inputs();
    const Array<T> buffers(threads_ * 2 * inputs);
    const Matrix x = x_rows();
    parallel(threads_, [&](int64_t thread) {
      const Share share(n_, thread, threads_);
      T *const h = buffers.get() + thread * 2 * inputs, *const up = h + inputs;
      for (int64_t row = share.first; row < share.last; ++row) {
        f_.load(op_.type, op_.w2 ? u + row * u_row * value_ : x.row(row), h, inputs);
        if (op_.w2) f_.activate(op_.activation, h, h, inputs);
        if (op_.gated) {
          f_.load(op_.type, u + (row * u_row + op_.hidden) * value_, up, inputs);
          f_.multiply(up, h, inputs);
        }
        f_.scale(weight(row), h, inputs);
        f_.store(op_.type, h, weighted_hidden + row * inputs * value_, inputs);
      }
    });
  }

  // dW [outputs, inputs] of one expert.
  void wgrad(const Matrix& dy, int64_t outputs, const Matrix& x, int64_t inputs, const Gradient& dw, int64_t e) {
    const int64_t stride = inputs * size_of(dw.type);
    cpu::wgrad(kernels_, dy, outputs, x, inputs, n_, dw.type, dw.data + e * outputs * stride, stride, dw.add, threads_);
  }

  // dx += du W1.
  void inputs(int64_t e, const char* du) {
    const auto add = [&](const ColumnBlock<T>& block, const FinishedRows<T>& done) {
      for (int r = 0; r < done.used; ++r) f_.add(done.row(r), dx_.get() + token(done.row0 + r) * op_.inputs + block.first, block.count);
    };
    const Matrix rows = rows_of<T>(du, op_.type, op_.first_outputs());
    grouped_gemm(kernels_, rows, n_, op_.first_outputs(), op_.w1.inputs(e), op_.inputs, epilogue_of(add), threads_);
  }

  const Experts<T>& op_;
  const ExpertsBackward<T>& grads_;
  const Kernels<T> kernels_;
  const RowFunctions<T>& f_;
  const int64_t threads_, value_;
  const Gradient &dw_last_, &db_last_;
  const Array<T> dx_;
  int64_t first_ = 0, n_ = 0;  // rows of the expert at work
};

}  // namespace

template <class T>
void experts_backward(const Experts<T>& op, const ExpertsBackward<T>& grads) {
  Backward<T>(op, grads).run();
}

template void experts_backward(const Experts<float>&, const ExpertsBackward<float>&);
template void experts_backward(const Experts<double>&, const ExpertsBackward<double>&);

}  // namespace cmoe::cpu
