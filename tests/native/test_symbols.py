"""What the object files hold: instructions stay in the files that are compiled for them."""

import platform
import re
import shutil
import subprocess

import pytest

from tests.builds import ROOT, product_objects

pytestmark = pytest.mark.skipif(platform.system() != "Linux" or platform.machine() != "x86_64", reason="reads ELF files of x86-64")
TABLE = {"generic": {"isa_generic", "microkernel_f64", "row_functions_f64"}}


@pytest.fixture(scope="module")
def files():
    return {source: ROOT / path for source, path in product_objects().items()}


def symbols(path):
    elffile = pytest.importorskip("elftools.elf.elffile")
    with open(path, "rb") as file:
        for symbol in elffile.ELFFile(file).get_section_by_name(".symtab").iter_symbols():
            yield symbol.name, symbol["st_info"]["bind"], symbol["st_shndx"]


def test_instruction_sets_define_their_tables_alone(files):
    """An inline function that such a file shares with another would be merged with it, instructions and all."""
    seen = []
    for source, path in files.items():
        if "/gemm/" not in source:
            continue
        stem = source.rsplit("/", 1)[1].removesuffix(".cpp")
        seen.append(stem)
        outward = {(name, bind) for name, bind, section in symbols(path) if section != "SHN_UNDEF" and bind != "STB_LOCAL"}
        assert outward == {(f"_ZN4cmoe3cpu{len(t)}{t}E", "STB_GLOBAL") for t in TABLE.get(stem, {f"isa_{stem}"})}, source
    assert "generic" in seen


BASELINE = re.compile(r"%[yz]mm|%xmm(1[6-9]|2\d|3[01])|%k[0-7]|%tmm|\bv[a-z]+(ps|pd|ss|sd|d|q|w|b)\b|\b(tileloadd?|tdp\w+)\b")


def test_portable_files_hold_baseline_instructions(files):
    if shutil.which("objdump") is None:
        pytest.skip("objdump (binutils) is not installed")
    checked = 0
    for source, path in files.items():
        if "/gemm/" in source and not source.endswith("generic.cpp"):
            continue
        text = subprocess.run(["objdump", "-d", "--no-show-raw-insn", str(path)], capture_output=True, text=True, check=True).stdout
        beyond = [line.strip() for line in text.splitlines() if BASELINE.search(line)]
        assert not beyond, f"{source}: {beyond[:3]}"
        checked += 1
    assert checked > 5


def test_the_rule_sees_other_instructions(files):
    """The pattern above finds what it must: AVX-512 in the file that is compiled for it."""
    if shutil.which("objdump") is None or not (wide := [path for source, path in files.items() if "/gemm/avx" in source]):
        pytest.skip("needs objdump and a compiler that knows AVX2")
    for path in wide:
        text = subprocess.run(["objdump", "-d", "--no-show-raw-insn", str(path)], capture_output=True, text=True, check=True).stdout
        assert sum(bool(BASELINE.search(line)) for line in text.splitlines()) > 100
