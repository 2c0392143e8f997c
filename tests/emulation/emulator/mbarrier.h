// Barriers in shared memory, and the copies that complete on them. Lazy copies land when a thread that waits would otherwise have to sleep.
#pragma once

#include <deque>

#include "ampere.h"

namespace emulator {

struct Mbarrier {
  unsigned count = 0, pending = 0;  // arrivals of a phase, and those that this one still misses
  int64_t bytes = 0;                // announced and not yet copied
  unsigned phase = 0;
  std::vector<Fiber*> waiting;
  std::deque<std::function<void()>> copies;  // on their way
};

using Mbarriers = std::map<uint32_t, Mbarrier>;

inline Mbarrier& mbarrier(uint32_t address) {
  Mbarriers& all = block().state<Mbarriers>();
  const auto found = all.find(address);
  if (found == all.end()) throw Fault("mbarrier at shared address " + std::to_string(address) + ": used before mbarrier.init");
  return found->second;
}

inline void end_phase_if_complete(Mbarrier& at) {
  if (at.pending || at.bytes) return;
  at.phase ^= 1;
  at.pending = at.count;
  for (Fiber* const fiber : at.waiting) wake(*fiber);
  at.waiting.clear();
}

inline void arrive(Mbarrier& at) {
  release(&at);
  if (!at.pending) throw Fault("mbarrier: more arrivals in a phase than its count, " + std::to_string(at.count));
  --at.pending;
  end_phase_if_complete(at);
}

// A copy that completes on a barrier: at once, or when somebody waits for it.
inline void complete_on(Mbarrier& at, std::function<void()> copy) {
  if (!options.lazy || options.early_copies) return copy();
  const Quiet quiet;
  at.copies.push_back(std::move(copy));
  for (Fiber* const fiber : at.waiting) wake(*fiber);
  at.waiting.clear();
}

// cp.async of one thread that completes on a barrier, and with it all that the thread had issued before.
struct Landing {
  std::vector<Copy> copies;
  std::shared_ptr<Landing> before;
  void run() {
    if (before) before->run();
    for (const Copy& copy : copies) copy.land();  // the kernel's own accesses: seen by ThreadSanitizer
    const Quiet quiet;
    before = nullptr;
    copies.clear();
  }
};
using Landings = std::map<unsigned, std::shared_ptr<Landing>>;  // the last of each thread

// Registers per thread, as each warpgroup has set them.
using Registers = std::map<unsigned, int>;

inline void set_registers(int n, bool more, const Where& where) {
  const Quiet quiet;
  if (n % 8 || n < 24 || n > 256)
    throw Fault("setmaxnreg: " + std::to_string(n) + " registers, neither a multiple of 8 nor from 24 to 256");
  Registers& all = block().state<Registers>();
  const unsigned warpgroup = self().number / 128;
  const auto [at, first] = all.emplace(warpgroup, n);
  if (!first && at->second != n) throw Fault("setmaxnreg at " + text_of(where) + ": threads of one warpgroup differ");
  int total = 0;
  for (const auto& [group, registers] : all) total += 128 * registers;
  if (more && total > 65536)
    throw Fault("setmaxnreg at " + text_of(where) + ": " + std::to_string(total) + " registers in one block, more than 65536");
}

}  // namespace emulator

namespace cmoe::cuda {

inline void mbarrier_init(SharedAddress barrier, uint32_t arrivals) {
  const emulator::Quiet quiet;
  emulator::shared_pointer(barrier, 8, "mbarrier.init");
  if (!arrivals) throw emulator::Fault("mbarrier.init: a count of 0");
  emulator::Mbarriers& all = emulator::block().state<emulator::Mbarriers>();
  if (!all.emplace(barrier, emulator::Mbarrier{arrivals, arrivals, 0, 0, {}, {}}).second)
    throw emulator::Fault("mbarrier.init: a barrier is there already");
}
inline void fence_mbarrier_init() {}

inline void mbarrier_arrive(SharedAddress barrier) {
  const emulator::Quiet quiet;
  emulator::arrive(emulator::mbarrier(barrier));
}
inline void mbarrier_arrive_expect(SharedAddress barrier, uint32_t bytes) {
  const emulator::Quiet quiet;
  emulator::mbarrier(barrier).bytes += bytes;
  emulator::arrive(emulator::mbarrier(barrier));
}
inline void mbarrier_wait(SharedAddress barrier, uint32_t parity, emulator::Where where = emulator::Where::current()) {
  for (;;) {
    std::function<void()> copy;
    {
      const emulator::Quiet quiet;
      emulator::Mbarrier& at = emulator::mbarrier(barrier);
      if (at.phase != (parity & 1)) return emulator::acquire(&at);
      if (at.copies.empty()) {
        at.waiting.push_back(&emulator::self());
        emulator::wait("an mbarrier", where);
        continue;
      }
      copy = std::move(at.copies.front());
      at.copies.pop_front();
    }
    copy();
  }
}

inline void cp_async_mbarrier_arrive(SharedAddress barrier) {
  emulator::Mbarrier* at;
  std::function<void()> copies;
  {
    const emulator::Quiet quiet;
    at = &emulator::mbarrier(barrier);
    emulator::Landings& landings = emulator::block().state<emulator::Landings>();
    emulator::Fiber& self = emulator::self();
    const auto landing = std::make_shared<emulator::Landing>();
    landing->before = landings[self.number];
    for (const auto& group : self.groups) landing->copies.insert(landing->copies.end(), group.begin(), group.end());
    landing->copies.insert(landing->copies.end(), self.open.begin(), self.open.end());
    self.groups.clear();
    self.open.clear();
    landings[self.number] = landing;
    emulator::release(landing.get());
    copies = [=] {
      emulator::acquire(landing.get());
      landing->run();
      const emulator::Quiet quiet;
      emulator::arrive(*at);
    };
  }
  emulator::complete_on(*at, std::move(copies));
}

inline void fence_async_proxy() {}

inline void barrier_sync(uint32_t id, uint32_t threads, emulator::Where where = emulator::Where::current()) {
  if (id == 0 || id > 15 || threads == 0 || threads % 32)
    throw emulator::Fault("barrier " + std::to_string(id) + " of " + std::to_string(threads) + " threads");
  emulator::barrier(static_cast<int>(id), threads, true, where);
}
inline void barrier_arrive(uint32_t id, uint32_t threads, emulator::Where where = emulator::Where::current()) {
  if (id == 0 || id > 15 || threads == 0 || threads % 32)
    throw emulator::Fault("barrier " + std::to_string(id) + " of " + std::to_string(threads) + " threads");
  emulator::barrier(static_cast<int>(id), threads, false, where);
}

template <int N>
void fewer_registers(emulator::Where where = emulator::Where::current()) {
  emulator::set_registers(N, false, where);
}
template <int N>
void more_registers(emulator::Where where = emulator::Where::current()) {
  emulator::set_registers(N, true, where);
}

}  // namespace cmoe::cuda
