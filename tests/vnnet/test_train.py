"""Training learns, stops early, survives kills at any moment and goes on bit for bit."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from examples.vnnet import train as t
from examples.vnnet.data import Tables, Windows, save
from examples.vnnet.files import UserError, read_json, read_tensors
from examples.vnnet.model import Settings
from examples.vnnet.train import Plan, chosen, rate, train, truth_share

ROOT = Path(__file__).parents[2]
PLAN = Plan(steps=5, batch=3, validate_every=2, checkpoint_every=2, validation_windows=2, warmup=2, sampling=2.0)


def settings(**changes):
    return Settings.small(stations=5, vision_width=4, state=8, **changes)


def parts(weather, s):
    tables = Tables.fit(weather)
    return [Windows(weather, tables, split, s.factors, s.history, s.horizon, s.frames) for split in ("train", "validation")]


def same(one, other):
    """The same tensors and values, bit for bit."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[k], other[k]) for k in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(same(a, b) for a, b in zip(one, other, strict=True))
    return torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


def assert_same_run(one, other):
    for name in ("last.pt", "best.pt"):
        assert same(read_tensors(one / name), read_tensors(other / name)), name
    assert read_json(one / "done.json") == read_json(other / "done.json")


class Stop(Exception):
    pass


@pytest.mark.parametrize("version", ["paper", "repository"])
def test_stopped_and_resumed_is_the_same_bits(weather, tmp_path, monkeypatch, version):
    s = settings(version=version, dropout=0.1)
    training, validation = parts(weather, s)
    train(tmp_path / "whole", s, PLAN, training, validation)

    def stop(step):
        if step == 3:
            raise Stop

    monkeypatch.setattr(t, "after_step", stop)
    with pytest.raises(Stop):
        train(tmp_path / "stopped", s, PLAN, training, validation)
    monkeypatch.setattr(t, "after_step", None)
    assert not (tmp_path / "stopped" / "done.json").exists()
    train(tmp_path / "stopped", s, PLAN, training, validation, resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "stopped")


# Killed by SIGKILL while the third checkpoint lies beside its place, not yet renamed.
KILLED = """
import os, signal, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from examples.vnnet import files
from tests.vnnet.test_train import PLAN, parts, settings
from examples.vnnet.data import load
from examples.vnnet.train import train
rename, count = os.replace, 0
def replace(source, target):
    global count
    count += Path(target).name == "last.pt"
    if count == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    rename(source, target)
files.os.replace = replace
s = settings()
train(Path(sys.argv[2]), s, PLAN, *parts(load(Path(sys.argv[1])), s))
"""


def test_killed_while_writing_a_checkpoint(weather, tmp_path):
    save(weather, tmp_path / "data")
    s = settings()
    training, validation = parts(weather, s)
    train(tmp_path / "whole", s, PLAN, training, validation)
    run = tmp_path / "killed"
    done = subprocess.run(
        [sys.executable, "-c", KILLED, tmp_path / "data", run], cwd=ROOT, capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert list(run.glob(".last.pt.*.partial"))
    assert read_tensors(run / "last.pt")["state"]["step"] == 4
    train(run, s, PLAN, training, validation, resume=True)
    assert not list(run.glob(".*"))
    assert_same_run(tmp_path / "whole", run)


def test_it_learns(weather, tmp_path):
    s = settings(vision=False)
    training, _ = parts(weather, s)
    plan = Plan(steps=60, batch=8, validate_every=15, validation_windows=32, warmup=5, sampling=1000.0)
    train(tmp_path / "run", s, plan, training, training)  # so few hours say nothing of others
    history = read_json(tmp_path / "run" / "done.json")["history"]
    assert [entry[0] for entry in history] == [15, 30, 45, 60]
    assert history[-1][1] < 0.9 * history[0][1]


def test_a_finished_run_is_read(weather, tmp_path, monkeypatch):
    s = settings(vision=False)
    training, validation = parts(weather, s)
    train(tmp_path / "run", s, PLAN, training, validation)
    monkeypatch.setattr(t, "_step", None)
    train(tmp_path / "run", s, PLAN, training, validation, resume=True)
    with pytest.raises(UserError, match="holds a run; resume it"):
        train(tmp_path / "run", s, PLAN, training, validation)
    with pytest.raises(UserError, match="begun with batch=3, now 5"):
        train(tmp_path / "run", s, Plan(**{**vars(PLAN), "batch": 5}), training, validation, resume=True)


def test_early_stop(weather, tmp_path, monkeypatch):
    s = settings(vision=False)
    training, validation = parts(weather, s)
    errors = iter([1.0, 2.0, 0.5, 0.6, 0.7, 0.1])
    monkeypatch.setattr(t, "validate", lambda *args: next(errors))
    plan = Plan(**{**vars(PLAN), "steps": 100, "validate_every": 1, "patience": 2})
    train(tmp_path / "run", s, plan, training, validation)
    assert read_json(tmp_path / "run" / "done.json")["steps"] == 5
    assert read_tensors(tmp_path / "run" / "best.pt")["about"]["step"] == 3


def test_a_broken_checkpoint_is_one_line(weather, tmp_path):
    s = settings(vision=False)
    training, validation = parts(weather, s)
    train(tmp_path / "run", s, PLAN, training, validation)
    (tmp_path / "run" / "done.json").unlink()
    whole = (tmp_path / "run" / "last.pt").read_bytes()
    (tmp_path / "run" / "last.pt").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="not a whole checkpoint") as caught:
        train(tmp_path / "run", s, PLAN, training, validation, resume=True)
    assert "\n" not in str(caught.value)


def test_missing_values_have_no_part_in_the_loss(weather, windows):
    w = windows()
    batch = w.batch(np.arange(3))
    scale = t.scale_of(w.tables, w.factors)
    values = torch.randn_like(batch.y)
    batch.valid[:, :, 2] = False
    before = t.masked_loss(values, batch, scale, batch.valid)
    values[:, :, 2] = 1e6
    assert torch.equal(before, t.masked_loss(values, batch, scale, batch.valid))
    expected = ((values * scale[1] + scale[0] - batch.y).abs() / scale[1])[:, :, [0, 1, 3, 4]].mean()
    torch.testing.assert_close(before, expected)
    batch.y[0, 0, 0, 0] = 0
    assert t.mask(batch, Plan())[0, 0, 0, 0]
    assert not t.mask(batch, Plan(zero_is_missing=True))[0, 0, 0, 0]


def test_schedules():
    shares = [truth_share(step, 12.0) for step in (0, 30, 200, 100_000)]
    assert shares[0] > 0.9
    assert shares == sorted(shares, reverse=True)
    assert shares[-1] < 1e-9
    plan = Plan(steps=100, warmup=10)
    rates = [rate(step, plan) for step in range(100)]
    assert max(rates) == rates[9] == plan.rate
    assert rates[-1] < 0.06 * plan.rate


def test_an_epoch_shows_each_window_once():
    seen = np.concatenate([chosen(0, step, 4, 22) for step in range(5)])
    assert len(np.unique(seen)) == 20
    assert not np.array_equal(chosen(0, 0, 4, 22), chosen(0, 5, 4, 22))
    assert np.array_equal(chosen(0, 7, 4, 22), chosen(0, 7, 4, 22))
