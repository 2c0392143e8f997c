// A processor, an operating system and a compiler may each promise an instruction set that does not work: a tier multiplies one small case
// of each kind before its first use in a process, and is left out if it traps or is wrong.
//
// The kernels are called through the tier's own tables, on this thread, in memory that is there from the start. The portable tier computes
// the same. Operands are small integers, so products must agree to the bit; activations may differ by 2 ulp, of one where they are smaller.
// A trap comes back here by a jump, so nothing between sigsetjmp and the kernels has a destructor.

#include "self_test.h"

#include <pthread.h>

#include <atomic>
#include <cmath>
#include <csetjmp>
#include <csignal>
#include <cstring>
#include <initializer_list>
#include <iterator>
#include <limits>

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#define SANITIZED
#elif defined(__has_feature)
#if __has_feature(address_sanitizer) || __has_feature(thread_sanitizer) || __has_feature(memory_sanitizer)
#define SANITIZED
#endif
#endif

namespace cmoe::cpu {

namespace {

// More than one panel of every kernel (32 lanes at most), and two chunks of k, whose last one is no whole k step.
constexpr int lanes = 37, other_lanes = 39, depth = 70, first_chunk = 64, most_lanes = 32;
constexpr int values = 37;  // of a row: whole vectors and a part of one
constexpr int64_t line = 64;

// An operand as fp32, as bf16 and as int8, by rows along k and by rows along lanes.
template <int n>
struct Integers {
  float f32[n][depth], f32_columns[depth][n];
  uint16_t bf16[n][depth], bf16_columns[depth][n];
  int8_t i8[n][depth];

