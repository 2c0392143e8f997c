"""runs/<name>/report.html: one file that shows what a run learned, what it did not, and how to get it again."""

from __future__ import annotations

import json
from collections.abc import Callable
from html import escape
from pathlib import Path
from typing import Any

from unimed import io
from unimed.errors import UserError
from unimed.evaluate.evaluate import ROWS, TRAINED
from unimed.evaluate.predictions import PREDICTIONS_FILE, read_predictions
from unimed.evaluate.run import METRICS_FILE, answered, cell, odd_answers
from unimed.inference.files import RECIPE_FILE, RUN_FILE
from unimed.records.example import Example
from unimed.records.pixels import load_image
from unimed.report import gallery, plots
from unimed.report.page import bar, card, lead, page, rows
from unimed.tasks import TASKS
from unimed.tasks.reading import KINDS
from unimed.tasks.task import task_of
from unimed.train import recipe as recipes
from unimed.train.folder import Run

REPORT_FILE = "report.html"
SAMPLE_LIMITS = (
    "This is the built-in sample: slices of a few CT and MR volumes. Held-out slabs are other slices of the volumes in training, with a "
    "gap of slices between; the held-out subject is one more CT.",
    "Masks, boxes and organ names are automatic: they come from TotalSegmentator's own test data, not from annotation by people.",
    "Text QA asks about a small table of anatomy facts that training saw in other words.",
)
SYNTHETIC = (
    "The reports are synthetic: sentences composed from facts of the organ masks. They are not radiologists' reports, and scores against "
    "them say nothing about report writing."
)


def write(run: Path, progress: Callable[[str], None] | None = None) -> Path:
    """Writes the report of a run that was trained and evaluated, and returns its path."""
    for name, command in ((RECIPE_FILE, "train"), (RUN_FILE, "train"), (METRICS_FILE, "evaluate"), (PREDICTIONS_FILE, "evaluate")):
        if not (run / name).is_file():
            hint = f"unimed evaluate {run}" if command == "evaluate" else "unimed train tiny"
            raise UserError(f"{run}: no {name} there; make it with: {hint}")
    say = progress or (lambda text: None)
    recipe = recipes.load(run / RECIPE_FILE)
    record, result = io.read_json(run / RUN_FILE), io.read_json(run / METRICS_FILE)
    predictions = read_predictions(run)
    if "intervals" not in next(iter(result.get("splits", {}).values()), {}):
        raise UserError(f"{run}: {METRICS_FILE} is of an older version; make it again with: unimed evaluate {run}")
    log = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    history = io.read_json(Run(run).router)
    say("plots")
    sections = [("looking", "Does looking help?", _table(result))]
    for split in result["splits"]:
        name = result["splits"][split]["name"]
        say(f"images of the {name}")
        examples, by_place = answered(predictions[split]["data"]), predictions[split]["rows"].get(TRAINED, {})
        if set(by_place) != set(range(len(examples))):
            raise UserError(f"{run}: {PREDICTIONS_FILE} lacks answers of the {split!r} split; finish it with: unimed evaluate {run}")
        given = [by_place[place] for place in range(len(examples))]
        if any(task_of(example).box == "answer" for example in examples):
            sections.append((f"boxes-{split}", f"Boxes: {name}", _boxes(examples, given, result["data"]["sample"])))
        text = lead("One right and one wrong answer for each task, chosen by the size of the image so that there is something to see.")
        sections.append((f"answers-{split}", f"Answers: {name}", text + gallery.right_and_wrong(examples, given, load_image)))
    sections += [
        ("loss", "Loss per task", _loss(log)),
        ("router", "Router", _router(history)),
        ("settings", "Settings and machine", _settings(recipe, record, result)),
        ("limits", "What this does not show", _limits(result)),
    ]
    path = run / REPORT_FILE
    io.write_text(path, page(f"Uni-Med run “{recipe.name}”", recipe.description, _cards(record, result), sections))
    return path


