// Memory of large results and scratch. glibc maps it anew each time and unmaps it when it is freed, so that a training step writes its
// gradients into pages that were never touched before, and touching them costs more than computing what they hold. Here it serves the next
// result, and while it is idle the system may take its pages if it needs them.
#pragma once

#include <cstdint>

namespace cmoe::cpu {

constexpr int64_t pooled = 32 << 20;  // from this size on glibc maps and unmaps every time

struct Block {
  void* data;    // null: there is no memory
  int64_t size;  // at least what was asked for
};

// False where CMOE_KEEP_PAGES=0 asks for malloc's memory, and on systems whose pages this file does not know.
bool pool_serves();

Block take(int64_t bytes);
void give_back(Block block);

}  // namespace cmoe::cpu
