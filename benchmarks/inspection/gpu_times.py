"""How long each kernel of a step takes on the GPU that is here, in the order of their launches: ours by each backend, and one peer.

    python -m benchmarks.inspection.gpu_times [--only soft_connector/released/T1024] [--write=FILE]

By torch's profiler, the middle one of three steps. ``busy``: the sum of the kernels' times; where ``span``, from the first to the last, is
much longer, launches are what takes time. Run by `make gpu-check`.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks import cases
from benchmarks.__main__ import ours

STEPS = 3
# What tells most: training at many tokens, where products count, and an answer's single token, where launches do.
CHOSEN = (
    "soft_connector/released/T1024/bf,sparse_experts/mixtral/T1024/bf,sparse_experts/cumo/T1024/bf,soft_connector_forward/released/T1/bf"
)
PEERS = ("fused torch", "torch grouped_mm")


def launches(trace: dict[str, Any]) -> dict[str, Any]:
    """Of a trace in Chrome's format that holds STEPS equal steps: kernels, copies and fills of the middle one, in microseconds.

    Raises:
        ValueError: the steps were not equal.
    """
    events = sorted((e for e in trace["traceEvents"] if e.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")), key=lambda e: e["ts"])
    if not events or len(events) % STEPS:
        raise ValueError(f"{len(events)} launches in {STEPS} steps")
    each = len(events) // STEPS
    found = events[each : 2 * each]
    return {
        "busy_us": round(sum(e["dur"] for e in found), 1),
        "span_us": round(found[-1]["ts"] + found[-1]["dur"] - found[0]["ts"], 1),
        "kernels": [
            {"name": e["name"][:100], "us": round(e["dur"], 1)}
            | {to: e["args"][of] for to, of in (("grid", "grid"), ("registers", "registers per thread")) if of in e.get("args", {})}
            for e in found
        ],
    }


def recorded(step: Callable[[], Any]) -> dict[str, Any]:
    for _ in range(STEPS):
        step()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as run:
        for _ in range(STEPS):
            step()
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "trace.json")
        run.export_chrome_trace(str(path))
        return launches(json.loads(path.read_text()))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.inspection.gpu_times", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default=CHOSEN, help=f"cases, as of python -m benchmarks (default: {CHOSEN})")
    parser.add_argument("--write", type=Path, metavar="FILE", help="a JSON file for what was found")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("gpu_times: torch finds no GPU here", file=sys.stderr)
        return 2
    found: dict[str, Any] = {}
    for instance in cases.select(options.only, device="cuda", ours=ours("cuda", None)):
        work = instance.make()
        sides = {"ours": work.ours, **{name: make for name, make in work.peers.items() if name in PEERS}}
        for side, make in sides.items():
            key = f"{instance.key}, {side}"
            found[key] = recorded(make())
            print(f"{key}: busy {found[key]['busy_us']} of {found[key]['span_us']} us", flush=True)
            for kernel in found[key]["kernels"]:
                print(f"  {kernel['us']:9.1f}  {kernel['name']}")
            if options.write is not None:  # after each, since the time may be up
                options.write.write_text(json.dumps({"launches": found}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
