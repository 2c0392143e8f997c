"""Data sets in our own form: a folder with dataset.json and records-*.jsonl, one record a line.

    DATA/dataset.json            {"name", "licence", "citation", "roots": {"NAME": "folder"}, "classes": {"SET": ["class", ...]}, "made_by"}
    DATA/records-00000.jsonl     at most SHARD records each, in the order in which they were written

A folder is written beside its place and renamed when it is whole.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from unimed import io
from unimed.records.files import read_lines, read_text
from unimed.records.policy import BadRecord, Tally
from unimed.records.record import SPLITS, Record, Text, parse, wrong

DATASET_FILE = "dataset.json"
SHARDS = "records-*.jsonl"
SHARD = 10_000
_SPLIT = re.compile(r'"split"\s*:\s*"(train|val|test)"')


class DatasetInfo(BaseModel):
    """dataset.json. roots: folders, relative to DATA or absolute, that image paths name as "NAME:path". classes: of each set of labels."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    name: Text
    licence: str = ""
    citation: str = ""
    roots: dict[Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+$")], str] = {}
    classes: dict[str, list[Text]] = {}
    made_by: str = ""


def is_records(folder: Path) -> bool:
    """dataset.json beside at least one records-*.jsonl."""
    return (folder / DATASET_FILE).is_file() and next(folder.glob(SHARDS), None) is not None


def read_info(folder: Path) -> DatasetInfo:
    """dataset.json of a folder."""
    path = folder / DATASET_FILE
    try:
        return DatasetInfo.model_validate_json(read_text(path), strict=True)
    except ValidationError as error:
        raise wrong(error, str(path)) from None


def read_lines_of(folder: Path) -> Iterator[tuple[str, str]]:
    """Place ("file:number") and text of every line of the shards that is not empty."""
    for shard in sorted(folder.glob(SHARDS)):
        for number, text in enumerate(read_lines(shard), 1):
            if text.strip():
                yield f"{shard}:{number}", text


def read_records(folder: Path, tally: Tally | None = None, split: str | None = None) -> Iterator[tuple[str, Record]]:
    """Place and record of every line, of one split or of all. A line that is no record goes to the tally; without one it is an error.

    A bad line whose split can still be read is reported with that split only.
    """
    for where, text in read_lines_of(folder):
        if split is not None and _names_another(text, split) and _split(text) not in (split, None):
            continue  # a tenth of the time that a record takes
        try:
            record = parse(text, where)
        except BadRecord as error:
            if split is None or _split(text) in (split, None):
                if tally is None:
                    raise
                tally.leave_out(error)
            continue
        if split in (record.split, None):
            yield where, record


def _names_another(text: str, split: str) -> bool:
    found = _SPLIT.search(text)
    return found is not None and found[1] != split


def _split(text: str) -> str | None:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return found["split"] if isinstance(found, dict) and found.get("split") in SPLITS else None


def write(
    folder: Path,
    info: DatasetInfo | Callable[[], DatasetInfo],
    records: Iterable[Record] | Callable[[Path], Iterable[Record]],
    shard: int = SHARD,
) -> dict[str, int]:
    """Writes a whole data set, which takes the place of what is there; counts the records of each split.

    records: also a function of the unfinished folder, to which it may write images. info: also a function, called after the last record.
    """
    counts: Counter[str] = Counter()

    def fill(place: Path) -> None:
        lines: list[str] = []
        shards = 0
        for record in records(place) if callable(records) else records:
            lines.append(line(record))
            counts[record.split] += 1
            if len(lines) == shard:
                _shard(place, shards, lines)
                lines, shards = [], shards + 1
        if lines or not shards:
            _shard(place, shards, lines)
        said = info() if callable(info) else info
        (place / DATASET_FILE).write_text(json.dumps(said.model_dump(), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")

    io.write_folder(folder, fill)
    return dict(counts)


def _shard(folder: Path, number: int, lines: list[str]) -> None:
    (folder / f"records-{number:05d}.jsonl").write_bytes("".join(lines).encode())


def line(record: Record) -> str:
    """A record as one line of JSON, without the fields that have their default."""
    value = record.model_dump(mode="json", exclude_defaults=True)
    if record.annotations:
        value["annotations"] = [{"kind": one.kind, **one.model_dump(mode="json", exclude_defaults=True)} for one in record.annotations]
    return io.json_line(value)