def _cards(record: dict[str, Any], result: dict[str, Any]) -> str:
    first = next(iter(result["splits"].values()))
    better = first["better"]
    return "".join(
        [
            card(f"{sum(better.values())} of {len(better)}", f"tasks beat the baselines ({first['name']})"),
            card(f"{record['seconds'] / 60:.1f} min", f"training, {record['steps']} steps"),
            card(f"{record['parameters'] / 1e6:.1f} M", f"parameters, {record['trained_parameters'] / 1e6:.1f} M trained"),
            card(f"{record['examples']:,}", "training examples"),
        ]
    )


def _table(result: dict[str, Any]) -> str:
    splits = list(result["splits"].values())
    head = "".join(f"<th colspan=3>{escape(split['name'])}: headline, strict</th>" for split in splits)
    rows_there = [row for row in ROWS if any(row in split["rows"] for split in splits)]
    body = []
    for task in (task for task in TASKS if any(task in split["counts"] for split in splits)):
        metric, strict = result["headline"][task], result["strict"][task]
        for row in rows_there:
            cells = []
            for split in splits:
                scores = split["rows"].get(row, {}).get(task)
                value, beside = (cell(split, row, task, name) for name in (metric, strict))
                cells.append(f"<td>{bar(scores[metric] if scores else 0.0, row == TRAINED)}</td><td class=value>{value}</td>")
                cells.append(f'<td class="value strict">{beside}</td>')
            what = f"<b>{task}</b><br>{TASKS[task].about}<br><small>{escape(_nature(task))}</small><br>{escape(metric)}"
            name = f"<th rowspan={len(rows_there)}>{what}</th>" if row == rows_there[0] else ""
            last = " class=last" if row == rows_there[-1] else ""
            body.append(f"<tr{last}>{name}<td>{row}</td>{''.join(cells)}</tr>")
    verdicts = [
        f"<tr><th>{escape(split['name'])}, {which}</th>{_marks(split, split[key])}</tr>"
        for split in splits
        for key, which in (("better", "headline"), ("better_strict", "strict"))
    ]
    text = (
        "The same questions, answered by the majority answer to each kind of question (for a box, the object's mean box in training), "
        "which looks at nothing; by the trained model with every image black; by the trained model; and, where it could be built again, by "
        "the model before training. The headline is the release's formula, where it has one. The strict value stands beside it."
    )
    return (
        f"{lead(text)}<div class=scroll><table><tr><th>task, metric</th><th>answers by</th>{head}</tr>{''.join(body)}</table></div>"
        "<h3>Better than both the majority answers and the blanked images?</h3>"
        f"{lead('A text question has no image to blank: only the majority answers count.')}"
        f"<div class=scroll><table>{''.join(verdicts)}</table></div>{_odd(splits)}"
    )


def _nature(task: str) -> str:
    loose, strict = TASKS[task].nature
    return f"{loose}; strict: {strict}"


def _marks(split: dict[str, Any], better: dict[str, bool]) -> str:
    marks = {task: ("yes" if better[task] else "no") if task in better else "no baseline" for task in split["counts"]}
    return "".join(f'<td class="{mark.split()[0]}">{task}: {mark}</td>' for task, mark in marks.items())


def _odd(splits: list[dict[str, Any]]) -> str:
    """How many answers of the trained model are not simply an answer."""
    head = "".join(f"<th>{kind.replace('_', ' ')}</th>" for kind in KINDS)
    lines = []
    for split in splits:
        found = odd_answers(split, TRAINED)
        for task, count in split["counts"].items():
            counts = [str(found.get(task, {}).get(kind, 0)) if kind in TASKS[task].kinds else "–" for kind in KINDS]
            cells = "".join(f"<td>{value}</td>" for value in (count, *counts))
            lines.append(f"<tr><th>{escape(split['name'])}</th><td>{task}</td>{cells}</tr>")
    text = (
        "Every answer counts. Empty: no text. Unparsable: no box, several boxes, or several answers of a list. Inverted: a box with its "
        "corners in the wrong order. Off list: no answer of the list. Chatty: the answer stands among other words."
    )
    return (
        f"<h3>Answers of the trained model that are not simply an answer</h3>{lead(text)}"
        f"<div class=scroll><table><tr><th>split</th><th>task</th><th>answers</th>{head}</tr>{''.join(lines)}</table></div>"
    )


