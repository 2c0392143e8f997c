"""`unimed train`, `unimed demo` and `unimed merge`; `app.py` registers them."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from unimed.cli.evaluate import score, write_report
from unimed.cli.sample import build
from unimed.cli.shared import RUNS, Overrides, RunPath, Strict, console, importing, rank, run_folder
from unimed.errors import UserError
from unimed.notice import NOTICE

BRAIN_RATIO = 0.3  # of its samples of a task to one of the CT and MR slices


def train(
    recipe: Annotated[str, typer.Argument(help="tiny, smollm2, medmoe-1 to -3, unimed-7b-release, ..., or a YAML file")] = "tiny",
    overrides: Overrides = None,
    name: Annotated[str | None, typer.Option(help="the run's name; by default the recipe's")] = None,
    llm: Annotated[str | None, typer.Option(help="the language model: tiny or smollm2")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="go on from the run's last checkpoint, by the run's own recipe")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="start again where a run of this name exists")] = False,
    strict: Strict = False,
) -> None:
    """Train a model by a recipe; the run goes to runs/NAME.

    Examples:

      [cyan]unimed train[/]                                            the tiny recipe

      [cyan]unimed train tiny train.max_steps=50 connector.router=hard --name hard[/]

      [cyan]unimed train --name hard --resume[/]                       after it was interrupted; nothing needs to be typed again

      [cyan]unimed train --llm smollm2[/]                              SmolLM2-135M with LoRA

      [cyan]unimed train tiny data.sets.mine.root=mine --name mine[/]  own data (unimed data import)

      [cyan]torchrun --nproc-per-node 2 -m unimed train[/]             two processes, each with its own batches
    """
    if "=" in recipe:  # an override, and the recipe left out
        recipe, overrides = "tiny", [recipe, *(overrides or [])]
    overrides = [*(overrides or []), *["data.strict=true"] * strict]
    if resume:
        loaded, run = _stored_recipe(recipe, llm, overrides, name)
    else:
        loaded = _recipe(recipe, llm, overrides, name)
        run = RUNS / loaded.name
    _train(loaded, run, resume, overwrite)


def demo(
    overrides: Overrides = None,
    name: Annotated[str | None, typer.Option(help="the run's name; demo by default")] = None,
    model: Annotated[str, typer.Option(help="tiny, smollm2 or medmoe")] = "tiny",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace a run of this name that another command made")] = False,
) -> None:
    """The whole job: build the sample, train the tiny model, evaluate it, write the report.

    It starts again each time, and replaces the run that it made before. medmoe trains three stages: runs/demo-medmoe-1, -2 and demo-medmoe.

    Examples:

      [cyan]unimed demo[/]

      [cyan]unimed demo --model smollm2[/]

      [cyan]unimed demo --model medmoe[/]           Med-MoE: alignment, instruction tuning and router, domain experts

      [cyan]unimed demo train.max_steps=20 evaluate.limit=5[/]    a quick look
    """
    start = time.perf_counter()
    if model not in ("tiny", "smollm2", "medmoe"):
        raise UserError(f"--model {model}: no such model; valid are tiny, smollm2, medmoe")
    # Overrides come after the default, so name=x holds; --name comes after both.
    first, default = ("medmoe-1", "demo-medmoe") if model == "medmoe" else (model, "demo")
    if model != "smollm2" and (os.cpu_count() or 1) > 1:  # the small models train with one thread
        overrides = ["data.workers=1", *(overrides or [])]
    loaded = _recipe(first, None, [f"name={default}", *(overrides or [])], name)
    if loaded.data.sets or not loaded.data.root:
        raise UserError("unimed demo: trains on the built-in sample; for own data: unimed train tiny data.sets.NAME.root=FOLDER")
    run = RUNS / loaded.name
    before = [run.with_name(f"{run.name}-{number}") for number in (1, 2)] if model == "medmoe" else []
    for one in (run, *before):
        _may_replace(one, overwrite)
    build(Path(loaded.data.root))
    if model == "medmoe":
        _train_stages([*before, run], [*_with_brain(loaded.data.root), *(overrides or [])])
    else:
        _train(loaded, run, resume=False, overwrite=True, command="demo")
    score(run, None, untrained=model != "medmoe")
    if loaded.medmoe and not loaded.medmoe.dense:
        from unimed.evaluate.experts import measure

        measure(run)
    write_report(run)
    console.print(f"demo: {(time.perf_counter() - start) / 60:.1f} minutes in all", highlight=False)


def _with_brain(root: str) -> list[str]:
    """The overrides that add the average brain to the sample as a fourth domain, if it lies beside it."""
    from unimed.datasets.records import made_by
    from unimed.sample import about

    place = Path(root).with_name(about.BRAIN)
    if made_by(place) != about.BRAIN_BY:
        console.print(f"MR brain: {place} is not there, so three domains; for a fourth: unimed sample brain", highlight=False)
        return []
    sets = f"data.sets.{about.BRAIN}"
    return [f"data.root={root}", f"{sets}.root={place}", f"{sets}.ratio={BRAIN_RATIO}", f"medmoe.domains.MR brain=['{about.BRAIN}/*/*']"]


def _train_stages(runs: list[Path], overrides: list[str]) -> None:
    """Med-MoE's stages, each from the run before. Only the first one takes what is said of the model's parts."""
    from unimed.train import recipe as recipes

    of_parts = ("vision.", "connector.", "language.")
    kept = [text for text in overrides if not text.startswith("name=")]
    for number, run in enumerate(runs, 1):
        if number > 1:
            kept = [text for text in kept if not text.startswith((*of_parts, "from="))] + [f"from={runs[number - 2]}"]
        loaded = recipes.load(f"medmoe-{number}", [*kept, f"name={run.name}"])
        console.print(f"stage {number} of {len(runs)}: {loaded.description}", highlight=False)
        _train(loaded, run, resume=False, overwrite=True, command="demo")


def _recipe(recipe: str, llm: str | None, overrides: list[str] | None, name: str | None) -> Any:
    from unimed.train import recipe as recipes

    if llm not in (None, "tiny", "smollm2"):
        raise UserError(f"--llm {llm}: no such language model; valid are tiny, smollm2")
    if llm and recipe != llm:
        if recipe not in ("tiny", "smollm2"):
            raise UserError(f"--llm {llm}: chooses between the recipes tiny and smollm2; for {recipe} set language.from instead")
        recipe = llm
    return recipes.load(recipe, [*(overrides or []), *([f"name={name}"] if name is not None else [])])


def _stored_recipe(recipe: str, llm: str | None, overrides: list[str] | None, name: str | None) -> tuple[Any, Path]:
    """The recipe and folder of the run to go on with; `recipe` only names it where nothing else does."""
    from unimed.train.folder import Run

    names = [text for text in overrides or [] if text.startswith("name=")]
    # A recipe of a later stage needs the run before; a run that is named needs no recipe.
    run = RUNS / _recipe(recipe if name is None else "tiny", llm if name is None else None, names, name).name
    loaded = Run(run).stored_recipe([text for text in overrides or [] if text not in names])
    if not rank():
        console.print(f"resuming {run} by its own recipe.yaml", highlight=False)
    return loaded, run


def _may_replace(run: Path, overwrite: bool) -> None:
    from unimed.train.folder import Run

    if Run(run).recipe.exists() and not overwrite and Run(run).started_with().get("command") != "demo":
        raise UserError(f"{run}: exists, and unimed demo did not make it; choose another --name, or replace it with --overwrite")


def _train(recipe: Any, run: Path, resume: bool, overwrite: bool, command: str = "train") -> None:
    with importing():
        from unimed.train.run import train as run_training

    run_training(recipe, run, resume, overwrite, _progress, command)
    from unimed.train import processes

    processes.end()
    if not rank():
        console.print(f"trained: {run}/model · {NOTICE}", highlight=False)


def _progress() -> list[Any]:
    from unimed.train.progress import TrainingProgress

    return [TrainingProgress(console)]


def merge(
    run: RunPath,
    out: Annotated[Path, typer.Option(help="folder for the model; it must not exist")],
) -> None:
    """Work a run's LoRA into the weights: a plain model in a folder of its own, which needs no base and no peft.

    Example: [cyan]unimed merge smollm2 --out smollm2-merged[/]
    """
    from unimed.inference.files import model_in

    folder = model_in(run_folder(run))
    from unimed.models.merge import merge_folder

    merge_folder(folder, out)
    console.print(f"merged: {out} · {NOTICE}", highlight=False)


COMMANDS: dict[str, Callable[..., None]] = {"train": train, "demo": demo, "merge": merge}
