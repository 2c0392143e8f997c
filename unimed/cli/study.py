"""`unimed study`; `app.py` registers it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from unimed.cli.shared import console
from unimed.notice import NOTICE


def study(
    name: Annotated[str, typer.Argument(help="connectors or imax")],
    out: Annotated[Path, typer.Option(help="the study's folder: data, runs, table.json, table.md, plot.png")],
    seeds: Annotated[int, typer.Option(help="runs of each row")] = 3,
    steps: Annotated[int | None, typer.Option(help="training steps of a run; by default the study's own")] = None,
    jobs: Annotated[int, typer.Option(help="runs at a time, one thread each")] = 2,
    rows: Annotated[str, typer.Option(help="only these, by comma")] = "",
    clean: Annotated[bool, typer.Option("--clean", help="delete models and data of finished runs; results and tables stay")] = False,
) -> None:
    """Train and compare: every row with several seeds, in processes. The same command again goes on.

    Examples:

      [cyan]unimed study connectors --out connectors[/]                            42 runs, and 3 that choose the learning rate

      [cyan]unimed study imax --out study[/]                                       24 runs

      [cyan]unimed study imax --out study --rows imax-cmoe,dmax-cmoe --seeds 1[/]

      [cyan]unimed study imax --out study --clean[/]
    """
    from unimed.cli.shared import bar
    from unimed.studies import run

    found = run.named(name)
    if clean:
        freed = run.clean(out)
        console.print(f"deleted {freed / 1e6:,.1f} MB of {out}", highlight=False, markup=False, soft_wrap=True)
        return
    with bar(console) as progress:
        task = progress.add_task(name, total=None, note="")

        def tell(done: int, total: int, what: str) -> None:
            progress.update(task, completed=done, total=total or None, note=what)

        run.run_study(found, out, seeds, steps, jobs, [one.strip() for one in rows.split(",") if one.strip()] or None, tell)
    console.print((out / "table.md").read_text(), highlight=False, markup=False, soft_wrap=True)
    size = f"{run.disk(out) / 1e6:,.1f} MB on disk (--clean keeps the results)"
    console.print(f"{out}: {size} · {NOTICE}", highlight=False, markup=False, soft_wrap=True)


COMMANDS: dict[str, Callable[..., None]] = {"study": study}
