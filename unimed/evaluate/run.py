"""Evaluating a run: the table against answers that need no image, written beside the model."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from unimed.errors import UserError
from unimed.evaluate import evaluate
from unimed.tasks import metrics
from unimed.train import config as recipes
from unimed.train import files, machine
from unimed.train import run as training

METRICS_FILE, PREDICTIONS_FILE = "metrics.json", "predictions.json"
NOTICE = "Research use, not for diagnosis"


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
        done: dict[str, int] = {}

        def report(row: str, count: int, split: str = split, done: dict[str, int] = done, total: int = len(held_out)) -> None:
            done[row] = done.get(row, 0) + count
            if progress:
                progress(split, row, done[row], total)

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


def answer_table(result: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the one table: headline metric of each task, for the four kinds of answers and every split."""
    splits = result["splits"]
    header = ["answers by"] + [f"{task}\n{result['headline'][task]}" for task in next(iter(splits.values()))["counts"]]
    lines = []
    for split, part in splits.items():
        for row in evaluate.ROWS:
            if row not in part["rows"]:
                continue
            scores = [f"{part['rows'][row][task][result['headline'][task]]:.3f}" for task in part["counts"]]
            lines.append([f"{row} · {split}", *scores])
    return header, lines
