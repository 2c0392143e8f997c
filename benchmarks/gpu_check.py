"""On a machine with a GPU: what its kernels are worth there, in the order of what each step tells. `make gpu-check MINUTES=8`.

    python -m benchmarks.gpu_check [--minutes M] [--library FILE] [--only words] [--again] [--out benchmarks/results]
    python -m benchmarks.gpu_fill FILE                preferred.json, tiles.json and README's status from a result

Offline, with the torch found there (2.10 or newer), triton and pytest; nothing is installed. The native library is the one beside the
package; else the one in ``--library`` (a wheel or a .so), in dist/ or in an installed cmoe-kernels; else it is built with the nvcc found.

Each step is a process of its own with its share of the minutes; what one leaves goes to the later ones. Results are written after every
step to gpu-<device>.json, in the form of the other benchmarks. The next call goes on from there while sources, torch and device are the
same: steps that were not reached first, then those whose time ran out, then those that failed. A package that is absent is a skip with
its reason. `--device cpu` is a dry run of this driver and says so.
"""

import argparse
import contextlib
import dataclasses
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
import zipfile
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from benchmarks import machine, peers, record, report
from benchmarks.__main__ import describe
from cmoe_kernels import backends, native

ROOT = Path(__file__).parents[1]
LIMIT = 9.5 * 60
# A step that would have less time than this is left to the next call: importing torch and collecting tests takes as long.
LEAST = 15.0
BUILD = 180.0
PACKAGES = ("torch", "triton", "transformers", "pytest", *peers.GPU_PEERS)
SANITIZERS = ("memcheck", "racecheck")
# Below this ratio to the fastest peer, tiles are timed.
LOST = 1.0
NO_TIME = "no time was left"
Results = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Step:
    """A command that says by its exit code whether something holds.

    ``share``: the minutes that it has at least, where they are left, and its part of longer times, against the other steps.
    """

    name: str
    command: tuple[str, ...]
    share: float = 1.0
    env: dict[str, str] = dataclasses.field(default_factory=dict)
    # Further arguments, known when its turn comes; or why it has nothing to do.
    arguments: Callable[[Results], tuple[str, ...] | str] = lambda results: ()
    # Its time is the limit, not a share: what is cut off in the middle would be worth nothing.
    firm: float | None = None

    @property
    def kind(self) -> str:
        return "pytest" if "pytest" in self.command else "times" if "benchmarks" in self.command else "other"


def pytest(name: str, share: float, *arguments: str, before: tuple[str, ...] = (), needs: str = "", **env: str) -> Step:
    return Step(name, (*before, sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments), share, env, _needs(needs))


def times(name: str, share: float, only: str, device: str, *more: str, **rest: Any) -> Step:
    quick = ("--seconds", "0.5") if device == "cuda" else ("--quick", *(("--backend", "cuda") if machine.EMULATED else ()))
    command = (sys.executable, "-m", "benchmarks", "--device", device, "--missing", *quick, *more, "--only", only)
    return Step(name, command, share, **rest)


def _needs(what: str) -> Callable[[Results], tuple[str, ...] | str]:
    """A skip where the environment lacks something."""
    return lambda results: f"no {what} here" if what and not results["environment"].get(what) else ()


