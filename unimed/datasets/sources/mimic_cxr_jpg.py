"""MIMIC-CXR-JPG: images, splits and CheXpert labels; with the reports of MIMIC-CXR in the same tree, where they are there.

    mimic-cxr-2.0.0-metadata.csv.gz   dicom_id, subject_id, study_id, ViewPosition, Rows, Columns
    mimic-cxr-2.0.0-split.csv.gz      dicom_id, study_id, subject_id, split (train, validate, test)
    mimic-cxr-2.0.0-chexpert.csv.gz   subject_id, study_id and the 14 labels: 1.0 present, 0.0 absent, -1.0 uncertain, "" not mentioned
    files/p10/p10000032/s50414267/<dicom_id>.jpg, files/p10/p10000032/s50414267.txt

The layout `mimic-cxr` is another one: the annotation.json of R2Gen.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from unimed.datasets.sources import tables
from unimed.datasets.sources.spec import Known, Row, SourceSpec
from unimed.records.files import cleaned, read_text, short
from unimed.records.policy import BadRecord, Tally
from unimed.records.record import QA, Annotation, Labels, Report, made

CHEXPERT = (
    "Atelectasis", "Cardiomegaly", "Consolidation", "Edema", "Enlarged Cardiomediastinum", "Fracture", "Lung Lesion", "Lung Opacity",
    "No Finding", "Pleural Effusion", "Pleural Other", "Pneumonia", "Pneumothorax", "Support Devices",
)  # fmt: skip
FINDINGS = tuple(name.lower() for name in CHEXPERT if name != "No Finding")
STATES = {1.0: "present", 0.0: "absent", -1.0: "uncertain"}
SPLITS = {"train": "train", "validate": "val", "test": "test"}
_SECTION = re.compile(r"^\s*(FINDINGS?|IMPRESSION|FINDINGS AND IMPRESSION)\s*:\s*", re.MULTILINE | re.IGNORECASE)
_NEXT = re.compile(r"^\s*[A-Z][A-Z /]+:", re.MULTILINE)


def _table(folder: Path, what: str) -> Path | None:
    return tables.find(folder, [f"mimic-cxr-2*-{what}.csv"])


def matches(folder: Path) -> bool:
    return _table(folder, "metadata") is not None


def read(folder: Path, tally: Tally) -> Iterator[Row]:
    """The images, then their splits, then the labels of studies."""
    metadata, split, labels = (_table(folder, what) for what in ("metadata", "split", "chexpert"))
    assert metadata is not None
    for where, cells in tables.rows(metadata, ("dicom_id", "subject_id", "study_id", "ViewPosition", "Rows", "Columns"), tally):
        with tally.record():
            key, subject, study = (cells[name].strip() for name in ("dicom_id", "subject_id", "study_id"))
            if not (key and subject.isdigit() and study.isdigit()):
                raise BadRecord("without an id", f"{where}: dicom_id {short(key)}, subject_id {short(subject)}, study_id {short(study)}")
            tree = f"files/p{subject[:2]}/p{subject}/s{study}"
            view = cells["ViewPosition"].strip()
            yield Row(
                where, key, f"s{study}", f"p{subject}", file=f"{tree}/{key}.jpg", size=tables.size(cells, "Columns", "Rows"), view=view,
                values={"report": f"{tree}.txt", "view": view} if (folder / f"{tree}.txt").is_file() else {"view": view},
            )  # fmt: skip
    if split is not None:
        for where, cells in tables.rows(split, ("dicom_id", "split"), tally):
            with tally.record():
                if cells["split"] not in SPLITS:
                    raise BadRecord("with an unknown split", f"{where}: split is {short(cells['split'])}, expected {', '.join(SPLITS)}")
                yield Row(where, cells["dicom_id"], split=SPLITS[cells["split"]])
    if labels is not None:
        for where, cells in tables.rows(labels, ("study_id", *CHEXPERT), tally):
            with tally.record():
                yield Row(where, study=f"s{cells['study_id']}", values={"labels": states(cells, where)})


def states(cells: dict[str, str], where: str) -> dict[str, list[str]]:
    """Findings by state, as CheXpert writes them. A study without any finding has "No Finding" present: then all are absent."""
    found: dict[str, list[str]] = {"present": [], "absent": [], "uncertain": []}
    none = False
    for name in CHEXPERT:
        if not cells[name].strip():
            continue
        value = tables.number(cells, name, where)
        if value not in STATES:
            raise BadRecord("with a label outside its schema", f"{where}: {name} is {short(cells[name])}, expected 1.0, 0.0, -1.0 or empty")
        if name == "No Finding":
            none = value == 1.0
        else:
            found[STATES[value]].append(name.lower())
    if none and not found["present"] and not found["uncertain"]:
        found["absent"] = [name for name in FINDINGS if name != "support devices" or name in found["absent"]]
    return found


def sections(text: str) -> str:
    """Findings and impression of a report, without their headings; the whole text where it has neither."""
    parts = []
    for heading in _SECTION.finditer(text):
        rest = text[heading.end() :]
        end = _NEXT.search(rest)
        parts.append(rest[: end.start()] if end else rest)
    return " ".join(" ".join(parts or [text]).split())


def make(row: Row, image: Known, folder: Path, tally: Tally) -> Iterator[Annotation]:
    if "labels" in row.values and any(row.values["labels"].values()):
        yield made(Labels, row.where, set="CheXpert", **{name: tuple(some) for name, some in row.values["labels"].items()})
    if "report" in row.values:
        place = row.values["report"]
        yield made(Report, row.where, text=cleaned(sections(read_text(folder / place)), "report", place), source=place)
    if row.values.get("view") in ("PA", "AP"):
        question = "Is this radiograph PA or AP?"
        yield made(QA, row.where, question=question, answer=row.values["view"], options=("PA", "AP"), template="vqa/view")


SOURCE = SourceSpec(
    name="mimic-cxr-jpg",
    title="MIMIC-CXR-JPG",
    files="MIMIC-CXR-JPG (mimic-cxr-2.0.0-{metadata,split,chexpert}.csv.gz, files/)",
    matches=matches,
    read=read,
    make=make,
    classes={"CheXpert": FINDINGS},
    licence="PhysioNet Credentialed Health Data License 1.5.0",
    citation="Johnson et al., MIMIC-CXR-JPG, a large publicly available database of labeled chest radiographs, 2019",
    where="https://physionet.org/content/mimic-cxr-jpg/",
    pages=("https://physionet.org/content/mimic-cxr-jpg/2.1.0/", "https://arxiv.org/abs/1901.07042"),
)
