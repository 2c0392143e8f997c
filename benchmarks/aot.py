"""Compile every Triton kernel for GPUs that are not here, and say what the compiler made of it.

    python -m benchmarks.aot [--targets sm_80,sm_90,sm_100,gfx942] [--ops soft_gate,topk_gate] [--write benchmarks/results/aot.json]

No GPU and no driver is needed. The calls of tests/ops/cases.py are made at the sizes of a connector and at small odd ones, on fake tensors:
the wrappers choose grids and configurations as they would on a GPU, and each launch is compiled, by Triton's own path, for the target.
So what is compiled is what would run, and a wrapper that asked a tensor for a value would fail here: fakes have none.

Run without TRITON_INTERPRET. Budgets and their reasons are in tests/triton/test_aot.py.
"""

import argparse
import contextlib
import importlib
import json
import re
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction, MockTensor

import cmoe_kernels as cmoe
from cmoe_kernels import backends
from tests.ops import cases

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
# The released connector for a batch of 16 images, and sizes that divide by nothing.
SIZES = {
    "connector": {"T": 1024, "D": 5632, "H": 4096, "O": 4096, "E": 5, "K": 2, "R": 45056, "G": 4, "S": 5632},
    "few_tokens": {"T": 64, "D": 5632, "H": 4096, "O": 4096, "E": 5, "K": 2, "R": 45056, "G": 4, "S": 5632},
    "many_experts": {"T": 4096, "D": 2048, "H": 768, "O": 2048, "E": 64, "K": 8, "R": 4096, "G": 4, "S": 2048},
    "odd": {"T": 11, "D": 7, "H": 9, "O": 6, "E": 5, "K": 2, "R": 13, "G": 3, "S": 4},
}


@dataclass
class Compiled:
    """One kernel in one configuration, compiled for one target."""

    kernel: str
    op: str
    target: str
    signature: dict[str, str]
    constants: dict[str, Any]
    warps: int
    stages: int
    aligned: bool
    seconds: float
    registers: int
    spills: int
    shared: int
    instructions: dict[str, int] = field(default_factory=dict)
    calls: list[str] = field(default_factory=list)


class _NoDevice:
    """Enough of a driver for a compile."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> str:
        return str(self.target)

    def get_current_stream(self, device: Any) -> int:
        return 0


@contextlib.contextmanager
def compiling(target: str, op: str, call: str, into: dict[Any, Compiled]) -> Iterator[None]:
    """Inside, a launch compiles its kernel for ``target`` and records it instead of running."""

    def getitem(self: JITFunction, grid: Any) -> Any:
        def compile_one(*args: Any, **kwargs: Any) -> None:
            args = tuple(MockTensor(a.dtype) if isinstance(a, Tensor) else a for a in args)
            start = time.perf_counter()
            kernel = self.run(*args, grid=grid, warmup=True, **kwargs)
            if id(kernel) not in into:
                into[id(kernel)] = _report(kernel, self, op, target, time.perf_counter() - start)
                into[id(kernel)].__dict__["kept"] = kernel
            if call not in into[id(kernel)].calls:
                into[id(kernel)].calls.append(call)

        return compile_one

    before = driver._active
    driver.set_active(_NoDevice(TARGETS[target]))  # type: ignore[arg-type]
    try:
        with mock.patch.object(JITFunction, "__getitem__", getitem):
            yield
    finally:
        driver._active = before


def _report(kernel: CompiledKernel, function: JITFunction, op: str, target: str, seconds: float) -> Compiled:
    source, metadata = kernel.src, kernel.metadata
    names = function.arg_names
    constants = {names[path[0]]: str(v) for path, v in source.constants.items()}
    pointers = [i for i, n in enumerate(names) if source.signature[n].startswith("*")]
    look = _amd if target.startswith("gfx") else _nvidia
    registers, spills, instructions = look(kernel)
    return Compiled(
        kernel=function.__name__,
        op=op,
        target=target,
        signature={n: t for n, t in source.signature.items() if t != "constexpr"},
        constants=constants,
        warps=metadata.num_warps,
        stages=metadata.num_stages,
        aligned=all(source.attrs.get((i,)) for i in pointers),
        seconds=round(seconds, 2),
        registers=registers,
        spills=spills,
        shared=metadata.shared,
        instructions=instructions,
    )


NVIDIA = {
    "mma": r"\bHMMA\.|\bHGMMA\.|\bUTC[A-Z]*MMA|\bQGMMA",
    "async_copy": r"\bLDGSTS",
    "tma": r"\bUTMALDG",
    "spill": r"\b(?:STL|LDL)\b",
}
AMD = {"mma": r"\bv_mfma_", "async_copy": r"\bglobal_load_lds|\bbuffer_load_.* lds", "spill": r"\bscratch_(?:load|store)"}


def _nvidia(kernel: CompiledKernel) -> tuple[int, int, dict[str, int]]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = subprocess.run([TOOLS / "cuobjdump", "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
        sass = subprocess.run([TOOLS / "nvdisasm", "-c", file.name], capture_output=True, text=True, check=True).stdout
    registers = re.search(r"REG:(\d+)", usage)
    assert registers is not None, usage
    counts = {name: len(re.findall(pattern, sass)) for name, pattern in NVIDIA.items()}
    return int(registers[1]), counts.pop("spill"), counts


def _amd(kernel: CompiledKernel) -> tuple[int, int, dict[str, int]]:
    text = kernel.asm["amdgcn"]

    def number(name: str) -> int:
        found = re.search(rf"\.{name}:\s*(\d+)", text)
        return int(found[1]) if found else 0

    counts = {name: len(re.findall(pattern, text)) for name, pattern in AMD.items()}
    return number("vgpr_count"), number("vgpr_spill_count"), {k: v for k, v in counts.items() if k != "spill"}


class _Recorder(TorchDispatchMode):
    """The calls of cmoe ops, forward and backward."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, tuple[Any, ...]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "cmoe":
            self.calls.append((func._schema.name.removeprefix("cmoe::"), args))
        return func(*args, **(kwargs or {}))


