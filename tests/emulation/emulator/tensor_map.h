// Maps of tensors as plain numbers, refused where the driver refuses them.
#pragma once

#include "block.h"

namespace cmoe::cuda {

struct TensorMap {
  TensorView view;
  int box_rows;
};

inline TensorMap tensor_map(const TensorView& view, int box_rows) {
  if (!can_map(view)) throw std::runtime_error("cuTensorMapEncodeTiled: sizes, strides or alignment that it refuses");
  if (box_rows < 1 || box_rows > 256) throw std::runtime_error("cuTensorMapEncodeTiled: a box of " + std::to_string(box_rows) + " rows");
  return {view, box_rows};
}

}  // namespace cmoe::cuda
