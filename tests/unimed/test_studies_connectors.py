"""The study of connectors: its rows, its sizes, its choice of a learning rate, its table, and one whole run."""

import dataclasses
import json

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from cmoe_kernels import CMoEConnector
from tests.unimed.conftest import SMALL
from unimed.studies import connectors, run
from unimed.studies.run import CHOICE_SEED, Job, run_study, work
from unimed.train import recipe as recipes

BASE = tuple(one for one in SMALL.split() if one.startswith(("vision.", "connector.", "language.")))


def test_the_rows_are_those_of_the_issue_and_each_is_a_recipe():
    assert len(connectors.STUDY.rows) == 14
    read = {row: recipes.load("tiny", list(connectors.overrides(row))).connector for row in connectors.STUDY.rows}
    kinds = {row: (one.router, one.num_experts, one.router_inputs, one.resample) for row, one in read.items()}
    assert kinds == {
        "mlp": ("constant", 1, "task_token", "projection"),
        "mlp-avgpool": ("constant", 1, "task_token", "avgpool"),
        "mlp-maxpool": ("constant", 1, "task_token", "maxpool"),
        "cmoe-soft": ("soft", 5, "task_token", "projection"),
        "cmoe-sparse": ("sparse", 5, "task_token", "projection"),
        "cmoe-hard": ("hard", 5, "task_token", "projection"),
        "cmoe-constant": ("constant", 5, "task_token", "projection"),
        "cmoe-3": ("soft", 3, "task_token", "projection"),
        "cmoe-avgpool": ("soft", 5, "task_token", "avgpool"),
        "cmoe-maxpool": ("soft", 5, "task_token", "maxpool"),
        "cmoe-token": ("soft", 5, "token", "projection"),
        "cmoe-task": ("soft", 5, "task", "projection"),
        "mlp-parameters": ("constant", 1, "task_token", "projection"),
        "mlp-flops": ("constant", 1, "task_token", "projection"),
    }
    against = connectors.STUDY.against
    assert {row: against[row] for row in ("cmoe-soft", "cmoe-avgpool", "cmoe-maxpool", "mlp-flops")} == {
        "cmoe-soft": "mlp", "cmoe-avgpool": "mlp-avgpool", "cmoe-maxpool": "mlp-maxpool", "mlp-flops": "mlp",
    }  # fmt: skip
    assert len(against) == 11


@pytest.mark.parametrize("row", list(connectors.SETTINGS))
def test_multiply_adds_are_those_that_run(row):
    """Of the experts and router as plain layers, counted by torch."""
    config = connectors._sizes(connectors.overrides(row, BASE))
    tokens, wide = 64, config.features
    x = torch.randn(tokens, wide)

    def mlp(width, hidden, out):
        return nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, out))

    with FlopCounterMode(display=False) as counter:
        for _ in range({"hard": 1, "sparse": 2}.get(config.router, config.num_experts)):
            mlp(wide, config.hidden, config.out_features)(x)
        if config.learned and config.router_inputs != "task":
            mlp(wide, config.router_features or 4 * config.router_in, config.num_experts)(x)
    assert counter.get_total_flops() == 2 * tokens * connectors.operations(config)


@pytest.mark.parametrize("base", [(), BASE, ("connector.hidden_features=77", "connector.router_features=5")])
def test_widened_mlps_match_the_cmoe(base):
    paper = connectors.size("cmoe-soft", base)
    same = connectors.size("mlp-parameters", base), connectors.size("mlp-flops", base)
    unit = connectors.size("mlp", base)["parameters"] / connectors.size("mlp", base)["hidden"] + 1
    assert abs(same[0]["parameters"] - paper["parameters"]) <= unit / 2
    assert abs(same[1]["operations"] - paper["operations"]) <= unit / 2
    config = connectors._sizes(connectors.overrides("mlp-parameters", base))
    assert sum(p.numel() for p in CMoEConnector(config).parameters()) == same[0]["parameters"]


def result(value, blank, rate=1e-3):
    columns = [name for name, _ in connectors.COLUMNS.values()]
    scores = dict.fromkeys(columns, value) | {connectors.APART[0]: 0.1}
    return {
        "scores": scores, "blank": dict.fromkeys(columns[:-1], 0.2) | {columns[0]: blank}, "learning rate": rate, "tried": {"0.001": 0.5},
        "connector": {"hidden": 8, "parameters": 1000, "operations": 900}, "training seconds": 3.0, "probe seconds": 0.1,
    }  # fmt: skip


