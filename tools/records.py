"""Every record in git that a program writes: which are stale, and all of those anew. `make records`, `make records CHECK=1`.

    python -m tools.records [--check] [--only words] [--jobs N]

A record is stale where it is not what its program would write now. Times of benchmarks are no records: they are of a day and a machine.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]


class Record(NamedTuple):
    """``stale`` says why the file must be written anew, or nothing; it raises Unknown where that cannot be told here."""

    file: str
    stale: Callable[[], str]
    module: str
    options: tuple[str, ...] = ()


class Unknown(Exception):
    """Why nothing can be said of a record on this machine."""


def _aot() -> str:
    from benchmarks.inspection import aot

    rows, wanted = {row["key"] for row in aot.read()}, {launch.key for target in aot.TARGETS for launch in aot.compiled(target)}
    return f"{len(wanted - rows)} launches have no row, {len(rows - wanted)} rows have no launch" if rows != wanted else ""


def _sass() -> str:
    from benchmarks.inspection import sass

    if reason := sass.missing():
        raise Unknown(reason)
    committed = json.loads(sass.TABLE.read_text())
    from tests.builds import build_script

    built = build_script().cuda_toolkit().built
    if committed["built"] != built:
        raise Unknown(f"it is of {committed['built']}, here is {built}")
    found = sass.table()
    other = sorted(s for s in found.keys() | committed["sources"].keys() if found.get(s) != committed["sources"].get(s))
    return f"other figures: {', '.join(other)}" if other else "" if sass.unchanged() else "other sources, with the same figures"


def _roofline() -> str:
    from benchmarks.inspection import roofline

    return "other counts" if roofline.RESULTS.read_text() != roofline.text(roofline.predict()) else ""


def _verdicts() -> str:
    from tests.mutants import __main__ as mutants

    record = mutants.verdicts()
    missing = sum(m.key not in record for m in mutants.MUTANTS)
    return f"{missing} of {len(mutants.MUTANTS)} planted bugs have no verdict" if missing else ""


def _readme() -> str:
    from benchmarks import record, report

    text = report.README.read_text()
    wanted = report.insert(text, report.readme(record.documents(), record.documents(suites=[report.MODELS])))
    return "other rows" if wanted != text else ""


def _families() -> str:
    from docs import experts

    return "other families" if (ROOT / "docs/kernels/experts_table.md").read_text() != experts.table() else ""


RECORDS = (
    Record("benchmarks/results/aot.json", _aot, "benchmarks.inspection.aot", ("--missing", "--write", "--jobs")),
    Record("benchmarks/results/sass.json", _sass, "benchmarks.inspection.sass", ("--write",)),
    Record("benchmarks/results/roofline.json", _roofline, "benchmarks.inspection.roofline", ("--write",)),
    Record("tests/mutants/verdicts.json", _verdicts, "tests.mutants", ("--missing", "--write", "--jobs")),
    Record("README.md", _readme, "benchmarks.report"),
    Record("docs/kernels/experts_table.md", _families, "docs.experts"),
)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m tools.records", description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="say which are stale, and write nothing")
    parser.add_argument("--only", default="", help="comma-separated words; the records whose file has one")
    parser.add_argument("--jobs", type=int, default=1)
    options = parser.parse_args(arguments)
    chosen = [r for r in RECORDS if not options.only or any(word in r.file for word in options.only.split(","))]
    bad = 0
    for record in chosen:
        try:
            reason = record.stale()
        except Unknown as unknown:
            print(f"{record.file}: cannot be checked here: {unknown}", flush=True)
            continue
        print(f"{record.file}: {f'stale: {reason}' if reason else 'up to date'}", flush=True)
        if reason and not options.check:
            last = (str(options.jobs),) if "--jobs" in record.options else ()
            command = [sys.executable, "-m", record.module, *record.options, *last]
            reason = "it could not be written" if subprocess.run(command, cwd=ROOT, check=False).returncode else ""
        bad += bool(reason)
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main())
