"""Expert layers whose rows are multiples of 16 bytes and exceed a tile, as tests/ops/cases.py, whose sizes are small and odd, has none.

Halves then come by asynchronous copies; with fp32 and weights in fp32 beside, dropped rows, an expert without rows, weights stored
transposed. For the emulated kernels (tests/emulation) and for a GPU (tests/gpu).
"""

import torch
from torch import Tensor

import cmoe_kernels as cmoe
from benchmarks.compare import assert_close, grads
from tests.ops import naive
from tests.ops.cases import Maker, to_double

T, D, H, O, E, G = 75, 40, 24, 72, 3, 4  # noqa: E741


def dropped(m: Maker) -> Tensor:
    """Every fourth selection is of no expert, and the middle expert is never chosen."""
    return (m.ids(2, T, 2) * 2).where(torch.arange(2 * T).view(T, 2) % 4 != 1, E)


def mlp(m: Maker, gated: bool = False) -> dict[str, Tensor]:
    rows = 2 * H if gated else H
    return {"w1": m.x(E, rows, D), "b1": m.x(E, rows), "w2": m.x(E, O, H), "b2": m.x(E, O)}


def stored_transposed(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {n: w.transpose(1, 2).contiguous().transpose(1, 2) if w.dim() == 3 else w for n, w in weights.items()}


def linear(m: Maker) -> dict[str, Tensor]:
    return {"w1": m.x(E, O, D), "b1": m.x(E, O)}


FORMS = {
    "soft": ("soft_experts", lambda m: {"x": m.x(T, D), "gates": m.gates(T, E), **mlp(m)}),
    "soft-recompute": (
        "soft_experts",
        lambda m: {"x": m.x(T, D), "gates": m.gates(G, E), **mlp(m), "group_ids": m.ids(G, T), "recompute": True},
    ),
    "soft-linear": ("soft_experts", lambda m: {"x": m.x(T, D), "gates": m.gates(T, E), **linear(m)}),
    "soft-merged": ("soft_experts", lambda m: {"x": m.x(T, D), "gates": m.gates(E, E), **linear(m), "group_ids": m.ids(E, T)}),
    "soft-merged-one": ("soft_experts", lambda m: {"x": m.x(T, D), "gates": m.gates(1, E), **linear(m)}),
    "sparse": ("sparse_experts", lambda m: {"x": m.x(T, D), "weights": m.gates(T, 2), "indices": dropped(m), **mlp(m)}),
    "sparse-gated": (
        "sparse_experts",
        lambda m: {"x": m.x(T, D), "weights": m.gates(T, 2), "indices": dropped(m), **mlp(m, True), "gated": True, "activation": "silu"},
    ),
    "sparse-transposed": (
        "sparse_experts",
        lambda m: {"x": m.x(T, D), "weights": m.gates(T, 2), "indices": dropped(m), **stored_transposed(mlp(m)), "activation": "gelu_tanh"},
    ),
    "sparse-linear": ("sparse_experts", lambda m: {"x": m.x(T, D), "weights": m.gates(T, 2), "indices": dropped(m), **linear(m)}),
    "hard": (
        "sparse_experts",
        lambda m: {
            "x": m.x(T, D), "weights": None, "indices": torch.tensor([[0], [2], [2], [0]]), **mlp(m),
            "group_ids": m.ids(G, T), "activation": "relu2",
        },
    ),
    "grouped": (
        "grouped_linear",
        lambda m: {
            "x": m.x(T, D), "w": m.x(E, D, O).transpose(1, 2), "b": m.x(E, O), "offsets": torch.tensor([0, 33, 33, 140], dtype=torch.int32),
            "gather_idx": m.permutation(2 * T), "k": 2, "scatter_idx": m.permutation(2 * T), "activation": "gelu",
        },
    ),
    "grouped-plain": (
        "grouped_linear",
        lambda m: {"x": m.x(T, D), "w": m.x(E, O, D), "b": None, "offsets": torch.tensor([0, 70, 70, 150], dtype=torch.int32), "k": 2},
    ),
}  # fmt: skip


def made(form: str, dtype: torch.dtype, wide_weights: bool = False) -> tuple[str, dict, list[str], Tensor]:
    """An op, its arguments, the names of those that get a gradient, the gradient of its result."""
    op, make = FORMS[form]
    arguments = make(Maker(dtype, 0))
    if wide_weights:
        arguments = {n: v.float() if n[0] in "wb" and n != "weights" and v is not None else v for n, v in arguments.items()}
    names = [n for n, v in arguments.items() if isinstance(v, Tensor) and v.is_floating_point()]
    for name in names:
        arguments[name].requires_grad_()
    rows = T * arguments.get("k", 1)
    width = (arguments["w"] if op == "grouped_linear" else arguments.get("w2", arguments["w1"])).shape[1]
    return op, arguments, names, Maker(torch.float64, 1).x(rows, width).to(dtype)


def results(form: str, dtype: torch.dtype) -> list[Tensor]:
    """The result and every gradient."""
    op, arguments, names, upstream = made(form, dtype)
    y = getattr(cmoe, op)(**arguments)
    return [y.detach(), *grads(y, [arguments[n] for n in names], upstream)]


def check(form: str, dtype: torch.dtype, wide_weights: bool = False) -> None:
    """Against fp64, under the rule of benchmarks/compare.py."""
    op, arguments, names, upstream = made(form, dtype, wide_weights)
    double = to_double(arguments)
    narrow = {n: v.detach().to(dtype).requires_grad_() if n in names and n not in ("gates", "weights") else v for n, v in arguments.items()}
    outputs = [getattr(which, op)(**values) for which, values in ((cmoe, arguments), (naive, double), (naive, narrow))]
    assert_close("y", *(y.detach() for y in outputs))
    found = [grads(y, [values[n] for n in names], upstream) for y, values in zip(outputs, (arguments, double, narrow), strict=True)]
    for name, ours, exact, baseline in zip(names, *found, strict=True):
        assert_close(name, ours, exact, baseline, dtype)
