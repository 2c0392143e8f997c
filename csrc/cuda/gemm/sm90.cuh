// Products of rows on sm_90a: y[r] = W_e x[r], with the epilogues and the schedule of those of sm_80.
//
// Memory plan. A stage holds 64 of k, 128 bytes for each row of x and each output of W, swizzled as wgmma reads them (descriptor.h); four
// stages are a ring, each with a barrier that says it is full and one that says it is empty. Two warpgroups multiply; a third one fills,
// and leaves them most of its registers: one thread issues tensor copies of x and W. Rows that are gathered (an index, assignments of a
// token) have no box: all its threads copy them by cp.async to where a tensor copy would have put them. It runs ahead by the ring, over the
// end of a tile: while results are stored, operands of the next tile arrive.
//
// A large tile (128 x 256) is one for both warpgroups, 64 rows each. With few rows each warpgroup has tiles of its own (64 x 128) and they
// alternate, so that one multiplies while the other stores; a warpgroup begins when the other has read its last stage, since a barrier
// tells phases apart by their parity and no thread may be two of them behind. Accumulators lie as those of mma.sync do, 16 rows of a warp
// by all columns of the tile, so the epilogues are the same.
//
// A box ends where the tensor ends, and not where an expert does: rows of the next expert are multiplied too, and not stored. Beyond the
// end of k both operands are zeros.
#pragma once

#include <cstdlib>
#include <string_view>

#include "../device/hopper.h"
#include "epilogue.cuh"

namespace cmoe::cuda {

// m x n for one warpgroup (m = 64) or for two (m = 128).
template <int m_, int n_>
struct WarpgroupTile : Tile<m_, n_, m_ / 16, 1, 4, 1> {
  static constexpr int k = 64, consumers = 256, producers = 128, threads = consumers + producers;
  static constexpr int few = 56, many = 224;  // registers, of 168 that each thread begins with
  static constexpr int x_bytes = m_ * 128, w_bytes = n_ * 128, stage_bytes = x_bytes + w_bytes;
  static constexpr bool common = m_ == 128;             // to both warpgroups
  static constexpr int readers = (common ? 2 : 1) * 4;  // warps that free a stage
};
// The columns of a tile that an epilogue gets at once, limited by registers.
template <class Of, int columns>
using Part = Tile<Of::m, columns, Of::m / 16, 1, 4, 1>;
template <class Epilogue>
constexpr int columns_at_once = 16;
template <class T>
constexpr int columns_at_once<DactEpilogue<T>> = 32;
using CommonTile = WarpgroupTile<128, 256>;
using OwnTile = WarpgroupTile<64, 128>;

struct Maps {
  TensorMap x, w;  // x: unused where rows are gathered
  bool x_alternates;
};

__host__ __device__ inline bool gathers(const RowOperand& x) { return x.index || x.divisor != 1; }

template <class Tile>
struct Ring {
  static constexpr int barriers = 2 * Tile::stages + 2;
  SharedAddress tiles, full, empty, turns;
  uint32_t step = 0;  // stages that were filled, or read, before

  __device__ Ring(SharedAddress memory, SharedAddress at)
      : tiles(memory), full(at), empty(at + 8 * Tile::stages), turns(at + 16 * Tile::stages) {}
  __device__ SharedAddress x() const { return tiles + step % Tile::stages * Tile::stage_bytes; }
  __device__ SharedAddress w() const { return x() + Tile::x_bytes; }
  __device__ SharedAddress filled() const { return full + step % Tile::stages * 8; }
  __device__ SharedAddress freed(uint32_t back = 0) const { return empty + (step - back) % Tile::stages * 8; }
  __device__ uint32_t parity() const { return step / Tile::stages & 1; }

