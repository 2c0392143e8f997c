// AMX: bf16 by tiles of 16 rows of 32 values, int8 of 64; everything else as on AVX-512.
//
// A block is 2 x 2 tiles of sums. A packed panel is whole tiles, so that a tile is 16 adjacent cache lines: operand A's are rows of k
// values, [k / 32][32 lanes][32 values], operand B's are pairs along k, [k / 32][2 tiles][16 pairs][16 lanes]. Operand A is also read in
// place, at the stride of a weight stored [out, in]. The outer operand's panel (32 KB at 512 values of k) stays in L1 for a sweep over the
// shared operand, whose tiles are loaded with TILELOADDT1 so that they do not push it out; while a block is summed, the next one is fetched
// into L1. The L2 cache is the limit: with one operand from L1 and one from L2 the tile multiplier is about half busy. So a few lines of
// what the next products read are prefetched per k step, and in dW the rows of the finished block are stored per k step too.
// In y = x W^T the weight is operand A, so that block is [weights, tokens] and is transposed on its way to the epilogue.

#include "bf16_panels.h"
#include "vnni.h"

#if defined(CMOE_EMULATE_AMX)
#include "amx_emulation.h"
#endif

namespace {

constexpr int tile_lanes = 32, tile_k = 32, tile_values = 16 * tile_k;

static void pack_a_rows(const void* const* rows, int lanes, int64_t k, void* panel) {
  uint16_t* to = static_cast<uint16_t*>(panel);
  for (int64_t i = 0; i < k; i += tile_k)
    for (int lane = 0; lane < tile_lanes; ++lane, to += tile_k)
      _mm512_storeu_si512(to, lane < lanes ? _mm512_maskz_loadu_epi16(low_halves(k - i), static_cast<const uint16_t*>(rows[lane]) + i)
                                           : _mm512_setzero_si512());
}

// Pairs (2i, 2i + 1) of rows along lanes, for 32 lanes: the first 16 and the last. whole: no row and no lane is missing, and loads need no
// masks.
template <bool whole>
INLINE void pairs_of(const void* const* rows, int64_t lane, __mmask32 mask, int64_t i, int64_t k, __m512i* low, __m512i* high) {
  const auto row = [&](int64_t r) {
    if (whole) return _mm512_loadu_si512(static_cast<const uint16_t*>(rows[r]) + lane);
    return r < k ? _mm512_maskz_loadu_epi16(mask, static_cast<const uint16_t*>(rows[r]) + lane) : _mm512_setzero_si512();
  };
  interleave(row(i), row(i + 1), low, high);
}

template <bool whole>
INLINE void pack_a_square(const void* const* rows, int64_t lane, __mmask32 mask, int64_t i, int64_t k, char* to) {
  __m512i low[16], high[16];
#pragma GCC unroll 16
  for (int j = 0; j < 16; ++j) pairs_of<whole>(rows, lane, mask, i + 2 * j, k, &low[j], &high[j]);
  transpose16(low);
  transpose16(high);
#pragma GCC unroll 16
  for (int j = 0; j < 16; ++j) {
    _mm512_storeu_si512(to + j * 64, low[j]);
    _mm512_storeu_si512(to + (16 + j) * 64, high[j]);
  }
}
template <bool whole>
INLINE void pack_b_square(const void* const* rows, int64_t lane, __mmask32 mask, int64_t i, int64_t k, char* to) {
#pragma GCC unroll 16
  for (int j = 0; j < 16; ++j) {
    __m512i low, high;
    pairs_of<whole>(rows, lane, mask, i + 2 * j, k, &low, &high);
    _mm512_storeu_si512(to + j * 64, low);
    _mm512_storeu_si512(to + (16 + j) * 64, high);
  }
}
template <bool a>
static void pack_columns(const void* const* rows, int64_t lanes, int64_t k0, int64_t k, void* panels, int64_t panel_bytes) {
  for (int64_t i = 0; i < k; i += tile_k) {
    char* to = static_cast<char*>(panels) + (k0 + i) / tile_k * 4 * tile_values;
    for (int64_t lane = 0; lane < lanes; lane += tile_lanes, to += panel_bytes) {
      const __mmask32 mask = low_halves(lanes - lane);
      if (k - i >= tile_k && lanes - lane >= tile_lanes)
        a ? pack_a_square<true>(rows, lane, mask, i, k, to) : pack_b_square<true>(rows, lane, mask, i, k, to);
      else
        a ? pack_a_square<false>(rows, lane, mask, i, k, to) : pack_b_square<false>(rows, lane, mask, i, k, to);
    }
  }
}

template <bool whole>
INLINE void pack_b_half(const void* const* rows, int lanes, int64_t i, int64_t k, char* to) {
  __m512i r[16];
#pragma GCC unroll 16
  for (int j = 0; j < 16; ++j) {
    if (whole)
      r[j] = _mm512_loadu_si512(static_cast<const uint16_t*>(rows[j]) + i);
    else
      r[j] = j < lanes ? _mm512_maskz_loadu_epi16(low_halves(k - i), static_cast<const uint16_t*>(rows[j]) + i) : _mm512_setzero_si512();
  }
  transpose16(r);
#pragma GCC unroll 16
  for (int j = 0; j < 16; ++j) _mm512_storeu_si512(to + j * 64, r[j]);
}
static void pack_b_rows(const void* const* rows, int lanes, int64_t k, void* panel) {
  char* to = static_cast<char*>(panel);
  for (int64_t i = 0; i < k; i += tile_k)
    for (int lane = 0; lane < tile_lanes; lane += 16, to += 2 * tile_values) {
      if (k - i >= tile_k && lanes - lane >= 16)
        pack_b_half<true>(rows + lane, 16, i, k, to);
      else
        pack_b_half<false>(rows + lane, lanes - lane, i, k, to);
    }
}

// Some rows of a finished block, which is stored while another is multiplied.
INLINE void store_rows(const Finished& finished, int64_t first, int64_t last) {
  for (int64_t r = first; r < last; ++r) {
    const float* const sums = static_cast<const float*>(finished.sums) + r * tile_lanes;
    _mm512_stream_si512(reinterpret_cast<__m512i*>(finished.to + r * finished.stride),
                        (__m512i)_mm512_cvtne2ps_pbh(_mm512_loadu_ps(sums + 16), _mm512_loadu_ps(sums)));
  }
}

// Tiles: 0..3 sums [A half][B half], 4 and 5 operand B, 6 and 7 operand A.
// Sums are fp32 or int32.
constexpr int64_t block_stride = tile_lanes * 4;

template <bool two, class Sum>
INLINE void load_sums(const Sum* block, bool add) {
  if (add) {
    _tile_loadd(0, block, block_stride);
    _tile_loadd(1, block + 16, block_stride);
    if (two) {
      _tile_loadd(2, block + 16 * tile_lanes, block_stride);
      _tile_loadd(3, block + 16 * tile_lanes + 16, block_stride);
    }
  } else {
    _tile_zero(0);
    _tile_zero(1);
    if (two) {
      _tile_zero(2);
      _tile_zero(3);
    }
  }
}
template <bool two, class Sum>
INLINE void store_tiles(Sum* block) {
  _tile_stored(0, block, block_stride);
  _tile_stored(1, block + 16, block_stride);
  if (two) {
    _tile_stored(2, block + 16 * tile_lanes, block_stride);
    _tile_stored(3, block + 16 * tile_lanes + 16, block_stride);
  }
}

template <bool a_resident, bool two>
INLINE void multiply_tiles(const char* a, int64_t a_stride, const char* b, float* block, int64_t k, bool add, const Prefetch& prefetch,
                           const Finished* finished) {
  constexpr int64_t b_step = 4 * tile_values;
  const int64_t a_step = a_stride == 2 * tile_k ? 4 * tile_values : 2 * tile_k;  // of a packed panel; of rows in place
  const char* const next = reinterpret_cast<const char*>(block + tile_lanes * tile_lanes);
  load_sums<two>(block, add);
  const int64_t steps = k / tile_k, rows_per_step = (tile_lanes + steps - 1) / steps;
  for (int64_t step = 0; step < steps; ++step, a += a_step, b += b_step) {
    if (add && step < 16)
      for (int line = 0; line < 4; ++line) _mm_prefetch(next + step * 256 + line * 64, _MM_HINT_T0);
    if (step < prefetch.lines)
      for (int row = 0; row < prefetch.rows; ++row) _mm_prefetch(prefetch.data + row * prefetch.stride + step * 64, _MM_HINT_T1);
    if (a_resident) {
      _tile_loadd(6, a, a_stride);
      _tile_stream_loadd(4, b, 64);
      _tile_dpbf16ps(0, 6, 4);
      if (two) _tile_loadd(7, a + 16 * a_stride, a_stride);
      if (two) _tile_dpbf16ps(2, 7, 4);
      _tile_stream_loadd(5, b + 2 * tile_values, 64);
      _tile_dpbf16ps(1, 6, 5);
      if (two) _tile_dpbf16ps(3, 7, 5);
    } else {
      _tile_loadd(4, b, 64);
      _tile_stream_loadd(6, a, a_stride);
      _tile_dpbf16ps(0, 6, 4);
      _tile_loadd(5, b + 2 * tile_values, 64);
      _tile_dpbf16ps(1, 6, 5);
      if (two) _tile_stream_loadd(7, a + 16 * a_stride, a_stride);
      if (two) _tile_dpbf16ps(2, 7, 4);
      if (two) _tile_dpbf16ps(3, 7, 5);
    }
    if (finished) {
      const int64_t first = step * rows_per_step, last = first + rows_per_step;
      store_rows(*finished, first, last < tile_lanes ? last : tile_lanes);
    }
  }
  store_tiles<two>(block);
}

template <bool a_resident>
INLINE void multiply_used(const void* a, int64_t a_stride, const void* b, void* block, int64_t k, int used, bool add,
                          const Prefetch& prefetch, const Finished* finished) {
  const char *const a_tiles = static_cast<const char*>(a), *const b_tiles = static_cast<const char*>(b);
  if (used > 16)
    multiply_tiles<a_resident, true>(a_tiles, a_stride, b_tiles, static_cast<float*>(block), k, add, prefetch, finished);
  else
    multiply_tiles<a_resident, false>(a_tiles, a_stride, b_tiles, static_cast<float*>(block), k, add, prefetch, finished);
}
template <bool a_resident>
static void multiply_amx(const void* a, int64_t a_stride, const void* b, void* block, int64_t k, int used, bool add,
                         const Prefetch& prefetch) {
  multiply_used<a_resident>(a, a_stride, b, block, k, used, add, prefetch, nullptr);
}
static void multiply_and_store(const void* a, int64_t a_stride, const void* b, void* block, int64_t k, int used, bool add,
                               const Prefetch& prefetch, const Finished& finished) {
  multiply_used<true>(a, a_stride, b, block, k, used, add, prefetch, &finished);
}

// --- int8 -------------------------------------------------------------------------------------------------------------------------------
// Operand A: rows of 64 values, [k / 64][32 lanes][64]. Operand B, weights, [k / 4][32 lanes][4]: a tile is every other line.
constexpr int tile_bytes_k = 64;

static void pack_a_i8(const void* const* rows, int lanes, int64_t k, void* panel) {
  char* to = static_cast<char*>(panel);
  for (int64_t i = 0; i < k; i += tile_bytes_k)
    for (int lane = 0; lane < tile_lanes; ++lane, to += tile_bytes_k) {
      const int64_t used = lane >= lanes ? 0 : k - i < tile_bytes_k ? k - i : tile_bytes_k;
      if (used) memcpy(to, static_cast<const char*>(rows[lane]) + i, used);
      memset(to + used, 0, tile_bytes_k - used);
    }
}

template <bool two>
INLINE void multiply_i8_tiles(const char* a, const char* b, int32_t* block, int64_t k, bool add, const Prefetch& prefetch) {
  constexpr int64_t b_stride = tile_lanes * 4;
  load_sums<two>(block, add);
  for (int64_t i = 0; i < k; i += tile_bytes_k, a += tile_lanes * tile_bytes_k, b += 16 * b_stride) {
    if (i / tile_bytes_k < prefetch.lines)
      for (int row = 0; row < prefetch.rows; ++row)
        _mm_prefetch(prefetch.data + row * prefetch.stride + i / tile_bytes_k * 64, _MM_HINT_T1);
    _tile_loadd(4, b, b_stride);
    _tile_stream_loadd(6, a, tile_bytes_k);
    _tile_dpbssd(0, 6, 4);
    _tile_loadd(5, b + 64, b_stride);
    _tile_dpbssd(1, 6, 5);
    if (two) {
      _tile_stream_loadd(7, a + 16 * tile_bytes_k, tile_bytes_k);
      _tile_dpbssd(2, 7, 4);
      _tile_dpbssd(3, 7, 5);
    }
  }
  store_tiles<two>(block);
}
static void multiply_i8_amx(const void* a, int64_t, const void* b, void* block, int64_t k, int used, bool add, const Prefetch& prefetch) {
  const char *const a_tiles = static_cast<const char*>(a), *const b_tiles = static_cast<const char*>(b);
  if (used > 16)
    multiply_i8_tiles<true>(a_tiles, b_tiles, static_cast<int32_t*>(block), k, add, prefetch);
  else
    multiply_i8_tiles<false>(a_tiles, b_tiles, static_cast<int32_t*>(block), k, add, prefetch);
}

// Eight tiles of 16 rows of 64 bytes. A constant: GCC 12 declares that _tile_loadconfig reads 8 bytes of its argument, so it removes the
// stores of the other 56 where the layout is built on the stack.
struct alignas(64) TileLayout {
  uint8_t palette, start_row, reserved[14];
  uint16_t bytes_per_row[16];
  uint8_t rows[16];
};
static const TileLayout tile_layout = {1, 0, {}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16}};