def write(out, rows):
    for (row, seed), one in rows.items():
        folder = Job(out, row, seed, 6).folder
        folder.mkdir(parents=True)
        (folder / "result.json").write_text(json.dumps(one))


def test_the_table_has_percent_only_where_the_mlp_sees(tmp_path):
    """Of five columns the MLP's first is no better than on black images; text questions are left out of every mean."""
    (tmp_path / "study.json").write_text('{"study": "connectors", "steps": 6}')
    rows = {("mlp", 0): result(0.4, 0.4), ("cmoe-soft", 0): result(0.5, 0.1), ("mlp-flops", 0): result(0.6, 0.1)}
    write(tmp_path, rows)
    table = run.write_table(connectors.STUDY, tmp_path)
    found = table["gains"]["cmoe-soft"]["seeds"]["0"]
    assert len(found["differences"]) == 5
    assert len(found["columns"]) == 4
    assert found["mean"] == pytest.approx(25)
    assert found["mean difference"] == pytest.approx(0.1)
    assert (found["up"], found["down"]) == (5, 0)
    text = (tmp_path / "table.md").read_text()
    assert "| 0.100 (0.100) | 0.500 (0.500) | mlp | +25.0 (+25.0) | +10.0 (+10.0) | 5, 0 |" in text
    assert "| cmoe-soft | mlp-flops | -16.7 (-16.7) | -10.0 (-10.0) | 0, 5 |" in text
    assert "Learning rate 0.001 for all rows" in text
    tables = [part.splitlines() for part in text.split("\n\n") if part.startswith("|")]
    assert len(tables) == 3
    assert all(len({line.count("|") for line in lines}) == 1 for lines in tables)
    assert "`unimed train smollm2 language.lora.r=4 language.lora.alpha=8 train.max_steps=100 --name lora-4`" in text


def test_the_rate_is_the_best_on_the_slabs_without_text_questions(tmp_path):
    write(tmp_path, {(choice, CHOICE_SEED): result(value, 0.0) for choice, value in zip(connectors.CHOICES, (0.3, 0.5, 0.4), strict=True)})
    tried = connectors._tried(Job(tmp_path, "mlp", 0, 6))
    assert tried == {5e-4: pytest.approx(0.3), 1e-3: pytest.approx(0.5), 2e-3: pytest.approx(0.4)}


def test_lora_rows_are_recipes():
    for command in connectors.lora_commands():
        recipe = recipes.load(command[2], command[3:-2])
        assert recipe.language.lora.alpha == 2 * recipe.language.lora.r
        assert recipe.train.max_steps == 100


@pytest.mark.full
def test_the_whole_study_in_six_steps(tmp_path, monkeypatch, without_java):
    """Choices first, then rows; every run in this process, which makes the models smaller."""
    monkeypatch.setattr(connectors, "BASE", BASE)
    monkeypatch.setattr(connectors, "LIMIT", 2)
    monkeypatch.setattr(connectors, "RATES", connectors.RATES[:2])
    choices = dict(list(connectors.CHOICES.items())[:2])
    monkeypatch.setattr(connectors, "CHOICES", choices)
    made = []

    def here(study, wanted, most, progress):
        for job in wanted:
            job.folder.mkdir(parents=True)
            work("unimed.studies.connectors", job.out, job.row, job.seed)
            made.append(job.row)

    monkeypatch.setattr(run, "_make", here)
    study = dataclasses.replace(connectors.STUDY, choices=choices)
    table = run_study(study, tmp_path / "s", seeds=1, steps=6, rows=["mlp", "cmoe-soft", "mlp-flops"])
    assert made[-3:] == ["mlp", "cmoe-soft", "mlp-flops"]
    for row in ("mlp", "cmoe-soft", "mlp-flops"):
        scores = table["results"][row]["0"]["scores"]
        assert list(scores) == [name for name, _ in connectors.COLUMNS.values()]
        assert all(0 <= value <= 1 for value in scores.values())
        assert (tmp_path / "s" / "runs" / f"{row}-0" / "run" / "model").is_dir() == (row in connectors.KEPT)
        assert not list((tmp_path / "s" / "runs" / f"{row}-0" / "run").glob("checkpoint-*"))
        points = (tmp_path / "s" / "runs" / f"{row}-0" / "probe.jsonl").read_text().splitlines()
        assert [json.loads(line)["step"] for line in points] == [1, 2, 3, 4, 5, 6]
        assert set(table["results"][row]["0"]["tried"]) == {"0.0005", "0.001"}
