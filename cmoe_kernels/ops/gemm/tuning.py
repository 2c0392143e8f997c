"""Which tile a product uses: by the device, the operands, the kernel and the rows that an expert has on average.

Tiles come from a table: ``tiles.json`` beside this file, over which the user's own table is laid. Nothing is tuned by default. With
CMOE_AUTOTUNE=1 the first call of a kind that the user's table lacks times its candidates on the device, outside CUDA graph capture, and
adds the fastest to that table: ``$XDG_CACHE_HOME/cmoe_kernels/tiles.json``, else ``~/.cache/cmoe_kernels/tiles.json``. Each candidate has
to be compiled: CMOE_AUTOTUNE=6 times only the six that are nearest to the table's tile. A table's lines read

    "sm_90 half gemm 64": [64, 128, 64, 4, 4, 2]        architecture, operands, kernel, most rows: a Tile

In tiles.json a word may have wildcards (``sm_*``) and alternatives (``gemm|gemm_dw``); of the lines that match, the last one counts.
Operands are "half" (bf16, fp16), "rounded" (fp32 weights with half-precision x: a weight tile takes twice the memory), "tf32" or "fp32".
An architecture without lines of its own uses those of the one before it. No line was timed on a GPU: they are what compiles without
spills for the architecture, with 64 rows for a warp group of Hopper, and narrow tiles in IEEE fp32, which runs on the vector units.
"""

import contextlib
import fnmatch
import functools
import itertools
import json
import math
import os
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
import triton
from torch import Tensor
from triton.runtime.driver import driver

from cmoe_kernels import backends

Result = TypeVar("Result")


class Device(NamedTuple):
    """What tiles depend on: the architecture, its multiprocessors, and the bytes of shared memory that one program may have."""

    arch: str
    multiprocessors: int
    shared: int

    @property
    def copies_tiles(self) -> bool:
        """Whether it has tensor descriptors (TMA)."""
        return self.arch.startswith("sm_") and int(self.arch[3:]) >= 90


# Also used when compiling for a device that is not present.
KNOWN = {
    "sm_80": Device("sm_80", 108, 163 << 10),
    "sm_90": Device("sm_90", 132, 227 << 10),
    "sm_100": Device("sm_100", 148, 227 << 10),
    "gfx942": Device("gfx942", 304, 64 << 10),
}
# The device that the interpreter emulates: few SMs, so that every program processes several tiles.
interpreted = Device("sm_90", 4, 227 << 10)


class Tile(NamedTuple):
    """Rows, columns and depth of a tile, its warps and the stages of its loads; how many programs a multiprocessor runs at once."""

    m: int
    n: int
    k: int
    warps: int
    stages: int
    resident: int = 1


