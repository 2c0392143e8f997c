"""What nvcc makes of the CUDA kernels is within its budgets, and is what the committed table says.

For the architectures of the library that is installed; `make test-full` compiles for all. In CI nvcc compiles, for sm_90a alone, where the
table is not of these very sources, and is left out where it is.
"""

import json
import re
import shutil
from pathlib import Path

import pytest

from benchmarks.inspection import sass
from cmoe_kernels import native
from tests.builds import build_script
from tests.sampling import FULL

REASON = sass.missing()
if REASON is None and not FULL and not native.cuda_kernels().built and sass.unchanged():
    REASON = "the table was made from these sources, and the library here has no CUDA kernels; `make test-full` compiles them"
COMMITTED = json.loads(sass.TABLE.read_text())
# Kernels over rows: blocks of 256 threads, of which a multiprocessor is to hold four at least.
ROWS = ("soft_gate", "topk_gate", "sort_by_expert", "balance_loss")


@pytest.fixture(scope="module", autouse=True)
def _architectures():
    installed = re.findall(r"sm_(\w+)", native.cuda_kernels().built)
    with pytest.MonkeyPatch.context() as patch:
        if installed and not FULL:
            patch.setenv("CMOE_CUDA_ARCHS", ";".join(installed))
        yield


@pytest.fixture(scope="module")
def found(_architectures):
    if REASON:
        pytest.skip(REASON)
    return sass.table()


def built():
    """The architectures, and the compiler's version."""
    archs, version = build_script().cuda_toolkit().built.split("; ")
    return {part for part in archs.split(", ") if part.startswith("sm_")}, version


def every_kernel(table):
    return [(s, k, arch, figures) for s, names in table.items() for k, arches in names.items() for arch, figures in arches.items()]


def test_no_kernel_spills(found):
    for source, kernel, arch, figures in every_kernel(found):
        counts = figures["counts"]
        assert figures["stack"] == 0, (source, kernel, arch)
        assert not counts.get("STL", 0) + counts.get("LDL", 0), (source, kernel, arch)


def test_atomics_are_of_integers(found):
    """Sums of floats would depend on the order."""
    atomics = {
        (source, kernel): figures["counts"]
        for source, kernel, _, figures in every_kernel(found)
        if set(figures["counts"]) & set(sass.ATOMICS)
    }
    assert {source for source, _ in atomics} == {"csrc/cuda/balance_loss.cu", "csrc/cuda/topk_gate.cu"}
    assert not [kernel for kernel, counts in atomics.items() if "float atomics" in counts]


def test_every_kernel_is_there_for_every_architecture(found):
    archs = {arch for *_, arch, _ in every_kernel(found)}
    assert archs == built()[0]
    for source, names in found.items():
        assert names, source
        for kernel, arches in names.items():
            assert arches.keys() == archs, (source, kernel)


def test_blocks_of_the_row_kernels_fit(found):
    seen = 0
    for source, kernel, arch, figures in every_kernel(found):
        if Path(source).stem in ROWS:
            assert sass.blocks(figures, 256, arch) >= 4, (source, kernel, arch, figures)
            seen += 1
    assert seen


def test_products_of_sm90_use_its_instructions(found):
    """Also the fences, which the emulator does not miss, and the registers that one warpgroup leaves to two."""
    on_sm90 = [(k, f) for source, k, arch, f in every_kernel(found) if source.endswith("_sm90.cu") and arch == "sm_90a"]
    kernels = [(k, f) for k, f in on_sm90 if "gemm" in k or "wgrad" in k]
    assert kernels
    for kernel, figures in kernels:
        counts = figures["counts"]
        for instruction, least in (("HGMMA", 4), ("UTMALDG", 2), ("LDGSTS", 1), ("USETMAXREG", 2), ("WARPGROUP", 3), ("FENCE", 2)):
            assert counts.get(instruction, 0) >= least, (kernel, instruction)
        assert "HMMA" not in counts
        assert figures["registers"] * 384 <= sass.REGISTERS


def test_the_committed_table(found):
    """The same kernels; and the same figures where the compiler is the same."""
    table = COMMITTED["sources"]
    known = {source: names for source, names in found.items() if source in table}
    assert {s: set(names) for s, names in table.items()} == {s: set(names) for s, names in known.items()}
    archs, version = built()
    if not COMMITTED["built"].endswith(version) or not all(arch in COMMITTED["built"] for arch in archs):
        pytest.skip(f"the table is of {COMMITTED['built']}")
    for source, kernel, arch, figures in every_kernel(known):
        assert figures == table[source][kernel][arch], f"{source}: {kernel} on {arch}: python -m benchmarks.inspection.sass --write"
    if new := sorted(found.keys() - table.keys()):
        pytest.skip(f"not in the table yet: {', '.join(new)} (python -m benchmarks.inspection.sass --write)")


def test_the_digest_follows_what_nvcc_reads(monkeypatch, tmp_path):
    shutil.copytree(sass.ROOT / "csrc", tmp_path / "csrc", ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(sass, "ROOT", tmp_path)
    first = sass.digest()
    (tmp_path / "csrc/cpu/experts.h").write_text("")
    assert sass.digest() == first
    for name in ("cuda/soft_gate.cu", "cuda/gemm/ring.cuh", "types.h"):
        file = tmp_path / "csrc" / name
        file.write_text(file.read_text() + "\n")
        assert sass.digest() != first
        file.write_text(file.read_text()[:-1])
        assert sass.digest() == first


def test_blocks_are_bounded_by_registers_warps_and_shared_memory():
    figures = {"registers": 64, "shared": 0}
    assert sass.blocks(figures, 256, "sm_80") == 4
    assert sass.blocks({**figures, "registers": 16}, 256, "sm_80") == 8
    assert sass.blocks({**figures, "shared": 100 << 10}, 256, "sm_80") == 1
    assert sass.blocks({**figures, "shared": 100 << 10}, 256, "sm_90a") == 2
