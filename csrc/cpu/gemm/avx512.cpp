// AVX-512 without bf16 instructions: bf16 runs as fp32, converted while it is packed, or at few tokens as it is read.

#include "avx512.h"

namespace cmoe::cpu {

const Isa isa_avx512 = {"avx512",         &f32, nullptr,  &f32_small_m, &widened_small_m, &row_functions, convert,
                        transpose_avx512, &w8,  &w8_wide, nullptr};

}  // namespace cmoe::cpu
