"""Evaluating a run: the table against answers that need no image, written beside the model."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from unimed import io
from unimed.datasets.load import terms
from unimed.datasets.records import made_by
from unimed.errors import NoItems, UserError
from unimed.evaluate import evaluate, groups, intervals
from unimed.evaluate.evaluate import BLANKED, MAJORITY, TRAINED
from unimed.evaluate.predictions import PREDICTIONS_FILE, Predictions
from unimed.inference.files import MODEL_FOLDER, RECIPE_FILE, fingerprint, model_in, require_run
from unimed.notice import NOTICE
from unimed.sample import about
from unimed.tasks import TASKS
from unimed.tasks.answers import spoken
from unimed.tasks.item import Item, digest
from unimed.tasks.metrics import clinical
from unimed.tasks.protocol import RELEASED, SETS, STANDARD
from unimed.train import machine
from unimed.train import recipe as recipes
from unimed.train import run as training

METRICS_FILE = "metrics.json"
SPLIT_NAMES = {
    "train": "training split",
    "val": "validation split",
    "slab": "validation split",
    "test": "test split",
    "subject": "test split",
}


def is_sample(data: recipes.Data) -> bool:
    """Whether the data is the built-in sample, with the average brain or without."""
    built_in = bool(data.root) and (Path(data.root) / about.SAMPLE_FILE).is_file()
    return built_in and all(made_by(Path(one.root)) == about.BRAIN_BY for one in data.sets.values())


def split_name(data: recipes.Data, split: str) -> str:
    """What a split of the data is called in tables."""
    names = about.SPLIT_NAMES if is_sample(data) else SPLIT_NAMES
    return names.get(split, f"split {split}")


def evaluate_run(
    run: Path,
    overrides: list[str] | None = None,
    progress: Callable[[str, str, int, int], None] | None = None,
    device: str = "auto",
    verify: bool = False,
    untrained: bool = False,
) -> dict[str, Any]:
    """Writes predictions.jsonl and metrics.json of a trained run and returns the latter.

    `overrides` change what is evaluated (`evaluate.limit=20`, `data.root=...`); both files say on what. Answers of an earlier call that
    was interrupted are kept. `progress` gets the split's name, row, items done and their number. `untrained` adds the row of the model
    before training. `device` and `verify` as in `unimed.load`.
    """
    require_run(run)
    model_in(run)
    stored, recipe = recipes.load(run / RECIPE_FILE), recipes.load(run / RECIPE_FILE, overrides)
    settings = recipe.evaluate
    clinical.check(settings.clinical)
    held_out = asked(recipe)
    if settings.clinical and not any(item.task == "caption" for items in held_out.values() for item in items):
        raise UserError(f"--clinical: {recipe.data.where} has no reports in {', '.join(held_out)} (task caption)")
    seen = _trained_on(stored)
    import torch  # not before the data is read: what is wrong there is said at once

    from unimed.inference.session import Session, load

    if recipe.train.threads:
        torch.set_num_threads(recipe.train.threads)
    before, left_out = _before_training(stored, seen) if untrained else (None, {})
    majority = seen if recipe.data == stored.data and seen else _some(recipe, "train")
    trained = load(run, device, verify=verify)
    where = {"device": trained.device.type, "dtype": str(trained.dtype).removeprefix("torch.")}
    if before is not None:
        model, processor = before
        before = Session(model, processor, trained.device, trained.dtype)
    spec = {
        "model": fingerprint(run / MODEL_FOLDER),
        "data": recipe.data.model_dump(),
        "splits": {split: {"limit": settings.limit, "sha256": digest(items)} for split, items in held_out.items()},
        "max_new_tokens": settings.max_new_tokens,
        **where,
    }
    answers = Predictions(run / PREDICTIONS_FILE, spec)
    splits: dict[str, Any] = {}
    given: dict[str, Any] = {}
    for split, items in held_out.items():
        name = split_name(recipe.data, split)
        report = _counter(progress, name, len(items), sum(item.image is not None for item in items))
        start = time.perf_counter()
        store = _SplitStore(answers, split)
        rows = evaluate.compare(before, trained, majority, items, settings.batch_size, settings.max_new_tokens, report, store)
        given[split] = items, {row: one["predictions"] for row, one in rows.items()}
        found, drawn, by_group = _details(items, rows)
        splits[split] = {
            "name": name,
            "counts": {task: len(found) for task, found in evaluate.by_task(items).items()},
            "better": evaluate.verdict(rows),
            "better_strict": evaluate.verdict(rows, STANDARD),
            "seconds": round(time.perf_counter() - start, 1),
            "facts": _facts(seen, items),
            "rows": {row: rows[row]["metrics"] for row in rows},
            "sets": {name: _by_set(items, rows, scores) for name, scores in SETS.items()},
            "drawn": drawn,
            "intervals": found,
            "groups": by_group,
            "clinical": {},
        }
    if settings.clinical:
        _clinical(splits, given, settings.clinical, str(trained.device))
    tasks = evaluate.by_task([item for items in held_out.values() for item in items])
    result = {
        "notice": NOTICE,
        "run": recipe.name,
        "seed": recipe.train.seed,
        "headline": RELEASED.metrics(tasks),
        "strict": STANDARD.metrics(tasks),
        "data": {"root": recipe.data.where, "sample": is_sample(recipe.data), "protocol": recipe.data.protocol},
        "sets": _terms(recipe.data),
        "evaluate": settings.model_dump(),
        "left_out": left_out,
        "machine": machine.describe() | {**where, "device": str(trained.device)},
        "splits": splits,
    }
    io.write_json(run / METRICS_FILE, result)
    return result


def _terms(data: recipes.Data) -> list[dict[str, str]]:
    """Licence, citation and known fault of each data set that is evaluated. The built-in sample has only the layouts of published ones."""
    root = Path(data.root) if data.root and not is_sample(data) else None
    return terms(root, {name: (Path(one.root), one.layout) for name, one in data.sets.items()})


@dataclasses.dataclass
class _SplitStore:
    """The part of the file of answers that holds one split."""

    answers: Predictions
    split: str

    def there(self, row: str) -> dict[int, str]:
        return self.answers.there(self.split, row)

    def add(self, row: str, places: Sequence[int], items: Sequence[Item], texts: Sequence[str]) -> None:
        self.answers.add(self.split, row, places, items, texts)


def _by_set(items: Sequence[Item], rows: dict[str, Any], scores: Callable[..., dict[str, Any]]) -> dict[str, Any]:
    """Row -> data set -> score, of the rows that answered; a row without answers to a task has none for it."""
    found = {}
    for row, one in rows.items():
        pairs = [(item, text) for item, text in zip(items, one["predictions"], strict=True) if text is not None]
        found[row] = scores([item for item, _ in pairs], [text for _, text in pairs])
    return found


def _clinical(splits: dict[str, Any], given: dict[str, Any], settings: dict[str, str], device: str) -> None:
    """Puts the scores of the reports into each split: row -> {"count", "scores", "intervals"}. The answers are all made by now."""
    score = clinical.load(settings, device)
    for split, (items, rows) in given.items():
        places = [place for place, item in enumerate(items) if item.task == "caption"]
        _, members = intervals.groups([items[place] for place in places])
        for row, texts in rows.items():
            pairs = [(spoken(texts[place]), items[place].answer) for place in places if texts[place] is not None]
            if len(pairs) < len(places) or not places:
                continue
            found = score(pairs)
            ends = intervals.interval(np.stack([*found.each.values()], 1), members) if found.each else []
            splits[split]["clinical"][row] = {
                "count": len(pairs),
                "scores": found.scores,
                "intervals": dict(zip(found.each, ends, strict=True)),
            }


def _details(items: Sequence[Item], rows: dict[str, dict[str, Any]]) -> tuple[dict[str, Any], dict[str, str], dict[str, Any]]:
    """Row -> task -> metric -> [lowest, highest], for each task what was drawn, and the scores by group. No answer is scored twice."""
    scored = {row: groups.Scored(items, one["predictions"], one["metrics"]) for row, one in rows.items()}
    found: dict[str, Any] = {row: {} for row in rows}
    drawn: dict[str, str] = {}
    for task in evaluate.by_task(items):
        places = [place for place, item in enumerate(items) if item.task == task]
        drawn[task], members = intervals.groups([items[place] for place in places])
        for row, one in scored.items():
            each = one.each(task, places)
            if each is not None:
                found[row][task] = dict(zip(groups.table_metrics(task), intervals.interval(each, members), strict=True))
    return found, drawn, groups.tables(items, scored, TRAINED)


def asked(recipe: recipes.Recipe) -> dict[str, list[Item]]:
    """The held-out items of each split that a recipe evaluates."""
    return {split: _held_out(recipe, split) for split in recipe.evaluate.splits}


def _held_out(recipe: recipes.Recipe, split: str) -> list[Item]:
    try:
        return evaluate.spread(training.items(recipe, split), recipe.evaluate.limit)
    except NoItems as error:
        there = [name for name in ("train", "val", "test") if _some(recipe, name)]
        if not there:
            raise
        raise NoItems(f"{error}; it has {', '.join(there)}: choose with evaluate.splits=[{there[-1]}]") from error


def _some(recipe: recipes.Recipe, split: str) -> Sequence[Item]:
    """The items of a split; none where the data lacks it."""
    try:
        return training.items(recipe, split)
    except NoItems:
        return []


def answered(spec: dict[str, Any]) -> list[Item]:
    """The items of one split that predictions.jsonl answers, read again from where they were; a UserError when they are others now."""
    names = set(recipes.Data.model_fields)
    sets = {name: recipes.DataSet(**one) for name, one in spec.get("sets", {}).items()}
    recipe = recipes.Recipe(data=recipes.Data(**{**{name: value for name, value in spec.items() if name in names}, "sets": sets}))
    found = evaluate.spread(training.items(recipe, spec["split"]), spec["limit"])
    if digest(found) != spec["sha256"]:
        what = f"the items of its {spec['split']!r} split are not those that were answered"
        raise UserError(f"{recipe.data.where}: {what} in {PREDICTIONS_FILE}; run unimed evaluate again")
    return found


def _trained_on(stored: recipes.Recipe) -> Sequence[Item]:
    """What the run was trained on; nothing where it is not there any more."""
    try:
        return training.items(stored, "train")
    except UserError:
        return []


def _before_training(stored: recipes.Recipe, seen: Sequence[Item]) -> tuple[Any, dict[str, str]]:
    """The model of the run before training; where it cannot be had any more, the reason, by row."""
    try:
        return training.build(stored, seen or training.items(stored, "train")), {}
    except UserError as error:
        return None, {evaluate.UNTRAINED: str(error)}


def _facts(seen: Sequence[Item], items: Sequence[Item]) -> dict[str, Any]:
    """What the report must say about the data: its sets, how many subjects their images name and training showed, synthetic references."""

    held_out, shown = _subjects(items), _subjects(seen)
    return {
        "datasets": sorted({item.dataset for item in items}),
        "subjects": {name: len(named) for name, named in sorted(held_out.items())},
        "subjects_in_training": {name: len(named & shown.get(name, set())) for name, named in sorted(held_out.items())} if seen else None,
        "synthetic_reports": any(item.layout == about.NAME and item.task == "caption" for item in items),
    }


def _subjects(items: Sequence[Item]) -> dict[str, set[str]]:
    """The subjects that the images of each data set name."""
    found: dict[str, set[str]] = {}
    for item in items:
        if item.image is not None:
            found.setdefault(item.dataset, set()).update([item.subject] if item.subject else [])
    return found


def _counter(progress: Callable[[str, str, int, int], None] | None, split: str, total: int, with_image: int) -> Callable[[str, int], None]:
    """Turns the number of new answers of a row into the number so far, of all."""
    done: dict[str, int] = {}

    def report(row: str, count: int) -> None:
        done[row] = done.get(row, 0) + count
        if progress:
            progress(split, row, done[row], with_image if row == BLANKED else total)

    return report


def answer_table(result: dict[str, Any], strict: bool = False) -> tuple[list[str], dict[str, list[list[str]]]]:
    """Header, and rows by split, of the one table: headline metric of each task for each kind of answers, or its strict form."""
    tasks = [task for task in TASKS if any(task in part["counts"] for part in result["splits"].values())]
    names = result["strict" if strict else "headline"]
    header = ["answers by"] + [f"{task}\n{names[task].removesuffix('_strict')}" for task in tasks]
    lines: dict[str, list[list[str]]] = {}
    for split, part in result["splits"].items():
        lines[split] = [[row, *(cell(part, row, task, names[task]) for task in tasks)] for row in part["rows"]]
    return header, lines


def clinical_table(part: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and lines of the scores of the reports of a split, by row; the interval is that of the trained row."""
    found = part["clinical"]
    rows = [row for row in evaluate.ROWS if row in found]
    lines = []
    for name in found[TRAINED]["scores"]:
        ends = found[TRAINED]["intervals"].get(name)
        words = f"{name} (lower is better)" if name in clinical.LOWER_IS_BETTER else name
        lines.append([words, *(f"{found[row]['scores'][name]:.3f}" for row in rows), f"{ends[0]:.3f} to {ends[1]:.3f}" if ends else "–"])
    return ["score", *rows, "95 % interval"], lines


