"""What is in a folder of records, and what is wrong with it: `unimed data validate` and `unimed data stats`.

A finding is something that training would leave out or that makes scores worthless: bad lines, images that are missing or damaged, boxes
outside their image, answers outside their classes or options, an id given twice, the same image or patient in two splits.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from unimed.datasets.alike import Alike, look_hash
from unimed.datasets.entries import Counts
from unimed.datasets.items import tasks_of
from unimed.datasets.records import known_faults, label_values
from unimed.errors import UserError
from unimed.progress import watched
from unimed.records import jsonl
from unimed.records.box import clip
from unimed.records.files import short
from unimed.records.image import Images
from unimed.records.pixels import load_image
from unimed.records.policy import BadRecord
from unimed.records.record import QA, SPLITS, BoxOf, ImageRef, Label, Labels, Number, Record, Report

PERCENTILES = (50, 90, 99, 100)
NO_LICENCE = "not given"
ALIKE = "images that look alike in several splits"
IMAGES = {"with a missing image": "images that are missing", "with an unreadable image": "images that cannot be read"}


@dataclass
class Finding:
    """How often something is wrong, and where it is first. known: why the published data set is like that."""

    count: int = 0
    first: str = ""
    known: str = ""


@dataclass
class Checked:
    """The outcome: numbers for the tables, findings by what is wrong. stopped: at the first finding (strict).

    entries: training entries as IMAX's paper counts them (Counts.as_json). samples: some records, spread over the data set, for the page.
    """

    name: str
    records: dict[str, int]
    patients: dict[str, int]
    images: dict[str, int]
    annotations: dict[str, dict[str, int]]
    words: dict[str, dict[str, int]]
    licences: dict[str, int]
    entries: dict[str, Any] = field(default_factory=dict)
    findings: dict[str, Finding] = field(default_factory=dict)
    stopped: bool = False
    samples: list[Record] = field(default_factory=list)

    @property
    def fine(self) -> bool:
        """No finding but known ones."""
        return all(one.known for one in self.findings.values())

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        values = {**vars(self), "findings": {kind: vars(one) for kind, one in self.findings.items()}}
        del values["samples"]
        return {**values, "fine": self.fine}


class _Stop(Exception):
    pass


class _Findings:
    def __init__(self, folder: Path, strict: bool, known: Mapping[str, str]) -> None:
        self.folder, self.strict, self.known = folder, strict, known
        self.found: dict[str, Finding] = {}

    def add(self, kind: str, where: str) -> None:
        one = self.found.setdefault(kind, Finding(known=self.known.get(kind, "")))
        one.count += 1
        one.first = one.first or " ".join(where.replace(f"{self.folder}/", "").split())
        if self.strict and not one.known:
            raise _Stop


def check(folder: Path, strict: bool = False, images: bool = True) -> Checked:
    """Reads a whole data set. Without `images`, no image is opened: for the numbers only."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    if not jsonl.is_records(folder):
        what = f"no folder of records: it needs {jsonl.DATASET_FILE} and {jsonl.SHARDS}"
        raise UserError(f"{folder}: {what}; make one with: unimed data import")
    info = jsonl.read_info(folder)
    findings = _Findings(folder, strict, known_faults(info.made_by))
    samples = _Samples()
    entries = Counts()
    alike = Alike()
    annotations: dict[str, Counter[str]] = defaultdict(Counter)
    records: Counter[str] = Counter()
    licences: Counter[str] = Counter()
    lengths: dict[str, list[int]] = defaultdict(list)
    patients: dict[str, dict[str, str]] = defaultdict(dict)  # patient -> split -> the first record
    files: dict[str, dict[str, str]] = defaultdict(dict)  # hash -> split -> the first image
    looks: dict[ImageRef, tuple[int, str]] = {}  # once an image, however many records name it
    seen: dict[str, set[str]] = {split: set() for split in SPLITS}
    ids: dict[str, str] = {}
    looker = Images(folder, info.roots)
    classes = info.classes or label_values(folder)
    stopped = False
    try:
        for where, text in watched(jsonl.read_lines_of(folder), f"check {info.name}"):
            try:
                record = jsonl.parse(text, where)
            except BadRecord as error:
                findings.add(f"lines {error.kind}", str(error))
                continue
            records[record.split] += 1
            entries.add(record)
            samples.add(record)
            licences[record.licence or info.licence or NO_LICENCE] += 1
            if record.id in ids:
                findings.add("ids given twice", f"{where}: id {record.id!r} is that of {ids[record.id]}")
            ids.setdefault(record.id, where)
            if record.patient:
                patients[record.patient].setdefault(record.split, where)
            for ref in record.images:
                seen[record.split].add(ref.path)
                if images:
                    try:
                        key = looker.hash(ref)
                        files[key].setdefault(record.split, f"{where}: {ref.path}")
                        if ref not in looks:
                            looks[ref] = _look(looker.look(ref, where).image)
                        bits, fault = looks[ref]
                        if fault:
                            findings.add(IMAGES["with an unreadable image"], f"{where}: {ref.path} ({fault})")
                        elif other := alike.add(bits, record.split, key, f"{where}: {ref.path}"):
                            findings.add(ALIKE, f"{other}; {record.split}: {where}: {ref.path}")
                    except BadRecord as error:
                        findings.add(IMAGES.get(error.kind, f"images {error.kind}"), str(error))
            for one in record.annotations:
                annotations[record.split][one.kind] += 1
                for kind, length in _lengths(one):
                    lengths[kind].append(length)
            for kind, fault in _faults(record, where, looker if images else None, classes):
                findings.add(kind, fault)
        for what, places in (("patients", patients), ("images", files)):
            for key, by_split in places.items():
                if len(by_split) > 1:
                    called = f" {key!r}" if places is patients else ""
                    findings.add(f"{what} in several splits", "; ".join(f"{split}{called}: {at}" for split, at in by_split.items()))
        if not records:
            findings.add("no record", f"{folder}: not one record")
    except _Stop:
        stopped = True
    return Checked(
        name=info.name,
        records={split: records[split] for split in SPLITS},
        patients={split: sum(split in by_split for by_split in patients.values()) for split in SPLITS},
        images={split: len(seen[split]) for split in SPLITS},
        annotations={split: dict(annotations[split]) for split in SPLITS},
        words={kind: _percentiles(values) for kind, values in sorted(lengths.items())},
        licences=dict(licences.most_common()),
        entries=entries.as_json(),
        findings=findings.found,
        stopped=stopped,
        samples=samples.kept,
    )


