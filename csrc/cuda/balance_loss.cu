// balance_loss on the GPU.
//
//     switch       E sum_e f_e m_e / n          m_e = sum of scores[:, e], n tokens that count,
//                                               f_e = share of the assignments that went to e
//     importance   E sum_e d_e^2                d_e = m_e / sum_j m_j - 1/E: zero where there is no mass
//     z            sum_t logsumexp(scores[t])^2 / n
//     the mean over the segments that hold a token that counts; without segments all tokens are one.
//
// d loss / d scores[t, e] is one slope per segment and expert for every token that counts (for "z" a factor on logsumexp times softmax).
//
// Without segments: each block sums a range of the tokens into a row of partials, one block adds the rows and makes the loss or the slopes
// of them, and backward then writes the gradient in one pass. With segments, whose labels come sorted: block i serves every position i,
// i + blocks ... at which a label begins, finds its end by bisection, and sums the segment alone, in token order; partials are a block's
// sum of losses and how many segments it found. Backward does that first, since the mean needs their number, and then once more to write.
// Blocks and ranges follow from the shape alone, and sums run in one order: the same bits on every GPU. No [segments, E], no one-hot.
//
// Sums over tokens: `width` lanes lie along a row, the other threads along the tokens; partial sums of a column meet by shuffles and in
// shared memory. Assignments are counted in shared memory by integer atomics. Shared memory: 2 E values.

#include "balance_loss.h"

#include <algorithm>

#include "rows/rows.cuh"

namespace cmoe::cuda {
namespace {

using Kind = BalanceLoss::Kind;

constexpr int warps = row_threads / 32;
constexpr int64_t most_parts = 128, least_range = 128, most_segment_blocks = 512;

int64_t range_of(int64_t tokens) { return std::max(least_range, (tokens + most_parts - 1) / most_parts); }
int64_t parts_of(const BalanceLoss& op) {
  if (op.labels) return std::min(op.tokens, most_segment_blocks);
  return (op.tokens + range_of(op.tokens) - 1) / range_of(op.tokens);
}

// The same in all threads.
template <class V>
__device__ V block_sum(V x) {
  CU_SHARED(V, partials, warps);
  for (int by = 16; by; by /= 2) x += __shfl_xor_sync(~0u, x, by);
  __syncthreads();
  if (threadIdx.x % 32 == 0) partials[threadIdx.x / 32] = x;
  __syncthreads();
  V sum = 0;
  for (int w = 0; w < warps; ++w) sum += partials[w];
  return sum;
}

// to[e] = sum of value(row, e) over rows 0..rows-1, in shared memory.
template <class V, class Value>
__device__ void column_sums(int64_t rows, int64_t columns, int width, V* to, const Value& value) {
  CU_SHARED(V, partials, row_threads);
  const int lane = static_cast<int>(threadIdx.x) & (width - 1), warp = static_cast<int>(threadIdx.x) / 32;
  for (int64_t first = 0; first < columns; first += width) {
    const int64_t e = first + lane;
    V sum = 0;
    for (int64_t row = static_cast<int>(threadIdx.x) / width; row < rows && e < columns; row += row_threads / width) sum += value(row, e);
    for (int by = width; by < 32; by *= 2) sum += __shfl_xor_sync(~0u, sum, by);
    __syncthreads();
    if (static_cast<int>(threadIdx.x) % 32 < width) partials[warp * width + lane] = sum;
    __syncthreads();
    if (static_cast<int>(threadIdx.x) < width && e < columns) {
      V whole = 0;
      for (int w = 0; w < warps; ++w) whole += partials[w * width + lane];
      to[e] = whole;
    }
  }
  __syncthreads();
}

// Tokens that one block sums: first..last-1, or those at these places of the order by segment.
struct Span {
  int64_t first, last;
  const int64_t* order;

  __device__ int64_t size() const { return last - first; }
  __device__ int64_t token(int64_t row) const { return order ? order[first + row] : first + row; }
};

// A row's logsumexp and the softmax that goes with it. All lanes of the warp take part.
template <class T>
struct LogSumExp {
  float base, total, inverse;

