"""The commands, from help to tables, and lines instead of tracebacks."""

import ast
import functools
import sys
from pathlib import Path

import pytest

pytest.importorskip("typer")
pytest.importorskip("matplotlib")
from typer.testing import CliRunner

from examples.vnnet.__main__ import app
from examples.vnnet.data import save

ROOT = Path(__file__).parents[2]


def call(*arguments, code=0):
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exit_code == code, result.output
    return result.output


def test_help_teaches():
    out = call("--help")
    for word in ("demo", "study", "train", "evaluate", "stations.npy", "pictures.npy"):
        assert word in out
    for name in ("demo", "study", "train", "evaluate"):
        assert "--help" in call(name, "--help")


def test_it_needs_nothing_of_unimed():
    allowed = {"examples", "cmoe_kernels", "numpy", "torch", "matplotlib", "typer", "rich", *sys.stdlib_module_names}
    for path in (ROOT / "examples" / "vnnet").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = (
                [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module] if isinstance(node, ast.ImportFrom) else []
            )
            assert {name.split(".")[0] for name in names} <= allowed, path.name


def test_train_and_evaluate_own_data(made, tmp_path):
    data, run = tmp_path / "data", tmp_path / "run"
    save(made[0], data)
    arguments = ("train", data, "--run", run, "--steps", 3, "--batch", 4, "--threads", 1)
    out = call(*arguments)
    assert "0 gaps in time" in out
    assert "holds a run" in call(*arguments, code=2)
    call(*arguments, "--resume")
    out = call("evaluate", run, data, "--threads", 1)
    assert "persistence" in out
    assert (run / "scores.json").is_file()
    assert {p.name for p in (run / "plots").glob("*.svg")} == {"error.svg", "forecasts.svg", "stations.svg", "gates.svg", "attention.svg"}


def test_study_goes_on_where_it_stopped(tmp_path, monkeypatch):
    from examples.vnnet import study

    small = lambda arm, stations: study.Settings.small(stations=4, vision_width=4, state=8, **arm.changes)  # noqa: E731
    monkeypatch.setattr(study, "settings_of", small)
    monkeypatch.setattr(study, "generated_place", _small_place)
    arguments = (
        "study",
        "--out",
        tmp_path,
        "--seeds",
        1,
        "--arms",
        "nnet,cmoe,temperature,humidity,visibility,wind",
        "--steps",
        2,
        "--hours",
        300,
    )
    first = call(*arguments)
    assert "Rows measured: 6. Rows not run: none." in first
    table, rows = (tmp_path / "table.md").read_text(), {p.name: p.stat().st_mtime_ns for p in (tmp_path / "rows").glob("*")}
    assert "gain, shuffled pictures" in table
    assert "parameters" in table
    (tmp_path / "rows" / "wind-0.json").unlink()
    second = call(*arguments)
    assert "Rows measured: 6" in second
    again = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "rows").glob("*")}
    assert [name for name in rows if rows[name] != again[name]] == ["wind-0.json"]
    with monkeypatch.context() as without_data:
        without_data.setattr(study, "generated_place", None)
        assert "Rows measured: 6" in call(*arguments)
    assert "made with steps=2" in call(*arguments[:-3], 3, "--hours", 300, code=2)
    monkeypatch.setattr(
        study, "settings_of", lambda arm, stations: study.Settings.small(stations=4, vision_width=4, state=16, **arm.changes)
    )
    assert "other settings" in call(*arguments, code=2)
    assert "--arms has 'x'" in call("study", "--arms", "x", code=2)


@functools.cache
def _small_place(seed, cache, hours):
    from examples.vnnet import study
    from examples.vnnet.generate import Settings, generate

    made = Settings(hours=hours, stations=4, size=16, seed=seed)
    weather, drift = generate(made)
    return study.Place(weather, study.Tables.fit(weather), drift, made)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("train", "nowhere", "--run", "r"), "no such folder"),
        (("train", ".", "--run", "r", "--factors", "rain"), "valid are temperature"),
        (("train", ".", "--run", "r", "--size", "big"), "valid are small, full"),
        (("train", ".", "--run", "r", "--test", "1.2"), "must be shares"),
        (("evaluate", "nowhere", "."), "holds no best.pt"),
    ],
)
def test_wrong_use_is_one_line(arguments, words):
    out = call(*arguments, code=2)
    assert words in out
    assert out.strip().count("\n") == 0
