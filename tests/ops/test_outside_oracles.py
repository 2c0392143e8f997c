"""Routers, experts and losses against implementations that are not ours, and against the formulas of the papers."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import cmoe_kernels as cmoe

T, D, E, K = 24, 16, 8, 3
mixtral = pytest.importorskip("transformers.models.mixtral.modeling_mixtral", reason="transformers is not installed")


def close(ours, theirs, tolerance=1e-6):
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("masked", [False, True])
def test_switch_is_the_load_balancing_loss_of_transformers_divided_by_k(masked):
    """transformers lets f sum to K (its issue 43688); here it is a share, so that the loss is 1 when even, whatever K."""
    logits = torch.randn(2 * T, E, requires_grad=True)
    mask = torch.rand(2, T) > 0.3 if masked else None
    theirs = mixtral.load_balancing_loss_func((logits,), E, K, None if mask is None else mask.float())
    theirs_grad = torch.autograd.grad(theirs, logits)[0]
    probabilities = logits.softmax(-1)
    indices = cmoe.topk_gate(logits, K).indices
    ours = cmoe.balance_loss(probabilities, indices, None if mask is None else mask.flatten())
    close(K * ours, theirs)
    close(K * torch.autograd.grad(ours, logits)[0], theirs_grad)


def test_switch_over_a_global_batch():
    """Two ranks with all-reduced counts: the mean of their losses is the loss of the whole batch."""
    probabilities = torch.randn(2 * T, E).softmax(-1).requires_grad_()
    indices = probabilities.topk(K).indices
    whole = cmoe.balance_loss(probabilities, indices)
    counts = torch.bincount(indices.flatten(), minlength=E)
    halves = [cmoe.balance_loss(part, counts=counts, total=2 * T * K) for part in probabilities.chunk(2)]
    close(sum(halves) / 2, whole)
    close(torch.autograd.grad(sum(halves) / 2, probabilities)[0], torch.autograd.grad(whole, probabilities)[0])


def _router(module, **settings):
    router = module(type("Config", (), settings)())
    nn.init.normal_(router.weight)
    return router


def test_mixtral_router_and_experts():
    config = mixtral.MixtralConfig(hidden_size=D, intermediate_size=12, num_local_experts=E, num_experts_per_tok=K)
    router, experts = mixtral.MixtralTopKRouter(config), mixtral.MixtralExperts(config)
    for parameter in (*router.parameters(), *experts.parameters()):
        nn.init.normal_(parameter)
    x = torch.randn(T, D, requires_grad=True)
    logits, theirs_w, theirs_i = router(x)
    ours = cmoe.topk_gate(logits, K)
    close(ours.weights, theirs_w)
    assert torch.equal(ours.indices, theirs_i)
    assert torch.equal(ours.counts.long(), torch.bincount(theirs_i.flatten(), minlength=E))
    theirs = experts(x, theirs_i, theirs_w)
    y = cmoe.sparse_experts(x, ours.weights, ours.indices, experts.gate_up_proj, None, experts.down_proj, activation="silu", gated=True)
    close(y, theirs, 1e-4)
    inputs = (x, router.weight, experts.gate_up_proj, experts.down_proj)
    upstream = torch.randn_like(y)
    for a, b in zip(
        torch.autograd.grad(y, inputs, upstream, retain_graph=True), torch.autograd.grad(theirs, inputs, upstream), strict=True
    ):
        close(a, b, 1e-3)


@pytest.mark.parametrize("renormalize", [True, False])
def test_qwen3_moe_router(renormalize):
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

    router = _router(Qwen3MoeTopKRouter, num_experts_per_tok=K, num_experts=E, norm_topk_prob=renormalize, hidden_size=D)
    logits, weights, indices = router(torch.randn(T, D))
    ours = cmoe.topk_gate(logits, K, renormalize=renormalize)
    close(ours.weights, weights)
    assert torch.equal(ours.indices, indices)


@pytest.mark.parametrize("renormalize", [True, False])
def test_deepseek_v3_router(renormalize):
    """Sigmoid scores; a correction bias and a choice of groups rank but do not weigh."""
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter

    settings = {"n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5, "norm_topk_prob": renormalize}
    router = _router(DeepseekV3TopkRouter, num_experts_per_tok=K, num_local_experts=E, hidden_size=D, **settings)
    router.e_score_correction_bias.copy_(torch.randn(E))
    logits, weights, indices = router(torch.randn(T, D))
    biased = logits.sigmoid() + router.e_score_correction_bias
    best = biased.view(T, 4, 2).sum(-1).topk(2).indices
    allowed = F.one_hot(best, 4).sum(1).repeat_interleave(2, -1).bool()
    ours = cmoe.topk_gate(logits, K, "sigmoid", renormalize, 2.5, selection=biased.masked_fill(~allowed, -torch.inf))
    dense, theirs = (torch.zeros(T, E).scatter(1, i, w) for i, w in ((ours.indices, ours.weights), (indices, weights)))
    close(dense, theirs)


# --- CuMo: the weights of its code, L_b = E^2 * mean over (image, expert) of [mean probability * share of first choices], z-loss ------


def test_cumo_gate_and_losses():
    images, patches = 3, 10
    logits = torch.randn(images, patches, E, requires_grad=True)
    flat = logits.flatten(0, 1)
    top = flat.softmax(-1).topk(2)
    ours = cmoe.topk_gate(flat, 2)
    close(ours.weights, top.values / top.values.sum(-1, keepdim=True))

    probabilities = logits.softmax(-1)
    first = F.one_hot(probabilities.argmax(-1), E).float()
    balance = E**2 * (probabilities.mean(1) * first.mean(1)).mean()
    z = logits.logsumexp(-1).square().mean()
    segments = torch.arange(images).repeat_interleave(patches)
    ours_balance = cmoe.balance_loss(flat.softmax(-1), ours.indices[:, :1], segments=segments)
    ours_z = cmoe.balance_loss(flat, kind="z")
    close(ours_balance, balance)
    close(ours_z, z)
    total, expected = (0.1 * b + 0.01 * z for b, z in ((ours_balance, ours_z), (balance, z)))
    close(torch.autograd.grad(total, logits)[0], torch.autograd.grad(expected, logits)[0])


def test_losses_at_uniform_routing():
    even = torch.full((T, E), 1 / E)
    everyone = torch.arange(E).repeat(T, 1)
    close(cmoe.balance_loss(even, everyone), torch.tensor(1.0))
    close(cmoe.balance_loss(torch.zeros(T, E), kind="z"), torch.tensor(float(E)).log().square())


def test_importance_is_the_squared_coefficient_of_variation():
    gates = torch.rand(T, E, requires_grad=True)
    mass = gates.sum(0)
    expected = mass.var(unbiased=False) / mass.mean().square()
    ours = cmoe.balance_loss(gates, kind="importance")
    close(ours, expected)
    close(torch.autograd.grad(ours, gates)[0], torch.autograd.grad(expected, gates)[0])


# --- Med-MoE: p * E(x) + meta(x), k = 1, the raw probability of the winner, the router frozen -----------------------------------------


def test_med_moe():
    x = torch.randn(T, D, requires_grad=True)
    router = torch.randn(E, D)
    w1, b1, w2, b2 = (torch.randn(s, requires_grad=True) for s in ((E, 12, D), (E, 12), (E, D, 12), (E, D)))
    meta = nn.Sequential(nn.Linear(D, 12), nn.GELU("tanh"), nn.Linear(12, D))
    with torch.no_grad():
        logits = cmoe.task_router(x, None, router, None, inputs="token")
    gate = cmoe.topk_gate(logits, 1, renormalize=False)
    y = cmoe.sparse_experts(x, gate.weights, gate.indices, w1, b1, w2, b2, activation="gelu_tanh") + meta(x)

    p, chosen = (x.detach() @ router.T).softmax(-1).max(-1)
    rows = [F.linear(F.gelu(F.linear(x[t], w1[e], b1[e]), approximate="tanh"), w2[e], b2[e]) for t, e in enumerate(chosen.tolist())]
    expected = p[:, None] * torch.stack(rows) + meta(x)
    close(y, expected, 1e-4)
    upstream = torch.randn_like(y)
    for a, b in zip(torch.autograd.grad(y, (x, w1, w2), upstream), torch.autograd.grad(expected, (x, w1, w2), upstream), strict=True):
        close(a, b, 1e-3)


# --- Uni-Med: what the ways of routing have in common ---------------------------------------------------------------------------------


def test_routing_identities():
    logits = torch.randn(T, E, requires_grad=True)
    full = cmoe.topk_gate(logits, E)
    close(torch.zeros(T, E).scatter(1, full.indices, full.weights), logits.softmax(-1))
    for gates in (cmoe.soft_gate(logits), full.weights, cmoe.topk_gate(logits, 2).weights):
        close(gates.sum(-1), torch.ones(T))
    for alone in (cmoe.topk_gate(logits, 1).weights, cmoe.soft_gate(logits[:, :1])):
        assert torch.equal(alone, torch.ones(T, 1))
        assert not torch.autograd.grad(alone.sum(), logits)[0].any()
