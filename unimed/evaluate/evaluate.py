"""All six tasks with the released metrics, beside answers that need no image."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from unimed.data.example import TASKS, Example
from unimed.evaluate.predict import answers
from unimed.tasks import metrics
from unimed.tasks.baselines import WithoutLooking

UNTRAINED, WITHOUT_LOOKING, BLANKED, TRAINED = ROWS = ("untrained", "without looking", "image blanked", "trained")


def by_task(examples: Sequence[Example]) -> dict[str, list[Example]]:
    return {task: found for task in TASKS if (found := [example for example in examples if example.task == task])}


def spread(examples: Sequence[Example], limit: int) -> list[Example]:
    """At most `limit` examples of each task, evenly spaced; all of them for 0."""
    kept: list[Example] = []
    for found in by_task(examples).values():
        if limit and len(found) > limit:
            found = [found[i * len(found) // limit] for i in range(limit)]
        kept += found
    return kept


def score(examples: Sequence[Example], predictions: Sequence[str]) -> dict[str, dict[str, float]]:
    """Metrics of every task that has examples."""
    given = {id(example): prediction for example, prediction in zip(examples, predictions, strict=True)}
    with _quiet_programs():
        return {task: metrics.score(task, [given[id(e)] for e in found], found) for task, found in by_task(examples).items()}


@contextmanager
def _quiet_programs() -> Iterator[None]:
    """The Java programs behind BLEU and METEOR write to our standard error by its number; nothing there is an error."""
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def evaluate(
    model: Any,
    processor: Any,
    examples: Sequence[Example],
    batch_size: int = 40,
    blank_images: bool = False,
    progress: Callable[[int], None] | None = None,
    max_new_tokens: int = 100,
) -> dict[str, Any]:
    """{"metrics": {task: {name: value}}, "predictions": [...]}, predictions in the order of the examples."""
    given: dict[int, str] = {}
    for found in by_task(examples).values():  # prompts of one task are about equally long: little padding
        given.update(zip(map(id, found), answers(model, processor, found, batch_size, max_new_tokens, blank_images, progress), strict=True))
    predictions = [given[id(example)] for example in examples]
    return {"metrics": score(examples, predictions), "predictions": predictions}


def compare(
    untrained: tuple[Any, Any] | None,
    trained: tuple[Any, Any],
    train_examples: Sequence[Example],
    held_out: Sequence[Example],
    batch_size: int = 40,
    max_new_tokens: int = 100,
    progress: Callable[[str, int], None] | None = None,
) -> dict[str, dict[str, Any]]:
    """Row name -> {"metrics", "predictions"} on the held-out examples, for the four rows of the table."""

    def run(row: str, pair: tuple[Any, Any], blank_images: bool, examples: Sequence[Example]) -> list[str]:
        report = (lambda count: progress(row, count)) if progress else None
        return evaluate(*pair, examples, batch_size, blank_images, report, max_new_tokens)["predictions"]

    looker = WithoutLooking.fit(train_examples)
    rows: dict[str, list[str]] = {}
    if untrained is not None:
        rows[UNTRAINED] = run(UNTRAINED, untrained, False, held_out)
    rows[WITHOUT_LOOKING] = [looker.predict(example) for example in held_out]
    rows[TRAINED] = run(TRAINED, trained, False, held_out)
    with_image = [example for example in held_out if example.image is not None]
    blind = dict(zip(map(id, with_image), run(BLANKED, trained, True, with_image), strict=True))
    # A question without an image has the same answer with the image blanked.
    rows[BLANKED] = [blind.get(id(example), answer) for example, answer in zip(held_out, rows[TRAINED], strict=True)]
    return {row: {"metrics": score(held_out, rows[row]), "predictions": rows[row]} for row in ROWS if row in rows}


def verdict(rows: dict[str, dict[str, Any]]) -> dict[str, bool]:
    """Task -> whether the trained model's headline metric beats both the answers without looking and its own with the image blanked."""
    result = {}
    for task in rows[TRAINED]["metrics"]:
        value = {row: rows[row]["metrics"][task][metrics.HEADLINE[task]] for row in (WITHOUT_LOOKING, BLANKED, TRAINED)}
        result[task] = value[TRAINED] > max(value[WITHOUT_LOOKING], value[BLANKED])
    return result
