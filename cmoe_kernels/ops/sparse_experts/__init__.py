"""Sparse experts: each token sees the K experts that were chosen for it.

y[t] = sum_i weights[t, i] * (w2[e] @ h + b2[e]),   e = indices[t, i],   h = act(w1[e] @ x[t] + b1[e])
gated: h = act(gate) * up with [gate ; up] = w1[e] @ x[t] + b1[e]
w2 None: y[t] = sum_i weights[t, i] * (w1[e] @ x[t] + b1[e])
"""

import torch
from torch import Tensor

from cmoe_kernels import backends
from cmoe_kernels.ops.accumulate import run_backward
from cmoe_kernels.ops.activation import ACTIVATIONS, Activation
from cmoe_kernels.ops.arguments import (
    require_choice,
    require_expert_weights,
    require_experts_per_token,
    require_float,
    require_gates,
    require_index,
    require_size,
)
from cmoe_kernels.ops.precision import autocast_dtype
from cmoe_kernels.ops.registration import empty_placeholder, fake_grads, operator, refuse_double_backward, wants_grad
from cmoe_kernels.ops.sparse_experts import reference


def sparse_experts(
    x: Tensor,
    weights: Tensor | None,
    indices: Tensor,
    w1: Tensor,
    b1: Tensor | None = None,
    w2: Tensor | None = None,
    b2: Tensor | None = None,
    activation: Activation = "gelu",
    gated: bool = False,
    group_ids: Tensor | None = None,
    recompute: bool = False,
) -> Tensor:
    """The chosen experts on every token (Uni-Med's sparse and hard connectors, CuMo, Med-MoE, the MoE layers of transformers).

    Args:
        x: [T, D].
        weights: [T, K], [G, K] with group_ids, or [1, K] for all tokens; fp32 (fp64 with an fp64 x). None: ones.
        indices: int64, of the shape of ``weights``; -1 and E mean no expert: nothing is added and no gradient flows, whatever the weight
            is. An expert may be named twice.
        w1: [E, H, D]; gated: [E, 2H, D], the gate's rows first. With w2 None the experts are single linear layers.
        b1: [E, H] (gated: [E, 2H]) or None.
        w2: [E, O, H] or None.
        b2: [E, O] or None.
        activation: "gelu" (erf), "gelu_tanh", "silu", "relu" or "relu2" (its square); not used by single linear layers.
        gated: the hidden layer is act(gate) * up.
        group_ids: [T] int64, the row of ``indices`` and ``weights`` that each token belongs to (``hard`` routing: indices [G, 1]).
        recompute: save nothing of size [T * K, H] for backward; the hidden layer is computed again.

    Returns:
        y [T, O] in the dtype of x (autocast's under autocast).

    Products run in the dtype of x and accumulate in fp32; fp32 weights are rounded to it and get fp32 gradients. Saves the inputs, the
    pre-activations [T * K, H] in the order of the experts, and that order; neither gathered rows of x nor expert outputs. An expert
    without tokens gets zero gradients. Deterministic: a token's K rows are added in the order of its assignments.

    Raises:
        TypeError, ValueError: wrong dtype or shape; on the CPU also an index outside -1..E and a group id outside 0..G-1.

    Example::

        x, logits = torch.randn(6, 8), torch.randn(6, 4)
        weights, indices, _ = topk_gate(logits, k=2)
        y = sparse_experts(x, weights, indices, w1=torch.randn(4, 16, 8), w2=torch.randn(4, 8, 16))  # [6, 8]
    """
    require_choice("activation", activation, ACTIVATIONS)
    require_float("x", x, "TD")
    dtype = autocast_dtype(x)
    x = x.to(dtype)
    require_index("indices", indices, "GK", x)
    require_experts_per_token(indices)
    if weights is not None:
        weights = require_gates("weights", weights, "GK", x)
        require_size("weights", weights, 0, indices.shape[0], "rows of indices")
        require_size("weights", weights, 1, indices.shape[1], "experts per token in indices")
    w1, b1, w2, b2 = require_expert_weights(x, dtype, w1, b1, w2, b2, gated)
    if group_ids is not None:
        require_index("group_ids", group_ids, "T", x)
        require_size("group_ids", group_ids, 0, x.shape[0], "tokens in x")
    elif indices.shape[0] not in (1, x.shape[0]):
        raise ValueError(f"indices has {indices.shape[0]} rows, must have {x.shape[0]} (tokens in x) or 1; or give group_ids")
    save = not recompute and w2 is not None and wants_grad(x, weights, w1, b1, w2, b2)
    backend = backends.choose("sparse_experts", x.device.type, x.dtype, x.shape[0])
    return _sparse_experts(x, weights, indices, w1, b1, w2, b2, group_ids, activation, gated, save, backend)[0]


@operator("sparse_experts")
def _sparse_experts(
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
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return backends.run("sparse_experts", backend, x.device, x, weights, indices, w1, b1, w2, b2, group_ids, activation, gated, save)


@_sparse_experts.register_fake
def _(x, weights, indices, w1, b1, w2, b2, group_ids, activation, gated, save, backend):
    rows = x.shape[0] * indices.shape[1]
    return (
        x.new_empty(x.shape[0], (w1 if w2 is None else w2).shape[1]),
        x.new_empty(rows, w1.shape[1]) if save else empty_placeholder(x),
        x.new_empty(rows, dtype=torch.int64),
        x.new_empty(w1.shape[0] + 1, dtype=torch.int32),
    )


@operator("sparse_experts_backward")
def _sparse_experts_backward(
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
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    arguments = (dy, x, weights, indices, w1, b1, w2, b2, group_ids, u, gather_idx, offsets, activation, gated, needs)
    return backends.run("sparse_experts_backward", backend, x.device, *arguments)


@_sparse_experts_backward.register_fake
def _(dy, x, weights, indices, w1, b1, w2, b2, group_ids, u, gather_idx, offsets, activation, gated, needs, backend):
    return fake_grads((x, weights, w1, b1, w2, b2), needs, x)


def _setup_context(ctx, inputs, output):
    *tensors, ctx.activation, ctx.gated, _, ctx.backend = inputs
    _, *saved = output
    ctx.mark_non_differentiable(*saved)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, *saved)


def _backward(ctx, dy, *_):
    if dy is None:
        return (None,) * 12
    x, weights, _, *parameters = ctx.needs_input_grad[:7]
    needs = [x, weights, *parameters]
    saved = ctx.saved_tensors
    arguments = (dy, *saved, ctx.activation, ctx.gated)
    dx, dweights, *dparameters = run_backward(_sparse_experts_backward, ctx, arguments, needs, saved[3:7])
    return dx, dweights, None, *dparameters, *(None,) * 5


_sparse_experts.register_autograd(_backward, setup_context=_setup_context)
refuse_double_backward(_sparse_experts_backward)
_sparse_experts_backward.adds_to("w1", "b1", "w2", "b2")
backends.register("sparse_experts", "reference", reference.sparse_experts)
backends.register("sparse_experts_backward", "reference", reference.sparse_experts_backward)
backends.register_triton("sparse_experts")
