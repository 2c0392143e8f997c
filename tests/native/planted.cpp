// An instruction set with a fault: SOUND is its table as the library has it, PLANTED the name by which dispatch.cpp knows it. The
// environment chooses the fault, CMOE_PLANTED, and names a file that is made when the fault is reached, CMOE_PLANTED_REACHED.

#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <type_traits>

#include "gemm/isa.h"

namespace cmoe::cpu {

extern const Isa SOUND;

namespace {

bool is(const char* fault) {
  const char* const planted = std::getenv("CMOE_PLANTED");
  return planted && std::strcmp(planted, fault) == 0;
}

void reached() {
  if (const char* const name = std::getenv("CMOE_PLANTED_REACHED"))
    if (std::FILE* const file = std::fopen(name, "w")) std::fclose(file);
}

void multiply(const void* a, int64_t a_stride, const void* b, void* block, int64_t k, int used, bool add, const Prefetch& prefetch) {
  SOUND.f32->multiply[1](a, a_stride, b, block, k, used, add, prefetch);
  if (is("wrong")) static_cast<float*>(block)[0] += 1;
  if (is("illegal instruction")) __builtin_trap();
  if (is("illegal access")) *static_cast<volatile int*>(nullptr) = 1;
  if (is("long")) reached(), sleep(60);
}

void multiply_wide(const void* a, int64_t a_stride, const void* b, void* block, int64_t k, int used, bool add, const Prefetch& prefetch) {
  SOUND.w8_wide->multiply[1](a, a_stride, b, block, k, used, add, prefetch);
  if (is("wrong wide weights")) static_cast<float*>(block)[0] += 1;
}

void multiply_few(const void* a, int64_t a_stride, const void* b, void* block, int64_t k, int used, bool add, const Prefetch& prefetch) {
  SOUND.w8_few->multiply[1](a, a_stride, b, block, k, used, add, prefetch);
  if (is("wrong few rows")) static_cast<float*>(block)[0] += 1;
}

template <bool i8>
void multiply_int8(const void* a, int64_t a_stride, const void* b, void* block, int64_t k, int used, bool add, const Prefetch& prefetch) {
  (i8 ? SOUND.i8 : SOUND.w8)->multiply[1](a, a_stride, b, block, k, used, add, prefetch);
  if (is(i8 ? "wrong int8" : "wrong int8 weights")) static_cast<std::conditional_t<i8, int32_t, float>*>(block)[0] += 1;
}

void activate(Activation f, const float* u, float* h, int64_t n) {
  SOUND.rows->activate(f, u, h, n);
  if (is("activation") && n > 0) h[n - 1] *= 1.0001f;
}

Microkernel planted_in(const Microkernel* sound, std::remove_reference_t<decltype(Microkernel::multiply[0])> multiply_) {
  Microkernel kernel = *(sound ? sound : SOUND.f32);
  kernel.multiply[0] = kernel.multiply[1] = multiply_;
  return kernel;
}
RowFunctions<float> functions() {
  RowFunctions<float> rows = *SOUND.rows;
  rows.activate = activate;
  return rows;
}

const Microkernel kernel = planted_in(SOUND.f32, multiply), w8 = planted_in(SOUND.w8, multiply_int8<false>),
                  w8_wide = planted_in(SOUND.w8_wide, multiply_wide), i8 = planted_in(SOUND.i8, multiply_int8<true>),
                  w8_few = planted_in(SOUND.w8_few, multiply_few);
const RowFunctions<float> rows = functions();

}  // namespace

extern const Isa PLANTED;
const Isa PLANTED = {
    SOUND.name,    &kernel,         SOUND.bf16, SOUND.f32_small_m, SOUND.bf16_small_m,       &rows,
    SOUND.convert, SOUND.transpose, &w8,        &w8_wide,          SOUND.i8 ? &i8 : nullptr, SOUND.w8_few ? &w8_few : nullptr};

}  // namespace cmoe::cpu
