"""Plant each bug in a copy of the tree and see that the tests named beside it fail.

    python -m tests.mutants [--sample 3] [--only TEXT] [--jobs 2]

Before the mutants, the tests of all of them run once on the tree as it is, where they must pass. Survivors are listed at the end, and so
are mutants of which nothing can be said (a text that is gone, tests that were not found or took too long); the exit status is then 1.
"""

import argparse
import os
import queue
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.mutants import Mutant, Suite
from tests.mutants.triton import MUTANTS as TRITON

MUTANTS = [*TRITON]
ROOT = Path(__file__).parents[2]
LIMIT = 300
# Everything that a build or a run leaves behind, but for the native library.
LEFT_OUT = shutil.ignore_patterns(".*", "build", "dist", "runs", "*.egg-info", "__pycache__")


def run(suite: Suite, tests: tuple[str, ...], tree: Path) -> tuple[int | None, str]:
    """The tests' exit status, None where they took too long; and the end of what they wrote."""
    # Bytecode goes by a file's time and size, and a mutant may change neither.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1", **suite.environment}
    for command in (*suite.before, (*suite.command, *tests)):
        try:
            done = subprocess.run(
                command, cwd=tree, env=environment, timeout=LIMIT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
            )
        except subprocess.TimeoutExpired:
            return None, f"stopped after {LIMIT} s"
        if done.returncode:
            break
    return done.returncode, done.stdout[-2000:]


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
        status, output = run(mutant.suite, mutant.tests, tree)
    finally:
        file.write_text(text)
    if status == mutant.suite.failed:
        return "caught"
    return "survived" if status == 0 else f"no test failed, but exit status {status}: {output}"


def sample(mutants: list[Mutant], count: int) -> list[Mutant]:
    """Some of them, spread evenly."""
    return [mutants[(2 * i + 1) * len(mutants) // (2 * count)] for i in range(min(count, len(mutants)))]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sample", type=int, help="that many, spread over the list")
    parser.add_argument("--only", default="", help="those with this text in their line")
    parser.add_argument("--jobs", type=int, default=1)
    options = parser.parse_args()
    mutants = [m for m in MUTANTS if options.only in str(m)]
    mutants = sample(mutants, options.sample) if options.sample else mutants
    suites = list(dict.fromkeys(m.suite for m in mutants))
    controls = [(suite, tuple(sorted({test for m in mutants if m.suite == suite for test in m.tests}))) for suite in suites]
    print(f"{len(mutants)} of {len(MUTANTS)} mutants, {options.jobs} at a time", flush=True)
    start, wrong = time.perf_counter(), []

    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(options.jobs) as pool:
        trees: queue.Queue[Path] = queue.Queue()
        for i in range(options.jobs):
            trees.put(Path(shutil.copytree(ROOT, Path(folder) / str(i), ignore=LEFT_OUT)))

        def control(which: tuple[Suite, tuple[str, ...]]) -> str:
            tree = trees.get()
            status, output = run(*which, tree)
            trees.put(tree)
            return "passes" if status == 0 else f"fails on the tree as it is (status {status}): {output}"

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
            if wrong:
                break
    print("\n\n".join(wrong) or "all caught")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
