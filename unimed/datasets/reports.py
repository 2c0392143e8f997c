"""Reports and captions: R2Gen-style annotation.json (MIMIC-CXR and the sample) and MedPix csv."""

import os
from pathlib import Path

from unimed.records import files as records
from unimed.records.example import Example
from unimed.records.policy import BadRecord, Tally

MIMIC_CXR, SAMPLE, MEDPIX = "mimic-cxr", "sample-report", "medpix"


def is_annotated(folder: Path) -> bool:
    """annotation.json or annotation_small.json."""
    return (folder / "annotation.json").is_file() or (folder / "annotation_small.json").is_file()


def read_annotated(tally: Tally) -> list[Example]:
    """The first image and the report of each record under the split's key; training prefers `annotation_small.json`, as the release does.

    Images are in `files/` (MIMIC-CXR) or `images/`.
    """
    folder, split = tally.folder, tally.split
    small = folder / "annotation_small.json"
    path = small if split == "train" and small.is_file() else folder / "annotation.json"
    if not path.is_file():
        return []
    images = folder / "files" if (folder / "files").is_dir() else folder / "images"
    examples = []
    for number, row in enumerate(records.of_kind(records.read_json(path, dict).get(split, []), list, f"{path}: {split!r}")):
        where = f"{path}: {split}[{number}]"
        with tally.record():
            report = records.text(row, "report", where, tally)
            names = records.field(row, "image_path", where, (list, str))
            first = names if isinstance(names, str) else next(iter(names), None)
            if not isinstance(first, str):
                raise BadRecord(
                    "with a wrong 'image_path'", f"{where}: image_path is {records.short(names)}, expected a list of file names"
                )
            image, _ = records.image(tally, images, first, where)
            layout = SAMPLE if row.get("synthetic") else MIMIC_CXR
            dataset = tally.folder_name or layout
            key, subject = records.name(f"{dataset}/{row.get('id', number)}"), records.name(row.get("subject_id", ""))
            examples.append(Example(key, "caption", dataset, "", report, image, None, None, "caption/report", None, subject, layout))
    return examples


def is_medpix(folder: Path) -> bool:
    """MedPix_single_train.csv or MedPix_single_test.csv."""
    return any((folder / f"MedPix_single_{split}.csv").is_file() for split in ("train", "test"))


def read_medpix(tally: Tally) -> list[Example]:
    """Rows of type "caption" with no missing cell: `context` is the caption, `name` the image, in the folder itself or in `images/`.

    Missing is what pandas reads as missing ("NA", "nan", an empty cell), since the release drops such rows.
    """
    folder, split = tally.folder, tally.split
    path = folder / f"MedPix_single_{split}.csv"
    if not path.is_file():
        return []
    dataset, images = tally.folder_name or MEDPIX, folder / "images"
    examples = []
    for number, row in records.csv_rows(path, ("name", "context", "type"), tally):
        where = f"{path}:{number}"
        with tally.record():
            empty = next((column for column, cell in row.items() if cell in records.MISSING), None)
            if empty is not None:
                raise BadRecord("with a missing cell", f"{where}: column {empty!r} is {row[empty]!r}")
            if row["type"] != "caption":
                tally.choose(f"of type {records.short(row['type'])}")
                continue
            report = records.text(row, "context", where, tally)
            beside = os.path.isfile(folder / row["name"])
            image, _ = records.image(tally, folder if beside else images, row["name"], where)
            key = records.name(f"{dataset}/{split}/{number}")
            subject = records.name(row["name"])
            examples.append(Example(key, "caption", dataset, "", report, image, None, None, "caption/image", None, subject, MEDPIX))
    return examples
