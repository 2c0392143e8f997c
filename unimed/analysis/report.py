"""runs/<name>/report.html: one file that shows what a run learned, what it did not, and how to get it again."""

from __future__ import annotations

import json
from collections.abc import Callable
from html import escape
from pathlib import Path
from typing import Any

from unimed.analysis import gallery, plots
from unimed.analysis.page import bar, card, lead, page, rows
from unimed.data.example import TASKS, Example
from unimed.data.images import load_image
from unimed.errors import UserError
from unimed.evaluate.evaluate import ROWS, TRAINED
from unimed.evaluate.run import METRICS_FILE, PREDICTIONS_FILE, SPLIT_NAMES
from unimed.train import config as recipes
from unimed.train import files
from unimed.train.run import RECIPE_FILE, RUN_FILE
from unimed.train.run import examples as load_split
from unimed.train.trainer import ROUTER_FILE

REPORT_FILE = "report.html"
TASK_NAMES = {
    "vqa": "questions about the image",
    "refer": "box of a named organ",
    "identify": "organ in a given box",
    "caption": "report (synthetic text)",
    "cls": "organ of a cropped image",
    "qa": "text questions, no image",
}


def write(run: Path, progress: Callable[[str], None] | None = None) -> Path:
    """Writes the report of a run that was trained and evaluated, and returns its path."""
    for name, command in ((RECIPE_FILE, "train"), (RUN_FILE, "train"), (METRICS_FILE, "evaluate"), (PREDICTIONS_FILE, "evaluate")):
        if not (run / name).is_file():
            hint = f"unimed evaluate {run}" if command == "evaluate" else "unimed train tiny"
            raise UserError(f"{run}: no {name} there; make it with: {hint}")
    say = progress or (lambda text: None)
    recipe = recipes.load(run / RECIPE_FILE)
    record, result = files.read_json(run / RUN_FILE), files.read_json(run / METRICS_FILE)
    predictions = files.read_json(run / PREDICTIONS_FILE)
    log = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    history = files.read_json(run / ROUTER_FILE)
    say("plots")
    sections = [("looking", "Does looking help?", _table(result))]
    for split in result["splits"]:
        say(f"slices of the {split} split")
        examples, given = _answered(recipe, split, predictions[split])
        name = SPLIT_NAMES[split]
        sections.append((f"boxes-{split}", f"Boxes: {name}", _boxes(examples, given)))
        text = lead("One right and one wrong answer for each task, chosen by the size of the slice so that there is something to see.")
        sections.append((f"answers-{split}", f"Answers: {name}", text + gallery.right_and_wrong(examples, given, load_image)))
    sections += [
        ("loss", "Loss per task", _loss(log)),
        ("router", "Router", _router(history)),
        ("settings", "Settings and machine", _settings(recipe, record, result)),
        ("limits", "What this does not show", _limits(result)),
    ]
    path = run / REPORT_FILE
    files.write_text(path, page(f"Uni-Med run “{recipe.name}”", recipe.description, _cards(record, result), sections))
    return path


def _answered(recipe: recipes.Recipe, split: str, stored: dict[str, Any]) -> tuple[list[Example], list[str]]:
    known = {example.id: example for example in load_split(recipe, split)}
    missing = [key for key in stored["ids"] if key not in known]
    if missing:
        raise UserError(f"{recipe.data.root}: no example {missing[0]!r} any more, {PREDICTIONS_FILE} has it; run unimed evaluate again")
    return [known[key] for key in stored["ids"]], stored["rows"][TRAINED]


def _cards(record: dict[str, Any], result: dict[str, Any]) -> str:
    first = next(iter(result["splits"]))
    better = result["splits"][first]["better"]
    return "".join(
        [
            card(f"{sum(better.values())} of {len(better)}", f"tasks beat both baselines ({SPLIT_NAMES[first]})"),
            card(f"{record['seconds'] / 60:.1f} min", f"training, {record['steps']} steps"),
            card(f"{record['parameters'] / 1e6:.1f} M", f"parameters, {record['trained_parameters'] / 1e6:.1f} M trained"),
            card(f"{record['examples']:,}", "training examples"),
        ]
    )


