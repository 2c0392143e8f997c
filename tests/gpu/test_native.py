"""What only a GPU can show: graphs, no synchronisation, TF32, bad indices, sizes beyond a tile. `make gpu-check` runs it there."""

import os
import subprocess
import sys

import pytest
import torch

import cmoe_kernels as cmoe
from benchmarks.compare import assert_close, grads
from cmoe_kernels import backends
from tests.ops import larger, naive
from tests.ops.cases import CASES, DEVICE, DTYPES, Maker, backends_of, leaves, on_backends, to_double

if DEVICE != "cuda" or not torch.cuda.is_available():
    pytest.skip("needs CMOE_TEST_DEVICE=cuda and a GPU that torch can use", allow_module_level=True)

# The reference reads offsets and indices on the host; the others must not.
NATIVE = [b for b in backends_of("soft_experts") if b in backends.WITHOUT_DOUBLE]
native = [mark for mark in on_backends(CASES).args[1] if mark.values[1] in NATIVE]
on_native = pytest.mark.parametrize(("case", "backend"), native)


def forward_and_backward(case, arguments, upstream=None):
    y = case.call(arguments)
    upstream = torch.ones_like(y) if upstream is None else upstream
    return [y, *grads(y, [arguments[n] for n in leaves(arguments)], upstream)]


@on_native
def test_a_graph_replays_on_other_values(case, backend):
    """Captured once, forward and backward: with other values in the same tensors it gives what a call gives."""
    with cmoe.use_backend(backend):
        static = case.make(torch.float32)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):
                forward_and_backward(case, static)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = forward_and_backward(case, static)
        other = case.make(torch.float32, seed=1)
        expected = forward_and_backward(case, other)
        with torch.no_grad():
            for name, value in other.items():
                if isinstance(value, torch.Tensor):
                    static[name].copy_(value)
        graph.replay()
        torch.cuda.synchronize()
    for name, ours, theirs in zip(["y", *leaves(other)], captured, expected, strict=True):
        assert torch.equal(ours, theirs), name


@on_native
def test_nothing_waits_for_the_device(case, backend):
    with cmoe.use_backend(backend):
        arguments = case.make(torch.float32)
        upstream = torch.ones_like(case.call(arguments))
        forward_and_backward(case, arguments, upstream)  # what is compiled and loaded once may wait
        torch.cuda.synchronize()
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error")
        try:
            forward_and_backward(case, arguments, upstream)
        finally:
            torch.cuda.set_sync_debug_mode(before)


@pytest.mark.parametrize("backend", NATIVE)
def test_the_connector_waits_for_nothing(backend):
    config = cmoe.CMoEConfig(in_features=24, out_features=40, hidden_features=48, aux_losses={"importance": 0.1, "z": 0.1})
    connector = cmoe.CMoEConnector(config)
    features, task = torch.randn(3, 16, 24), torch.tensor([0, 4, 4])
    mask = torch.arange(12).view(3, 4) % 5 != 0

    def train():
        out = connector(features, task, mask=mask)
        (out.embeddings.sum() + out.aux_loss).backward()

    with cmoe.use_backend(backend):
        train()
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            train()
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("backend", NATIVE)
def test_tf32_only_where_it_was_asked_for(backend):
    """IEEE products keep fp32's precision; with torch's switch they lose what plain torch loses to TF32."""
    m = Maker(torch.float32, 0)
    mlp = {"w1": m.x(3, 160, 192), "b1": m.x(3, 160), "w2": m.x(3, 96, 160), "b2": m.x(3, 96)}
    arguments = {"x": m.x(200, 192), "gates": m.gates(200, 3), **mlp}
    exact = naive.soft_experts(**to_double(arguments))
    results = {}
    before = torch.backends.cuda.matmul.allow_tf32
    try:
        for allowed in (False, True):
            torch.backends.cuda.matmul.allow_tf32 = allowed
            with cmoe.use_backend(backend):
                results[allowed] = cmoe.soft_experts(**arguments), naive.soft_experts(**arguments)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
    assert_close("IEEE", results[False][0], exact, results[False][1])
    if backend == "cuda":  # fp32 by FFMA, whatever the switch says
        assert torch.equal(results[True][0], results[False][0])
        return
    # TF32 keeps ten bits of the fraction, as fp16 does.
    assert_close("TF32", results[True][0], exact, results[True][1], torch.float16)
    if torch.version.hip is None and torch.cuda.get_device_capability() >= (8, 0):
        lost = (results[True][0] - results[False][0]).abs().max() / exact.abs().max()
        assert lost > 1e-5, "the switch changed nothing"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", NATIVE)
