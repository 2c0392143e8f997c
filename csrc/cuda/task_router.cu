// task_router on the GPU.
//
//     u = W_task task[group] + W x + b1      logits = W2 act(u) + b2
//
// The task's part of the first layer is one row per task, [G, R] in fp32, and is the bias of the product over tokens. That product's
// epilogue stores u where it is to be saved and multiplies act(u) by W2 at once, for up to 16 experts: a thread keeps the hidden units of
// its two rows in registers, takes one expert after the other, and the four lanes and the warps along a row add up in shared memory. A tile
// leaves [rows, E] sums for its columns; add_partials adds the tiles in their order. The hidden layer goes to memory only to be saved.
//
// Backward: du and act(u) both follow from u, which a thread reads for one hidden unit and a range of rows: du is stored for the products,
// and summed per group as long as the group stays the same, into the range's own row of partials; dW2 likewise, 16 experts at a time.

#include "task_router.h"

#include <algorithm>

#include "router_epilogue.cuh"

namespace cmoe::cuda {
namespace {

constexpr int column_threads = 128;
constexpr int64_t least_rows = 32, most_ranges = 32;

struct GradientArguments {
  int64_t rows, width, experts, range;
  const float* dlogits;
  int64_t row, column;
  Activation activation;
  const int64_t* group_ids;
  int64_t groups;

