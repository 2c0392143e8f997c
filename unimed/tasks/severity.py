"""severity: a grade out of an ordered list, which the question gives from the lowest to the highest. No release has it.

accuracy    the grade is right
within_one  the grade is right or a neighbour; in both, an answer that does not name exactly one grade is wrong
kappa       quadratic weighted Cohen's kappa of the answers that name exactly one grade, 0 where it is not defined
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from unimed.records.policy import BadRecord
from unimed.tasks import answers, cls
from unimed.tasks.asked import Asked
from unimed.tasks.item import Item
from unimed.tasks.metrics import standard
from unimed.tasks.metrics.released import mean


def ask(asked: Asked) -> Item:
    one, grades = asked.annotation, asked.label()
    if not asked.source.graded:
        raise BadRecord("with grades whose order is unknown", f"{asked.where}: dataset.json lists no classes of {one.set!r}")
    question = f"What is the grade of {one.set}: {cls.joint(grades).join(grades)}?"
    return asked.item("severity", question, asked.text(one.value, "value"), f"severity/{one.set}")


def grade(item: Item, prediction: str) -> int | None:
    """The place of the grade that a prediction names; None unless it names exactly one."""
    says = answers.read(item, prediction).says or frozenset()
    grades = answers.options(item)
    (named,) = says if len(says) == 1 else ("",)
    return grades.index(named) if named in grades else None


def score(predictions: Sequence[str], items: Sequence[Item], coco: bool | None) -> dict[str, float]:
    grades = [(grade(item, text), grade(item, item.answer)) for item, text in zip(items, predictions, strict=True)]
    named = [(given, wanted) for given, wanted in grades if given is not None and wanted is not None]
    within = sum(abs(given - wanted) <= 1 for given, wanted in named) / len(items)
    return standard.accuracy(predictions, items) | {"within_one": within, "kappa": kappa(named)}


def kappa(pairs: Sequence[tuple[int, int]]) -> float:
    """Quadratic weighted kappa of pairs of grades."""
    given, wanted = np.array(pairs, dtype=float).reshape(-1, 2).T
    if not len(given):
        return 0.0
    by_chance = mean(((given[:, None] - wanted[None]) ** 2).mean(axis=1).tolist())
    return 1 - float(((given - wanted) ** 2).mean()) / by_chance if by_chance else 0.0


TASK = replace(
    cls.TASK,
    tag="severity",
    makes={"label": ask},
    named=frozenset({"label"}),
    about="grade of a finding",
    score=score,
    strict="accuracy",
    nature=("equal without case and punctuation; not in the release", "the same"),
)
