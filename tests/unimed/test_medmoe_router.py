"""Med-MoE: routers trained on domains, their files, their accuracy by labels."""

import re

import pytest
import torch
from torch import nn

from tests.unimed.test_models_medmoe import decoder
from unimed.errors import UserError
from unimed.models.medmoe import (
    label_curve,
    load_router,
    moe_layers,
    plot_label_curve,
    router_accuracy,
    save_router,
    train_router,
    upcycle,
)

torch.set_num_threads(1)


def modalities(count, seed, start=0):
    """Texts whose words tell the modality, in batches of 4, padded on the left."""
    draw = torch.Generator().manual_seed(seed)
    for _ in range(count):
        labels = torch.randint(4, (4,), generator=draw)
        ids = 3 + 12 * labels[:, None] + torch.randint(12, (4, 10), generator=draw)
        mask = torch.ones(4, 10, dtype=torch.int64)
        mask[:2, :3] = 0
        yield {"input_ids": ids.where(mask.bool(), 0), "attention_mask": mask}, labels


@pytest.mark.parametrize("router_layers", [1, 2])
def test_a_trained_router_sends_each_modality_to_its_expert(router_layers, tmp_path):
    model = upcycle(decoder(), router_layers=router_layers, router_features=24)
    before = router_accuracy(model, modalities(5, 1))
    weights = {name: p.clone() for name, p in model.named_parameters()}
    seen = train_router(model, modalities(20, 0), steps=200, lr=3e-2, batch_size=128)
    after = router_accuracy(model, modalities(5, 1))
    assert before.tokens < 0.6
    assert seen.tokens > 0.95
    assert after.tokens > 0.95
    assert after.samples == 1
    assert 0.25 <= after.majority < 0.6
    states = [layer.router.state_dict() for layer in moe_layers(model).values()]
    assert all(torch.equal(states[0][name], state[name]) for state in states for name in state)
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters())
    # Out to a file and into another model; and once more from a file as torch.save writes it.
    save_router(model, tmp_path / "router.safetensors")
    assert [file.name for file in tmp_path.iterdir()] == ["router.safetensors"]
    other = upcycle(decoder(), router_layers=router_layers, router_features=24)
    load_router(other, tmp_path / "router.safetensors")
    assert all(torch.equal(a, b) for a, b in zip(states[0].values(), next(iter(moe_layers(other).values())).router.buffers(), strict=True))
    assert router_accuracy(other, modalities(5, 1)) == after


def test_accuracy_by_the_number_of_labels(tmp_path):
    model = upcycle(decoder(), scale="preserve")  # equal experts: what layers read does not depend on the router
    how = {"steps": 120, "lr": 3e-2, "batch_size": 128}
    curve = label_curve(model, modalities(20, 0), modalities(5, 1), [80, 2], **how)
    assert list(curve) == [2, 80]
    assert curve[2].tokens < curve[80].tokens > 0.9
    # The layers keep the router of all labels; tokens are few enough for all to be drawn.
    assert router_accuracy(model, modalities(5, 1)) == curve[80]
    plot_label_curve(curve, tmp_path / "curve.svg")
    assert "<svg" in (tmp_path / "curve.svg").read_text()
    with pytest.raises(UserError, match=re.escape("counts is [0, 5], must be numbers in 1..8 (the samples in batches)")):
        label_curve(model, modalities(2, 0), modalities(1, 1), [0, 5])


def test_router_files_as_torch_writes_them(tmp_path):
    model = upcycle(decoder())
    linear = nn.Linear(32, 4)
    torch.save({"wg.weight": linear.weight, "wg.bias": linear.bias}, tmp_path / "router.pth")
    load_router(model, tmp_path / "router.pth")
    assert all(
        torch.equal(layer.router.w1, linear.weight) and torch.equal(layer.router.b1, linear.bias) for layer in moe_layers(model).values()
    )


def test_training_a_router_is_repeatable_and_leaves_the_mode():
    models = [upcycle(decoder()).train() for _ in range(2)]
    found = [train_router(model, modalities(3, 0), steps=5, tokens_per_sample=4) for model in models]
    assert found[0] == found[1]
    assert models[0].training
    assert torch.equal(models[0].model.layers[0].mlp.router.w1, models[1].model.layers[0].mlp.router.w1)
