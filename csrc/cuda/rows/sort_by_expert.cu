// The order of assignments by expert, by counting: one launch for few assignments, two for many, and none that waits for another block.
//
// A block has a range of the assignments, a warp a part of that, and a warp reads 32 at a time. Lanes with the same expert find each other
// (match), so a lane's rank among them is a population count, and the lowest of them alone writes their number: every place is computed,
// none is drawn from a counter, and the order is stable and the same each time.
//   count   each block counts its assignments per expert, into a row of a table [blocks, E + 1]
//   order   each block adds up the table (at most `most_blocks` rows, from the second-level cache) for where each expert begins and what
//           lies before its own range, counts per warp, and stores each assignment at its place
// With a single block the table is not needed and `order` does it all.
//
// Shared memory: (warps + 2) (E + 1) integers. Assignments may be one row for all tokens, or one per group: the table is never spread out
// in memory.

#include "sort_by_expert.h"

#include <algorithm>

#include "../device/launch.h"
#include "rows.cuh"

namespace cmoe::cuda {
namespace {

constexpr int sort_threads = 256, sort_warps = sort_threads / 32;
constexpr int64_t least_range = 2048, most_blocks = 256, most_experts = 4096;

// Assignments of a block, a multiple of what its threads read at once.
int64_t range_of(int64_t n) {
  return std::max(least_range, (n + most_blocks * sort_threads - 1) / (most_blocks * sort_threads) * sort_threads);
}
int64_t blocks_of(int64_t n) { return (n + range_of(n) - 1) / range_of(n); }

// The place in indices and weights of assignment i, by row and column; false where its group does not exist.
__device__ bool locate(const Assignments& s, int64_t i, int64_t* row, int64_t* column) {
  const int64_t token = static_cast<uint32_t>(i) / static_cast<uint32_t>(s.k);  // below 2^31, and division by 64 bits is a subroutine
  *column = i - token * s.k;
  *row = s.group_ids ? s.group_ids[token] : s.rows == 1 ? 0 : token;
  return *row >= 0 && *row < s.rows;
}

// The expert of assignment i, E for "no expert" (as any index outside 0..E-1 is); -1 from `end` on.
__device__ int expert_of(const Assignments& s, int64_t i, int64_t end) {
  if (i >= end) return -1;
  int64_t row, column;
  if (!locate(s, i, &row, &column)) return static_cast<int>(s.experts);
  const int64_t e = s.indices.data[row * s.indices.row + column * s.indices.column];
  return static_cast<int>(e >= 0 && e < s.experts ? e : s.experts);
}

// Adds the assignments first..last-1, which are this warp's, to counts [E + 1]; each(i, expert, place) first, where place is the count so
// far of that expert and i's rank among its lanes.
template <class F>
__device__ void walk(const Assignments& s, int64_t first, int64_t last, int* counts, F&& each) {
  const int lane = static_cast<int>(threadIdx.x) & 31;
  for (int64_t at = first; at < last; at += 32) {
    const int expert = expert_of(s, at + lane, last);
    const uint32_t same = __match_any_sync(~0u, static_cast<uint32_t>(expert));
    const int before = __popc(same & ((1u << lane) - 1));
    const int sofar = expert < 0 ? 0 : counts[expert];
    if (expert >= 0) each(at + lane, sofar + before);
    __syncwarp();
    if (expert >= 0 && before == 0) counts[expert] = sofar + __popc(same);
    __syncwarp();
  }
}

// The range of the calling warp.
struct Range {
  int64_t first, last;

