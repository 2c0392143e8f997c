"""task_router in plain PyTorch.

The concatenation [task; x] is never built: its product with w1 is x @ W_img^T plus one row per task, which acts as a bias.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from cmoe_kernels.ops.activation import activate, activate_backward
from cmoe_kernels.ops.groups import per_token, sum_per_group
from cmoe_kernels.ops.precision import accumulate_dtype


class Needs(NamedTuple):
    """The gradients that the backward op makes."""

    x: bool
    task: bool
    w1: bool
    b1: bool
    w2: bool
    b2: bool


def task_router(
    x: Tensor | None,
    task: Tensor | None,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor | None,
    b2: Tensor | None,
    group_ids: Tensor | None,
    activation: str,
    save: bool,
) -> tuple[Tensor, Tensor | None]:
    rows = input_rows(x, task)
    exact = accumulate_dtype(rows.dtype)
    # E is small, so the layer that gives the logits is computed in fp32 without a rounding before it.
    u = _first_layer(x, task, w1, b1, group_ids, rows.dtype if w2 is not None else exact)
    if w2 is None:
        return u, None
    logits = activate(activation, u).to(exact) @ w2.to(rows.dtype).to(exact).T
    if b2 is not None:
        logits += b2.to(exact)
    return logits, u if save else None


def task_router_backward(
    dlogits: Tensor,
    x: Tensor | None,
    task: Tensor | None,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor | None,
    b2: Tensor | None,
    group_ids: Tensor | None,
    u: Tensor,
    activation: str,
    needs: list[bool],
) -> tuple[Tensor | None, ...]:
    need = Needs(*needs)
    rows = input_rows(x, task)
    dtype, exact = rows.dtype, accumulate_dtype(rows.dtype)
    dx = dtask = dw1 = db1 = dw2 = db2 = None

    if w2 is None:
        du = dlogits
    else:
        if not u.numel():
            u = _first_layer(x, task, w1, b1, group_ids, dtype)
        du = activate_backward(activation, (dlogits @ w2.to(dtype).to(exact)).to(dtype), u)
        if need.w2:
            dw2 = (dlogits.T @ activate(activation, u).to(exact)).to(w2.dtype)
        if b2 is not None and need.b2:
            db2 = dlogits.sum(0).to(b2.dtype)

    split = 0 if task is None else task.shape[1]
    # The gradient of the first layer's bias, one row per task: [G, R].
    dbias = sum_per_group(du.to(exact), group_ids, 1 if task is None else task.shape[0])
    if need.w1:
        dw1 = w1.new_empty(w1.shape)
    if x is not None:
        if need.x:
            dx = (du @ w1[:, split:].to(dtype).to(du.dtype)).to(dtype)
        if dw1 is not None:
            dw1[:, split:] = du.T @ x.to(du.dtype)
    if task is not None:
        if need.task:
            dtask = (dbias @ w1[:, :split].to(dtype).to(exact)).to(task.dtype)
        if dw1 is not None:
            # One outer product per task: no product over tokens.
            dw1[:, :split] = dbias.T @ task.to(dtype).to(exact)
    if b1 is not None and need.b1:
        db1 = dbias.sum(0).to(b1.dtype)
    return dx, dtask, dw1, db1, dw2, db2


def input_rows(x: Tensor | None, task: Tensor | None) -> Tensor:
    """What the router reads a row of per result: image tokens, or task tokens where there are none."""
    rows = task if x is None else x
    assert rows is not None
    return rows


def _first_layer(
    x: Tensor | None, task: Tensor | None, w1: Tensor, b1: Tensor | None, group_ids: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """w1 @ [task; x] + b1 with products in ``dtype``, of operands rounded as x is."""
    rounded = input_rows(x, task).dtype
    split = 0 if task is None else task.shape[1]
    bias = None if b1 is None else b1.to(dtype)[None]
    if task is not None:
        product = task.to(rounded).to(dtype) @ w1[:, :split].to(rounded).to(dtype).T
        bias = product if bias is None else product + bias
    if x is None:
        assert bias is not None
        return bias
    u = x.to(dtype) @ w1[:, split:].to(rounded).to(dtype).T
    if bias is not None:
        u += per_token(bias, group_ids if task is not None else None)
    return u
