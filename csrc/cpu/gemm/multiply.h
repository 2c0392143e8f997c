// The product for y = x W^T and dx = dy W: a matrix of outer lanes against a matrix of shared lanes, over k. wgrad.h has the product for
// dW = dy^T x.
//
// The shared operand (tokens; in dW the inputs) is packed once, whole, by all threads. Each thread then takes its part of the outer
// lanes (rows or columns of a weight) in blocks, packs a block's panels one stretch of k at a time, each element once per block of
// shared lanes, and sums into a block of products in fp32 that stays in its L2 cache until k is done.
// Finished rows go to the caller's epilogue, which knows their meaning. Threads share only operands that they read.
#pragma once

#include "pack.h"

namespace cmoe::cpu {

// The block of outer lanes that is worked on at a time, for one thread.
struct Blocking {
  Side outer, shared;
  int64_t outer_panels, shared_panels;  // of a block
  int64_t run;                          // chunks of k that a panel of the outer operand is taken through before the next panel
  int64_t outer_bytes, block_bytes, row_bytes, conversion;  // of scratch
  int64_t row_ld;
  int64_t bytes() const { return outer_bytes + block_bytes + row_bytes + conversion; }
};

// For y = x W^T and dx = dy W: outer lanes are a weight's, shared lanes are tokens. in_rows: the weight's rows lie along k (W in y = x
// W^T). ranges: of lanes in a block.
template <class T>
Blocking blocking(const Kernels<T>& kernels, bool in_rows, int64_t outer_lanes, int64_t shared_lanes, int64_t threads, int64_t ranges = 1) {
  const Microkernel& gemm = *kernels.gemm;
  Blocking p;
  p.outer = in_rows ? gemm.weights : Side::b;
  p.shared = p.outer == Side::a ? Side::b : Side::a;
  const int64_t ol = kernels.panel_width(p.outer), sl = kernels.panel_width(p.shared), cell = ol * sl * static_cast<int64_t>(sizeof(T));
  const int64_t all_outer = std::max<int64_t>(1, (outer_lanes + ol * threads - 1) / (ol * threads)),
                all_shared = std::max<int64_t>(1, (shared_lanes + sl - 1) / sl);
  const int64_t cells = std::max<int64_t>(4, kernels.l2 / 3 / cell);
  p.shared_panels = std::min(all_shared, std::max<int64_t>(1, 512 / sl));
  p.outer_panels = round_up(std::min({all_outer, std::max<int64_t>(1, cells / p.shared_panels), std::max<int64_t>(1, 512 / ol)}), ranges);
  const int64_t panel = ol * gemm.kc * kernels.element();
  // Rows along k are packed panel by panel, just before they are used; columns for all panels of the block at once.
  p.outer_bytes = round_up(panel * (in_rows ? 1 : p.outer_panels), 64);
  // A longer run reads longer stretches of a weight's rows, while the shared operand's chunks of the run stay in the L2 cache.
  const int64_t chunk_bytes = p.shared_panels * sl * gemm.kc * kernels.element();
  p.run = in_rows ? std::max<int64_t>(1, kernels.l2 / (gemm.outer_resident ? 4 : 2) / chunk_bytes) : 1;
  p.block_bytes = cell * p.outer_panels * p.shared_panels;
  p.row_ld = p.outer_panels * ol;
  p.row_bytes = round_up(sl * p.row_ld * static_cast<int64_t>(sizeof(T)), 64);
  p.conversion = conversion_bytes(kernels);
  return p;
}

// Memory to prefetch, shared out to n products: each fetches its part while it runs. Rows at a stride, or memory without gaps.
class PrefetchShares {
 public:
  PrefetchShares() = default;
  PrefetchShares(const char* data, int64_t stride, int64_t rows, int64_t bytes, int64_t n)
      : data_(data), stride_(stride), rows_(rows), share_((rows + n - 1) / n), lines_(static_cast<int>((bytes + 63) / 64)) {}
  PrefetchShares(const char* data, int64_t bytes, int64_t n)
      : PrefetchShares(data, row(bytes, n), (bytes + row(bytes, n) - 1) / row(bytes, n), row(bytes, n), n) {}
  Prefetch operator[](int64_t product) const {
    const int64_t first = product * share_;
    if (first >= rows_) return {};
    return {data_ + first * stride_, stride_, static_cast<int>(std::min(share_, rows_ - first)), lines_};
  }

