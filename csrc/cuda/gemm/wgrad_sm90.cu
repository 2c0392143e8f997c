// Gradients of weights on sm_90a: dW_e = sum over the rows of e of p[r] q[r]^T, and db_e = sum of routing_weights[r] p[r] in the same pass.
//
// Memory plan. As sm90.cuh, but the reduction runs over rows, so both operands are MN-major: a stage is 64 rows, in blocks of 64 lanes
// (128 bytes a row). A box ends where the tensor ends, and not where an expert does: its last rows, if they do not fill a stage, and rows
// that are gathered are copied by threads, with zeros beyond the end. Experts without rows have no steps, and their gradients are zeros.
// db is summed from the stages of p by the blocks that hold the first columns of dW: two threads for each row of it, each over half of a
// stage, added in the end; the order is fixed.

#include "sm90.cuh"
#include "sm90.h"

namespace cmoe::cuda {

namespace {

using GradientTile = WarpgroupTile<128, 256>;

struct WgradArguments {
  Groups groups;
  int64_t height, width;
  RowOperand p, q;
  RoutingWeights routing_weights;
  int tiles_m, tiles_n;
};
struct WeightMaps {
  TensorMap p, q;  // unused where rows are gathered
  bool p_alternates, q_alternates;
};
struct WeightTile {
  int expert, first, end, row, column;  // rows of the reduction; where the tile of dW begins

