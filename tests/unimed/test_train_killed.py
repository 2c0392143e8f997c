import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import TrainerCallback

from unimed import io
from unimed.errors import UserError
from unimed.train import recipe as recipes
from unimed.train.folder import Run
from unimed.train.run import train

ROOT = Path(__file__).resolve().parents[2]


SHORT = ["train.max_steps=8", "train.keep=1"]


def kill(kills, seed, overrides, folder):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [
        sys.executable,
        ROOT / "tests/unimed/killed_runs.py",
        folder,
        str(kills),
        str(seed),
        *overrides,
        "train.keep=1",
        "train.max_steps=8",
    ]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads((folder / "killed.json").read_text())["operations"] > 100
    files = contents(folder / "whole")
    for number in range(kills):
        assert contents(folder / f"killed-{number}") == files, number


def contents(run):
    """What a run holds, without times and without the pickles of torch.save, whose bytes hold no more than the weights show."""
    files = {str(path.relative_to(run)): path.read_bytes() for path in run.rglob("*") if path.is_file()}
    held = {name: data for name, data in files.items() if name.endswith((".safetensors", ".yaml")) or name == "start.json"}
    lines = [json.loads(line) for line in files["metrics.jsonl"].decode().splitlines()]
    held["log"] = [{key: value for key, value in line.items() if "second" not in key} for line in lines if "loss" in line]
    return {"names": sorted(files), **held}


@pytest.mark.parametrize(("kills", "seed"), [(3, 0), pytest.param(20, 1, marks=pytest.mark.full)])
def test_a_run_killed_at_any_file_operation_is_the_same_run(small_overrides, tmp_path, kills, seed):
    kill(kills, seed, small_overrides, tmp_path)


class KillAt(TrainerCallback):
    """Ends a run as a kill does, before a step."""

    def __init__(self, step):
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


def test_a_run_killed_before_its_first_checkpoint_logs_each_step_once(small_overrides, tmp_path):
    recipe, run = recipes.load("tiny", [*small_overrides, *SHORT]), tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        train(recipe, run, callbacks=[KillAt(3)])  # step 2 is logged, step 4 would be kept
    train(recipe, run, resume=True)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [2, 4, 6, 8]


@pytest.fixture
def stopped(small_overrides, tmp_path):
    """A run with one checkpoint, and a recipe to go on by."""

    def stop(step):
        raise KeyboardInterrupt

    recipe = recipes.load("tiny", [*small_overrides, "train.max_steps=8"])
    run = Run(tmp_path / "run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("unimed.train.trainer.UniMedTrainer._save_rng_state", once(stop))
        with pytest.raises(KeyboardInterrupt):
            train(recipe, run.path)
    assert [path.name for path in run.checkpoints()] == ["checkpoint-4"]
    return recipe, run


def once(then):
    """The method as it is the first time, `then` the second."""
    from unimed.train.trainer import UniMedTrainer

    whole, calls = UniMedTrainer._save_rng_state, []

    def method(self, folder):
        calls.append(folder)
        return whole(self, folder) if len(calls) == 1 else then(folder)

    return method


SAYS = r"checkpoint-8: not written \(.*\); the checkpoint before it, checkpoint-4, is whole: free space or repair the folder, then --resume"


@pytest.mark.parametrize("size", [2_000, 150_000])  # the first file, and weights or optimiser
def test_a_full_disk_leaves_the_checkpoint_before(stopped, size):
    recipe, run = stopped
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(self, *given):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("transformers.trainer_callback.CallbackHandler.on_step_end", after(fill, step=8))
        try:
            with pytest.raises(UserError, match=SAYS):
                train(recipe, run.path, resume=True)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    io.verify_folder(run.checkpoints()[-1])
    assert [path.name for path in run.checkpoints()] == ["checkpoint-4"]
    train(recipe, run.path, resume=True)
    assert [path.name for path in run.checkpoints()] == ["checkpoint-4", "checkpoint-8"]


def after(body, step):
    from transformers.trainer_callback import CallbackHandler

    whole = CallbackHandler.on_step_end

    def method(self, args, state, control):
        if state.global_step == step:
            body(self)
        return whole(self, args, state, control)

    return method


def test_a_folder_that_takes_no_files_leaves_the_checkpoint_before(stopped):
    recipe, run = stopped
    (run.path / ".checkpoint.partial").unlink(missing_ok=True)

    def block(self):
        (run.path / ".checkpoint.partial").write_text("in its place")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("transformers.trainer_callback.CallbackHandler.on_step_end", after(block, step=8))
        with pytest.raises(UserError, match=SAYS):
            train(recipe, run.path, resume=True)
    io.verify_folder(run.checkpoints()[-1])
    train(recipe, run.path, resume=True)
    assert not list(run.path.glob(".*"))
