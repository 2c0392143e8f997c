"""What a run did inside: `unimed analyze RUN` writes RUN/analysis/.

    analysis.json   what was found, from what, and what the run lacks
    pairs.csv       direction, magnitude and interference of each pair of tasks, by step and module; a task with itself: its two halves
    modules.csv     interference, statistics score and their means
    layers.csv      change of each layer, and how much it served each task
    gates.csv       gate and load of each expert and entropy by task over training
    regions.csv     mean gate of each expert by task and patch of the picture
    features.csv    held-out images on three principal components before and after the connector
    *.png           the same as pictures

The points are those of `train.probe_every`. A run without them is measured at its checkpoints, in the same way. Definitions: `train.probe`.
"""

from __future__ import annotations

import csv
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from unimed import io
from unimed.errors import UserError
from unimed.inference.files import RECIPE_FILE
from unimed.notice import NOTICE
from unimed.studies.features import Features, features, principal, silhouette
from unimed.tasks.item import Item
from unimed.train import recipe as recipes
from unimed.train.folder import Run
from unimed.train.probe import InterferenceProbe, halves_of, interference, number

FOLDER, FILE = "analysis", "analysis.json"
IMAGES = 40  # of each task, for features and regions
Say = Callable[[str], None]


def analyze(run: Path, say: Say = lambda text: None, device: str = "auto", overrides: Sequence[str] | None = None) -> dict[str, Any]:
    """Writes RUN/analysis/, whole or not at all, and returns what analysis.json says.

    ``overrides`` of the run's recipe: other data (data.root=...), other splits (evaluate.splits=[...]).
    """
    folder = Run(run)
    if not folder.recipe.is_file():
        raise UserError(f"{run}: not a run of unimed (no {RECIPE_FILE}); train one with: unimed train tiny")
    recipe = recipes.load(folder.recipe, list(overrides or []))
    if recipe.train.threads:
        torch.set_num_threads(recipe.train.threads)
    if not folder.checkpoints() and not (folder.model / "config.json").is_file() and not (folder.model / "adapter_config.json").is_file():
        raise UserError(f"{run}: no model and no checkpoint there yet; go on with: unimed train --name {run.name} --resume")
    lacks: list[str] = []
    say("gradients of the tasks")
    points, source = _points(folder, recipe, lacks)
    history = io.read_json(folder.router) if folder.router.is_file() else []
    if not history:
        lacks.append(f"gates over training: no {folder.router.name}, or no image passed the connector")
    say("images before and after the connector")
    found = _features(run, recipe, device, lacks)
    result: dict[str, Any] = {
        "notice": NOTICE,
        "run": recipe.name,
        "source": source,
        "steps": [point["step"] for point in points],
        "modules": summary(points),
        "features": spread_of(found) if found else {},
        "lacks": lacks,
        "plots": [],
    }

    def fill(place: Path) -> None:
        result["plots"] = _plots(place, points, history, found, lacks, say)
        _tables(place, points, history, found)
        io.write_json(place / FILE, result)

    io.write_folder(run / FOLDER, fill)
    return result


# What is measured


def read_points(path: Path) -> list[dict[str, Any]]:
    """The points of a probe, by step; a line that is none is named."""
    found = {}
    for row, line in enumerate(io.written_lines(path), 1):
        if not isinstance(line.get("step"), int) or not isinstance(line.get("modules"), dict) or not isinstance(line.get("layers"), list):
            raise UserError(f"{path}:{row}: not a point of a probe (step, modules, layers); move this file away")
        found[line["step"]] = line
    return [found[step] for step in sorted(found)]


def _points(folder: Run, recipe: recipes.Recipe, lacks: list[str]) -> tuple[list[dict[str, Any]], str]:
    """The points of the run, and what they come from."""
    if points := read_points(folder.probe):
        return points, folder.probe.name
    every = recipe.train.probe_every
    why = f"train.probe_every={every} has no point in {recipe.train.max_steps} steps" if every else "train.probe_every=0"
    lacks.append(f"points of training ({why}): measured at the checkpoints that are there")
    try:
        points = _at_checkpoints(folder, recipe)
    except UserError as error:
        lacks.append(f"gradients of the tasks: {error}")
        return [], ""
    if len(points) < 2:
        lacks.append("changes of the layers: they need two checkpoints")
    return points, "checkpoints"


def _at_checkpoints(folder: Run, recipe: recipes.Recipe) -> list[dict[str, Any]]:
    from unimed.models.load import load
    from unimed.train.collate import Collator, TrainingSet
    from unimed.train.run import items

    train_items = items(recipe, "train")
    places = {int(path.name.rpartition("-")[2]): path for path in folder.checkpoints()}
    steps = io.read_json(folder.record)["steps"] if folder.record.is_file() else None
    if steps is not None:
        places.setdefault(steps, folder.model)
    points, probe = [], None
    for step, place in sorted(places.items()):
        model, processor = load(place, trainable=True)
        if probe is None:
            data = TrainingSet(train_items, recipe.augment, model.config.vision_config.image_size)
            probe = InterferenceProbe(1, halves_of(data, Collator(processor)), folder.probe)
        points.append(probe.measure(model, step))
    return points


