#include "pool.h"

#include <cstdlib>
#include <cstring>

#include "memory.h"

#if defined(__linux__) && !defined(__SANITIZE_ADDRESS__)
#include <pthread.h>

#include <algorithm>
#include <mutex>
#include <vector>

namespace cmoe::cpu {

namespace {

constexpr int64_t page = 2 << 20;

void* map(int64_t size) {
  void* const found = mmap(nullptr, static_cast<size_t>(size + page), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (found == MAP_FAILED) return nullptr;
  char* const begin = static_cast<char*>(found);
  char* const data = reinterpret_cast<char*>(round_up(reinterpret_cast<int64_t>(begin), page));
  if (data > begin) munmap(begin, static_cast<size_t>(data - begin));
  munmap(data + size, static_cast<size_t>(begin + page - data));
  advise_large_pages(data, size);
  return data;
}

// Blocks in use and idle ones together take at most 5/4 of what was in use at one time: a step also has blocks that are never in use
// together.
class Pool {
 public:
  Block take(int64_t size) {
    std::vector<Block> gone;
    Block block{nullptr, size};
    {
      const std::lock_guard lock(mutex);
      auto best = idle_.end();
      for (auto it = idle_.begin(); it != idle_.end(); ++it)
        if (it->size >= size && it->size - size <= size / 8 && (best == idle_.end() || it->size < best->size)) best = it;
      if (best != idle_.end()) {
        block = *best;
        idle_.erase(best);
        idle_bytes_ -= block.size;
      }
      in_use_ += block.size;
      peak_ = std::max(peak_, in_use_);
      drop(peak_ + peak_ / 4 - in_use_, gone);
    }
    unmap(gone);
    if (block.data) return block;
    if (!(block.data = map(size))) {
      {
        const std::lock_guard lock(mutex);
        drop(0, gone);
      }
      unmap(gone);
      if (!(block.data = map(size))) {
        const std::lock_guard lock(mutex);
        in_use_ -= size;
      }
    }
    return block;
  }

  void give_back(Block block) {
#if defined(MADV_FREE)
    madvise(block.data, static_cast<size_t>(block.size), MADV_FREE);
#endif
    const std::lock_guard lock(mutex);
    in_use_ -= block.size;
    idle_.push_back(block);
    idle_bytes_ += block.size;
  }

  std::mutex mutex;

 private:
  // Leaves at most `bytes` idle; what was idle longest goes first.
  void drop(int64_t bytes, std::vector<Block>& gone) {
    auto it = idle_.begin();
    for (; it != idle_.end() && idle_bytes_ > bytes; ++it) {
      idle_bytes_ -= it->size;
      gone.push_back(*it);
    }
    idle_.erase(idle_.begin(), it);
  }
  static void unmap(std::vector<Block>& gone) {
    for (const Block& block : gone) munmap(block.data, static_cast<size_t>(block.size));
    gone.clear();
  }

  std::vector<Block> idle_;  // longest first
  int64_t in_use_ = 0, idle_bytes_ = 0, peak_ = 0;
};

// Never destroyed: tensors may outlive every static object. A forked child finds it unlocked.
Pool& pool() {
  static Pool& only = []() -> Pool& {
    static Pool* const made = new Pool;
    pthread_atfork([] { made->mutex.lock(); }, [] { made->mutex.unlock(); }, [] { made->mutex.unlock(); });
    return *made;
  }();
  return only;
}

}  // namespace

bool pool_serves() {
  static const bool serves = [] {
    const char* const said = std::getenv("CMOE_KEEP_PAGES");
    return !said || std::strcmp(said, "0") != 0;
  }();
  return serves;
}

Block take(int64_t bytes) { return pool().take(round_up(bytes, page)); }
void give_back(Block block) { pool().give_back(block); }

}  // namespace cmoe::cpu

#else

namespace cmoe::cpu {

bool pool_serves() { return false; }
Block take(int64_t) { return {nullptr, 0}; }
void give_back(Block) {}

}  // namespace cmoe::cpu

#endif
