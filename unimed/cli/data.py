"""The commands of `unimed data`; `app.py` registers them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from unimed.cli.shared import new_table
from unimed.notice import NOTICE

Strict = Annotated[bool, typer.Option("--strict", help="stop at the first bad record")]
Folder = Annotated[Path, typer.Argument(help="a folder of records: dataset.json, records-*.jsonl")]
JsonFile = Annotated[Path | None, typer.Option("--json", help="write the numbers and findings here, too")]
HtmlFile = Annotated[Path | None, typer.Option("--html", help="write a page with numbers, findings and samples here")]


def _console() -> Console:
    return Console(highlight=False, soft_wrap=True, markup=False)


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
        console.print(done.left_out, style="yellow")
    made = ", ".join(f"{count:,} {kind}" for kind, count in done.annotations.items())
    console.print(f"{sum(done.records.values()):,} records with {made}")
    shares = ", ".join(f"{split} {count:,}" for split, count in done.records.items())
    console.print(f"splits by {done.grouped_by} ({done.groups:,} groups, seed {seed}): {shares}")
    console.print(f"{done.out} · next: unimed data validate {done.out} · {NOTICE}")


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
        console.print(line, style="yellow")
    made = ", ".join(f"{count:,} {kind}" for kind, count in done.annotations.items())
    shares = ", ".join(f"{split} {count:,}" for split, count in done.records.items())
    console.print(f"{sum(done.records.values()):,} records with {made}: {shares}")
    console.print(f"{done.out} · next: unimed data validate {done.out} · {NOTICE}")


def validate(path: Folder, json: JsonFile = None, html: HtmlFile = None, strict: Strict = False) -> None:
    """Check a folder of records: leakage between splits, images, boxes, answers. Exit code 1 with findings.

    Example: [cyan]unimed data validate mine --html mine.html[/]
    """
    checked = _check(path, strict, json, html, images=True)
    console = _console()
    for kind, one in checked.findings.items():
        known = f" · known: {one.known}" if one.known else ""
        console.print(f"{one.count:,} {kind} (first: {one.first}){known}", style="dim" if known else "yellow")
    if not checked.fine:
        console.print(f"{path}: {'stopped at the first finding' if checked.stopped else f'{len(checked.findings)} kinds of findings'}")
        raise typer.Exit(1)
    console.print(f"{path}: no {'other ' if checked.findings else ''}findings · {NOTICE}")


def stats(
    path: Folder,
    json: JsonFile = None,
    html: HtmlFile = None,
    plot: Annotated[Path | None, typer.Option(help="draw entries by task and images by number of tasks here, as .png or .svg")] = None,
    strict: Strict = False,
) -> None:
    """Count what is in a folder of records, by split: records and annotations, then training entries by task and source.

    No image is opened, but the samples of the page. The numbers beside IMAX's are those of its paper.

    Example: [cyan]unimed data stats mine --plot mine.png[/]
    """
    checked = _check(path, False, json, html, images=False)
    _show_entries(checked.entries)
    if plot is not None:
        from unimed.report.entries import draw

        draw(checked.entries, checked.name, plot)
        _console().print(f"plot: {plot}", style="dim")
    bad = {kind: one for kind, one in checked.findings.items() if kind.startswith("lines ")}
    for kind, one in bad.items():
        _console().print(f"{one.count:,} {kind} (first: {one.first})", style="yellow")
    if strict and bad:
        raise typer.Exit(1)


def _check(path: Path, strict: bool, json: Path | None, html: Path | None, images: bool) -> Any:
    from unimed import io
    from unimed.datasets.validate import check, table_rows

    checked = check(path, strict, images)
    if json is not None:
        io.write_json(json, checked.as_json())
    if html is not None:
        from unimed.datasets.page import page

        io.write_text(html, page(checked, path))
    console = Console(markup=False)
    table = new_table(f"{checked.name}: {path}")
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
    _console().print(f"licences: {licences or 'none'}", style="dim")
    return checked


def _show_entries(found: dict[str, Any]) -> None:
    """The tables of IMAX's paper: entries, images, tasks and entries an image; entries by task and source."""
    from unimed.datasets.entries import PAPER

    table = new_table("training entries")
    for title in ("", "this set", "IMAX (paper)"):
        table.add_column(title, justify="left" if not title else "right")
    for name in ("entries", "images", "tasks", "tasks per image", "entries per image", "entries without an image"):
        theirs = PAPER.get(name)
        shown = "" if theirs is None else f"> {theirs:,}" if name == "entries" else f"{theirs:.2f}" if isinstance(theirs, float) else theirs
        ours = f"{found[name]:.2f}" if isinstance(found[name], float) else f"{found[name]:,}"
        table.add_row(name, ours, str(shown))
    _console().print(table)
    tasks = list(found["entries by task"])
    table = new_table("entries by source and task")
    table.add_column("")
    for task in tasks:
        table.add_column(task, justify="right")
    for name, by_task in found["entries by source and task"].items():
        table.add_row(name, *(f"{by_task[task]:,}" if task in by_task else "" for task in tasks))
    table.add_row("all", *(f"{count:,}" for count in found["entries by task"].values()), style="bold")
    table.add_row("images", *(f"{count:,}" for count in found["images by task"].values()), style="dim")
    _console().print(table)


