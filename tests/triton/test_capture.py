"""What a CUDA graph needs of a call, seen without a GPU: launches that depend on shapes alone, and no wait for the device.

Every form of every op runs on torch's meta device, forward and backward, its launches taken down instead of run. Tensors there have no
values, so a grid, a tile or a branch that came from one would be an error; and no operation is called whose result's size comes from
values, or that moves data between devices. What is captured natively is `make gpu-check`'s to run.
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

from benchmarks import aot
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


@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
@pytest.mark.parametrize("index", range(len(cases.CASES)), ids=[str(case) for case in cases.CASES])
def test_launches_come_from_shapes(index, target):
    kernels = importlib.import_module(f"cmoe_kernels.ops.{cases.CASES[index].op}.triton")
    launches = []
    for name, arguments in aot._op_calls(index, torch.bfloat16, False, "image"):
        with aot._recording(target, launches), NoWait():
            getattr(kernels, name)(*arguments)
    assert launches


def test_a_wait_is_seen():
    x = torch.empty(3, device="meta")
    for call in (lambda: x.nonzero(), lambda: x.sum().item(), lambda: x[x > 0], lambda: torch.bincount(x.long()), lambda: x.to("cpu")):
        with pytest.raises((AssertionError, RuntimeError, NotImplementedError)), NoWait():
            call()
