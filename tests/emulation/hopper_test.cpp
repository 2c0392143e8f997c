// What the emulator must compute and report of sm_90a's instructions: one small kernel for each.
//
//     hopper_test CASE [forward|reverse|shuffled] [eager|early]      prints what came of it

#include <cstdio>
#include <string>

#include "device/hopper.h"
#include "device/launch.h"

using namespace cmoe::cuda;
using emulator::options;

namespace {

constexpr int tile_bytes = 64 * 128;  // 64 rows of 64 elements
alignas(16) bf16 a_host[256 * 256], b_host[256 * 256];
float results[64 * 256 + 1024];

float small_integer(int i, int j, int salt) { return static_cast<float>((i * 7 + j * 3 + salt + i * j) % 9 - 4); }

template <class T>
void fill(T* to, int rows, int columns, int salt) {
  for (int i = 0; i < rows; ++i)
    for (int j = 0; j < columns; ++j) to[i * columns + j] = from_float<T>(small_integer(i, j, salt));
}
TensorView view(const void* data, int inner, int rows, int matrices = 1) {
  return {data, inner, rows, matrices, inner, int64_t{inner} * rows};
}

// --- products: d [64, N] = a [64, 64] b [N, 64]^T; an operand whose major is mn lies in memory as [64 of k, 64 or N]
template <class T, int N, Major A, Major B>
__global__ void product(const __grid_constant__ TensorMap a, const __grid_constant__ TensorMap b, float* out, bool waits, bool fences) {
  CU_DYNAMIC_SHARED(memory);
  CU_SHARED(uint64_t, barriers, 1);
  const SharedAddress tile_a = shared_address(memory), tile_b = tile_a + tile_bytes, full = shared_address(barriers);
  if (threadIdx.x == 0) {
    mbarrier_init(full, 1);
    fence_mbarrier_init();
    mbarrier_arrive_expect(full, tile_bytes + N * 128);
    tma_load(tile_a, a, full, 0, 0, 0);
    if (B == Major::k)
      tma_load(tile_b, b, full, 0, 0, 0);
    else
      for (int n = 0; n < N; n += 64) tma_load(tile_b + n * 128, b, full, n, 0, 0);
  }
  __syncthreads();
  mbarrier_wait(full, 0);
  float d[N / 2] = {};
  if (fences) wgmma_fence();
  for (int k = 0; k < 4; ++k)
    wgmma<T, N, A, B>(d, descriptor(tile_a, A == Major::k ? 16 : tile_bytes) + k * (A == Major::k ? k16_along_k : k16_along_mn),
                      descriptor(tile_b, B == Major::k ? 16 : tile_bytes) + k * (B == Major::k ? k16_along_k : k16_along_mn));
  wgmma_commit();
  if (waits) wgmma_wait<0>();
  for (int i = 0; i < N / 2; ++i) out[emulator::fragment_row(threadIdx.x, i) * N + emulator::fragment_column(threadIdx.x, i)] = d[i];
  if (!waits) wgmma_wait<0>();
}

template <class T, int N, Major A, Major B>
float product_error(bool waits = true, bool fences = true) {
  T* const a = reinterpret_cast<T*>(a_host);
  T* const b = reinterpret_cast<T*>(b_host);
  A == Major::k ? fill(a, 64, 64, 1) : fill(a, 64, 64, 2);
  B == Major::k ? fill(b, N, 64, 3) : fill(b, 64, N, 4);
  const TensorMap map_a = tensor_map(view(a, 64, 64), 64),
                  map_b = B == Major::k ? tensor_map(view(b, 64, N), N) : tensor_map(view(b, N, 64), 64);
  launch("test", product<T, N, A, B>, 1, 128, tile_bytes + N * 128, nullptr, map_a, map_b, results, waits, fences);
  float worst = 0;
  for (int m = 0; m < 64; ++m)
    for (int n = 0; n < N; ++n) {
      float sum = 0;
      for (int k = 0; k < 64; ++k)
        sum += to_float(A == Major::k ? a[m * 64 + k] : a[k * 64 + m]) * to_float(B == Major::k ? b[n * 64 + k] : b[k * N + n]);
      worst = std::max(worst, std::fabs(sum - results[m * N + n]));
    }
  return worst;
}
template <class T, int N>
float product_errors() {
  return product_error<T, N, Major::k, Major::k>() + product_error<T, N, Major::k, Major::mn>() +
         product_error<T, N, Major::mn, Major::k>() + product_error<T, N, Major::mn, Major::mn>();
}

// --- copies: a box of [64, 64] at these coordinates of a [2, 100, 72], moved to the same place of another
__global__ void through_shared(const __grid_constant__ TensorMap from, const __grid_constant__ TensorMap to, int c0, int c1, int c2,
                               bool waits) {
  CU_DYNAMIC_SHARED(memory);
  CU_SHARED(uint64_t, barriers, 1);
  const SharedAddress tile = shared_address(memory), full = shared_address(barriers);
  if (threadIdx.x != 0) return;
  mbarrier_init(full, 1);
  fence_mbarrier_init();
  mbarrier_arrive_expect(full, tile_bytes);
  tma_load(tile, from, full, c0, c1, c2);
  mbarrier_wait(full, 0);
  tma_store(to, tile, c0, c1, c2);
  tma_store_commit();
  if (waits) tma_store_wait<0>();
}
int moved(int c0, int c1, int c2, bool waits = true) {
  fill(a_host, 200, 72, 5);
  for (bf16& x : b_host) x = from_float<bf16>(77);
  launch("test", through_shared, 1, 32, tile_bytes, nullptr, tensor_map(view(a_host, 72, 100, 2), 64),
         tensor_map(view(b_host, 72, 100, 2), 64), c0, c1, c2, waits);
  int wrong = 0;
  for (int matrix = 0; matrix < 2; ++matrix)
    for (int r = 0; r < 100; ++r)
      for (int c = 0; c < 72; ++c) {
        const bool inside = matrix == c2 && r >= c1 && r < c1 + 64 && c >= c0 && c < c0 + 64;
        const int i = (matrix * 100 + r) * 72 + c;
        wrong += to_float(b_host[i]) != (inside ? to_float(a_host[i]) : 77);
      }
  return wrong;
}

// What lies outside of the tensor is zeros in the tile.
__global__ void outside(const __grid_constant__ TensorMap from, float* out) {
  CU_DYNAMIC_SHARED(memory);
  CU_SHARED(uint64_t, barriers, 1);
  const SharedAddress tile = shared_address(memory), full = shared_address(barriers);
  if (threadIdx.x == 0) {
    mbarrier_init(full, 1);
    mbarrier_arrive_expect(full, tile_bytes);
    tma_load(tile, from, full, 40, 50, 0);
  }
  __syncthreads();
  mbarrier_wait(full, 0);
  for (int c = 0; c < 64; ++c)
    out[threadIdx.x * 64 + c] = to_float(*reinterpret_cast<const bf16*>(memory + emulator::swizzled(threadIdx.x * 128 + c * 2)));
}

// --- a ring of two stages: one thread copies, a warpgroup multiplies with the identity and hands the stage back
template <bool takes_turns, bool counts_bytes, bool flips>
__global__ void ring(const __grid_constant__ TensorMap rows, const __grid_constant__ TensorMap identity, float* out, int steps) {
  CU_DYNAMIC_SHARED(memory);
  CU_SHARED(uint64_t, barriers, 5);
  const SharedAddress tiles = shared_address(memory), one = tiles + 2 * tile_bytes, full = shared_address(barriers), empty = full + 16,
                      ready = full + 32;
  if (threadIdx.x == 0) {
    for (int s = 0; s < 2; ++s) mbarrier_init(full + 8 * s, 1), mbarrier_init(empty + 8 * s, 128);
    mbarrier_init(ready, 1);
    fence_mbarrier_init();
  }
  __syncthreads();
  if (threadIdx.x >= 128) {
    if (threadIdx.x != 128) return;
    mbarrier_arrive_expect(ready, tile_bytes);
    tma_load(one, identity, ready, 0, 0, 0);
    for (int t = 0; t < steps; ++t) {
      const int s = t % 2;
      if (takes_turns && t >= 2) mbarrier_wait(empty + 8 * s, (t / 2 - 1) & 1);
      mbarrier_arrive_expect(full + 8 * s, counts_bytes ? tile_bytes : tile_bytes - 128);
      tma_load(tiles + s * tile_bytes, rows, full + 8 * s, 0, 64 * t, 0);
    }
    return;
  }
  mbarrier_wait(ready, 0);
  float d[32] = {};
  for (int t = 0; t < steps; ++t) {
    const int s = t % 2;
    mbarrier_wait(full + 8 * s, flips ? t / 2 & 1 : 0);
    wgmma_fence();
    for (int k = 0; k < 4; ++k)
      wgmma<bf16, 64, Major::k, Major::k>(d, descriptor(tiles + s * tile_bytes) + k * k16_along_k, descriptor(one) + k * k16_along_k);
    wgmma_commit();
    wgmma_wait<0>();
    mbarrier_arrive(empty + 8 * s);
  }
  for (int i = 0; i < 32; ++i) out[emulator::fragment_row(threadIdx.x, i) * 64 + emulator::fragment_column(threadIdx.x, i)] = d[i];
}
template <bool takes_turns, bool counts_bytes, bool flips>
int ring_errors() {
  fill(a_host, 256, 64, 6);
  for (int i = 0; i < 64 * 64; ++i) b_host[i] = from_float<bf16>(i % 65 == 0);
  launch("test", ring<takes_turns, counts_bytes, flips>, 1, 160, 3 * tile_bytes, nullptr, tensor_map(view(a_host, 64, 256), 64),
         tensor_map(view(b_host, 64, 64), 64), results, 4);
  int wrong = 0;
  for (int i = 0; i < 64 * 64; ++i)
    wrong += results[i] != to_float(a_host[i]) + to_float(a_host[i + 4096]) + to_float(a_host[i + 8192]) + to_float(a_host[i + 12288]);
  return wrong;
}

// The stage is handed back before its products are done.
__global__ void early_hand_back(const __grid_constant__ TensorMap rows, const __grid_constant__ TensorMap identity, float* out) {
  CU_DYNAMIC_SHARED(memory);
  CU_SHARED(uint64_t, barriers, 2);
  const SharedAddress tile = shared_address(memory), one = tile + tile_bytes, full = shared_address(barriers);
  if (threadIdx.x == 0) {
    mbarrier_init(full, 1);
    mbarrier_arrive_expect(full, 2 * tile_bytes);
    tma_load(tile, rows, full, 0, 0, 0);
    tma_load(one, identity, full, 0, 0, 0);
  }
  __syncthreads();
  mbarrier_wait(full, 0);
  float d[32] = {};
  wgmma_fence();
  wgmma<bf16, 64, Major::k, Major::k>(d, descriptor(tile), descriptor(one));
  wgmma_commit();
  if (threadIdx.x == 0) {
    mbarrier_arrive_expect(full, tile_bytes);
    tma_load(tile, rows, full, 0, 64, 0);
  }
  wgmma_wait<0>();
  mbarrier_wait(full, 1);
  out[threadIdx.x] = d[0];
}

// --- rows gathered by threads, whose arrivals wait for their copies
template <bool arrives_late>
__global__ void gathered(const bf16* rows, float* out) {
  CU_DYNAMIC_SHARED(memory);
  CU_SHARED(uint64_t, barriers, 1);
  const SharedAddress full = shared_address(barriers);
  if (threadIdx.x == 0) mbarrier_init(full, 32);
  __syncthreads();
  cp_async_16(shared_address(memory) + threadIdx.x * 16, rows + (31 - threadIdx.x) * 8, 16);
  if (arrives_late)
    cp_async_mbarrier_arrive(full);
  else
    mbarrier_arrive(full);
  mbarrier_wait(full, 0);
  fence_async_proxy();
  out[threadIdx.x] = to_float(*reinterpret_cast<const bf16*>(memory + (31 - threadIdx.x) * 16));
}

// Warp 0 arrives and goes on; warp 1 waits for what it has written.
__global__ void handed_over(float* out) {
  CU_SHARED(float, values, 32);
  if (threadIdx.x < 32) {
    values[threadIdx.x] = 3;
    barrier_arrive(1, 64);
  } else {
    barrier_sync(1, 64);
    out[threadIdx.x - 32] = values[63 - threadIdx.x];
  }
}

// --- faults
__global__ void not_initialised() { mbarrier_wait(shared_address(emulator::block().shared), 0); }
__global__ void too_many_arrivals() {
  CU_SHARED(uint64_t, barriers, 1);
  const SharedAddress at = shared_address(barriers);
  if (threadIdx.x == 0) {
    mbarrier_init(at, 2);
    mbarrier_arrive_expect(at, 16);
    mbarrier_arrive(at);
    mbarrier_arrive(at);
  }
}
__global__ void misaligned_tile(const __grid_constant__ TensorMap map) {
  CU_DYNAMIC_SHARED(memory);
  CU_SHARED(uint64_t, barriers, 1);
  mbarrier_init(shared_address(barriers), 1);
  tma_load(shared_address(memory) + 128, map, shared_address(barriers), 0, 0, 0);
}
__global__ void different_operands() {
  float d[32] = {};
  wgmma_fence();
  wgmma<bf16, 64, Major::k, Major::k>(d, descriptor(threadIdx.x < 64 ? 0 : 1024), descriptor(0));
}
__global__ void half_a_warpgroup() { wgmma_fence(); }
__global__ void parted_warpgroup() {
  if (threadIdx.x < 64)
    wgmma_fence();
  else
    wgmma_commit();
}
__global__ void too_many_registers() {
  if (threadIdx.x < 128)
    more_registers<256>();
  else if (threadIdx.x < 256)
    more_registers<240>();
  else
    more_registers<24>();
}

}  // namespace

