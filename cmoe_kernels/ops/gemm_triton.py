"""The products of expert layers: rows by experts, and the sum over experts in the accumulator.

Memory plan. A tile of BM rows belongs to one expert, so its weights are read as they are stored, [E, N, K] by strides, never copied;
fp32 weights are rounded on their way to the tensor cores. Rows of x are gathered by the load (``gather``, divided by K selections per
token) and results scattered by the store, so gathered rows never exist. Bias, activation and the row's weight are applied to the fp32
accumulator: one rounding at the store, and the pre-activation ``u``, when it is saved, is written by the same pass.

Which expert a tile belongs to is found on the device from ``offsets``: at most floor(rows / BM) + E + 1 tiles exist, one of them
possibly short per expert and one for the rows of no expert, which are written as zeros; that many are launched and the rest return at
once, so the host reads nothing. Without offsets every expert sees every row (dense layers, N = E * H).
``gemm_sum_fwd_kernel`` is the dense second layer: one loop over E * K, so that experts are added in the accumulator.
Tiles run in groups of GROUP row tiles per column of weights, which keeps a weight tile in L2 while the group uses it.
"""

import os
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from cmoe_kernels.ops.activation_triton import activate

TL_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


class Tile(NamedTuple):
    m: int
    n: int
    k: int
    warps: int
    stages: int


# By the rows that an expert has on average. A half-precision product wants 64 rows for a warp group of Hopper; IEEE fp32 runs on the
# vector units, where a wide tile only costs registers.
HALF_TILES = ((16, Tile(16, 128, 64, 4, 4)), (64, Tile(64, 128, 64, 4, 4)), (None, Tile(128, 128, 64, 8, 3)))
FULL_TILES = ((16, Tile(16, 64, 32, 4, 2)), (None, Tile(64, 64, 32, 8, 2)))
GROUP = 8


def tile_for(rows: int, dtype: torch.dtype, weight_dtype: torch.dtype | None = None) -> Tile:
    """The tile for products of ``dtype``; weights that are rounded on load take twice the shared memory, so one stage less."""
    table = FULL_TILES if dtype == torch.float32 else HALF_TILES
    tile = next(tile for most, tile in table if most is None or rows <= most)
    return tile if weight_dtype in (None, dtype) else tile._replace(stages=2)


def precision() -> str:
    """fp32 products are IEEE unless TF32 was asked for, by torch's own switch or CMOE_TF32=1."""
    return "tf32" if torch.backends.cuda.matmul.allow_tf32 or os.environ.get("CMOE_TF32") == "1" else "ieee"


def launch(kernel: Any, programs: int, *arguments: Any, **settings: Any) -> None:
    """Run ``kernel``; an empty grid is not launched."""
    if programs:
        kernel[(programs,)](*arguments, **settings)


@triton.jit
def tile_order(pid, tiles_m, tiles_n, GROUP: tl.constexpr):
    """The tile of a program: GROUP row tiles by all column tiles, rows first."""
    width = GROUP * tiles_n
    first = pid // width * GROUP
    size = tl.minimum(tiles_m - first, GROUP)
    return first + pid % width % size, pid % width // size


@triton.jit
def tile_rows(tile, offsets, rows, experts, EP: tl.constexpr, BM: tl.constexpr):
    """Expert, first row and end row of a row tile; the expert is ``experts`` for rows of none, and past the last tile first >= end."""
    if offsets is None:
        tiles = tl.cdiv(rows, BM)
        return tile // tiles, tile % tiles * BM, rows
    else:
        e = tl.arange(0, EP)
        lows = tl.load(offsets + e, mask=e <= experts, other=0)
        highs = tl.load(offsets + e + 1, mask=e < experts, other=0)
        highs = tl.where(e == experts, rows, highs)
        tiles = tl.where(e <= experts, tl.cdiv(tl.maximum(highs - lows, 0), BM), 0)
        ends = tl.cumsum(tiles, 0)
        expert = tl.sum((ends <= tile).to(tl.int32), 0)
        mine = e == expert
        first = tl.sum(tl.where(mine, lows + (tile - ends + tiles) * BM, 0), 0)
        return expert, first, tl.sum(tl.where(mine, highs, 0), 0)


@triton.jit
def source_rows(index, r, live, rows, DIV: tl.constexpr):
    """Where row r is read or written, and whether: an index outside the rows is no row."""
    if index is None:
        source = r.to(tl.int64)
    else:
        source = tl.load(index + r, mask=live, other=0)
        live = live & (source >= 0) & (source < rows)
    return source // DIV, live


