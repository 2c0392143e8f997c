"""One training run: a recipe in, a folder with the model, its logs and checkpoints out.

runs/<name>/recipe.yaml  metrics.jsonl  router.json  run.json  checkpoint-<step>/  model/
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from unimed.data.example import Example
from unimed.data.load import load_examples
from unimed.data.policy import Rules
from unimed.errors import NoExamples, UserError
from unimed.tasks import prompts
from unimed.train import config as recipes
from unimed.train import files, machine
from unimed.train.config import Recipe

RECIPE_FILE, RUN_FILE, MODEL_FOLDER = "recipe.yaml", "run.json", "model"


def examples(recipe: Recipe, split: str) -> list[Example]:
    root = Path(recipe.data.root)
    if not root.is_dir():
        raise UserError(f"data.root={recipe.data.root}: no such folder; make the sample with: unimed sample build --out {recipe.data.root}")
    data = recipe.data
    rules = Rules(data.strict, tuple(data.languages), data.protocol, data.links)
    found = load_examples(root, split, data.tasks, rules)
    if not found:
        raise NoExamples(f"data.root={recipe.data.root}: no example of the tasks {', '.join(recipe.data.tasks)} in its {split!r} split")
    return found


def build(recipe: Recipe, train_examples: Sequence[Example]) -> tuple[Any, Any]:
    """The untrained model of a recipe and its processor, the same every time for the same seed."""
    if recipe.cannot_run:
        raise UserError(f"recipe {recipe.name!r} cannot run here: {recipe.cannot_run}")
    from transformers import set_seed

    set_seed(recipe.train.seed)
    connector = {name: value for name, value in vars(recipe.connector).items() if value is not None}
    model: Any
    if recipe.language.kind == "smollm2":
        from unimed.model.build import build_smollm2

        source = recipe.language.archive or None
        model, processor = build_smollm2(source, None, connector=connector, seed=recipe.train.seed, **_vision(recipe))
    else:
        from unimed.model.build import build_tiny

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
        from unimed.model.lora import add_lora

        model = add_lora(model, r=recipe.lora.r, alpha=recipe.lora.alpha, dropout=recipe.lora.dropout)
    return model, processor


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


def train(recipe: Recipe, run: Path, resume: bool = False, overwrite: bool = False, callbacks: list[Any] | None = None) -> Path:
    """Trains and returns the run's folder. A killed run goes on from its last checkpoint with `resume`."""
    from unimed.train.collate import TrainingSet
    from unimed.train.trainer import UniMedTrainer, checkpoints

    if recipe.train.threads:
        import torch

        torch.set_num_threads(recipe.train.threads)
    train_examples = examples(recipe, "train")
    _prepare_folder(recipe, run, resume, overwrite)
    model, processor = build(recipe, train_examples)
    data = TrainingSet(train_examples, recipe.augment, recipe.data.cache_images)
    trainer = UniMedTrainer(recipe, model, processor, data, run, callbacks)
    last = checkpoints(run)[-1:] if resume else []
    if last:
        trainer.resume(last[0])
    else:
        trainer.train()

    def save(folder: Path) -> None:
        model.save_pretrained(folder)
        processor.save_pretrained(folder)

    if trainer.args.should_save:
        files.write_folder(run / MODEL_FOLDER, save)
        record = {
            "seconds": round(trainer.seconds(), 1),
            "steps": trainer.state.global_step,
            "examples": len(train_examples),
            "parameters": sum(p.numel() for p in model.parameters()),
            "trained_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
            "class_questions": sorted({example.question for example in train_examples if example.task == "cls"}),
            "machine": machine.describe(),
        }
        files.write_json(run / RUN_FILE, record)
    return run


def _prepare_folder(recipe: Recipe, run: Path, resume: bool, overwrite: bool) -> None:
    if resume:
        if not (run / RECIPE_FILE).is_file():
            raise UserError(f"{run}: nothing to resume: no {RECIPE_FILE} there; leave out --resume to start")
        _same(recipe, recipes.load(run / RECIPE_FILE), run)
        return
    if (run / RECIPE_FILE).exists():
        if not overwrite:
            raise UserError(f"{run}: this run exists; go on with --resume, start it again with --overwrite, or choose another --name")
        shutil.rmtree(run)
    elif run.exists() and (not run.is_dir() or any(run.iterdir())):
        raise UserError(f"{run}: exists and is not a run of unimed; choose another --name")
    files.write_text(run / RECIPE_FILE, recipes.dump(recipe))


def _same(recipe: Recipe, stored: Recipe, run: Path) -> None:
    for key in recipes.dotted_keys():
        new, old = recipes.value(recipe, key), recipes.value(stored, key)
        if new != old:
            raise UserError(f"{run}: cannot resume with {key}={new!r}: the run was started with {old!r}; keep that, or use another --name")


def load_model(run: Path) -> tuple[Any, Any]:
    """The trained model and processor of a run (its `model` folder, or a folder that save_pretrained wrote)."""
    folder = run / MODEL_FOLDER if (run / MODEL_FOLDER).is_dir() else run
    if (folder / files.MANIFEST).is_file():
        files.verify_folder(folder)
    if not (folder / "config.json").is_file() and not (folder / "adapter_config.json").is_file():
        raise UserError(f"{run}: no trained model there (looked for {MODEL_FOLDER}/config.json); train one with: unimed train tiny")
    from unimed.model.load import load

    return load(folder)
