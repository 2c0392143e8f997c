"""Evaluating a run: the table against answers that need no image, written beside the model."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from unimed import NOTICE
from unimed.data.example import TASKS
from unimed.errors import UserError
from unimed.evaluate import evaluate
from unimed.evaluate.evaluate import BLANKED
from unimed.tasks import metrics
from unimed.train import config as recipes
from unimed.train import files, machine
from unimed.train import run as training

METRICS_FILE, PREDICTIONS_FILE = "metrics.json", "predictions.json"
SPLIT_NAMES = {"slab": "held-out slabs", "subject": "held-out subject", "train": "training slices"}


def evaluate_run(
    run: Path, overrides: list[str] | None = None, progress: Callable[[str, str, int, int], None] | None = None
) -> dict[str, Any]:
    """Writes metrics.json and predictions.json of a trained run and returns the former.

    `overrides` change the stored recipe (`evaluate.limit=20`, `data.root=...`). `progress` gets split, row, examples done and their number.
    """
    if not (run / training.RECIPE_FILE).is_file():
        raise UserError(f"{run}: not a run of unimed (no {training.RECIPE_FILE}); train one with: unimed train tiny")
    recipe = recipes.load(run / training.RECIPE_FILE, overrides)
    if recipe.train.threads:
        import torch

        torch.set_num_threads(recipe.train.threads)
    train_examples = training.examples(recipe, "train")
    trained = training.load_model(run)
    untrained = training.build(recipe, train_examples)
    settings = recipe.evaluate
    splits: dict[str, Any] = {}
    predictions: dict[str, Any] = {}
    for split in settings.splits:
        held_out = evaluate.spread(training.examples(recipe, split), settings.limit)
        report = _counter(progress, split, len(held_out), sum(example.image is not None for example in held_out))
        start = time.perf_counter()
        rows = evaluate.compare(untrained, trained, train_examples, held_out, settings.batch_size, settings.max_new_tokens, report)
        splits[split] = {
            "counts": {task: len(found) for task, found in evaluate.by_task(held_out).items()},
            "better": evaluate.verdict(rows),
            "seconds": round(time.perf_counter() - start, 1),
            "rows": {row: rows[row]["metrics"] for row in rows},
        }
        predictions[split] = {"ids": [example.id for example in held_out], "rows": {row: rows[row]["predictions"] for row in rows}}
    result = {
        "notice": NOTICE,
        "run": recipe.name,
        "seed": recipe.train.seed,
        "headline": dict(metrics.HEADLINE),
        "machine": machine.describe(),
        "splits": splits,
    }
    files.write_json(run / PREDICTIONS_FILE, predictions)
    files.write_json(run / METRICS_FILE, result)
    return result


def _counter(progress: Callable[[str, str, int, int], None] | None, split: str, total: int, with_image: int) -> Callable[[str, int], None]:
    """Turns "so many more answered" into "so many of so many", row by row."""
    done: dict[str, int] = {}

    def report(row: str, count: int) -> None:
        done[row] = done.get(row, 0) + count
        if progress:
            progress(split, row, done[row], with_image if row == BLANKED else total)

    return report


def answer_table(result: dict[str, Any]) -> tuple[list[str], dict[str, list[list[str]]]]:
    """Header, and rows by split, of the one table: headline metric of each task for the four kinds of answers."""
    tasks = [task for task in TASKS if any(task in part["counts"] for part in result["splits"].values())]
    header = ["answers by"] + [f"{task}\n{result['headline'][task]}" for task in tasks]
    lines: dict[str, list[list[str]]] = {}
    for split, part in result["splits"].items():
        lines[split] = []
        for row in part["rows"]:
            scores = [part["rows"][row].get(task, {}).get(result["headline"][task]) for task in tasks]
            lines[split].append([row, *("–" if score is None else f"{score:.3f}" for score in scores)])
    return header, lines
