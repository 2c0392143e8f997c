"""The backward products of expert layers.

``gemm_bwd_du_kernel`` is one product with everything that hangs on it in its epilogue: dh = dy @ w2[e] stays in the accumulator, is
multiplied there by h = act(u) and summed over the tile's columns (the gate's gradient: one number per row and column tile, added later
in a fixed order, no atomics), becomes du, and leaves a = weight * h for the weights' gradient. Expert outputs are never stored.
``gemm_bwd_dw_kernel`` gives each expert's weight gradient to tiles of [BM, BN] that loop over the expert's rows, gathered by the loads:
no row is copied, no two programs meet, and an expert without rows writes zeros. The bias's gradient is summed by the programs of the
first column tile in a loop of their own, so that the loop of products stays free of reductions.
dx is a forward product (``linear``, ``linear_sum``) with transposed strides.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from cmoe_kernels.ops.activation_triton import activate, derivative
from cmoe_kernels.ops.gemm_triton import GROUP, TL_DTYPES, launch, precision, source_rows, strides, tile_for, tile_order, tile_rows


@triton.jit
def gemm_bwd_du_kernel(
    dy, w, u, scale, du, h, parts, offsets, gather, scatter,
    rows, width, depth, experts,
    sd_r, sd_k, sw_e, sw_n, sw_k, su_r, su_e, su_n, ss_r, ss_e, so_r, so_e, sh_r, sh_e, sp_n, sp_r, sp_e,
    DIV: tl.constexpr, ACT: tl.constexpr, GATED: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr, EP: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """dh = dy @ w[e]; parts = sum over n of dh * act(u); du = scale * dh * act'(u); h = scale * act(u). ACT None: u is a row of x."""
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
    far_r, far_n, far_e = r.to(tl.int64), n.to(tl.int64), expert.to(tl.int64)
    ds = dy + source[:, None] * sd_r + k[None, :] * sd_k
    ws = w + far_e * sw_e + far_n[None, :] * sw_n + k[:, None] * sw_k
    acc = tl.zeros((BM, BN), tl.float32)
    for start in range(0, tl.where(expert < experts, depth, 0), BK):
        d = tl.load(ds, mask=served[:, None] & (k[None, :] < depth - start), other=0.0)
        v = tl.load(ws, mask=(n[None, :] < width) & (k[:, None] < depth - start), other=0.0)
        acc = tl.dot(d.to(OPERAND), v.to(OPERAND), acc, input_precision=PRECISION)
        ds += BK * sd_k
        ws += BK * sw_k

    inside = served[:, None] & (n < width)[None, :]
    written = live[:, None] & (n < width)[None, :]
    if u is not None:
        us = u + (source if ACT is None else far_r)[:, None] * su_r + far_e * su_e + far_n[None, :] * su_n
        pre = tl.load(us, mask=inside, other=0.0).to(tl.float32)
        act = activate(pre, ACT)
        if GATED:
            up = tl.load(us + width, mask=inside, other=0.0).to(tl.float32)
    if parts is not None:
        sums = tl.sum(acc * act * up, 1) if GATED else tl.sum(acc * act, 1)
        tl.store(parts + tile_n.to(tl.int64) * sp_n + far_r * sp_r + far_e * sp_e, sums, mask=live)
    if scale is not None:
        s = tl.load(scale + far_r * ss_r + far_e * ss_e, mask=served, other=0.0)[:, None]
        acc *= s
    if h is not None:
        value = act * up if GATED else act
        if scale is not None:
            value *= s
        tl.store(h + far_r[:, None] * sh_r + far_e * sh_e + far_n[None, :], value.to(h.dtype.element_ty), mask=written)
    if du is not None:
        target, stored = source_rows(scatter, r, live, rows, 1)
        outs = du + target[:, None] * so_r + far_e * so_e + far_n[None, :]
        written = stored[:, None] & (n < width)[None, :]
        if GATED:
            tl.store(outs + width, (acc * act).to(du.dtype.element_ty), mask=written)
            acc *= up
        if ACT is not None:
            acc *= derivative(pre, ACT)
        tl.store(outs, acc.to(du.dtype.element_ty), mask=written)


