"""The weights' gradients of expert layers.

``wgrad_bwd_kernel`` gives each expert's weight gradient to tiles of [BM, BN] that loop over the expert's rows, gathered by the loads:
no row is copied, no two programs meet, and an expert without rows writes zeros. Rows are what the product sums over, so those past an
expert's end must be zeros on both sides: through descriptors, whole steps run without a mask and the last one is masked in registers.
The bias's gradient is summed with the first column tile in a loop of its own, so that the loop of products stays free of reductions.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from cmoe_kernels.ops.gemm.tiles import TL_DTYPES, launch_gemm, multiply_add, operand, reads_by_tma, source_rows, strides, tile_order
from cmoe_kernels.ops.gemm.tuning import Tile, tuned


@triton.jit
def _tile(
    t, pointers, index, expert, start, end, rows, column, columns, stride,
    DIV: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr, TMA: tl.constexpr, LAST: tl.constexpr, COLUMNS_FIRST: tl.constexpr,
):  # fmt: skip
    """[BR, BC] or [BC, BR] of an operand: rows ``start`` to ``end`` as its index says, then zeros; by descriptor those only in LAST."""
    r = start + tl.arange(0, BR)
    live = r < end
    if TMA is None:
        source, live = source_rows(index, r, live, rows, DIV)
        if COLUMNS_FIRST:
            return tl.load(pointers[:, None] + source[None, :] * stride, mask=live[None, :] & columns[:, None], other=0.0)
        else:
            return tl.load(pointers[None, :] + source[:, None] * stride, mask=live[:, None] & columns[None, :], other=0.0)
    else:
        value = tl.reshape(t.load([expert, start, column]), [BR, BC])
        if LAST:
            value = tl.where(live[:, None], value, 0.0).to(value.dtype)
        return tl.trans(value) if COLUMNS_FIRST else value


@triton.jit
def _step(
    acc, p, ps, p_index, p_expert, q, qs, q_index, q_expert, weights,
    start, end, rows, m0, n0, in_m, in_n, sp_r, sq_r, ss_r,
    P_DIV: tl.constexpr, Q_DIV: tl.constexpr, ROUND: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
    P_TMA: tl.constexpr, Q_TMA: tl.constexpr, LAST: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """acc + p[r]^T q[r] over the rows of one step, p weighted by ``weights`` where given."""
    a = _tile(p, ps, p_index, p_expert, start, end, rows, m0, in_m, sp_r, P_DIV, BR, BM, P_TMA, LAST, True)
    if weights is not None:
        r = start + tl.arange(0, BR)
        a = a.to(tl.float32) * tl.load(weights + r.to(tl.int64) * ss_r, mask=r < end, other=0.0)[None, :]
    c = _tile(q, qs, q_index, q_expert, start, end, rows, n0, in_n, sq_r, Q_DIV, BR, BN, Q_TMA, LAST, False)
    return multiply_add(a.to(OPERAND), c.to(ROUND).to(OPERAND), acc, PRECISION)


@triton.jit
def wgrad_bwd_kernel(
    p, q, p_bias, routing_weights, dw, db, offsets, p_index, q_index,
    rows, height, width, experts,
    sp_r, sp_e, sp_m, sq_r, sq_e, sq_n, ss_r, ss_e, sw_e, sw_m, sw_n, sb_e,
    P_DIV: tl.constexpr, Q_DIV: tl.constexpr, WEIGH_DW: tl.constexpr, ROUND: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
    P_TMA: tl.constexpr, Q_TMA: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """dw[e] = sum over rows of p[r]^T q[r]; db[e] = sum of s[r] * p_bias[r], s the routing weight; WEIGH_DW: s[r] * p[r] in dw too."""
    tiles_m, tiles_n = tl.cdiv(height, BM), 1 if dw is None else tl.cdiv(width, BN)
    for tile in range(tl.program_id(0), experts * tiles_m * tiles_n, tl.num_programs(0)):
        e = tile // (tiles_m * tiles_n)
        tile_m, tile_n = tile_order(tile % (tiles_m * tiles_n), tiles_m, tiles_n, GROUP)
        expert = e.to(tl.int64)
        first, end = 0, rows
        if offsets is not None:
            first = tl.maximum(tl.load(offsets + expert), 0)
            end = tl.minimum(tl.load(offsets + expert + 1), rows)
        m = tile_m * BM + tl.arange(0, BM)
        n = tile_n * BN + tl.arange(0, BN)
        in_m, in_n = m < height, n < width
        weights = None if routing_weights is None else routing_weights + expert * ss_e
        factor = weights if WEIGH_DW else None
        if dw is not None:
            ps = None if P_TMA is not None else p + expert * sp_e + m.to(tl.int64) * sp_m
            qs = None if Q_TMA is not None else q + expert * sq_e + n.to(tl.int64) * sq_n
            pe, qe = tl.where(sp_e == 0, 0, e), tl.where(sq_e == 0, 0, e)
            acc = tl.zeros((BM, BN), tl.float32)
            whole = end
            if P_TMA is not None or Q_TMA is not None:
                whole = first + tl.maximum(end - first, 0) // BR * BR
            for start in range(first, whole, BR):
                acc = _step(
                    acc, p, ps, p_index, pe, q, qs, q_index, qe, factor,
                    start, end, rows, tile_m * BM, tile_n * BN, in_m, in_n, sp_r, sq_r, ss_r,
                    P_DIV, Q_DIV, ROUND, OPERAND, PRECISION, P_TMA, Q_TMA, False, BM, BN, BR,
                )  # fmt: skip
            if P_TMA is not None or Q_TMA is not None:
                if whole < end:
                    acc = _step(
                        acc, p, ps, p_index, pe, q, qs, q_index, qe, factor,
                        whole, end, rows, tile_m * BM, tile_n * BN, in_m, in_n, sp_r, sq_r, ss_r,
                        P_DIV, Q_DIV, ROUND, OPERAND, PRECISION, P_TMA, Q_TMA, True, BM, BN, BR,
                    )  # fmt: skip
            out = dw + expert * sw_e + m.to(tl.int64)[:, None] * sw_m + n.to(tl.int64)[None, :] * sw_n
            tl.store(out, acc.to(dw.dtype.element_ty), mask=in_m[:, None] & in_n[None, :])
        if db is not None:
            if tile_n == 0:
                total = tl.zeros((BM,), tl.float32)
                bs = p_bias + expert * sp_e + m.to(tl.int64) * sp_m
                for start in range(first, end, BR):
                    a = _tile(p_bias, bs, p_index, 0, start, end, rows, 0, in_m, sp_r, P_DIV, BR, BM, None, False, True).to(tl.float32)
                    if weights is not None:
                        r = start + tl.arange(0, BR)
                        a *= tl.load(weights + r.to(tl.int64) * ss_r, mask=r < end, other=0.0)[None, :]
                    total += tl.sum(a, 1)
                tl.store(db + expert * sb_e + m, total.to(db.dtype.element_ty), mask=in_m)


def wgrad(
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
    routing_weights: Tensor | None = None,
    weigh_dw: bool = False,
    round_to: torch.dtype | None = None,
) -> None:
    """dw[e] = p^T q and db[e] = routing_weights @ p over the rows of each expert, written in place.

    Args:
        p, q: [T, M], [T, N], read at index[r] // k; or [T, E, M], [T, E, N].
        dw: [E, M, N] by strides, db: [E, M].
        routing_weights: [rows], or [T, E] without offsets: weighs p in db, and with ``weigh_dw`` in dw.
    """
    target = db if dw is None else dw
    if target is None:
        return
    experts, height = target.shape[:2]
    width = q.shape[-1]

    def run(tile: Tile) -> None:
        columns = 1 if dw is None else triton.cdiv(width, tile.n)
        tma = reads_by_tma(p) and dw is not None
        p_operand, p_tma = _operand(p, tile.k, tile.m, tma, p_index, p_k)
        q_operand, q_tma = _operand(q, tile.k, tile.n, tma, q_index, q_k)
        launch_gemm(
            wgrad_bwd_kernel,
            tile,
            experts * triton.cdiv(height, tile.m) * columns,
            p,
            *(p_operand, q_operand, p, routing_weights, dw, db, offsets, p_index, q_index),
            *(rows, height, width, experts),
            *(*strides(p, 3), *strides(q, 3), *strides(routing_weights, 2), *strides(dw, 3), strides(db, 2)[0]),
            P_DIV=p_k,
            Q_DIV=q_k,
            WEIGH_DW=weigh_dw,
            ROUND=TL_DTYPES[round_to or p.dtype],
            OPERAND=TL_DTYPES[p.dtype],
            P_TMA=p_tma,
            Q_TMA=q_tma,
            depth="BR",
        )

    tuned("gemm_dw", max(height, width), p, q, run)


def _operand(t: Tensor, rows: int, columns: int, tma: bool, index: Tensor | None, k: int) -> tuple[object, str | None]:
    """Rows that lie along their columns; a step of the product goes down the rows."""
    return operand(t if t.dim() == 2 else t.transpose(0, 1), (rows, columns), tma and t.stride(-1) == 1, index, k)
