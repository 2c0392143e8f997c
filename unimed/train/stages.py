"""The three stages of Med-MoE: what each starts from, what it trains, and the router between the second and the third."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from unimed import io
from unimed.errors import UserError
from unimed.tasks.item import Item
from unimed.train import recipe as recipes
from unimed.train.folder import Run
from unimed.train.recipe import MedMoE, Recipe

ROUTER_FILE, DOMAINS_FILE = "router.safetensors", "domains.json"
BATCH = 16
FEWER = (10, 30, 100, 300, 1000, 3000)  # labels of routers that are measured beside that of all
MEASURED = 300  # held-out images for that


def require(recipe: Recipe, run: Path | None = None) -> None:
    """The run before is there, is finished, and is of the stage before, with the same model.

    Raises:
        UserError: which of these does not hold.
    """
    if not recipe.source:
        return
    assert recipe.medmoe is not None
    before, stage = Run(recipe.source), recipe.medmoe.stage
    where = f"from={recipe.source!r}"
    if run is not None and run.resolve() == before.path.resolve():
        raise UserError(f"{where}: it is the run itself; choose another --name")
    if not before.recipe.is_file():
        raise UserError(f"{where}: no run is there (no {before.recipe.name}); train stage {stage - 1} first, or give from=runs/NAME")
    stored = recipes.load(before.recipe)
    if stored.medmoe is None or stored.medmoe.stage != stage - 1:
        what = f"a run of stage {stored.medmoe.stage}" if stored.medmoe else "no run of Med-MoE's stages"
        raise UserError(f"{where}: {what}, must be of stage {stage - 1} (medmoe.stage={stage} starts from it)")
    if not before.model.is_dir() or (stage == 3 and not before.domains.is_dir()):
        raise UserError(f"{where}: the run is not finished; go on with: unimed train {stored.name} --name {before.path.name} --resume")
    for part in ("vision", "connector", "language"):
        ours, theirs = (recipes.flat(getattr(one, part)) for one in (recipe, stored))
        if changed := next((key for key in ours if key != "freeze" and ours[key] != theirs[key]), None):
            what = f"{part}.{changed}={ours[changed]!r}: the run in {where} has {theirs[changed]!r}"
            raise UserError(f"{what}, and its model is the start; leave it out")
    if stage == 3:
        for key in ("layers", "router_layers", "domains"):
            ours, theirs = getattr(recipe.medmoe, key), getattr(stored.medmoe, key)
            if ours != theirs:
                raise UserError(f"medmoe.{key}={ours!r}: the router in {where} was trained with {theirs!r}; keep that")


def start(recipe: Recipe) -> tuple[Any, Any]:
    """The model of the run before and its processor; in stage 3 upcycled, with the router that stage 2 trained."""
    from unimed.models.load import load

    require(recipe)
    assert recipe.medmoe is not None
    before = Run(recipe.source)
    model, processor = load(before.model)
    if absent := [task for task in recipe.data.tasks if recipes.TASKS[task].needs_image and task not in processor.tasks]:
        raise UserError(f"data.tasks: the model in from={recipe.source!r} has no task {', '.join(absent)}; name it in stage 1")
    if recipe.medmoe.stage == 3 and not recipe.medmoe.dense:
        from unimed.models.medmoe import load_router, upcycle

        upcycle(model, part="language_model", **recipe.medmoe.upcycling)
        if recipe.medmoe.router == "frozen":
            load_router(model, before.domains / ROUTER_FILE)
    model.config.training = {"recipe": recipe.name, "description": recipe.description}
    set_trainable(model, recipe)
    return model.train(), processor


def set_trainable(model: Any, recipe: Recipe) -> None:
    """Stage 1: the connector; 2: the language model, too; both: a tower that is not frozen. 3: experts and meta expert, nothing else
    but a learned router; of a dense model the FFNs in their places."""
    from unimed.models.medmoe import moe_layers
    from unimed.models.medmoe.upcycling import ffns_at

    assert recipe.medmoe is not None
    stage, config = recipe.medmoe.stage, model.config
    config.freeze_vision = recipe.vision.freeze or stage == 3
    config.freeze_connector, config.freeze_language = stage == 3, stage != 2
    model.requires_grad_(True)
    model.set_trainable()
    if stage == 3:
        trained = ffns_at(model, "language_model", recipe.medmoe.layers) if recipe.medmoe.dense else moe_layers(model)
        for layer in trained.values():
            layer.requires_grad_(True)


# Domains and the router


def domain(settings: MedMoE, item: Item) -> int | None:
    """The place of an item's domain, which is its expert's; None for text, and for an image that no domain has."""
    if item.image is None:
        return None
    name = f"{item.dataset}/{item.subject}/{item.task}"
    return next((place for place, found in enumerate(settings.domains.values()) if any(fnmatchcase(name, one) for one in found)), None)


def labelled(settings: MedMoE, items: Sequence[Item], most: int, seed: int) -> list[tuple[Item, int]]:
    """At most `most` items with their domains, in a random order."""
    order = list(range(len(items)))
    random.Random(seed).shuffle(order)
    found: list[tuple[Item, int]] = []
    for place in order:
        item = items[place]
        if (label := domain(settings, item)) is not None:
            found.append((item, label))
            if len(found) == most:
                break
    return found


def batches(model: Any, processor: Any, found: Sequence[tuple[Item, int]], batch_size: int = BATCH) -> Iterator[tuple[dict[str, Any], Any]]:
    """Questions with their answers as the model reads them, and labels, for `train_router` and `router_accuracy`."""
    import torch

    from unimed.tasks import prompts
    from unimed.train.collate import Collator, Sample

    device = next(model.parameters()).device
    for first in range(0, len(found), batch_size):
        part = found[first : first + batch_size]
        samples = [Sample(item.task, prompts.chat(prompts.instruction(item, None)), item.answer, item.open()) for item, _ in part]
        inputs = {name: value.to(device) for name, value in Collator(processor)(samples).items() if name not in ("labels", "sample_tasks")}
        yield inputs, torch.tensor([label for _, label in part])


def router_items(recipe: Recipe, items: Sequence[Item]) -> tuple[list[tuple[Item, int]], dict[str, int]]:
    """The labelled items that the router learns from, and how many each domain has.

    Raises:
        UserError: a domain has none.
    """
    settings = recipe.medmoe
    assert settings is not None
    found = labelled(settings, items, settings.router_samples, recipe.train.seed)
    counts = {name: sum(label == place for _, label in found) for place, name in enumerate(settings.domains)}
    if empty := [name for name, count in counts.items() if not count]:
        raise UserError(f"medmoe.domains: no image of {', '.join(map(repr, empty))} among {len(found)} labelled training items")
    return found, counts


def train_domains(recipe: Recipe, items: Sequence[Item], held_out: Sequence[Item], folder: Run) -> None:
    """Trains the router on the saved model of stage 2 (that in memory may be dealt out), and writes it with the domain of each expert.

    Routers of fewer labels are trained and measured on the held-out items first, if there are any.
    """
    from unimed.models.load import load, pick_device
    from unimed.models.medmoe import label_curve, save_router, train_router, upcycle

    found, counts = router_items(recipe, items)
    settings = recipe.medmoe
    assert settings is not None
    model, processor = load(folder.model)
    upcycle(model.to(pick_device("auto")), part="language_model", **settings.upcycling | {"router": "frozen"})
    asked: Any = {"steps": settings.router_steps, "lr": settings.router_lr, "seed": recipe.train.seed}
    record: dict[str, Any] = {"experts": list(settings.domains), "labelled": counts, "labels": {}}
    if measured := labelled(settings, held_out, MEASURED, recipe.train.seed):
        fewer = [*(count for count in FEWER if count < len(found)), len(found)]
        curve = label_curve(model, batches(model, processor, found), batches(model, processor, measured), fewer, **asked)
        record["labels"] = {count: accuracy._asdict() for count, accuracy in curve.items()}
    record["training"] = train_router(model, batches(model, processor, found), **asked)._asdict()

    def fill(place: Path) -> None:
        save_router(model, place / ROUTER_FILE)
        io.write_json(place / DOMAINS_FILE, record)

    io.write_folder(folder.domains, fill)
