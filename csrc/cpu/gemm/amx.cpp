// AMX: bf16 by tiles of 16 rows of 32 values; everything else as on AVX-512.
//
// A block is 2 x 2 tiles of sums. Operand A's tiles are rows of k values at any stride, so a weight stored [out, in] is read where it lies;
// operand B's are pairs along k, [k / 32][2 tiles][16 pairs][16 lanes]. The outer operand's panel (32 KB at 512 values of k) stays in L1
// for a sweep over the shared operand, whose tiles are loaded with TILELOADDT1 so that they do not push it out; while a block is summed,
// the next one is fetched into L1. With one operand from L1 and one from L2 the tile multiplier is about half busy: what limits it is
// the L2 cache.
// In y = x W^T the weight is operand A, so that block is [weights, tokens] and is transposed on its way to the epilogue.

#include "bf16_panels.h"

#if defined(CMOE_EMULATE_AMX)
#include "amx_emulation.h"
#endif

namespace {

constexpr int tile_lanes = 32, tile_k = 32, tile_values = 16 * tile_k;

static void pack_a_rows(const void* const* rows, int lanes, int64_t k, void* panel) {
  const int64_t stride = (k + tile_k - 1) / tile_k * tile_k;
  for (int lane = 0; lane < tile_lanes; ++lane) {
    uint16_t* const to = static_cast<uint16_t*>(panel) + lane * stride;
    for (int64_t i = 0; i < stride; i += tile_k) {
      const __mmask32 mask = lane < lanes && i < k ? low_halves(k - i) : 0;
      _mm512_storeu_si512(to + i, _mm512_maskz_loadu_epi16(mask, lane < lanes ? static_cast<const uint16_t*>(rows[lane]) + i : nullptr));
    }
  }
}

// Pairs (2i, 2i + 1) of rows along lanes, for 32 lanes: the first 16 and the last.
INLINE void pairs_of(const void* const* rows, int64_t lane, __mmask32 mask, int64_t i, int64_t k, __m512i* low, __m512i* high) {
  const __m512i zero = _mm512_setzero_si512();
  const __m512i a = i < k ? _mm512_maskz_loadu_epi16(mask, static_cast<const uint16_t*>(rows[i]) + lane) : zero;
  const __m512i b = i + 1 < k ? _mm512_maskz_loadu_epi16(mask, static_cast<const uint16_t*>(rows[i + 1]) + lane) : zero;
  interleave(a, b, low, high);
}

static void pack_a_columns(const void* const* rows, int64_t lanes, int64_t k0, int64_t k, void* panels, int64_t panel_bytes) {
  const int64_t stride = panel_bytes / tile_lanes;
  for (int64_t i = 0; i < k; i += tile_k) {
    char* panel = static_cast<char*>(panels) + (k0 + i) * 2;
    for (int64_t lane = 0; lane < lanes; lane += tile_lanes, panel += panel_bytes) {
      const __mmask32 mask = low_halves(lanes - lane);
      __m512i low[16], high[16];
      for (int j = 0; j < 16; ++j) pairs_of(rows, lane, mask, i + 2 * j, k, &low[j], &high[j]);
      transpose16(low);
      transpose16(high);
      for (int j = 0; j < 16; ++j) {
        _mm512_storeu_si512(panel + j * stride, low[j]);
        _mm512_storeu_si512(panel + (16 + j) * stride, high[j]);
      }
    }
  }
}

static void pack_b_rows(const void* const* rows, int lanes, int64_t k, void* panel) {
  for (int64_t i = 0; i < k; i += tile_k)
    for (int half = 0; half < 2; ++half) {
      __m512i r[16];
      for (int j = 0; j < 16; ++j) {
        const int lane = 16 * half + j;
        r[j] = lane < lanes ? _mm512_maskz_loadu_epi16(low_halves(k - i), static_cast<const uint16_t*>(rows[lane]) + i) : _mm512_setzero_si512();
      }
      transpose16(r);
      uint16_t* const to = static_cast<uint16_t*>(panel) + i / tile_k * 2 * tile_values + half * tile_values;
      for (int j = 0; j < 16; ++j) _mm512_storeu_si512(to + j * 32, r[j]);
    }
}

static void pack_b_columns(const void* const* rows, int64_t lanes, int64_t k0, int64_t k, void* panels, int64_t panel_bytes) {
  for (int64_t i = 0; i < k; i += tile_k) {
    char* panel = static_cast<char*>(panels) + (k0 + i) / tile_k * 4 * tile_values;
    for (int64_t lane = 0; lane < lanes; lane += tile_lanes, panel += panel_bytes) {
      const __mmask32 mask = low_halves(lanes - lane);
      for (int j = 0; j < 16; ++j) {
        __m512i low, high;
        pairs_of(rows, lane, mask, i + 2 * j, k, &low, &high);
        _mm512_storeu_si512(panel + j * 64, low);
        _mm512_storeu_si512(panel + tile_values * 2 + j * 64, high);
      }
    }
  }
}

// Tiles: 0..3 sums [A half][B half], 4 and 5 operand B, 6 and 7 operand A.
template <bool a_resident, bool two>
INLINE void multiply_tiles(const char* a, int64_t a_stride, const char* b, float* block, int64_t k, bool add) {
  constexpr int64_t block_stride = tile_lanes * 4, b_step = 4 * tile_values;
  const char* const next = reinterpret_cast<const char*>(block + tile_lanes * tile_lanes);
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
  for (int64_t step = 0; step * tile_k < k; ++step, a += 2 * tile_k, b += b_step) {
    if (add && step < 16)
      for (int line = 0; line < 4; ++line) _mm_prefetch(next + step * 256 + line * 64, _MM_HINT_T0);
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
  }
  _tile_stored(0, block, block_stride);
  _tile_stored(1, block + 16, block_stride);
  if (two) {
    _tile_stored(2, block + 16 * tile_lanes, block_stride);
    _tile_stored(3, block + 16 * tile_lanes + 16, block_stride);
  }
}

template <bool a_resident>
static void multiply_amx(const void* a, int64_t a_stride, const void* b, void* block, int64_t k, int rows, bool add) {
  if (rows > 16)
    multiply_tiles<a_resident, true>(static_cast<const char*>(a), a_stride, static_cast<const char*>(b), static_cast<float*>(block), k, add);
  else
    multiply_tiles<a_resident, false>(static_cast<const char*>(a), a_stride, static_cast<const char*>(b), static_cast<float*>(block), k, add);
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
static void end_tiles() { _tile_release(); }

constexpr Microkernel bf16_tiles = {Type::bf16, tile_lanes, tile_lanes, tile_k, 512, Side::a, {true, false}, true,
                                    {pack_a_rows, pack_b_rows}, {pack_a_columns, pack_b_columns}, begin_tiles, end_tiles,
                                    {multiply_amx<true>, multiply_amx<false>}};

}  // namespace

namespace cmoe::cpu {

const Isa isa_amx = {"amx", &f32, &bf16_tiles, &f32_few, &bf16_few, &row_functions, convert, transpose_avx512};

}  // namespace cmoe::cpu
