// Gradients of weights: dW_e = sum over the rows of e of p[r] q[r]^T, and db_e = sum of routing_weights[r] p[r] in the same pass.
//
// The reduction runs over rows, which lie across the memory of both operands: stages hold row after row, and ldmatrix transposes. An expert
// without rows has no steps and its gradients are zeros. db is summed from the stages of p by the blocks that hold the first columns of
// dW: two threads for each of its rows where there are as many, each over half of a stage, added in the end; the order is fixed.

#include "epilogue.cuh"
#include "sm90.h"

namespace cmoe::cuda {

namespace {

struct WgradArguments {
  Groups groups;
  int64_t height, width;
  RowOperand p, q;
  RoutingWeights routing_weights;
};

struct WeightTile {
  int expert, first, end, row, column;  // rows of the reduction; where the tile of dW begins
};

// Chunks of an operand with this number of lanes that a thread copies for each stage.
template <class T, class Tile, int lanes>
constexpr int chunks_of = k_step<T> * (lanes / 8) / Tile::threads;

template <class T, class Tile, Load how>
class WeightLoader;

template <class T, class Tile>
class WeightLoader<T, Tile, Load::async> {
 public:
  __device__ WeightLoader(const WgradArguments& a, const WeightTile& tile)
      : a_(a), tile_(tile), p_(static_cast<const T*>(a.p.data) + int64_t{tile.expert} * a.p.expert),
        q_(static_cast<const T*>(a.q.data) + int64_t{tile.expert} * a.q.expert), r_(tile.first) {
    prefetch();
  }

  __device__ void operator()(SharedAddress stage) {
    fill<Tile::m>(a_.p, p_, a_.height - tile_.row, tile_.row, p_source_, stage);
    fill<Tile::n>(a_.q, q_, a_.width - tile_.column, tile_.column, q_source_, stage + 64 * Tile::m);
    r_ += k_step<T>;
    prefetch();
  }

 private:
  template <int lanes>
  __device__ static int row(int i) {
    return (static_cast<int>(threadIdx.x) + i * Tile::threads) / (lanes / 8);
  }

  // The rows that the next stage reads: their indices are on their way while this one is multiplied.
  __device__ void prefetch() {
#pragma unroll
    for (int i = 0; i < chunks_of<T, Tile, Tile::m>; ++i) p_source_[i] = source(a_.p, r_ + row<Tile::m>(i));
#pragma unroll
    for (int i = 0; i < chunks_of<T, Tile, Tile::n>; ++i) q_source_[i] = source(a_.q, r_ + row<Tile::n>(i));
  }
  __device__ int source(const RowOperand& x, int r) const { return r < tile_.end ? source_row(x.index, x.divisor, r, a_.groups.rows) : -1; }

  template <int lanes>
  __device__ void fill(const RowOperand& x, const T* data, int64_t left, int lane0, const int (&sources)[chunks_of<T, Tile, lanes>],
                       SharedAddress to) const {
#pragma unroll
    for (int i = 0; i < chunks_of<T, Tile, lanes>; ++i) {
      const int chunk = (static_cast<int>(threadIdx.x) + i * Tile::threads) % (lanes / 8);
      const int bytes = sources[i] < 0 ? 0 : chunk_bytes<T>(left - 8 * chunk);
      cp_async_16(to + along_lanes<lanes>(row<lanes>(i), chunk), bytes ? data + int64_t{sources[i]} * x.row + lane0 + 8 * chunk : data,
                  bytes);
    }
  }

  const WgradArguments& a_;
  const WeightTile& tile_;
  const T *p_, *q_;
  int r_, p_source_[chunks_of<T, Tile, Tile::m>], q_source_[chunks_of<T, Tile, Tile::n>];
};

template <class T, class Tile>
class WeightLoader<T, Tile, Load::elements> {
 public:
  __device__ WeightLoader(const WgradArguments& a, const WeightTile& tile) : a_(a), tile_(tile), r_(tile.first) {}

  __device__ void operator()(SharedAddress stage) {
    fill<Tile::m>(a_.p, a_.height, tile_.row, stage);
    fill<Tile::n>(a_.q, a_.width, tile_.column, stage + 64 * Tile::m);
    r_ += k_step<T>;
  }

 private:
  template <int lanes>
  __device__ void fill(const RowOperand& x, int64_t width, int lane0, SharedAddress to) const {
    const Elements<T> from{x.data, x.type == Type::f32};
    for (int id = static_cast<int>(threadIdx.x); id < 4 * lanes; id += Tile::threads) {
      const int lane = id % lanes, chunk = id / lanes;
      T v[per_chunk<T>];
#pragma unroll
      for (int j = 0; j < per_chunk<T>; ++j) {
        const int r = r_ + per_chunk<T> * chunk + j;
        const int64_t source = r < tile_.end && lane0 + lane < width ? source_row(x.index, x.divisor, r, a_.groups.rows) : -1;
        v[j] = source < 0 ? from_float<T>(0.0f) : from(tile_.expert * x.expert + source * x.row + (lane0 + lane) * x.column);
      }
      store_shared_16(to + along_k(lane, chunk), packed(v));
    }
  }

