"""All tasks with the released metrics, beside answers that need no image."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from unimed.inference.session import Session
from unimed.records.example import Example
from unimed.tasks import TASKS, metrics
from unimed.tasks.baselines import MajorityAnswers
from unimed.tasks.protocol import RELEASED, Protocol

UNTRAINED, MAJORITY, BLANKED, TRAINED = ROWS = ("untrained", "majority answer", "image blanked", "trained")


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


def score(examples: Sequence[Example], predictions: Sequence[str | None]) -> dict[str, dict[str, float]]:
    """Metrics of every task that has answers; None is an example without one (a baseline that was not fitted for its task)."""
    answered = [(example, text) for example, text in zip(examples, predictions, strict=True) if text is not None]
    result = {}
    with _quiet_programs():
        for task in by_task([example for example, _ in answered]):
            part = [(example, text) for example, text in answered if example.task == task]
            result[task] = metrics.score(task, [text for _, text in part], [example for example, _ in part])
    return result


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
    session: Session,
    examples: Sequence[Example],
    batch_size: int = 40,
    blank_images: bool = False,
    progress: Callable[[int], None] | None = None,
    max_new_tokens: int = 100,
) -> dict[str, Any]:
    """{"metrics": {task: {name: value}}, "predictions": [...]}, predictions in the order of the examples."""
    predictions = _answers(session, examples, batch_size, max_new_tokens, blank_images, progress)
    return {"metrics": score(examples, predictions), "predictions": predictions}


def _answers(session: Session, examples: Sequence[Example], *settings: Any) -> list[str]:
    """The answers in the order of the examples, task by task: prompts of one task are about equally long, with little padding."""
    found = [""] * len(examples)
    for task in by_task(examples):
        places = [place for place, example in enumerate(examples) if example.task == task]
        made = session.generate([examples[place] for place in places], *settings)
        for place, one in zip(places, made, strict=True):
            found[place] = one.text
    return found


def compare(
    untrained: Session | None,
    trained: Session,
    train_examples: Sequence[Example],
    held_out: Sequence[Example],
    batch_size: int = 40,
    max_new_tokens: int = 100,
    progress: Callable[[str, int], None] | None = None,
) -> dict[str, dict[str, Any]]:
    """Row name -> {"metrics", "predictions"} on the held-out examples, for the rows of the table.

    Without an untrained model its row is left out. The majority answers are missing for tasks that the training examples lack.
    """

    def run(row: str, session: Session, blank_images: bool, examples: Sequence[Example]) -> list[str]:
        report = (lambda count: progress(row, count)) if progress else None
        return _answers(session, examples, batch_size, max_new_tokens, blank_images, report)

    majority = MajorityAnswers.fit(train_examples)
    rows: dict[str, Sequence[str | None]] = {}
    if untrained is not None:
        rows[UNTRAINED] = run(UNTRAINED, untrained, False, held_out)
    rows[MAJORITY] = [majority.predict(example) if example.task in majority.tasks else None for example in held_out]
    trained_answers = rows[TRAINED] = run(TRAINED, trained, False, held_out)
    with_image = [example for example in held_out if example.image is not None]
    blind = iter(run(BLANKED, trained, True, with_image))
    # A question without an image has the same answer with the image blanked.
    rows[BLANKED] = [text if example.image is None else next(blind) for example, text in zip(held_out, trained_answers, strict=True)]
    return {row: {"metrics": score(held_out, rows[row]), "predictions": rows[row]} for row in ROWS if row in rows}


def verdict(rows: dict[str, dict[str, Any]], protocol: Protocol = RELEASED) -> dict[str, bool]:
    """Task -> whether the trained model's metric beats the majority answers and, for a task with images, its own on black images.

    A task without majority answers has no verdict.
    """
    result = {}
    for task, trained in rows[TRAINED]["metrics"].items():
        if task in rows[MAJORITY]["metrics"]:
            metric = protocol.metric(TASKS[task])
            baselines = (MAJORITY, BLANKED) if TASKS[task].needs_image else (MAJORITY,)
            best = max(rows[row]["metrics"][task][metric] for row in baselines)
            result[task] = trained[metric] > best
    return result
