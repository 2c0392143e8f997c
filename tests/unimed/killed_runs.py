"""Runs that are killed at one of their file operations: killed_runs.py FOLDER KILLS SEED override...

One process has imported everything and forks every attempt. An operation is an event of Python's audit hooks on a path in the run's folder:
a file opened, a folder made, something renamed or removed. The first run is whole and counts them. Each of the others is killed by SIGKILL
before an operation drawn by SEED, then gone on with. FOLDER/whole and FOLDER/killed-N are left, and killed.json with the numbers.
"""

import json
import os
import random
import signal
import sys
from pathlib import Path

import torch

from unimed.train import recipe as recipes
from unimed.train import trainer  # noqa: F401  (imported before the forks)
from unimed.train.run import items, train

EVENTS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree"}


def attempt(recipe, run, kill_at=None):
    """Trains in a process of its own; returns how often it touched the run's folder, or None where it was killed."""
    read, write = os.pipe()
    child = os.fork()
    if not child:
        seen, inside = [0], str(run)

        def count(event, arguments):
            if event in EVENTS and inside in str(arguments[0]):
                if seen[0] == kill_at:
                    os.kill(os.getpid(), signal.SIGKILL)
                seen[0] += 1

        sys.addaudithook(count)
        status = 1
        try:
            train(recipe, run, resume=(run / "recipe.yaml").is_file())
            os.write(write, str(seen[0]).encode())
            status = 0
        except BaseException as error:
            print(f"{run.name}, killed at {kill_at}: {type(error).__name__}: {error}", file=sys.stderr)
        finally:
            os._exit(status)
    os.close(write)
    _, status = os.waitpid(child, 0)
    said = os.read(read, 100)
    os.close(read)
    if os.WIFSIGNALED(status):
        return None
    if status:
        raise SystemExit(f"{run}: an attempt failed")
    return int(said)


if __name__ == "__main__":
    folder, kills, seed, *overrides = sys.argv[1:]
    torch.set_num_threads(1)
    recipe = recipes.load("tiny", overrides)
    items(recipe, "train")
    operations = attempt(recipe, Path(folder) / "whole")
    drawn = random.Random(int(seed)).sample(range(operations), int(kills))
    for number, place in enumerate(drawn):
        run = Path(folder) / f"killed-{number}"
        if attempt(recipe, run, place) is not None:
            raise SystemExit(f"{run}: not killed at {place}")
        attempt(recipe, run)
    (Path(folder) / "killed.json").write_text(json.dumps({"operations": operations, "killed_at": drawn}))
