import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from many_processes import Gradients
from model_samples import QA, batch, small
from safetensors.torch import load_file

from unimed.inference.session import load
from unimed.models.adapter import add_lora
from unimed.train import recipe as recipes
from unimed.train.run import train

ROOT = Path(__file__).resolve().parents[2]
# Batches of one task: in some steps a process has no image, in some none has.
SETTINGS = [
    *("data.tasks=[qa, caption]", "sampler.mode=homogeneous", "sampler.ratios={qa: 3, caption: 1}", "train.batch_size=2"),
    *("connector.aux_losses={importance: 0.1}", "train.gradient_checkpointing=true", "train.max_steps=8"),
]
BATCHES = 4  # of a step, in all processes


def log_of(run):
    entries = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in entry.items() if "second" not in key} for entry in entries if "loss" in entry]


def launch(processes, folder, parts, overrides):
    """Runs parts of many_processes.py. Each process takes its share of a step's batches."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    start = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", processes, ROOT / "tests/unimed/many_processes.py"]
    arguments = [*start, folder, parts, *overrides, f"train.accumulate={BATCHES // processes}"]
    shown = subprocess.run(
        [sys.executable, *map(str, arguments)], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert shown.returncode == 0, shown.stdout + shown.stderr
    return shown


@pytest.fixture(scope="module")
def one(small_overrides, tmp_path_factory):
    """The run of one process, with the gradients of each step."""
    gradients = Gradients()
    recipe = recipes.load("tiny", [*small_overrides, *SETTINGS, f"train.accumulate={BATCHES}"])
    run = train(recipe, tmp_path_factory.mktemp("one") / "one", callbacks=[gradients])
    trained = [any("connector" in name for name in step) for step in gradients.steps.values()]
    assert {*trained} == {True, False}  # a step without an image trains no connector
    return run, gradients.steps


def same_log(run, one):
    ours, theirs = log_of(run), log_of(one)
    assert [entry.keys() for entry in ours] == [entry.keys() for entry in theirs]
    for many, single in zip(ours, theirs, strict=True):
        assert many == pytest.approx(single, rel=2e-4, abs=1e-6)
    return ours


def same_gradients(file, theirs, steps):
    ours = torch.load(file, weights_only=True)
    assert sorted(ours) == list(range(steps))
    for step, gradients in ours.items():
        assert gradients.keys() == theirs[step].keys()
        largest = max(float(gradient.abs().max()) for gradient in gradients.values())
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient, theirs[step][name], rtol=1e-3, atol=1e-5 * largest, msg=lambda m, n=name: f"{n}: {m}")


def test_two_processes_train_log_and_resume_as_one_does_with_their_batches(one, small_overrides, tmp_path):
    shown = launch(2, tmp_path, "sharded,ddp", [*small_overrides, *SETTINGS])
    for rank in range(2):
        seen = json.loads((tmp_path / f"process-{rank}.json").read_text())
        assert seen == {"sharded_killed": True, "killed": True, "again": 2, "resumed": 0}
        same_gradients(tmp_path / f"ddp-{rank}.pt", one[1], 5)
        same_gradients(tmp_path / f"sharded-{rank}.pt", one[1], 8)
    # One process speaks.
    assert shown.stdout.count("trained: ") == 1
    assert shown.stdout.count("training: step 8 of 8") == 1
    assert shown.stderr.count("error: ") == 1
    assert "this run exists" in shown.stderr

    for name in ("pair", "sharded"):
        run = tmp_path / "runs" / name
        names = {path.name for path in run.iterdir()}
        assert names == {"recipe.yaml", "start.json", "metrics.jsonl", "router.json", "run.json", "model", "checkpoint-4", "checkpoint-8"}
        log = same_log(run, one[0])
    assert {"loss/qa", "loss/caption", "aux/importance", "router_entropy/caption"} <= {key for entry in log for key in entry}
    in_shards(tmp_path / "runs" / "sharded")


def in_shards(run):
    """One process reads what several wrote: the checkpoint has the weights of the whole model."""
    whole = load_file(run / "model" / "model.safetensors")
    read = {name: torch.empty_like(value) for name, value in whole.items()}
    folder = run / "checkpoint-8" / "pytorch_model_fsdp_0"
    dcp.load({"model": read}, storage_reader=dcp.FileSystemReader(folder), no_dist=True)
    assert all(torch.equal(read[name], whole[name]) for name in whole)
    assert json.loads((run / "model" / "config.json").read_text())["architectures"] == ["UniMedForConditionalGeneration"]
    load(run)


@pytest.mark.full
def test_four_processes_train_as_one_does_and_two_go_on_from_their_checkpoint(one, small_overrides, tmp_path):
    overrides = [*small_overrides, *SETTINGS]
    launch(4, tmp_path, "half,sharded,ddp", overrides)
    same_gradients(tmp_path / "ddp-3.pt", one[1], 5)
    same_gradients(tmp_path / "sharded-3.pt", one[1], 8)
    in_shards(tmp_path / "runs" / "sharded")
    for name in ("pair", "sharded"):
        same_log(tmp_path / "runs" / name, one[0])
    launch(2, tmp_path, "rest", overrides)
    same_log(tmp_path / "runs" / "moved", one[0])


def test_layers_that_are_dealt_out_whole_are_layers_of_the_model():
    model, _ = small()
    assert {"Blip2EncoderLayer", "CMoEConnector", "LlamaDecoderLayer"}.issubset(model._no_split_modules)
    assert {type(module).__name__ for module in model.modules()}.issuperset(model._no_split_modules)


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