def cell(part: dict[str, Any], row: str, task: str, metric: str) -> str:
    """One value of the table of a split as text."""
    scores = part["rows"].get(row, {}).get(task)
    if scores:
        return f"{scores[metric]:.3f}"
    return "not fitted" if row == MAJORITY and task in part["counts"] else "–"


def interval_cell(part: dict[str, Any], row: str, task: str, metric: str) -> str:
    """The interval of one value of the table as text; "" where there is none."""
    ends = part["intervals"].get(row, {}).get(task, {}).get(metric)
    return f"{ends[0]:.2f}–{ends[1]:.2f}" if ends else ""


def drawn_by(part: dict[str, Any]) -> str:
    """What the intervals of a split were drawn over, in a few words."""
    by_kind: dict[str, list[str]] = {}
    for task, kind in part["drawn"].items():
        by_kind.setdefault(kind, []).append(task)
    return "; ".join(f"over {kind}: {', '.join(tasks)}" for kind, tasks in by_kind.items())


def odd_answers(part: dict[str, Any], row: str) -> dict[str, dict[str, int]]:
    """Task -> how many answers of a row are empty, unparsable, inverted, off the list or chatty; only kinds that occur."""
    found = {}
    for task, scores in part["rows"].get(row, {}).items():
        counts = {kind: int(scores[kind]) for kind in TASKS[task].kinds if scores.get(kind)}
        if counts:
            found[task] = counts
    return found
