// The backward product whose epilogue holds all that follows from dh = dy W: du, the hidden units weighted for dW, and the gradient of the
// weight itself, of which every tile leaves the sum over its columns. They are added later, in a fixed order; expert outputs never exist.

#include "gemm_epilogue.cuh"
#include "gemm_sm90.h"

namespace cmoe::cuda {

namespace {

RowArguments arguments(const HiddenProduct& p) { return {p.groups, p.width, p.depth, 0, false, false, p.dy, p.w, false, false}; }

}  // namespace

void hidden_product(const char* operation, const HiddenProduct& p, Stream stream) {
  if (hidden_product_sm90(operation, p, stream)) return;
  run_rows<HiddenEpilogue>(operation, p.type, arguments(p), p, stream);
}

int64_t hidden_parts(const HiddenProduct& p) {
  if (const int64_t parts = hidden_parts_sm90(p)) return parts;
  const bool large = RowLoads(p.type, arguments(p)).how == Load::async && takes_large_tiles(p.groups, p.width);
  const int64_t wide = large ? LargeTile::n : SmallTile::n;
  static_assert(SmallTile::n == ElementTile::n);
  return (p.width + wide - 1) / wide;
}

}  // namespace cmoe::cuda
