// Products of rows by the weights of their expert: y[r] = W_e x[r], with an epilogue that a policy gives.
//
// Operand A is rows of x, gathered by their addresses; operand B is outputs of W_e, as it is stored: along k (rows of W), or along lanes (W
// transposed, as for dx). Gated weights are read gate and up in turn, eight outputs each, so that a thread holds both halves of its
// columns in one accumulator. The scheduler, the ring and the tiles are in files of their own.
#pragma once

#include "ring.cuh"
#include "schedule.cuh"

namespace cmoe::cuda {

struct RowArguments {
  Groups groups;
  int64_t width, depth;
  int columns;  // of tiles
  bool sum, gated;
  RowOperand x;
  WeightOperand w;
  // For Load::elements: operands that can all the same be read 16 bytes at a time, along k.
  bool x_chunks, w_chunks;
};

// The output of W that lane l of a tile stands for, beside the first column of the tile.
__device__ inline int column_of_lane(bool gated, int l) { return gated ? l / 16 * 8 + l % 8 : l; }
__device__ inline bool is_up(bool gated, int l) { return gated && (l / 8 & 1); }

template <class T, class Tile, Load how, bool b_along_lanes>
class RowLoader;

// Registers are scarce beside the accumulator: a chunk's address is kept as it advances, and whether it is read at all in one bit.
template <class T, class Tile, bool b_along_lanes>
class RowLoader<T, Tile, Load::async, b_along_lanes> {
 public:
  __device__ RowLoader(const RowArguments& p, const RowTile& tile) : p_(p) {
    const int64_t e = p.sum ? 0 : tile.expert;
#pragma unroll
    for (int i = 0; i < a_count; ++i) {
      const int r = tile.first + id(i) / 4, source = r < tile.end ? source_row(p.x.index, p.x.divisor, r, p.groups.rows) : -1;
      a_[i] = static_cast<const T*>(p.x.data) + e * p.x.expert + (source < 0 ? 0 : source * p.x.row + per_chunk<T> * (id(i) % 4));
      if (source >= 0) read_ |= 1u << i;
    }
    const int64_t column0 = int64_t{tile.column} * (p.gated ? Tile::n / 2 : Tile::n);
#pragma unroll
    for (int i = 0; i < b_count; ++i) {
      const int lane = b_along_lanes ? id(i) % (Tile::n / 8) * 8 : id(i) / 4;
      const int64_t column = column0 + column_of_lane(p.gated, lane), output = column + (is_up(p.gated, lane) ? p.width : 0);
      const int64_t at = b_along_lanes ? output + id(i) / (Tile::n / 8) * p.w.input : output * p.w.output + per_chunk<T> * (id(i) % 4);
      b_[i] = static_cast<const T*>(p.w.data) + e * p.w.expert + (column < p.width ? at : 0);
      if (column < p.width) read_ |= 1u << (8 + i);
      if (b_along_lanes) lanes_left_[i] = static_cast<int>(p.width - column < 8 ? p.width - column : 8);
    }
  }

  __device__ void operator()(SharedAddress stage) {
    const int left = static_cast<int>(p_.depth) - k_;
#pragma unroll
    for (int i = 0; i < a_count; ++i) {
      const int chunk = id(i) % 4;
      cp_async_16(stage + along_k(id(i) / 4, chunk), a_[i], read_ >> i & 1 ? chunk_bytes<T>(left - per_chunk<T> * chunk) : 0);
      a_[i] += k_step<T>;
    }
    const SharedAddress b = stage + 64 * Tile::m;
#pragma unroll
    for (int i = 0; i < b_count; ++i) {
      const bool read = read_ >> (8 + i) & 1;
      if constexpr (b_along_lanes) {
        const int row = id(i) / (Tile::n / 8);
        cp_async_16(b + along_lanes<Tile::n>(row, id(i) % (Tile::n / 8)), b_[i], read && row < left ? chunk_bytes<T>(lanes_left_[i]) : 0);
        b_[i] += k_step<T> * p_.w.input;
      } else {
        const int chunk = id(i) % 4;
        cp_async_16(b + along_k(id(i) / 4, chunk), b_[i], read ? chunk_bytes<T>(left - per_chunk<T> * chunk) : 0);
        b_[i] += k_step<T>;
      }
    }
    if ((k_ += k_step<T>) < p_.depth) return;
#pragma unroll
    for (int i = 0; i < a_count; ++i) a_[i] += p_.x.expert - k_;  // the next expert of a sum
#pragma unroll
    for (int i = 0; i < b_count; ++i) b_[i] += p_.w.expert - (b_along_lanes ? k_ * p_.w.input : k_);
    k_ = 0;
  }

