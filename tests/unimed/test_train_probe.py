"""The probe of task gradients: two tasks with a known answer, sketches with their error, and a training that it leaves as it is."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from unimed.studies.interference import direction, magnitude
from unimed.train import recipe as recipes
from unimed.train.folder import Run
from unimed.train.probe import InterferenceProbe, Keeper, layers_of, module_of, sketch
from unimed.train.run import train


class Quadratic(nn.Module):
    """|w - c|^2 / 2: the gradient at w is w - c."""

    def __init__(self, size=3):
        super().__init__()
        self.connector = nn.Module()
        self.connector.experts = nn.ParameterDict({"w1": nn.Parameter(torch.zeros(1, size))})
        self.drop = nn.Dropout(0.5)

    def forward(self, c):
        return SimpleNamespace(loss=self.drop((self.connector.experts["w1"][0] - c).square()).sum() / 2)


def half(*values):
    return {"c": torch.tensor(values)}


# Wishes of two tasks in a plane, and what differs between their halves across it.
ONE, OTHER, NOISE = (3.0, 0.0), (1.0, 1.0), (1.0, 0.5)
HALVES = {
    "vqa": (half(*ONE, NOISE[0]), half(*ONE, -NOISE[0])),
    "refer": (half(*OTHER, NOISE[1]), half(*OTHER, -NOISE[1])),
}


def test_two_quadratics_have_the_known_answer(tmp_path):
    model = Quadratic().train()
    probe = InterferenceProbe(1, HALVES, tmp_path / "probe.jsonl")
    line = probe.measure(model, 1)
    assert model.drop.training
    found = line["modules"]["connector"]
    (pair,) = found["pairs"]
    a, b = torch.tensor(ONE), torch.tensor(OTHER)
    assert pair["tasks"] == ["vqa", "refer"]
    assert pair["direction"] == pytest.approx(direction(a, b), abs=1e-5)
    assert pair["magnitude"] == pytest.approx(magnitude(a, b), abs=1e-5)
    own = [(9 - 1) / (9 + 1), (2 - 0.25) / (2 + 0.25)]
    assert [one["split"]["direction"] for one in found["tasks"].values()] == pytest.approx(own, abs=1e-5)
    assert [one["split"]["magnitude"] for one in found["tasks"].values()] == pytest.approx([1, 1], abs=1e-5)
    halves = 3 / math.sqrt(10 * 2.25)
    assert pair["halves"] == pytest.approx(halves, abs=1e-5)
    assert pair["interference"] == found["interference"] == pytest.approx((1 - halves / math.sqrt(own[0] * own[1])) / 2, abs=1e-5)
    assert line["loss"]["vqa"] == pytest.approx(5)


def test_tasks_that_agree_and_that_undo_each_other(tmp_path):
    same = InterferenceProbe(1, {"vqa": HALVES["vqa"], "cls": HALVES["vqa"]}, tmp_path / "p")
    assert same.measure(Quadratic(), 1)["modules"]["connector"]["interference"] == pytest.approx(0.05, abs=0.06)
    against = tuple(half(-ONE[0], -ONE[1], z) for z in NOISE)
    opposed = InterferenceProbe(1, {"vqa": HALVES["vqa"], "cls": against}, tmp_path / "p")
    assert opposed.measure(Quadratic(), 1)["modules"]["connector"]["interference"] == pytest.approx(1, abs=0.01)
    noise = (half(0.1, 0.0, 1.0), half(0.1, 0.0, -1.0))  # halves that do not agree tell nothing
    found = InterferenceProbe(1, {"vqa": HALVES["vqa"], "cls": noise}, tmp_path / "p").measure(Quadratic(), 1)["modules"]["connector"]
    assert (found["pairs"][0]["interference"], found["interference"]) == (None, None)


def test_a_step_serves_the_tasks_that_it_brings_nearer(tmp_path):
    """From 0 to (1, 0, 0): the first task wants (3, 0, 0), the second (1, 1, 0), a third (-1, 0, 0)."""
    model = Quadratic()
    third = (half(-1.0, 0.0, 0.0), half(-1.0, 0.0, 0.0))
    probe = InterferenceProbe(1, {**HALVES, "cls": third}, tmp_path / "probe.jsonl")
    probe.on_train_begin(None, SimpleNamespace(is_world_process_zero=True, global_step=4, max_steps=9), None, model)
    with torch.no_grad():
        model.connector.experts["w1"][0, 0] = 1
    (layer,) = probe.measure(model, 6)["layers"]
    assert (layer["name"], layer["moved"], layer["change"]) == ("connector.experts.0", 1, None)
    assert layer["served"] == pytest.approx({"vqa": 1, "refer": 0, "cls": -1})
    with torch.no_grad():
        model.connector.experts["w1"][0, 0] = 2
    line = probe.measure(model, 7)
    assert line["since"] == 6
    assert line["layers"][0]["change"] == pytest.approx(1)
    served = line["layers"][0]["served"]
    assert served == pytest.approx({"vqa": 1, "refer": -1 / math.sqrt(2), "cls": -1})
    wanted = sum(served.values()) / sum(map(abs, served.values()))
    assert line["modules"]["connector"]["statistics"] == line["layers"][0]["statistics"] == pytest.approx(wanted, abs=1e-5)


def test_a_sketch_keeps_angles_and_knows_its_error(tmp_path):
    torch.manual_seed(0)
    size = 60_000
    a, b = torch.randn(size), torch.randn(size)
    wishes = {"vqa": (a, a + 0.3 * b), "cls": (b - a, b - 0.9 * a)}
    halves = {task: tuple({"c": one} for one in pair) for task, pair in wishes.items()}
    exact = InterferenceProbe(1, halves, tmp_path / "p").measure(Quadratic(size), 1)["modules"]["connector"]
    rough = InterferenceProbe(1, halves, tmp_path / "p", exact=1000, width=4096).measure(Quadratic(size), 1)["modules"]["connector"]
    assert "error" not in exact
    assert 0 < rough["error"] < 0.1
    assert rough["pairs"][0]["direction"] == pytest.approx(exact["pairs"][0]["direction"], abs=0.06)
    assert rough["interference"] == pytest.approx(exact["interference"], abs=0.06)
    out = [torch.zeros(4096) for _ in range(3)]
    for piece, to in zip((a, b, 2 * a - b), out, strict=True):
        sketch(piece, "x", to)
    assert torch.allclose(2 * out[0] - out[1], out[2], atol=1e-3)  # linear: a change of weights is sketched by two weights


def test_modules_and_layers_by_name():
    names = {
        "connector.experts.w1": ("connector", ["connector.experts.0", "connector.experts.1"]),
        "connector.router.task_tokens": ("router", ["connector.router"]),
        "base_model.model.connector.modules_to_save.default.router.w1": ("router", ["connector.router"]),
        "base_model.model.language_model.model.layers.1.mlp.up_proj.lora_A.default.weight": ("lora", ["language_model.model.layers.1"]),
        "language_model.model.layers.0.mlp.up_proj.weight": ("language", ["language_model.model.layers.0"]),
        "language_model.lm_head.weight": ("language", ["language_model.lm_head"]),
        "vision_tower.encoder.layers.2.mlp.fc1.weight": ("vision", ["vision_tower.encoder.layers.2"]),
    }
    for name, (module, layers) in names.items():
        assert module_of(name) == module
        assert [layer.name for layer in layers_of([(name, torch.zeros(2, 3))])] == layers
    keeper = Keeper([(name, torch.ones(2, 3)) for name in names])
    kept, norms = keeper.keep([None if "lora" in name else torch.ones(2, 3) for name in names])
    assert [len(one) for one in kept] == [layer.size for layer in keeper.layers]
    assert norms == [float(one.square().sum()) for one in kept]


def test_a_run_with_the_probe_has_the_bits_of_one_without(small_overrides, tmp_path):
    """LoRA with dropout, trained connector, tower and router; the probe's file is that of the run's steps, also after a resume."""
    plain = [*small_overrides, "language.lora.r=2", "language.lora.dropout=0.2", "train.max_steps=6", "train.save_every=2", "train.keep=9"]
    without = train(recipes.load("tiny", plain), tmp_path / "without")
    probed = recipes.load("tiny", [*plain, "train.probe_every=3"])
    with_it = train(probed, tmp_path / "with")
    assert not Run(without).probe.exists()
    for name in ("model/adapter_model.safetensors", "checkpoint-6/optimizer.pt", "router.json"):
        assert (without / name).read_bytes() == (with_it / name).read_bytes(), name
    kept = [json.loads(line) for line in Run(with_it).probe.read_text().splitlines()]
    assert [(line["step"], line["since"]) for line in kept] == [(3, 0), (6, 3)]
    last = kept[-1]
    assert set(last["modules"]) == {"connector", "router", "lora", "vision"}
    assert len(last["modules"]["connector"]["pairs"]) == 10  # of five tasks with an image
    assert len(last["modules"]["lora"]["pairs"]) == 15
    assert set(last["loss"]) == {"vqa", "refer", "identify", "caption", "cls", "qa"}
    assert last["gates"]["cls"]["gates"] == pytest.approx([1 / 5] * 5, abs=0.2)
    for found in last["modules"].values():
        for pair in found["pairs"]:
            assert -1 <= pair["direction"] <= 1
            assert 0 <= pair["magnitude"] <= 1
        assert -1 <= found["statistics"] <= 1
    assert all(0 < layer["change"] < 1 for layer in last["layers"] if layer["module"] not in ("lora", "router"))
    assert json.loads(Run(with_it).record.read_text())["probe_seconds"] > 0
    # Lines that were measured after the checkpoint come again.
    Run(with_it).checkpoint(6).rename(tmp_path / "away")
    train(probed, with_it, resume=True)
    again = [json.loads(line) for line in Run(with_it).probe.read_text().splitlines()]
    assert [(line["step"], line["since"]) for line in again] == [(3, 0), (6, 4)]
    assert again[-1]["modules"]["connector"]["pairs"] == last["modules"]["connector"]["pairs"]
