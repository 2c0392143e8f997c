"""severity: a grade out of an ordered list, which the question gives from the lowest to the highest. No release has it.

accuracy    the grade; within_one: it or a neighbour; an answer that names no one grade is wrong in both
kappa       quadratic weighted Cohen's kappa of the answers that name one grade, 0 where it is not defined
"""

from collections.abc import Sequence

import numpy as np

from unimed.data.example import Example
from unimed.tasks import answers
from unimed.tasks.baselines import most_frequent
from unimed.tasks.cls import listed
from unimed.tasks.metrics import standard
from unimed.tasks.metrics.released import mean
from unimed.tasks.task import Task


def grade(example: Example, prediction: str) -> int | None:
    """The place of the grade that a prediction names; None where it names no one grade."""
    says = answers.read(example, prediction).says or frozenset()
    grades = answers.options(example)
    (named,) = says if len(says) == 1 else ("",)
    return grades.index(named) if named in grades else None


def score(predictions: Sequence[str], examples: Sequence[Example], coco: bool | None) -> dict[str, float]:
    grades = [(grade(example, text), grade(example, example.answer)) for example, text in zip(examples, predictions, strict=True)]
    named = [(given, wanted) for given, wanted in grades if given is not None and wanted is not None]
    within = sum(abs(given - wanted) <= 1 for given, wanted in named) / len(examples)
    return standard.accuracy(predictions, examples) | {"within_one": within, "kappa": kappa(named)}


def kappa(pairs: Sequence[tuple[int, int]]) -> float:
    """Quadratic weighted kappa of pairs of grades."""
    given, wanted = np.array(pairs, dtype=float).reshape(-1, 2).T
    if not len(given):
        return 0.0
    by_chance = mean(((given[:, None] - wanted[None]) ** 2).mean(axis=1).tolist())
    return 1 - float(((given - wanted) ** 2).mean()) / by_chance if by_chance else 0.0


TASK = Task(
    tag="severity",
    about="grade of a finding",
    wordings={"": ("{}",)},
    asks="classes",
    listed=listed,
    read=answers.read_text,
    kinds=answers.LISTED,
    score=score,
    is_right=answers.is_it,
    majority=most_frequent,
    headline="accuracy",
    strict="accuracy",
    nature=("equal without case and punctuation; not in the release", "the same"),
)