@pytest.mark.parametrize("form", ["soft", "sparse", "gated", "router"])
@pytest.mark.parametrize("hidden", [330, 336])
def test_many_tiles(hidden, form, backend, dtype):
    """Sizes over several tiles that divide by none, every expert with a tail; rows of whole chunks throughout (336), and not (330)."""
    m = Maker(dtype, 0)
    tokens, width, out, experts = 523, 200, 264, 5
    mlp = {"w1": m.x(experts, hidden, width), "b1": m.x(experts, hidden), "w2": m.x(experts, out, hidden), "b2": m.x(experts, out)}
    mlp = {name: value / value.shape[-1] ** 0.5 for name, value in mlp.items()}
    x = m.x(tokens, width)
    if form == "soft":
        op, arguments = "soft_experts", {"x": x, "gates": m.gates(tokens, experts), **mlp}
    elif form == "router":
        op, arguments = (
            "task_router",
            {"x": x, "task": m.x(3, 56), "w1": m.x(hidden, 256) / 16, "b1": m.x(hidden), "w2": m.x(experts, hidden) / 18},
        )
        arguments |= {"b2": m.x(experts), "group_ids": m.ids(3, tokens)}
    else:
        op, arguments = "sparse_experts", {"x": x, "weights": m.gates(tokens, 2), "indices": m.distinct(tokens, 2, experts), **mlp}
        if form == "gated":
            doubled = {"w1": m.x(experts, 2 * hidden, width) / width**0.5, "b1": m.x(experts, 2 * hidden)}
            arguments |= {**doubled, "gated": True, "activation": "silu"}
    with cmoe.use_backend(backend):
        larger.check(op, larger.with_leaves(arguments), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", larger.EXPERTS)
@pytest.mark.parametrize("backend", NATIVE)
def test_rows_of_whole_chunks(backend, form, dtype):
    with cmoe.use_backend(backend):
        larger.check(*larger.made(form, dtype), dtype)


@pytest.mark.parametrize("backend", NATIVE)
def test_a_bad_index_is_no_expert(backend):
    """It reads and writes nothing, forward and backward; the rest is what it would be without it."""
    m = Maker(torch.float32, 0)
    arguments = {"x": m.x(8, 7), "weights": m.gates(8, 2), "indices": m.distinct(8, 2, 5), **m.mlp()}
    bad, none = arguments["indices"].clone(), arguments["indices"].clone()
    bad[3], none[3] = torch.tensor([1 << 40, -3]), torch.tensor([5, 5])
    results = []
    for indices in (bad, none):
        given = {n: v.detach().requires_grad_(v.is_floating_point()) for n, v in arguments.items()} | {"indices": indices}
        with cmoe.use_backend(backend):
            y = cmoe.sparse_experts(**given)
            results.append([y, *grads(y, [given[n] for n in leaves(given)], torch.ones_like(y))])
        torch.cuda.synchronize()
    assert not results[0][0][3].any()
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    ids = torch.tensor([0, 1, 2, 0, 1, 2, 99, -7])
    with cmoe.use_backend(backend):
        grouped = cmoe.soft_experts(arguments["x"], m.gates(3, 5), **m.mlp(), group_ids=ids)
        hard = cmoe.sparse_experts(arguments["x"], None, torch.arange(3)[:, None], **m.mlp(), group_ids=ids)
    for y in (grouped, hard):
        assert y[:-2].any(-1).all()
        assert not y[-2:].any()


@pytest.mark.parametrize("backend", NATIVE)
def test_check_makes_a_bad_index_an_error(backend):
    code = (
        "import torch, cmoe_kernels as cmoe\n"
        "x, w = torch.randn(4, 6, device='cuda'), torch.randn(3, 5, 6, device='cuda')\n"
        f"with cmoe.use_backend({backend!r}):\n"
        "    cmoe.sparse_experts(x, None, torch.full((4, 1), 7, device='cuda'), w, None)\n"
        "torch.cuda.synchronize()\n"
    )
    for check, expected in (("1", "indices holds 7, must be in 0..3"), ("0", "")):
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", code],
            env=os.environ | {"CMOE_CHECK": check},
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert (done.returncode != 0) == (check == "1"), done.stderr
        assert expected in done.stderr


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("backend", NATIVE)
def test_a_device_that_is_not_the_current_one(backend):
    logits = torch.randn(9, 5)
    with cmoe.use_backend(backend):
        here, there = cmoe.soft_gate(logits), cmoe.soft_gate(logits.to("cuda:1"))
    assert there.device == torch.device("cuda:1")
    assert torch.equal(here, there.to(here.device))
