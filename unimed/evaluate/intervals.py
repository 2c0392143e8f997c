"""How far a score may be off: 95 % intervals by the bootstrap, over patients where the data names enough of them.

Patients are drawn with replacement, each with all of its examples; the interval holds the middle 95 % of the scores. With fewer than
`FEWEST` patients images are drawn, and for text questions the questions.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from unimed.records.example import Example, View
from unimed.tasks import metrics

FEWEST = 10  # patients
DRAWS = 1000
SHARE = 0.95


def groups(examples: Sequence[Example]) -> tuple[str, list[Any]]:
    """What is drawn (patients, images or questions), and the one that each example belongs to."""
    patients = [(example.dataset, example.subject) for example in examples]
    if all(example.subject for example in examples) and len(set(patients)) >= FEWEST:
        return "patients", patients
    if all(example.image is not None for example in examples):
        return "images", [_image(example) for example in examples]
    return "questions", list(range(len(examples)))


def _image(example: Example) -> Any:
    image = example.image
    if isinstance(image, np.ndarray):
        return hashlib.sha256(repr(image.shape).encode() + np.ascontiguousarray(image).tobytes()).hexdigest()
    return image if isinstance(image, View) else Path(str(image))


def singles(task: str, examples: Sequence[Example], predictions: Sequence[str], names: Sequence[str]) -> np.ndarray | None:
    """[examples, names]: the score of each answer. None unless their means are the scores of all, which is what the bootstrap needs."""
    each = np.array([[one[name] for name in names] for one in _scores(task, examples, predictions)])
    whole = metrics.score(task, predictions, examples, coco=False)
    return each if np.allclose(each.mean(0), [whole[name] for name in names], atol=1e-9) else None


def _scores(task: str, examples: Sequence[Example], predictions: Sequence[str]) -> list[dict[str, float]]:
    """The scores of each answer; the same answer to the same question is scored once."""
    seen: dict[Any, dict[str, float]] = {}
    found = []
    for example, text in zip(examples, predictions, strict=True):
        key = (text, example.question, example.answer, example.answer_type, example.box, example.size)
        if key not in seen:
            seen[key] = metrics.score(task, [text], [example], coco=False)
        found.append(seen[key])
    return found


def draws(members: Sequence[Any], seed: int = 0) -> np.ndarray:
    """[DRAWS, examples]: how often each example is in each draw of whole groups."""
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
