"""The products of sm_90a (csrc/cuda/gemm/*_sm90.cu) on the CPU: each sum of the main loop exactly, and what test_gemm.py tests of sm_80."""

import pytest

from tests.builds import compile_emulated, run_emulated, runtime_of
from tests.emulation.test_emulator import pytestmark  # noqa: F401
from tests.emulation.test_gemm import BOUND, LARGE, SMALL, results

# With those of sm_80, which serve where these do not.
KERNELS = tuple(f"{product}{of}" for product in ("grouped_gemm", "dact_gemm", "wgrad") for of in ("", "_sm90"))


@pytest.fixture(scope="module")
def program():
    return compile_emulated("gemm_test", "plain", KERNELS)


# CI has the bounds of the products of sm_80: test_gemm.py.
@pytest.fixture(scope="module", params=[pytest.param("address", marks=pytest.mark.full), "thread"])
def sanitized(request):
    for name in ("asan", "ubsan", "tsan"):
        runtime_of(name)
    return compile_emulated("gemm_test", request.param, KERNELS)


@pytest.fixture(autouse=True)
def sm90(monkeypatch):
    monkeypatch.setenv("CMOE_EMULATE_CAPABILITY", "90")


@pytest.mark.parametrize("order", ["forward", "reverse", "shuffled"])
@pytest.mark.parametrize("when", ["late", "early", "eager"])
def test_main_loop(order, when):
    run = run_emulated(compile_emulated("gemm_sm90_test"), order, when)
    assert run.stdout == "done\n"


@pytest.mark.parametrize("dtype", ["bf16", "f16"])
@pytest.mark.parametrize("scenario", [*SMALL, *LARGE])
def test_values(program, scenario, dtype):
    errors, accesses, _ = results(program, scenario, dtype)
    for name, error in errors.items():
        assert error <= BOUND[dtype], f"{name}: {error} times the rounding"
    assert accesses["ldmatrix"][0] == 0, "these are the products of sm_80"
    copies, phases = accesses["copies"]
    assert phases == copies, f"{phases - copies} bank conflicts in {copies} copies"


def test_operands_that_no_tensor_copy_reads_take_the_products_of_sm80(program):
    errors, _, _ = results(program, "odd_gated", "bf16")
    assert max(errors.values()) <= BOUND["bf16"]


@pytest.mark.parametrize(("scenario", "dtype"), [("gated", "bf16"), ("sum", "f16"), ("large_transposed", "bf16")])
def test_no_order_of_threads_and_no_moment_of_copies_changes_a_bit(program, scenario, dtype):
    digests = {
        results(program, scenario, dtype, order, when)[2]
        for order in ("forward", "reverse", "shuffled")
        for when in ("late", "early", "eager")
    }
    assert len(digests) == 1


@pytest.mark.parametrize("scenario", ["gated_transposed", pytest.param("large", marks=pytest.mark.full)])
def test_sanitizers_find_nothing(sanitized, scenario):
    errors, _, _ = results(sanitized, scenario, "bf16", "shuffled")
    assert max(errors.values()) <= BOUND["bf16"]
