"""Scores by data set, by modality and by organ, of the same answers as the whole table.

Modality and organ are those of the records (`records.record`), in one spelling. An item whose record names none is listed as `UNKNOWN`, one
without an image as `NO_IMAGE`: the groups of a table hold every item once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from unimed.evaluate import intervals
from unimed.evaluate.evaluate import TRAINED
from unimed.tasks import TASKS, metrics
from unimed.tasks.item import Item

UNKNOWN, NO_IMAGE = "unknown", "no image"
_SPELLINGS = {
    "CT": ("ct", "computed tomography", "cat"),
    "MRI": ("mri", "mr", "magnetic resonance", "magnetic resonance imaging"),
    "X-ray": ("x-ray", "xray", "x ray", "cr", "dx", "cxr", "radiograph", "radiography"),
    "ultrasound": ("ultrasound", "us", "echo", "ultrasonography"),
    "PET": ("pet", "pt"),
    "mammography": ("mammography", "mg"),
    "pathology": ("pathology", "histopathology", "histology", "sm"),
    "fundus": ("fundus", "fundus photography", "op"),
    "OCT": ("oct", "opt"),
    "endoscopy": ("endoscopy", "es"),
    "dermatoscopy": ("dermatoscopy", "dermoscopy"),
}
_MODALITY = {spelling: name for name, spellings in _SPELLINGS.items() for spelling in spellings}


def modality(item: Item) -> str:
    """The modality in one spelling; a name that is not listed here as it is."""
    return _MODALITY.get(item.modality.strip().lower(), item.modality.strip()) or _unnamed(item)


def organ(item: Item) -> str:
    return " ".join(item.organ.replace("_", " ").split()).lower() or _unnamed(item)


def _unnamed(item: Item) -> str:
    return NO_IMAGE if item.image is None and not TASKS[item.task].needs_image else UNKNOWN


KINDS: dict[str, Callable[[Item], str]] = {"dataset": lambda item: item.dataset, "modality": modality, "organ": organ}


def tables(items: Sequence[Item], rows: Mapping[str, Scored], shown: str) -> dict[str, Any]:
    """Kind -> group -> task -> {"count", "rows": {row: {metric: score}}, "drawn", "intervals": {metric: [lowest, highest]}}.

    `shown` is the row that has intervals. Groups come in the order of their items, the largest first; `UNKNOWN` and `NO_IMAGE` last.
    """
    found: dict[str, Any] = {}
    for kind, name_of in KINDS.items():
        places: dict[str, dict[str, list[int]]] = {}
        for place, item in enumerate(items):
            places.setdefault(name_of(item), {}).setdefault(item.task, []).append(place)
        ordered = sorted(places, key=lambda name: (name in (UNKNOWN, NO_IMAGE), -sum(map(len, places[name].values()))))
        found[kind] = {
            name: {task: _one(items, rows, shown, task, places[name][task]) for task in TASKS if task in places[name]} for name in ordered
        }
    return found


def _one(items: Sequence[Item], rows: Mapping[str, Scored], shown: str, task: str, places: list[int]) -> dict[str, Any]:
    part = [items[place] for place in places]
    scores = {row: value for row, scored in rows.items() if (value := scored.of(task, part, places)) is not None}
    drawn, members = intervals.groups(part)
    each = rows[shown].each(task, places) if shown in rows else None
    ends = dict(zip(table_metrics(task), intervals.interval(each, members), strict=True)) if each is not None else {}
    return {"count": len(part), "rows": scores, "drawn": drawn, "intervals": ends}


def table_metrics(task: str) -> list[str]:
    """The metrics of a task that tables show: headline and strict."""
    return list(dict.fromkeys((TASKS[task].headline, TASKS[task].strict)))


def group_table(result: dict[str, Any], kind: str, names: Mapping[str, str], most: int = 0) -> tuple[list[str], list[list[str]], int]:
    """Header and lines of a table of the trained row by group, and how many smaller groups of a split are left out beyond `most`.

    names: task -> metric. A cell has the score and the number of items.
    """
    tasks = [task for task in TASKS if any(task in part["counts"] for part in result["splits"].values())]
    lines, left = [], 0
    for part in result["splits"].values():
        found = part["groups"][kind]
        chosen = list(found)[: most or None]
        left += len(found) - len(chosen)
        for group in chosen:
            lines.append([part["name"], group, *(_cell(found[group].get(task), names[task]) for task in tasks)])
    return ["split", kind, *(f"{task}\n{names[task].removesuffix('_strict')}" for task in tasks)], lines, left


def _cell(one: dict[str, Any] | None, metric: str) -> str:
    value = one["rows"].get(TRAINED, {}).get(metric) if one else None
    return "" if one is None else f"{'–' if value is None else f'{value:.3f}'} ({one['count']:,})"


class Scored:
    """The answers of one row with the score of each, where the score of all is their mean."""

    def __init__(self, items: Sequence[Item], predictions: Sequence[str | None], whole: Mapping[str, Mapping[str, float]]) -> None:
        self.predictions = predictions
        self._each: dict[str, np.ndarray | None] = {}
        self._at: dict[int, int] = {}
        by_task: dict[str, list[int]] = {}
        for place, item in enumerate(items):
            by_task.setdefault(item.task, []).append(place)
        for task, places in by_task.items():
            self._at |= {place: at for at, place in enumerate(places)}
            texts = [text for place in places if (text := predictions[place]) is not None]
            part = [items[place] for place in places]
            all_there = len(texts) == len(part)
            self._each[task] = intervals.singles(task, part, texts, table_metrics(task), whole[task]) if all_there else None

    def each(self, task: str, places: Sequence[int]) -> np.ndarray | None:
        """[places, metrics of the table]: the scores of these answers; None where no mean of them is the score of all."""
        found = self._each[task]
        return None if found is None else found[[self._at[place] for place in places]]

    def of(self, task: str, part: Sequence[Item], places: Sequence[int]) -> dict[str, float] | None:
        """The scores of some answers; None where some of them are missing."""
        names, each = table_metrics(task), self.each(task, places)
        if each is not None:
            return dict(zip(names, map(float, each.mean(0)), strict=True))
        texts = [text for place in places if (text := self.predictions[place]) is not None]
        if len(texts) < len(part):
            return None
        found = metrics.score(task, texts, part, coco=False)
        return {name: float(found[name]) for name in names if name in found}
