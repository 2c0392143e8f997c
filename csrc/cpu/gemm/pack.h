// Packed operands: panels in the order in which a microkernel reads them, out of matrices in memory or out of rows of computed values.
//
// k may consist of segments (experts, whose weights do not follow each other in memory): sums run over all of them. It is packed in chunks,
// each within one segment.
#pragma once

#include <algorithm>
#include <cstring>
#include <vector>

#include "../memory.h"
#include "isa.h"

namespace cmoe::cpu {

// A matrix in memory, by rows of contiguous values; row i is row index[i] / divisor of the data where there is an index.
struct Matrix {
  const void* data;
  int64_t stride;  // bytes from row to row
  Type type;
  const int64_t* index = nullptr;
  int64_t divisor = 1;

  const char* row(int64_t i) const { return static_cast<const char*>(data) + (index ? index[i] / divisor : i) * stride; }
};

// An operand: its lanes are the rows of a matrix (k runs along a row), or the columns (k runs over rows).
struct Operand {
  Matrix matrix;
  bool lanes_are_rows;
  const char* packed = nullptr;  // panels of the outer side that were packed before, all of k one after the other; for one range of lanes
  int64_t panel_bytes = 0;       // from one of them to the next
};

// What an operation computes with: chosen once a call. T, float or double, is the type of sums and epilogues; Type is that of values in
// memory, which is known at run time only: data are char*.
template <class T>
struct Kernels {
  const Microkernel* gemm;
  const RowFunctions<T>* rows;
  void (*convert)(Type, const void*, Type, void*, int64_t);
  void (*transpose)(const float*, int64_t, float*, int64_t, int, int);
  Type type;   // of x: products are of values rounded to it
  int64_t l2;  // bytes of L2 cache a thread may fill

  int panel_width(Side side) const { return side == Side::a ? gemm->mr : gemm->nr; }
  int64_t element() const { return size_of(gemm->panel); }
  int64_t packed_element() const { return gemm->int8_weights ? 1 : element(); }  // of weights that were packed before
};

template <class T>
Kernels<T> kernels_for(Type type);  // dispatch.cpp

// For products y = x W^T of few tokens, at most small_m(type), with weights along k, where the instruction set has such a kernel.
constexpr int64_t most_small_m = 8;
int64_t small_m(Type type);
template <class T>
Kernels<T> kernels_for_small_m(Type type);

// For int8 weights and some rows of activations: fp32, or int8 where there are such products.
Kernels<float> kernels_for_int8_weights(bool int8_activations, int64_t rows);
bool has_int8_products();

constexpr int64_t longest_packed_chunk = 512;  // of columns; of rows, a microkernel's kc
constexpr int most_lanes = 32;

// Scratch for converting values before they are packed: one panel of rows along k, or some rows of a block of lanes.
constexpr int64_t converted_rows = 32, most_columns = 1024;
template <class T>
int64_t rounded_bytes(const Kernels<T>& kernels) {
  return std::max<int64_t>(kernels.gemm->kc, most_columns) * 4;
}
template <class T>
int64_t conversion_bytes(const Kernels<T>& kernels) {
  const Microkernel& gemm = *kernels.gemm;
  const int64_t rows = int64_t{std::max(gemm.mr, gemm.nr)} * gemm.kc;
  return round_up(std::max(rows, converted_rows * most_columns) * 4 + rounded_bytes(kernels), 64);
}

// Rows of an operand as the panels' type, rounded to the type of x on the way: pointers to where they are, or to their converted copies.
template <class T>
void converted(const Kernels<T>& kernels, const Matrix& m, int64_t row0, int64_t rows, int64_t column0, int64_t length,
               const void** pointers, char* conversion) {
  const Type panel = kernels.gemm->panel;
  const bool round = m.type != kernels.type && panel != kernels.type;  // fp32 values in a product of half-precision ones that runs as fp32
  char* const rounded = conversion + conversion_bytes(kernels) - rounded_bytes(kernels);
  for (int64_t i = 0; i < rows; ++i) {
    const void* source = m.row(row0 + i) + column0 * size_of(m.type);
    if (round || m.type != panel) {
      char* const to = conversion + i * length * size_of(panel);
      if (round) {
        kernels.convert(m.type, source, kernels.type, rounded, length);
        kernels.convert(kernels.type, rounded, panel, to, length);
      } else {
        kernels.convert(m.type, source, panel, to, length);
      }
      source = to;
    }
    pointers[i] = source;
  }
}

// Packs lanes [lane0, lane0 + lanes) over [k0, k0 + k) as panels of one side, panel_bytes apart.
template <class T>
void pack_panels(const Kernels<T>& kernels, Side side, const Operand& operand, int64_t lane0, int64_t lanes, int64_t k0, int64_t k,
                 char* panels, int64_t panel_bytes, char* conversion) {
  const Microkernel& gemm = *kernels.gemm;
  const Matrix& m = operand.matrix;
  const void* pointers[longest_packed_chunk];
  if (operand.lanes_are_rows) {
    const int64_t width = kernels.panel_width(side);
    for (int64_t lane = 0; lane < lanes; lane += width, panels += panel_bytes) {
      const int64_t n = std::min(width, lanes - lane);
      converted(kernels, m, lane0 + lane, n, k0, k, pointers, conversion);
      gemm.pack_rows[static_cast<int>(side)](pointers, static_cast<int>(n), k, panels);
    }
    return;
  }
  const bool whole = m.type == gemm.panel && (m.type == kernels.type || gemm.panel == kernels.type);  // nothing to convert
  const int64_t rows = whole ? k : converted_rows,
                columns = whole ? lanes : most_columns / kernels.panel_width(side) * kernels.panel_width(side);
  for (int64_t lane = 0; lane < lanes; lane += columns)
    for (int64_t i = 0; i < k; i += rows) {
      const int64_t n = std::min(rows, k - i), length = std::min(columns, lanes - lane);
      converted(kernels, m, k0 + i, n, lane0 + lane, length, pointers, conversion);
      gemm.pack_columns[static_cast<int>(side)](pointers, length, i, n, panels + lane / kernels.panel_width(side) * panel_bytes,
                                                panel_bytes);
    }
}

// A stretch of k within one segment.
struct Chunk {
  int64_t segment, k0, k, padded, start;  // start: padded k before it, over all segments
};

inline std::vector<Chunk> chunks_of(const Microkernel& gemm, int64_t segments, int64_t k) {
  std::vector<Chunk> chunks;
  int64_t start = 0;
  for (int64_t s = 0; s < segments; ++s)
    for (int64_t k0 = 0; k0 < k; k0 += gemm.kc) {
      const int64_t length = std::min<int64_t>(gemm.kc, k - k0), padded = round_up(length, gemm.k_step);
      chunks.push_back({s, k0, length, padded, start});
      start += padded;
    }
  return chunks;
}

// From one lane of operand A to the next within a k step, where panels are not row-major.
template <class T>
int64_t packed_stride(const Kernels<T>& kernels) {
  return kernels.gemm->k_step * kernels.element();
}

// Bytes of one panel over all of k of a segment, chunk after chunk.
template <class T>
int64_t packed_panel_bytes(const Kernels<T>& kernels, Side side, int64_t k) {
  return round_up(k, kernels.gemm->k_step) * kernels.panel_width(side) * kernels.element();
}

// The shared operand: [chunk][panel][padded k of the chunk][lanes of a panel].
template <class T>
class PackedOperand {
 public:
  PackedOperand(const Kernels<T>& kernels, Side side, int64_t lanes, int64_t segments, int64_t k)
      : kernels_(kernels), side_(side), lanes_(lanes), segment_k_(k),
        panels_((lanes + kernels.panel_width(side) - 1) / kernels.panel_width(side)), chunks_(chunks_of(*kernels.gemm, segments, k)),
        buffer_(bytes()) {
    // Such panels are written in part: what pads them must be zero before.
    if (kernels.gemm->row_major[static_cast<int>(side)]) std::memset(buffer_.get(), 0, bytes());
  }