def build_imax(
    out: Annotated[Path, typer.Option(help="the new folder of records")],
    source: Annotated[list[str] | None, typer.Option(help="LAYOUT=FOLDER; may stand several times; none: the built-in sample")] = None,
    join: Annotated[Path | None, typer.Option(help="a CSV table source,id,image: ids of the sources that name one image")] = None,
    by: Annotated[str, typer.Option(help="what makes two files one image: id, or hash (the same bytes)")] = "id",
    jobs: Annotated[int, typer.Option(help="processes; 0: one a core")] = 0,
    ray: Annotated[bool, typer.Option("--ray", help="make the parts as a Ray Data pipeline (extra: ray)")] = False,
    strict: Strict = False,
) -> None:
    """Join sources that share images into one record an image, with up to seven tasks (IMAX).

    A build that was stopped goes on with the same command. Annotations that contradict each other are listed in conflicts.jsonl.

    Examples:

      [cyan]unimed data build-imax --out imax[/]                           the built-in CT and MR slices

      [cyan]unimed data build-imax --source mimic-cxr-jpg=mimic --source chexmask=masks --source edema=grades --out imax[/]
    """
    from unimed.cli.shared import bar
    from unimed.datasets.build import build
    from unimed.datasets.imax import source_named
    from unimed.errors import UserError

    console = _console()
    lines: list[str] = []
    conflicts: dict[str, int] = {}
    orphans: dict[str, int] = {}
    with bar(console) as progress:
        task = progress.add_task("build-imax", total=None, note="")

        def tell(done: int, total: int, what: str) -> None:
            progress.update(task, description=what, completed=done, total=total or None)

        if not source:
            from unimed.sample.imax import build_imax_sample

            if join is not None or ray:
                raise UserError("build-imax: --join and --ray need a --source")
            if out.exists():
                raise UserError(f"--out {out}: exists already; choose another folder, or delete it")
            counts = build_imax_sample(out, tell)
        else:
            named = [(name, Path(root)) for name, root in map(source_named, source)]
            done = build(named, out, join, by, strict, jobs, tell, ray)
            counts, lines, conflicts, orphans = done.splits, done.lines, done.conflicts, done.orphans
    for line in lines:
        console.print(line, style="yellow")
    for name, count in orphans.items():
        console.print(f"{name}: {count:,} rows are about images that no source brings", style="yellow")
    for kind, count in conflicts.items():
        console.print(f"{count:,} conflicts: {kind}", style="yellow")
    shares = ", ".join(f"{split} {count:,}" for split, count in counts.items())
    console.print(f"{sum(counts.values()):,} images: {shares}")
    console.print(f"{out} · next: unimed data stats {out} · {NOTICE}")


def build_dmax(
    imax: Annotated[Path, typer.Argument(help="a folder of image-centric records (unimed data build-imax)")],
    out: Annotated[Path, typer.Option(help="the new folder of records")],
    pool: Annotated[Path | None, typer.Option(help="records whose images are drawn from; by default those of IMAX itself")] = None,
    tasks_per_image: Annotated[int, typer.Option(help="tasks of every image")] = 1,
    seed: Annotated[int, typer.Option(help="of the draw")] = 0,
) -> None:
    """Make the decentralised twin of an image-centric set: as many entries of every task, from images that have one task each (DMAX).

    Example: [cyan]unimed data build-dmax imax --pool all --out dmax[/]
    """
    from unimed.datasets.dmax import build_dmax as build

    done = build(imax, out, pool, tasks_per_image, seed)
    console = _console()
    for split, by_task in done.variation.items():
        shown = ", ".join(f"{task} {value:.3f}" for task, value in by_task.items())
        console.print(f"{split}: total variation of labels: {shown}", style="dim")
    leaks = ", ".join(f"{count:,} {what}" for what, count in done.leaks.items())
    console.print(f"leakage: {leaks}")
    entries, per_image = done.counts.entries, done.counts.tasks_per_image
    console.print(
        f"{entries:,} entries of {done.images['dmax']:,} images ({done.images['imax']:,} in {imax}), {per_image:.2f} tasks an image"
    )
    console.print(f"{out} · next: unimed data stats {out} · {NOTICE}")


COMMANDS: dict[str, Callable[..., None]] = {
    "import": import_,
    "convert": convert,
    "validate": validate,
    "stats": stats,
    "build-imax": build_imax,
    "build-dmax": build_dmax,
}
