// The products of gemm.h by sm_90a's instructions. Each says whether it serves: it does on a device of that kind, for bf16 and fp16 in
// memory that tensor copies can read; else nothing has happened, and the products of sm_80 take its place.
#pragma once

#include "gemm.h"

namespace cmoe::cuda {

bool grouped_gemm_sm90(const char* operation, const GroupedGemm& p, Stream stream);
bool dact_gemm_sm90(const char* operation, const DactGemm& p, Stream stream);
bool wgrad_sm90(const char* operation, const Wgrad& p, Stream stream);
// Partials per row that dact_gemm_sm90 leaves; 0 where it does not serve.
int64_t dact_partials_sm90(const DactGemm& p);

}  // namespace cmoe::cuda
