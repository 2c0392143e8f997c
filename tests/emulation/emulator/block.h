// A thread block at work: its warps, barriers and shared memory; and the meetings of its threads.
#pragma once

#include <algorithm>
#include <cstdlib>
#include <functional>
#include <map>
#include <memory>
#include <typeindex>

#include "fiber.h"

namespace emulator {

constexpr std::size_t shared_capacity = 227 << 10;  // the most that a block can have, on sm_90

// 16-byte accesses of a warp, matched by their number: the n-th of each lane are one instruction. Instructions that not all lanes issue are
// not counted.
class Accesses {
 public:
  // Adds lane's access; true when the instruction is complete, whose phases are then in *phases.
  bool add(unsigned number, unsigned lane, uint32_t address, unsigned* phases) {
    Instruction& i = slots_[number % slots];
    if (i.number != number) i = {number, 0, {}};
    i.address[lane] = address;
    if ((i.seen |= 1u << lane) != ~0u) return false;
    i.seen = 0;
    *phases = 0;
    for (int quarter = 0; quarter < 4; ++quarter) *phases += worst(i.address + 8 * quarter);
    return true;
  }

  // How often the busiest of the 8 groups of four banks is asked for different 16 bytes.
  static unsigned worst(const uint32_t* address) {
    unsigned most = 0;
    for (int i = 0; i < 8; ++i) {
      unsigned same = 0;
      for (int j = 0; j < 8; ++j)
        if (address[j] / 16 % 8 == address[i] / 16 % 8 && std::find(address, address + j, address[j]) == address + j) ++same;
      most = std::max(most, same);
    }
    return most;
  }

 private:
  static constexpr int slots = 256;
  struct Instruction {
    unsigned number = ~0u, seen = 0;
    uint32_t address[32] = {};
  };
  std::vector<Instruction> slots_ = std::vector<Instruction>(slots);
};

// Lanes of a warp on their way through one collective; free with no mask.
struct Meeting {
  void* argument[32];
  uint32_t arrived = 0, mask = 0;
  const char* what = nullptr;
};

struct Warp {
  Meeting meetings[4];  // parts of a warp may be in collectives of their own
  uint32_t exited = 0;
  Accesses copies, vectors;
};

struct Barrier {
  unsigned arrived = 0;
  Where where;
  std::vector<Fiber*> waiting;
};

struct Block {
  uint3 index;
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  unsigned live = 0;
  Barrier barriers[16];
  std::map<const void*, char*> arrays;  // static shared arrays, by where they are declared
  char* shared = nullptr;               // dynamic shared memory first
  std::size_t used = 0;

  // State that one kind of instruction keeps for a block (mbarriers, warpgroups ...).
  template <class T>
  T& state() {
    std::shared_ptr<void>& p = states_[typeid(T)];
    if (!p) p = std::make_shared<T>();
    return *static_cast<T*>(p.get());
  }

  Block() = default;
  Block(const Block&) = delete;
  ~Block() {
#if defined(__SANITIZE_ADDRESS__)
    if (shared) __asan_unpoison_memory_region(shared, shared_capacity);
#endif
    free(shared);
  }

