"""Shared by the commands of `unimed`: the console, option types, folders of runs."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from unimed.errors import UserError

RUNS = Path("runs")

console = Console(markup=False)  # a name or an answer may look like markup
errors = Console(stderr=True, markup=False)
debugging = False  # --debug: everything is shown

Overrides = Annotated[list[str] | None, typer.Argument(help="dotted recipe overrides, for example train.max_steps=50", show_default=False)]
Strict = Annotated[bool, typer.Option("--strict", help="stop at the first bad record of the data (data.strict=true)")]
Device = Annotated[str, typer.Option(help="auto (a GPU where there is one), cpu, cuda or cuda:N")]
Verify = Annotated[bool, typer.Option("--verify", help="hash the model's files before they are read")]
RunPath = Annotated[str, typer.Argument(help="a run: its name under runs/, or its folder")]


def rank() -> int | None:
    """This process's number among those of torchrun; None for a single process."""
    many = "LOCAL_RANK" in os.environ and os.environ.get("WORLD_SIZE", "1") != "1"
    return int(os.environ.get("RANK", "0")) if many else None


def bar(where: Console = console) -> Any:
    from unimed.progress import bar

    return bar(where)


@contextmanager
def importing() -> Iterator[None]:
    """Garbage is not collected meanwhile: that took a fifth of the time in which torch and transformers are imported, and found nothing."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


def new_table(title: str = "", header: bool = True) -> Any:
    """A table as all commands show it: without a frame, so that a score of each of six tasks fits into 80 columns uncut."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    return Table(
        title=title or None,
        title_justify="left",
        box=SIMPLE_HEAD,
        show_header=header,
        show_edge=False,
        pad_edge=False,
        collapse_padding=True,
    )


def run_folder(run: str) -> Path:
    for path in (RUNS / run, Path(run)):
        if path.is_dir():
            return path
    known = sorted(path.parent.name for path in RUNS.glob("[!.]*/recipe.yaml"))
    raise UserError(f"no run {run!r}: not a folder, and runs/ has {', '.join(known) or 'none'}; train one with: unimed train tiny")


def model_folder(model: str | None) -> Path:
    """The run or saved model of that name; by default the newest run with a model."""
    from unimed.inference.files import model_in

    if model is not None:
        found = run_folder(model)
        model_in(found)  # says what is wrong before torch is imported
        return found
    trained = sorted(RUNS.glob("[!.]*/model"), key=lambda path: path.stat().st_mtime)
    if not trained:
        raise UserError("no trained model under runs/; train one with: unimed demo, or name one with --model")
    return trained[-1].parent
