"""The versions that are installed and tested: constraints.txt, and the two ends of the ranges in pyproject.toml.

    python -m tools.versions lock      resolves the newest of every range together and writes constraints.txt
    python -m tools.versions latest    .venv-latest: ranges without their upper end; runs the tests of what uses these packages
    python -m tools.versions oldest    .venv-oldest: the lower end of each range; runs the same tests

The Makefile calls these and says which torch and triton: --pin torch==2.13.0. Those two, and what a CUDA build of torch brings, are
never in constraints.txt, so an environment that has a torch keeps it. The tests run from the checkout with its own native library.
"""

import argparse
import json
import os
import re
import signal
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
# Named by no extra yet: a browser page, a server, more readers, the build by ninja. One set of versions must hold them and the rest.
PLANNED = (
    *("gradio", "fastapi", "uvicorn", "httpx", "openai", "playwright", "pydantic", "jinja2", "pyarrow"),
    *("pyjpegls", "pylibjpeg-openjpeg", "sacrebleu", "rouge-score", "tensorboard"),
    *("ninja", "pybind11", "clang-format"),
)
NOT_LOCKED = re.compile(r"torch|triton|pytorch-triton.*|(nvidia|cuda)-.*")
# In this order; a sample runs as many as its time allows.
TESTS = ("tests/test_readme.py", "tests/test_examples.py", "tests/unimed", "tests/integrations")


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
    """The names of both whose versions differ, as one line."""
    return ", ".join(f"{name} {before[name]} -> {version}" for name, version in after.items() if before.get(name, version) != version)


def lane(name: str, settings: dict[str, Any]) -> list[str]:
    end = {"latest": without_upper_end, "oldest": lower_end}[name]
    versions = locked()
    tools = [r.name for r in requirements(settings, ["dev"]) if r.name.startswith(("pytest", "hypothesis"))]
    return [*(str(end(requirement)) for requirement in run_time(settings)), *(f"{tool}=={versions[tool]}" for tool in tools)]


class Out(Exception):
    """The time of a sample is used up."""


class Clock:
    def __init__(self, seconds: float | None):
        self.end = None if seconds is None else time.monotonic() + seconds

    def left(self) -> float | None:
        return None if self.end is None else self.end - time.monotonic()


def call(command: Sequence[object], clock: Clock, capture: bool = False) -> tuple[int, str]:
    """Runs a command in a process group of its own. When time is up it is interrupted, as by Ctrl-C: pytest then says what it has found."""
    output = subprocess.PIPE if capture else None
    process = subprocess.Popen(
        [*map(str, command)], cwd=ROOT, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    try:
        text, _ = process.communicate(timeout=clock.left())
    except subprocess.TimeoutExpired as late:
        os.killpg(process.pid, signal.SIGINT)
        try:
            text, _ = process.communicate(timeout=10)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            raise Out from late
        if not capture:
            raise Out from late
    return process.returncode, text or ""


def environment(name: str, wanted: Sequence[str], pins: Sequence[str], clock: Clock, quiet: bool = False) -> Path:
    """A new environment beside the checkout. pip's cache keeps what was downloaded."""
    folder = ROOT / f".venv-{name}"
    python = folder / "bin" / "python"
    install = (python, "-m", "pip", "install", "--quiet")
    steps = [
        (sys.executable, "-m", "venv", "--clear", folder),
        (*install, f"pip=={locked()['pip']}"),
        (*install, *pins),
        (*install, *pins, *wanted),
    ]
    for step in steps:
        code, text = call(step, clock, capture=quiet)
        if code:
            raise subprocess.CalledProcessError(code, step, text)
    return python


def installed(python: Path) -> dict[str, str]:
    listed = subprocess.run([python, "-m", "pip", "list", "--format", "json"], check=True, capture_output=True, text=True).stdout
    return {canonicalize_name(item["name"]): item["version"] for item in json.loads(listed)}


def test(name: str, pins: Sequence[str], jobs: int) -> int:
    try:
        python = environment(name, lane(name, project()), pins, Clock(None))
    except subprocess.CalledProcessError as failed:
        return failed.returncode
    versions = installed(python)
    print(f"{name}: {', '.join(f'{r.name} {versions[canonicalize_name(r.name)]}' for r in run_time(project()))}", flush=True)
    code, _ = call((python, "-m", "pytest", "-n", jobs, "--dist", "loadfile", *TESTS), Clock(None))
    return code


def sample(pins: Sequence[str], jobs: int, seconds: float) -> str:
    """For CI, which must not fail because others released something: what would break, in words."""
    clock, wanted = Clock(seconds), lane("latest", project())
    try:
        found = resolve([*pins, *wanted], clock.left())
    except subprocess.TimeoutExpired:
        return "passed over: no index answered in time"
    except subprocess.CalledProcessError as failed:
        conflict = "ResolutionImpossible" in failed.stderr or "conflict" in failed.stderr
        reason = failed.stderr.strip().splitlines()[-1:] if conflict else ["no index answers"]
        return f"passed over: {' '.join(reason)}"
    newer = differences(locked(), found)
    if not newer:
        return "nothing is newer than constraints.txt"
    try:
        python = environment("latest", wanted, pins, clock, quiet=True)
        _, text = call((python, "-m", "pytest", "-q", "-n", jobs, "--dist", "loadfile", *TESTS), clock, capture=True)
    except Out:
        return f"newer: {newer}; passed over: {seconds:.0f} s were too short"
    except subprocess.CalledProcessError as failed:
        return f"newer: {newer}; they do not install: {' '.join((failed.stdout or '').split())[-300:]}"
    broken = re.findall(r"^(?:FAILED|ERROR) .*", text, flags=re.MULTILINE)
    (ran,) = re.findall(r"^.*\d+ (?:passed|failed|error).*$", text, flags=re.MULTILINE)[-1:] or ["no test ran"]
    return "\n".join([f"newer: {newer}", f"would break: {len(broken)} ({ran.strip('= ')})", *broken])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["lock", "latest", "oldest"])
    parser.add_argument("--pin", action="append", default=[], help="a requirement of torch or triton")
    parser.add_argument("--jobs", type=int, default=2, help="processes of pytest")
    parser.add_argument("--sample", type=float, metavar="SECONDS", help="latest only: as much as fits into this time, and never an error")
    given = parser.parse_args()
    if given.what == "lock":
        lock(given.pin)
    elif given.what == "latest" and given.sample:
        print(f"test-latest, sampled: {sample(given.pin, given.jobs, given.sample)}")
    else:
        return test(given.what, given.pin, given.jobs)
    return 0


if __name__ == "__main__":
    sys.exit(main())
