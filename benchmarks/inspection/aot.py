"""Compile every Triton kernel for GPUs that are not here, and say what the compiler made of it.

    python -m benchmarks.inspection.aot [--targets sm_80,sm_90,sm_100,gfx942] [--kernels grouped_gemm_fwd_kernel,...] [--jobs 2] [--write]

No GPU and no driver is needed, and no kernel runs. The calls of tests/ops/cases.py are made at the sizes of a connector and at small odd
ones, on tensors without memory (torch's meta device): the wrappers choose grids and configurations as they would on a GPU, and Triton's own
launcher turns each launch into a signature, constants and divisibility hints. Launches that differ in one of these are compiled, each
once. So what is compiled is what would run, and a wrapper that asked a tensor for a value would fail here.

Compiled is one launch for each kernel, configuration, dtype and alignment, the one with the most to hold (``cover``); for targets that
are reported and not proven, in bf16 at aligned sizes alone. ``--write`` puts the rows into benchmarks/results/aot.json, in place of those
of the same kernels and targets; `make docs` shows them. Budgets and their reasons are in tests/triton/test_aot.py.

Run without TRITON_INTERPRET.
"""

import argparse
import contextlib
import functools
import hashlib
import importlib
import json
import multiprocessing
import re
import subprocess
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

import cmoe_kernels as cmoe
from cmoe_kernels import backends
from tests.ops import cases

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# Held to budgets; the others are compiled and reported.
PROVEN = ("sm_80", "sm_90")
# Of a multiprocessor: warps and bytes of shared memory, of which each program takes 1 KiB more than it asks for.
MULTIPROCESSOR = {"sm_80": (64, 164 << 10), "sm_90": (64, 228 << 10), "sm_100": (64, 228 << 10)}
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
RESULTS = Path(__file__).parents[1] / "results" / "aot.json"

# The released connector for 16 images, for four, for one and for a few tokens, so that each row of the tile tables is chosen; many experts;
# sizes that divide by nothing; and narrow weights, which have tiles of their own in the product of the weights' gradients.
_CONNECTOR = {"T": 1024, "D": 5632, "H": 4096, "O": 4096, "E": 5, "K": 2, "R": 45056, "G": 4, "S": 5632}
SIZES = {
    "connector": _CONNECTOR,
    "images": {**_CONNECTOR, "T": 256},
    "image": {**_CONNECTOR, "T": 64},
    "tokens": {**_CONNECTOR, "T": 16},
    "many_experts": {"T": 4096, "D": 2048, "H": 768, "O": 2048, "E": 64, "K": 8, "R": 4096, "G": 4, "S": 2048},
    "odd": {"T": 11, "D": 7, "H": 9, "O": 6, "E": 5, "K": 2, "R": 13, "G": 3, "S": 4},
    "narrow": {"T": 64, "D": 64, "H": 64, "O": 64, "E": 5, "K": 2, "R": 64, "G": 4, "S": 64},
}
# "mixed" is bf16 with weights in fp32, tf32 is fp32 with the switch that asks for it.
PRECISIONS = {"bf16": torch.bfloat16, "mixed": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "tf32": torch.float32}


