"""What a CUDA graph needs of a call, seen without a GPU: launches that depend on shapes alone, and no wait for the device.

Every form of every op runs on torch's meta device, forward and backward, its launches taken down instead of run. Tensors there have no
values, so a grid, a tile or a branch that came from one would be an error; and no operation is called whose result's size comes from
values, or that moves data between devices. What is captured natively is `make gpu-check`'s to run.

Seen the same way: what a call allocates, where a fused kernel is there to allocate less.
"""

import importlib
import importlib.util

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from cmoe_kernels import backends

if backends.INTERPRETED:
    pytest.skip("records launches as for a GPU, so not in the interpreter's process", allow_module_level=True)
if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

from benchmarks.inspection import aot
from tests.ops import cases


class NoWait(TorchDispatchMode):
    """Raises at an operation that would read the device's memory on the host."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name
        tags = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape)
        # An index may be a mask, which the meta device refuses by itself.
        assert name == "aten::index" or not any(tag in func.tags for tag in tags), name
        result = func(*args, **(kwargs or {}))
        tensors = [a for a in torch.utils._pytree.tree_leaves((args, kwargs, result)) if isinstance(a, torch.Tensor)]
        assert all(t.device.type == "meta" for t in tensors), name
        return result


@pytest.mark.parametrize("target", [pytest.param("sm_80", marks=pytest.mark.full), "sm_90"])
@pytest.mark.parametrize("index", range(len(cases.CASES)), ids=[str(case) for case in cases.CASES])
def test_launches_come_from_shapes(index, target):
    kernels = importlib.import_module(f"cmoe_kernels.ops.{cases.CASES[index].op}.triton")
    launches = []
    for name, arguments in aot._op_calls(index, torch.bfloat16, False, "image"):
        with aot._recording(target, launches), NoWait():
            getattr(kernels, name)(*arguments)
    assert launches


class Allocations(TorchDispatchMode):
    """The elements of every new tensor."""

    def __init__(self):
        super().__init__()
        self.sizes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if not any(r.alias_info for r in func._schema.returns):
            self.sizes += [t.numel() for t in torch.utils._pytree.tree_leaves(result) if isinstance(t, torch.Tensor)]
        return result


def allocated(form: str, name: str) -> list[int]:
    index = [str(case) for case in cases.CASES].index(form)
    kernels = importlib.import_module(f"cmoe_kernels.ops.{cases.CASES[index].op}.triton")
    arguments = dict(aot._op_calls(index, torch.bfloat16, False, "wide"))[name]
    with aot._recording("sm_90", []), Allocations() as allocations:
        getattr(kernels, name)(*arguments)
    return allocations.sizes


def test_what_is_never_in_memory(monkeypatch):
    size = {"T": 1024, "D": 512, "H": 256, "O": 768, "E": 5, "K": 2, "R": 4096, "G": 4, "S": 512}
    monkeypatch.setitem(aot.SIZES, "wide", size)
    tokens, hidden = size["T"], size["T"] * size["R"]
    # The router's hidden activation: not in inference and with recompute, once where backward will read it.
    assert max(allocated("task_router-task_token-recompute", "task_router")) <= hidden * size["E"] // 64
    assert sorted(allocated("task_router-task_token", "task_router"))[-2:] < [hidden, hidden]
    assert max(allocated("task_router-task_token", "task_router")) == hidden
    # Dense experts' outputs, in either direction.
    for name in ("soft_experts", "soft_experts_backward"):
        sizes = allocated("soft_experts-mlp", name)
        assert tokens * size["E"] * size["H"] in sizes
        assert tokens * size["E"] * size["O"] not in sizes
    # Sparse experts' gathered tokens.
    assert tokens * size["K"] * size["D"] not in allocated("sparse_experts-mlp", "sparse_experts")


def test_a_wait_is_seen():
    x = torch.empty(3, device="meta")
    for call in (lambda: x.nonzero(), lambda: x.sum().item(), lambda: x[x > 0], lambda: torch.bincount(x.long()), lambda: x.to("cpu")):
        with pytest.raises((AssertionError, RuntimeError, NotImplementedError)), NoWait():
            call()
