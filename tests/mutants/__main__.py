"""Plant each bug in a copy of the tree and see that the tests named beside it fail.

    python -m tests.mutants [--sample 3] [--only TEXT] [--missing] [--no-control] [--jobs 2] [--write]

Before the mutants, the tests of all of them run once on the tree as it is, where they must pass; CI, where they have just passed, leaves
that out (--no-control). Survivors are listed at the end, and so are mutants of which nothing can be said: a text that is gone, code that
does not build or run, tests that were not found or took too long. The exit status is then 1. ``--write`` notes the verdicts in
verdicts.json, beside those of mutants that were not run; `make docs` shows them.
"""

import argparse
import json
import os
import queue
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from tests.mutants import Mutant, Suite
from tests.mutants.cpu import MUTANTS as CPU
from tests.mutants.cuda_gemm import MUTANTS as CUDA_GEMM
from tests.mutants.cuda_rows import MUTANTS as CUDA_ROWS
from tests.mutants.cuda_sm90 import MUTANTS as CUDA_SM90
from tests.mutants.triton import MUTANTS as TRITON

MUTANTS = [*TRITON, *CUDA_ROWS, *CUDA_GEMM, *CUDA_SM90, *CPU]
ROOT = Path(__file__).parents[2]
LIMIT = 600
ILLEGAL_ACCESS = (-signal.SIGSEGV, -signal.SIGBUS, -signal.SIGABRT)
# Everything that a build or a run leaves behind, but for the native library.
LEFT_OUT = shutil.ignore_patterns(".*", "build", "dist", "runs", "*.egg-info", "__pycache__")


RECORD = Path(__file__).parent / "verdicts.json"


class Outcome(NamedTuple):
    """Of a suite: whether the commands before the tests passed, the last command's exit status (None: too long), what it wrote."""

    built: bool
    status: int | None
    output: str

    @property
    def end(self) -> str:
        return self.output[-2000:]


def tree_in(folder: Path) -> Path:
    """A copy of the tree; with the object files that its tests use, so that a mutant compiles no more than it changes."""
    shutil.copytree(ROOT, folder, ignore=LEFT_OUT)
    for objects in ("emulation/library", "native", "programs/products", "emulated/objects", "planted/objects"):
        if (ROOT / "build" / objects).exists():
            shutil.copytree(ROOT / "build" / objects, folder / "build" / objects)
    return folder


def run(suite: Suite, tests: tuple[str, ...], tree: Path) -> Outcome:
    # Bytecode goes by a file's time and size, and a mutant may change neither.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1", **suite.environment}
    for command in (*suite.before, (*suite.command, *tests)):
        built = command not in suite.before
        try:
            done = subprocess.run(
                command, cwd=tree, env=environment, timeout=LIMIT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
            )
        except subprocess.TimeoutExpired:
            return Outcome(built, None, f"stopped after {LIMIT} s")
        if done.returncode:
            break
    return Outcome(built, done.returncode, done.stdout)


def verdict(mutant: Mutant, tree: Path) -> str:
    """ "caught", or what is wrong."""
    file = tree / mutant.file
    text = file.read_text()
    try:
        planted = mutant.planted(text)
    except ValueError as error:
        return str(error)
    try:
        file.write_text(planted)
        found = run(mutant.suite, mutant.tests, tree)
    finally:
        file.write_text(text)
    if not found.built and found.status != 0:
        return f"broken: it does not build: {found.end}"
    if found.status == mutant.suite.failed:
        error = re.search(mutant.suite.broken, found.output, re.MULTILINE)
        return f"broken: {error[0]}" if error else "caught"
    if mutant.suite.crashes and found.status in ILLEGAL_ACCESS:
        return "caught"
    return "survived" if found.status == 0 else f"no test failed, but exit status {found.status}: {found.end}"