  // writers: arrivals that fill a stage
  __device__ void start(uint32_t writers) const {
    if (threadIdx.x == 0) {
      for (int s = 0; s < Tile::stages; ++s) {
        mbarrier_init(full + 8 * s, writers);
        mbarrier_init(empty + 8 * s, Tile::readers);
      }
      for (int warpgroup = 0; warpgroup < 2; ++warpgroup) mbarrier_init(turns + 8 * warpgroup, 4);
      fence_mbarrier_init();
    }
    __syncthreads();
  }
};

// W of the tile's columns and this step of k; gated: gate rows in the first half of them, up rows in the second.
template <class Tile, Major major>
__device__ void load_weights(const Ring<Tile>& ring, const TensorMap& w, bool gated, int width, int expert, int column, int k) {
  constexpr int n = Tile::n;
  if constexpr (major == Major::k) {
    tma_load(ring.w(), w, ring.filled(), k, column, expert);
    if (gated) tma_load(ring.w() + n / 2 * 128, w, ring.filled(), k, width + column, expert);
  } else {
#pragma unroll
    for (int i = 0; i < n; i += 64)
      tma_load(ring.w() + i * 128, w, ring.filled(), column + i + (gated && i >= n / 2 ? width - n / 2 : 0), k, expert);
  }
}

// source: of each row of the tile, shared by the eight threads that copy it; -1: none.
template <class T, class Tile, Major major>
__device__ void fill(Ring<Tile> ring, const Maps& maps, const RowArguments& p, const RowTiles<Tile::m, Tile::threads>& tiles, int* source) {
  constexpr int at_once = Tile::producers / 8;
  const int thread = static_cast<int>(threadIdx.x) - Tile::consumers, chunk = thread % 8;
  const bool leads = thread == 0, by_threads = gathers(p.x);
  if (!by_threads && !leads) return;
  if (leads) prefetch(maps.x), prefetch(maps.w);
  tiles.each([&](const RowTile& tile) {
    if (tile.expert == p.groups.experts) return;
    if (by_threads) {
      __syncwarp();
      for (int row = thread / 8; row < Tile::m && chunk == 0; row += at_once) {
        const int r = tile.first + row;
        source[row] = r < tile.end ? static_cast<int>(source_row(p.x.index, p.x.divisor, r, p.groups.rows)) : -1;
      }
      __syncwarp();
    }
    const int column = tile.column * (p.gated ? Tile::n / 2 : Tile::n), last = p.sum ? static_cast<int>(p.groups.experts) - 1 : tile.expert;
    for (int e = p.sum ? 0 : tile.expert; e <= last; ++e) {
      const int matrix = p.x.expert ? e : 0;
      const T* const x = static_cast<const T*>(p.x.data) + e * p.x.expert;
#pragma unroll 1
      for (int k = 0; k < p.depth; k += Tile::k, ++ring.step) {
        if (ring.step >= Tile::stages) mbarrier_wait(ring.freed(), ring.parity() ^ 1);
        if (leads) {
          mbarrier_arrive_expect(ring.filled(), by_threads ? Tile::w_bytes : Tile::stage_bytes);
          load_weights<Tile, major>(ring, maps.w, p.gated, static_cast<int>(p.width), e, column, k);
        }
        if (!by_threads) {
          tma_load(ring.x(), maps.x, ring.filled(), k, maps.x_alternates ? matrix : tile.first, maps.x_alternates ? tile.first : matrix);
          continue;
        }
        const int at = k + chunk * 8, left = chunk_bytes<T>(p.depth - at);
#pragma unroll 2
        for (int row = thread / 8; row < Tile::m; row += at_once) {
          const int from = source[row], bytes = from < 0 ? 0 : left;
          cp_async_16(ring.x() + row * 128 + ((chunk ^ (row & 7)) << 4), bytes ? x + from * p.x.row + at : x, bytes);
        }
        cp_async_mbarrier_arrive(ring.filled());
      }
    }
  });
}

// The sums of this warpgroup's n-th tile, of its rows. A stage is freed when its products are done, which is known one step later.
template <class T, class Tile, Major major>
__device__ void multiply(Ring<Tile>& ring, float (&d)[Tile::n / 2], int n, int steps, bool by_threads) {
  constexpr uint32_t next = major == Major::k ? k16_along_k : k16_along_mn;
  const SharedAddress warpgroup = threadIdx.x / 128, rows = Tile::common ? warpgroup * (64 * 128) : 0;
  const bool speaks = threadIdx.x % 32 == 0;
#pragma unroll
  for (float& sum : d) sum = 0.0f;
  if (!Tile::common && (n > 0 || warpgroup > 0)) mbarrier_wait(ring.turns + 8 * warpgroup, (n + 1 - warpgroup) & 1);
#pragma unroll 1
  for (int i = 0; i < steps; ++i, ++ring.step) {
    mbarrier_wait(ring.filled(), ring.parity());
    if (by_threads) fence_async_proxy();  // rows came by ordinary copies
    const uint64_t x = descriptor(ring.x() + rows), w = descriptor(ring.w(), major == Major::k ? 16 : 64 * 128);
    pin(d);
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < Tile::k / 16; ++k) wgmma<T, Tile::n, Major::k, major>(d, x + k * k16_along_k, w + k * next);
    wgmma_commit();
    wgmma_wait<1>();
    pin(d);
    if (i > 0 && speaks) mbarrier_arrive(ring.freed(1));
  }
  if (!Tile::common && speaks) mbarrier_arrive(ring.turns + 8 * (1 - warpgroup));
  wgmma_wait<0>();
  pin(d);
  if (steps > 0 && speaks) mbarrier_arrive(ring.freed(1));
}

