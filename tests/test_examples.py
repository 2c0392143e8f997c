"""The examples run, and what they train learns."""

import importlib.util
from pathlib import Path

import pytest
import torch
from PIL import Image

EXAMPLES = Path(__file__).parents[1] / "examples"


def load(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_llava_like():
    """Chance is 7 / 24: the question does not say whether a colour or a place is asked for."""
    first, right = load("llava_like").main(steps=150)
    assert first > 1.5
    assert right > 0.9


def test_minigpt4_style():
    pytest.importorskip("transformers")
    module = load("minigpt4_style")
    first, last = module.main(steps=60)
    assert last < first / 2


def test_minigpt4_trains_the_connector_alone():
    pytest.importorskip("transformers")
    module = load("minigpt4_style")
    model = module.build()
    model(torch.randn(2, 3, 32, 32), ["vqa", "refer"], torch.tensor([[1, 3, 4, 9]] * 2), torch.tensor([[5, 6]] * 2)).backward()
    with_grad = {name for name, p in model.named_parameters() if p.grad is not None}
    assert with_grad == {name for name, _ in model.named_parameters() if name.startswith("connector.")}


def test_unimed_ask(tmp_path, capsys):
    pytest.importorskip("transformers")
    from unimed.models.build import build
    from unimed.models.spec import ModelSpec

    image = tmp_path / "a.png"
    Image.new("RGB", (80, 64), (90, 90, 90)).save(image)
    spec = ModelSpec.model_validate({"vision": {"image_size": 32}, "language": {"vocab_size": 400}})
    model, processor = build(spec, ["[INST] <Img><ImageHere></Img> [vqa] which plane is shown [/INST]", "axial coronal"])
    for part in (model, processor):
        part.save_pretrained(tmp_path / "run" / "model")
    (tmp_path / "run" / "run.json").write_text('{"class_questions": ["Which organ is in the image: liver, spleen?"]}')
    answers = load("unimed_ask").main(str(tmp_path / "run"), str(image), str(tmp_path / "boxed.png"))
    assert [answer.task for answer in answers] == ["vqa", "refer", "identify", "cls", "qa"]
    assert answers[2].box == (10, 10, 60, 60)
    assert (tmp_path / "boxed.png").read_bytes().startswith(b"\x89PNG")
    assert "caption: " in capsys.readouterr().out


def test_unimed_own_data(tmp_path, capsys):
    pytest.importorskip("transformers")
    small = "vision.image_size=32 vision.patch_size=8 vision.width=16 vision.layers=1 language.width=32 language.mlp_width=32"
    small += " train.batch_size=4 train.max_steps=4 train.save_every=4 train.log_every=2"
    load("unimed_own_data").main(str(tmp_path / "own"), *small.split())
    shown = capsys.readouterr().out
    assert "records by split: {'train': 16, 'val': 2, 'test': 2}\nfindings: none\nvqa: On which side is the nodule? -> " in shown
    assert "answer: " in shown
    assert (tmp_path / "own" / "runs" / "mine" / "model" / "config.json").is_file()


def test_every_example_is_run():
    source = Path(__file__).read_text()
    assert all(f'"{path.stem}"' in source for path in EXAMPLES.glob("*.py") if path.stem != "__init__")
