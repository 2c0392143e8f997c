"""Builds cmoe_kernels/_C.abi3.so where torch and a C++ compiler are found; elsewhere the package installs in pure Python.

torch is located and not imported: this file also runs to write metadata, and then an import of some seconds would be wasted. Every
source is compiled by a command line of its own, in parallel, into build/native, and again only when the command, the source or a header
it includes has changed. CXX and CXXFLAGS are honoured, CMOE_NATIVE=0 leaves the library out on purpose, CMOE_WERROR=1 makes a warning
of the C++ compiler an error.

Where nvcc is found (CUDA_HOME, PATH, or the toolkit that pip installs), the same library holds the CUDA kernels, whatever torch is there
and with or without a GPU: csrc/cuda/*.cu by nvcc, their bindings by the C++ compiler, the runtime linked statically.
CMOE_CUDA_ARCHS chooses the architectures (default "80;90a"), CMOE_CUDA=0 leaves the kernels out on purpose.
"""

import importlib.metadata
import importlib.util
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import setuptools
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

if int(setuptools.__version__.split(".")[0]) < 77:  # without build isolation nobody compares it with pyproject.toml
    sys.exit(f"setuptools is {setuptools.__version__}, at least 77 is needed: pip install --upgrade setuptools")

ROOT = Path(__file__).resolve().parent
ALL_SOURCES = sorted(p.relative_to(ROOT).as_posix() for p in (ROOT / "csrc").rglob("*.c*") if p.suffix in (".cpp", ".cu"))
SOURCES = [source for source in ALL_SOURCES if not source.startswith("csrc/cuda/")]
CUDA_SOURCES = [source for source in ALL_SOURCES if source.startswith("csrc/cuda/")]
OBJECTS, LIBRARY = Path("build", "native"), "_C.abi3.so"

# The instruction sets that have kernels of their own, by the file that they compile; a compiler that refuses the flags leaves one out. The
# generic tier needs none.
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq"]
AVX512_BF16 = [*AVX512, "-mavx512bf16"]
TIERS = {"avx2": AVX2, "avx512": AVX512, "avx512_bf16": AVX512_BF16, "amx": [*AVX512_BF16, "-mamx-tile", "-mamx-bf16"]}

# For CI only: another compiler has other warnings.
WERROR = ["-Werror"]

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
        command, tiers, cuda = compile_command(folder), tiers_of_compiler(), cuda_toolkit()

        def compiled_here(source: str) -> Path:
            if source.endswith(".cu"):
                return compiled(source, list(cuda.command))
            return compiled(source, [*command, *flags_of(source, tiers, cuda)])

        with ThreadPoolExecutor(os.cpu_count()) as pool:  # nvcc first: it takes longest
            objects = list(pool.map(compiled_here, [*(CUDA_SOURCES[::-1] if cuda.found else []), *built(SOURCES, tiers)]))
        library = linked(objects, folder, link=cuda.link)
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
    # and std::optional set off -Wmaybe-uninitialized. Fused multiply-adds are where the source has them: else a moved line or another
    # compiler could change how a sum is rounded.
    return [
        *compiler(), "-c", "-std=c++20", "-O3", "-g0", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off",
        "-Wall", "-Wextra", "-Wno-maybe-uninitialized",
        f"-DTORCH_TARGET_VERSION={TORCH_TARGET}", f"-DPy_LIMITED_API={PYTHON_TARGET}",
        "-isystem", str(torch / "include"), "-isystem", sysconfig.get_path("include"), f"-ffile-prefix-map={torch / 'include'}/=",
        *(WERROR if os.environ.get("CMOE_WERROR") == "1" else []), *shlex.split(os.environ.get("CXXFLAGS", "")),
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


def flags_of(source: str, tiers: list[str], cuda: "CudaToolkit | None" = None) -> list[str]:
    stem = Path(source).stem
    if source == "csrc/register.cpp" and cuda is not None:
        return [f'-DCMOE_CUDA_BUILT="{cuda.built}"', f'-DCMOE_CUDA_MISSING="{cuda.missing}"']
    return [f"-DCMOE_HAS_{tier.upper()}" for tier in tiers] if stem == "dispatch" else TIERS.get(stem, [])


def compiled(source: str, command: list[str], folder: Path = OBJECTS) -> Path:
    target = folder / (source + ".o")
    dependencies = target.with_suffix(".d")
    run_if_stale([*command, "-MD", "-MF", str(dependencies), "-o", str(target), source], target, dependencies)
    return target


class CudaToolkit(NamedTuple):
    """nvcc and what it takes to compile and link with it; or why there is none."""

    missing: str = ""
    command: Sequence[str] = ()
    link: Sequence[str] = ()
    built: str = ""  # what the library will hold, for people and for backends.py

    @property
    def found(self) -> bool:
        return not self.missing


def cuda_toolkit() -> CudaToolkit:
    """The toolkit found here, once an empty kernel has been compiled with it for every architecture that is asked for."""
    if os.environ.get("CMOE_CUDA", "1") == "0":
        return CudaToolkit("CMOE_CUDA=0 asked for none when the package was built")
    if platform.system() != "Linux":
        return CudaToolkit(f"there is no build for {platform.system()}")
    nvcc = find_nvcc()
    if nvcc is None:
        return CudaToolkit("no nvcc was found when the package was built (CUDA_HOME, PATH, or pip install nvidia-cuda-nvcc)")
    archs = [a for a in re.split(r"[;, ]+", os.environ.get("CMOE_CUDA_ARCHS", "80;90a")) if a]
    if not archs or not all(re.fullmatch(r"\d{2,3}[af]?", a) for a in archs):
        sys.exit(f"CMOE_CUDA_ARCHS is {os.environ['CMOE_CUDA_ARCHS']!r}, must list architectures such as 80;90a")
    # Newer GPUs compile PTX when they first load it; that of 90a and the like is for one architecture alone.
    ptx = min((a for a in archs if a.isdigit()), key=int, default="")
    code = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in archs] + ([f"-gencode=arch=compute_{ptx},code=compute_{ptx}"] if ptx else [])
    # -Xfatbin: cubins for several architectures are much alike.
    command = [
        nvcc, "-c", "-std=c++20", "-O3", *code, "-Xfatbin=-compress-all", "-Xcompiler=-fPIC,-fvisibility=hidden,-Wall,-Wextra,-g0",
        "--Werror=cross-execution-space-call", *shlex.split(os.environ.get("NVCCFLAGS", "")),
    ]  # fmt: skip
    probe = OBJECTS / "probe.cu"
    probe.parent.mkdir(parents=True, exist_ok=True)
    if not probe.exists():
        probe.write_text("__global__ void probe() {}\n")
    try:
        target = probe.with_suffix(".o")
        run_if_stale([*command, "-o", str(target), str(probe)], target, probe, capture_output=True, text=True)
        paths = subprocess.run([nvcc, "--dryrun", "-x", "cu", str(probe)], capture_output=True, text=True, check=True).stderr
    except (OSError, subprocess.CalledProcessError) as error:
        said = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
        reason = re.sub(r'["\\]', "'", next((line for line in said if "error" in line), said[0] if said else "no word of why"))
        return CudaToolkit(f"nvcc could not compile an empty kernel when the package was built: {reason.replace(str(ROOT), '.')}")
    version = re.search(r"release (\S+),", subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout)
    top = Path(re.search(r"^#\$ TOP=(.*)$", paths, re.M)[1])
    folders = [Path(p) for p in re.findall(r'"-L([^"]+)"', paths)] + [top / "lib64", top / "lib"]
    runtime = next((f for f in folders if (f / "libcudart_static.a").exists()), None)
    if runtime is None:
        return CudaToolkit(f"nvcc was found when the package was built and libcudart_static.a was not ({os.path.normpath(top)})")
    # libtorch brings libtorch_cuda where torch has one: the current stream is asked for there, by a weak symbol.
    link = ["-Wl,--no-as-needed", "-ltorch", "-Wl,--as-needed", f"-L{runtime}", "-lcudart_static", "-ldl", "-lrt", "-lpthread"]
    built = ", ".join([f"sm_{a}" for a in archs] + ([f"PTX of compute_{ptx}"] if ptx else [])) + f"; CUDA {version[1] if version else '?'}"
    return CudaToolkit("", command, link, built)


