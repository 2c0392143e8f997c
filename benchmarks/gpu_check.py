"""On a machine with a GPU: the same tests natively, then ours against the peers found there. `make gpu-check`.

    python -m benchmarks.gpu_check [--device cuda] [--only words] [--again] [--prefer] [--out benchmarks/results]

Offline, with the torch found there; nothing is installed. Each step is a process of its own that ends within ten minutes, and its result is
written at once to gpu-<device>.json, so an interrupted check goes on where it was: a step that passed is not run again while the sources,
torch and the device are the same (``--again`` runs it all the same). A peer or a package that is absent is a skip with its reason.
The last lines say what was verified, what failed and what was not run. `--device cpu` is a dry run of this driver and says so.

``--prefer`` then notes in cmoe_kernels/ops/preferred.json, for this architecture, which of the CUDA and the Triton kernels of each op took
less time over all shapes, with up to 64 tokens and with more: `auto` takes that one from then on. On sm_90 the products of both
architectures are checked and timed.
"""

import argparse
import dataclasses
import hashlib
import importlib.metadata
import importlib.util
import json
import math
import os
import platform
import re
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from benchmarks import gpu_bench
from cmoe_kernels import backends, native

ROOT = Path(__file__).parents[1]
LIMIT = 9.5 * 60
PACKAGES = ("torch", "triton", "transformers", "pytest", *gpu_bench.PACKAGES)


@dataclasses.dataclass(frozen=True)
class Step:
    """A command that says by its exit code whether something holds."""

    name: str
    command: tuple[str, ...]
    env: dict[str, str] = dataclasses.field(default_factory=dict)
    limit: float = LIMIT

    @property
    def is_pytest(self) -> bool:
        return "pytest" in self.command


def pytest(name: str, *arguments: str, **env: str) -> Step:
    return Step(name, (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments), env)


def steps(device: str) -> list[Step]:
    """What is checked, in order: values first, times last."""
    tests = [
        *(pytest(f"promises of {op}", "tests/ops/test_promises.py", "-k", op) for op in backends.OPS),
        pytest("edge sizes", "tests/ops/test_edges.py"),
        pytest("wrong input", "tests/ops/test_errors.py"),
        pytest("wrong input, values read", "tests/ops/test_errors.py", "tests/nn/test_connector.py", "-k", "wrong", CMOE_CHECK="1"),
        pytest("algebra and other implementations", "tests/ops/test_algebra.py", "tests/ops/test_outside_oracles.py"),
        pytest("golden", "tests/nn/test_golden.py", "tests/triton/test_golden.py"),
        pytest("connector", "tests/nn/test_connector.py", "tests/nn/test_convert.py"),
        pytest("graphs, synchronisation, TF32, bad indices", "tests/gpu"),
    ]
    times = [times_of(shape, tokens, device) for shape, tokens in (gpu_bench.AT if device == "cuda" else gpu_bench.DRY)]
    if device == "cuda" and torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0) and native.cuda_kernels().built:
        # There the CUDA products of two architectures run: those of sm_80 by themselves, for their values and for comparison.
        sm80 = {"CMOE_CUDA_SM90": "0"}
        tests.append(
            pytest(
                "CUDA products of sm_80", "tests/ops/test_promises.py", "tests/gpu", "-k", "cuda and (experts or tiles or chunks)", **sm80
            )
        )
        times += [
            dataclasses.replace(times_of(shape, tokens, device, "--backend", "cuda"), name=f"{SM80} of {shape} at T = {tokens}", env=sm80)
            for shape, tokens in gpu_bench.AT
        ]
    return tests + times


SM80 = "times with CUDA products of sm_80"


def times_of(shape: str, tokens: int, device: str, *options: str) -> Step:
    command = (sys.executable, "-m", "benchmarks.gpu_bench", "--device", device, "--shape", shape, "--tokens", str(tokens), *options)
    return Step(f"times of {shape} at T = {tokens}", command)


def run(step: Step, device: str) -> dict[str, Any]:
    """Run one step: its status (passed, failed, skipped, timeout), seconds, and what pytest or the benchmark reported."""
    if step.is_pytest and importlib.util.find_spec("pytest") is None:
        return {"status": "skipped", "seconds": 0.0, "skip_reasons": ["pytest is not installed"]}
    env = {**os.environ, "CMOE_TEST_DEVICE": device, "CUBLAS_WORKSPACE_CONFIG": ":4096:8", **step.env}
    if device == "cuda":
        env.pop("TRITON_INTERPRET", None)
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report")
        command = [*step.command, f"--junitxml={report}" if step.is_pytest else f"--write={report}"]
        process = subprocess.Popen(
            command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
        )
        try:
            output, _ = process.communicate(timeout=step.limit)
            # pytest ends with 5 where it collected nothing.
            status = {0: "passed", 5: "skipped" if step.is_pytest else "failed"}.get(process.returncode, "failed")
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            output, status = process.communicate()[0], "timeout"
        record: dict[str, Any] = {"status": status, "seconds": round(time.monotonic() - start, 1)}
        if report.exists() and report.stat().st_size:
            record |= _tests(report) if step.is_pytest else json.loads(report.read_text())
    if status == "passed" and record.get("tests") == 0:
        record["status"] = "skipped"
    if record["status"] in ("failed", "timeout"):
        record["output"] = output[-4000:]
    return record