// Results are stored some columns at a time, in a loop, because code for 128 sums at once would be enormous. Registers cannot be indexed,
// so each round picks its own among all; gated: gate and up columns in turn, eight of each, as the epilogues expect them.
template <class Tile, int columns>
__device__ void pick(const float (&d)[Tile::n / 2], int part, bool gated, Accumulator<Part<Tile, columns>>& sums) {
  constexpr int tiles = columns / 8;
#pragma unroll
  for (int c = 0; c < Tile::n / columns; ++c)
    if (part == c)
#pragma unroll
      for (int j = 0; j < tiles; ++j)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int straight = c * tiles + j, in_turn = c * tiles / 2 + j / 2 + j % 2 * (Tile::tiles_n / 2);
          sums[0][j][i] = gated ? d[4 * in_turn + i] : d[4 * straight + i];
        }
}

template <class Tile, class Epilogue>
__device__ void store(const RowArguments& p, const RowTile& tile, bool known, const float (&d)[Tile::n / 2], const Epilogue& epilogue) {
  constexpr int columns = columns_at_once<Epilogue>, parts = Tile::n / columns;
  WarpPlace<Part<Tile, columns>> place;
  place.warp_n = 0;  // each warpgroup has all columns
#pragma unroll 1
  for (int part = 0; part < parts; ++part) {
    const int column = tile.column * parts + part;  // of parts
    if (int64_t{column} * (p.gated ? columns / 2 : columns) >= p.width) break;
    Accumulator<Part<Tile, columns>> sums;
    pick<Tile, columns>(d, part, p.gated, sums);
    epilogue.template store<Part<Tile, columns>>(p, {tile.expert, tile.first, tile.end, column}, known, place, sums, nullptr);
  }
}

template <class T, class Tile, Major major, class Epilogue>
__global__ void __launch_bounds__(Tile::threads, 1)
    grouped_gemm_sm90_kernel(const __grid_constant__ Maps maps, const __grid_constant__ RowArguments p,
                             const __grid_constant__ Epilogue epilogue) {
#if defined(CMOE_EMULATE_CUDA) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
  CU_DYNAMIC_SHARED(memory);
  CU_SHARED(uint64_t, barriers, Ring<Tile>::barriers);
  CU_SHARED(int, source, Tile::m);
  const bool by_threads = gathers(p.x);
  Ring<Tile> ring(shared_address(memory), shared_address(barriers));
  ring.start(by_threads ? 1 + Tile::producers : 1);  // the thread that copies W, and all that copy rows of x
  const RowTiles<Tile::m, Tile::threads> tiles(p.groups, p.sum, p.columns,
                                               reinterpret_cast<int*>(memory + Tile::stages * Tile::stage_bytes));
  if (threadIdx.x >= Tile::consumers) {
    fewer_registers<Tile::few>();
    return fill<T, Tile, major>(ring, maps, p, tiles, source);
  }
  more_registers<Tile::many>();
  const int each = static_cast<int>((p.depth + Tile::k - 1) / Tile::k) * (p.sum ? static_cast<int>(p.groups.experts) : 1);
  uint32_t turn = threadIdx.x / 128;
  int n = 0;
  tiles.each([&](const RowTile& tile) {
    const bool known = tile.expert < p.groups.experts;
    const int steps = known ? each : 0;
    if (!Tile::common && (turn++ & 1)) {  // the other warpgroup's
      ring.step += steps;
      return;
    }
    float d[Tile::n / 2];
    multiply<T, Tile, major>(ring, d, n++, steps, by_threads);
    store<Tile>(p, tile, known, d, epilogue);
  });
#endif
}

// --- on the host

// The current device is of the kind, and the library was built for it: made for another architecture the kernels are empty, and so is this
// one, which else has shared memory. CMOE_CUDA_SM90=0 leaves the products to sm_80's, for comparison.
#ifdef CMOE_EMULATE_CUDA
inline bool runs_sm90() { return emulator::options.capability == 90; }
#else
static __global__ void built_for_sm90_kernel(unsigned* out) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  __shared__ volatile unsigned there;
  there = threadIdx.x;
  *out = there;
