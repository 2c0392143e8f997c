#include "expert_rows.h"

#include "../gemm/epilogue.cuh"
#include "rows.cuh"

namespace cmoe::cuda {

namespace {

constexpr int block = 256;

// Enough blocks to fill the GPU; each goes on by the grid's size.
dim3 blocks_for(int64_t n) {
  const int64_t most = int64_t{multiprocessors()} * 8;
  return dim3(static_cast<unsigned>(n < most ? n : most));
}

// f(row, column) of a matrix, a block to a row.
template <class F>
__device__ void for_rows(int64_t rows, int64_t width, F&& f) {
  for (int64_t r = blockIdx.x; r < rows; r += gridDim.x)
    for (int64_t n = threadIdx.x; n < width; n += block) f(r, n);
}

__device__ inline float sum_of_warp(float v) {
  for (int by = 16; by; by /= 2) v += __shfl_xor_sync(~0u, v, by);
  return v;
}

// out[i] = the table's element for assignment (t, c) = order[i], or i itself.
__global__ void __launch_bounds__(block)
    per_token_kernel(const float* table, int64_t row, int64_t column, int64_t groups, const int64_t* ids, const int64_t* order,
                     int64_t count, int64_t columns, float* out) {
  for (int64_t i = int64_t{blockIdx.x} * block + threadIdx.x; i < count; i += int64_t{gridDim.x} * block) {
    const int64_t assignment = order ? order[i] : i, t = assignment / columns;
    const int64_t g = ids ? ids[t] : groups == 1 ? 0 : t;
    out[i] = g >= 0 && g < groups ? table[g * row + (assignment - t * columns) * column] : 0.0f;
  }
}

__global__ void __launch_bounds__(block)
    sum_per_group_kernel(const float* rows, const int64_t* ids, int64_t tokens, int64_t groups, int64_t columns, float* out) {
  CU_SHARED(float, sums, block / 32);
  for (int64_t i = blockIdx.x; i < groups * columns; i += gridDim.x) {
    const int64_t g = i / columns, c = i - g * columns;
    float sum = 0.0f;
    for (int64_t t = threadIdx.x; t < tokens; t += block)
      if (!ids || ids[t] == g) sum += rows[t * columns + c];
    sum = sum_of_warp(sum);
    if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = sum;
    __syncthreads();
    if (threadIdx.x == 0) {
      float total = 0.0f;
      for (int w = 0; w < block / 32; ++w) total += sums[w];
      out[i] = total;
    }
    __syncthreads();
  }
}

template <class T>
__global__ void __launch_bounds__(block) sum_assignments_kernel(const T* rows, int64_t tokens, int64_t k, int64_t width, T* y) {
  for_rows(tokens, width, [&](int64_t t, int64_t n) {
    float sum = 0.0f;
    for (int64_t i = 0; i < k; ++i) sum += to_float(rows[(t * k + i) * width + n]);
    y[t * width + n] = from_float<T>(sum);
  });
}

template <class T>
__global__ void __launch_bounds__(block)
    weighted_rows_kernel(RowOperand x, Groups groups, RoutingWeights routing_weights, int64_t width, T* out) {
  const Elements<T> from{x.data, x.type == Type::f32};
  const int64_t experts = groups.offsets ? 1 : groups.experts, live = groups.offsets ? groups.offsets[groups.experts] : groups.rows;
  for_rows(groups.rows * experts, width, [&](int64_t i, int64_t n) {
    const int64_t r = i / experts, e = i - r * experts;
    const int64_t source = r < live ? source_row(x.index, x.divisor, r, groups.rows) : -1;
    const float s = routing_weights.data ? routing_weights.data[r * routing_weights.row + e * routing_weights.expert] : 1.0f;
    out[i * width + n] = from_float<T>(source < 0 ? 0.0f : s * to_float(from(source * x.row + n * x.column)));
  });
}

template <class T>
__global__ void __launch_bounds__(block)
    activation_gradient_kernel(RowOperand dy, const T* u, int64_t rows, int64_t width, Activation f, T* du) {
  const Elements<T> from{dy.data, dy.type == Type::f32};
  for_rows(rows, width, [&](int64_t r, int64_t n) {
    const int64_t source = source_row(dy.index, dy.divisor, r, rows), at = r * width + n;
    du[at] = from_float<T>(source < 0 ? 0.0f : to_float(from(source * dy.row + n * dy.column)) * slope(f, to_float(u[at])).derivative);
  });
}

// A warp to a weight: its lanes share the row of dy.
template <class T>
__global__ void __launch_bounds__(block) routing_weight_grad_kernel(const float* partials, int64_t tiles, int64_t count, RowOperand dy,
                                                                    BiasTable<T> b, int64_t width, Groups groups, float* out) {
  const Elements<T> from{dy.data, dy.type == Type::f32};
  const int lane = static_cast<int>(threadIdx.x) % 32;
  for (int64_t i = int64_t{blockIdx.x} * (block / 32) + threadIdx.x / 32; i < count; i += int64_t{gridDim.x} * (block / 32)) {
    int64_t r = i, e, target = i;
    if (groups.offsets) {
      e = 0;
      while (e < groups.experts && i >= groups.offsets[e + 1]) ++e;
      target = dy.index ? dy.index[i] : i;
    } else {
      r = i / groups.experts, e = i - r * groups.experts;
    }
    float sum = 0.0f;
    if (e < groups.experts) {
      if (b) {
        const int64_t source = source_row(dy.index, dy.divisor, r, groups.rows);
        for (int64_t n = lane; n < width && source >= 0; n += 32) sum += to_float(from(source * dy.row + n * dy.column)) * b(e, n);
      }
      sum = sum_of_warp(sum);
      for (int64_t tile = 0; tile < tiles; ++tile) sum += partials[tile * count + i];
    }
    if (lane == 0) out[target] = sum;
  }
}

__global__ void settled_offsets_kernel(const int32_t* offsets, int64_t stride, int64_t experts, int64_t rows, int32_t* out) {
  if (threadIdx.x) return;
  int32_t last = 0;
  out[0] = 0;
  for (int64_t e = 1; e <= experts; ++e) {
    last = max(last, static_cast<int32_t>(min(static_cast<int64_t>(offsets[e * stride]), rows)));
    out[e] = last;
  }
}

}  // namespace

void per_row(const float* table, int64_t row, int64_t column, int64_t groups, const int64_t* group_ids, const int64_t* order, int64_t rows,
             int64_t k, float* out, Stream stream) {
  if (!rows) return;
  launch("per_row", per_token_kernel, blocks_for((rows + block - 1) / block), block, 0, stream, table, row, column, groups, group_ids,
         order, rows, k, out);
}

void per_token(const float* table, int64_t row, int64_t column, int64_t groups, const int64_t* group_ids, int64_t tokens, int64_t columns,
               float* out, Stream stream) {
  per_row(table, row, column, groups, group_ids, nullptr, tokens * columns, columns, out, stream);
}

void sum_per_group(const float* rows, const int64_t* group_ids, int64_t tokens, int64_t groups, int64_t columns, float* out,
                   Stream stream) {
  if (!groups || !columns) return;
  launch("sum_per_group", sum_per_group_kernel, blocks_for(groups * columns), block, 0, stream, rows, group_ids, tokens, groups, columns,
         out);
}

void sum_assignments(Type type, const void* rows, int64_t tokens, int64_t k, int64_t width, void* y, Stream stream) {
  if (!tokens || !width) return;
  dispatch("sum_assignments", type, [&](auto zero) {
    using T = decltype(zero);
    launch("sum_assignments", sum_assignments_kernel<T>, blocks_for(tokens), block, 0, stream, static_cast<const T*>(rows), tokens, k,
           width, static_cast<T*>(y));
  });
}

void weighted_rows(Type type, const RowOperand& x, const Groups& groups, const RoutingWeights& routing_weights, int64_t width, void* out,
                   Stream stream) {
  const int64_t rows = groups.rows * (groups.offsets ? 1 : groups.experts);
  if (!rows || !width) return;
  dispatch("weighted_rows", type, [&](auto zero) {
    using T = decltype(zero);
    launch("weighted_rows", weighted_rows_kernel<T>, blocks_for(rows), block, 0, stream, x, groups, routing_weights, width,
           static_cast<T*>(out));
  });
}

void activation_gradient(Type type, const RowOperand& dy, const void* u, int64_t rows, int64_t width, Activation f, void* du,
                         Stream stream) {
  if (!rows || !width) return;
  dispatch("activation_gradient", type, [&](auto zero) {
    using T = decltype(zero);
    launch("activation_gradient", activation_gradient_kernel<T>, blocks_for(rows), block, 0, stream, dy, static_cast<const T*>(u), rows,
           width, f, static_cast<T*>(du));
  });
}

void routing_weight_grad(const float* partials, int64_t tiles, const RowOperand& dy, Type type, const Table& b, int64_t width,
                         const Groups& groups, float* out, Stream stream) {
  const int64_t count = groups.rows * (groups.offsets ? 1 : groups.experts);
  if (!count) return;
  dispatch("routing_weight_grad", type, [&](auto zero) {
    using T = decltype(zero);
    launch("routing_weight_grad", routing_weight_grad_kernel<T>, blocks_for((count + block / 32 - 1) / (block / 32)), block, 0, stream,
           partials, tiles, count, dy, BiasTable<T>(b), width, groups, out);
  });
}

void settled_offsets(const int32_t* offsets, int64_t stride, int64_t experts, int64_t rows, int32_t* out, Stream stream) {
  launch("settled_offsets", settled_offsets_kernel, 1, 32, 0, stream, offsets, stride, experts, rows, out);
}

}  // namespace cmoe::cuda
