"""Programs in C++ over the drivers, without torch, which tests/native/threads.h gives their threads."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.native.variants import ROOT, alone_in, build_script, emulation_flags, need_compiler, product_objects

CORE = ("dispatch", "self_test", "pool")
DRIVERS = (*CORE, "soft_experts", "sparse_experts", "grouped_linear", "experts_backward", "task_router")


def compile_program(name: str, *flags: str) -> Path:
    """tests/native/<name>.cpp with what it uses, compiled with these flags; or, without flags, with the library's own object files."""
    script, compiler = build_script(), need_compiler()
    os.chdir(ROOT)
    folder, tiers = Path("build", "programs", name), script.tiers_of_compiler()
    command = [*compiler, "-c", "-std=c++20", "-g1", "-Icsrc/cpu", *(flags or ["-O1"])]

    def compiled(source: str) -> Path:
        own = emulation_flags(source)
        return script.compiled(source, [*command, *(script.flags_of(source, tiers) if own is None else own)], folder)

    def used(source: str) -> bool:
        return "/gemm/" in source or Path(source).stem in (CORE if name == "products" else DRIVERS)

    program = folder / name
    with alone_in(folder), ThreadPoolExecutor(os.cpu_count()) as pool:
        sources = [source for source in script.built(script.SOURCES, tiers) if used(source)] if flags else []
        objects = list(pool.map(compiled, [*sources, f"tests/native/{name}.cpp"]))
        if not flags:
            objects += [path for source, path in product_objects(emulate=True).items() if used(source)]
        script.run_if_stale([*compiler, *flags, "-pthread", "-o", str(program), *map(str, objects)], program, *objects)
    return ROOT / program


def run_program(program: Path, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run([str(program)], env=os.environ | environment, capture_output=True, text=True)


if __name__ == "__main__":  # compiled before the tests of a mutant
    compile_program(sys.argv[1], *sys.argv[2:])
