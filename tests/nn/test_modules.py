"""What people do with a module: copy, pickle, save, move, checkpoint, replicate, shard, and build or call it in another mode."""

import copy
import io
import pickle

import pytest
import torch
from torch import distributed, nn
from torch.utils.checkpoint import checkpoint

import cmoe_kernels as cmoe
from cmoe_kernels import backends
from tests.ops.cases import DEVICE

NATIVE = backends.choose("soft_experts", "cpu") == "cpu"
SIZES = {"in_features": 6, "out_features": 7, "hidden_features": 9, "num_experts": 3, "router_features": 13, "tasks": ("a", "b", "c")}
ROUTINGS = [
    {"router": "soft"},
    {"router": "soft", "router_inputs": "task", "expert": "linear"},
    {"router": "sparse"},
    {"router": "sparse", "router_inputs": "token"},
    {"router": "hard"},
    {"router": "constant"},
    {"router": "constant", "expert": "linear"},
]
MIXED = ["a", "c", "a"]
every_routing = pytest.mark.parametrize("settings", ROUTINGS, ids=lambda s: "-".join(s.values()))


def connector(settings, **more):
    torch.manual_seed(0)
    return cmoe.CMoEConnector(cmoe.CMoEConfig(**SIZES, **settings), **more)


def features():
    return torch.randn(3, 16, 6, generator=torch.Generator().manual_seed(1), device="cpu").to(DEVICE)


def gradients(call, module):
    module.zero_grad()
    call().square().sum().backward()
    return {name: p.grad for name, p in module.named_parameters() if p.grad is not None}


def saved(module):
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {"deepcopy": copy.deepcopy, "copy": copy.copy, "pickle": lambda m: pickle.loads(pickle.dumps(m)), "save": saved}


@pytest.mark.parametrize("packed", [False, pytest.param(True, marks=pytest.mark.skipif(not NATIVE, reason="no native library"))])
@pytest.mark.parametrize("how", COPIES)
@every_routing
def test_copies(settings, how, packed):
    """A copy has no packed weights: it runs, and what happens to its own weights counts."""
    module = connector(settings).eval()
    if packed:
        module.prepack()
    twin = COPIES[how](module)
    with torch.no_grad():
        expected = module(features(), MIXED).embeddings
        torch.testing.assert_close(twin(features(), MIXED).embeddings, expected)
        if how != "copy":
            twin.experts.w1.zero_()
            assert not torch.equal(twin(features(), MIXED).embeddings, expected)
            torch.testing.assert_close(module(features(), MIXED).embeddings, expected, rtol=0, atol=0)
    assert (module.experts.packed is None) == (not packed)
    if packed and how != "copy":
        assert twin.experts.packed is None
        assert len(pickle.dumps(module)) < 1.1 * len(pickle.dumps(connector(settings)))
        assert twin.prepack() > 0


@pytest.mark.skipif(not NATIVE, reason="no native library")
@every_routing
def test_prepack_of_weights_made_in_inference_mode(settings):
    expected = connector(settings)(features(), MIXED).embeddings.detach()
    with torch.inference_mode():
        module = connector(settings).eval()
    module.prepack()
    for mode in (torch.inference_mode, torch.no_grad):
        with mode():
            torch.testing.assert_close(module(features(), MIXED).embeddings, expected)


@every_routing
def test_another_default_device_changes_nothing(settings):
    module = connector(settings)
    expected = gradients(lambda: module(features(), MIXED).embeddings, module)
    x = features()
    with torch.device("meta"):
        found = gradients(lambda: module(x, MIXED).embeddings, module)
        if NATIVE:
            module.eval().prepack()
            with torch.no_grad():
                packed = module(x, MIXED).embeddings
    assert all(torch.equal(found[name], grad) for name, grad in expected.items())
    if NATIVE:
        torch.testing.assert_close(packed, module(x, MIXED).embeddings.detach())


