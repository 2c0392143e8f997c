"""One table of calls: every op in every form it has, at small odd sizes. The promises are tested over this table.

On the CPU, or on the device that CMOE_TEST_DEVICE names (cuda), which tests/conftest.py also makes torch's default: values are drawn on the
CPU, so that they are the same everywhere, and moved there.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

import cmoe_kernels as cmoe
from cmoe_kernels import backends
from tests.emulation import library
from tests.ops import naive

T, D, H, O, E, K, R, G, S = 11, 7, 9, 6, 5, 2, 13, 3, 4  # noqa: E741
DEVICE = torch.device(os.environ.get("CMOE_TEST_DEVICE") or "cpu").type
on_cpu = pytest.mark.skipif(DEVICE != "cpu", reason=f"about the CPU, and this run is on {DEVICE}")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Case:
    op: str
    form: str
    arguments: Callable[["Maker"], dict[str, Any]]

    def make(self, dtype: torch.dtype = torch.float64, grad: bool = True, seed: int = 0) -> dict[str, Any]:
        """Arguments of the public function; float tensors are leaves that ask for gradients."""
        arguments = self.arguments(Maker(dtype, seed))
        for name, value in arguments.items():
            if isinstance(value, Tensor) and value.is_floating_point() and name not in ("selection", "counts", "total"):
                value.requires_grad_(grad)
        return arguments

    def call(self, arguments: dict[str, Any]) -> Tensor:
        result = getattr(cmoe, self.op)(**arguments)
        return result[0] if isinstance(result, tuple) else result

    def naive(self, arguments: dict[str, Any]) -> Tensor:
        return getattr(naive, self.op)(**arguments)

    def __str__(self) -> str:
        return f"{self.op}-{self.form}"


def leaves(arguments: dict[str, Any]) -> list[str]:
    return [name for name, value in arguments.items() if isinstance(value, Tensor) and value.requires_grad]


def to_double(arguments: dict[str, Any]) -> dict[str, Any]:
    """The same values in fp64, as leaves."""
    return {
        name: value.detach().double().requires_grad_(value.requires_grad)
        if isinstance(value, Tensor) and value.is_floating_point()
        else value
        for name, value in arguments.items()
    }


class Maker:
    """Random tensors of one dtype (``x``, weights) or of the dtype of gates and logits (fp32, fp64)."""

    def __init__(self, dtype: torch.dtype, seed: int) -> None:
        self.dtype, self.generator = dtype, torch.Generator().manual_seed(seed)
        self.gate_dtype = torch.float64 if dtype == torch.float64 else torch.float32

    def _drawn(self, draw: Callable[..., Tensor], *arguments: Any, **settings: Any) -> Tensor:
        return draw(*arguments, generator=self.generator, device="cpu", **settings).to(DEVICE)

    def x(self, *shape: int) -> Tensor:
        return self._drawn(torch.randn, shape, dtype=torch.float64).to(self.dtype)

    def gates(self, *shape: int) -> Tensor:
        return self._drawn(torch.rand, shape, dtype=torch.float64).add(0.1).to(self.gate_dtype)

    def probabilities(self, *shape: int) -> Tensor:
        return self._drawn(torch.randn, shape, dtype=torch.float64).softmax(-1).to(self.gate_dtype)

    def ids(self, high: int, *shape: int) -> Tensor:
        return self._drawn(torch.randint, high, shape)

    def distinct(self, rows: int, k: int, experts: int) -> Tensor:
        return self._drawn(torch.rand, rows, experts).argsort(-1)[:, :k].contiguous()

    def permutation(self, n: int) -> Tensor:
        return self._drawn(torch.randperm, n)

    def mlp(self, gated: bool = False) -> dict[str, Tensor]:
        rows = 2 * H if gated else H
        return {"w1": self.x(E, rows, D), "b1": self.x(E, rows), "w2": self.x(E, O, H), "b2": self.x(E, O)}

    def linear(self) -> dict[str, Tensor]:
        return {"w1": self.x(E, O, D), "b1": self.x(E, O)}

    def router(self, width: int) -> dict[str, Tensor]:
        return {"w1": self.x(R, width), "b1": self.x(R), "w2": self.x(E, R), "b2": self.x(E)}


def _offsets(*ends: int) -> Tensor:
    """Of E experts; those without an end of their own have no rows."""
    return torch.tensor([0, *ends] + [ends[-1]] * (E - len(ends)), dtype=torch.int32)


def _some(m: Maker) -> Tensor:
    return torch.arange(T) % 3 != 1


CASES = [
    Case("soft_gate", "logits", lambda m: {"logits": m.x(T, E)}),
    Case("soft_gate", "one_expert", lambda m: {"logits": m.x(T, 1)}),
    *(
        Case(
            "topk_gate",
            f"{score}-{'renormalized' if r else 'raw'}-{k}of{E}",
            lambda m, s=score, r=r, k=k: {"logits": m.x(T, E), "k": k, "score": s, "renormalize": r, "scale": 1.5},
        )
        for score in ("softmax", "sigmoid")
        for r in (True, False)
        for k in (1, 2, E)
    ),
    Case("topk_gate", "selection", lambda m: {"logits": m.x(T, E), "k": 2, "selection": m.x(T, E)}),
    Case("task_router", "task_token", lambda m: {"x": m.x(T, D), "task": m.x(1, S), **m.router(S + D)}),
    Case("task_router", "task_token-groups", lambda m: {"x": m.x(T, D), "task": m.x(G, S), **m.router(S + D), "group_ids": m.ids(G, T)}),
    Case(
        "task_router",
        "task_token-recompute",
        lambda m: {"x": m.x(T, D), "task": m.x(G, S), **m.router(S + D), "group_ids": m.ids(G, T), "recompute": True, "activation": "silu"},
    ),
    Case(
        "task_router",
        "task_token-one_layer",
        lambda m: {"x": m.x(T, D), "task": m.x(G, S), "w1": m.x(E, S + D), "b1": m.x(E), "group_ids": m.ids(G, T)},
    ),
    Case(
        "task_router",
        "task_token-no_bias",
        lambda m: {"x": m.x(T, D), "task": m.x(1, S), "w1": m.x(R, S + D), "b1": None, "w2": m.x(E, R), "activation": "gelu_tanh"},
    ),
    Case("task_router", "token", lambda m: {"x": m.x(T, D), "task": None, **m.router(D), "inputs": "token", "activation": "relu"}),
    Case("task_router", "token-one_layer", lambda m: {"x": m.x(T, D), "task": None, "w1": m.x(E, D), "b1": None, "inputs": "token"}),
    Case("task_router", "task", lambda m: {"x": None, "task": m.x(G, S), **m.router(S), "inputs": "task"}),
    Case("task_router", "task-one_layer", lambda m: {"x": None, "task": m.x(G, S), "w1": m.x(E, S), "b1": m.x(E), "inputs": "task"}),
    Case("grouped_linear", "plain", lambda m: {"x": m.x(T, D), "w": m.x(E, O, D), "b": m.x(E, O), "offsets": _offsets(3, 3, 7, 8, T)}),
    Case(
        "grouped_linear",
        "tail",
        lambda m: {"x": m.x(T, D), "w": m.x(E, O, D), "b": m.x(E, O), "offsets": _offsets(0, 4, 5, 5, 8), "activation": "gelu"},
    ),
    Case(
        "grouped_linear",
        "gather-scatter",
        lambda m: {
            "x": m.x(T, D),
            "w": m.x(E, O, D),
            "b": None,
            "offsets": _offsets(5, 9, 9, 20, 21),
            "gather_idx": m.permutation(T * K),
            "k": K,
            "scatter_idx": m.permutation(T * K),
            "activation": "silu",
        },
    ),
    Case(
        "grouped_linear",
        "repeat",
        lambda m: {"x": m.x(T, D), "w": m.x(E, O, D), "b": m.x(E, O), "offsets": _offsets(5, 9, 9, 20, 22), "k": K, "activation": "relu"},
    ),
    Case("soft_experts", "mlp", lambda m: {"x": m.x(T, D), "gates": m.gates(T, E), **m.mlp()}),
    Case(
        "soft_experts",
        "mlp-recompute",
        lambda m: {"x": m.x(T, D), "gates": m.gates(T, E), **m.mlp(), "recompute": True, "activation": "gelu_tanh"},
    ),
    Case(
        "soft_experts",
        "mlp-groups",
        lambda m: {"x": m.x(T, D), "gates": m.gates(G, E), **m.mlp(), "group_ids": m.ids(G, T), "activation": "silu"},
    ),
    Case("soft_experts", "mlp-one_row", lambda m: {"x": m.x(T, D), "gates": m.gates(1, E), **m.mlp(), "activation": "relu"}),
    Case(
        "soft_experts",
        "mlp-no_bias",
        lambda m: {"x": m.x(T, D), "gates": m.gates(T, E), "w1": m.x(E, H, D), "b1": None, "w2": m.x(E, O, H)},
    ),
    Case("soft_experts", "linear", lambda m: {"x": m.x(T, D), "gates": m.gates(T, E), **m.linear()}),
    Case(
        "soft_experts", "linear-merged-groups", lambda m: {"x": m.x(T, D), "gates": m.gates(G, E), **m.linear(), "group_ids": m.ids(G, T)}
    ),
    Case("soft_experts", "linear-merged-one_row", lambda m: {"x": m.x(T, D), "gates": m.gates(1, E), "w1": m.x(E, O, D), "b1": None}),
    Case("sparse_experts", "mlp", lambda m: {"x": m.x(T, D), "weights": m.gates(T, K), "indices": m.distinct(T, K, E), **m.mlp()}),
    Case(
        "sparse_experts",
        "mlp-dropped",
        lambda m: {"x": m.x(T, D), "weights": m.gates(T, K), "indices": m.ids(E + 2, T, K) - 1, **m.mlp(), "activation": "relu2"},
    ),
    Case(
        "sparse_experts",
        "mlp-all",
        lambda m: {"x": m.x(T, D), "weights": m.gates(T, E), "indices": m.distinct(T, E, E), **m.mlp(), "recompute": True},
    ),
    Case(
        "sparse_experts",
        "gated",
        lambda m: {
            "x": m.x(T, D),
            "weights": m.gates(T, K),
            "indices": m.distinct(T, K, E),
            **m.mlp(gated=True),
            "gated": True,
            "activation": "silu",
        },
    ),
    Case(
        "sparse_experts",
        "gated-recompute",
        lambda m: {
            "x": m.x(T, D),
            "weights": m.gates(T, 1),
            "indices": m.ids(E, T, 1),
            "w1": m.x(E, 2 * H, D),
            "b1": None,
            "w2": m.x(E, O, H),
            "gated": True,
            "recompute": True,
        },
    ),
    Case(
        "sparse_experts",
        "hard",
        lambda m: {"x": m.x(T, D), "weights": None, "indices": torch.arange(G)[:, None], **m.mlp(), "group_ids": m.ids(G, T)},
    ),
    Case(
        "sparse_experts",
        "groups",
        lambda m: {"x": m.x(T, D), "weights": m.gates(G, K), "indices": m.distinct(G, K, E), **m.mlp(), "group_ids": m.ids(G, T)},
    ),
    Case("sparse_experts", "one_row", lambda m: {"x": m.x(T, D), "weights": m.gates(1, K), "indices": m.distinct(1, K, E), **m.mlp()}),
    Case("sparse_experts", "linear", lambda m: {"x": m.x(T, D), "weights": m.gates(T, K), "indices": m.distinct(T, K, E), **m.linear()}),
    Case("balance_loss", "switch", lambda m: {"scores": m.probabilities(T, E), "indices": m.distinct(T, K, E)}),
    Case("balance_loss", "switch-mask", lambda m: {"scores": m.probabilities(T, E), "indices": m.ids(E + 2, T, K) - 1, "mask": _some(m)}),
    Case(
        "balance_loss",
        "switch-segments",
        lambda m: {"scores": m.probabilities(T, E), "indices": m.ids(E, T, 1), "segments": m.ids(3, T), "mask": _some(m)},
    ),
    Case("balance_loss", "switch-counts", lambda m: {"scores": m.probabilities(T, E), "counts": m.ids(9, E).int(), "total": 40}),
    Case("balance_loss", "switch-counts-sum", lambda m: {"scores": m.probabilities(T, E), "counts": m.ids(9, E).add(1)}),
    Case("balance_loss", "importance", lambda m: {"scores": m.gates(T, E), "kind": "importance"}),
    Case(
        "balance_loss",
        "importance-mask-segments",
        lambda m: {"scores": m.gates(T, E), "kind": "importance", "mask": _some(m), "segments": m.ids(4, T)},
    ),
    Case("balance_loss", "z", lambda m: {"scores": m.x(T, E), "kind": "z"}),
    Case("balance_loss", "z-mask-segments", lambda m: {"scores": m.x(T, E), "kind": "z", "mask": _some(m), "segments": m.ids(4, T)}),
    Case(
        "balance_loss",
        "switch-logits-mask",
        lambda m: {"scores": m.x(T, E), "indices": m.ids(E + 2, T, K) - 1, "mask": _some(m), "from_logits": True},
    ),
    Case("balance_loss", "importance-logits", lambda m: {"scores": m.x(T, E), "kind": "importance", "from_logits": True}),
]
ONE_PER_OP = list({case.op: case for case in reversed(CASES)}.values())[::-1]


def backends_of(op: str, dtype: torch.dtype = torch.float32) -> list[str]:
    """The backends to test here. Where kernels are interpreted or emulated they alone: the others were tested in the ordinary process."""
    able = sorted(backends.serving(op, DEVICE, dtype))
    alone = "triton" if backends.INTERPRETED else "cuda" if library.WANTED else None
    return [b for b in able if alone in (None, b)]


def widest(op: str, backend: str) -> torch.dtype:
    """fp64 where the backend serves it."""
    return torch.float64 if backend in backends.serving(op, DEVICE, torch.float64) else torch.float32


def on_backends(cases: list[Case], dtype: torch.dtype = torch.float32) -> pytest.MarkDecorator:
    """Parametrise a test over cases and the backends that serve them here, in a dtype."""
    pairs = [(case, backend) for case in cases for backend in backends_of(case.op, dtype)]
    return pytest.mark.parametrize(("case", "backend"), [pytest.param(c, b, id=f"{c}-{b}") for c, b in pairs])
