// Activations and their derivatives on the device. The choice is the same for all threads of a launch, so it costs a uniform branch and no
// second copy of a kernel.
#pragma once

#include "../types.h"
#include "device/types.h"

namespace cmoe::cuda {

__device__ inline float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

// The argument of gelu_tanh: 0.5 (1 + tanh(z)) = sigmoid(2 z)
__device__ inline float tanh_argument(float u) { return 1.5957691216057308f * (u + 0.044715f * u * u * u); }

__device__ inline float activate(Activation f, float u) {
  switch (f) {
    case Activation::gelu: return 0.5f * u * (1.0f + erff(u * 0.70710678118654752f));
    case Activation::gelu_tanh: return u * sigmoid(tanh_argument(u));
    case Activation::silu: return u * sigmoid(u);
    case Activation::relu: return u <= 0.0f ? 0.0f : u;  // a NaN stays one
    case Activation::relu2: return u <= 0.0f ? 0.0f : u * u;
    default: return u;
  }
}

struct Slope {
  float value, derivative;
};

// sigmoid(x) and sigmoid(-x): 1 - sigmoid(x) would lose what derivatives far from zero are made of.
struct Sigmoids {
  float value, rest;

  __device__ explicit Sigmoids(float x) {
    const float e = expf(-fabsf(x)), large = 1.0f / (1.0f + e), small = e * large;
    value = x < 0.0f ? small : large;
    rest = x < 0.0f ? large : small;
  }
};

// f(u) and f'(u)
__device__ inline Slope slope(Activation f, float u) {
  switch (f) {
    case Activation::gelu: {
      const float half = 0.5f * (1.0f + erff(u * 0.70710678118654752f));
      return {u * half, half + 0.3989422804014327f * u * expf(-0.5f * u * u)};
    }
    case Activation::gelu_tanh: {
      const Sigmoids s(tanh_argument(u));
      return {u * s.value, s.value + u * s.value * s.rest * 1.5957691216057308f * (1.0f + 0.134145f * u * u)};
    }
    case Activation::silu: {
      const Sigmoids s(u);
      return {u * s.value, s.value * (1.0f + u * s.rest)};
    }
    case Activation::relu: return {u <= 0.0f ? 0.0f : u, u <= 0.0f ? 0.0f : 1.0f};
    case Activation::relu2: return {u <= 0.0f ? 0.0f : u * u, u <= 0.0f ? 0.0f : u + u};
    default: return {u, 1.0f};
  }
}

}  // namespace cmoe::cuda
