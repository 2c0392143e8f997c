"""Kernels of the four ops with products, where sizes exceed a tile: many tiles in every direction, tails in each, short and empty experts.

Tiles are made small here, as the interpreter's cost is per operation and not per element. What is not a number of the ops' table: indices
and offsets that are wrong on the device, where nothing may raise and nothing outside a tensor may be touched.
"""

import importlib
import itertools

import pytest
import torch

import cmoe_kernels as cmoe
from cmoe_kernels import backends
from cmoe_kernels.ops import checked
from tests.ops import larger
from tests.ops.cases import Maker
from tests.ops.larger import FORMS, Sizes, made, mlp

pytestmark = pytest.mark.skipif(not backends.INTERPRETED, reason="needs TRITON_INTERPRET=1")
SIZES = Sizes(T=37, D=35, H=21, O=18, E=3, G=3)
# Where rows are multiples of 16 bytes, a device with TMA reads through descriptors; rows of the table's sizes are not.
ALIGNED = SIZES._replace(D=40, H=24, O=24, R=40, S=24)

tuning = importlib.import_module("cmoe_kernels.ops.gemm.tuning")


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    monkeypatch.setattr(tuning, "tile_for", lambda *_: tuning.Tile(16, 16, 16, 4, 1))
    device(monkeypatch, "sm_80")
    monkeypatch.setattr(tuning, "LEAST_STEPS", 1)
    monkeypatch.setattr(importlib.import_module("cmoe_kernels.ops.gemm.tiles"), "GROUP", 2)


def device(monkeypatch, arch: str, multiprocessors: int = 3) -> None:
    """Play a device of an architecture, with few multiprocessors: programs take several tiles."""
    monkeypatch.setattr(tuning, "interpreted", tuning.KNOWN[arch]._replace(multiprocessors=multiprocessors))


@pytest.fixture
def descriptors(monkeypatch):
    """The operands that were read through descriptors."""
    found, tiles = [], importlib.import_module("cmoe_kernels.ops.gemm.tiles")
    plain = tiles.TensorDescriptor
    monkeypatch.setattr(tiles, "TensorDescriptor", lambda *arguments: found.append(arguments) or plain(*arguments))
    return found


@pytest.fixture
def tf32():
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    yield
    torch.backends.cuda.matmul.fp32_precision = before


HALF = [pytest.param(f, torch.float16, marks=() if f in ("soft", "sparse-gated", "grouped", "router") else pytest.mark.full) for f in FORMS]


@pytest.mark.parametrize(("form", "dtype"), [*itertools.product(FORMS, (torch.float32, torch.bfloat16)), *HALF], ids=str)
def test_many_tiles(monkeypatch, descriptors, form, dtype):
    device(monkeypatch, "sm_80")
    check(form, dtype)
    assert not descriptors


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.full)], ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_many_tiles_through_descriptors(monkeypatch, descriptors, tf32, form, dtype):
    """fp32 as TF32, whose rounding the interpreter does not do; IEEE fp32 reads through pointers everywhere."""
    device(monkeypatch, "sm_90")
    check(form, dtype, ALIGNED)
    assert descriptors


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.full)], ids=str)
def test_a_loop_is_split_among_programs_without_a_tile(monkeypatch, dtype):
    """Six tiles of y on 24 multiprocessors: four programs for each, of whose six steps the last one has none."""
    device(monkeypatch, "sm_80", 24)
    module, partials = importlib.import_module("cmoe_kernels.ops.gemm.grouped_gemm_sum"), []
    plain = module.sum_partials
    monkeypatch.setattr(module, "sum_partials", lambda each, *others: partials.append(len(each)) or plain(each, *others))
    check("soft", dtype)
    assert 4 in partials


def check(form: str, dtype: torch.dtype, sizes: Sizes = SIZES) -> None:
    with cmoe.use_backend("triton"):
        larger.check(*made(form, dtype, sizes), dtype)


@pytest.mark.parametrize("ends", [(-5, 40, 20), (99, 3, 1 << 30), (0, 0, 0)])
@pytest.mark.parametrize("activation", [None, "silu"])
def test_wrong_indices_are_no_rows(monkeypatch, ends, activation):
    """As on a GPU, where nothing raises: a row that has no source is zero, and no gradient goes where there is no row."""
    monkeypatch.setattr(checked, "CHECKS", {})
    m, (T, D, _, O, E, *_) = Maker(torch.float32, 0), SIZES  # noqa: E741
    x, w, b = (t.requires_grad_() for t in (m.x(T, D), m.x(E, O, D), m.x(E, O)))
    gather, scatter = m.permutation(T), m.permutation(T)
    gather[3], gather[4], scatter[5], scatter[6] = -1, T, 1 << 40, -(1 << 40)
    offsets = torch.tensor([7, *ends], dtype=torch.int32)
    with cmoe.use_backend("triton"):
        y = cmoe.grouped_linear(x, w, b, offsets, gather, 1, scatter, activation)
        got = torch.autograd.grad(y.sum(), (x, w, b))
    assert all(t.isfinite().all() for t in (y, *got))
    assert not y[scatter[3:5]].any()
    assert y.any() == (max(ends) > 0)


def test_an_unknown_group_selects_no_expert(monkeypatch):
    monkeypatch.setattr(checked, "CHECKS", {})
    m, (T, D, _, _, E, G, *_) = Maker(torch.float32, 0), SIZES
    x, ids, weights = m.x(T, D), m.ids(G, T), mlp(m, SIZES)
    ids[2], ids[3] = -1, G
    with cmoe.use_backend("triton"):
        for y in (
            cmoe.sparse_experts(x, m.gates(G, 1), torch.tensor([[0], [1], [7]]), **weights, group_ids=ids),
            cmoe.soft_experts(x, m.gates(G, E), **weights, group_ids=ids),
        ):
            assert not y[2:4].any()
            assert y[ids == 0].any()
