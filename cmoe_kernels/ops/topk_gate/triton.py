"""topk_gate in Triton.

A program holds BLOCK_T rows of logits whole, [BLOCK_T, BLOCK_E], and picks K times the largest key of each row. Keys are integers in
the order of the ranking values (a float's bits, turned so that they compare as the float does), because integers give what a sort
gives and float comparisons do not: a place for NaN (first), one for -inf (last, and read as "no expert"), one below both for columns
already taken. The lowest column that holds the largest key is taken, so ties go to the lower index. K is 1 to 8 in practice: K times
two row reductions in registers cost less than a sorting network over E, and nothing but the logits is read.

Weights come from the picked logits in registers: no second pass over the row but for a softmax over all E. Counts are summed per program
and added by an integer atomic, whose result does not depend on the order.

Backward reads its K indices, gathers those logits, and spreads the K gradients over the row in registers: each element of dlogits is
written once and nothing is scattered through memory. An index outside 0..E-1 reads and receives nothing.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 1024


@triton.jit
def _ranking_key(v, INTEGER: tl.constexpr, LOWEST: tl.constexpr):
    """Integers that compare as the floats do. NaN is the largest, and -0.0 equals 0.0."""
    bits = (v + 0.0).to(INTEGER, bitcast=True)
    key = tl.where(bits < 0, bits ^ ~tl.full((), LOWEST, INTEGER), bits)
    return tl.where(v != v, ~tl.full((), LOWEST, INTEGER), key)


@triton.jit
def _sigmoid(x):
    """tl.sigmoid divides approximately, in fp32 two units in the last place off."""
    return tl.math.div_rn(1.0, 1.0 + tl.exp(-x))


@triton.jit
def _log_sigmoid(l):
    return tl.minimum(l, 0.0) - tl.log(1.0 + tl.exp(-tl.abs(l)))


@triton.jit
def _softmax(l):
    """Along a row; a row of nothing but -inf is zeros."""
    top = tl.max(l, 1)[:, None]
    powers = tl.exp(l - tl.where(top == -float("inf"), 0.0, top))
    total = tl.sum(powers, 1)[:, None]
    return tl.math.div_rn(powers, tl.where(top == -float("inf"), 1.0, total))


@triton.jit
def _weights(l, picked, chosen, e, E, SCORE: tl.constexpr, RENORMALIZE: tl.constexpr):
    """Weights [BLOCK_T, BLOCK_K] before the scale, of the logits l [BLOCK_T, BLOCK_E], of which ``picked`` were ``chosen``."""
    if RENORMALIZE:
        # Dividing the chosen by their sum is a softmax over the chosen, of the logits or of log(sigmoid).
        scores = _log_sigmoid(picked) if SCORE == "sigmoid" else picked
        return _softmax(tl.where(chosen, scores, -float("inf")))
    if SCORE == "sigmoid":
        return tl.where(chosen, _sigmoid(picked), 0.0)
    top = tl.max(tl.where(e < E, l, -float("inf")), 1)[:, None]
    base = tl.where(top == -float("inf"), 0.0, top)
    total = tl.sum(tl.where(e < E, tl.exp(l - base), 0.0), 1)[:, None]
    return tl.where(chosen, tl.math.div_rn(tl.exp(picked - base), total), 0.0)


@triton.jit
def topk_gate_fwd_kernel(
    logits, rank, weights, indices, counts, T, E, scale, stride_t, stride_e, stride_rt, stride_re,
    K: tl.constexpr, SCORE: tl.constexpr, RENORMALIZE: tl.constexpr, INTEGER: tl.constexpr, LOWEST: tl.constexpr, MINUS_INF: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    t = (tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T))[:, None]
    e = tl.arange(0, BLOCK_E)[None, :]
    slot = tl.arange(0, BLOCK_K)[None, :]
    live = (t < T) & (e < E)
    l = tl.load(logits + t * stride_t + e.to(tl.int64) * stride_e, live, other=0.0).to(tl.float32)
    r = tl.load(rank + t * stride_rt + e.to(tl.int64) * stride_re, live, other=0.0)
    if rank.dtype.element_ty != tl.float64:
        r = r.to(tl.float32)
    key = tl.where(e < E, _ranking_key(r, INTEGER, LOWEST), tl.full((), LOWEST, INTEGER))
    picked = tl.zeros((BLOCK_T, BLOCK_K), tl.float32)
    index = tl.zeros((BLOCK_T, BLOCK_K), tl.int32)
    count = tl.zeros((BLOCK_E,), tl.int32)
    for i in range(K):
        best = tl.max(key, 1)[:, None]
        column = tl.min(tl.where(key == best, e, BLOCK_E), 1)[:, None]
        taken = e == column
        some = best > MINUS_INF
        picked = tl.where(slot == i, tl.sum(tl.where(taken, l, 0.0), 1)[:, None], picked)
        index = tl.where(slot == i, tl.where(some, column, E), index)
        count += tl.sum((taken & some & (t < T)).to(tl.int32), 0)
        key = tl.where(taken, tl.full((), LOWEST, INTEGER), key)
    w = _weights(l, picked, (index < E) & (slot < K), e, E, SCORE, RENORMALIZE) * scale
    inside = (t < T) & (slot < K)
    tl.store(weights + t * K + slot, w, inside)
    tl.store(indices + t * K + slot, index.to(tl.int64), inside)
    tl.atomic_add(counts + tl.arange(0, BLOCK_E), count, mask=tl.arange(0, BLOCK_E) < E)


@triton.jit
def topk_gate_bwd_kernel(
    dweights, logits, indices, dlogits, T, E, scale, stride_dt, stride_dk, stride_t, stride_e, stride_it, stride_ik,
    K: tl.constexpr, SCORE: tl.constexpr, RENORMALIZE: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    t = (tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T))[:, None]
    e = tl.arange(0, BLOCK_E)[None, :]
    slot = tl.arange(0, BLOCK_K)[None, :]
    live = (t < T) & (e < E)
    inside = (t < T) & (slot < K)
    l = tl.load(logits + t * stride_t + e.to(tl.int64) * stride_e, live, other=0.0).to(tl.float32)
    index = tl.load(indices + t * stride_it + slot.to(tl.int64) * stride_ik, inside, other=E)
    chosen = (index >= 0) & (index < E)
    picked = tl.load(logits + t * stride_t + index * stride_e, chosen, other=0.0).to(tl.float32)
    d = tl.load(dweights + t * stride_dt + slot.to(tl.int64) * stride_dk, inside, other=0.0).to(tl.float32)
    w = _weights(l, picked, chosen, e, E, SCORE, RENORMALIZE)
    scaled = tl.where(chosen, d * scale, 0.0)
    total = tl.sum(scaled * w, 1)[:, None]
    if RENORMALIZE:
        # What all have in common cancels: taken away first, it leaves no rounding, and where all are equal nothing.
        least = tl.min(tl.where(chosen, scaled, float("inf")), 1)[:, None]
        scaled = tl.where(chosen, scaled - least, 0.0)
        scaled -= tl.sum(scaled * w, 1)[:, None]
    dpicked = scaled * w
    if SCORE == "sigmoid":
        # d log(sigmoid(l)) / d l = sigmoid(-l)
        dpicked *= _sigmoid(-picked)
    dl = tl.zeros((BLOCK_T, BLOCK_E), tl.float32)
    for i in range(K):
        column = tl.sum(tl.where(slot == i, index, 0), 1)[:, None]
        dl += tl.where(e == column, tl.sum(tl.where(slot == i, dpicked, 0.0), 1)[:, None], 0.0)
    if SCORE == "softmax" and not RENORMALIZE:
        dl -= _softmax(tl.where(e < E, l, -float("inf"))) * total
    tl.store(dlogits + t * E + e, dl.to(dlogits.dtype.element_ty), live)


def topk_gate(
    logits: Tensor, k: int, score: str, renormalize: bool, scale: float, selection: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    tokens, experts = logits.shape
    rank = logits if selection is None else selection
    weights = logits.new_empty(tokens, k, dtype=torch.float32)
    indices = logits.new_empty(tokens, k, dtype=torch.int64)
    counts = logits.new_zeros(experts, dtype=torch.int32)
    if tokens:
        double = rank.dtype == torch.float64
        # The key of -inf: its bits, all but the sign turned over.
        order = (tl.int64, -(2**63), -0x7FF0000000000001) if double else (tl.int32, -(2**31), -0x7F800001)
        grid, settings = _launch(logits, k)
        topk_gate_fwd_kernel[grid](
            logits, rank, weights, indices, counts, tokens, experts, scale, *logits.stride(), *rank.stride(), k, score, renormalize,
            *order, **settings,
        )  # fmt: skip
    return weights, indices, counts


def topk_gate_backward(dweights: Tensor, logits: Tensor, indices: Tensor, score: str, renormalize: bool, scale: float) -> Tensor:
    tokens, experts = logits.shape
    k = indices.shape[1]
    dlogits = logits.new_empty(logits.shape)
    if tokens:
        grid, settings = _launch(logits, k)
        topk_gate_bwd_kernel[grid](
            dweights, logits, indices, dlogits, tokens, experts, scale, *dweights.stride(), *logits.stride(), *indices.stride(),
            k, score, renormalize, **settings,
        )  # fmt: skip
    return dlogits


def _launch(logits: Tensor, k: int) -> tuple[tuple[int], dict[str, int]]:
    block_e = triton.next_power_of_2(logits.shape[1])
    block_t = max(1, TILE // block_e)
    settings = {"BLOCK_T": block_t, "BLOCK_E": block_e, "BLOCK_K": triton.next_power_of_2(k), "num_warps": 4 if block_e <= TILE else 8}
    return (triton.cdiv(logits.shape[0], block_t),), settings
