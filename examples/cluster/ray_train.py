"""Training by Ray Train: each worker is a process of one run.

    python examples/cluster/ray_train.py tiny --workers 2 --storage /shared/unimed train.max_steps=200
    python examples/cluster/ray_train.py tiny --workers 2 --storage /shared/unimed --dry-run

All machines see the folder of --storage; the run and its checkpoints lie there. A second start goes on from the last checkpoint.
The dry run is a test; it was not run on a Ray cluster.
"""

import argparse
import os
import sys
from pathlib import Path


def work(settings: dict) -> None:
    """One worker. Ray has started the process group; accelerate takes it."""
    from unimed.train import recipe as recipes
    from unimed.train.run import train

    os.chdir(settings["storage"])
    run = Path("runs") / settings["name"]
    train(recipes.load(settings["recipe"], settings["overrides"]), run, resume=(run / "recipe.yaml").is_file())


def main() -> int:
    parser = argparse.ArgumentParser(description="Trains a recipe of unimed by Ray Train.")
    parser.add_argument("recipe")
    parser.add_argument("overrides", nargs="*", help="KEY=VALUE")
    parser.add_argument("--workers", type=int, default=2, help="processes; each takes a GPU unless --cpu is given")
    parser.add_argument("--storage", required=True, help="folder that all machines see")
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--dry-run", action="store_true", help="check the recipe, say what would run, and stop")
    given = parser.parse_intermixed_args()

    from unimed.errors import UserError
    from unimed.train import recipe as recipes

    try:
        recipe = recipes.load(given.recipe, given.overrides)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    settings = {
        "recipe": given.recipe,
        "overrides": given.overrides,
        "name": recipe.name,
        "storage": os.path.abspath(given.storage),
    }
    if given.dry_run:
        print(f"would train {recipe.name} with {given.workers} workers on {'CPUs' if given.cpu else 'GPUs'} in {settings['storage']}/runs")
        return 0
    try:
        from ray.train import RunConfig, ScalingConfig
        from ray.train.torch import TorchTrainer
    except ModuleNotFoundError:
        print("error: the package ray is not installed; get it with: pip install 'ray[train]'", file=sys.stderr)
        return 2
    scaling = ScalingConfig(num_workers=given.workers, use_gpu=not given.cpu)
    TorchTrainer(work, train_loop_config=settings, scaling_config=scaling, run_config=RunConfig(storage_path=settings["storage"])).fit()
    return 0


if __name__ == "__main__":
    sys.exit(main())
