"""Experts and router on int8 weights, forward only; nn/int8.py holds such weights.

Where the processor multiplies int8 (AMX, AVX-512 VNNI, AVX-VNNI), an expert with many rows quantises them to int8, a scale per row: the
sums are exact integers, and a scale per row and per output makes them fp32. With at most ``FEW`` rows, and on every other processor, the
weights are converted to fp32 on the way into the product: bytes of weights decide there. Between the layers values stay fp32.
"""

import torch
from torch import Tensor

from cmoe_kernels import backends, native
from cmoe_kernels.ops.int8 import reference
from cmoe_kernels.ops.precision import autocast_dtype
from cmoe_kernels.ops.registration import operator

FEW = 4
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MANY = 2**31  # more rows than there are: none is quantised
MOST_INPUTS = 2**17  # 2^17 products of two int8 values stay below 2^31


@native.constant
def float_rows(backend: str) -> int:
    """The largest number of an expert's rows whose activations stay floating-point."""
    found = native.int8_kernels() if backend == "cpu" else None
    return FEW if found and found.products else MANY


def experts(
    x: Tensor,
    weights: Tensor | None,
    indices: Tensor | None,
    w1: Tensor,
    scale1: Tensor,
    b1: Tensor | None,
    w2: Tensor | None,
    scale2: Tensor | None,
    b2: Tensor | None,
    group_ids: Tensor | None = None,
    activation: str = "gelu",
    gated: bool = False,
) -> Tensor:
    """y[t] = sum_e weight[t, e] (act(x[t] W1_e^T + b1_e) W2_e^T + b2_e), over the experts that ``indices`` names or over all.

    Args:
        x: [T, D], float32, bfloat16 or float16.
        weights: [T, K], or [G, K] with group_ids, or [1, K]; without indices [.., E]. None: ones.
        indices: the same shape, int64; -1 and E are no expert. None: all experts, weighted by ``weights``.
        w1, w2: panels of int8 weights (``quantise.pack``); w2 None: single linear experts.
        scale1, scale2: [E, H] (gated: [E, 2H]) and [E, O], fp32.
        b1, b2: biases of the same shapes, fp32, or None.
        group_ids: [T], the row of weights and indices of each token.
        activation: as in ``sparse_experts``.
        gated: gate rows then up rows in w1.

    Returns:
        [T, O] in the dtype of x. Deterministic. No gradient.
    """
    x = _floats(x)
    backend = backends.choose("int8_experts", x.device.type, x.dtype, x.shape[0])
    _refuse_gradients("weights", weights)
    weights = None if weights is None else weights.float()
    return _experts(
        x, weights, indices, w1, scale1, b1, w2, scale2, b2, group_ids, activation, gated, float_rows(backend), backend
    )  # fmt: skip


def router(
    x: Tensor, w1: Tensor, scale1: Tensor, bias: Tensor, w2: Tensor, b2: Tensor | None, group_ids: Tensor | None, activation: str
) -> Tensor:
    """logits[t] = act(x[t] W1^T + bias[group of t]) W2^T + b2: [T, E], fp32. w1 int8 panels, scale1 [1, R], bias [G or 1, R], w2 [E, R]."""
    x = _floats(x)
    backend = backends.choose("int8_router", x.device.type, x.dtype, x.shape[0])
    if w2.dtype == torch.float64:  # of a connector that was cast
        w2, b2 = w2.float(), None if b2 is None else b2.float()
    return _router(x, w1, scale1, bias, w2, b2, group_ids, activation, float_rows(backend), backend)


def _floats(x: Tensor) -> Tensor:
    """``x`` in its dtype or that of autocast; refuses what int8 weights do not serve."""
    if x.dtype not in DTYPES:
        raise TypeError(f"x is {x.dtype}; int8 weights take float32, bfloat16 or float16")
    _refuse_gradients("x", x)
    return x.to(autocast_dtype(x))


def _refuse_gradients(name: str, t: Tensor | None) -> None:
    if torch.is_grad_enabled() and t is not None and t.requires_grad:
        raise RuntimeError(f"{name} requires a gradient, which int8 weights do not give: call under torch.no_grad()")


@operator("int8_experts")
def _experts(
    x: Tensor,
    weights: Tensor | None,
    indices: Tensor | None,
    w1: Tensor,
    scale1: Tensor,
    b1: Tensor | None,
    w2: Tensor | None,
    scale2: Tensor | None,
    b2: Tensor | None,
    group_ids: Tensor | None,
    activation: str,
    gated: bool,
    float_rows: int,
    backend: str,
) -> Tensor:
    return backends.run(
        "int8_experts", backend, x.device, x, weights, indices, w1, scale1, b1, w2, scale2, b2, group_ids, activation, gated, float_rows
    )


@_experts.register_fake
def _(x, weights, indices, w1, scale1, b1, w2, scale2, b2, group_ids, activation, gated, float_rows, backend):
    return x.new_empty(x.shape[0], (scale1 if scale2 is None else scale2).shape[1])


@operator("int8_router")
def _router(
    x: Tensor,
    w1: Tensor,
    scale1: Tensor,
    bias: Tensor,
    w2: Tensor,
    b2: Tensor | None,
    group_ids: Tensor | None,
    activation: str,
    float_rows: int,
    backend: str,
) -> Tensor:
    return backends.run("int8_router", backend, x.device, x, w1, scale1, bias, w2, b2, group_ids, activation, float_rows)


@_router.register_fake
def _(x, w1, scale1, bias, w2, b2, group_ids, activation, float_rows, backend):
    return x.new_empty(x.shape[0], w2.shape[0], dtype=torch.float32)


backends.register("int8_experts", "reference", reference.int8_experts)
backends.register("int8_router", "reference", reference.int8_router)