@triton.jit
def gemm_fwd_kernel(
    x, w, b, scale, u, y, offsets, gather, scatter,
    rows, width, depth, experts,
    sx_r, sx_k, sw_e, sw_n, sw_k, sw_up, sb_e, sb_n, sb_up, ss_r, ss_e, su_r, su_e, sy_r, sy_e,
    DIV: tl.constexpr, ACT: tl.constexpr, GATED: tl.constexpr, SCALE_BIAS: tl.constexpr,
    ROUND: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr, EP: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """y[scatter[r]] = scale * act(w[e] @ x[gather[r] // DIV] + b[e]), or scale on the bias alone; u is what goes into act."""
    tiles_n = tl.cdiv(width, BN)
    tile_m, tile_n = tile_order(tl.program_id(0), tl.num_programs(0) // tiles_n, tiles_n, GROUP)
    expert, first, end = tile_rows(tile_m, offsets, rows, experts, EP, BM)
    if first >= end:
        return
    r = first + tl.arange(0, BM)
    live = r < end
    source, served = source_rows(gather, r, live & (expert < experts), rows, DIV)
    n = tile_n * BN + tl.arange(0, BN)
    k = tl.arange(0, BK)
    wide = expert.to(tl.int64)
    xs = x + source[:, None] * sx_r + k[None, :] * sx_k
    ws = w + wide * sw_e + n.to(tl.int64)[None, :] * sw_n + k[:, None] * sw_k
    acc = tl.zeros((BM, BN), tl.float32)
    up = tl.zeros((BM, BN), tl.float32)
    for start in range(0, tl.where(expert < experts, depth, 0), BK):
        a = tl.load(xs, mask=served[:, None] & (k[None, :] < depth - start), other=0.0).to(OPERAND)
        inside = (n[None, :] < width) & (k[:, None] < depth - start)
        acc = tl.dot(a, tl.load(ws, mask=inside, other=0.0).to(ROUND).to(OPERAND), acc, input_precision=PRECISION)
        if GATED:
            v = tl.load(ws + sw_up, mask=inside, other=0.0).to(ROUND).to(OPERAND)
            up = tl.dot(a, v, up, input_precision=PRECISION)
        xs += BK * sx_k
        ws += BK * sw_k

    columns = n < width
    if scale is not None:
        s = tl.load(scale + r.to(tl.int64) * ss_r + wide * ss_e, mask=served, other=0.0)
    if b is not None:
        bs = b + wide * sb_e + n.to(tl.int64) * sb_n
        known = columns & (expert < experts)
        bias = tl.load(bs, mask=known, other=0.0).to(ROUND).to(tl.float32)[None, :]
        acc += s[:, None] * bias if SCALE_BIAS else bias
        if GATED:
            up += tl.load(bs + sb_up, mask=known, other=0.0).to(ROUND).to(tl.float32)[None, :]
    if ACT is not None:
        # The saved value is what backward will see, so act sees it too.
        acc = tl.where(served[:, None], acc, 0.0).to(ROUND)
        up = tl.where(served[:, None], up, 0.0).to(ROUND)
        if u is not None:
            us = u + r.to(tl.int64)[:, None] * su_r + wide * su_e + n.to(tl.int64)[None, :]
            tl.store(us, acc, mask=live[:, None] & columns[None, :])
            if GATED:
                tl.store(us + width, up, mask=live[:, None] & columns[None, :])
        acc = activate(acc.to(tl.float32), ACT)
        if GATED:
            acc *= up.to(tl.float32)
    if y is not None:
        if scale is not None and not SCALE_BIAS:
            acc *= s[:, None]
        target, stored = source_rows(scatter, r, live, rows, 1)
        ys = y + target[:, None] * sy_r + wide * sy_e + n.to(tl.int64)[None, :]
        value = tl.where(served[:, None], acc, 0.0).to(y.dtype.element_ty)
        tl.store(ys, value, mask=stored[:, None] & columns[None, :])


@triton.jit
def gemm_sum_fwd_kernel(
    x, w, b, gates, y,
    rows, width, depth, experts,
    sx_r, sx_e, sx_k, sw_e, sw_n, sw_k, sb_e, sb_n, sg_r, sg_e, sy_r,
    SCALE: tl.constexpr, ROUND: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """y[r] = sum_e w[e] @ x[r, e] + gates[r, e] * b[e]; SCALE: gates[r, e] * x[r, e] in place of x[r, e]."""
    tiles_n = tl.cdiv(width, BN)
    tile_m, tile_n = tile_order(tl.program_id(0), tl.cdiv(rows, BM), tiles_n, GROUP)
    r = tile_m * BM + tl.arange(0, BM)
    n = tile_n * BN + tl.arange(0, BN)
    k = tl.arange(0, BK)
    live, columns = r < rows, n < width
    xs = x + r.to(tl.int64)[:, None] * sx_r + k[None, :] * sx_k
    ws = w + n.to(tl.int64)[None, :] * sw_n + k[:, None] * sw_k
    acc = tl.zeros((BM, BN), tl.float32)
    steps = tl.cdiv(depth, BK)
    for step in range(experts * steps):
        e = (step // steps).to(tl.int64)
        start = step % steps * BK
        far = tl.cast(start, tl.int64)
        a = tl.load(xs + (e * sx_e + far * sx_k), mask=live[:, None] & (k[None, :] < depth - start), other=0.0)
        if SCALE:
            g = tl.load(gates + r.to(tl.int64) * sg_r + e * sg_e, mask=live, other=0.0)
            a = a.to(tl.float32) * g[:, None]
        v = tl.load(ws + (e * sw_e + far * sw_k), mask=columns[None, :] & (k[:, None] < depth - start), other=0.0)
        acc = tl.dot(a.to(OPERAND), v.to(ROUND).to(OPERAND), acc, input_precision=PRECISION)
    if b is not None:
        for e in range(experts):
            far = tl.cast(e, tl.int64)
            g = tl.load(gates + r.to(tl.int64) * sg_r + far * sg_e, mask=live, other=0.0)
            bias = tl.load(b + far * sb_e + n.to(tl.int64) * sb_n, mask=columns, other=0.0).to(ROUND).to(tl.float32)
            acc += g[:, None] * bias[None, :]
    ys = y + r.to(tl.int64)[:, None] * sy_r + n.to(tl.int64)[None, :]
    tl.store(ys, acc.to(y.dtype.element_ty), mask=live[:, None] & columns[None, :])


def linear(
    x: Tensor,
    w: Tensor,
    b: Tensor | None = None,
    *,
    offsets: Tensor | None = None,
    gather: Tensor | None = None,
    k: int = 1,
    scatter: Tensor | None = None,
    scale: Tensor | None = None,
    scale_bias: bool = False,
    activation: str | None = None,
    gated: bool = False,
    u: Tensor | None = None,
    y: Tensor | None = None,
    round_to: torch.dtype | None = None,
) -> None:
    """A linear layer of each expert on its rows, into ``y`` and ``u``.

    Args:
        x: [T, K], read at gather[r] // k.
        w: [E, N, K] (gated: [E, 2N, K]) by strides; rounded to ``round_to`` (default x's dtype), multiplied in the dtype of x.
        offsets: [E + 1]: the rows of each expert. None: each expert has all rows, and y and u are [T, E, N].
        scale: the rows' weights, [rows], or [T, E] without offsets; ``scale_bias``: x is weighted already, the bias is not.
    """
    experts, width, depth = w.shape
    if gated:
        width //= 2
    rows = x.shape[0] * k
    tile = tile_for(rows if offsets is None else rows // experts, x.dtype, w.dtype)
    if gated:
        tile = tile._replace(n=max(tile.n // 2, 16))
    tiles_m = triton.cdiv(rows, tile.m) * experts if offsets is None else rows // tile.m + experts + 1
    launch(
        gemm_fwd_kernel,
        tiles_m * triton.cdiv(width, tile.n) if rows else 0,
        *(x, w, b, scale, u, y, offsets, gather, scatter),
        *(rows, width, depth, experts),
        *(*x.stride(), *w.stride(), width * w.stride(1), *strides(b, 2), width * strides(b, 2)[1]),
        *(*strides(scale, 2), *strides(u, 3)[:2], *strides(y, 3)[:2]),
        DIV=k,
        ACT=activation,
        GATED=gated,
        SCALE_BIAS=scale_bias,
        ROUND=TL_DTYPES[round_to or x.dtype],
        OPERAND=TL_DTYPES[x.dtype],
        PRECISION=precision(),
        EP=triton.next_power_of_2(experts + 1),
        BM=tile.m,
        BN=tile.n,
        BK=tile.k,
        GROUP=GROUP,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )


def linear_sum(x: Tensor, w: Tensor, y: Tensor, b: Tensor | None = None, gates: Tensor | None = None, scale: bool = False) -> None:
    """The sum of the experts' linear layers, into ``y`` [T, N].

    Args:
        x: [T, E, K], or [T, K] for all experts.
        w: [E, N, K] by strides.
        gates: [T, E], the weights of b [E, N]; with ``scale`` also of x.
    """
    experts, width, depth = w.shape
    tile = tile_for(x.shape[0], x.dtype, w.dtype)
    sx_r, sx_e, sx_k = x.stride() if x.dim() == 3 else (x.stride(0), 0, x.stride(1))
    launch(
        gemm_sum_fwd_kernel,
        triton.cdiv(x.shape[0], tile.m) * triton.cdiv(width, tile.n),
        *(x, w, b, gates, y),
        *(x.shape[0], width, depth, experts),
        *(sx_r, sx_e, sx_k, *w.stride(), *strides(b, 2), *strides(gates, 2), y.stride(0)),
        SCALE=scale,
        ROUND=TL_DTYPES[x.dtype],
        OPERAND=TL_DTYPES[x.dtype],
        PRECISION=precision(),
        BM=tile.m,
        BN=tile.n,
        BK=tile.k,
        GROUP=GROUP,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )


def strides(t: Tensor | None, dims: int) -> tuple[int, ...]:
    """Strides of a tensor with one row per token or row and, in the middle, perhaps one per expert: zero for what is not there."""
    if t is None:
        return (0,) * dims
    if t.dim() == dims:
        return t.stride()
    return (t.stride(0), 0, *t.stride()[1:])
