"""The scores of a study's model on held-out items."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from unimed.inference.session import Session, load
from unimed.tasks.item import Item

BATCH, NEW_TOKENS = 64, 64  # the longest reference has 50 words


def score(session: Session, items: Sequence[Item], blank: bool = False) -> dict[str, dict[str, Any]]:
    """Every metric by task. ``blank``: on black images; items without an image are left out, and a question is answered once."""
    from unimed.evaluate.evaluate import by_task
    from unimed.evaluate.evaluate import score as measure

    shown = [item for item in items if item.image is not None] if blank else list(items)
    answers: list[str] = []
    kept: list[Item] = []
    for part in by_task(shown).values():  # prompts of one task are about equally long
        asked = list({item.question: item for item in part}.values()) if blank else part
        made = [one.text for one in session.generate(asked, BATCH, NEW_TOKENS, blank)]
        said = {item.question: text for item, text in zip(asked, made, strict=True)}
        answers += [said[item.question] for item in part] if blank else made
        kept += part
    return measure(kept, answers)


def scores(model: Path, items: Sequence[Item]) -> tuple[dict[str, float], dict[str, dict[str, Any]]]:
    """The strict score of every task that the items have, and all metrics. ``model``: a run or a saved model."""
    from unimed.tasks import TASKS

    metrics = score(load(model, "cpu"), items)
    return {task: metrics[task][TASKS[task].strict] for task in metrics}, metrics
