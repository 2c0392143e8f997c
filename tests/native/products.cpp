// The products of the drivers, block by block: y = x W^T, dx = dy W, dW = dy^T x. Operands are small integers, so every way through a
// driver gives the same bits. Memory behind the scratch, and around the rows of dW, is left as it was; behind a weight there is none.

#include <sys/mman.h>
#include <unistd.h>

#include <cstdio>
#include <cstring>
#include <random>

#include "dispatch.h"
#include "threads.h"
#include "gemm/wgrad.h"

using namespace cmoe::cpu;

namespace {

int cases = 0, wrong = 0;
constexpr char untouched = 0x5b;

std::vector<int> integers(int64_t n) {
  static std::mt19937 generator;
  std::vector<int> values(n);
  for (int& value : values) value = static_cast<int>(generator() % 7) - 3;
  return values;
}

template <class T>
std::vector<char> as(const Kernels<T>& kernels, Type type, const std::vector<int>& values) {
  std::vector<char> bytes(values.size() * size_of(type) + 1);  // never without memory
  const std::vector<T> wide(values.begin(), values.end());
  if (!values.empty()) kernels.rows->store(type, wide.data(), bytes.data(), static_cast<int64_t>(values.size()));
  return bytes;
}

// A copy of n bytes, behind which a page begins that must not be read.
class Guarded {
 public:
  Guarded(const char* from, int64_t n) {
    const int64_t page = sysconf(_SC_PAGESIZE);
    mapped_ = round_up(n, page) + page;
    first_ = static_cast<char*>(mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    at_ = first_ + mapped_ - page - n;
    if (first_ == MAP_FAILED || mprotect(first_ + mapped_ - page, page, PROT_NONE) != 0) std::abort();
    std::memcpy(at_, from, n);
  }
  ~Guarded() { munmap(first_, mapped_); }
  Guarded(const Guarded&) = delete;
  Guarded& operator=(const Guarded&) = delete;
  const char* data() const { return at_; }

 private:
  int64_t mapped_;
  char *first_, *at_;
};

long long number(int64_t n) { return n; }

bool is_untouched(const char* p, int64_t n) {
  for (int64_t i = 0; i < n; ++i)
    if (p[i] != untouched) return false;
  return true;
}

struct Weighted {
  int64_t tokens, outputs, k, segments;
  int64_t stride;  // elements from row to row of the weight; rows may overlap
  bool in_rows;    // rows of the weight lie along k
  bool packed;     // before
  bool gated;      // two ranges of outputs a block
  int64_t l2;
};

// y[t, o] = sum over segments and k of x[t, s, k] w[s, o, k].
template <class T>
void run(Kernels<T> kernels, Type weight_type, const Weighted& c) {
  kernels.l2 = c.l2;
  const int64_t value = size_of(kernels.type), weight_value = size_of(weight_type), outputs = c.gated ? 2 * c.outputs : c.outputs;
  const int64_t rows = c.in_rows ? outputs : c.k, segment = rows * c.stride + (c.in_rows ? c.k : outputs);
  const std::vector<int> x = integers(c.tokens * c.segments * c.k), w = integers(c.segments * segment);
  const std::vector<char> x_bytes = as(kernels, kernels.type, x);
  const Guarded w_bytes(as(kernels, weight_type, w).data(), rows ? (c.segments * segment - c.stride) * weight_value : 0);

  const Blocking p = blocking(kernels, c.in_rows, outputs, c.tokens, 1, c.gated ? 2 : 1);
  const PackedOperand<T> shared(kernels, p.shared, c.tokens, c.segments, c.k);
  const Buffer conversion(conversion_bytes(kernels)), scratch(p.bytes() + 64);
  for (int64_t s = 0; s < c.segments; ++s)
    shared.pack(0, shared.panels(), s, {{x_bytes.data() + s * c.k * value, c.segments * c.k * value, kernels.type}, true},
                conversion.get());
  const int64_t width = kernels.panel_width(p.outer), panels = (outputs + width - 1) / width,
                panel_bytes = packed_panel_bytes(kernels, p.outer, c.k);
  const auto weight = [&](int64_t s) { return Matrix{w_bytes.data() + s * segment * weight_value, c.stride * weight_value, weight_type}; };
  const Buffer packed(c.packed ? c.segments * panels * panel_bytes : 0);
  if (c.packed)
    for (int64_t s = 0; s < c.segments; ++s)
      for (int64_t panel = 0; panel < panels; ++panel)
        for (const Chunk& chunk : chunks_of(*kernels.gemm, 1, c.k))
          pack_panels(kernels, p.outer, {weight(s), true}, panel * width, std::min(width, outputs - panel * width), chunk.k0, chunk.k,
                      packed.get() + (s * panels + panel) * panel_bytes + chunk.k0 * width * kernels.element(), 0, conversion.get());
  std::memset(scratch.get(), untouched, p.bytes() + 64);

  std::vector<T> y(c.tokens * outputs, T(-1));
  const int64_t in_range = c.gated ? c.outputs : outputs, most = p.outer_panels / (c.gated ? 2 : 1) * width;
  const int64_t step = std::min(most, c.gated ? in_range / width * width : most);  // a second range begins at a whole panel
  if (step == 0) return;
  for (int64_t first = 0; first < in_range; first += step) {
    const OuterRange lanes{first, std::min(step, in_range - first), c.gated ? in_range + first : -1};
    grouped_gemm_block(
        kernels, p, shared,
        [&](int64_t s) { return Operand{weight(s), c.in_rows, c.packed ? packed.get() + s * panels * panel_bytes : nullptr, panel_bytes}; },
        lanes, scratch.get(),
        [&](T* rows, int64_t ld, int64_t row0, int used, int64_t n) {
          for (int r = 0; r < used; ++r) {
            std::copy(rows + r * ld, rows + r * ld + n, y.data() + (row0 + r) * outputs + first);
            if (c.gated)
              std::copy(rows + r * ld + round_up(n, width), rows + r * ld + round_up(n, width) + n,
                        y.data() + (row0 + r) * outputs + in_range + first);
          }
        });
  }

  bool right = is_untouched(scratch.get() + p.bytes(), 64);
  for (int64_t t = 0; t < c.tokens; ++t)
    for (int64_t o = 0; o < outputs; ++o) {
      int64_t sum = 0;
      for (int64_t s = 0; s < c.segments; ++s)
        for (int64_t k = 0; k < c.k; ++k)
          sum += int64_t{x[(t * c.segments + s) * c.k + k]} * w[s * segment + (c.in_rows ? o * c.stride + k : k * c.stride + o)];
      right &= y[t * outputs + o] == static_cast<T>(sum);
    }
  ++cases;
  if (right) return;
  ++wrong;
  std::printf(
      "WRONG: types %d and %d, %lld tokens, %lld outputs, %lld segments of %lld, stride %lld, in rows %d, packed %d, gated %d, l2 %lld\n",
      static_cast<int>(kernels.type), static_cast<int>(weight_type), number(c.tokens), number(c.outputs), number(c.segments), number(c.k),
      number(c.stride), c.in_rows, c.packed, c.gated, number(c.l2));
}

// The same with int8 weights, packed as ops/int8/quantise.py does; the integers are those of int8, so that fp32 sums may round: k is short.
void run_int8(bool int8_activations, Type type, int64_t tokens, int64_t outputs, int64_t k, bool gated, int64_t l2) {
  Kernels<float> kernels = kernels_for_int8_weights(int8_activations, tokens);
  kernels.l2 = l2;
  const Microkernel& gemm = *kernels.gemm;
  const int64_t all = gated ? 2 * outputs : outputs, panels = (outputs + gemm.nr - 1) / gemm.nr, padded = round_up(k, int8_layout().depth),
                panel_bytes = padded * gemm.nr, step_outputs = panels * gemm.nr;
  std::vector<int> x = integers(tokens * k), w = integers(all * k);
  for (int& value : x) value = int8_activations ? value * 42 : value;  // as large as they may be
  for (int& value : w) value *= 42;
  const Buffer packed((gated ? 2 : 1) * panels * panel_bytes);
  std::memset(packed.get(), 0, (gated ? 2 : 1) * panels * panel_bytes);
  for (int64_t o = 0; o < all; ++o)
    for (int64_t i = 0; i < k; ++i) {
      const int64_t lane = o / outputs * step_outputs + o % outputs;
      packed.get()[lane / gemm.nr * panel_bytes + (i / 4 * gemm.nr + lane % gemm.nr) * 4 + i % 4] = static_cast<char>(w[o * k + i]);
    }
  std::vector<char> x_bytes(x.begin(), x.end());
  if (!int8_activations) x_bytes = as(kernels, type, x);
  const Blocking p = blocking(kernels, true, all, tokens, 1, gated ? 2 : 1);
  const PackedOperand<float> shared(kernels, p.shared, tokens, 1, k);
  const Buffer conversion(conversion_bytes(kernels)), scratch(p.bytes() + 64);
  const Type in = int8_activations ? Type::i8 : type;
  shared.pack(0, shared.panels(), 0, {{x_bytes.data(), k * size_of(in), in}, true}, conversion.get());
  std::memset(scratch.get(), untouched, p.bytes() + 64);
  std::vector<float> y(tokens * all, -1);
  const int64_t step = p.outer_panels / (gated ? 2 : 1) * gemm.nr;
  for (int64_t first = 0; first < outputs; first += step) {
    const OuterRange lanes{first, std::min(step, outputs - first), gated ? step_outputs + first : -1};
    grouped_gemm_block(
        kernels, p, shared, [&](int64_t) { return Operand{{nullptr, 0, Type::i8}, true, packed.get(), panel_bytes}; }, lanes, scratch.get(),
        [&](float* rows, int64_t ld, int64_t row0, int used, int64_t n) {
          for (int r = 0; r < used; ++r) {
            std::memcpy(y.data() + (row0 + r) * all + first, rows + r * ld, n * sizeof(float));
            if (gated) std::memcpy(y.data() + (row0 + r) * all + outputs + first, rows + r * ld + round_up(n, gemm.nr), n * sizeof(float));
          }
        });
  }
  bool right = is_untouched(scratch.get() + p.bytes(), 64);
  for (int64_t t = 0; t < tokens; ++t)
    for (int64_t o = 0; o < all; ++o) {
      int32_t sum = 0, found;
      for (int64_t i = 0; i < k; ++i) sum += x[t * k + i] * w[o * k + i];
      std::memcpy(&found, &y[t * all + o], 4);
      right &= int8_activations ? found == sum : y[t * all + o] == static_cast<float>(sum);
    }
  ++cases;
  if (right) return;
  ++wrong;
  std::printf("WRONG: int8 weights, activations of type %d, %lld tokens, %lld outputs, k %lld, gated %d, l2 %lld\n", static_cast<int>(in),
              number(tokens), number(outputs), number(k), gated, number(l2));
}

struct Wgrad {
  int64_t outputs, inputs, tokens, l2, most_packed, offset, gap;  // offset and gap: bytes before the first row of dW, and between its rows
  Type type;                                                      // of dW
  bool sorted;                                                    // rows of dy are read through an index
};

template <class T>
void run(Kernels<T> kernels, const Wgrad& c) {
  const bool add = (cases ^ cases >> 2) % 2;  // to what is there: every second case, of three or four in a row not always the same
  kernels.l2 = c.l2;
  const int64_t value = size_of(kernels.type), stride = c.inputs * size_of(c.type) + c.gap;
  const std::vector<int> dy = integers(c.tokens * c.outputs), x = integers(c.tokens * c.inputs);
  const std::vector<char> dy_bytes = as(kernels, kernels.type, dy), x_bytes = as(kernels, kernels.type, x);
  std::vector<int64_t> index(c.tokens);
  for (int64_t t = 0; t < c.tokens; ++t) index[t] = c.sorted ? c.tokens - 1 - t : t;

  const Blocking p = wgrad_blocking(kernels, c.outputs, c.inputs, c.tokens, 1, c.most_packed);
  const PackedOperand<T> shared(kernels, p.shared, c.inputs, 1, c.tokens);
  const Buffer conversion(conversion_bytes(kernels)), scratch(p.bytes() + 64), dw(c.offset + c.outputs * stride + 64);
  shared.pack(0, shared.panels(), 0, {{x_bytes.data(), c.inputs * value, kernels.type}, false}, conversion.get());
  std::memset(scratch.get(), untouched, p.bytes() + 64);
  std::memset(dw.get(), untouched, c.offset + c.outputs * stride + 64);
  char* const to = dw.get() + c.offset;
  constexpr int before = 3;
  const std::vector<T> was(c.inputs, T(before));
  for (int64_t o = 0; add && o < c.outputs; ++o) kernels.rows->store(c.type, was.data(), to + o * stride, c.inputs);
  const Matrix rows{dy_bytes.data(), c.outputs * value, kernels.type, c.sorted ? index.data() : nullptr, 1};
  const int64_t most = p.outer_panels * kernels.panel_width(p.outer);
  for (int64_t first = 0; first < c.outputs; first += most)
    WgradBlock<T>(kernels, p, shared, rows, OuterRange{first, std::min(most, c.outputs - first)}, scratch.get(), c.type,
                  to + first * stride, stride, add)
        .compute();

  bool right = is_untouched(scratch.get() + p.bytes(), 64) && is_untouched(dw.get(), c.offset) && is_untouched(to + c.outputs * stride, 64);
  // What needs no conversion leaves the room for it, which lies behind the sums.
  if (kernels.type == kernels.gemm->panel) right &= is_untouched(scratch.get() + p.bytes() - p.conversion, p.conversion);
  std::vector<int> sums(c.inputs);
  std::vector<T> wide(c.inputs);
  std::vector<char> expected(c.inputs * size_of(c.type));
  for (int64_t o = 0; o < c.outputs; ++o) {
    std::fill(sums.begin(), sums.end(), add ? before : 0);
    for (int64_t t = 0; t < c.tokens; ++t)
      for (int64_t i = 0; i < c.inputs; ++i) sums[i] += dy[index[t] * c.outputs + o] * x[t * c.inputs + i];
    std::copy(sums.begin(), sums.end(), wide.begin());
    if constexpr (sizeof(T) == 8)
      std::memcpy(expected.data(), wide.data(), expected.size());
    else
      isa_generic.rows->store(c.type, wide.data(), expected.data(), c.inputs);
    right &= std::memcmp(to + o * stride, expected.data(), expected.size()) == 0 &&
             is_untouched(to + o * stride + c.inputs * size_of(c.type), c.gap);
  }
  ++cases;
  if (right) return;
  ++wrong;
  std::printf("WRONG: dW of types %d and %d, %lld x %lld, %lld tokens, l2 %lld, packed %lld, offset %lld, gap %lld, sorted %d, added %d\n",
              static_cast<int>(kernels.type), static_cast<int>(c.type), number(c.outputs), number(c.inputs), number(c.tokens), number(c.l2),
              number(c.most_packed), number(c.offset), number(c.gap), c.sorted, add);
}

constexpr int64_t small = 1 << 15;  // an L2 cache in which every operand takes several blocks

template <class T>
void weighted(Type type) {
  const Kernels<T> kernels = kernels_for<T>(type), dots = kernels_for_small_m<T>(type);
  const int64_t chunk = kernels.gemm->kc;
  for (const int64_t k : {int64_t{0}, int64_t{1}, int64_t{32}, int64_t{64}, chunk, 2 * chunk + 33})
    for (const auto& [tokens, outputs] : {std::pair<int64_t, int64_t>{1, 5}, {33, 64}, {70, 149}})
      for (const int64_t l2 : {kernels.l2, small}) {
        run(kernels, type, {tokens, outputs, k, 1, k, true, false, false, l2});
        run(kernels, type, {tokens, outputs, k, 1, outputs, false, false, false, l2});
        run(kernels, type, {tokens, outputs, k, 1, k, true, true, false, l2});
        run(kernels, type, {tokens, outputs, k, 1, k + 5, true, false, true, l2});
      }
  // Several segments; weights in another type; rows of a weight at multiples of 4 KB, with many tokens and with few; rows that overlap.
  for (const bool in_rows : {true, false}) {
    run(kernels, type, {37, 70, 96, 3, in_rows ? int64_t{96} : 70, in_rows, false, false, small});
    if (type != Type::f64) run(kernels, Type::f32, {37, 70, 96, 1, in_rows ? int64_t{96} : 70, in_rows, false, false, small});
    for (const int64_t tokens : {33, 200}) run(kernels, type, {tokens, 70, 64, 1, 4096, in_rows, false, false, kernels.l2});
  }
  for (const int64_t stride : {0, 16, 32, 64}) run(kernels, type, {37, 70, 96, 1, stride, true, false, false, kernels.l2});
  for (int64_t tokens = 1; tokens <= most_small_m; ++tokens)
    for (const int64_t k : {1, 64, 1100, 4096 + 70}) run(dots, type, {tokens, 11, k, 1, k + 1, true, false, false, kernels.l2});
  if (type != Type::f64) run(dots, Type::f32, {3, 11, 4096 + 70, 1, 4096 + 70, true, false, false, kernels.l2});
}

template <class T>
void wgrad(Type type) {
  const Kernels<T> kernels = kernels_for<T>(type);
  const int64_t chunk = kernels.gemm->kc;
  // No token, less than a k step, a few, one chunk, two (one run of AMX), more.
  for (const int64_t tokens : {int64_t{0}, int64_t{1}, int64_t{70}, chunk, chunk + 1, 2 * chunk, 2 * chunk + 1, 3 * chunk + 5})
    // A part of a panel; whole panels; several blocks of both operands.
    for (const auto& [outputs, inputs] : {std::pair<int64_t, int64_t>{3, 5}, {64, 64}, {70, 161}})
      for (const int64_t l2 : {kernels.l2, small})
        for (const int64_t most_packed : {most_packed_outer, int64_t{1}}) {
          const bool sorted = tokens % 2;
          // Rows of whole cache lines; rows without gaps, the first of which does or does not begin a cache line; dW in another type.
          run(kernels,
              {outputs, inputs, tokens, l2, most_packed, 64, round_up(inputs * size_of(type), 64) - inputs * size_of(type), type, sorted});
          run(kernels, {outputs, inputs, tokens, l2, most_packed, 64, 0, type, sorted});
          run(kernels, {outputs, inputs, tokens, l2, most_packed, 32, 0, type, sorted});
          if (size_of(type) == 2) run(kernels, {outputs, inputs, tokens, l2, most_packed, 64, 0, Type::f32, sorted});
        }
}

}  // namespace

int main() {
  need_instruction_set();
  weighted<float>(Type::f32), weighted<float>(Type::bf16), weighted<float>(Type::f16), weighted<double>(Type::f64);
  wgrad<float>(Type::f32), wgrad<float>(Type::bf16), wgrad<float>(Type::f16), wgrad<double>(Type::f64);
  for (const bool int8_activations : {false, true}) {
    if (int8_activations && !has_int8_products()) continue;
    for (const Type type : {Type::f32, Type::bf16})
      for (const int64_t tokens : {1, 2, 5, 9, 17, 33, 70})
        for (const int64_t outputs : {1, 31, 64, 150})
          for (const int64_t k : {1, 6, 64, 70, 1100})
            for (const bool gated : {false, true})
              run_int8(int8_activations, type, tokens, outputs, k, gated, tokens == 70 ? 8 << 10 : 1 << 20);
  }
  std::printf("instruction set %s: %d products, %d wrong\n", isa_name(), cases, wrong);
  return wrong ? 1 : 0;
}
