// The instruction set, chosen once a process: the best that the processor, the operating system and the build have and that passes its
// self-test, or the one that CMOE_CPU_ISA names.

#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include <algorithm>
#include <cstdlib>
#include <iterator>
#include <string>
#include <vector>

#include "dispatch.h"
#include "gemm/pack.h"
#include "self_test.h"

#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace cmoe::cpu {

namespace {

struct Tier {
  const Isa* isa;
  bool (*supported)();
};

#if defined(__x86_64__)
bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"); }
#if defined(CMOE_HAS_AVX_VNNI)
#if defined(CMOE_EMULATE_AVX_VNNI)
bool has_avx_vnni() { return has_avx2(); }
#else
bool has_avx_vnni() {
  unsigned a = 0, b = 0, c = 0, d = 0;  // not every compiler knows the name
  return has_avx2() && __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a & 1u << 4);
}
#endif
#endif
#if defined(CMOE_EMULATE_AVX512)
bool has_avx512() { return has_avx2(); }
bool has_avx512_vnni() { return has_avx2(); }
bool has_avx512_bf16() { return has_avx2(); }
#else
bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512dq");
}
#if defined(CMOE_HAS_AVX512_VNNI)
bool has_avx512_vnni() { return has_avx512() && __builtin_cpu_supports("avx512vnni"); }
#endif
#if defined(CMOE_HAS_AVX512_BF16)
bool has_avx512_bf16() { return has_avx512() && __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bf16"); }
#endif
#endif
#if defined(CMOE_HAS_AMX)
#if defined(CMOE_EMULATE_AMX)
bool has_amx() { return has_avx512_bf16(); }
#else
bool has_amx() {
#if defined(__linux__)
  // Tile registers are large: Linux gives them to a process that asks, once, before its first tile instruction.
  constexpr long request_permission = 0x1023, tile_data = 18;
  return has_avx512_bf16() && __builtin_cpu_supports("amx-tile") && __builtin_cpu_supports("amx-bf16") &&
         __builtin_cpu_supports("amx-int8") && syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
#else
  return false;
#endif
}
#endif
#endif
#endif
bool always() { return true; }

// Best first, but for best_first().
constexpr Tier tiers[] = {
#if defined(CMOE_HAS_AMX)
    {&isa_amx, has_amx},
#endif
#if defined(CMOE_HAS_AVX512_BF16)
    {&isa_avx512_bf16, has_avx512_bf16},
#endif
#if defined(CMOE_HAS_AVX512_VNNI)
    {&isa_avx512_vnni, has_avx512_vnni},
#endif
#if defined(CMOE_HAS_AVX512)
    {&isa_avx512, has_avx512},
#endif
#if defined(CMOE_HAS_AVX_VNNI)
    {&isa_avx_vnni, has_avx_vnni},
#endif
#if defined(CMOE_HAS_AVX2)
    {&isa_avx2, has_avx2},
#endif
    {&isa_generic, always},
};

// VDPBF16PS has half the rate of fp32 products on Intel's processors: without AMX, 256 tokens of the released connector took 0.85 times the
// time on the avx512 tier, whose kernels avx512_vnni shares. On AMD's it has the full rate.
std::vector<Tier> best_first() {
  std::vector<Tier> order(std::begin(tiers), std::end(tiers));
#if defined(CMOE_HAS_AVX512_BF16) && defined(CMOE_HAS_AVX512)
  const auto is = [](const Isa& isa) { return [&isa](const Tier& tier) { return tier.isa == &isa; }; };
  if (__builtin_cpu_is("intel")) {
    const auto bf16 = std::find_if(order.begin(), order.end(), is(isa_avx512_bf16));
    std::rotate(bf16, bf16 + 1, std::find_if(order.begin(), order.end(), is(isa_avx512)) + 1);
  }
#endif
  return order;
}

// CMOE_SELF_TEST=0: tiers are trusted.
bool self_tests() {
  const char* const setting = std::getenv("CMOE_SELF_TEST");
  return !setting || std::string(setting) != "0";
}

struct Choice {
  const Isa* isa = nullptr;
  std::string names, left_out, error;

  Choice() {
    const char* const setting = std::getenv("CMOE_CPU_ISA");
    const std::string named = setting ? setting : "";
    for (const Tier& tier : best_first()) {
      if (!tier.supported()) continue;
      const std::string name = tier.isa->name;
      const bool wanted = !isa && (named.empty() || named == name);
      if (const std::string fault = wanted && tier.isa != &isa_generic && self_tests() ? self_test(*tier.isa) : ""; !fault.empty()) {
        left_out += (left_out.empty() ? "" : ", ") + name + " (" + fault + ")";
        continue;
      }
      if (wanted) isa = tier.isa;
      names += (names.empty() ? "" : ", ") + name;
    }
    if (isa) return;
    error = "CMOE_CPU_ISA is '" + named + "', ";
    error += left_out.empty()
                 ? "must be one of those that this machine and this build have: " + names
                 : "which failed its self-test: " + left_out + "; must be one of " + names + " (CMOE_SELF_TEST=0 skips the test)";
  }
};

const Choice& choice() {
  static const Choice made;
  return made;
}

int64_t l2_bytes() {
#if defined(__linux__) && defined(_SC_LEVEL2_CACHE_SIZE)
  const long size = sysconf(_SC_LEVEL2_CACHE_SIZE);
  if (size > 0) return std::min<int64_t>(std::max<int64_t>(size, 256 << 10), 2 << 20);
#endif
  return 1 << 20;
}

}  // namespace

