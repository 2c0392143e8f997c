"""Tables with one row per group (task), read and summed per token or row; and the order of assignments by expert."""

import torch
from torch import Tensor


def per_token(table: Tensor, group_ids: Tensor | None) -> Tensor:
    """The row of each token. Without group_ids the table has one row per token already, or one row that broadcasts."""
    if group_ids is None:
        return table
    groups = table.shape[0]
    # On a GPU a bad id is not an error: it reads no row.
    known = (group_ids >= 0) & (group_ids < groups)
    return table[group_ids.clamp(0, groups - 1)] * known[:, None].to(table.dtype)


def per_row(table: Tensor, group_ids: Tensor | None, tokens: int, gather_idx: Tensor) -> Tensor:
    """The weights of assignments, one per row [T * K], in the order of the experts."""
    return per_token(table, group_ids).expand(tokens, -1).reshape(-1)[gather_idx]


def sum_per_group(rows: Tensor, group_ids: Tensor | None, groups: int) -> Tensor:
    """The transpose of per_token: [T, N] -> [groups, N]. A product with the one-hot matrix, as index_add is not deterministic on a GPU."""
    if group_ids is None:
        return rows if groups == rows.shape[0] else rows.sum(0, keepdim=True)
    one_hot = (group_ids == torch.arange(groups, device=rows.device)[:, None]).to(rows.dtype)
    return one_hot @ rows


def sort_by_expert(indices: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    """Assignments [T, K] in the order of their experts: gather_idx [T * K] int64 (stable; "no expert" last), offsets [E + 1] int32."""
    flat = indices.flatten()
    flat = flat.where((flat >= 0) & (flat < experts), experts)
    counts = torch.bincount(flat, minlength=experts + 1)[:experts]
    offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)]).to(torch.int32)
    return flat.argsort(stable=True), offsets