HEAD = """# Planted bugs

Written by `make docs`; the verdicts are those of `make mutants`. Each bug was planted in a copy of the tree, where the tests beside it
had passed; "caught" means that one of them failed then, and not because the code no longer built or ran. A bug whose text or tests have
changed since stands as "not run".
"""


def verdicts() -> dict[str, str]:
    """Of the record, by a mutant's key."""
    return json.loads(RECORD.read_text()) if RECORD.exists() else {}


def page(found: dict[str, str]) -> str:
    """The page, a line a mutant."""
    parts = [HEAD]
    for file in dict.fromkeys(m.file for m in MUTANTS):
        parts.append(f"\n## {file}\n\n| planted | kind | tests | verdict | key |\n| --- | --- | --- | --- | --- |\n")
        for m in (m for m in MUTANTS if m.file == file):
            first = (m.new.strip().splitlines() or ["(gone)"])[0].replace("|", "&#124;").replace("`", "'").replace("](", "] (")
            tests = ", ".join(test.rsplit("/", 1)[-1] for test in m.tests).replace("|", "&#124;")
            parts.append(f"| `{first}` | {m.kind} | `{tests}` | {found.get(m.key, 'not run')} | `{m.key}` |\n")
    return "".join(parts)


def sample(mutants: list[Mutant], count: int) -> list[Mutant]:
    """Some of them, spread evenly."""
    return [mutants[(2 * i + 1) * len(mutants) // (2 * count)] for i in range(min(count, len(mutants)))]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sample", type=int, help="that many, spread over the list")
    parser.add_argument("--only", default="", help="those with this text in their line")
    parser.add_argument("--missing", action="store_true", help="those not noted as caught")
    parser.add_argument("--no-control", action="store_true", help="their tests are known to pass on the tree as it is")
    parser.add_argument("--write", action="store_true", help="note the verdicts in verdicts.json")
    parser.add_argument("--jobs", type=int, default=1)
    options = parser.parse_args()
    record = verdicts()
    mutants = [m for m in MUTANTS if options.only in str(m) and not (options.missing and record.get(m.key) == "caught")]
    mutants = sample(mutants, options.sample) if options.sample else mutants
    suites = [] if options.no_control else list(dict.fromkeys(m.suite for m in mutants))
    controls = [(suite, tuple(sorted({test for m in mutants if m.suite == suite for test in m.tests}))) for suite in suites]
    print(f"{len(mutants)} of {len(MUTANTS)} mutants, {options.jobs} at a time", flush=True)
    start, wrong = time.perf_counter(), []

    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(options.jobs) as pool:
        trees: queue.Queue[Path] = queue.Queue()
        for i in range(options.jobs):
            trees.put(tree_in(Path(folder) / str(i)))

        def control(which: tuple[Suite, tuple[str, ...]]) -> str:
            tree = trees.get()
            found = run(*which, tree)
            trees.put(tree)
            return "passes" if found.status == 0 else f"fails on the tree as it is (status {found.status}): {found.end}"

        def check(mutant: Mutant) -> str:
            tree = trees.get()
            found = verdict(mutant, tree)
            trees.put(tree)
            return found

        for kind, work, items, good in (("control", control, controls, "passes"), ("mutant", check, mutants, "caught")):
            for number, (item, found) in enumerate(zip(items, pool.map(work, items), strict=True), 1):
                name = f"{len(item[1])} tests" if isinstance(item, tuple) else str(item)
                print(f"{kind} {number}/{len(items)}, {time.perf_counter() - start:.0f} s: {found.splitlines()[0]}: {name}", flush=True)
                if found != good:
                    wrong.append(f"{name}\n{found}")
                if options.write and isinstance(item, Mutant):
                    record[item.key] = found.split(":")[0]
                    keep = {m.key for m in MUTANTS}
                    RECORD.write_text(json.dumps({k: v for k, v in sorted(record.items()) if k in keep}, indent=0) + "\n")
            if wrong:
                break
    print("\n\n".join(wrong) or "all caught")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
