"""Edge sizes: nothing to do, one of everything, all of one kind, primes."""

import pytest
import torch
from torch import Tensor

import cmoe_kernels as cmoe
from tests.ops import naive
from tests.ops.cases import CASES, Maker, backends_of, leaves, on_backends

TOKEN_ARGUMENTS = ("logits", "x", "scores", "mask", "segments", "group_ids", "selection")


def without_tokens(case, arguments):
    """The same call with T = 0."""
    tokens = next(arguments[n].shape[0] for n in ("x", "logits", "scores") if arguments.get(n) is not None)
    emptied = {}
    for name, value in arguments.items():
        per_token = name in TOKEN_ARGUMENTS or (name in ("gates", "weights", "indices") and value is not None and value.shape[0] == tokens)
        if name == "offsets":
            value = torch.zeros_like(value)
        elif name in ("gather_idx", "scatter_idx") and value is not None:
            value = value[:0]
        elif isinstance(value, Tensor) and per_token:
            value = value.detach()[:0].requires_grad_(value.requires_grad)
        emptied[name] = value
    return emptied


@on_backends([c for c in CASES if c.form not in ("task", "task-one_layer")])
def test_no_tokens(case, backend):
    arguments = without_tokens(case, case.make(torch.float32))
    names = leaves(arguments)
    with cmoe.use_backend(backend):
        y = case.call(arguments)
        got = torch.autograd.grad(y.sum(), [arguments[n] for n in names], allow_unused=True)
    if case.op == "balance_loss":
        assert y == 0
    else:
        assert y.shape[0] == 0
    for name, grad in zip(names, got, strict=True):
        assert grad is None or (grad.shape == arguments[name].shape and not grad.any()), name


@pytest.mark.parametrize("backend", backends_of("topk_gate"))
def test_topk_of_no_tokens_counts_nothing(backend):
    with cmoe.use_backend(backend):
        weights, indices, counts = cmoe.topk_gate(torch.empty(0, 5), 2)
    assert weights.shape == indices.shape == (0, 2)
    assert counts.tolist() == [0] * 5
    assert counts.dtype == torch.int32


# Tokens, width, hidden width, output width, experts.
SIZES = [(1, 1, 1, 1, 1), (1, 3, 5, 7, 5), (13, 17, 19, 23, 3), (5, 1, 1, 1, 7), (37, 16, 32, 16, 4)]