 private:
  static int64_t row(int64_t bytes, int64_t n) { return std::min<int64_t>(1024, std::max<int64_t>(64, bytes / n / 64 * 64)); }
  const char* data_ = nullptr;
  int64_t stride_ = 0, rows_ = 0, share_ = 0;
  int lines_ = 0;
};

// The outer lanes of a block: a range, or two ranges of one length (the gate rows and the up rows of a gated layer), each in whole panels.
struct OuterRange {
  int64_t first, count, second = -1;
};

// Multiplies a block of outer lanes, a weight's, with all shared lanes, tokens. outer(segment) gives the Operand of a segment.
// epilogue(rows, ld, row0, rows in use, lanes): finished sums of some tokens from row0 on; their columns are the block's lanes (a second
// range begins at a whole panel).
template <class T, class Outer, class Epilogue>
void grouped_gemm_block(const Kernels<T>& kernels, const Blocking& p, const PackedOperand<T>& shared, const Outer& outer,
                        const OuterRange& lanes, char* scratch, Epilogue&& epilogue) {
  const Microkernel& gemm = *kernels.gemm;
  const int ol = kernels.panel_width(p.outer), sl = kernels.panel_width(p.shared), cell = gemm.mr * gemm.nr;
  const int64_t per_range = (lanes.count + ol - 1) / ol, panels = lanes.second < 0 ? per_range : 2 * per_range;
  char* const packed = scratch;
  T* const block = reinterpret_cast<T*>(scratch + p.outer_bytes);
  T* const rows = reinterpret_cast<T*>(scratch + p.outer_bytes + p.block_bytes);
  char* const conversion = scratch + p.outer_bytes + p.block_bytes + p.row_bytes;
  const int resident = static_cast<int>(gemm.outer_resident ? p.outer : Side::b);
  const std::vector<Chunk>& chunks = shared.chunks();
  const int64_t count = static_cast<int64_t>(chunks.size());

  struct OuterPanel {
    const char* data;
    int64_t stride;
  };
  // Whether a weight whose rows lie along k is read where it is. Rows at a multiple of 4 KB share few sets of the L1 cache, which costs
  // more than a copy where they are read many times. Rows at the stride of a packed panel would be taken for one.
  const auto in_place = [&](const Matrix& m, int64_t uses) {
    return p.outer == Side::a && gemm.in_place && m.type == gemm.panel && !m.index && m.stride != packed_stride(kernels) &&
           (ol <= 8 || m.stride % 4096 || uses <= 2);
  };
  // The weight is prefetched where the L2 cache has bandwidth left for it: not under AMX, unless the shared operand's block stays there or
  // the weight is copied. Else the shared operand's next block is prefetched.
  const bool prefetches_weight = !gemm.outer_resident || p.run >= count ||
                                 (outer(0).lanes_are_rows && !in_place(outer(0).matrix, std::min(shared.panels(), p.shared_panels)));
  const auto lane_of = [&](int64_t o) { return o < per_range ? lanes.first + o * ol : lanes.second + (o - per_range) * ol; };
  const auto lanes_in = [&](int64_t o) { return static_cast<int>(std::min<int64_t>(ol, lanes.count - (o % per_range) * ol)); };
  const auto packed_panel = [&](const Operand& operand, int64_t o, const Chunk& chunk) {
    return operand.packed + lane_of(o) / ol * operand.panel_bytes + chunk.k0 * ol * kernels.packed_element();
  };
  const auto a_stride = [&](const Chunk& chunk) { return gemm.row_major[0] ? chunk.padded * kernels.element() : packed_stride(kernels); };
  // A panel of rows along k: where it is, or packed.
  const auto row_panel = [&](const Operand& operand, int64_t o, const Chunk& chunk, int64_t uses) -> OuterPanel {
    const Matrix& m = operand.matrix;
    if (operand.packed && gemm.widen) {
      gemm.widen(packed_panel(operand, o, chunk), chunk.padded, packed);
      return {packed, a_stride(chunk)};
    }
    if (operand.packed) return {packed_panel(operand, o, chunk), a_stride(chunk)};
    if (in_place(m, uses) && lanes_in(o) == ol && chunk.k == chunk.padded)
      return {m.row(lane_of(o)) + chunk.k0 * kernels.element(), m.stride};
    pack_panels(kernels, p.outer, operand, lane_of(o), lanes_in(o), chunk.k0, chunk.k, packed, 0, conversion);
    return {packed, a_stride(chunk)};
  };
  const auto multiply = [&](const OuterPanel& o, int64_t outer_index, int64_t s, int64_t s0, const Chunk& chunk, bool add,
                            const Prefetch& prefetch) {
    const char* const other = shared.at(s, chunk);
    T* const to = block + (outer_index * p.shared_panels + s - s0) * cell;
    if (p.outer == Side::a)
      gemm.multiply[resident](o.data, o.stride, other, to, chunk.padded, gemm.row_major[1] ? shared.in_panel(s) : lanes_in(outer_index),
                              add, prefetch);
    else
      gemm.multiply[resident](other, a_stride(chunk), o.data, to, chunk.padded, shared.in_panel(s), add, prefetch);
  };

  for (int64_t s0 = 0; s0 < shared.panels(); s0 += p.shared_panels) {
    if (gemm.begin) gemm.begin();
    const int64_t s1 = std::min(shared.panels(), s0 + p.shared_panels);
    // The shared operand's block of the next run.
    const auto next_block = [&](int64_t c) -> PrefetchShares {
      if (!gemm.outer_resident || c + p.run >= count) return {};
      const Chunk& chunk = chunks[c + p.run];
      return {shared.at(s0, chunk), (s1 - s0) * chunk.padded * sl * kernels.element(), panels * (s1 - s0)};
    };
    for (int64_t c0 = 0; c0 < count; c0 += p.run) {
      const int64_t c1 = std::min(count, c0 + p.run);
      if (outer(chunks[c0].segment).lanes_are_rows) {
        for (int64_t o = 0; o < panels; ++o)
          for (int64_t c = c0; c < c1; ++c) {
            const OuterPanel panel = row_panel(outer(chunks[c].segment), o, chunks[c], s1 - s0);
            const bool same = c + 1 < c1;  // the next panel: more of these lanes, or the next lanes
            const Chunk& next = chunks[same ? c + 1 : c0];
            const Operand operand = outer(next.segment);
            const int64_t next_o = same ? o : o + 1;
            PrefetchShares prefetch;
            int64_t product = 0;
            if (next_o < panels && operand.packed) {
              prefetch = {packed_panel(operand, next_o, next), next.padded * ol * kernels.packed_element(), s1 - s0};
            } else if (next_o < panels && prefetches_weight) {
              const Matrix& m = operand.matrix;
              prefetch = {m.row(lane_of(next_o)) + next.k0 * size_of(m.type), m.stride, lanes_in(next_o), next.k * size_of(m.type),
                          s1 - s0};
            } else if (!prefetches_weight) {
              prefetch = next_block(c);
              product = o * (s1 - s0);
            }
            for (int64_t s = s0; s < s1; ++s) multiply(panel, o, s, s0, chunks[c], c > 0, prefetch[product++]);
          }
        continue;
      }
      const Chunk& chunk = chunks[c0];
      const int64_t bytes = chunk.padded * ol * kernels.element();
      const Operand operand = outer(chunk.segment);
      pack_panels(kernels, p.outer, operand, lanes.first, lanes.count, chunk.k0, chunk.k, packed, bytes, conversion);
      if (lanes.second >= 0)
        pack_panels(kernels, p.outer, operand, lanes.second, lanes.count, chunk.k0, chunk.k, packed + per_range * bytes, bytes, conversion);
      const int64_t products = panels * (s1 - s0);
      PrefetchShares prefetch;
      if (!prefetches_weight) {
        prefetch = next_block(c0);
      } else if (c1 < count) {
        const Matrix m = outer(chunks[c1].segment).matrix;
        prefetch = {m.row(chunks[c1].k0) + lanes.first * size_of(m.type), m.stride, chunks[c1].k, lanes.count * size_of(m.type), products};
      }
      int64_t product = 0;
      if (gemm.outer_resident || p.outer == Side::b) {
        for (int64_t o = 0; o < panels; ++o)
          for (int64_t s = s0; s < s1; ++s) multiply({packed + o * bytes, a_stride(chunk)}, o, s, s0, chunk, c0 > 0, prefetch[product++]);
      } else {
        for (int64_t s = s0; s < s1; ++s)
          for (int64_t o = 0; o < panels; ++o)
            multiply({packed + o * bytes, a_stride(chunk)}, o, s, s0, chunk, c0 > 0, prefetch[product++]);
      }
    }
    if (count == 0) std::memset(block, 0, p.block_bytes);  // k is 0: sums of nothing
    if (gemm.end) gemm.end();

    for (int64_t s = s0; s < s1; ++s) {
      const int used = shared.in_panel(s);
      for (int64_t o = 0; o < panels; ++o) {
        const T* const from = block + (o * p.shared_panels + s - s0) * cell;
        if (p.outer == Side::b) {
          for (int r = 0; r < used; ++r) std::memcpy(rows + r * p.row_ld + o * ol, from + r * ol, sizeof(T) * ol);
        } else if constexpr (sizeof(T) == 4) {
          kernels.transpose(from, sl, rows + o * ol, p.row_ld, ol, sl);
        }
      }
      epilogue(rows, p.row_ld, s * sl, used, lanes.count);
    }
  }
}

}  // namespace cmoe::cpu
