"""Measure one instance, and keep what was measured: one JSON file per machine and number of threads, merged case by case."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from benchmarks import machine, timer
from benchmarks.cases import Instance
from benchmarks.steps import PEER_SLACK, Rule, Skipped, Work, WrongResult
from cmoe_kernels import backends

RESULTS = machine.ROOT / "benchmarks" / "results"
SUITE = "cpu"


def measure(instance: Instance, run: dict[str, Any], seconds: float, least: int, memory: bool) -> dict[str, Any]:
    """Check, then time, ours against each peer in turn.

    Args:
        instance: what to measure.
        run: what ``machine.run_info`` gave; the GEMM rate of the instance's dtype is added to a copy.
        seconds: time for each pair, unless ``least`` calls take longer.
        least: timed calls of each side at least.
        memory: also measure peak memory, in processes of their own.

    Returns:
        a record for the file. Where our result is wrong it holds the error and no time; where a peer's is, the peer is under "wrong".
    """
    dtype = str(instance.dtype).removeprefix("torch.")
    run = {**run, "gemm_gflops": {dtype: round(machine.gemm_rate(instance.dtype), 1)}}
    record: dict[str, Any] = {
        "case": instance.case.name,
        "title": instance.case.title,
        "shape": instance.shape.name,
        "tokens": instance.tokens,
        "dtype": dtype,
        "run": run,
        "peers": {},
        "skipped": {},
        "wrong": {},
    }
    try:
        work = instance.make()
    except Skipped as reason:
        return {**record, "skipped": {"ours": str(reason)}}
    record |= {"flops": work.flops, "bytes": work.bytes, "baseline": work.baseline}
    record["served_by"] = {op: backends.choose(op, "cpu", work.dtype) for op in work.ops}
    try:
        rule = Rule(work)
        ours = work.ours()
        rule.check(ours)
    except WrongResult as error:
        return {**record, "wrong": {"ours": str(error)}}
    record["ours"] = {"saved_bytes": ours.saved_bytes(work.given)}
    pooled: list[float] = []
    for name, make in work.peers.items():
        try:
            peer = make()
            rule.check(peer, PEER_SLACK)
        except Skipped as reason:
            record["skipped"][name] = str(reason)
            continue
        except WrongResult as error:
            record["wrong"][name] = str(error)
            continue
        except Exception as error:  # other people's code: one that fails must not end a run of hours
            record["skipped"][name] = f"it failed: {type(error).__name__}: {str(error).strip().splitlines()[0][:200]}"
            continue
        mine, theirs = timer.alternate(ours, peer, seconds, least)
        pooled += mine.seconds
        record["peers"][name] = {
            **theirs.summary(),
            "ours_p50_ms": mine.summary()["p50_ms"],
            "ratio": round(timer.ratio(mine, theirs), 4),
            "saved_bytes": peer.saved_bytes(work.given),
        }
        del peer
    times = timer.Times(tuple(pooled))
    record["ours"] |= {**times.summary(), **_rates(work, times.quantile(0.5), run, dtype)}
    del work, rule, ours
    if memory:
        for name, side in {"ours": record["ours"], **record["peers"]}.items():
            side["peak_bytes"] = peak_bytes(instance.key, name, run["threads"])
    return record


def _rates(work: Work, seconds: float, run: dict[str, Any], dtype: str) -> dict[str, float]:
    gflops, gbps = work.flops / seconds / 1e9, work.bytes / seconds / 1e9
    return {
        "gflops": round(gflops, 2),
        "gbps": round(gbps, 3),
        "gemm_share": round(gflops / run["gemm_gflops"][dtype], 4),
        "copy_share": round(gbps / run["copy_gbps"], 4),
    }


def peak_bytes(key: str, side: str, threads: int) -> int | None:
    """What one call needs above its weights and inputs, measured in a process of its own; None where the kernel does not tell."""
    command = [sys.executable, "-m", "benchmarks.memory", key, side, str(threads)]
    done = subprocess.run(command, cwd=machine.ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command[1:])} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def load(path: Path) -> dict[str, Any]:
    """A results file; {} where there is none."""
    return json.loads(path.read_text()) if path.exists() else {}


def merge(path: Path, described: dict[str, Any], key: str, record: dict[str, Any]) -> None:
    """Put one record into a file, and leave the others as they are.

    Raises:
        ValueError: the file is of another machine or number of threads.
    """
    threads = record["run"]["threads"]
    document = load(path) or {"suite": SUITE, "machine": described, "threads": threads, "cases": {}}
    if (document["machine"], document["threads"]) != (described, threads):
        held = f"{document['machine']['cpu']}, {document['threads']} threads"
        raise ValueError(f"{path} holds results of another machine or number of threads ({held}); give --out another name")
    document["cases"][key] = record
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(document, indent=1, sort_keys=True) + "\n")
    os.replace(part, path)


def documents(folder: Path = RESULTS) -> list[dict[str, Any]]:
    """All results of this suite in a folder."""
    found = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    return [d for d in found if isinstance(d, dict) and d.get("suite") == SUITE]


def set_threads(threads: int | None) -> int:
    """Torch's thread count, set or as it is."""
    if threads is not None:
        torch.set_num_threads(threads)
    return torch.get_num_threads()
