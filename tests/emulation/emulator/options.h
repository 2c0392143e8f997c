// How kernels are run on the CPU, and what a run has counted.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>

namespace emulator {

enum class Order : int { forward, reverse, shuffled };

struct Options {
  Order order = Order::forward;  // in which threads that can run do run: results must not depend on it
  unsigned seed = 1;             // of the shuffled order
  bool lazy = true;              // asynchronous copies take effect at the last legal moment (the wait); else at the first (the instruction)
  bool early_copies = false;     // of tensors, while warpgroup products stay lazy: a tile that is filled again before its products are done
  bool poison = true;            // shared memory holds NaNs before a block starts
  int resident = 1;              // blocks that run interleaved: kernels in which blocks wait for each other need as many as they have
  int multiprocessors = 4;       // what the launchers are told
  int capability = std::getenv("CMOE_EMULATE_CAPABILITY") ? std::atoi(std::getenv("CMOE_EMULATE_CAPABILITY")) : 80;  // likewise: 80 or 90
  std::size_t stack = 128 << 10;
};
inline Options options;

// A phase is what one pass over the 32 banks of shared memory serves: 8 lanes of 16 bytes. Without conflicts every access is as many phases
// as it has rows of 128 bytes, so phases equal accesses.
struct Counts {
  uint64_t launches = 0, mma = 0, barriers = 0;
  uint64_t ldmatrix = 0, ldmatrix_phases = 0;  // 8 x 8 matrices
  uint64_t copies = 0, copy_phases = 0;        // quarter warps of 16-byte cp.async
  uint64_t vectors = 0, vector_phases = 0;     // quarter warps of 16-byte loads and stores of shared memory
};
inline Counts counts;

}  // namespace emulator
