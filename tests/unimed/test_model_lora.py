import json

import pytest
import torch
from model_samples import batch, lively, small
from safetensors.torch import load_file, save_file

from unimed.errors import UserError
from unimed.models.adapter import add_lora, merge
from unimed.models.load import load
from unimed.models.spec import Lora
from unimed.models.unimed import UniMedForConditionalGeneration


def trained(model, processor, steps=3):
    """A few steps, so that adapter and connector differ from their start."""
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    model.train()
    for _ in range(steps):
        model(**batch(processor)).loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    return model.eval()


def adapted(folder=None, freeze=False):
    model, processor = small()
    lively(model)
    if freeze:
        model.config.freeze_vision = True
        model.vision_tower.requires_grad_(False)
    if folder is not None:
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        model, processor = load(folder)
    return trained(add_lora(model, Lora(r=4, alpha=8, dropout=0.0)), processor), processor


@pytest.mark.parametrize("freeze", [False, True])
def test_what_trains_is_lora_and_connector(freeze):
    model, processor = small()
    model.config.freeze_vision = freeze
    peft = add_lora(model)
    trainable = {name for name, p in peft.named_parameters() if p.requires_grad}
    assert all(".lora_" in n or ".modules_to_save.default." in n for n in trainable)
    assert any("vision_tower" in n for n in trainable) is not freeze
    # q, k, v, o, gate, up, down of both layers, A and B; the head stays as it is
    assert len([n for n in trainable if ".lora_" in n]) == 2 * 7 * 2
    assert not any("lm_head" in n for n in trainable)
    peft.train()
    out = peft(**batch(processor))
    out.loss.backward()
    without = [n for n, p in peft.named_parameters() if p.requires_grad and p.grad is None]
    assert without == []
    assert all(p.grad is None for n, p in peft.named_parameters() if n not in trainable)


def test_the_auxiliary_loss_works_under_peft():
    model, processor = small()
    rows = batch(processor)
    plain = model(**rows)
    wrapped = add_lora(model)(**rows)  # B starts at zero: the same model
    torch.testing.assert_close(wrapped.loss, plain.loss)
    torch.testing.assert_close(wrapped.aux_loss, plain.aux_loss)
    assert wrapped.aux_loss > 0
    torch.testing.assert_close(wrapped.gates, plain.gates)
    wrapped.aux_loss.backward()


def test_one_folder_holds_adapter_and_connector(tmp_path):
    model, processor = adapted(tmp_path / "base")
    model.save_pretrained(tmp_path / "adapter")
    keys = load_file(tmp_path / "adapter" / "adapter_model.safetensors").keys()
    assert any(".connector.experts.w1" in key for key in keys)
    assert any(".lora_A" in key for key in keys)
    assert not (tmp_path / "adapter" / "base").exists()
    assert "Research use, not for diagnosis" in (tmp_path / "adapter" / "README.md").read_text()
    again, its_processor = load(tmp_path / "adapter")
    rows = batch(processor)
    assert torch.equal(again(**batch(its_processor)).logits, model(**rows).logits)
    plain, _ = load(tmp_path / "base")
    assert not torch.allclose(plain(**rows).logits, model(**rows).logits)


def test_a_base_that_was_never_saved_goes_with_the_adapter(tmp_path):
    model, processor = adapted()
    model.save_pretrained(tmp_path / "adapter")
    processor.save_pretrained(tmp_path / "adapter")
    (tmp_path / "adapter").rename(tmp_path / "moved")
    again, _ = load(tmp_path / "moved")
    rows = batch(processor)
    assert torch.equal(again(**rows).logits, model(**rows).logits)


