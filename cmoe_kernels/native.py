"""The native library: whether it is there, what it holds, and what the processor and the GPUs here can run of it.

It registers kernels for the operations ``cmoe_native::*``; their schemas are Python's (ops/registration.py).
"""

import functools
import importlib
import importlib.util
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

library: Path | None = None
error: str | None = None
stale = False
BACKENDS = {"CPU": "cpu", "CUDA": "cuda"}  # by the device that the library names


def _load() -> None:
    global library, error, stale
    spec = importlib.util.find_spec("cmoe_kernels._C")
    if spec is None or spec.origin is None:
        error = "the native library was not built (no C++ compiler, or no torch when the package was built)"
    else:
        try:
            torch.ops.load_library(spec.origin)
        except OSError as fault:
            error = f"the native library {spec.origin} does not load: {fault}"
        else:
            # Schemas were the library's own once: one from then is not bound, and has defined what Python would.
            stale = not hasattr(_module(), "operations")
            if stale:
                error = f"the native library {spec.origin} was built from other sources, and must be built again"
            else:
                library = Path(spec.origin)
    if error:
        warnings.warn(
            f"cmoe_kernels: {error}; CPU ops run on plain PyTorch. For the native kernels install a C++ compiler and run "
            "`pip install --no-build-isolation cmoe-kernels` (`make install` in a checkout).",
            stacklevel=2,
        )


def _module() -> Any:
    return importlib.import_module("cmoe_kernels._C")


_load()


@functools.cache
def operations() -> dict[str, dict[str, str]]:
    """What the library implements: {operation: {backend: the types of its arguments and results}}."""
    found: dict[str, dict[str, str]] = {}
    for line in _module().operations().splitlines() if library else ():
        device, name, types = line.split("; ")
        found.setdefault(name, {})[BACKENDS[device]] = types
    return found


class InstructionSets(NamedTuple):
    """What the CPU kernels run with.

    ``left_out`` names better ones that failed their self-test, and how. ``used`` is empty and ``error`` says why where CMOE_CPU_ISA names
    one that is not there or that failed.
    """

    used: str
    available: list[str]
    left_out: str
    error: str


def instruction_sets() -> InstructionSets | None:
    """The instruction set of the CPU kernels, and all that could run here, best first. None without the native library."""
    if library is None:
        return None
    used, available, left_out, fault = _module().instruction_sets()
    return InstructionSets(used, available.split(", "), left_out, fault)


class Int8Kernels(NamedTuple):
    """How the CPU kernels read int8 weights (ops/int8/quantise.py), and whether they multiply int8 activations with them."""

    lanes: int
    step: int
    depth: int
    products: bool


@functools.cache
def int8_kernels() -> Int8Kernels | None:
    """The int8 kernels of the instruction set in use. None without the native library, or with no instruction set to run on."""
    if library is None or not instruction_sets().used:  # type: ignore[union-attr]
        return None
    lanes, step, depth, products = _module().int8_kernels()
    return Int8Kernels(lanes, step, depth, bool(products))


class CudaKernels(NamedTuple):
    """What the CUDA kernels of the library were compiled for; ``error`` says why there are none."""

    built: str
    error: str


@functools.cache
def cuda_kernels() -> CudaKernels:
    """What CUDA kernels the native library holds."""
    return CudaKernels("", error or "") if library is None else CudaKernels(*_module().cuda_kernels())


def runs_on(built: str, major: int, minor: int) -> bool:
    """Whether code for these architectures (``CudaKernels.built``) runs on a GPU of a compute capability.

    A cubin runs on its own and on later minor versions, one of an architecture with a letter on that alone; PTX on everything later.
    """
    capability = 10 * major + minor
    cubins = re.findall(r"sm_(\d+)([af]?)", built)
    ptx = [int(arch) for arch in re.findall(r"PTX of compute_(\d+)", built)]
    fits = [int(arch) == capability if letter else int(arch) // 10 == major and int(arch) <= capability for arch, letter in cubins]
    return any(fits) or any(arch <= capability for arch in ptx)


def constant(function: Callable[..., str | int]) -> Any:
    """Called once, and a constant of compiled functions: torch.compiler.assume_constant_result without importing torch._dynamo here."""
    cached = functools.cache(function)

    @functools.wraps(function)
    def call(*arguments: str) -> str | int:
        return cached(*arguments)

    call._dynamo_marked_constant = True  # type: ignore[attr-defined]
    call.cache_clear = cached.cache_clear  # type: ignore[attr-defined]
    return call


@constant
def gpu_error(backend: str) -> str:
    """Why a backend's kernels cannot run on the GPUs found here; empty where they can, or where there is no GPU."""
    if backend == "cuda" and (cuda_kernels().error or not torch.cuda.is_available()):
        return cuda_kernels().error
    if backend not in ("triton", "cuda") or not torch.cuda.is_available():
        return ""
    if torch.version.hip is not None:
        return "the CUDA kernels are for NVIDIA GPUs" if backend == "cuda" else ""
    for device in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(device)
        found = f"{torch.cuda.get_device_name(device)} has compute capability {major}.{minor}"
        if backend == "triton" and major < 8:
            return f"{found}, the Triton kernels need 8.0"
        if backend == "cuda" and not runs_on(cuda_kernels().built, major, minor):
            return f"{found}, the CUDA kernels were compiled for {cuda_kernels().built}"
    return ""
