"""balance_loss in plain PyTorch. Without ``segments`` all tokens are one segment; the loss is the mean over segments that hold a token."""

from typing import NamedTuple

import torch
from torch import Tensor

from cmoe_kernels.ops.precision import accumulate_dtype


def balance_loss(
    scores: Tensor,
    indices: Tensor | None,
    mask: Tensor | None,
    kind: str,
    segments: Tensor | None,
    counts: Tensor | None,
    total: Tensor | None,
) -> Tensor:
    experts = scores.shape[1]
    kind, s, live = _read(scores, mask, kind)
    seg = _segments(live, segments)
    if kind == "switch":
        f = _assignment_shares(seg, live, experts, indices, counts, total)
        loss = experts * (f * _sum(s, seg) / seg.tokens).sum(-1)
    elif kind == "importance":
        deviation, _ = _deviation(_sum(s, seg))
        loss = experts * deviation.square().sum(-1)
    else:
        loss = (_sum(s.logsumexp(-1, keepdim=True).square() * live, seg) / seg.tokens)[:, 0]
    return (loss * seg.weight).sum()


def balance_loss_backward(
    dloss: Tensor,
    scores: Tensor,
    indices: Tensor | None,
    mask: Tensor | None,
    kind: str,
    segments: Tensor | None,
    counts: Tensor | None,
    total: Tensor | None,
) -> Tensor:
    experts = scores.shape[1]
    softmax = kind.startswith("softmax_")
    kind, s, live = _read(scores, mask, kind)
    seg = _segments(live, segments)
    if kind == "switch":
        slope = experts * _assignment_shares(seg, live, experts, indices, counts, total) / seg.tokens
    elif kind == "importance":
        deviation, mass = _deviation(_sum(s, seg))
        # E * sum p^2 - 1 in terms of d = p - 1/E: no difference of nearly equal numbers, and exactly zero at balance.
        slope = 2 * experts / mass * (deviation - deviation.square().sum(-1, keepdim=True))
    else:
        slope = 2 / seg.tokens
    if softmax:
        # What all slopes of a token have in common has no effect; near balance it is nearly all there is.
        slope = slope - slope.mean(-1, keepdim=True)
    ds = _of_token((slope * seg.weight[:, None]), seg) * live * dloss
    if kind == "z":
        ds = ds * s.logsumexp(-1, keepdim=True) * s.softmax(-1)
    elif softmax:
        ds = s * (ds - (s * ds).sum(-1, keepdim=True))
    # Rows of one segment and no mask are views of one row: the op returns memory of its own.
    return ds.expand_as(scores).to(scores.dtype, memory_format=torch.contiguous_format, copy=True)


class _Segments(NamedTuple):
    ids: Tensor | None  # [T], 0..S-1; None: one segment
    order: Tensor | None  # stable order of the tokens by segment
    lengths: Tensor | None  # [S] tokens of each, masked ones too
    tokens: Tensor  # [S, 1] unmasked tokens, at least 1
    weight: Tensor  # [S] 1 / (segments with a token), 0 for a segment without


def _read(scores: Tensor, mask: Tensor | None, kind: str) -> tuple[str, Tensor, Tensor]:
    """The kind without "softmax_"; what it takes, in fp32 (fp64), zero where masked; the mask as numbers [T, 1]."""
    s = scores.to(accumulate_dtype(scores.dtype))
    if kind.startswith("softmax_"):
        kind, s = kind.removeprefix("softmax_"), s.softmax(-1)
    if mask is None:
        return kind, s, s.new_ones(s.shape[0], 1)
    return kind, s.masked_fill(~mask[:, None], 0), mask[:, None].to(s.dtype)


def _segments(live: Tensor, segments: Tensor | None) -> _Segments:
    ids = order = lengths = None
    if segments is None:
        tokens = live.sum(0, keepdim=True)
    else:
        _, ids, lengths = segments.unique(return_inverse=True, return_counts=True)
        order = ids.argsort(stable=True)
        tokens = _sum(live, _Segments(ids, order, lengths, live, live))
    filled = (tokens[:, 0] > 0).to(live.dtype)
    return _Segments(ids, order, lengths, tokens.clamp(min=1), filled / filled.sum().clamp(min=1))


def _sum(rows: Tensor, seg: _Segments) -> Tensor:
    """Sum of the rows of each segment, [S, N]; a fixed order, unlike index_add on a GPU."""
    if seg.ids is None or not rows.numel():
        return rows.sum(0, keepdim=True)
    return torch.segment_reduce(rows[seg.order], "sum", lengths=seg.lengths)


def _of_token(table: Tensor, seg: _Segments) -> Tensor:
    return table if seg.ids is None else table[seg.ids]


def _assignment_shares(
    seg: _Segments, live: Tensor, experts: int, indices: Tensor | None, counts: Tensor | None, total: Tensor | None
) -> Tensor:
    """f [S, E]: the share of the assignments that went to each expert."""
    if counts is not None:
        selected = counts.to(live.dtype)[None]
        whole = selected.sum(-1, keepdim=True) if total is None else total.to(live.dtype)
        return selected / whole.clamp(min=1)
    assert indices is not None
    chosen = (indices[:, :, None] == torch.arange(experts, device=indices.device)).sum(1).to(live.dtype)
    return _sum(chosen * live, seg) / (seg.tokens * indices.shape[1])


def _deviation(mass: Tensor) -> tuple[Tensor, Tensor]:
    """m_e / sum m - 1/E per segment, zero where there is no mass; and sum m [S, 1] (1 there)."""
    whole = mass.sum(-1, keepdim=True)
    empty = whole == 0
    whole = whole.masked_fill(empty, 1)
    return ((mass - whole / mass.shape[-1]) / whole).masked_fill(empty, 0), whole