@triton.jit
def gemm_bwd_dw_kernel(
    p, q, scale, dw, db, offsets, p_index, q_index,
    rows, height, width,
    sp_r, sp_e, sp_m, sq_r, sq_e, sq_n, ss_r, ss_e, sw_e, sw_m, sw_n, sb_e,
    P_DIV: tl.constexpr, Q_DIV: tl.constexpr, SCALE: tl.constexpr, ROUND: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """dw[e] = sum over rows of p[r]^T q[r]; db[e] = sum of scale[r] * p[r]; SCALE: scale[r] * p[r] in dw too."""
    tiles_m, tiles_n = tl.cdiv(height, BM), 1 if dw is None else tl.cdiv(width, BN)
    pid = tl.program_id(0)
    expert = (pid // (tiles_m * tiles_n)).to(tl.int64)
    tile_m, tile_n = tile_order(pid % (tiles_m * tiles_n), tiles_m, tiles_n, GROUP)
    first, end = 0, rows
    if offsets is not None:
        first = tl.maximum(tl.load(offsets + expert), 0)
        end = tl.minimum(tl.load(offsets + expert + 1), rows)
    m = tile_m * BM + tl.arange(0, BM)
    n = tile_n * BN + tl.arange(0, BN)
    ps = p + expert * sp_e + m.to(tl.int64)[:, None] * sp_m
    qs = q + expert * sq_e + n.to(tl.int64)[None, :] * sq_n
    if dw is not None:
        acc = tl.zeros((BM, BN), tl.float32)
        for start in range(first, end, BR):
            r = start + tl.arange(0, BR)
            live = r < end
            p_row, p_live = source_rows(p_index, r, live, rows, P_DIV)
            q_row, q_live = source_rows(q_index, r, live, rows, Q_DIV)
            a = tl.load(ps + p_row[None, :] * sp_r, mask=p_live[None, :] & (m < height)[:, None], other=0.0)
            if SCALE:
                s = tl.load(scale + r.to(tl.int64) * ss_r + expert * ss_e, mask=live, other=0.0)
                a = a.to(tl.float32) * s[None, :]
            c = tl.load(qs + q_row[:, None] * sq_r, mask=q_live[:, None] & (n < width)[None, :], other=0.0)
            acc = tl.dot(a.to(OPERAND), c.to(ROUND).to(OPERAND), acc, input_precision=PRECISION)
        out = dw + expert * sw_e + m.to(tl.int64)[:, None] * sw_m + n.to(tl.int64)[None, :] * sw_n
        tl.store(out, acc.to(dw.dtype.element_ty), mask=(m < height)[:, None] & (n < width)[None, :])
    if db is not None:
        if tile_n == 0:
            total = tl.zeros((BM,), tl.float32)
            for start in range(first, end, BR):
                r = start + tl.arange(0, BR)
                live = r < end
                p_row, p_live = source_rows(p_index, r, live, rows, P_DIV)
                a = tl.load(ps + p_row[None, :] * sp_r, mask=p_live[None, :] & (m < height)[:, None], other=0.0).to(tl.float32)
                if scale is not None:
                    a *= tl.load(scale + r.to(tl.int64) * ss_r + expert * ss_e, mask=live, other=0.0)[None, :]
                total += tl.sum(a, 1)
            tl.store(db + expert * sb_e + m, total.to(db.dtype.element_ty), mask=m < height)


def hidden_grads(
    dy: Tensor,
    w: Tensor,
    u: Tensor | None,
    du: Tensor | None,
    h: Tensor | None,
    want_parts: bool,
    *,
    offsets: Tensor | None = None,
    gather: Tensor | None = None,
    k: int = 1,
    scatter: Tensor | None = None,
    scale: Tensor | None = None,
    activation: str | None = None,
    gated: bool = False,
) -> Tensor | None:
    """du and h = scale * act(u), written in place; returns the partial sums of <dh, act(u)>, [column tiles, rows (times E)].

    Args:
        dy: [T, O], read at gather[r] // k.
        w: [E, O, N] by strides.
        u: pre-activations [rows, N] (gated: [rows, 2N]) or [T, E, N] without offsets; with activation None the rows of x, [T, N].
    """
    experts, depth, width = w.shape
    rows = dy.shape[0] * k
    tile = tile_for(rows if offsets is None else rows // experts, dy.dtype, w.dtype)
    # The epilogue holds u, act(u) and dh at once, so half as wide a tile as a plain product has; gated, twice as many of them.
    tile = tile._replace(n=max(tile.n // 2, 16))
    if gated and tile.m >= 64:
        tile = tile._replace(m=min(tile.m, 64), warps=8)
    each = 1 if offsets is not None else experts
    parts = dy.new_empty(triton.cdiv(width, tile.n), rows * each, dtype=torch.float32) if want_parts else None
    tiles_m = triton.cdiv(rows, tile.m) * experts if offsets is None else rows // tile.m + experts + 1
    launch(
        gemm_bwd_du_kernel,
        tiles_m * triton.cdiv(width, tile.n) if rows else 0,
        *(dy, w, u, scale, du, h, parts, offsets, gather, scatter),
        *(rows, width, depth, experts),
        *(*dy.stride(), w.stride(0), w.stride(2), w.stride(1), *strides(u, 3), *strides(scale, 2), *strides(du, 3)[:2]),
        *(*strides(h, 3)[:2], rows * each, each, int(offsets is None)),
        DIV=k,
        ACT=activation,
        GATED=gated,
        OPERAND=TL_DTYPES[dy.dtype],
        PRECISION=precision(),
        EP=triton.next_power_of_2(experts + 1),
        BM=tile.m,
        BN=tile.n,
        BK=tile.k,
        GROUP=GROUP,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    return parts


def weight_grads(
    p: Tensor,
    q: Tensor,
    dw: Tensor | None,
    db: Tensor | None,
    *,
    rows: int,
    offsets: Tensor | None = None,
    p_index: Tensor | None = None,
    p_k: int = 1,
    q_index: Tensor | None = None,
    q_k: int = 1,
    scale: Tensor | None = None,
    scale_dw: bool = False,
    round_to: torch.dtype | None = None,
) -> None:
    """dw[e] = p^T q and db[e] = scale @ p over the rows of each expert, written in place.

    Args:
        p, q: [T, M], [T, N], read at index[r] // k; or [T, E, M], [T, E, N].
        dw: [E, M, N] by strides, db: [E, M].
        scale: [rows], or [T, E] without offsets: weighs p in db, and with ``scale_dw`` in dw.
    """
    target = db if dw is None else dw
    if target is None:
        return
    experts, height = target.shape[:2]
    width = q.shape[-1]
    tile = tile_for(max(height, width), p.dtype)
    columns = 1 if dw is None else triton.cdiv(width, tile.n)
    launch(
        gemm_bwd_dw_kernel,
        experts * triton.cdiv(height, tile.m) * columns,
        *(p, q, scale, dw, db, offsets, p_index, q_index),
        *(rows, height, width),
        *(*strides(p, 3), *strides(q, 3), *strides(scale, 2), *strides(dw, 3), strides(db, 2)[0]),
        P_DIV=p_k,
        Q_DIV=q_k,
        SCALE=scale_dw,
        ROUND=TL_DTYPES[round_to or p.dtype],
        OPERAND=TL_DTYPES[p.dtype],
        PRECISION=precision(),
        BM=tile.m,
        BN=tile.n,
        BR=tile.k,
        GROUP=GROUP,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
