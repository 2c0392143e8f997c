// Experts and router on int8 weights.
//
//     y[t] = sum over the experts e of token t of weight (W2_e h + b2_e),   h = act(W1_e x[t] + b1_e)   (gated: act(gate) up)
//
// W_e is int8 with a scale per output. Two ways, chosen by an expert's number of rows and by the processor:
//   - Activations stay fp32. With few rows, where bytes of W decide, the kernel converts weights on their way from the L1 cache. With many, on
//     processors without int8 products, a panel becomes fp32 once for all rows.
//   - Rows are quantised, a scale per row, and multiplied as int8. Cells of a block are then int32, which the drivers below only move:
//     finished() makes them fp32.
// Memory plan: that of sparse_experts.cpp. Quantised rows of h need all of H before they have a scale: h is then fp32 [rows, H] first.

#include "int8_layers.h"

#include <limits>
#include <memory>
#include <vector>

namespace cmoe::cpu {

namespace {

// int8 values of a row, to nearest, ties to even, and their scale; zeros and NaN for a row that is not finite (ops/int8/quantise.py).
float quantise(const float* x, int8_t* q, int64_t n) {
  int32_t largest = 0;
  for (int64_t i = 0; i < n; ++i) {
    int32_t bits;
    std::memcpy(&bits, x + i, 4);
    largest = std::max(largest, bits & 0x7fffffff);
  }
  float most;
  std::memcpy(&most, &largest, 4);
  const float scale = most / 127;
  if (largest >= 0x7f800000 || scale == 0) {
    std::memset(q, 0, n);
    return largest >= 0x7f800000 ? std::numeric_limits<float>::quiet_NaN() : 0;
  }
  constexpr float shift = 12582912;  // 1.5 * 2^23: adding it rounds to an integer
  for (int64_t i = 0; i < n; ++i) {
    const float rounded = x[i] / scale + shift - shift;
    q[i] = static_cast<int8_t>(std::min(127.f, std::max(-127.f, rounded)));
  }
  return scale;
}

// Rows [n, inputs] as int8, and their scales.
struct Quantised {
  int64_t rows, inputs;
  Array<int8_t> q;
  Array<float> scale;

  Quantised(int64_t rows_, int64_t inputs_) : rows(rows_), inputs(inputs_), q(rows_ * inputs_), scale(rows_) {}

  // row(i, scratch): where row i is as fp32; scratch has place for one.
  template <class Row>
  void fill(int64_t threads, const Row& row) const {
    const ThreadScratch scratch(threads, inputs * static_cast<int64_t>(sizeof(float)));
    parallel(threads, [&](int64_t thread) {
      const Share share(rows, thread, threads);
      for (int64_t i = share.first; i < share.last; ++i)
        scale[i] = quantise(row(i, reinterpret_cast<float*>(scratch[thread])), q.get() + i * inputs, inputs);
    });
  }
  Matrix matrix(int64_t first, const int64_t* index = nullptr, int64_t divisor = 1) const {
    return {q.get() + first * inputs, inputs, Type::i8, index, divisor};
  }
};

// Finished sums, of one row, as fp32 with weights' scales and bias. row_scale null: they are fp32 already.
void finished(const RowFunctions<float>& f, const Int8Weight& w, int64_t e, int64_t first, const float* row_scale, float* row, int64_t n) {
  if (row_scale) {
    for (int64_t i = 0; i < n; ++i) {
      int32_t sum;
      std::memcpy(&sum, row + i, 4);
      row[i] = static_cast<float>(sum);
    }
    f.scale(*row_scale, row, n);
  }
  f.multiply(w.scale + e * w.outputs + first, row, n);
  if (w.bias) f.add(w.bias + e * w.outputs + first, row, n);
}

class Layers8 {
 public:
  Layers8(const Int8Experts& op, const Int8Rows& rows) : op_(op), rows_(rows), f_(*kernels_for_int8_weights(false, 1).rows) {
    bool quantised = false;
    for (int64_t e = 0; e < op.experts; ++e) {
      const int64_t n = rows.count(e, op.tokens);
      if (n == 0) continue;
      Expert a{e,  rows.first(e), n,      n > op.float_rows, hidden_rows_, kernels_for_int8_weights(n > op.float_rows, n), {},
               {}, nullptr,       nullptr};
      a.in = blocking(a.kernels, true, op.gated ? 2 * op.hidden : op.hidden, n, threads_, op.gated ? 2 : 1);
      a.out = blocking(a.kernels, true, op.outputs, n, threads_);
      const bool shared = rows.gates && !active_.empty();  // by all experts, whose rows are the tokens
      a.x = shared ? active_[0].x : std::make_shared<PackedOperand<float>>(a.kernels, a.in.shared, n, 1, op.inputs);
      if (op.w2) a.h = std::make_shared<PackedOperand<float>>(a.kernels, a.out.shared, n, 1, op.hidden);
      if (a.quantised) hidden_rows_ += n;
      quantised |= a.quantised;
      bytes_ = std::max({bytes_, conversion_bytes(a.kernels), a.in.bytes(), a.out.bytes()});
      active_.push_back(a);
    }
    if (quantised) x_ = std::make_unique<Quantised>(op.tokens, op.inputs);
    if (quantised && op.w2) h_ = std::make_unique<Quantised>(hidden_rows_, op.hidden);
  }

