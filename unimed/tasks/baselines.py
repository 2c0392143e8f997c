"""The majority answer: what the training set says most often for a question of this kind."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence

import numpy as np

from unimed.errors import UserError
from unimed.records.box import to_text
from unimed.tasks.item import Item
from unimed.tasks.task import TASKS, task_of


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
        """Counts answers and averages boxes (0 to 100, each axis by its own image)."""
        by_template: dict[tuple[str, str], list[Item]] = defaultdict(list)
        by_task: dict[str, list[Item]] = defaultdict(list)
        for item in train_items:
            by_template[item.task, item.template].append(item)
            by_task[task_of(item).tag].append(item)
        answers = {template: TASKS[task].majority(found) for (task, template), found in by_template.items()}
        return cls(answers, {task: TASKS[task].majority(found) for task, found in by_task.items()})

    def predict(self, item: Item) -> str:
        """The answer for an item, from its template alone."""
        answer = self._answers.get(item.template, self._fallback.get(item.task))
        if answer is None:
            raise UserError(f"{item.id}: nothing was fitted for task {item.task!r}")
        return answer


def most_frequent(items: Sequence[Item]) -> str:
    """The answer that most items have; of several, the first."""
    return Counter(item.answer for item in items).most_common(1)[0][0]


def mean_box(items: Sequence[Item]) -> str:
    """The mean box, as text."""
    scaled = [np.asarray(item.box) * 100 / np.asarray(item.size * 2) for item in items if item.box is not None and item.size is not None]
    if not scaled:
        raise UserError(f"{items[0].id}: a {items[0].task} item needs a box and the image's size")
    x1, y1, x2, y2 = np.mean(scaled, axis=0)
    return to_text((x1, y1, x2, y2), (100, 100))
