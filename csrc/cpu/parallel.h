// Threads, as a policy: torch's own pool in the product (parallel.cpp), std::thread in the race tests. The number of threads is read once
// per operation, work is cut by it and by nothing else.
#pragma once

#include <cstdint>

namespace cmoe::cpu {

int64_t thread_count();

// body(i) for i in 0..n-1, each on some thread; returns when all are done. body must not throw.
void parallel(int64_t n, void (*body)(int64_t i, void* context), void* context);

template <class F>
void parallel(int64_t n, F&& f) {
  parallel(n, [](int64_t i, void* context) { (*static_cast<F*>(context))(i); }, const_cast<void*>(static_cast<const void*>(&f)));
}

// The part of n things that thread i of `threads` does.
struct Share {
  int64_t first, last;
  Share(int64_t n, int64_t i, int64_t threads) : first(n * i / threads), last(n * (i + 1) / threads) {}
};

}  // namespace cmoe::cpu