@dataclass
class Launch:
    """What Triton compiles one kernel for. Launches with one key run the same machine code."""

    kernel: str
    target: str
    function: JITFunction
    signature: dict[str, str]
    constants: dict[tuple[int, ...], Any]
    attributes: dict[tuple[int, ...], Any]
    options: Any
    # Of the calls that make it: op, form, precision, size.
    calls: list[tuple[str, str, str, str]] = field(default_factory=list)

    @functools.cached_property
    def key(self) -> str:
        names = self.function.arg_names
        constants = {names[path[0]]: str(value) for path, value in self.constants.items()}
        hints = {names[path[0]]: str(value) for path, value in self.attributes.items()}
        parts = (self.kernel, self.target, self.signature, sorted(constants.items()), sorted(hints.items()), self.config)
        return hashlib.sha256(repr(parts).encode()).hexdigest()[:12]

    @functools.cached_property
    def settings(self) -> dict[str, Any]:
        """Its constants by name, without those that are None."""
        return {self.function.arg_names[path[0]]: _plain(value) for path, value in self.constants.items() if value is not None}

    @property
    def tile(self) -> str:
        return "x".join(str(self.settings[n]) for n in ("BM", "BN", "BK", "BR", "BT", "BLOCK_T", "BLOCK_E", "BLOCK") if n in self.settings)

    @property
    def config(self) -> tuple[str, int, int]:
        return self.tile, self.options.num_warps, self.options.num_stages

    @property
    def dtypes(self) -> tuple[str, ...]:
        return tuple(sorted({t for t in self.signature.values() if t.startswith("*")}))

    @property
    def product(self) -> bool:
        """Whether it is one of the kernels with a loop of products on operands of its caller's dtype."""
        return "BM" in self.settings and ("BK" in self.settings or "BR" in self.settings)

    @property
    def operand(self) -> str:
        """What the products multiply: bf16, fp16, tf32 or fp32."""
        if not self.product:
            return ""
        dtype = str(self.settings.get("OPERAND", self.settings.get("ROUND")))
        return "tf32" if dtype == "fp32" and self.settings.get("PRECISION") == "tf32" else dtype

    @property
    def aligned(self) -> bool:
        return any(size != "odd" for *_, size in self.calls)

    def compile(self) -> CompiledKernel:
        """Always anew: a kernel from Triton's cache would say nothing about the compiler."""
        source = ASTSource(self.function, self.signature, self.constants, self.attributes)
        with tempfile.TemporaryDirectory() as cache, triton.knobs.cache.scope():
            triton.knobs.cache.dir = cache
            return triton.compile(source, target=TARGETS[self.target], options=self.options.__dict__)

    def report(self) -> dict[str, Any]:
        """Compile it, and what became of it."""
        kernel = self.compile()
        registers, spills, instructions = (_amd if self.target.startswith("gfx") else _nvidia)(kernel)
        return {
            "kernel": self.kernel,
            "target": self.target,
            "key": self.key,
            "tile": self.tile,
            "warps": self.options.num_warps,
            "stages": self.options.num_stages,
            "operand": self.operand,
            "aligned": self.aligned,
            "call": " ".join(self.calls[0]),
            "constants": self.settings,
            "descriptors": sum("tensordesc" in t for t in self.signature.values()),
            "pointers": {n: t[1:] for n, t in self.signature.items() if t.startswith("*")},
            "registers": registers,
            "spills": spills,
            "shared": kernel.metadata.shared,
            **instructions,
        }


def _plain(value: Any) -> Any:
    return value if isinstance(value, (bool, int, float, str)) else str(value)


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


class _Pointer:
    """A tensor as a launch sees it; its storage begins at an aligned address, as an allocator's does."""

    def __init__(self, tensor: Tensor) -> None:
        self.dtype, self.offset = tensor.dtype, tensor.storage_offset() * tensor.element_size()

    def data_ptr(self) -> int:
        return self.offset

    @staticmethod
    def ptr_range() -> int:
        return 0


@contextlib.contextmanager
def _recording(target: str, into: list[Launch]) -> Iterator[None]:
    """Inside, a launch is taken down and nothing is compiled."""

    def take(self: JITFunction, key: Any, signature: Any, device: Any, constants: Any, options: Any, attributes: Any, warmup: bool) -> None:
        into.append(Launch(self.__name__, target, self, signature, constants, attributes, options))

    def getitem(self: JITFunction, grid: Any) -> Any:
        def launch(*args: Any, **kwargs: Any) -> None:
            self.run(*(_Pointer(a) if isinstance(a, Tensor) else a for a in args), grid=grid, warmup=True, **kwargs)

        return launch

    before = driver._active
    driver.set_active(_NoDevice(TARGETS[target]))  # type: ignore[arg-type]
    try:
        with mock.patch.object(JITFunction, "__getitem__", getitem), mock.patch.object(JITFunction, "_do_compile", take):
            yield
    finally:
        driver._active = before


