"""soft_gate in Triton.

A program holds BLOCK_T rows whole, so every logit is read once and every result written once: the op costs its bytes and a launch.
E is 5 in Uni-Med; the columns are padded to a power of two, and the rows of a program chosen so that a tile has about TILE elements.

Gates are the softmax of log(sigmoid), as in the reference: a row whose sigmoids all underflow still sums to one. Triton has no log1p;
log(1 + exp(-|l|)) loses what lies below half an ulp of 1, an absolute error in the exponent, so a relative one of 6e-8 in the gate.

Backward recomputes the gates from the logits (two transcendental functions per element; reading saved gates would cost as many bytes
as reading the logits again). Columns past E hold -inf: their gate is zero and they add nothing to a row's sums.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 1024


@triton.jit
def _gates(logits):
    """Softmax of log(sigmoid) along a row, fp32."""
    scores = tl.minimum(logits, 0.0) - tl.log(1.0 + tl.exp(-tl.abs(logits)))
    powers = tl.exp(scores - tl.max(scores, 1)[:, None])
    return tl.math.div_rn(powers, tl.sum(powers, 1)[:, None])


@triton.jit
def soft_gate_fwd_kernel(logits, gates, T, E, stride_t, stride_e, BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr):
    t = (tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T))[:, None]
    e = tl.arange(0, BLOCK_E).to(tl.int64)[None, :]
    live = (t < T) & (e < E)
    l = tl.load(logits + t * stride_t + e * stride_e, live, other=-float("inf")).to(tl.float32)
    # A row past the end would be 0 / 0.
    g = _gates(tl.where(t < T, l, 0.0))
    tl.store(gates + t * E + e, g, live)


@triton.jit
def soft_gate_bwd_kernel(
    dgates, logits, dlogits, T, E, stride_dt, stride_de, stride_t, stride_e, BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr
):
    t = (tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T))[:, None]
    e = tl.arange(0, BLOCK_E).to(tl.int64)[None, :]
    live = (t < T) & (e < E)
    l = tl.load(logits + t * stride_t + e * stride_e, live, other=-float("inf")).to(tl.float32)
    l = tl.where(t < T, l, 0.0)
    d = tl.load(dgates + t * stride_dt + e * stride_de, live, other=0.0).to(tl.float32)
    g = _gates(l)
    # What all have in common cancels: taken away first, it leaves no rounding, and where all are equal nothing.
    d = tl.where(e < E, d - tl.min(tl.where(e < E, d, float("inf")), 1)[:, None], 0.0)
    # d log(sigmoid(l)) / d l = sigmoid(-l)
    dl = g * (d - tl.sum(d * g, 1)[:, None]) * tl.sigmoid(-l)
    tl.store(dlogits + t * E + e, dl.to(dlogits.dtype.element_ty), live)


def soft_gate(logits: Tensor) -> Tensor:
    gates = logits.new_empty(logits.shape, dtype=torch.float32)
    if gates.numel():
        grid, settings = _launch(logits)
        soft_gate_fwd_kernel[grid](logits, gates, *logits.shape, *logits.stride(), **settings)
    return gates


def soft_gate_backward(dgates: Tensor, logits: Tensor) -> Tensor:
    dlogits = logits.new_empty(logits.shape)
    if dlogits.numel():
        grid, settings = _launch(logits)
        soft_gate_bwd_kernel[grid](dgates, logits, dlogits, *logits.shape, *dgates.stride(), *logits.stride(), **settings)
    return dlogits


def _launch(logits: Tensor) -> tuple[tuple[int], dict[str, int]]:
    block_e = triton.next_power_of_2(logits.shape[1])
    block_t = max(1, TILE // block_e)
    return (triton.cdiv(logits.shape[0], block_t),), {"BLOCK_T": block_t, "BLOCK_E": block_e, "num_warps": 4 if block_e <= TILE else 8}