def test_the_base_is_named_relative_to_the_adapter(tmp_path):
    model, processor = adapted(tmp_path / "project" / "archives" / "base")
    rows = batch(processor)
    logits = model(**rows).logits

    def named(folder):
        return json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]

    run = tmp_path / "project" / "runs" / "one"
    model.save_pretrained(run / "model")
    model.home = run / "checkpoint-5"  # as the Trainer writes a checkpoint
    model.save_pretrained(run / ".partial" / "checkpoint-5")
    model.home = None
    (run / ".partial" / "checkpoint-5").rename(run / "checkpoint-5")
    assert named(run / "model") == named(run / "checkpoint-5") == "../../../archives/base"
    assert str(tmp_path) not in (run / "model" / "README.md").read_text()
    (tmp_path / "project").rename(tmp_path / "moved")
    run = tmp_path / "moved" / "runs" / "one"
    for folder in (run / "model", run / "checkpoint-5"):
        again, _ = load(folder)
        assert torch.equal(again(**rows).logits, logits)
    again.save_pretrained(tmp_path / "copy")
    assert named(tmp_path / "copy") == "../moved/archives/base"

    # The run without its base: the folders to search, or one line.
    run.rename(tmp_path / "sent")
    with pytest.raises(UserError, match=r"the adapter's base model is not at .*; give its folder as base"):
        load(tmp_path / "sent" / "model")
    again, _ = load(tmp_path / "sent" / "model", search=[tmp_path / "moved" / "archives"])
    assert torch.equal(again(**rows).logits, logits)
    again, _ = load(tmp_path / "sent" / "model", base=tmp_path / "moved" / "archives" / "base")
    assert torch.equal(again(**rows).logits, logits)


def test_an_adapter_that_names_an_absolute_path_still_loads(tmp_path):
    model, processor = adapted(tmp_path / "base")
    model.save_pretrained(tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "base_model_name_or_path": str(tmp_path / "base")}))
    again, _ = load(tmp_path / "adapter")
    rows = batch(processor)
    assert torch.equal(again(**rows).logits, model(**rows).logits)


@pytest.mark.parametrize("freeze", [False, True])
def test_merged_equals_adapted(tmp_path, freeze):
    model, processor = adapted(tmp_path / "base", freeze)
    rows = batch(processor)
    before = model(**rows)
    asked = batch(processor, answers=False)
    answers = model.generate(**asked, max_new_tokens=8)
    whole = merge(model)
    assert type(whole) is UniMedForConditionalGeneration
    assert not any("lora" in name or "modules_to_save" in name for name, _ in whole.named_parameters())
    after = whole(**rows)
    torch.testing.assert_close(after.logits, before.logits, atol=1e-3, rtol=1e-4)
    torch.testing.assert_close(after.gates, before.gates)
    assert torch.equal(whole.generate(**asked, max_new_tokens=8), answers)
    whole.save_pretrained(tmp_path / "merged")
    processor.save_pretrained(tmp_path / "merged")
    again, _ = load(tmp_path / "merged")
    assert torch.equal(again(**rows).logits, after.logits)
    assert add_lora(whole).peft_config["default"].base_model_name_or_path is None  # not the base that it once had


def test_a_loaded_adapter_can_train_on(tmp_path):
    model, processor = adapted(tmp_path / "base")
    model.save_pretrained(tmp_path / "adapter")
    frozen, _ = load(tmp_path / "adapter")
    assert not any(p.requires_grad for p in frozen.parameters())
    again, _ = load(tmp_path / "adapter", trainable=True)
    wanted = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {name for name, p in again.named_parameters() if p.requires_grad} == wanted
    before = again(**batch(processor)).loss
    assert trained(again, processor, 5)(**batch(processor)).loss < before


def test_damaged_adapters_are_one_line(tmp_path):
    model, _ = adapted(tmp_path / "base")
    folder = tmp_path / "adapter"
    model.save_pretrained(folder)
    file = folder / "adapter_model.safetensors"
    weights = load_file(file)

    def refused(message, base=None):
        with pytest.raises(UserError, match=message) as caught:
            load(folder, base=base)
        assert "\n" not in str(caught.value)

    less = {key: value for key, value in weights.items() if not key.endswith("connector.experts.w1")}
    save_file(less | {"other": torch.zeros(1)}, file)
    refused("missing: base_model.model.connector.experts.w1; extra: other")
    file.write_bytes(b"?")
    refused("the adapter cannot be read")
    file.unlink()
    refused("no adapter_model.safetensors")
    save_file(weights, file)
    other, other_processor = small(language={"width": 64})
    other.save_pretrained(tmp_path / "other")
    other_processor.save_pretrained(tmp_path / "other")
    refused("wrong shape: .* and must be", base=tmp_path / "other")
    refused("no config.json", base=tmp_path / "nowhere")
    settings = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**settings, "base_model_name_or_path": None}))
    refused("names no base model")
