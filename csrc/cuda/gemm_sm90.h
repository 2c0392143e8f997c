// The products of gemm.h by sm_90a's instructions. Each says whether it serves: it does on a device of that kind, for bf16 and fp16 in
// memory that tensor copies can read; else nothing has happened, and the products of sm_80 take its place.
#pragma once

#include "gemm.h"

namespace cmoe::cuda {

bool row_product_sm90(const char* operation, const RowProduct& p, Stream stream);
bool hidden_product_sm90(const char* operation, const HiddenProduct& p, Stream stream);
bool weight_product_sm90(const char* operation, const WeightProduct& p, Stream stream);
// How many parts hidden_product_sm90 cuts the columns into; 0 where it does not serve.
int64_t hidden_parts_sm90(const HiddenProduct& p);

}  // namespace cmoe::cuda
