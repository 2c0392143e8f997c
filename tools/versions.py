"""The versions that are installed and tested: constraints.txt, and the two ends of the ranges in pyproject.toml.

    python -m tools.versions lock      resolves the newest of every range together and writes constraints.txt
    python -m tools.versions latest    .venv-latest: ranges without their upper end; runs the tests of what uses these packages
    python -m tools.versions oldest    .venv-oldest: the lower end of each range; runs the same tests
    python -m tools.versions dev       prints what pip installs for the extra dev, without the package itself

The Makefile calls these and says which torch and triton: --pin torch==2.13.0. Those two, and what a CUDA build of torch brings, are
never in constraints.txt, so an environment that has a torch keeps it. The tests run from the checkout with its own native library.
"""

import argparse
import contextlib
import json
import os
import re
import signal
import site
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[1]
CONSTRAINTS = ROOT / "constraints.txt"
HEADER = """\
# The exact versions that make install, test, demo and docs use, direct and transitive. Written by make lock; do not edit.
# torch, triton and CUDA's packages are left out on purpose: an environment that has a torch keeps it.
"""

# Extras for those who change this repository; the ranges of the other extras are what users meet.
FOR_DEVELOPERS = ("dev", "docs")
# Named by no extra: one set of versions must hold them and the rest.
PLANNED = ("tensorboard", "pybind11")
NOT_LOCKED = re.compile(r"torch|triton|pytorch-triton.*|(nvidia|cuda)-.*")
TESTS = ("tests/test_readme.py", "tests/test_examples.py", "tests/unimed", "tests/integrations")
# In this order, as many as the time allows.
SAMPLE = (
    "tests/test_readme.py",
    *(f"tests/unimed/test_{name}.py" for name in ("model_forward", "model_generate", "model_lora", "model_save", "data_volumes")),
    *("tests/integrations/test_experts.py", "tests/integrations/test_routers.py", "tests/integrations/test_projectors.py"),
)


def project(path: Path = ROOT / "pyproject.toml") -> dict[str, Any]:
    return tomllib.loads(path.read_text())


def requirements(settings: dict[str, Any], extras: Iterable[str]) -> list[Requirement]:
    """The requirements of the extras, those of the base package first; an extra that names others is written out."""
    table = settings["project"]
    own, pending, found = canonicalize_name(table["name"]), list(extras), [Requirement(line) for line in table["dependencies"]]
    seen: set[str] = set()
    while pending:
        extra = pending.pop(0)
        if extra in seen:
            continue
        seen.add(extra)
        for requirement in map(Requirement, table["optional-dependencies"][extra]):
            if canonicalize_name(requirement.name) == own:
                pending += sorted(requirement.extras)
            else:
                found.append(requirement)
    return list({str(requirement): requirement for requirement in found}.values())


def run_time_extras(settings: dict[str, Any]) -> list[str]:
    return [extra for extra in settings["project"]["optional-dependencies"] if extra not in FOR_DEVELOPERS]


def run_time(settings: dict[str, Any]) -> list[Requirement]:
    """What users meet, without torch."""
    return [r for r in requirements(settings, run_time_extras(settings)) if not NOT_LOCKED.fullmatch(canonicalize_name(r.name))]


def without_upper_end(requirement: Requirement) -> Requirement:
    """The newest that the name admits; an exact version stays, since no range was meant."""
    newest = Requirement(str(requirement))
    newest.specifier = SpecifierSet(",".join(str(part) for part in requirement.specifier if part.operator not in ("<", "<=")))
    return newest


def lower_end(requirement: Requirement) -> Requirement:
    (floor,) = [part for part in requirement.specifier if part.operator in (">=", "==", "~=")]
    oldest = Requirement(str(requirement))
    oldest.specifier = SpecifierSet(f"=={floor.version}")
    return oldest


def versions_of(report: dict[str, Any]) -> dict[str, str]:
    """Name to version of what pip's report would install, without torch and what it brings, and without local tags."""
    found = {canonicalize_name(item["metadata"]["name"]): Version(item["metadata"]["version"]).public for item in report["install"]}
    return {name: version for name, version in sorted(found.items()) if not NOT_LOCKED.fullmatch(name)}


def locked(path: Path = CONSTRAINTS) -> dict[str, str]:
    return dict(line.split("==") for line in path.read_text().splitlines() if line and not line.startswith("#"))


def resolve(wanted: Sequence[str], seconds: float | None = None) -> dict[str, str]:
    """What pip would install into an empty environment. Raises CalledProcessError with pip's own words."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.json")
        options = ("--quiet", "--dry-run", "--ignore-installed", "--retries", "1", "--report", str(report))
        command = [sys.executable, "-m", "pip", "install", *options, *wanted]
        subprocess.run(command, check=True, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=seconds)
        return versions_of(json.loads(report.read_text()))


def lock(pins: Sequence[str]) -> None:
    settings = project()
    build = settings["build-system"]["requires"]
    extras = settings["project"]["optional-dependencies"]
    wanted = [*pins, "pip", *build, *map(str, requirements(settings, extras)), *PLANNED]
    try:
        found = resolve(wanted)
    except subprocess.CalledProcessError as failed:
        sys.exit(f"pip cannot resolve this set together; {CONSTRAINTS.name} is as it was:\n{failed.stderr}")
    before = locked() if CONSTRAINTS.exists() else {}
    CONSTRAINTS.write_text(HEADER + "".join(f"{name}=={version}\n" for name, version in found.items()))
    print(f"{CONSTRAINTS.name}: {len(found)} packages; changed: {differences(before, found) or 'none'}")


def differences(before: dict[str, str], after: dict[str, str]) -> str:
    """One line; what has gone is not in it."""
    return ", ".join(f"{name} {before.get(name, '-')} -> {version}" for name, version in after.items() if before.get(name) != version)


def lane(name: str, settings: dict[str, Any]) -> list[str]:
    end = {"latest": without_upper_end, "oldest": lower_end}[name]
    versions = locked()
    tools = [r.name for r in requirements(settings, ["dev"]) if r.name.startswith(("pytest", "hypothesis"))]
    return [*(str(end(requirement)) for requirement in run_time(settings)), *(f"{tool}=={versions[tool]}" for tool in tools)]


def environment(name: str, pins: Sequence[str], wanted: Sequence[str]) -> Path:
    """A new environment beside the checkout. pip's cache keeps what was downloaded."""
    folder = ROOT / f".venv-{name}"
    python = folder / "bin" / "python"
    install = (python, "-m", "pip", "install", "--quiet")
    subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
    subprocess.run([*install, f"pip=={locked()['pip']}"], check=True)
    subprocess.run([*install, *pins], check=True)
    subprocess.run([*install, *pins, *wanted], check=True)
    return python


