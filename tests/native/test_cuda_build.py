"""How csrc/build.py finds nvcc, and what the library then says of itself."""

import platform
import shutil

import pytest

from cmoe_kernels import backends, native
from tests.builds import ROOT, build_script

pytestmark = pytest.mark.skipif(platform.system() != "Linux", reason="the CUDA kernels are built on Linux alone")
SETTINGS = ("CMOE_CUDA", "CMOE_CUDA_ARCHS", "CUDA_HOME", "CUDA_PATH")
NVCC = """#!/bin/sh
case "$*" in
  *--version*) echo "Cuda compilation tools, release 12.9, V12.9.1";;
  *--dryrun*) echo '#$ TOP={home}/bin/..' >&2;;
  *sm_75*) echo "nvcc fatal   : error: Unsupported gpu architecture 'compute_75'" >&2; exit 1;;
  *) while [ "$1" != "-o" ]; do shift; done; echo > "$2";;
esac
"""


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A toolkit that says what a real one would, named by CUDA_HOME; the build's own folder is elsewhere."""
    for name in SETTINGS:
        monkeypatch.delenv(name, raising=False)
    nvcc = tmp_path / "toolkit" / "bin" / "nvcc"
    (tmp_path / "toolkit" / "lib64").mkdir(parents=True)
    nvcc.parent.mkdir()
    nvcc.write_text(NVCC.format(home=tmp_path / "toolkit"))
    nvcc.chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "toolkit"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "toolkit"


def test_nothing_in_the_sources_waits_or_allocates():
    """What a CUDA graph could not capture, and memory that is not torch's."""
    text = "".join(path.read_text() for path in (ROOT / "csrc" / "cuda").rglob("*.*"))
    for name in ("cudaMalloc", "cudaFree", "cudaMemcpy", "Synchronize", "cudaEventQuery", "cudaStreamQuery"):
        assert name not in text, name
    assert text.count("<<<") == text.count(">>>") == 1, "every kernel is launched by launch(), which names the stream and checks"


def test_without_nvcc(home, monkeypatch):
    monkeypatch.setenv("CMOE_CUDA", "0")
    assert "CMOE_CUDA=0" in build_script().cuda_toolkit().missing
    monkeypatch.delenv("CMOE_CUDA")
    (home / "bin" / "nvcc").unlink()
    assert "no nvcc was found" in build_script().cuda_toolkit().missing


def test_a_toolkit_that_does_not_serve(home, monkeypatch):
    assert "libcudart_static.a was not" in build_script().cuda_toolkit().missing
    monkeypatch.setenv("CMOE_CUDA_ARCHS", "75")
    missing = build_script().cuda_toolkit().missing
    assert "could not compile an empty kernel" in missing
    assert "Unsupported gpu architecture 'compute_75'" in missing
    monkeypatch.setenv("CMOE_CUDA_ARCHS", "sm_80")
    with pytest.raises(SystemExit, match="CMOE_CUDA_ARCHS is 'sm_80'"):
        build_script().cuda_toolkit()


@pytest.mark.parametrize(
    ("archs", "built", "code"),
    [
        (None, "sm_80, sm_90a, PTX of compute_80; CUDA 12.9", ("sm_80", "sm_90a", "compute_80")),
        ("90a", "sm_90a; CUDA 12.9", ("sm_90a",)),
        ("86 100", "sm_86, sm_100, PTX of compute_86; CUDA 12.9", ("sm_86", "sm_100", "compute_86")),
    ],
)
def test_architectures(home, monkeypatch, archs, built, code):
    (home / "lib64" / "libcudart_static.a").touch()
    if archs:
        monkeypatch.setenv("CMOE_CUDA_ARCHS", archs)
    toolkit = build_script().cuda_toolkit()
    assert toolkit.found
    assert toolkit.built == built
    assert [f.rsplit("=", 1)[1] for f in toolkit.command if f.startswith("-gencode")] == list(code)
    assert f"-L{home}/bin/../lib64" in toolkit.link


def test_nvcc_on_the_path(home, monkeypatch):
    monkeypatch.delenv("CUDA_HOME")
    monkeypatch.setenv("PATH", f"{home / 'bin'}:/usr/bin:/bin")
    assert build_script().find_nvcc() == str(home / "bin" / "nvcc")


@pytest.mark.skipif(native.library is None, reason=str(native.error))
def test_the_library_holds_kernels_where_a_toolkit_is():
    built, error = native.cuda_kernels()
    if error:
        assert shutil.which("nvcc") is None or "nvcc" in error or "CMOE_CUDA=0" in error
        pytest.skip(error)
    registered = {op for op, backend in backends._kernels if backend == "cuda"}
    assert {"soft_gate", "soft_gate_backward"} <= registered
    assert "sm_" in built
