import pytest
import torch
from transformers import AutoConfig, Blip2VisionConfig, LlamaConfig

from unimed.errors import UserError
from unimed.models.build import adapt, describe
from unimed.models.unimed import TASKS, UniMedConfig, UniMedForConditionalGeneration
from unimed.models.unimed.modeling import EvaVisionModel
from unimed.train import recipe as recipes


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


@pytest.mark.parametrize("name", ["unimed-7b-release", "unimed-7b-paper"])
def test_full_size(name):
    recipe = recipes.load(name)
    config = describe(recipe)
    with torch.device("meta"):
        model = adapt(UniMedForConditionalGeneration(config), recipe)
    base = model.get_base_model()
    connector = base.connector.modules_to_save["default"]
    counts = {part: sum(p.numel() for p in module.parameters()) for part, module in connector.named_children()}
    tasks = connector.router.task_tokens.numel()
    assert counts["experts"] == 199_270_400
    assert counts["router"] - tasks == 507_781_125
    assert tasks == 28_160
    # The release's encoder stores no key bias (zeros here, 39 x 1408) and keeps its last norm (2 x 1408) outside the encoder.
    vision = sum(p.numel() for p in base.vision_tower.parameters())
    assert vision == 985_894_528 + 54_912 + 2_816 == 985_952_256
    assert not any(p.requires_grad for p in base.vision_tower.parameters())
    assert isinstance(base.vision_tower, EvaVisionModel)
    assert base.vision_tower.post_layernorm.eps == 1e-5
    # Llama-2-7B, and one row more in the embedding and in the head for <image>.
    lora = sum(p.numel() for name, p in model.named_parameters() if ".lora_" in name)
    assert lora == 19_988_480
    assert sum(p.numel() for p in base.language_model.parameters()) - lora == 6_738_415_616 + 2 * 4096
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 727_068_165
    assert config.num_image_tokens == 64


def test_the_differences_of_the_paper_s_recipe_are_listed_in_its_file():
    release, paper = (recipes.flat(recipes.load(name)) for name in ("unimed-7b-release", "unimed-7b-paper"))
    differ = {key for key in release if release[key] != paper[key]} - {"name", "description"}
    head = (recipes.RECIPES / "unimed-7b-paper.yaml").read_text().partition("description:")[0]
    assert {line.split()[1] for line in head.splitlines() if line.startswith("#   ")} - {"setting"} == differ
