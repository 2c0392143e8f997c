"""The majority answer: what the training set says most often for a question of this kind."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence

import numpy as np

from unimed.errors import UserError
from unimed.records.box import to_text
from unimed.records.example import Example
from unimed.tasks.task import TASKS, task_of


class MajorityAnswers:
    """The task's majority of the training answers to each question template: the most frequent answer, for refer the mean box.

    A template that training does not have falls back to the most frequent answer (the mean box) of the whole task. Ties go to the answer
    that training has first.
    """

    def __init__(self, answers: dict[str, str], fallback: dict[str, str]) -> None:
        self._answers = answers
        self._fallback = fallback
        self.tasks = frozenset(fallback)  # those that the training examples have

    @classmethod
    def fit(cls, train_examples: Iterable[Example]) -> "MajorityAnswers":
        """Counts answers and averages boxes (0 to 100, each axis by its own image)."""
        by_template: dict[tuple[str, str], list[Example]] = defaultdict(list)
        by_task: dict[str, list[Example]] = defaultdict(list)
        for example in train_examples:
            by_template[example.task, example.template].append(example)
            by_task[task_of(example).tag].append(example)
        answers = {template: TASKS[task].majority(found) for (task, template), found in by_template.items()}
        return cls(answers, {task: TASKS[task].majority(found) for task, found in by_task.items()})

    def predict(self, example: Example) -> str:
        """The answer for an example, from its template alone."""
        answer = self._answers.get(example.template, self._fallback.get(example.task))
        if answer is None:
            raise UserError(f"{example.id}: nothing was fitted for task {example.task!r}")
        return answer


def most_frequent(examples: Sequence[Example]) -> str:
    """The answer that most examples have; of several, the first."""
    return Counter(example.answer for example in examples).most_common(1)[0][0]


def mean_box(examples: Sequence[Example]) -> str:
    """The mean box, as text."""
    scaled = [
        np.asarray(example.box) * 100 / np.asarray(example.size * 2)
        for example in examples
        if example.box is not None and example.size is not None
    ]
    if not scaled:
        raise UserError(f"{examples[0].id}: a {examples[0].task} example needs a box and the image's size")
    x1, y1, x2, y2 = np.mean(scaled, axis=0)
    return to_text((x1, y1, x2, y2), (100, 100))