def _tests(report: Path) -> dict[str, Any]:
    """How many tests ran, were skipped (with each reason once) and failed (by name)."""
    cases = list(ElementTree.parse(report).getroot().iter("testcase"))
    skips = [e for case in cases for e in case.iter("skipped")]
    reasons = sorted({_reason(e) for e in skips})
    failed = [
        f"{case.get('classname')}.{case.get('name')}"
        for case in cases
        if case.find("failure") is not None or case.find("error") is not None
    ]
    counts = {"tests": len(cases) - len(skips), "skipped": len(skips)}
    return counts | ({"skip_reasons": reasons} if reasons else {}) | ({"failures": failed} if failed else {})


def _reason(skip: ElementTree.Element) -> str:
    """A module that skips itself has its reason in the text, as the tuple (file, line, 'Skipped: reason')."""
    found = re.search(r"'Skipped: (.*)'\)", skip.text or "")
    return found[1] if found else skip.get("message") or ""


# --- what was found here ----------------------------------------------------------------------------------------------------
def environment(device: str) -> dict[str, Any]:
    found: dict[str, Any] = {"device": device_name(device), "python": platform.python_version(), "system": platform.platform()}
    for package in PACKAGES:
        found[package] = _version(package)
    found["native library"] = str(native.library) if native.library else f"absent: {native.error}"
    found["CUDA kernels"] = native.cuda_kernels().built or f"none: {native.cuda_kernels().error}"
    found["backends"] = {op: backends.serving(op, device) for op in backends.OPS}
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        found |= {
            "capability": ".".join(map(str, torch.cuda.get_device_capability())),
            "multiprocessors": properties.multi_processor_count,
            "memory_gib": round(properties.total_memory / 2**30, 1),
            "cuda": torch.version.cuda,
            "hip": torch.version.hip,
        }
    return found


