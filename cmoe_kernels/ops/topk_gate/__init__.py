"""Sparse gates: the k best experts of each token and their weights.

score[t, e]   = softmax(logits[t])[e]  or  sigmoid(logits[t, e])
indices[t]    = the k experts with the highest selection (default: the logits, which rank as their scores do)
weights[t, i] = scale * score[t, indices[t, i]] / (sum_j score[t, indices[t, j]] if renormalize else 1)
"""

from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from cmoe_kernels import backends
from cmoe_kernels.ops.arguments import require_choice, require_device, require_float, require_integer, require_size
from cmoe_kernels.ops.precision import accumulate_dtype
from cmoe_kernels.ops.registration import operator, refuse_double_backward
from cmoe_kernels.ops.topk_gate import reference

Score = Literal["softmax", "sigmoid"]
SCORES: tuple[Score, ...] = get_args(Score)


class TopK(NamedTuple):
    """A sparse selection: ``weights`` [T, K] fp32, ``indices`` [T, K] int64 (best first), ``counts`` [E] int32."""

    weights: Tensor
    indices: Tensor
    counts: Tensor


def topk_gate(
    logits: Tensor,
    k: int,
    score: Score = "softmax",
    renormalize: bool = True,
    scale: float = 1.0,
    selection: Tensor | None = None,
) -> TopK:
    """The k best experts of each token, their weights, and how often each expert was chosen.

    Args:
        logits: router output, [T, E], any float dtype.
        k: experts per token, 1..E.
        score: "softmax" over all E, or "sigmoid".
        renormalize: divide by the sum over the chosen. With softmax this is the softmax of the chosen logits (Uni-Med's sparse
            router, CuMo); without it the raw probability stays (Med-MoE, norm_topk_prob=False).
        scale: factor on the weights.
        selection: [T, E], ranks in place of the logits and gets no gradient: logits plus noise or a balancing bias, -inf to exclude.

    Returns:
        TopK(weights [T, K] fp32 (fp64 for fp64), indices [T, K] int64 best first, counts [E] int32). Ties go to the lower index. Where
        the ranking value is -inf the index is E ("no expert", as ``sparse_experts`` reads it), the weight zero, and nothing is counted.

    Raises:
        TypeError, ValueError: wrong dtype or shape, k outside 1..E, an unknown score.

    Saves ``logits`` and ``indices`` for backward. Deterministic. ``T == 0`` gives empty results and zero counts.

    Example::

        weights, indices, counts = topk_gate(torch.randn(6, 4), k=2)  # [6, 2], [6, 2], [4]
    """
    require_float("logits", logits, "TE")
    require_choice("score", score, SCORES)
    require_integer("k", k)
    if not 1 <= k <= logits.shape[1]:
        raise ValueError(f"k is {k}, must be in 1..{logits.shape[1]} (the experts in logits of shape {tuple(logits.shape)})")
    if selection is not None:
        require_float("selection", selection, "TE")
        require_device("selection", selection, logits, "logits")
        for dim, of in enumerate(("tokens in logits", "experts in logits")):
            require_size("selection", selection, dim, logits.shape[dim], of)
        selection = selection.detach()
    backend = backends.choose("topk_gate", logits.device.type, logits.dtype, logits.shape[0])
    return TopK(*_topk_gate(logits, k, score, renormalize, float(scale), selection, backend))


@operator("topk_gate")
def _topk_gate(
    logits: Tensor, k: int, score: str, renormalize: bool, scale: float, selection: Tensor | None, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    return backends.run("topk_gate", backend, logits.device, logits, k, score, renormalize, scale, selection)


@_topk_gate.register_fake
def _(logits, k, score, renormalize, scale, selection, backend):
    tokens, experts = logits.shape
    return (
        logits.new_empty(tokens, k, dtype=accumulate_dtype(logits.dtype)),
        logits.new_empty(tokens, k, dtype=torch.int64),
        logits.new_empty(experts, dtype=torch.int32),
    )


@operator("topk_gate_backward")
def _topk_gate_backward(
    dweights: Tensor, logits: Tensor, indices: Tensor, score: str, renormalize: bool, scale: float, backend: str
) -> Tensor:
    return backends.run("topk_gate_backward", backend, logits.device, dweights, logits, indices, score, renormalize, scale)


@_topk_gate_backward.register_fake
def _(dweights, logits, indices, score, renormalize, scale, backend):
    return logits.new_empty(logits.shape)


def _setup_context(ctx, inputs, output):
    logits, _, ctx.score, ctx.renormalize, ctx.scale, _, ctx.backend = inputs
    _, indices, counts = output
    ctx.mark_non_differentiable(indices, counts)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(logits, indices)


def _backward(ctx, dweights, _dindices, _dcounts):
    if dweights is None:
        return (None,) * 7
    dlogits = _topk_gate_backward(dweights, *ctx.saved_tensors, ctx.score, ctx.renormalize, ctx.scale, ctx.backend)
    return dlogits, *(None,) * 6


_topk_gate.register_autograd(_backward, setup_context=_setup_context)
refuse_double_backward(_topk_gate_backward)
backends.register("topk_gate", "reference", reference.topk_gate)
backends.register("topk_gate_backward", "reference", reference.topk_gate_backward)
backends.register_triton("topk_gate")
