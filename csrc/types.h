// Types of values, and activations by the names of cmoe_kernels/ops/activation.py: for drivers and kernels of both devices. No torch, and C
// headers only (cpu/gemm/isa.h says why).
#pragma once

#include <stdint.h>

namespace cmoe {

enum class Type : int { f32, bf16, f16, f64, i8 };

constexpr int64_t size_of(Type type) { return type == Type::f64 ? 8 : type == Type::f32 ? 4 : type == Type::i8 ? 1 : 2; }

enum class Activation : int { none, gelu, gelu_tanh, silu, relu, relu2 };

}  // namespace cmoe
