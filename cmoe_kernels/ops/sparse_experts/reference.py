"""sparse_experts in plain PyTorch: assignments sorted by expert, one pair of products per expert, whose row ranges are read on the host."""

import itertools
from typing import NamedTuple

import torch
from torch import Tensor

from cmoe_kernels.ops.activation import activate, activate_backward
from cmoe_kernels.ops.groups import per_row, sort_by_expert, sum_per_group
from cmoe_kernels.ops.precision import accumulate_dtype


class Needs(NamedTuple):
    """The gradients that the backward op makes."""

    x: bool
    weights: bool
    w1: bool
    b1: bool
    w2: bool
    b2: bool


def sparse_experts(
    x: Tensor,
    weights: Tensor | None,
    indices: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor | None,
    b2: Tensor | None,
    group_ids: Tensor | None,
    activation: str,
    gated: bool,
    save: bool,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    experts, tokens, k = w1.shape[0], x.shape[0], indices.shape[1]
    gather_idx, offsets = sort_by_expert(_assignments(indices, group_ids, tokens, experts), experts)
    routing_weights = None if weights is None else per_row(weights, group_ids, tokens, gather_idx)[:, None]
    rows = x[gather_idx // k]
    u = x.new_zeros(tokens * k, w1.shape[1]) if w2 is not None else None
    y = x.new_zeros(tokens * k, (w1 if w2 is None else w2).shape[1])
    for e, r in _ranges(offsets):
        hidden = rows[r] @ w1[e].to(x.dtype).T
        if b1 is not None:
            hidden += b1[e].to(x.dtype)
        if w2 is None or u is None:
            product = hidden if routing_weights is None else (routing_weights[r] * hidden).to(x.dtype)
        else:
            u[r] = hidden
            h = activate(activation, hidden, gated)
            product = (h if routing_weights is None else (routing_weights[r] * h).to(x.dtype)) @ w2[e].to(x.dtype).T
            if b2 is not None:
                product += (b2[e] if routing_weights is None else routing_weights[r] * b2[e]).to(x.dtype)
        y[r] = product
    return _sum_assignments(y, gather_idx, k), u if save else None, gather_idx, offsets


def sparse_experts_backward(
    dy: Tensor,
    x: Tensor,
    weights: Tensor | None,
    indices: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor | None,
    b2: Tensor | None,
    group_ids: Tensor | None,
    u: Tensor,
    gather_idx: Tensor,
    offsets: Tensor,
    activation: str,
    gated: bool,
    needs: list[bool],
) -> tuple[Tensor | None, ...]:
    need = Needs(*needs)
    dtype, exact = x.dtype, accumulate_dtype(x.dtype)
    tokens, k = x.shape[0], indices.shape[1]
    routing_weights = None if weights is None else per_row(weights, group_ids, tokens, gather_idx)[:, None]
    drows = x.new_zeros(tokens * k, x.shape[1]) if need.x else None
    dweights = x.new_zeros(tokens * k, dtype=exact) if weights is not None and need.weights else None
    dw1 = w1.new_zeros(w1.shape) if need.w1 else None
    db1 = b1.new_zeros(b1.shape) if b1 is not None and need.b1 else None
    dw2 = w2.new_zeros(w2.shape) if w2 is not None and need.w2 else None
    db2 = b2.new_zeros(b2.shape) if b2 is not None and need.b2 else None

    for e, r in _ranges(offsets):
        rows = x[gather_idx[r] // k]
        dout = dy[gather_idx[r] // k]
        weighted = dout if routing_weights is None else (routing_weights[r] * dout).to(dtype)
        if w2 is None:
            du = weighted
            if dweights is not None:
                hidden = rows @ w1[e].to(dtype).T
                if b1 is not None:
                    hidden += b1[e].to(dtype)
                dweights[r] = (dout * hidden).sum(-1, dtype=exact)
        else:
            pre = u[r] if u.numel() else rows @ w1[e].to(dtype).T + (0 if b1 is None else b1[e].to(dtype))
            h = activate(activation, pre, gated)
            dh = dout @ w2[e].to(dtype)
            if dweights is not None:
                dweights[r] = (dh * h).sum(-1, dtype=exact)
                if b2 is not None:
                    dweights[r] += dout.to(exact) @ b2[e].to(exact)
            if dw2 is not None:
                dw2[e] = weighted.T @ h
            if db2 is not None:
                db2[e] = weighted.sum(0, dtype=exact)
            du = activate_backward(activation, dh if routing_weights is None else (routing_weights[r] * dh).to(dtype), pre, gated)
        if drows is not None:
            drows[r] = du @ w1[e].to(dtype)
        if dw1 is not None:
            dw1[e] = du.T @ rows
        if db1 is not None:
            db1[e] = du.sum(0, dtype=exact)

    if dweights is not None and weights is not None:
        by_token = torch.empty_like(dweights).index_copy_(0, gather_idx, dweights).view(tokens, k)
        dweights = sum_per_group(by_token, group_ids, weights.shape[0])
    return None if drows is None else _sum_assignments(drows, gather_idx, k), dweights, dw1, db1, dw2, db2


def _assignments(indices: Tensor, group_ids: Tensor | None, tokens: int, experts: int) -> Tensor:
    """indices [T, K]; on a GPU a group id out of range selects no expert."""
    if group_ids is None:
        return indices.expand(tokens, -1)
    groups = indices.shape[0]
    known = (group_ids >= 0) & (group_ids < groups)
    return indices[group_ids.clamp(0, groups - 1)].where(known[:, None], experts)


def _ranges(offsets: Tensor) -> list[tuple[int, slice]]:
    ends = offsets.tolist()
    return [(e, slice(start, stop)) for e, (start, stop) in enumerate(itertools.pairwise(ends)) if stop > start]


def _sum_assignments(rows: Tensor, gather_idx: Tensor, k: int) -> Tensor:
    """Sum of each token's K rows in the order of its assignments, in fp32: the same bits each time."""
    by_token = torch.empty_like(rows).index_copy_(0, gather_idx, rows).view(len(rows) // k, k, rows.shape[1])
    return by_token[:, 0] if k == 1 else by_token.sum(1, dtype=accumulate_dtype(rows.dtype)).to(rows.dtype)
