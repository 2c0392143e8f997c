"""topk_gate in plain PyTorch."""

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from cmoe_kernels.ops.precision import accumulate_dtype


def topk_gate(
    logits: Tensor, k: int, score: str, renormalize: bool, scale: float, selection: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    experts = logits.shape[1]
    rank = logits if selection is None else selection
    # A stable sort, because torch.topk promises no order among equals.
    ranked, order = rank.sort(dim=-1, descending=True, stable=True)
    indices = order[:, :k].masked_fill(ranked[:, :k] == -torch.inf, experts)
    counts = torch.bincount(indices.flatten(), minlength=experts + 1)[:experts].to(torch.int32)
    return _weights(logits, indices, score, renormalize) * scale, indices, counts


def topk_gate_backward(dweights: Tensor, logits: Tensor, indices: Tensor, score: str, renormalize: bool, scale: float) -> Tensor:
    experts = logits.shape[1]
    exact = logits.to(accumulate_dtype(logits.dtype))
    weights = _weights(logits, indices, score, renormalize)
    scaled = (dweights * scale).masked_fill(indices == experts, 0)
    total = (scaled * weights).sum(-1, keepdim=True)
    if renormalize:
        # A mean lies between the values, also after rounding: where all are equal nothing remains.
        scaled = scaled - total.clamp(*scaled.aminmax(dim=-1, keepdim=True))
    dpicked = scaled * weights
    if score == "sigmoid":
        # d log(sigmoid(l)) / d l = sigmoid(-l)
        dpicked = dpicked * (-exact.gather(1, indices.clamp(max=experts - 1))).sigmoid()
    # The chosen experts of a row differ, so this scatter meets collisions in its last column alone, among the zeros of "no expert".
    dlogits = exact.new_zeros(exact.shape[0], experts + 1).scatter_(1, indices, dpicked)[:, :experts]
    if score == "softmax" and not renormalize:
        dlogits = dlogits - _softmax(exact) * total
    return dlogits.to(logits.dtype)


def _weights(logits: Tensor, indices: Tensor, score: str, renormalize: bool) -> Tensor:
    """Weights [T, K] before the scale; zero where the index says no expert."""
    experts = logits.shape[1]
    exact = logits.to(accumulate_dtype(logits.dtype))
    excluded = indices == experts
    position = indices.clamp(max=experts - 1)
    if score == "softmax" and not renormalize:
        return _softmax(exact).gather(1, position).masked_fill(excluded, 0)
    picked = exact.gather(1, position)
    if score == "sigmoid" and not renormalize:
        return picked.sigmoid().masked_fill(excluded, 0)
    # Dividing the chosen by their sum is a softmax over the chosen, of the logits or of log(sigmoid).
    return _softmax((logsigmoid(picked) if score == "sigmoid" else picked).masked_fill(excluded, -torch.inf))


def _softmax(scores: Tensor) -> Tensor:
    """Softmax whose rows of nothing but -inf are zeros."""
    return scores.softmax(-1).masked_fill((scores == -torch.inf).all(-1, keepdim=True), 0)
