// The tile instructions in plain C++, for tests on machines that lack them: built in with -DCMOE_EMULATE_AMX and never in a release.
#pragma once

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

namespace {

struct Tiles {
  bool configured = false;
  unsigned char data[8][16][64];
};
thread_local Tiles tiles;

inline void require_configuration() {
  if (!tiles.configured) {
    fputs("a tile instruction without a tile configuration\n", stderr);
    abort();
  }
}
inline void emulated_loadconfig(const void*) { tiles.configured = true; }
inline void emulated_release() { tiles.configured = false; }
inline void emulated_zero(int tile) {
  require_configuration();
  memset(tiles.data[tile], 0, sizeof tiles.data[tile]);
}
inline void emulated_load(int tile, const void* from, int64_t stride) {
  require_configuration();
  for (int r = 0; r < 16; ++r) memcpy(tiles.data[tile][r], static_cast<const char*>(from) + r * stride, 64);
}
inline void emulated_store(int tile, void* to, int64_t stride) {
  require_configuration();
  for (int r = 0; r < 16; ++r) memcpy(static_cast<char*>(to) + r * stride, tiles.data[tile][r], 64);
}
inline float widened(const unsigned char* p) {
  uint16_t half;
  memcpy(&half, p, 2);
  const uint32_t bits = static_cast<uint32_t>(half) << 16;
  float value;
  memcpy(&value, &bits, 4);
  return value;
}
inline void emulated_multiply(int sums, int a, int b) {
  require_configuration();
  for (int m = 0; m < 16; ++m)
    for (int n = 0; n < 16; ++n) {
      float sum;
      memcpy(&sum, tiles.data[sums][m] + 4 * n, 4);
      for (int k = 0; k < 16; ++k)
        for (int half = 0; half < 2; ++half)
          sum += widened(tiles.data[a][m] + 4 * k + 2 * half) * widened(tiles.data[b][k] + 4 * n + 2 * half);
      memcpy(tiles.data[sums][m] + 4 * n, &sum, 4);
    }
}

inline void emulated_multiply_bytes(int sums, int a, int b) {
  require_configuration();
  for (int m = 0; m < 16; ++m)
    for (int n = 0; n < 16; ++n) {
      int32_t sum;
      memcpy(&sum, tiles.data[sums][m] + 4 * n, 4);
      for (int k = 0; k < 64; ++k)
        sum += static_cast<int8_t>(tiles.data[a][m][k]) * static_cast<int8_t>(tiles.data[b][k / 4][4 * n + k % 4]);
      memcpy(tiles.data[sums][m] + 4 * n, &sum, 4);
    }
}

}  // namespace

#undef _tile_loadconfig
#undef _tile_release
#undef _tile_zero
#undef _tile_loadd
#undef _tile_stream_loadd
#undef _tile_stored
#undef _tile_dpbf16ps
#undef _tile_dpbssd
#define _tile_loadconfig emulated_loadconfig
#define _tile_release emulated_release
#define _tile_zero emulated_zero
#define _tile_loadd emulated_load
#define _tile_stream_loadd emulated_load
#define _tile_stored emulated_store
#define _tile_dpbf16ps emulated_multiply
#define _tile_dpbssd emulated_multiply_bytes
