// What the emulator must compute and what it must report: one small kernel for each.
//
//     emulator_test CASE [forward|reverse|shuffled] [eager]      prints what came of it

#include <cstdio>
#include <cstdlib>

#include "device/ampere.h"
#include "device/launch.h"

using namespace cmoe::cuda;
using emulator::options;

namespace {

float host[1024];
float* const numbers = host;

// --- faults
__global__ void barrier_at_two_places(float* out) {
  if (threadIdx.x < 16)
    __syncthreads();
  else
    __syncthreads();
  out[threadIdx.x] = 1;
}
__global__ void barrier_not_reached(float* out) {
  if (threadIdx.x < 48) __syncthreads();
  if (threadIdx.x >= 32) __shfl_xor_sync(~0u, 1, 1);  // lanes 32..47 never come: they passed a barrier that waits for all
  out[threadIdx.x] = 1;
}
__global__ void shuffle_in_a_branch(float* out) {
  if (threadIdx.x & 1) out[threadIdx.x] = __shfl_xor_sync(~0u, out[threadIdx.x], 1);
}
__global__ void two_collectives(float* out) {
  if (threadIdx.x & 1)
    out[threadIdx.x] = static_cast<float>(__ballot_sync(~0u, 1));
  else
    out[threadIdx.x] = __shfl_xor_sync(~0u, 1.f, 1);
}
__global__ void lane_not_in_mask(float* out) { out[threadIdx.x] = __shfl_xor_sync(1u, 1.f, 1); }
__global__ void too_much_shared(float* out) {
  CU_SHARED(float, large, 60000);
  out[0] = large[0];
}
__global__ void misaligned_copy(float* out) {
  CU_SHARED(float, s, 64);
  cp_async_16(shared_address(s), out + 1, 16);
}
__global__ void misaligned_matrix(float* out) {
  CU_SHARED(float, s, 64);
  uint32_t r[4];
  ldmatrix_x4(r, shared_address(s) + 4);
  out[0] = static_cast<float>(r[0]);
}
__global__ void not_shared(float* out) { out[0] = static_cast<float>(shared_address(out)); }
__global__ void stack_of_global(float* out) { out[threadIdx.x] = 1; }

// --- wrong numbers, where a GPU might give right ones
__global__ void unwritten_shared(float* out) {
  CU_SHARED(float, s, 32);
  if (threadIdx.x < 31) s[threadIdx.x] = 1;
  __syncthreads();
  out[threadIdx.x] = s[threadIdx.x];
}
template <bool waits>
__global__ void copy_and_read(const float* in, float* out) {
  CU_SHARED(float, s, 128);
  cp_async_16(shared_address(s + threadIdx.x * 4), in + threadIdx.x * 4, threadIdx.x == 31 ? 8 : 16);
  cp_async_commit();
  if (waits) cp_async_wait<0>();
  __syncthreads();
  for (int i = 0; i < 4; ++i) out[threadIdx.x * 4 + i] = s[threadIdx.x * 4 + i];
}
// A ring of one stage too few: the next copy starts while the last is read. A lazy copy hides it, an eager one shows it.
__global__ void copy_over_what_is_read(const float* in, float* out) {
  CU_SHARED(float, s, 128);
  cp_async_16(shared_address(s + threadIdx.x * 4), in + threadIdx.x * 4, 16);
  cp_async_commit();
  cp_async_wait<0>();
  __syncthreads();
  cp_async_16(shared_address(s + threadIdx.x * 4), in + 128 + threadIdx.x * 4, 16);
  cp_async_commit();
  for (int i = 0; i < 4; ++i) out[threadIdx.x * 4 + i] = s[(threadIdx.x * 4 + i + 64) % 128];
  cp_async_wait<0>();
}
__global__ void order_dependent(float* out) {
  CU_SHARED(float, s, 1);
  s[0] = static_cast<float>(threadIdx.x);
  __syncthreads();
  out[threadIdx.x] = s[0];
}

// --- races and overruns, for the sanitizers
__global__ void race_in_shared(float* out) {
  CU_SHARED(float, s, 64);
  s[threadIdx.x] = 1;
  out[threadIdx.x] = s[63 - threadIdx.x];
}
__global__ void race_between_blocks(float* out) {
  if (threadIdx.x == 0) out[0] += 1;
}
__global__ void race_with_a_copy(const float* in, float* out) {
  CU_SHARED(float, s, 128);
  cp_async_16(shared_address(s + threadIdx.x * 4), in + threadIdx.x * 4, 16);
  cp_async_commit();
  cp_async_wait<0>();  // of one's own copies, and no barrier for the others'
  out[threadIdx.x] = s[(threadIdx.x * 4 + 4) % 128];
}
__global__ void overrun_of_shared(float* out) {
  CU_SHARED(float, s, 32);
  s[threadIdx.x + 1] = 1;
  __syncthreads();
  out[threadIdx.x] = s[threadIdx.x];
}
__global__ void overrun_of_global(float* out) { out[threadIdx.x + 1] = 1; }
__global__ void no_race(const float* in, float* out) {
  CU_SHARED(float, s, 128);
  cp_async_16(shared_address(s + threadIdx.x * 4), in + threadIdx.x * 4, 16);
  cp_async_commit();
  cp_async_wait<0>();
  __syncthreads();
  const float v = s[(threadIdx.x * 4 + 4) % 128];
  out[blockIdx.x * 32 + threadIdx.x] = v + __shfl_xor_sync(~0u, v, 1);
}

// --- right numbers
template <class T, bool transposed>
__global__ void product(const T* a, const T* b, float* d) {  // d[16, 8] = a[16, 16] b, b[8, 16] by rows or, transposed, b[16, 8]
  CU_SHARED(T, s, 16 * 16 + 16 * 16);
  for (int i = threadIdx.x; i < 256; i += 32) s[i] = a[i];
  for (int i = threadIdx.x; i < 256; i += 32) s[256 + i] = from_float<T>(0);
  __syncthreads();
  for (int i = threadIdx.x; i < 128; i += 32) {
    if (transposed)
      s[256 + i / 8 * 16 + i % 8] = b[i];
    else
      s[256 + i] = b[i];
  }
  __syncthreads();
  const int lane = threadIdx.x;
  uint32_t fa[4], fb[4];
  ldmatrix_x4(fa, shared_address(s + (lane & 15) * 16 + (lane >> 4) * 8));
  if (transposed)
    ldmatrix_x4_trans(fb, shared_address(s + 256 + (lane & 15) * 16 + (lane >> 4) * 8));  // k rows 0..7, 8..15 of columns 0..7
  else
    ldmatrix_x4(fb, shared_address(s + 256 + (lane & 7) * 16 + (lane >> 3 & 1) * 8));
  float acc[4] = {};
  mma_16816<T>(acc, fa, fb[0], fb[1]);
  for (int i = 0; i < 4; ++i) d[(lane / 4 + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2] = acc[i];
}

template <class T, bool transposed>
double product_error() {
  T a[256], b[128];
  double worst = 0;
  for (int i = 0; i < 256; ++i) a[i] = from_float<T>(static_cast<float>((i * 37 % 41) - 20) / 8);
  for (int i = 0; i < 128; ++i) b[i] = from_float<T>(static_cast<float>((i * 29 % 31) - 15) / 4);
  launch("product", product<T, transposed>, 1, 32, 0, nullptr, a, b, numbers);
  for (int m = 0; m < 16; ++m)
    for (int n = 0; n < 8; ++n) {
      double sum = 0;
      for (int k = 0; k < 16; ++k) sum += double{to_float(a[m * 16 + k])} * to_float(b[transposed ? k * 8 + n : n * 16 + k]);
      worst = std::max(worst, std::abs(sum - numbers[m * 8 + n]));
    }
  return worst;
}

__global__ void collectives(uint32_t* out) {
  const int lane = threadIdx.x;
  bool good = __shfl_sync(~0u, lane, 5) == 5 && __shfl_sync(~0u, lane, 3, 8) == lane / 8 * 8 + 3;
  good = good && __shfl_xor_sync(~0u, lane, 3) == (lane ^ 3);
  good = good && __shfl_up_sync(~0u, lane, 2) == (lane < 2 ? lane : lane - 2) &&
         __shfl_down_sync(~0u, lane, 2) == (lane > 29 ? lane : lane + 2);
  good = good && __ballot_sync(~0u, lane % 3 == 0) == 0x49249249u && __any_sync(~0u, lane == 7) && !__all_sync(~0u, lane == 7);
  good = good && __match_any_sync(~0u, lane % 4) == 0x11111111u << lane % 4;
  if (lane < 8) good = good && __ballot_sync(0xffu, 1) == 0xffu;
  __syncwarp();
  out[lane] = good;
}

// Rows of 64 bytes: the eight rows of a matrix fall on half the banks, four times each over; with the swizzle on all of them.
template <bool swizzled>
__global__ void conflicts(float* out) {
  CU_SHARED(uint4, s, 128);
  const int lane = threadIdx.x;
  for (int i = 0; i < 4; ++i) s[lane * 4 + i] = make_uint4(0, 0, 0, 0);
  __syncthreads();
  uint32_t r[4];
  const int row = lane, chunk = swizzled ? row >> 1 & 3 : 0;
  ldmatrix_x4(r, shared_address(s + row * 4 + chunk));
  const uint4 v = load_shared_16(shared_address(s + row * 4 + chunk));
  out[lane] = static_cast<float>(r[0] + v.x);
}

__global__ void turns(int* turn, int* order) {
  if (threadIdx.x) return;
  while (atomicCAS(turn, static_cast<int>(blockIdx.x), static_cast<int>(blockIdx.x)) != static_cast<int>(blockIdx.x)) {
  }
  order[blockIdx.x] = atomicAdd(turn, 1);
}
__global__ void exit_before_a_barrier(float* out) {
  if (threadIdx.x >= 32) return;
  __syncthreads();
  out[threadIdx.x] = 1;
}
__global__ void endless_recursion(float* out) {
  volatile float large[40000];
  for (int i = 0; i < 40000; ++i) large[i] = 1;
  out[0] = large[39999];
}

int half_roundings() {
  int wrong = 0;
  for (uint32_t i = 0; i < 65536; ++i) {
    const float b = to_float(bf16{static_cast<uint16_t>(i)}), h = to_float(fp16{static_cast<uint16_t>(i)});
    if (b == b) wrong += from_float<bf16>(b).bits != i;
    if (h == h) wrong += from_float<fp16>(h).bits != i;
  }
  // Between neighbours: down, up, and the even one of the two at the middle.
  const float one = 1.f, b = 0x1p-7f, h = 0x1p-10f;
  wrong += to_float(from_float<bf16>(one + b / 2)) != one || to_float(from_float<bf16>(one + 1.5f * b)) != one + 2 * b ||
           to_float(from_float<bf16>(one + 0.51f * b)) != one + b;
  wrong += to_float(from_float<fp16>(one + h / 2)) != one || to_float(from_float<fp16>(one + 1.5f * h)) != one + 2 * h ||
           to_float(from_float<fp16>(one + 0.51f * h)) != one + h;
  wrong += !std::isinf(to_float(from_float<fp16>(65520.f))) || !std::isnan(to_float(from_float<bf16>(NAN))) ||
           !std::isinf(to_float(from_float<bf16>(3.4e38f)));
  return wrong;
}

double difference(int first, int count, float factor, float shift) {
  double worst = 0;
  for (int i = first; i < first + count; ++i)
    worst = std::max(worst, std::isnan(numbers[512 + i]) ? 1e9 : std::abs(numbers[512 + i] - (factor * static_cast<float>(i) + shift)));
  return worst;
}

}  // namespace

int main(int argc, char** argv) {
  const std::string which = argc > 1 ? argv[1] : "";
  for (int i = 2; i < argc; ++i) {
    const std::string option = argv[i];
    if (option == "reverse") options.order = emulator::Order::reverse;
    if (option == "shuffled") options.order = emulator::Order::shuffled;
    if (option == "eager") options.lazy = false;
  }
  for (int i = 0; i < 1024; ++i) host[i] = static_cast<float>(i);
  float* const in = static_cast<float*>(std::aligned_alloc(16, 1024 * sizeof(float)));
  for (int i = 0; i < 1024; ++i) in[i] = static_cast<float>(i);
  float* const small = static_cast<float*>(malloc(32 * sizeof(float)));
  float* const out = numbers + 512;
  const auto run = [&](auto kernel, unsigned blocks, unsigned threads, auto... arguments) {
    launch("test", kernel, blocks, threads, 0, nullptr, arguments...);
  };
  try {
    if (which == "barrier_at_two_places")
      run(barrier_at_two_places, 1, 64, out);
    else if (which == "barrier_not_reached")
      run(barrier_not_reached, 1, 64, out);
    else if (which == "shuffle_in_a_branch")
      run(shuffle_in_a_branch, 1, 32, out);
    else if (which == "two_collectives")
      run(two_collectives, 1, 32, out);
    else if (which == "lane_not_in_mask")
      run(lane_not_in_mask, 1, 32, out);
    else if (which == "too_much_shared")
      run(too_much_shared, 1, 32, out);
    else if (which == "misaligned_copy")
      run(misaligned_copy, 1, 32, in);
    else if (which == "misaligned_matrix")
      run(misaligned_matrix, 1, 32, out);
    else if (which == "not_shared")
      run(not_shared, 1, 32, out);
    else if (which == "empty_grid")
      run(stack_of_global, 0, 32, out);
    else if (which == "too_many_threads")
      run(stack_of_global, 1, 1025, out);
    else if (which == "stack_overrun")
      run(endless_recursion, 1, 32, out);
    else if (which == "unwritten_shared")
      run(unwritten_shared, 1, 32, out), printf("%g %g\n", out[30], out[31]);
    else if (which == "copy_without_wait")
      run(copy_and_read<false>, 1, 32, in, out), printf("%g\n", out[3]);
    else if (which == "copy")
      run(copy_and_read<true>, 1, 32, in, out), printf("%g %g %g\n", difference(0, 126, 1, 0), out[126], out[127]);
    else if (which == "copy_over_what_is_read")
      run(copy_over_what_is_read, 1, 32, in, out), printf("%g\n", out[0]);
    else if (which == "order_dependent")
      run(order_dependent, 1, 64, out), printf("%g\n", out[0]);
    else if (which == "race_in_shared")
      run(race_in_shared, 1, 64, out);
    else if (which == "race_between_blocks")
      run(race_between_blocks, 2, 32, out);
    else if (which == "race_with_a_copy")
      run(race_with_a_copy, 1, 32, in, out);
    else if (which == "overrun_of_shared")
      run(overrun_of_shared, 1, 32, out);
    else if (which == "overrun_of_global")
      run(overrun_of_global, 1, 32, small);
    else if (which == "no_race")
      run(no_race, 3, 32, in, out), run(no_race, 3, 32, in, out), printf("%g\n", out[0]);
    else if (which == "products")
      printf("%g %g %g %g\n", product_error<bf16, false>(), product_error<fp16, false>(), product_error<bf16, true>(),
             product_error<fp16, true>());
    else if (which == "collectives") {
      uint32_t good[32];
      unsigned sum = 0;
      run(collectives, 1, 32, good);
      for (const uint32_t g : good) sum += g;
      printf("%u\n", sum);
    } else if (which == "conflicts") {
      run(conflicts<false>, 1, 32, out);
      printf("%g %g ", static_cast<double>(emulator::counts.ldmatrix_phases) / static_cast<double>(emulator::counts.ldmatrix),
             static_cast<double>(emulator::counts.vector_phases) / static_cast<double>(emulator::counts.vectors));
      emulator::counts = {};
      run(conflicts<true>, 1, 32, out);
      printf("%g %g\n", static_cast<double>(emulator::counts.ldmatrix_phases) / static_cast<double>(emulator::counts.ldmatrix),
             static_cast<double>(emulator::counts.vector_phases) / static_cast<double>(emulator::counts.vectors));
    } else if (which == "turns") {
      int turn = 0, order[8] = {};
      options.resident = 8;
      run(turns, 8, 32, &turn, order);
      printf("%d %d %d\n", turn, order[0], order[7]);
    } else if (which == "exit_before_a_barrier")
      run(exit_before_a_barrier, 1, 64, out), printf("%g\n", out[31]);
    else if (which == "halves")
      printf("%d\n", half_roundings());
    else
      return fprintf(stderr, "no case %s\n", which.c_str()), 2;
    printf("done\n");
  } catch (const std::exception& error) {
    printf("fault: %s\n", error.what());
  }
  free(in);
  free(small);
}
