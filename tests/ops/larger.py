"""One table of expert layers and routers that exceed a tile, at the sizes of a backend's test; tests/ops/cases.py has small odd sizes.

Dropped rows, an expert without rows, weights stored transposed. Where rows are multiples of 16 bytes, halves come by asynchronous copies or
descriptors. For the emulated kernels, the interpreted ones and a GPU.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

import cmoe_kernels as cmoe
from benchmarks.compare import assert_close, grads
from tests.ops import naive
from tests.ops.cases import Maker, leaves, to_double


class Sizes(NamedTuple):
    """Named as everywhere: tokens, widths of input, hidden units and output, experts, groups; of a router hidden units and task."""

    T: int
    D: int
    H: int
    O: int  # noqa: E741
    E: int
    G: int
    R: int = 50
    S: int = 19


ALIGNED = Sizes(T=75, D=40, H=24, O=72, E=3, G=4)


def _dropped(m: Maker, s: Sizes) -> Tensor:
    """Every fourth selection is of no expert, and the middle expert is never chosen."""
    return (m.ids(2, s.T, 2) * 2).where(torch.arange(2 * s.T).view(s.T, 2) % 4 != 1, s.E)


def mlp(m: Maker, s: Sizes, gated: bool = False) -> dict[str, Tensor]:
    rows = 2 * s.H if gated else s.H
    return {"w1": m.x(s.E, rows, s.D), "b1": m.x(s.E, rows), "w2": m.x(s.E, s.O, s.H), "b2": m.x(s.E, s.O)}


def _linear(m: Maker, s: Sizes) -> dict[str, Tensor]:
    return {"w1": m.x(s.E, s.O, s.D), "b1": m.x(s.E, s.O)}


def _router(m: Maker, s: Sizes, width: int, experts: int = 5) -> dict[str, Tensor]:
    return {"w1": m.x(s.R, width), "b1": m.x(s.R), "w2": m.x(experts, s.R), "b2": m.x(experts)}


def _transposed(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {n: w.mT.contiguous().mT if w.dim() == 3 else w for n, w in weights.items()}


def _soft(layers, rows=None):
    """Gates of every token, or of rows(s) groups or one row."""

    def make(m: Maker, s: Sizes) -> dict[str, Any]:
        several = rows and rows(s) > 1
        return {
            "x": m.x(s.T, s.D), "gates": m.gates(rows(s) if rows else s.T, s.E), **layers(m, s),
            **({"group_ids": m.ids(rows(s), s.T)} if several else {}),
        }  # fmt: skip

    return "soft_experts", make


def _sparse(layers, **settings):
    def make(m: Maker, s: Sizes) -> dict[str, Any]:
        return {"x": m.x(s.T, s.D), "weights": m.gates(s.T, 2), "indices": _dropped(m, s), **layers(m, s), **settings}

    return "sparse_experts", make


def _grouped(last, **settings):
    """Rows up to last(s), none of the second expert."""

    def make(m: Maker, s: Sizes) -> dict[str, Any]:
        offsets = torch.tensor([0, s.T // 2, s.T // 2, last(s)], dtype=torch.int32)
        return {"x": m.x(s.T, s.D), "w": m.x(s.E, s.O, s.D), "b": m.x(s.E, s.O), "offsets": offsets, **settings}

    return "grouped_linear", make


def _task(groups, **settings):
    def make(m: Maker, s: Sizes) -> dict[str, Any]:
        count = groups(s)
        return {
            "x": m.x(s.T, s.D), "task": m.x(count, s.S), **_router(m, s, s.S + s.D), "group_ids": m.ids(count, s.T), **settings,
        }  # fmt: skip

    return "task_router", make


def _also(form, **settings):
    """A form with further arguments, each made of a Maker and sizes where it is a function."""
    op, make = form

    def more(m: Maker, s: Sizes) -> dict[str, Any]:
        return make(m, s) | {name: value(m, s) if callable(value) else value for name, value in settings.items()}

    return op, more


FORMS = {
    "soft": _soft(mlp),
    "soft-recompute": _also(_soft(mlp, lambda s: s.G), recompute=True),
    "soft-groups": _soft(mlp, lambda s: s.G),
    "soft-linear": _soft(_linear),
    "soft-linear-no_bias": _also(_soft(_linear), b1=None),
    "soft-merged": _soft(_linear, lambda s: s.E),
    "soft-merged-one": _soft(_linear, lambda s: 1),
    "sparse": _sparse(mlp),
    "sparse-gated": _sparse(lambda m, s: mlp(m, s, True), gated=True, activation="silu"),
    "sparse-transposed": _sparse(lambda m, s: _transposed(mlp(m, s)), activation="gelu_tanh"),
    "sparse-linear": _sparse(_linear),
    "hard": _also(
        _sparse(mlp, activation="relu2"), weights=None, indices=lambda m, s: torch.tensor([[0], [2], [2], [0]])[: s.G],
        group_ids=lambda m, s: m.ids(s.G, s.T),
    ),
    "grouped": _also(
        _grouped(lambda s: 2 * s.T - 10, k=2, activation="gelu"), w=lambda m, s: m.x(s.E, s.D, s.O).mT,
        gather_idx=lambda m, s: m.permutation(2 * s.T), scatter_idx=lambda m, s: m.permutation(2 * s.T),
    ),
    "grouped-repeat": _also(_grouped(lambda s: 2 * s.T, k=2), b=None),
    # Neither gathered nor scattered: the only one whose weights' gradients read both sides through descriptors.
    "grouped-plain": _grouped(lambda s: s.T),
    "router": _task(lambda s: s.G),
    "router-many_experts": (
        "task_router",
        lambda m, s: {"x": m.x(s.T, s.D), "task": None, **_router(m, s, s.D, 19), "inputs": "token"},
    ),
    "router-many_groups": _task(lambda s: 21),
}  # fmt: skip
EXPERTS = [form for form, (op, _) in FORMS.items() if op != "task_router"]


def made(form: str, dtype: torch.dtype, sizes: Sizes = ALIGNED) -> tuple[str, dict[str, Any]]:
    """An op and its arguments, whose floating-point tensors are leaves."""
    op, make = FORMS[form]
    return op, with_leaves(make(Maker(dtype, 3), sizes))


def with_leaves(arguments: dict[str, Any]) -> dict[str, Any]:
    for value in arguments.values():
        if isinstance(value, Tensor) and value.is_floating_point():
            value.requires_grad_()
    return arguments


def results(op: str, arguments: dict[str, Any], of: Any = cmoe) -> list[Tensor]:
    """The result of cmoe's function or of the naive one, and the gradient of every leaf."""
    y = getattr(of, op)(**arguments)
    y = y[0] if isinstance(y, tuple) else y
    upstream = Maker(torch.float64, 1).x(*y.shape)
    return [y.detach(), *grads(y, [arguments[n] for n in leaves(arguments)], upstream)]


def check(op: str, arguments: dict[str, Any], dtype: torch.dtype, ours: list[Tensor] | None = None, plain: dict[str, Any] | None = None):
    """Result and gradients against fp64, under the rule of benchmarks/compare.py.

    Args:
        dtype: of the products.
        ours: the results to be checked, where they are there already.
        plain: the arguments of the naive formula, where it takes others.
    """
    ours = results(op, arguments) if ours is None else ours
    exact, baseline = results(op, to_double(arguments), naive), results(op, plain or arguments, naive)
    for name, *found in zip(["output", *leaves(arguments)], ours, exact, baseline, strict=True):
        assert_close(f"gradient of {name}" if name != "output" else name, *found, dtype)
