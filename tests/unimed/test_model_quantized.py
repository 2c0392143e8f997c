"""Language models in 4 and 8 bits, and GGUF files; where a package is missing, one line."""

import importlib.util

import pytest
import torch
from model_samples import TEXTS, batch, small, spec

from unimed import io
from unimed.errors import UserError
from unimed.models import quantized
from unimed.models.build import adapt, build
from unimed.models.load import load
from unimed.models.merge import merge_folder
from unimed.models.parts import read_language_model
from unimed.models.spec import ModelSpec


@pytest.fixture(scope="module")
def language(tmp_path_factory):
    """A folder with a small language model."""
    folder = tmp_path_factory.mktemp("language")
    model, processor = small(language={"width": 64, "mlp_width": 128})
    model.language_model.save_pretrained(folder)
    processor.tokenizer.save_pretrained(folder)
    return folder


def of(folder, kind):
    given = spec().model_dump(by_alias=True, exclude={"language"})
    return ModelSpec.model_validate({**given, "language": {"from": f"{folder}", "quantize": kind, "lora": {"r": 4}}})


def test_a_missing_package_is_one_line_before_weights_are_read(language, tmp_path, monkeypatch):
    there = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name in ("bitsandbytes", "gguf") else there(name, *rest))
    monkeypatch.setattr("unimed.models.parts.read_language_model", None)
    with pytest.raises(
        UserError, match=r"language.quantize='4bit': the package bitsandbytes is not installed; .* pip install bitsandbytes"
    ):
        build(of(language, "4bit"), TEXTS)
    (tmp_path / "m.gguf").touch()
    with pytest.raises(UserError, match=r"m\.gguf: the package gguf is not installed; get it with: pip install gguf"):
        read_language_model(f"{tmp_path / 'm.gguf'}", torch.float32)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"quantize": "4bit"}, "language.quantize='4bit': a model from scratch trains whole"),
        ({"quantize": "8bit", "from": "./x"}, "language.quantize='8bit': such weights do not train; add language.lora.r=8"),
    ],
)
def test_what_cannot_be_quantised_is_one_line(settings, message):
    with pytest.raises(UserError, match=message):
        ModelSpec.model_validate({"language": settings})


def test_the_settings_are_those_of_qlora(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda *_: True)
    four, eight = quantized.settings("4bit", torch.bfloat16), quantized.settings("8bit", torch.bfloat16)
    assert (four.load_in_4bit, four.bnb_4bit_quant_type, four.bnb_4bit_use_double_quant) == (True, "nf4", True)
    assert four.bnb_4bit_compute_dtype is torch.bfloat16
    assert eight.load_in_8bit
    assert four.llm_int8_skip_modules == eight.llm_int8_skip_modules == ["vision_tower", "connector", "lm_head"]


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="the package bitsandbytes is not installed")
@pytest.mark.parametrize("kind", ["4bit", "8bit"])
def test_a_quantised_model_trains_and_comes_back(kind, language, tmp_path):
    chosen = of(language, kind)
    model, processor = build(chosen, TEXTS)

    def fill(folder):
        model.save_pretrained(folder)
        processor.save_pretrained(folder)

    io.write_folder(tmp_path / "base", fill)
    rows = batch(processor)
    peft = adapt(model, chosen, tmp_path / "base")
    names = {"4bit": "Linear4bit", "8bit": "Linear8bitLt"}
    packed = [name for name, module in peft.named_modules() if type(module).__name__ == names[kind] and "base_layer" not in name]
    assert len(packed) == 2 * 7
    assert all(".language_model." in name for name in packed)
    with torch.no_grad():
        off = (peft.eval()(**rows).logits - model.eval()(**rows).logits).abs().max()
    assert 0 < off < 0.3
    optimiser = torch.optim.AdamW([p for p in peft.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(4):
        losses.append(peft.train()(**rows).loss)
        losses[-1].backward()
        optimiser.step()
        optimiser.zero_grad()
    assert losses[-1] < losses[0]
    peft.eval().save_pretrained(tmp_path / "adapter")
    again, _ = load(tmp_path / "adapter")
    assert torch.equal(again.eval()(**rows).logits, peft(**rows).logits)
    merge_folder(tmp_path / "adapter", tmp_path / "merged")
