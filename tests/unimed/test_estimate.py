"""The estimate against the live tensors of real steps of the Trainer."""

import copy
import json

import pytest
import torch
from model_samples import TEXTS
from torch import nn
from torch.utils.data import DataLoader
from transformers import LlamaConfig
from typer.testing import CliRunner

from cmoe_kernels import CMoEConfig, CMoEConnector
from unimed.cli import app as cli
from unimed.estimate import DEVICES, Live, LoopConnector, connector_memory, smaller, step_memory
from unimed.models.build import adapt, build, describe
from unimed.train import recipe as recipes
from unimed.train.trainer import UniMedTrainer

TEXT = 64
SMALL = """
vision.image_size=32 vision.patch_size=8 vision.width=64 vision.layers=2 vision.heads=2 connector.hidden_features=64
connector.router_features=64 language.width=96 language.layers=2 language.heads=2 language.mlp_width=192 language.vocab_size=480
train.max_steps=2 train.batch_size=8 train.log_every=1 train.threads=1
"""
WIDE = """
vision.width=256 vision.layers=4 vision.heads=4 connector.hidden_features=512 connector.router_features=1024
language.width=512 language.layers=6 language.heads=8 language.mlp_width=1536 language.vocab_size=480
train.max_steps=2 train.batch_size=24 train.log_every=1 train.threads=1
"""
SETTINGS = {
    "all of it": [],
    "bf16, LoRA, a frozen tower": ["train.precision=bf16", "language.lora.r=8", "vision.freeze=true", "vision.dtype=bf16"],
    "checkpoints": ["train.gradient_checkpointing=true", "connector.recompute=true"],
    "two parts, no clipping": ["train.accumulate=2", "optim.clip=0"],
}


class Fixed(UniMedTrainer):
    """The Trainer on batches of one size."""

    def get_train_dataloader(self):
        return DataLoader([self.batch] * 2 * self.recipe.train.accumulate, batch_size=None, collate_fn=lambda batch: dict(batch))


def measured(recipe, folder):
    """The peak of live tensors while the Trainer takes two steps."""
    model, processor = build(recipe, TEXTS, seed=0)
    config = model.config
    trainer = Fixed(recipe, adapt(model, recipe, folder / "base"), processor, None, folder)
    size, images = recipe.train.batch_size, config.num_image_tokens
    ids = torch.full((size, images + TEXT), 5)
    ids[:, 2 : 2 + images] = config.image_token_index
    side = config.vision_config.image_size
    zeros = torch.zeros(size, dtype=torch.long)
    trainer.batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone(), "task_ids": zeros}
    trainer.batch |= {"pixel_values": torch.randn(size, 3, side, side), "sample_tasks": zeros}
    live = Live()
    live.add([*trainer.model.parameters(), *trainer.model.buffers()])
    with live:
        trainer.train()
    return live.peak


QUICK = ("bf16, LoRA, a frozen tower", "checkpoints")


