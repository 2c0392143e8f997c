// What an instruction set provides: packing, the product of two panels, and functions over rows. The drivers know no instruction and
// these functions know no operation.
//
// A panel holds some lanes (rows or columns of a matrix) over a stretch of the reduction index k, padded with zeros to the kernel's
// lanes and to a multiple of its k step, in the order in which the kernel reads it. Operand A's lanes become the rows of the block of
// products, operand B's its columns: block[i, j] = sum_k A[i, k] B[j, k], stored [mr, nr] without gaps.
//
// The files of this folder that are compiled for one instruction set include C headers and intrinsics only, and define everything
// but their table in an unnamed namespace: an inline function of theirs, merged by the linker with its namesake elsewhere, would
// bring their instructions to machines that lack them.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "../../types.h"

namespace cmoe::cpu {

using cmoe::Activation, cmoe::Type, cmoe::size_of;

enum class Side : int { a, b };

// Memory to prefetch into the L2 cache beside a product, for those that follow: rows of a few cache lines.
struct Prefetch {
  const char* data = nullptr;
  int64_t stride = 0;
  int rows = 0, lines = 0;
};

// A block of finished sums, and where its rows go.
struct Finished {
  const void* sums;
  char* to;
  int64_t stride;
  int rows, columns;
};

struct Microkernel {
  Type panel;  // type of a panel's elements
  int mr, nr;
  int k_step;         // depths of panels are multiples of this
  int kc;             // depth at which a resident panel fills its share of the L1 cache
  Side weights;       // the operand that weights are in y = x W^T; b: the block is [tokens, weights]
  bool row_major[2];  // by side: a panel is rows of all its k values; else the values of all lanes lie together, k step by k step
  bool in_place;  // operand A's rows may lie at any stride but that of a packed panel: a matrix whose rows lie along k is read where it is
  bool outer_resident;  // the outer operand's panel stays in L1 while the shared operand streams by; else B's does

  // By side. Rows along k: one panel, `k` deep; rows[lane] points at the first k.
  void (*pack_rows[2])(const void* const* rows, int lanes, int64_t k, void* panel);
  // Rows along lanes: as many panels as `lanes` fill, panel_bytes apart, so that rows are read in long runs. rows[i] points at the first
  // lane of k0 + i; k0 is a multiple of the k step, and so is k unless the panel ends there.
  void (*pack_columns[2])(const void* const* rows, int64_t lanes, int64_t k0, int64_t k, void* panels, int64_t panel_bytes);

  // Around all products of a block; null where there is nothing to set up.
  void (*begin)();
  void (*end)();

  // block = A B^T over k (a multiple of k_step), or block += with add; `used` lanes of A are in use; of B, where B is row-major.
  // a_stride: bytes from one lane of A to the next where A is read in place or row-major. By the side of the resident operand.
  void (*multiply[2])(const void* a, int64_t a_stride, const void* b, void* block, int64_t k, int used, bool add, const Prefetch& prefetch);
  // The same with A resident, and beside it a whole finished block becomes rows of the panels' type: whole cache lines, past the caches.
  // May be null.
  void (*multiply_and_store)(const void* a, int64_t a_stride, const void* b, void* block, int64_t k, int used, bool add,
                             const Prefetch& prefetch, const Finished& finished);

  // Operand B is int8 weights that were packed before, [k / 4][nr][4], zeros behind the last. A's panels are fp32, and so are the sums; or
  // int8, and the sums are int32.
  bool int8_weights = false;
  // Such a panel as fp32, [k][nr], which multiply then reads; null where it reads int8.
  void (*widen)(const void* packed, int64_t k, void* panel) = nullptr;
};

// Functions over n values; T is float, or double for fp64.
template <class T>
struct RowFunctions {
  void (*load)(Type type, const void* from, T* to, int64_t n);
  void (*store)(Type type, const T* from, void* to, int64_t n);
  void (*round)(Type type, T* x, int64_t n);                                       // to the values that the type has
  void (*activate)(Activation f, const T* u, T* h, int64_t n);                     // h = f(u)
  void (*activate_backward)(Activation f, const T* u, T* h, T* slope, int64_t n);  // h = f(u), slope = f'(u)
  void (*add)(const T* x, T* y, int64_t n);                                        // y += x
  void (*multiply)(const T* x, T* y, int64_t n);                                   // y *= x
  void (*scale)(T s, T* y, int64_t n);                                             // y *= s
  void (*axpy)(T s, const T* x, T* y, int64_t n);                                  // y += s x
  T (*dot)(const T* x, const T* y, int64_t n);
  void (*exp)(const T* x, T* y, int64_t n);  // y = exp(x)
  // Rows of n finished values, to where the caller does not read them again.
  void (*store_block)(Type type, const T* from, int64_t from_ld, char* to, int64_t to_stride, int64_t rows, int64_t n);
};

struct Isa {
  const char* name;
  const Microkernel* f32;                         // for fp32, and for half-precision types that have no kernel of their own
  const Microkernel* bf16;                        // null: bf16 runs as fp32
  const Microkernel *f32_small_m, *bf16_small_m;  // for few tokens, y = x W^T alone, W along k: dot products, W read once where it is
  const RowFunctions<float>* rows;
  void (*convert)(Type from, const void* source, Type to, void* target, int64_t n);  // fp32, bf16 and fp16
  void (*transpose)(const float* from, int64_t from_ld, float* to, int64_t to_ld, int rows, int columns);
  const Microkernel *w8, *w8_wide;      // int8 weights, fp32 activations: few rows, and many, for which a panel becomes fp32 once
  const Microkernel* i8;                // int8 weights, int8 activations; null: the processor has no such products
  const Microkernel* w8_few = nullptr;  // as w8, faster for at most its mr rows; null where w8 serves them
};

extern const Isa isa_generic, isa_avx2, isa_avx_vnni, isa_avx512, isa_avx512_vnni, isa_avx512_bf16, isa_amx;
extern const Microkernel microkernel_f64;
extern const RowFunctions<double> row_functions_f64;

}  // namespace cmoe::cpu
