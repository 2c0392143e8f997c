"""`unimed study` and `unimed analyze`; `app.py` registers them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from unimed.cli.shared import Device, Overrides, RunPath, console, new_table, run_folder
from unimed.errors import UserError
from unimed.notice import NOTICE

INTERFERENCE = "interference"  # reads the runs of connectors, makes none of its own


def study(
    name: Annotated[str, typer.Argument(help="connectors, interference, imax or medmoe")],
    out: Annotated[Path, typer.Option(help="the study's folder: data, runs, table.json, table.md, plot.png")],
    seeds: Annotated[int, typer.Option(help="runs of each row")] = 3,
    steps: Annotated[int | None, typer.Option(help="training steps of a run; by default the study's own")] = None,
    jobs: Annotated[int, typer.Option(help="runs at a time, one thread each")] = 2,
    rows: Annotated[str, typer.Option(help="only these, by comma")] = "",
    source: Annotated[Path | None, typer.Option("--from", help="interference: the folder of study connectors, if not --out")] = None,
    clean: Annotated[bool, typer.Option("--clean", help="delete models and data of finished runs; results and tables stay")] = False,
) -> None:
    """Train and compare: every row with several seeds, in processes. The same command again goes on.

    interference trains nothing: it compares how tasks pull in the runs of connectors, one MLP and the paper's CMoE.

    Examples:

      [cyan]unimed study connectors --out connectors[/]                            42 runs, and 3 that choose the learning rate

      [cyan]unimed study interference --out connectors[/]                          connectors/interference/, from its runs

      [cyan]unimed study imax --out study[/]                                       24 runs

      [cyan]unimed study imax --out study --rows imax-cmoe,dmax-cmoe --seeds 1[/]

      [cyan]unimed study imax --out study --clean[/]

      [cyan]unimed study medmoe --out parts[/]                                     15 runs from one second stage of Med-MoE
    """
    from unimed.cli.shared import bar
    from unimed.studies import run

    if name == INTERFERENCE:
        if clean or rows or steps is not None:
            raise UserError("study interference: it has no runs of its own; give --out and --from only")
        _interference(source or out, out)
        return
    found = run.named(name)
    if source is not None:
        raise UserError(f"--from {source}: only study interference reads the runs of another study")
    if clean:
        freed = run.clean(out)
        console.print(f"deleted {freed / 1e6:,.1f} MB of {out}", highlight=False, soft_wrap=True)
        return
    with bar(console) as progress:
        task = progress.add_task(name, total=None, note="")

        def tell(done: int, total: int, what: str) -> None:
            progress.update(task, completed=done, total=total or None, note=what)

        run.run_study(found, out, seeds, steps, jobs, [one.strip() for one in rows.split(",") if one.strip()] or None, tell)
    console.print((out / "table.md").read_text(), highlight=False, soft_wrap=True)
    size = f"{run.disk(out) / 1e6:,.1f} MB on disk (--clean keeps the results)"
    console.print(f"{out}: {size} · {NOTICE}", highlight=False, soft_wrap=True)


def _interference(source: Path, out: Path) -> None:
    from unimed.studies.interference import place_of, study

    study(source, out)
    place = place_of(source, out)
    console.print((place / "table.md").read_text(), highlight=False, soft_wrap=True)
    console.print(f"{place} · {NOTICE}", highlight=False, soft_wrap=True)


def analyze(run: RunPath, overrides: Overrides = None, device: Device = "auto") -> None:
    """Show how the tasks of a run pull at its weights, what its experts do, and what its connector does to images.

    Writes tables and plots to RUN/analysis/, and into report.html where the run was evaluated. A run without train.probe_every is measured
    at its checkpoints.

    Examples:

      [cyan]unimed analyze tiny[/]

      [cyan]unimed analyze tiny data.root=sample 'evaluate.splits=[subject]'[/]    held-out images of other data
    """
    from unimed.cli.evaluate import write_report
    from unimed.evaluate.run import METRICS_FILE
    from unimed.studies.analyze import FOLDER, analyze

    folder = run_folder(run)
    result = analyze(folder, lambda text: console.print(f"analysis: {text}", highlight=False), device, overrides)
    _show(result)
    console.print(f"analysis: {folder / FOLDER} · {NOTICE}", highlight=False, soft_wrap=True)
    if (folder / METRICS_FILE).is_file():
        try:
            write_report(folder)
        except UserError as error:  # the analysis is whole without it
            console.print(f"report not written again: {error}", style="yellow", highlight=False, soft_wrap=True)


def _show(result: dict) -> None:
    if result["modules"]:
        names = list(next(iter(result["modules"].values())))
        title = f"{result['run']}: how the tasks pull, mean over {len(result['steps'])} points"
        table = new_table(title)
        for text in ("module", *names):
            table.add_column(text.replace(" of ", "\nof "), justify="left" if text == "module" else "right", no_wrap=True)
        for module, found in result["modules"].items():
            table.add_row(module, *("–" if found[name] is None else f"{found[name]:.3f}" for name in names))
        console.print(table)
        console.print("of halves: of one task with itself, what noise leaves", style="dim", highlight=False)
    for side, values in result["features"].items():
        if values:
            console.print(f"silhouette by task {side} the connector: {values['all']:.3f}", highlight=False)
    for what in result["lacks"]:
        console.print(f"lacks {what}", style="yellow", highlight=False, soft_wrap=True)


COMMANDS: dict[str, Callable[..., None]] = {"study": study, "analyze": analyze}
