"""The Triton kernels, compiled for GPUs that are not here, in the launches that the table of calls makes, and held to budgets.

Where a kernel has changed, CI compiles one bf16 launch of each, for sm_80 and sm_90 by turns. It holds every row of
benchmarks/results/aot.json to the same budgets. `make test-full` compiles all configurations, every bf16 form of the products, and all
that the file has, also for sm_100 and gfx942, where a launch must compile and is held to no budget. TF32's rounding is seen neither here
nor in the interpreter.
"""

import functools
import importlib
import importlib.util
import pkgutil

import pytest

from cmoe_kernels import backends

if backends.INTERPRETED:
    pytest.skip("compiles, so not in the interpreter's process", allow_module_level=True)
if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

from triton.runtime.jit import JITFunction

import cmoe_kernels.ops
from benchmarks.inspection import aot
from tests.sampling import FULL, chosen

# Bytes of shared memory that one program may ask for.
SHARED = {"sm_80": 163 << 10, "sm_90": 227 << 10}
# Programs that a multiprocessor is to hold at once, so that one computes while another waits, by their warps; larger tiles hide the wait
# in their own pipeline.
RESIDENT = {4: 2, 8: 1}


def on(target, *marks):
    """A target's tests in one worker of xdist (--dist loadgroup), which records its launches once."""
    return pytest.param(target, marks=(pytest.mark.xdist_group(target), *marks))


def within_budget(row):
    assert row["shared"] <= SHARED[row["target"]], row
    fast = row["operand"] in ("bf16", "fp16", "tf32") and row["aligned"]
    if fast or not row["operand"]:
        assert row["spills"] == 0, row
    if fast:
        assert aot.blocks(row) >= RESIDENT[row["warps"]], row
        assert row["mma"] > 0, row
        assert row["async_copies"] + row["tma"] > 0, row
        # A warp group multiplies 64 rows.
        if row["target"] == "sm_90" and row["operand"] != "tf32" and int(row["tile"].split("x")[0]) >= 64:
            assert row["wgmma"] > 0, row
        assert (row["tma"] > 0) == (row["target"] == "sm_90" and row["descriptors"] > 0), row


@pytest.mark.costly
@pytest.mark.parametrize("target", [on(target) for target in aot.PROVEN])
def test_configurations_in_bf16(target):
    launches = aot.cover(aot.bf16(target))
    if not FULL:
        by_turns = sorted({launch.kernel for launch in launches})[aot.PROVEN.index(target) :: len(aot.PROVEN)]
        launches = [launch for launch in launches if launch.kernel in by_turns]
        launches = [launches[i] for i in chosen(target, [(launch.kernel,) for launch in launches], len(by_turns))]
    for launch in launches:
        within_budget(launch.report())


# To record the launches of those that are only reported takes longer than it shows.
TARGETS = [on(target, *(() if target in aot.PROVEN else (pytest.mark.full,))) for target in aot.TARGETS]


@pytest.mark.costly
@pytest.mark.parametrize("target", TARGETS)
def test_every_kernel_is_compiled(target):
    modules = [m.name for m in pkgutil.walk_packages(cmoe_kernels.ops.__path__, "cmoe_kernels.ops.")]
    found = [vars(importlib.import_module(name)).values() for name in modules]
    kernels = {v.__name__ for values in found for v in values if isinstance(v, JITFunction) and v.__name__.endswith("_kernel")}
    assert {launch.kernel for launch in aot.compiled(target)} == kernels


@functools.cache
def committed():
    return {row["key"]: row for row in aot.read()}


@pytest.mark.costly
@pytest.mark.parametrize("target", TARGETS)
def test_the_committed_launches_are_those_of_the_code(target):
    """If not: `make aot`."""
    assert {row["key"] for row in committed().values() if row["target"] == target} == {launch.key for launch in aot.compiled(target)}


def test_the_committed_rows_are_within_budget():
    for row in committed().values():
        if row["target"] in aot.PROVEN:
            within_budget(row)


def test_the_page_has_a_line_for_each_row():
    assert sum(line.startswith("| ") for line in aot.page(aot.read()).splitlines()) == len(aot.read()) + 2 * len(aot.TARGETS)


@pytest.mark.full
@pytest.mark.parametrize("target", [on(target) for target in aot.PROVEN])
def test_every_form_of_a_product_in_bf16(target):
    for launch in aot.bf16(target):
        if launch.product:
            within_budget(launch.report())


@pytest.mark.full
@pytest.mark.parametrize("target", [on(target) for target in aot.TARGETS])
def test_the_compiler_says_what_is_committed(target):
    for launch in aot.compiled(target):
        assert launch.report() == committed()[launch.key]