UNREADABLE = (OSError, ValueError, TypeError, AttributeError)
ROWS = (16, 64, 256)
OPERANDS = ("half", "rounded", "tf32", "fp32")
KERNELS = ("gemm", "gemm_gated", "gemm_sum", "gemm_sum_scaled", "gemm_du", "gemm_du_gated", "gemm_mix", "gemm_dw", "task_router")
GROUP = 8
# Shares of a split loop shorter than this cost more to add than they save.
LEAST_STEPS = 8
# 32 to 128 numbers of the accumulator per thread; tiles of 16 rows have fewer.
CANDIDATES = [
    Tile(m, n, k, warps, stages, resident)
    for m, n, k, warps, stages, resident in itertools.product((16, 32, 64, 128), (64, 128, 256), (32, 64), (4, 8), (3, 4), (1, 2))
    if (warps == 4 if m == 16 else 32 <= m * n // (warps * 32) <= 128)
]


def device_of(t: Tensor) -> Device:
    if backends.INTERPRETED:
        return interpreted
    if t.is_cuda:
        return _present(t.device)
    return KNOWN[_arch(driver.active.get_current_target())]


@functools.cache
def _present(device: torch.device) -> Device:
    properties = torch.cuda.get_device_properties(device)
    shared = getattr(properties, "shared_memory_per_block_optin", 0) or properties.shared_memory_per_block
    return Device(_arch(driver.active.get_current_target()), properties.multi_processor_count, shared)


def _arch(target: Any) -> str:
    return f"sm_{target.arch}" if target.backend == "cuda" else target.arch.split(":")[0]


def precision() -> str:
    """fp32 products are IEEE unless torch's own switch asks for TF32 (``torch.backends.cuda.matmul.fp32_precision`` or allow_tf32)."""
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def programs(tiles: int, tile: Tile, x: Tensor) -> int:
    """The programs to launch: what the device runs at once, and no more than tiles."""
    return min(tiles, device_of(x).multiprocessors * tile.resident)


def splits(tiles: int, steps: int, tile: Tile, x: Tensor) -> int:
    """Among how many programs a loop of ``steps`` is split, where there are fewer tiles than the device runs at once."""
    return max(1, min(device_of(x).multiprocessors * tile.resident // max(tiles, 1), steps // LEAST_STEPS))


def tuned(kernel: str, rows: int, x: Tensor, w: Tensor, run: Callable[[Tile], Result]) -> Result:
    """Run a product of x and w with the tile for it. ``run`` writes the same whenever it is called with the same tile."""
    device = device_of(x)
    # fp32 x with weights of another dtype (a router's single layer) is multiplied in fp32.
    operands = ("tf32" if precision() == "tf32" else "fp32") if x.dtype == torch.float32 else "half" if w.dtype == x.dtype else "rounded"
    line = f"{operands} {kernel} {next((most for most in ROWS if rows <= most), 'more')}"
    if os.environ.get("CMOE_AUTOTUNE", "0") not in ("", "0") and rows and not _capturing(x) and f"{device.arch} {line}" not in _own_table():
        _tune(f"{device.arch} {line}", x, run)
    return run(tile_for(line, x))


def tile_for(line: str, x: Tensor) -> Tile:
    """The tile of a line ("half gemm 64") for the device of x, with no more stages than its shared memory holds."""
    device = device_of(x)
    tile = _own_table().get(f"{device.arch} {line}") or _table()[f"{_family(device.arch)} {line}"]
    while tile.stages > 1 and _bytes(tile, line, x) > device.shared:
        tile = tile._replace(stages=tile.stages - 1)
    return tile


def _bytes(tile: Tile, line: str, x: Tensor) -> int:
    """Shared memory of the operands' tiles in all stages."""
    columns = tile.n * (2 if "gemm_gated" in line else 1) * (2 if line.startswith("rounded") else 1)
    return (tile.m + columns) * tile.k * x.element_size() * tile.stages


def _family(arch: str) -> str:
    if not arch.startswith("sm_"):
        return "gfx942"
    return max((a for a in KNOWN if a.startswith("sm_") and int(a[3:]) <= int(arch[3:])), key=lambda a: int(a[3:]), default="sm_80")


@functools.cache
def _table() -> dict[str, Tile]:
    """tiles.json with a line for each combination of its words."""
    table: dict[str, Tile] = {}
    known = (tuple(KNOWN), OPERANDS, KERNELS, (*map(str, ROWS), "more"))
    for key, tile in _parse((Path(__file__).parent / "tiles.json").read_text()).items():
        words = [
            [name for name in names if any(fnmatch.fnmatchcase(name, pattern) for pattern in word.split("|"))]
            for names, word in zip(known, key.split(" "), strict=True)
        ]
        table |= {" ".join(line): tile for line in itertools.product(*words)}
    return table


def own_path() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cmoe_kernels" / "tiles.json"


@functools.cache
def _own_table() -> dict[str, Tile]:
    """The user's table; what is no table is left alone, with one warning."""
    path = own_path()
    try:
        return _parse(path.read_text()) if path.exists() else {}
    except UNREADABLE as error:
        warnings.warn(
            f"cmoe_kernels: {path} is not a table of tiles ({error}); the built-in table is used. Delete the file, or let CMOE_AUTOTUNE=1 "
            "write it anew.",
            stacklevel=2,
        )
        return {}


def _parse(text: str) -> dict[str, Tile]:
    table = {key: Tile(*numbers) for key, numbers in json.loads(text).items()}
    for key, tile in table.items():
        if not all(isinstance(n, int) and n > 0 for n in tile) or any(n & (n - 1) for n in tile[:4]) or min(tile[:3]) < 16:
            raise ValueError(f"{key!r} has {list(tile)}")
    return table


def _capturing(x: Tensor) -> bool:
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


def _tune(key: str, x: Tensor, run: Callable[[Tile], Any]) -> None:
    """Time the candidates that fit the device and put the fastest into the user's table, in memory and on disk."""
    line, device = key.split(" ", 1)[1], device_of(x)
    fastest, least = None, float("inf")
    for tile in _candidates(tile_for(line, x)):
        if _bytes(tile, line, x) > device.shared:
            continue
        try:
            time = _time(functools.partial(run, tile))
        except (triton.runtime.errors.OutOfResources, triton.CompilationError):
            continue
        if time < least:
            fastest, least = tile, time
    if fastest is None:
        return
    own = _own_table()
    own[key] = fastest
    path, others = own_path(), {}
    # Another process may have added lines since.
    with contextlib.suppress(*UNREADABLE):
        others = _parse(path.read_text())
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".json", delete=False) as file:
            file.write(_text({**others, **own}))
        os.replace(file.name, path)
    except OSError as error:
        warnings.warn(f"cmoe_kernels: {path} cannot be written ({error}); what was tuned is forgotten with this process", stacklevel=2)


def _candidates(before: Tile) -> list[Tile]:
    """The tile as it is, then the others: all of them, or as many as CMOE_AUTOTUNE says, the nearest first."""
    wanted = os.environ.get("CMOE_AUTOTUNE", "")
    if not wanted.isdecimal() or int(wanted) < 2:
        return [before, *CANDIDATES]
    others = [tile for tile in CANDIDATES if tile != before]
    return [before, *sorted(others, key=lambda tile: sum(abs(math.log2(a / b)) for a, b in zip(tile, before, strict=True)))[: int(wanted)]]


def _text(table: dict[str, Tile]) -> str:
    return "{\n" + ",\n".join(f"  {json.dumps(key)}: {json.dumps(list(table[key]))}" for key in sorted(table)) + "\n}\n"


def _time(call: Callable[[], Any]) -> float:
    return triton.testing.do_bench(call, warmup=10, rep=50, return_mode="median")
