"""Two tasks whose gradients are known."""

import json
import math

import pytest
import torch
from typer.testing import CliRunner

from tests.unimed.test_train_probe import HALVES, Quadratic
from unimed.cli import app as cli
from unimed.studies.interference import direction, magnitude
from unimed.train.probe import InterferenceProbe


def test_two_quadratics():
    """Losses |w - a|^2 / 2 and s |w - b|^2 / 2 at w = 0 have the gradients -a and -s b."""
    a, b, s = torch.tensor([3.0, 4.0]), torch.tensor([4.0, -3.0]), 2.0
    w = torch.zeros(2, requires_grad=True)
    one = torch.autograd.grad((w - a).square().sum() / 2, [w])
    other = torch.autograd.grad(s * (w - (a + b) / 2).square().sum() / 2, [w])
    assert direction(one, other) == pytest.approx(math.cos(math.pi / 4), rel=1e-6)
    size = s * 5 / math.sqrt(2)
    assert magnitude(one, other) == pytest.approx(2 * 5 * size / (25 + size**2), rel=1e-6)


def test_ends():
    a = torch.tensor([1.0, 2.0])
    assert direction(a, 3 * a) == pytest.approx(1)
    assert direction(a, -a) == pytest.approx(-1)
    assert direction(a, torch.tensor([2.0, -1.0])) == pytest.approx(0)
    assert magnitude(a, -a) == pytest.approx(1)
    assert magnitude(a, 0 * a) == 0
    assert math.isnan(direction(a, 0 * a))
    assert math.isnan(magnitude(0 * a, 0 * a))


def test_several_tensors_and_one_without_a_gradient():
    a, b = torch.tensor([[1.0], [2.0]]), torch.tensor([2.0])
    assert direction([a, b], [a, None]) == pytest.approx(math.sqrt(5) / 3)
    assert magnitude([a, b], [a, None]) == pytest.approx(2 * 3 * math.sqrt(5) / 14)
    with pytest.raises(ValueError, match="expected the same parameters"):
        direction([a], [b])
    with pytest.raises(ValueError, match="zip"):
        direction([a], [])


# The study


def write(out, row, seed, shift):
    """A finished run of study connectors with the probe of two quadratic tasks, whose second wish is turned by `shift`."""
    folder = out / "runs" / f"{row}-{seed}"
    folder.mkdir(parents=True)
    (folder / "result.json").write_text("{}")
    halves = {"vqa": HALVES["vqa"], "refer": tuple({"c": one["c"] + torch.tensor([0.0, shift, 0.0])} for one in HALVES["refer"])}
    line = InterferenceProbe(1, halves, folder / "probe.jsonl").measure(Quadratic(), 4)
    (folder / "probe.jsonl").write_text(json.dumps(line) + "\n")
    return line


def test_the_study_compares_seed_by_seed(tmp_path):
    out = tmp_path / "s"
    out.mkdir()
    run = CliRunner().invoke(cli.app, ["study", "interference", "--out", str(out)])
    assert (run.exit_code, "no runs of unimed study connectors" in run.output) == (2, True)
    (out / "study.json").write_text('{"study": "connectors", "steps": 6}')
    lines = {("mlp", seed): write(out, "mlp", seed, 0.5 * seed) for seed in (0, 1)}
    run = CliRunner().invoke(cli.app, ["study", "interference", "--out", str(out)])
    assert run.exit_code == 2
    assert "no seed has finished runs of mlp and cmoe-soft with their probe (mlp: 0, 1; cmoe-soft: none); make them with" in run.output
    lines |= {("cmoe-soft", seed): write(out, "cmoe-soft", seed, -1.0) for seed in (1, 2)}
    run = CliRunner().invoke(cli.app, ["study", "interference", "--out", str(out)])
    assert run.exit_code == 0, run.output
    table = json.loads((out / "interference" / "table.json").read_text())
    assert table["seeds"] == [1]
    one, other = (lines[row, 1]["modules"]["connector"]["interference"] for row in ("mlp", "cmoe-soft"))
    assert table["modules"]["mlp"]["1"]["connector"]["interference"] == pytest.approx(one, abs=1e-5)
    cells = [f"{one:.3f} ({one:.3f})", f"{other:.3f} ({other:.3f})", f"{other - one:+.3f} ({other - one:+.3f})"]
    expected = f"| connector | interference | {' | '.join(cells)} | {'1, 0' if other > one else '0, 1'} |"
    assert expected in (out / "interference" / "table.md").read_text()
    assert "silhouette" not in (out / "interference" / "table.md").read_text()  # no model is there
    assert all((out / "interference" / name).stat().st_size > 100 for name in ("plot.png", "agreement.png", "table.csv"))
    # Another folder takes the files themselves; one with other files is refused.
    run = CliRunner().invoke(cli.app, ["study", "interference", "--from", str(out), "--out", str(tmp_path / "t")])
    assert (run.exit_code, (tmp_path / "t" / "table.md").is_file()) == (0, True)
    run = CliRunner().invoke(cli.app, ["study", "interference", "--from", str(out), "--out", str(out / "runs")])
    assert (run.exit_code, "exists and is no result of this study" in run.output) == (2, True)
    for wrong in (["interference", "--rows", "mlp"], ["imax", "--from", str(out)]):
        assert CliRunner().invoke(cli.app, ["study", *wrong, "--out", str(tmp_path / "z")]).exit_code == 2
