"""The tile layout of the AMX tier, in the object file: the test needs no AMX machine.

LDTILECFG reads 64 bytes. GCC 12's intrinsic declares only 8 of them as read, so the stores of the others may be removed, and the first tile
instruction then ends the process. The layout must be a constant: the test follows the instruction's address to the bytes in the file.
"""

import platform
import re
import shutil
import subprocess

import pytest

from tests.builds import ROOT, build_script, product_objects

pytestmark = pytest.mark.skipif(platform.system() != "Linux" or platform.machine() != "x86_64", reason="reads ELF files of x86-64")
SOURCE = "csrc/cpu/gemm/amx.cpp"
# Palette 1, start row 0, 14 reserved bytes; bytes per row of 8 tiles and of 8 that palette 1 lacks; rows of the same.
MEANT = bytes([1, 0, *[0] * 14, *[64, 0] * 8, *[0] * 16, *[16] * 8, *[0] * 8])

# "  19:\tldtilecfg 0x0(%rip)", and under an instruction that holds an address "\t\t\t1f: R_X86_64_PC32\t.rodata+0x3c".
FUNCTION, ADDRESS = re.compile(r"^[0-9a-f]+ <.*>:$"), re.compile(r": R_X86_64_PC32\t")


def layouts(path) -> list[bytes]:
    """The 64 bytes that each LDTILECFG of an object file reads; empty where they are no constant."""
    command = ["objdump", "-dr", "--no-show-raw-insn", str(path)]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    found = []
    for i, line in enumerate(lines):
        if "\tldtilecfg " not in line:
            continue
        operand = line.split("ldtilecfg ")[1].split()[0]
        if "(%rip)" in operand:
            addresses = lines[i + 1 : i + 2]
        else:  # without optimisation the address is in a register: the one address that the function takes
            first = max(at for at in range(i) if FUNCTION.match(lines[at]))
            addresses = [text for text in lines[first:i] if ADDRESS.search(text)]
        found.append(bytes_at(path, addresses[0].split("\t")[-1]) if len(addresses) == 1 and ADDRESS.search(addresses[0]) else b"")
    return found


def bytes_at(path, address: str) -> bytes:
    """64 bytes at "symbol+0x3c", counted from the end of four bytes of displacement."""
    elffile = pytest.importorskip("elftools.elf.elffile")
    name, sign, offset = re.fullmatch(r"(\S+?)(?:([+-])0x([0-9a-f]+))?", address).groups()
    start = int(f"{sign or '+'}{offset or '0'}", 16) + 4
    with open(path, "rb") as file:
        elf = elffile.ELFFile(file)
        section = elf.get_section_by_name(name)
        if section is None:
            (symbol,) = elf.get_section_by_name(".symtab").get_symbol_by_name(name)
            section, start = elf.get_section(symbol["st_shndx"]), start + symbol["st_value"]
        return section.data()[start : start + 64] if section["sh_type"] == "SHT_PROGBITS" else b""


def check(path):
    if shutil.which("objdump") is None:
        pytest.skip("objdump (binutils) is not installed")
    found = layouts(path)
    assert found
    assert found == [MEANT] * len(found)


def test_the_library_loads_the_layout_that_is_meant():
    files = product_objects()
    if SOURCE not in files:
        pytest.skip("the compiler knows no AMX")
    check(ROOT / files[SOURCE])


@pytest.mark.full  # some seconds each
@pytest.mark.parametrize("level", ["-O0", "-O1", "-O2", "-O3", "-Os"])
@pytest.mark.parametrize("compiler", ["g++", "clang++"])
def test_every_compiler_and_level(compiler, level, tmp_path):
    flags = build_script().TIERS["amx"]
    command = [compiler, *flags, "-c", "-std=c++20", level, "-fPIC", "-fvisibility=hidden", "-w", "-o", str(tmp_path / "amx.o"), SOURCE]
    if shutil.which(compiler) is None:
        pytest.skip(f"{compiler} is not installed")
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if "unrecognized command-line option" in run.stderr or "unknown argument" in run.stderr:
        pytest.skip(f"{compiler} knows no AMX")
    assert run.returncode == 0, run.stderr[-2000:]
    check(tmp_path / "amx.o")
