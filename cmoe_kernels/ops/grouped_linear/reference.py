"""grouped_linear in plain PyTorch: one product per expert, whose row ranges are read on the host."""

from typing import NamedTuple

import torch
from torch import Tensor

from cmoe_kernels.ops.activation import activate, activate_backward
from cmoe_kernels.ops.arguments import require_offsets


class Needs(NamedTuple):
    """The gradients that the backward op makes."""

    x: bool
    w: bool
    b: bool


def grouped_linear(
    x: Tensor,
    w: Tensor,
    b: Tensor | None,
    offsets: Tensor,
    gather_idx: Tensor | None,
    k: int,
    scatter_idx: Tensor | None,
    activation: str | None,
    save: bool,
) -> tuple[Tensor, Tensor | None]:
    bounds = require_offsets(offsets, x.shape[0] * k)
    rows = _gather(x, gather_idx, k)
    u = x.new_zeros(rows.shape[0], w.shape[1])
    for e, (start, stop) in enumerate(bounds):
        u[start:stop] = rows[start:stop] @ w[e].to(x.dtype).T
        if b is not None:
            u[start:stop] += b[e].to(x.dtype)
    y = u if activation is None else activate(activation, u)
    if bounds:
        y[bounds[-1][1] :] = 0
    if scatter_idx is not None:
        y = torch.empty_like(y).index_copy_(0, scatter_idx, y)
    return y, u if save else None


def grouped_linear_backward(
    dy: Tensor,
    x: Tensor,
    w: Tensor,
    b: Tensor | None,
    offsets: Tensor,
    gather_idx: Tensor | None,
    scatter_idx: Tensor | None,
    u: Tensor,
    k: int,
    activation: str | None,
    needs: list[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    need = Needs(*needs)
    bounds = require_offsets(offsets, x.shape[0] * k)
    rows = _gather(x, gather_idx, k)
    du = dy if scatter_idx is None else dy[scatter_idx]
    if activation is not None:
        du = activate_backward(activation, du, u)
    drows = rows.new_zeros(rows.shape) if need.x else None
    dw = w.new_zeros(w.shape) if need.w else None
    db = b.new_zeros(b.shape) if b is not None and need.b else None
    for e, (start, stop) in enumerate(bounds):
        if drows is not None:
            drows[start:stop] = du[start:stop] @ w[e].to(x.dtype)
        if dw is not None:
            dw[e] = du[start:stop].T @ rows[start:stop]
        if db is not None:
            db[e] = du[start:stop].sum(0)
    return None if drows is None else _sum_rows(drows, gather_idx, k), dw, db


def _gather(x: Tensor, gather_idx: Tensor | None, k: int) -> Tensor:
    if gather_idx is not None:
        return x[gather_idx // k]
    return x.repeat_interleave(k, 0) if k > 1 else x


def _sum_rows(drows: Tensor, gather_idx: Tensor | None, k: int) -> Tensor:
    """The transpose of _gather. gather_idx is a permutation: a token's k rows are laid side by side and added in their order."""
    if gather_idx is not None:
        drows = torch.empty_like(drows).index_copy_(0, gather_idx, drows)
    return drows.view(-1, k, drows.shape[1]).sum(1) if k > 1 else drows