 private:
  std::map<std::type_index, std::shared_ptr<void>> states_;
};

struct Grid : Loop {
  uint3 grid, block;
  std::vector<Fiber*> next;  // what can run in the next round
  std::function<void()> body;
  std::exception_ptr fault;
};
// Fibers never leave their CPU thread, so its address may be kept across a switch. Not a pointer through the dynamic linker: this is read
// at every access to threadIdx.
inline thread_local Grid* grid [[gnu::tls_model("initial-exec")]] = nullptr;

inline Fiber& self() { return *grid->current; }
inline Block& block() { return *grid->current->block; }
inline Warp& warp() { return block().warps[self().warp()]; }

inline void wake(Fiber& fiber) {
  fiber.state = Fiber::State::ready;
  grid->next.push_back(&fiber);
}

// Runs others until somebody wakes this thread.
inline void wait(const char* what, const Where& where) {
  Fiber& fiber = self();
  fiber.state = Fiber::State::waiting;
  fiber.awaited = what;
  fiber.where = where;
  to_loop(*grid);
}

// Lets others run: for loops that wait for a value in memory.
inline void yield() {
  const Quiet quiet;
  wake(self());
  to_loop(*grid);
}

// --- barriers
inline void open_if_complete(Barrier& barrier, unsigned expected) {
  if (barrier.arrived < expected || !barrier.arrived) return;
  ++counts.barriers;
  for (Fiber* const fiber : barrier.waiting) wake(*fiber);
  barrier.waiting.clear();
  barrier.arrived = 0;
}

// bar.sync, or bar.arrive where the thread does not wait; 0 threads: all that have not exited (__syncthreads).
inline void barrier(int id, unsigned threads, bool waits, const Where& where) {
  const Quiet quiet;
  Fiber& fiber = self();
  Block& own = block();
  Barrier& at = own.barriers[id];
  if (threads == 0 && at.arrived && at.where.line() != where.line())
    throw Fault("__syncthreads reached at two places: " + text_of(at.where) + " and " + text_of(where));
  at.where = where;
  ++at.arrived;
  release(&at);
  if (waits) {
    at.waiting.push_back(&fiber);
    fiber.state = Fiber::State::waiting;
    fiber.awaited = "a barrier";
    fiber.where = where;
  }
  open_if_complete(at, threads ? threads : own.live);
  if (!waits) return;
  to_loop(*grid);
  acquire(&at);
}

// --- collectives of a warp: each lane of the mask hands in an A, and the last to come runs f on all, by lane
template <class A, class F>
void collective(uint32_t mask, A& argument, const char* what, const Where& where, F&& f) {
  const Quiet quiet;
  Fiber& fiber = self();
  Block& own = block();
  Warp& w = warp();
  const auto fail = [&](const std::string& why) { throw Fault(std::string(what) + " at " + text_of(where) + ": " + why); };
  if (!(mask >> fiber.lane() & 1)) fail("the calling lane is not in its own mask");
  if (mask & w.exited) fail("the mask names a lane that has exited");
  Meeting* at = nullptr;
  for (Meeting& m : w.meetings) {
    if (m.mask == mask && strcmp(m.what, what) != 0) fail(std::string("other lanes of the warp are in another collective, ") + m.what);
    if (m.mask == mask || (!at && !m.mask)) at = &m;
  }
  if (!at) fail("the warp is in more collectives than the emulator keeps");
  at->mask = mask;
  at->what = what;
  at->argument[fiber.lane()] = &argument;
  at->arrived |= 1u << fiber.lane();
  release(&w);
  if (at->arrived != mask) {
    wait(what, where);
  } else {
    acquire(&w);
    f(reinterpret_cast<A**>(at->argument));
    release(&w);
    at->mask = at->arrived = 0;
    for (unsigned lane = 0; lane < 32; ++lane)
      if ((mask >> lane & 1) && lane != fiber.lane()) wake(own.fibers[(fiber.number & ~31u) + lane]);
  }
  acquire(&w);
}

// --- shared memory: an arena with 32-bit addresses. Between arrays lie gaps that AddressSanitizer knows.
inline char* allocate_shared(Block& own, std::size_t bytes) {
  if (!own.shared) {
    own.shared = static_cast<char*>(std::aligned_alloc(1024, (shared_capacity + 1023) / 1024 * 1024));
    if (!own.shared) throw std::bad_alloc();
    if (options.poison) memset(own.shared, 0xff, shared_capacity);
#if defined(__SANITIZE_ADDRESS__)
    __asan_poison_memory_region(own.shared, shared_capacity);
#endif
  }
  if (own.used + bytes > shared_capacity)
    throw Fault("shared memory: " + std::to_string(own.used + bytes) + " bytes in one block, at most " + std::to_string(shared_capacity));
  char* const p = own.shared + own.used;
  own.used = std::min(shared_capacity, own.used + (bytes + 32 + 127) / 128 * 128);
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(p, bytes);
#endif
  return p;
}

template <class T>
T* shared_array(std::size_t n, const void* key) {
  const Quiet quiet;
  Block& own = block();
  auto found = own.arrays.find(key);
  if (found == own.arrays.end()) found = own.arrays.emplace(key, allocate_shared(own, n * sizeof(T))).first;
  return reinterpret_cast<T*>(found->second);
}

inline uint32_t shared_address(const void* p) {
  const std::size_t offset = static_cast<const char*>(p) - block().shared;
  if (offset >= shared_capacity) throw Fault("not an address of shared memory");
  return static_cast<uint32_t>(offset);
}

inline char* shared_pointer(uint32_t address, unsigned bytes, const char* what) {
  if (address % bytes || address + bytes > shared_capacity)
    throw Fault(std::string(what) + ": shared address " + std::to_string(address) + " is out of range or not aligned to " +
                std::to_string(bytes) + " bytes");
  return block().shared + address;
}

}  // namespace emulator
