"""Which backend serves which op on which device.

Four backends implement the same functions: ``reference`` (plain PyTorch, every device, the definition of correct), ``cpu``
(C++, csrc/), ``triton`` and ``cuda``. ``auto`` takes the first of a device's order that has a kernel for the op. The choice is
made in the public function, before the op is called: so it is recorded with the autograd graph, and a backward pass runs on the
backend of its forward pass, also outside ``use_backend`` and on another thread, and ``torch.compile`` guards on it.

Triton is imported by the first call that it serves, so a machine without a GPU never imports it. With TRITON_INTERPRET=1 in the
environment its kernels also run on the CPU, interpreted: the last choice there, for tests.

Which of ``cuda`` and ``triton`` goes first is a matter of measurement: ops/preferred.json says it per architecture, op and number of tokens
(few, many). Where it says "unmeasured" the order below stands.
"""

import contextlib
import functools
import importlib.util
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from cmoe_kernels import native
from cmoe_kernels.ops import checked
from cmoe_kernels.ops.arguments import CHECK_ON_DEVICE

OPS = ("soft_gate", "topk_gate", "task_router", "grouped_linear", "soft_experts", "sparse_experts", "balance_loss")
BACKENDS = ("reference", "cpu", "triton", "cuda")
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"
DEVICE_ORDER = {
    "cpu": ("cpu", "reference", "triton") if INTERPRETED else ("cpu", "reference"),
    # Both are proven without a GPU (tests/triton, tests/emulation) and have not run on one yet.
    "cuda": ("triton", "cuda", "reference"),
}
# GPU kernels accumulate in fp32: fp64 is left to the others.
WITHOUT_DOUBLE = ("triton", "cuda")
# {architecture: {op: {"few" or "many" tokens: the faster one of "cuda" and "triton"}}}; a line that is missing is unmeasured.
FEW = 64
PREFERRED: dict[str, dict[str, dict[str, str]]] = json.loads((Path(__file__).parent / "ops" / "preferred.json").read_text())

_kernels: dict[tuple[str, str], Callable[..., Any]] = {}


def _checked(name: str, source: str) -> str:
    if name != "auto" and name not in BACKENDS:
        raise ValueError(f"{source}: {name!r} is not a backend; choose one of {', '.join(BACKENDS)} or auto")
    return name


