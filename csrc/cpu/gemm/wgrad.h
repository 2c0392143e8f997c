// The product for dW = dy^T x: columns of dy, the outer lanes, against columns of x, the shared lanes; k runs over tokens.
//
// The panels of a block of dy are packed once, for all of k, and taken through runs of k one after the other, each with a block of x that
// stays in the L2 cache. With tokens of one run, one or two chunks, sums are finished before the next panel's begin and share a row of cells
// (under AMX and with one chunk, two cells); else they stay in the L2 cache until k is done.
// Under AMX, finished sums are stored one product late, beside the products that follow, and the next panel of dy is prefetched from the
// cache behind L2: a gradient is written once and not read again here. Elsewhere they are stored by rows of x's block.
//
// dW += dy^T x: what dW holds is read once, with the rows that are stored, or under AMX into the sums before they begin.
#pragma once

#include "multiply.h"

namespace cmoe::cpu {

// Bytes of packed panels of dy that a thread may hold. A larger block is packed run by run, again for each block of shared lanes.
constexpr int64_t most_packed_outer = 16 << 20;

template <class T>
Blocking wgrad_blocking(const Kernels<T>& kernels, int64_t outer_lanes, int64_t shared_lanes, int64_t k, int64_t threads,
                        int64_t most_packed = most_packed_outer) {
  const Microkernel& gemm = *kernels.gemm;
  Blocking p{};
  p.outer = Side::a;
  p.shared = Side::b;
  const int64_t ol = gemm.mr, sl = gemm.nr, cell = ol * sl * static_cast<int64_t>(sizeof(T)), element = kernels.element();
  const int64_t all_outer = std::max<int64_t>(1, (outer_lanes + ol * threads - 1) / (ol * threads)),
                all_shared = std::max<int64_t>(1, (shared_lanes + sl - 1) / sl);
  const int64_t depth = std::max<int64_t>(1, round_up(k, gemm.k_step)) * element;
  const bool late = gemm.multiply_and_store, one_run = k <= 2 * gemm.kc;
  p.run = late && !one_run ? 1 : 2;
  const int64_t x_panel = sl * std::min(depth, p.run * gemm.kc * element);
  const auto panels = [](int64_t fitting, int64_t all) { return std::clamp<int64_t>(fitting, 1, all); };
  if (!late) {  // x's panels of a run, in a quarter of L2
    p.outer_panels = panels(448 / ol, all_outer);
    p.shared_panels = panels(kernels.l2 / 4 / x_panel, all_shared);
  } else if (one_run) {  // all of x's panels in half of L2, those of dy in twice of it
    p.outer_panels = panels(2 * kernels.l2 / depth / ol, all_outer);
    p.shared_panels = panels(kernels.l2 / 2 / x_panel, all_shared);
  } else {  // the sums of all runs, in half of L2
    p.outer_panels = panels(512 / ol, all_outer);
    p.shared_panels = panels(kernels.l2 / 2 / (cell * p.outer_panels), all_shared);
  }
  const int64_t packed = depth * ol * p.outer_panels;
  p.outer_bytes = round_up(packed <= most_packed ? packed : std::min(depth, p.run * gemm.kc * element) * ol * p.outer_panels, 64);
  p.block_bytes = cell * std::max<int64_t>(2, p.shared_panels * (one_run ? 1 : p.outer_panels));
  p.row_ld = late ? 0 : p.shared_panels * sl;
  p.row_bytes = round_up(p.row_ld * static_cast<int64_t>(sizeof(T)), 64);
  p.conversion = conversion_bytes(kernels);
  return p;
}

// The rows [lanes.first, lanes.first + lanes.count) of dW; `to` is the first of them in memory, `stride` the bytes from row to row.
template <class T>
class WgradBlock {
 public:
  WgradBlock(const Kernels<T>& kernels, const Blocking& p, const PackedOperand<T>& shared, const Matrix& dy, const OuterRange& lanes,
             char* scratch, Type type, char* to, int64_t stride, bool accumulate)
      : kernels_(kernels), gemm_(*kernels.gemm), p_(p), shared_(shared), chunks_(shared.chunks()),
        count_(static_cast<int64_t>(chunks_.size())), dy_(dy), lanes_(lanes), packed_(scratch),
        block_(reinterpret_cast<T*>(scratch + p.outer_bytes)), type_(type), to_(to), stride_(stride), accumulate_(accumulate) {}

