"""What tests compile: the native library with other flags, in a copy of the tree, and tests that run there; its object files; C++ programs.

All of it lies under build/ and stays there, so that a second run compiles what has changed and nothing else.
"""

import fcntl
import filecmp
import functools
import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from cmoe_kernels import native
from tests.sampling import FULL

ROOT = Path(__file__).parents[1]
COPIED = (
    "cmoe_kernels",
    "csrc",
    "tests/ops",
    "tests/native",
    "tests/emulation",
    "tests/__init__.py",
    "tests/builds.py",
    "tests/conftest.py",
    "tests/passed.py",
    "tests/sampling.py",
    "benchmarks/__init__.py",
    "benchmarks/compare.py",
    "setup.py",
)
COPIED += ("tests/test_native.py", "pyproject.toml", "README.md", "LICENSE", "NOTICE")
PASSED_OVER = ("__pycache__", ".hypothesis", ".pytest_cache")


@functools.cache
def build_script():
    """csrc/build.py as a module: its flags, its list of what the compiler can do."""
    spec = importlib.util.spec_from_file_location("build_native", ROOT / "csrc" / "build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def need_compiler() -> list[str]:
    reason = build_script().missing()
    if reason:
        pytest.skip(f"nothing can be compiled here: {reason}")
    return build_script().compiler()


def runtime_of(sanitizer: str) -> str:
    """The path of a sanitizer's runtime library, which must be loaded before Python is."""
    compiler = need_compiler()
    path = subprocess.run([*compiler, f"-print-file-name=lib{sanitizer}.so"], capture_output=True, text=True).stdout.strip()
    if not os.path.isabs(path):
        pytest.skip(f"{compiler[0]} has no runtime library lib{sanitizer}.so")
    return path


def copy_of_tree(name: str) -> Path:
    tree = ROOT / "build" / name
    kept = set()
    for part in COPIED:
        source = ROOT / part
        for file in [source] if source.is_file() else sorted(source.rglob("*")):
            if not file.is_file() or file.suffix == ".so" or set(file.parts) & set(PASSED_OVER):
                continue
            target = tree / file.relative_to(ROOT)
            kept.add(target)
            if not target.exists() or not filecmp.cmp(file, target, shallow=False):
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, target)  # with a new time: what was compiled from the old one is stale
    for part in COPIED:
        if (tree / part).is_dir():
            for file in (tree / part).rglob("*"):
                if file.is_file() and file not in kept and file.suffix != ".so" and not set(file.parts) & set(PASSED_OVER):
                    file.unlink()
    return tree


def build(tree: Path, flags: str, link_flags: str = "") -> None:
    environment = os.environ | {
        "CMOE_CUDA": "0",  # nothing of it runs here, and nvcc takes its time
        "CMOE_CPU_TIERS": " ".join(_tiers_that_run()),
        "CXXFLAGS": f"{os.environ.get('CXXFLAGS', '')} {flags}",
        "LDFLAGS": f"{os.environ.get('LDFLAGS', '')} {link_flags}",
    }
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    run = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-4000:]


