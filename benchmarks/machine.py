"""What the numbers were measured on, and how fast that machine copies and multiplies."""

import datetime
import functools
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tests.passed import digest

ROOT = Path(__file__).resolve().parent.parent
# What a time follows from: the kernels, and the part of the benchmarks that calls and times them. A run keeps a digest of it.
TIMED = ("csrc", "cmoe_kernels", *(f"benchmarks/{name}.py" for name in ("cases", "peers", "record", "shapes", "steps", "timer", "works")))
# The CUDA kernels on the CPU (tests/emulation), as in the tests.
EMULATED = os.environ.get("CMOE_EMULATE_CUDA", "0") == "1"
COPY_BYTES = {"cpu": 2**28, "cuda": 2**30}
GEMM_SIDE = {"cpu": 2048, "cuda": 8192}
# glibc's malloc maps every large block anew and unmaps it when it is freed; with these in the environment it keeps what it has.
KEEP_PAGES = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**40)}
# What decides which kernels run; the rest of a CPU's flags does not.
FLAGS = ("amx_bf16", "amx_tile", "avx512_bf16", "avx512_fp16", "avx512_vnni", "avx512f", "avx2", "f16c", "fma")


def keeps_pages() -> bool:
    return all(os.environ.get(name) == value for name, value in KEEP_PAGES.items())


def keep_pages() -> None:
    """Begin this program again with a malloc that keeps the pages of freed memory, unless it does: malloc reads this when it starts."""
    if not keeps_pages():
        sys.stdout.flush()
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], os.environ | KEEP_PAGES)


def clock(device: str) -> Callable[[], float]:
    """The time after all that the device was given to do."""

    def now() -> float:
        torch.cuda.synchronize()
        return time.perf_counter()

    return now if device == "cuda" else time.perf_counter


def gpu() -> dict[str, Any]:
    """The GPU that torch uses."""
    found = torch.cuda.get_device_properties(0)
    return {
        "gpu": torch.cuda.get_device_name(),
        "capability": f"{found.major}.{found.minor}",
        "multiprocessors": found.multi_processor_count,
        "gpu_memory_gib": round(found.total_memory / 2**30, 1),
        "cuda": torch.version.cuda or torch.version.hip,
    }


def describe(device: str = "cpu") -> dict[str, Any]:
    """The machine itself: what stays from run to run."""
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    fields = dict(re.findall(r"^(model name|flags|cpu family|model)\s*: (.*)$", info, flags=re.MULTILINE))
    present = fields.get("flags", "").split()
    memory = re.search(r"MemTotal:\s+(\d+) kB", Path("/proc/meminfo").read_text()) if info else None
    return {
        "cpu": fields.get("model name", platform.processor() or platform.machine()),
        "family_model": f"{fields.get('cpu family', '?')}/{fields.get('model', '?')}",
        "flags": [f for f in FLAGS if f in present],
        "cores": len(re.findall(r"^processor", info, flags=re.MULTILINE)) or 1,
        "memory_gib": round(int(memory[1]) / 2**20) if memory else None,
        "system": f"{platform.system()} {platform.machine()}",
        **({"pages": "kept"} if keeps_pages() else {}),
        **(gpu() if device == "cuda" else {}),
    }


def slug(machine: dict[str, Any], threads: int) -> str:
    """A file name for a machine, and for a number of threads where a CPU is measured."""
    if "gpu" in machine:
        return re.sub(r"[^a-z0-9]+", "-", f"gpu {machine['gpu']}".lower()).strip("-")
    words = re.sub(r"\([^)]*\)|@.*|CPU|Processor", " ", machine["cpu"])
    tier = next((f for f in ("amx_bf16", "avx512_bf16", "avx512f", "avx2") if f in machine["flags"]), "generic")
    pages = f"pages {machine['pages']}" if "pages" in machine else ""
    return re.sub(r"[^a-z0-9]+", "-", f"cpu {words} {tier} {threads} threads {pages}".lower()).strip("-")


def memory_of(machine: dict[str, Any]) -> str:
    """Where the memory of a run's results came from, for people."""
    if "gpu" in machine:
        return "Memory is torch's on every side."
    if "pages" in machine:
        return "Memory that was freed stays in the process (--keep-pages), so results lie in pages used before."
    return (
        "The peers' large results lie in fresh pages, as malloc gives them; ours, from 32 MB on, in memory that earlier ones left "
        "(since commit 233ed55; a row keeps its commit in the results file)."
    )


def run_info(threads: int, device: str = "cpu") -> dict[str, Any]:
    """What may change from run to run, with the bandwidth measured now."""
    return {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": _commit(),
        "kernels": digest(TIMED)[:12],
        "torch": torch.__version__,
        "torch_capability": torch.backends.cpu.get_cpu_capability(),
        "python": platform.python_version(),
        "threads": threads,
        "copy_gbps": round(copy_bandwidth(device), 2),
    }


def _commit() -> str:
    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    try:
        # Not what the benchmarks themselves write.
        code = (".", ":!benchmarks/results", ":!docs", ":!README.md")
        changed = git("status", "--porcelain", "--untracked-files=no", "--", *code)
        return git("rev-parse", "--short=12", "HEAD") + ("+changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def best(call: Callable[[], Any], calls: int = 7, device: str = "cpu") -> float:
    """The shortest of several calls, in seconds: a peak is what the machine can do, not what it does on average."""
    call()
    times, now = [], clock(device)
    for _ in range(calls):
        start = now()
        call()
        times.append(now() - start)
    return min(times)


def copy_bandwidth(device: str = "cpu") -> float:
    """GB/s of a copy far larger than the caches; bytes read and bytes written both count."""
    source = torch.ones(COPY_BYTES[device] // 4, device=device)
    target = torch.empty_like(source)
    return 2 * COPY_BYTES[device] / best(lambda: target.copy_(source), device=device) / 1e9


@functools.cache
def gemm_rate(dtype: torch.dtype, device: str, side: int) -> float:
    """GFLOP/s of the best product of a size in a dtype: torch.mm on random data (zeros flatter), into an existing buffer."""
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    return 2 * side**3 / best(lambda: torch.mm(a, b, out=out), device=device) / 1e9
