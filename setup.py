"""Builds cmoe_kernels/_C.abi3.so where torch and a C++ compiler are found; elsewhere the package installs in pure Python.

torch is located and not imported: this file also runs to write metadata, and then an import of some seconds would be wasted. Every
source is compiled by a command line of its own, in parallel, into build/native, and again only when the command, the source or a header
it includes has changed. CXX and CXXFLAGS are honoured, CMOE_NATIVE=0 leaves the library out on purpose.
"""

import importlib.metadata
import importlib.util
import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import setuptools
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

if int(setuptools.__version__.split(".")[0]) < 77:  # without build isolation nobody compares it with pyproject.toml
    sys.exit(f"setuptools is {setuptools.__version__}, at least 77 is needed: pip install --upgrade setuptools")

ROOT = Path(__file__).resolve().parent
SOURCES = sorted(p.relative_to(ROOT).as_posix() for p in (ROOT / "csrc").rglob("*.cpp"))
OBJECTS, LIBRARY = Path("build", "native"), "_C.abi3.so"

# The instruction sets that have kernels of their own, by the file that they compile; a compiler that refuses the flags leaves one out. The
# generic tier needs none.
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq"]
AVX512_BF16 = [*AVX512, "-mavx512bf16"]
TIERS = {"avx2": AVX2, "avx512": AVX512, "avx512_bf16": AVX512_BF16, "amx": [*AVX512_BF16, "-mamx-tile", "-mamx-bf16"]}

# The oldest torch and Python that the library may be loaded into, whatever it is built with.
TORCH_TARGET, TORCH_OLDEST = "0x020a000000000000ULL", (2, 10)
PYTHON_TARGET, PYTHON_TAG = "0x030A0000", "cp310"


def compiler() -> list[str]:
    named = shlex.split(os.environ.get("CXX", ""))
    for command in [named] if named else [["c++"], ["g++"], ["clang++"]]:
        if shutil.which(command[0]):
            return command
    return []


def torch_folder() -> Path | None:
    spec = importlib.util.find_spec("torch")
    return Path(spec.origin).parent if spec and spec.origin else None


def missing() -> str | None:
    """What the native library would need here and does not find."""
    if os.environ.get("CMOE_NATIVE", "1") == "0":
        return "CMOE_NATIVE=0 asks for none"
    if platform.system() == "Windows":
        return "there is no build for Windows"
    if torch_folder() is None:
        return "torch is not installed where the package is built (with build isolation it never is)"
    version = importlib.metadata.version("torch")
    if tuple(int(part) for part in version.split(".")[:2]) < TORCH_OLDEST:
        return f"torch is {version}, at least {'.'.join(map(str, TORCH_OLDEST))} is needed"
    if not compiler():
        return "no C++ compiler was found (c++, g++, clang++, or the one that CXX names)"
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        return "the headers of Python are not installed (python3-dev on Debian)"
    return None


MISSING = missing()


class Build(build_ext):
    def build_extension(self, ext: Extension) -> None:
        folder = torch_folder()
        assert folder is not None
        command, tiers = compile_command(folder), tiers_of_compiler()
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = list(pool.map(lambda source: compiled(source, [*command, *flags_of(source, tiers)]), built(SOURCES, tiers)))
        library = linked(objects, folder)
        target = self.get_ext_fullpath(ext.name)
        self.mkpath(os.path.dirname(target))
        self.copy_file(str(library), target)


class BuildPython(build_py):
    def run(self) -> None:
        if MISSING:
            print(
                f"cmoe_kernels: installed WITHOUT its native library: {MISSING}. Everything works, on plain PyTorch. For the native "
                "kernels, have torch and a C++ compiler, then: pip install --no-build-isolation --force-reinstall --no-deps <this package>",
                file=sys.stderr,
            )
            # A library from an earlier build in place would be loaded all the same, whatever it was built from.
            Path("cmoe_kernels", LIBRARY).unlink(missing_ok=True)
        super().run()