def _tiers_that_run() -> list[str]:
    """The instruction sets of this machine; in CI only the best, since no test there uses another."""
    here = sets.available if (sets := native.instruction_sets()) else ["generic"]
    return list(here) if FULL else list(here[:1])


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Other test processes that want files of this folder wait, and then find them fresh: no process writes a program that another runs."""
    folder.mkdir(parents=True, exist_ok=True)
    with Path(folder, "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def emulated_tiers() -> list[str]:
    """The instruction sets that the tests have in plain C++, best first: AMX always, AVX-512 and AVX-VNNI where they are missing."""
    here = sets.available if (sets := native.instruction_sets()) else []
    if "avx2" not in here or not build_script().compiler() or "amx" not in build_script().tiers_of_compiler():
        return []
    vnni = ["avx_vnni"] if "avx_vnni" not in here and "avx_vnni" in build_script().tiers_of_compiler() else []
    return ["amx", *vnni] if "avx512_bf16" in here else ["amx", "avx512_bf16", "avx512_vnni", "avx512", *vnni]


def tiers_with_emulation(known: Iterable[str]) -> list[str]:
    """Of these instruction sets those of a build that emulates: in CI AMX and what it needs, since each takes half a minute to compile."""
    emulated = emulated_tiers()
    return [tier for tier in known if FULL or tier not in emulated or tier in ("amx", "avx512_bf16")]


def tiers_to_run() -> tuple[list[str], list[str]]:
    """The instruction sets that programs can run, those first that are emulated alone; and those of this machine."""
    here = list(sets.available) if (sets := native.instruction_sets()) else []
    return [*(tier for tier in emulated_tiers() if tier not in here), *here], here


def tiers_of_products() -> list[str] | None:
    """Of tests/native/products.cpp, if not all: in CI the emulated one with most paths, and the best of this machine."""
    tiers, here = tiers_to_run()
    return None if FULL else [*tiers[:1], *here[:1]]


def emulation_flags(source: str, tiers: list[str]) -> list[str] | None:
    """How a file of the library, or of a program of some tiers, is compiled where some are emulated; None: as the product."""
    script, emulated, stem = build_script(), emulated_tiers(), Path(source).stem
    if stem not in (*emulated, "dispatch") or not emulated:
        return None
    wide = "avx512" in emulated
    on = {
        "AMX": stem in ("amx", "dispatch"),
        "AVX512": wide and stem != "avx_vnni",
        "AVX512_BF16": wide and stem in ("amx", "avx512_bf16"),
        "AVX_VNNI": "avx_vnni" in emulated and stem in ("avx_vnni", "dispatch"),
    }
    narrow = stem == "avx_vnni" or (wide and stem != "dispatch")
    own = [*script.AVX2, "-O1", "-Wno-psabi"] if narrow else script.flags_of(source, tiers)
    return [*own, *(f"-DCMOE_EMULATE_{name}" for name, wanted in on.items() if wanted)]


def emulated_objects(sources: Iterable[str], tiers: list[str]) -> dict[str, Path]:
    """The object files of those sources that this machine's emulation compiles in its own way, unless they are there and fresh."""
    need_compiler()
    os.chdir(ROOT)
    script = build_script()
    build, command = script.Build(Path("build", "emulated", "objects")), script.compile_command(script.torch_folder())
    made = {source: build.compile(source, [*command, *own]) for source in sources if (own := emulation_flags(source, tiers)) is not None}
    if made:
        with alone_in(build.folder):
            build.run()
    return made


def product_objects(*, emulate: bool = False) -> dict[str, Path]:
    """The library's object files by their source, compiled unless they are there and fresh; with emulate, for this machine's emulation."""
    need_compiler()
    os.chdir(ROOT)
    script = build_script()
    library, known = script.library(), script.tiers_of_compiler()
    tiers = tiers_with_emulation(known) if emulate else known
    objects = {source: path for source, path in library.objects.items() if source in script.built(script.SOURCES, tiers)}
    theirs = emulated_objects(objects, tiers) if emulate else {}
    with alone_in(Path("build")):
        library.build.run(*(path for source, path in objects.items() if source not in theirs))
    return objects | theirs


def cuda_objects() -> dict[str, Path]:
    """The object files of csrc/cuda/*.cu by their source, compiled by nvcc unless they are there and fresh; none where there is no nvcc."""
    need_compiler()
    os.chdir(ROOT)
    library = build_script().library()
    objects = {source: path for source, path in library.objects.items() if source.endswith(".cu")}
    if objects:
        with alone_in(Path("build")):
            library.build.run(*objects.values())
    return {source: ROOT / path for source, path in objects.items()}


