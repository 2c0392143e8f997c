// The instructions of csrc/cuda/device/ampere.h on the CPU, with the fragment layouts of the PTX ISA.
#pragma once

#include <array>

#include "cuda.h"
#include "types.h"

namespace cmoe::cuda {

using SharedAddress = uint32_t;

inline SharedAddress shared_address(const void* p) { return emulator::shared_address(p); }

inline void cp_async_16(SharedAddress to, const void* from, int bytes) {
  emulator::Fiber& self = emulator::self();
  const emulator::Copy copy{emulator::shared_pointer(to, 16, "cp.async"), from, 16, static_cast<unsigned>(bytes)};
  if (bytes < 0 || bytes > 16) throw emulator::Fault("cp.async: " + std::to_string(bytes) + " bytes of 16");
  if (reinterpret_cast<uintptr_t>(from) % 16) throw emulator::Fault("cp.async: the global address is not aligned to 16 bytes");
  if (!emulator::options.lazy) copy.land();
  const emulator::Quiet quiet;
  unsigned phases;
  if (emulator::warp().copies.add(self.copies++, self.lane(), to, &phases))
    emulator::counts.copies += 4, emulator::counts.copy_phases += phases;
  if (emulator::options.lazy) self.open.push_back(copy);
}

inline void cp_async_commit() {
  const emulator::Quiet quiet;
  emulator::Fiber& self = emulator::self();
  self.groups.push_back(std::move(self.open));
  self.open.clear();
}

template <int pending>
void cp_async_wait() {
  emulator::Fiber& self = emulator::self();
  while (static_cast<int>(self.groups.size()) > pending) {
    for (const emulator::Copy& copy : self.groups.front()) copy.land();  // the kernel's own accesses: seen by ThreadSanitizer
    const emulator::Quiet quiet;
    self.groups.erase(self.groups.begin());
  }
}

namespace detail {

struct Ldmatrix {
  uint32_t row[4], out[4];
  SharedAddress address;
};

template <bool transposed>
void ldmatrix_x4(uint32_t (&r)[4], SharedAddress address, emulator::Where where) {
  Ldmatrix argument{{}, {}, address};
  memcpy(argument.row, emulator::shared_pointer(address, 16, "ldmatrix"), 16);  // each lane reads the row that it names
  emulator::collective(~0u, argument, transposed ? "ldmatrix.trans" : "ldmatrix", where, [](Ldmatrix** lane) {
    for (int m = 0; m < 4; ++m) {
      uint32_t addresses[8];
      for (int i = 0; i < 8; ++i) addresses[i] = lane[8 * m + i]->address;
      emulator::counts.ldmatrix_phases += emulator::Accesses::worst(addresses);
      ++emulator::counts.ldmatrix;
      const auto element = [&](int row, int column) { return lane[8 * m + row]->row[column / 2] >> (16 * (column % 2)) & 0xffff; };
      for (int t = 0; t < 32; ++t) {
        const int i = t / 4, j = t % 4 * 2;
        lane[t]->out[m] = transposed ? element(j, i) | element(j + 1, i) << 16 : element(i, j) | element(i, j + 1) << 16;
      }
    }
  });
  memcpy(r, argument.out, 16);
}

struct Mma {
  float d[4];
  uint32_t a[4], b[2];
};

}  // namespace detail

inline void ldmatrix_x4(uint32_t (&r)[4], SharedAddress row, emulator::Where where = emulator::Where::current()) {
  detail::ldmatrix_x4<false>(r, row, where);
}
inline void ldmatrix_x4_trans(uint32_t (&r)[4], SharedAddress row, emulator::Where where = emulator::Where::current()) {
  detail::ldmatrix_x4<true>(r, row, where);
}

// Sums in fp64, rounded once: what a tensor core would give at its best, not its bits.
template <class T>
void mma_16816(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, emulator::Where where = emulator::Where::current()) {
  detail::Mma argument{{d[0], d[1], d[2], d[3]}, {a[0], a[1], a[2], a[3]}, {b0, b1}};
  emulator::collective(~0u, argument, "mma.m16n8k16", where, [](detail::Mma** lane) {
    double A[16][16], B[16][8];
    const auto half = [](uint32_t pair, int which) {
      return static_cast<double>(to_float(T{static_cast<uint16_t>(pair >> (16 * which))}));
    };
    for (int t = 0; t < 32; ++t) {
      const int g = t / 4, c = t % 4 * 2;
      for (int h = 0; h < 2; ++h) {
        for (int i = 0; i < 4; ++i) A[g + i % 2 * 8][c + i / 2 * 8 + h] = half(lane[t]->a[i], h);
        for (int i = 0; i < 2; ++i) B[c + i * 8 + h][g] = half(lane[t]->b[i], h);
      }
    }
    for (int m = 0; m < 16; ++m) {
      double sum[8] = {};
      for (int k = 0; k < 16; ++k)
        for (int n = 0; n < 8; ++n) sum[n] += A[m][k] * B[k][n];
      for (int n = 0; n < 8; ++n) {
        float& at = lane[m % 8 * 4 + n / 2]->d[m / 8 * 2 + n % 2];
        at = static_cast<float>(at + sum[n]);
      }
    }
    ++emulator::counts.mma;
  });
  memcpy(d, argument.d, 16);
}

namespace detail {

inline char* vector_access(SharedAddress address) {
  const emulator::Quiet quiet;
  emulator::Fiber& self = emulator::self();
  unsigned phases;
  if (emulator::warp().vectors.add(self.vectors++, self.lane(), address, &phases))
    emulator::counts.vectors += 4, emulator::counts.vector_phases += phases;
  return emulator::shared_pointer(address, 16, "16-byte access");
}

}  // namespace detail

inline uint4 load_shared_16(SharedAddress from) {
  uint4 value;
  memcpy(&value, detail::vector_access(from), 16);
  return value;
}
inline void store_shared_16(SharedAddress to, uint4 value) { memcpy(detail::vector_access(to), &value, 16); }

}  // namespace cmoe::cuda