  __device__ LogSumExp(const Place& p, const Rows<T>& scores, int64_t experts) {
    float top = -infinity, sum = 0.0f;
    p.each(experts, [&](int64_t e) { top = fmaxf(top, scores(p.t, e)); });
    top = p.largest(top);
    base = top == -infinity ? 0.0f : top;
    p.each(experts, [&](int64_t e) { sum += expf(scores(p.t, e) - base); });
    total = p.sum(sum);
    inverse = 1.0f / total;
  }
  __device__ float value() const { return base + logf(total); }
  __device__ float softmax(float score) const { return expf(score - base) * inverse; }
};

// f(place, counts) for each row of the span, in whole warps; the token is in place.t, and only a live place is in the span.
template <class F>
__device__ void each_row(const BalanceLoss& op, const Span& span, int width, F&& f) {
  const int slots = row_threads / width;
  for (int64_t base = 0; base < span.size(); base += slots) {
    Place p(1, width);
    const int64_t row = base + threadIdx.x / width;
    p.live = row < span.size();
    p.t = span.token(p.live ? row : 0);
    f(p, p.live && (!op.mask || op.mask[p.t]));
  }
}

// Sums of a span: mass and selected [E] in shared memory, the rest in every thread.
struct Sums {
  float* mass;
  int* selected;
  int tokens = 0;
  float squares = 0.0f;

  template <class T>
  __device__ void add(const BalanceLoss& op, const Rows<T>& scores, const Span& span, int width) {
    const auto counts = [&](int64_t t) { return !op.mask || op.mask[t]; };
    int held = 0;
    for (int64_t row = threadIdx.x; row < span.size(); row += row_threads) held += counts(span.token(row));
    tokens = block_sum(held);
    if (op.kind == Kind::z) {
      float own = 0.0f;
      each_row(op, span, width, [&](const Place& p, bool counted) {
        const float z = LogSumExp<T>(p, scores, op.experts).value();
        if (counted && p.lane == 0) own += z * z;
      });
      squares = block_sum(own);
      return;
    }
    column_sums(span.size(), op.experts, width, mass, [&](int64_t row, int64_t e) {
      const int64_t t = span.token(row);
      return counts(t) ? scores(t, e) : 0.0f;
    });
    if (!op.indices.data) return;
    for (int64_t e = threadIdx.x; e < op.experts; e += row_threads) selected[e] = 0;
    __syncthreads();
    for (int64_t row = threadIdx.x; row < span.size(); row += row_threads) {
      const int64_t t = span.token(row);
      for (int64_t i = 0; counts(t) && i < op.k; ++i) {
        const int64_t e = op.indices.data[t * op.indices.row + i * op.indices.column];
        if (e >= 0 && e < op.experts) atomicAdd(selected + e, 1);
      }
    }
    __syncthreads();
  }