  const WgradArguments& a_;
  const WeightTile& tile_;
  int r_;
};

// Element (lane, k) of operand A in a stage.
template <class T, class Tile, Load how>
__device__ float element(const unsigned char* stage, int lane, int k) {
  const int chunk = how == Load::async ? lane / 8 : k / per_chunk<T>, in_chunk = how == Load::async ? lane % 8 : k % per_chunk<T>;
  const int at = how == Load::async ? along_lanes<Tile::m>(k, chunk) : along_k(lane, chunk);
  return to_float(reinterpret_cast<const T*>(stage + at)[in_chunk]);
}

template <class T, class Tile, Load how>
__global__ void __launch_bounds__(Tile::threads, Tile::blocks)
    wgrad_kernel(const __grid_constant__ WgradArguments a, const __grid_constant__ Stored<T> dw, const __grid_constant__ Stored<T> db,
                 int tiles_m, int tiles_n) {
  CU_DYNAMIC_SHARED(memory);
  const SharedAddress ring = shared_address(memory);
  float* const sums = reinterpret_cast<float*>(memory + Tile::stages * Tile::stage_bytes);
  const WarpPlace<Tile> place;
  static_assert(Tile::threads == 2 * Tile::m);
  const int lane = static_cast<int>(threadIdx.x) % Tile::m, half = static_cast<int>(threadIdx.x) / Tile::m;
  const int64_t each = int64_t{tiles_m} * tiles_n;
  for (int64_t t = blockIdx.x; t < each * a.groups.experts; t += gridDim.x) {
    const int e = static_cast<int>(t / each), in_expert = static_cast<int>(t - e * each);
    const WeightTile tile{e, a.groups.offsets ? a.groups.offsets[e] : 0,
                          a.groups.offsets ? a.groups.offsets[e + 1] : static_cast<int>(a.groups.rows), in_expert % tiles_m * Tile::m,
                          in_expert / tiles_m * Tile::n};
    const int steps = static_cast<int>((tile.end - tile.first + k_step<T> - 1) / k_step<T>);
    const bool bias = db && tile.column == 0;
    WeightLoader<T, Tile, how> load(a, tile);
    Accumulator<Tile> acc = {};
    float sum = 0.0f;
    accumulate<T, Tile, how == Load::async, how == Load::async>(acc, place, ring, steps, load, [&](SharedAddress stage, int step) {
      if (!bias) return;
      const int r = tile.first + step * k_step<T> + half * (k_step<T> / 2);
      for (int k = 0; k < k_step<T> / 2; ++k) {
        if (r + k >= tile.end) break;
        const float s =
            a.routing_weights.data ? a.routing_weights.data[int64_t{r + k} * a.routing_weights.row + e * a.routing_weights.expert] : 1.0f;
        sum += s * element<T, Tile, how>(memory + (stage - ring), lane, half * (k_step<T> / 2) + k);
      }
    });
    if (bias) {
      if (half) sums[lane] = sum;
      __syncthreads();
      if (!half && tile.row + lane < a.height) db.write(e * db.expert + tile.row + lane, 1, sum + sums[lane], 0.0f);
    }
    if (!dw) continue;
#pragma unroll
    for (int i = 0; i < 2 * Tile::tiles_m; ++i) {
      const int64_t m = tile.row + place.row(i / 2, i % 2);
      if (m >= a.height) continue;
#pragma unroll
      for (int j = 0; j < Tile::tiles_n; ++j) {
        const int64_t n = tile.column + place.column(j);
        dw.write(e * dw.expert + m * dw.row + n, a.width - n, acc[i / 2][j][i % 2 * 2], acc[i / 2][j][i % 2 * 2 + 1]);
      }
    }
  }
}

template <class T, class Tile, Load how>
void launch_weights(const char* operation, const WgradArguments& a, const Stored<T>& dw, const Stored<T>& db, Stream stream) {
  const int64_t tiles_m = (a.height + Tile::m - 1) / Tile::m, tiles_n = dw ? (a.width + Tile::n - 1) / Tile::n : 1;
  const int64_t tiles = tiles_m * tiles_n * a.groups.experts;
  if (!tiles) return;
  launch(operation, wgrad_kernel<T, Tile, how>, persistent_blocks<Tile>(tiles), Tile::threads,
         Tile::stages * Tile::stage_bytes + Tile::m * sizeof(float), stream, a, dw, db, static_cast<int>(tiles_m),
         static_cast<int>(tiles_n));
}

template <class T>
void run(const char* operation, const Wgrad& p, Stream stream) {
  const WgradArguments a{p.groups, p.height, p.width, p.p, p.q, p.routing_weights};
  const Stored<T> dw(p.dw), db(p.db);
  if constexpr (sizeof(T) == 2) {
    const auto chunks = [&](const RowOperand& x) { return x.type == p.type && in_chunks(x.data, x.type, x.column, x.row, x.expert); };
    if (chunks(p.p) && chunks(p.q)) {
      if (p.height >= 96 && p.width >= 96) return launch_weights<T, LargeWeightTile, Load::async>(operation, a, dw, db, stream);
      return launch_weights<T, SmallTile, Load::async>(operation, a, dw, db, stream);
    }
  }
  launch_weights<T, ElementTile, Load::elements>(operation, a, dw, db, stream);
}

}  // namespace

void wgrad(const char* operation, const Wgrad& p, Stream stream) {
  if (wgrad_sm90(operation, p, stream)) return;
  switch (p.type) {
    case Type::f32: return run<float>(operation, p, stream);
    case Type::bf16: return run<bf16>(operation, p, stream);
    case Type::f16: return run<fp16>(operation, p, stream);
    default: throw std::runtime_error(std::string(operation) + ": fp64 has no CUDA kernel");
  }
}

}  // namespace cmoe::cuda
