"""The backward products of expert layers that give gradients of rows and of gates.

``dact_gemm_bwd_kernel`` is one product with everything that hangs on it in its epilogue: dh = dy @ w2[e] stays in the accumulator, is
multiplied there by h = act(u) and summed over the tile's columns (partials of the routing weight's gradient: one number per row and
column tile, added later in a fixed order, no atomics), becomes du, and leaves the weighted hidden, routing weight * h, for wgrad. Expert
outputs are never stored.
``dense_dgrad_bwd_kernel`` does the same for dense experts of a single layer: dy @ w1[e] gives both the gate's gradient, by its product with
x, and its share of dx, so the experts are gone through once. dx of other layers is a forward product with transposed strides.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from cmoe_kernels.ops.gemm.tiles import (
    TL_DTYPES,
    count_row_tiles,
    launch_gemm,
    load_rows,
    load_weights,
    multiply_add,
    operand,
    reads_by_tma,
    source_rows,
    strides,
    tile_order,
    tile_rows,
)
from cmoe_kernels.ops.gemm.tuning import Tile, tuned
from cmoe_kernels.ops.rows.activation import activate, derivative


@triton.jit
def dact_gemm_bwd_kernel(
    dy, w, u, routing_weights, du, weighted_hidden, partials, offsets, gather, scatter,
    rows, width, depth, experts,
    sd_r, sd_k, sw_e, sw_n, sw_k, su_r, su_e, su_n, ss_r, ss_e, so_r, so_e, sh_r, sh_e, sp_n, sp_r, sp_e,
    DIV: tl.constexpr, ACT: tl.constexpr, GATED: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr, D_TMA: tl.constexpr, W_TMA: tl.constexpr, EP: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """dh = dy @ w[e]; partials = sum over n of dh * act(u); du = s * dh * act'(u); weighted_hidden = s * act(u), s the routing weight.

    ACT None: u is a row of x.
    """
    tiles_m, tiles_n = count_row_tiles(offsets, rows, experts, EP, BM), tl.cdiv(width, BN)
    k = tl.arange(0, BK).to(tl.int64)
    for tile in range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0)):
        tile_m, tile_n = tile_order(tile, tiles_m, tiles_n, GROUP)
        expert, first, end = tile_rows(tile_m, offsets, rows, experts, EP, BM)
        known = expert < experts
        r = first + tl.arange(0, BM)
        live = r < end
        source, served = source_rows(gather, r, live & known, rows, DIV)
        n = tile_n * BN + tl.arange(0, BN)
        columns = n < width
        far_r, far_n, far_e = r.to(tl.int64), n.to(tl.int64), expert.to(tl.int64)
        ds = None if D_TMA is not None else dy + source[:, None] * sd_r + k[None, :] * sd_k
        ws = None if W_TMA is not None else w + far_e * sw_e + far_n[None, :] * sw_n + k[:, None] * sw_k
        acc = tl.zeros((BM, BN), tl.float32)
        for start in range(0, tl.where(known, depth, 0), BK):
            d = load_rows(dy, ds, 0, first, start, served, depth, sd_k, BM, BK, D_TMA)
            v = load_weights(w, ws, expert, tile_n * BN, start, columns, depth, sw_k, BN, BK, W_TMA)
            acc = multiply_add(d.to(OPERAND), v.to(OPERAND), acc, PRECISION)

        # A descriptor's rows past the end, and those of a wrong index, are no rows.
        acc = tl.where(served[:, None], acc, 0.0)
        inside = served[:, None] & columns[None, :]
        written = live[:, None] & columns[None, :]
        if u is not None:
            us = u + (source if ACT is None else far_r)[:, None] * su_r + far_e * su_e + far_n[None, :] * su_n
            pre = tl.load(us, mask=inside, other=0.0).to(tl.float32)
            act = activate(pre, ACT)
            if GATED:
                up = tl.load(us + width, mask=inside, other=0.0).to(tl.float32)
        if partials is not None:
            sums = tl.sum(acc * act * up, 1) if GATED else tl.sum(acc * act, 1)
            tl.store(partials + tile_n.to(tl.int64) * sp_n + far_r * sp_r + far_e * sp_e, sums, mask=live)
        if routing_weights is not None:
            s = tl.load(routing_weights + far_r * ss_r + far_e * ss_e, mask=served, other=0.0)[:, None]
            acc *= s
        if weighted_hidden is not None:
            value = act * up if GATED else act
            if routing_weights is not None:
                value *= s
            tl.store(
                weighted_hidden + far_r[:, None] * sh_r + far_e * sh_e + far_n[None, :],
                value.to(weighted_hidden.dtype.element_ty),
                mask=written,
            )
        if du is not None:
            target, stored = source_rows(scatter, r, live, rows, 1)
            outs = du + target[:, None] * so_r + far_e * so_e + far_n[None, :]
            written = stored[:, None] & columns[None, :]
            if GATED:
                tl.store(outs + width, (acc * act).to(du.dtype.element_ty), mask=written)
                acc *= up
            if ACT is not None:
                acc *= derivative(pre, ACT)
            tl.store(outs, acc.to(du.dtype.element_ty), mask=written)


@triton.jit
def dense_dgrad_bwd_kernel(
    dy, w, x, gates, dx, partials,
    rows, width, depth, experts,
    sd_r, sd_k, sw_e, sw_n, sw_k, sx_r, sx_n, sg_r, sg_e, so_r,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr, D_TMA: tl.constexpr, W_TMA: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """For each expert z = dy @ w[e]: partials = sum over n of z * x; dx = sum over e of gates[e] * z."""
    tiles_m, tiles_n = tl.cdiv(rows, BM), tl.cdiv(width, BN)
    k = tl.arange(0, BK).to(tl.int64)
    for tile in range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0)):
        tile_m, tile_n = tile_order(tile, tiles_m, tiles_n, GROUP)
        first = tile_m * BM
        r = (first + tl.arange(0, BM)).to(tl.int64)
        n = (tile_n * BN + tl.arange(0, BN)).to(tl.int64)
        live, columns = r < rows, n < width
        inside = live[:, None] & columns[None, :]
        total = tl.zeros((BM, BN), tl.float32)
        for e in range(experts):
            far = tl.cast(e, tl.int64)
            ds = None if D_TMA is not None else dy + r[:, None] * sd_r + k[None, :] * sd_k
            ws = None if W_TMA is not None else w + far * sw_e + (n[None, :] * sw_n + k[:, None] * sw_k)
            acc = tl.zeros((BM, BN), tl.float32)
            for start in range(0, depth, BK):
                d = load_rows(dy, ds, 0, first, start, live, depth, sd_k, BM, BK, D_TMA)
                v = load_weights(w, ws, e, tile_n * BN, start, columns, depth, sw_k, BN, BK, W_TMA)
                acc = multiply_add(d.to(OPERAND), v.to(OPERAND), acc, PRECISION)
            xs = tl.load(x + r[:, None] * sx_r + n[None, :] * sx_n, mask=inside, other=0.0).to(tl.float32)
            tl.store(partials + (tile_n.to(tl.int64) * rows + r) * experts + e, tl.sum(acc * xs, 1), mask=live)
            if dx is not None:
                total += acc * tl.load(gates + r * sg_r + far * sg_e, mask=live, other=0.0)[:, None]
        if dx is not None:
            tl.store(dx + r[:, None] * so_r + n[None, :], total.to(dx.dtype.element_ty), mask=inside)


def dact_gemm(
    dy: Tensor,
    w: Tensor,
    u: Tensor | None,
    du: Tensor | None,
    weighted_hidden: Tensor | None,
    want_partials: bool,
    *,
    offsets: Tensor | None = None,
    gather: Tensor | None = None,
    k: int = 1,
    scatter: Tensor | None = None,
    routing_weights: Tensor | None = None,
    activation: str | None = None,
    gated: bool = False,
) -> Tensor | None:
    """du and weighted_hidden = routing_weights * act(u), written in place; returns the partials of <dh, act(u)>.

    They are [column tiles, rows (times E)].

    Args:
        dy: [T, O], read at gather[r] // k.
        w: [E, O, N] by strides.
        u: pre-activations [rows, N] (gated: [rows, 2N]) or [T, E, N] without offsets; with activation None the rows of x, [T, N].
    """
    experts, depth, width = w.shape
    rows = dy.shape[0] * k
    each = 1 if offsets is not None else experts

    def run(tile: Tile) -> Tensor | None:
        partials = dy.new_empty(triton.cdiv(width, tile.n), rows * each, dtype=torch.float32) if want_partials else None
        tiles_m = triton.cdiv(rows, tile.m) * experts if offsets is None else rows // tile.m + experts + 1
        tma = reads_by_tma(dy)
        d_operand, d_tma = operand(dy, (tile.m, tile.k), tma, gather, k)
        w_operand, w_tma = operand(w.transpose(1, 2), (tile.n, tile.k), tma)
        launch_gemm(
            dact_gemm_bwd_kernel,
            tile,
            tiles_m * triton.cdiv(width, tile.n) if rows else 0,
            dy,
            *(d_operand, w_operand, u, routing_weights, du, weighted_hidden, partials, offsets, gather, scatter),
            *(rows, width, depth, experts),
            *(*dy.stride(), w.stride(0), w.stride(2), w.stride(1), *strides(u, 3), *strides(routing_weights, 2), *strides(du, 3)[:2]),
            *(*strides(weighted_hidden, 3)[:2], rows * each, each, int(offsets is None)),
            DIV=k,
            ACT=activation,
            GATED=gated,
            OPERAND=TL_DTYPES[dy.dtype],
            D_TMA=d_tma,
            W_TMA=w_tma,
            EP=triton.next_power_of_2(experts + 1),
        )
        return partials

    return tuned("gemm_du_gated" if gated else "gemm_du", rows if offsets is None else rows // experts, dy, w, run)


def dense_dgrad(dy: Tensor, w: Tensor, x: Tensor, gates: Tensor, dx: Tensor | None) -> Tensor:
    """dx of dense single layers [T, D], written in place; returns the partial sums of the gates' gradient, [column tiles, T * E].

    Args:
        dy: [T, O]. w: [E, O, D] by strides. x: [T, D]. gates: [T, E].
    """
    experts, depth, width = w.shape
    rows = dy.shape[0]

    def run(tile: Tile) -> Tensor:
        partials = dy.new_empty(triton.cdiv(width, tile.n), rows * experts, dtype=torch.float32)
        tma = reads_by_tma(dy)
        d_operand, d_tma = operand(dy, (tile.m, tile.k), tma)
        w_operand, w_tma = operand(w.transpose(1, 2), (tile.n, tile.k), tma)
        launch_gemm(
            dense_dgrad_bwd_kernel,
            tile,
            triton.cdiv(rows, tile.m) * triton.cdiv(width, tile.n),
            dy,
            *(d_operand, w_operand, x, gates, dx, partials),
            *(rows, width, depth, experts),
            *(*dy.stride(), w.stride(0), w.stride(2), w.stride(1), *x.stride(), *gates.stride(), 0 if dx is None else dx.stride(0)),
            OPERAND=TL_DTYPES[dy.dtype],
            D_TMA=d_tma,
            W_TMA=w_tma,
        )
        return partials

    return tuned("gemm_mix", rows, dy, w, run)
