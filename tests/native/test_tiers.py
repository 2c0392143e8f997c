"""The op tests in every instruction set of this machine: CMOE_CPU_ISA, in a process each."""

import platform
import shutil
from pathlib import Path

import pytest

from cmoe_kernels import native
from tests import forked
from tests.builds import (
    ROOT,
    alone_in,
    build_script,
    copy_of_tree,
    emulated_tiers,
    output_of,
    product_objects,
    run_tests,
    summary_of,
)
from tests.sampling import FULL, SAMPLE

pytestmark = pytest.mark.skipif(native.library is None, reason=str(native.error))
HERE = sets.available if (sets := native.instruction_sets()) else []
KNOWN = ["generic", *build_script().TIERS]

# Numbers depend on the instruction set. The best one is that of the ordinary run. In CI, of those between it and the portable one, AVX2
# alone meets random shapes.
NUMBERS = ("tests/ops/test_promises.py", "tests/ops/test_int8.py", "tests/native/test_shapes.py")
SELECTED = "((test_precision and cpu and (experts or router or linear)) or test_shapes or test_int8)"


def check(tree, tier, capsys):
    full = tier in ("generic", "amx") or FULL
    run = run_tests(tree, *NUMBERS, *SAMPLE, "-k", SELECTED if full else "test_shapes or test_int8", CMOE_CPU_ISA=tier)
    assert run.returncode == 0, output_of(run)
    with capsys.disabled():
        print(f"\ninstruction set {tier}: {summary_of(run)}")


@pytest.mark.parametrize("tier", KNOWN)
def test_the_ops_in_every_instruction_set(tier, capsys):
    if tier not in HERE:
        pytest.skip(f"{tier} does not run here: this machine and this build have {', '.join(HERE)}")
    if tier == HERE[0]:
        pytest.skip(f"{tier} is what every other test here runs in")
    if tier not in ("generic", "avx2") and not FULL:
        pytest.skip("runs under `make test-full`")
    check(ROOT, tier, capsys)


@pytest.fixture(scope="module")
def emulation():
    """A tree whose library has in plain C++ what this processor lacks, and AMX's tile instructions on every one."""
    if not emulated_tiers():
        pytest.skip(f"the emulation needs avx2 and a compiler that knows AMX; here are {', '.join(HERE)}")
    tree, script = copy_of_tree("emulated"), build_script()
    build = script.Build(Path("build", "emulated", "objects"))
    library = script.link_library(build, product_objects(emulate=True).values(), script.torch_folder())
    with alone_in(build.folder):
        build.run()
    shutil.copyfile(library, tree / "cmoe_kernels" / script.LIBRARY)
    return tree


# Half a minute each: CI runs the one with most paths.
EMULATED = ("avx512_bf16", "avx512_vnni", "avx512", "avx_vnni")


@pytest.mark.costly
@pytest.mark.parametrize("tier", ["amx", *(pytest.param(tier, marks=pytest.mark.full) for tier in EMULATED)])
def test_emulated(emulation, tier, capsys):
    """The paths of a tier on a machine that lacks its instructions."""
    if tier not in emulated_tiers():
        pytest.skip(f"{tier} runs here")
    check(emulation, tier, capsys)


def test_an_unknown_instruction_set_is_one_clear_line():
    line = f"CMOE_CPU_ISA is 'sse9', must be one of those that this machine and this build have: {', '.join(HERE)}"
    code = "import torch, cmoe_kernels as c; c.soft_experts(torch.ones(2, 3), torch.ones(2, 1), torch.ones(1, 4, 3), None)"
    run = forked.run(code, CMOE_CPU_ISA="sse9")
    assert run.returncode == 1
    assert line in run.stderr
    report = forked.run("from cmoe_kernels import doctor; print(doctor.report())", CMOE_CPU_ISA="sse9")
    assert report.returncode == 0
    assert f"none: {line}" in report.stdout


def test_the_environment_chooses():
    code = "import cmoe_kernels.native as b; print(b.instruction_sets().used)"
    assert [forked.run(code, CMOE_CPU_ISA=tier).stdout.strip() for tier in HERE] == HERE
    assert forked.run(code, CMOE_CPU_ISA="").stdout.strip() == HERE[0]


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="instruction sets of x86-64")
def test_no_machine_of_this_kind_falls_to_scalar_code():
    """Whatever the processor has beyond the baseline is used."""
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    flags = next((line for line in info.splitlines() if line.startswith("flags")), "")
    if " avx512dq" in flags and " avx512bw" in flags and "avx512" in build_script().tiers_of_compiler():
        assert any(tier.startswith("avx512") for tier in HERE)
    if " avx2 " in flags and "avx2" in build_script().tiers_of_compiler():
        assert "avx2" in HERE
    assert "generic" in HERE
