"""What a GPU has shown, put where it is used: `make gpu-fill FILE=benchmarks/results/gpu-....json`.

The faster of the Triton and the CUDA kernels of each op goes into ops/preferred.json for that architecture, the tiles that were timed into
ops/gemm/tiles.json, and what was verified into README's status.
"""

import json
import math
import re
import sys
import textwrap
from pathlib import Path

from benchmarks import report
from benchmarks.gpu_check import GPU_BACKENDS, ROOT, STATUSES, Results
from cmoe_kernels import backends

PREFERRED, TILES = (ROOT / "cmoe_kernels" / "ops" / name for name in ("preferred.json", "gemm/tiles.json"))
BEGIN, END = "<!-- gpu: written by make gpu-fill -->", "<!-- /gpu -->"


def preferences(results: Results) -> dict[str, dict[str, str]]:
    """Of each op, for few and for many tokens, "cuda" or "triton": by the geometric mean of times over cases where both ran."""
    times: dict[tuple[str, str], dict[str, dict[str, float]]] = {}
    for key, case in results["cases"].items():
        if "p50_ms" not in case.get("ours", {}) or case.get("backend") not in GPU_BACKENDS:
            continue
        op = "grouped_linear" if case["case"].startswith("gemm_") else next((o for o in backends.OPS if case["case"].startswith(o)), None)
        if op is not None:
            tokens = "few" if case["tokens"] <= backends.FEW else "many"
            by_backend = times.setdefault((op, tokens), {backend: {} for backend in GPU_BACKENDS})
            by_backend[case["backend"]][key.removesuffix(f"/{case['backend']}")] = case["ours"]["p50_ms"]
    found: dict[str, dict[str, str]] = {}
    for (op, tokens), by_backend in times.items():
        cuda, triton = by_backend["cuda"], by_backend["triton"]
        if cuda and cuda.keys() == triton.keys():
            found.setdefault(op, {})[tokens] = "cuda" if sum(math.log(cuda[at] / triton[at]) for at in cuda) < 0 else "triton"
    return found


def status(results: Results | None) -> str:
    """README's sentence on GPUs."""
    if results is None:
        return "Triton and CUDA kernels: checked by interpreter, emulator and compiler, **not yet run on a GPU**."
    by = {of: [name for name, step in results["steps"].items() if step["status"] == of] for of in STATUSES}
    tests = sum(step.get("tests", 0) for step in results["steps"].values())
    found = results["environment"]
    text = (
        f"Triton and CUDA kernels: run on {found['device']} ({results['date']}, torch {found['torch']}, triton {found['triton']}): "
        f"{len(by['passed'])} steps of `make gpu-check` passed, {tests} tests"
    )
    wrong = sum(len(step.get("failures", {})) for step in results["steps"].values())
    tests_of = f" ({wrong} tests)" if wrong else ""
    text += f"; **failed: {', '.join(by['failed'])}{tests_of}**" if by["failed"] else ""
    return text + (f"; ran out of time: {', '.join(by['timeout'])}." if by["timeout"] else ".")


def insert(text: str, sentence: str) -> str:
    """README with the sentence between its markers."""
    if len(re.findall(f"{re.escape(BEGIN)}.*?{re.escape(END)}", text, flags=re.DOTALL)) != 1:
        raise ValueError(f"README must have {BEGIN} and {END} once, in this order")
    head, rest = text.split(BEGIN)
    lines = "".join(f"\n> {line}" for line in textwrap.wrap(sentence, 150, break_on_hyphens=False))
    return f"{head}{BEGIN}{lines}\n> {END}{rest.split(END)[1]}"


def fill(path: Path, preferred: Path = PREFERRED, tiles: Path = TILES, readme: Path = report.README) -> None:
    """Put what a GPU has shown where it is used: the faster backend of each op, the tiles that were timed, README's status.

    Raises:
        ValueError: the results are of a dry run.
    """
    results = json.loads(path.read_text())
    if results.get("dry_run", True):
        raise ValueError(f"{path} is of a dry run: nothing in it was measured on a GPU")
    table = json.loads(preferred.read_text())
    noted = table.setdefault("sm_" + results["environment"]["capability"].replace(".", ""), {})
    for op, found in preferences(results).items():
        noted[op] = noted.get(op, {}) | found
    preferred.write_text(json.dumps({arch: of for arch, of in table.items() if of}, indent=1) + "\n")
    lines = json.loads(tiles.read_text())
    for step in results["steps"].values():
        for line, tile in step.get("tiles", {}).items():
            # After the wildcards, as the last one counts.
            lines.pop(line, None)
            lines[line] = tile
    tiles.write_text("{\n" + ",\n".join(f"  {json.dumps(line)}: {json.dumps(tile)}" for line, tile in lines.items()) + "\n}\n")
    readme.write_text(insert(readme.read_text(), status(results)))
    print(f"{path.name}: {len(noted)} ops in {preferred.name}, {len(lines)} lines in {tiles.name}, the status in {readme.name}")
    for page in (readme, *sorted((ROOT / "docs").rglob("*.md"))):
        for number, line in enumerate(page.read_text().splitlines(), 1):
            if re.search(r"(not|has been|no) .*\bGPU\b", line, re.IGNORECASE) and "run" in line.lower():
                print(f"to be read again by hand: {page.name}:{number}: {line.strip()[:120]}")


if __name__ == "__main__":
    fill(Path(sys.argv[1]))
