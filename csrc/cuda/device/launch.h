// Launches a kernel on a stream and reports what the launch itself says. Nothing here waits for the GPU.
#pragma once

#include <stdexcept>
#include <string>

#include "stream.h"
#include "types.h"

namespace cmoe::cuda {

#ifdef CMOE_EMULATE_CUDA

inline int multiprocessors() { return emulator::options.multiprocessors; }

template <class... Parameters, class... Arguments>
void launch(const char* operation, void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared, Stream, Arguments... arguments) {
  try {
    emulator::launch({grid.x, grid.y, grid.z}, {block.x, block.y, block.z}, shared, [&] { kernel(static_cast<Parameters>(arguments)...); });
  } catch (const emulator::Fault& fault) {
    throw std::runtime_error(std::string(operation) + ": " + fault.what());
  }
}

#else

inline void check(const char* operation, cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error(std::string(operation) + ": " + cudaGetErrorString(error));
}

// Of the current device, by which persistent kernels choose their grid.
inline int multiprocessors() {
  int device = 0, count = 0;
  check("multiprocessors", cudaGetDevice(&device));
  check("multiprocessors", cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device));
  return count;
}

template <class... Parameters, class... Arguments>
void launch(const char* operation, void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared, Stream stream,
            Arguments... arguments) {
  // Beyond 48 KiB a kernel must be allowed what it asks for, on each device.
  if (shared > 48 << 10)
    check(operation, cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared)));
  // clang-format off
  kernel<<<grid, block, shared, static_cast<cudaStream_t>(stream)>>>(static_cast<Parameters>(arguments)...);
  // clang-format on
  check(operation, cudaGetLastError());
}

#endif

}  // namespace cmoe::cuda
