"""CMoEConnector: every combination against the released order of work, batches, packing, masks, losses, errors."""

import itertools
import json
import math
import warnings

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.nn import functional as F

import cmoe_kernels as cmoe
from cmoe_kernels.ops.arguments import CHECK_ON_DEVICE
from tests.ops import naive
from tests.ops.cases import DEVICE

B, P, C, O, H, E = 3, 16, 6, 7, 9, 5  # noqa: E741
TASKS = ("vqa", "refer", "identify", "caption", "cls")


def connector(dtype=torch.float64, **settings):
    torch.manual_seed(3)
    config = cmoe.CMoEConfig(in_features=C, out_features=O, **{"hidden_features": H, "router_features": 13, "task_features": 8, **settings})
    module = cmoe.CMoEConnector(config, dtype=dtype)
    for parameter in module.parameters():  # beyond the small initial values, so that gates differ
        torch.nn.init.normal_(parameter, std=0.5)
    return module


def features(dtype=torch.float64, patches=P):
    return torch.randn(B, patches, C, dtype=dtype, generator=torch.Generator().manual_seed(5), device="cpu").to(DEVICE)


def resample_by_loop(f, c):
    """As the release: neighbours in sequence side by side, or pooling on the square grid."""
    if c.resample == "none":
        return f
    if c.resample == "projection":
        return torch.stack([torch.cat(list(f[:, i : i + c.resample_rate].unbind(1)), -1) for i in range(0, f.shape[1], c.resample_rate)], 1)
    side, step = math.isqrt(f.shape[1]), math.isqrt(c.resample_rate)
    grid = f.view(f.shape[0], side, side, -1)
    pooled = []
    for i, j in itertools.product(range(0, side, step), repeat=2):
        window = grid[:, i : i + step, j : j + step].flatten(1, 2)
        pooled.append(window.mean(1) if c.resample == "avgpool" else window.max(1).values)
    return torch.stack(pooled, 1)


def expected(module, f, places):
    """The whole connector the slow way: sample by sample, all experts, gates as dense rows."""
    c, w = module.config, module.experts
    x = resample_by_loop(f, c)
    outputs, gates = [], []
    for sample, place in zip(x, places, strict=True):
        if c.router == "constant":
            gate = torch.full((len(sample), c.num_experts), 1 / c.num_experts).to(x.dtype)
        elif c.router == "hard":
            gate = F.one_hot(torch.tensor([place] * len(sample)), c.num_experts).to(x.dtype)
        else:
            r = module.router
            task = None if c.router_inputs == "token" else r.task_tokens[place : place + 1].expand(len(sample), -1)
            image = None if c.router_inputs == "task" else sample
            logits = naive.task_router(image, task, r.w1, r.b1, r.w2, r.b2, torch.arange(len(sample)), c.router_inputs, c.activation)
            if c.router == "soft":
                gate = naive.soft_gate(logits)
            else:
                kept = logits.masked_fill(logits < logits.topk(c.top_k).values[:, -1:], -torch.inf)
                gate = kept.softmax(-1)
        outputs.append(naive.soft_experts(sample, gate, w.w1, w.b1, w.w2, w.b2, c.activation))
        gates.append(gate)
    return torch.stack(outputs), torch.stack(gates)


