// AVX-512 with VDPBF16PS.

#include "bf16_panels.h"

namespace cmoe::cpu {

const Isa isa_avx512_bf16 = {"avx512_bf16", &f32, &bf16_pairs, &f32_small_m, &bf16_small_m, &row_functions, convert, transpose_avx512};

}  // namespace cmoe::cpu
