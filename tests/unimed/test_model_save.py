import json

import pytest
import torch
from model_samples import batch, picture, small
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from unimed.errors import UserError
from unimed.models.load import load
from unimed.models.unimed import UniMedForConditionalGeneration
from unimed.models.unimed.card import record_training


@pytest.fixture
def saved(tmp_path):
    model, processor = small()
    model.save_pretrained(tmp_path / "m")
    processor.save_pretrained(tmp_path / "m")
    return model, processor, tmp_path / "m"


def rewrite(folder, change):
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def test_round_trip_is_exact(saved):
    model, processor, folder = saved
    again, its_processor = load(folder)
    assert again.state_dict().keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    rows, same = batch(processor), batch(its_processor)
    assert torch.equal(model(**rows).logits, again(**same).logits)
    assert again.generation_config.to_dict() == model.generation_config.to_dict()
    assert again.vision_tower.post_layernorm.eps == 1e-5
    assert again.language_model.lm_head.weight is again.language_model.model.embed_tokens.weight
    assert {p.name for p in folder.iterdir()} >= {
        "config.json",
        "model.safetensors",
        "README.md",
        "processor_config.json",
        "tokenizer.json",
    }
    assert not [p.name for p in folder.iterdir() if p.name.startswith(".") or p.suffix in (".bin", ".pt", ".pkl")]


@pytest.mark.parametrize("auto", [AutoModelForImageTextToText, AutoModelForCausalLM])
def test_auto_classes(saved, auto):
    model, _, folder = saved
    again = auto.from_pretrained(folder)
    assert isinstance(again, UniMedForConditionalGeneration)
    assert torch.equal(again.connector.experts.w1, model.connector.experts.w1)


def test_a_frozen_tower_stays_frozen(tmp_path):
    model, processor = small()
    model.config.freeze_vision = True
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again, _ = load(tmp_path)
    assert again.vision_is_frozen
    assert all(p.requires_grad for name, p in again.named_parameters() if not name.startswith("vision_tower"))


def test_shards_of_an_earlier_save_do_not_stay(saved):
    model, _, folder = saved
    model.save_pretrained(folder, max_shard_size="200KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    assert not (folder / "model.safetensors").exists()
    assert torch.equal(load(folder)[0].connector.experts.w1, model.connector.experts.w1)
    model.save_pretrained(folder)
    assert [p.name for p in folder.glob("model*.safetensors*")] == ["model.safetensors"]


def test_the_card_says_what_it_is_for_and_how_it_was_trained(saved):
    model, _, folder = saved
    record_training(model.config, {"lr": 3e-4, "recipe": "tiny"})
    model.save_pretrained(folder)
    card = (folder / "README.md").read_text()
    assert "Research use, not for diagnosis" in card
    assert '"lr": 0.0003' in card
    assert f"{sum(p.numel() for p in model.parameters()):,} parameters" in card
    assert '"aux_losses"' in card
    assert load(folder)[0].config.training == {"lr": 3e-4, "recipe": "tiny"}


def test_missing_and_extra_keys_are_listed(saved):
    _, _, folder = saved

    def change(weights):
        del weights["connector.experts.w1"], weights["language_model.model.norm.weight"]
        weights["surplus"] = torch.zeros(1)

    rewrite(folder, change)
    with pytest.raises(UserError) as caught:
        load(folder)
    message = str(caught.value)
    assert "missing: connector.experts.w1, language_model.model.norm.weight; extra: surplus" in message
    assert str(folder) in message
    assert "\n" not in message


def test_wrong_shapes_are_listed(saved):
    _, _, folder = saved
    rewrite(folder, lambda weights: weights.update({"connector.experts.b1": torch.zeros(5, 7)}))
    with pytest.raises(UserError, match=r"wrong shape: connector.experts.b1 is \[5, 7\] and must be \[5, 24\]"):
        load(folder)


def test_widths_that_do_not_fit_are_named(saved):
    _, _, folder = saved
    config = json.loads((folder / "config.json").read_text())
    config["connector"]["in_features"] = 16
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"connector.in_features is 16, it must be 32 \(vision_config.hidden_size\)"):
        load(folder)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "config.json").unlink(), "no config.json"),
        (lambda folder: (folder / "config.json").write_text("{"), "config.json: not valid JSON"),
        (lambda folder: (folder / "config.json").write_text('{"model_type": "llama"}'), "'llama' model, it must be 'unimed'"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"not tensors"), "the model cannot be read"),
        (lambda folder: (folder / "model.safetensors").unlink(), "the model cannot be read"),
        (lambda folder: (folder / "processor_config.json").unlink(), "no processor_config.json"),
        (lambda folder: (folder / "tokenizer.json").write_text("{}"), "the processor cannot be read"),
    ],
)
def test_damaged_folders_are_one_line(saved, damage, message):
    _, _, folder = saved
    damage(folder)
    with pytest.raises(UserError, match=message) as caught:
        load(folder)
    assert "\n" not in str(caught.value)


def test_pickled_weights_are_not_read(saved):
    _, _, folder = saved
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match="cannot be read"):
        load(folder)


def test_a_processor_of_another_model_is_refused(saved):
    _, processor, folder = saved
    processor.num_image_tokens = 9
    processor.save_pretrained(folder)
    with pytest.raises(UserError, match="the processor makes 9 image tokens"):
        load(folder)


def test_dtype(saved):
    _, processor, folder = saved
    model, _ = load(folder, dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.generate(**processor(text="[INST] <ImageHere> [vqa] x [/INST]", images=picture(1)), max_new_tokens=2).shape[0] == 1
