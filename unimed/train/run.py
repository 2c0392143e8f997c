"""One training run: a recipe in, a folder with the model, its logs and checkpoints out.

Under torchrun every process calls `train`; the main process makes the folder and writes into it.
"""

from __future__ import annotations

import importlib.util
import os
import random
from collections.abc import Callable, Iterator, Sequence
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unimed import io, literal
from unimed.datasets.load import find_items, set_items
from unimed.errors import NoItems, UserError
from unimed.needs import missing_weights
from unimed.records.policy import Rules
from unimed.tasks import RELEASED_TASKS, TASKS, prompts
from unimed.tasks.item import Item, digest
from unimed.train import machine, stages
from unimed.train.folder import Run
from unimed.train.recipe import Recipe

if TYPE_CHECKING:
    from unimed.datasets.index import Items

MOST_TEXTS = 20_000


def items(recipe: Recipe, split: str) -> Items:
    """The items of a split of all data of a recipe: `data.root`, and each of `data.sets` by its own name of the split."""
    from unimed.datasets.index import Items

    data = recipe.data
    rules = Rules(data.strict, tuple(data.languages), data.protocol, data.links)
    parts: list[Items] = []
    if data.root:
        root = Path(data.root)
        if not root.is_dir():
            raise UserError(f"data.root={data.root}: no such folder; make the sample with: unimed sample build --out {data.root}")
        parts.append(find_items(root, split, data.tasks, rules))
    elif not data.sets:
        raise UserError("data: no data; name a folder with data.root=FOLDER or data.sets.NAME.root=FOLDER")
    for name, one in data.sets.items():
        parts.append(set_items(name, Path(one.root), one.layout, one.splits.get(split, split), data.tasks, rules))
    found = parts[0] if len(parts) == 1 else Items(parts)
    if not found:
        what = f"data.root={data.root}" if not data.sets else f"data: {data.where}"
        raise NoItems(f"{what}: no item of the tasks {', '.join(data.tasks)} in its {split!r} split")
    return found


def _held_out(recipe: Recipe) -> Sequence[Item]:
    """The first of the splits for evaluation that the data has; nothing where it has none."""
    for split in recipe.evaluate.splits:
        try:
            return items(recipe, split)
        except NoItems:
            continue
    return []


def build(recipe: Recipe, train_items: Sequence[Item], base: Path | None = None) -> tuple[Any, Any]:
    """The untrained model of a recipe and its processor, the same every time for the same seed.

    `base`: where a model with LoRA is saved without it, unless it was; its adapters then name that folder.
    """
    _can_run(recipe)
    from transformers import set_seed

    from unimed.models import build as models

    set_seed(recipe.train.seed)
    if recipe.source:
        return stages.start(recipe)
    more = [task for task in recipe.data.tasks if task not in RELEASED_TASKS]
    tasks = [task for task in (*RELEASED_TASKS, *more) if TASKS[task].needs_image]
    kept = _tokenizer_file(train_items, recipe.language.vocab_size)
    model, processor = models.build(recipe, texts(train_items), tasks=tasks, seed=recipe.train.seed, kept=kept)
    model.config.training = {"recipe": recipe.name, "description": recipe.description}
    if recipe.medmoe:
        stages.set_trainable(model, recipe)
    if base is not None and recipe.lora and not (base / io.MANIFEST).is_file():
        io.write_folder(base, lambda folder: save(model, processor, folder))
    return models.adapt(model, recipe, base), processor


def saved(recipe: Recipe, folder: Path) -> tuple[Any, Any]:
    """The model and processor of a folder, to be trained further."""
    from transformers import set_seed

    from unimed.models.load import load

    set_seed(recipe.train.seed)
    model, processor = load(folder)
    return model.train(), processor


def save(model: Any, processor: Any, folder: Path, weights: dict[str, Any] | None = None) -> None:
    """`weights`: in place of the model's own, where each process holds a part of them."""
    model.save_pretrained(folder, state_dict=weights)
    processor.save_pretrained(folder)


def _can_run(recipe: Recipe) -> None:
    if missing := missing_weights(recipe):
        raise UserError(f"recipe {recipe.name!r} cannot run here: {missing}; see unimed doctor. `unimed train tiny` runs")


def _require_installed(trackers: Sequence[str]) -> None:
    for tracker in trackers:
        if importlib.util.find_spec(tracker) is None:
            raise UserError(f"train.report_to={tracker!r}: the package {tracker} is not installed; get it with: pip install {tracker}")


