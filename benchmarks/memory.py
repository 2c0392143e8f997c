"""Peak memory of one call, in this process: ``python -m benchmarks.memory KEY SIDE THREADS`` prints bytes, or null.

Weights, inputs and what a first call keeps are resident before; what counts is how far a second call rises above that.
"""

import ctypes
import gc
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.cases import find
from benchmarks.record import set_threads

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def _resident(field: str) -> int:
    found = re.search(rf"^{field}:\s+(\d+) kB", STATUS.read_text(), flags=re.MULTILINE)
    assert found is not None, f"{STATUS} has no {field}"
    return int(found[1]) * 1024


def measure(key: str, side: str) -> int | None:
    """Bytes that one call of a side needs above what is resident before it; None where Linux does not tell."""
    work = find(key).make()
    return peak((work.ours if side == "ours" else work.peers[side])())


def peak(step: Callable[[], Any]) -> int | None:
    """Bytes that a second call needs above what is resident before it; None where Linux does not tell."""
    if not CLEAR.exists():
        return None
    step()
    gc.collect()
    # What malloc keeps of the first call would hide as much of the second.
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
    try:
        CLEAR.write_text("5")  # the high-water mark falls to what is resident now
    except OSError:
        return None
    before = _resident("VmRSS")
    step()
    return _resident("VmHWM") - before


if __name__ == "__main__":
    set_threads(int(sys.argv[3]))
    print(json.dumps(measure(sys.argv[1], sys.argv[2])))
