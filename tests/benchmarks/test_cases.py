"""Every case at a tiny shape: ours and each peer that is installed give the fp64 result."""

import functools

import pytest
import torch

from benchmarks import peers
from benchmarks.cases import CASES, select
from benchmarks.shapes import SHAPES, TINY
from benchmarks.steps import PEER_SLACK, ROWS, Exact, Leaves, Rule, Skipped, Step, WrongResult, sample, sampled_rows

TINIES = [i for i in select(tiny=True) if i.tokens == 64]


def made(instance):
    try:
        return instance.make()
    except Skipped as reason:
        pytest.skip(str(reason))


@pytest.mark.parametrize("instance", TINIES, ids=lambda i: i.key)
def test_ours_and_every_peer_give_the_result(instance):
    work = made(instance)
    rule = Rule(work)
    ours = work.ours()
    rule.check(ours)
    assert work.bytes > 0
    ran = []
    for name, make in work.peers.items():
        if "compiled" in name:
            continue
        try:
            rule.check(make(), PEER_SLACK)
            ran.append(name)
        except Skipped:
            continue
    assert work.baseline in ran


@pytest.mark.full  # Inductor takes most of a minute for a connector
@pytest.mark.parametrize("name", ["compiled loop", "compiled fused"])
def test_compiled_peers_give_the_result(name):
    work = next(i for i in TINIES if i.case.name == "soft_connector").make()
    Rule(work).check(work.peers[name](), PEER_SLACK)


def test_a_compiled_peer_gives_the_result():
    work = next(i for i in TINIES if i.case.name == "topk_gate").make()
    Rule(work).check(peers.compiled(work.peers["torch"])(), PEER_SLACK)


def test_every_case_has_a_tiny_shape_and_real_ones():
    for case in CASES.values():
        shapes = {i.shape.name for i in case.instances()}
        assert shapes & set(TINY)
        assert shapes - set(TINY)
    keys = [i.key for case in CASES.values() for i in case.instances()]
    assert len(keys) == len(set(keys))


def test_the_released_shape_has_the_released_sizes():
    s = SHAPES["released"]
    router = s.R * (s.S + s.D) + s.R + s.E * s.R + s.E
    assert (router, s.expert_weights + s.expert_biases) == (507_781_125, 199_270_400)


def test_select_knows_its_words():
    assert {i.case.name for i in select("gemm_dx,topk", tiny=True)} == {"gemm_dx", "topk_gate"}
    assert not any(i.shape.name in TINY for i in select())
    with pytest.raises(ValueError, match="no_such_case"):
        select("soft,no_such_case")


def test_bytes_saved_for_backward_leave_out_weights_and_inputs():
    x, w = torch.randn(6, 4), torch.randn(5, 4)
    leaves = Leaves()
    weight = leaves.weight("w", w)
    step = Step(lambda: (x @ weight.T).exp().sigmoid(), leaves, torch.randn(6, 5))
    assert step.saved_bytes([x]) == 2 * 6 * 5 * 4  # what exp and what sigmoid gave
    assert step.saved_bytes([]) == 2 * 6 * 5 * 4 + x.nbytes


def test_recompute_saves_only_what_is_small():
    saved = {}
    for name in ("soft_connector", "soft_connector_recompute"):
        work = next(i for i in TINIES if i.case.name == name).make()
        saved[name] = work.ours().saved_bytes(work.given)
        loop = work.peers["released loop"]().saved_bytes(work.given)
    assert saved["soft_connector"] < 0.5 * loop
    assert saved["soft_connector_recompute"] < 0.08 * loop


def test_sampled_rows_reach_both_ends():
    assert sampled_rows(7).tolist() == list(range(7))
    rows = sampled_rows(20480)
    assert len(set(rows.tolist())) == ROWS
    assert (rows[0], rows[-1]) == (0, 20479)
    stack = torch.randn(2, 1000, 3)
    assert torch.equal(sample(stack), stack[:, sampled_rows(1000)])


def test_the_exact_linear_layer_has_the_gradients_of_the_compared_rows():
    """A weight with more rows than are compared, and more than one block."""
    x, w, b = torch.randn(3, 7), torch.randn(5000, 7), torch.randn(5000)
    dy = torch.randn(3, 5000)
    results = []
    for leaves, rows in ((Exact(), x.double()), (Leaves(), x)):
        arguments = leaves.vector("x", rows), leaves.weight("w", w), leaves.vector("b", b)
        results.append(Step(functools.partial(leaves.linear, *arguments), leaves, dy).results())
    for name in ("y", "w", "b", "x"):
        torch.testing.assert_close(results[0][name].float(), results[1][name], msg=name, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("wrong", ["y", "grad", "nan"])
def test_a_wrong_result_is_named(wrong):
    work = next(i for i in TINIES if i.key == "soft_gate/tiny/T64/float32").make()
    rule, step = Rule(work), work.ours()
    forward = step.forward
    rule.check(step)
    if wrong == "grad":
        step.dy = 1.001 * step.dy
    else:
        step.forward = (lambda: 1.001 * forward()) if wrong == "y" else (lambda: forward().masked_fill(torch.eye(64, 5) > 0, torch.nan))
    with pytest.raises(WrongResult, match="logits" if wrong == "grad" else "y"):
        rule.check(step)


def test_a_wrong_plain_formula_is_no_measure():
    work = next(i for i in TINIES if i.key == "topk_gate/tiny/T64/float32").make()
    make = work.peers["torch"]

    def wrong():
        step = make()
        forward = step.forward
        step.forward = lambda: 1.01 * forward()
        return step

    work.peers["torch"] = wrong
    with pytest.raises(WrongResult, match="torch: y"):
        Rule(work)
