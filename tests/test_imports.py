"""No two files of the package import each other, not even for their types."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def modules(package: str) -> dict[str, Path]:
    files = (ROOT / package).rglob("*.py")
    return {".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): p for p in files}


def imported(path: Path, known: dict[str, Path]) -> set[str]:
    """The files that one names in its import statements; a package's own __init__ counts where a name is taken from it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            inside = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= inside & known.keys() or {node.module}
    return found & known.keys()


@pytest.mark.parametrize("package", ["cmoe_kernels", "unimed"])
def test_no_circles(package):
    known = modules(package)
    assert len(known) > 40
    # graphlib raises CycleError, which names the files.
    assert set(TopologicalSorter({name: imported(path, known) for name, path in known.items()}).static_order()) == set(known)
