"""The gate and loss kernels of Triton, in every configuration that the table of calls launches, compiled for GPUs that are not here.

A sample in CI: sm_80 and sm_90, bf16 at the sizes of the connector and fp32 at odd ones. `make test-full` adds sm_100, gfx942,
every dtype and the other sizes. The kernels of the GEMM ops are not compiled here yet; `python -m benchmarks.aot --ops ...` takes them.
"""

import importlib.util

import pytest
import torch

from cmoe_kernels import backends

if backends.INTERPRETED:
    pytest.skip("compiles, so not in the interpreter's process", allow_module_level=True)
if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

from benchmarks import aot

# Bytes of shared memory that one program may ask for.
SHARED = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024, "gfx942": 64 * 1024}
# Gate, loss and index kernels hold a few rows in registers: they must not spill in any configuration.
SMALL = ("soft_gate", "topk_gate", "balance_loss")
SAMPLED = {"connector": torch.bfloat16, "odd": torch.float32}


def within_budget(rows):
    for row in rows:
        assert row.shared <= SHARED[row.target], row
        if row.op in SMALL:
            assert row.spills == 0, row


@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
@pytest.mark.parametrize("op", [op for op in SMALL if op in aot.served()])
def test_gates_and_losses_fit_in_registers(op, target):
    rows = [row for size, dtype in SAMPLED.items() for row in aot.compile_op(op, target, {size: aot.SIZES[size]}, (dtype,))]
    assert {row.kernel for row in rows} >= {f"{op}_fwd_kernel", f"{op}_bwd_kernel"}
    within_budget(rows)


@pytest.mark.full
@pytest.mark.parametrize("target", list(aot.TARGETS))
@pytest.mark.parametrize("op", [op for op in SMALL if op in aot.served()])
def test_every_size_and_dtype_compiles(op, target):
    rows = aot.compile_op(op, target)
    assert rows
    if target.startswith("sm"):
        within_budget(rows)