def _table(result: dict[str, Any]) -> str:
    splits = result["splits"]
    head = "".join(f"<th colspan=2>{escape(SPLIT_NAMES[split])}</th>" for split in splits)
    body = []
    for task in TASKS:
        metric = result["headline"].get(task)
        if not any(task in splits[split]["counts"] for split in splits):
            continue
        for row in ROWS:
            cells = []
            for split in splits:
                scores = splits[split]["rows"].get(row, {}).get(task)
                value = f"{scores[metric]:.3f}" if scores else "–"
                cells.append(f"<td>{bar(scores[metric] if scores else 0.0, row == TRAINED)}</td><td class=value>{value}</td>")
            what = f"<b>{task}</b><br>{TASK_NAMES[task]}<br>{escape(metric)}"
            name = f"<th rowspan={len(ROWS)}>{what}</th>" if row == ROWS[0] else ""
            last = " class=last" if row == ROWS[-1] else ""
            body.append(f"<tr{last}>{name}<td>{row}</td>{''.join(cells)}</tr>")
    verdicts = []
    for split in splits:
        marks = {task: "yes" if good else "no" for task, good in splits[split]["better"].items()}
        words = "".join(f'<td class="{mark}">{task}: {mark}</td>' for task, mark in marks.items())
        verdicts.append(f"<tr><th>{escape(SPLIT_NAMES[split])}</th>{words}</tr>")
    text = (
        "The same questions, answered four ways: by the model before training; by the majority answer to each kind of question (for a box, "
        "the organ's mean box in training), which looks at nothing; by the trained model with every image black; and by the trained model."
    )
    return (
        f"{lead(text)}<div class=scroll><table><tr><th>task, metric</th><th>answers by</th>{head}</tr>{''.join(body)}</table></div>"
        "<h3>Better than both the answers without looking and the blanked images?</h3>"
        f"<div class=scroll><table>{''.join(verdicts)}</table></div>"
    )


def _boxes(examples: list[Example], given: list[str]) -> str:
    key = (
        f'<span class=key><i style="background:{gallery.TRUE}"></i>true box (from the mask)<i style="background:{gallery.GUESS}"></i>'
        "predicted box (dashed)</span>"
    )
    text = (
        "Evenly spaced over the ranking by IoU, from the best to the worst, not hand-picked. "
        "Radiological view: the patient's right is on the left."
    )
    return f"{lead(text)}<p>{key}</p>{gallery.box_grid(examples, given, load_image)}"


def _loss(log: list[dict[str, Any]]) -> str:
    text = "Training cross-entropy of the learned tokens, averaged between two logs; the running mean on top."
    return f"{lead(text)}<div class=plot>{plots.loss_per_task(log)}</div><div class='plot narrow'>{plots.learning_rate(log)}</div>"


def _router(history: list[dict[str, Any]]) -> str:
    if not history:
        return lead("This run logged no gates: no image passed the connector.")
    entropies = {task: entry["entropy"] for task, entry in _last_seen(history)["tasks"].items()}
    words = ", ".join(f"{task} {value:.3f}" for task, value in entropies.items())
    text = (
        "Every image token is projected by a mixture of experts; the router sees the token and its task. Shown are mean gates; white is "
        "an even share. "
        f"Entropy of a token's gates at the end, in shares of log E (1: all experts alike): {words}."
    )
    first, last = history[0], _last_seen(history)
    maps = plots.gate_heat_map(first, f"step {first['step']}"), plots.gate_heat_map(last, f"step {last['step']}")
    pair = "".join(f"<div class=plot>{plot}</div>" for plot in maps)
    return f"{lead(text)}<div class=pair>{pair}</div><div class=plot>{plots.gates_over_training(history)}</div>"


def _last_seen(history: list[dict[str, Any]]) -> dict[str, Any]:
    """The newest record of every task: with one task a batch, the last log may lack some."""
    tasks: dict[str, Any] = {}
    for entry in history:
        tasks.update(entry["tasks"])
    return {"step": history[-1]["step"], "tasks": tasks}


def _settings(recipe: recipes.Recipe, record: dict[str, Any], result: dict[str, Any]) -> str:
    seconds = [("training", record["seconds"])] + [(f"evaluation, {split}", part["seconds"]) for split, part in result["splits"].items()]
    times = [(name, f"{value:.0f} s") for name, value in seconds]
    counts = [
        (SPLIT_NAMES[split], ", ".join(f"{task} {count}" for task, count in part["counts"].items()))
        for split, part in result["splits"].items()
    ]
    return (
        f"<h3>Machine</h3>{rows(list(record['machine'].items()))}<h3>Time</h3>{rows(times)}<h3>Examples evaluated</h3>{rows(counts)}"
        f"<h3>Recipe</h3><pre>{escape(recipes.dump(recipe))}</pre>"
    )


def _limits(result: dict[str, Any]) -> str:
    points = [
        "No generalisation beyond the two held-out sets. Training images come from two volumes, one CT and one MR; the held-out slabs are "
        "other slices of the same two people, with a gap of two slices; the held-out subject is one more CT.",
        "The reports are synthetic: sentences composed from facts of the organ masks. They are not radiologists' reports, and scores "
        "against them say nothing about report writing.",
        "Masks, boxes and organ names are automatic: they come from TotalSegmentator's own test data, not from annotation by people.",
        "Text QA asks about a small table of anatomy facts that training saw in other words; it has no image, so blanking changes nothing.",
        "One seed and one run: differences of a few examples are noise.",
        "No score here can be compared with the published Uni-Med: its data, encoder and language model are other and far larger.",
    ]
    return f"<ul>{''.join(f'<li>{escape(point)}</li>' for point in points)}</ul><p>{escape(result['notice'])}.</p>"
