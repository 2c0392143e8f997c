"""How far a score may be off: 95 % intervals by the bootstrap, over patients where the data names enough of them.

Patients are drawn with replacement, each with all of its items; the interval holds the middle 95 % of the scores. With fewer than
`FEWEST` patients images are drawn, and for text questions the questions.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from unimed.records.pixels import View
from unimed.tasks import metrics
from unimed.tasks.item import Item

FEWEST = 10  # patients
DRAWS = 1000
SHARE = 0.95


def groups(items: Sequence[Item]) -> tuple[str, list[Any]]:
    """What is drawn (patients, images or questions), and the one that each item belongs to."""
    patients = [(item.dataset, item.subject) for item in items]
    if all(item.subject for item in items) and len(set(patients)) >= FEWEST:
        return "patients", patients
    if all(item.image is not None for item in items):
        return "images", [_image(item) for item in items]
    return "questions", list(range(len(items)))


def _image(item: Item) -> Any:
    image = item.image
    if isinstance(image, np.ndarray):
        return hashlib.sha256(repr(image.shape).encode() + np.ascontiguousarray(image).tobytes()).hexdigest()
    return image if isinstance(image, View) else Path(str(image))


def singles(
    task: str, items: Sequence[Item], predictions: Sequence[str], names: Sequence[str], whole: Mapping[str, float] | None = None
) -> np.ndarray | None:
    """[items, names]: the score of each answer. None unless their means are the scores of all, which is what the bootstrap needs.

    whole: the scores of all, where they are known.
    """
    each = np.array([[one[name] for name in names] for one in _scores(task, items, predictions)])
    whole = whole or metrics.score(task, predictions, items, coco=False)
    return each if np.allclose(each.mean(0), [whole[name] for name in names], atol=1e-9) else None


def _scores(task: str, items: Sequence[Item], predictions: Sequence[str]) -> list[dict[str, float]]:
    """The scores of each answer; the same answer to the same question is scored once."""
    seen: dict[Any, dict[str, float]] = {}
    found = []
    for item, text in zip(items, predictions, strict=True):
        key = (text, item.question, item.answer, item.answer_type, item.box, item.size)
        if key not in seen:
            seen[key] = metrics.score(task, [text], [item], coco=False)
        found.append(seen[key])
    return found


def draws(members: Sequence[Any], seed: int = 0) -> np.ndarray:
    """[DRAWS, items]: how often each item is in each draw of whole groups."""
    place = {member: at for at, member in enumerate(dict.fromkeys(members))}
    of, count = np.array([place[member] for member in members]), len(place)
    drawn = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=DRAWS)
    return drawn[:, of]


def interval(each: np.ndarray, members: Sequence[Any]) -> list[list[float]]:
    """[lowest, highest] of the mean of each column."""
    weights = draws(members)
    means = (weights @ each) / weights.sum(1, keepdims=True)
    tail = 100 * (1 - SHARE) / 2
    low, high = np.percentile(means, [tail, 100 - tail], axis=0)
    return [[float(a), float(b)] for a, b in zip(low, high, strict=True)]
