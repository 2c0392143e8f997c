"""Compiles the native library: one command line a file, written to build/native/build.ninja and run by ninja.

setup.py, the tests and benchmarks/inspection load this file by its place, and run it in the project's root. ninja compiles in parallel, and
again only when a command, a source or a header it includes has changed. Where there is no ninja the same commands run one after another.
torch is located and not imported: an import of some seconds would be wasted. CXX, CXXFLAGS and LDFLAGS are honoured. CMOE_NATIVE=0 leaves
the library out on purpose; CMOE_WERROR=1 makes a warning of the C++ compiler an error. CMOE_CPU_TIERS, such as "avx2", chooses instruction
sets beside the portable one (default: all that the compiler knows).

Where nvcc is found (CUDA_HOME, PATH, or the toolkit that pip installs), the same library holds the CUDA kernels, whatever torch is there
and with or without a GPU: csrc/cuda/*.cu by nvcc, their bindings by the C++ compiler, the runtime linked statically.
CMOE_CUDA_ARCHS chooses the architectures (default "80;90a"), CMOE_CUDA=0 leaves the kernels out on purpose.
"""

import functools
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
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
ALL_SOURCES = sorted(p.relative_to(ROOT).as_posix() for p in (ROOT / "csrc").rglob("*.c*") if p.suffix in (".cpp", ".cu"))
SOURCES = [source for source in ALL_SOURCES if not source.startswith("csrc/cuda/")]
CUDA_SOURCES = [source for source in ALL_SOURCES if source.startswith("csrc/cuda/")]
FOLDER, LIBRARY = Path("build", "native"), "_C.abi3.so"

# The instruction sets that have kernels of their own, by the file that they compile; a compiler that refuses the flags leaves one out. The
# generic tier needs none.
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq"]
AVX512_VNNI = [*AVX512, "-mavx512vnni"]
AVX512_BF16 = [*AVX512_VNNI, "-mavx512bf16"]
TIERS = {
    "avx2": AVX2,
    "avx_vnni": [*AVX2, "-mavxvnni"],
    "avx512": AVX512,
    "avx512_vnni": AVX512_VNNI,
    "avx512_bf16": AVX512_BF16,
    "amx": [*AVX512_BF16, "-mamx-tile", "-mamx-bf16", "-mamx-int8"],
}

# Expanded by the shell that runs a command: an object file that was made with -Werror serves without. For CI: compilers differ in warnings.
WERROR = "${CMOE_WERROR:+-Werror}"

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
        return "CMOE_NATIVE=0 leaves it out"
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


