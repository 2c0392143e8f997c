"""task_router on Triton kernels.

The hidden layer is the wide one: R is 45056 in Uni-Med. One kernel makes a tile of it, adds the row of its task (a bias [G, R], made by a
product over G rows), applies the activation and multiplies by w2 there and then, so without ``save`` nothing of size [T, R] is written;
with it, the pre-activation is, once. Each tile leaves its part of the logits, [R / BN, T, E] in fp32, and these are added in the order
of the tiles. More experts than MOST take the second layer as a product of its own.

Backward reads u twice: once for du and once for dw2 = dlogits^T act(u); du is summed per task to the gradient of the bias [G, R], from
which the task columns of w1, the task and b1 get theirs by products over G rows. dx, if x is not frozen, and the image columns of w1 are
one product each. Single linear layers (R = E) are computed in fp32 throughout, as logits are.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from cmoe_kernels.ops.gemm.grouped_gemm import grouped_gemm
from cmoe_kernels.ops.gemm.grouped_gemm_sum import grouped_gemm_sum, sum_partials
from cmoe_kernels.ops.gemm.tiles import (
    TL_DTYPES,
    launch,
    launch_gemm,
    load_rows,
    load_weights,
    multiply_add,
    operand,
    reads_by_tma,
    strides,
    tile_order,
)
from cmoe_kernels.ops.gemm.tuning import Tile, tuned
from cmoe_kernels.ops.gemm.wgrad import wgrad
from cmoe_kernels.ops.groups import per_token
from cmoe_kernels.ops.rows.activation import activate, derivative
from cmoe_kernels.ops.rows.reduce import column_sums, sum_per_group
from cmoe_kernels.ops.task_router.reference import Needs, input_rows

MOST = 16


@triton.jit
def task_router_fwd_kernel(
    x, w1, bias, ids, w2, u, h, partials,
    rows, width, depth, groups, experts,
    sx_r, sx_k, sw_n, sw_k, sb_g, sb_n, sv_e, sv_n,
    ACT: tl.constexpr, ROUND: tl.constexpr, PRECISION: tl.constexpr, X_TMA: tl.constexpr, W_TMA: tl.constexpr, EP: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """u = x @ w1^T + bias[ids]; partials[tile] = act(u) @ w2^T over the tile's columns, or h = act(u)."""
    tiles_m, tiles_n = tl.cdiv(rows, BM), tl.cdiv(width, BN)
    k = tl.arange(0, BK).to(tl.int64)
    for tile in range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0)):
        tile_m, tile_n = tile_order(tile, tiles_m, tiles_n, GROUP)
        r = (tile_m * BM + tl.arange(0, BM)).to(tl.int64)
        n = (tile_n * BN + tl.arange(0, BN)).to(tl.int64)
        live, columns = r < rows, n < width
        xs = None if X_TMA is not None else x + r[:, None] * sx_r + k[None, :] * sx_k
        ws = None if W_TMA is not None else w1 + n[None, :] * sw_n + k[:, None] * sw_k
        acc = tl.zeros((BM, BN), tl.float32)
        for start in range(0, depth, BK):
            a = load_rows(x, xs, 0, tile_m * BM, start, live, depth, sx_k, BM, BK, X_TMA)
            v = load_weights(w1, ws, 0, tile_n * BN, start, columns, depth, sw_k, BN, BK, W_TMA)
            acc = multiply_add(a, v.to(ROUND), acc, PRECISION)
        inside = live[:, None] & columns[None, :]
        if bias is not None:
            if ids is None:
                acc += tl.load(bias + n * sb_n, mask=columns, other=0.0).to(tl.float32)[None, :]
            else:
                group = tl.load(ids + r, mask=live, other=-1)
                known = (group >= 0) & (group < groups)
                acc += tl.load(bias + group[:, None] * sb_g + n[None, :] * sb_n, mask=known[:, None] & columns[None, :], other=0.0)
        pre = acc.to(ROUND)
        if u is not None:
            tl.store(u + r[:, None] * width + n[None, :], pre, mask=inside)
        act = activate(pre.to(tl.float32), ACT).to(ROUND)
        if h is not None:
            tl.store(h + r[:, None] * width + n[None, :], act, mask=inside)
        if partials is not None:
            # Columns past the end are act(0) times a weight of zero.
            e = tl.arange(0, EP)
            v = tl.load(w2 + e.to(tl.int64)[None, :] * sv_e + n[:, None] * sv_n, mask=(e < experts)[None, :] & columns[:, None], other=0.0)
            logits = tl.dot(act, v.to(ROUND), input_precision=PRECISION)
            place = (tile_n.to(tl.int64) * rows + r)[:, None] * experts + e[None, :]
            tl.store(partials + place, logits, mask=live[:, None] & (e < experts)[None, :])


