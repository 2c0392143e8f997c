"""The sum of the experts' products, in the accumulator: the dense second layer, dx of the first, and products of few rows.

``grouped_gemm_sum_fwd_kernel`` is one loop over E * K. Where its tiles would leave multiprocessors idle (few rows, a long loop), the
loop is split among programs (split-K): each stores its partials in fp32, and ``partials_sum_kernel`` adds them in their order, so the
bits are the same each time. The biases, weighted by the gates, are added where the sum is complete.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from cmoe_kernels.ops.gemm.tiles import (
    TL_DTYPES,
    launch,
    launch_gemm,
    load_rows,
    load_weights,
    operand,
    reads_by_tma,
    strides,
    tile_order,
)
from cmoe_kernels.ops.gemm.tuning import Tile, splits, tuned


@triton.jit
def _add_bias(acc, b, gates, r, n, live, columns, experts, sb_e, sb_n, sg_r, sg_e, ROUND: tl.constexpr):
    """acc + sum over e of gates[r, e] * b[e, n]; a gate that is not there is one."""
    for e in range(experts):
        far = tl.cast(e, tl.int64)
        bias = tl.load(b + far * sb_e + n * sb_n, mask=columns, other=0.0).to(ROUND).to(tl.float32)[None, :]
        if gates is None:
            acc += bias
        else:
            acc += tl.load(gates + r * sg_r + far * sg_e, mask=live, other=0.0)[:, None] * bias
    return acc


@triton.jit
def grouped_gemm_sum_fwd_kernel(
    x, w, b, gates, y, partials,
    rows, width, depth, experts, splits,
    sx_r, sx_e, sx_k, sw_e, sw_n, sw_k, sb_e, sb_n, sg_r, sg_e, sy_r,
    WEIGH_X: tl.constexpr, ROUND: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr, X_TMA: tl.constexpr, W_TMA: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """y[r] = sum_e w[e] @ x[r, e] + gates[r, e] * b[e], or its partials; WEIGH_X: gates[r, e] * x[r, e] in place of x[r, e]."""
    tiles_m, tiles_n = tl.cdiv(rows, BM), tl.cdiv(width, BN)
    k = tl.arange(0, BK).to(tl.int64)
    steps = tl.cdiv(depth, BK)
    share = tl.cdiv(experts * steps, splits)
    for tile in range(tl.program_id(0), tiles_m * tiles_n * splits, tl.num_programs(0)):
        part = tile // (tiles_m * tiles_n)
        tile_m, tile_n = tile_order(tile % (tiles_m * tiles_n), tiles_m, tiles_n, GROUP)
        first = tile_m * BM
        r = (first + tl.arange(0, BM)).to(tl.int64)
        n = (tile_n * BN + tl.arange(0, BN)).to(tl.int64)
        live, columns = r < rows, n < width
        acc = tl.zeros((BM, BN), tl.float32)
        for step in range(part * share, tl.minimum((part + 1) * share, experts * steps)):
            e = step // steps
            start = step % steps * BK
            far = tl.cast(e, tl.int64)
            xs = None if X_TMA is not None else x + (r[:, None] * sx_r + k[None, :] * sx_k) + far * sx_e
            ws = None if W_TMA is not None else w + (n[None, :] * sw_n + k[:, None] * sw_k) + far * sw_e
            a = load_rows(x, xs, tl.where(sx_e == 0, 0, e), first, start, live, depth, sx_k, BM, BK, X_TMA)
            if WEIGH_X:
                a = a.to(tl.float32) * tl.load(gates + r * sg_r + far * sg_e, mask=live, other=0.0)[:, None]
            v = load_weights(w, ws, e, tile_n * BN, start, columns, depth, sw_k, BN, BK, W_TMA)
            acc = tl.dot(a.to(OPERAND), v.to(ROUND).to(OPERAND), acc, input_precision=PRECISION)
        inside = live[:, None] & columns[None, :]
        if partials is not None:
            tl.store(partials + (tl.cast(part, tl.int64) * rows + r)[:, None] * width + n[None, :], acc, mask=inside)
        else:
            if b is not None:
                acc = _add_bias(acc, b, gates, r, n, live, columns, experts, sb_e, sb_n, sg_r, sg_e, ROUND)
            tl.store(y + r[:, None] * sy_r + n[None, :], acc.to(y.dtype.element_ty), mask=inside)


@triton.jit
def partials_sum_kernel(
    partials, b, gates, y, rows, width, experts, splits, sb_e, sb_n, sg_r, sg_e, sy_r,
    ROUND: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """y[r] = sum of partials[:, r] in their order + sum_e gates[r, e] * b[e]"""
    tiles_n = tl.cdiv(width, BN)
    r = (tl.program_id(0) // tiles_n * BM + tl.arange(0, BM)).to(tl.int64)
    n = (tl.program_id(0) % tiles_n * BN + tl.arange(0, BN)).to(tl.int64)
    live, columns = r < rows, n < width
    inside = live[:, None] & columns[None, :]
    total = tl.zeros((BM, BN), tl.float32)
    for part in range(splits):
        total += tl.load(partials + (tl.cast(part, tl.int64) * rows + r)[:, None] * width + n[None, :], mask=inside, other=0.0)
    if b is not None:
        total = _add_bias(total, b, gates, r, n, live, columns, experts, sb_e, sb_n, sg_r, sg_e, ROUND)
    tl.store(y + r[:, None] * sy_r + n[None, :], total.to(y.dtype.element_ty), mask=inside)


def sum_partials(partials: Tensor, y: Tensor, b: Tensor | None, gates: Tensor | None, round_to: torch.dtype) -> None:
    """y [T, N] = partials [splits, T, N] added in their order, plus b [E, N] weighted by gates [T, E], or by ones."""
    count, rows, width = partials.shape
    bn = min(128, max(16, triton.next_power_of_2(width)))
    bm = 1024 // bn
    launch(
        partials_sum_kernel,
        triton.cdiv(rows, bm) * triton.cdiv(width, bn),
        *(partials, b, gates, y, rows, width, 0 if b is None else b.shape[0], count, *strides(b, 2), *strides(gates, 2), y.stride(0)),
        ROUND=TL_DTYPES[round_to],
        BM=bm,
        BN=bn,
    )


def grouped_gemm_sum(
    x: Tensor,
    w: Tensor,
    y: Tensor,
    b: Tensor | None = None,
    gates: Tensor | None = None,
    weigh_x: bool = False,
    round_to: torch.dtype | None = None,
) -> None:
    """The sum of the experts' linear layers, into ``y`` [T, N].

    Args:
        x: [T, E, K], or [T, K] for all experts.
        w: [E, N, K] by strides; rounded to ``round_to`` (default x's dtype), multiplied in the dtype of x.
        gates: [T, E], the weights of b [E, N]; with ``weigh_x`` also of x.
    """
    experts, width, depth = w.shape
    rows = x.shape[0]
    sx_r, sx_e, sx_k = strides(x, 3)
    rounded = round_to or x.dtype

    def run(tile: Tile) -> None:
        tma = reads_by_tma(x)
        x_operand, x_tma = operand(x if x.dim() == 2 else x.transpose(0, 1), (tile.m, tile.k), tma)
        w_operand, w_tma = operand(w, (tile.n, tile.k), tma)
        tiles = triton.cdiv(rows, tile.m) * triton.cdiv(width, tile.n)
        count = splits(tiles, experts * triton.cdiv(depth, tile.k), tile, x)
        partials = None if count == 1 else x.new_empty(count, rows, width, dtype=torch.float32)
        launch_gemm(
            grouped_gemm_sum_fwd_kernel,
            tile,
            tiles * count,
            x,
            *(x_operand, w_operand, b, gates, y, partials),
            *(rows, width, depth, experts, count),
            *(sx_r, sx_e, sx_k, *w.stride(), *strides(b, 2), *strides(gates, 2), y.stride(0)),
            WEIGH_X=weigh_x,
            ROUND=TL_DTYPES[rounded],
            OPERAND=TL_DTYPES[x.dtype],
            X_TMA=x_tma,
            W_TMA=w_tma,
        )
        if partials is not None:
            sum_partials(partials, y, b, gates, rounded)

    tuned("gemm_sum_scaled" if weigh_x else "gemm_sum", rows, x, w, run)
