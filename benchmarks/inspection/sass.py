"""What nvcc makes of the CUDA kernels: registers, stack, shared memory and instructions of each, per architecture.

    python -m benchmarks.inspection.sass [--write] [--only words]

Reads the object files of the library (compiled where they are missing or stale) with cuobjdump: from the CUDA toolkit, the PATH, or inside
the triton wheel. No GPU. ``--write`` puts the table into benchmarks/results/sass.json, which tests/native/test_sass.py holds against what
is compiled; `make docs` shows it. ``--unchanged`` says by its exit code whether the table was made from the sources that are here: CI then
leaves nvcc out.
"""

import argparse
import functools
import hashlib
import importlib.util
import inspect
import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
TABLE = ROOT / "benchmarks" / "results" / "sass.json"
# Tensor cores, asynchronous copies, matrix loads, floating-point products, atomics, spills; what orders warpgroups and copies.
COUNTED = (
    "HMMA",
    "HGMMA",
    "LDGSTS",
    "UTMALDG",
    "LDSM",
    "FFMA",
    "ATOM",
    "ATOMS",
    "ATOMG",
    "RED",
    "REDG",
    "STL",
    "LDL",
    "FENCE",
    "WARPGROUP",
    "USETMAXREG",
)
ATOMICS = ("ATOMS", "ATOMG", "ATOM", "RED", "REDG")
REGISTERS, SHARED, MOST_WARPS = 65536, {"sm_80": 164 << 10, "sm_90a": 228 << 10}, 64

HEAD = """# What nvcc makes of the CUDA kernels

Written by `make docs`; read by `python -m benchmarks.inspection.sass --write` from the cubins of the library ({built}).
No kernel spills. No GPU was needed.
"shared" is static shared memory in bytes (on sm_90a with the 1024 that the system keeps).
"""


