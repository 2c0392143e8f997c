"""soft_experts on Triton kernels.

Two products forward: the first with N = E * H, whose epilogue applies bias, activation and gate and writes gate * act(u) [T, E, H] (and u
when it is saved); the second with K = E * H, so the experts are added in its accumulator, with gates @ b2 in the epilogue. Backward: one
product makes dh in registers and leaves du, gate * act(u) and the gate's partial sums; dx is one product with K = E * H, the weights'
gradients one each. Nothing of size [E, T, O] exists in either direction.

Single linear experts multiply x (dy) by the gate on load; their dx and the gates' gradient come from one product. Where their gates have
fewer rows than there are tokens (a row per task, or one), they merge into one linear layer per row of gates, [G, O, D]: E times fewer
products over tokens. Tokens are then the rows of their group as sparse tokens are of their expert, and the merged weight's gradient
is shared out by the gates. More groups than experts are not merged: their weights would outgrow the experts' own.
"""

import torch
from torch import Tensor

from cmoe_kernels.ops.gemm.dact_gemm import dact_gemm, dense_dgrad
from cmoe_kernels.ops.gemm.grouped_gemm import grouped_gemm
from cmoe_kernels.ops.gemm.grouped_gemm_sum import grouped_gemm_sum
from cmoe_kernels.ops.gemm.wgrad import wgrad
from cmoe_kernels.ops.groups import per_token
from cmoe_kernels.ops.rows.reduce import column_sums, routing_weight_grad, sum_per_group
from cmoe_kernels.ops.rows.sort import sort_by_expert
from cmoe_kernels.ops.soft_experts.reference import Needs


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
    if _merges(x, gates, w2):
        return _merged(x, gates, w1, b1, group_ids), None
    g = _gates(x, gates, group_ids)
    if w2 is None:
        y = x.new_empty(x.shape[0], w1.shape[1])
        grouped_gemm_sum(x, w1, y, b1, g, weigh_x=True)
        return y, None
    y, weighted_hidden = x.new_empty(x.shape[0], w2.shape[1]), x.new_empty(x.shape[0], *w1.shape[:2])
    u = torch.empty_like(weighted_hidden) if save else None
    grouped_gemm(x, w1, b1, routing_weights=g, activation=activation, u=u, y=weighted_hidden)
    grouped_gemm_sum(weighted_hidden, w2, y, b2, g)
    return y, u


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
    g = _gates(x, gates, group_ids)
    tokens, experts = x.shape[0], w1.shape[0]
    b_out = b1 if w2 is None else b2
    dx = x.new_empty(x.shape) if need.x else None
    dw1 = w1.new_empty(w1.shape) if need.w1 else None
    dw2 = w2.new_empty(w2.shape) if w2 is not None and need.w2 else None
    db_out = b_out.new_empty(b_out.shape) if b_out is not None and (need.b1 if w2 is None else need.b2) else None
    db1 = b1.new_empty(b1.shape) if w2 is not None and b1 is not None and need.b1 else None

    if w2 is None:
        partials = dense_dgrad(dy, w1, x, g, dx) if need.gates else None
        if dx is not None and partials is None:
            grouped_gemm_sum(dy, w1.transpose(1, 2), dx, gates=g, weigh_x=True)
        wgrad(dy, x, dw1, db_out, rows=tokens, routing_weights=g, weigh_dw=True)
    else:
        shape = tokens, experts, w1.shape[1]
        if not u.numel():
            u = x.new_empty(shape)
            grouped_gemm(x, w1, b1, activation=activation, u=u)
        du = x.new_empty(shape) if need.x or need.w1 or db1 is not None else None
        weighted_hidden = x.new_empty(shape) if dw2 is not None else None
        partials = None
        if du is not None or weighted_hidden is not None or need.gates:
            partials = dact_gemm(dy, w2, u, du, weighted_hidden, need.gates, routing_weights=g, activation=activation)
        if dx is not None and du is not None:
            grouped_gemm_sum(du, w1.transpose(1, 2), dx)
        if du is not None:
            wgrad(du, x, dw1, db1, rows=tokens)
        wgrad(dy, x if weighted_hidden is None else weighted_hidden, dw2, db_out, rows=tokens, routing_weights=g)
    dgates = None
    if partials is not None:
        per_row = routing_weight_grad(partials, dy, b_out, experts).view(tokens, experts)
        dgates = sum_per_group(per_row, group_ids, gates.shape[0])
    return (dx, dgates, dw1, db_out, None, None) if w2 is None else (dx, dgates, dw1, db1, dw2, db_out)


