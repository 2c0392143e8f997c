"""Programs in C++ over the drivers, without torch, which tests/native/threads.h gives their threads."""

import os
import subprocess
import sys
from pathlib import Path

from tests.native.variants import ROOT, alone_in, build_script, emulated_objects, emulation_flags, need_compiler, product_objects

CORE = ("dispatch", "self_test", "pool")
DRIVERS = (*CORE, "soft_experts", "sparse_experts", "int8_layers", "grouped_linear", "experts_backward", "task_router")


def compile_program(name: str, *flags: str, tiers: list[str] | None = None) -> Path:
    """tests/native/<name>.cpp with what it uses, compiled with these flags; or, without flags, with the library's own object files.

    tiers: instruction sets that it has beside the generic one, all by default.
    """
    script, compiler = build_script(), need_compiler()
    os.chdir(ROOT)
    build, known = script.Build(Path("build", "programs", name)), script.tiers_of_compiler()
    wanted = known if tiers is None else [*tiers, *(["avx512_bf16"] if "amx" in tiers else [])]  # whose instructions amx uses, too
    tiers = [tier for tier in known if tier in wanted]
    command = [*compiler, "-c", "-std=c++20", "-g1", "-Icsrc/cpu", *(flags or ["-O1"])]
    # Emulated tiers are compiled with -O1 for the library of test_tiers.py: the same files serve here, but for what names the tiers.
    of_tiers = [source for source in script.built(script.SOURCES, tiers) if Path(source).stem in tiers]
    shared = emulated_objects(of_tiers) if flags == ("-O1",) else {}

    def compiled(source: str) -> Path:
        own = emulation_flags(source, tiers)
        return build.compile(source, [*command, *(script.flags_of(source, tiers) if own is None else own)])

    def used(source: str) -> bool:
        return "/gemm/" in source or Path(source).stem in (CORE if name == "products" else DRIVERS)

    with alone_in(build.folder):
        sources = [source for source in script.built(script.SOURCES, tiers) if used(source)] if flags else []
        objects = [shared.get(source) or compiled(source) for source in [*sources, f"tests/native/{name}.cpp"]]
        if not flags:
            objects += [path for source, path in product_objects(emulate=True).items() if used(source)]
        program = build.link(name, [*compiler, *flags, "-pthread"], objects)
        build.run()
    return ROOT / program


def run_program(program: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run([str(program), *arguments], env=os.environ | environment, capture_output=True, text=True)


if __name__ == "__main__":  # compiled before the tests of a mutant
    compile_program(sys.argv[1], *sys.argv[2:])