 private:
  static constexpr int a_count = Tile::m * 4 / Tile::threads, b_count = Tile::n * 4 / Tile::threads;
  __device__ static int id(int i) { return static_cast<int>(threadIdx.x) + i * Tile::threads; }

  const RowArguments& p_;
  const T *a_[a_count], *b_[b_count];
  int lanes_left_[b_count];
  int k_ = 0;
  uint32_t read_ = 0;
};

template <class T, class Tile, bool b_along_lanes>
class RowLoader<T, Tile, Load::elements, b_along_lanes> {
 public:
  __device__ RowLoader(const RowArguments& p, const RowTile& tile)
      : p_(p), x_{p.x.data, p.x.type == Type::f32}, w_{p.w.data, p.w.type == Type::f32}, x_at_(p.sum ? 0 : tile.expert * p.x.expert),
        w_at_(p.sum ? 0 : tile.expert * p.w.expert) {
#pragma unroll
    for (int i = 0; i < a_count; ++i) {
      const int64_t r = tile.first + lane(p.x.column == 1, i, Tile::m);
      const int64_t source = r < tile.end ? source_row(p.x.index, p.x.divisor, r, p.groups.rows) : -1;
      a_[i] = source < 0 ? -1 : source * p.x.row;
    }
    const int64_t column0 = int64_t{tile.column} * (p.gated ? Tile::n / 2 : Tile::n);
#pragma unroll
    for (int i = 0; i < b_count; ++i) {
      const int l = lane(p.w.input == 1, i, Tile::n);
      const int64_t column = column0 + column_of_lane(p.gated, l);
      b_[i] = column < p.width ? (column + (is_up(p.gated, l) ? p.width : 0)) * p.w.output : -1;
    }
  }

  __device__ void operator()(SharedAddress stage) {
#pragma unroll
    for (int i = 0; i < a_count; ++i) fill(x_, x_at_, a_[i], p_.x.column, p_.x_chunks, stage, i, Tile::m);
#pragma unroll
    for (int i = 0; i < b_count; ++i) fill(w_, w_at_, b_[i], p_.w.input, p_.w_chunks, stage + 64 * Tile::m, i, Tile::n);
    if ((k_ += k_step<T>) >= p_.depth) k_ = 0, x_at_ += p_.x.expert, w_at_ += p_.w.expert;
  }

 private:
  static constexpr int a_count = Tile::m * 4 / Tile::threads, b_count = Tile::n * 4 / Tile::threads;
  // Neighbouring threads read what is next to each other in memory: chunks of a lane, or lanes.
  __device__ static int lane(bool k_next, int i, int lanes) { return k_next ? id(i) / 4 : id(i) % lanes; }
  __device__ static int chunk(bool k_next, int i, int lanes) { return k_next ? id(i) % 4 : id(i) / lanes; }
  __device__ static int id(int i) { return static_cast<int>(threadIdx.x) + i * Tile::threads; }

  __device__ void fill(const Elements<T>& from, int64_t at, int64_t row, int64_t stride, bool chunks, SharedAddress to, int i,
                       int lanes) const {
    const int c = chunk(stride == 1, i, lanes);
    const int64_t k = k_ + per_chunk<T> * c, left = row < 0 ? 0 : p_.depth - k;
    uint4 bits;
    if (chunks && left >= per_chunk<T>) {
      bits = chunk_of(from, at + row + k);
    } else {
      T v[per_chunk<T>];
#pragma unroll
      for (int j = 0; j < per_chunk<T>; ++j) v[j] = j < left ? from(at + row + (k + j) * stride) : from_float<T>(0.0f);
      bits = packed(v);
    }
    store_shared_16(to + along_k(lane(stride == 1, i, lanes), c), bits);
  }

