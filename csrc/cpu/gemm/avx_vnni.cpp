// AVX2 with the int8 products of AVX-VNNI.

#include "avx2.h"
#include "vnni.h"

namespace {

constexpr Microkernel i8 = vnni_microkernel<5>;  // 10 registers of sums, 2 of weights, 2 of their sums, 1 of activations: 16 there are

}  // namespace

namespace cmoe::cpu {

const Isa isa_avx_vnni = {"avx_vnni",      &f32, nullptr,  &f32_small_m, &widened_small_m, &row_functions, convert,
                          transpose_plain, &w8,  &w8_wide, &i8};

}  // namespace cmoe::cpu
