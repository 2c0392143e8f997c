"""The products of expert layers (csrc/cuda/gemm/*.cu) on the CPU: against fp64, in every order of threads, without bank conflicts."""

import re

import pytest

from tests.builds import compile_emulated, run_emulated, runtime_of
from tests.emulation.test_emulator import needs_fibers as pytestmark  # noqa: F401

KERNELS = ("grouped_gemm", "dact_gemm", "wgrad", "without_sm90")
# By cp.async in small tiles, in large tiles, and element by element.
SMALL = (
    "sparse",
    "sorted",
    "transposed",
    "gated",
    "gated_transposed",
    "gated_in_fours",
    "dense",
    "sum",
    "sum_transposed",
    "empty",
    "bad",
    "padded",
    "deep",
    "many",
)
LARGE = ("large", "large_transposed", "large_gated")
ELEMENTS = ("odd", "odd_gated", "odd_sum", "odd_bad", "wide")
SCENARIOS = (*SMALL, *LARGE, *ELEMENTS)
# Over the rounding of the result: halves are rounded once, what is made of halves that were rounded twice; fp32 adds some hundred terms.
BOUND = {"bf16": 1.1, "f16": 1.1, "f32": 12.0}


def results(program, *arguments):
    run = run_emulated(program, *arguments)
    assert run.returncode == 0, run.stdout + run.stderr[-3000:]
    errors, accesses, digest = run.stdout.splitlines()
    counts = [int(n) for n in re.findall(r"\d+", accesses)]
    named = dict(zip(errors.split()[::2], map(float, errors.split()[1::2]), strict=True))
    return named, dict(zip(("copies", "ldmatrix", "vectors"), zip(counts[::2], counts[1::2], strict=True), strict=True)), digest


@pytest.fixture(scope="module")
def program():
    return compile_emulated("gemm_test", "plain", KERNELS)


@pytest.mark.parametrize("dtype", ["bf16", "f16", "f32"])
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_values_and_bank_conflicts(program, scenario, dtype):
    errors, accesses, _ = results(program, scenario, dtype)
    for name, error in errors.items():
        assert error <= BOUND[dtype], f"{name}: {error} times the rounding"
    if scenario != "empty":
        assert (accesses["copies"][0] > 0) == (dtype != "f32" and not scenario.startswith("odd"))
        assert (accesses["ldmatrix"][0] > 0) == (dtype != "f32")
    for kind, (count, phases) in accesses.items():
        assert phases == count, f"{kind}: {phases - count} bank conflicts in {count} accesses"


@pytest.mark.parametrize(
    ("scenario", "dtype"),
    [
        ("sparse", "bf16"),
        ("gated_transposed", "f16"),
        ("sum", "bf16"),
        ("deep", "bf16"),
        ("odd_gated", "bf16"),
        ("odd", "f32"),
        ("large", "bf16"),
    ],
)
def test_no_order_of_threads_and_no_moment_of_copies_changes_a_bit(program, scenario, dtype):
    digests = {
        results(program, scenario, dtype, order, *mode)[2] for order in ("forward", "reverse", "shuffled") for mode in ((), ("eager",))
    }
    assert len(digests) == 1


# Half a minute of compiling each; CI has threads' races in the products of sm_90a.
@pytest.fixture(scope="module", params=["address", pytest.param("thread", marks=pytest.mark.full)])
def sanitized(request):
    for name in ("asan", "ubsan", "tsan"):
        runtime_of(name)
    return compile_emulated("gemm_test", request.param, KERNELS)


@pytest.mark.costly
@pytest.mark.parametrize(
    ("scenario", "dtype"),
    [("sparse", "bf16"), ("gated_transposed", "bf16"), ("odd_gated", "f32")]
    + [pytest.param(s, d, marks=pytest.mark.full) for s in SCENARIOS for d in ("bf16", "f32")],
)
def test_sanitizers_find_nothing(sanitized, scenario, dtype):
    errors, _, _ = results(sanitized, scenario, dtype, "shuffled")
    assert max(errors.values()) <= BOUND[dtype]
