"""What the native library was compiled from: setup.py as a module, and the object files."""

import fcntl
import importlib.util
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def build_script():
    """setup.py as a module: its flags, its list of what the compiler can do."""
    spec = importlib.util.spec_from_file_location("build_script", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def need_compiler() -> list[str]:
    reason = build_script().missing()
    if reason:
        pytest.skip(f"nothing can be compiled here: {reason}")
    return build_script().compiler()


def product_objects(*, emulate_amx: bool = False) -> dict[str, Path]:
    """The library's object files by their source, compiled unless they are there and fresh. On demand AMX's instructions are plain C++."""
    need_compiler()
    os.chdir(ROOT)
    script = build_script()
    command, tiers = script.compile_command(script.torch_folder()), script.tiers_of_compiler()

    def compiled(source: str) -> Path:
        flags = [*command, *script.flags_of(source, tiers)]
        if emulate_amx and Path(source).stem in ("amx", "dispatch"):
            return script.compiled(source, [*flags, "-DCMOE_EMULATE_AMX"], Path("build", "emulated", "objects"))
        return script.compiled(source, flags)

    Path("build").mkdir(exist_ok=True)
    with Path("build", "lock").open("w") as lock, ThreadPoolExecutor(os.cpu_count()) as pool:
        fcntl.flock(lock, fcntl.LOCK_EX)  # other test processes want the same files
        sources = script.built(script.SOURCES, tiers)
        return dict(zip(sources, pool.map(compiled, sources), strict=True))