  void compute() {
    if (count_ == 0 && !accumulate_)  // k is 0: sums of nothing
      for (int64_t r = 0; r < lanes_.count; ++r) std::memset(to_ + r * stride_, 0, shared_.lanes() * size_of(type_));
    packed_once_ = count_ && (chunks_.back().start + chunks_.back().padded) * panels_ * ol_ * element_ <= p_.outer_bytes;
    if (packed_once_) pack(0, count_);
    if (gemm_.begin) gemm_.begin();
    for (int64_t s0 = 0; s0 < shared_.panels(); s0 += p_.shared_panels) {
      const int64_t s1 = std::min(shared_.panels(), s0 + p_.shared_panels);
      for (int64_t c0 = 0; c0 < count_; c0 += p_.run) {
        const int64_t c1 = std::min(count_, c0 + p_.run);
        if (!packed_once_) pack(c0, c1);
        if (gemm_.multiply_and_store)
          sweeps(s0, s1, c0, c1);
        else
          run(s0, s1, c0, c1);
      }
    }
    store_finished();
    if (gemm_.end) gemm_.end();
  }

 private:
  char* panel(int64_t o, const Chunk& chunk) const {
    return packed_ + ((chunk.start - chunks_[packed_from_].start) * panels_ + o * chunk.padded) * ol_ * element_;
  }
  int used(int64_t o) const { return static_cast<int>(std::min(ol_, lanes_.count - o * ol_)); }
  T* sums(int64_t o, int64_t s) const { return block_ + (o * p_.shared_panels + s) * ol_ * sl_; }
  char* row(int64_t o, int64_t s) const { return to_ + o * ol_ * stride_ + s * sl_ * size_of(type_); }

  // Under AMX: the sums of a cell as they are before its first chunk, and whether the chunk is to add to them.
  bool begin(int64_t o, int64_t s, T* sums) const {
    for (int r = 0; accumulate_ && r < used(o); ++r)
      kernels_.rows->load(type_, row(o, s) + r * stride_, sums + r * sl_, shared_.in_panel(s));
    return accumulate_;
  }

  void pack(int64_t c0, int64_t c1) {
    packed_from_ = c0;
    char* const conversion = packed_ + p_.outer_bytes + p_.block_bytes + p_.row_bytes;
    for (int64_t c = c0; c < c1; ++c)
      pack_panels(kernels_, Side::a, Operand{dy_, false}, lanes_.first, lanes_.count, chunks_[c].k0, chunks_[c].k, panel(0, chunks_[c]),
                  chunks_[c].padded * ol_ * element_, conversion);
  }

  // One run; after the last one, the rows, which are prefetched beside its products.
  void run(int64_t s0, int64_t s1, int64_t c0, int64_t c1) const {
    const auto multiply = gemm_.multiply[static_cast<int>(Side::a)];
    const int64_t stride = packed_stride(kernels_), columns = std::min(shared_.lanes(), s1 * sl_) - s0 * sl_;
    for (int64_t o = 0; o < panels_; ++o) {
      const int64_t at = count_ <= p_.run ? 0 : o;
      for (int64_t c = c0; c < c1; ++c) {
        const Chunk& chunk = chunks_[c];
        const char* const a = panel(o, chunk);
        const PrefetchShares rows = c + 1 == count_ && (accumulate_ || type_ == Type::f32)
                                        ? PrefetchShares(row(o, s0), stride_, used(o), columns * size_of(type_), s1 - s0)
                                        : PrefetchShares();
        for (int64_t s = s0; s < s1; ++s)
          multiply(a, stride, shared_.at(s, chunk), sums(at, s - s0), chunk.padded, used(o), c > 0, rows[s - s0]);
      }
      if (c1 == count_) store_rows(o, sums(at, 0), s0, columns);
    }
  }

