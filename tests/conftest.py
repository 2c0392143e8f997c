"""For every test: one thread, a fixed seed, and memory that torch.empty leaves poisoned, so that an unwritten output shows as NaN."""

import os

import pytest
import torch

from cmoe_kernels import backends
from tests.emulation import library
from tests.ops.cases import DEVICE

if DEVICE != "cpu":  # before the test files are imported: some make tensors for their parameters
    torch.set_default_device(DEVICE)
if backends.INTERPRETED:
    from tests.triton import strict

    strict.install()
if library.WANTED and not library.missing():
    library.install()
try:
    from hypothesis import settings
except ImportError:  # `make gpu-check` installs nothing: the tests that need it are skipped with that reason
    pass
else:
    settings.load_profile("ci")  # the same examples every time, and no limit of time for one


@pytest.fixture(autouse=True)
def _settled():
    torch.set_num_threads(1)
    torch.manual_seed(0)
    # A naive formula may use an operation that has no deterministic form on a GPU; ours are compared bit for bit.
    torch.use_deterministic_algorithms(True, warn_only=DEVICE != "cpu")
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


def pytest_make_parametrize_id(val, argname):
    # Not by content: a gzip header holds the second it was made in, and two workers must collect the same names.
    return argname if isinstance(val, bytes) else None


def pytest_collection_modifyitems(items):
    if os.environ.get("CMOE_TEST_FULL", "0") in ("", "0"):
        skip = pytest.mark.skip(reason="runs under `make test-full`")
        for item in items:
            if "full" in item.keywords:
                item.add_marker(skip)


def pytest_report_header():
    sets = backends.instruction_sets()
    native = f"{backends.native_library}, {sets.used or sets.error}" if sets else f"absent ({backends.native_error})"
    return (
        f"cmoe_kernels: native library {native}; GPU: {torch.cuda.is_available()}; tests on {DEVICE}"
        + (
            "; Triton kernels interpreted: opcheck and tracing of one form per op, of all under `make test-full`"
            if backends.INTERPRETED
            else ""
        )
        + ("; CUDA kernels emulated on the CPU, they alone" if library.WANTED else "")
    )
