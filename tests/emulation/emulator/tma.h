// Copies of boxes between tensors in global memory and swizzled tiles in shared memory.
#pragma once

#include "layouts.h"
#include "mbarrier.h"

namespace emulator {

// f(address in shared memory, the element of the tensor or null) for each element of a box.
template <class F>
void each_element(char* shared, uint32_t tile, const cmoe::cuda::TensorMap& map, int c0, int c1, int c2, F&& f) {
  const cmoe::cuda::TensorView& t = map.view;
  if (alternates(t)) std::swap(c1, c2);
  for (int r = 0; r < map.box_rows; ++r)
    for (int c = 0; c < cmoe::cuda::box_inner; ++c) {
      const int64_t inner = int64_t{c0} + c, row = int64_t{c1} + r;
      const bool inside = inner >= 0 && inner < t.inner && row >= 0 && row < t.rows && c2 >= 0 && c2 < t.matrices;
      const auto* data = static_cast<const uint16_t*>(t.data);
      f(reinterpret_cast<uint16_t*>(shared + swizzled(tile + r * row_bytes + c * 2)),
        inside ? data + c2 * t.matrix_stride + row * t.row_stride + inner : nullptr);
    }
}

inline void check_tile(uint32_t tile, const cmoe::cuda::TensorMap& map, const char* what) {
  if (tile % 1024)
    throw Fault(std::string(what) + ": a swizzled tile at shared address " + std::to_string(tile) + ", not a multiple of 1024");
  if (tile + map.box_rows * row_bytes > shared_capacity) throw Fault(std::string(what) + ": a tile beyond shared memory");
}

// Stores of a thread: issued, and committed in groups that have not read shared memory yet.
struct Stores {
  std::vector<std::function<void()>> open;
  std::deque<std::vector<std::function<void()>>> groups;
};
using StoresOfThreads = std::map<unsigned, Stores>;
inline Stores& stores() { return block().state<StoresOfThreads>()[self().number]; }

}  // namespace emulator

namespace cmoe::cuda {

inline void prefetch(const TensorMap&) {}

inline void tma_load(SharedAddress to, const TensorMap& map, SharedAddress barrier, int c0, int c1, int c2) {
  emulator::check_tile(to, map, "tma_load");
  emulator::Mbarrier* at;
  std::function<void()> copy;
  {
    const emulator::Quiet quiet;
    at = &emulator::mbarrier(barrier);
    char* const shared = emulator::block().shared;
    const auto issued = std::make_shared<char>();
    emulator::release(issued.get());
    copy = [=] {
      emulator::acquire(issued.get());
      emulator::each_element(shared, to, map, c0, c1, c2, [](uint16_t* tile, const uint16_t* element) { *tile = element ? *element : 0; });
      const emulator::Quiet quiet;
      emulator::release(at);
      at->bytes -= map.box_rows * emulator::row_bytes;
      emulator::end_phase_if_complete(*at);
    };
  }
  emulator::complete_on(*at, std::move(copy));
}

inline void tma_store(const TensorMap& map, SharedAddress from, int c0, int c1, int c2) {
  emulator::check_tile(from, map, "tma_store");
  char* const shared = emulator::block().shared;
  const auto store = [=] {
    emulator::each_element(shared, from, map, c0, c1, c2, [](const uint16_t* tile, const uint16_t* element) {
      if (element) *const_cast<uint16_t*>(element) = *tile;
    });
  };
  if (!emulator::options.lazy) return store();
  const emulator::Quiet quiet;
  emulator::stores().open.emplace_back(store);
}
inline void tma_store_commit() {
  const emulator::Quiet quiet;
  emulator::stores().groups.push_back(std::move(emulator::stores().open));
  emulator::stores().open.clear();
}
template <int N>
void tma_store_wait() {
  std::vector<std::function<void()>> due;
  {
    const emulator::Quiet quiet;
    for (auto& groups = emulator::stores().groups; static_cast<int>(groups.size()) > N; groups.pop_front())
      for (auto& store : groups.front()) due.push_back(std::move(store));
  }
  for (const auto& store : due) store();
}

}  // namespace cmoe::cuda
