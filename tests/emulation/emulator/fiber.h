// A CUDA thread as a fiber: a stack of its own and a switch to and from it, announced to the sanitizers.
//
// Under ThreadSanitizer every fiber counts as a thread and a switch orders nothing: only what the emulated program does (barriers,
// collectives, waits) does, so a race between CUDA threads is reported although all run on one CPU thread. The emulator's own
// bookkeeping is hidden from it by Quiet.
#pragma once

#include <sys/mman.h>

#include <cstring>
#include <new>
#include <source_location>
#include <stdexcept>
#include <string>
#include <vector>

#include "options.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#if defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>
extern "C" void AnnotateIgnoreReadsBegin(const char*, int);
extern "C" void AnnotateIgnoreReadsEnd(const char*, int);
extern "C" void AnnotateIgnoreWritesBegin(const char*, int);
extern "C" void AnnotateIgnoreWritesEnd(const char*, int);
#endif

#if !defined(__x86_64__) || !defined(__linux__)
#error "the emulator switches stacks by x86-64 code and maps them as Linux does"
#endif

extern "C" void cmoe_emulator_switch(void** save, void* load);
asm(R"(
.text
.weak cmoe_emulator_switch
.type cmoe_emulator_switch,@function
cmoe_emulator_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp,(%rdi)
  movq %rsi,%rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size cmoe_emulator_switch,.-cmoe_emulator_switch
)");

namespace emulator {

using Where = std::source_location;

// What a kernel did that a GPU would not forgive.
struct Fault : std::logic_error {
  using std::logic_error::logic_error;
};

inline std::string text_of(const Where& where) {
  const std::string file = where.file_name();
  return file.substr(file.rfind('/') + 1) + ":" + std::to_string(where.line());
}

#if defined(__SANITIZE_THREAD__)
struct Quiet {
  Quiet() { AnnotateIgnoreReadsBegin(__FILE__, __LINE__), AnnotateIgnoreWritesBegin(__FILE__, __LINE__); }
  ~Quiet() { AnnotateIgnoreWritesEnd(__FILE__, __LINE__), AnnotateIgnoreReadsEnd(__FILE__, __LINE__); }
};
inline void release(void* p) { __tsan_release(p); }
inline void acquire(void* p) { __tsan_acquire(p); }
#else
struct Quiet {
  ~Quiet() {}
};
inline void release(void*) {}
inline void acquire(void*) {}
#endif

struct uint3 {
  unsigned x = 0, y = 0, z = 0;
};

struct Copy {
  void* to;
  const void* from;
  unsigned bytes, valid;  // the rest is filled with zeros
  void land() const {
    memcpy(to, from, valid);
    memset(static_cast<char*>(to) + valid, 0, bytes - valid);
  }
};

struct Block;

struct Fiber {
  enum class State : uint8_t { ready, waiting, done };

  void* stack_pointer = nullptr;
  char* stack = nullptr;
  Block* block = nullptr;
  uint3 index;
  unsigned number = 0;  // linear thread index
  State state = State::ready;
  const char* awaited = "";
  Where where;
  std::vector<Copy> open;                 // cp.async issued and not committed
  std::vector<std::vector<Copy>> groups;  // committed and not waited for
  unsigned copies = 0, vectors = 0;       // 16-byte accesses so far, by which those of a warp are matched
#if defined(__SANITIZE_THREAD__)
  void* thread = nullptr;
#endif
#if defined(__SANITIZE_ADDRESS__)
  void* fake_stack = nullptr;
#endif
  unsigned lane() const { return number & 31; }
  unsigned warp() const { return number >> 5; }
};

// Stacks are kept for the next block, each above a page that faults: a kernel that overruns one stops there.
class Stacks {
 public:
  char* get() {
    if (!free_.empty()) {
      char* const stack = free_.back();
      free_.pop_back();
      return stack;
    }
    void* const p = mmap(nullptr, options.stack + guard, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (p == MAP_FAILED) throw std::bad_alloc();
    mprotect(p, guard, PROT_NONE);
    return static_cast<char*>(p) + guard;
  }
  void put(char* stack) {
#if defined(__SANITIZE_ADDRESS__)
    __asan_unpoison_memory_region(stack, options.stack);
#endif
#if defined(__SANITIZE_THREAD__)
    munmap(stack - guard, options.stack + guard);  // a stack used again would look like a race between blocks
#else
    free_.push_back(stack);
#endif
  }
  ~Stacks() {
    for (char* const stack : free_) munmap(stack - guard, options.stack + guard);
  }

 private:
  static constexpr std::size_t guard = 4096;
  std::vector<char*> free_;
};
inline thread_local Stacks stacks;

// The loop that runs the fibers of a grid, as a place to switch to.
struct Loop {
  void* stack_pointer = nullptr;
  Fiber* current = nullptr;
#if defined(__SANITIZE_THREAD__)
  void* thread = __tsan_get_current_fiber();
  std::vector<void*> finished;
  void end() {
    for (void* const fiber : finished) __tsan_destroy_fiber(fiber);
    finished.clear();
  }
  ~Loop() { end(); }
#endif
#if defined(__SANITIZE_ADDRESS__)
  void* fake_stack = nullptr;
  const void* bottom = nullptr;
  std::size_t size = 0;
#endif
};

inline void to_loop(Loop& loop) {
  Fiber& fiber = *loop.current;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(fiber.state == Fiber::State::done ? nullptr : &fiber.fake_stack, loop.bottom, loop.size);
#endif
#if defined(__SANITIZE_THREAD__)
  __tsan_switch_to_fiber(loop.thread, __tsan_switch_to_fiber_no_sync);
#endif
  cmoe_emulator_switch(&fiber.stack_pointer, loop.stack_pointer);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fiber.fake_stack, &loop.bottom, &loop.size);
#endif
}

inline void to_fiber(Loop& loop, Fiber& fiber) {
  loop.current = &fiber;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&loop.fake_stack, fiber.stack, options.stack);
#endif
#if defined(__SANITIZE_THREAD__)
  __tsan_switch_to_fiber(fiber.thread, __tsan_switch_to_fiber_no_sync);
#endif
  cmoe_emulator_switch(&loop.stack_pointer, fiber.stack_pointer);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(loop.fake_stack, nullptr, nullptr);
#endif
}

// Makes a fiber that starts in `entry` at its first switch.
inline void prepare(Fiber& fiber, void (*entry)()) {
  fiber.stack = stacks.get();
  void** top = reinterpret_cast<void**>(reinterpret_cast<uintptr_t>(fiber.stack + options.stack) & ~uintptr_t{15}) - 2;
  top[0] = reinterpret_cast<void*>(entry);  // where the first switch returns to; its slot is 16-byte aligned, as after a call
  top[1] = nullptr;
  fiber.stack_pointer = top - 6;  // six registers, all zero
  memset(fiber.stack_pointer, 0, 6 * sizeof(void*));
#if defined(__SANITIZE_THREAD__)
  fiber.thread = __tsan_create_fiber(0);
#endif
}

inline void dispose(Fiber& fiber, [[maybe_unused]] Loop& loop) {
#if defined(__SANITIZE_THREAD__)
  if (fiber.state != Fiber::State::done) return;  // abandoned after a fault, its annotations still open
  // The sanitizer gives a thread's number to another soon after its end, and then takes the two for one: the threads of a launch end with
  // it.
  loop.finished.push_back(fiber.thread);
  if (loop.finished.size() > 4096) loop.end();
#endif
  stacks.put(fiber.stack);
}

}  // namespace emulator
