"""What the products of expert layers share: their tiles, the order in which programs take them, and how a tile's operands are loaded.

Programs are persistent: as many as the device runs at once, each taking every n-th tile. Which expert a tile belongs to is found on the
device from ``offsets``, and so is the number of tiles, so the host reads nothing and a launch can be captured in a CUDA graph.
Tiles run in groups of GROUP row tiles per column of weights, which keeps a weight tile in L2 while the group uses it.

An operand is a tensor, read through pointers, or on devices that copy tiles (TMA, sm_90 and newer) a tensor descriptor [E, rows,
columns], where its strides are multiples of 16 bytes and no row is gathered. TMA fills with zeros past the end of the tensor
but not past the end of an expert: such a tile contains rows of the next expert, which must be masked before a store or a reduction.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from cmoe_kernels.ops.gemm.tuning import GROUP, Tile, device_of, precision, programs

TL_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@triton.jit
def tile_order(tile, tiles_m, tiles_n, GROUP: tl.constexpr):
    """Row and column of a tile: GROUP row tiles by all column tiles, rows first."""
    width = GROUP * tiles_n
    first = tile // width * GROUP
    size = tl.minimum(tiles_m - first, GROUP)
    return first + tile % width % size, tile % width // size


@triton.jit
def _expert_tiles(offsets, rows, experts, EP: tl.constexpr, BM: tl.constexpr):
    """Per expert, and in lane ``experts`` for unrouted rows: first row, end row, number of row tiles."""
    e = tl.arange(0, EP)
    lows = tl.load(offsets + e, mask=e <= experts, other=0)
    highs = tl.load(offsets + e + 1, mask=e < experts, other=0)
    highs = tl.where(e == experts, rows, highs)
    return lows, highs, tl.where(e <= experts, tl.cdiv(tl.maximum(highs - lows, 0), BM), 0)


@triton.jit
def count_row_tiles(offsets, rows, experts, EP: tl.constexpr, BM: tl.constexpr):
    if offsets is None:
        return tl.cdiv(rows, BM) * experts
    else:
        return tl.sum(_expert_tiles(offsets, rows, experts, EP, BM)[2], 0)


@triton.jit
def tile_rows(tile, offsets, rows, experts, EP: tl.constexpr, BM: tl.constexpr):
    """Expert, first row and end row of a row tile; the expert is ``experts`` for unrouted rows. Without offsets each has all rows."""
    if offsets is None:
        tiles = tl.cdiv(rows, BM)
        return tile // tiles, tile % tiles * BM, rows
    else:
        lows, highs, tiles = _expert_tiles(offsets, rows, experts, EP, BM)
        ends = tl.cumsum(tiles, 0)
        expert = tl.sum((ends <= tile).to(tl.int32), 0)
        mine = tl.arange(0, EP) == expert
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
def load_rows(t, pointers, expert, row, start, live, depth, stride, BM: tl.constexpr, BK: tl.constexpr, TMA: tl.constexpr):
    """[BM, BK] of an operand from ``row`` and depth ``start`` on; depths from ``depth`` on are zeros.

    TMA None: through ``pointers`` to depths 0..BK of the rows, those that are not ``live`` as zeros. Else t is a descriptor, whose memory
    lies by "rows" or by "columns", and rows past an expert's end are those of the next.
    """
    if TMA is None:
        inside = live[:, None] & (start + tl.arange(0, BK) < depth)[None, :]
        return tl.load(pointers + tl.cast(start, tl.int64) * stride, mask=inside, other=0.0)
    elif TMA == "rows":
        return tl.reshape(t.load([expert, row, start]), [BM, BK])
    else:
        return tl.trans(tl.reshape(t.load([expert, start, row]), [BK, BM]))


@triton.jit
def load_weights(t, pointers, expert, row, start, live, depth, stride, BN: tl.constexpr, BK: tl.constexpr, TMA: tl.constexpr):
    """The same of an operand's transpose, [BK, BN]: loaded as it is multiplied, as a transpose in between is not copied asynchronously."""
    if TMA is None:
        inside = live[None, :] & (start + tl.arange(0, BK) < depth)[:, None]
        return tl.load(pointers + tl.cast(start, tl.int64) * stride, mask=inside, other=0.0)
    elif TMA == "rows":
        return tl.trans(tl.reshape(t.load([expert, row, start]), [BN, BK]))
    else:
        return tl.reshape(t.load([expert, start, row]), [BK, BN])


@triton.jit
def multiply_add(a, v, acc, PRECISION: tl.constexpr):
    """acc + a @ v. In IEEE fp32 the products are added up first, since rounding grows with the number of sums in a row."""
    if PRECISION == "ieee" and a.dtype == tl.float32:
        # An ordinary sum would be made the product's accumulator by the compiler.
        return tl.fma(tl.dot(a, v, input_precision=PRECISION), tl.full(acc.shape, 1.0, tl.float32), acc)
    else:
        return tl.dot(a, v, acc, input_precision=PRECISION)


def operand(t: Tensor, block: tuple[int, int], tma: bool, index: Tensor | None = None, k: int = 1) -> tuple[Any, str | None]:
    """An operand for ``load_rows`` or ``load_weights``: t [E, I, J] or [I, J] in tiles of ``block``; (t, None) where pointers must do.

    ``index`` and ``k`` say that rows are gathered, each k times.
    """
    if not tma or index is not None or k > 1 or not t.numel():
        return t, None
    cube, order = t if t.dim() == 3 else t[None], "rows"
    if cube.stride(2) != 1:
        cube, block, order = cube.transpose(1, 2), (block[1], block[0]), "columns"
    aligned = 16 // t.element_size()
    # A stride that is never stepped by may be anything in torch; a descriptor wants a multiple of 16 bytes.
    steps = [stride if size > 1 else aligned for size, stride in zip(cube.shape[:2], cube.stride()[:2], strict=True)]
    starts = t.storage_offset() % aligned == 0 and t.data_ptr() % 16 == 0
    if cube.stride(2) != 1 or not starts or any(step <= 0 or step % aligned or step * t.element_size() >= 1 << 40 for step in steps):
        return t, None
    return TensorDescriptor(cube, list(cube.shape), [*steps, 1], [1, *block]), order


def reads_by_tma(x: Tensor) -> bool:
    """Whether products of x use descriptors: on a device that has them, and not in IEEE fp32, which runs on the vector units."""
    return device_of(x).copies_tiles and (x.dtype != torch.float32 or precision() == "tf32")


def launch(kernel: Any, programs: int, *arguments: Any, **settings: Any) -> None:
    """Run ``kernel``; an empty grid is not launched."""
    if programs:
        kernel[(programs,)](*arguments, **settings)


def launch_gemm(kernel: Any, tile: Tile, tiles: int, x: Tensor, *arguments: Any, depth: str = "BK", **settings: Any) -> None:
    """Run a persistent kernel of products of x, over ``tiles`` tiles of ``tile``; ``depth`` names the kernel's constant for tile.k."""
    shape = {"BM": tile.m, "BN": tile.n, depth: tile.k, "GROUP": GROUP}
    settings |= {"PRECISION": precision(), "num_warps": tile.warps, "num_stages": tile.stages}
    launch(kernel, programs(tiles, tile, x), *arguments, **shape, **settings)


def strides(t: Tensor | None, dims: int) -> tuple[int, ...]:
    """Strides of a tensor with one row per token or row and, in the middle, perhaps one per expert: zero for what is not there."""
    if t is None:
        return (0,) * dims
    if t.dim() == dims:
        return t.stride()
    return (t.stride(0), 0, *t.stride()[1:])
