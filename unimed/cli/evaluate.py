"""`unimed evaluate` and `unimed report`; `app.py` registers them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from unimed.cli.shared import Device, Overrides, RunPath, Strict, Verify, bar, console, no_bars_of_transformers, nothing, run_folder
from unimed.notice import NOTICE


def evaluate(run: RunPath, overrides: Overrides = None, device: Device = "auto", verify: Verify = False, strict: Strict = False) -> None:
    """Score a run on the held-out slabs and the held-out subject, beside answers that need no image.

    Writes metrics.json and predictions.json into the run.

    Examples:

      [cyan]unimed evaluate tiny[/]

      [cyan]unimed evaluate tiny evaluate.limit=20 'evaluate.splits=[slab]'[/]
    """
    score(run_folder(run), [*(overrides or []), *["data.strict=true"] * strict], device, verify)


def report(run: RunPath) -> None:
    """Write the run's report.html: the table, boxes on slices, answers, losses, router gates. One file, no network.

    Example: [cyan]unimed report tiny[/]
    """
    write_report(run_folder(run))


def score(run: Path, overrides: list[str] | None, device: str = "auto", verify: bool = False) -> None:
    from rich.table import Table

    from unimed.evaluate.evaluate import TRAINED
    from unimed.evaluate.run import answer_table, evaluate_run, odd_answers
    from unimed.tasks import TASKS

    no_bars_of_transformers()
    with bar() as progress:
        tasks: dict[str, Any] = {}

        def show(split: str, row: str, done: int, total: int) -> None:
            key = f"{split}: {row}"
            if key not in tasks:
                tasks[key] = progress.add_task(key, total=total, note="")
            progress.update(tasks[key], completed=done, total=total)
            if done == total and not console.is_terminal:
                console.print(f"evaluation of {split}: {row}, {total} answers", highlight=False)

        result = evaluate_run(run, overrides, show, device, verify)
    for strict, what in ((False, "headline metric of each task"), (True, "the same answers, scored strictly")):
        header, lines = answer_table(result, strict)
        table = Table(title=f"{result['run']}: {what} · {NOTICE}")
        for i, text in enumerate(header):
            table.add_column(text, justify="left" if i == 0 else "right", no_wrap=True)
        for split, rows in lines.items():
            table.add_row(f"[italic]{result['splits'][split]['name']}[/]")
            for row in rows:
                table.add_row(*row, style="bold" if row[0] == TRAINED else None, end_section=row[0] == TRAINED)
        console.print(table)
        for name in header[1:]:
            task = name.partition("\n")[0]
            console.print(f"{' '.join(name.split())}: {TASKS[task].nature[strict]}", style="dim", highlight=False, soft_wrap=True)
    for row, reason in result["left_out"].items():
        console.print(f"{row}: left out ({reason})", style="yellow", highlight=False, soft_wrap=True)
    for part in result["splits"].values():
        for better, how in ((part["better"], ""), (part["better_strict"], "scored strictly, ")):
            good = [task for task, is_better in better.items() if is_better]
            count = f"{len(good)} of {len(better)} tasks: {', '.join(good) or 'none'}"
            console.print(f"{part['name']}: {how}better than the baselines on {count}", highlight=False, soft_wrap=True)
        odd = [f"{task} {count} {kind}" for task, kinds in odd_answers(part, TRAINED).items() for kind, count in kinds.items()]
        console.print(f"{part['name']}: answers that are not simply one: {', '.join(odd) or 'none'}", highlight=False, soft_wrap=True)
    _show_gates(run)


def _show_gates(run: Path) -> None:
    """The router's gates per task, as the last steps of training saw them."""
    from rich.table import Table

    from unimed import io
    from unimed.train.trainer import ROUTER_FILE

    history = io.read_json(run / ROUTER_FILE) if (run / ROUTER_FILE).is_file() else []
    if not history:
        return
    last = history[-1]
    table = Table(title=f"{run.name}: mean gate of each expert, at step {last['step']}", title_justify="left")
    table.add_column("task", no_wrap=True)
    for expert in range(len(next(iter(last["tasks"].values()))["gates"])):
        table.add_column(f"expert {expert + 1}", justify="right")
    for task, entry in last["tasks"].items():
        table.add_row(task, *(f"{gate:.3f}" for gate in entry["gates"]))
    console.print(table)


def write_report(run: Path) -> None:
    from unimed.report.report import write

    with console.status("report") if console.is_terminal else nothing():
        path = write(run)
    console.print(f"report: {path} · {NOTICE}", highlight=False)


COMMANDS: dict[str, Callable[..., None]] = {"evaluate": evaluate, "report": report}