class Build:
    """Commands that make files in a folder, by its build.ninja."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.commands = folder, dict[Path, str]()
        self.lines = [
            f"builddir = {_path(str(folder))}",
            "rule compile\n  command = $line\n  description = $out\n  depfile = $out.d\n  deps = gcc",
            "rule link\n  command = $line\n  description = $out",
        ]

    def compile(self, source: str, command: Sequence[str]) -> Path:
        """The object file of a source."""
        target = self.folder / f"{source}.o"
        return self._add("compile", target, [source], [*command, "-MD", "-MF", f"{target}.d", "-o", str(target), source])

    def link(self, name: str, command: Sequence[str], objects: Iterable[Path], *, libraries: Sequence[str] = (), also: str = "") -> Path:
        """A program or library of object files; made again also when the file ``also`` changes."""
        target, files = self.folder / name, [str(path) for path in objects]
        return self._add("link", target, [*files, *([also] if also else [])], [*command, "-o", str(target), *files, *libraries])

    def _add(self, rule: str, target: Path, inputs: Sequence[str], command: Sequence[str]) -> Path:
        line = shlex.join(command).replace(shlex.quote(WERROR), WERROR)
        self.commands[target] = line
        self.lines.append(f"build {_path(str(target))}: {rule} {' '.join(map(_path, inputs))}\n  line = {line.replace('$', '$$')}")
        return target

    def run(self, *targets: Path) -> None:
        """Make these files, or all."""
        self.folder.mkdir(parents=True, exist_ok=True)
        script = self.folder / "build.ninja"
        script.write_text("\n".join(self.lines) + "\n")
        environment = {**os.environ, "CMOE_WERROR": "1" if os.environ.get("CMOE_WERROR") == "1" else ""}
        if tool := ninja():
            command = [tool, "-f", str(script), "-j", str(os.cpu_count() or 1), *map(str, targets)]
            subprocess.run(command, check=True, env=environment)
            return
        print("ninja was not found: files are compiled one after another, all of them. pip install ninja is faster.", flush=True)
        for target in targets or self.commands:
            target.parent.mkdir(parents=True, exist_ok=True)
            print(self.commands[target], flush=True)
            subprocess.run(self.commands[target], shell=True, check=True, env=environment)


def _path(path: str) -> str:
    return re.sub(r"([$ :])", r"$\1", path)


def ninja() -> str | None:
    """The ninja that pip installed, or that of the PATH."""
    try:
        from ninja import BIN_DIR
    except ImportError:
        BIN_DIR = os.devnull
    return shutil.which("ninja", path=BIN_DIR) or shutil.which("ninja")


def compile_command(torch: Path) -> list[str]:
    # No -march: the library must run on every machine of its architecture. -isystem: warnings are for our own files. GCC 12's intrinsics
    # and std::optional set off -Wmaybe-uninitialized. Fused multiply-adds are where the source has them: else a moved line or another
    # compiler could change how a sum is rounded.
    return [
        *compiler(), "-c", "-std=c++20", "-O3", "-g0", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off",
        "-Wall", "-Wextra", "-Wno-maybe-uninitialized", WERROR,
        f"-DTORCH_TARGET_VERSION={TORCH_TARGET}", f"-DPy_LIMITED_API={PYTHON_TARGET}",
        "-isystem", str(torch / "include"), "-isystem", sysconfig.get_path("include"), f"-ffile-prefix-map={torch / 'include'}/=",
        *shlex.split(os.environ.get("CXXFLAGS", "")),
    ]  # fmt: skip


def tiers_of_compiler() -> list[str]:
    """The instruction sets for which the compiler makes code: none but the generic one where it targets no x86-64."""
    return [tier for tier in TIERS if _takes(tuple(compiler()), tier)]


def tiers_to_build() -> list[str]:
    """Those of the compiler that CMOE_CPU_TIERS names, or all; avx512_bf16 comes with amx, which uses its instructions."""
    known, setting = tiers_of_compiler(), os.environ.get("CMOE_CPU_TIERS")
    if setting is None:
        return known
    named = {name for name in re.split(r"[;, ]+", setting) if name}
    if not named or named - {"generic", *TIERS}:
        sys.exit(f"CMOE_CPU_TIERS is {setting!r}, must list some of generic, {', '.join(TIERS)}")
    return [tier for tier in known if tier in named or (tier == "avx512_bf16" and "amx" in named)]


@functools.cache
def _takes(command: tuple[str, ...], tier: str) -> bool:
    probe = "#if !defined(__x86_64__)\n#error\n#endif\n#include <immintrin.h>\n"
    line = [*command, *TIERS[tier], "-x", "c++", "-fsyntax-only", "-"]
    return subprocess.run(line, input=probe, text=True, capture_output=True).returncode == 0


def built(sources: list[str], tiers: list[str]) -> list[str]:
    return [source for source in sources if Path(source).stem not in TIERS or Path(source).stem in tiers]


def flags_of(source: str, tiers: list[str], cuda: "CudaToolkit | None" = None) -> list[str]:
    stem = Path(source).stem
    if source == "csrc/register.cpp" and cuda is not None:
        return [f'-DCMOE_CUDA_BUILT="{cuda.built}"', f'-DCMOE_CUDA_MISSING="{cuda.missing}"']
    return [f"-DCMOE_HAS_{tier.upper()}" for tier in tiers] if stem == "dispatch" else TIERS.get(stem, [])


class Library(NamedTuple):
    """The commands of the native library, and the files that they make."""

    build: Build
    objects: dict[str, Path]  # by their source
    target: Path


def library() -> Library:
    torch = torch_folder()
    assert torch is not None
    build, command, tiers, cuda = Build(FOLDER), compile_command(torch), tiers_to_build(), cuda_toolkit()
    objects = {}
    for source in [*(CUDA_SOURCES[::-1] if cuda.found else []), *built(SOURCES, tiers)]:  # nvcc first: it takes longest
        objects[source] = build.compile(source, cuda.command if source.endswith(".cu") else [*command, *flags_of(source, tiers, cuda)])
    return Library(build, objects, link_library(build, objects.values(), torch, cuda.link))


def link_library(build: Build, objects: Iterable[Path], torch: Path, libraries: Sequence[str] = ()) -> Path:
    # One symbol leaves the library: another library's copy of a template, built for other instructions, must never be taken for ours.
    exports = "csrc/exports.map"
    elf, mac = ["-shared", f"-Wl,--version-script={exports}"], ["-dynamiclib", "-undefined", "dynamic_lookup"]
    linker = [*compiler(), *(mac if platform.system() == "Darwin" else elf), *shlex.split(os.environ.get("LDFLAGS", ""))]
    return build.link(LIBRARY, linker, objects, libraries=["-L" + str(torch / "lib"), "-ltorch_cpu", *libraries], also=exports)


class CudaToolkit(NamedTuple):
    """nvcc and what it takes to compile and link with it; or why there is none."""

    missing: str = ""
    command: Sequence[str] = ()
    link: Sequence[str] = ()
    built: str = ""  # what the library will hold, for people and for native.py

    @property
    def found(self) -> bool:
        return not self.missing


def cuda_toolkit() -> CudaToolkit:
    """The toolkit found here, once an empty kernel has been compiled with it for every architecture that is named."""
    if os.environ.get("CMOE_CUDA", "1") == "0":
        return CudaToolkit("CMOE_CUDA=0 left them out when the package was built")
    if platform.system() != "Linux":
        return CudaToolkit(f"there is no build for {platform.system()}")
    nvcc = find_nvcc()
    if nvcc is None:
        return CudaToolkit("no nvcc was found when the package was built (CUDA_HOME, PATH, or pip install nvidia-cuda-nvcc)")
    archs = [a for a in re.split(r"[;, ]+", os.environ.get("CMOE_CUDA_ARCHS", "80;90a")) if a]
    if not archs or not all(re.fullmatch(r"\d{2,3}[af]?", a) for a in archs):
        sys.exit(f"CMOE_CUDA_ARCHS is {os.environ['CMOE_CUDA_ARCHS']!r}, must list architectures such as 80;90a")
    return _toolkit(nvcc, tuple(archs), os.environ.get("NVCCFLAGS", ""))


@functools.cache
def _toolkit(nvcc: str, archs: tuple[str, ...], flags: str) -> CudaToolkit:
    # Newer GPUs compile PTX when they first load it; that of 90a and the like is for one architecture alone.
    ptx = min((a for a in archs if a.isdigit()), key=int, default="")
    code = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in archs] + ([f"-gencode=arch=compute_{ptx},code=compute_{ptx}"] if ptx else [])
    # -Xfatbin: cubins for several architectures are much alike.
    command = [
        nvcc, "-c", "-std=c++20", "-O3", *code, "-Xfatbin=-compress-all", "-Xcompiler=-fPIC,-fvisibility=hidden,-Wall,-Wextra,-g0",
        "--Werror=cross-execution-space-call", *shlex.split(flags),
    ]  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        probe = Path(folder, "probe.cu")
        probe.write_text("__global__ void probe() {}\n")
        try:
            subprocess.run([*command, "-o", str(probe.with_suffix(".o")), str(probe)], capture_output=True, text=True, check=True)
            paths = subprocess.run([nvcc, "--dryrun", "-x", "cu", str(probe)], capture_output=True, text=True, check=True).stderr
        except (OSError, subprocess.CalledProcessError) as error:
            said = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
            line = next((line for line in said if "error" in line), said[0] if said else "it gave no reason")
            reason = re.sub(r'["\\]', "'", line.replace(folder, "."))
            return CudaToolkit(f"nvcc could not compile an empty kernel when the package was built: {reason}")
    version = re.search(r"release (\S+),", subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout)
    top = Path(re.search(r"^#\$ TOP=(.*)$", paths, re.M)[1])
    folders = [Path(p) for p in re.findall(r'"-L([^"]+)"', paths)] + [top / "lib64", top / "lib"]
    runtime = next((f for f in folders if (f / "libcudart_static.a").exists()), None)
    if runtime is None:
        return CudaToolkit(f"nvcc was found when the package was built and libcudart_static.a was not ({os.path.normpath(top)})")
    # libtorch brings libtorch_cuda where torch has one: the current stream is found there, by a weak symbol.
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
