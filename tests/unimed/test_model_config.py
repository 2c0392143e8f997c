import pytest
import torch
from transformers import AutoConfig, Blip2VisionConfig, LlamaConfig

from unimed.errors import UserError
from unimed.models.build import released_config
from unimed.models.unimed import TASKS, UniMedConfig, UniMedForConditionalGeneration


def config(**changes) -> UniMedConfig:
    vision = Blip2VisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, image_size=32, patch_size=8
    )
    text = LlamaConfig(vocab_size=100, hidden_size=48, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
    return UniMedConfig(**{"vision_config": vision, "text_config": text, "image_token_index": 7, **changes})


def test_round_trip_keeps_every_setting(tmp_path):
    first = config(
        connector={"num_experts": 3, "router": "sparse", "top_k": 1, "aux_losses": {"switch": 0.1, "z": 0.01}}, training={"lr": 1e-3}
    )
    first.save_pretrained(tmp_path)
    again = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(again, UniMedConfig)
    again.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "config.json").read_text() == (tmp_path / "config.json").read_text()
    assert (again.vision_config.hidden_size, again.text_config.hidden_size) == (32, 48)
    assert again.connector["aux_losses"] == {"switch": 0.1, "z": 0.01}
    assert again.connector["resample_rate"] == 4  # defaults are recorded as well


def test_defaults():
    assert UniMedConfig().tasks == TASKS
    assert UniMedConfig().num_image_tokens == 64
    assert config().connector["in_features"] == 32
    assert config().connector["out_features"] == 48


@pytest.mark.parametrize(
    ("connector", "tokens"),
    [
        ({}, 4),
        ({"resample_rate": 2}, 8),
        ({"resample": "none"}, 16),
        ({"resample": "avgpool"}, 4),
        ({"resample": "maxpool", "resample_rate": 16}, 1),
    ],
)
def test_number_of_image_tokens_is_what_the_connector_makes(connector, tokens):
    settings = config(connector=connector)
    assert settings.num_image_tokens == tokens
    model = UniMedForConditionalGeneration(settings)
    features = model.encode_images(torch.zeros(1, 3, 32, 32))
    assert model.connector(features, task=["vqa"]).embeddings.shape == (1, tokens, 48)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"connector": {"in_features": 31}}, r"connector.in_features is 31, it must be 32 \(vision_config.hidden_size\)"),
        ({"connector": {"out_features": 5}}, r"connector.out_features is 5, it must be 48 \(text_config.hidden_size\)"),
        ({"connector": {"routers": "soft"}}, r"config: connector: unknown settings \['routers'\]"),
        ({"connector": {"router": "softt"}}, r"config: connector: router is 'softt', must be one of soft"),
        ({"image_token_index": 100}, r"image_token_index is 100, it must be below 100"),
    ],
)
def test_wrong_settings_are_one_line(changes, message):
    with pytest.raises(UserError, match=message) as caught:
        config(**changes)
    assert "\n" not in str(caught.value)


def test_patches_that_do_not_divide():
    with pytest.raises(UserError, match="4x4 patches cannot be joined 3 to one"):
        _ = config(connector={"resample_rate": 3}).num_image_tokens


def test_released_sizes():
    with torch.device("meta"):
        model = UniMedForConditionalGeneration(released_config())
    counts = {name: sum(p.numel() for p in module.parameters()) for name, module in model.connector.named_children()}
    tasks = model.connector.router.task_tokens.numel()
    assert counts["experts"] == 199_270_400
    assert counts["router"] - tasks == 507_781_125
    assert tasks == 28_160
    # The release's encoder stores no key bias (zeros here, 39 x 1408) and keeps its last norm (2 x 1408) outside the encoder.
    vision = sum(p.numel() for p in model.vision_tower.parameters())
    assert vision == 985_894_528 + 39 * 1408 + 2 * 1408
    assert not any(p.requires_grad for p in model.vision_tower.parameters())
    # Llama-2-7B, and one row more in the embedding and in the head for <image>.
    assert sum(p.numel() for p in model.language_model.parameters()) == 6_738_415_616 + 2 * 4096
    assert released_config().num_image_tokens == 64
