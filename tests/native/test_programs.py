"""The drivers without torch and Python: races between their threads, sizes beyond int32, products to the bit."""

import platform
import re

import pytest

from cmoe_kernels import native
from tests.builds import compile_program, run_program, runtime_of, tiers_of_products, tiers_to_run, tiers_with_emulation
from tests.sampling import FULL

pytestmark = [
    pytest.mark.skipif(native.library is None, reason=str(native.error)),
    pytest.mark.skipif(platform.system() != "Linux", reason="sanitizers and untouched memory as Linux has them"),
]
TIERS, HERE = tiers_to_run()


@pytest.fixture(scope="module")
def race():
    runtime_of("tsan")
    return compile_program("race", "-O1", "-fsanitize=thread", tiers=None if FULL else HERE[:1])


@pytest.fixture(scope="module")
def sizes():
    return compile_program("sizes")


def some(wanted):
    """All tiers; those that CI leaves to `make test-full` are marked, and those that are emulated."""
    marks = {tier: [*[pytest.mark.full] * (tier not in wanted), *[pytest.mark.costly] * (tier not in HERE)] for tier in TIERS}
    return [pytest.param(tier, marks=of) for tier, of in marks.items()]


# A minute each, and more where the tier is emulated: CI runs the best one of this machine.
@pytest.mark.costly
@pytest.mark.parametrize("tier", some(HERE[:1]))
def test_no_races(race, tier):
    """Forward and backward of every driver with several threads of std::thread under ThreadSanitizer.

    torch's own pool is not seen by it: its OpenMP runtime is not instrumented, and every barrier of it would be reported.
    """
    # Addresses must lie where the sanitizer's shadow expects them.
    run = run_program(race, *(["all"] if FULL else []), CMOE_CPU_ISA=tier, TSAN_OPTIONS="halt_on_error=1:exitcode=66")
    assert run.returncode == 0, (run.stdout + run.stderr)[-6000:]
    assert f"instruction set {tier}" in run.stdout
    assert run.stdout.endswith("0 results differ\n")


@pytest.mark.costly
@pytest.mark.parametrize("tier", [one for one in some(TIERS) if one.values[0] in tiers_with_emulation(TIERS)])
def test_sizes_beyond_int32(sizes, tier):
    run = run_program(sizes, CMOE_CPU_ISA=tier)
    if run.returncode == 77:
        pytest.skip(run.stdout.strip())
    assert run.returncode == 0, run.stdout + run.stderr
    assert f"instruction set {tier}: 0 wrong" in run.stdout


@pytest.mark.parametrize("tier", some(tiers_of_products() or TIERS))
def test_products_to_the_bit(tier):
    """Every way through the drivers of y = x W^T, dx = dy W and dW = dy^T x, on small integers."""
    run = run_program(compile_program("products", "-O1", tiers=tiers_of_products()), CMOE_CPU_ISA=tier)
    assert run.returncode == 0, run.stdout + run.stderr
    assert re.fullmatch(rf"instruction set {tier}: \d{{4}} products, 0 wrong\n", run.stdout)


@pytest.mark.costly
def test_an_instruction_set_that_is_not_there_is_one_line(sizes):
    run = run_program(sizes, CMOE_CPU_ISA="sse9")
    assert (run.returncode, run.stderr) == (2, "")
    assert run.stdout.startswith("CMOE_CPU_ISA is 'sse9', must be one of ")
