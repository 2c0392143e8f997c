"""The order of assignments by expert, in Triton: what a grouped product needs before its first tile.

    gather_idx [T * K]  the assignments sorted by expert, stable, those of "no expert" last      offsets [E + 1]  where each expert begins

Without a sort, for E + 1 <= LARGEST: a counting sort in three launches, whose one float-free intermediate is a table of counts
[blocks, E + 1]. (1) Each program counts the experts among its BLOCK assignments, as the column sums of a one-hot tile. (2) One
program turns the table into places: experts one after another, and within an expert the blocks in order; the same prefix sums give
offsets. (3) Each program reads its assignments again, ranks them among themselves by a running sum down the one-hot tile, and stores
each at its place. Every position is computed, none is drawn from an atomic counter, so the order is the same each time and stable.

The one-hot tile has BLOCK rows of E + 1 columns (padded to a power of two) and stays in registers; BLOCK shrinks as E grows, and past
LARGEST experts a stable sort on the device is cheaper. Neither waits for the host: sizes come from shapes alone.

Assignments may be given per token, as one row for all, or per group with group_ids [T]: the table is then never spread out in memory.
An index outside 0..E-1, and every index of a group that does not exist, means "no expert".
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 8192
LARGEST = 64


@triton.jit
def _selected(indices, group_ids, i, N, K, E, G, stride_r, stride_k, GROUPED: tl.constexpr, SHARED: tl.constexpr):
    """The expert of assignments i; E for "no expert", and -1 past the end."""
    token = i // K
    row = token
    valid = i < N
    if SHARED:
        row = token * 0
    if GROUPED:
        row = tl.load(group_ids + token, i < N, other=-1)
        valid = (row >= 0) & (row < G)
    expert = tl.load(indices + row * stride_r + (i % K) * stride_k, valid, other=E)
    expert = tl.where((expert >= 0) & (expert < E), expert, E).to(tl.int32)
    return tl.where(i < N, expert, -1)


@triton.jit
def expert_counts_kernel(
    indices, group_ids, table, N, K, E, G, stride_r, stride_k,
    GROUPED: tl.constexpr, SHARED: tl.constexpr, BLOCK: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    expert = _selected(indices, group_ids, i, N, K, E, G, stride_r, stride_k, GROUPED, SHARED)
    e = tl.arange(0, BLOCK_E)
    count = tl.sum((expert[:, None] == e[None, :]).to(tl.int32), 0)
    tl.store(table + tl.program_id(0) * (E + 1) + e, count, e <= E)


@triton.jit
def expert_places_kernel(table, places, offsets, blocks, E, BLOCK: tl.constexpr, BLOCK_E: tl.constexpr):
    e = tl.arange(0, BLOCK_E)
    b = tl.arange(0, BLOCK)[:, None]
    total = tl.zeros((BLOCK_E,), tl.int32)
    for start in range(0, blocks, BLOCK):
        total += tl.sum(tl.load(table + (start + b) * (E + 1) + e[None, :], (start + b < blocks) & (e[None, :] <= E), other=0), 0)
    place = tl.cumsum(total, 0) - total
    tl.store(offsets + e, place, e <= E)
    for start in range(0, blocks, BLOCK):
        inside = (start + b < blocks) & (e[None, :] <= E)
        count = tl.load(table + (start + b) * (E + 1) + e[None, :], inside, other=0)
        tl.store(places + (start + b) * (E + 1) + e[None, :], place[None, :] + tl.cumsum(count, 0) - count, inside)
        place += tl.sum(count, 0)


@triton.jit
def expert_order_kernel(
    indices, group_ids, places, gather_idx, N, K, E, G, stride_r, stride_k,
    GROUPED: tl.constexpr, SHARED: tl.constexpr, BLOCK: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    expert = _selected(indices, group_ids, i, N, K, E, G, stride_r, stride_k, GROUPED, SHARED)
    e = tl.arange(0, BLOCK_E)
    mine = expert[:, None] == e[None, :]
    rank = tl.cumsum(mine.to(tl.int32), 0) - 1
    first = tl.load(places + tl.program_id(0) * (E + 1) + e, e <= E, other=0)
    place = tl.sum(tl.where(mine, first[None, :] + rank, 0), 1)
    tl.store(gather_idx + place, i, i < N)


def sort_by_expert(indices: Tensor, experts: int, tokens: int, group_ids: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Assignments in the order of their experts: gather_idx [tokens * K] int64 (stable; "no expert" last), offsets [experts + 1] int32.

    indices: [tokens, K], or [1, K] for all tokens, or [G, K] with group_ids [tokens].
    """
    rows, k = indices.shape
    n = tokens * k
    if n == 0:
        return indices.new_empty(0), indices.new_zeros(experts + 1, dtype=torch.int32)
    grouped, shared = group_ids is not None, rows == 1 and group_ids is None
    if experts + 1 > LARGEST:
        return _device_sort(indices, experts, tokens, group_ids)
    block_e = triton.next_power_of_2(experts + 1)
    block = min(1024, TILE // block_e)
    blocks = triton.cdiv(n, block)
    table = indices.new_empty(blocks, experts + 1, dtype=torch.int32)
    places = torch.empty_like(table)
    offsets = indices.new_empty(experts + 1, dtype=torch.int32)
    gather_idx = indices.new_empty(n)
    assignments = (n, k, experts, rows, *indices.stride(), grouped, shared, block, block_e)
    ids = indices if group_ids is None else group_ids.contiguous()
    expert_counts_kernel[(blocks,)](indices, ids, table, *assignments, num_warps=4)
    expert_places_kernel[(1,)](table, places, offsets, blocks, experts, 64, block_e, num_warps=4)
    expert_order_kernel[(blocks,)](indices, ids, places, gather_idx, *assignments, num_warps=4)
    return gather_idx, offsets


def _device_sort(indices: Tensor, experts: int, tokens: int, group_ids: Tensor | None) -> tuple[Tensor, Tensor]:
    if group_ids is not None:
        known = (group_ids >= 0) & (group_ids < indices.shape[0])
        indices = indices[group_ids.clamp(0, indices.shape[0] - 1)].where(known[:, None], experts)
    flat = indices.expand(tokens, -1).flatten()
    ordered, gather_idx = flat.where((flat >= 0) & (flat < experts), experts).sort(stable=True)
    # Not bincount, which reads its largest value on the host.
    offsets = torch.searchsorted(ordered, torch.arange(experts + 1, device=flat.device), out_int32=True)
    return gather_idx, offsets
