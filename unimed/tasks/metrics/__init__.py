"""The scores of each task, under three kinds of names.

    f1            the release's formula over every answer; an empty one scores 0. Text QA, which the release does not score: strict
    f1_strict     the same quantity without the release's generosity
    f1_released   caption, and refer's unparsable: the release's own number, where it leaves answers out or reads fewer of them

`released` and `standard` say what each quantity is. Beside them stand `count`, count_open and count_closed (vqa), scored (captions with
text on both sides, which the _released names average) and ptb_tokenizer (caption). Last come the numbers of answers that are empty,
unparsable, inverted, off the list or chatty, as far as the task can have them (`answers`). Every score is between 0 and 1, but for cider.
"""

from collections import Counter
from collections.abc import Sequence

from unimed.errors import UserError
from unimed.tasks import answers
from unimed.tasks.item import Item
from unimed.tasks.task import TASKS, task_of


def score(task: str, predictions: Sequence[str], items: Sequence[Item], coco: bool | None = None) -> dict[str, float]:
    """All scores of one task. ``coco`` (captions only) False leaves out what needs Java; None takes it when it is there."""
    if len(predictions) != len(items):
        raise UserError(f"{task}: {len(predictions)} predictions for {len(items)} items")
    if task not in TASKS:
        raise UserError(f"unknown task {task!r}: expected one of {', '.join(TASKS)}")
    if not items:
        return {"count": 0.0}
    found = TASKS[task].score(predictions, items, coco)
    kinds = Counter(answers.read(item, given).kind for given, item in zip(predictions, items, strict=True))
    return {"count": float(len(items)), **found, **{kind: float(kinds[kind]) for kind in TASKS[task].kinds}}


def is_right(item: Item, prediction: str) -> bool:
    """Whether one answer is right, strictly: a box by its IoU, anything else when it is the reference."""
    return task_of(item).is_right(item, prediction)


def strictly(found: dict[str, float]) -> dict[str, float]:
    """The same values under strict names."""
    return {f"{name}_strict": value for name, value in found.items()}
