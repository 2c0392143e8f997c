"""All tasks with the released metrics, beside answers that need no image."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

from unimed.inference.session import Session
from unimed.records.example import Example
from unimed.tasks import TASKS, metrics
from unimed.tasks import protocol as protocols
from unimed.tasks.baselines import MajorityAnswers


class Store(Protocol):
    """Keeps the answers of one split by row and place."""

    def there(self, row: str) -> dict[int, str]: ...
    def add(self, row: str, places: Sequence[int], examples: Sequence[Example], texts: Sequence[str]) -> None: ...


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


def _answers(
    session: Session,
    examples: Sequence[Example],
    row: str,
    batch_size: int,
    max_new_tokens: int,
    progress: Callable[[str, int], None] | None,
    store: Store | None,
) -> list[str | None]:
    """The answers in the order of the examples, made task by task: prompts of one task are about equally long, with little padding.

    With blanked images, examples without an image have None.
    """
    blank = row == BLANKED
    found: dict[int, str] = dict(store.there(row)) if store else {}
    if found and progress:
        progress(row, len(found))
    for task in by_task(examples):
        places = [
            place
            for place, example in enumerate(examples)
            if example.task == task and place not in found and not (blank and example.image is None)
        ]
        for start in range(0, len(places), batch_size):
            batch = places[start : start + batch_size]
            part = [examples[place] for place in batch]
            texts = [one.text for one in session.generate(part, batch_size, max_new_tokens, blank)]
            found |= dict(zip(batch, texts, strict=True))
            if store:
                store.add(row, batch, part, texts)
            if progress:
                progress(row, len(batch))
    return [found.get(place) for place in range(len(examples))]


def compare(
    untrained: Session | None,
    trained: Session,
    train_examples: Sequence[Example],
    held_out: Sequence[Example],
    batch_size: int = 40,
    max_new_tokens: int = 100,
    progress: Callable[[str, int], None] | None = None,
    store: Store | None = None,
) -> dict[str, dict[str, Any]]:
    """Row name -> {"metrics", "predictions"} on the held-out examples, for the rows of the table.

    Without an untrained model its row is left out. The majority answers are missing for tasks that the training examples lack. Answers
    that ``store`` has are not made again, and new ones go there. ``progress`` gets a row and the number of its examples just answered.
    """
    settings = (batch_size, max_new_tokens, progress, store)
    majority = MajorityAnswers.fit(train_examples)
    rows: dict[str, Sequence[str | None]] = {}
    if untrained is not None:
        rows[UNTRAINED] = _answers(untrained, held_out, UNTRAINED, *settings)
    rows[MAJORITY] = [majority.predict(example) if example.task in majority.tasks else None for example in held_out]
    rows[TRAINED] = _answers(trained, held_out, TRAINED, *settings)
    blind = _answers(trained, held_out, BLANKED, *settings)
    # A question without an image has the same answer with the image blanked.
    pairs = zip(held_out, blind, rows[TRAINED], strict=True)
    rows[BLANKED] = [seen if example.image is None else unseen for example, unseen, seen in pairs]
    return {row: {"metrics": score(held_out, rows[row]), "predictions": rows[row]} for row in ROWS if row in rows}


def verdict(rows: dict[str, dict[str, Any]], protocol: protocols.Protocol = protocols.RELEASED) -> dict[str, bool]:
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