@every_routing
def test_built_on_the_meta_device(settings):
    with torch.device("meta"):
        module = connector(settings)
    assert module(features().to("meta"), MIXED).embeddings.shape == (3, 4, 7)
    module.to_empty(device=DEVICE)
    torch.manual_seed(0)
    module.reset_parameters()
    expected = connector(settings)
    assert torch.equal(module(features(), MIXED).embeddings, expected(features(), MIXED).embeddings)
    module = connector(settings, device="meta")
    module.load_state_dict(expected.state_dict(), assign=True)
    assert torch.equal(module(features(), MIXED).embeddings, expected(features(), MIXED).embeddings)


@every_routing
def test_half(settings):
    module = connector(settings).half()
    half = gradients(lambda: module(features().half(), MIXED).embeddings.float(), module)
    single = module.float()
    for name, grad in gradients(lambda: single(features(), MIXED).embeddings, single).items():
        torch.testing.assert_close(half[name].float(), grad, rtol=0.05, atol=0.05 * float(grad.abs().max()) + 1e-4)


@pytest.mark.parametrize("reentrant", [True, False])
@every_routing
def test_checkpoint(settings, reentrant):
    module = connector(settings)
    x = features().requires_grad_()
    expected = gradients(lambda: module(x, MIXED).embeddings, module)
    found = gradients(lambda: checkpoint(lambda x: module(x, MIXED).embeddings, x, use_reentrant=reentrant), module)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], grad) for name, grad in expected.items())


@every_routing
def test_replicas_of_data_parallel(settings):
    """As torch.nn.parallel.replicate makes them, without a second device."""
    module = connector(settings).eval()
    if NATIVE:
        module.prepack()
    replicas = {part: part._replicate_for_data_parallel() for part in module.modules()}
    for part, replica in replicas.items():
        for name, child in part.named_children():
            setattr(replica, name, replicas[child])
        for name, p in part.named_parameters(recurse=False):
            setattr(replica, name, p * 1)
        for name, p in part._parameters.items():
            if p is None:
                replica._parameters[name] = None
    expected = gradients(lambda: module(features(), MIXED).embeddings, module)
    found = gradients(lambda: replicas[module](features(), MIXED).embeddings, module)
    assert all(torch.equal(found[name], grad) for name, grad in expected.items())
    with torch.no_grad():
        torch.testing.assert_close(replicas[module](features(), "b").embeddings, module(features(), "b").embeddings)


@every_routing
def test_vmap_and_other_transforms(settings):
    module = connector(settings)
    x = features()
    torch.testing.assert_close(torch.vmap(lambda x: module(x[None], "b").embeddings[0])(x), module(x, "b").embeddings)
    parameters = {name: p.detach() for name, p in module.named_parameters()}
    torch.testing.assert_close(torch.func.functional_call(module, parameters, (x, "b")).embeddings, module(x, "b").embeddings)
    with pytest.raises(RuntimeError, match=r"cmoe::\w+ has no rule for torch.func.grad, vjp or jacrev: use backward\(\)"):
        torch.func.grad(lambda p: torch.func.functional_call(module, p, (x, "b")).embeddings.sum())(parameters)


@pytest.mark.skipif(DEVICE != "cpu", reason="gloo's mesh is on the CPU")
def test_fully_shard_in_one_process():
    from torch.distributed.fsdp import fully_shard

    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        mesh = distributed.init_device_mesh("cpu", (1,))
        for settings in ROUTINGS:
            module = connector(settings)
            expected = gradients(lambda m=module: m(features(), MIXED).embeddings, module)
            sharded = fully_shard(nn.Sequential(fully_shard(connector(settings), mesh=mesh)), mesh=mesh)
            found = gradients(lambda s=sharded: s[0](features(), MIXED).embeddings, sharded)
            assert {name.removeprefix("0.") for name in found} == expected.keys()
            assert all(torch.equal(found[f"0.{name}"].full_tensor(), grad) for name, grad in expected.items())
    finally:
        distributed.destroy_process_group()