def device_name(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else "cpu"


def _version(package: str) -> str:
    if importlib.util.find_spec(package) is None:
        return "not installed"
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "installed, version unknown"


def fingerprint(device: str) -> str:
    """Of the sources, torch and the device: what was verified is verified for these."""
    digest = hashlib.sha256(f"{torch.__version__} {device_name(device)}".encode())
    for folder in ("cmoe_kernels", "csrc", "tests/ops", "tests/nn", "tests/gpu", "tests/triton", "benchmarks"):
        for path in sorted(p for p in (ROOT / folder).rglob("*") if p.suffix in (".py", ".cpp", ".h", ".cu", ".cuh")):
            digest.update(str(path.relative_to(ROOT)).encode() + path.read_bytes())
    return digest.hexdigest()[:16]


# --- the check --------------------------------------------------------------------------------------------------------------
def check(device: str, todo: Sequence[Step], path: Path, again: bool = False) -> dict[str, Any]:
    """Run the steps that have not passed yet and keep the results in ``path``."""
    results = json.loads(path.read_text()) if path.exists() else {}
    mark = fingerprint(device)
    if results.get("fingerprint") != mark:
        if results:
            print(f"{path.name} is of other sources, another torch or another device: starting anew", flush=True)
        results = {"fingerprint": mark, "dry_run": device != "cuda", "environment": environment(device), "steps": {}}
    for step in todo:
        before = results["steps"].get(step.name, {})
        if before.get("status") == "passed" and not again:
            print(f"{step.name:45} passed before", flush=True)
            continue
        print(f"{step.name:45} ", end="", flush=True)
        record = results["steps"][step.name] = run(step, device)
        results["date"] = datetime.now(UTC).strftime("%Y-%m-%d")
        path.parent.mkdir(parents=True, exist_ok=True)
        # Replaced in one go, so that an interruption leaves the file of the step before.
        path.with_suffix(".part").write_text(json.dumps(results, indent=1) + "\n")
        path.with_suffix(".part").replace(path)
        print(f"{record['status']:8} {record['seconds']:6.1f} s", flush=True)
    return results


def summary(results: dict[str, Any], todo: Sequence[Step]) -> str:
    """What was verified, what failed and what was not run, in plain lines."""
    found, done = results["environment"], results["steps"]
    where = f"{found['device']}, torch {found['torch']}, triton {found['triton']}"
    lines = [f"Dry run on the CPU ({where}): nothing here ran on a GPU." if results["dry_run"] else f"On {where}:"]
    for step in todo:
        record = done.get(step.name, {"status": "not run"})
        status = record["status"]
        detail = f"{record['tests']} tests, {record['skipped']} skipped" if "tests" in record else ""
        if status == "failed" and record.get("failures"):
            detail += f"; failed: {', '.join(record['failures'][:5])}" + (" ..." if len(record["failures"]) > 5 else "")
        lines.append(f"  {status:8} {step.name}" + (f" ({detail})" if detail else ""))
        lines += [f"           skipped: {reason}" for reason in record.get("skip_reasons", [])]
        for row in record.get("rows", []):
            lines.append(f"           {gpu_bench.line(row)}")
    counts = [sum(done.get(step.name, {}).get("status") == s for step in todo) for s in ("passed", "failed", "timeout", "skipped")]
    lines.append("{} steps passed, {} failed, {} ran out of time, {} had nothing to run here".format(*counts))
    return "\n".join(lines)


# --- which of two backends is faster ------------------------------------------------------------------------------------------
def preferences(results: dict[str, Any]) -> dict[str, dict[str, str]]:
    """Of each op, for few and for many tokens, "cuda" or "triton": by the geometric mean of times over shapes and passes.

    "unmeasured" unless both ran everywhere.
    """
    times: dict[tuple[str, str], dict[str, dict[tuple[str, str], float]]]
    times = {(op, tokens): {"cuda": {}, "triton": {}} for op in backends.OPS for tokens in ("few", "many")}
    for step, record in results["steps"].items():
        for row in record.get("rows", []) if not step.startswith(SM80) else []:
            ours = next((peer["ours"]["p50_ms"] for peer in row["peers"].values() if "ours" in peer), None)
            if ours is not None and row["backend"] in ("cuda", "triton"):
                tokens = "few" if row["tokens"] <= backends.FEW else "many"
                times[row["op"], tokens][row["backend"]][step, row["pass"]] = ours
    found: dict[str, dict[str, str]] = {op: {} for op in backends.OPS}
    for (op, tokens), by_backend in times.items():
        cuda, triton = by_backend["cuda"], by_backend["triton"]
        if not cuda or cuda.keys() != triton.keys():
            found[op][tokens] = "unmeasured"
        else:
            found[op][tokens] = "cuda" if sum(math.log(cuda[at] / triton[at]) for at in cuda) < 0 else "triton"
    return found


def note_preferences(results: dict[str, Any], path: Path) -> dict[str, dict[str, str]]:
    """Write them into the table, for the architecture of the results; what was not measured leaves the line as it was."""
    table = json.loads(path.read_text())
    arch = "sm_" + results["environment"]["capability"].replace(".", "")
    noted = table.setdefault(arch, {})
    for op, found in preferences(results).items():
        before = noted.setdefault(op, found)
        before |= {tokens: backend for tokens, backend in found.items() if backend != "unmeasured"}
    path.write_text(json.dumps(table, indent=1) + "\n")
    return noted


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: a dry run of this driver at tiny shapes")
    parser.add_argument("--only", default="", help="comma-separated words; the steps whose name has one")
    parser.add_argument("--again", action="store_true", help="run steps that passed before, too")
    parser.add_argument("--prefer", action="store_true", help="note the faster GPU backend of each op in ops/preferred.json")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        print("gpu-check: torch finds no GPU here; --device cpu makes a dry run of the driver", file=sys.stderr)
        return 2
    words = [word for word in options.only.split(",") if word]
    todo = [step for step in steps(options.device) if not words or any(word in step.name for word in words)]
    if not todo:
        print(f"gpu-check: no step has one of {', '.join(words)} in its name", file=sys.stderr)
        return 2
    name = re.sub(r"[^a-z0-9]+", "-", device_name(options.device).lower()).strip("-")
    path = options.out / f"gpu-{name}.json"
    results = check(options.device, todo, path, options.again)
    print(summary(results, todo))
    print(f"written to {path}")
    if options.prefer and options.device == "cuda":
        noted = note_preferences(results, Path(backends.__file__).parent / "ops" / "preferred.json")
        print("; ".join(f"{op}: {of['few']} for few tokens, {of['many']} for many" for op, of in noted.items()))
    return int(any(results["steps"][step.name]["status"] in ("failed", "timeout") for step in todo))


if __name__ == "__main__":
    sys.exit(main())
