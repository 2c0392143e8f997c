"""Load-balancing losses of a router.

switch      E * sum_e f_e p_e      p_e: mean of scores[:, e];  f_e: share of the assignments that went to e
importance  E * sum_e (m_e / sum_j m_j)^2 - 1      m_e: sum of scores[:, e]
z           mean_t logsumexp(scores[t])^2

The op cmoe::balance_loss also has the kinds softmax_switch and softmax_importance, of the softmax of its scores (``from_logits``).
"""

from typing import Literal, get_args

import torch
from torch import Tensor

from cmoe_kernels import backends
from cmoe_kernels.ops.arguments import (
    require_choice,
    require_device,
    require_experts_per_token,
    require_float,
    require_index,
    require_size,
    require_tensor,
)
from cmoe_kernels.ops.balance_loss import reference
from cmoe_kernels.ops.precision import accumulate_dtype
from cmoe_kernels.ops.registration import operator, refuse_double_backward

Kind = Literal["switch", "importance", "z"]
KINDS: tuple[Kind, ...] = get_args(Kind)


def balance_loss(
    scores: Tensor,
    indices: Tensor | None = None,
    mask: Tensor | None = None,
    kind: Kind = "switch",
    segments: Tensor | None = None,
    counts: Tensor | None = None,
    total: Tensor | float | None = None,
    from_logits: bool = False,
) -> Tensor:
    """A scalar that is least when the experts are used evenly ("switch", "importance") or the logits are small ("z").

    Args:
        scores: [T, E]. "switch": probabilities, such as the softmax of the logits over all experts. "importance": gates. "z": logits.
        indices: [T, K] int64, the chosen experts ("switch"); -1 and E mean no expert.
        mask: [T] bool, True for the tokens that count. Everything masked: the loss is 0 with a zero gradient.
        kind: "switch" (Switch Transformer eq. 4; 1 when even; the share is divided by K, so its sum is 1), "importance" (the squared
            coefficient of variation of the gates' sums, Shazeer et al. 2017 eq. 7; 0 when even and for E = 1, with a zero gradient
            there), "z" (ST-MoE eq. 5).
        segments: [T] int64 labels: the statistic of each segment, then their mean. CuMo's loss is per image with indices[:, :1].
        counts: [E], assignments all-reduced over ranks, in place of ``indices``: f is then of the global batch.
        total: the number of assignments that counts belongs to; default their sum.
        from_logits: scores are logits, and the loss is of their softmax over the experts, in fp32 ("switch", "importance"). On the CPU the
            softmax and its gradient are computed inside, and no probabilities are stored.

    Returns:
        a scalar, fp32 (fp64 for fp64).

    Only scores get a gradient. Saves its inputs. Deterministic: sums in a fixed order, no float atomics.
    "switch" is 1/K of the load-balancing loss of transformers.

    Raises:
        TypeError, ValueError: wrong dtype, shape or combination of arguments; on the CPU also an index outside -1..E.

    Example::

        logits = torch.randn(6, 4, requires_grad=True)
        indices = topk_gate(logits, k=2).indices
        loss = balance_loss(logits, indices, from_logits=True)  # Switch Transformer eq. 4
    """
    require_choice("kind", kind, KINDS)
    require_float("scores", scores, "TE")
    tokens, experts = scores.shape
    if from_logits and kind == "z":
        raise ValueError("from_logits is given, is for kind='switch' and 'importance'; the scores of 'z' are logits as they are")
    if kind == "switch":
        if (indices is None) == (counts is None):
            raise ValueError("kind='switch' needs either indices or counts")
    elif indices is not None or counts is not None:
        raise ValueError(f"{'indices' if counts is None else 'counts'} is given, is for kind='switch' alone, not {kind!r}")
    if indices is not None:
        require_index("indices", indices, "TK", scores)
        require_size("indices", indices, 0, tokens, "tokens in scores")
        require_experts_per_token(indices)
    if mask is not None:
        require_index("mask", mask, "T", scores, torch.bool)
        require_size("mask", mask, 0, tokens, "tokens in scores")
    if segments is not None:
        require_index("segments", segments, "T", scores)
        require_size("segments", segments, 0, tokens, "tokens in scores")
    if counts is not None:
        if segments is not None:
            raise ValueError("counts cannot be combined with segments: it has one statistic for the whole batch")
        require_tensor("counts", counts, "E")
        require_size("counts", counts, 0, experts, "experts in scores")
        require_device("counts", counts, scores, "scores")
        if isinstance(total, Tensor):
            require_device("total", total, scores, "scores")
            if total.numel() != 1:
                raise ValueError(f"total must hold one number, got shape {tuple(total.shape)}")
            total = total.detach().reshape(())
        elif total is not None:
            total = scores.new_full((), total, dtype=accumulate_dtype(scores.dtype))
        counts = counts.detach()
    elif total is not None:
        raise ValueError("total is given without counts")
    backend = backends.choose("balance_loss", scores.device.type, scores.dtype, scores.shape[0])
    form: str = kind
    if from_logits and backend == "cpu":
        form = f"softmax_{kind}"
    elif from_logits:
        # A masked row gets the gradient zero, which a softmax of NaN would make NaN again.
        kept = scores if mask is None else scores.masked_fill(~mask[:, None], 0)
        scores = kept.softmax(-1, dtype=accumulate_dtype(scores.dtype))
    return _balance_loss(scores, indices, mask, form, segments, counts, total, backend)


@operator("balance_loss")
def _balance_loss(
    scores: Tensor,
    indices: Tensor | None,
    mask: Tensor | None,
    kind: str,
    segments: Tensor | None,
    counts: Tensor | None,
    total: Tensor | None,
    backend: str,
) -> Tensor:
    return backends.run("balance_loss", backend, scores.device, scores, indices, mask, kind, segments, counts, total)


@_balance_loss.register_fake
def _(scores, indices, mask, kind, segments, counts, total, backend):
    return scores.new_empty((), dtype=accumulate_dtype(scores.dtype))


@operator("balance_loss_backward")
def _balance_loss_backward(
    dloss: Tensor,
    scores: Tensor,
    indices: Tensor | None,
    mask: Tensor | None,
    kind: str,
    segments: Tensor | None,
    counts: Tensor | None,
    total: Tensor | None,
    backend: str,
) -> Tensor:
    return backends.run("balance_loss_backward", backend, scores.device, dloss, scores, indices, mask, kind, segments, counts, total)


@_balance_loss_backward.register_fake
def _(dloss, scores, indices, mask, kind, segments, counts, total, backend):
    return scores.new_empty(scores.shape)


def _setup_context(ctx, inputs, output):
    scores, indices, mask, ctx.kind, segments, counts, total, ctx.backend = inputs
    ctx.save_for_backward(scores, indices, mask, segments, counts, total)


def _backward(ctx, dloss):
    scores, indices, mask, segments, counts, total = ctx.saved_tensors
    dscores = _balance_loss_backward(dloss, scores, indices, mask, ctx.kind, segments, counts, total, ctx.backend)
    return dscores, *(None,) * 7


_balance_loss.register_autograd(_backward, setup_context=_setup_context)
refuse_double_backward(_balance_loss_backward)
backends.register("balance_loss", "reference", reference.balance_loss)
backends.register("balance_loss_backward", "reference", reference.balance_loss_backward)
backends.register_triton("balance_loss")
