"""MedPix captions, as the release splits them: MedPix_single_<split>.csv."""

import os
from collections.abc import Iterator
from pathlib import Path

from unimed.datasets.spec import DatasetSpec
from unimed.records import files
from unimed.records.policy import BadRecord
from unimed.records.record import Record, Report, made
from unimed.records.source import Source


def matches(folder: Path) -> bool:
    """MedPix_single_train.csv or MedPix_single_test.csv."""
    return any((folder / f"MedPix_single_{split}.csv").is_file() for split in ("train", "test"))


def read(source: Source) -> Iterator[tuple[str, Record]]:
    """Rows of type "caption" with no missing cell: `context` is the caption, `name` the image, in the folder itself or in `images/`.

    Missing is what pandas reads as missing ("NA", "nan", an empty cell), since the release drops such rows.
    """
    folder, split, tally = source.folder, source.split, source.tally
    path = folder / f"MedPix_single_{split}.csv"
    if not path.is_file():
        return
    for number, row in files.csv_rows(path, ("name", "context", "type"), tally):
        where = f"{path}:{number}"
        with tally.record():
            empty = next((column for column, cell in row.items() if cell in files.MISSING), None)
            if empty is not None:
                raise BadRecord("with a missing cell", f"{where}: column {empty!r} is {row[empty]!r}")
            if row["type"] != "caption":
                tally.choose(f"of type {files.short(row['type'])}")
                continue
            text = files.text(row, "context", where)
            ref, _ = source.image("" if os.path.isfile(folder / row["name"]) else "images", row["name"], where)
            key = files.name(f"{split}/{number}")
            report = made(Report, where, text=text, id=key, template="caption/image")
            values = {"patient": files.name(row["name"]), "source": SPEC.name}
            yield where, source.record(where, key, SPEC.name, images=(ref,), annotations=(report,), **values)


SPEC = DatasetSpec(
    name="medpix",
    title="MedPix (MPx-Single)",
    files="MedPix (MedPix_single_<split>.csv)",
    matches=matches,
    read=read,
    tasks=("caption",),
    splits=("train", "test"),
    ratio={"caption": 8},
    sized=False,
    licence="no common one: each case belongs to its contributors",
    citation="MedPix, National Library of Medicine; in the selection of RadFM (Wu et al., 2023)",
    where="https://medpix.nlm.nih.gov; the csv files with the data of RadFM",
)