RESAMPLES = ["projection", "avgpool", "maxpool", "none"]
COMBINATIONS = [
    *itertools.product(["mlp", "linear"], ["soft", "sparse"], ["task_token", "token", "task"], RESAMPLES, [2, 1]),
    *itertools.product(["mlp", "linear"], ["hard", "constant"], ["task_token"], RESAMPLES, [2]),
]


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize(("expert", "router", "inputs", "resample", "layers"), COMBINATIONS)
def test_every_combination_in_a_mixed_batch(expert, router, inputs, resample, layers, bias):
    module = connector(
        expert=expert, router=router, router_inputs=inputs, resample=resample, expert_bias=bias, router_bias=bias, router_layers=layers
    )
    f = features().requires_grad_()
    places = [3, 0, 3]
    out = module(f, task=[TASKS[p] for p in places])
    y, gates = expected(module, f, places)
    torch.testing.assert_close(out.embeddings, y, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(out.gates, gates, rtol=1e-10, atol=1e-10)
    inputs_ = [f, *module.parameters()]
    upstream = torch.randn_like(y)
    got = torch.autograd.grad(out.embeddings, inputs_, upstream, allow_unused=True, retain_graph=True)
    wanted = torch.autograd.grad(y, inputs_, upstream, allow_unused=True)
    for ours, theirs in zip(got, wanted, strict=True):
        torch.testing.assert_close(
            torch.zeros(()) if ours is None else ours, torch.zeros(()) if theirs is None else theirs, rtol=1e-9, atol=1e-9
        )


ROUTINGS = [
    {"router": "soft"},
    {"router": "soft", "router_inputs": "task", "expert": "linear"},
    {"router": "sparse"},
    {"router": "sparse", "router_inputs": "task"},
    {"router": "hard"},
    {"router": "constant"},
]


def name(settings):
    return "-".join(settings.values())


@pytest.mark.parametrize("settings", ROUTINGS, ids=name)
def test_ways_to_name_the_task_agree(settings):
    module = connector(**settings)
    f = features()
    by_name = module(f, task="identify")
    for task in (["identify"] * B, torch.tensor([2] * B)):
        torch.testing.assert_close(module(f, task=task).embeddings, by_name.embeddings, rtol=1e-12, atol=1e-12)
    mixed = module(f, task=["vqa", "identify", "cls"])
    for i, task in enumerate(("vqa", "identify", "cls")):
        alone = module(f[i : i + 1], task=task)
        torch.testing.assert_close(mixed.embeddings[i : i + 1], alone.embeddings, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(mixed.gates[i : i + 1], alone.gates, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("settings", ROUTINGS, ids=name)
def test_packed_tokens(settings):
    module = connector(resample="none", **settings)
    f = features(patches=4)
    padded = module(f, task=torch.tensor([4, 1, 0]))
    packed = module(f.flatten(0, 1), group_ids=torch.tensor([4, 1, 0]).repeat_interleave(4))
    torch.testing.assert_close(packed.embeddings, padded.embeddings.flatten(0, 1))
    torch.testing.assert_close(packed.gates, padded.gates.flatten(0, 1))
    torch.testing.assert_close(module(f.flatten(0, 1), task="cls").embeddings[:4], padded.embeddings[0])
    by_token = module(f, group_ids=torch.tensor([4, 1, 0]).repeat_interleave(4))
    torch.testing.assert_close(by_token.embeddings, padded.embeddings)
    torch.testing.assert_close(by_token.gates, padded.gates)


@pytest.mark.parametrize("aux", [{"switch": 0.1, "z": 0.01}, {"importance": 0.5}, {}], ids=str)
def test_mask_leaves_tokens_out(aux):
    module = connector(router="sparse", aux_losses=aux)
    f = features()
    mask = torch.tensor([[True, True, False, False], [True] * 4, [False] * 4])
    spoiled = f.clone()
    spoiled[0, 8:] = torch.nan
    spoiled[2] = torch.nan
    out = module(spoiled, task="vqa", mask=mask)
    kept = module(f, task="vqa")
    assert not out.embeddings[~mask].any()
    assert not out.gates[~mask].any()
    torch.testing.assert_close(out.embeddings[mask], kept.embeddings[mask])
    for kind, loss in out.aux_losses.items():
        logits = module.router(module._resample(f)[0], 0, None)[mask.flatten()]
        indices = cmoe.topk_gate(logits, 2).indices
        scores = {"switch": logits.softmax(-1), "z": logits, "importance": kept.gates[mask]}[kind]
        torch.testing.assert_close(loss, naive.balance_loss(scores, indices if kind == "switch" else None, kind=kind))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("resample", RESAMPLES)
@pytest.mark.parametrize("settings", [*ROUTINGS, {"router": "constant", "expert": "linear"}], ids=name)
def test_nothing_of_a_masked_token_reaches_a_gradient(settings, resample, value):
    aux = {"importance": 0.5, **({"z": 0.1} if settings["router"] in ("soft", "sparse") else {})}
    module = connector(torch.float32, resample=resample, aux_losses=aux, **settings)
    rate = 1 if resample == "none" else 4
    mask = torch.arange(B * P // rate).view(B, -1) % 3 != 1
    mask[2] = False
    # The encoder's tokens that become the masked ones: neighbours in sequence, or in windows of the square grid.
    dropped = ~mask.repeat_interleave(rate, 1)
    if resample in ("avgpool", "maxpool"):
        dropped = ~mask.view(B, 2, 2).repeat_interleave(2, 1).repeat_interleave(2, 2).flatten(1)
    results = []
    for task in ("cls", ["vqa", "cls", "cls"]):
        for filled in (0.0, value):
            f = features(torch.float32).masked_fill(dropped[..., None], filled).requires_grad_()
            out = module(f, task, mask=mask)
            grads = torch.autograd.grad(out.embeddings.square().sum() + out.aux_loss, [f, *module.parameters()], allow_unused=True)
            results.append([out.embeddings, out.gates, out.aux_loss, *(g for g in grads if g is not None)])
    for clean, spoiled in (results[:2], results[2:]):
        assert all(torch.equal(*pair) for pair in zip(clean, spoiled, strict=True))
        assert not spoiled[3][dropped].any()


def test_a_mask_of_packed_tokens():
    module = connector(torch.float32, resample="none", router="sparse")
    ids, mask = torch.tensor([0, 0, 1, 4, 4]), torch.tensor([True, False, True, False, True])
    f = torch.randn(5, C).masked_fill(~mask[:, None], torch.nan)
    out = module(f, group_ids=ids, mask=mask)
    torch.testing.assert_close(out.embeddings[mask], module(f[mask], group_ids=ids[mask]).embeddings)
    out.embeddings.sum().backward()
    assert all(p.grad.isfinite().all() for p in module.parameters())


@pytest.mark.parametrize("inputs", ["task_token", "token", "task"])
@pytest.mark.parametrize("top_k", [1, 2, E])
def test_raw_probabilities(top_k, inputs):
    """renormalize=False: the chosen experts keep their share of the softmax over all, and the router learns also with top_k=1."""
    module = connector(router="sparse", top_k=top_k, router_inputs=inputs, renormalize=False)
    f, places = features(), [3, 0, 3]
    out = module(f, [TASKS[p] for p in places])
    logits = module.router(module._resample(f)[0], None, torch.tensor(places).repeat_interleave(4))
    probabilities = (logits if inputs != "task" else logits[places].repeat_interleave(4, 0)).softmax(-1)
    gates = probabilities.masked_fill(probabilities < probabilities.topk(top_k).values[:, -1:], 0)
    torch.testing.assert_close(out.gates.flatten(0, 1), gates)
    w = module.experts
    y = naive.soft_experts(module._resample(f)[0], gates, w.w1, w.b1, w.w2, w.b2)
    torch.testing.assert_close(out.embeddings.flatten(0, 1), y)
    parameters = list(module.router.parameters())
    for got, want in zip(*(torch.autograd.grad(o.square().sum(), parameters) for o in (out.embeddings, y)), strict=True):
        torch.testing.assert_close(got, want)
        assert got.any()


@pytest.mark.parametrize(
    ("settings", "learns"),
    [
        ({}, False),
        ({"aux_losses": {"importance": 1.0, "switch": 0.0}}, False),
        ({"renormalize": False}, True),
        ({"aux_losses": {"switch": 0.1}}, True),
        ({"aux_losses": {"sample_switch": 0.1}}, True),
        ({"aux_losses": {"z": 0.1}}, True),
        ({"top_k": 2}, True),
    ],
    ids=str,
)
def test_a_router_that_can_learn_nothing_is_warned_about(settings, learns):
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        module = connector(router="sparse", **{"top_k": 1, **settings})
    assert [str(w.message).partition(", so")[0] for w in said] == (
        [] if learns else ["router='sparse' with top_k=1 and renormalize=True weighs every chosen expert by 1"]
    )
    out = module(features(), ["vqa", "cls", "cls"])
    (out.embeddings.square().sum() + out.aux_loss).backward()
    assert any(p.grad.any() for p in module.router.parameters()) == learns


def test_aux_losses_are_weighted_and_reach_the_router():
    module = connector(torch.float32, router="sparse", aux_losses={"switch": 0.1, "importance": 0.2, "z": 0.01})
    out = module(features(torch.float32), task=["vqa", "cls", "cls"])
    assert out.aux_loss.dtype == torch.float32
    assert out.aux_loss.shape == ()
    parts = out.aux_losses
    torch.testing.assert_close(out.aux_loss, 0.1 * parts["switch"] + 0.2 * parts["importance"] + 0.01 * parts["z"])
    out.aux_loss.backward()
    assert all(p.grad.any() for p in module.router.parameters())
    assert connector(router="constant", aux_losses={"importance": 1.0})(features()).aux_loss.abs() < 1e-12


@pytest.mark.parametrize("settings", ROUTINGS, ids=name)
def test_no_samples(settings):
    module = connector(aux_losses={"importance": 1.0}, **settings)
    out = module(features()[:0], task=[])
    assert out.embeddings.shape == (0, 4, O)
    assert out.gates.shape == (0, 4, E)
    (out.embeddings.sum() + out.aux_loss).backward()
    assert all(p.grad is None or not p.grad.any() for p in module.parameters())


@pytest.mark.parametrize("settings", ROUTINGS, ids=name)
def test_recompute_changes_no_bit(settings):
    results = []
    for recompute in (False, True):
        module = connector(torch.float32, recompute=recompute, **settings)
        y = module(features(torch.float32), task=["vqa", "cls", "cls"]).embeddings
        y.square().sum().backward()
        results.append([y.detach(), *(p.grad for p in module.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("settings", ROUTINGS, ids=name)
def test_compile_export_and_autocast(settings):
    torch._dynamo.reset()
    module = connector(torch.float32, aux_losses={"importance": 0.1}, **settings)
    f, task = features(torch.float32), torch.tensor([0, 4, 4])
    y = module(f, task)
    z = torch.compile(module, fullgraph=True, backend="aot_eager")(f, task)
    torch.testing.assert_close(z.embeddings, y.embeddings)
    torch.testing.assert_close(torch.compile(module, fullgraph=True, backend="aot_eager")(f, "cls").embeddings, module(f, "cls").embeddings)
    program = torch.export.export(module, (f, task))
    torch.testing.assert_close(program.module()(f, task).embeddings, y.embeddings)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        half = module(f, task)
    assert half.embeddings.dtype == torch.bfloat16
    assert half.gates.dtype == torch.float32
    torch.testing.assert_close(half.embeddings.float(), y.embeddings, rtol=0.1, atol=0.3)
    half.embeddings.float().sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in module.parameters() if p.grad is not None)


def test_released_size_on_the_meta_device():
    module = cmoe.CMoEConnector(cmoe.CMoEConfig(in_features=1408, out_features=4096), device="meta")
    tokens = module.router.task_tokens.numel()
    assert sum(p.numel() for p in module.experts.parameters()) == 199_270_400
    assert sum(p.numel() for p in module.router.parameters()) - tokens == 507_781_125
    assert tokens == 28_160
    out = module(torch.empty(4, 256, 1408, device="meta"), task="caption")
    assert out.embeddings.shape == (4, 64, 4096)


@pytest.mark.parametrize(
    ("expert", "resample", "count"),
    [("linear", "projection", 115_363_840), ("mlp", "avgpool", 5 * 22_552_576), ("linear", "maxpool", 5 * 5_771_264)],
)
def test_sizes_of_the_other_released_connectors(expert, resample, count):
    module = cmoe.CMoEConnector(cmoe.CMoEConfig(in_features=1408, out_features=4096, expert=expert, resample=resample), device="meta")
    assert sum(p.numel() for p in module.experts.parameters()) == count


@pytest.mark.parametrize(("inputs", "count"), [("token", 127_012_869), ("task", 127_012_869)])
def test_sizes_of_the_other_released_routers(inputs, count):
    module = cmoe.CMoEConnector(cmoe.CMoEConfig(in_features=1408, out_features=4096, router_inputs=inputs), device="meta")
    assert sum(p.numel() for n, p in module.router.named_parameters() if n != "task_tokens") == count


def test_initialisation_is_that_of_the_release():
    """nn.Linear's: uniform within 1/sqrt(in) for weights and biases, experts independent; task tokens N(0, 0.02^2)."""
    module = cmoe.CMoEConnector(cmoe.CMoEConfig(in_features=64, out_features=96, task_features=4096))
    for part, weight, bias in (
        (module.experts, "w1", "b1"),
        (module.experts, "w2", "b2"),
        (module.router, "w1", "b1"),
        (module.router, "w2", "b2"),
    ):
        bound = getattr(part, weight).shape[-1] ** -0.5
        for tensor in (getattr(part, weight), getattr(part, bias)):
            assert (0.8 if tensor.numel() > 50 else 0.1) * bound < tensor.abs().max() <= bound
        assert abs(getattr(part, weight).std() / (bound / 3**0.5) - 1) < 0.05
    assert not torch.equal(module.experts.w1[0], module.experts.w1[1])
    assert abs(module.router.task_tokens.std() / 0.02 - 1) < 0.05


def test_config_round_trip():
    config = cmoe.CMoEConfig(
        in_features=3, out_features=4, router="sparse", renormalize=False, tasks=(t for t in "ab"), aux_losses={"switch": 0.1}
    )
    assert config.tasks == ("a", "b")
    assert cmoe.CMoEConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    with pytest.raises(ValueError, match="unknown settings \\['topk'\\]; known are in_features"):
        cmoe.CMoEConfig.from_dict({"in_features": 1, "out_features": 1, "topk": 2})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"router": "softmax"}, "router is 'softmax', must be one of soft, sparse, hard, constant"),
        ({"num_experts": 0}, "num_experts is 0, must be a positive integer"),
        ({"router": "sparse", "top_k": 6}, "top_k is 6, must be in 1..5"),
        ({"router": "sparse", "top_k": 1.5}, "top_k is 1.5, must be a positive integer"),
        ({"tasks": None}, "tasks is None, must be a sequence of names"),
        ({"aux_losses": None}, "aux_losses is None, must be a dict of weights by name"),
        ({"router": "hard", "num_experts": 4}, "num_experts is 4, must be at least 5 with router='hard'"),
        ({"tasks": ("a", "a")}, "must be different names"),
        ({"tasks": ()}, "at least one"),
        ({"num_task_tokens": 0}, "num_task_tokens is 0, must be 1 with router_inputs='task_token'"),
        ({"resample": "avgpool", "resample_rate": 3}, "resample_rate is 3, must be a square number"),
        ({"aux_losses": {"switch": 0.1}}, "aux_losses has 'switch', must be among importance, z with router='soft'"),
        ({"aux_losses": {"z": "much"}}, "must be a number"),
        ({"activation": "swish"}, "activation is 'swish'"),
    ],
)
def test_wrong_settings(settings, message):
    with pytest.raises(TypeError if None in settings.values() else ValueError, match=message):
        cmoe.CMoEConfig(in_features=C, out_features=O, **settings)


def test_a_connector_takes_a_configuration():
    with pytest.raises(TypeError, match="config is a dict, must be a CMoEConfig"):
        cmoe.CMoEConnector({"in_features": C, "out_features": O})


@pytest.mark.parametrize(
    ("settings", "arguments", "error", "message"),
    [
        ({}, {"task": "qa"}, ValueError, "task is 'qa', must be one of vqa, refer, identify, caption, cls"),
        ({}, {"task": 5}, TypeError, "task is 5, must be a name, a name per sample or LongTensor"),
        ({}, {}, ValueError, "task is missing; this router needs one of the two: a name out of vqa"),
        ({}, {"task": ["vqa"]}, ValueError, "task has 1 .* must be 3 .samples in features"),
        ({}, {"task": torch.tensor([0, 1, 9])}, ValueError, "task holds 9, must be in 0..4 .vqa, refer"),
        ({}, {"task": torch.zeros(3)}, TypeError, "task must be torch.int64"),
        ({}, {"group_ids": torch.zeros(12, dtype=torch.int64)}, ValueError, "group_ids is for packed features"),
        ({}, {"task": "vqa", "features": torch.zeros(3, 16, 5)}, ValueError, "features has 5 .* must be 6 .in_features"),
        ({}, {"task": "vqa", "features": torch.zeros(3, 15, 6)}, ValueError, "15 tokens per sample, must be a multiple of resample_rate=4"),
        ({}, {"task": "vqa", "features": torch.zeros(48, 6)}, ValueError, "features is packed .* needs resample='none'"),
        ({}, {"task": "vqa", "mask": torch.ones(3, 16, dtype=torch.bool)}, ValueError, "mask has 16 .* must be 4"),
        ({"resample": "avgpool"}, {"task": "vqa", "features": torch.zeros(3, 15, 6)}, ValueError, "must be a square grid"),
        ({"resample": "maxpool"}, {"task": "vqa", "features": torch.zeros(3, 0, 6)}, ValueError, "0 tokens per sample, must be a square"),
        ({"resample": "none"}, {"task": ["vqa"], "features": torch.zeros(4, 6)}, ValueError, "task must be one name with packed features"),
        ({"resample": "none"}, {"group_ids": torch.tensor([0, 5]), "features": torch.zeros(2, 6)}, ValueError, "group_ids holds 5"),
    ],
)
def test_wrong_input(settings, arguments, error, message):
    module = connector(torch.float32, **settings)
    arguments = {"features": features(torch.float32)} | arguments
    if DEVICE != "cpu" and not CHECK_ON_DEVICE and "holds" in message:
        pytest.skip("values are read on a GPU only with CMOE_CHECK=1")
    with pytest.raises(error, match=message):
        module(**arguments)


@pytest.mark.parametrize("masked", [False, True])
def test_sample_switch_is_of_first_choices_in_each_sample(masked):
    module = connector(router="sparse", top_k=2, aux_losses={"sample_switch": 0.5})
    logits = []
    module.router.register_forward_hook(lambda _, __, out: logits.append(out))
    mask = torch.ones(B, 4, dtype=torch.bool, device=DEVICE)
    mask[1, 2:] = not masked
    out = module(features(), ["vqa", "cls", "cls"], mask=mask)
    samples = [rows[kept].softmax(-1) for rows, kept in zip(logits[0].view(B, 4, E), mask, strict=True)]
    shares = [F.one_hot(p.argmax(-1), E).to(p.dtype).mean(0) for p in samples]
    loss = torch.stack([E * (p.mean(0) * f).sum() for p, f in zip(samples, shares, strict=True)]).mean()
    torch.testing.assert_close(out.aux_losses["sample_switch"], loss)
    torch.testing.assert_close(out.aux_loss, 0.5 * loss)


def test_sample_switch_needs_samples():
    module = connector(router="sparse", resample="none", aux_losses={"sample_switch": 1.0})
    with pytest.raises(ValueError, match=r"features is packed \[T, C\]; aux_losses\['sample_switch'\] needs the samples"):
        module(features()[0], "vqa")


def test_a_connector_runs_on_tensors_without_data():
    module = connector(torch.float32)
    with FakeTensorMode(allow_non_fake_inputs=True):
        x, task = torch.empty(B, P, C, requires_grad=True), torch.empty(B, dtype=torch.int64)
        out = module(x, task=task)
        out.embeddings.sum().backward()
        assert (out.embeddings.shape, x.grad.shape) == ((B, P // 4, O), (B, P, C))
