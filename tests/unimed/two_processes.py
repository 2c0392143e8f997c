"""What test_train_processes.py runs in two processes: torchrun two_processes.py FOLDER override...

Each process writes what it saw into FOLDER/process-RANK.json: lines of two processes may mix on one standard output.
"""

import json
import os
import sys
from pathlib import Path

import torch
from accelerate import PartialState
from transformers import TrainerCallback

from unimed.__main__ import main
from unimed.train import recipe as recipes
from unimed.train.run import train


class Killed(Exception):
    pass


class KillAt(TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 5:
            raise Killed


def command(*arguments):
    """Runs `unimed ...` in this process and returns its exit code."""
    sys.argv = ["unimed", *arguments]
    try:
        main()
    except SystemExit as stop:
        return stop.code


if __name__ == "__main__":
    work, *overrides = sys.argv[1:]
    torch.set_num_threads(1)
    os.chdir(work)
    recipe = recipes.load("tiny", [*overrides, "name=pair"])
    seen = {}
    try:
        train(recipe, Path("runs/pair"), callbacks=[KillAt()])
    except Killed:
        seen["killed"] = True
    seen["again"] = command("train", "tiny", *overrides, "--name", "pair")
    rank = PartialState().process_index
    seen["resumed"] = command("train", "--name", "pair", "--resume")
    Path(f"process-{rank}.json").write_text(json.dumps(seen))