def steps(device: str, library: Path | None = None) -> list[Step]:
    """What is checked, in the order of what it tells."""
    provide = (sys.executable, "-m", "benchmarks.gpu_check", "--provide", "--device", device)
    todo = [Step("the native library", (*provide, *(("--library", str(library)) if library else ())), firm=BUILD)]
    todo += [pytest(f"values of the {b} kernels", 1.0, "tests/ops/test_promises.py", "-k", f"test_precision and {b}") for b in GPU_BACKENDS]
    todo.append(pytest("golden cases", 0.4, "tests/nn/test_golden.py", "tests/triton/test_golden.py"))
    sanitizer = compute_sanitizer()
    for tool in SANITIZERS:
        before = (sanitizer or "compute-sanitizer", "--tool", tool, "--error-exitcode", "86", "--target-processes", "all")
        chosen = ("tests/ops/test_promises.py", "-k", "test_precision and cuda and float32", "--sample", "7")
        env = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        todo.append(pytest(f"compute-sanitizer {tool}", 0.4, *chosen, before=before, needs="compute-sanitizer", **env))
    tiny = device == "cpu"
    shapes = ("tiny/T1/bf", "tiny/T1/bf", "tiny_gated/T1/bf") if tiny else ("released/", "cumo/", "mixtral/")
    for name, shape, cases in zip(("connector", "CuMo's experts", "Mixtral-like experts"), shapes, WORKS, strict=True):
        todo.append(times(f"times: {name}", 1.0, ",".join(f"{case}/{shape}" for case in cases), device))
    todo.append(times("times: the ops", 0.8, ",".join(f"{case}/{'tiny/T1/' if tiny else ''}" for case in OP_CASES), device))
    if device == "cuda":
        todo.append(Step("kernels of a step", (sys.executable, "-m", "benchmarks.inspection.gpu_times"), 0.5))
    todo.append(times("tiles of what lost", 0.6, "", device, "--backend", "triton", arguments=lost, env={"CMOE_AUTOTUNE": "6"}))
    todo.append(pytest("CUDA graphs", 0.3, "tests/gpu", "-k", "graph"))
    sm80 = {"CMOE_CUDA_SM90": "0"}
    todo += [
        pytest("synchronisation, TF32, bad indices, sizes", 0.5, "tests/gpu", "-k", "not graph"),
        pytest("CUDA products of sm_80", 0.3, "tests/ops/test_promises.py", "-k", "cuda and experts and precision", needs="sm_90a", **sm80),
        *(pytest(f"promises of {op}", 0.4, "tests/ops/test_promises.py", "-k", f"{op} and not test_precision") for op in backends.OPS),
        pytest("edge sizes", 0.3, "tests/ops/test_edges.py"),
        pytest("wrong input", 0.2, "tests/ops/test_errors.py"),
        pytest("wrong input, values read", 0.2, "tests/ops/test_errors.py", "tests/nn/test_connector.py", "-k", "wrong", CMOE_CHECK="1"),
        pytest("algebra and other implementations", 0.2, "tests/ops/test_algebra.py", "tests/ops/test_outside_oracles.py"),
        pytest("connector", 0.3, "tests/nn/test_connector.py", "tests/nn/test_convert.py"),
    ]
    return todo


GPU_BACKENDS = ("triton", "cuda")
_SPARSE = ("sparse_experts", "sparse_experts_forward")
WORKS = (("soft_connector", "soft_connector_forward"), _SPARSE, _SPARSE)
OP_CASES = ("task_router", "soft_experts", "grouped_linear", "soft_gate", "topk_gate", "balance_loss")


def compute_sanitizer() -> str | None:
    return shutil.which("compute-sanitizer") or next(
        (p for p in ("/usr/local/cuda/bin/compute-sanitizer", "/usr/local/cuda/compute-sanitizer/compute-sanitizer") if Path(p).exists()),
        None,
    )


def lost(results: Results) -> tuple[str, ...] | str:
    """The Triton cases that a peer outran, the worst first."""
    ratios = {
        key: min(peer["ratio"] for name, peer in case["peers"].items() if name != report.OWN)
        for key, case in results["cases"].items()
        if case.get("backend") == "triton" and set(case["peers"]) - {report.OWN}
    }
    if not ratios:
        return "no time was measured"
    return (
        ("--only", ",".join(key for key in sorted(ratios, key=ratios.__getitem__) if ratios[key] < LOST))
        if min(ratios.values()) < LOST
        else ("Triton is ahead everywhere")
    )