def run_tests(tree: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    """pytest in a process of its own, on the package of a tree."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--no-header", "--capture=sys", *arguments]
    # An empty value takes a variable out.
    changed = {name: value for name, value in (os.environ | environment).items() if value != "" and not name.startswith("PYTEST_")}
    return subprocess.run(command, cwd=tree, env=changed, capture_output=True, text=True)


def output_of(run: subprocess.CompletedProcess, lines: int = 60) -> str:
    return "\n".join((run.stdout + run.stderr).splitlines()[-lines:])


def summary_of(run: subprocess.CompletedProcess) -> str:
    """The last line of pytest, with its counts."""
    return next((line for line in reversed(run.stdout.splitlines()) if " passed" in line), "nothing passed")


# --- programs over the drivers, without torch; tests/native/threads.h gives them their threads --------------------------------------------
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
    shared = emulated_objects(of_tiers, tiers) if flags == ("-O1",) else {}

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


# --- programs in which kernels of csrc/cuda run on the CPU (tests/emulation/emulator) -----------------------------------------------------
# Unused parameters and variables: a kernel is written for nvcc, whose launch bounds and pragmas mean nothing here.
EMULATED = ("-std=c++20", "-DCMOE_EMULATE_CUDA", "-Icsrc/cuda", "-Itests/emulation", "-Wall", "-Wextra", "-Wno-unknown-pragmas", "-g1")
SANITIZERS = {
    "plain": ("-O1",),
    # With checks in every line most of the time is the optimiser's.
    "address": ("-Og", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"),
    "thread": ("-Og", "-fsanitize=thread"),
}


def emulated_library(sanitizer: str = "plain"):
    """The commands that build the emulated library (tests/emulation/library.py), and its object files by their source."""
    script, compiler = build_script(), need_compiler()
    flags = [flag for flag in script.compile_command(script.torch_folder())[len(compiler) + 1 :] if flag not in ("-O3", "-g0")]
    command = [*compiler, "-c", *flags, *EMULATED, *SANITIZERS[sanitizer]]
    build = script.Build(Path("build", "emulation", "library" if sanitizer == "plain" else f"library-{sanitizer}"))
    sources = [*script.CUDA_SOURCES[::-1], "tests/emulation/library.cpp"]
    return build, {source: build.compile(source, [*command, *(["-x", "c++"] if source.endswith(".cu") else [])]) for source in sources}


def compile_emulated(program: str, sanitizer: str = "plain", kernels: tuple[str, ...] = ()) -> Path:
    """tests/emulation/<program>.cpp with some files of csrc/cuda; compiled again only when they, a header or the flags have changed.

    The last of the kernels may be a file of tests/emulation in place of others of csrc/cuda: the program then has its name, too. Without a
    sanitizer the kernels are the emulated library's own object files.
    """
    script, compiler = build_script(), need_compiler()
    os.chdir(ROOT)
    build = script.Build(Path("build", "emulation", sanitizer))
    command = [*compiler, "-c", *EMULATED, *SANITIZERS[sanitizer], "-x", "c++"]
    stand_ins = [kernel for kernel in kernels if Path("tests", "emulation", f"{kernel}.cpp").exists()]
    sources = [source for kernel in kernels for source in script.CUDA_SOURCES if source.endswith(f"/{kernel}.cu")]
    if sanitizer == "plain":
        library, made = emulated_library()
        objects = [made[source] for source in sources]
        with alone_in(library.folder):
            library.run(*objects)
    else:
        objects = [build.compile(source, command) for source in sources]
    objects += [build.compile(f"tests/emulation/{name}.cpp", command) for name in (program, *stand_ins)]
    target = build.link("-".join((program, *stand_ins)), [*compiler, *SANITIZERS[sanitizer]], objects)
    with alone_in(build.folder):
        build.run()
    return ROOT / target


def run_emulated(program: Path, *arguments: str, timeout: float = 240) -> subprocess.CompletedProcess:
    # Leaks: a fault leaves the threads that it stopped as they were, with what they held.
    options = {"ASAN_OPTIONS": "detect_leaks=0", "UBSAN_OPTIONS": "print_stacktrace=1", "TSAN_OPTIONS": "halt_on_error=1:exitcode=66"}
    return subprocess.run([str(program), *arguments], env=os.environ | options, capture_output=True, text=True, timeout=timeout)


if __name__ == "__main__":  # before the tests of a mutant: python -m tests.builds program products FLAG ... or emulated NAME KERNEL ...
    _kind, _name, *_more = sys.argv[1:]
    if _kind == "emulated":
        compile_emulated(_name, kernels=tuple(_more))
    else:
        compile_program(_name, *_more, tiers=tiers_of_products())
