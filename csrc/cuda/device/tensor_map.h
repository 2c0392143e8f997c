// Maps of tensors in global memory, by which the copies of sm_90a find them: [matrices, rows, inner] of 2-byte elements, read and written
// in boxes of 64 inner elements by some rows of one matrix, swizzled to where 128-byte rows of shared memory have no bank conflicts.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

#ifndef CMOE_EMULATE_CUDA
#include <cuda.h>
#include <cuda_runtime_api.h>
#endif

namespace cmoe::cuda {

// Strides in elements; inner elements lie next to each other.
struct TensorView {
  const void* data;
  int64_t inner, rows, matrices, row_stride, matrix_stride;
};
constexpr int box_inner = 64;

// A map's strides grow with its dimensions, so where rows of different matrices alternate the coordinates are (inner, matrix, row).
inline bool alternates(const TensorView& t) { return t.matrices > 1 && t.matrix_stride < t.row_stride; }

// What the hardware asks of a mapped tensor ("cuTensorMapEncodeTiled"): others are read by threads.
inline bool can_map(const TensorView& t) {
  constexpr int64_t per_16_bytes = 8, most = int64_t{1} << 31, farthest = int64_t{1} << 39;
  const bool rows_first = !alternates(t);
  const int64_t near = rows_first ? t.row_stride : t.matrix_stride, nears = rows_first ? t.rows : t.matrices;
  const int64_t far = t.matrices == 1 ? near * nears : rows_first ? t.matrix_stride : t.row_stride;
  const bool aligned = reinterpret_cast<uintptr_t>(t.data) % 16 == 0 && near % per_16_bytes == 0 && far % per_16_bytes == 0;
  const bool sized = t.inner > 0 && t.rows > 0 && t.matrices > 0 && t.inner < most && t.rows < most && t.matrices < most;
  return aligned && sized && near >= t.inner && far >= near * nears && far % near == 0 && far < farthest;
}

}  // namespace cmoe::cuda

#ifdef CMOE_EMULATE_CUDA
#include "emulator/tensor_map.h"
#else

namespace cmoe::cuda {

using TensorMap = CUtensorMap;

// Asked of the driver that is there at run time: nothing links libcuda.
inline auto tensor_map_encoder() {
  static const auto encode = [] {
    void* f = nullptr;
    cudaDriverEntryPointQueryResult found = cudaDriverEntryPointSymbolNotFound;
#if CUDART_VERSION >= 12050
    const cudaError_t error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &f, 12000, cudaEnableDefault, &found);
#else
    const cudaError_t error = cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &f, cudaEnableDefault, &found);
#endif
    if (error != cudaSuccess || found != cudaDriverEntryPointSuccess)
      throw std::runtime_error("the CUDA driver has no cuTensorMapEncodeTiled: it is older than 12.0");
    return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(f);
  }();
  return encode;
}

inline TensorMap tensor_map(const TensorView& t, int box_rows) {
  const int row = alternates(t) ? 2 : 1, matrix = 3 - row;
  cuuint64_t sizes[] = {cuuint64_t(t.inner), 0, 0}, strides[2];
  cuuint32_t box[] = {box_inner, 1, 1}, steps[] = {1, 1, 1};
  sizes[row] = cuuint64_t(t.rows), sizes[matrix] = cuuint64_t(t.matrices), box[row] = cuuint32_t(box_rows);
  strides[row - 1] = cuuint64_t(t.row_stride) * 2,
                strides[matrix - 1] = cuuint64_t(t.matrices == 1 ? t.row_stride * t.rows : t.matrix_stride) * 2;
  TensorMap map;
  // Any 2-byte type: elements are moved, and what lies outside is zero in all of them.
  const CUresult error = tensor_map_encoder()(&map, CU_TENSOR_MAP_DATA_TYPE_UINT16, 3, const_cast<void*>(t.data), sizes, strides, box,
                                              steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                                              CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (error != CUDA_SUCCESS) throw std::runtime_error("cuTensorMapEncodeTiled failed with error " + std::to_string(error));
  return map;
}

}  // namespace cmoe::cuda

#endif
