"""Rows and experts so far apart that their offsets need 64 bits: the same bits as when they lie side by side.

The memory between them is reserved and never touched.
"""

import functools
import mmap

import pytest
import torch
from torch import Tensor

import cmoe_kernels as cmoe
from benchmarks.compare import grads
from cmoe_kernels import backends
from cmoe_kernels.ops.gemm import tuning
from tests.ops.cases import Maker

pytestmark = pytest.mark.skipif(not backends.INTERPRETED, reason="needs TRITON_INTERPRET=1")
# Three of these are more than 2**31 elements, and one fits into 32 bits, so that Triton passes it as 32 bits.
STRIDE = 1 << 30
# Linux's MAP_NORESERVE, which Python's mmap does not name.
NORESERVE = 0x4000


def far(t: Tensor, dim: int) -> Tensor:
    """The same values, STRIDE elements between neighbours in one dimension."""
    strides = [STRIDE if d == dim else stride for d, stride in enumerate(t.contiguous().stride())]
    elements = 1 + sum((size - 1) * stride for size, stride in zip(t.shape, strides, strict=True))
    memory = mmap.mmap(-1, elements * t.element_size(), mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NORESERVE)
    return torch.frombuffer(memory, dtype=t.dtype).as_strided(t.shape, strides).copy_(t)


def mlp(m: Maker) -> dict[str, Tensor]:
    return {"w1": m.x(4, 3, 5), "b1": m.x(4, 3), "w2": m.x(4, 6, 3), "b2": m.x(4, 6)}


CALLS = {
    "soft_gate": lambda m: {"logits": m.x(4, 3)},
    "topk_gate": lambda m: {"logits": m.x(4, 3), "k": 2},
    "balance_loss": lambda m: {"scores": m.gates(4, 3), "kind": "z"},
    "grouped_linear": lambda m: {"x": m.x(4, 5), "w": m.x(4, 6, 5), "b": m.x(4, 6), "offsets": torch.tensor([0, 1, 1, 2, 4]).int()},
    "soft_experts": lambda m: {"x": m.x(4, 5), "gates": m.gates(4, 4), **mlp(m)},
    "sparse_experts": lambda m: {"x": m.x(4, 5), "weights": m.gates(4, 1), "indices": torch.tensor([[0], [3], [3], [2]]), **mlp(m)},
    "task_router": lambda m: {"x": m.x(4, 5), "task": None, "w1": m.x(4, 5), "b1": m.x(4), "w2": m.x(4, 4), "b2": None, "inputs": "token"},
}
PLACES = [
    (op, name, dim)
    for op, make in CALLS.items()
    for name, value in {**make(Maker(torch.float16, 0)), "gradient": torch.ones(4, 3)}.items()
    if isinstance(value, Tensor) and name != "offsets" and (op, name) != ("balance_loss", "gradient")
    for dim, size in enumerate(value.shape)
    if size > 1
]


def run(op: str, name: str = "", dim: int = 0) -> list[Tensor]:
    """The result and its gradients, with one tensor spread out."""
    arguments = CALLS[op](Maker(torch.float16, 0))
    if name in arguments:
        arguments[name] = far(arguments[name], dim)
    leaves = [n for n, v in arguments.items() if isinstance(v, Tensor) and v.is_floating_point()]
    for n in leaves:
        arguments[n].requires_grad_()
    with cmoe.use_backend("triton"):
        y = getattr(cmoe, op)(**arguments)
    y = y[0] if isinstance(y, tuple) else y
    gradient = far(torch.ones_like(y), dim) if name == "gradient" else torch.ones_like(y)
    return [y, *grads(y, [arguments[n] for n in leaves], gradient)]


@functools.cache
def near(op: str, arch: str) -> list[Tensor]:
    return run(op)


# Through pointers, which the kernels step along themselves, and through descriptors where strides allow.
@pytest.mark.parametrize("arch", ["sm_80", pytest.param("sm_90", marks=pytest.mark.full)])
@pytest.mark.parametrize(("op", "name", "dim"), PLACES)
def test_far_apart(op, name, dim, arch, monkeypatch):
    monkeypatch.setattr(tuning, "interpreted", tuning.KNOWN[arch]._replace(multiprocessors=4))
    for expected, got in zip(near(op, arch), run(op, name, dim), strict=True):
        assert torch.equal(expected, got)
