// AVX-512 with VDPBF16PS and VPDPBUSD: processors that have the one have the other.

#include "bf16_panels.h"
#include "vnni.h"

namespace {

constexpr Microkernel i8 = vnni_microkernel<12>, w8_few = fixed_microkernel<4>;

}  // namespace

namespace cmoe::cpu {

const Isa isa_avx512_bf16 = {"avx512_bf16",    &f32, &bf16_pairs, &f32_small_m, &bf16_small_m, &row_functions, convert,
                             transpose_avx512, &w8,  &w8_wide,    &i8,          &w8_few};

}  // namespace cmoe::cpu