def find_nvcc() -> str | None:
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    for home in homes:  # named on purpose: no other is taken in its place
        return str(Path(home, "bin", "nvcc")) if Path(home, "bin", "nvcc").exists() else None
    if found := shutil.which("nvcc"):
        return found
    spec = importlib.util.find_spec("nvidia")
    packages = [Path(folder) for folder in (spec.submodule_search_locations or [] if spec else [])]
    installed = [nvcc for folder in packages for nvcc in sorted(folder.glob("cu*/bin/nvcc"))] + [Path("/usr/local/cuda/bin/nvcc")]
    return next((str(nvcc) for nvcc in installed if nvcc.exists()), None)


def linked(objects: list[Path], torch: Path, target: Path = OBJECTS / LIBRARY, link: Sequence[str] = ()) -> Path:
    exports = Path("csrc", "exports.map")
    # One symbol leaves the library: another library's copy of a template, built for other instructions, must never be taken for ours.
    elf, mac = ["-shared", f"-Wl,--version-script={exports}"], ["-dynamiclib", "-undefined", "dynamic_lookup"]
    command = [
        *compiler(), *(mac if platform.system() == "Darwin" else elf), *shlex.split(os.environ.get("LDFLAGS", "")), "-o", str(target),
        *map(str, objects), "-L" + str(torch / "lib"), "-ltorch_cpu", *link,
    ]  # fmt: skip
    run_if_stale(command, target, exports, *objects)
    return target


def run_if_stale(command: list[str], target: Path, *inputs: Path, **settings: Any) -> None:
    """Run a command unless it has made ``target`` before, exactly so, from these inputs; a .d file stands for the files it lists.

    -Werror does not count: it changes nothing in what is made.
    """
    record, line = target.with_name(target.name + ".cmd"), shlex.join(part for part in command if part not in WERROR)
    if target.exists() and record.exists() and record.read_text() == line and all(map(Path.exists, inputs)):
        files = [file for i in inputs for file in (listed(i) if i.suffix == ".d" else [i])]
        if all(f.exists() and f.stat().st_mtime <= target.stat().st_mtime for f in files):
            return
    target.parent.mkdir(parents=True, exist_ok=True)
    record.unlink(missing_ok=True)
    print(line, flush=True)
    subprocess.run(command, check=True, **settings)
    record.write_text(line)


def listed(dependencies: Path) -> list[Path]:
    """The files in a make rule that the compiler has written: "target: file file ...", over several lines."""
    return [Path(file) for file in dependencies.read_text().replace("\\\n", " ").split(": ", 1)[1].split()]


if __name__ == "__main__":  # the tests read the flags from here
    setup(
        ext_modules=[] if MISSING else [Extension("cmoe_kernels._C", ALL_SOURCES, py_limited_api=True)],
        cmdclass={"build_ext": Build, "build_py": BuildPython},
        options={} if MISSING else {"bdist_wheel": {"py_limited_api": PYTHON_TAG}},
    )