  int64_t bytes() const {
    return (chunks_.empty() ? 0 : chunks_.back().start + chunks_.back().padded) * panels_ * kernels_.panel_width(side_) *
           kernels_.element();
  }
  int64_t lanes() const { return lanes_; }
  int64_t panels() const { return panels_; }
  int64_t segment_k() const { return segment_k_; }
  Side side() const { return side_; }
  const std::vector<Chunk>& chunks() const { return chunks_; }
  int in_panel(int64_t panel) const {
    return static_cast<int>(std::min<int64_t>(kernels_.panel_width(side_), lanes_ - panel * kernels_.panel_width(side_)));
  }
  char* at(int64_t panel, const Chunk& chunk) const {
    return buffer_.get() + (chunk.start * panels_ + panel * chunk.padded) * kernels_.panel_width(side_) * kernels_.element();
  }

  // Panels [first, last), all of k of one segment, out of memory.
  void pack(int64_t first, int64_t last, int64_t segment, const Operand& from, char* conversion) const {
    const int64_t width = kernels_.panel_width(side_);
    for (const Chunk& chunk : chunks_)
      if (chunk.segment == segment && first < last)
        pack_panels(kernels_, side_, from, first * width, std::min(lanes_, last * width) - first * width, chunk.k0, chunk.k,
                    at(first, chunk), chunk.padded * width * kernels_.element(), conversion);
  }

  // k values [first, first + n) of one segment, for the lanes of one panel, out of rows of computed values. `first` is a multiple of the k
  // step, and so is n unless the segment ends there.
  void write(int64_t panel, int64_t segment, int64_t first, int64_t n, const T* rows, int64_t ld, int lanes, char* conversion) const {
    const Type type = sizeof(T) == 8 ? Type::f64 : Type::f32;
    for (const Chunk& chunk : chunks_) {
      const int64_t begin = std::max(first, chunk.k0), end = std::min(first + n, chunk.k0 + chunk.k);
      if (chunk.segment != segment || begin >= end) continue;
      const Operand from{{rows, ld * static_cast<int64_t>(sizeof(T)), type}, true};
      if (kernels_.gemm->row_major[static_cast<int>(side_)]) {  // rows of the whole chunk: lane by lane
        for (int lane = 0; lane < lanes; ++lane)
          kernels_.convert(type, rows + lane * ld + begin - first, kernels_.gemm->panel,
                           at(panel, chunk) + (lane * chunk.padded + begin - chunk.k0) * kernels_.element(), end - begin);
        continue;
      }
      char* const to = at(panel, chunk) + (begin - chunk.k0) * kernels_.panel_width(side_) * kernels_.element();
      pack_panels(kernels_, side_, from, 0, lanes, begin - first, end - begin, to, 0, conversion);
    }
  }

 private:
  const Kernels<T> kernels_;
  Side side_;
  int64_t lanes_, segment_k_, panels_;
  std::vector<Chunk> chunks_;
  Buffer buffer_;
};

}  // namespace cmoe::cpu
