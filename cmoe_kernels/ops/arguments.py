"""What the public functions check before an op is called: each message names the argument, what it was and what it must be.

Shapes and dtypes are checked here, where torch.compile can trace them. Values of index tensors are checked by the kernels, which may
read them: always on the CPU; on a GPU, where reading would wait for the device, only with CMOE_CHECK=1.
"""

import itertools
import os

import torch
from torch import Tensor
from torch._subclasses import FakeTensor

from cmoe_kernels.ops.precision import FLOATS, autocast_is_on

CHECK_ON_DEVICE = os.environ.get("CMOE_CHECK", "0") not in ("", "0")


def require_tensor(name: str, value: object, letters: str) -> None:
    """A tensor with one dimension per letter of ``letters`` ("TE": tokens by experts)."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor {_brackets(letters)}, got {type(value).__name__}")
    if value.dim() != len(letters):
        raise ValueError(f"{name} must have the dimensions {_brackets(letters)}, got shape {tuple(value.shape)}")


def require_float(name: str, value: Tensor, letters: str) -> None:
    require_tensor(name, value, letters)
    if value.dtype not in FLOATS:
        raise TypeError(f"{name} must be float32, bfloat16, float16 or float64, got {value.dtype}")


def require_size(name: str, value: Tensor, dim: int, size: int, of: str) -> None:
    if value.shape[dim] != size:
        raise ValueError(f"{name} has {value.shape[dim]} in dimension {dim} of shape {tuple(value.shape)}, must be {size} ({of})")


def require_device(name: str, value: Tensor | None, x: Tensor, of: str = "x") -> None:
    if value is not None and value.device != x.device:
        raise ValueError(f"{name} is on {value.device}, must be on {x.device} like {of}")


def require_index(name: str, value: Tensor, letters: str, x: Tensor, dtype: torch.dtype = torch.int64) -> None:
    """An index tensor of one dtype on the device of ``x``; its values are the kernel's to check."""
    require_tensor(name, value, letters)
    if value.dtype != dtype:
        raise TypeError(f"{name} must be {dtype}, got {value.dtype}")
    require_device(name, value, x)


def require_weight(name: str, value: Tensor, letters: str, x: Tensor, dtype: torch.dtype) -> Tensor:
    """A weight or bias in ``dtype``, the dtype of the products, or in fp32 to be rounded to it by the kernel."""
    require_float(name, value, letters)
    require_device(name, value, x)
    if value.dtype == dtype or (value.dtype == torch.float32 and dtype != torch.float64):
        return value
    if value.dtype != torch.float64 and dtype != torch.float64 and autocast_is_on(x):
        return value.to(dtype)
    raise TypeError(
        f"{name} is {value.dtype}, must be {dtype} like x" + ("" if dtype in (torch.float32, torch.float64) else " or torch.float32")
    )


def require_gates(name: str, value: Tensor, letters: str, x: Tensor) -> Tensor:
    """Gates and weights of experts, in fp32 (fp64 with an fp64 ``x``); half precision is widened."""
    require_float(name, value, letters)
    require_device(name, value, x)
    if value.dtype == torch.float64 and x.dtype != torch.float64:
        raise TypeError(f"{name} is torch.float64, must be torch.float32 where x is {x.dtype}")
    return value.to(torch.float64 if x.dtype == torch.float64 else torch.float32)


def require_expert_weights(
    x: Tensor, dtype: torch.dtype, w1: Tensor, b1: Tensor | None, w2: Tensor | None, b2: Tensor | None, gated: bool = False
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """The weights of E experts against ``x`` and each other: w1 [E, H, D] (gated: [E, 2H, D]), b1, w2 [E, O, H], b2."""
    w1 = require_weight("w1", w1, "EHD", x, dtype)
    require_size("w1", w1, 2, x.shape[1], "width of x")
    if b1 is not None:
        b1 = require_weight("b1", b1, "EH", x, dtype)
        require_size("b1", b1, 0, w1.shape[0], "experts in w1")
        require_size("b1", b1, 1, w1.shape[1], "rows of an expert in w1")
    if w2 is None:
        if b2 is not None:
            raise ValueError("b2 is given without w2")
        if gated:
            raise ValueError("w2 must be given with gated=True")
        return w1, b1, None, None
    w2 = require_weight("w2", w2, "EOH", x, dtype)
    require_size("w2", w2, 0, w1.shape[0], "experts in w1")
    if gated and w1.shape[1] % 2:
        raise ValueError(f"w1 has {w1.shape[1]} in dimension 1 of shape {tuple(w1.shape)}, must be even (gate rows, then up rows)")
    require_size("w2", w2, 2, w1.shape[1] // 2 if gated else w1.shape[1], "hidden width of w1")
    if b2 is not None:
        b2 = require_weight("b2", b2, "EO", x, dtype)
        require_size("b2", b2, 0, w2.shape[0], "experts in w2")
        require_size("b2", b2, 1, w2.shape[1], "output width of w2")
    return w1, b1, w2, b2


def require_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} is {value!r}, must be one of {', '.join(choices)}")


def require_integer(name: str, value: object) -> None:
    if not isinstance(value, int | torch.SymInt) and not hasattr(value, "__index__"):  # numpy has integers of its own
        raise TypeError(f"{name} is {value!r}, must be an integer")


def require_experts_per_token(indices: Tensor) -> None:
    if indices.shape[1] < 1:
        raise ValueError(f"indices has shape {tuple(indices.shape)}, must name at least one expert per token")


def may_read(index: Tensor) -> bool:
    """Whether a check may read the values of a tensor: on a GPU that waits for the device, and a fake tensor has none."""
    return (index.device.type == "cpu" or CHECK_ON_DEVICE) and not isinstance(index, FakeTensor)


def require_range(name: str, index: Tensor, size: int, what: str, least: int = 0) -> None:
    """Values in [least, size); reads the tensor, so it is for kernels (see the module's note)."""
    if index.numel() and may_read(index):
        low, high = (int(v) for v in index.aminmax())
        if low < least or high >= size:
            raise ValueError(f"{name} holds {low if low < least else high}, must be in {least}..{size - 1} ({what})")


def require_permutation(name: str, index: Tensor) -> None:
    """Values that are range(n) in some order; reads the tensor as require_range does."""
    if may_read(index) and not torch.equal(index.sort().values, torch.arange(index.shape[0], device=index.device)):
        raise ValueError(f"{name} must be a permutation of range({index.shape[0]})")


def require_offsets(offsets: Tensor, rows: int) -> list[tuple[int, int]]:
    """Where each expert's rows begin and end; reads the tensor on every device."""
    ends = offsets.tolist()
    if ends[0] != 0 or ends[-1] > rows or any(a > b for a, b in itertools.pairwise(ends)):
        raise ValueError(f"offsets are {ends}, must start at 0, not decrease and end at {rows} rows or before")
    return list(itertools.pairwise(ends))


def _brackets(letters: str) -> str:
    return "[" + ", ".join(letters) + "]"
