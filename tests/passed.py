"""Whether the kernels and their tests are as they were when all of them last passed: `tests/passed.json`.

    python -m tests.passed            exit code 0 where nothing has changed since, and a line about it
    python -m tests.passed --write    they have passed now; `make test` does it

In CI, where nothing has changed, a third of the cases of each of these tests run, and none of those marked ``costly``: they take up to a
minute each and say little that a machine could change. The wheel is built without its library there, and one bug is planted instead of
three. It runs before anything is installed, so it imports nothing but Python.
"""

import argparse
import datetime
import hashlib
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RECORD = ROOT / "tests" / "passed.json"
VARIABLE = "CMOE_KERNELS_UNCHANGED"  # the day when they passed
# What the tests' results follow from: the kernels, what calls and builds them, the tests, and the versions that are installed.
SOURCES = (
    *("csrc", "cmoe_kernels", "benchmarks", "tests/ops", "tests/nn", "tests/integrations", "tests/native", "tests/triton"),
    *("tests/emulation", "tests/benchmarks", "tests/builds.py", "tests/conftest.py", "tests/sampling.py", "tests/test_wheel.py"),
    *("tests/every_op.py", "tools/wheel.py", "setup.py", "pyproject.toml", "MANIFEST.in", "constraints.txt", "Makefile"),
)
SUFFIXES = (".py", ".cpp", ".cu", ".cuh", ".h", ".toml", ".txt", ".in", "Makefile")


def digest(sources: Sequence[str] = SOURCES) -> str:
    """Of every source by its name. Results and built files are not among them."""
    found = hashlib.sha256()
    for name in sources:
        path = ROOT / name
        for file in [path] if path.is_file() else sorted(path.rglob("*")):
            if file.is_file() and file.name.endswith(SUFFIXES) and "__pycache__" not in file.parts:
                found.update(f"\n{file.relative_to(ROOT)}\n".encode() + file.read_bytes())
    return found.hexdigest()


def since() -> str:
    """The day when everything passed, if nothing has changed since; else ""."""
    record = json.loads(RECORD.read_text()) if RECORD.is_file() else {}
    return record["date"] if record.get("digest") == digest() else ""


def reason() -> str:
    """Why a test marked ``costly`` is left out in this process, or ""."""
    day = os.environ.get(VARIABLE, "")
    return f"left out in CI: kernels and their tests are as on {day}, when it passed" if day else ""


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m tests.passed", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="they have passed now")
    write, day = parser.parse_args(arguments).write, since()
    if write:
        if not day:
            day = datetime.datetime.now(datetime.UTC).date().isoformat()
            RECORD.write_text(json.dumps({"date": day, "digest": digest()}, indent=1) + "\n")
        return 0
    print(day)
    return 0 if day else 1


if __name__ == "__main__":
    sys.exit(main())
