"""Sorting selections by expert: equal to a stable sort, for every way in which selections are given."""

import pytest
import torch

from cmoe_kernels import backends
from cmoe_kernels.ops import groups
from cmoe_kernels.ops.sparse_experts.reference import _assignments

if not backends.INTERPRETED:
    pytest.skip("for the interpreter's process (TRITON_INTERPRET=1)", allow_module_level=True)

from cmoe_kernels.ops.rows import sort


def expected(indices, experts, tokens, group_ids=None):
    return groups.sort_by_expert(_assignments(indices, group_ids, tokens, experts), experts)


def check(indices, experts, tokens, group_ids=None):
    gather_idx, offsets = sort.sort_by_expert(indices, experts, tokens, group_ids)
    order, ends = expected(indices, experts, tokens, group_ids)
    assert gather_idx.dtype == torch.int64
    assert offsets.dtype == torch.int32
    assert torch.equal(gather_idx, order)
    assert torch.equal(offsets, ends)


@pytest.mark.parametrize("experts", [1, 3, 5, 8, 63, 64, 200])
@pytest.mark.parametrize("tokens", [1, 11, 700])
def test_selections_of_tokens(experts, tokens):
    check(torch.randint(-1, experts + 2, (tokens, 3)), experts, tokens)


@pytest.mark.parametrize("tokens", [1, 2100])
def test_one_row_for_all(tokens):
    check(torch.tensor([[4, 0, 5]]), 5, tokens)


@pytest.mark.parametrize("experts", [5, 100])
def test_groups(experts):
    check(torch.randint(-1, experts + 1, (4, 2)), experts, 2500, torch.randint(-1, 5, (2500,)))


def test_more_blocks_than_one_program_scans_at_a_time(monkeypatch):
    monkeypatch.setattr(sort, "TILE", 64)
    check(torch.randint(0, 4, (1100, 1)), 3, 1100)


@pytest.mark.parametrize("expert", [0, 2, 3])
def test_all_to_one(expert):
    check(torch.full((1030, 1), expert), 3, 1030)


def test_strided_and_empty():
    check(torch.randint(0, 6, (2, 300)).t(), 5, 300)
    gather_idx, offsets = sort.sort_by_expert(torch.empty(0, 2, dtype=torch.int64), 5, 0)
    assert gather_idx.shape == (0,)
    assert offsets.tolist() == [0] * 6
