import json

import pytest
import torch
from model_samples import QA, REFER, TEXTS, VQA, batch, lively, picture, small, spec
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    CLIPConfig,
    CLIPModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from unimed.errors import UserError
from unimed.models.adapter import merge
from unimed.models.build import adapt, build
from unimed.models.load import load
from unimed.models.spec import LANGUAGE, VISION, ModelSpec
from unimed.models.unimed import UniMedForConditionalGeneration


@pytest.fixture(scope="module")
def qwen2(tmp_path_factory):
    """A language model of transformers with its own tokenizer, which knows no `<image>` and has no padding."""
    folder = tmp_path_factory.mktemp("parts") / "qwen2"
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=300, special_tokens=["<end>"], initial_alphabet=alphabet))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<end>")
    tokenizer.save_pretrained(folder)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    torch.manual_seed(1)
    Qwen2ForCausalLM(Qwen2Config(vocab_size=len(tokenizer), max_position_embeddings=256, **sizes)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """A whole CLIP, of which the vision side is taken."""
    folder = tmp_path_factory.mktemp("parts") / "clip"
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(2)
    vision, text = {**sizes, "image_size": 32, "patch_size": 8}, {**sizes, "vocab_size": 64}
    CLIPModel(CLIPConfig(vision_config=vision, text_config=text, projection_dim=16)).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.1, 0.2, 0.3], "image_std": [1, 1, 1]}))
    return folder


def of_folders(qwen2, clip, **language):
    text = {"from": str(qwen2), **language}
    connector = {"hidden_features": 24, "router_features": 12, "task_features": 8}
    return ModelSpec.model_validate({"vision": {"from": str(clip)}, "connector": connector, "language": text})


def a_step(model, processor, lr=0.05):
    trained = [p for p in model.parameters() if p.requires_grad]
    model.train()
    loss = model(**batch(processor)).loss
    loss.backward()
    without = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    torch.optim.SGD(trained, lr=lr).step()
    model.zero_grad()
    return float(loss.detach()), without


def asked(processor):
    return processor(text=[REFER, QA, VQA], images=[picture(1), picture(2)])


@pytest.mark.parametrize(
    ("part", "name"), [*(("language", name) for name in LANGUAGE), *(("vision", name) for name in VISION if name != "eva")]
)
def test_an_architecture_of_transformers_is_a_name(part, name, tmp_path):
    """It trains with a gradient in every tensor that is trainable, answers the same with and without a cache, and comes back as it was."""
    model, processor = small(**{part: {"from": name}})
    lively(model)
    first, without = a_step(model, processor)
    assert without == []
    assert sum(a_step(model, processor)[0] < first for _ in range(3)) == 3
    model.eval()
    answers = model.generate(**asked(processor), max_new_tokens=6)
    assert torch.equal(answers, model.generate(**asked(processor), max_new_tokens=6, use_cache=False))
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again, its_processor = load(tmp_path)
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    assert torch.equal(again.generate(**asked(its_processor), max_new_tokens=6), answers)
    assert {n for n, p in again.named_parameters() if p.requires_grad} == {n for n, p in model.named_parameters() if p.requires_grad}


def test_a_model_of_two_folders_trains_and_the_auto_classes_read_it(qwen2, clip, tmp_path):
    model, processor = build(of_folders(qwen2, clip), seed=3)
    stored = load_file(qwen2 / "model.safetensors")
    own = model.language_model.state_dict()
    assert all(torch.equal(own[name][: len(value)], value) for name, value in stored.items())
    assert len(own["model.embed_tokens.weight"]) == len(processor.tokenizer) > len(stored["model.embed_tokens.weight"])  # <image>
    tower = {f"vision_model.{name}": value for name, value in model.vision_tower.state_dict().items()}
    whole = load_file(clip / "model.safetensors")
    assert all(torch.equal(whole[name if name in whole else name.removeprefix("vision_model.")], value) for name, value in tower.items())
    assert list(processor.image_processor.image_mean) == [0.1, 0.2, 0.3]
    again, _ = build(of_folders(qwen2, clip), seed=3)
    assert torch.equal(again.connector.experts.w1, model.connector.experts.w1)
    other, _ = build(of_folders(qwen2, clip), seed=4)
    assert not torch.equal(other.connector.experts.w1, model.connector.experts.w1)
    assert not any(p.is_meta for p in model.parameters())
    first, without = a_step(model, processor)
    assert without == []
    assert a_step(model, processor)[0] < first
    model.eval()
    assert torch.equal(
        model.generate(**asked(processor), max_new_tokens=5), model.generate(**asked(processor), max_new_tokens=5, use_cache=False)
    )
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    auto = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert isinstance(auto, UniMedForConditionalGeneration)
    rows = batch(AutoProcessor.from_pretrained(tmp_path))
    assert torch.equal(auto.eval()(**rows).logits, model(**rows).logits)


