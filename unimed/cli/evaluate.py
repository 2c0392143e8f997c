"""`unimed evaluate` and `unimed report`; `app.py` registers them."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import nullcontext
from json import dumps as json_text
from pathlib import Path
from typing import Annotated, Any

import typer

from unimed.cli.shared import Device, Overrides, RunPath, Strict, Verify, bar, console, importing, new_table, run_folder
from unimed.errors import UserError
from unimed.notice import NOTICE

GROUPS = 15  # of a table in the terminal


def evaluate(
    run: RunPath,
    overrides: Overrides = None,
    against: Annotated[str | None, typer.Option(help="another run: the difference on the same items, with its interval")] = None,
    data: Annotated[Path | None, typer.Option(help="other data: a folder of records, or of a published layout")] = None,
    split: Annotated[list[str] | None, typer.Option(help="which split; may stand several times")] = None,
    protocol: Annotated[str | None, typer.Option(help="released, standard or medmoe; by default the recipe's data and both tables")] = None,
    clinical: Annotated[list[str] | None, typer.Option(help="a scorer of reports, as radgraph=DIR; may stand several times")] = None,
    untrained: Annotated[bool, typer.Option("--untrained", help="add the row of the model before training")] = False,
    json: Annotated[Path | None, typer.Option("--json", help="write the scores here, too")] = None,
    device: Device = "auto",
    verify: Verify = False,
    strict: Strict = False,
) -> None:
    """Score a run on held-out data, beside answers that need no image, with 95 % intervals.

    Writes predictions.jsonl and metrics.json into the run. After an interruption the same command goes on.

    Examples:

      [cyan]unimed evaluate tiny[/]

      [cyan]unimed evaluate tiny --data hospital --split test --json scores.json[/]

      [cyan]unimed evaluate soft --against hard[/]

      [cyan]unimed evaluate tiny evaluate.limit=20 'evaluate.splits=[slab]'[/]
    """
    from unimed import io
    from unimed.tasks.protocol import PROTOCOLS, SETS

    if protocol not in (None, *PROTOCOLS, *SETS):
        raise UserError(f"--protocol {protocol}: it must be {' or '.join([*PROTOCOLS, *SETS])}")
    more = protocol if protocol in SETS else None  # on whole texts, beside the standard table
    protocol = "standard" if more else protocol
    changed = [*_data_overrides(data), *([f"evaluate.splits={json_text(split)}"] if split else [])]
    changed += [*([f"data.protocol={protocol}"] if protocol else []), *(overrides or []), *["data.strict=true"] * strict]
    scorers = _scorers(clinical or [])
    folder, other = run_folder(run), run_folder(against) if against else None
    if other is not None and other.resolve() == folder.resolve():
        raise UserError(f"--against {against}: it is the run itself")
    if other is not None:
        from unimed.evaluate import against as pairs

        pairs.check(folder, other, changed)
        score(other, changed, device, verify, False, protocol)
    result = score(folder, [*changed, *scorers], device, verify, untrained, protocol)
    if more:
        _show_set(result, more)
    _show_groups(result, protocol)
    _show_clinical(result)
    if other is not None:
        pairs.add(folder, other, result)
        _show_difference(result, protocol)
    if json is not None:
        io.write_json(json, result)
        console.print(f"scores: {json}", highlight=False)


def _data_overrides(data: Path | None) -> list[str]:
    """Overrides that put this folder in the place of the run's data."""
    if data is None:
        return []
    if not data.is_dir():
        raise UserError(f"--data {data}: no such folder")
    if not (data / "dataset.json").is_file():
        return [f"data.root={data}"]
    name = re.sub(r"[^A-Za-z0-9_-]", "_", data.resolve().name).lstrip("_-") or "data"
    return [f"data.sets.{name}.root={data}"]


def _scorers(given: list[str]) -> list[str]:
    """The overrides of --clinical."""
    for one in given:
        name, equals, path = one.partition("=")
        if not (name and equals and path):
            raise UserError(f"--clinical {one}: expected NAME=PATH, for example radgraph=weights")
    return [f"evaluate.clinical.{one}" for one in given]


