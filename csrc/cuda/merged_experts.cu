#include "merged_experts.h"

#include "gemm/tile.cuh"
#include "rows/rows.cuh"

namespace cmoe::cuda {

namespace {

constexpr int block = 256;

template <class T>
__device__ float value(const Stack& stack, int64_t e, int64_t i, int64_t j) {
  return to_float(Elements<T>{stack.data, false}(e * stack.expert + i * stack.row + j * stack.column));
}

// A thread has one element of all results, so that the stack is read from memory once.
template <class T, class Out>
__global__ void __launch_bounds__(block) mix_kernel(Stack stack, const float* c, int64_t c_row, int64_t c_column, int64_t m, Out* out) {
  for (int64_t i = blockIdx.x; i < stack.height; i += gridDim.x)
    for (int64_t j = threadIdx.x; j < stack.width; j += block)
      for (int64_t g = 0; g < m; ++g) {
        float sum = 0.0f;
        for (int64_t e = 0; e < stack.experts; ++e) sum += c[g * c_row + e * c_column] * value<T>(stack, e, i, j);
        out[(g * stack.height + i) * stack.width + j] = from_float<Out>(sum);
      }
}

__device__ inline float sum_of_block(float v, float* sums) {
  for (int by = 16; by; by /= 2) v += __shfl_xor_sync(~0u, v, by);
  if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = v;
  __syncthreads();
  float total = 0.0f;
  for (int w = 0; w < block / 32; ++w) total += sums[w];
  __syncthreads();
  return total;
}

// scratch[part, g, e]: every `partials`-th row of the stack.
template <class T>
__global__ void __launch_bounds__(block)
    dot_partials_kernel(Stack stack, const float* d, int64_t groups, int64_t partials, float* scratch) {
  CU_SHARED(float, sums, block / 32);
  const int64_t pairs = groups * stack.experts;
  for (int64_t t = blockIdx.x; t < partials * pairs; t += gridDim.x) {
    const int64_t part = t / pairs, g = t % pairs / stack.experts, e = t % stack.experts;
    float sum = 0.0f;
    for (int64_t i = part; i < stack.height; i += partials)
      for (int64_t j = threadIdx.x; j < stack.width; j += block)
        sum += d[(g * stack.height + i) * stack.width + j] * value<T>(stack, e, i, j);
    sum = sum_of_block(sum, sums);
    if (threadIdx.x == 0) scratch[t] = sum;
  }
}

__global__ void __launch_bounds__(block) add_partials_kernel(const float* scratch, int64_t partials, int64_t pairs, bool add, float* out) {
  for (int64_t i = int64_t{blockIdx.x} * block + threadIdx.x; i < pairs; i += int64_t{gridDim.x} * block) {
    float sum = add ? out[i] : 0.0f;
    for (int64_t part = 0; part < partials; ++part) sum += scratch[part * pairs + i];
    out[i] = sum;
  }
}

dim3 blocks_for(int64_t n) {
  const int64_t most = int64_t{multiprocessors()} * 8;
  return dim3(static_cast<unsigned>(n < most ? n : most));
}

}  // namespace

void mix(const Stack& stack, const float* c, int64_t c_row, int64_t c_column, int64_t m, Type out_type, void* out, Stream stream) {
  if (!m || !stack.height || !stack.width) return;
  dispatch("mix", stack.type, [&](auto from) {
    using T = decltype(from);
    dispatch("mix", out_type, [&](auto to) {
      using Out = decltype(to);
      launch("mix", mix_kernel<T, Out>, blocks_for(stack.height), block, 0, stream, stack, c, c_row, c_column, m, static_cast<Out*>(out));
    });
  });
}

int64_t dot_partials(const Stack& stack) { return stack.height < 64 ? stack.height : 64; }

void dots(const Stack& stack, const float* d, int64_t groups, bool add, float* scratch, float* out, Stream stream) {
  const int64_t partials = dot_partials(stack), pairs = groups * stack.experts;
  if (!pairs) return;
  if (partials)
    dispatch("dots", stack.type, [&](auto from) {
      using T = decltype(from);
      launch("dots", dot_partials_kernel<T>, blocks_for(partials * pairs), block, 0, stream, stack, d, groups, partials, scratch);
    });
  launch("dots", add_partials_kernel, blocks_for((pairs + block - 1) / block), block, 0, stream, scratch, partials, pairs, add, out);
}

}  // namespace cmoe::cuda