def launches(case: cases.Case, dtype: torch.dtype) -> list[tuple[str, tuple[Any, ...]]]:
    """The ops that a case runs forward and backward, with fake tensors for arguments. Call inside a FakeTensorMode."""
    arguments = case.make(dtype)
    with cmoe.use_backend("reference"), _Recorder() as recorder:
        y = case.call(arguments)
        torch.autograd.grad(y, [arguments[n] for n in cases.leaves(arguments)], torch.ones_like(y), allow_unused=True)
    # An op's last argument is its backend.
    return [(name, args[:-1]) for name, args in recorder.calls]


def compile_op(
    op: str, target: str, sizes: dict[str, dict[str, int]] = SIZES, dtypes: tuple[torch.dtype, ...] = cases.DTYPES
) -> list[Compiled]:
    """Every launch of every form of an op, for one target."""
    into: dict[Any, Compiled] = {}
    kernels = importlib.import_module(f"cmoe_kernels.ops.{op}.triton")
    for size, letters in sizes.items():
        with contextlib.ExitStack() as stack:
            for letter, value in letters.items():
                stack.enter_context(mock.patch.object(cases, letter, value))
            stack.enter_context(FakeTensorMode())
            for case in cases.CASES:
                if case.op != op or (size != "odd" and _has_literal_sizes(case)):
                    continue
                for dtype in dtypes:
                    for name, arguments in launches(case, dtype):
                        with compiling(target, op, f"{name} {case.form} {str(dtype).removeprefix('torch.')} {size}", into):
                            getattr(kernels, name)(*arguments)
    return list(into.values())


def _has_literal_sizes(case: cases.Case) -> bool:
    """Forms written out for the table's own eleven tokens."""
    return "mask" in case.form or (case.form.endswith("segments") and case.op == "balance_loss")


def served() -> list[str]:
    return [op for op in backends.OPS if (op, "triton") in backends._kernels]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--targets", default=",".join(TARGETS))
    parser.add_argument("--ops", default=",".join(served()))
    parser.add_argument("--write", type=Path)
    options = parser.parse_args()
    rows: list[Compiled] = []
    print(f"{'kernel':32} {'target':7} {'configs':>7} {'registers':>9} {'spills':>6} {'shared':>7} {'mma':>5} {'seconds':>8}")
    for op in options.ops.split(","):
        for target in options.targets.split(","):
            found = compile_op(op, target)
            rows += found
            for kernel in sorted({r.kernel for r in found}):
                mine = [r for r in found if r.kernel == kernel]
                most = [max(getattr(r, n) for r in mine) for n in ("registers", "spills", "shared")]
                mma = max(r.instructions["mma"] for r in mine)
                print(
                    f"{kernel:32} {target:7} {len(mine):7} {most[0]:9} {most[1]:6} {most[2]:7} {mma:5} {sum(r.seconds for r in mine):8.1f}",
                    flush=True,
                )
    if options.write:
        document = {"triton": triton.__version__, "torch": torch.__version__, "sizes": SIZES, "kernels": [asdict(r) for r in rows]}
        options.write.parent.mkdir(parents=True, exist_ok=True)
        options.write.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
