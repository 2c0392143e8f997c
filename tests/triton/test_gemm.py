"""Kernels of the four ops with products, where sizes exceed a tile: many tiles in every direction, tails in each, short and empty experts.

Tiles are made small here, as the interpreter's cost is per operation and not per element. What is not a number of the ops' table: indices
and offsets that are wrong on the device, where nothing may raise and nothing outside a tensor may be touched.
"""

import importlib
import itertools
import sys

import pytest
import torch
from torch import Tensor

import cmoe_kernels as cmoe
from benchmarks.compare import assert_close, grads
from cmoe_kernels import backends
from cmoe_kernels.ops import checked
from tests.ops import naive
from tests.ops.cases import Maker

pytestmark = pytest.mark.skipif(not backends.INTERPRETED, reason="needs TRITON_INTERPRET=1")
T, D, H, O, E, R, G, S = 37, 35, 21, 18, 3, 50, 3, 19  # noqa: E741
# Where rows are multiples of 16 bytes, a device with TMA reads through descriptors; rows of the table's sizes are not.
ALIGNED = {"D": 40, "H": 24, "O": 24, "R": 40, "S": 24}

tuning = importlib.import_module("cmoe_kernels.ops.gemm.tuning")


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    monkeypatch.setattr(tuning, "tile_for", lambda *_: tuning.Tile(16, 16, 16, 4, 1))
    device(monkeypatch, "sm_80")
    monkeypatch.setattr(tuning, "LEAST_STEPS", 1)
    monkeypatch.setattr(importlib.import_module("cmoe_kernels.ops.gemm.tiles"), "GROUP", 2)


def dropped(m: Maker) -> Tensor:
    """Every fourth selection is of no expert, and the middle expert is never chosen."""
    return (m.ids(2, T, 2) * 2).where(torch.arange(2 * T).view(T, 2) % 4 != 1, E)


def router(m: Maker, width: int, experts: int = 5) -> dict[str, Tensor]:
    return {"w1": m.x(R, width), "b1": m.x(R), "w2": m.x(experts, R), "b2": m.x(experts)}


def experts(m: Maker, gated: bool = False) -> dict[str, Tensor]:
    rows = 2 * H if gated else H
    return {"w1": m.x(E, rows, D), "b1": m.x(E, rows), "w2": m.x(E, O, H), "b2": m.x(E, O)}


