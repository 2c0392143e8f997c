"""The commands of `unimed data`; `app.py` registers them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from unimed.notice import NOTICE

Strict = Annotated[bool, typer.Option("--strict", help="stop at the first bad record")]
Folder = Annotated[Path, typer.Argument(help="a folder of records: dataset.json, records-*.jsonl")]
JsonFile = Annotated[Path | None, typer.Option("--json", help="write the numbers and findings here, too")]
HtmlFile = Annotated[Path | None, typer.Option("--html", help="write a page with numbers, findings and samples here")]


def _console() -> Console:
    return Console(highlight=False, soft_wrap=True)


def import_(
    form: Annotated[str, typer.Argument(help="llava, swift or messages")],
    file: Annotated[Path, typer.Argument(help="the rows: a JSON list, or JSON lines")],
    images: Annotated[Path, typer.Option(help="the folder that image paths are relative to")],
    out: Annotated[Path, typer.Option(help="the new folder of records")],
    name: Annotated[str, typer.Option(help="of the data set; by default the new folder's")] = "",
    task: Annotated[str, typer.Option(help="of the questions: vqa, caption, cls, or qa for text only")] = "",
    patient: Annotated[str, typer.Option(help="the field of a row that names the patient")] = "",
    val: Annotated[float, typer.Option(help="share for validation")] = 0.1,
    test: Annotated[float, typer.Option(help="share for test")] = 0.1,
    seed: Annotated[int, typer.Option(help="of the splits")] = 0,
    strict: Strict = False,
) -> None:
    """Make a folder of records from rows of LLaVA, ms-swift or chat messages.

    Patients, and rows that show one image file, stay in one split. The images stay where they are.

    Examples:

      [cyan]unimed data import llava data.json --images imgs --out mine[/]

      [cyan]unimed data import swift boxes.jsonl --images imgs --out mine --patient subject_id[/]
    """
    from unimed.records.imports import import_rows

    done = import_rows(form, file, images, out, name, task, patient, val, test, seed, strict)
    console = _console()
    if done.left_out:
        console.print(done.left_out, style="yellow", markup=False)
    made = ", ".join(f"{count:,} {kind}" for kind, count in done.annotations.items())
    console.print(f"{sum(done.records.values()):,} records with {made}", markup=False)
    shares = ", ".join(f"{split} {count:,}" for split, count in done.records.items())
    console.print(f"splits by {done.grouped_by} ({done.groups:,} groups, seed {seed}): {shares}", markup=False)
    console.print(f"{done.out} · next: unimed data validate {done.out} · {NOTICE}", markup=False)


def convert(
    layout: Annotated[str, typer.Argument(help="slake, path-vqa, sa-med2d, medmnist, mimic-cxr, medpix, medqa, pubmedqa or vqa-rad")],
    root: Annotated[Path, typer.Argument(help="the folder of the published data set")],
    out: Annotated[Path, typer.Option(help="the new folder of records")],
    languages: Annotated[str, typer.Option(help="of the questions, where a data set has several: en, or en,zh")] = "en",
    strict: Strict = False,
) -> None:
    """Make a folder of records from a published data set. Its images stay where they are, those of archives become PNG files.

    Example: [cyan]unimed data convert vqa-rad downloads/vqa-rad --out rad[/]
    """
    from unimed.datasets.convert import convert as convert_set

    done = convert_set(layout, root, out, strict, [one.strip() for one in languages.split(",")])
    console = _console()
    for line in done.left_out:
        console.print(line, style="yellow", markup=False)
    made = ", ".join(f"{count:,} {kind}" for kind, count in done.annotations.items())
    shares = ", ".join(f"{split} {count:,}" for split, count in done.records.items())
    console.print(f"{sum(done.records.values()):,} records with {made}: {shares}", markup=False)
    console.print(f"{done.out} · next: unimed data validate {done.out} · {NOTICE}", markup=False)


def validate(path: Folder, json: JsonFile = None, html: HtmlFile = None, strict: Strict = False) -> None:
    """Check a folder of records: leakage between splits, images, boxes, answers. Exit code 1 with findings.

    Example: [cyan]unimed data validate mine --html mine.html[/]
    """
    checked = _check(path, strict, json, html, images=True)
    console = _console()
    for kind, one in checked.findings.items():
        known = f" · known: {one.known}" if one.known else ""
        console.print(f"{one.count:,} {kind} (first: {one.first}){known}", style="dim" if known else "yellow", markup=False)
    if not checked.fine:
        console.print(f"{path}: {'stopped at the first finding' if checked.stopped else f'{len(checked.findings)} kinds of findings'}")
        raise typer.Exit(1)
    console.print(f"{path}: no {'other ' if checked.findings else ''}findings · {NOTICE}", markup=False)


def stats(path: Folder, json: JsonFile = None, html: HtmlFile = None, strict: Strict = False) -> None:
    """Count what is in a folder of records, by split. No image is opened, but the samples of the page.

    Example: [cyan]unimed data stats mine[/]
    """
    checked = _check(path, False, json, html, images=False)
    bad = {kind: one for kind, one in checked.findings.items() if kind.startswith("lines ")}
    for kind, one in bad.items():
        _console().print(f"{one.count:,} {kind} (first: {one.first})", style="yellow", markup=False)
    if strict and bad:
        raise typer.Exit(1)


def _check(path: Path, strict: bool, json: Path | None, html: Path | None, images: bool) -> Any:
    from rich.table import Table

    from unimed import io
    from unimed.datasets.validate import check, table_rows

    checked = check(path, strict, images)
    if json is not None:
        io.write_json(json, checked.as_json())
    if html is not None:
        from unimed.datasets.page import page

        io.write_text(html, page(checked, path))
    console = Console()
    table = Table(title=f"{checked.name}: {path}", title_justify="left")
    table.add_column("")
    for split in checked.records:
        table.add_column(split, justify="right")
    for title, values in table_rows(checked):
        table.add_row(title, *(f"{value:,}" for value in values.values()))
    console.print(table)
    for kind, shares in checked.words.items():
        listed = ", ".join(f"{share} {words}" for share, words in shares.items())
        _console().print(f"words of each {kind}: {listed}", style="dim")
    licences = ", ".join(f"{licence} ({count:,} records)" for licence, count in checked.licences.items())
    _console().print(f"licences: {licences or 'none'}", style="dim", markup=False)
    return checked


COMMANDS: dict[str, Callable[..., None]] = {"import": import_, "convert": convert, "validate": validate, "stats": stats}
