"""The benchmark of whole training steps: what it compares, refuses and writes."""

import json

import pytest
import torch

from benchmarks import record, training
from unimed.train import recipe as recipes

SIZES = """
vision.image_size=32 vision.patch_size=8 vision.width=16 vision.layers=1 vision.heads=2 connector.hidden_features=16
language.width=32 language.layers=1 language.heads=2 language.mlp_width=32 language.vocab_size=400
"""
SMALL = SIZES.split()


def test_both_sides_take_whole_steps_and_the_file_says_so(tmp_path):
    found = training.measure("small", 2, 0.01, SMALL, 20)
    assert found["gradients_apart"] < 1e-4
    assert found["tokens"] == 2 * (4 + training.TEXT)
    for side in ("kernels", "reference"):
        one = found["sides"][side]
        assert one["calls"] >= 3
        assert one["tokens_per_second"] == pytest.approx(one["images_per_second"] * (4 + training.TEXT), rel=1e-2)
    found["run"] = {"threads": 1, "date": "2026-11-29 10:00 UTC"}
    for width in training.WIDTHS:
        record.merge(tmp_path / "a.json", {"cpu": "some CPU", "flags": []}, width, found, training.SUITE)
    document = json.loads((tmp_path / "a.json").read_text())
    assert document["suite"] == "training"
    assert training.row(document).endswith("(some CPU, 1 thread, 2026-11-29).")
    assert record.documents(tmp_path) == []  # the op benchmarks' pages leave it out


def test_a_step_updates_every_trainable_part():
    recipe = recipes.load("tiny", [*SMALL, "vision.freeze=true", "language.lora.r=2"])
    model, inputs = training.prepare(recipe, 5)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    step, _ = training.steps(model, inputs, bf16=False)
    step("auto"), step("auto")
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert {part for part in ("connector", "lora_", "vision_tower") if any(part in name for name in moved)} == {"connector", "lora_"}
    assert any("router" in name for name in moved)


def test_readme_has_what_was_measured():
    (document,) = record.documents(suites=[training.SUITE])
    assert training.row(document) in (record.machine.ROOT / "README.md").read_text()


def test_gradients_that_differ_get_no_time():
    some = [torch.ones(3), torch.zeros(2)]
    assert training.check(some, some, bf16=False) == 0
    with pytest.raises(ValueError, match=r"differ by 1.00e-01"):
        training.check([1.1 * some[0], some[1]], some, bf16=False)


def test_what_does_not_fit_is_not_begun(monkeypatch):
    monkeypatch.setattr(training, "free_gb", lambda: 1.0)
    with pytest.raises(SystemExit, match=r"needs 1\d\.\d GB; 1.0 GB are free, and --most-gb is 20"):
        training.measure("full", 1, 1, [], 20)
