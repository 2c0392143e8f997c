"""What test_train_processes.py runs in several processes: torchrun many_processes.py FOLDER PART[,PART] override...

Each process writes what it saw into FOLDER/process-RANK.json: lines of two processes may mix on one standard output.
"""

import json
import os
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from accelerate import PartialState
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.state import GradientState
from accelerate.utils import DistributedType
from accelerate.utils.launch import prepare_multi_gpu_env
from transformers import TrainerCallback

from unimed.__main__ import main
from unimed.train import recipe as recipes
from unimed.train.recipe import RECIPES
from unimed.train.run import train


class Killed(Exception):
    pass


class KillAt(TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 5:
            raise Killed


class Gradients(TrainerCallback):
    """The gradients of every optimiser step, whole, by name."""

    def __init__(self):
        self.steps = {}

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        self.steps[state.global_step] = {
            name: (grad.full_tensor() if hasattr(grad, "full_tensor") else grad).clone() for name, grad in found.items()
        }


def command(*arguments):
    """Runs `unimed ...` in this process and returns its exit code."""
    sys.argv = ["unimed", *arguments]
    try:
        main()
    except SystemExit as stop:
        return stop.code


@contextmanager
def fully_sharded():
    """The shipped fsdp2.yaml, as `accelerate launch` hands it on. accelerate shards on GPUs only: it takes these processes for GPUs."""
    config = str(RECIPES / "accelerate" / "fsdp2.yaml")
    arguments = _validate_launch_command(launch_command_parser().parse_args(["--config_file", config, "unimed"]))[0]
    find = PartialState._prepare_backend

    def as_gpus(self, *given, **named):
        if not torch.distributed.is_initialized():
            torch.distributed.init_process_group("gloo")
        return find(self, *given, **named)[0], DistributedType.MULTI_GPU

    with pytest.MonkeyPatch.context() as patch:
        for name, value in prepare_multi_gpu_env(arguments).items():
            if name.startswith(("FSDP_", "ACCELERATE_USE_FSDP")):
                patch.setenv(name, value)
        patch.setattr(PartialState, "_prepare_backend", as_gpus)
        patch.setattr(PartialState, "set_device", lambda self: setattr(self, "device", torch.device("cpu")))
        yield


def until_killed(recipe, run, callbacks, resume=False):
    try:
        train(recipe, run, resume, callbacks=callbacks)
    except Killed:
        return True
    return False


def ddp(overrides):
    gradients = Gradients()
    seen = {"killed": until_killed(recipes.load("tiny", [*overrides, "name=pair"]), Path("runs/pair"), [KillAt(), gradients])}
    seen["again"] = command("train", "tiny", *overrides, "--name", "pair")
    torch.save(gradients.steps, f"ddp-{PartialState().process_index}.pt")
    seen["resumed"] = command("train", "--name", "pair", "--resume")
    return seen


def sharded(overrides):
    """Killed, gone on with, finished; the gradients of all steps."""
    recipe, run, gradients = recipes.load("tiny", [*overrides, "name=sharded"]), Path("runs/sharded"), Gradients()
    with fully_sharded():
        killed = until_killed(recipe, run, [KillAt(), gradients])
        GradientState._reset_state()  # a new process has a new one
        train(recipe, run, resume=True, callbacks=[gradients])
    torch.save(gradients.steps, f"sharded-{PartialState().process_index}.pt")
    return {"sharded_killed": killed}


def half(overrides):
    """Started and killed; another number of processes goes on."""
    with fully_sharded():
        return {"killed": until_killed(recipes.load("tiny", [*overrides, "name=moved"]), Path("runs/moved"), [KillAt()])}


def rest(overrides):
    with fully_sharded():
        train(recipes.load("tiny", [*overrides, "name=moved"]), Path("runs/moved"), resume=True)
    return {"resumed": True}


PARTS = {"ddp": ddp, "sharded": sharded, "half": half, "rest": rest}

if __name__ == "__main__":
    work, parts, *overrides = sys.argv[1:]
    torch.set_num_threads(1)
    os.chdir(work)
    seen = {}
    rank = int(os.environ["RANK"])
    for part in parts.split(","):
        seen |= PARTS[part](overrides)
    Path(f"process-{rank}.json").write_text(json.dumps(seen))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
