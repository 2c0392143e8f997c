"""The bar of every command."""

from collections.abc import Iterable, Iterator
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


def bar(console: Console) -> Progress:
    """Hidden without a terminal."""
    return Progress(
        TextColumn("{task.description}", style="bold", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}", markup=False),
        console=console,
        disable=not console.is_terminal,
    )


T = TypeVar("T")
AT_ONCE = 100


def watched(items: Iterable[T], what: str) -> Iterator[T]:
    """The items, counted by a bar on a terminal while they are read."""
    with bar(Console(stderr=True, markup=False)) as progress:
        shown = progress.add_task(what, total=None, note="")
        count = 0
        for item in items:
            yield item
            count += 1
            if count % AT_ONCE == 0:
                progress.update(shown, completed=count)
        progress.update(shown, completed=count)
