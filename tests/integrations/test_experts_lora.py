"""LoRA on the 3-D weights of experts, by peft's own mechanism, on the fused path."""

import importlib

import pytest
import torch

pytest.importorskip("peft")

import peft
import transformers

import cmoe_kernels
from cmoe_kernels.integrations import experts
from tests.integrations.test_experts import mixtral_config
from tests.integrations.tiny import tiny_inputs, tiny_model

# Gated; transposed; not gated.
LAYOUTS = {"mixtral": "MixtralExperts", "aria": "AriaExperts", "nemotron_h": "NemotronHExperts"}


@pytest.fixture
def model():
    torch.manual_seed(0)
    return transformers.MixtralForCausalLM(mixtral_config())


def with_lora(model, **settings):
    place, module = next((name, m) for name, m in model.named_modules() if experts._is_experts(m))
    targets = [f"{place.rpartition('.')[2]}.{name}" for name, _ in module.named_parameters()]
    lora = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=[], target_parameters=targets, **settings))
    with torch.no_grad():
        for name, p in lora.named_parameters():
            if "lora_B" in name:
                p.normal_(0, 0.1)
    return lora.eval()


@pytest.mark.parametrize("family", LAYOUTS)
def test_merged_equals_unmerged_and_eager(family, monkeypatch):
    modeling = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    model = tiny_model(experts.Family(family, getattr(modeling, LAYOUTS[family]), "", None, ()))
    calls = []
    monkeypatch.setattr(experts, "sparse_experts", lambda *a, **k: calls.append(1) or cmoe_kernels.sparse_experts(*a, **k))
    inputs = tiny_inputs(model)
    plain = model(**inputs).logits
    lora = with_lora(model)
    lora.base_model.model.set_experts_implementation("eager")
    eager = lora(**inputs).logits
    lora.base_model.model.set_experts_implementation("cmoe")
    ours = lora(**inputs).logits
    assert calls
    torch.testing.assert_close(ours, eager)
    assert not torch.allclose(ours, plain, atol=1e-3)
    merged = lora.merge_and_unload()
    torch.testing.assert_close(merged(**inputs).logits, ours, rtol=1e-4, atol=1e-5)


def test_gradients_reach_the_adapters_alone(model):
    inputs = tiny_inputs(model)
    lora = with_lora(model)
    grads = []
    for implementation in ("eager", "cmoe"):
        lora.base_model.model.set_experts_implementation(implementation)
        lora.zero_grad()
        lora(**inputs, labels=inputs["input_ids"]).loss.backward()
        grads.append({name: p.grad.clone() for name, p in lora.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    assert all("lora_" in name for name in grads[1])
    assert len(grads[1]) == 8
    for name, grad in grads[1].items():
        assert grad.any()
        torch.testing.assert_close(grad, grads[0][name], rtol=1e-4, atol=1e-7)


def test_dropout_is_refused_by_peft(model):
    with pytest.raises(ValueError, match="does not work with lora_dropout != 0"):
        with_lora(model, lora_dropout=0.1)
