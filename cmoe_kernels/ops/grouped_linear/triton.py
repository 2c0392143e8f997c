"""grouped_linear on Triton kernels.

Forward is one kernel: gather on load, bias and activation in the epilogue, scatter on store. Backward reads dy where forward stored y;
without an activation it is the operand of both products as it lies, else du [T * k, O] is made once, in row order. A token's k rows of
dx are stored side by side and added in their order. The host reads neither offsets nor indices.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from cmoe_kernels.ops.gemm.grouped_gemm import grouped_gemm
from cmoe_kernels.ops.gemm.tiles import launch, source_rows
from cmoe_kernels.ops.gemm.wgrad import wgrad
from cmoe_kernels.ops.grouped_linear.reference import Needs
from cmoe_kernels.ops.rows.activation import derivative
from cmoe_kernels.ops.rows.reduce import sum_assignments


@triton.jit
def grouped_linear_bwd_du_kernel(dy, u, scatter, du, rows, width, sd_r, sd_n, ACT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    """du[r] = dy[scatter[r]] * act'(u[r])"""
    tiles_n = tl.cdiv(width, BN)
    r = tl.program_id(0) // tiles_n * BM + tl.arange(0, BM)
    n = tl.program_id(0) % tiles_n * BN + tl.arange(0, BN)
    live = r < rows
    source, served = source_rows(scatter, r, live, rows, 1)
    columns = (n < width)[None, :]
    d = tl.load(dy + source[:, None] * sd_r + n.to(tl.int64)[None, :] * sd_n, mask=served[:, None] & columns, other=0.0)
    place = r.to(tl.int64)[:, None] * width + n[None, :]
    pre = tl.load(u + place, mask=live[:, None] & columns, other=0.0).to(tl.float32)
    value = d.to(tl.float32) * derivative(pre, ACT)
    tl.store(du + place, value.to(du.dtype.element_ty), mask=live[:, None] & columns)


def grouped_linear(
    x: Tensor,
    w: Tensor,
    b: Tensor | None,
    offsets: Tensor,
    gather_idx: Tensor | None,
    k: int,
    scatter_idx: Tensor | None,
    activation: str | None,
    save: bool,
) -> tuple[Tensor, Tensor | None]:
    rows, width = x.shape[0] * k, w.shape[1]
    offsets = _clamped(offsets, rows)
    # An index that is no permutation would leave rows unwritten.
    y = x.new_empty(rows, width) if scatter_idx is None else x.new_zeros(rows, width)
    u = x.new_empty(rows, width) if save else None
    gather = _repeat(x, gather_idx, k)
    grouped_gemm(x, w, b, offsets=offsets, gather=gather, k=k, scatter=scatter_idx, activation=activation, u=u, y=y)
    return y, u


def grouped_linear_backward(
    dy: Tensor,
    x: Tensor,
    w: Tensor,
    b: Tensor | None,
    offsets: Tensor,
    gather_idx: Tensor | None,
    scatter_idx: Tensor | None,
    u: Tensor,
    k: int,
    activation: str | None,
    needs: list[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    need = Needs(*needs)
    rows = x.shape[0] * k
    offsets = _clamped(offsets, rows)
    du, du_index = dy, scatter_idx
    if activation is not None:
        du, du_index = torch.empty_like(u), None
        programs = triton.cdiv(rows, 16) * triton.cdiv(u.shape[1], 128)
        arguments = (dy, u, scatter_idx, du, rows, u.shape[1], *dy.stride())
        launch(grouped_linear_bwd_du_kernel, programs, *arguments, ACT=activation, BM=16, BN=128)
    dx = None
    if need.x:
        drows = x.new_empty(rows, x.shape[1]) if gather_idx is None else x.new_zeros(rows, x.shape[1])
        grouped_gemm(du, w.transpose(1, 2), offsets=offsets, gather=du_index, scatter=gather_idx, y=drows)
        dx = sum_assignments(drows, k)
    dw = w.new_empty(w.shape) if need.w else None
    db = b.new_empty(b.shape) if b is not None and need.b else None
    wgrad(du, x, dw, db, rows=rows, offsets=offsets, p_index=du_index, q_index=_repeat(x, gather_idx, k), q_k=k)
    return dx, dw, db


def _clamped(offsets: Tensor, rows: int) -> Tensor:
    """Offsets that start at 0, do not decrease and stay within the rows, whatever was given: then each row has one tile."""
    ends = offsets[1:].clamp(0, rows).cummax(0).values.to(torch.int32)
    return torch.cat([ends.new_zeros(1), ends])


def _repeat(x: Tensor, gather_idx: Tensor | None, k: int) -> Tensor | None:
    if gather_idx is None and k > 1:
        return torch.arange(x.shape[0] * k, device=x.device)
    return gather_idx
