// Activations in fp32, by the names of cmoe_kernels/ops/activation.py.
#pragma once

namespace cmoe::cuda {

enum class Activation : int { none, gelu, gelu_tanh, silu, relu, relu2 };

}  // namespace cmoe::cuda