@pytest.mark.parametrize("name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.full) for name in SETTINGS])
def test_it_is_the_peak_of_live_tensors(name, tmp_path):
    recipe = recipes.load("tiny", [*SMALL.split(), *SETTINGS[name]])
    assert step_memory(recipe, TEXT).total == pytest.approx(measured(recipe, tmp_path), rel=0.1)


@pytest.mark.full
def test_it_is_the_peak_of_live_tensors_of_half_a_gigabyte(tmp_path):
    recipe = recipes.load("tiny", WIDE.split())
    peak = measured(recipe, tmp_path)
    assert peak >= 500e6
    assert step_memory(recipe, TEXT).total == pytest.approx(peak, rel=0.1)


@pytest.mark.parametrize("router", ["soft", "sparse", "hard", "constant"])
@pytest.mark.parametrize("inputs", ["task_token", "token", "task"])
@pytest.mark.parametrize("expert", ["mlp", "linear"])
def test_the_loop_gives_the_connector_s_values(router, inputs, expert):
    torch.manual_seed(0)
    c = CMoEConfig(in_features=6, out_features=10, router=router, router_inputs=inputs, expert=expert, task_features=7)
    connector = CMoEConnector(c)
    nn.init.normal_(connector.experts.w1)
    x, tasks = torch.randn(3, 16, 6), torch.tensor([4, 0, 2])
    want, loop = connector(x, task=tasks), LoopConnector(connector, recompute=True)
    got = loop(x, task=tasks)
    torch.testing.assert_close(got.embeddings, want.embeddings, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(got.gates.expand_as(want.gates), want.gates, rtol=1e-5, atol=1e-5)


def test_the_connector_s_share_is_what_the_whole_step_differs_by():
    recipe = recipes.load("tiny", SMALL.split())
    kernels, loop = step_memory(recipe, TEXT), step_memory(recipe, TEXT, loop=True)
    saved = {(loop, again): connector_memory(recipe, loop, again) for loop in (False, True) for again in (False, True)}
    assert loop.saved - kernels.saved == pytest.approx(saved[True, False] - saved[False, False], rel=0.02)
    assert saved[False, True] < saved[False, False] < saved[True, False]
    assert saved[True, True] < saved[True, False]


def test_the_command_says_whether_it_fits_and_what_would(monkeypatch):
    def run(*arguments):
        return CliRunner().invoke(cli.app, ["estimate", *arguments], env={"COLUMNS": "160"})

    monkeypatch.setitem(DEVICES, "small", 1)
    monkeypatch.setattr("unimed.estimate.RESERVED", 970_000_000 - 50_000_000)
    monkeypatch.setattr("unimed.estimate.USABLE", 0.97)
    given = ["tiny", *SMALL.split(), "--tokens", "64", "--batch", "32"]
    result = run(*given, "--device", "small", "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.output)
    assert found["total"] == sum(found[name] for name in ("parameters", "gradients", "optimizer", "activations"))
    assert (found["batch"], found["device_bytes"]) == (32, 10**9)
    assert found["activations_without_kernels"] > found["activations"]
    assert not found["fits"]
    totals = [found["total"], *(one["total"] for one in found["changes"])]
    assert totals == sorted(totals, reverse=True)
    assert [one["fits"] for one in found["changes"]][-1]
    shown = run(*given, "--device", "small").output
    assert "does not fit on small" in shown
    assert "train.gradient_checkpointing=true" in shown
    assert "nearest: rtx4090" in run("tiny", "--device", "rtx4091").stderr


def test_what_makes_a_recipe_smaller_comes_one_on_top_of_the_other():
    *_, last = smaller(recipes.load("unimed-7b-release"))
    assert " ".join(last) == (
        "train.gradient_checkpointing=true connector.recompute=true train.batch_size=1 train.accumulate=4 language.dtype=fp16 "
        "language.quantize=4bit"
    )
    recipes.load("unimed-7b-release", list(last))
    assert not [one for one in smaller(recipes.load("tiny", ["train.batch_size=1"])) if "language" in " ".join(one)]


def test_full_size_is_counted_without_its_weights():
    """A language model of four layers in place of 32, for the time it takes."""
    recipe = recipes.load("unimed-7b-release")
    config = describe(recipe)
    config.text_config.num_hidden_layers, config.vision_config.num_hidden_layers = 4, 2
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("unimed.estimate.describe", lambda *_: config)
        found = step_memory(recipe)
    trained = 199_270_400 + 507_781_125 + 28_160 + 4 * 624_640
    assert found.gradients == 4 * trained
    assert found.optimizer == pytest.approx(8 * trained, rel=1e-3)
    tower = 2 * (985_952_256 - 37 * (985_952_256 - 1408 * (257 + 1 + 2 + 1 + 3 * 196)) // 39)
    llama = 4 * (4 * 202_383_360 + 2 * 32001 * 4096 + 4096)
    connector = 2 * 4 * (trained - 4 * 624_640)  # peft keeps the one that it started from
    assert found.parameters == pytest.approx(llama + connector + 4 * 4 * 624_640 + tower, rel=0.01)


def test_fewer_bits_take_fewer_bytes():
    given = [one for one in SMALL.split() if not one.startswith("language.")]
    given += ["language.from=checkpoints/llama-2-7b-chat", "language.lora.r=8", "vision.freeze=true"]
    config = LlamaConfig(vocab_size=480, hidden_size=128, intermediate_size=256, num_hidden_layers=1, num_attention_heads=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("unimed.models.parts.read_config", lambda *_: copy.deepcopy(config))
        found = {kind: step_memory(recipes.load("tiny", [*given, f"language.quantize={kind}"]), TEXT) for kind in ("null", "4bit")}
    linears = 4 * 128 * 128 + 3 * 128 * 256
    assert found["null"].parameters - found["4bit"].parameters == 4 * linears - linears * 33 // 64 - linears // 4096
    assert found["4bit"].gradients == found["null"].gradients
    assert found["4bit"].total < found["null"].total