  __device__ Range(int64_t n, int64_t range) {
    const int64_t part = range / sort_warps, block_end = min(n, (blockIdx.x + int64_t{1}) * range);
    first = min(block_end, blockIdx.x * range + threadIdx.x / 32 * part);
    last = min(block_end, first + part);
  }
};

__device__ int* counts_of_warp(int* counts, int64_t columns) { return counts + threadIdx.x / 32 * columns; }

__device__ void count_by_warp(const Assignments& s, const Range& r, int* counts, int64_t columns) {
  for (int64_t i = threadIdx.x; i < sort_warps * columns; i += sort_threads) counts[i] = 0;
  __syncthreads();
  walk(s, r.first, r.last, counts_of_warp(counts, columns), [](int64_t, int) {});
  __syncthreads();
}

__global__ void __launch_bounds__(sort_threads, row_residents) sort_count_kernel(Assignments s, int* table, int64_t range) {
  CU_DYNAMIC_SHARED(memory);
  int* const counts = reinterpret_cast<int*>(memory);
  const int64_t columns = s.experts + 1;
  count_by_warp(s, Range(s.tokens * s.k, range), counts, columns);
  for (int64_t e = threadIdx.x; e < columns; e += sort_threads) {
    int sum = 0;
    for (int w = 0; w < sort_warps; ++w) sum += counts[w * columns + e];
    table[blockIdx.x * columns + e] = sum;
  }
}

__global__ void __launch_bounds__(sort_threads, row_residents)
    sort_order_kernel(Assignments s, Rows<float> weights, const int* table, int64_t* gather_idx, int* offsets, float* row_weights,
                      int64_t range) {
  CU_DYNAMIC_SHARED(memory);
  const int64_t columns = s.experts + 1;
  int *const counts = reinterpret_cast<int*>(memory), *const total = counts + sort_warps * columns, *const before = total + columns;
  const Range r(s.tokens * s.k, range);
  count_by_warp(s, r, counts, columns);
  for (int64_t e = threadIdx.x; e < columns; e += sort_threads) {
    int all = 0, earlier = 0;
    if (table) {
      for (unsigned b = 0; b < gridDim.x; ++b) {
        earlier = b == blockIdx.x ? all : earlier;
        all += table[b * columns + e];
      }
    } else {
      for (int w = 0; w < sort_warps; ++w) all += counts[w * columns + e];
    }
    total[e] = all;
    before[e] = earlier;
  }
  __syncthreads();
  if (threadIdx.x < 32) {  // totals to where each expert begins
    const int lane = static_cast<int>(threadIdx.x);
    int base = 0;
    for (int64_t start = 0; start < columns; start += 32) {
      const int own = start + lane < columns ? total[start + lane] : 0;
      int sum = own;
      for (int by = 1; by < 32; by *= 2) {
        const int lower = __shfl_up_sync(~0u, sum, by);
        if (lane >= by) sum += lower;
      }
      if (start + lane < columns) {
        total[start + lane] = base + sum - own;
        if (blockIdx.x == 0) offsets[start + lane] = base + sum - own;
      }
      base += __shfl_sync(~0u, sum, 31);
    }
  }
  __syncthreads();
  for (int64_t e = threadIdx.x; e < columns; e += sort_threads) {  // counts to where each warp begins
    int place = total[e] + before[e];
    for (int w = 0; w < sort_warps; ++w) {
      const int count = counts[w * columns + e];
      counts[w * columns + e] = place;
      place += count;
    }
  }
  __syncthreads();
  walk(s, r.first, r.last, counts_of_warp(counts, columns), [&](int64_t i, int place) {
    gather_idx[place] = i;
    if (row_weights) {
      int64_t row, column;
      row_weights[place] = locate(s, i, &row, &column) ? weights(row, column) : 0.0f;
    }
  });
}

}  // namespace

int64_t sort_scratch(const Assignments& s) {
  const int64_t blocks = blocks_of(s.tokens * s.k);
  return blocks > 1 ? blocks * (s.experts + 1) : 0;
}

void sort_by_expert(const Assignments& s, const Matrix& weights, int64_t* gather_idx, int32_t* offsets, float* row_weights,
                    int32_t* scratch, Stream stream) {
  const char* const name = "sort_by_expert";
  const int64_t n = s.tokens * s.k, range = range_of(n), blocks = std::max<int64_t>(1, blocks_of(n)), columns = s.experts + 1;
  if (n > INT32_MAX || s.experts > most_experts)
    throw std::runtime_error(std::string(name) + ": " + std::to_string(n) + " assignments among " + std::to_string(s.experts) +
                             " experts, at most " + std::to_string(INT32_MAX) + " and " + std::to_string(most_experts));
  const dim3 grid(static_cast<unsigned>(blocks));
  if (blocks > 1) launch(name, sort_count_kernel, grid, sort_threads, sort_warps * columns * sizeof(int), stream, s, scratch, range);
  launch(name, sort_order_kernel, grid, sort_threads, (sort_warps + 2) * columns * sizeof(int), stream, s, Rows<float>(weights),
         blocks > 1 ? scratch : nullptr, gather_idx, offsets, row_weights, range);
}

}  // namespace cmoe::cuda
