"""Experts and router on int8 weights in plain PyTorch: the twin of the native kernels, which rounds where they do.

Sums of int8 products are exact in both. What is fp32 (products with float activations, activations, sums over experts) agrees within
rounding.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from cmoe_kernels.ops.activation import activate
from cmoe_kernels.ops.groups import per_token
from cmoe_kernels.ops.int8.quantise import quantise_rows, unpack


def int8_experts(
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
) -> Tensor:
    experts, tokens = w1.shape[0], x.shape[0]
    rows = x.float()
    y = rows.new_zeros(tokens, (scale1 if scale2 is None else scale2).shape[1])
    table = None if weights is None else per_token(weights, group_ids).expand(tokens, -1)
    chosen = None if indices is None else per_token(indices, group_ids).expand(tokens, -1)
    for e in range(experts):
        if chosen is None:
            assert table is not None
            token, routing = torch.arange(tokens, device=x.device), table[:, e]
        else:
            token, place = (chosen == e).nonzero(as_tuple=True)
            routing = rows.new_ones(len(token)) if table is None else table[token, place]
        if not len(token):
            continue
        quantised = len(token) > float_rows
        h = _linear(rows[token], w1[e : e + 1], scale1[e], None if b1 is None else b1[e], quantised, 2 if gated else 1)
        if w2 is not None:
            assert scale2 is not None
            h = _linear(activate(activation, h, gated), w2[e : e + 1], scale2[e], None if b2 is None else b2[e], quantised)
        y.index_add_(0, token, routing.float()[:, None] * h)
    return y.to(x.dtype)


def int8_router(
    x: Tensor,
    w1: Tensor,
    scale1: Tensor,
    bias: Tensor,
    w2: Tensor,
    b2: Tensor | None,
    group_ids: Tensor | None,
    activation: str,
    float_rows: int,
) -> Tensor:
    u = _linear(x.float(), w1, scale1[0], None, x.shape[0] > float_rows)
    h = activate(activation, u + per_token(bias, group_ids), False)
    return F.linear(h, w2.float(), None if b2 is None else b2.float())


def _linear(x: Tensor, panels: Tensor, scale: Tensor, b: Tensor | None, quantised: bool, parts: int = 1) -> Tensor:
    q = unpack(panels, scale.shape[0], x.shape[1], parts)[0]
    if quantised:
        rows, row_scale = quantise_rows(x)
        # Integers up to 2^31, which fp64 adds exactly.
        y = (rows.double() @ q.double().T).float() * row_scale[:, None] * scale
    else:
        y = (x @ q.float().T) * scale
    return y if b is None else y + b.float()