def sized(op, m, tokens, width, hidden, out, experts):
    """Arguments of an op at given sizes."""
    x = m.x(tokens, width)
    if op == "task_router":
        return {"x": x, "task": m.x(1, out), "w1": m.x(hidden, out + width), "b1": m.x(hidden), "w2": m.x(experts, hidden), "b2": None}
    weights = {"w1": m.x(experts, hidden, width), "b1": m.x(experts, hidden), "w2": m.x(experts, out, hidden), "b2": m.x(experts, out)}
    if op == "soft_experts":
        return {"x": x, "gates": m.gates(tokens, experts), **weights}
    return {"x": x, "weights": m.gates(tokens, experts), "indices": m.distinct(tokens, experts, experts), **weights}


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("op", ["soft_experts", "sparse_experts", "task_router"])
def test_sizes(op, sizes):
    arguments = sized(op, Maker(torch.float64, 0), *sizes)
    torch.testing.assert_close(getattr(cmoe, op)(**arguments), getattr(naive, op)(**arguments), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", backends_of("sparse_experts"))
def test_all_tokens_to_one_expert_leaves_zero_gradients_elsewhere(backend):
    m = Maker(torch.float32, 0)
    weights = {n: t.requires_grad_() for n, t in m.mlp().items()}
    x = m.x(8, weights["w1"].shape[2])
    with cmoe.use_backend(backend):
        y = cmoe.sparse_experts(x, None, torch.full((8, 1), 3), **weights)
        y.sum().backward()
    for tensor in weights.values():
        assert tensor.grad[3].any()
        assert not tensor.grad[[0, 1, 2, 4]].any()


@pytest.mark.parametrize("backend", backends_of("sparse_experts"))
def test_no_expert_at_all(backend):
    m = Maker(torch.float32, 0)
    weights = m.mlp()
    x, gates = m.x(8, 7).requires_grad_(), m.gates(8, 2).requires_grad_()
    with cmoe.use_backend(backend):
        y = cmoe.sparse_experts(x, gates, torch.full((8, 2), 5), **weights)
        y.sum().backward()
    assert not y.any()
    assert not x.grad.any()
    assert not gates.grad.any()


PADDED = ["mlp", "mlp-all", "gated", "gated-recompute", "groups", "hard", "linear"]


@on_backends([c for c in CASES if c.op == "sparse_experts" and c.form in PADDED])
def test_padding_of_no_expert_may_hold_anything(case, backend):
    """-1, as serving stacks pad, is E: the same bits, and no value of such a token reaches an output or a gradient."""
    arguments = case.make(torch.float32)
    grouped = arguments.get("group_ids")
    padded = torch.arange(arguments["indices"].shape[0]) % 3 == 1
    tokens = padded if grouped is None else padded[grouped]
    results = []
    for index, value in ((arguments["w1"].shape[0], 0.0), (-1, torch.nan)):
        call = {
            **arguments,
            "indices": arguments["indices"].masked_fill(padded[:, None], index),
            "x": arguments["x"].detach().masked_fill(tokens[:, None], value).requires_grad_(),
        }
        if call["weights"] is not None:
            call["weights"] = call["weights"].detach().masked_fill(padded[:, None], value).requires_grad_()
        names = leaves(call)
        with cmoe.use_backend(backend):
            y = case.call(call)
            upstream = torch.linspace(-1, 1, y.numel()).view_as(y).masked_fill(tokens[:, None], value)
            results.append([y, *torch.autograd.grad(y, [call[n] for n in names], upstream)])
    for name, want, got in zip(["y", *names], *results, strict=True):
        assert torch.equal(got, want), name
    assert not results[1][0][tokens].any()


@pytest.mark.parametrize("backend", backends_of("grouped_linear"))
def test_rows_of_no_expert_may_hold_anything(backend):
    x, w = torch.randn(7, 4), torch.randn(2, 3, 4).requires_grad_()
    results = []
    for value in (0.0, torch.nan):
        spoiled = x.masked_fill((torch.arange(7) > 4)[:, None], value).requires_grad_()
        with cmoe.use_backend(backend):
            y = cmoe.grouped_linear(spoiled, w, None, torch.tensor([0, 3, 5], dtype=torch.int32), activation="silu")
            results.append([y, *torch.autograd.grad(y.sum(), [spoiled, w])])
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


@pytest.mark.parametrize("backend", backends_of("balance_loss"))
@pytest.mark.parametrize("segmented", [False, True])
def test_balance_loss_counts_minus_one_as_no_expert(segmented, backend):
    scores, indices = torch.rand(9, 4), torch.randint(0, 5, (9, 2))
    results = []
    for none in (4, -1):
        leaf = scores.clone().requires_grad_()
        with cmoe.use_backend(backend):
            loss = cmoe.balance_loss(leaf, indices.masked_fill(indices == 4, none), segments=torch.arange(9) // 4 if segmented else None)
            results.append([loss, *torch.autograd.grad(loss, [leaf])])
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


@pytest.mark.parametrize("backend", backends_of("soft_gate"))
def test_soft_gate_where_every_sigmoid_underflows(backend):
    logits = torch.tensor([[-200.0, -201.0, -200.0], [-1e4, 0.0, 1e4]], requires_grad=True)
    with cmoe.use_backend(backend):
        gates = cmoe.soft_gate(logits)
        gates[:, 0].sum().backward()
    e = torch.tensor(-1.0).exp()
    torch.testing.assert_close(gates[0], torch.stack([1 / (2 + e), e / (2 + e), 1 / (2 + e)]))
    torch.testing.assert_close(gates.sum(-1), torch.ones(2))
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize("backend", backends_of("topk_gate"))
@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("renormalize", [True, False])
def test_topk_ties_exclusion_and_saturation(backend, score, renormalize):
    inf = torch.inf
    logits = torch.tensor(
        [[1.0, 2.0, 2.0, 2.0], [300.0, 200.0, 100.0, 400.0], [0.0, 1.0, 2.0, 3.0], [0.0, 1.0, 2.0, 3.0]], requires_grad=True
    )
    selection = torch.tensor([[1.0, 2.0, 2.0, 2.0], [300.0, 200.0, 100.0, 400.0], [0.0, 0.0, -inf, -inf], [-inf, -inf, -inf, 0.0]])
    with cmoe.use_backend(backend):
        weights, indices, counts = cmoe.topk_gate(logits, 2, score, renormalize, selection=selection)
        nothing = torch.full((1, 4), -inf, requires_grad=True)
        excluded = cmoe.topk_gate(nothing, 2, score, renormalize)
        excluded.weights.sum().backward()
        (weights.sum() + weights[:, 0].sum()).backward()
    assert indices.tolist() == [[1, 2], [3, 0], [0, 1], [3, 4]]
    assert counts.tolist() == [2, 2, 1, 2]
    assert weights[3, 1] == 0
    assert weights.isfinite().all()
    assert logits.grad.isfinite().all()
    assert excluded.indices.tolist() == [[4, 4]]
    assert not excluded.weights.any()
    assert not nothing.grad.any()
    assert not nothing.grad.any()


@pytest.mark.parametrize("backend", backends_of("soft_gate"))
@pytest.mark.parametrize("experts", [1, 3, 5, 8])
def test_equal_gradients_of_gates_whose_sum_is_one_cancel_exactly(backend, experts):
    """Experts that are equal, as those of an upcycled connector, give their router nothing, not even rounding."""
    logits = torch.randn(64, experts, requires_grad=True)
    for dtype in (torch.float32, torch.bfloat16):
        with cmoe.use_backend(backend):
            rows = logits.to(dtype)
            gates = [cmoe.soft_gate(rows)]
            gates += [
                cmoe.topk_gate(rows, k, score, scale=2.5).weights
                for k in {1, 2, experts}
                if k <= experts
                for score in ("softmax", "sigmoid")
            ]
        for made in gates:
            (grad,) = torch.autograd.grad((made * torch.randn(64, 1)).sum(), logits, retain_graph=True)
            assert not grad.any()


@pytest.mark.parametrize("backend", backends_of("balance_loss"))
@pytest.mark.parametrize("kind", ["switch", "importance", "z"])
def test_everything_masked(backend, kind):
    scores = torch.full((4, 3), torch.nan, requires_grad=True)
    indices = torch.zeros(4, 1, dtype=torch.int64) if kind == "switch" else None
    with cmoe.use_backend(backend):
        loss = cmoe.balance_loss(scores, indices, torch.zeros(4, dtype=torch.bool), kind)
        loss.backward()
    assert loss == 0
    assert not scores.grad.any()


@pytest.mark.parametrize("backend", backends_of("balance_loss"))
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("segmented", [False, True])
@pytest.mark.parametrize("kind", ["switch", "importance", "z", "switch-logits", "importance-logits"])
def test_masked_scores_may_be_anything(kind, segmented, value, backend):
    kind, _, from_logits = kind.partition("-")
    mask = torch.arange(8) % 3 != 1
    scores, indices = torch.rand(8, 3), torch.randint(0, 3, (8, 1)) if kind == "switch" else None
    results = []
    for masked in (0.0, value):
        leaf = scores.masked_fill(~mask[:, None], masked).requires_grad_()
        with cmoe.use_backend(backend):
            segments = torch.arange(8) // 4 if segmented else None
            loss = cmoe.balance_loss(leaf, indices, mask, kind, segments, from_logits=bool(from_logits))
            results.append([loss, *torch.autograd.grad(loss, [leaf])])
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


@pytest.mark.parametrize("backend", backends_of("balance_loss"))
@pytest.mark.parametrize("experts", [1, 3, 5, 7])
def test_importance_at_balance_is_zero_with_a_zero_gradient(backend, experts):
    """A loss through the standard deviation has a NaN gradient here."""
    scores = torch.full((6, experts), 1 / experts, requires_grad=True)
    with cmoe.use_backend(backend):
        loss = cmoe.balance_loss(scores, kind="importance")
        loss.backward()
    assert abs(loss.item()) < 1e-12
    assert scores.grad.abs().max() < 1e-7


@pytest.mark.parametrize("backend", backends_of("balance_loss"))
def test_a_segment_without_a_token_does_not_count(backend):
    scores = torch.rand(6, 3).softmax(-1)
    indices = torch.randint(3, (6, 1))
    segments = torch.tensor([7, 7, -1, -1, 1 << 40, 1 << 40])
    mask = torch.tensor([True, True, True, True, False, False])
    with cmoe.use_backend(backend):
        loss = cmoe.balance_loss(scores, indices, mask, segments=segments)
        torch.testing.assert_close(loss, cmoe.balance_loss(scores[:4], indices[:4], segments=segments[:4]))


@pytest.mark.parametrize("backend", backends_of("grouped_linear"))
def test_relu_has_no_gradient_at_zero(backend):
    x, w = torch.zeros(5, 4, requires_grad=True), torch.randn(2, 3, 4)
    with cmoe.use_backend(backend):
        y = cmoe.grouped_linear(x, w, None, torch.tensor([0, 3, 5], dtype=torch.int32), activation="relu")
        y.sum().backward()
    assert not x.grad.any()
