// dgrad GEMM dh = dy W with a fused epilogue: du, the weighted hidden for wgrad, and per-tile partials of the routing weight's gradient,
// which are added later in a fixed order. Expert outputs never exist.

#include "epilogue.cuh"
#include "sm90.h"

namespace cmoe::cuda {

namespace {

RowArguments arguments(const DactGemm& p) { return {p.groups, p.width, p.depth, 0, false, false, p.dy, p.w, false, false}; }

}  // namespace

void dact_gemm(const char* operation, const DactGemm& p, Stream stream) {
  if (dact_gemm_sm90(operation, p, stream)) return;
  run_rows<DactEpilogue>(operation, p.type, arguments(p), p, stream);
}

int64_t dact_partials(const DactGemm& p) {
  if (const int64_t partials = dact_partials_sm90(p)) return partials;
  const bool large = RowLoads(p.type, arguments(p)).how == Load::async && takes_large_tiles(p.groups, p.width);
  const int64_t wide = large ? LargeTile::n : SmallTile::n;
  static_assert(SmallTile::n == ElementTile::n);
  return (p.width + wide - 1) / wide;
}

}  // namespace cmoe::cuda
