"""soft_experts in plain PyTorch.

The sum over experts happens in the accumulator, expert by expert: no [E, T, O] stack, no separate product with the gates. The gate's
gradient needs no expert output: dgate[t, e] = <dy[t] @ w2[e], act(u[t, e])> + <dy[t], b2[e]>, whose first operand du needs anyway.
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
    gates: bool
    w1: bool
    b1: bool
    w2: bool
    b2: bool


def soft_experts(
    x: Tensor,
    gates: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor | None,
    b2: Tensor | None,
    group_ids: Tensor | None,
    activation: str,
    save: bool,
) -> tuple[Tensor, Tensor | None]:
    exact = accumulate_dtype(x.dtype)
    if _merges(x, gates, w2):
        return _merged(x, gates, w1, b1, group_ids), None
    g = per_token(gates, group_ids)
    w_out, b_out = (w1, b1) if w2 is None else (w2, b2)
    y = x.new_zeros(x.shape[0], w_out.shape[1], dtype=exact) if b_out is None else (g @ b_out.to(exact)).expand(x.shape[0], -1).clone()
    u = None if w2 is None else _pre_activation(x, w1, b1)
    for e in range(w1.shape[0]):
        a = x if u is None else activate(activation, u[:, e])
        y += (g[:, e, None] * a).to(x.dtype) @ w_out[e].to(x.dtype).T
    return y.to(x.dtype), u if save else None


def soft_experts_backward(
    dy: Tensor,
    x: Tensor,
    gates: Tensor,
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
    if _merges(x, gates, w2):
        return _merged_backward(dy, x, gates, w1, b1, group_ids, need)
    dtype, exact = x.dtype, accumulate_dtype(x.dtype)
    g = per_token(gates, group_ids)
    dyb = _expand(g, x.shape[0]).T @ dy.to(exact)
    b_out = b1 if w2 is None else b2
    db_out = dyb.to(b_out.dtype) if b_out is not None and (need.b1 if w2 is None else need.b2) else None
    dx = x.new_zeros(x.shape, dtype=exact) if need.x else None
    dg = gates.new_zeros(x.shape[0], gates.shape[1]) if need.gates else None
    if dg is not None and b_out is not None:
        dg += dy.to(exact) @ b_out.to(exact).T
    dw1 = w1.new_empty(w1.shape) if need.w1 else None
    db1 = b1.new_empty(b1.shape) if w2 is not None and b1 is not None and need.b1 else None
    dw2 = w2.new_empty(w2.shape) if w2 is not None and need.w2 else None
    if w2 is not None and not u.numel():
        u = _pre_activation(x, w1, b1)

    for e in range(w1.shape[0]):
        ge = g[:, e, None]
        if w2 is None:
            du = (ge * dy).to(dtype)
            if dg is not None:
                dg[:, e] += ((dy @ w1[e].to(dtype)) * x).sum(-1, dtype=exact)
        else:
            h = activate(activation, u[:, e])
            da = dy @ w2[e].to(dtype)
            if dg is not None:
                dg[:, e] += (da * h).sum(-1, dtype=exact)
            if dw2 is not None:
                dw2[e] = dy.T @ (ge * h).to(dtype)
            du = activate_backward(activation, (ge * da).to(dtype), u[:, e])
            if db1 is not None:
                db1[e] = du.sum(0, dtype=exact)
        if dx is not None:
            dx += du @ w1[e].to(dtype)
        if dw1 is not None:
            dw1[e] = du.T @ x
    dgates = None if dg is None else sum_per_group(dg, group_ids, gates.shape[0])
    dx = None if dx is None else dx.to(dtype)
    return (dx, dgates, dw1, db_out, None, None) if w2 is None else (dx, dgates, dw1, db1, dw2, db_out)


def _pre_activation(x: Tensor, w1: Tensor, b1: Tensor | None) -> Tensor:
    """u [T, E, H] by one product with N = E * H."""
    experts, hidden, width = w1.shape
    u = x @ w1.reshape(experts * hidden, width).to(x.dtype).T
    if b1 is not None:
        u += b1.reshape(experts * hidden).to(x.dtype)
    return u.view(x.shape[0], experts, hidden)


def _expand(rows: Tensor, tokens: int) -> Tensor:
    return rows if rows.shape[0] == tokens else rows.expand(tokens, -1)


# --- single-Linear experts whose gates are known per group: the experts merge into one Linear per group ------------------


def _merges(x: Tensor, gates: Tensor, w2: Tensor | None) -> bool:
    """Merging costs G * E * O * D products in place of T * E * O * D, in both directions."""
    return w2 is None and gates.shape[0] < x.shape[0]


def _groups(gates: Tensor, group_ids: Tensor | None) -> list[tuple[int, Tensor | slice]]:
    if group_ids is None:
        return [(0, slice(None))]
    return [(g, (group_ids == g).nonzero()[:, 0]) for g in range(gates.shape[0])]


def _merged_weight(gate: Tensor, w: Tensor) -> Tensor:
    return torch.einsum("e,eod->od", gate, w.to(gate.dtype))


def _merged(x: Tensor, gates: Tensor, w: Tensor, b: Tensor | None, group_ids: Tensor | None) -> Tensor:
    y = x.new_zeros(x.shape[0], w.shape[1])
    for g, rows in _groups(gates, group_ids):
        y[rows] = x[rows] @ _merged_weight(gates[g], w).to(x.dtype).T
        if b is not None:
            y[rows] += (gates[g] @ b.to(gates.dtype)).to(x.dtype)
    return y


def _merged_backward(
    dy: Tensor, x: Tensor, gates: Tensor, w: Tensor, b: Tensor | None, group_ids: Tensor | None, need: Needs
) -> tuple[Tensor | None, ...]:
    exact = accumulate_dtype(x.dtype)
    dx = x.new_zeros(x.shape) if need.x else None
    dgates = gates.new_zeros(gates.shape) if need.gates else None
    dw = w.new_zeros(w.shape, dtype=exact) if need.w1 else None
    db = b.new_zeros(b.shape, dtype=exact) if b is not None and need.b1 else None
    for g, rows in _groups(gates, group_ids):
        if dx is not None:
            dx[rows] = dy[rows] @ _merged_weight(gates[g], w).to(x.dtype)
        # What the merged layer's weight and bias would get is shared out to the experts by their gates.
        dmerged = (dy[rows].T @ x[rows]).to(exact)
        dmerged_b = dy[rows].sum(0, dtype=exact)
        if dgates is not None:
            dgates[g] = torch.einsum("od,eod->e", dmerged, w.to(exact))
            if b is not None:
                dgates[g] += b.to(exact) @ dmerged_b
        if dw is not None:
            dw += gates[g][:, None, None] * dmerged
        if db is not None:
            db += gates[g][:, None] * dmerged_b
    return dx, dgates, None if dw is None else dw.to(w.dtype), None if db is None or b is None else db.to(b.dtype), None, None
