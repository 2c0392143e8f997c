"""CuMo on the same layers: multimodal models, co-upcycling, both losses, a CLIP tower."""

import torch
import transformers as tf
from torch.nn import functional as F

from tests.integrations import tiny_models
from tests.unimed.test_models_medmoe import stir
from unimed.models.medmoe import (
    co_upcycle,
    count_parameters,
    moe_layers,
    record_routing,
    router_accuracy,
    routing_losses,
    train_router,
    upcycle,
)

torch.set_num_threads(1)


def llava():
    torch.manual_seed(0)
    model, images = tiny_models.llava()
    found = images(model, [1, 1])
    ids = torch.randint(3, 60, (2, 20), generator=torch.Generator().manual_seed(3))
    ids[:, 2 : 2 + found.tokens[0]] = tiny_models.IMAGE
    return model.eval(), {"input_ids": ids, **found.arguments}


def test_the_language_model_of_a_multimodal_model(tmp_path):
    model, inputs = llava()
    before = model(**inputs).logits
    upcycle(model, "all", scale="preserve", part="model.language_model")
    torch.testing.assert_close(model(**inputs).logits, before, rtol=1e-5, atol=2e-6)
    stir(model).save_pretrained(tmp_path)
    loaded = tf.AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert list(moe_layers(loaded)) == ["model.language_model.layers.0.mlp", "model.language_model.layers.1.mlp"]
    assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)


def test_a_router_is_trained_beside_a_tower_with_learned_ones():
    model, inputs = llava()
    co_upcycle(model)
    upcycle(model, "all", num_experts=2, part="model.language_model")
    train_router(model, [(inputs, torch.tensor([0, 1]))], steps=100, lr=3e-2, batch_size=64)
    assert router_accuracy(model, [(inputs, torch.tensor([0, 1]))]).samples == 1
    learned = [layer for layer in moe_layers(model).values() if layer.settings.router == "learned"]
    assert len(learned) == 2
    assert not torch.equal(learned[0].router.w1, learned[1].router.w1)


def test_co_upcycling_changes_nothing_at_first(tmp_path):
    """Check 7 of the facts, for the whole model: connector and CLIP (quick_gelu) with 2 of 4 experts."""
    model, inputs = llava()
    assert model.config.vision_config.hidden_act == "quick_gelu"
    before = model(**inputs).logits
    co_upcycle(model)
    layers = moe_layers(model)
    assert list(layers) == [f"model.vision_tower.encoder.layers.{i}.mlp" for i in range(2)]
    assert all(layer.router.b1 is None and layer.router.w1.requires_grad for layer in layers.values())
    torch.testing.assert_close(model(**inputs).logits, before, rtol=1e-5, atol=2e-6)
    stir(model).save_pretrained(tmp_path)
    loaded = tf.AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)


def naive_losses(logits):
    """L_b and L_z of CuMo for logits [B, N, E], as the paper's text has them."""
    experts = logits.shape[-1]
    p = logits.softmax(-1)
    share = F.one_hot(logits.argmax(-1), experts).float()
    balance = experts**2 * (p.mean(1) * share.mean(1)).mean()
    return balance, logits.logsumexp(-1).square().mean()


def test_cumo_losses_are_their_formulas():
    model, inputs = llava()
    co_upcycle(model)
    stir(model).train()
    connector = model.model.multi_modal_projector.connector
    assert connector.config.router_bias is False
    with torch.no_grad():
        connector.router.w1.normal_(0, 0.5)
    seen = []
    connector.router.register_forward_hook(lambda _, __, logits: seen.append(logits))
    with record_routing(model) as records:
        out = model(**inputs, labels=inputs["input_ids"])
    assert len(records) == 2
    # Of the connector: in the model's loss, images of 4 tokens.
    balance, z = naive_losses(seen[0].view(2, 4, 4))
    torch.testing.assert_close(out.aux_losses["sample_switch"], balance)
    torch.testing.assert_close(out.aux_losses["z"], z)
    torch.testing.assert_close(out.loss, out.lm_loss + 0.1 * balance + 0.01 * z)
    # Of CLIP: means over the layers.
    ours = routing_losses(records)
    by_layer = [naive_losses(logits) for logits, _ in records]
    torch.testing.assert_close(ours.balance, torch.stack([b for b, _ in by_layer]).mean())
    torch.testing.assert_close(ours.z, torch.stack([z for _, z in by_layer]).mean())
    torch.testing.assert_close(ours.weighted(), 0.1 * ours.balance + 0.01 * ours.z)
    # A statistic over both images at once is another number.
    flat = [logits.flatten(0, 1)[None] for logits, _ in records]
    assert abs(naive_losses(flat[0])[0] - by_layer[0][0]) > 1e-4
    (out.loss + ours.weighted()).backward()
    assert all(layer.router.w1.grad.any() for layer in moe_layers(model).values())
    assert all(layer.records is None for layer in moe_layers(model).values())


def test_cumo_losses_at_balance_and_with_a_mask():
    """Check 7: L_b is 1 for uniform gates, L_z is (ln S)^2 for zero logits."""
    zero = torch.zeros(3, 8, 4)
    losses = routing_losses([(zero, torch.zeros(3, 8, 2, dtype=torch.int64))])
    torch.testing.assert_close(losses.balance, torch.tensor(1.0))
    torch.testing.assert_close(losses.z, torch.log(torch.tensor(4.0)) ** 2)
    logits = torch.randn(2, 6, 4)
    mask = torch.tensor([[True] * 6, [True] * 4 + [False] * 2])
    indices = logits.topk(2, -1).indices
    masked = routing_losses([(logits, indices)], mask)
    parts = [naive_losses(logits[:1]), naive_losses(logits[1:, :4])]
    torch.testing.assert_close(masked.balance, (parts[0][0] + parts[1][0]) / 2)
    torch.testing.assert_close(masked.z, (6 * parts[0][1] + 4 * parts[1][1]) / 10)


def test_clip_of_24_layers_on_the_meta_device():
    config = tf.CLIPVisionConfig(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, image_size=336)
    config.patch_size = 14
    with torch.device("meta"):
        model = tf.CLIPVisionModel(config)
        dense = count_parameters(model).total
        upcycle(model, "all", top_k=2, meta=False, router_bias=False)
    layers = moe_layers(model)
    assert len(layers) == 24
    mlp = 2 * 1024 * 4096 + 4096 + 1024
    assert count_parameters(model) == (dense + 24 * (3 * mlp + 4 * 1024), dense + 24 * (mlp + 4 * 1024))