@functools.cache
def cuobjdump() -> str | None:
    """The disassembler's path."""
    places = [Path(os.environ[name], "bin") for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    spec = importlib.util.find_spec("triton")
    if spec and spec.origin:
        places.append(Path(spec.origin).parent / "backends" / "nvidia" / "bin")
    return next((str(p / "cuobjdump") for p in places if (p / "cuobjdump").exists()), shutil.which("cuobjdump"))


def digest() -> str:
    """Of the kernels' sources with what they include, and of how nvcc is called: what the table follows from, but for nvcc's version."""
    # By its place: nothing is installed yet in CI.
    spec = importlib.util.spec_from_file_location("build_native", ROOT / "csrc" / "build.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    root = ROOT.resolve()
    seen, left = set(), [root / source for source in script.CUDA_SOURCES if source.endswith(".cu")]
    while left:
        if (file := left.pop()) not in seen:
            seen.add(file)
            included = [(file.parent / name).resolve() for name in re.findall(r'^#include "(.+)"', file.read_text(), re.M)]
            left += [one for one in included if one.is_file()]  # the emulator's are not nvcc's, and lie elsewhere
    found = hashlib.sha256(inspect.getsource(script._toolkit).encode())
    for file in sorted(seen):
        found.update(f"\n{file.relative_to(root)}\n".encode() + file.read_bytes())
    return found.hexdigest()


def unchanged() -> bool:
    """Whether the committed table was made from the sources that are here."""
    return json.loads(TABLE.read_text()).get("digest") == digest()


def missing() -> str | None:
    """Why there is nothing to read here."""
    from tests.builds import build_script

    script = build_script()
    return script.missing() or script.cuda_toolkit().missing or (None if cuobjdump() else "there is no cuobjdump (CUDA toolkit, or triton)")


def kernels(path: Path) -> dict[str, dict[str, dict[str, Any]]]:
    """{kernel: {architecture: its figures}} of an object file."""
    usage, code = (_run(cuobjdump(), f"-{what}", path) for what in ("res-usage", "sass"))
    found: dict[str, dict[str, dict[str, Any]]] = {}
    arch = name = ""
    for line in usage.splitlines():
        if match := re.match(r"\s*arch = (\w+)", line):
            arch = match[1]
        elif match := re.match(r"\s*Function (\S+):", line):
            name = match[1]
        elif "REG:" in line and name:
            figures = dict(re.findall(r"(REG|STACK|SHARED):(\d+)", line))
            figures = {key: int(figures[old]) for key, old in (("registers", "REG"), ("stack", "STACK"), ("shared", "SHARED"))}
            found.setdefault(name, {})[arch], name = figures, ""
    for line in code.splitlines():
        if match := re.match(r"\s*code for (\w+)", line):
            arch = match[1]
        elif match := re.match(r"\s*Function : (\S+)", line):
            name = match[1]
            found[name][arch]["counts"] = Counter()
        elif (match := re.match(r"\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9]+)([.A-Z0-9_]*)", line)) and match[1] in COUNTED:
            found[name][arch]["counts"][match[1]] += 1
            if match[1] in ATOMICS and re.search(r"\.(F\d|BF)", match[2]):
                found[name][arch]["counts"]["float atomics"] += 1
    plain = _run("c++filt", stdin="\n".join(found)).splitlines()
    return {_short(name): arches for name, arches in zip(plain, found.values(), strict=True)}


def _short(name: str) -> str:
    """A kernel's name without what is the same for all, or differs with the place of the file."""
    name = re.sub(r"\(anonymous namespace\)::|_GLOBAL__N__\w+::|cmoe::cuda::", "", name)
    name = re.sub(r"^void ", "", name).replace("__nv_bfloat16", "bf16").replace("__half", "fp16")
    return name[: _end_of_name(name)]


def _end_of_name(name: str) -> int:
    """Where the parameters begin: the first bracket outside the template's arguments."""
    depth = 0
    for i, c in enumerate(name):
        depth += (c == "<") - (c == ">")
        if c == "(" and depth == 0:
            return i
    return len(name)


def _run(*command: Any, stdin: str | None = None) -> str:
    return subprocess.run([str(c) for c in command], input=stdin, capture_output=True, text=True, check=True).stdout


def table(only: Sequence[str] = ()) -> dict[str, dict[str, dict[str, dict[str, Any]]]]:
    """{source: {kernel: {architecture: its figures}}}"""
    from tests.builds import cuda_objects

    objects = cuda_objects()
    return {source: kernels(path) for source, path in sorted(objects.items()) if not only or any(word in source for word in only)}


def blocks(figures: dict[str, Any], threads: int, arch: str) -> int:
    """Blocks of this many threads that fit a multiprocessor: by registers, warps and static shared memory."""
    warps = (threads + 31) // 32
    registers = -(-figures["registers"] // 8) * 8 * 32 * warps
    return min(REGISTERS // registers, MOST_WARPS // warps, SHARED[arch] // (figures["shared"] + 1024))


def page(found: dict[str, Any], built: str) -> str:
    """The page."""
    lines = [HEAD.format(built=built)]
    for source, by_name in found.items():
        lines.append(f"\n## {source}\n\n| kernel | architecture | registers | shared | instructions |\n| --- | --- | --- | --- | --- |")
        for name, arches in sorted(by_name.items()):
            for arch, f in sorted(arches.items()):
                counts = ", ".join(f"{n} {op}" for op, n in sorted(f["counts"].items()))
                lines.append(f"| `{name}` | {arch} | {f['registers']} | {f['shared']} | {counts} |")
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--only", default="", help="comma-separated words; the sources whose name has one")
    parser.add_argument("--unchanged", action="store_true", help="nothing but an exit code: 0 where the table is of these sources")
    options = parser.parse_args(arguments)
    if options.unchanged:
        return 0 if unchanged() else 1
    if reason := missing():
        print(f"sass: {reason}", file=sys.stderr)
        return 2
    from tests.builds import build_script

    found = table([word for word in options.only.split(",") if word])
    built = build_script().cuda_toolkit().built
    if options.write:
        before = json.loads(TABLE.read_text())["sources"] if TABLE.exists() and options.only else {}
        of_all = {} if options.only else {"digest": digest()}  # a table in parts is of several states
        TABLE.write_text(json.dumps({"built": built, **of_all, "sources": before | found}, indent=1, sort_keys=True) + "\n")
    else:
        print(page(found, built))
    return 0


if __name__ == "__main__":
    sys.exit(main())
