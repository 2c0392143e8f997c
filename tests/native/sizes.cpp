// Sizes beyond int32: plans, the addresses of panels, and products at the far end of operands in memory that was never touched.

#include <cstdio>
#include <cstring>
#include <limits>

#include "dispatch.h"
#include "grouped_linear.h"
#include "threads.h"

#include <sys/mman.h>

using namespace cmoe::cpu;

namespace {

int wrong = 0;
void check(bool holds, const char* what, long long a = 0, long long b = 0, long long c = 0) {
  if (holds) return;
  std::printf("WRONG: %s (%lld, %lld, %lld)\n", what, a, b, c);
  ++wrong;
}

// Memory that reads as zeros and costs nothing until it is written to.
template <class T>
T* untouched(int64_t n) {
  void* const p =
      mmap(nullptr, static_cast<size_t>(n) * sizeof(T), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (p == MAP_FAILED) {
    std::printf("SKIP: no address space of %lld bytes\n", static_cast<long long>(n * sizeof(T)));
    std::exit(77);
  }
  return static_cast<T*>(p);
}

constexpr int64_t large[] = {1, 16, 4096, (int64_t{1} << 31) - 1, (int64_t{1} << 31) + 7, (int64_t{1} << 32) + 1, int64_t{1} << 40};

// A thread's scratch is bounded by the caches, whatever the sizes are.
template <class T>
void plans(Type type) {
  const Kernels<T> kernels = kernels_for<T>(type);
  for (const int64_t outer : large)
    for (const int64_t shared : large)
      for (const int64_t count : {int64_t{1}, int64_t{2}, int64_t{256}}) {
        for (const bool in_rows : {false, true})
          for (const int64_t ranges : {int64_t{1}, int64_t{2}}) {
            const Blocking p = blocking(kernels, in_rows, outer, shared, count, ranges);
            check(p.outer_panels >= ranges && p.outer_panels % ranges == 0 && p.shared_panels >= 1, "panels of a plan", outer, shared,
                  count);
            check(p.outer_bytes > 0 && p.block_bytes > 0 && p.row_bytes > 0 && p.conversion > 0, "parts of a plan", outer, shared, count);
            check(p.bytes() < int64_t{64} << 20, "bytes of a plan", p.bytes(), outer, shared);
          }
        for (const int64_t k : large) {
          const Blocking p = wgrad_blocking(kernels, outer, shared, k, count);
          check(p.outer_panels >= 1 && p.shared_panels >= 1 && p.outer_bytes > 0 && p.block_bytes > 0 && p.conversion > 0,
                "parts of a wgrad plan", outer, shared, k);
          check(p.bytes() < int64_t{64} << 20, "bytes of a wgrad plan", p.bytes(), outer, shared);
        }
      }
}

// The shared operand of 2^31 values and more: its size, the order of its panels, and a product with its last one.
template <class T>
void shared_operands(Type type) {
  const Kernels<T> kernels = kernels_for<T>(type);
  const Blocking p = blocking(kernels, true, 8, int64_t{1} << 20, 1);
  const int64_t width = kernels.panel_width(p.shared), value = size_of(type), k = 3000;
  if (kernels.gemm->row_major[static_cast<int>(p.shared)]) return;  // such panels are filled with zeros first: 6 GB of them
  const int64_t lanes = ((int64_t{1} << 31) / k / width + 9) * width - 1;
  const PackedOperand<T> shared(kernels, p.shared, lanes, 1, k);
  __int128 bytes = 0;
  for (const Chunk& chunk : shared.chunks()) bytes += static_cast<__int128>(chunk.padded) * shared.panels() * width * kernels.element();
  check(bytes == shared.bytes() && bytes > std::numeric_limits<int32_t>::max(), "bytes of a shared operand", shared.bytes(), lanes, k);
  const Chunk& last = shared.chunks().back();
  check(shared.at(shared.panels() - 1, last) + last.padded * width * kernels.element() == shared.at(0, shared.chunks()[0]) + shared.bytes(),
        "the last panel's address");

  // x is zero but for its last rows; W is ones: y of the last token is the sum of its row.
  char* const x = untouched<char>(lanes * k * value);
  const T one = 1, half = T(0.5);
  for (int64_t i = 0; i < k; ++i) kernels.rows->store(type, i % 2 ? &one : &half, x + ((lanes - 1) * k + i) * value, 1);
  std::vector<char> w(8 * k * value), conversion(conversion_bytes(kernels));
  for (int64_t i = 0; i < 8 * k; ++i) kernels.rows->store(type, &one, w.data() + i * value, 1);
  shared.pack(shared.panels() - 1, shared.panels(), 0, {rows_of<T>(x, type, k), true}, conversion.data());
  // Of the operand, the product reads every panel; only the last is packed, so a shorter view of it is multiplied.
  const int used = shared.in_panel(shared.panels() - 1);
  check(used == width - 1, "lanes in the last panel", used, width);
  alignas(64) static T block[most_lanes * most_lanes * 4];
  std::vector<char> panel(kernels.panel_width(p.outer) * kernels.gemm->kc * kernels.element() + 64);
  char* const aligned = reinterpret_cast<char*>(round_up(reinterpret_cast<int64_t>(panel.data()), 64));
  const int64_t outer_lanes = std::min<int64_t>(8, kernels.panel_width(p.outer));
  bool add = false;
  if (kernels.gemm->begin) kernels.gemm->begin();
  for (const Chunk& chunk : shared.chunks()) {
    pack_panels(kernels, p.outer, Operand{rows_of<T>(w.data(), type, k), true}, 0, outer_lanes, chunk.k0, chunk.k, aligned, 0,
                conversion.data());
    const char* const other = shared.at(shared.panels() - 1, chunk);
    const int resident = static_cast<int>(kernels.gemm->outer_resident ? p.outer : Side::b);
    const int64_t stride = (kernels.gemm->row_major[0] ? chunk.padded : kernels.gemm->k_step) * kernels.element();
    if (p.outer == Side::a)
      kernels.gemm->multiply[resident](aligned, stride, other, block, chunk.padded, kernels.panel_width(p.outer), add, Prefetch());
    else
      kernels.gemm->multiply[resident](other, stride, aligned, block, chunk.padded, static_cast<int>(width), add, Prefetch());
    add = true;
  }
  if (kernels.gemm->end) kernels.gemm->end();
  const int64_t row = used - 1;  // the last token, against the first lane of W
  const T got = p.outer == Side::a ? block[row] : block[row * kernels.gemm->nr];
  check(got == T(0.75 * k), "the last token's sum", static_cast<long long>(got), static_cast<long long>(0.75 * k));
  munmap(x, lanes * k * value);
}

// Offsets beyond int32 in x (tokens times inputs), in w (experts times outputs times inputs) and from row to row.
void grouped() {
  const Type type = Type::f32;
  const int64_t inputs = 1 << 16, tokens = (1 << 15) + 9, experts = (1 << 15) + 3, value = 4;
  float *const x = untouched<float>(tokens * inputs), *const w = untouched<float>(experts * inputs);
  for (int64_t i = 0; i < inputs; ++i) x[(tokens - 1) * inputs + i] = 1, w[(experts - 1) * inputs + i] = 0.5f;
  std::vector<int32_t> offsets(experts + 1, 0);
  offsets[experts] = 2;  // two rows, of the last expert
  const int64_t index[] = {tokens - 1, tokens - 2}, scatter[] = {1, 0};
  std::vector<float> y(2, -1);
  Experts<float> op{type, tokens, inputs, 0, 1, experts, false, Activation::relu, reinterpret_cast<const char*>(x), {}, {}, {}, {}};
  op.w1 = {reinterpret_cast<const char*>(w), type, inputs, inputs, 1};
  for (threads = 1; threads <= 2; ++threads) {
    grouped_linear<float>(op, {offsets.data(), index, 1}, scatter, false, reinterpret_cast<char*>(y.data()), nullptr);
    check(y[0] == 0 && y[1] == 0.5f * inputs, "grouped_linear beyond int32", static_cast<long long>(y[0]), static_cast<long long>(y[1]));
  }
  threads = 1;
  // Its gradient for the weights of the last expert, at an offset beyond int32 in dw; the experts without rows would be 8 GB of zeros.
  float* const dw = untouched<float>(experts * inputs);
  std::vector<float> dy = {2, 3};
  Experts<float> one = op;
  one.experts = 1;
  const int32_t both[] = {0, 2};
  one.w1.data += (experts - 1) * inputs * value;
  ExpertsBackward<float> grads{};
  grads.offsets = both;
  grads.index = index;
  grads.divisor = grads.dy_divisor = 1;
  grads.dy_index = scatter;
  grads.dy = reinterpret_cast<const char*>(dy.data());
  grads.dw1 = {reinterpret_cast<char*>(dw + (experts - 1) * inputs), type};
  experts_backward<float>(one, grads);
  check(dw[experts * inputs - 1] == 3 && dw[(experts - 1) * inputs] == 3, "dW beyond int32",
        static_cast<long long>(dw[experts * inputs - 1]));
  munmap(x, tokens * inputs * value), munmap(w, experts * inputs * value), munmap(dw, experts * inputs * value);
}

void impossible() {
  for (const int64_t bytes : {int64_t{1} << 50, int64_t{1} << 62}) {
    bool refused = false;
    try {
      const Buffer buffer(bytes);
    } catch (const std::bad_alloc&) {
      refused = true;
    }
    check(refused, "memory that no machine has", bytes);
  }
}

}  // namespace

int main() {
  need_instruction_set();
  plans<float>(Type::f32), plans<float>(Type::bf16), plans<float>(Type::f16), plans<double>(Type::f64);
  shared_operands<float>(Type::f32), shared_operands<float>(Type::bf16);
  grouped();
  impossible();
  std::printf("instruction set %s: %d wrong\n", isa_name(), wrong);
  return wrong ? 1 : 0;
}
