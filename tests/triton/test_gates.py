"""Gates and losses over more rows than one program holds, more experts than a warp, and values that only a GPU must survive.

The table of tests/ops has eleven tokens, which one program serves: what programs do beside each other is tested here.
"""

import pytest
import torch

import cmoe_kernels as cmoe
from cmoe_kernels import backends
from tests.ops import naive

if not backends.INTERPRETED:
    pytest.skip("for the interpreter's process (TRITON_INTERPRET=1)", allow_module_level=True)

from cmoe_kernels.ops.balance_loss import triton as balance_loss_triton
from cmoe_kernels.ops.topk_gate import reference as topk_reference
from cmoe_kernels.ops.topk_gate import triton as topk_triton
from tests.triton import strict

SHAPES = [(300, 5), (130, 8), (40, 64), (3, 1500)]


@pytest.fixture(autouse=True)
def _triton():
    with cmoe.use_backend("triton"):
        yield


@pytest.mark.parametrize(("tokens", "experts"), SHAPES)
def test_soft_gate(tokens, experts):
    logits = torch.randn(tokens, experts, requires_grad=True)
    dgates = torch.randn(tokens, experts)
    double = logits.detach().double().requires_grad_()
    gates, exact = cmoe.soft_gate(logits), naive.soft_gate(double)
    torch.testing.assert_close(gates, exact.float(), rtol=1e-5, atol=1e-7)
    gates.backward(dgates)
    exact.backward(dgates.double())
    torch.testing.assert_close(logits.grad, double.grad.float(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("tokens", "experts"), SHAPES)
@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("renormalize", [True, False])
def test_topk_gate(tokens, experts, score, renormalize):
    # Few distinct values, so that every row has ties.
    logits = torch.randint(-3, 4, (tokens, experts)).float()
    k = min(3, experts)
    weights, indices, counts = cmoe.topk_gate(logits, k, score, renormalize)
    expected = topk_reference.topk_gate(logits, k, score, renormalize, 1.0, None)
    assert torch.equal(indices, expected[1])
    assert torch.equal(counts, expected[2])
    torch.testing.assert_close(weights, expected[0], rtol=1e-5, atol=1e-7)
    dweights = torch.randn(tokens, k)
    ours = topk_triton.topk_gate_backward(dweights, logits, indices, score, renormalize, 1.5)
    torch.testing.assert_close(
        ours, topk_reference.topk_gate_backward(dweights, logits, indices, score, renormalize, 1.5), rtol=1e-4, atol=1e-6
    )


@pytest.mark.parametrize("seed", range(3))
def test_counts_of_programs_that_take_turns(seed, monkeypatch):
    """The only programs that meet: their counts are added by integer atomics, in whatever order."""
    monkeypatch.setattr(topk_triton, "TILE", 64)
    logits = torch.randn(100, 5)
    with strict.schedule("shuffle", seed):
        _, indices, counts = cmoe.topk_gate(logits, 2)
    assert torch.equal(counts, indices.flatten().bincount(minlength=5).int())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_ranks_are_those_of_a_stable_sort(dtype):
    """Signed zeros are equal, NaN of either sign comes first, -inf is no expert; fp64 selections keep what fp32 would lose."""
    nan, inf = torch.nan, torch.inf
    special = torch.tensor([[0.0, -0.0, 0.0, -inf], [1.0, nan, inf, -nan], [-1.0, -1e-30, -2.0, 1e-30], [-inf, -inf, -inf, -3.0]])
    selection = torch.cat([special.to(dtype), (torch.randn(8, 4, dtype=torch.float64) * 1e-9 + 1).to(dtype)])
    logits = torch.randn(12, 4)
    _, indices, counts = cmoe.topk_gate(logits, 3, selection=selection)
    _, expected, expected_counts = topk_reference.topk_gate(logits, 3, "softmax", True, 1.0, selection)
    assert torch.equal(indices, expected)
    assert torch.equal(counts, expected_counts)


def test_a_bad_index_reads_and_receives_nothing():
    logits, dweights = torch.randn(2, 3), torch.randn(2, 2)
    indices = torch.tensor([[1 << 40, 0], [-1, 2]])
    clean = torch.tensor([[3, 0], [3, 2]])
    for score, renormalize in (("softmax", True), ("softmax", False), ("sigmoid", True)):
        ours = topk_triton.topk_gate_backward(dweights, logits, indices, score, renormalize, 1.0)
        torch.testing.assert_close(ours, topk_reference.topk_gate_backward(dweights, logits, clean, score, renormalize, 1.0))
    scores = torch.rand(2, 3)
    assert balance_loss_triton.balance_loss(scores, indices, None, "switch", None, None, None).isfinite()


@pytest.mark.parametrize("segmented", [False, True], ids=["whole", "segments"])
@pytest.mark.parametrize("kind", ["switch", "importance", "z"])
@pytest.mark.parametrize(("tokens", "experts", "programs"), [(150, 8, 7), (90, 5, 7), (40, 64, 40)])
def test_balance_loss(tokens, experts, programs, kind, segmented, monkeypatch):
    """With fewer programs than blocks of tokens, with more than the second stage adds at a time, and segments longer than a block."""
    monkeypatch.setattr(balance_loss_triton, "TILE", 64)
    monkeypatch.setattr(balance_loss_triton, "PROGRAMS", programs)
    arguments = {
        "indices": torch.randint(-1, experts + 1, (tokens, 2)) if kind == "switch" else None,
        "mask": torch.rand(tokens) < 0.7,
        "kind": kind,
        "segments": torch.randint(-2, 3, (tokens,)) * (1 << 35) if segmented else None,
    }
    scores = torch.rand(tokens, experts, requires_grad=True)
    double = scores.detach().double().requires_grad_()
    loss, exact = cmoe.balance_loss(scores, **arguments), naive.balance_loss(double, **arguments)
    torch.testing.assert_close(loss, exact.float(), rtol=1e-5, atol=1e-6)
    loss.backward()
    exact.backward()
    torch.testing.assert_close(scores.grad, double.grad.float(), rtol=1e-3, atol=1e-3 * double.grad.abs().max().item())
