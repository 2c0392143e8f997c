"""The majority answer: what the training set says most often for a question of this kind."""

from collections import Counter
from collections.abc import Iterable
from typing import Any

import numpy as np

from unimed.errors import UserError
from unimed.records.box import to_text
from unimed.tasks.item import Item
from unimed.tasks.task import Majority, task_of


class MajorityAnswers:
    """The task's majority of the training answers to each question template: the most frequent answer, for refer the mean box.

    A template that training does not have falls back to the most frequent answer (the mean box) of the whole task. Ties go to the answer
    that training has first.
    """

    def __init__(self, answers: dict[str, str], fallback: dict[str, str]) -> None:
        self._answers = answers
        self._fallback = fallback
        self.tasks = frozenset(fallback)  # those that the training items have

    @classmethod
    def fit(cls, train_items: Iterable[Item]) -> "MajorityAnswers":
        """Counts answers and averages boxes (0 to 100, each axis by its own image). No item is kept."""
        by_template: dict[Any, Majority] = {}
        by_task: dict[Any, Majority] = {}
        for item in train_items:
            for counters, key in ((by_template, (item.task, item.template)), (by_task, item.task)):
                if key not in counters:
                    counters[key] = task_of(item).majority()
                counters[key].add(item)
        answers = {template: found.answer() for (_, template), found in by_template.items()}
        return cls(answers, {task: found.answer() for task, found in by_task.items()})

    def predict(self, item: Item) -> str:
        """The answer for an item, from its template alone."""
        answer = self._answers.get(item.template, self._fallback.get(item.task))
        if answer is None:
            raise UserError(f"{item.id}: nothing was fitted for task {item.task!r}")
        return answer


class MostFrequent:
    """The answer that most items have; of several, the first."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()

    def add(self, item: Item) -> None:
        self._counts[item.answer] += 1

    def answer(self) -> str:
        return self._counts.most_common(1)[0][0]


class MeanBox:
    """The mean box, as text."""

    def __init__(self) -> None:
        self._sum, self._count = np.zeros(4), 0
        self._without = ""  # the first item that has none

    def add(self, item: Item) -> None:
        if item.box is not None and item.size is not None:
            self._sum += np.asarray(item.box) * 100 / np.asarray(item.size * 2)
            self._count += 1
        elif not self._without:
            self._without = f"{item.id}: a {item.task} item"

    def answer(self) -> str:
        if not self._count:
            raise UserError(f"{self._without} needs a box and the image's size")
        x1, y1, x2, y2 = self._sum / self._count
        return to_text((x1, y1, x2, y2), (100, 100))