  __device__ WeightTile(const WgradArguments& a, int64_t t) {
    const int64_t each = int64_t{a.tiles_m} * a.tiles_n, in_expert = t % each;
    expert = static_cast<int>(t / each);
    first = a.groups.offsets ? a.groups.offsets[expert] : 0;
    end = a.groups.offsets ? a.groups.offsets[expert + 1] : static_cast<int>(a.groups.rows);
    row = static_cast<int>(in_expert % a.tiles_m) * GradientTile::m;
    column = static_cast<int>(in_expert / a.tiles_m) * GradientTile::n;
  }
};

// 64 rows of an operand, `lanes` of them from lane0, by boxes.
template <int lanes>
__device__ void copy_boxes(SharedAddress to, SharedAddress filled, const TensorMap& map, bool alternates, int lane0, int row, int matrix) {
#pragma unroll
  for (int block = 0; block < lanes / 64; ++block)
    tma_load(to + block * 64 * 128, map, filled, lane0 + block * 64, alternates ? matrix : row, alternates ? row : matrix);
}

// The same by 128 threads: what is not a row of the expert, or beyond the operand's width, is zeros.
template <class T, int lanes>
__device__ void copy_rows(SharedAddress to, const RowOperand& x, int expert, int64_t width, int lane0, int row0, int end, int64_t rows) {
  const int thread = static_cast<int>(threadIdx.x) % 128, chunk = thread % 8;
  const T* const data = static_cast<const T*>(x.data) + expert * x.expert;
#pragma unroll 1
  for (int row = thread / 8; row < 64; row += 16) {
    const int64_t source = row0 + row < end ? source_row(x.index, x.divisor, row0 + row, rows) : -1;
#pragma unroll
    for (int block = 0; block < lanes / 64; ++block) {
      const int lane = lane0 + block * 64 + chunk * 8;
      const int bytes = source < 0 ? 0 : chunk_bytes<T>(width - lane);
      cp_async_16(to + block * 64 * 128 + row * 128 + ((chunk ^ (row & 7)) << 4), bytes ? data + source * x.row + lane : data, bytes);
    }
  }
}

template <class T>
__device__ void fill(Ring<GradientTile>& ring, const WeightMaps& maps, const WgradArguments& a, const WeightTile& tile) {
  using Tile = GradientTile;
  const bool leads = threadIdx.x == Tile::consumers;
  for (int r = tile.first; r < tile.end; r += Tile::k, ++ring.step) {
    if (ring.step >= Tile::stages) mbarrier_wait(ring.freed(), ring.parity() ^ 1);
    const bool last = tile.end - r < Tile::k, p_by_threads = last || gathers(a.p), q_by_threads = last || gathers(a.q);
    if (leads) {
      mbarrier_arrive_expect(ring.filled(), (p_by_threads ? 0 : Tile::x_bytes) + (q_by_threads ? 0 : Tile::w_bytes));
      if (!p_by_threads) copy_boxes<Tile::m>(ring.x(), ring.filled(), maps.p, maps.p_alternates, tile.row, r, a.p.expert ? tile.expert : 0);
      if (!q_by_threads)
        copy_boxes<Tile::n>(ring.w(), ring.filled(), maps.q, maps.q_alternates, tile.column, r, a.q.expert ? tile.expert : 0);
    }
    if (p_by_threads) copy_rows<T, Tile::m>(ring.x(), a.p, tile.expert, a.height, tile.row, r, tile.end, a.groups.rows);
    if (q_by_threads) copy_rows<T, Tile::n>(ring.w(), a.q, tile.expert, a.width, tile.column, r, tile.end, a.groups.rows);
    cp_async_mbarrier_arrive(ring.filled());
  }
}

// This thread's part of db: its lane of p over its half of the rows of a stage.
template <class T>
__device__ float bias_of_stage(const unsigned char* p, const WgradArguments& a, const WeightTile& tile, int r) {
  const int lane = static_cast<int>(threadIdx.x) % 128, first = static_cast<int>(threadIdx.x) / 128 * 32;
  float sum = 0.0f;
#pragma unroll 4
  for (int k = first; k < first + 32; ++k) {
    if (r + k >= tile.end) break;
    const float s =
        a.routing_weights.data ? a.routing_weights.data[(r + k) * a.routing_weights.row + tile.expert * a.routing_weights.expert] : 1.0f;
    sum +=
        s * to_float(*reinterpret_cast<const T*>(p + lane / 64 * (64 * 128) + k * 128 + ((lane % 64 / 8 ^ (k & 7)) << 4) + lane % 8 * 2));
  }
  return sum;
}

template <class T>
__global__ void __launch_bounds__(GradientTile::threads, 1)
    wgrad_sm90_kernel(const __grid_constant__ WeightMaps maps, const __grid_constant__ WgradArguments a,
                      const __grid_constant__ Stored<T> dw, const __grid_constant__ Stored<T> db) {
#if defined(CMOE_EMULATE_CUDA) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
  using Tile = GradientTile;
  constexpr int columns = 32;  // stored at a time
  CU_DYNAMIC_SHARED(memory);
  CU_SHARED(uint64_t, barriers, Ring<Tile>::barriers);
  CU_SHARED(float, sums, Tile::m);
  Ring<Tile> ring(shared_address(memory), shared_address(barriers));
  ring.start(1 + Tile::producers);
  const int64_t tiles = int64_t{a.tiles_m} * a.tiles_n * a.groups.experts;
  if (threadIdx.x >= Tile::consumers) {
    fewer_registers<Tile::few>();
    if (threadIdx.x == Tile::consumers && !gathers(a.p)) prefetch(maps.p);
    if (threadIdx.x == Tile::consumers && !gathers(a.q)) prefetch(maps.q);
    for (int64_t t = blockIdx.x; t < tiles; t += gridDim.x) fill<T>(ring, maps, a, WeightTile(a, t));
    return;
  }
  more_registers<Tile::many>();
  const SharedAddress rows = threadIdx.x / 128 * (64 * 128);
  const bool speaks = threadIdx.x % 32 == 0;
  for (int64_t t = blockIdx.x; t < tiles; t += gridDim.x) {
    const WeightTile tile(a, t);
    const bool bias = db && tile.column == 0;
    float d[Tile::n / 2] = {}, sum = 0.0f;
    for (int r = tile.first; r < tile.end; r += Tile::k, ++ring.step) {
      mbarrier_wait(ring.filled(), ring.parity());
      fence_async_proxy();  // some rows came by ordinary copies
      const uint64_t p = descriptor(ring.x() + rows), q = descriptor(ring.w(), 64 * 128);
      pin(d);
      wgmma_fence();
#pragma unroll
      for (int k = 0; k < Tile::k / 16; ++k) wgmma<T, Tile::n, Major::mn, Major::mn>(d, p + k * k16_along_mn, q + k * k16_along_mn);
      wgmma_commit();
      if (bias) sum += bias_of_stage<T>(memory + (ring.x() - ring.tiles), a, tile, r);
      wgmma_wait<1>();
      pin(d);
      __syncwarp();  // of the lanes that have read the last stage's p
      if (r > tile.first && speaks) mbarrier_arrive(ring.freed(1));
    }
    wgmma_wait<0>();
    pin(d);
    __syncwarp();
    if (tile.first < tile.end && speaks) mbarrier_arrive(ring.freed(1));
    if (bias) {
      const int lane = static_cast<int>(threadIdx.x) % Tile::m;
      if (threadIdx.x >= Tile::m) sums[lane] = sum;
      barrier_sync(1, Tile::consumers);
      if (threadIdx.x < Tile::m && tile.row + lane < a.height)
        db.write(tile.expert * db.expert + tile.row + lane, 1, sum + sums[lane], 0.0f);
      barrier_sync(1, Tile::consumers);
    }
    if (!dw) continue;
    const WarpPlace<Part<Tile, columns>> place;
    const int64_t at = tile.expert * dw.expert;
#pragma unroll 1
    for (int part = 0; part < Tile::n / columns; ++part) {
      Accumulator<Part<Tile, columns>> sums;
      pick<Tile, columns>(d, part, false, sums);
#pragma unroll
      for (int j = 0; j < columns / 8; ++j)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int64_t m = tile.row + place.row(0, half), n = tile.column + part * columns + place.column(j);
          if (m < a.height && n < a.width) dw.write(at + m * dw.row + n, a.width - n, sums[0][j][2 * half], sums[0][j][2 * half + 1]);
        }
    }
  }
#endif
}

template <class T>
bool run(const char* operation, const Wgrad& p, Stream stream) {
  using Tile = GradientTile;
  WgradArguments a{p.groups,
                   p.height,
                   p.width,
                   p.p,
                   p.q,
                   p.routing_weights,
                   static_cast<int>((p.height + Tile::m - 1) / Tile::m),
                   p.dw.data ? static_cast<int>((p.width + Tile::n - 1) / Tile::n) : 1};
  const auto view = [&](const RowOperand& x, int64_t width) {
    return TensorView{x.data, width, p.groups.rows, x.expert ? p.groups.experts : 1, x.row, x.expert};
  };
  const TensorView view_p = view(p.p, p.height), view_q = view(p.q, p.width);
  const auto can = [&](const RowOperand& x, const TensorView& v) {
    return x.data && x.type == p.type && in_chunks(x.data, x.type, x.column, x.row, x.expert) && (gathers(x) || can_map(v));
  };
  if (!can(p.p, view_p) || !can(p.q, view_q)) return false;
  const int64_t tiles = int64_t{a.tiles_m} * a.tiles_n * p.groups.experts;
  if (!tiles) return true;
  const WeightMaps maps{gathers(p.p) ? TensorMap{} : tensor_map(view_p, 64), gathers(p.q) ? TensorMap{} : tensor_map(view_q, 64),
                        alternates(view_p), alternates(view_q)};
  launch(operation, wgrad_sm90_kernel<T>, persistent_blocks<Tile>(tiles), Tile::threads, Tile::stages * Tile::stage_bytes, stream, maps, a,
         Stored<T>(p.dw), Stored<T>(p.db));
  return true;
}

}  // namespace

bool wgrad_sm90(const char* operation, const Wgrad& p, Stream stream) {
  if (!runs_sm90()) return false;
  return p.type == Type::bf16 ? run<bf16>(operation, p, stream) : p.type == Type::f16 && run<fp16>(operation, p, stream);
}

}  // namespace cmoe::cuda