def _look(image: Any) -> tuple[int, str]:
    """The hash of a picture's look, and why there is none."""
    try:
        return look_hash(load_image(image)), ""
    except Exception as error:  # decoders raise nearly anything
        return 0, str(error) or type(error).__name__


class _Samples:
    """Some of the records, evenly spread, whatever their number."""

    def __init__(self, most: int = 24) -> None:
        self.kept: list[Record] = []
        self.most, self._step, self._seen = most, 1, 0

    def add(self, record: Record) -> None:
        if self._seen % self._step == 0:
            self.kept.append(record)
            if len(self.kept) > self.most:
                self.kept, self._step = self.kept[::2], self._step * 2
        self._seen += 1


def table_rows(checked: Checked) -> list[tuple[str, dict[str, int]]]:
    """What is counted, by split."""
    kinds = sorted({kind for by_kind in checked.annotations.values() for kind in by_kind})
    rows = [("records", checked.records), ("patients", checked.patients), ("images", checked.images)]
    return [*rows, *((kind, {split: by_kind.get(kind, 0) for split, by_kind in checked.annotations.items()}) for kind in kinds)]


def _faults(record: Record, where: str, looker: Images | None, classes: dict[str, list[str]]) -> Iterator[tuple[str, str]]:
    for number, one in enumerate(record.annotations):
        place = f"{where}: annotations.{number}"
        if one.task not in tasks_of(one.kind):
            yield "annotations with an unknown task", f"{place}: task {one.task!r} of a {one.kind}"
        if isinstance(one, Label) and one.value not in classes.get(one.set, []):
            yield "labels outside their classes", f"{place}: {one.value!r} is no class of {one.set!r}: {short(classes.get(one.set, []))}"
        if isinstance(one, Labels) and (listed := classes.get(one.set)):
            outside = [finding for finding in (*one.present, *one.absent, *one.uncertain) if finding not in listed]
            if outside:
                yield "labels outside their classes", f"{place}: {short(outside)} is no class of {one.set!r}: {short(listed)}"
        if isinstance(one, QA) and one.options and one.answer not in one.options:
            yield "answers outside their options", f"{place}: {short(one.answer)} is none of {short(list(one.options))}"
        if isinstance(one, BoxOf) and looker is not None:
            try:
                seen = looker.look(record.images[one.image], where)
            except BadRecord:
                continue  # a finding of its own
            shown = seen.placement.inverse(one.xyxy)
            inner = clip(shown, seen.size)
            if inner is None or any(abs(a - b) > 0.01 for a, b in zip(inner, shown, strict=True)):
                _, _, width, height = seen.placement((0, 0, *seen.size))
                kind = "boxes outside their image" if inner is None else "boxes partly outside their image"
                yield kind, f"{place}: the box of {one.name!r} is {short(list(one.xyxy))}, the image has {width:g} x {height:g} pixels"


def _lengths(one: Any) -> Iterator[tuple[str, int]]:
    if isinstance(one, QA):
        yield "question", len(one.question.split())
        yield "answer", len(one.answer.split())
    elif isinstance(one, Report):
        yield "report", len(one.text.split())
    elif isinstance(one, BoxOf | Number):
        yield "name", len(one.name.split())


def _percentiles(values: list[int]) -> dict[str, int]:
    return {f"p{share}": int(np.percentile(values, share, method="lower")) for share in PERCENTILES}