  // Rows of one panel of dy; `cells`: their sums.
  void store_rows(int64_t o, const T* cells, int64_t s0, int64_t columns) const {
    const int64_t cell = ol_ * sl_, whole = columns / sl_, line = sl_ * size_of(type_);
    T* const sum = reinterpret_cast<T*>(packed_ + p_.outer_bytes + p_.block_bytes);
    for (int r = 0; r < used(o); ++r) {
      const T* const from = cells + r * sl_;
      char* const to = row(o, s0) + r * stride_;
      if (accumulate_) {
        kernels_.rows->load(type_, to, sum, columns);
        for (int64_t i = 0; i < columns; i += sl_) kernels_.rows->add(from + i / sl_ * cell, sum + i, std::min(sl_, columns - i));
        kernels_.rows->store_block(type_, sum, 0, to, 0, 1, columns);
      } else {
        kernels_.rows->store_block(type_, from, cell, to, line, whole, sl_);
        kernels_.rows->store_block(type_, from + whole * cell, 0, to + whole * line, 0, 1, columns - whole * sl_);
      }
    }
  }

  // One run; where it finishes the sums of a panel of dy before the next one begins, these share their cells.
  void sweeps(int64_t s0, int64_t s1, int64_t c0, int64_t c1) {
    const bool one_run = count_ <= p_.run;
    for (int64_t o = 0; o < panels_; ++o) {
      for (int64_t c = c0; c < c1; ++c) {
        const Chunk& chunk = chunks_[c];
        const PrefetchShares next =
            o + 1 < panels_ ? PrefetchShares(panel(o + 1, chunk), chunk.padded * ol_ * element_, s1 - s0) : PrefetchShares();
        for (int64_t s = s0; s < s1; ++s) {
          T* const to = count_ == 1 ? sums(0, turn_++ % 2) : sums(one_run ? 0 : o, s - s0);
          multiply_and_store(o, chunk, s, to, c > 0 || begin(o, s, to), next[s - s0]);
          if (c + 1 == count_) finished_ = {to, row(o, s), stride_, used(o), shared_.in_panel(s)};
        }
      }
      if (count_ > 1) store_finished();  // before the next panel's sums are written there
    }
  }

  void multiply_and_store(int64_t o, const Chunk& chunk, int64_t s, T* to, bool add, const Prefetch& prefetch) {
    const bool lines =
        type_ == gemm_.panel && (reinterpret_cast<uintptr_t>(to_) | static_cast<uintptr_t>(stride_)) % 64 == 0;  // every cell begins one
    if (finished_.sums && lines && finished_.rows == ol_ && finished_.columns == sl_) {
      gemm_.multiply_and_store(panel(o, chunk), packed_stride(kernels_), shared_.at(s, chunk), to, chunk.padded, used(o), add, prefetch,
                               finished_);
      finished_.sums = nullptr;
    } else {
      gemm_.multiply[static_cast<int>(Side::a)](panel(o, chunk), packed_stride(kernels_), shared_.at(s, chunk), to, chunk.padded, used(o),
                                                add, prefetch);
      store_finished();
    }
  }
  void store_finished() {
    if (finished_.sums)
      kernels_.rows->store_block(type_, static_cast<const T*>(finished_.sums), sl_, finished_.to, stride_, finished_.rows,
                                 finished_.columns);
    finished_.sums = nullptr;
  }

  const Kernels<T>& kernels_;
  const Microkernel& gemm_;
  const Blocking& p_;
  const PackedOperand<T>& shared_;
  const std::vector<Chunk>& chunks_;
  const int64_t count_;  // of chunks
  const Matrix& dy_;
  const OuterRange& lanes_;
  char* const packed_;
  T* const block_;
  const Type type_;
  char* const to_;
  const int64_t stride_;
  const bool accumulate_;
  const int64_t ol_ = gemm_.mr, sl_ = gemm_.nr, panels_ = (lanes_.count + ol_ - 1) / ol_, element_ = kernels_.element();
  bool packed_once_ = false;
  int64_t packed_from_ = 0;  // the chunk whose panels come first
  Finished finished_{};
  int64_t turn_ = 0;
};

}  // namespace cmoe::cpu
