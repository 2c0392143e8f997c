"""Expert layers on the emulated kernels where rows are multiples of 16 bytes and exceed a tile, in every order of threads."""

import pytest
import torch

import cmoe_kernels as cmoe
from tests.emulation import library
from tests.ops.larger import EXPERTS, check, made, results, with_leaves

if not library.WANTED:
    pytest.skip("for the process of emulated kernels (CMOE_EMULATE_CUDA=1)", allow_module_level=True)


@pytest.fixture(autouse=True)
def _emulated():
    if reason := library.missing():
        pytest.skip(reason)
    with cmoe.use_backend("cuda"):
        yield


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("form", EXPERTS)
def test_values_and_gradients(form, dtype):
    check(*made(form, dtype), dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("form", EXPERTS)
def test_values_and_gradients_on_sm90(form, dtype):
    with library.emulator(capability=90):
        library.take_counts()
        check(*made(form, dtype), dtype)
    assert library.take_counts().ldmatrix == 0, "a product of sm_80"


@pytest.mark.parametrize("form", ["soft", "sparse-gated", "grouped"])
def test_weights_in_fp32_under_rows_in_half_precision(form):
    op, narrow = made(form, torch.bfloat16)
    wide = with_leaves({n: v.detach().float() if n[0] in "wb" and n != "weights" else v for n, v in narrow.items()})
    check(op, wide, torch.bfloat16, plain=narrow)


# Order of threads, and whether asynchronous instructions take effect as late as they may.
MODES = [("forward", True), ("reverse", False), ("shuffled", True)]
REST = [("forward", False), ("reverse", True), ("shuffled", False)]


@pytest.mark.parametrize("modes", [pytest.param(MODES, id="three"), pytest.param(MODES[:1] + REST, id="rest", marks=pytest.mark.full)])
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("form", EXPERTS)
def test_no_order_of_threads_and_no_moment_of_copies_changes_a_bit(form, capability, modes):
    found = []
    for order, lazy in modes:
        with library.emulator(order, lazy=lazy, capability=capability):
            found.append(results(*made(form, torch.bfloat16)))
    for mode, again in zip(modes[1:], found[1:], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(found[0], again, strict=True)), mode
