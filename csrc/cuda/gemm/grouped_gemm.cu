// Forward products of expert layers, and dx, which is one with the weights transposed.

#include "epilogue.cuh"
#include "sm90.h"

namespace cmoe::cuda {

void grouped_gemm(const char* operation, const GroupedGemm& p, Stream stream) {
  if (grouped_gemm_sm90(operation, p, stream)) return;
  run_rows<ForwardEpilogue>(operation, p.type, {p.groups, p.width, p.depth, 0, p.sum, p.gated, p.x, p.w, false, false}, p, stream);
}

}  // namespace cmoe::cuda