class _Calls(TorchDispatchMode):
    """The calls of cmoe ops, forward and backward, their tensors without memory."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, list[Any]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "cmoe":
            # An op's last argument is its backend.
            self.calls.append((func._schema.name.removeprefix("cmoe::"), list(args[:-1])))
        return func(*args, **(kwargs or {}))


@functools.cache
def _op_calls(index: int, dtype: torch.dtype, master: bool, size: str) -> list[tuple[str, list[Any]]]:
    """The ops that a case runs forward and backward, on the meta device; ``master``: with weights in fp32."""
    if dtype in (torch.float16, torch.float32) and not master:  # those of bf16, whose tensors have another dtype
        calls = _op_calls(index, torch.bfloat16, False, size)
        return [(name, [_meta(a, dtype) if isinstance(a, Tensor) else a for a in args]) for name, args in calls]
    case = cases.CASES[index]
    with contextlib.ExitStack() as stack:
        for letter, value in SIZES[size].items():
            stack.enter_context(mock.patch.object(cases, letter, value))
        stack.enter_context(FakeTensorMode())
        stack.enter_context(cmoe.use_backend("reference"))
        recorder = stack.enter_context(_Calls())
        arguments = case.make(dtype)
        for name in ("w", "b", "w1", "b1", "w2", "b2") if master else ():
            if arguments.get(name) is not None:
                arguments[name] = arguments[name].detach().float().requires_grad_()
        y = case.call(arguments)
        torch.autograd.grad(y, [arguments[n] for n in cases.leaves(arguments)], torch.ones_like(y), allow_unused=True)
    return [(name, [_meta(a, torch.bfloat16) if isinstance(a, Tensor) else a for a in args]) for name, args in recorder.calls]


def _meta(t: Tensor, half: torch.dtype) -> Tensor:
    """Without memory; what is bf16 becomes ``half``."""
    return torch.empty_strided(t.shape, t.stride(), dtype=half if t.dtype == torch.bfloat16 else t.dtype, device="meta")


@contextlib.contextmanager
def _tf32(on: bool) -> Iterator[None]:
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = on
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


@functools.cache
def launches(target: str) -> list[Launch]:
    """Every launch of every form of every op, in every precision and at every size, those with the same key as one."""
    found: dict[str, Launch] = {}
    for precision, dtype in PRECISIONS.items():
        for size in SIZES:
            for index, case in enumerate(cases.CASES):
                if (case.op, "triton") not in backends._kernels:
                    continue
                kernels = importlib.import_module(f"cmoe_kernels.ops.{case.op}.triton")
                taken: list[Launch] = []
                calls = _op_calls(index, dtype, precision == "mixed", size)
                with _tf32(precision == "tf32"), _recording(target, taken):
                    for name, arguments in calls:
                        getattr(kernels, name)(*arguments)
                for launch in taken:
                    found.setdefault(launch.key, launch).calls.append((case.op, case.form, precision, size))
    return list(found.values())


def cover(among: Iterable[Launch]) -> list[Launch]:
    """One launch for each kernel, configuration, dtype and alignment: that with the most to hold, of the constants and pointers it has."""
    chosen: dict[tuple[Any, ...], Launch] = {}

    def held(launch: Launch) -> tuple[int, int]:
        return sum(value not in (False, 1, 0) for value in launch.settings.values()), len(launch.signature) - len(launch.constants)

    for launch in among:
        group = (launch.kernel, launch.config, launch.operand or launch.dtypes, launch.aligned)
        if group not in chosen or held(launch) > held(chosen[group]):
            chosen[group] = launch
    return list(chosen.values())


def compiled(target: str) -> list[Launch]:
    """The launches that benchmarks/results/aot.json has for a target: a cover, of bf16 at aligned sizes where it is only reported."""
    everything = launches(target) if target in PROVEN else bf16(target)
    return sorted(cover(everything), key=lambda launch: (launch.kernel, launch.operand, launch.config, launch.key))


def bf16(target: str) -> list[Launch]:
    """Every form, at aligned sizes."""
    return [launch for launch in launches(target) if launch.aligned and any(precision == "bf16" for _, _, precision, _ in launch.calls)]


NVIDIA = {
    "mma": r"\bHMMA\.|\bHGMMA\.|\bUTC[A-Z]*MMA",
    "wgmma": r"\bHGMMA\.",
    "async_copies": r"\bLDGSTS",
    "tma": r"\bUTMALDG",
    "spills": r"\b(?:STL|LDL)\b",
}
AMD = {"mma": r"\bv_mfma_", "async_copies": r"\b(?:global_load_lds|buffer_load_\w+ .* lds)"}


def _nvidia(kernel: CompiledKernel) -> tuple[int, int, dict[str, int]]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = subprocess.run([TOOLS / "cuobjdump", "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
        sass = subprocess.run([TOOLS / "nvdisasm", "-c", file.name], capture_output=True, text=True, check=True).stdout
    registers = re.search(r"REG:(\d+)", usage)
    assert registers is not None, usage
    counts = {name: len(re.findall(pattern, sass)) for name, pattern in NVIDIA.items()}
    return int(registers[1]), counts.pop("spills"), counts


def _amd(kernel: CompiledKernel) -> tuple[int, int, dict[str, int]]:
    text = kernel.asm["amdgcn"]

    def number(name: str) -> int:
        found = re.search(rf"\.{name}:\s*(\d+)", text)
        assert found is not None, name
        return int(found[1])

    return number("vgpr_count"), number("vgpr_spill_count"), {name: len(re.findall(pattern, text)) for name, pattern in AMD.items()}


def blocks(row: dict[str, Any]) -> int:
    """Programs that a multiprocessor runs at once, by registers (given out per warp, by eights), warps and shared memory; 0: not known."""
    if row["target"] not in MULTIPROCESSOR:
        return 0
    warps, shared = MULTIPROCESSOR[row["target"]]
    registers = -(-row["registers"] // 8) * 8 * 32 * row["warps"]
    return min(65536 // registers, warps // row["warps"], shared // (row["shared"] + 1024))


def read() -> list[dict[str, Any]]:
    return json.loads(RESULTS.read_text())["kernels"] if RESULTS.exists() else []


def write(rows: list[dict[str, Any]]) -> None:
    """benchmarks/results/aot.json, one line a row."""
    head = json.dumps({"triton": triton.__version__, "sizes": SIZES}, indent=1)
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(head[:-2] + ',\n "kernels": [\n' + ",\n".join(json.dumps(row) for row in rows) + "\n ]\n}\n")


def page(rows: list[dict[str, Any]]) -> str:
    """The page, a line a row."""
    parts = [PREFACE.format(triton=triton.__version__, count=len(rows))]
    header = ("kernel", "operands", "tile", "warps, stages", "sizes", "registers", "spills", "shared KiB", "programs", *COUNTS)
    for target in TARGETS:
        parts += [f"\n## {target}\n\n", _line(header), _line(["---"] * len(header))]
        for row in (row for row in rows if row["target"] == target):
            operands = row["operand"] or ", ".join(sorted(set(row["pointers"].values())))
            config, sizes = f"{row['warps']}, {row['stages']}", "aligned" if row["aligned"] else "odd"
            counts = [row.get(n, 0) for n in COUNTS.values()]
            found = (row["registers"], row["spills"], round(row["shared"] / 1024, 1), blocks(row) or "", *counts)
            parts.append(_line([row["kernel"], operands, row["tile"], config, sizes, *found]))
    return "".join(parts)


COUNTS = {"matrix": "mma", "async copies": "async_copies", "TMA": "tma"}


def _line(cells: Iterable[Any]) -> str:
    return "| " + " | ".join(str(cell) for cell in cells) + " |\n"


PREFACE = """# What the compiler makes of the Triton kernels

