"""Activations and their derivatives for Triton kernels, in fp32 and by the names of ``activation.py``."""

import triton
import triton.language as tl


@triton.jit
def activate(u, ACT: tl.constexpr):
    """act(u); the identity without an activation."""
    if ACT == "gelu":
        return 0.5 * u * (1.0 + tl.erf(u * 0.7071067811865476))
    elif ACT == "gelu_tanh":
        # 0.5 * (1 + tanh(z)) = sigmoid(2 z)
        return u * tl.sigmoid(1.5957691216057308 * (u + 0.044715 * u * u * u))
    elif ACT == "silu":
        return u * tl.sigmoid(u)
    elif ACT == "relu":
        return tl.where(u <= 0.0, 0.0, u)
    elif ACT == "relu2":
        return tl.where(u <= 0.0, 0.0, u * u)
    else:
        return u


@triton.jit
def derivative(u, ACT: tl.constexpr):
    """d act(u) / du"""
    if ACT == "gelu":
        return 0.5 * (1.0 + tl.erf(u * 0.7071067811865476)) + 0.3989422804014327 * u * tl.exp(-0.5 * u * u)
    elif ACT == "gelu_tanh":
        s = tl.sigmoid(1.5957691216057308 * (u + 0.044715 * u * u * u))
        return s + u * s * (1.0 - s) * 1.5957691216057308 * (1.0 + 0.134145 * u * u)
    elif ACT == "silu":
        s = tl.sigmoid(u)
        return s * (1.0 + u * (1.0 - s))
    elif ACT == "relu":
        return tl.where(u <= 0.0, 0.0, 1.0)
    elif ACT == "relu2":
        return tl.where(u <= 0.0, 0.0, u + u)
    else:
        return u * 0.0 + 1.0
