"""The commands of `unimed sample`; `app.py` registers them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from unimed.cli.shared import bar, console
from unimed.notice import NOTICE


def build_(
    out: Annotated[Path, typer.Option(help="folder of the data set")] = Path(".cache/unimed/sample"),
) -> None:
    """Cut the vendored CT and MR volumes into slices with questions, boxes and synthetic reports.

    Works offline, gives the same bytes every time, and does nothing when the sample is there already.

    Example: [cyan]unimed sample build[/]
    """
    build(out)


def fetch(
    dest: Annotated[Path, typer.Option(help="folder for the archives")] = Path(".cache/unimed/archives"),
    names: Annotated[list[str] | None, typer.Argument(help="which archives; all of them by default", show_default=False)] = None,
) -> None:
    """Download the larger archives (more volumes, SmolLM2), each checked against its pinned sha256.

    Example: [cyan]unimed sample fetch[/]
    """
    from unimed.sample.archives import fetch_sample

    with bar() as progress:
        task = progress.add_task("fetching", total=None, note="")
        fetch_sample(dest, names or None, progress=lambda done, total, what: progress.update(task, completed=done, total=total, note=what))
    console.print(f"archives are in {dest} · {NOTICE}", highlight=False)


def brain(
    out: Annotated[Path, typer.Option(help="folder of the data set")] = Path(".cache/unimed/brain"),
    archives: Annotated[Path, typer.Option(help="folder of the archives")] = Path(".cache/unimed/archives"),
) -> None:
    """Cut an average brain (MR, 12 MB to download, checked by sha256) into slices with questions, boxes and synthetic reports.

    Where it is there, `unimed demo --model medmoe` has a fourth domain. Template and labels have their own terms: see dataset.json.

    Example: [cyan]unimed sample brain[/]
    """
    from unimed.sample.archives import fetch_sample
    from unimed.sample.brain import build_brain

    with bar() as progress:
        task = progress.add_task("brain", total=None, note="")
        archive = fetch_sample(archives, ["brain"], lambda done, total, what: progress.update(task, note=what))["brain"]
        build_brain(out, archive, lambda done, total, what: progress.update(task, completed=done, total=total, note=what))
    console.print(f"brain: {out} · {NOTICE}", highlight=False)


def build(out: Path) -> None:
    from unimed.sample.build import build_sample

    with bar() as progress:
        task = progress.add_task("sample", total=None, note="")
        build_sample(out, progress=lambda done, total, what: progress.update(task, completed=done, total=total, note=what))
    console.print(f"sample: {out} · {NOTICE}", highlight=False)


COMMANDS: dict[str, Callable[..., None]] = {"build": build_, "fetch": fetch, "brain": brain}
