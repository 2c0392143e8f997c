"""The scores of a study's model on held-out items."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from unimed.inference.session import Session
from unimed.tasks.item import Item

BATCH, NEW_TOKENS = 64, 64  # the longest reference has 50 words


def score(session: Session, items: Sequence[Item], blank: bool = False) -> dict[str, dict[str, Any]]:
    """Every metric by task. ``blank``: on black images; items without an image are left out, and a question is answered once."""
    from unimed.evaluate import evaluate

    if not blank:
        return evaluate.score(items, evaluate.answers(session, items, evaluate.TRAINED, BATCH, NEW_TOKENS))
    shown = [item for item in items if item.image is not None]
    asked = {(item.task, item.question): item for item in shown}
    made = evaluate.answers(session, list(asked.values()), evaluate.BLANKED, BATCH, NEW_TOKENS)
    said = dict(zip(asked, made, strict=True))
    return evaluate.score(shown, [said[item.task, item.question] for item in shown])


def strict(metrics: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """The strict score of every task."""
    from unimed.tasks import TASKS

    return {task: one[TASKS[task].strict] for task, one in metrics.items()}