def report(run: RunPath) -> None:
    """Write the run's report.html: the table, boxes on slices, answers, losses, router gates. One file, no network.

    Example: [cyan]unimed report tiny[/]
    """
    write_report(run_folder(run))


def score(
    run: Path,
    overrides: list[str] | None,
    device: str = "auto",
    verify: bool = False,
    untrained: bool = False,
    protocol: str | None = None,
) -> dict[str, Any]:
    with importing():
        from unimed.evaluate.evaluate import TRAINED
        from unimed.evaluate.run import answer_table, drawn_by, evaluate_run, interval_cell, odd_answers
        from unimed.tasks import TASKS

    with bar() as progress:
        tasks: dict[str, Any] = {}

        def show(split: str, row: str, done: int, total: int) -> None:
            key = f"{split}: {row}"
            if key not in tasks:
                tasks[key] = progress.add_task(key, total=total, note="")
            progress.update(tasks[key], completed=done, total=total)
            if done == total and not console.is_terminal:
                console.print(f"evaluation of {split}: {row}, {total} answers", highlight=False)

        result = evaluate_run(run, overrides, show, device, verify, untrained)
    tables = ((False, "headline metric of each task"), (True, "the same answers, scored strictly"))
    shown = [(strict, what) for strict, what in tables if protocol is None or strict == (protocol == "standard")]
    for strict, what in shown:
        header, lines = answer_table(result, strict)
        table = new_table(f"{result['run']}: {what} · {NOTICE}")
        for i, text in enumerate(header):
            table.add_column(text, justify="left" if i == 0 else "right", no_wrap=True)
        for split, rows in lines.items():
            table.add_row(result["splits"][split]["name"], style="italic")
            for row in rows:
                table.add_row(*row, style="bold" if row[0] == TRAINED else None)
            part, metrics = result["splits"][split], result["strict" if strict else "headline"]
            cells = [
                interval_cell(part, TRAINED, task, metrics[task]).replace("0.", ".")
                for task in (name.partition("\n")[0] for name in header[1:])
            ]
            table.add_row("95 % interval", *cells, style="dim", end_section=True)
        console.print(table)
        for name in header[1:]:
            task = name.partition("\n")[0]
            console.print(f"{' '.join(name.split())}: {TASKS[task].nature[strict]}", style="dim", highlight=False, soft_wrap=True)
    for part in result["splits"].values():
        console.print(f"{part['name']}: intervals by bootstrap {drawn_by(part)}", style="dim", highlight=False, soft_wrap=True)
    for row, reason in result["left_out"].items():
        console.print(f"{row}: left out ({reason})", style="yellow", highlight=False, soft_wrap=True)
    for part in result["splits"].values():
        verdicts = ((False, part["better"], ""), (True, part["better_strict"], "scored strictly, "))
        for better, how in [(better, how) for strict, better, how in verdicts if protocol is None or strict == (protocol == "standard")]:
            good = [task for task, is_better in better.items() if is_better]
            count = f"{len(good)} of {len(better)} tasks: {', '.join(good) or 'none'}"
            console.print(f"{part['name']}: {how}better than the baselines on {count}", highlight=False, soft_wrap=True)
        odd = [f"{task} {count} {kind}" for task, kinds in odd_answers(part, TRAINED).items() for kind, count in kinds.items()]
        console.print(f"{part['name']}: answers that are not simply one: {', '.join(odd) or 'none'}", highlight=False, soft_wrap=True)
    _show_gates(run)
    return result


def _shown(result: dict[str, Any], protocol: str | None) -> list[tuple[str, dict[str, str]]]:
    """What is added to a title, and task -> metric, for each table that a protocol has: the headlines, the strict scores, or both."""
    both = [("released", "", result["headline"]), ("standard", ", scored strictly", result["strict"])]
    return [(title, names) for name, title, names in both if protocol in (None, name)]