def _tokenizer_file(train_items: Sequence[Item], vocab_size: int) -> Path | None:
    """Where the tokenizer of these items is kept; None for items without an index."""
    from tokenizers import __version__

    from unimed.datasets.index import Items, code
    from unimed.models.unimed import tokenization

    key = train_items.key() if isinstance(train_items, Items) else None
    if key is None:
        return None
    made_of = (
        key,
        vocab_size,
        __version__,
        code(),
        *(io.sha256(Path(file)) for file in (__file__, literal.__file__, tokenization.__file__)),
    )
    return io.cache_folder() / "tokenizers" / sha256(repr(made_of).encode()).hexdigest()


def texts(train_items: Sequence[Item]) -> Iterator[str]:
    """What the tokenizer is made from: prompts in both forms, and answers, of at most MOST_TEXTS items of the training split."""
    for index, item in enumerate(train_items[:: max(-(-len(train_items) // MOST_TEXTS), 1)]):  # a slice is read many rows at a time
        yield prompts.chat(prompts.instruction(item, None))
        yield prompts.chat(prompts.instruction(item, random.Random(index)))
        yield item.answer


def train(
    recipe: Recipe,
    run: Path,
    resume: bool = False,
    overwrite: bool = False,
    callbacks: Sequence[Any] | Callable[[], Sequence[Any]] = (),
    command: str = "train",
    initial: Path | None = None,
) -> Path:
    """Trains and returns the run's folder. A killed run goes on from its last checkpoint with `resume`.

    `command` is what the run says it was made by. `initial`: the folder of a saved model that training starts from, with its tokenizer, in
    place of a new one; the recipe's model must be its own. `callbacks`: of the Trainer, or what makes them once torch is there.
    """
    folder = Run(run)
    _can_run(recipe)
    _require_installed(recipe.train.report_to)
    stages.require(recipe, run)
    if not resume and os.environ.get("WORLD_SIZE", "1") == "1":  # of several processes, the main one has made it, or will
        folder.require_free(overwrite)
    train_items = items(recipe, "train")
    if recipe.medmoe and recipe.medmoe.stage == 2:
        stages.router_items(recipe, train_items)  # what the router will lack is said before the model is trained

    # All that can be wrong without a model has been said: now the imports that take seconds.
    from unimed.train import processes
    from unimed.train.collate import TrainingSet
    from unimed.train.trainer import UniMedTrainer, arguments

    settings = arguments(recipe, run)  # under torchrun, the processes find each other here
    if recipe.train.threads:
        import torch

        torch.set_num_threads(recipe.train.threads)
    start = {
        "command": command,
        "processes": settings.world_size,
        "examples": len(train_items),
        "examples_sha256": digest(train_items),
    }

    checkpoint = processes.on_main(lambda: folder.resume(recipe, start) if resume else folder.create(recipe, start, overwrite))
    try:
        with processes.main_first():  # a language model that is converted once is kept for the others
            model, processor = build(recipe, train_items, folder.base) if initial is None else saved(recipe, initial)
    except BaseException:
        if processes.is_main():
            folder.restore()
        raise
    processes.on_main(folder.replaced)
    cache_mb = recipe.data.cache_mb / max(recipe.data.workers, 1)
    data = TrainingSet(train_items, recipe.augment, model.config.vision_config.image_size, cache_mb)
    trainer = UniMedTrainer(recipe, model, processor, data, run, list(callbacks() if callable(callbacks) else callbacks), settings)
    if checkpoint:
        trainer.resume(checkpoint)
    else:
        trainer.train()

    weights = trainer.whole_weights()

    def finish() -> None:
        of_classes = [tag for tag, task in TASKS.items() if task.asks == "classes"]
        with folder.writing(folder.model):
            io.write_folder(folder.model, lambda place: save(model, processor, place, weights))
        record = {
            "seconds": round(trainer.seconds(), 1),
            **({"probe_seconds": round(trainer.probe.seconds, 1)} if trainer.probe else {}),
            "steps": trainer.state.global_step,
            "processes": settings.world_size,
            "examples": len(train_items),
            "parameters": sum(p.numel() for p in model.parameters()),
            "trained_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
            "class_questions": sorted({item.question for item in train_items.of_tasks(of_classes)}),
            "machine": machine.describe(),
        }
        if recipe.medmoe and recipe.medmoe.stage == 2:
            stages.train_domains(recipe, train_items, _held_out(recipe), folder)
        io.write_json(folder.record, record)

    processes.on_main(finish)
    return run
