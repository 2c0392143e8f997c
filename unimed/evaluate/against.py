"""Two runs on the same items: the difference of their scores, with the interval of a bootstrap that draws both together.

What is drawn are patients, images or questions, as in `intervals`: each draw takes the same ones of both runs, so what makes an item hard
for both falls out of the difference.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from unimed import io
from unimed.errors import UserError
from unimed.evaluate import evaluate, intervals
from unimed.evaluate.evaluate import TRAINED
from unimed.evaluate.groups import table_metrics
from unimed.evaluate.predictions import read_predictions
from unimed.evaluate.run import METRICS_FILE, answered, asked
from unimed.inference.files import RECIPE_FILE, require_run
from unimed.tasks import metrics
from unimed.tasks.item import asks
from unimed.train import recipe as recipes


def check(run: Path, other: Path, overrides: list[str] | None = None) -> None:
    """A UserError where the runs would be scored on other items, before any answer is made."""
    for one in (run, other):
        require_run(one)
    ours, theirs = (asked(recipes.load(one / RECIPE_FILE, overrides)) for one in (run, other))
    if set(ours) != set(theirs):
        what = f"{run} is scored on {', '.join(ours)}, {other} on {', '.join(theirs)}"
        raise UserError(f"--against {other}: {what}; choose the same for both with --split")
    for split, items in ours.items():
        mine, its = (list(map(asks, some)) for some in (items, theirs[split]))
        if mine != its:
            counts = f"{len(mine):,} items here, {len(its):,} there, {len(set(mine) & set(its)):,} of them the same"
            what = f"{run} and {other} are scored on other data (split {split!r}: {counts})"
            raise UserError(f"--against {other}: {what}; name the data for both with --data")


def add(run: Path, other: Path, result: dict[str, Any]) -> None:
    """Puts the differences into what `evaluate_run` gave and into the run's metrics.json."""
    result["against"] = {"run": str(other), "splits": differences(run, other)}
    io.write_json(run / METRICS_FILE, result)


def differences(run: Path, other: Path) -> dict[str, Any]:
    """Split -> task -> {"drawn", "count", metric: {"score", "other", "difference", "interval"}} of the trained rows of two evaluated runs.

    `difference` is the score of `run` less that of `other`. `interval` is None where a score is not the mean of its answers' scores.
    """
    ours, theirs = read_predictions(run), read_predictions(other)
    result: dict[str, Any] = {}
    for split, part in ours.items():
        if theirs.get(split, {}).get("data", {}).get("sha256") != part["data"]["sha256"]:
            raise UserError(f"{other}: its {split!r} split has other items than {run}; evaluate both on the same data")
        items = answered(part["data"])
        texts = [_texts(one, split, folder, len(items)) for one, folder in ((part, run), (theirs[split], other))]
        result[split] = {}
        for task in evaluate.by_task(items):
            places = [place for place, item in enumerate(items) if item.task == task]
            some, names = [items[place] for place in places], table_metrics(task)
            given = [[of[place] for place in places] for of in texts]
            ours_each, its_each = (intervals.singles(task, some, one, names) for one in given)
            drawn, members = intervals.groups(some)
            scores: list[Any]
            ends: list[Any]
            if ours_each is None or its_each is None:
                found = [metrics.score(task, one, some, coco=False) for one in given]
                scores, ends = [[one[name] for name in names] for one in found], [None] * len(names)
            else:
                scores, ends = [ours_each.mean(0), its_each.mean(0)], intervals.interval(ours_each - its_each, members)
            result[split][task] = {"drawn": drawn, "count": len(some)}
            for name, mine, its, interval in zip(names, *scores, ends, strict=True):
                result[split][task][name] = {
                    "score": float(mine),
                    "other": float(its),
                    "difference": float(mine - its),
                    "interval": interval,
                }
    return result


def _texts(part: dict[str, Any], split: str, run: Path, count: int) -> dict[int, str]:
    found: dict[int, str] = part["rows"].get(TRAINED, {})
    if set(found) != set(range(count)):
        raise UserError(f"{run}: answers of its {split!r} split are missing; finish them with: unimed evaluate {run}")
    return found


def strip(one: dict[str, Any], span: float, width: int = 25) -> str:
    """A line of text that shows a difference (●) and its interval (━) around zero (│), from -span to span."""
    cells, middle = [" "] * width, width // 2

    def place(value: float) -> int:
        return middle + round(max(-1.0, min(1.0, value / span if span else 0.0)) * middle)

    if one["interval"]:
        low, high = map(place, one["interval"])
        cells[low : high + 1] = "━" * (high + 1 - low)
    cells[middle] = "┿" if cells[middle] == "━" else "│"
    cells[place(one["difference"])] = "●"
    return "".join(cells)


def span_of(found: dict[str, Any], names: dict[str, str]) -> float:
    """The largest distance from zero of the differences and intervals of a table."""
    shown = [one[names[task]] for tasks in found.values() for task, one in tasks.items()]
    return max((abs(end) for one in shown for end in (one["difference"], *(one["interval"] or ()))), default=0.0)
