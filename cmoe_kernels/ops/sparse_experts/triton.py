"""sparse_experts on Triton kernels.

Rows are assignments (a token and an expert) in the order of their experts. Forward: the first product gathers x on load and writes
weight * act(u) [T * K, H] (and u when it is saved); the second adds weight * b2 and scatters on store to [T, K, O], whose K rows are added
in the order of the assignments; with K = 1 it stores y itself. Backward: one product makes dh in registers and leaves du,
weight * act(u) and the weight's partial sums; dx scatters as y does. Neither gathered rows of x nor expert outputs are saved.
Rows of no expert lie past offsets[E]: their tiles read no weights and write zeros.
"""

from typing import Any

import torch
from torch import Tensor

from cmoe_kernels.ops.gemm.dact_gemm import dact_gemm
from cmoe_kernels.ops.gemm.grouped_gemm import grouped_gemm
from cmoe_kernels.ops.gemm.wgrad import wgrad
from cmoe_kernels.ops.groups import per_row
from cmoe_kernels.ops.rows.reduce import routing_weight_grad, sum_assignments, sum_per_group
from cmoe_kernels.ops.rows.sort import sort_by_expert
from cmoe_kernels.ops.sparse_experts.reference import Needs


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
    gather_idx, offsets = sort_by_expert(indices, experts, tokens, group_ids)
    routing_weights = None if weights is None else per_row(weights, group_ids, tokens, gather_idx)
    w_out = w1 if w2 is None else w2
    rows = x.new_empty(tokens * k, w_out.shape[1])
    u = None
    if w2 is None:
        grouped_gemm(x, w1, b1, offsets=offsets, gather=gather_idx, k=k, scatter=gather_idx, routing_weights=routing_weights, y=rows)
    else:
        u = x.new_empty(tokens * k, w1.shape[1]) if save else None
        weighted_hidden = x.new_empty(tokens * k, w2.shape[2])
        grouped_gemm(
            x,
            w1,
            b1,
            offsets=offsets,
            gather=gather_idx,
            k=k,
            routing_weights=routing_weights,
            activation=activation,
            gated=gated,
            u=u,
            y=weighted_hidden,
        )
        grouped_gemm(
            weighted_hidden,
            w2,
            b2,
            offsets=offsets,
            scatter=gather_idx,
            routing_weights=routing_weights,
            weigh_bias=routing_weights is not None,
            y=rows,
        )
    return sum_assignments(rows, k), u, gather_idx, offsets


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
    experts, tokens, k = w1.shape[0], x.shape[0], indices.shape[1]
    routing_weights = None if weights is None else per_row(weights, group_ids, tokens, gather_idx)
    want_weights = weights is not None and need.weights
    drows = x.new_empty(tokens * k, x.shape[1]) if need.x else None
    dw1 = w1.new_empty(w1.shape) if need.w1 else None
    db1 = b1.new_empty(b1.shape) if b1 is not None and need.b1 else None
    dw2 = w2.new_empty(w2.shape) if w2 is not None and need.w2 else None
    db2 = b2.new_empty(b2.shape) if b2 is not None and need.b2 else None
    gathered: dict[str, Any] = {"offsets": offsets, "gather": gather_idx, "k": k}
    partials = None

    if w2 is None:
        # One product gives both: its rows are dx, and their products with x are the gradients of the weights.
        if drows is not None or want_weights:
            partials = dact_gemm(dy, w1, x, drows, None, want_weights, **gathered, scatter=gather_idx, routing_weights=routing_weights)
        wgrad(
            dy, x, dw1, db1, rows=tokens * k, offsets=offsets, p_index=gather_idx, p_k=k, q_index=gather_idx, q_k=k,
            routing_weights=routing_weights, weigh_dw=routing_weights is not None,
        )  # fmt: skip
    else:
        if not u.numel():
            u = x.new_empty(tokens * k, w1.shape[1])
            grouped_gemm(x, w1, b1, **gathered, activation=activation, gated=gated, u=u)
        du = torch.empty_like(u) if drows is not None or dw1 is not None or db1 is not None else None
        weighted_hidden = x.new_empty(tokens * k, w2.shape[2]) if dw2 is not None else None
        if du is not None or weighted_hidden is not None or want_weights:
            partials = dact_gemm(
                dy,
                w2,
                u,
                du,
                weighted_hidden,
                want_weights,
                **gathered,
                routing_weights=routing_weights,
                activation=activation,
                gated=gated,
            )
        if du is not None:
            if drows is not None:
                grouped_gemm(du, w1.transpose(1, 2), offsets=offsets, scatter=gather_idx, y=drows)
            wgrad(du, x, dw1, db1, rows=tokens * k, offsets=offsets, q_index=gather_idx, q_k=k)
        wgrad(
            dy,
            dy if weighted_hidden is None else weighted_hidden,
            dw2,
            db2,
            rows=tokens * k,
            offsets=offsets,
            p_index=gather_idx,
            p_k=k,
            routing_weights=routing_weights,
        )
    dweights = None
    if partials is not None and weights is not None:
        by_token = routing_weight_grad(partials, dy, b1 if w2 is None else b2, experts, **gathered).view(tokens, k)
        dweights = sum_per_group(by_token, group_ids, weights.shape[0])
    return None if drows is None else sum_assignments(drows, k), dweights, dw1, db1, dw2, db2
