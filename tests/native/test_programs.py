"""The drivers without torch and Python, at sizes beyond int32."""

import platform

import pytest

from cmoe_kernels import backends
from tests.native.programs import compile_program, run_program

pytestmark = [
    pytest.mark.skipif(backends.native_library is None, reason=str(backends.native_error)),
    pytest.mark.skipif(platform.system() != "Linux", reason="untouched memory as Linux has it"),
]
TIERS = list(sets.available) if (sets := backends.instruction_sets()) else []
if "avx512_bf16" in TIERS and "amx" not in TIERS:
    TIERS.append("amx")  # the tile instructions are emulated in these programs


@pytest.fixture(scope="module")
def sizes():
    return compile_program("sizes")


@pytest.mark.parametrize("tier", TIERS)
def test_sizes_beyond_int32(sizes, tier):
    run = run_program(sizes, CMOE_CPU_ISA=tier)
    if run.returncode == 77:
        pytest.skip(run.stdout.strip())
    assert run.returncode == 0, run.stdout + run.stderr
    assert f"instruction set {tier}: 0 wrong" in run.stdout
