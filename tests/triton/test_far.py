"""Rows and experts so far apart that their offsets need 64 bits: the same bits as when they lie side by side.

The memory between them is reserved and never touched.
"""

import mmap

import pytest
import torch
from torch import Tensor

import cmoe_kernels as cmoe
from cmoe_kernels import backends
from tests.compare import grads
from tests.ops.cases import Maker

pytestmark = pytest.mark.skipif(not backends.INTERPRETED, reason="needs TRITON_INTERPRET=1")
# Three of these are more than 2**31 elements, and one fits into 32 bits, so that Triton passes it as 32 bits.
STRIDE = 1 << 30
# Linux's MAP_NORESERVE, which Python's mmap does not name.
NORESERVE = 0x4000


def far(t: Tensor) -> Tensor:
    """The same values, STRIDE elements between neighbours in the first dimension."""
    elements = (t.shape[0] - 1) * STRIDE + t[0].numel()
    memory = mmap.mmap(-1, elements * t.element_size(), mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NORESERVE)
    return torch.frombuffer(memory, dtype=t.dtype).as_strided(t.shape, (STRIDE, *t[0].stride())).copy_(t)


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
# Left out: rows of w1 are the depth of the product that gives dx, and a step along the depth is taken in 32 bits.
PAIRS = [
    (op, name)
    for op, make in CALLS.items()
    for name, value in make(Maker(torch.float16, 0)).items()
    if isinstance(value, Tensor) and value.dim() > 1 and (op, name) != ("task_router", "w1")
]


@pytest.mark.parametrize(("op", "name"), PAIRS)
def test_far_apart(op, name):
    results = []
    for place in (lambda t: t, far):
        arguments = CALLS[op](Maker(torch.float16, 0))
        arguments[name] = place(arguments[name])
        leaves = [n for n, v in arguments.items() if isinstance(v, Tensor) and v.is_floating_point()]
        for n in leaves:
            arguments[n].requires_grad_()
        with cmoe.use_backend("triton"):
            y = getattr(cmoe, op)(**arguments)
        y = y[0] if isinstance(y, tuple) else y
        results.append([y, *grads(y, [arguments[n] for n in leaves], torch.ones_like(y))])
    for near, apart in zip(*results, strict=True):
        assert torch.equal(near, apart)
