"""All tasks with the released metrics, beside answers that need no image."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

from unimed.errors import TooLong
from unimed.tasks import TASKS, metrics
from unimed.tasks import protocol as protocols
from unimed.tasks.baselines import MajorityAnswers
from unimed.tasks.item import Item

if TYPE_CHECKING:
    from unimed.inference.session import Session

log = logging.getLogger("unimed.evaluate")


class Store(Protocol):
    """Keeps the answers of one split by row and place."""

    def there(self, row: str) -> dict[int, str]: ...
    def add(self, row: str, places: Sequence[int], items: Sequence[Item], texts: Sequence[str]) -> None: ...


UNTRAINED, MAJORITY, BLANKED, TRAINED = ROWS = ("untrained", "majority answer", "image blanked", "trained")


def by_task(items: Sequence[Item]) -> dict[str, list[Item]]:
    found: dict[str, list[Item]] = {}
    for item in items:
        found.setdefault(item.task, []).append(item)
    return {task: found[task] for task in TASKS if task in found}


def spread(items: Sequence[Item], limit: int) -> list[Item]:
    """At most `limit` items of each task, evenly spaced; all of them for 0."""
    kept: list[Item] = []
    for found in by_task(items).values():
        if limit and len(found) > limit:
            found = [found[i * len(found) // limit] for i in range(limit)]
        kept += found
    return kept


def score(items: Sequence[Item], predictions: Sequence[str | None]) -> dict[str, dict[str, float]]:
    """Metrics of every task that has answers; None is an item without one (a baseline that was not fitted for its task)."""
    answered = [(item, text) for item, text in zip(items, predictions, strict=True) if text is not None]
    result = {}
    with _quiet_programs():
        for task in by_task([item for item, _ in answered]):
            part = [(item, text) for item, text in answered if item.task == task]
            result[task] = metrics.score(task, [text for _, text in part], [item for item, _ in part])
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


def answers(
    session: Session,
    items: Sequence[Item],
    row: str,
    batch_size: int,
    max_new_tokens: int,
    progress: Callable[[str, int], None] | None = None,
    store: Store | None = None,
) -> list[str | None]:
    """The answers in the order of the items, made task by task: prompts of one task are about equally long, with little padding.

    With blanked images, items without an image have None.
    """
    blank = row == BLANKED
    found: dict[int, str] = dict(store.there(row)) if store else {}
    if found and progress:
        progress(row, len(found))
    for task in by_task(items):
        places = [
            place for place, item in enumerate(items) if item.task == task and place not in found and not (blank and item.image is None)
        ]
        for start in range(0, len(places), batch_size):
            batch = places[start : start + batch_size]
            part = [items[place] for place in batch]
            texts = _texts(session, part, batch_size, max_new_tokens, blank)
            found |= dict(zip(batch, texts, strict=True))
            if store:
                store.add(row, batch, part, texts)
            if progress:
                progress(row, len(batch))
    return [found.get(place) for place in range(len(items))]


def _texts(session: Session, items: Sequence[Item], batch_size: int, max_new_tokens: int, blank: bool) -> list[str]:
    """The answers of one batch; an item that the model cannot be asked, since its prompt is too long, has an empty one."""
    try:
        return [one.text for one in session.generate(items, batch_size, max_new_tokens, blank)] if items else []
    except TooLong as error:
        place = error.place
        log.warning("%s: %s; its answer is empty", items[place].id, error)
        texts = _texts(session, [*items[:place], *items[place + 1 :]], batch_size, max_new_tokens, blank)
        return [*texts[:place], "", *texts[place:]]


def compare(
    untrained: Session | None,
    trained: Session,
    train_items: Sequence[Item],
    held_out: Sequence[Item],
    batch_size: int = 40,
    max_new_tokens: int = 100,
    progress: Callable[[str, int], None] | None = None,
    store: Store | None = None,
) -> dict[str, dict[str, Any]]:
    """Row name -> {"metrics", "predictions"} on the held-out items, for the rows of the table.

    Without an untrained model its row is left out. The majority answers are missing for tasks that the training items lack. Answers
    that ``store`` has are not made again, and new ones go there. ``progress`` gets a row and the number of its items just answered.
    """
    settings = (batch_size, max_new_tokens, progress, store)
    majority = MajorityAnswers.fit(train_items)
    rows: dict[str, Sequence[str | None]] = {}
    if untrained is not None:
        rows[UNTRAINED] = answers(untrained, held_out, UNTRAINED, *settings)
    rows[MAJORITY] = [majority.predict(item) if item.task in majority.tasks else None for item in held_out]
    rows[TRAINED] = answers(trained, held_out, TRAINED, *settings)
    blind = answers(trained, held_out, BLANKED, *settings)
    # A question without an image has the same answer with the image blanked.
    pairs = zip(held_out, blind, rows[TRAINED], strict=True)
    rows[BLANKED] = [seen if item.image is None else unseen for item, unseen, seen in pairs]
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
