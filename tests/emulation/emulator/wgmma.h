// Products of warpgroups. Lazy products read shared memory and write accumulators at the wait. Sums are fp64 and rounded once a product:
// what a tensor core would give at its best, not its bits.
#pragma once

#include "tma.h"

namespace emulator {

// Four warps that issue products together.
struct Warpgroup {
  unsigned arrived = 0;
  const char* what = nullptr;
  void* argument[128];
  bool fenced = false;  // since the accumulators were last waited for
  std::vector<std::function<void()>> open;
  std::deque<std::vector<std::function<void()>>> groups;
};
using Warpgroups = std::map<unsigned, Warpgroup>;

// Each of the 128 threads hands in an A, and the last to come runs f on all of them.
template <class A, class F>
void meet(A& argument, const char* what, const Where& where, F&& f) {
  const Quiet quiet;
  Fiber& fiber = self();
  Block& own = block();
  Warpgroup& group = own.state<Warpgroups>()[fiber.number / 128];
  if (own.fibers.size() < fiber.number / 128 * 128 + 128) throw Fault(std::string(what) + ": fewer than the 128 threads of a warpgroup");
  if (group.arrived && strcmp(group.what, what) != 0)
    throw Fault(std::string(what) + " at " + text_of(where) + ": other threads of the warpgroup are at " + group.what);
  group.what = what;
  group.argument[fiber.number % 128] = &argument;
  release(&group);
  if (++group.arrived < 128) {
    wait(what, where);
  } else {
    group.arrived = 0;
    acquire(&group);
    f(group, reinterpret_cast<A**>(group.argument));
    release(&group);
    const unsigned first = fiber.number / 128 * 128;
    for (unsigned i = first; i < first + 128; ++i)
      if (i != fiber.number) wake(own.fibers[i]);
  }
  acquire(&group);
}

// Inside a meeting, for what is the kernel's own access to shared memory.
struct Heard {
#if defined(__SANITIZE_THREAD__)
  Heard() { AnnotateIgnoreWritesEnd(__FILE__, __LINE__), AnnotateIgnoreReadsEnd(__FILE__, __LINE__); }
  ~Heard() { AnnotateIgnoreReadsBegin(__FILE__, __LINE__), AnnotateIgnoreWritesBegin(__FILE__, __LINE__); }
#else
  ~Heard() {}
#endif
};

template <int N>
struct Product {
  float* d;
  uint64_t a, b;
};

template <class T, int N>
void multiply(char* shared, const std::vector<Product<N>>& p, bool a_along_k, bool b_along_k) {
  struct Operands {
    double a[64][16], b[16][N], sum[N];
  };
  const auto operands = std::make_unique<Operands>();  // large for a fiber's stack
  auto& [a, b, sum] = *operands;
  const auto element = [&](uint64_t descriptor, bool k_major, int m, int k) {
    const uint32_t address = operand_address(descriptor, k_major, m, k);
    if (address + 2 > shared_capacity) throw Fault("wgmma: an operand beyond shared memory");
    return static_cast<double>(cmoe::cuda::to_float(*reinterpret_cast<const T*>(shared + address)));
  };
  {
    const Heard heard;
    for (int k = 0; k < 16; ++k) {
      for (int m = 0; m < 64; ++m) a[m][k] = element(p[0].a, a_along_k, m, k);
      for (int n = 0; n < N; ++n) b[k][n] = element(p[0].b, b_along_k, n, k);
    }
  }
  for (int m = 0; m < 64; ++m) {
    std::fill(sum, sum + N, 0.0);
    for (int k = 0; k < 16; ++k)
      for (int n = 0; n < N; ++n) sum[n] += a[m][k] * b[k][n];
    for (int n = 0; n < N; ++n) {
      float& at = p[m / 16 * 32 + m % 8 * 4 + n % 8 / 2].d[n / 8 * 4 + m / 8 % 2 * 2 + n % 2];
      at = static_cast<float>(at + sum[n]);
    }
  }
  ++counts.mma;
}

}  // namespace emulator

namespace cmoe::cuda {

inline void wgmma_fence(emulator::Where where = emulator::Where::current()) {
  char nothing;
  emulator::meet(nothing, "wgmma.fence", where, [](emulator::Warpgroup& group, char**) { group.fenced = true; });
}

template <class T, int N, Major A, Major B>
void wgmma(float (&d)[N / 2], uint64_t a, uint64_t b, emulator::Where where = emulator::Where::current()) {
  using Product = emulator::Product<N>;
  Product own{d, a, b};
  emulator::meet(own, "wgmma.mma_async", where, [&](emulator::Warpgroup& group, Product** of) {
    if (!group.fenced)
      throw emulator::Fault("wgmma.mma_async at " + emulator::text_of(where) + ": no wgmma.fence since the accumulators were waited for");
    std::vector<Product> products;
    for (int t = 0; t < 128; ++t) products.push_back(*of[t]);
    if (!emulator::known(a) || !emulator::known(b))
      throw emulator::Fault("wgmma.mma_async at " + emulator::text_of(where) +
                            ": a descriptor of another swizzle than that of 128 bytes, or with a base offset");
    for (const Product& p : products)
      if (p.a != a || p.b != b)
        throw emulator::Fault("wgmma.mma_async at " + emulator::text_of(where) + ": threads of one warpgroup differ in its operands");
    char* const shared = emulator::block().shared;
    const auto product = [=, products = std::move(products)] { emulator::multiply<T, N>(shared, products, A == Major::k, B == Major::k); };
    if (emulator::options.lazy)
      group.open.emplace_back(product);
    else
      product();
  });
}

inline void wgmma_commit(emulator::Where where = emulator::Where::current()) {
  char nothing;
  emulator::meet(nothing, "wgmma.commit_group", where, [](emulator::Warpgroup& group, char**) {
    group.groups.push_back(std::move(group.open));
    group.open.clear();
  });
}

template <int N>
void wgmma_wait(emulator::Where where = emulator::Where::current()) {
  char nothing;
  emulator::meet(nothing, "wgmma.wait_group", where, [](emulator::Warpgroup& group, char**) {
    for (; static_cast<int>(group.groups.size()) > N; group.groups.pop_front())
      for (const auto& product : group.groups.front()) product();
    if (N == 0) group.fenced = false;
  });
}

template <int N>
void pin(float (&)[N]) {}

}  // namespace cmoe::cuda