  __device__ float dlogit(int64_t t, int64_t e) const { return dlogits[t * row + e * column]; }
  __device__ int64_t first() const { return blockIdx.y * range; }
  __device__ int64_t last() const { return min(rows, (blockIdx.y + int64_t{1}) * range); }
};

GradientArguments arguments(const RouterGradient& g) {
  const int64_t ranges = std::max<int64_t>(1, router_ranges(g.rows));
  return {g.rows,
          g.width,
          g.experts,
          (g.rows + ranges - 1) / ranges,
          static_cast<const float*>(g.dlogits.data),
          g.dlogits.row,
          g.dlogits.column,
          g.activation,
          g.group_ids,
          g.groups};
}

template <class T>
__global__ void __launch_bounds__(column_threads)
    router_bwd_du_kernel(GradientArguments g, BiasTable<T> w2, const T* u, T* du, float* dbias) {
  const int64_t n = static_cast<int64_t>(blockIdx.x) * column_threads + threadIdx.x;
  if (n >= g.width) return;
  int64_t group = -1;
  float sum = 0.0f;
  const auto leave = [&] {
    if (dbias && group >= 0 && group < g.groups) dbias[(blockIdx.y * g.groups + group) * g.width + n] += sum;
    sum = 0.0f;
  };
  for (int64_t t = g.first(); t < g.last(); ++t) {
    const int64_t own = g.group_ids ? g.group_ids[t] : 0;
    if (own != group) leave();
    group = own;
    float dh = 0.0f;
    for (int64_t e = 0; e < g.experts; ++e) dh = fmaf(g.dlogit(t, e), w2(e, n), dh);
    const T value = from_float<T>(dh * slope(g.activation, to_float(u[t * g.width + n])).derivative);
    du[t * g.width + n] = value;
    sum += to_float(value);
  }
  leave();
}

template <class T>
__global__ void __launch_bounds__(column_threads) router_bwd_dw2_kernel(GradientArguments g, const T* u, float* partials) {
  const int64_t n = static_cast<int64_t>(blockIdx.x) * column_threads + threadIdx.x, e0 = blockIdx.z * most_fused;
  if (n >= g.width) return;
  float sums[most_fused] = {};
  for (int64_t t = g.first(); t < g.last(); ++t) {
    const float h = activate(g.activation, to_float(u[t * g.width + n]));
#pragma unroll
    for (int i = 0; i < most_fused; ++i)
      if (e0 + i < g.experts) sums[i] = fmaf(g.dlogit(t, e0 + i), h, sums[i]);
  }
#pragma unroll
  for (int i = 0; i < most_fused; ++i)
    if (e0 + i < g.experts) partials[(blockIdx.y * g.experts + e0 + i) * g.width + n] = sums[i];
}

// A warp adds 32 neighbouring results; the warps of a block share the partials, and meet in shared memory.
constexpr int adding_warps = 8;

template <class Out>
__global__ void __launch_bounds__(32 * adding_warps)
    add_partials_kernel(const float* partials, int64_t count, int64_t n, const float* b, int64_t columns, Out* out) {
  CU_SHARED(float, sums, 32 * adding_warps);
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const int64_t i = static_cast<int64_t>(blockIdx.x) * 32 + lane;
  float sum = 0.0f;
  for (int64_t p = warp; i < n && p < count; p += adding_warps) sum += partials[p * n + i];
  sums[threadIdx.x] = sum;
  __syncthreads();
  if (warp || i >= n) return;
  for (int w = 1; w < adding_warps; ++w) sum += sums[32 * w + lane];
  out[i] = from_float<Out>(sum + (b ? b[i % columns] : 0.0f));
}

template <class F>
void dispatch_type(const char* operation, Type type, F&& f) {
  switch (type) {
    case Type::f32: return f(float{});
    case Type::bf16: return f(bf16{});
    case Type::f16: return f(fp16{});
    default: throw std::runtime_error(std::string(operation) + ": fp64 has no CUDA kernel");
  }
}

dim3 column_grid(int64_t width, int64_t ranges, int64_t z) {
  return dim3(static_cast<unsigned>((width + column_threads - 1) / column_threads), static_cast<unsigned>(ranges),
              static_cast<unsigned>(z));
}

}  // namespace

void router_product(const char* operation, const RouterProduct& p, Stream stream) {
  if (p.width && !router_product_sm90(operation, p, stream)) run_rows<RouterEpilogue>(operation, p.type, arguments(p), p, stream);
}

int64_t router_partials(const RouterProduct& p) {
  if (const int64_t parts = router_partials_sm90(p)) return parts;
  const bool large = RowLoads(p.type, arguments(p)).how == Load::async && takes_large_tiles(arguments(p).groups, p.width);
  const int64_t wide = large ? LargeTile::n : SmallTile::n;
  return (p.width + wide - 1) / wide;
}

int64_t router_ranges(int64_t rows) { return std::min(most_ranges, (rows + least_rows - 1) / least_rows); }

void router_hidden_gradient(const RouterGradient& g, void* du, float* dbias, Stream stream) {
  const char* const name = "task_router_backward";
  if (!g.rows || !g.width) return;
  dispatch_type(name, g.type, [&](auto zero) {
    using T = decltype(zero);
    launch(name, router_bwd_du_kernel<T>, column_grid(g.width, router_ranges(g.rows), 1), column_threads, 0, stream, arguments(g),
           BiasTable<T>(g.w2), static_cast<const T*>(g.u), static_cast<T*>(du), dbias);
  });
}

void router_weight_gradient(const RouterGradient& g, float* partials, Stream stream) {
  const char* const name = "task_router_backward";
  if (!g.rows || !g.width || !g.experts) return;
  dispatch_type(name, g.type, [&](auto zero) {
    using T = decltype(zero);
    launch(name, router_bwd_dw2_kernel<T>, column_grid(g.width, router_ranges(g.rows), (g.experts + most_fused - 1) / most_fused),
           column_threads, 0, stream, arguments(g), static_cast<const T*>(g.u), partials);
  });
}

void add_partials(const float* partials, int64_t count, int64_t n, const float* b, int64_t columns, void* out, Type out_type,
                  Stream stream) {
  if (!n) return;
  dispatch_type("task_router", out_type, [&](auto zero) {
    using Out = decltype(zero);
    launch("task_router", add_partials_kernel<Out>, dim3(static_cast<unsigned>((n + 31) / 32)), 32 * adding_warps, 0, stream, partials,
           count, n, b, columns, static_cast<Out*>(out));
  });
}

}  // namespace cmoe::cuda
