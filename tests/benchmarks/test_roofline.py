"""The roofline's page: its counts against the algebra, and that it says what it is."""

import importlib.util
import json

import pytest

from cmoe_kernels import backends

if backends.INTERPRETED:
    pytest.skip("for the ordinary process", allow_module_level=True)
if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed: its wrappers are what is counted", allow_module_level=True)

from benchmarks.inspection import launch_counts, roofline
from benchmarks.shapes import SHAPES

TOKENS = 64


def rows(name):
    return {(r.op, r.backward): r for r in roofline.predict((name,), (TOKENS,), ("bf16",))}


def flops(steps):
    return sum(step.flops for step in steps)


def test_released_products_are_those_of_the_algebra():
    s, t = SHAPES["released"], TOKENS
    got = rows("released")
    router = got["task_router", False]
    assert flops(router.ours["A100"]) == 2 * (t * s.D * s.R + s.S * s.R + t * s.R * s.E)
    assert flops(router.torch) == 2 * (t * (s.S + s.D) * s.R + t * s.R * s.E)
    experts = 2 * t * s.E * (s.D * s.H + s.H * s.O)
    assert flops(got["soft_experts", False].ours["H100"]) == flops(got["soft_experts", False].torch) == experts
    # dx and dw of each product; dh = dy @ w2 gives the gates' gradient too.
    assert flops(got["soft_experts", True].ours["B200"]) == 3 * experts
    layer = got["layer", True]
    assert flops(layer.ours["H100"]) < flops(layer.torch)
    assert len(layer.ours["H100"]) < len(layer.torch)
    # The weights alone have to be read: no prediction can be shorter.
    weights = 2 * (s.R * (s.S + s.D) + s.expert_weights)
    assert sum(step.bytes for step in got["layer", False].ours["MI300X"]) > weights


@pytest.mark.parametrize("name", ["cumo", "mixtral"])
def test_sparse_products_are_those_of_the_chosen_experts(name):
    s = SHAPES[name]
    experts = 2 * TOKENS * s.K * (s.expert_weights // s.E)
    got = rows(name)["sparse_experts", False]
    assert flops(got.ours["H100"]) == flops(got.torch) == experts


def test_time_is_the_larger_bound():
    gpu = launch_counts.Gpu(launch_counts.TARGETS["sm_90"], {"bf16": 100.0, "fp32": 10.0}, 5.0, "made up")
    assert launch_counts.Step("gemm", 300.0, 5.0, "bf16").seconds(gpu) == 3.0
    assert launch_counts.Step("gemm", 300.0, 5.0, "fp32").seconds(gpu) == 30.0
    assert launch_counts.Step("copy", 0.0, 20.0).seconds(gpu) == 4.0


def test_page_and_results_say_that_nothing_was_measured(tmp_path):
    got = roofline.predict(("cumo",), (TOKENS,), ("bf16",))
    text = roofline.page(got)
    assert text.startswith("This page predicts; nothing on it was measured")
    assert f"| cumo | {TOKENS} | forward |" in text
    roofline.plot(got, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 1000
    document = json.loads(roofline.RESULTS.read_text())
    assert "nothing was measured" in document["what"]
