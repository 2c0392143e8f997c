"""topk_gate and balance_loss in place of the routers and the load-balancing loss of transformers."""

import copy
import pickle
import re
import sys

import pytest
import torch

pytest.importorskip("transformers")

import transformers

from cmoe_kernels.integrations import experts
from tests.integrations import tiny
from tests.integrations.test_experts import full_unless_sampled, mixtral_config
from tests.integrations.tiny import SIZES, tiny_inputs, tiny_model

SAMPLE = ("MixtralTopKRouter", "Qwen3MoeTopKRouter", "DeepseekV3TopkRouter", "HYV3TopKRouter", "JambaTopKRouter", "BeamTopKRouter")


@pytest.fixture(scope="module")
def of_router():
    """The family whose module defines each router."""
    return {name: family for family in tiny.families() for name in family.routers if talker(name) == talker(family.experts.__name__)}


def talker(name):
    return "Talker" in name


@pytest.mark.parametrize("name", full_unless_sampled(sorted(experts.ROUTERS), SAMPLE))
def test_router(name, of_router):
    """Logits, weights per expert, and their gradients."""
    model = tiny_model(of_router[name])
    own = next(m for m in model.modules() if type(m).__name__ == name).float()
    for key, value in [*own.named_parameters(), *own.named_buffers()]:
        if "bias" in key:
            value.data.normal_(0, 0.1)
    fused = copy.deepcopy(own)
    fused.__class__ = experts._fused_router(type(own))
    assert isinstance(fused, type(own))
    bias = (torch.randn(8) * 0.1,) if experts.ROUTERS[name].bias == "argument" else ()
    x = torch.randn(64, 32)
    results = []
    for router in (own, fused):
        logits, weights, indices = router(x, *bias)
        dense = torch.zeros(64, 8).scatter(1, indices, weights.float())
        (grad,) = torch.autograd.grad((dense * torch.arange(8.0)).sum() + logits.float().square().sum(), [router.weight])
        results.append((logits, dense, grad, weights.dtype))
    for got, want in zip(*reversed(results), strict=True):
        if isinstance(got, torch.dtype):
            assert got == want
        else:
            torch.testing.assert_close(got, want)


def test_exact_routers_cast_their_weights_as_the_model_does(of_router):
    """Logits in fp32; weights in fp32, or in the dtype of the hidden states."""
    dtypes = {}
    for name in ("LaraMiniTopKRouter", "DeepseekV3TopkRouter"):
        own = next(m for m in tiny_model(of_router[name]).modules() if type(m).__name__ == name).bfloat16()
        fused = copy.deepcopy(own)
        fused.__class__ = experts._fused_router(type(own))
        x = torch.randn(4, 32, dtype=torch.bfloat16)
        dtypes[name] = [[out.dtype for out in router(x)[:2]] for router in (own, fused)]
    assert dtypes["LaraMiniTopKRouter"] == [[torch.float32, torch.bfloat16]] * 2
    assert dtypes["DeepseekV3TopkRouter"] == [[torch.float32, torch.float32]] * 2


def test_every_router_of_the_table_is_there(of_router):
    assert set(of_router) == set(experts.ROUTERS)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("k", [1, 2, 3])
def test_load_balancing_loss(k, padded):
    """Three layers pooled, the factor K, padding."""
    theirs = transformers.models.mixtral.modeling_mixtral.load_balancing_loss_func
    assert theirs.__module__.startswith("transformers.")
    layers = tuple(torch.randn(12, 5, requires_grad=True) for _ in range(3))
    mask = torch.tensor([[1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 0]]) if padded else None
    ours, want = experts.load_balancing_loss(layers, 5, k, mask), theirs(layers, 5, k, mask)
    torch.testing.assert_close(ours, want)
    for got, grad in zip(torch.autograd.grad(ours, layers), torch.autograd.grad(want, layers), strict=True):
        torch.testing.assert_close(got, grad)


