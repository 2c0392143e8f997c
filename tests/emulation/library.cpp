// What the tests set and read of the emulator, and the launchers that no operation has to itself, beside what csrc/cuda binds.

#include <cstring>

#include "../../csrc/registration.h"
#include "emulator/options.h"
#include "rows/sort_by_expert.h"

extern "C" {

[[gnu::visibility("default")]] const char* operations() { return cmoe::operations().c_str(); }

[[gnu::visibility("default")]] void set_options(int order, unsigned seed, bool lazy, int multiprocessors, int capability) {
  emulator::options.order = static_cast<emulator::Order>(order);
  emulator::options.seed = seed;
  emulator::options.lazy = lazy;
  emulator::options.multiprocessors = multiprocessors;
  emulator::options.capability = capability;
}

// launches, then quarter warps and phases of 16-byte copies, matrices and phases of ldmatrix, quarter warps and phases of 16-byte accesses.
[[gnu::visibility("default")]] void take_counts(uint64_t* to) {
  const emulator::Counts& c = emulator::counts;
  const uint64_t values[] = {c.launches, c.copies, c.copy_phases, c.ldmatrix, c.ldmatrix_phases, c.vectors, c.vector_phases};
  memcpy(to, values, sizeof values);
  emulator::counts = {};
}

// Sizes: rows of indices and their strides, tokens, k, experts, and the strides of the weights. 0, or the scratch that is needed where
// there is none.
[[gnu::visibility("default")]] int64_t sort_by_expert(const int64_t* indices, const int64_t* group_ids, const float* weights,
                                                      const int64_t* sizes, int64_t* gather_idx, int32_t* offsets, float* row_weights,
                                                      int32_t* scratch) {
  using namespace cmoe::cuda;
  const Assignments s{{indices, sizes[1], sizes[2]}, sizes[0], group_ids, sizes[3], sizes[4], sizes[5]};
  if (!scratch) return sort_scratch(s);
  sort_by_expert(s, Matrix{weights, Type::f32, sizes[6], sizes[7]}, gather_idx, offsets, row_weights, scratch, nullptr);
  return 0;
}
}
