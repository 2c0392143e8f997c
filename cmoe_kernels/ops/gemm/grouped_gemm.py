"""The product of expert layers: rows by the weights of their expert.

Memory plan. A tile of BM rows belongs to one expert, so its weights are read as they are stored, [E, N, K] by strides, never copied;
fp32 weights are rounded on their way to the tensor cores. Rows of x are gathered by the load (``gather``, divided by K assignments per
token) and results scattered by the store, so gathered rows never exist. Bias, activation and the row's weight are applied to the fp32
accumulator: one rounding at the store, and the pre-activation ``u``, when it is saved, is written by the same pass.

Experts may have a short tile each, and the rows of no expert are written as zeros. Without offsets every expert sees every row (dense
layers, N = E * H). How programs share the tiles, and how tiles are read, is in tiles.py.
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
from cmoe_kernels.ops.rows.activation import activate


@triton.jit
def grouped_gemm_fwd_kernel(
    x, w, b, routing_weights, u, y, offsets, gather, scatter,
    rows, width, depth, experts,
    sx_r, sx_k, sw_e, sw_n, sw_k, sb_e, sb_n, ss_r, ss_e, su_r, su_e, sy_r, sy_e,
    DIV: tl.constexpr, ACT: tl.constexpr, GATED: tl.constexpr, WEIGH_BIAS: tl.constexpr,
    ROUND: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr, X_TMA: tl.constexpr, W_TMA: tl.constexpr, EP: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """y[scatter[r]] = s * act(w[e] @ x[gather[r] // DIV] + b[e]), s the routing weight, or s on the bias only; u is what goes into act."""
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
        wide_e, wide_n = expert.to(tl.int64), n.to(tl.int64)
        xs = None if X_TMA is not None else x + source[:, None] * sx_r + k[None, :] * sx_k
        ws = None if W_TMA is not None else w + wide_e * sw_e + wide_n[None, :] * sw_n + k[:, None] * sw_k
        ws_up = None if W_TMA is not None or not GATED else ws + tl.cast(width, tl.int64) * sw_n
        acc = tl.zeros((BM, BN), tl.float32)
        up = tl.zeros((BM, BN), tl.float32)
        for start in range(0, tl.where(known, depth, 0), BK):
            a = load_rows(x, xs, 0, first, start, served, depth, sx_k, BM, BK, X_TMA).to(OPERAND)
            v = load_weights(w, ws, expert, tile_n * BN, start, columns, depth, sw_k, BN, BK, W_TMA)
            if GATED:  # two sums leave no registers for a third
                acc = tl.dot(a, v.to(ROUND).to(OPERAND), acc, input_precision=PRECISION)
                v = load_weights(w, ws_up, expert, width + tile_n * BN, start, columns, depth, sw_k, BN, BK, W_TMA)
                up = tl.dot(a, v.to(ROUND).to(OPERAND), up, input_precision=PRECISION)
            else:
                acc = multiply_add(a, v.to(ROUND).to(OPERAND), acc, PRECISION)

        if routing_weights is not None:
            s = tl.load(routing_weights + r.to(tl.int64) * ss_r + wide_e * ss_e, mask=served, other=0.0)
        if b is not None:
            bs = b + wide_e * sb_e + wide_n * sb_n
            bias = tl.load(bs, mask=columns & known, other=0.0).to(ROUND).to(tl.float32)[None, :]
            acc += s[:, None] * bias if WEIGH_BIAS else bias
            if GATED:
                up += tl.load(bs + tl.cast(width, tl.int64) * sb_n, mask=columns & known, other=0.0).to(ROUND).to(tl.float32)[None, :]
        if ACT is not None:
            # The saved value is what backward will see, so act sees it too.
            acc = tl.where(served[:, None], acc, 0.0).to(ROUND)
            up = tl.where(served[:, None], up, 0.0).to(ROUND)
            if u is not None:
                us = u + r.to(tl.int64)[:, None] * su_r + wide_e * su_e + wide_n[None, :]
                tl.store(us, acc, mask=live[:, None] & columns[None, :])
                if GATED:
                    tl.store(us + width, up, mask=live[:, None] & columns[None, :])
            acc = activate(acc.to(tl.float32), ACT)
            if GATED:
                acc *= up.to(tl.float32)
        if y is not None:
            if routing_weights is not None and not WEIGH_BIAS:
                acc *= s[:, None]
            target, stored = source_rows(scatter, r, live, rows, 1)
            ys = y + target[:, None] * sy_r + wide_e * sy_e + wide_n[None, :]
            value = tl.where(served[:, None], acc, 0.0).to(y.dtype.element_ty)
            tl.store(ys, value, mask=stored[:, None] & columns[None, :])


def grouped_gemm(
    x: Tensor,
    w: Tensor,
    b: Tensor | None = None,
    *,
    offsets: Tensor | None = None,
    gather: Tensor | None = None,
    k: int = 1,
    scatter: Tensor | None = None,
    routing_weights: Tensor | None = None,
    weigh_bias: bool = False,
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
        routing_weights: the rows' weights, [rows], or [T, E] without offsets; ``weigh_bias``: x is weighted already, the bias is not.
    """
    experts, width, depth = w.shape
    if gated:
        width //= 2
    rows = x.shape[0] * k

    def run(tile: Tile) -> None:
        # At most one tile per expert is short, and one more holds unrouted rows.
        tiles_m = triton.cdiv(rows, tile.m) * experts if offsets is None else rows // tile.m + experts + 1
        tma = reads_by_tma(x)
        x_operand, x_tma = operand(x, (tile.m, tile.k), tma, gather, k)
        # The second half begins where a descriptor may not, if it lies along the memory's rows and is no multiple of 16 bytes.
        w_operand, w_tma = operand(w, (tile.n, tile.k), tma and not (gated and width * w.element_size() % 16))
        launch_gemm(
            grouped_gemm_fwd_kernel,
            tile,
            tiles_m * triton.cdiv(width, tile.n) if rows else 0,
            x,
            *(x_operand, w_operand, b, routing_weights, u, y, offsets, gather, scatter),
            *(rows, width, depth, experts),
            *(*x.stride(), *w.stride(), *strides(b, 2), *strides(routing_weights, 2), *strides(u, 3)[:2], *strides(y, 3)[:2]),
            DIV=k,
            ACT=activation,
            GATED=gated,
            WEIGH_BIAS=weigh_bias,
            ROUND=TL_DTYPES[round_to or x.dtype],
            OPERAND=TL_DTYPES[x.dtype],
            X_TMA=x_tma,
            W_TMA=w_tma,
            EP=triton.next_power_of_2(experts + 1),
        )

    tuned("gemm_gated" if gated else "gemm", rows if offsets is None else rows // experts, x, w, run)
