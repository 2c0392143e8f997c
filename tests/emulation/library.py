"""The CUDA kernels on the CPU: csrc/cuda built by the C++ compiler over the emulator, serving CPU tensors as backend "cuda".

With CMOE_EMULATE_CUDA=1 in the environment tests/conftest.py installs it, so that the tests of the ops run on these kernels alone, as they
do on Triton's under TRITON_INTERPRET=1.
"""

import contextlib
import ctypes
import functools
import os
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch

from cmoe_kernels import backends
from tests.builds import ROOT, SANITIZERS, alone_in, build_script, emulated_library, need_compiler

WANTED = os.environ.get("CMOE_EMULATE_CUDA", "0") == "1"
# One of SANITIZERS; its runtime must have been loaded before Python.
SANITIZER = os.environ.get("CMOE_EMULATE_SANITIZER", "plain")
SCHEMAS = torch.library.Library("cmoe_emulated", "FRAGMENT")
CAPABILITY = int(os.environ.get("CMOE_EMULATE_CAPABILITY", "80"))


class Counts(NamedTuple):
    """Launches; and accesses to shared memory beside the phases that serve them, equal where no banks conflict."""

    launches: int
    copies: int
    copy_phases: int
    ldmatrix: int
    ldmatrix_phases: int
    vectors: int
    vector_phases: int


def missing() -> str | None:
    """Why nothing can be emulated here."""
    if (platform.system(), platform.machine()) != ("Linux", "x86_64"):
        return "the emulator switches stacks on x86-64 Linux"
    return build_script().missing()


@functools.cache
def library() -> ctypes.CDLL:
    """Built unless it is there and fresh, and loaded: its operations are torch.ops.cmoe_emulated.*"""
    before = os.getcwd()
    os.chdir(ROOT)
    try:
        target = ROOT / build()
    finally:
        os.chdir(before)
    torch.ops.load_library(str(target))
    for name in operations(found := ctypes.CDLL(str(target))):
        schema = str(getattr(torch.ops.cmoe_native, name).default._schema)
        SCHEMAS.define(schema.removeprefix("cmoe_native::"))
    return found


def operations(found: ctypes.CDLL) -> dict[str, str]:
    """The types of each operation that the library implements."""
    found.operations.restype = ctypes.c_char_p
    return dict(line.split("; ")[1:] for line in found.operations().decode().splitlines())


def build() -> Path:
    made, objects = emulated_library(SANITIZER)
    torch_folder = build_script().torch_folder()
    libraries = ["-L" + str(torch_folder / "lib"), "-ltorch_cpu"]
    target = made.link("emulated.so", [*need_compiler(), *SANITIZERS[SANITIZER], "-shared"], objects.values(), libraries=libraries)
    with alone_in(made.folder):
        made.run()
    return target


def install() -> None:
    """Let the emulated kernels serve CPU tensors as backend "cuda", the last choice there."""
    for name in operations(library()):
        backends.register(name, "cuda", getattr(torch.ops.cmoe_emulated, name).default)
    backends.DEVICE_ORDER["cpu"] = (*(b for b in backends.DEVICE_ORDER["cpu"] if b != "cuda"), "cuda")


@contextlib.contextmanager
def emulator(
    order: str = "forward", *, lazy: bool = True, seed: int = 1, multiprocessors: int = 4, capability: int = CAPABILITY
) -> Iterator[None]:
    """How kernels are run inside the block: the order of threads and blocks, when asynchronous copies land, and on what device."""
    set_options = library().set_options
    set_options(("forward", "reverse", "shuffled").index(order), seed, lazy, multiprocessors, capability)
    try:
        yield
    finally:
        set_options(0, 1, True, 4, CAPABILITY)


def take_counts() -> Counts:
    """What was counted since the last call."""
    values = (ctypes.c_uint64 * len(Counts._fields))()
    library().take_counts(values)
    return Counts(*values)


if __name__ == "__main__":
    os.chdir(ROOT)
    print(build())