  // The loss of these sums; mass becomes the slopes.
  __device__ float statistic(const BalanceLoss& op) {
    const float experts = static_cast<float>(op.experts), n = static_cast<float>(tokens > 1 ? tokens : 1);
    const auto each = [&](auto&& f) {
      for (int64_t e = threadIdx.x; e < op.experts; e += row_threads) f(e);
    };
    float loss = 0.0f;
    if (op.kind == Kind::switch_) {
      float whole = n * static_cast<float>(op.k);
      if (op.counts) {
        float sum = 0.0f;
        if (!op.total) each([&](int64_t e) { sum += op.counts[e]; });
        sum = block_sum(sum);
        whole = fmaxf(op.total ? *op.total : sum, 1.0f);
      }
      const float each_share = 1.0f / whole, factor = experts / n;
      each([&](int64_t e) {
        const float share = (op.counts ? op.counts[e] : static_cast<float>(selected[e])) * each_share;
        loss += share * mass[e];
        mass[e] = factor * share;
      });
      loss = factor * block_sum(loss);
    } else if (op.kind == Kind::importance) {
      float total = 0.0f, square = 0.0f;
      each([&](int64_t e) { total += mass[e]; });
      total = block_sum(total);
      const float mean = total / experts, inverse = total == 0.0f ? 0.0f : 1.0f / total,
                  slope = 2.0f * experts * (total == 0.0f ? 1.0f : inverse);
      // E sum p^2 - 1 in terms of d = p - 1/E: no difference of nearly equal numbers, and exactly zero at balance.
      const auto deviation = [&](int64_t e) { return (mass[e] - mean) * inverse; };
      each([&](int64_t e) { square += deviation(e) * deviation(e); });
      square = block_sum(square);
      loss = experts * square;
      each([&](int64_t e) { mass[e] = slope * (deviation(e) - square); });
    } else {
      loss = squares / n;
      each([&](int64_t e) { mass[e] = 2.0f / n; });
    }
    if (!tokens) {
      loss = 0.0f;
      each([&](int64_t e) { mass[e] = 0.0f; });
    }
    __syncthreads();
    return loss;
  }
};

__device__ Sums shared_sums(unsigned char* memory, const BalanceLoss& op) {
  float* const mass = reinterpret_cast<float*>(memory);
  return {mass, reinterpret_cast<int*>(mass + op.experts)};
}

// The gradient of the rows of a span: slopes [E] times a factor, zero for a token that does not count.
template <class T>
__device__ void spread(const BalanceLoss& op, const Rows<T>& scores, const Span& span, int width, const float* slopes, float factor,
                       T* dscores) {
  each_row(op, span, width, [&](const Place& p, bool counted) {
    T* const row = dscores + p.t * op.experts;
    if (op.kind == Kind::z) {
      const LogSumExp<T> sum(p, scores, op.experts);
      const float z = sum.value();
      if (p.live)
        p.each(op.experts,
               [&](int64_t e) { row[e] = from_float<T>(counted ? slopes[e] * factor * z * sum.softmax(scores(p.t, e)) : 0.0f); });
    } else if (p.live) {
      p.each(op.experts, [&](int64_t e) { row[e] = from_float<T>(counted ? slopes[e] * factor : 0.0f); });
    }
  });
}

// Partials of a block: tokens and the sum of squares, then mass and assignments per expert.
__host__ __device__ inline int64_t part_size(int64_t experts) { return 2 + 2 * experts; }

template <class T>
__global__ void __launch_bounds__(row_threads, row_residents)
    balance_loss_sums_kernel(BalanceLoss op, Rows<T> scores, float* partials, int64_t range, int width) {
  CU_DYNAMIC_SHARED(memory);
  Sums sums = shared_sums(memory, op);
  const int64_t first = blockIdx.x * range;
  sums.add(op, scores, Span{first, min(first + range, op.tokens), nullptr}, width);
  float* const part = partials + blockIdx.x * part_size(op.experts);
  if (threadIdx.x == 0) {
    part[0] = __int_as_float(sums.tokens);
    part[1] = sums.squares;
  }
  if (op.kind == Kind::z) return;
  for (int64_t e = threadIdx.x; e < op.experts; e += row_threads) {
    part[2 + e] = sums.mass[e];
    if (op.indices.data) part[2 + op.experts + e] = __int_as_float(sums.selected[e]);
  }
}

// The loss, or the slopes [E] of the gradient where these are wanted.
__global__ void __launch_bounds__(row_threads, row_residents)
    balance_loss_statistic_kernel(BalanceLoss op, const float* partials, int64_t count, float* loss, float* slopes, int width) {
  CU_DYNAMIC_SHARED(memory);
  Sums sums = shared_sums(memory, op);
  const int64_t size = part_size(op.experts);
  int tokens = 0;
  float squares = 0.0f;
  for (int64_t p = threadIdx.x; p < count; p += row_threads) {
    tokens += static_cast<int>(__float_as_uint(partials[p * size]));
    squares += partials[p * size + 1];
  }
  sums.tokens = block_sum(tokens);
  sums.squares = block_sum(squares);
  if (op.kind != Kind::z)
    column_sums(count, op.experts, width, sums.mass, [&](int64_t p, int64_t e) { return partials[p * size + 2 + e]; });
  if (op.indices.data)
    column_sums(count, op.experts, width, sums.selected,
                [&](int64_t p, int64_t e) { return static_cast<int>(__float_as_uint(partials[p * size + 2 + op.experts + e])); });
  const float value = sums.statistic(op);
  if (!slopes && threadIdx.x == 0) *loss = value;
  for (int64_t e = threadIdx.x; slopes && e < op.experts; e += row_threads) slopes[e] = sums.mass[e];
}

template <class T>
__global__ void __launch_bounds__(row_threads, row_residents)
    balance_loss_bwd_kernel(BalanceLoss op, Rows<T> scores, const float* slopes, const float* dloss, T* dscores, int64_t range, int width) {
  const int64_t first = blockIdx.x * range;
  spread(op, scores, Span{first, min(first + range, op.tokens), nullptr}, width, slopes, *dloss, dscores);
}

// Losses of this block's segments and how many they are, into partials; or the gradient, where dscores is given, with the mean's weight.
template <class T>
__global__ void __launch_bounds__(row_threads, row_residents)
    balance_loss_segments_kernel(BalanceLoss op, Rows<T> scores, float* partials, const float* dloss, const float* weight, T* dscores,
                                 int width) {
  CU_DYNAMIC_SHARED(memory);
  Sums sums = shared_sums(memory, op);
  float loss = 0.0f;
  int filled = 0;
  for (int64_t first = blockIdx.x; first < op.tokens; first += gridDim.x) {
    const int64_t label = op.labels[first];
    if (first > 0 && op.labels[first - 1] == label) continue;
    int64_t last = first + 1;
    for (int64_t end = op.tokens; last < end;) {  // labels[first..last-1] are this label, those from `end` on are not
      const int64_t middle = last + (end - last) / 2;
      if (op.labels[middle] == label) {
        last = middle + 1;
      } else {
        end = middle;
      }
    }
    const Span span{first, last, op.order};
    sums.add(op, scores, span, width);
    loss += sums.statistic(op);
    filled += sums.tokens > 0;
    if (dscores) spread(op, scores, span, width, sums.mass, *weight * *dloss, dscores);
    __syncthreads();
  }
  if (dscores || threadIdx.x != 0) return;
  partials[2 * blockIdx.x] = loss;
  partials[2 * blockIdx.x + 1] = __int_as_float(filled);
}

// The mean loss, and what a segment weighs in it.
__global__ void __launch_bounds__(row_threads, row_residents)
    balance_loss_mean_kernel(const float* partials, int64_t count, float* mean, float* weight) {
  float loss = 0.0f;
  int filled = 0;
  for (int64_t p = threadIdx.x; p < count; p += row_threads) {
    loss += partials[2 * p];
    filled += static_cast<int>(__float_as_uint(partials[2 * p + 1]));
  }
  loss = block_sum(loss);
  filled = block_sum(filled);
  if (threadIdx.x != 0) return;
  *weight = 1.0f / static_cast<float>(filled > 1 ? filled : 1);
  *mean = loss * *weight;
}

size_t shared_bytes(const BalanceLoss& op) { return 2 * op.experts * sizeof(float); }

// Scratch: what a segment weighs, the slopes, the partials.
struct Scratch {
  float *weight, *slopes, *partials;
  Scratch(const BalanceLoss& op, float* memory) : weight(memory), slopes(memory + 1), partials(slopes + op.experts) {}
};

// The loss, or without a place for it the slopes (with segments: the weight).
template <class T>
void sums(const char* name, const BalanceLoss& op, const Scratch& scratch, float* loss, Stream stream) {
  const int width = row_width(op.experts);
  const int64_t count = parts_of(op);
  const dim3 grid(static_cast<unsigned>(count));
  const Rows<T> scores(op.scores);
  if (op.labels) {
    launch(name, balance_loss_segments_kernel<T>, grid, row_threads, shared_bytes(op), stream, op, scores, scratch.partials, nullptr,
           nullptr, nullptr, width);
    launch(name, balance_loss_mean_kernel, 1, row_threads, 0, stream, scratch.partials, count, loss ? loss : scratch.slopes,
           scratch.weight);
  } else {
    launch(name, balance_loss_sums_kernel<T>, grid, row_threads, shared_bytes(op), stream, op, scores, scratch.partials,
           range_of(op.tokens), width);
    launch(name, balance_loss_statistic_kernel, 1, row_threads, shared_bytes(op), stream, op, scratch.partials, count, loss,
           loss ? nullptr : scratch.slopes, width);
  }
}

}  // namespace

int64_t balance_loss_scratch(const BalanceLoss& op) { return 1 + op.experts + parts_of(op) * (op.labels ? 2 : part_size(op.experts)); }

void balance_loss(const BalanceLoss& op, float* loss, float* scratch, Stream stream) {
  dispatch("balance_loss", op.scores.type,
           [&](auto zero) { sums<decltype(zero)>("balance_loss", op, Scratch(op, scratch), loss, stream); });
}

void balance_loss_backward(const BalanceLoss& op, const float* dloss, void* dscores, float* memory, Stream stream) {
  const char* const name = "balance_loss_backward";
  const Scratch scratch(op, memory);
  dispatch(name, op.scores.type, [&](auto zero) {
    using T = decltype(zero);
    sums<T>(name, op, scratch, nullptr, stream);
    const int width = row_width(op.experts);
    const dim3 grid(static_cast<unsigned>(parts_of(op)));
    const Rows<T> scores(op.scores);
    T* const out = static_cast<T*>(dscores);
    if (op.labels) {
      launch(name, balance_loss_segments_kernel<T>, grid, row_threads, shared_bytes(op), stream, op, scores, nullptr, dloss, scratch.weight,
             out, width);
    } else {
      launch(name, balance_loss_bwd_kernel<T>, grid, row_threads, 0, stream, op, scores, scratch.slopes, dloss, out, range_of(op.tokens),
             width);
    }
  });
}

}  // namespace cmoe::cuda