_selected = _checked(os.environ.get("CMOE_BACKEND") or "auto", "CMOE_BACKEND")


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run ops on one backend inside a ``with`` block.

    Args:
        name: "reference", "cpu", "triton", "cuda", or "auto" for the best one that the op and the device have.

    The setting is process-wide, as torch's own backend flags are. An op that the named backend lacks raises a RuntimeError: it
    never falls back in silence. The environment variable CMOE_BACKEND sets the value outside every block.
    """
    global _selected
    outer, _selected = _selected, _checked(name, "use_backend")
    try:
        yield
    finally:
        _selected = outer


def register(op: str, backend: str, kernel: Callable[..., Any]) -> None:
    """Let ``backend`` serve ``op``. Kernels of one op share one signature, that of its reference."""
    _kernels[op, backend] = kernel


def register_triton(op: str) -> None:
    """Let ``ops/<op>/triton.py`` serve ``op`` and its backward; it is imported when first called."""
    if importlib.util.find_spec("triton") is not None:
        for name in (op, f"{op}_backward"):
            register(name, "triton", functools.partial(_run_triton, f"cmoe_kernels.ops.{op}.triton", name))


def _run_triton(module: str, name: str, *arguments: Any) -> Any:
    return getattr(importlib.import_module(module), name)(*arguments)


def serving(op: str, device_type: str, dtype: torch.dtype = torch.float32, tokens: int | None = None) -> list[str]:
    """The backends that can run ``op`` on a device in a dtype, best first; ``tokens`` is None for many."""
    able = [b for b in DEVICE_ORDER.get(device_type, ("reference",)) if (op, b) in _kernels]
    if dtype == torch.float64:
        return [b for b in able if b not in WITHOUT_DOUBLE]
    if device_type == "cuda":
        able = [b for b in able if not native.gpu_error(b)]
        if "cuda" in able and _preferred(op, tokens) == "cuda":
            able = ["cuda", *(b for b in able if b != "cuda")]
    return able


def selected() -> str:
    """What use_backend or CMOE_BACKEND asks for: a backend, or "auto"."""
    return _selected


def choose(op: str, device_type: str, dtype: torch.dtype = torch.float32, tokens: int | None = None) -> str:
    """The backend that ``op`` will use on a device, in a dtype, for a number of tokens (None: many), now."""
    able = serving(op, device_type, dtype, tokens)
    if _selected == "auto":
        return able[0]
    if _selected not in able:
        what = f"{op} in torch.float64" if _selected in serving(op, device_type) else op
        why = f" ({native.gpu_error(_selected)})" if device_type == "cuda" and native.gpu_error(_selected) else ""
        raise RuntimeError(
            f"backend {_selected!r} has no {what} for device {device_type!r}{why}; it is served there by {', '.join(able)} "
            "(use_backend('auto') picks one)"
        )
    return _selected


def run(op: str, backend: str, device: torch.device, *arguments: Any) -> Any:
    """Call a backend's kernel, after a look at the values of its index tensors where ``ops/checked.py`` says so.

    Autocast is off inside: dtypes were settled by the public function. Outputs are made contiguous, as the fakes say, and None (a
    gradient that was not requested, nothing saved) becomes an empty tensor of its own.
    """
    kernel = _kernels.get((op, backend))
    if kernel is None or backend not in DEVICE_ORDER.get(device.type, ("reference",)):
        raise RuntimeError(f"{op} was recorded with backend {backend!r}, which is not there on this machine: {missing_reason(backend)}")
    # "cuda" is a GPU's backend also where tests emulate it.
    if op in checked.CHECKS and backend != "cpu" and (backend != "cuda" or CHECK_ON_DEVICE):
        checked.CHECKS[op](*arguments)
    autocast = torch.is_autocast_enabled(device.type)
    if backend == "cpu" and not autocast:  # contiguous outputs by contract; on one token the lines below take as long as the kernel
        return kernel(*arguments)
    # Triton launches on the current device, which need not be that of the arguments.
    current = torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
    with torch.autocast(device.type, enabled=False) if autocast else contextlib.nullcontext(), current:
        result = kernel(*arguments)
    if isinstance(result, torch.Tensor):
        return result.contiguous()
    return tuple(torch.empty(0, device=device) if t is None else t.contiguous() for t in result)


def missing_reason(backend: str) -> str:
    """Why a backend, or a part of it, does not serve here."""
    if backend == "cpu":
        return native.error or "it has no kernel for this op yet"
    if backend == "triton" and importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if backend == "cuda" and native.cuda_kernels().error:
        return native.cuda_kernels().error
    if backend in ("triton", "cuda") and not torch.cuda.is_available():
        return "no GPU that torch can use was found"
    return native.gpu_error(backend) or "it has no kernel for this op yet"


@native.constant
def preferred(op: str, tokens: str) -> str:
    """What ops/preferred.json says of an op with "few" or "many" tokens on the first GPU: "cuda", "triton" or "unmeasured"."""
    if not torch.cuda.is_available() or torch.version.hip is not None:
        return "unmeasured"
    table = PREFERRED.get("sm_{}{}".format(*torch.cuda.get_device_capability(0)), {})
    return table.get(op, {}).get(tokens, "unmeasured")


def _preferred(op: str, tokens: int | None) -> str:
    few, many = preferred(op, "few"), preferred(op, "many")
    # The number of tokens is looked at where it decides: torch.compile makes a graph for each side of what is compared.
    return few if few != many and tokens is not None and tokens <= FEW else many
