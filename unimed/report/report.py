"""runs/<name>/report.html: one file that shows what a run learned, what it did not, and how to get it again."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image

from unimed import io
from unimed.errors import UserError
from unimed.evaluate import groups
from unimed.evaluate.evaluate import MAJORITY, ROWS, TRAINED
from unimed.evaluate.experts import EXPERTS_FILE
from unimed.evaluate.predictions import PREDICTIONS_FILE, read_predictions
from unimed.evaluate.run import METRICS_FILE, answered, cell, clinical_table, drawn_by, interval_cell, odd_answers
from unimed.inference.files import RECIPE_FILE, RUN_FILE
from unimed.notice import NOTICE
from unimed.report import gallery, page, plots
from unimed.sample import about
from unimed.studies.analyze import FILE as ANALYSIS_FILE
from unimed.studies.analyze import FOLDER as ANALYSIS
from unimed.tasks import TASKS
from unimed.tasks.item import Item
from unimed.tasks.reading import KINDS
from unimed.train import recipe as recipes
from unimed.train.folder import Run

REPORT_FILE = "report.html"


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
    if not {"intervals", "groups"} <= next(iter(result.get("splits", {}).values()), {}).keys():
        raise UserError(f"{run}: {METRICS_FILE} is of an older version; make it again with: unimed evaluate {run}")
    log = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    history = io.read_json(Run(run).router)
    say("plots")
    splits = []
    for split, part in result["splits"].items():
        say(f"images of the {part['name']}")
        items, by_place = answered(predictions[split]["data"]), predictions[split]["rows"].get(TRAINED, {})
        if set(by_place) != set(range(len(items))):
            raise UserError(f"{run}: {PREDICTIONS_FILE} lacks answers of the {split!r} split; finish it with: unimed evaluate {run}")
        given = [by_place[place] for place in range(len(items))]
        splits.append(
            {
                "key": split,
                "name": part["name"],
                "boxes": gallery.box_grid(items, given, Item.open),
                "note": about.BOX_NOTE if result["data"]["sample"] else "",
                "answers": gallery.right_and_wrong(items, given, Item.open),
            }
        )
    headings = [("looking", "Does looking help?")]
    for part in splits:
        headings += [(f"boxes-{part['key']}", f"Boxes: {part['name']}")] if part["boxes"] else []
        headings += [(f"answers-{part['key']}", f"Answers: {part['name']}")]
    by_group, pair = _groups(result), _against(result)
    headings += [("groups", "By data set, modality and organ")] if by_group else []
    headings += [("against", f"Against {pair['run']}")] if pair else []
    scored = [{"name": part["name"], "table": clinical_table(part)} for part in result["splits"].values() if part["clinical"]]
    headings += [("clinical", "Clinical scores of the reports")] if scored else []
    experts = _experts(run / EXPERTS_FILE)
    headings += [("experts", "Experts")] if experts else []
    analysis = _analysis(run / ANALYSIS)
    headings += [("analysis", "How the tasks pull")] if analysis else []
    headings += [
        ("loss", "Loss per task"),
        ("router", "Router"),
        ("settings", "Settings and machine"),
        ("limits", "What this does not show"),
    ]
    path = run / REPORT_FILE
    html = page.render(
        title=f"Uni-Med run “{recipe.name}”",
        subtitle=recipe.description,
        notice=NOTICE,
        headings=headings,
        cards=_cards(record, result),
        table=table(result),
        splits=splits,
        groups=by_group,
        against=pair,
        clinical=scored,
        true_colour=gallery.TRUE,
        guess_colour=gallery.GUESS,
        loss=page.Markup(plots.loss_per_task(log)),
        learning_rate=page.Markup(plots.learning_rate(log)),
        router=_router(history) if experts is None else None,
        experts=experts,
        analysis=analysis,
        settings=_settings(recipe, record, result),
        recipe=recipes.dump(recipe),
        limits=_limits(result),
    )
    io.write_text(path, html)
    return path


def _analysis(folder: Path) -> list[dict[str, str]]:
    """The plots of `unimed analyze`, as pictures in the page; a file that is no picture is named."""
    if not (folder / ANALYSIS_FILE).is_file():
        return []
    found = []
    for one in io.read_json(folder / ANALYSIS_FILE).get("plots", []):
        place = io.inside(folder, str(one["file"]), links=False)
        try:
            with Image.open(place, formats=("PNG",)) as image:
                uri = gallery.data_uri(image.convert("RGB"), 1600, optimize=False)
        except (OSError, ValueError) as error:
            raise UserError(f"{place}: not a picture ({error}); make it again with: unimed analyze {folder.parent}") from error
        found.append({"title": str(one["title"]), "text": str(one["text"]), "uri": uri})
    return found


def _groups(result: dict[str, Any]) -> list[dict[str, Any]]:
    """A table for each kind of group that has several: the trained row's scores with intervals, the majority answers' beside them."""
    found = []
    for kind in groups.KINDS:
        lines = []
        tasks = [task for task in TASKS if any(task in part["counts"] for part in result["splits"].values())]
        for part in result["splits"].values():
            for group, by_task in part["groups"][kind].items():
                lines.append({"split": part["name"], "name": group, "cells": [_group_cell(by_task.get(task), task) for task in tasks]})
        if len({line["name"] for line in lines}) > 1:
            found.append({"kind": kind, "tasks": [(task, TASKS[task].strict.removesuffix("_strict")) for task in tasks], "lines": lines})
    return found


def _group_cell(one: dict[str, Any] | None, task: str) -> dict[str, str]:
    if one is None:
        return dict.fromkeys(("value", "interval", "count", "majority"), "")
    metric = TASKS[task].strict
    value, majority = (one["rows"].get(row, {}).get(metric) for row in (TRAINED, MAJORITY))
    ends = one["intervals"].get(metric)
    return {
        "value": "–" if value is None else f"{value:.3f}",
        "interval": f"{ends[0]:.2f}–{ends[1]:.2f}" if ends else "",
        "count": f"{one['count']:,}",
        "majority": "" if majority is None else f"{majority:.3f}",
    }


def _against(result: dict[str, Any]) -> dict[str, Any] | None:
    """The differences to another run, where the last evaluation compared them."""
    if "against" not in result:
        return None
    lines = []
    for split, tasks in result["against"]["splits"].items():
        for task, found in tasks.items():
            for metric in groups.table_metrics(task):
                one = found[metric]
                low, high = one["interval"] or (0.0, 0.0)
                lines.append(
                    {
                        "split": result["splits"][split]["name"],
                        "task": task,
                        "metric": metric,
                        "scores": (f"{one['score']:.3f}", f"{one['other']:.3f}"),
                        "difference": f"{one['difference']:+.3f}",
                        "interval": f"{low:+.3f} to {high:+.3f}" if one["interval"] else "no mean of answers",
                        "clear": low > 0 or high < 0,
                        "drawn": f"{found['count']:,} items; {found['drawn']}",
                    }
                )
    names = {split: result["splits"][split]["name"] for split in result["against"]["splits"]}
    plot = page.Markup(plots.differences(result["against"]["splits"], names, result["strict"]))
    return {"run": result["against"]["run"], "lines": lines, "plot": plot}


def _experts(file: Path) -> dict[str, Any] | None:
    """Tables of a Med-MoE run: use by domain and layer, accuracy of the router, cost of a layer."""
    if not file.is_file():
        return None
    found = io.read_json(file)
    splits = []
    for split, part in found["splits"].items():
        rows = [
            [domain, layer.removeprefix("language_model.model.").removesuffix(".mlp"), *(f"{share:.3f}" for share in shares)]
            for domain, by_layer in part["use"].items()
            for layer, shares in zip(found["layers"], by_layer, strict=True)
            if any(shares)
        ]
        accuracy = ", ".join(f"{'images' if name == 'samples' else name} {value:.3f}" for name, value in part["accuracy"].items())
        splits.append({"name": about.SPLIT_NAMES.get(split, split), "images": part["images"], "accuracy": accuracy, "rows": rows})
    cost = found["cost"]
    forms = [(name, f"{one['ms']:.2f} ms, {one['bytes_kept'] / 2**20:.2f} MiB kept") for name, one in cost["forms"].items()]
    return {
        "domains": found["domains"],
        "meta": found.get("meta", True),
        "splits": splits,
        "labels": page.Markup(_labels(found["labels"])) if found.get("labels") else None,
        "tokens": cost["tokens"],
        "width": cost["width"],
        "forms": forms,
    }


def _labels(found: dict[str, dict[str, float]]) -> str:
    from unimed.models.medmoe import RouterAccuracy, label_curve_figure

    with plots.plt.rc_context(plots.STYLE):
        return plots.svg(label_curve_figure({int(count): RouterAccuracy(**one) for count, one in found.items()}), "router by labels")


def _cards(record: dict[str, Any], result: dict[str, Any]) -> list[tuple[str, str]]:
    first = next(iter(result["splits"].values()))
    better = first["better"]
    return [
        (f"{sum(better.values())} of {len(better)}", f"tasks beat the baselines ({first['name']})"),
        (f"{record['seconds'] / 60:.1f} min", f"training, {record['steps']} steps"),
        (f"{record['parameters'] / 1e6:.1f} M", f"parameters, {record['trained_parameters'] / 1e6:.1f} M trained"),
        (f"{record['examples']:,}", "training items"),
    ]


def table(result: dict[str, Any]) -> dict[str, Any]:
    """Every score of the table, with bars, intervals and verdicts."""
    splits = list(result["splits"].values())
    rows_there = [row for row in ROWS if any(row in split["rows"] for split in splits)]
    tasks = []
    for task in (task for task in TASKS if any(task in split["counts"] for split in splits)):
        names = result["headline"][task], result["strict"][task]
        rows = [
            {"name": row, "trained": row == TRAINED, "cells": [_cell(split, row, task, *names) for split in splits]} for row in rows_there
        ]
        tasks.append({"tag": task, "about": TASKS[task].about, "nature": _nature(task), "metric": names[0], "rows": rows})
    return {
        "splits": [split["name"] for split in splits],
        "tasks": tasks,
        "drawn": [f"Intervals of the {split['name']}: bootstrap {drawn_by(split)}." for split in splits],
        "verdicts": [
            {"name": f"{split['name']}, {which}", "marks": _marks(split, split[key])}
            for split in splits
            for key, which in (("better", "headline"), ("better_strict", "strict"))
        ],
        "kinds": [kind.replace("_", " ") for kind in KINDS],
        "odd": _odd(splits),
    }


def _cell(split: dict[str, Any], row: str, task: str, metric: str, strict: str) -> dict[str, str]:
    scores = split["rows"].get(row, {}).get(task)
    return {
        "width": f"{100 * min(max(scores[metric] if scores else 0.0, 0.0), 1.0):.1f}",
        "value": cell(split, row, task, metric),
        "strict": cell(split, row, task, strict),
        "interval": interval_cell(split, row, task, metric),
        "strict_interval": interval_cell(split, row, task, strict),
    }


def _nature(task: str) -> str:
    loose, strict = TASKS[task].nature
    return f"{loose}; strict: {strict}"


def _marks(split: dict[str, Any], better: dict[str, bool]) -> list[tuple[str, str]]:
    return [(task, ("yes" if better[task] else "no") if task in better else "no baseline") for task in split["counts"]]


def _odd(splits: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """How many answers of the trained model are not simply an answer."""
    lines = []
    for split in splits:
        found = odd_answers(split, TRAINED)
        for task, count in split["counts"].items():
            counts = [str(found.get(task, {}).get(kind, 0)) if kind in TASKS[task].kinds else "–" for kind in KINDS]
            lines.append({"split": split["name"], "task": task, "counts": [count, *counts]})
    return lines


def _router(history: list[dict[str, Any]]) -> dict[str, Any] | None:
    if not history:
        return None
    first, last = history[0], _last_seen(history)
    return {
        "entropies": ", ".join(f"{task} {entry['entropy']:.3f}" for task, entry in last["tasks"].items()),
        "maps": [page.Markup(plots.gate_heat_map(entry, f"step {entry['step']}")) for entry in (first, last)],
        "over_training": page.Markup(plots.gates_over_training(history)),
    }


def _last_seen(history: list[dict[str, Any]]) -> dict[str, Any]:
    """The newest record of every task: with one task a batch, the last log may lack some."""
    tasks: dict[str, Any] = {}
    for entry in history:
        tasks.update(entry["tasks"])
    return {"step": history[-1]["step"], "tasks": tasks}


def _settings(recipe: recipes.Recipe, record: dict[str, Any], result: dict[str, Any]) -> list[tuple[str, list[tuple[str, str]]]]:
    seconds = [("training", record["seconds"])] + [(f"evaluation, {split}", part["seconds"]) for split, part in result["splits"].items()]
    counts = [(part["name"], ", ".join(f"{task} {count}" for task, count in part["counts"].items())) for part in result["splits"].values()]
    return [
        ("Machine", list(record["machine"].items())),
        ("Time", [(name, f"{value:.0f} s") for name, value in seconds]),
        ("Data", [("trained on", recipe.data.where), ("evaluated on", result["data"]["root"]), *counts]),
        ("Evaluation", [(name, str(value)) for name, value in result["evaluate"].items()]),
    ]


def _limits(result: dict[str, Any]) -> list[str]:
    """What the data that was used, and the way it was used, leave open. Nothing here is said of other data."""
    splits = list(result["splits"].values())
    points = ["No generalisation beyond the items evaluated here is shown."]
    points += [f"{split['name'][:1].upper()}{split['name'][1:]}: {_who(split)}" for split in splits]
    for one in result.get("sets", ()):
        cited = f" {one['citation'].rstrip('.')}." if one["citation"] else ""
        points.append(
            f"{one['title']}: licence {one['licence'] or 'not given'}.{cited}" + (f" Known: {one['known']}." if one["known"] else "")
        )
    points += about.LIMITS if result["data"]["sample"] else ()
    if any(split["facts"]["synthetic_reports"] for split in splits):
        points.append(about.SYNTHETIC)
    if result["evaluate"]["limit"]:
        points.append(f"At most {result['evaluate']['limit']} items of a task and split were evaluated, evenly spaced.")
    if any(not TASKS[task].needs_image for split in splits for task in split["counts"]):
        points.append("Text questions have no image, so blanking changes nothing.")
    points += [f"The row “{row}” is missing: {reason}." for row, reason in result["left_out"].items()]
    if any(task not in split["better"] for split in splits for task in split["counts"]):
        points.append("Where the majority answers were not fitted, the data has no training items of that task.")
    points += [
        "One seed and one run: differences of a few items are noise.",
        "A score can be compared with the published Uni-Med only for the same data, splits, encoder and language model.",
    ]
    return points


def _who(split: dict[str, Any]) -> str:
    """Whose images a split shows, and whether training showed those people, too."""
    facts = split["facts"]
    text = f"{sum(split['counts'].values())} items of {', '.join(facts['datasets'])}. "
    if not facts["subjects"]:
        return text + "No image is among them."
    shared = facts["subjects_in_training"]
    if shared is None:
        return text + "The training data is not there any more, so whether it shows the same people cannot be told."
    known = ", ".join(f"{name} {shared[name]} of {count}" for name, count in facts["subjects"].items() if count)
    unknown = ", ".join(name for name, count in facts["subjects"].items() if not count)
    text += f"Subjects that the training data shows as well: {known}. " if known else ""
    return text + (f"Nothing names the subjects of {unknown}: the same people may be in training." if unknown else "")