def _features(run: Path, recipe: recipes.Recipe, device: str, lacks: list[str]) -> Features | None:
    from unimed.inference.session import load

    try:
        items = held_out(recipe)
        found = features(load(run if Run(run).record.is_file() else Run(run).checkpoints()[-1], device), items)
    except UserError as error:
        lacks.append(f"images before and after the connector, and gates over the picture: {error}")
        return None
    if len(found.items) < 2:
        lacks.append("images before and after the connector: the data has fewer than two")
        return None
    return found


def held_out(recipe: recipes.Recipe, most: int = IMAGES) -> list[Item]:
    """Items with an image of the first split to evaluate that the data has, evenly spaced over each task."""
    from unimed.errors import NoItems
    from unimed.evaluate.evaluate import spread
    from unimed.train.run import items

    for split in (*recipe.evaluate.splits, "test", "train"):
        try:
            return [item for item in spread(items(recipe, split), most) if item.image is not None]
        except NoItems:
            continue
    raise UserError(f"{recipe.data.where}: no item of the tasks {', '.join(recipe.data.tasks)}")


def summary(points: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float | None]]:
    """By module the means over the points: statistics, and of direction and magnitude those of pairs and of split halves.

    Interference is that of the means over the points, which have less noise than one point, and then the mean over the pairs of tasks.
    """
    values: dict[str, dict[str, list[float]]] = {}
    for point in points:
        for module, found in point["modules"].items():
            numbers: dict[str, list[float | None]] = {"interference": _pulls(points, module), "statistics": [found["statistics"]]}
            for name in ("direction", "magnitude"):
                numbers[name] = [pair[name] for pair in found["pairs"]]
                numbers[f"{name} of halves"] = [one["split"][name] for one in found["tasks"].values()]
            for name, some in numbers.items():
                values.setdefault(module, {}).setdefault(name, []).extend(value for value in some if value is not None)
    return {
        module: {name: statistics.fmean(some) if some else None for name, some in numbers.items()} for module, numbers in values.items()
    }


def _pulls(points: Sequence[Mapping[str, Any]], module: str) -> list[float | None]:
    """The interference of each pair of tasks over all points."""
    parts = [point["modules"][module] for point in points if module in point["modules"]]
    cells: dict[tuple[str, ...], list[float]] = {}
    for part in parts:
        for pair in part["pairs"]:
            cells.setdefault(tuple(pair["tasks"]), []).append(math.nan if pair["halves"] is None else pair["halves"])
        for task, one in part["tasks"].items():
            direction = one["split"]["direction"]
            cells.setdefault((task,), []).append(math.nan if direction is None else direction)
    means = {key: statistics.fmean(some) for key, some in cells.items()}
    return [number(interference(means[key], means[key[:1]], means[key[1:]])) for key in means if len(key) == 2]


def spread_of(found: Features) -> dict[str, Any]:
    """Silhouettes by task before and after the connector."""
    return {name: silhouette(x, found.tasks) for name, x in (("before", found.before), ("after", found.after))}


# What is written