Written by `make docs` from `benchmarks/results/aot.json`: triton {triton}, {count} compiled launches, no GPU. Nothing here was run. These
are the compiler's numbers and say nothing about speed.

A line is a kernel in one configuration and dtype, in the form that has most to hold (activation, bias, gathering and the like).
Registers are per thread; spills are loads and stores of spilled registers; matrix instructions are mma, wgmma, tcgen05 or mfma; "programs"
is how many a multiprocessor holds at once. "odd" sizes divide by nothing, so no access is wide: they must compile, and may spill.
`tests/triton/test_aot.py` holds sm_80 and sm_90 to budgets.
"""


def _report(which: tuple[str, str]) -> dict[str, Any]:
    target, key = which
    return next(launch for launch in launches(target) if launch.key == key).report()


def _keep(target: str, current: set[str], fresh: dict[str, dict[str, Any]]) -> None:
    """Put fresh rows of a target into the file, without rows of launches that are gone."""
    kept = [r for r in read() if r["key"] not in fresh and (r["target"] != target or r["key"] in current)]
    write(sorted([*kept, *fresh.values()], key=lambda r: [r[n] for n in ("target", "kernel", "operand", "tile", "key")]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--targets", default=",".join(TARGETS))
    parser.add_argument("--kernels", help="all where not given")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--missing", action="store_true", help="only those that the file has no row for, after an interruption")
    parser.add_argument("--write", action="store_true", help="put the rows into benchmarks/results/aot.json")
    options = parser.parse_args()
    for target in options.targets.split(","):
        current = {launch.key for launch in compiled(target)}
        there = {row["key"] for row in read()} if options.missing else set()
        kernels = None if options.kernels is None else options.kernels.split(",")
        wanted = [launch for launch in compiled(target) if (kernels is None or launch.kernel in kernels) and launch.key not in there]
        fresh: dict[str, dict[str, Any]] = {}
        start = time.perf_counter()
        # The children inherit what was recorded.
        with multiprocessing.get_context("fork").Pool(options.jobs) as pool:
            for row in pool.imap(_report, [(target, launch.key) for launch in wanted]):
                fresh[row["key"]] = row
                what = f"{row['kernel']} {row['operand']} {row['tile']}, {row['warps']} warps, {row['stages']} stages ({row['call']})"
                found = (
                    f"{row['registers']} registers, {row['spills']} spills, {row['shared']} bytes shared, {row['mma']} matrix instructions"
                )
                print(f"{target} {len(fresh)}/{len(wanted)} {time.perf_counter() - start:.0f} s: {what}: {found}", flush=True)
                if options.write and len(fresh) % 10 == 0:
                    _keep(target, current, fresh)
        if options.write:
            _keep(target, current, fresh)


if __name__ == "__main__":
    main()
