"""C++ programs in which kernels of csrc/cuda run on the CPU (tests/emulation/emulator), built plainly or with a sanitizer."""

import os
import subprocess
import sys
from pathlib import Path

from tests.native.variants import ROOT, alone_in, build_script, need_compiler

# Unused parameters and variables: a kernel is written for nvcc, whose launch bounds and pragmas mean nothing here.
EMULATED = ("-std=c++20", "-DCMOE_EMULATE_CUDA", "-Icsrc/cuda", "-Itests/emulation", "-Wall", "-Wextra", "-Wno-unknown-pragmas", "-g1")
SANITIZERS = {
    "plain": ("-O1",),
    # With checks in every line most of the time is the optimiser's.
    "address": ("-Og", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"),
    "thread": ("-Og", "-fsanitize=thread"),
}


def compile_emulated(program: str, sanitizer: str = "plain", kernels: tuple[str, ...] = ()) -> Path:
    """tests/emulation/<program>.cpp with some files of csrc/cuda; compiled again only when they, a header or the flags have changed.

    The last of the kernels may be a file of tests/emulation in place of others of csrc/cuda: the program then has its name, too.
    """
    script, compiler = build_script(), need_compiler()
    os.chdir(ROOT)
    build = script.Build(Path("build", "emulation", sanitizer))
    command = [*compiler, "-c", *EMULATED, *SANITIZERS[sanitizer], "-x", "c++"]
    stand_ins = [kernel for kernel in kernels if Path("tests", "emulation", f"{kernel}.cpp").exists()]
    sources = [source for kernel in kernels for source in script.CUDA_SOURCES if source.endswith(f"/{kernel}.cu")]
    sources += [f"tests/emulation/{name}.cpp" for name in (program, *stand_ins)]
    objects = [build.compile(source, command) for source in sources]
    target = build.link("-".join((program, *stand_ins)), [*compiler, *SANITIZERS[sanitizer]], objects)
    with alone_in(build.folder):
        build.run()
    return ROOT / target


def run_emulated(program: Path, *arguments: str, timeout: float = 240) -> subprocess.CompletedProcess:
    # Leaks: a fault leaves the threads that it stopped as they were, with what they held.
    options = {"ASAN_OPTIONS": "detect_leaks=0", "UBSAN_OPTIONS": "print_stacktrace=1", "TSAN_OPTIONS": "halt_on_error=1:exitcode=66"}
    return subprocess.run([str(program), *arguments], env=os.environ | options, capture_output=True, text=True, timeout=timeout)


if __name__ == "__main__":  # python -m tests.emulation.programs PROGRAM KERNEL ...
    compile_emulated(sys.argv[1], kernels=tuple(sys.argv[2:]))
