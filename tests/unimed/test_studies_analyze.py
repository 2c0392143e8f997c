"""`unimed analyze`: silhouettes and components with known answers, images around a connector, runs with and without a probe."""

import csv
import json
import shutil

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from unimed.cli import app as cli
from unimed.errors import UserError
from unimed.studies import analyze
from unimed.studies.features import features, principal, silhouette
from unimed.train.folder import Run


def naive(x, labels):
    """Row by row, as it is defined."""
    values = []
    for i, label in enumerate(labels):

        def mean(name, i=i):
            return np.mean([np.linalg.norm(x[i] - x[j]) for j in range(len(x)) if labels[j] == name and j != i])

        if labels.count(label) == 1:
            values.append(0.0)
            continue
        a, b = mean(label), min(mean(other) for other in set(labels) - {label})
        values.append((b - a) / max(a, b))
    return values


def test_silhouette_is_as_defined():
    x, labels = np.random.default_rng(0).normal(size=(12, 3)), list("aaaabbbbbccd")
    x[4:9] += 2
    wanted = naive(x, labels)
    found = silhouette(x, labels)
    assert found["all"] == pytest.approx(np.mean(wanted))
    for name in "abcd":
        assert found[name] == pytest.approx(np.mean([value for value, label in zip(wanted, labels, strict=True) if label == name]))
    assert found["d"] == 0
    far = silhouette(np.array([[0.0], [0.0], [9.0], [9.0]]), list("aabb"))
    assert far == {"a": 1, "b": 1, "all": 1}
    assert silhouette(np.zeros((4, 2)), list("aabb"))["all"] == 0
    assert silhouette(x, ["a"] * 12) == {}


def test_principal_components_of_a_plane():
    rng = np.random.default_rng(1)
    axes = np.linalg.qr(rng.normal(size=(6, 2)))[0]
    places = rng.normal(size=(40, 2)) * (5, 1)
    found, shares = principal(places @ axes.T + 3)
    assert sum(shares[:2]) == pytest.approx(1)
    assert shares[0] > 0.9
    apart = [np.linalg.norm(one[:, None] - one[None], axis=-1) for one in (found[:, :2], places)]
    assert np.allclose(*apart)  # distances stay


def test_images_on_both_sides_of_the_connector(small_run):
    from unimed.inference.session import load
    from unimed.train import recipe as recipes

    session = load(small_run, "cpu")
    items = analyze.held_out(recipes.load(small_run / "recipe.yaml"), most=2)
    found = features(session, items)
    assert found.tasks == [item.task for item in items]
    assert "qa" not in found.tasks
    item = items[-1]
    batch = session.processor(text=["<image> x"], images=[item.open()], task=[item.task])
    with torch.no_grad():
        patches = session.model.encode_images(batch["pixel_values"])
        out = session.connector(patches, task=batch["task_ids"])
    assert np.allclose(found.before[-1], session.connector._resample(patches)[0].mean(0), atol=1e-5)
    assert np.allclose(found.after[-1], out.embeddings[0].mean(0), atol=1e-5)
    assert found.maps[-1].shape == (4, 4, 5)
    assert np.allclose(found.maps[-1].sum(-1), 1, atol=1e-5)


def rows(path):
    with path.open() as file:
        return list(csv.DictReader(file))


