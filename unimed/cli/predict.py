"""`unimed predict` and `unimed chat`; `app.py` registers them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from unimed.cli.shared import Device, Verify, bar, console, errors, importing, model_folder
from unimed.errors import UserError
from unimed.notice import NOTICE

if TYPE_CHECKING:
    from unimed.inference.request import Answer, Asked, Request
    from unimed.inference.session import Session
    from unimed.records.pixels import Opened

NAMED = 5  # bad rows that are named on the screen

Model = Annotated[str | None, typer.Option(help="a run or a saved model; by default the newest run")]
TaskName = Annotated[str, typer.Option(help="vqa, refer, identify, caption, cls or qa")]
Plane = Annotated[str, typer.Option(help="volumes: axial, coronal or sagittal")]
Slice = Annotated[int | None, typer.Option("--slice", help="volumes, frames, pages: which one; the middle one by default")]
Window = Annotated[str | None, typer.Option(help="grey images: lowest,highest value shown, for example --window=-160,240")]


def predict(
    image: Annotated[str, typer.Argument(help="image or volume (png, jpg, tiff, DICOM, NIfTI), folder or JSONL of them; - for qa")],
    question: Annotated[str, typer.Argument(help="the question; an organ for refer, a box x1,y1,x2,y2 in pixels for identify")] = "",
    task: TaskName = "vqa",
    model: Model = None,
    save: Annotated[Path | None, typer.Option(help="refer, identify: write the image with its box drawn here")] = None,
    out: Annotated[Path | None, typer.Option(help="folder or JSONL: add the answers to this JSONL file, and skip those it has")] = None,
    json: Annotated[bool, typer.Option("--json", help="print answers as JSON, one a line")] = False,
    plane: Plane = "axial",
    index: Slice = None,
    window: Window = None,
    strict: Annotated[bool, typer.Option("--strict", help="folder or JSONL: stop at the first row that cannot be used")] = False,
    device: Device = "auto",
    verify: Verify = False,
) -> None:
    """Answer one question about one image, or many: a folder or JSONL in, JSONL out.

    Examples:

      [cyan]unimed predict slice.png 'which plane is shown' --task vqa[/]

      [cyan]unimed predict ct.nii.gz liver --task refer --slice 12 --save boxed.png[/]

      [cyan]unimed predict slice.png 12,30,80,96 --task identify[/]

      [cyan]unimed predict slice.png --task caption[/]

      [cyan]unimed predict - 'Which organ makes bile?' --task qa[/]

      [cyan]unimed predict images/ --task caption --out captions.jsonl[/]     again after an interruption: goes on

      [cyan]unimed predict rows.jsonl --out answers.jsonl[/]                  rows of image, question, task ...
    """
    from unimed.inference.request import Request, check
    from unimed.inference.rows import is_many

    source = Path(image) if image != "-" else None
    request = Request(source, question, task, plane, index, read_window(window))
    if source is not None and is_many(source, out):
        if save is not None:
            raise UserError(f"--save {save}: it draws one image; {image} holds many")
        _many(source, request, out, strict, json, model, device, verify)
        return
    if out is not None:
        raise UserError(f"--out {out}: it is for a folder or a JSONL file; for one image use --json")
    check(request)
    _one(request, save, json, model, device, verify)


def _one(request: Request, save: Path | None, json: bool, model: str | None, device: str, verify: bool) -> None:
    from dataclasses import replace

    from unimed.inference.images import open_source
    from unimed.inference.request import prepare
    from unimed.inference.rows import Row, as_line

    folder = model_folder(model)
    name = str(request.image or "")
    if request.image is not None:  # a wrong file is found before the model is loaded
        request = replace(request, image=open_source(request.image, request.plane, request.slice, request.window))
    session = _load(folder, device, verify)
    asked = prepare(request, session.class_questions)
    answer = session.answer_prepared([asked])[0]
    if json:
        import json as format

        print(format.dumps(as_line(Row(name, name, request), answer, session.name), ensure_ascii=False))
    else:
        _show(answer, asked)
    if save is not None:
        _save(asked, answer, save)
    if not json:
        size = f"{asked.opened.rgb.size[0]} x {asked.opened.rgb.size[1]} pixels shown to the " if asked.opened else ""
        notes = "".join(f"{note} · " for note in answer.notes)
        console.print(f"{notes}{size}model {session.name} · {NOTICE}", style="dim", highlight=False, soft_wrap=True)


def _load(folder: Path, device: str, verify: bool) -> Session:
    with importing():
        from unimed.inference.session import load

        return load(folder, device=device, verify=verify)


def _show(answer: Answer, asked: Asked) -> None:
    console.print(answer.text, highlight=False, soft_wrap=True)
    _show_box(answer, asked)


def _show_box(answer: Answer, asked: Asked) -> None:
    from unimed.inference.request import remark

    if said := remark(answer):
        console.print(said, style="yellow")
    if answer.box is not None and asked.opened is not None:
        shown = asked.opened.to_original.inverse(answer.box)
        corners = ", ".join(f"{value:.0f}" for value in shown)
        size = asked.opened.rgb.size
        console.print(f"box in pixels (x1, y1, x2, y2): {corners} of {size[0]} x {size[1]}", highlight=False)
        if max(abs(one - other) for one, other in zip(answer.box, shown, strict=True)) > 0.01:
            corners = ", ".join(f"{value:.0f}" for value in answer.box)
            console.print(f"the same in pixels (in a volume: voxels) of the file: {corners}", highlight=False)


def _save(asked: Asked, answer: Answer, save: Path) -> None:
    from unimed.inference import draw

    draw.save(asked.opened, answer.box, save)
    errors.print(f"drawn in {save}", highlight=False)


def _many(source: Path, like: Request, out: Path | None, strict: bool, json: bool, model: str | None, device: str, verify: bool) -> None:
    import json as format

    from unimed.inference.rows import answer_rows, read_rows

    total = sum(1 for _ in read_rows(source, like))
    if not total:
        raise UserError(f"{source}: no file or row there to answer about")
    session = _load(model_folder(model), device, verify)
    show = (lambda line: print(format.dumps(line, ensure_ascii=False), flush=True)) if json or out is None else None
    with bar(errors) as progress:
        task = progress.add_task("answers", total=total, note="")
        done = answer_rows(session, read_rows(source, like), out, strict, each=show, progress=lambda n: progress.advance(task, n))
    for text in done.bad[:NAMED]:
        errors.print(f"left out: {text}", style="yellow", highlight=False, soft_wrap=True)
    if len(done.bad) > NAMED:
        errors.print(f"left out: {len(done.bad) - NAMED} more", style="yellow")
    before = f", {done.before} were there" if done.before else ""
    where = f" in {out}" if out else ""
    errors.print(f"{done.answered} answers{before}, {len(done.bad)} left out{where} · {NOTICE}", highlight=False, soft_wrap=True)
    if done.bad:
        raise typer.Exit(1)


def read_window(text: str | None) -> tuple[float, float] | None:
    if text is None:
        return None
    try:
        low, high = (float(part) for part in text.split(","))
    except ValueError:
        raise UserError(f"--window {text}: write it as lowest,highest, for example --window=-160,240") from None
    if not low < high:
        raise UserError(f"--window {text}: the first number must be below the second")
    return low, high


HELP = "/task NAME   /image FILE   /save FILE (the box of the last answer)   /help   /quit"


def chat(
    image: Annotated[str, typer.Argument(help="image or volume (png, jpg, tiff, DICOM, NIfTI); - for qa")],
    task: TaskName = "vqa",
    model: Model = None,
    plane: Plane = "axial",
    index: Slice = None,
    window: Window = None,
    device: Device = "auto",
    verify: Verify = False,
) -> None:
    """Ask about an image, question after question; the answer appears as it is made.

    Example: [cyan]unimed chat slice.png[/]

    Ctrl-C stops an answer, and the chat where there is none.
    """
    from unimed.inference.images import open_source

    grey = read_window(window)

    def open_(name: str) -> Opened | None:
        if name == "-":
            return None
        opened = open_source(Path(name), plane, index, grey)
        notes = "".join(f"{note} · " for note in opened.notes)
        console.print(f"{notes}{opened.rgb.size[0]} x {opened.rgb.size[1]} pixels", style="dim", highlight=False, soft_wrap=True)
        return opened

    opened = open_(image)
    session = _load(model_folder(model), device, verify)
    console.print(f"model {session.name} · {HELP} · {NOTICE}", style="dim", highlight=False, soft_wrap=True)
    if not session.dialogue:
        console.print("This model was not trained for dialogue: it gets the last question only.", style="yellow")
    _learned(task, session)
    asked = answer = None
    while True:
        try:
            line = console.input(f"{task}> ").strip()
        except EOFError:
            return
        try:
            name, _, rest = line.partition(" ")
            rest = rest.strip()
            if line == "/quit":
                return
            if line == "/help":
                console.print(HELP, highlight=False)
            elif name in ("/task", "/image", "/save") and not rest:
                raise UserError(f"{name}: it needs a name behind it; {HELP}")
            elif name == "/task":
                task = _learned(rest, session)
            elif name == "/image":
                opened = open_(rest)
                asked = answer = None
            elif name == "/save":
                if asked is None or answer is None:
                    raise UserError("/save: no answer yet")
                _save(asked, answer, Path(rest))
            elif name.startswith("/") and len(name) > 1:
                raise UserError(f"{name}: no such command; {HELP}")
            else:
                asked, answer = _turn(session, opened, line, task)
        except KeyboardInterrupt:
            errors.print("stopped")
        except (UserError, OSError) as error:
            errors.print(str(error), style="bold red", highlight=False, soft_wrap=True)


def _learned(task: str, session: Session) -> str:
    if task not in session.tasks:
        raise UserError(f"task {task}: not one of this model's; valid are {', '.join(session.tasks)}")
    return task


def _turn(session: Session, opened: Any, question: str, task: str) -> tuple[Asked, Answer]:
    from unimed.inference.request import Request, prepare
    from unimed.tasks import TASKS

    request = Request(opened if TASKS[task].needs_image else None, question, task)
    asked = prepare(request, session.class_questions)
    text = ""
    for piece in session.stream(request):
        text += piece
        console.print(piece, end="", highlight=False, soft_wrap=True)
    console.print()
    answer = session.read(asked, text)
    _show_box(answer, asked)
    return asked, answer


COMMANDS: dict[str, Callable[..., None]] = {"predict": predict, "chat": chat}
