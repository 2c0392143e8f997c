// AVX-512 with VPDPBUSD, and without bf16 instructions.

#include "avx512.h"
#include "vnni.h"

namespace {

constexpr Microkernel i8 = vnni_microkernel<12>, w8_few = fixed_microkernel<4>;

}  // namespace

namespace cmoe::cpu {

const Isa isa_avx512_vnni = {"avx512_vnni",    &f32, nullptr,  &f32_small_m, &widened_small_m, &row_functions, convert,
                             transpose_avx512, &w8,  &w8_wide, &i8,          &w8_few};

}  // namespace cmoe::cpu
