// Memory of an operation: scratch allocated once a call, and large pages for what is large and fresh.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <new>

#include "pool.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

namespace cmoe::cpu {

// Asks for 2 MB pages where the system gives them on request: a fresh page costs a fault, and 4 KB ones cost more than computing what is
// written to them. Only advice; only to be given before the memory is first touched.
inline void advise_large_pages(void* data, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t page = 2 << 20;
  const uintptr_t first = (reinterpret_cast<uintptr_t>(data) + page - 1) / page * page,
                  last = (reinterpret_cast<uintptr_t>(data) + bytes) / page * page;
  if (last > first) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#else
  (void)data, (void)bytes;
#endif
}

// Poisons, for AddressSanitizer, the padding between parts of a block.
inline void forbid(void* data, int64_t bytes) {
#if defined(__SANITIZE_ADDRESS__)
  ASAN_POISON_MEMORY_REGION(data, static_cast<size_t>(bytes));
#else
  (void)data, (void)bytes;
#endif
}

class Buffer {
 public:
  explicit Buffer(int64_t bytes) {
    const int64_t whole = (bytes + 63) / 64 * 64 + 64;
    if (whole >= pooled && pool_serves()) block_ = take(whole);
    data_ = block_.data ? block_.data : std::aligned_alloc(64, static_cast<size_t>(whole));
    if (!data_) throw std::bad_alloc();
    if (!block_.data) advise_large_pages(data_, bytes);
    forbid(get() + bytes, whole - bytes);
  }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() {
    if (block_.data)
      give_back(block_);
    else
      std::free(data_);
  }
  char* get() const { return static_cast<char*>(data_); }

 private:
  Block block_{nullptr, 0};
  void* data_;
};

template <class T>
class Array {
 public:
  explicit Array(int64_t n) : size_(n), buffer_(n * static_cast<int64_t>(sizeof(T))) {}
  T* get() const { return reinterpret_cast<T*>(buffer_.get()); }
  T& operator[](int64_t i) const { return get()[i]; }
  int64_t size() const { return size_; }

 private:
  int64_t size_;
  Buffer buffer_;
};

constexpr int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

}  // namespace cmoe::cpu