static void begin_tiles() { _tile_loadconfig(&tile_layout); }
static void end_tiles() {
  _tile_release();
  _mm_sfence();  // other threads see what was stored past the caches
}

constexpr Microkernel bf16_tiles = {Type::bf16,
                                    tile_lanes,
                                    tile_lanes,
                                    tile_k,
                                    512,
                                    Side::a,
                                    {false, false},
                                    true,
                                    true,
                                    {pack_a_rows, pack_b_rows},
                                    {pack_columns<true>, pack_columns<false>},
                                    begin_tiles,
                                    end_tiles,
                                    {multiply_amx<true>, multiply_amx<false>},
                                    multiply_and_store};

constexpr Microkernel w8_few = fixed_microkernel<4>;
constexpr Microkernel i8_tiles = {
    Type::i8, tile_lanes, tile_lanes,           tile_bytes_k,       512,         Side::b,   {false, false},
    false,    false,      {pack_a_i8, nullptr}, {nullptr, nullptr}, begin_tiles, end_tiles, {multiply_i8_amx, multiply_i8_amx},
    nullptr,  true};

}  // namespace

namespace cmoe::cpu {

const Isa isa_amx = {"amx", &f32,     &bf16_tiles, &f32_small_m, &bf16_small_m, &row_functions, convert, transpose_avx512,
                     &w8,   &w8_wide, &i8_tiles,   &w8_few};

}  // namespace cmoe::cpu