  void run(char* y) {
    const int64_t value = size_of(op_.type);
    const ThreadScratch scratch(threads_, bytes_);
    const Array<float> sums(op_.tokens * op_.outputs), hidden(h_ ? hidden_rows_ * op_.hidden : 0);
    if (x_)
      x_->fill(threads_, [&](int64_t t, float* row) {
        f_.load(op_.type, op_.x + t * op_.inputs * value, row, op_.inputs);
        return row;
      });
    parallel(threads_, [&](int64_t thread) {
      for (const Expert& a : active_) {
        if (rows_.gates && &a != active_.data()) break;
        const int64_t* const index = rows_.gates ? nullptr : rows_.sorted.index + a.first;
        pack(*a.x,
             a.quantised ? x_->matrix(0, index, rows_.sorted.divisor)
                         : rows_of<float>(op_.x, op_.type, op_.inputs, index, rows_.sorted.divisor),
             thread, scratch[thread]);
      }
      const Share share(op_.tokens * op_.outputs, thread, threads_);
      std::fill(sums.get() + share.first, sums.get() + share.last, 0.f);
    });
    if (op_.w2) {
      parallel(threads_, [&](int64_t thread) {
        for (const Expert& a : active_) first_layer(a, thread, scratch[thread], hidden.get());
      });
      if (h_) {
        h_->fill(threads_, [&](int64_t i, float*) { return hidden.get() + i * op_.hidden; });
        parallel(threads_, [&](int64_t thread) {
          for (const Expert& a : active_)
            if (a.quantised) pack(*a.h, h_->matrix(a.hidden_first), thread, scratch[thread]);
        });
      }
    }
    parallel(threads_, [&](int64_t thread) {
      for (const Expert& a : active_) last_layer(a, thread, scratch[thread], sums.get());
    });
    parallel(threads_, [&](int64_t thread) {
      const Share share(op_.tokens * op_.outputs, thread, threads_);
      f_.store(op_.type, sums.get() + share.first, y + share.first * value, share.last - share.first);
    });
  }

 private:
  struct Expert {
    int64_t e, first, n;
    bool quantised;
    int64_t hidden_first;  // its first row among those of h that are quantised
    Kernels<float> kernels;
    Blocking in, out;
    std::shared_ptr<PackedOperand<float>> x, h;
  };

  void pack(const PackedOperand<float>& into, const Matrix& from, int64_t thread, char* conversion) const {
    const Share share(into.panels(), thread, threads_);
    into.pack(share.first, share.last, 0, {from, true}, conversion);
  }

  // A thread's columns of an expert's first layer; h is packed, or where it is quantised afterwards in `hidden`.
  void first_layer(const Expert& a, int64_t thread, char* scratch, float* hidden) const {
    const int64_t width = a.kernels.panel_width(a.in.outer), panels = (op_.hidden + width - 1) / width,
                  step = op_.gated ? a.in.outer_panels / 2 : a.in.outer_panels;
    char* const conversion = scratch + a.in.outer_bytes + a.in.block_bytes + a.in.row_bytes;
    const Share share(panels, thread, threads_);
    for (int64_t at = share.first; at < share.last; at += step) {
      OuterRange lanes{at * width, std::min(op_.hidden - at * width, std::min(step, share.last - at) * width)};
      const int64_t up = round_up(lanes.count, width);  // where the up part of a row begins
      if (op_.gated) lanes.second = panels * width + lanes.first;
      grouped_gemm_block(
          a.kernels, a.in, *a.x, [&](int64_t) { return op_.w1.expert(a.e); }, lanes, scratch,
          [&](float* block, int64_t ld, int64_t row0, int used, int64_t n) {
            for (int r = 0; r < used; ++r) {
              float* const row = block + r * ld;
              const float* const row_scale = a.quantised ? &x_->scale[rows_.token(a.first + row0 + r)] : nullptr;
              finished(f_, op_.w1, a.e, lanes.first, row_scale, row, n);
              f_.activate(op_.activation, row, row, n);
              if (op_.gated) {
                finished(f_, op_.w1, a.e, op_.hidden + lanes.first, row_scale, row + up, n);
                f_.multiply(row + up, row, n);
              }
              if (a.quantised) std::copy(row, row + n, hidden + (a.hidden_first + row0 + r) * op_.hidden + lanes.first);
            }
            if (!a.quantised) a.h->write(row0 / a.kernels.panel_width(a.in.shared), 0, lanes.first, n, block, ld, used, conversion);
          });
    }
  }