def test_a_run_without_a_probe_is_measured_at_its_checkpoints(evaluated_run, tmp_path):
    run = tmp_path / "runs" / "small"
    shutil.copytree(evaluated_run, run)
    told = CliRunner().invoke(cli.app, ["analyze", str(run)])
    assert told.exit_code == 0, told.output
    assert (
        "lacks points of training (train.probe_every=250 has no point in 12 steps): measured at the checkpoints that are there"
        in told.output
    )
    result = json.loads((run / "analysis" / analyze.FILE).read_text())
    assert (result["steps"], result["source"]) == ([8, 12], "checkpoints")
    assert set(result["modules"]) == {"connector", "router", "language", "vision"}
    assert {one["file"] for one in result["plots"]} == {path.name for path in (run / "analysis").glob("*.png")}
    assert len(result["plots"]) == 6
    assert set(result["features"]["after"]) == {"vqa", "refer", "identify", "caption", "cls", "all"}
    layers = rows(run / "analysis" / "layers.csv")
    assert {one["layer"] for one in layers if one["module"] == "connector"} == {f"connector.experts.{i}" for i in range(5)}
    assert all((one["change"] != "") == (one["step"] == "12") for one in layers)
    assert len(rows(run / "analysis" / "regions.csv")) == 5 * 4 * 4 * 5
    gates = rows(run / "analysis" / "gates.csv")
    assert sum(float(one["gate"]) for one in gates if (one["step"], one["task"]) == ("12", gates[-1]["task"])) == pytest.approx(1)
    html = (run / "report.html").read_text()
    assert "How the tasks pull" in html
    assert html.count('<img class=drawn src="data:image/png;base64,') == 6
    # A file that is no picture is one line.
    (run / "analysis" / "pulls.png").write_text("<svg onload=x>")
    told = CliRunner().invoke(cli.app, ["report", str(run)])
    assert (told.exit_code, "not a picture" in told.output) == (2, True)


def test_a_run_whose_data_is_gone_says_what_it_lacks(small_run, tmp_path):
    run = tmp_path / "small"
    shutil.copytree(small_run, run)
    recipe = (run / "recipe.yaml").read_text()
    root = next(line.split()[1] for line in recipe.splitlines() if line.strip().startswith("root:"))
    (run / "recipe.yaml").write_text(recipe.replace(root, str(tmp_path / "gone")))
    result = analyze.analyze(run)
    assert [one.partition(":")[0] for one in result["lacks"]] == [
        "points of training (train.probe_every=250 has no point in 12 steps)",
        "gradients of the tasks",
        "images before and after the connector, and gates over the picture",
    ]
    assert [one["file"] for one in result["plots"]] == ["experts.png"]
    with pytest.raises(UserError, match=r"unknown key 'data\.rot'"):
        analyze.analyze(run, overrides=["data.rot=x"])


def test_points_of_a_probe_are_read_and_checked(tmp_path):
    path = tmp_path / "probe.jsonl"
    point = {"step": 2, "modules": {}, "layers": []}
    path.write_text("".join(json.dumps({**point, "step": step}) + "\n" for step in (2, 1, 2)) + '{"step": 3')
    assert [one["step"] for one in analyze.read_points(path)] == [1, 2]
    path.write_text('{"step": "x"}\n')
    with pytest.raises(UserError, match=r"probe.jsonl:1: not a point of a probe"):
        analyze.read_points(path)
    with pytest.raises(UserError, match="not a run of unimed"):
        analyze.analyze(tmp_path)


def test_interference_of_a_run_is_that_of_the_means_over_its_points():
    """One point has halves that hardly agree: by itself it tells nothing, beside the other it counts."""

    def point(halves, own):
        split = {"split": {"direction": own, "magnitude": 1.0}}
        pair = {"tasks": ["vqa", "cls"], "direction": 0.5, "magnitude": 0.8, "halves": halves}
        return {"modules": {"connector": {"tasks": {"vqa": split, "cls": split}, "pairs": [pair], "statistics": None}}}

    found = analyze.summary([point(0.02, 0.05), point(0.38, 0.75)])["connector"]
    assert found["interference"] == pytest.approx((1 - 0.2 / 0.4) / 2)
    assert (found["statistics"], found["direction"], found["direction of halves"]) == (None, 0.5, pytest.approx(0.4))
    assert analyze.summary([point(0.02, 0.05)])["connector"]["interference"] is None


def test_a_run_with_a_probe_needs_no_checkpoint(small_run, tmp_path):
    run = tmp_path / "small"
    shutil.copytree(small_run, run, ignore=shutil.ignore_patterns("checkpoint-*", "router.json"))
    points = analyze._at_checkpoints(Run(small_run), analyze.recipes.load(small_run / "recipe.yaml"))
    (run / "probe.jsonl").write_text("".join(json.dumps(one) + "\n" for one in points))
    result = analyze.analyze(run)
    assert (result["source"], result["steps"]) == ("probe.jsonl", [8, 12])
    assert [one.partition(":")[0] for one in result["lacks"]] == ["gates over training"]
    assert result["modules"] == analyze.summary(points)
