"""One training run: a recipe in, a folder with the model, its logs and checkpoints out.

runs/<name>/recipe.yaml  start.json  metrics.jsonl  router.json  run.json  checkpoint-<step>/  model/

Under torchrun every process calls `train`; the main process makes the folder and writes into it.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from unimed import io
from unimed.datasets.load import load_examples, load_set
from unimed.errors import NoExamples, UserError
from unimed.inference.files import MODEL_FOLDER, RECIPE_FILE, RUN_FILE
from unimed.records.example import Example, digest
from unimed.records.policy import Rules
from unimed.tasks import RELEASED_TASKS, TASKS, prompts
from unimed.train import config as recipes
from unimed.train import machine
from unimed.train.config import Recipe

START_FILE = "start.json"


def examples(recipe: Recipe, split: str) -> list[Example]:
    """The examples of a split of all data of a recipe: `data.root`, and each of `data.sets` by its own name of the split."""
    data = recipe.data
    rules = Rules(data.strict, tuple(data.languages), data.protocol, data.links)
    found: list[Example] = []
    if data.root:
        root = Path(data.root)
        if not root.is_dir():
            raise UserError(f"data.root={data.root}: no such folder; make the sample with: unimed sample build --out {data.root}")
        found += load_examples(root, split, data.tasks, rules)
    elif not data.sets:
        raise UserError("data: no data; name a folder with data.root=FOLDER or data.sets.NAME.root=FOLDER")
    for name, one in data.sets.items():
        found += load_set(name, Path(one.root), one.layout, one.splits.get(split, split), data.tasks, rules)
    if not found:
        what = f"data.root={data.root}" if not data.sets else f"data: {data.where}"
        raise NoExamples(f"{what}: no example of the tasks {', '.join(data.tasks)} in its {split!r} split")
    return found


def build(recipe: Recipe, train_examples: Sequence[Example]) -> tuple[Any, Any]:
    """The untrained model of a recipe and its processor, the same every time for the same seed."""
    _can_run(recipe)
    from transformers import set_seed

    set_seed(recipe.train.seed)
    connector = {name: value for name, value in vars(recipe.connector).items() if value is not None}
    if more := [task for task in recipe.data.tasks if task not in RELEASED_TASKS]:
        connector["tasks"] = [task for task in (*RELEASED_TASKS, *more) if TASKS[task].needs_image]
    model: Any
    if recipe.language.kind == "smollm2":
        from unimed.models.build import build_smollm2

        source = recipe.language.archive or None
        model, processor = build_smollm2(source, None, connector=connector, seed=recipe.train.seed, **_vision(recipe))
    else:
        from unimed.models.build import build_tiny

        language = recipe.language
        model, processor = build_tiny(
            texts(train_examples),
            text_width=language.width,
            text_layers=language.layers,
            text_heads=language.heads,
            text_hidden=language.mlp_width,
            vocab_size=language.vocab_size,
            connector=connector,
            seed=recipe.train.seed,
            **_vision(recipe),
        )
    model.config.training = {"recipe": recipe.name, "description": recipe.description}
    if recipe.vision.freeze:
        model.config.freeze_vision = True
        model.vision_tower.requires_grad_(False)
    if recipe.lora.enabled:
        from unimed.models.adapter import add_lora

        model = add_lora(model, r=recipe.lora.r, alpha=recipe.lora.alpha, dropout=recipe.lora.dropout)
    return model, processor


def _can_run(recipe: Recipe) -> None:
    if recipe.cannot_run:
        raise UserError(f"recipe {recipe.name!r} cannot run here: {recipe.cannot_run}")


def _vision(recipe: Recipe) -> dict[str, Any]:
    side = recipe.vision
    sizes = {"image_size": side.image_size, "patch_size": side.patch_size}
    return {**sizes, "vision_width": side.width, "vision_layers": side.layers, "vision_heads": side.heads}


def texts(train_examples: Sequence[Example]) -> Iterator[str]:
    """What the tokenizer is made from: prompts in both forms, and answers, of the training split alone."""
    for index, example in enumerate(train_examples):
        yield prompts.chat(prompts.instruction(example, None))
        yield prompts.chat(prompts.instruction(example, random.Random(index)))
        yield example.answer


def train(
    recipe: Recipe,
    run: Path,
    resume: bool = False,
    overwrite: bool = False,
    callbacks: list[Any] | None = None,
    command: str = "train",
) -> Path:
    """Trains and returns the run's folder. A killed run goes on from its last checkpoint with `resume`.

    `command` is what the run says it was made by.
    """
    from unimed.train import processes
    from unimed.train.collate import TrainingSet
    from unimed.train.trainer import UniMedTrainer, arguments, checkpoints

    _can_run(recipe)
    settings = arguments(recipe, run)  # under torchrun, the processes find each other here
    if recipe.train.threads:
        import torch

        torch.set_num_threads(recipe.train.threads)
    train_examples = examples(recipe, "train")
    start = {
        "command": command,
        "processes": settings.world_size,
        "examples": len(train_examples),
        "examples_sha256": digest(train_examples),
    }

    def prepare() -> Path | None:
        if not resume:
            _new_folder(recipe, start, run, overwrite)
            return None
        _same(recipe, start, run)
        last = checkpoints(run)[-1:]
        for checkpoint in last:
            io.verify_folder(checkpoint)
        io.write_text(run / RECIPE_FILE, recipes.dump(recipe))
        return last[0] if last else None

    checkpoint = processes.on_main(prepare)
    with processes.main_first():  # a language model that is converted once is kept for the others
        model, processor = build(recipe, train_examples)
    cache_mb = recipe.data.cache_mb / max(recipe.data.workers, 1)
    data = TrainingSet(train_examples, recipe.augment, recipe.vision.image_size, cache_mb)
    trainer = UniMedTrainer(recipe, model, processor, data, run, callbacks, settings)
    if checkpoint:
        trainer.resume(checkpoint)
    else:
        trainer.train()

    def save(folder: Path) -> None:
        model.save_pretrained(folder)
        processor.save_pretrained(folder)

    def finish() -> None:
        io.write_folder(run / MODEL_FOLDER, save)
        record = {
            "seconds": round(trainer.seconds(), 1),
            "steps": trainer.state.global_step,
            "processes": settings.world_size,
            "examples": len(train_examples),
            "parameters": sum(p.numel() for p in model.parameters()),
            "trained_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
            "class_questions": sorted({example.question for example in train_examples if TASKS[example.task].asks == "classes"}),
            "machine": machine.describe(),
        }
        io.write_json(run / RUN_FILE, record)

    processes.on_main(finish)
    return run


def _new_folder(recipe: Recipe, start: dict[str, Any], run: Path, overwrite: bool) -> None:
    if (run / RECIPE_FILE).exists():
        if not overwrite:
            raise UserError(f"{run}: this run exists; go on with --resume, start it again with --overwrite, or choose another --name")
        shutil.rmtree(run)
    elif run.exists() and (not run.is_dir() or any(run.iterdir())):
        raise UserError(f"{run}: exists and is not a run of unimed; choose another --name")
    io.write_text(run / RECIPE_FILE, recipes.dump(recipe))
    io.write_json(run / START_FILE, start)


def _same(recipe: Recipe, start: dict[str, Any], run: Path) -> None:
    """Raises UserError where going on with this recipe, data or number of processes would not be the run that was started."""
    stored = stored_recipe(run)
    for key in recipes.dotted_keys():
        new, old = recipes.learned(recipe, key), recipes.learned(stored, key)
        if new != old and not recipes.harmless(key):
            raise UserError(f"{run}: cannot resume with {key}={new!r}: the run was started with {old!r}; keep that, or use another --name")
    started = started_with(run)
    if started.get("processes", start["processes"]) != start["processes"]:
        was, now = started["processes"], start["processes"]
        raise UserError(f"{run}: cannot resume with {now} processes: the run was started with {was}; use torchrun --nproc-per-node {was}")
    if started.get("examples_sha256", start["examples_sha256"]) != start["examples_sha256"]:
        was, now = started["examples"], start["examples"]
        what = f"{now} training examples in {recipe.data.where}, the run was started with {was}"
        raise UserError(f"{run}: cannot resume with other data: {what if was != now else 'the examples changed'}; use another --name")


def stored_recipe(run: Path, overrides: list[str] | None = None) -> Recipe:
    """The recipe that a run was started with, with overrides."""
    if not (run / RECIPE_FILE).is_file():
        raise UserError(f"{run}: nothing to resume: no {RECIPE_FILE} there; leave out --resume to start")
    return recipes.load(run / RECIPE_FILE, overrides)


def started_with(run: Path) -> dict[str, Any]:
    """How a run was started: by which command, in how many processes, on which examples; {} for a run of an earlier version."""
    return io.read_json(run / START_FILE) if (run / START_FILE).is_file() else {}