FORMS = {
    "soft": ("soft_experts", lambda m: {"x": m.x(T, D), "gates": m.gates(T, E), **experts(m)}),
    "soft-recompute": ("soft_experts", lambda m: {"x": m.x(T, D), "gates": m.gates(T, E), **experts(m), "recompute": True}),
    "soft-linear": ("soft_experts", lambda m: {"x": m.x(T, D), "gates": m.gates(T, E), "w1": m.x(E, O, D), "b1": m.x(E, O)}),
    "soft-groups": ("soft_experts", lambda m: {"x": m.x(T, D), "gates": m.gates(G, E), **experts(m), "group_ids": m.ids(G, T)}),
    "soft-linear-no_bias": (
        "soft_experts",
        lambda m: {"x": m.x(T, D), "gates": m.gates(T, E), "w1": m.x(E, O, D), "b1": None},
    ),
    "soft-merged": (
        "soft_experts",
        lambda m: {"x": m.x(T, D), "gates": m.gates(G, E), "w1": m.x(E, O, D), "b1": m.x(E, O), "group_ids": m.ids(G, T)},
    ),
    "soft-merged-one": ("soft_experts", lambda m: {"x": m.x(T, D), "gates": m.gates(1, E), "w1": m.x(E, O, D), "b1": m.x(E, O)}),
    "sparse": ("sparse_experts", lambda m: {"x": m.x(T, D), "weights": m.gates(T, 2), "indices": dropped(m), **experts(m)}),
    "sparse-gated": (
        "sparse_experts",
        lambda m: {"x": m.x(T, D), "weights": m.gates(T, 2), "indices": m.distinct(T, 2, E), **experts(m, True), "gated": True},
    ),
    "sparse-linear": (
        "sparse_experts",
        lambda m: {"x": m.x(T, D), "weights": m.gates(T, 2), "indices": dropped(m), "w1": m.x(E, O, D), "b1": m.x(E, O)},
    ),
    "hard": (
        "sparse_experts",
        lambda m: {
            "x": m.x(T, D),
            "weights": None,
            "indices": torch.tensor([[0], [2], [2]]),
            **experts(m),
            "group_ids": m.ids(G, T),
        },
    ),
    "grouped": (
        "grouped_linear",
        lambda m: {
            "x": m.x(T, D),
            "w": m.x(E, D, O).transpose(1, 2),
            "b": m.x(E, O),
            "offsets": torch.tensor([0, 33, 33, 70], dtype=torch.int32),
            "gather_idx": m.permutation(2 * T),
            "k": 2,
            "scatter_idx": m.permutation(2 * T),
            "activation": "gelu",
        },
    ),
    # Neither gathered nor scattered: the only one whose weights' gradients read both sides through descriptors.
    "grouped-plain": (
        "grouped_linear",
        lambda m: {"x": m.x(T, D), "w": m.x(E, O, D), "b": m.x(E, O), "offsets": torch.tensor([0, 21, 21, T], dtype=torch.int32)},
    ),
    "router": ("task_router", lambda m: {"x": m.x(T, D), "task": m.x(G, S), **router(m, S + D), "group_ids": m.ids(G, T)}),
    "router-many_experts": ("task_router", lambda m: {"x": m.x(T, D), "task": None, **router(m, D, 19), "inputs": "token"}),
    "router-many_groups": ("task_router", lambda m: {"x": m.x(T, D), "task": m.x(21, S), **router(m, S + D), "group_ids": m.ids(21, T)}),
}


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
    for letter, size in ALIGNED.items():
        monkeypatch.setattr(sys.modules[__name__], letter, size)
    check(form, dtype)
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


def check(form: str, dtype: torch.dtype) -> None:
    op, make = FORMS[form]
    arguments = make(Maker(dtype, 3))
    names = [n for n, v in arguments.items() if isinstance(v, Tensor) and v.is_floating_point()]
    for name in names:
        arguments[name] = arguments[name].detach().requires_grad_()
    double = {n: v.detach().double().requires_grad_() if n in names else v for n, v in arguments.items()}
    exact, baseline = getattr(naive, op)(**double), getattr(naive, op)(**arguments)
    upstream = torch.randn(exact.shape, dtype=torch.float64)
    with cmoe.use_backend("triton"):
        y = getattr(cmoe, op)(**arguments)
        got = grads(y, [arguments[n] for n in names], upstream)
    assert_close("output", y, exact.detach(), baseline.detach(), dtype)
    exact_grads, baseline_grads = (grads(o, [a[n] for n in names], upstream) for o, a in ((exact, double), (baseline, arguments)))
    for name, ours, true, base in zip(names, got, exact_grads, baseline_grads, strict=True):
        assert_close(f"gradient of {name}", ours, true, base, dtype)


@pytest.mark.parametrize("ends", [(-5, 40, 20), (99, 3, 1 << 30), (0, 0, 0)])
@pytest.mark.parametrize("activation", [None, "silu"])
def test_wrong_indices_are_no_rows(monkeypatch, ends, activation):
    """As on a GPU, where nothing raises: a row that has no source is zero, and no gradient goes where there is no row."""
    monkeypatch.setattr(checked, "CHECKS", {})
    m = Maker(torch.float32, 0)
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
    m = Maker(torch.float32, 0)
    x, ids, weights = m.x(T, D), m.ids(G, T), experts(m)
    ids[2], ids[3] = -1, G
    with cmoe.use_backend("triton"):
        for y in (
            cmoe.sparse_experts(x, m.gates(G, 1), torch.tensor([[0], [1], [7]]), **weights, group_ids=ids),
            cmoe.soft_experts(x, m.gates(G, E), **weights, group_ids=ids),
        ):
            assert not y[2:4].any()
            assert y[ids == 0].any()