def test_each_part_is_frozen_kept_in_its_dtype_and_adapted(qwen2, clip, tmp_path):
    settings = of_folders(qwen2, clip, dtype="bf16", lora={"r": 4}).model_dump(by_alias=True)
    settings["vision"] |= {"freeze": True, "dtype": "bf16", "lora": {"r": 2, "alpha": 4}}
    described = ModelSpec.model_validate(settings)
    model, processor = build(described)
    dtypes = [{p.dtype for p in part.parameters()} for part in (model.vision_tower, model.connector, model.language_model)]
    assert dtypes == [{torch.bfloat16}, {torch.float32}, {torch.bfloat16}]
    model.save_pretrained(tmp_path / "base")
    processor.save_pretrained(tmp_path / "base")
    adapted = adapt(model, described, tmp_path / "base")
    trained = {name for name, p in adapted.named_parameters() if p.requires_grad}
    assert all(".lora_" in name or "connector.modules_to_save" in name for name in trained)
    ranks = {part: {p.shape[0] for n, p in adapted.named_parameters() if part in n and "lora_A" in n} for part in ("vision", "language")}
    assert ranks == {"vision": {2}, "language": {4}}
    # Four Linears of attention and two of the MLP in each layer of the tower, seven in each layer of the language model.
    assert len([name for name in trained if "lora_A" in name]) == 2 * 6 + 2 * 7
    assert a_step(adapted, processor)[1] == []
    adapted.eval().save_pretrained(tmp_path / "adapter")
    again, _ = load(tmp_path / "adapter")
    rows = batch(processor)
    assert torch.equal(again(**rows).logits, adapted(**rows).logits)
    assert {p.dtype for p in again.get_base_model().language_model.model.embed_tokens.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("part", ["vision", "connector", "language"])
def test_a_frozen_part_stays_as_it_is(part, tmp_path):
    frozen = {"freeze": True} | ({"hidden_features": 24, "router_features": 12, "task_features": 8} if part == "connector" else {})
    model, processor = small(**{part: frozen})
    name = {"vision": "vision_tower", "connector": "connector", "language": "language_model"}[part]
    before = {key: value.clone() for key, value in model.state_dict().items()}
    assert a_step(model, processor)[1] == []
    changed = {key.partition(".")[0] for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert changed == {"vision_tower", "connector", "language_model"} - {name}
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again, _ = load(tmp_path)
    assert {key.partition(".")[0] for key, p in again.named_parameters() if not p.requires_grad} == {name}


def test_a_connector_starts_as_that_of_a_saved_model(tmp_path):
    model, _ = small(seed=5)
    model.save_pretrained(tmp_path / "run" / "model")
    connector = {"hidden_features": 24, "router_features": 12, "task_features": 8, "from": str(tmp_path / "run")}
    started, _ = small(connector=connector)
    assert all(torch.equal(value, model.connector.state_dict()[name]) for name, value in started.connector.state_dict().items())
    with pytest.raises(UserError, match=r"connector.from=.*do not fit the model: wrong shape: .*experts.w1 is \[5, 24"):
        small(connector={**connector, "hidden_features": 16})
    with pytest.raises(UserError, match=r"connector.from=.*no model.safetensors"):
        small(connector={**connector, "from": str(tmp_path)})


def test_lora_beside_a_trained_clip_leaves_out_what_its_features_do_not_read(clip):
    described = ModelSpec.model_validate({**spec(language={"lora": {}}).model_dump(by_alias=True), "vision": {"from": str(clip)}})
    model, processor = build(described, TEXTS)
    assert a_step(adapt(model, described), processor)[1] == []


def test_a_merged_model_is_the_adapted_one_up_to_rounding(tmp_path):
    described = spec(language={"lora": {"r": 4, "dropout": 0.0}})
    model, processor = build(described, TEXTS)
    adapted = adapt(lively(model), described)
    a_step(adapted, processor)
    rows = batch(processor)
    expected = adapted.eval()(**rows).logits
    merged = merge(adapted)
    torch.testing.assert_close(merged(**rows).logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("part", "settings", "message"),
    [
        ("language", {"from": "qwen9"}, r"language.from='qwen9': no architecture of transformers; tested are llama, qwen2"),
        ("vision", {"from": "resnet"}, r"vision: 'resnet' is not a tower that has hidden_size, image_size and patch_size"),
        ("vision", {"from": "qwen2"}, r"vision: 'qwen2' is not a tower"),
        ("language", {"from": "clip_vision_model"}, r"language.from='clip_vision_model': not a causal language model; tested are llama"),
        ("language", {"config": {"num_key_value_heads": "many"}}, r"language.config"),
    ],
)
def test_a_part_that_does_not_exist_is_one_line(part, settings, message):
    with pytest.raises(UserError, match=message) as caught:
        small(**{part: settings})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("part", ["vision", "language"])
def test_a_wrong_folder_or_a_hub_name_offline_is_one_line(part, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (tmp_path / "pickled").mkdir()
    (tmp_path / "pickled" / "config.json").write_text(
        '{"model_type": "llama"}' if part == "language" else '{"model_type": "clip_vision_model"}'
    )
    (tmp_path / "pickled" / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    for source in ("some-lab/some-model", f"{tmp_path}/nothing", f"{tmp_path}/pickled"):
        with pytest.raises(UserError, match=rf"{part}.from='{source}'.*cannot be read") as caught:
            build(ModelSpec.model_validate({part: {"from": source}}), TEXTS)
        assert "\n" not in str(caught.value)
