// parallel.h on std::thread, for programs without torch. `threads` is what thread_count() answers.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <thread>
#include <vector>

#include "dispatch.h"
#include "parallel.h"

inline int64_t threads = 1;

namespace cmoe::cpu {

int64_t thread_count() { return threads; }

void parallel(int64_t n, void (*body)(int64_t, void*), void* context) {
  std::vector<std::thread> running;
  for (int64_t i = 1; i < n; ++i) running.emplace_back(body, i, context);
  if (n > 0) body(0, context);
  for (std::thread& thread : running) thread.join();
}

}  // namespace cmoe::cpu

// Ends the program where CMOE_CPU_ISA names what does not run, or what this program was built without.
inline void need_instruction_set() {
  if (cmoe::cpu::isa_error().empty()) return;
  std::printf("%s\n", cmoe::cpu::isa_error().c_str());
  std::exit(2);
}