@triton.jit
def task_router_bwd_du_kernel(
    dlogits, w2, u, du, rows, width, experts, sd_r, sd_e, sv_e, sv_n,
    ACT: tl.constexpr, ROUND: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """du = dlogits @ w2 * act'(u)"""
    tiles_n = tl.cdiv(width, BN)
    r = (tl.program_id(0) // tiles_n * BM + tl.arange(0, BM)).to(tl.int64)
    n = (tl.program_id(0) % tiles_n * BN + tl.arange(0, BN)).to(tl.int64)
    live, columns = r < rows, n < width
    inside = live[:, None] & columns[None, :]
    dh = tl.zeros((BM, BN), tl.float32)
    for e in range(experts):
        far = tl.cast(e, tl.int64)
        d = tl.load(dlogits + r * sd_r + far * sd_e, mask=live, other=0.0)
        v = tl.load(w2 + far * sv_e + n * sv_n, mask=columns, other=0.0).to(ROUND).to(tl.float32)
        dh += d[:, None] * v[None, :]
    place = r[:, None] * width + n[None, :]
    pre = tl.load(u + place, mask=inside, other=0.0).to(tl.float32)
    tl.store(du + place, (dh * derivative(pre, ACT)).to(du.dtype.element_ty), mask=inside)


def task_router(
    x: Tensor | None,
    task: Tensor | None,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor | None,
    b2: Tensor | None,
    group_ids: Tensor | None,
    activation: str,
    save: bool,
) -> tuple[Tensor, Tensor | None]:
    rows = input_rows(x, task)
    if w2 is None:
        return _one_layer(x, task, w1, b1, group_ids), None
    u = rows.new_empty(rows.shape[0], w1.shape[0]) if save else None
    if w2.shape[0] <= MOST:
        return _hidden_layer(x, task, w1, b1, w2, b2, group_ids, activation, u), u
    h = rows.new_empty(rows.shape[0], w1.shape[0])
    _hidden_layer(x, task, w1, b1, None, None, group_ids, activation, u, h)
    logits = rows.new_empty(rows.shape[0], w2.shape[0], dtype=torch.float32)
    grouped_gemm_sum(h, w2[None], logits, None if b2 is None else b2[None])
    return logits, u


def task_router_backward(
    dlogits: Tensor,
    x: Tensor | None,
    task: Tensor | None,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor | None,
    b2: Tensor | None,
    group_ids: Tensor | None,
    u: Tensor,
    activation: str,
    needs: list[bool],
) -> tuple[Tensor | None, ...]:
    need = Needs(*needs)
    rows = input_rows(x, task)
    dx = x.new_empty(x.shape) if x is not None and need.x else None
    dtask = task.new_empty(task.shape) if task is not None and need.task else None
    dw1 = w1.new_empty(w1.shape) if need.w1 else None
    want_db1 = b1 is not None and need.b1
    dw2 = db2 = db1 = None

    du = dlogits
    if w2 is not None:
        if not u.numel():
            u = rows.new_empty(rows.shape[0], w1.shape[0])
            _hidden_layer(x, task, w1, b1, None, None, group_ids, activation, u)
        if need.w2:
            dw2 = column_sums(u, w2.shape[0], w2.dtype, c=dlogits, activation=activation)
        if b2 is not None and need.b2:
            db2 = column_sums(dlogits, 1, b2.dtype)[0]
        du = _hidden_grad(dlogits, w2, u, activation) if any((need.x, need.task, need.w1, need.b1)) else du

    split = 0 if task is None else task.shape[1]
    if x is not None:
        if dx is not None:
            grouped_gemm(du, w1[:, split:].T[None], y=dx, round_to=x.dtype)
        if dw1 is not None:
            wgrad(du, x, dw1[None, :, split:], None, rows=x.shape[0], round_to=x.dtype)
    if (task is not None and (dtask is not None or dw1 is not None)) or want_db1:
        dbias = sum_per_group(du, group_ids, 1 if task is None else task.shape[0])
        if dtask is not None:
            grouped_gemm_sum(dbias, w1[:, :split].T[None], dtask, round_to=rows.dtype)
        if task is not None and dw1 is not None:
            wgrad(dbias, task, dw1[None, :, :split], None, rows=task.shape[0], round_to=rows.dtype)
        if b1 is not None and want_db1:
            db1 = column_sums(dbias, 1, b1.dtype)[0]
    return dx, dtask, dw1, db1, dw2, db2


def _task_bias(task: Tensor, w1: Tensor, b1: Tensor | None) -> Tensor:
    """What the first layer adds per task: [G, R], fp32."""
    bias = task.new_empty(task.shape[0], w1.shape[0], dtype=torch.float32)
    grouped_gemm(task, w1[None, :, : task.shape[1]], None if b1 is None else b1[None], y=bias)
    return bias


def _one_layer(x: Tensor | None, task: Tensor | None, w1: Tensor, b1: Tensor | None, group_ids: Tensor | None) -> Tensor:
    """logits = w1 @ [task; x] + b1 in fp32."""
    if x is None or task is None:
        rows = input_rows(x, task)
        logits = rows.new_empty(rows.shape[0], w1.shape[0], dtype=torch.float32)
        grouped_gemm_sum(rows, w1[None], logits, None if b1 is None else b1[None])
        return logits
    bias = _task_bias(task, w1, b1)
    logits = torch.empty(x.shape[0], w1.shape[0], dtype=torch.float32, device=x.device)
    grouped_gemm_sum(x, w1[None, :, task.shape[1] :], logits)
    return logits.add_(per_token(bias, group_ids))


def _hidden_layer(
    x: Tensor | None,
    task: Tensor | None,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor | None,
    b2: Tensor | None,
    group_ids: Tensor | None,
    activation: str,
    u: Tensor | None,
    h: Tensor | None = None,
) -> Tensor:
    """logits (with w2), u and h."""
    rows, bias = input_rows(x, task), None if b1 is None else b1[None]
    if x is not None and task is not None:
        bias, w1 = _task_bias(task, w1, b1), w1[:, task.shape[1] :]
    elif bias is not None:
        bias = bias.to(rows.dtype)
    tokens, width = rows.shape[0], w1.shape[0]
    experts = 0 if w2 is None else w2.shape[0]
    logits = rows.new_empty(tokens, experts, dtype=torch.float32)

    def run(tile: Tile) -> None:
        tiles_n = triton.cdiv(width, tile.n)
        partials = None if w2 is None else rows.new_empty(tiles_n, tokens, experts, dtype=torch.float32)
        tma = reads_by_tma(rows)
        x_operand, x_tma = operand(rows, (tile.m, tile.k), tma)
        w_operand, w_tma = operand(w1, (tile.n, tile.k), tma)
        launch_gemm(
            task_router_fwd_kernel,
            tile,
            triton.cdiv(tokens, tile.m) * tiles_n,
            rows,
            *(x_operand, w_operand, bias, None if group_ids is None else group_ids.contiguous(), w2, u, h, partials),
            *(tokens, width, w1.shape[1], 0 if bias is None else bias.shape[0], experts),
            *(*rows.stride(), *w1.stride(), *strides(bias, 2), *strides(w2, 2)),
            ACT=activation,
            ROUND=TL_DTYPES[rows.dtype],
            X_TMA=x_tma,
            W_TMA=w_tma,
            EP=16,
        )
        if partials is not None:
            sum_partials(partials, logits, None if b2 is None else b2[None], None, rows.dtype)

    tuned("task_router", tokens, rows, w1, run)
    return logits


def _hidden_grad(dlogits: Tensor, w2: Tensor, u: Tensor, activation: str) -> Tensor:
    rows, width = dlogits.shape[0], w2.shape[1]
    du = u.new_empty(rows, width)
    arguments = (dlogits, w2, u, du, rows, width, w2.shape[0], *dlogits.stride(), *w2.stride())
    programs = triton.cdiv(rows, 32) * triton.cdiv(width, 128)
    launch(task_router_bwd_du_kernel, programs, *arguments, ACT=activation, ROUND=TL_DTYPES[u.dtype], BM=32, BN=128)
    return du
