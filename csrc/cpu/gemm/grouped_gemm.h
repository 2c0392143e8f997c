// GEMMs by all threads, over the blocks of multiply.h and wgrad.h. What follows from finished sums is an Epilogue: expert layers and the
// router have one each, and know no panels.
#pragma once

#include "../parallel.h"
#include "multiply.h"
#include "wgrad.h"

namespace cmoe::cpu {

// Scratch of each thread, allocated once for an operation.
class ThreadScratch {
 public:
  ThreadScratch(int64_t threads, int64_t bytes) : bytes_(round_up(bytes, 4096) + 64), buffer_(threads * bytes_) {
    for (int64_t thread = 0; thread < threads; ++thread) forbid((*this)[thread] + bytes, bytes_ - bytes);
  }
  char* operator[](int64_t thread) const { return buffer_.get() + thread * bytes_; }

 private:
  int64_t bytes_;
  Buffer buffer_;
};

// Packs a shared operand of one segment with all threads.
template <class T>
void pack_operand(const Kernels<T>& kernels, const PackedOperand<T>& shared, const Operand& from, int64_t threads) {
  const ThreadScratch scratch(threads, conversion_bytes(kernels));
  parallel(threads, [&](int64_t thread) {
    const Share share(shared.panels(), thread, threads);
    shared.pack(share.first, share.last, 0, from, scratch[thread]);
  });
}

// f(group, OuterRange) for the blocks of outer lanes that are a thread's: its part of all panels of all groups, in their order.
template <class T, class F>
void blocks_of(const Kernels<T>& kernels, const Blocking& p, int64_t groups, int64_t lanes, int64_t thread, int64_t threads, F&& f) {
  const int64_t width = kernels.panel_width(p.outer), panels = (lanes + width - 1) / width;
  const Share share(groups * panels, thread, threads);
  for (int64_t at = share.first; at < share.last;) {
    const int64_t group = at / panels, panel = at % panels, count = std::min({p.outer_panels, panels - panel, share.last - at});
    f(group, OuterRange{panel * width, std::min(lanes - panel * width, count * width)});
    at += count;
  }
}

// Columns of a group's weight that one thread works on.
template <class T>
struct ColumnBlock {
  int64_t group, first, count, thread;
  T* scratch;  // of the epilogue, in rows of ld values
  int64_t ld;
  char* conversion;  // for PackedOperand::write
};

// Finished sums: `used` rows from row0 on, by the columns of a block.
template <class T>
struct FinishedRows {
  T* data;
  int64_t ld, row0;
  int used;

  T* row(int r) const { return data + r * ld; }
};

template <class Begin, class Rows>
struct Epilogue {
  int64_t scratch;  // rows of values, one for each column of a block
  Begin begin;      // begin(block), before its first rows: fills the scratch
  Rows rows;        // rows(block, finished)
};

template <class Rows>
auto epilogue_of(Rows rows) {
  return Epilogue{0, [](const auto&) {}, rows};
}

// y = x W^T or dx = dy W, for the weights of some groups, with x packed. weight(group, segment) gives the Operand of a segment of k.
template <class T, class Weight, class Begin, class Rows>
void grouped_gemm(const Kernels<T>& kernels, const Blocking& p, const PackedOperand<T>& x, int64_t groups, int64_t columns,
                  const Weight& weight, const Epilogue<Begin, Rows>& epilogue, int64_t threads) {
  const int64_t before_conversion = p.outer_bytes + p.block_bytes + p.row_bytes;
  const ThreadScratch scratch(threads, p.bytes() + epilogue.scratch * p.row_ld * static_cast<int64_t>(sizeof(T)));
  parallel(threads, [&](int64_t thread) {
    char* const own = scratch[thread];
    blocks_of(kernels, p, groups, columns, thread, threads, [&](int64_t group, const OuterRange& lanes) {
      const ColumnBlock<T> block{
          group, lanes.first, lanes.count, thread, reinterpret_cast<T*>(own + p.bytes()), p.row_ld, own + before_conversion};
      epilogue.begin(block);
      grouped_gemm_block(
          kernels, p, x, [&](int64_t segment) { return weight(group, segment); }, lanes, own,
          [&](T* rows, int64_t ld, int64_t row0, int used, int64_t) { epilogue.rows(block, FinishedRows<T>{rows, ld, row0, used}); });
    });
  });
}

// The same for one weight, with the rows of x as they lie in memory.
template <class T, class Begin, class Rows>
void grouped_gemm(const Kernels<T>& kernels, const Matrix& x, int64_t rows, int64_t depth, const Operand& weight, int64_t columns,
                  const Epilogue<Begin, Rows>& epilogue, int64_t threads) {
  const Blocking p = blocking(kernels, weight.lanes_are_rows, columns, rows, threads);
  const PackedOperand<T> packed(kernels, p.shared, rows, 1, depth);
  pack_operand(kernels, packed, {x, true}, threads);
  grouped_gemm(kernels, p, packed, 1, columns, [&](int64_t, int64_t) { return weight; }, epilogue, threads);
}

// dW [outputs, inputs] = dy^T x over the rows of both, or dW += dy^T x; `stride`: bytes from row to row of dW.
template <class T>
void wgrad(const Kernels<T>& kernels, const Matrix& dy, int64_t outputs, const Matrix& x, int64_t inputs, int64_t rows, Type type, char* dw,
           int64_t stride, bool add, int64_t threads) {
  const PackedOperand<T> packed(kernels, Side::b, inputs, 1, rows);
  pack_operand(kernels, packed, {x, false}, threads);
  const Blocking p = wgrad_blocking(kernels, outputs, inputs, rows, threads);
  const ThreadScratch scratch(threads, p.bytes());
  parallel(threads, [&](int64_t thread) {
    blocks_of(kernels, p, 1, outputs, thread, threads, [&](int64_t, const OuterRange& lanes) {
      WgradBlock<T>(kernels, p, packed, dy, lanes, scratch[thread], type, dw + lanes.first * stride, stride, add).compute();
    });
  });
}

}  // namespace cmoe::cpu
