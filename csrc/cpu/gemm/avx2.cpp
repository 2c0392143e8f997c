// AVX2 with FMA and F16C.

#include "avx2.h"

namespace cmoe::cpu {

const Isa isa_avx2 = {"avx2",          &f32, nullptr,  &f32_small_m, &widened_small_m, &row_functions, convert,
                      transpose_plain, &w8,  &w8_wide, nullptr};

}  // namespace cmoe::cpu