def _gates(x: Tensor, gates: Tensor, group_ids: Tensor | None) -> Tensor:
    """[T, E], a view where every token has the same row."""
    return per_token(gates, group_ids).expand(x.shape[0], -1)


# --- single linear experts whose gates are known per group: the experts merge into one linear layer per group ---------------


def _merges(x: Tensor, gates: Tensor, w2: Tensor | None) -> bool:
    groups, experts = gates.shape
    return w2 is None and groups < x.shape[0] and groups <= experts


def _tokens_by_group(x: Tensor, gates: Tensor, group_ids: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Tokens in the order of their groups, and where each group begins; None where one group has all."""
    if group_ids is None:
        return None, None
    return sort_by_expert(group_ids[:, None], gates.shape[0], x.shape[0])


def _merge(table: Tensor, gates: Tensor, dtype: torch.dtype) -> Tensor:
    """sum over e of gates[g, e] * table[e], [G, ...]"""
    return column_sums(table.reshape(table.shape[0], -1), gates.shape[0], dtype, c=gates.T).view(-1, *table.shape[1:])


def _merged(x: Tensor, gates: Tensor, w: Tensor, b: Tensor | None, group_ids: Tensor | None) -> Tensor:
    y = x.new_empty(x.shape[0], w.shape[1])
    order, offsets = _tokens_by_group(x, gates, group_ids)
    bias = None if b is None else _merge(b, gates, torch.float32)
    grouped_gemm(x, _merge(w, gates, x.dtype), bias, offsets=offsets, gather=order, scatter=order, y=y)
    return y


def _merged_backward(
    dy: Tensor, x: Tensor, gates: Tensor, w: Tensor, b: Tensor | None, group_ids: Tensor | None, need: Needs
) -> tuple[Tensor | None, ...]:
    groups, experts = gates.shape
    order, offsets = _tokens_by_group(x, gates, group_ids)
    dx = dgates = dw = db = None
    if need.x:
        dx = x.new_empty(x.shape)
        grouped_gemm(dy, _merge(w, gates, x.dtype).transpose(1, 2), offsets=offsets, gather=order, scatter=order, y=dx)
    dmerged = w.new_empty(groups, *w.shape[1:], dtype=torch.float32) if need.gates or need.w1 else None
    dbias = w.new_empty(groups, w.shape[1], dtype=torch.float32) if b is not None and (need.gates or need.b1) else None
    wgrad(dy, x, dmerged, dbias, rows=x.shape[0], offsets=offsets, p_index=order, q_index=order)
    if need.gates and dmerged is not None:
        # Few rows, a product over all elements of a layer: a split loop.
        dgates = gates.new_empty(gates.shape)
        grouped_gemm_sum(dmerged.view(groups, -1), w.reshape(1, experts, -1), dgates)
        if b is not None and dbias is not None:
            by_bias = torch.empty_like(dgates)
            grouped_gemm_sum(dbias, b.reshape(1, experts, -1), by_bias)
            dgates += by_bias
    if need.w1 and dmerged is not None:
        dw = _merge(dmerged, gates.T, w.dtype)
    if b is not None and need.b1 and dbias is not None:
        db = _merge(dbias, gates.T, b.dtype)
    return dx, dgates, dw, db, None, None