  // A thread's columns of y, for all rows of an expert: a token's experts are added in their order, without locks.
  void last_layer(const Expert& a, int64_t thread, char* scratch, float* sums) const {
    const Int8Weight& last = op_.last();
    const int64_t width = a.kernels.panel_width(a.out.outer), step = a.out.outer_panels * width;
    const Share share((op_.outputs + width - 1) / width, thread, threads_);
    const int64_t end = std::min(op_.outputs, share.last * width);
    for (int64_t first = share.first * width; first < end; first += step) {
      const OuterRange lanes{first, std::min(end - first, step)};
      grouped_gemm_block(
          a.kernels, a.out, op_.w2 ? *a.h : *a.x, [&](int64_t) { return last.expert(a.e); }, lanes, scratch,
          [&](float* block, int64_t ld, int64_t row0, int used, int64_t n) {
            for (int r = 0; r < used; ++r) {
              float* const row = block + r * ld;
              const int64_t i = a.first + row0 + r, token = rows_.token(i);
              const float* const row_scale = !a.quantised ? nullptr : op_.w2 ? &h_->scale[a.hidden_first + row0 + r] : &x_->scale[token];
              finished(f_, last, a.e, lanes.first, row_scale, row, n);
              f_.axpy(rows_.weight(a.e, i), row, sums + token * op_.outputs + lanes.first, n);
            }
          });
    }
  }

  const Int8Experts& op_;
  const Int8Rows& rows_;
  const RowFunctions<float>& f_;
  const int64_t threads_ = thread_count();
  int64_t bytes_ = 0, hidden_rows_ = 0;
  std::vector<Expert> active_;
  std::unique_ptr<Quantised> x_, h_;
};

}  // namespace

void int8_experts(const Int8Experts& op, const Int8Rows& rows, char* y) { Layers8(op, rows).run(y); }

void int8_router(const Int8Router& op, float* logits) {
  const bool quantised = op.tokens > op.float_rows;
  const Kernels<float> kernels = kernels_for_int8_weights(quantised, op.tokens);
  const RowFunctions<float>& f = *kernels.rows;
  const int64_t threads = thread_count(), value = size_of(op.type);
  const Blocking p = blocking(kernels, true, op.hidden, op.tokens, threads);
  const PackedOperand<float> x(kernels, p.shared, op.tokens, 1, op.inputs);
  const Quantised rows(quantised ? op.tokens : 0, op.inputs);
  rows.fill(threads, [&](int64_t t, float* row) {
    f.load(op.type, op.x + t * op.inputs * value, row, op.inputs);
    return row;
  });
  pack_operand(kernels, x, {quantised ? rows.matrix(0) : rows_of<float>(op.x, op.type, op.inputs), true}, threads);

  // As task_router.cpp: a thread sums the logits of its own hidden units.
  const Array<float> sums(threads * op.tokens * op.experts);
  std::fill(sums.get(), sums.get() + sums.size(), 0.f);
  const auto second = [&](const ColumnBlock<float>& block) {
    for (int64_t e = 0; e < op.experts; ++e)
      f.load(op.w2.type, op.w2.matrix(0).row(e) + block.first * size_of(op.w2.type), block.scratch + e * block.count, block.count);
  };
  const auto reduce = [&](const ColumnBlock<float>& block, const FinishedRows<float>& done) {
    for (int r = 0; r < done.used; ++r) {
      float* const row = done.row(r);
      const int64_t token = done.row0 + r, n = block.count, group = op.group_ids ? op.group_ids[token] : 0;
      finished(f, op.w1, 0, block.first, quantised ? &rows.scale[token] : nullptr, row, n);
      f.add(op.bias + group * op.hidden + block.first, row, n);
      f.activate(op.activation, row, row, n);
      float* const sum = sums.get() + (block.thread * op.tokens + token) * op.experts;
      for (int64_t e = 0; e < op.experts; ++e) sum[e] += f.dot(row, block.scratch + e * n, n);
    }
  };
  grouped_gemm(
      kernels, p, x, 1, op.hidden, [&](int64_t, int64_t) { return op.w1.expert(0); }, Epilogue{op.experts, second, reduce}, threads);
  for (int64_t t = 0; t < op.tokens; ++t) {
    float* const to = logits + t * op.experts;
    op.b2.load(kernels, 0, 0, op.experts, to);
    for (int64_t thread = 0; thread < threads; ++thread) f.add(sums.get() + (thread * op.tokens + t) * op.experts, to, op.experts);
  }
}

}  // namespace cmoe::cpu