def _show_groups(result: dict[str, Any], protocol: str | None) -> None:
    """The trained row by data set, modality and organ, where there are several."""
    from unimed.evaluate.groups import group_table

    for title, names in _shown(result, protocol)[-1:]:
        for kind in ("dataset", "modality", "organ"):
            if all(len(part["groups"][kind]) < 2 for part in result["splits"].values()):
                continue
            header, lines, left = group_table(result, kind, names, GROUPS)
            table = new_table(f"{result['run']} by {kind}{title}: score (items) · {NOTICE}")
            for number, text in enumerate(header):
                table.add_column(text, justify="right" if number > 1 else "left")
            for line in lines:
                table.add_row(*line)
            console.print(table)
            if left:
                console.print(f"{left} smaller groups are in metrics.json and report.html", style="dim", highlight=False)


def _show_clinical(result: dict[str, Any]) -> None:
    """The scores of the reports, a line a score, with the interval of the trained row."""
    from unimed.evaluate.run import clinical_table

    for part in result["splits"].values():
        if part["clinical"]:
            header, lines = clinical_table(part)
            table = new_table(f"{result['run']}, {part['name']}: clinical scores of the reports · {NOTICE}")
            for text in header:
                table.add_column(text, justify="left" if text == "score" else "right")
            for line in lines:
                table.add_row(*line)
            console.print(table)


def _show_difference(result: dict[str, Any], protocol: str | None) -> None:
    from unimed.evaluate.against import span_of, strip

    found = result["against"]
    for title, names in _shown(result, protocol):
        span = span_of(found["splits"], names)
        table = new_table(f"{result['run']} less {found['run']}, on the same items{title}")
        for text in ("split", "task", "difference", "95 % interval", f"from {-span:.2f} to {span:.2f}", "bootstrap over"):
            table.add_column(text, no_wrap=True)
        for split, tasks in found["splits"].items():
            for task, of in tasks.items():
                one = of[names[task]]
                low, high = one["interval"] or (0.0, 0.0)
                ends = f"{low:+.3f} to {high:+.3f}" if one["interval"] else "no mean of answers"
                line = (f"{one['difference']:+.3f}", ends, strip(one, span), of["drawn"] if one["interval"] else "–")
                table.add_row(result["splits"][split]["name"], task, *line, style="bold" if low > 0 or high < 0 else None)
        console.print(table)
    console.print("bold: the interval leaves out zero", style="dim", highlight=False)


def _show_set(result: dict[str, Any], name: str) -> None:
    """The scores of a set, a line a data set and row."""
    from unimed.tasks.metrics.medmoe import NAMES

    table = new_table(f"{result['run']}: scores of {name} · {NOTICE}")
    for text in ("split", "data set", "answers by", *NAMES):
        table.add_column(text.replace("_", "\n"), justify="right" if text in NAMES else "left")
    for part in result["splits"].values():
        for row, datasets in part["sets"][name].items():
            for dataset, scores in datasets.items():
                table.add_row(part["name"], dataset, row, *(f"{scores[one]:.3f}" if one in scores else "–" for one in NAMES))
    console.print(table)


def _show_gates(run: Path) -> None:
    """The router's gates per task, as the last steps of training saw them."""
    from unimed import io
    from unimed.train.folder import Run

    router = Run(run).router
    history = io.read_json(router) if router.is_file() else []
    if not history or len(next(iter(history[-1]["tasks"].values()))["gates"]) == 1:
        return
    last = history[-1]
    table = new_table(f"{run.name}: mean gate of each expert, at step {last['step']}")
    table.add_column("task", no_wrap=True)
    for expert in range(len(next(iter(last["tasks"].values()))["gates"])):
        table.add_column(f"expert {expert + 1}", justify="right")
    for task, entry in last["tasks"].items():
        table.add_row(task, *(f"{gate:.3f}" for gate in entry["gates"]))
    console.print(table)


def write_report(run: Path) -> None:
    from unimed.report.report import write

    with console.status("report") if console.is_terminal else nullcontext():
        path = write(run)
    console.print(f"report: {path} · {NOTICE}", highlight=False)


COMMANDS: dict[str, Callable[..., None]] = {"evaluate": evaluate, "report": report}
