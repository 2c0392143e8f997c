// The backward product whose epilogue holds du, the weighted hidden units and the gradient of the weights, on sm_90a.

#include "sm90.cuh"
#include "sm90.h"

namespace cmoe::cuda {

namespace {

RowArguments arguments(const DactGemm& p) { return {p.groups, p.width, p.depth, 0, false, false, p.dy, p.w, false, false}; }

}  // namespace

bool dact_gemm_sm90(const char* operation, const DactGemm& p, Stream stream) {
  return run_rows_sm90<DactEpilogue>(operation, p.type, arguments(p), p, stream);
}

int64_t dact_partials_sm90(const DactGemm& p) { return partials_sm90<DactEpilogue>(p.type, arguments(p)); }

}  // namespace cmoe::cuda