  const RowArguments& p_;
  const Elements<T> x_, w_;
  int64_t x_at_, w_at_, a_[a_count], b_[b_count], k_ = 0;
};

template <class T, class Tile, Load how, bool b_along_lanes, class Epilogue>
__global__ void __launch_bounds__(Tile::threads, Tile::blocks)
    grouped_gemm_kernel(const __grid_constant__ RowArguments p, const __grid_constant__ Epilogue epilogue) {
  CU_DYNAMIC_SHARED(memory);
  const SharedAddress ring = shared_address(memory);
  unsigned char* const scratch = memory + Tile::stages * Tile::stage_bytes;
  const WarpPlace<Tile> place;
  const RowTiles<Tile::m, Tile::threads> tiles(p.groups, p.sum, p.columns,
                                               reinterpret_cast<int*>(scratch + Epilogue::template scratch_bytes<Tile>));
  const int steps = static_cast<int>((p.depth + k_step<T> - 1) / k_step<T>);
  tiles.each([&](const RowTile& tile) {
    const bool known = tile.expert < p.groups.experts;
    RowLoader<T, Tile, how, b_along_lanes> load(p, tile);
    Accumulator<Tile> acc = {};
    accumulate<T, Tile, false, b_along_lanes && how == Load::async>(
        acc, place, ring, known ? p.sum ? steps * static_cast<int>(p.groups.experts) : steps : 0, load, [](SharedAddress, int) {});
    // A loop, because code for all sums at once would be enormous; registers cannot be indexed, so each round picks its own among all.
#pragma unroll 1
    for (int s = 0; s < Tile::tiles_m; ++s) {
      Accumulator<Slice<Tile>> sums;
#pragma unroll
      for (int i = 0; i < Tile::tiles_m; ++i)
        if (s == i)
#pragma unroll
          for (int j = 0; j < Tile::tiles_n; ++j)
#pragma unroll
            for (int c = 0; c < 4; ++c) sums[0][j][c] = acc[i][j][c];
      epilogue.template store<Slice<Tile>>(p, {tile.expert, tile.first + 16 * s, tile.end, tile.column}, known, WarpPlace<Slice<Tile>>(),
                                           sums, reinterpret_cast<float*>(scratch));
    }
  });
}

// Large tiles where experts have rows for them.
inline bool takes_large_tiles(const Groups& g, int64_t width) {
  return width >= 96 && (g.offsets ? g.rows / (g.experts ? g.experts : 1) : g.rows) >= 96;
}

template <class T, class Tile, Load how, bool b_along_lanes, class Epilogue>
void launch_rows(const char* operation, RowArguments p, const Epilogue& epilogue, Stream stream) {
  const int64_t wide = p.gated ? Tile::n / 2 : Tile::n;
  p.columns = static_cast<int>((p.width + wide - 1) / wide);
  const int64_t tiles = most_row_tiles(p.groups, p.sum, Tile::m) * p.columns;
  if (!tiles || !p.groups.rows) return;
  const size_t shared =
      Tile::stages * Tile::stage_bytes + Epilogue::template scratch_bytes<Tile> + RowTiles<Tile::m, Tile::threads>::bytes(p.groups);
  launch(operation, grouped_gemm_kernel<T, Tile, how, b_along_lanes, Epilogue>, persistent_blocks<Tile>(tiles), Tile::threads, shared,
         stream, p, epilogue);
}

// Whether an operand pair goes by cp.async, and how B then lies.
struct RowLoads {
  Load how;
  bool b_along_lanes;

  RowLoads(Type type, const RowArguments& p) {
    const bool x = p.x.type == type && in_chunks(p.x.data, type, p.x.column, p.x.row, p.x.expert);
    const bool along_inputs = in_chunks(p.w.data, type, p.w.input, p.w.output, p.w.expert);
    const bool along_outputs = in_chunks(p.w.data, type, p.w.output, p.w.input, p.w.expert) && (!p.gated || p.width % 8 == 0);
    b_along_lanes = !along_inputs;
    how = type != Type::f32 && p.w.type == type && x && (along_inputs || along_outputs) ? Load::async : Load::elements;
  }
};

template <class T, template <class> class Epilogue, class Description>
void run_rows_in(const char* operation, Type type, RowArguments p, const Description& description, Stream stream) {
  const RowLoads loads(type, p);
  const Epilogue<T> epilogue(description);
  p.x_chunks = in_chunks(p.x.data, p.x.type, p.x.column, p.x.row, p.x.expert);
  p.w_chunks = in_chunks(p.w.data, p.w.type, p.w.input, p.w.output, p.w.expert);
  if constexpr (sizeof(T) == 2) {
    if (loads.how == Load::async) {
      const bool large = takes_large_tiles(p.groups, p.width);
      if (loads.b_along_lanes)
        return large ? launch_rows<T, LargeTile, Load::async, true>(operation, p, epilogue, stream)
                     : launch_rows<T, SmallTile, Load::async, true>(operation, p, epilogue, stream);
      return large ? launch_rows<T, LargeTile, Load::async, false>(operation, p, epilogue, stream)
                   : launch_rows<T, SmallTile, Load::async, false>(operation, p, epilogue, stream);
    }
  }
  launch_rows<T, ElementTile, Load::elements, false>(operation, p, epilogue, stream);
}

template <template <class> class Epilogue, class Description>
void run_rows(const char* operation, Type type, const RowArguments& p, const Description& description, Stream stream) {
  switch (type) {
    case Type::f32: return run_rows_in<float, Epilogue>(operation, type, p, description, stream);
    case Type::bf16: return run_rows_in<bf16, Epilogue>(operation, type, p, description, stream);
    case Type::f16: return run_rows_in<fp16, Epilogue>(operation, type, p, description, stream);
    default: throw std::runtime_error(std::string(operation) + ": fp64 has no CUDA kernel");
  }
}

}  // namespace cmoe::cuda
