"""Sums between the products: a token's assignments, the gate's gradient, and columns weighted by a small matrix.

Each output belongs to one program, which adds in a fixed order in fp32: the same bits each time, no atomics. All three read their
operands once and are bound by memory. ``column_sums_kernel`` is the transpose of "each token reads the row of its group": a product
with a matrix C [T, M] of few columns, which for groups is one-hot and made from ``group_ids`` in registers, so that it never exists.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from cmoe_kernels.ops.gemm.tiles import TL_DTYPES, launch, multiply_add, strides
from cmoe_kernels.ops.rows.activation import activate


@triton.jit
def assignments_sum_kernel(rows, y, tokens, k, width, BM: tl.constexpr, BN: tl.constexpr):
    """y[t] = sum over i < k of rows[t * k + i]"""
    tiles_n = tl.cdiv(width, BN)
    t = (tl.program_id(0) // tiles_n * BM + tl.arange(0, BM)).to(tl.int64)
    n = tl.program_id(0) % tiles_n * BN + tl.arange(0, BN)
    inside = (t < tokens)[:, None] & (n < width)[None, :]
    total = tl.zeros((BM, BN), tl.float32)
    for i in range(k):
        total += tl.load(rows + (t * k + i)[:, None] * width + n[None, :], mask=inside, other=0.0).to(tl.float32)
    tl.store(y + t[:, None] * width + n[None, :], total.to(y.dtype.element_ty), mask=inside)


@triton.jit
def routing_weight_bwd_kernel(
    partials, dy, b, dgates, offsets, gather,
    count, tiles, width, experts, sd_t, sd_n, sb_e, sb_n,
    DIV: tl.constexpr, ROUND: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """dgates[i] = sum over column tiles of partials[:, i] + <dy[t], b[e]>; i is a row of an expert, or t * E + e without offsets."""
    i = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    live = i < count
    if offsets is None:
        target, token, e = i, i // experts, i % experts
    else:
        e = i * 0
        for j in range(experts):
            e += (i >= tl.load(offsets + j + 1)).to(tl.int32)
        live = live & (e < experts)
        target = tl.load(gather + i, mask=i < count, other=0)
        token = target // DIV
    total = tl.zeros((BM,), tl.float32)
    for tile in range(tiles):
        total += tl.load(partials + tl.cast(tile, tl.int64) * count + i, mask=live, other=0.0)
    if b is not None:
        n = tl.arange(0, BN).to(tl.int64)
        ds = dy + token[:, None] * sd_t + n[None, :] * sd_n
        bs = b + e[:, None] * sb_e + n[None, :] * sb_n
        dot = tl.zeros((BM, BN), tl.float32)
        for start in range(0, width, BN):
            inside = live[:, None] & (n[None, :] < width - start)
            bias = tl.load(bs, mask=inside, other=0.0).to(ROUND).to(tl.float32)
            dot += tl.load(ds, mask=inside, other=0.0).to(tl.float32) * bias
            ds += tl.cast(BN, tl.int64) * sd_n
            bs += tl.cast(BN, tl.int64) * sb_n
        total += tl.sum(dot, 1)
    tl.store(dgates + target, total, mask=i < count)


@triton.jit
def column_sums_kernel(
    c, ids, v, out, tokens, height, width, sc_t, sc_m, sv_t, sv_n, so_m,
    ACT: tl.constexpr, PRECISION: tl.constexpr, BT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """out[m] = sum over t of c[t, m] * act(v[t]); without c, over the tokens whose id is m, or over all."""
    tiles_n = tl.cdiv(width, BN)
    m = tl.program_id(0) // tiles_n * BM + tl.arange(0, BM)
    n = tl.program_id(0) % tiles_n * BN + tl.arange(0, BN)
    total = tl.zeros((BM, BN), tl.float32)
    for start in range(0, tokens, BT):
        t = start + tl.arange(0, BT)
        far = t.to(tl.int64)
        live = t < tokens
        if c is not None:
            share = tl.load(
                c + far[None, :] * sc_t + m.to(tl.int64)[:, None] * sc_m, mask=live[None, :] & (m < height)[:, None], other=0.0
            ).to(tl.float32)
        elif ids is not None:
            mine = tl.load(ids + far, mask=live, other=-1)[None, :] == m[:, None]
            share = (mine & live[None, :]).to(tl.float32)
        else:
            share = (live[None, :] & (m < height)[:, None]).to(tl.float32)
        inside = live[:, None] & (n < width)[None, :]
        value = tl.load(v + far[:, None] * sv_t + n.to(tl.int64)[None, :] * sv_n, mask=inside, other=0.0).to(tl.float32)
        total = multiply_add(share, activate(value, ACT), total, PRECISION)
    out_at = out + m.to(tl.int64)[:, None] * so_m + n.to(tl.int64)[None, :]
    tl.store(out_at, total.to(out.dtype.element_ty), mask=(m < height)[:, None] & (n < width)[None, :])


def sum_assignments(rows: Tensor, k: int) -> Tensor:
    """[T * k, N] -> [T, N]: a token's k rows in their order."""
    if k == 1:
        return rows
    y = rows.new_empty(rows.shape[0] // k, rows.shape[1])
    block = 16, 128
    programs = triton.cdiv(y.shape[0], block[0]) * triton.cdiv(y.shape[1], block[1])
    launch(assignments_sum_kernel, programs, rows, y, *(y.shape[0], k, y.shape[1]), BM=block[0], BN=block[1])
    return y


def routing_weight_grad(
    partials: Tensor, dy: Tensor, b: Tensor | None, experts: int, offsets: Tensor | None = None, gather: Tensor | None = None, k: int = 1
) -> Tensor:
    """Gradients of gates [T, E], or of the weights of rows [T * k] in the order of the tokens."""
    tiles, count = partials.shape
    dgates = dy.new_empty(count, dtype=torch.float32)
    block = 16, 128
    launch(
        routing_weight_bwd_kernel,
        triton.cdiv(count, block[0]),
        *(partials, dy, b, dgates, offsets, gather),
        *(count, tiles, dy.shape[1], experts, *dy.stride(), *strides(b, 2)),
        DIV=k,
        ROUND=TL_DTYPES[dy.dtype],
        BM=block[0],
        BN=block[1],
    )
    return dgates


def column_sums(
    v: Tensor,
    height: int,
    dtype: torch.dtype,
    c: Tensor | None = None,
    ids: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:
    """out[m, n] = sum_t C[t, m] * act(v[t, n]), with C [T, height] = c, or one-hot in ``ids`` [T], or ones."""
    out = v.new_empty(height, v.shape[1], dtype=dtype)
    block = 32, 16, 64
    launch(
        column_sums_kernel,
        triton.cdiv(height, block[1]) * triton.cdiv(v.shape[1], block[2]),
        *(c, None if ids is None else ids.contiguous(), v, out),
        *(v.shape[0], height, v.shape[1], *strides(c, 2), *v.stride(), out.stride(0)),
        ACT=activation,
        PRECISION="ieee",
        BT=block[0],
        BM=block[1],
        BN=block[2],
    )
    return out


def sum_per_group(rows: Tensor, group_ids: Tensor | None, groups: int) -> Tensor:
    """[T, N] summed per group, [groups, N] in fp32; without ids one group has all, unless each token is its own."""
    if group_ids is None and groups == rows.shape[0]:
        return rows
    return column_sums(rows, groups, torch.float32, ids=group_ids)
