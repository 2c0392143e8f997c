"""Own data: rows of LLaVA, ms-swift or chat messages become a folder of records, split by patient or else by image."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from unimed.errors import UserError
from unimed.progress import watched
from unimed.records import jsonl
from unimed.records.convert import FORMS
from unimed.records.files import parse_json, read_json, read_lines, short
from unimed.records.image import Images
from unimed.records.policy import BadRecord, Rules, Tally
from unimed.records.record import QA, SPLITS, Annotation, ImageRef, Record, Report, split_root
from unimed.tasks import TASKS

ROOT = "images"
IMPORTED = ("vqa", "caption", "cls", "qa")


class Imported(NamedTuple):
    """The outcome. records, annotations: counts by split and by kind. grouped_by: what the splits keep together, groups: how many.

    left_out: the line that names the rows left out, "" without any.
    """

    out: Path
    records: dict[str, int]
    annotations: dict[str, int]
    grouped_by: str
    groups: int
    left_out: str


class _Kept(NamedTuple):
    """A row that becomes a record, and what must not be in two splits."""

    key: str
    patient: str
    refs: list[ImageRef]
    annotations: list[Annotation]
    together: list[str]


def import_rows(
    form: str,
    file: Path,
    images: Path,
    out: Path,
    name: str = "",
    task: str = "",
    patient: str = "",
    val: float = 0.1,
    test: float = 0.1,
    seed: int = 0,
    strict: bool = False,
) -> Imported:
    """Writes `out` from the rows of `file`, whose image paths are relative to `images`. The images stay where they are.

    task: of the questions: vqa (the usual one), caption (the answers are reports), cls, or qa for text only. patient: the field of a row
    that names the patient; patients, and rows that show the same image file, are kept in one split. val, test: shares of these groups.
    A bad row is left out and counted, or with `strict` an error.
    """
    if form not in FORMS:
        raise UserError(f"{form!r}: no such form of rows; one of {', '.join(FORMS)}")
    if not file.is_file():
        raise UserError(f"{file}: no such file")
    if not images.is_dir():
        raise UserError(f"--images {images}: no such folder")
    if out.exists():
        raise UserError(f"--out {out}: exists already; choose another folder, or delete it")
    if task not in ("", *IMPORTED):
        raise UserError(f"--task {task}: must be one of {', '.join(IMPORTED)}")
    for option, share in (("--val", val), ("--test", test)):
        if not 0 <= share < 1:
            raise UserError(f"{option} {share}: must be a share, at least 0 and below 1")
    if not val + test < 1:
        raise UserError(f"--val {val} --test {test}: together they must be below 1")
    tally = Tally(name or Path(os.path.abspath(out)).name, file.parent, "import", Rules(strict=strict))
    kept = _read(form, file, Images(out, {ROOT: os.path.abspath(images)}), task, patient, tally)
    if not kept:
        raise UserError(f"{file}: no row can be used as {form}: {tally.line() or 'it has none'}")
    groups = _joined([row.together for row in kept])
    split_of = splits(sorted(set(groups)), val, test, seed)
    by = "patient" if patient else "image"
    info = jsonl.DatasetInfo(
        name=tally.name, roots={ROOT: root_of(images, out)}, made_by=f"unimed data import {form}, seed {seed}, splits by {by}"
    )
    records = (
        Record(
            id=row.key,
            dataset=tally.name,
            split=split_of[group],
            patient=row.patient,
            images=tuple(row.refs),
            annotations=tuple(row.annotations),
            source=file.name,
        )
        for group, row in zip(groups, kept, strict=True)
    )
    counts = jsonl.write(out, info, records)
    kinds: Counter[str] = Counter(one.kind for row in kept for one in row.annotations)
    return Imported(out, {split: counts.get(split, 0) for split in SPLITS}, dict(kinds), by, len(set(groups)), tally.line())


def splits(groups: list[str], val: float, test: float, seed: int) -> dict[str, str]:
    """A split for every group: a shuffle by `seed`, the same for the same groups in any order. A share above 0 takes at least one group,
    where training keeps one."""
    order = sorted(groups, key=lambda group: hashlib.sha256(f"{seed}/{group}".encode("utf-8", "surrogatepass")).digest())
    count = len(order)
    tests, vals = (max(1, round(count * share)) if share else 0 for share in (test, val))
    if tests + vals >= count:
        tests = min(tests, max(count - 1, 0))
        vals = min(vals, max(count - 1 - tests, 0))
    return {group: "test" if place < tests else "val" if place < tests + vals else "train" for place, group in enumerate(order)}


def _read(form: str, file: Path, images: Images, task: str, patient: str, tally: Tally) -> list[_Kept]:
    kept: list[_Kept] = []
    seen: set[str] = set()
    for number, (where, given) in enumerate(watched(_rows(file), f"import {file.name}")):
        with tally.record():
            row = parse_json(given, where) if isinstance(given, str) else given
            convert = FORMS[form]
            refs, annotations = convert(row, where, lambda ref, where=where: _stored_size(images, _rooted(ref), where))
            if not annotations:
                raise BadRecord("without a question or a box", f"{where}: nothing to learn in this row")
            refs = [_rooted(ref) for ref in refs]
            for ref in refs:
                images.look(ref, where)
            who = _patient(row, patient, where)
            key = str(row.get("id") if isinstance(row.get("id"), str | int) else f"row{number}").strip() or f"row{number}"
            _unicode(where, key, who, *(text for one in annotations for text in one.model_dump().values() if isinstance(text, str)))
            if key in seen:
                key = f"{key}#{number}"
            seen.add(key)
            together = [f"patient {who}"] if who else []
            together += [f"image {images.hash(ref)}" for ref in refs]
            kept.append(_Kept(key, who, refs, [_of_task(one, task, bool(refs), where) for one in annotations], together or [f"row {key}"]))
    return kept


def _rows(file: Path) -> Iterator[tuple[str, Any]]:
    """Place and row of a JSON list, or place and text of JSON lines."""
    first = next((line for line in read_lines(file) if line.strip()), "")
    if first.lstrip().startswith("["):
        yield from ((f"{file}[{number}]", row) for number, row in enumerate(read_json(file, list)))
    else:
        yield from ((f"{file}:{number}", line) for number, line in enumerate(read_lines(file), 1) if line.strip())


def _rooted(ref: ImageRef) -> ImageRef:
    return ref.model_copy(update={"path": f"{ROOT}:{split_root(ref.path)[1]}"})


def _stored_size(images: Images, ref: ImageRef, where: str) -> tuple[int, int]:
    """(width, height) in pixels of the file."""
    seen = images.look(ref, where)
    _, _, width, height = seen.placement((0, 0, *seen.size))
    return round(width), round(height)


def _patient(row: dict[str, Any], field: str, where: str) -> str:
    if not field:
        return ""
    who = row.get(field)
    if isinstance(who, bool) or not isinstance(who, str | int) or not str(who).strip():
        raise BadRecord("without a patient", f"{where}: field {field!r} (--patient) is {short(who)}, expected a name or number")
    return str(who)


def _unicode(where: str, *texts: str) -> None:
    try:
        "".join(texts).encode()
    except UnicodeEncodeError:
        raise BadRecord("with text that is not Unicode", f"{where}: holds bytes or surrogates that are no text") from None


def _of_task(annotation: Annotation, task: str, image: bool, where: str) -> Annotation:
    """A question as its task keeps it; other annotations as they are."""
    if not task or not isinstance(annotation, QA):
        return annotation
    if image != TASKS[task].needs_image:
        raise BadRecord("of a task that does not fit", f"{where}: --task {task} {'takes no' if image else 'needs an'} image")
    if task == "caption":
        return Report(text=annotation.answer, image=annotation.image)
    return annotation.model_copy(update={"task": task})


def _joined(rows: list[list[str]]) -> list[str]:
    """Rows that share any name are one group, called by the first of its names in the order of the alphabet."""
    leader: dict[str, str] = {}

    def find(name: str) -> str:
        while leader.setdefault(name, name) != name:
            leader[name] = leader[leader[name]]
            name = leader[name]
        return name

    for names in rows:
        for other in names:
            first, second = sorted((find(names[0]), find(other)))
            leader[second] = first
    return [find(names[0]) for names in rows]


def root_of(images: Path, out: Path) -> str:
    """Relative where the images lie beside or below the new folder, so that both can be moved together; else absolute."""
    place, beside = Path(os.path.abspath(images)), Path(os.path.abspath(out)).parent
    return Path(os.path.relpath(place, os.path.abspath(out))).as_posix() if place.is_relative_to(beside) else str(place)
