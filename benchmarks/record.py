"""Measure one instance, and keep what was measured: one JSON file per machine and number of threads, merged case by case."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch

from benchmarks import machine, timer
from benchmarks.cases import Instance
from benchmarks.shapes import TINY
from benchmarks.steps import PEER_SLACK, Rule, Skipped, Step, WrongResult
from cmoe_kernels import backends

RESULTS = machine.ROOT / "benchmarks" / "results"
NO_TIME = "no time was left for it"
# By device.
SUITES = {"cpu": "cpu", "cuda": "gpu"}


def measure(
    instance: Instance, run: dict[str, Any], seconds: float, least: int, memory: bool, until: float = float("inf")
) -> dict[str, Any]:
    """Check, then time, ours against each peer in turn.

    Args:
        instance: what to measure.
        run: what ``machine.run_info`` gave; the GEMM rate in the instance's dtype is added to a copy.
        seconds: time for each pair, unless ``least`` calls take longer.
        least: timed calls of each side at least.
        memory: also measure peak memory, on a CPU in processes of their own.
        until: the time, by time.monotonic, after which no peer is begun.

    Returns:
        a record for the file. Where our result is wrong it holds the error and no time; where a peer's is, the peer is under "wrong".
    """
    dtype = str(instance.dtype).removeprefix("torch.")
    side = 128 if instance.shape.name in TINY else machine.GEMM_SIDE[instance.device]
    rate = machine.gemm_rate(instance.dtype, instance.device, side)
    record = {
        "case": instance.case.name,
        "title": instance.case.title,
        "shape": instance.shape.name,
        "tokens": instance.tokens,
        "dtype": dtype,
        **({"backend": instance.backend} if instance.backend else {}),
        "run": {**run, "gemm_loop": f"torch.mm {side}^3", "gemm_gflops": {dtype: round(rate, 1)}},
        **{"peers": {}, "skipped": {}, "wrong": {}},
        **_timed(instance, run["copy_gbps"], rate, seconds, least, until),
    }
    # By now the weights are freed: the processes make their own.
    if memory and record["peers"] and instance.device == "cpu":
        for name, side in {"ours": record["ours"], **record["peers"]}.items():
            try:
                side["peak_bytes"] = peak_bytes(instance.key, name, run["threads"])
            except RuntimeError as error:
                record["skipped"][f"peak memory of {name}"] = why(error)
    return record


def _timed(instance: Instance, copy_gbps: float, gemm_gflops: float, seconds: float, least: int, until: float) -> dict[str, Any]:
    try:
        work = instance.make()
    except (Skipped, torch.OutOfMemoryError) as reason:
        return {"skipped": {"ours": str(reason).splitlines()[0]}}
    about = {
        "flops": work.flops,
        "bytes": work.bytes,
        "baseline": work.baseline,
        "served_by": {op: instance.backend or backends.choose(op, instance.device, work.dtype) for op in work.ops},
    }
    try:
        rule = Rule(work)
        ours = work.ours()
        rule.check(ours, work.slack)
    except torch.OutOfMemoryError as error:
        return {**about, "skipped": {"ours": why(error)}}
    except Exception as error:
        return {**about, "wrong": {"ours": why(error)}}
    peers: dict[str, dict[str, Any]] = {}
    skipped: dict[str, str] = {}
    wrong: dict[str, str] = {}
    pooled: list[float] = []
    clock = machine.clock(instance.device)
    for name, make in work.peers.items():
        try:
            if time.monotonic() > until:
                raise Skipped(NO_TIME)
            peer = make()
            rule.check(peer, PEER_SLACK)
        except Skipped as reason:
            skipped[name] = str(reason)
            continue
        except WrongResult as error:
            wrong[name] = str(error)
            continue
        except Exception as error:  # other people's code: one that fails must not end a run of hours
            skipped[name] = f"it failed: {why(error)}"
            continue
        mine, theirs = timer.alternate(ours, peer, seconds, least, clock=clock)
        pooled += mine.seconds
        peers[name] = {
            **theirs.summary(),
            "ours_p50_ms": mine.summary()["p50_ms"],
            "ratio": round(timer.ratio(mine, theirs), 4),
            "saved_bytes": peer.saved_bytes(work.given),
            **_peak_on_gpu(peer, instance.device),
        }
    if not pooled:
        return {**about, "skipped": skipped, "wrong": wrong}
    times = timer.Times(tuple(pooled))
    gflops, gbps = (x / times.quantile(0.5) / 1e9 for x in (work.flops, work.bytes))
    rates = {
        "gflops": round(gflops, 2),
        "gbps": round(gbps, 3),
        "gemm_share": round(gflops / gemm_gflops, 4),
        "copy_share": round(gbps / copy_gbps, 4),
        "saved_bytes": ours.saved_bytes(work.given),
        **_peak_on_gpu(ours, instance.device),
    }
    return {**about, "ours": {**times.summary(), **rates}, "peers": peers, "skipped": skipped, "wrong": wrong}


def _peak_on_gpu(step: Step, device: str) -> dict[str, int]:
    """What one call needs above what is there before it."""
    if device != "cuda":
        return {}
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    return {"peak_bytes": torch.cuda.max_memory_allocated() - before}


def why(error: Exception) -> str:
    first = (str(error).strip().splitlines() or [""])[0][:200]
    return first if isinstance(error, WrongResult) else f"{type(error).__name__}: {first}"


def peak_bytes(key: str, side: str, threads: int) -> int | None:
    """What one call needs above its weights and inputs, measured in a process of its own; None where the kernel does not tell."""
    command = [sys.executable, "-m", "benchmarks.memory", key, side, str(threads)]
    done = subprocess.run(command, cwd=machine.ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"exit status {done.returncode}: {(done.stderr.strip().splitlines() or ['no message'])[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def is_current(case: dict[str, Any] | None, run: dict[str, Any]) -> bool:
    """Whether a record needs no further run: every peer has had its time, beside the kernels of ``run``."""
    return case is not None and NO_TIME not in str(case) and case["run"].get("kernels") == run["kernels"]


def load(path: Path) -> dict[str, Any]:
    """A results file; {} where there is none."""
    return json.loads(path.read_text()) if path.exists() else {}


def merge(path: Path, described: dict[str, Any], key: str, record: dict[str, Any], suite: str = "") -> None:
    """Put one record into a file, and leave the others as they are. suite: by default that of the device.

    Raises:
        ValueError: the file is of another machine or number of threads.
    """
    threads = record["run"]["threads"]
    suite = suite or SUITES["cuda" if "gpu" in described else "cpu"]
    document = load(path) or {"suite": suite, "machine": described, "threads": threads, "cases": {}}
    if (document["machine"], document["threads"]) != (described, threads):
        held = f"{document['machine']['cpu']}, {document['threads']} threads"
        raise ValueError(f"{path} holds results of another machine or number of threads ({held}); give --out another name")
    document["cases"][key] = record
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(document, indent=1, sort_keys=True) + "\n")
    os.replace(part, path)


def documents(folder: Path = RESULTS, suites: Collection[str] = tuple(SUITES.values())) -> list[dict[str, Any]]:
    """All results of some suites in a folder, ordinary runs before those that kept pages."""
    found = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    return sorted((d for d in found if isinstance(d, dict) and d.get("suite") in suites), key=lambda d: "pages" in d["machine"])


def set_threads(threads: int | None) -> int:
    """Torch's thread count, set or as it is."""
    if threads is not None:
        torch.set_num_threads(threads)
    return torch.get_num_threads()