def _boxes(examples: list[Example], given: list[str], sample: bool) -> str:
    true = "true box (from the mask)" if sample else "true box"
    key = (
        f'<span class=key><i style="background:{gallery.TRUE}"></i>{true}<i style="background:{gallery.GUESS}"></i>'
        "predicted box (dashed)</span>"
    )
    text = "Evenly spaced over the ranking by IoU, from the best to the worst, not hand-picked."
    if sample:
        text += " Radiological view: the patient's right is on the left."
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
    counts = [(part["name"], ", ".join(f"{task} {count}" for task, count in part["counts"].items())) for part in result["splits"].values()]
    data = [("trained on", recipe.data.where), ("evaluated on", result["data"]["root"])]
    return (
        f"<h3>Machine</h3>{rows(list(record['machine'].items()))}<h3>Time</h3>{rows(times)}<h3>Data</h3>{rows(data + counts)}"
        f"<h3>Evaluation</h3>{rows([(name, str(value)) for name, value in result['evaluate'].items()])}"
        f"<h3>Recipe of the training</h3><pre>{escape(recipes.dump(recipe))}</pre>"
    )


def _limits(result: dict[str, Any]) -> str:
    """What the data that was used, and the way it was used, leave open. Nothing here is said of other data."""
    splits = list(result["splits"].values())
    points = ["No generalisation beyond the examples evaluated here is shown."]
    points += [f"{split['name'][:1].upper()}{split['name'][1:]}: {_who(split)}" for split in splits]
    points += SAMPLE_LIMITS if result["data"]["sample"] else ()
    if any(split["facts"]["synthetic_reports"] for split in splits):
        points.append(SYNTHETIC)
    if result["evaluate"]["limit"]:
        points.append(f"At most {result['evaluate']['limit']} examples of a task and split were evaluated, evenly spaced.")
    if any(not TASKS[task].needs_image for split in splits for task in split["counts"]):
        points.append("Text questions have no image, so blanking changes nothing.")
    points += [f"The row “{row}” is missing: {reason}." for row, reason in result["left_out"].items()]
    if any(task not in split["better"] for split in splits for task in split["counts"]):
        points.append("Where the majority answers were not fitted, the data has no training examples of that task.")
    points += [
        "One seed and one run: differences of a few examples are noise.",
        "A score can be compared with the published Uni-Med only for the same data, splits, encoder and language model.",
    ]
    return f"<ul>{''.join(f'<li>{escape(point)}</li>' for point in points)}</ul><p>{escape(result['notice'])}.</p>"


def _who(split: dict[str, Any]) -> str:
    """Whose images a split shows, and whether training showed those people, too."""
    facts = split["facts"]
    text = f"{sum(split['counts'].values())} examples of {', '.join(facts['datasets'])}. "
    if not facts["subjects"]:
        return text + "No image is among them."
    shared = facts["subjects_in_training"]
    if shared is None:
        return text + "The training data is not there any more, so whether it shows the same people cannot be told."
    known = ", ".join(f"{name} {shared[name]} of {count}" for name, count in facts["subjects"].items() if count)
    unknown = ", ".join(name for name, count in facts["subjects"].items() if not count)
    text += f"Subjects that the training data shows as well: {known}. " if known else ""
    return text + (f"Nothing names the subjects of {unknown}: the same people may be in training." if unknown else "")
