// Forward products of expert layers, and dx, on sm_90a.

#include "sm90.cuh"
#include "sm90.h"

namespace cmoe::cuda {

bool grouped_gemm_sm90(const char* operation, const GroupedGemm& p, Stream stream) {
  return run_rows_sm90<ForwardEpilogue>(operation, p.type, {p.groups, p.width, p.depth, 0, p.sum, p.gated, p.x, p.w, false, false}, p,
                                        stream);
}

}  // namespace cmoe::cuda