# --- one step -----------------------------------------------------------------------------------------------------------------
def run(step: Step, device: str, results: Results, seconds: float) -> Results:
    """Run one step: its status (passed, failed, skipped, timeout), seconds, and what pytest or the benchmark reported."""
    more = step.arguments(results)
    if step.kind == "pytest" and importlib.util.find_spec("pytest") is None:
        more = "pytest is not installed"
    if isinstance(more, str):
        return {"status": "skipped", "seconds": 0.0, "skip_reasons": [more]}
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        env = {**os.environ, "CMOE_TEST_DEVICE": device, "CUBLAS_WORKSPACE_CONFIG": ":4096:8", **step.env}
        if "CMOE_AUTOTUNE" in step.env:
            env["XDG_CACHE_HOME"] = name
        if device == "cuda":
            env.pop("TRITON_INTERPRET", None)
        # Triton compiles on the CPU, so the tests of one step are shared out among processes; not under compute-sanitizer.
        parts = min(8, max(1, (os.cpu_count() or 1) // 2)) if device == "cuda" and step.command[0] == sys.executable else 1
        commands = []
        for part in range(parts if step.kind == "pytest" else 1):
            command = [*step.command, *more]
            if step.kind == "pytest":
                command += [f"--junitxml={folder / f'{part}.xml'}", "--part", f"{part + 1}/{parts}"]
                command += ["--seconds", f"{max(0.8 * seconds, seconds - 30):.0f}"]
            elif step.kind == "times":
                document = {k: results[k] for k in ("suite", "machine", "threads", "cases")}
                if "CMOE_AUTOTUNE" not in step.env:
                    (folder / "times.json").write_text(json.dumps(document))
                command += ["--out", str(folder / "times.json"), "--minutes", f"{0.8 * seconds / 60:.2f}"]
                command += ["--threads", str(results["threads"])]  # one file holds the times of one number of threads
            else:
                command.append(f"--write={folder / 'report.json'}")
            commands.append(command)
        output, codes = _run(commands, env, seconds)
        taken: Results = {"seconds": round(time.monotonic() - start, 1)}
        taken |= _tests(folder) if step.kind == "pytest" else {}
        if (folder / "report.json").exists():
            taken |= json.loads((folder / "report.json").read_text())
        if (folder / "times.json").exists():
            taken["document"] = json.loads((folder / "times.json").read_text())
        tiles = folder / "cmoe_kernels" / "tiles.json"
        if tiles.exists():
            taken["tiles"] = json.loads(tiles.read_text())
    late = None in codes or NO_TIME in taken.get("skip_reasons", []) or record.NO_TIME in json.dumps(taken.get("document", {}))
    # pytest ends with 5 where it collected nothing.
    bad = [code for code in codes if code not in (0, None) and not (step.kind == "pytest" and code == 5)]
    status = "failed" if bad else "timeout" if late else "passed"
    if status == "passed" and step.kind == "pytest" and not taken.get("tests"):
        status = "skipped"
    told = status not in ("failed", "timeout") or bool(taken.get("failures"))
    return {"status": status, **taken, **({} if told else {"output": output[-4000:].replace(f"{ROOT}/", "")})}


def _run(commands: list[list[str]], env: dict[str, str], seconds: float) -> tuple[str, list[int | None]]:
    """Run commands beside each other; what they wrote, and exit statuses: None for one that was ended because time was up."""
    end, codes = time.monotonic() + seconds, []
    with tempfile.TemporaryFile("w+") as log:
        begun = [subprocess.Popen(c, cwd=ROOT, env=env, stdout=log, stderr=subprocess.STDOUT, start_new_session=True) for c in commands]
        try:
            for process in begun:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(max(0.0, end - time.monotonic()))
                codes.append(process.returncode)
        finally:  # also where this process is told to end
            for process in begun:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        log.seek(0)
        return log.read(), codes


def _tests(folder: Path) -> Results:
    """How many tests ran, were skipped (with each reason once) and failed (by name, with what each said first)."""
    cases = [
        case for path in sorted(folder.glob("*.xml")) if path.stat().st_size for case in ElementTree.parse(path).getroot().iter("testcase")
    ]
    skips = [e for case in cases for e in case.iter("skipped")]
    reasons = sorted({_reason(e) for e in skips})
    failed = {
        f"{case.get('classname')}.{case.get('name')}": (trouble.get("message") or "").partition("\n")[0][:200]
        for case in cases
        for trouble in [*case.iter("failure"), *case.iter("error")][:1]
    }
    counts = {"tests": len(cases) - len(skips), "skipped": len(skips)}
    return counts | ({"skip_reasons": reasons} if reasons else {}) | ({"failures": failed} if failed else {})


def _reason(skip: ElementTree.Element) -> str:
    """A module that skips itself has its reason in the text, as the tuple (file, line, 'Skipped: reason')."""
    found = re.search(r"'Skipped: (.*)'\)", skip.text or "")
    return found[1] if found else skip.get("message") or ""


# --- what was found here ----------------------------------------------------------------------------------------------------
def provide(device: str, given: Path | None) -> Results:
    """See that the package has a native library, and say where it came from and what is there then.

    Raises:
        ValueError: ``given`` holds none.
    """
    target, said = ROOT / "cmoe_kernels", "as it lay beside the package"
    there = next(target.glob("_C*.so"), None)
    if given is not None or there is None:
        found = given or next((ROOT / "dist").glob("*.whl"), None) or _installed()
        if found is not None:
            said = f"from {found.name}"
            (target / "_C.abi3.so").write_bytes(_library_in(found))
        elif device == "cuda":
            start = time.monotonic()
            built = subprocess.run([sys.executable, "setup.py", "build_ext", "--inplace"], cwd=ROOT, check=False)
            said = f"built here in {time.monotonic() - start:.0f} s" if not built.returncode else "absent: the build failed"
        else:
            said = "absent"
    code = f"import json; from benchmarks.gpu_check import environment; print(json.dumps(environment({device!r})))"
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return {"library": said, "environment": json.loads(done.stdout.splitlines()[-1])}


def _library_in(path: Path) -> bytes:
    """The library itself, or the one in a wheel."""
    if path.suffix != ".whl":
        return path.read_bytes()
    with zipfile.ZipFile(path) as wheel:
        names = [name for name in wheel.namelist() if re.fullmatch(r"cmoe_kernels/_C[^/]*\.so", name)]
        if len(names) != 1:
            raise ValueError(f"{path} holds {len(names)} native libraries, must hold one")
        return wheel.read(names[0])


def _installed() -> Path | None:
    """The library of an installed cmoe-kernels."""
    try:
        files = importlib.metadata.files("cmoe-kernels") or []
    except importlib.metadata.PackageNotFoundError:
        return None
    return next((Path(f.locate()) for f in files if re.fullmatch(r"cmoe_kernels/_C[^/]*\.so", str(f)) and Path(f.locate()).exists()), None)


def environment(device: str) -> Results:
    found: Results = {"device": device_name(device), "python": platform.python_version(), "system": platform.platform()}
    for package in PACKAGES:
        found[package] = _version(package)
    kernels = native.cuda_kernels()
    found["native library"] = str(native.library).removeprefix(f"{ROOT}/") if native.library else f"absent: {native.error}"
    found["CUDA kernels"] = kernels.built or f"none: {kernels.error}"
    found["backends"] = {op: backends.serving(op, device) for op in backends.OPS}
    found["compute-sanitizer"] = device == "cuda" and compute_sanitizer()
    if device == "cuda":
        found |= machine.gpu()
        found["sm_90a"] = found["capability"] == "9.0" and "sm_90a" in kernels.built
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
def check(
    device: str,
    todo: Sequence[Step],
    path: Path,
    minutes: float = float("inf"),
    again: bool = False,
    clock: Callable[[], float] = time.monotonic,
) -> Results:
    """Run the steps that have not passed yet while there is time, and keep the results in ``path`` after each."""
    end = clock() + 60 * minutes
    results = json.loads(path.read_text()) if path.exists() else {}
    mark = fingerprint(device)
    if results.get("fingerprint") != mark:
        if results:
            print(f"{path.name} is of other sources, another torch or another device: starting anew", flush=True)
        results = {"fingerprint": mark, "dry_run": device != "cuda", "suite": "dry run" if device != "cuda" else record.SUITES[device]}
        results |= {"environment": environment(device), "machine": machine.describe(device), "threads": torch.get_num_threads()}
        results |= {"steps": {}, "cases": {}}
    order = ("not run", "timeout", "failed", "skipped", *(("passed",) if again else ()))
    status = {step.name: results["steps"].get(step.name, {}).get("status", "not run") for step in todo}
    left = sorted((step for step in todo if status[step.name] in order), key=lambda step: 0 if again else order.index(status[step.name]))
    for step in todo:
        if step not in left:
            print(f"{step.name:45} passed before", flush=True)
    while left:
        step, shares = left[0], sum(s.share for s in left if s.firm is None)
        remaining = end - clock()
        seconds = min(LIMIT, remaining, step.firm if step.firm is not None else max(60 * step.share, remaining * step.share / shares))
        left.pop(0)
        if seconds < LEAST:
            continue
        print(f"{step.name:45} ", end="", flush=True)
        found = run(step, device, results, seconds)
        _merge(results, step, found)
        results["date"] = datetime.now(UTC).strftime("%Y-%m-%d")
        path.parent.mkdir(parents=True, exist_ok=True)
        # Replaced in one go, so that an interruption leaves the file of the step before.
        path.with_suffix(".part").write_text(json.dumps(results, indent=1) + "\n")
        path.with_suffix(".part").replace(path)
        print(f"{found['status']:8} {found['seconds']:6.1f} s", flush=True)
    return results


def _merge(results: Results, step: Step, found: Results) -> None:
    """A step's record into the results: what was found and timed lies at the top, where the report looks for it."""
    results["environment"] = found.pop("environment", results["environment"])
    document = found.pop("document", None)
    if document is not None and "CMOE_AUTOTUNE" in step.env:
        found["cases"] = document["cases"]
    elif document is not None:
        results["cases"] = document["cases"]
    results["steps"][step.name] = found


def summary(results: Results, todo: Sequence[Step]) -> str:
    """What was verified, what failed and what was not run, in plain lines."""
    found, done = results["environment"], results["steps"]
    where = f"{found['device']}, torch {found['torch']}, triton {found['triton']}"
    lines = [f"Dry run on the CPU ({where}): nothing here ran on a GPU." if results["dry_run"] else f"On {where}:"]
    for step in todo:
        taken = done.get(step.name, {"status": "not run"})
        status = taken["status"]
        detail = f"{taken['tests']} tests, {taken['skipped']} skipped" if "tests" in taken else taken.get("library", "")
        lines.append(f"  {status:8} {step.name}" + (f" ({detail})" if detail else ""))
        lines += [f"           failed: {test}: {said}" for test, said in taken.get("failures", {}).items()]
        lines += [f"           skipped: {reason}" for reason in taken.get("skip_reasons", [])]
    for key, case in results["cases"].items():
        lines.append(f"{key}\n{describe(case)}")
    counts = [sum(done.get(s.name, {"status": "not run"})["status"] == of for s in todo) for of in STATUSES]
    lines.append("{} steps passed, {} failed, {} ran out of time, {} had nothing to run here, {} were not reached".format(*counts))
    return "\n".join(lines)


STATUSES = ("passed", "failed", "timeout", "skipped", "not run")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.gpu_check", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: a dry run of this driver at tiny shapes")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="stop in this time; the next call goes on")
    parser.add_argument("--library", type=Path, help="a wheel or a native library that was built elsewhere")
    parser.add_argument("--only", default="", help="comma-separated words; the steps whose name has one")
    parser.add_argument("--again", action="store_true", help="run steps that passed before, too")
    parser.add_argument("--provide", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--write", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    options = parser.parse_args(arguments)
    if options.library is not None and not options.library.is_file():
        parser.error(f"--library {options.library}: no such file")
    if options.device == "cuda" and not torch.cuda.is_available():
        print("gpu-check: torch finds no GPU here; --device cpu makes a dry run of the driver", file=sys.stderr)
        return 2
    if options.provide:
        options.write.write_text(json.dumps(provide(options.device, options.library)))
        return 0
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # as an interrupt: steps end too
    words = [word for word in options.only.split(",") if word]
    todo = [step for step in steps(options.device, options.library) if not words or any(word in step.name for word in words)]
    if not todo:
        print(f"gpu-check: no step has one of {', '.join(words)} in its name", file=sys.stderr)
        return 2
    name = re.sub(r"[^a-z0-9]+", "-", device_name(options.device).lower()).strip("-")
    path = options.out / f"gpu-{name}.json"
    results = check(options.device, todo, path, options.minutes, options.again)
    print(summary(results, todo))
    print(f"written to {path}")
    return int(any(results["steps"].get(step.name, {}).get("status") == "failed" for step in todo))


if __name__ == "__main__":
    sys.exit(main())