def test_load_balancing_loss_of_nothing():
    assert experts.load_balancing_loss(None) == 0
    layers = (torch.randn(4, 5, requires_grad=True),)
    loss = experts.load_balancing_loss(layers, 5, 2, torch.zeros(1, 4))
    loss.backward()
    assert loss == 0
    assert not layers[0].grad.any()


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_model_with_fused_routers(family):
    """Loss with its balancing part, padding in the batch, and every gradient; the model's own again afterwards."""
    if family == "mixtral":
        model = transformers.MixtralForCausalLM(mixtral_config(output_router_logits=True, router_aux_loss_coef=0.5))
    else:
        known = transformers.Qwen3MoeConfig().to_dict()
        sizes = {name: value for name, value in SIZES.items() if name in known}
        model = transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**sizes, output_router_logits=True, router_aux_loss_coef=0.5))
    model.eval()
    modeling = sys.modules[type(model).__module__]
    inputs = tiny_inputs(model)
    inputs["attention_mask"] = torch.ones(2, 9, dtype=torch.int64)
    inputs["attention_mask"][0, :4] = 0
    want, want_grads = loss_and_grads(model, inputs)
    own_loss, own_router = modeling.load_balancing_loss_func, type(model.model.layers[0].mlp.gate)
    try:
        assert experts.use_cmoe(model, use_fused_router=True) is model
        assert isinstance(model.model.layers[0].mlp.gate, experts._FusedRouter)
        assert modeling.load_balancing_loss_func is experts.load_balancing_loss
        got, got_grads = loss_and_grads(model, inputs)
    finally:
        experts.use_cmoe(model, use_fused_router=False)
    assert modeling.load_balancing_loss_func is own_loss
    assert type(model.model.layers[0].mlp.gate) is own_router
    assert len(got.router_logits) == len(want.router_logits) == 2
    torch.testing.assert_close(got.aux_loss, want.aux_loss)
    torch.testing.assert_close(got.loss, want.loss)
    for key, grad in want_grads.items():
        torch.testing.assert_close(got_grads[key], grad, rtol=1e-4, atol=1e-6)


COPIES = {"deepcopy": copy.deepcopy, "pickle": lambda model: pickle.loads(pickle.dumps(model))}


@pytest.mark.parametrize("how", COPIES)
def test_copies_of_a_model_with_fused_routers(how):
    model = transformers.MixtralForCausalLM(mixtral_config()).eval()
    inputs = tiny_inputs(model)
    try:
        experts.use_cmoe(model, use_fused_router=True)
        twin = COPIES[how](model)
        assert torch.equal(twin(**inputs).logits, model(**inputs).logits)
        for ours, theirs in zip(twin.model.layers, model.model.layers, strict=True):
            assert type(ours.mlp.gate) is type(theirs.mlp.gate)
            assert ours.mlp.gate.weight is not theirs.mlp.gate.weight
    finally:
        experts.use_cmoe(model)
    experts.use_cmoe(twin)
    assert {type(layer.mlp.gate).__name__ for layer in twin.model.layers} == {"MixtralTopKRouter"}


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_load_balancing_loss_of_padding_that_is_no_number(value):
    mask = torch.tensor([[1, 0, 1, 1], [0, 1, 1, 1]])
    logits = torch.randn(8, 5)
    results = []
    for filled in (0.0, value):
        layer = logits.masked_fill(~mask.flatten().bool()[:, None], filled).requires_grad_()
        loss = experts.load_balancing_loss((layer,), 5, 2, mask)
        results.append([loss, *torch.autograd.grad(loss, [layer])])
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


def loss_and_grads(model, inputs):
    model.zero_grad()
    out = model(**inputs, labels=inputs["input_ids"])
    out.loss.backward()
    return out, {name: p.grad.clone() for name, p in model.named_parameters()}


def test_a_router_that_has_no_fused_form_keeps_its_own(of_router):
    family = next(f for f in tiny.families() if f.name == "phimoe")
    model = tiny_model(family)
    with pytest.warns(UserWarning, match=re.escape("PhimoeForCausalLM: its routers are none that topk_gate can stand for")):
        experts.use_cmoe(model, use_fused_router=True)
    assert not any(isinstance(m, experts._FusedRouter) for m in model.modules())
    experts.use_cmoe(model)