def installed(python: Path) -> dict[str, str]:
    listed = subprocess.run([python, "-m", "pip", "list", "--format", "json"], check=True, capture_output=True, text=True).stdout
    return {canonicalize_name(item["name"]): item["version"] for item in json.loads(listed)}


def test(name: str, pins: Sequence[str], jobs: int) -> int:
    try:
        python = environment(name, pins, lane(name, project()))
    except subprocess.CalledProcessError as failed:  # pip has said why
        sys.exit(f"{name}: {' '.join(map(str, failed.cmd[1:]))} ended with exit code {failed.returncode}; no test ran")
    versions = installed(python)
    print(f"{name}: {', '.join(f'{r.name} {versions[canonicalize_name(r.name)]}' for r in run_time(project()))}", flush=True)
    return subprocess.run([python, "-m", "pytest", "-n", str(jobs), "--dist", "loadfile", *TESTS], cwd=ROOT).returncode


def overlay(wanted: Sequence[str], seconds: float) -> Path:
    """An environment that holds these packages only and finds all else in the one that runs this."""
    folder = ROOT / ".venv-sample"
    python = folder / "bin" / "python"
    subprocess.run([sys.executable, "-m", "venv", "--clear", "--without-pip", folder], check=True, capture_output=True, text=True)
    (packages,) = folder.glob("lib/python3*/site-packages")
    (packages / "other.pth").write_text("\n".join(site.getsitepackages()))
    command = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps", *wanted]
    subprocess.run(command, check=True, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=seconds)
    return python


def run_until(command: Sequence[object], seconds: float) -> str:
    """What a command has written when it ends or the time is up."""
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(
            [*map(str, command)],
            cwd=ROOT,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            process.wait(timeout=max(seconds, 0))
        except subprocess.TimeoutExpired:
            pass
        finally:  # also those that it has started
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        output.seek(0)
        return output.read()


def sample(pins: Sequence[str], jobs: int, seconds: float) -> str:
    """For CI, which must not fail because others released something: what would break, in words."""
    end = time.monotonic() + seconds
    try:
        found = resolve([*pins, *lane("latest", project())], end - time.monotonic())
    except subprocess.TimeoutExpired:
        return "passed over: no index answered in time"
    except subprocess.CalledProcessError as failed:
        conflict = [line for line in failed.stderr.splitlines() if "ResolutionImpossible" in line or "conflict" in line]
        return f"passed over: {conflict[0] if conflict else 'no index answers'}"
    before = locked()
    other = [f"{name}=={version}" for name, version in found.items() if before.get(name) != version]
    if not other:
        return "nothing is newer than constraints.txt"
    newer = f"newer than constraints.txt: {differences(before, found)}"
    try:
        python = overlay(other, end - time.monotonic())
    except subprocess.TimeoutExpired:
        return f"{newer}; passed over: {seconds:.0f} s were too short"
    except subprocess.CalledProcessError as failed:
        return f"{newer}; they do not install: {' '.join(failed.stderr.split())[-300:]}"
    output = run_until((python, "-m", "pytest", "-v", "-n", jobs, "--dist", "loadfile", *SAMPLE), end - time.monotonic())
    # One line a test as it ends, and at the end of all, where the time was enough, one with the reason for each that failed.
    verdicts = re.findall(r"^(?:\[gw\d+\] \[ *\d+%\] )?(PASSED|FAILED|ERROR) (\S.*?)(?: - (.*))?\s*$", output, flags=re.MULTILINE)
    broken = {
        test: f"{verdict} {test}: {reason or 'no reason was written in time'}" for verdict, test, reason in verdicts if verdict != "PASSED"
    }
    ran = len({test for _, test, _ in verdicts})
    return "\n".join([newer, f"would break: {len(broken)} of {ran} tests that ran in {seconds:.0f} s", *broken.values()])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["lock", "latest", "oldest", "dev"])
    parser.add_argument("--pin", action="append", default=[], help="a requirement of torch or triton")
    parser.add_argument("--jobs", type=int, default=2, help="processes of pytest")
    parser.add_argument("--sample", type=float, metavar="SECONDS", help="latest only: as much as fits into this time, and never an error")
    given = parser.parse_args()
    if given.what == "lock":
        lock(given.pin)
    elif given.what == "dev":
        print("\n".join(map(str, requirements(project(), ["dev"]))))
    elif given.what == "latest" and given.sample:
        print(f"test-latest, sampled: {sample(given.pin, given.jobs, given.sample)}")
    else:
        return test(given.what, given.pin, given.jobs)
    return 0


if __name__ == "__main__":
    sys.exit(main())