def compile_command(torch: Path) -> list[str]:
    # No -march: the library must run on every machine of its architecture. -isystem: warnings are for our own files. GCC 12's intrinsics
    # and std::optional set off -Wmaybe-uninitialized.
    return [
        *compiler(), "-c", "-std=c++20", "-O3", "-g0", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-maybe-uninitialized",
        f"-DTORCH_TARGET_VERSION={TORCH_TARGET}", f"-DPy_LIMITED_API={PYTHON_TARGET}",
        "-isystem", str(torch / "include"), "-isystem", sysconfig.get_path("include"), f"-ffile-prefix-map={torch / 'include'}/=",
        *shlex.split(os.environ.get("CXXFLAGS", "")),
    ]  # fmt: skip


def tiers_of_compiler() -> list[str]:
    """The instruction sets for which the compiler makes code: none but the generic one where it targets no x86-64."""
    probe = "#if !defined(__x86_64__)\n#error\n#endif\n#include <immintrin.h>\n"

    def takes(flags: list[str]) -> bool:
        command = [*compiler(), *flags, "-x", "c++", "-fsyntax-only", "-"]
        return subprocess.run(command, input=probe, text=True, capture_output=True).returncode == 0

    return [tier for tier, flags in TIERS.items() if takes(flags)]


def built(sources: list[str], tiers: list[str]) -> list[str]:
    return [source for source in sources if Path(source).stem not in TIERS or Path(source).stem in tiers]


def flags_of(source: str, tiers: list[str]) -> list[str]:
    stem = Path(source).stem
    return [f"-DCMOE_HAS_{tier.upper()}" for tier in tiers] if stem == "dispatch" else TIERS.get(stem, [])


def compiled(source: str, command: list[str], folder: Path = OBJECTS) -> Path:
    target = folder / (source + ".o")
    dependencies = target.with_suffix(".d")
    run_if_stale([*command, "-MD", "-MF", str(dependencies), "-o", str(target), source], target, dependencies)
    return target


def linked(objects: list[Path], torch: Path, target: Path = OBJECTS / LIBRARY) -> Path:
    exports = Path("csrc", "exports.map")
    # One symbol leaves the library: another library's copy of a template, built for other instructions, must never be taken for ours.
    elf, mac = ["-shared", f"-Wl,--version-script={exports}"], ["-dynamiclib", "-undefined", "dynamic_lookup"]
    command = [
        *compiler(), *(mac if platform.system() == "Darwin" else elf), *shlex.split(os.environ.get("LDFLAGS", "")), "-o", str(target),
        *map(str, objects), "-L" + str(torch / "lib"), "-ltorch_cpu",
    ]  # fmt: skip
    run_if_stale(command, target, exports, *objects)
    return target


def run_if_stale(command: list[str], target: Path, *inputs: Path) -> None:
    """Run a command unless it has made ``target`` before, exactly so, from these inputs; a .d file stands for the files it lists."""
    record, line = target.with_name(target.name + ".cmd"), shlex.join(command)
    if target.exists() and record.exists() and record.read_text() == line and all(map(Path.exists, inputs)):
        files = [file for i in inputs for file in (listed(i) if i.suffix == ".d" else [i])]
        if all(f.exists() and f.stat().st_mtime <= target.stat().st_mtime for f in files):
            return
    target.parent.mkdir(parents=True, exist_ok=True)
    record.unlink(missing_ok=True)
    print(line, flush=True)
    subprocess.run(command, check=True)
    record.write_text(line)


def listed(dependencies: Path) -> list[Path]:
    """The files in a make rule that the compiler has written: "target: file file ...", over several lines."""
    return [Path(file) for file in dependencies.read_text().replace("\\\n", " ").split(": ", 1)[1].split()]


if __name__ == "__main__":  # the tests read the flags from here
    setup(
        ext_modules=[] if MISSING else [Extension("cmoe_kernels._C", SOURCES, py_limited_api=True)],
        cmdclass={"build_ext": Build, "build_py": BuildPython},
        options={} if MISSING else {"bdist_wheel": {"py_limited_api": PYTHON_TAG}},
    )
