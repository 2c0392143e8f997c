"""What is measured: each case at its shapes, numbers of tokens and dtypes, with its peers."""

import functools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch

from benchmarks import works
from benchmarks.shapes import SHAPES, TINY, TOKENS, Shape
from benchmarks.steps import Work

BF16, FP32 = torch.bfloat16, torch.float32
# Tokens of the gates and of the loss: a batch of 16 images of 256 tokens.
GATE_TOKENS = 4096
# On a GPU, where 1024 tokens are few, also these.
GPU_TOKENS = 8192


@dataclass(frozen=True)
class At:
    """Where a case is measured."""

    shape: str
    tokens: tuple[int, ...]
    dtypes: tuple[torch.dtype, ...]


@dataclass(frozen=True)
class Instance:
    """One row of the results."""

    case: "Case"
    shape: Shape
    tokens: int
    dtype: torch.dtype
    device: str = "cpu"
    # The backend of ours; None: the one that the device takes by itself.
    backend: str | None = None

    @property
    def key(self) -> str:
        backend = f"/{self.backend}" if self.backend else ""
        return f"{self.case.name}/{self.shape.name}/T{self.tokens}/{str(self.dtype).removeprefix('torch.')}{backend}"

    def make(self) -> Work:
        """Inputs and weights, the same for every run on a device."""
        torch.manual_seed(0)
        # Not around the calls as well: torch would look at each of them for tensors to be made.
        with torch.device(self.device):
            work = self.case.make(self.shape, self.tokens, self.dtype)
        if self.backend:
            work.ours = works.on_backend(work.ours, self.backend)
        return work


@dataclass(frozen=True)
class Case:
    """A kind of work."""

    name: str
    title: str
    make: Callable[[Shape, int, torch.dtype], Work]
    at: tuple[At, ...]
    memory: bool = False

    def instances(self, device: str = "cpu", backend: str | None = None, dtype: torch.dtype | None = None) -> Iterator[Instance]:
        """Its rows, in ``dtype`` instead of its own dtypes where one is given."""
        rows = (
            Instance(self, SHAPES[at.shape], tokens, each, device, backend)
            for at in self.at
            for each in ((dtype,) if dtype else at.dtypes)
            for tokens in (*at.tokens, *((GPU_TOKENS,) if device == "cuda" and TOKENS[-1] in at.tokens else ()))
        )
        return iter(dict.fromkeys(rows))


def _tiny(*dtypes: torch.dtype, shapes: tuple[str, ...] = TINY[:1]) -> tuple[At, ...]:
    return tuple(At(shape, (1, 64), dtypes or (BF16, FP32)) for shape in shapes)


_bound = functools.partial
CASES = {
    case.name: case
    for case in (
        Case(
            "soft_connector",
            "soft connector, forward and all gradients",
            _bound(works.connector, train=True),
            (At("released", TOKENS, (BF16,)), At("released", (256,), (FP32,)), *_tiny()),
            memory=True,
        ),
        Case(
            "soft_connector_recompute",
            "soft connector with recompute=True, forward and all gradients",
            _bound(works.connector, train=True, recompute=True),
            (At("released", (256, 1024), (BF16,)), *_tiny()),
            memory=True,
        ),
        Case(
            "soft_connector_forward",
            "soft connector, forward",
            _bound(works.connector, train=False),
            (At("released", TOKENS, (BF16,)), At("released", (256,), (FP32,)), *_tiny()),
        ),
        Case(
            "soft_connector_prepacked",
            "soft connector after prepack(), forward",
            _bound(works.connector, train=False, prepacked=True),
            (At("released", TOKENS, (BF16,)), *_tiny()),
        ),
        Case(
            "soft_connector_int8",
            "soft connector with int8 weights, forward",
            works.connector_int8,
            (At("released", (1, 16, 64, 256, 1024), (BF16,)), *_tiny(BF16)),
        ),
        *(
            Case(
                f"gemm_{form}",
                f"one GEMM, {what}",
                _bound(works.gemm, form=form),
                (At("released", TOKENS[1:], (BF16,)), At("released", (256,), (FP32,)), *_tiny()),
            )
            for form, what in (("forward", "y = x W^T"), ("dx", "dx = dy W"), ("dw", "dW = dy^T x"))
        ),
        Case(
            "grouped_linear",
            "one linear layer per expert on sorted rows, forward and gradients",
            works.grouped,
            (At("mixtral", TOKENS[1:], (BF16,)), *_tiny()),
        ),
        Case("task_router", "router, forward and all gradients", works.router, (At("released", TOKENS[1:], (BF16,)), *_tiny())),
        Case(
            "soft_experts", "dense experts, forward and all gradients", works.soft_experts, (At("released", TOKENS[1:], (BF16,)), *_tiny())
        ),
        Case(
            "sparse_experts_forward",
            "sparse experts, forward",
            _bound(works.sparse, train=False),
            (At("mixtral", TOKENS, (BF16,)), At("mixtral", (256,), (FP32,)), At("cumo", TOKENS, (BF16,)), *_tiny(shapes=TINY)),
        ),
        Case(
            "sparse_experts",
            "sparse experts, forward and all gradients",
            _bound(works.sparse, train=True),
            (At("mixtral", TOKENS[1:], (BF16,)), At("cumo", TOKENS[1:], (BF16,)), *_tiny(shapes=TINY)),
            memory=True,
        ),
        Case(
            "balance_loss",
            "topk_gate and balance_loss from logits, forward and backward",
            _bound(works.gates, kind="loss"),
            (At("mixtral", (1, GATE_TOKENS), (FP32,)), *_tiny(FP32)),
        ),
        Case(
            "soft_gate",
            "soft_gate, forward and backward",
            _bound(works.gates, kind="soft"),
            (At("mixtral", (1, GATE_TOKENS), (FP32,)), *_tiny(FP32)),
        ),
        Case(
            "topk_gate",
            "topk_gate, forward and backward",
            _bound(works.gates, kind="topk"),
            (At("mixtral", (1, GATE_TOKENS), (FP32,)), *_tiny(FP32)),
        ),
    )
}


def select(
    only: str = "", tiny: bool = False, device: str = "cpu", ours: Iterable[str | None] = (None,), dtype: torch.dtype | None = None
) -> list[Instance]:
    """Instances whose key contains one of the comma-separated words of ``only``; tiny shapes or the others; ``ours``: the backends;
    ``dtype``: instead of each case's own."""
    words = [w for w in only.split(",") if w]
    every = (i for case in CASES.values() for backend in ours for i in case.instances(device, backend, dtype))
    found = [i for i in every if (i.shape.name in TINY) == tiny]
    chosen = [i for i in found if not words or any(word in i.key for word in words)]
    unknown = [w for w in words if not any(w in i.key for i in found)]
    if unknown:
        raise ValueError(f"--only {','.join(unknown)}: no such case; --list shows them")
    return chosen


def find(key: str) -> Instance:
    """The instance of a key."""
    dtype = getattr(torch, key.split("/")[3])
    return next(i for case in CASES.values() for i in case.instances(dtype=dtype) if i.key == key)
