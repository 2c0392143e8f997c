"""A call to be timed, the gradients it makes, and whether its results are right.

Ours, every peer and the fp64 reference of a case are ``Step``s over the same weights. Peers hold weights in pieces (one matrix per expert,
the router's task columns apart); ``Leaves`` gives them such views without a copy and joins the gradients again under our names.

Results are compared by the rule of ``benchmarks/compare.py``. Of each matrix 256 rows are compared, spread evenly with the first and the
last among them: a released connector in fp64, with its gradients, would be 11 GB. For the same reason the reference reads weights block
by block, and computes the gradient of a weight for the compared rows only.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.compare import assert_close, errors

ROWS = 256
BLOCK = 2048
# Largest error of the baseline itself, in eps of the result's RMS; a worse baseline would make the rule of 2x meaningless.
BASELINE_EPS = 64
# Factors on what the rule allows. A peer rounds where its authors chose to. And where the plain formula adds many short sums, the algebra
# has one long one (the task token's gradient: 45056 products), whose rounding in fp32 grows with its length; in bf16 the store hides that.
PEER_SLACK = 4
LONG_SUM_SLACK = 8


class Skipped(Exception):
    """A peer or a case that cannot run here; the message is the reason that is recorded."""


class WrongResult(Exception):
    """A result outside the rule: no time is recorded."""


def sampled_rows(rows: int) -> Tensor:
    return torch.arange(rows) if rows <= ROWS else torch.linspace(0, rows - 1, ROWS, dtype=torch.float64).round().long()


def sample(t: Tensor) -> Tensor:
    """The compared rows of a matrix or of a stack of matrices."""
    t = t.detach()
    return t[..., sampled_rows(t.shape[-2]), :] if t.dim() > 1 and t.shape[-2] > ROWS else t.clone()


class Leaves:
    """The differentiable weights of one implementation, by the names of our gradients."""

    linear = staticmethod(F.linear)

    def __init__(self) -> None:
        self.groups: dict[str, tuple[list[Tensor], Callable[[Sequence[Tensor]], Tensor]]] = {}

    def vector(self, name: str, t: Tensor | None) -> Tensor | None:
        """A tensor that is no weight of a linear layer: a bias, a token, gates."""
        return None if t is None else self._add(name, [t], _only)[0]

    def weight(self, name: str, t: Tensor) -> Any:
        """A weight for ``linear``."""
        return self._add(name, [t], _only)[0]

    def vectors(self, name: str, t: Tensor | None, experts: int) -> list[Tensor] | list[None]:
        return [None] * experts if t is None else self._add(name, list(t), torch.stack)

    def weights(self, name: str, t: Tensor) -> list[Any]:
        """The weight of each expert."""
        return self._add(name, list(t), torch.stack)

    def columns(self, name: str, t: Tensor, at: int) -> list[Tensor]:
        """A weight in two parts."""
        return self._add(name, [t[:, :at], t[:, at:]], functools.partial(torch.cat, dim=-1))

    def _add(self, name: str, parts: list[Tensor], join: Callable[[Sequence[Tensor]], Tensor]) -> list[Tensor]:
        leaves = [p.detach().requires_grad_() for p in parts]
        self.groups[name] = (leaves, join)
        return leaves

    def flat(self) -> list[Tensor]:
        return [leaf for leaves, _ in self.groups.values() for leaf in leaves]

    def by_name(self, grads: Sequence[Tensor]) -> dict[str, Tensor]:
        """The compared rows of each gradient."""
        left: Iterator[Tensor] = iter(grads)
        return {name: join([sample(next(left)) for _ in leaves]) for name, (leaves, join) in self.groups.items()}


def _only(tensors: Sequence[Tensor]) -> Tensor:
    return tensors[0]


def parameters(module: torch.nn.Module) -> Leaves:
    """The parameters of a module as they are."""
    leaves = Leaves()
    leaves.groups = {name: ([p], _only) for name, p in module.named_parameters()}
    return leaves


@dataclass(frozen=True)
class _Probed:
    """A weight in its own dtype, and zeros added to its compared rows, whose gradient is theirs."""

    weight: Tensor
    probe: Tensor
    rows: Tensor


class Exact(Leaves):
    """Weights of the fp64 reference."""

    def vector(self, name: str, t: Tensor | None) -> Tensor | None:
        return super().vector(name, None if t is None else t.double())

    def vectors(self, name: str, t: Tensor | None, experts: int) -> list[Tensor] | list[None]:
        return super().vectors(name, None if t is None else t.double(), experts)

    def weight(self, name: str, t: Tensor) -> _Probed:
        return self._probe(name, [t], _only)[0]

    def weights(self, name: str, t: Tensor) -> list[_Probed]:
        return self._probe(name, list(t), torch.stack)

    def _probe(self, name: str, parts: list[Tensor], join: Callable[[Sequence[Tensor]], Tensor]) -> list[_Probed]:
        rows = [sampled_rows(p.shape[0]) for p in parts]
        probes = self._add(name, [p.new_zeros(len(r), p.shape[1], dtype=torch.float64) for p, r in zip(parts, rows, strict=True)], join)
        return [_Probed(p.detach(), probe, r) for p, probe, r in zip(parts, probes, rows, strict=True)]

    @staticmethod
    def linear(x: Tensor, w: _Probed, b: Tensor | None = None) -> Tensor:  # type: ignore[override]
        y = _ExactLinear.apply(x, w.weight, w.probe, w.rows)
        return y if b is None else y + b


class _ExactLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w, probe, rows):
        ctx.save_for_backward(x, w, rows)
        return torch.cat([x @ block.double().T for block in w.split(BLOCK)], -1)

    @staticmethod
    def backward(ctx, dy):
        x, w, rows = ctx.saved_tensors
        dx = None
        if ctx.needs_input_grad[0]:
            dx = torch.zeros_like(x)
            for part, block in zip(dy.split(BLOCK, -1), w.split(BLOCK), strict=True):
                dx += part @ block.double()
        return dx, None, dy[:, rows].T @ x, None


@dataclass
class Step:
    """One call: forward, and with ``leaves`` the gradient of each for the output gradient ``dy``."""

    forward: Callable[[], Tensor]
    leaves: Leaves | None = None
    dy: Tensor | None = None

    def __call__(self) -> tuple[Tensor, ...]:
        if self.leaves is None:
            with torch.no_grad():
                return (self.forward(),)
        y = self.forward()
        assert self.dy is not None
        return y, *torch.autograd.grad(y, self.leaves.flat(), self.dy.to(y.dtype))

    def results(self) -> dict[str, Tensor]:
        """The compared rows of the output and of each gradient."""
        y, *grads = self()
        return {"y": sample(y), **({} if self.leaves is None else self.leaves.by_name(grads))}

    def saved_bytes(self, given: Sequence[Tensor]) -> int:
        """Bytes kept from forward to backward: each storage once, but not those of weights and inputs."""
        if self.leaves is None:
            return 0
        known = {t.untyped_storage().data_ptr() for t in (*given, *self.leaves.flat())}
        saved: dict[int, int] = {}

        def pack(t: Tensor) -> Tensor:
            storage = t.untyped_storage()
            if storage.data_ptr() not in known:
                saved[storage.data_ptr()] = storage.nbytes()
            return t

        # The graph lives as long as its output: until then no storage is freed and its address given to another.
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            y = self.forward()
        total = sum(saved.values())
        del y
        return total


@dataclass
class Work:
    """One case at one shape, number of tokens and dtype.

    Steps are made when their turn comes, because some pack weights or compile. ``baseline`` names the peer that is the plain formula.
    ``flops`` counts the products that the mathematics needs (split router, no gradient of frozen tokens), the same for every side;
    ``bytes`` each weight, input, output and gradient once.
    """

    ours: Callable[[], Step]
    peers: dict[str, Callable[[], Step]]
    exact: Callable[[], Step]
    baseline: str
    ops: tuple[str, ...]
    dtype: torch.dtype
    flops: float
    bytes: float
    given: list[Tensor] = field(default_factory=list)
    # On what the rule allows ours; another value than 1 has its reason where it is given.
    slack: float = 1


class Rule:
    """Whether results are right: err <= 2 * err(plain formula in this dtype) + 2 * eps * max|exact|, against fp64 (compare.py)."""

    def __init__(self, work: Work) -> None:
        self.dtype = work.dtype
        self.exact = work.exact().results()
        self.baseline = work.peers[work.baseline]().results()
        for name, exact in self.exact.items():
            rms = exact.square().mean().sqrt().item()
            error = errors(self.baseline[name], exact)[1]
            if not error <= BASELINE_EPS * torch.finfo(self.dtype).eps * rms:
                raise WrongResult(f"{work.baseline}: {name}: RMS error {error:.3e} where the RMS is {rms:.3e}: it measures nothing")

    def check(self, step: Step, slack: float = 1) -> None:
        """Raises WrongResult, which names the result."""
        if self.dtype == torch.float32:
            slack = max(slack, LONG_SUM_SLACK)
        got = step.results()
        if set(got) != set(self.exact):
            raise WrongResult(f"gives {', '.join(sorted(got))}, must give {', '.join(sorted(self.exact))}")
        for name, exact in self.exact.items():
            try:
                assert_close(name, got[name], exact, self.baseline[name], self.dtype, slack)
            except AssertionError as error:
                raise WrongResult(str(error)) from None
