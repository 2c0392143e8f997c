"""Our own form as a layout: dataset.json and records-*.jsonl."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path

from unimed.datasets.spec import DATASETS, DatasetSpec
from unimed.errors import UserError
from unimed.records import files, jsonl
from unimed.records.policy import BadRecord
from unimed.records.record import Label, Record
from unimed.records.source import Source
from unimed.tasks.asked import LAYOUT

CONVERTED = "unimed data convert"
SAMPLE = "unimed sample build"
_AS_ITS_SOURCE = (CONVERTED, SAMPLE)  # such records keep the wordings of their source, and the protocol says whether options are shown


def names(folder: Path) -> list[str]:
    """The name in dataset.json."""
    try:
        return [files.name(jsonl.read_info(folder).name)]
    except UserError:  # reading it says why
        return [LAYOUT]


def info(folder: Path) -> tuple[str, str, Mapping[str, str]]:
    """Licence and citation in dataset.json, and the known faults of the published set that it was converted from."""
    try:
        about = jsonl.read_info(folder)
    except UserError:
        return "", "", {}
    return about.licence, about.citation, known_faults(about.made_by)


def made_by(folder: Path) -> str:
    """The command that dataset.json names; "" where there is none."""
    try:
        return jsonl.read_info(folder).made_by
    except UserError:
        return ""


def known_faults(made_by: str) -> Mapping[str, str]:
    """Those of the published data set that was converted, by the kind of finding."""
    spec = DATASETS.get(made_by.removeprefix(CONVERTED).strip()) if made_by.startswith(CONVERTED) else None
    return spec.known if spec else {}


def read(source: Source) -> Iterator[tuple[str, Record]]:
    """One record after the other, however many there are."""
    info = jsonl.read_info(source.folder)
    source.tally.name = source.called(info.name)
    source.images.roots = info.roots
    source.counted, source.own = False, not info.made_by.startswith(_AS_ITS_SOURCE)
    labelled = not info.classes and any(record.split == source.split for record in _labelled(source.folder))
    source.classes = label_values(source.folder) if labelled else info.classes
    source.graded = bool(info.classes)
    for where, record in jsonl.read_records(source.folder, source.tally, source.split):
        name = source.called(record.dataset)
        yield where, record if name == record.dataset else record.model_copy(update={"dataset": name})


def label_values(folder: Path) -> dict[str, list[str]]:
    """The classes of each set of labels in the order of the alphabet, where dataset.json does not list them: all that the records have."""
    found: dict[str, set[str]] = defaultdict(set)
    for record in _labelled(folder):
        for one in record.annotations:
            if isinstance(one, Label):
                found[one.set].add(one.value)
    return {name: sorted(values) for name, values in found.items()}


def _labelled(folder: Path) -> Iterator[Record]:
    """The records with a label."""
    for _, text in jsonl.read_lines_of(folder):
        if '"label"' in text or "\\u00" in text:  # the kind, which JSON may also spell by number
            try:
                record = jsonl.parse(text, "")
            except BadRecord:
                continue
            if any(isinstance(one, Label) for one in record.annotations):
                yield record


SPEC = DatasetSpec(
    name=LAYOUT,
    title="records",
    files="records (dataset.json, records-*.jsonl)",
    matches=jsonl.is_records,
    read=read,
    tasks=("vqa", "refer", "identify", "caption", "cls", "qa", "severity", "findings", "calculation"),
    licence="as dataset.json says",
    where="own data",
    names=names,
    info=info,
)