  void fill(int seed) {
    for (int i = 0; i < n; ++i)
      for (int k = 0; k < depth; ++k) {
        const float value = static_cast<float>((i * 5 + k * 3 + i * k + seed) % 7 - 3);
        uint32_t bits;
        std::memcpy(&bits, &value, sizeof bits);
        f32[i][k] = f32_columns[k][i] = value;
        bf16[i][k] = bf16_columns[k][i] = static_cast<uint16_t>(bits >> 16);
        i8[i][k] = static_cast<int8_t>(value);
      }
  }
  const char* row(Type type, int lane, int k) const {
    if (type == Type::i8) return reinterpret_cast<const char*>(&i8[lane][k]);
    return type == Type::bf16 ? reinterpret_cast<const char*>(&bf16[lane][k]) : reinterpret_cast<const char*>(&f32[lane][k]);
  }
  const char* column(Type type, int lane, int k) const {
    return type == Type::bf16 ? reinterpret_cast<const char*>(&bf16_columns[k][lane])
                              : reinterpret_cast<const char*>(&f32_columns[k][lane]);
  }
};

enum class Packing { rows, columns, in_place };

struct alignas(64) Memory {
  char a_panel[most_lanes * (depth + most_lanes) * 4], b_panel[most_lanes * (depth + most_lanes) * 4];
  char wide_panel[most_lanes * (depth + most_lanes) * 4];
  float block[most_lanes * most_lanes], next_block[most_lanes * most_lanes];
  uint16_t stored[most_lanes][most_lanes];  // one cache line a row
  Integers<lanes> a;
  Integers<other_lanes> b;
  float expected[lanes][other_lanes], found[lanes][other_lanes];
};
Memory memory;

// Of the test that runs: a handler and the code after a jump read them.
const Isa* tested;
const char* volatile part;
volatile bool wrong;

template <int n>
void pack(const Microkernel& gemm, Side side, Packing packing, const Integers<n>& from, int lane, int count, int k0, int k, void* panel) {
  const void* pointers[depth];
  const int at = static_cast<int>(side);
  if (packing == Packing::columns && gemm.pack_columns[at]) {
    for (int i = 0; i < k; ++i) pointers[i] = from.column(gemm.panel, lane, k0 + i);
    // In two pieces, as the drivers do where they convert.
    const int first = k < most_lanes ? k : most_lanes;
    gemm.pack_columns[at](pointers, count, 0, first, panel, 0);
    if (first < k) gemm.pack_columns[at](pointers + first, count, first, k - first, panel, 0);
    return;
  }
  for (int i = 0; i < count; ++i) pointers[i] = from.row(gemm.panel, lane + i, k0);
  gemm.pack_rows[at](pointers, count, k, panel);
}

// int8 weights, as ops/int8/quantise.py packs them.
void pack_int8_weights(const Microkernel& gemm, int lane, int count, int k0, int k, int padded) {
  std::memset(memory.b_panel, 0, gemm.nr * padded);
  for (int i = 0; i < count; ++i)
    for (int at = 0; at < k; ++at) memory.b_panel[(at / 4 * gemm.nr + i) * 4 + at % 4] = memory.b.i8[lane + i][k0 + at];
}

// found = A B^T, block by block, each over two chunks of k.
void product(const Microkernel& gemm, Packing packing, Side resident) {
  const int64_t value = size_of(gemm.panel);
  if (gemm.begin) gemm.begin();
  for (int i = 0; i < lanes; i += gemm.mr)
    for (int j = 0; j < other_lanes; j += gemm.nr) {
      const int in_a = lanes - i < gemm.mr ? lanes - i : gemm.mr, in_b = other_lanes - j < gemm.nr ? other_lanes - j : gemm.nr;
      for (const int k0 : {0, first_chunk}) {
        const int k = k0 ? depth - first_chunk : first_chunk, padded = (k + gemm.k_step - 1) / gemm.k_step * gemm.k_step;
        const char* a = memory.a_panel;
        int64_t stride = (gemm.row_major[0] ? padded : gemm.k_step) * value;
        if (packing == Packing::in_place && gemm.in_place && in_a == gemm.mr && k == padded) {
          a = memory.a.row(gemm.panel, i, k0);
          stride = depth * value;
        } else {
          pack(gemm, Side::a, packing, memory.a, i, in_a, k0, k, memory.a_panel);
        }
        if (gemm.int8_weights)
          pack_int8_weights(gemm, j, in_b, k0, k, padded);
        else
          pack(gemm, Side::b, packing, memory.b, j, in_b, k0, k, memory.b_panel);
        if (gemm.widen) gemm.widen(memory.b_panel, padded, memory.wide_panel);
        const char* const b = gemm.widen ? memory.wide_panel : memory.b_panel;
        gemm.multiply[static_cast<int>(resident)](a, stride, b, memory.block, padded, gemm.row_major[1] ? in_b : in_a, k0 > 0,
                                                  {memory.b_panel, line, 2, 1});
      }
      for (int r = 0; r < in_a; ++r)
        for (int c = 0; c < in_b; ++c) {
          int32_t sum;
          std::memcpy(&sum, memory.block + r * gemm.nr + c, sizeof sum);
          memory.found[i + r][j + c] = gemm.panel == Type::i8 ? static_cast<float>(sum) : memory.block[r * gemm.nr + c];
        }
    }
  if (gemm.end) gemm.end();
}

// The first block, stored beside a second product, which must come out as the first.
bool stored_beside(const Microkernel& gemm) {
  if (!gemm.multiply_and_store) return true;
  const int64_t stride = gemm.k_step * size_of(gemm.panel);
  if (gemm.begin) gemm.begin();
  pack(gemm, Side::a, Packing::rows, memory.a, 0, gemm.mr, 0, first_chunk, memory.a_panel);
  pack(gemm, Side::b, Packing::rows, memory.b, 0, gemm.nr, 0, first_chunk, memory.b_panel);
  gemm.multiply[0](memory.a_panel, stride, memory.b_panel, memory.block, first_chunk, gemm.mr, false, {});
  gemm.multiply_and_store(memory.a_panel, stride, memory.b_panel, memory.next_block, first_chunk, gemm.mr, false, {},
                          {memory.block, reinterpret_cast<char*>(memory.stored), sizeof memory.stored[0], gemm.mr, gemm.nr});
  if (gemm.end) gemm.end();
  bool right = std::memcmp(memory.block, memory.next_block, sizeof memory.block) == 0;
  for (int r = 0; r < gemm.mr; ++r) {
    uint16_t row[most_lanes];
    isa_generic.rows->store(gemm.panel, memory.block + r * gemm.nr, row, gemm.nr);
    right &= std::memcmp(row, memory.stored[r], gemm.nr * sizeof(uint16_t)) == 0;
  }
  return right;
}

// Within some ulp, of one where values are smaller; a NaN is near nothing.
bool near(const float* x, const float* y, int n, float ulps) {
  for (int i = 0; i < n; ++i) {
    const float largest = std::fmax(1.f, std::fmax(std::fabs(x[i]), std::fabs(y[i])));
    if (!(std::fabs(x[i] - y[i]) <= ulps * std::numeric_limits<float>::epsilon() * largest)) return false;
  }
  return true;
}

// One function over rows, by the tier and by the portable one, on the same values: f(functions, x, y) changes x and y.
template <class F>
bool same(const Isa& isa, float ulps, const F& f) {
  float x[2][values], y[2][values];
  for (int of = 0; of < 2; ++of) {
    for (int i = 0; i < values; ++i) {
      x[of][i] = static_cast<float>(i - values / 2);
      y[of][i] = static_cast<float>(i % 5 - 2);
    }
    f(of ? isa : isa_generic, x[of], y[of]);
  }
  return near(x[0], x[1], values, ulps) && near(y[0], y[1], values, ulps);
}

bool rows_agree(const Isa& isa) {
  bool right = same(isa, 0, [](const Isa& on, float* x, float* y) { on.rows->add(x, y, values); });
  right &= same(isa, 0, [](const Isa& on, float* x, float* y) { on.rows->multiply(x, y, values); });
  right &= same(isa, 0, [](const Isa& on, float*, float* y) { on.rows->scale(-3.f, y, values); });
  right &= same(isa, 0, [](const Isa& on, float* x, float* y) { on.rows->axpy(2.f, x, y, values); });
  right &= same(isa, 0, [](const Isa& on, float* x, float* y) { y[0] = on.rows->dot(x, y, values); });
  return right;
}

bool conversions_agree(const Isa& isa) {
  bool right = true;
  for (const Type type : {Type::f32, Type::bf16, Type::f16}) {
    // Thirds: no type has them, so that they are rounded.
    right &= same(isa, 0, [=](const Isa& on, float* x, float* y) {
      on.rows->scale(1.f / 3, x, values);
      on.rows->round(type, x, values);
      char narrow[values * sizeof(float)], wide[values * sizeof(float)];
      on.rows->store(type, y, narrow, values);
      on.convert(type, narrow, Type::f32, wide, values);
      on.rows->load(Type::f32, wide, y, values);
    });
    right &= same(isa, 0, [=](const Isa& on, float* x, float* y) {
      char narrow[values * sizeof(float)];
      on.rows->scale(1.f / 3, x, values);
      on.rows->store_block(type, x, values, narrow, 0, 1, values);
      on.rows->load(type, narrow, y, values);
    });
  }
  return right;
}

bool transposes_agree(const Isa& isa) {
  float* const from = memory.block;
  for (int i = 0; i < most_lanes * most_lanes; ++i) from[i] = static_cast<float>(i);
  isa.transpose(from, most_lanes, memory.next_block, most_lanes, most_lanes, most_lanes);
  bool right = true;
  for (int r = 0; r < most_lanes; ++r)
    for (int c = 0; c < most_lanes; ++c) right &= memory.next_block[c * most_lanes + r] == from[r * most_lanes + c];
  return right;
}

bool activations_agree(const Isa& isa) {
  constexpr float ulps = 2;
  bool right = same(isa, ulps, [](const Isa& on, float* x, float* y) {
    on.rows->scale(0.25f, x, values);
    on.rows->exp(x, y, values);
  });
  for (const Activation f : {Activation::gelu, Activation::gelu_tanh, Activation::silu, Activation::relu, Activation::relu2}) {
    right &= same(isa, ulps, [=](const Isa& on, float* x, float* y) {
      on.rows->scale(0.25f, x, values);
      on.rows->activate(f, x, y, values);
    });
    right &= same(isa, ulps, [=](const Isa& on, float* x, float* y) {
      float u[values];
      on.rows->scale(0.25f, x, values);
      std::memcpy(u, x, sizeof u);
      on.rows->activate_backward(f, u, x, y, values);
    });
  }
  return right;
}

// Every kind in turn, until one is wrong.
void run() {
  const Isa& isa = *tested;
  memory.a.fill(0);
  memory.b.fill(4);
  part = "products of the portable tier";
  product(*isa_generic.f32, Packing::rows, Side::b);
  std::memcpy(memory.expected, memory.found, sizeof memory.found);
  struct {
    const char* name;
    const Microkernel* gemm;
  } const kinds[] = {{"products of fp32", isa.f32},
                     {"products of bf16", isa.bf16},
                     {"dot products of fp32", isa.f32_small_m},
                     {"dot products of bf16", isa.bf16_small_m},
                     {"products of int8 weights", isa.w8},
                     {"products of int8 weights as fp32", isa.w8_wide},
                     {"products of int8 weights in few rows", isa.w8_few},
                     {"products of int8", isa.i8}};
  for (const auto& kind : kinds) {
    if (!kind.gemm) continue;
    part = kind.name;
    for (const Packing packing : {Packing::rows, Packing::columns, Packing::in_place})
      for (const Side resident : {Side::a, Side::b}) {
        std::memset(memory.found, 0, sizeof memory.found);
        product(*kind.gemm, packing, resident);
        if (std::memcmp(memory.found, memory.expected, sizeof memory.found) != 0) return;
      }
    if (!stored_beside(*kind.gemm)) return;
  }
  struct {
    const char* name;
    bool (*agree)(const Isa&);
  } const functions[] = {{"sums of rows", rows_agree},
                         {"conversions", conversions_agree},
                         {"transposes", transposes_agree},
                         {"activations", activations_agree}};
  for (const auto& function : functions) {
    part = function.name;
    if (!function.agree(isa)) return;
  }
  wrong = false;
}

// What a trap may have left set up.
void release() {
  for (const Microkernel* gemm :
       {tested->f32, tested->bf16, tested->f32_small_m, tested->bf16_small_m, tested->w8, tested->w8_wide, tested->w8_few, tested->i8})
    if (gemm && gemm->end) gemm->end();
}

#if defined(SANITIZED)

// A sanitizer has handlers of its own, and a jump would skip its bookkeeping.
int trap_in(void (*f)()) {
  f();
  return 0;
}

#else

constexpr int signals[] = {SIGILL, SIGSEGV, SIGBUS};
struct sigaction others[std::size(signals)];
sigjmp_buf before;
volatile std::sig_atomic_t trapped;
// The thread that tests: a trap in another one is not ours. A thread-local flag might allocate when a handler first reads it.
std::atomic<pthread_t> tester;
std::atomic<bool> testing{false};
static_assert(std::atomic<pthread_t>::is_always_lock_free && std::atomic<bool>::is_always_lock_free);

void on_trap(int signal, siginfo_t* info, void* context) {
  if (testing && pthread_equal(tester, pthread_self())) {
    trapped = signal;
    siglongjmp(before, 1);
  }
  for (size_t i = 0; i < std::size(signals); ++i) {
    if (signals[i] != signal) continue;
    const struct sigaction& other = others[i];
    if (other.sa_flags & SA_SIGINFO) {
      other.sa_sigaction(signal, info, context);
    } else if (other.sa_handler != SIG_DFL && other.sa_handler != SIG_IGN) {
      other.sa_handler(signal);
    } else {
      // The instruction traps again, now without us; a signal that somebody sent is sent again.
      sigaction(signal, &other, nullptr);
      if (info->si_code <= 0) raise(signal);
    }
  }
}

// The signal that ended f(), or 0.
int trap_in(void (*f)()) {
  struct sigaction ours = {}, now;
  ours.sa_sigaction = on_trap;
  ours.sa_flags = SA_SIGINFO | SA_ONSTACK;
  sigemptyset(&ours.sa_mask);
  sigset_t traps, mask;
  sigemptyset(&traps);
  for (const int signal : signals) sigaddset(&traps, signal);
  for (size_t i = 0; i < std::size(signals); ++i) {
    sigaction(signals[i], nullptr, &others[i]);  // before a handler of ours may need it
    sigaction(signals[i], &ours, nullptr);
  }
  pthread_sigmask(SIG_UNBLOCK, &traps, &mask);
  trapped = 0;
  tester = pthread_self();
  testing = true;
  if (sigsetjmp(before, 1) == 0) f();
  testing = false;
  pthread_sigmask(SIG_SETMASK, &mask, nullptr);
  for (size_t i = 0; i < std::size(signals); ++i)
    if (sigaction(signals[i], nullptr, &now) == 0 && now.sa_sigaction == on_trap) sigaction(signals[i], &others[i], nullptr);
  return trapped;
}

#endif

}  // namespace

std::string self_test(const Isa& isa) {
  tested = &isa;
  wrong = true;
  if (const int signal = trap_in(run)) {
    const std::string name = signal == SIGILL ? "SIGILL" : signal == SIGSEGV ? "SIGSEGV" : "SIGBUS", where = part;
    trap_in(release);
    return name + " in " + where;
  }
  return wrong ? "wrong " + std::string(part) : "";
}

}  // namespace cmoe::cpu
