"""Writes the pages of docs/ that are made from records: `python -m docs.pages`, which `make docs` runs. They are not in git.

evidence/benchmarks.md and its plots    benchmarks/results/*.json of `make bench`
evidence/aot.md                         benchmarks/results/aot.json
evidence/sass.md                        benchmarks/results/sass.json
evidence/roofline.md and its plot       counted anew
evidence/mutants.md                     tests/mutants/verdicts.json
"""

import json
from pathlib import Path

from benchmarks import report
from benchmarks.inspection import aot, roofline, sass
from tests.mutants import __main__ as mutants

EVIDENCE = Path(__file__).parent / "evidence"


def main() -> None:
    EVIDENCE.mkdir(exist_ok=True)
    report.write_pages(EVIDENCE)
    (EVIDENCE / "aot.md").write_text(aot.page(aot.read()))
    table = json.loads(sass.TABLE.read_text())
    (EVIDENCE / "sass.md").write_text(sass.page(table["sources"], table["built"]))
    (EVIDENCE / "mutants.md").write_text(mutants.page(mutants.verdicts()))
    rows = roofline.predict()
    (EVIDENCE / "roofline.md").write_text(roofline.page(rows))
    roofline.plot(rows, EVIDENCE / "roofline.png")


if __name__ == "__main__":
    main()
