import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from model_samples import QA, batch, small

from unimed.models.adapter import add_lora
from unimed.train import recipe as recipes
from unimed.train.run import train

ROOT = Path(__file__).resolve().parents[2]
# Batches of one task: some steps have an image in one process only, some in none.
SETTINGS = [
    *("data.tasks=[qa, caption]", "sampler.mode=homogeneous", "sampler.ratios={qa: 1, caption: 1}"),
    *("connector.aux_losses={importance: 0.1}", "train.gradient_checkpointing=true", "train.max_steps=8"),
]


def log_of(run):
    entries = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in entry.items() if "second" not in key} for entry in entries if "loss" in entry]


def test_two_processes_train_log_and_resume_as_one_does_with_twice_the_batches(small_overrides, tmp_path):
    overrides = [*small_overrides, *SETTINGS]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", ROOT / "tests/unimed/two_processes.py", tmp_path]
    shown = subprocess.run(
        [sys.executable, *map(str, launch), *overrides], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert shown.returncode == 0, shown.stdout + shown.stderr
    for rank in range(2):
        assert json.loads((tmp_path / f"process-{rank}.json").read_text()) == {"killed": True, "again": 2, "resumed": 0}
    # One process speaks.
    assert shown.stdout.count("trained: ") == 1
    assert shown.stdout.count("training: step 8 of 8") == 1
    assert shown.stderr.count("error: ") == 1
    assert "this run exists" in shown.stderr

    run = tmp_path / "runs" / "pair"
    names = {path.name for path in run.iterdir()}
    assert names == {"recipe.yaml", "start.json", "metrics.jsonl", "router.json", "run.json", "model", "checkpoint-4", "checkpoint-8"}
    one = train(recipes.load("tiny", [*overrides, "train.accumulate=2"]), tmp_path / "one")
    ours, theirs = log_of(run), log_of(one)
    assert [entry.keys() for entry in ours] == [entry.keys() for entry in theirs]
    for pair, single in zip(ours, theirs, strict=True):
        assert pair == pytest.approx(single, rel=2e-4, abs=1e-6)
    assert {"loss/qa", "loss/caption", "aux/importance", "router_entropy/caption"} <= {key for entry in ours for key in entry}


@pytest.fixture
def many(monkeypatch):
    """As if another process took part; nothing is sent to it."""
    monkeypatch.setattr("unimed.models.unimed.modeling._many_processes", lambda: True)


ROUTERS = [
    {"router": "soft"},
    {"router": "soft", "router_inputs": "task"},
    {"router": "soft", "router_inputs": "token"},
    {"router": "sparse", "aux_losses": {"z": 0.1}},
    {"router": "hard"},
    {"router": "constant"},
]


@pytest.mark.parametrize("router", ROUTERS, ids=lambda settings: "-".join(map(str, settings.values())))
def test_a_batch_without_an_image_gives_every_parameter_a_gradient_of_zero(many, router):
    sizes = {"hidden_features": 24, "router_features": 12, "task_features": 8}
    model, processor = small(connector={**sizes, **router})
    model.train()
    text = processor(text=[QA], answers=["left"])
    out = model(**text)
    out.loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if "language_model" not in name}
    assert [name for name, gradient in gradients.items() if gradient is None] == []
    assert all(not gradient.any() for gradient in gradients.values())
    assert out.loss == out.lm_loss
    assert out.gates is None


def test_in_one_process_a_batch_without_an_image_runs_no_tower():
    model, processor = small()
    model.train()
    model(**processor(text=[QA], answers=["left"])).loss.backward()
    assert all(p.grad is None for name, p in model.named_parameters() if "language_model" not in name)


def test_a_frozen_tower_and_lora_take_part_too(many):
    model, processor = small()
    model.config.freeze_vision = True
    model.vision_tower.requires_grad_(False)
    peft = add_lora(model).train()
    peft(**processor(text=[QA], answers=["left"])).loss.backward()
    assert [name for name, p in peft.named_parameters() if p.requires_grad and p.grad is None] == []
    peft.zero_grad()
    peft(**batch(processor)).loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in peft.parameters() if p.requires_grad)
