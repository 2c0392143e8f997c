"""Many requests, from a folder or a JSONL file, answered into a JSONL file that an interrupted call goes on with."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from unimed import io
from unimed.errors import UserError
from unimed.inference.request import Answer, Request, prepare

if TYPE_CHECKING:
    from unimed.inference.session import Session

PICTURES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".webp", ".gif", ".nii", ".nii.gz")
FIELDS = ("id", "image", "question", "task", "plane", "slice", "window", "max_new_tokens")


class Row(NamedTuple):
    """One request with its id, or what is wrong with it; ``image`` as it is named in the source."""

    id: str
    image: str
    request: Request | UserError


@dataclass
class Done:
    answered: int = 0
    before: int = 0  # answered by an earlier call
    bad: list[str] = field(default_factory=list)


def is_many(source: Path, out: Path | None) -> bool:
    """Whether a source is many requests: a JSONL file, or a folder with pictures. A folder of DICOM files only is one series, unless its
    answers go to a file."""
    if source.is_dir():
        return out is not None or any(path.name.lower().endswith(PICTURES) for path in source.rglob("*"))
    return source.suffix.lower() == ".jsonl"


def read_rows(source: Path, like: Request) -> Iterator[Row]:
    """The requests of a folder (every file, by path) or of JSON lines; what a line does not say is as in ``like``."""
    if source.is_dir():
        for path in sorted(path for path in source.rglob("*") if path.is_file() and not path.name.startswith(".")):
            name = path.relative_to(source).as_posix()
            yield Row(name, name, replace(like, image=path))
        return
    try:
        with source.open(encoding="utf-8-sig") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield _row(source, number, line, like)
    except OSError as error:
        raise UserError(f"{source}: cannot be read ({error.strerror or error})") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{source}: not UTF-8 text ({error.reason} at byte {error.start})") from error


def _row(source: Path, number: int, line: str, like: Request) -> Row:
    where = f"{source}:{number}"
    try:
        given = json.loads(line)
    except (ValueError, RecursionError) as error:
        return Row(str(number), "", UserError(f"{where}: not valid JSON ({error})"))
    if not isinstance(given, dict):
        return Row(str(number), "", UserError(f"{where}: not a JSON object; write {{'image': ..., 'question': ...}}"))
    key, image = str(number if given.get("id") is None else given["id"]), given.get("image")
    wrong = _wrong(given)
    if wrong:
        return Row(key, str(image or ""), UserError(f"{where}: {wrong}"))
    fields = {name: value for name, value in given.items() if name not in ("id", "image") and value is not None}
    if "window" in fields:
        fields["window"] = tuple(fields["window"])
    return Row(key, image or "", replace(like, image=source.parent / image if image else None, **fields))


_FORMS: dict[str, tuple[Any, str]] = {
    "slice": (int, "a number"),
    "max_new_tokens": (int, "a number"),
    "window": (list, "[lowest, highest]"),
    "id": ((str, int), "text"),
}


def _wrong(given: dict[str, Any]) -> str:
    """What is wrong with the fields of a row; "" where nothing is."""
    for name, value in given.items():
        if name not in FIELDS:
            return f"unknown field {name!r}; valid are {', '.join(FIELDS)}"
        kind, form = _FORMS.get(name, (str, "text"))
        if value is not None and (not isinstance(value, kind) or isinstance(value, bool)):
            return f"{name} is {value!r}; it must be {form}"
    window = given.get("window")
    numbers = window is None or (len(window) == 2 and all(type(v) in (int, float) and math.isfinite(v) for v in window))
    if window is not None and not (numbers and window[0] < window[1]):
        return f"window is {window!r}; it must be [lowest, highest]"
    return ""


def as_line(row: Row, answer: Answer, model: str) -> dict[str, Any]:
    assert isinstance(row.request, Request)
    return {
        "id": row.id,
        "image": row.image,
        "question": row.request.question,
        "task": answer.task,
        "text": answer.text,
        "box": [round(value, 2) for value in answer.box] if answer.box else None,
        "kind": answer.parsed.kind,
        "confidence": round(answer.confidence, 4),
        "gates": [round(value, 4) for value in answer.gates],
        "notes": list(answer.notes),
        **_shown(row.request),
        "model": model,
    }


def _shown(request: Request) -> dict[str, Any]:
    """What an answer depends on beside image, question, task and model."""
    window = list(map(float, request.window)) if request.window else None
    return {"plane": request.plane, "slice": request.slice, "window": window, "max_new_tokens": request.max_new_tokens}


def answer_rows(
    session: Session,
    rows: Iterator[Row],
    out: Path | None,
    strict: bool = False,
    batch: int = 16,
    each: Callable[[dict[str, Any]], None] | None = None,
    progress: Callable[[int], None] | None = None,
) -> Done:
    """Answers in batches, in order. ``each`` gets every new line. With ``out`` it is added to that file; lines there are not made again.

    A row that cannot be used is left out and named in `Done.bad`; ``strict`` raises it.
    """
    done, there = Done(), _there(out, session) if out else {}
    waiting: list[tuple[Row, Any]] = []

    def write(some: Sequence[tuple[Row, Any]]) -> None:
        try:
            made = session.answer_prepared([asked for _, asked in some]) if some else []
        except UserError as error:
            if len(some) > 1:  # one of them ends the batch; the others are answered
                for one in some:
                    write([one])
                return
            wrong = UserError(f"{some[0][0].id}: {error}")
            if strict:
                raise wrong from error
            done.bad.append(str(wrong))
            return
        for (row, _), answer in zip(some, made, strict=True):
            line = as_line(row, answer, session.name) | {"weights": session.weights}
            if out:
                io.append_json_line(out, line)
            if each:
                each(line)
        done.answered += len(some)

    def flush() -> None:
        write(waiting)
        waiting.clear()

    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
    own = out.resolve() if out else None
    seen: set[str] = set()
    for row in rows:
        if progress:
            progress(1)
        try:
            if isinstance(row.request, UserError):
                raise row.request
            image = row.request.image
            if own and isinstance(image, Path) and image.name == own.name and image.resolve() == own:
                continue  # the answers lie in the folder that is asked about
            if row.id in seen:
                raise UserError("another row has this id")
            seen.add(row.id)
            if row.id in there:
                _same(row, row.request, there[row.id], out)
                done.before += 1
                continue
            waiting.append((row, prepare(row.request, session.class_questions)))
        except _Other:
            flush()
            raise
        except UserError as error:
            named = error if error is row.request else UserError(f"{row.id}: {error}")
            if strict:
                flush()
                raise named from error
            done.bad.append(str(named))
        if len(waiting) == batch:
            flush()
    flush()
    return done


class _Other(UserError):
    """The file of answers belongs to other requests: no row of it can be used."""


def _there(out: Path, session: Session) -> dict[str, dict[str, Any]]:
    lines = {str(line.get("id")): line for line in io.written_lines(out)}
    for line in lines.values():
        if line.get("model") != session.name:
            raise UserError(f"{out}: its answers are by the model {line.get('model')!r}, not by {session.name!r}; name another --out")
        if line.get("weights", session.weights) != session.weights:
            raise UserError(f"{out}: its answers are by other weights of the model {session.name!r}; name another --out")
    return lines


def _same(row: Row, request: Request, line: dict[str, Any], out: Path | None) -> None:
    now = {"image": row.image, "question": request.question, "task": request.task, **_shown(request)}
    line = _shown(request) | line  # files of earlier versions do not say all
    for name, value in now.items():
        if line.get(name) != value:
            raise _Other(f"{out}: {row.id}: its {name} was {line.get(name)!r} and is now {value!r}; name another --out")
