"""Med-MoE: what is refused, in one line, and a model that was refused is as it was."""

import re

import pytest
import torch
import transformers as tf
from torch import nn

from tests.unimed.test_medmoe_cumo import llava
from tests.unimed.test_medmoe_router import modalities
from tests.unimed.test_models_medmoe import decoder, tokens
from unimed.errors import UserError
from unimed.models.medmoe import (
    MoESettings,
    co_upcycle,
    load_router,
    moe_layers,
    record_routing,
    register,
    router_accuracy,
    routing_losses,
    save_router,
    train_router,
    upcycle,
)
from unimed.models.medmoe.layers import read_ffn

torch.set_num_threads(1)


class Elsewhere(nn.Module):
    """The names of an FFN, another computation."""

    def __init__(self):
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(32, 48, bias=False), nn.Linear(32, 48, bias=False)
        self.down_proj, self.act_fn = nn.Linear(48, 32, bias=False), nn.SiLU()

    def forward(self, x):
        return self.down_proj(self.act_fn(self.up_proj(x)) * self.gate_proj(x))


def broken(change):
    model = decoder()
    change(model.model.layers[2].mlp)
    return model


def other_layers(mlp):
    mlp.extra_proj = nn.Linear(32, 32)


def other_activation(mlp):
    mlp.act_fn = nn.Mish()


def other_linear(mlp):
    mlp.up_proj = nn.Bilinear(1, 1, 1)


def half_a_bias(mlp):
    mlp.up_proj.bias = nn.Parameter(torch.zeros(48))


@pytest.mark.each
@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: upcycle(broken(other_layers)), "model.layers.2.mlp: Qwen2MLP has the layers down_proj, extra_proj, gate_proj, up_proj;"),
        (lambda: upcycle(broken(other_activation)), "model.layers.2.mlp: the activation is Mish, must be one of gelu, gelu_tanh"),
        (lambda: upcycle(broken(other_linear)), "model.layers.2.mlp.up_proj is a Bilinear, must be an unquantised Linear"),
        (lambda: upcycle(broken(half_a_bias)), "model.layers.2.mlp: one of gate_proj, up_proj has a bias, must be all or none"),
        (lambda: upcycle(decoder(), num_experts=0), "num_experts is 0, must be a positive integer"),
        (lambda: upcycle(decoder(), num_experts=2, top_k=3), "top_k is 3, must be in 1..2 (num_experts)"),
        (lambda: upcycle(decoder(), top_k=3, released=True), "top_k is 3, must be 1 or 2 with released=True"),
        (lambda: upcycle(decoder(), scale="same"), "scale is 'same', must be one of released, preserve"),
        (lambda: upcycle(decoder(), router="random"), "router is 'random', must be one of frozen, learned"),
        (lambda: upcycle(decoder(), [0, 4]), "layers is [0, 4], must be 'every_other', 'all' or different numbers in 0..3"),
        (lambda: upcycle(decoder(), [1, 1]), "layers is [1, 1], must be"),
        (lambda: upcycle(decoder(), "sparse"), "layers is 'sparse', must be"),
        (lambda: upcycle(upcycle(decoder())), "MedMoEQwen2ForCausalLM is upcycled already"),
        (lambda: upcycle(nn.Linear(2, 2)), "model is a Linear, must be a model of transformers"),
        (lambda: upcycle(llava()[0]), "LlavaForConditionalGeneration has stacks of layers at"),
        (lambda: upcycle(llava()[0], part="model.vision"), "part is 'model.vision', must be one of"),
        (lambda: co_upcycle(decoder()), "model is a Qwen2ForCausalLM, must be a multimodal model of type"),
        (lambda: co_upcycle(llava()[0], top_k=1), "top_k is 1, must be at least 2"),
        (lambda: MoESettings.from_dict({"num_experts": 4}), "config.medmoe is {'num_experts': 4}, must map layers and any of"),
        (lambda: routing_losses([]), "records is empty: run the model inside record_routing"),
        (lambda: record_routing(decoder()).__enter__(), "Qwen2ForCausalLM has no upcycled layers to record"),
        (lambda: train_router(decoder(), modalities(1, 0)), "Qwen2ForCausalLM has no upcycled layers; call upcycle first"),
        (lambda: train_router(upcycle(decoder(), router="learned"), modalities(1, 0)), "the routers are learned with the model"),
        (lambda: train_router(upcycle(decoder()), []), "batches holds no sample"),
        (lambda: train_router(upcycle(decoder(), num_experts=2), modalities(3, 0)), "must be int64 in 0..1 (the experts)"),
        (lambda: router_accuracy(upcycle(decoder()), [({"input_ids": tokens()}, torch.tensor([1]))]), "labels has 1 entries, must have 2"),
        (lambda: load_router(upcycle(decoder()), "nowhere.safetensors"), "nowhere.safetensors: not a file of plain tensors"),
        (lambda: save_router(upcycle(decoder()), "router.safetensors"), "the layers' routers differ"),
        (
            lambda: save_router(upcycle(decoder(), [0]), f"{__file__}/router.safetensors"),
            "test_medmoe_wrong.py/router.safetensors: cannot be written",
        ),
        (lambda: upcycle(decoder(), meta="yes"), "meta is 'yes', must be True or False"),
        (lambda: co_upcycle(llava()[0], vision="model.tower"), "part is 'model.tower', must be one of"),
    ],
)
def test_wrong_input_gives_one_line(call, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="^.*" + re.escape(says)) as caught:
        call()
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_names_that_hide_another_computation_are_refused():
    with pytest.raises(UserError, match="Elsewhere is no plain FFN"):
        read_ffn(Elsewhere(), "layer")


def test_a_refused_model_is_left_as_it_was():
    model = broken(other_activation)
    before = model(tokens()).logits
    with pytest.raises(UserError):
        upcycle(model)
    assert type(model) is tf.Qwen2ForCausalLM
    assert not moe_layers(model)
    assert model.config.model_type == "qwen2"
    assert torch.equal(model(tokens()).logits, before)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ({"weight": torch.zeros(4, 40), "bias": torch.zeros(4)}, "the router has b1 [4], w1 [4, 40], must have b1 [4], w1 [4, 32]"),
        ({"weight": torch.zeros(5, 32), "bias": torch.zeros(5)}, "the router has b1 [5], w1 [5, 32], must have b1 [4], w1 [4, 32]"),
        ({"weight": torch.zeros(4, 32)}, "the router has w1 [4, 32], must have"),
        ({"wg": torch.zeros(4, 32)}, "the key 'wg' must end in weight or bias"),
        ({"weight": [1, 2]}, "it must map names to dense floating-point tensors"),
        ({"weight": torch.zeros(4, 32).to_sparse()}, "it must map names to dense"),
        (nn.Linear(32, 4), "not a file of plain tensors"),
    ],
)
def test_a_router_that_does_not_fit_is_named(content, says, tmp_path):
    file = tmp_path / "router.pth"
    torch.save(content, file)
    with pytest.raises(UserError, match=re.escape(says)) as caught:
        load_router(upcycle(decoder()), file)
    assert "\n" not in str(caught.value)


def test_another_model_class_is_registered_by_hand():
    classes = register(tf.Starcoder2ForCausalLM)
    assert classes.config.model_type == "medmoe_starcoder2"
    assert register(tf.Starcoder2ForCausalLM) is classes