def _table(path: Path, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows([["" if value is None else value for value in row] for row in rows])


def _tables(place: Path, points: Sequence[Mapping[str, Any]], history: Sequence[Mapping[str, Any]], found: Features | None) -> None:
    modules = [(point["step"], name, part) for point in points for name, part in point["modules"].items()]
    pairs = [
        (step, name, *pair["tasks"], pair["direction"], pair["magnitude"], pair["halves"], pair["interference"])
        for step, name, part in modules
        for pair in part["pairs"]
    ]
    pairs += [
        (step, name, task, task, one["split"]["direction"], one["split"]["magnitude"], None, None)
        for step, name, part in modules
        for task, one in part["tasks"].items()
    ]
    _table(place / "pairs.csv", ("step", "module", "task", "other", "direction", "magnitude", "halves", "interference"), pairs)
    _table(
        place / "modules.csv",
        ("step", "module", "parameters", "interference", "statistics", "error"),
        [(step, name, part["parameters"], part["interference"], part["statistics"], part.get("error")) for step, name, part in modules],
    )
    _table(
        place / "layers.csv",
        ("step", "module", "layer", "parameters", "change", "statistics", "task", "served"),
        [
            (point["step"], one["module"], one["name"], one["parameters"], one["change"], one["statistics"], task, value)
            for point in points
            for one in point["layers"]
            for task, value in (one["served"] or {"": None}).items()
        ],
    )
    _table(
        place / "gates.csv",
        ("step", "task", "expert", "gate", "load", "entropy"),
        [
            (entry["step"], task, expert + 1, one["gates"][expert], one["load"][expert], one["entropy"])
            for entry in history
            for task, one in entry["tasks"].items()
            for expert in range(len(one["gates"]))
        ],
    )
    if found is None:
        return
    names = [f"{side}_{axis}" for side in ("before", "after") for axis in (1, 2, 3)]
    coordinates = [principal(x)[0] for x in (found.before, found.after)]
    wide = [np.pad(one, ((0, 0), (0, 3 - one.shape[1]))) for one in coordinates]
    rows = [(item.id, item.task, *map(_digits, (*one, *other))) for item, one, other in zip(found.items, *wide, strict=True)]
    _table(place / "features.csv", ("item", "task", *names), rows)
    _table(
        place / "regions.csv",
        ("task", "row", "column", "expert", "gate"),
        [
            (task, y, x, expert + 1, _digits(value))
            for task, maps in region_means(found).items()
            for (y, x, expert), value in np.ndenumerate(maps)
        ],
    )


def _digits(value: float) -> float:
    return float(f"{value:.6g}")


def region_means(found: Features) -> dict[str, np.ndarray]:
    """By task the mean gates by patch [rows, columns, E]."""
    by_task: dict[str, list[np.ndarray]] = {}
    for task, maps in zip(found.tasks, found.maps, strict=True):
        if maps is not None:
            by_task.setdefault(task, []).append(maps)
    return {task: np.mean(some, axis=0) for task, some in by_task.items()}


def _plots(
    place: Path,
    points: Sequence[Mapping[str, Any]],
    history: Sequence[Mapping[str, Any]],
    found: Features | None,
    lacks: list[str],
    say: Say,
) -> list[dict[str, str]]:
    """Draws what there is; file, title and a sentence of each plot."""
    from unimed.report import analysis as draw

    made: list[dict[str, str]] = []

    def add(name: str, title: str, text: str) -> Path:
        say(title.lower())
        made.append({"file": f"{name}.png", "title": title, "text": text})
        return place / f"{name}.png"

    if points:
        draw.pulls(
            {"run": points},
            add(
                "pulls",
                "Interference and statistics score",
                "Interference: 0 where two tasks agree as well as each one with itself, 1/2 where they have nothing to do with each "
                "other, 1 where one undoes the other. Statistics: 1 where the change of the weights serves every task, -1 where it harms "
                "all. Both are our definitions.",
            ),
        )
        draw.agreement(
            {module: (points, module) for module in draw.modules_in(points)},
            add(
                "agreement",
                "Direction and magnitude of the gradients",
                "Means over the points of training. On the diagonal, bold: the two halves of one task, which is what noise leaves.",
            ),
        )
        draw.changes(
            points,
            add("changes", "Change of the layers", "Right: whether the last change went where the loss of a task falls (1) or rises (-1)."),
        )
    if history and len(next(iter(history[0]["tasks"].values()))["gates"]) > 1:
        text = "Entropy in shares of log E: 1 where all experts are alike. Load: how often an expert is a token's first."
        draw.experts(history, add("experts", "Experts over training", text))
    pictures = _pictures(found) if found else []
    if pictures:
        text = "One held-out picture of each task. Colour: clear where the expert's gate is lowest, strongest where it is highest."
        draw.regions(pictures, add("regions", "Gates over the picture", text))
    elif found:
        lacks.append("gates over the picture: this router's gates are the same everywhere in it, or there is one expert")
    if found:
        panels = {}
        for title, x in (("before the connector", found.before), ("after the connector", found.after)):
            coordinates, shares = principal(x)
            panels[title] = (coordinates, found.tasks, shares, silhouette(x, found.tasks).get("all"))
        text = "Held-out images, the mean over an image's tokens. Silhouette by task: 1 where tasks lie far apart, 0 where they mix."
        draw.spread(panels, add("features", "Images before and after the connector", text))
    return made


def _pictures(found: Features) -> list[tuple[str, Any, np.ndarray]]:
    """Of each task the picture that shows most, by its shorter side, of those whose gates differ from place to place."""
    by_task: dict[str, list[int]] = {}
    for at, (task, maps) in enumerate(zip(found.tasks, found.maps, strict=True)):
        if maps is not None and maps.shape[2] > 1 and float(np.ptp(maps, axis=(0, 1)).max()) > 1e-6:
            by_task.setdefault(task, []).append(at)
    chosen = []
    for task, places in by_task.items():
        image, maps = max(((found.items[at].open(), found.maps[at]) for at in places), key=lambda one: min(one[0].size))
        assert maps is not None
        chosen.append((task, image, maps))
    return chosen