const char* isa_name() { return choice().isa ? choice().isa->name : ""; }
const std::string& isa_names() { return choice().names; }
const std::string& isa_left_out() { return choice().left_out; }
const std::string& isa_error() { return choice().error; }

template <>
Kernels<float> kernels_for<float>(Type type) {
  const Isa& isa = *choice().isa;
  return {type == Type::bf16 && isa.bf16 ? isa.bf16 : isa.f32, isa.rows, isa.convert, isa.transpose, type, l2_bytes()};
}

// Products of bf16 by instructions of their own are as fast from five tokens on, and so are all where weights are converted before.
int64_t small_m(Type type) { return type == Type::f16 || (type == Type::bf16 && choice().isa->bf16) ? most_small_m / 2 : most_small_m; }

template <>
Kernels<float> kernels_for_small_m<float>(Type type) {
  const Isa& isa = *choice().isa;
  // Blocks of few lanes are transposed value by value.
  const auto transpose = [](const float* from, int64_t from_ld, float* to, int64_t to_ld, int rows, int columns) {
    for (int r = 0; r < rows; ++r)
      for (int c = 0; c < columns; ++c) to[c * to_ld + r] = from[r * from_ld + c];
  };
  return {type == Type::bf16 && isa.bf16_small_m ? isa.bf16_small_m : isa.f32_small_m, isa.rows, isa.convert, transpose, type, l2_bytes()};
}

Kernels<float> kernels_for_int8_weights(bool int8_activations, int64_t rows) {
  const Isa& isa = *choice().isa;
  // A kernel converts a panel again for every panel of rows: from the third on, once is less.
  const Microkernel* const floats = isa.w8_few && rows <= isa.w8_few->mr ? isa.w8_few : rows > 2 * isa.w8->mr ? isa.w8_wide : isa.w8;
  return {int8_activations ? isa.i8 : floats, isa.rows, isa.convert, isa.transpose, int8_activations ? Type::i8 : Type::f32, l2_bytes()};
}

Int8Layout int8_layout() {
  const Isa& isa = *choice().isa;
  return {isa.w8->nr, 4, std::max((isa.i8 ? isa.i8 : isa.w8)->k_step, isa.w8_few ? isa.w8_few->k_step : 0), isa.i8 != nullptr};
}

bool has_int8_products() { return choice().isa && choice().isa->i8; }

template <>
Kernels<double> kernels_for<double>(Type type) {
  return {&microkernel_f64, &row_functions_f64, nullptr, nullptr, type, l2_bytes()};
}

template <>
Kernels<double> kernels_for_small_m<double>(Type type) {
  return kernels_for<double>(type);
}

}  // namespace cmoe::cpu