#endif
}
inline bool runs_sm90() {
  static const bool wanted = [] {
    const char* const set = std::getenv("CMOE_CUDA_SM90");
    return !set || std::string_view(set) != "0";
  }();
  if (!wanted) return false;
  int device = 0, major = 0, minor = 0;
  check("capability", cudaGetDevice(&device));
  check("capability", cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
  check("capability", cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device));
  if (major != 9 || minor != 0) return false;
  static const bool built = [] {
    cudaFuncAttributes attributes{};
    check("capability", cudaFuncGetAttributes(&attributes, built_for_sm90_kernel));
    return attributes.sharedSizeBytes > 0;
  }();
  return built;
}
#endif

// How the operands are mapped: nothing where sm_90a's copies cannot read them.
struct Mapped {
  TensorView x, w;
  Major major;
  bool can;

  explicit Mapped(Type type, const RowArguments& p) {
    const int64_t outputs = p.gated ? 2 * p.width : p.width, experts = p.groups.experts;
    const int64_t x_experts = p.x.expert ? experts : 1;
    major = p.w.input == 1 ? Major::k : Major::mn;
    x = {p.x.data, p.depth, p.groups.rows, x_experts, p.x.row, p.x.expert};
    w = major == Major::k ? TensorView{p.w.data, p.depth, outputs, experts, p.w.output, p.w.expert}
                          : TensorView{p.w.data, outputs, p.depth, experts, p.w.input, p.w.expert};
    const bool along = p.x.column == 1 && (p.w.input == 1 || p.w.output == 1),
               narrow = type != Type::f32 && p.x.type == type && p.w.type == type;
    const bool rows = gathers(p.x) ? in_chunks(p.x.data, type, p.x.column, p.x.row, p.x.expert) : can_map(x);
    can = narrow && along && rows && can_map(w);
  }
};

template <class T, class Tile, Major major, class Epilogue>
void launch_rows_sm90(const char* operation, const Mapped& from, RowArguments p, const Epilogue& epilogue, Stream stream) {
  const int wide = p.gated ? Tile::n / 2 : Tile::n;
  p.columns = static_cast<int>((p.width + wide - 1) / wide);
  const int64_t tiles = most_row_tiles(p.groups, p.sum, Tile::m) * p.columns;
  if (!tiles || !p.groups.rows) return;
  const TensorMap w = tensor_map(from.w, major == Major::mn ? 64 : wide);
  const bool by_threads = gathers(p.x);
  const Maps maps{by_threads ? w : tensor_map(from.x, Tile::m), w, alternates(from.x)};
  const size_t shared = Tile::stages * Tile::stage_bytes + RowTiles<Tile::m, Tile::threads>::bytes(p.groups);
  launch(operation, grouped_gemm_sm90_kernel<T, Tile, major, Epilogue>, persistent_blocks<Tile>(tiles), Tile::threads, shared, stream, maps,
         p, epilogue);
}

template <class T, template <class> class Epilogue, class Description>
void run_rows_sm90_in(const char* operation, const Mapped& from, const RowArguments& p, const Description& description, Stream stream) {
  const Epilogue<T> epilogue(description);
  const bool large = takes_large_tiles(p.groups, p.width);
  if (from.major == Major::mn)
    return large ? launch_rows_sm90<T, CommonTile, Major::mn>(operation, from, p, epilogue, stream)
                 : launch_rows_sm90<T, OwnTile, Major::mn>(operation, from, p, epilogue, stream);
  return large ? launch_rows_sm90<T, CommonTile, Major::k>(operation, from, p, epilogue, stream)
               : launch_rows_sm90<T, OwnTile, Major::k>(operation, from, p, epilogue, stream);
}

// Partials per row of an epilogue that leaves one for each part of the columns; 0 where these products do not serve.
template <template <class> class Epilogue>
int64_t partials_sm90(Type type, const RowArguments& p) {
  constexpr int64_t part = columns_at_once<Epilogue<bf16>>;
  return runs_sm90() && Mapped(type, p).can ? (p.width + part - 1) / part : 0;
}

template <template <class> class Epilogue, class Description>
bool run_rows_sm90(const char* operation, Type type, const RowArguments& p, const Description& description, Stream stream) {
  if (!runs_sm90()) return false;
  const Mapped from(type, p);
  if (!from.can) return false;
  if (type == Type::bf16)
    run_rows_sm90_in<bf16, Epilogue>(operation, from, p, description, stream);
  else
    run_rows_sm90_in<fp16, Epilogue>(operation, from, p, description, stream);
  return true;
}

}  // namespace cmoe::cuda