int main(int count, char** arguments) {
  const std::string which = count > 1 ? arguments[1] : "";
  for (int i = 2; i < count; ++i) {
    const std::string option = arguments[i];
    if (option == "reverse") options.order = emulator::Order::reverse;
    if (option == "shuffled") options.order = emulator::Order::shuffled;
    if (option == "eager") options.lazy = false;
    if (option == "early") options.early_copies = true;
  }
  const auto run = [&](auto kernel, unsigned threads, auto... arguments) {
    launch("test", kernel, 1, threads, 2 * tile_bytes, nullptr, arguments...);
  };
  float* const out = results;
  fill(a_host, 256, 64, 7);
  const TensorMap map = tensor_map(view(a_host, 64, 256), 64);
  try {
#if !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
    if (which == "products")
      printf("%g %g %g %g %g %g\n", product_errors<bf16, 64>(), product_errors<bf16, 128>(), product_errors<bf16, 256>(),
             product_errors<fp16, 64>(), product_errors<fp16, 128>(), product_errors<fp16, 256>());
    else
#endif
        if (which == "product_without_wait")
      printf("%d\n", product_error<bf16, 64, Major::k, Major::k>(false) > 0);
    else if (which == "product_without_fence")
      product_error<bf16, 64, Major::k, Major::k>(true, false);
    else if (which == "copies")
      printf("%d %d %d %d\n", moved(0, 0, 0), moved(8, 36, 1), moved(64, 80, 0), moved(-16, -5, 1));
    else if (which == "store_without_wait")
      printf("%d\n", moved(0, 0, 0, false));
    else if (which == "outside") {
      fill(a_host, 100, 72, 5);
      run(outside, 64, tensor_map(view(a_host, 72, 100), 64), out);
      int wrong = 0;
      for (int r = 0; r < 64; ++r)
        for (int c = 0; c < 64; ++c) wrong += out[r * 64 + c] != (r < 50 && c < 32 ? to_float(a_host[(50 + r) * 72 + 40 + c]) : 0);
      printf("%d\n", wrong);
    } else if (which == "ring")
      printf("%d\n", ring_errors<true, true, true>());
    else if (which == "ring_without_turns")
      printf("%d\n", ring_errors<false, true, true>());
    else if (which == "ring_of_wrong_bytes")
      ring_errors<true, false, true>();
    else if (which == "ring_of_one_phase")
      printf("%d\n", ring_errors<true, true, false>() > 0);
    else if (which == "early_hand_back") {
      for (int i = 0; i < 64 * 64; ++i) b_host[i] = from_float<bf16>(i % 65 == 0);
      run(early_hand_back, 128, map, tensor_map(view(b_host, 64, 64), 64), out);
      int wrong = 0;
      for (int t = 0; t < 128; ++t)
        wrong += emulator::fragment_column(t, 0) < 16 &&
                 out[t] != to_float(a_host[emulator::fragment_row(t, 0) * 64 + emulator::fragment_column(t, 0)]);
      printf("%d\n", wrong > 0);
    } else if (which == "gathered" || which == "gathered_too_soon") {
      which == "gathered" ? run(gathered<true>, 32, a_host, out) : run(gathered<false>, 32, a_host, out);
      int wrong = 0;
      for (int t = 0; t < 32; ++t) wrong += out[t] != to_float(a_host[t * 8]);
      printf("%d\n", wrong > 0);
    } else if (which == "handed_over")
      run(handed_over, 64, out), printf("%g %g\n", out[0], out[31]);
    else if (which == "not_initialised")
      run(not_initialised, 32);
    else if (which == "too_many_arrivals")
      run(too_many_arrivals, 32);
    else if (which == "misaligned_tile")
      run(misaligned_tile, 32, map);
    else if (which == "different_operands")
      run(different_operands, 128);
    else if (which == "half_a_warpgroup")
      run(half_a_warpgroup, 64);
    else if (which == "parted_warpgroup")
      run(parted_warpgroup, 128);
    else if (which == "too_many_registers")
      run(too_many_registers, 384);
    else if (which == "misaligned_map")
      tensor_map(view(a_host + 1, 64, 64), 64);
    else if (which == "map_of_odd_rows")
      tensor_map(view(a_host, 60, 64), 64);
    else
      return fprintf(stderr, "no case %s\n", which.c_str()), 2;
    printf("done\n");
  } catch (const std::exception& error) {
    printf("fault: %s\n", error.what());
  }
}
