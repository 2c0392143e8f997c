"""Checkpoints in the released layout, made here with random weights."""

import pickle

import pytest
import torch
from model_samples import batch, lively, small

from cmoe_kernels import CMoEConfig
from cmoe_kernels.nn.convert import to_unimed
from unimed.errors import UserError
from unimed.models.adapter import add_lora
from unimed.models.load import apply_released, import_released
from unimed.models.spec import Lora


class Surprise:
    def __reduce__(self):
        return (open, ("surprise", "w"))


def adapted(seed):
    model, processor = small(seed=seed, connector={"hidden_features": 24, "router_features": 12, "task_features": 8})
    peft = add_lora(lively(model), Lora(r=4))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in peft.named_parameters():
            if ".lora_B" in name or "connector.modules_to_save" in name:
                p.normal_(0, 0.3, generator=generator)
    return peft.eval(), processor


def checkpoint(peft):
    """What the release's trainer writes: connector, LoRA and more under its own names."""
    connector = peft.get_base_model().connector
    state = to_unimed(
        connector.modules_to_save["default"].state_dict(),
        CMoEConfig.from_dict(peft.get_base_model().config.connector),
    )
    state |= {key.replace("moe_layers", "llm_proj"): value for key, value in state.items() if key.startswith("moe_layers")}
    start, ours = "llm_model.base_model.model.", "base_model.model.language_model."
    state |= {start + name.removeprefix(ours): p for name, p in peft.named_parameters() if ".lora_" in name}
    state[start + "model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(4)
    state |= {"ln_vision.weight": torch.ones(32), "ln_vision.bias": torch.zeros(32)}
    return {
        "model": {key: value.detach().clone() for key, value in state.items()},
        "optimizer": {"lr": 1e-5},
        "config": {"run": {"epoch": 1}},
        "epoch": 0,
    }


def test_a_released_checkpoint_gives_the_same_answers(tmp_path):
    source, processor = adapted(1)
    torch.save(checkpoint(source), tmp_path / "checkpoint_0.pth")
    released = import_released(tmp_path / "checkpoint_0.pth")
    wanted = CMoEConfig.from_dict(source.get_base_model().config.connector)
    assert released.connector_config == wanted
    assert len(released.lora) == 2 * 7 * 2
    target, _ = adapted(2)
    with torch.no_grad():  # the parts that a released checkpoint does not hold
        for name, p in target.named_parameters():
            if ".lora_" not in name and "connector.modules_to_save" not in name:
                p.copy_(source.get_parameter(name))
    rows = batch(processor)
    assert not torch.allclose(target(**rows).logits, source(**rows).logits)
    apply_released(target, released)
    assert torch.equal(target(**rows).logits, source(**rows).logits)


def test_nothing_in_a_checkpoint_is_executed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.pth").write_bytes(pickle.dumps({"model": Surprise()}))
    torch.save({"model": {}, "config": Surprise()}, tmp_path / "worse.pth")
    for name in ("bad.pth", "worse.pth"):
        with pytest.raises(UserError, match="not a checkpoint of plain tensors") as caught:
            import_released(tmp_path / name)
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "surprise").exists()


def test_wrong_checkpoints_are_one_line(tmp_path):
    source, _ = adapted(1)
    content = checkpoint(source)
    file = tmp_path / "c.pth"

    def refused(message, value):
        torch.save(value, file)
        with pytest.raises(UserError, match=message) as caught:
            apply_released(adapted(2)[0], import_released(file))
        assert "\n" not in str(caught.value)

    refused("'model' entry maps names to tensors", {"state": {}})
    refused("unknown keys: something", {"model": {**content["model"], "something": torch.zeros(1)}})
    lora = "llm_model.base_model.model.model.layers.0.mlp.up_proj.lora_A.default.weight"
    less = {key: value for key, value in content["model"].items() if key != lora}
    refused("missing: base_model.model.language_model.model.layers.0.mlp.up_proj.lora_A.weight", {"model": less})
    refused("wrong shape: .*up_proj.lora_A.weight is", {"model": {**content["model"], lora: torch.zeros(8, 48)}})
    with pytest.raises(UserError, match="not a checkpoint of plain tensors"):
        import_released(tmp_path / "absent.pth")
