import pytest
import torch
from model_samples import QA, small

from unimed.errors import UserError
from unimed.inference.session import Session, load
from unimed.models.load import pick_device
from unimed.models.unimed import UniMedForConditionalGeneration
from unimed.train import recipe as recipes
from unimed.train.run import items


def gpus(monkeypatch, count):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)


def test_auto_is_a_gpu_where_there_is_one(monkeypatch):
    gpus(monkeypatch, 0)
    assert pick_device("auto") == pick_device("cpu") == torch.device("cpu")
    with pytest.raises(UserError, match="device 'cuda': PyTorch finds no GPU here; use cpu or auto"):
        pick_device("cuda")
    gpus(monkeypatch, 2)
    assert pick_device("auto") == pick_device("cuda") == torch.device("cuda")
    assert pick_device("cuda:1") == torch.device("cuda:1")
    assert pick_device("cpu") == torch.device("cpu")
    with pytest.raises(UserError, match="device 'cuda:2': this machine has 2 GPUs, numbered from 0"):
        pick_device("cuda:2")
    for wrong in ("gpu", "cuda:x", "", "mps", "cpu:0"):
        with pytest.raises(UserError, match="it must be auto, cpu, cuda, or cuda:N"):
            pick_device(wrong)


@pytest.mark.parametrize(("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_a_gpu_answers_in_the_precision_of_training(small_run, small_overrides, tmp_path, monkeypatch, precision, dtype):
    run = tmp_path / "run"
    run.mkdir()
    (run / "model").symlink_to(small_run / "model")
    (run / "recipe.yaml").write_text(recipes.dump(recipes.load("tiny", [*small_overrides, f"train.precision={precision}"])))
    moved = []
    monkeypatch.setattr(UniMedForConditionalGeneration, "to", lambda self, device: moved.append((device, self.dtype)) or self)
    gpus(monkeypatch, 1)
    load(run)
    gpus(monkeypatch, 0)
    load(run)
    assert moved == [(torch.device("cuda"), dtype), (torch.device("cpu"), torch.float32)]


def test_the_model_trains_on_after_an_answer_failed(small_run, small_overrides):
    session = load(small_run, device="cpu")
    model = session.model
    found = items(recipes.load("tiny", small_overrides), "slab")[:2]
    model.train()

    def broken(**inputs):
        assert not model.training
        raise UserError("no")

    with pytest.raises(UserError, match="no"):
        Session(model, broken).generate(found)
    assert model.training
    assert len(session.generate(found, max_new_tokens=2)) == 2
    assert model.training


def test_what_does_not_fit_the_positions_is_one_line(small_run, small_overrides):
    model, processor = small()
    positions = model.config.text_config.max_position_embeddings
    assert processor.max_prompt_tokens + processor.max_answer_tokens == positions
    with pytest.raises(UserError, match=f"at most {processor.max_prompt_tokens} are allowed"):
        processor(text=QA.replace("spleen", "spleen " * positions), answers="left")
    trained = load(small_run, device="cpu")
    found = items(recipes.load("tiny", small_overrides), "slab")[:2]
    with pytest.raises(UserError, match=rf"answer of up to {positions} do not fit the model's {positions} positions"):
        trained.generate(found, max_new_tokens=positions)
