"""SLAKE: questions and boxes on CT, MR and X-ray images, in English and Chinese."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from unimed.datasets.boxes import read_boxes, rows
from unimed.datasets.spec import DatasetSpec
from unimed.records import files
from unimed.records.policy import BadRecord
from unimed.records.record import QA, Annotation, ImageRef, Record, made
from unimed.records.source import Source

LISTS = {"train": ("train",), "val": ("validate", "validation"), "test": ("test",)}


def _listed(folder: Path, suffix: str, split: str | None = None) -> Path | None:
    """The first list that is there, of cases (.txt) or of questions (.json), of one split or of any."""
    names = [f"{name}{suffix}" for key, some in LISTS.items() if split in (key, None) for name in some] or [f"{split}{suffix}"]
    return next((folder / name for name in names if (folder / name).is_file()), None)


def matches(folder: Path) -> bool:
    """imgs/ with at least one list of case folders (as in the release) or of questions (as published)."""
    return (folder / "imgs").is_dir() and any(_listed(folder, suffix) for suffix in (".txt", ".json"))


class _Case:
    """What is found of one case: its images in the order in which they are named, its annotations and its patient."""

    def __init__(self) -> None:
        self.refs: dict[ImageRef, int] = {}
        self.annotations: list[Annotation] = []
        self.patient = ""
        self.modality = ""

    def add(self, ref: ImageRef, annotation: Annotation) -> None:
        image = self.refs.setdefault(ref, len(self.refs))
        self.annotations.append(annotation.model_copy(update={"image": image}))


def read(source: Source) -> Iterator[tuple[str, Record]]:
    """A record for each case.

    `<split>.txt` names case folders, each with its own question.json. Where there is no such list, `<split>.json` holds the questions of
    all cases. Boxes come from the detection.json of each case. Questions in other languages than `Rules.languages` are counted, not read.
    """
    by_case = _listed(source.folder, ".txt") is not None
    path = _listed(source.folder, ".txt" if by_case else ".json", source.split)
    if path is None:
        return
    cases: dict[str, _Case] = {}
    if by_case:
        names = files.read_text(path).split()
    else:
        for number, row in enumerate(files.read_json(path, list)):
            _question(source, row, f"{path}[{number}]", number, cases)
            image = row.get("img_name") if isinstance(row, dict) else None
            if isinstance(image, str) and "/" in image:
                cases.setdefault(image.rpartition("/")[0], _Case())
        names = list(cases)
    for name in names:
        case = _Case() if by_case else cases[name]
        try:
            place = source.place(source.folder / "imgs", name)
            if not os.path.isdir(place):
                raise BadRecord("with a missing folder", f"names case {name!r}, but there is no folder {place}")
        except BadRecord as error:
            if by_case:  # else each of its questions has been counted for it
                source.tally.leave_out(BadRecord(error.kind, f"{path}: {error}"))
        else:
            if by_case and (place / "question.json").is_file():
                for where, number, row in rows(source, place / "question.json"):
                    _question(source, row, where, number, {name: case}, name)
            if (place / "detection.json").is_file():
                for ref, box in read_boxes(source, name, "imgs", f"{name}/source.jpg", place / "detection.json"):
                    case.add(ref, box)
        if case.annotations:
            key, patient = files.name(name), case.patient or files.name(name)
            values = {"images": tuple(case.refs), "annotations": tuple(case.annotations), "patient": patient, "source": SPEC.name}
            values["modality"] = case.modality
            yield str(place), source.record(str(path), key, SPEC.name, **values)


def _question(source: Source, row: Any, where: str, number: int, cases: dict[str, _Case], case: str | None = None) -> None:
    with source.tally.record():
        image = files.field(row, "img_name", where)
        language = str(row.get("q_lang") or "en")
        if language not in source.rules.languages:
            source.tally.choose(f"with q_lang {files.short(language)} (data.languages={files.short(list(source.rules.languages))})")
            return
        answer = files.text(row, "answer", where, (str, int, float))
        question = files.text(row, "question", where)
        kind = str(row.get("answer_type") or "OPEN").strip().upper()
        if kind not in ("OPEN", "CLOSED"):
            raise BadRecord("with a wrong 'answer_type'", f"{where}: answer_type {files.short(kind)}, expected OPEN or CLOSED")
        ref, _ = source.image("imgs", image, where)
        if case is None:
            case = image.rpartition("/")[0] or image
            number = row.get("qid", number)
        template, key = files.name(row.get("template") or ""), files.name(f"{case}/q{number}")
        about = {"modality": files.name(row.get("modality") or ""), "organ": files.name(row.get("location") or "")}
        one = made(QA, where, question=question, answer=answer, answer_type=kind, template=template, id=key, **about)
        found = cases.setdefault(case, _Case())
        found.add(ref, one)
        found.patient = found.patient or files.name(row.get("subject") or "")
        found.modality = found.modality or about["modality"]  # of its boxes


SPEC = DatasetSpec(
    name="slake",
    title="SLAKE",
    files="SLAKE (imgs/, train.json or train.txt)",
    matches=matches,
    read=read,
    tasks=("vqa", "refer", "identify"),
    ratio={"vqa": 5, "refer": 4, "identify": 4},
    licence="CC BY 4.0 (as its hub page says)",
    citation="Liu et al., SLAKE: a semantically-labeled knowledge-enhanced dataset for medical visual question answering, ISBI 2021",
    where="https://www.med-vqa.com/slake/",
)
