// Whether an instruction set works here; see self_test.cpp.
#pragma once

#include <string>

#include "gemm/isa.h"

namespace cmoe::cpu {

// Empty, or what went wrong: "SIGILL in products of bf16". One thread at a time.
std::string self_test(const Isa& isa);

}  // namespace cmoe::cpu
