"""Reports and captions: R2Gen-style annotation.json (MIMIC-CXR and the sample) and MedPix csv."""

import csv
import logging
from pathlib import Path

from unimed.data.example import Example
from unimed.data.files import inside
from unimed.data.records import field, read_json, read_text
from unimed.data.text import clean
from unimed.errors import UserError

log = logging.getLogger("unimed.data")


def is_annotated(folder: Path) -> bool:
    """annotation.json or annotation_small.json."""
    return (folder / "annotation.json").is_file() or (folder / "annotation_small.json").is_file()


def read_annotated(folder: Path, split: str) -> list[Example]:
    """The first image and the report of each record under the split's key; training prefers `annotation_small.json`, as the release does.

    Images are in `files/` (MIMIC-CXR) or `images/`. Records whose image is missing are dropped and counted in the log.
    """
    small = folder / "annotation_small.json"
    path = small if split == "train" and small.is_file() else folder / "annotation.json"
    if not path.is_file():
        return []
    images = folder / "files" if (folder / "files").is_dir() else folder / "images"
    examples = []
    records = read_json(path, dict).get(split, [])
    for number, record in enumerate(records):
        where = f"{path}: {split}[{number}]"
        names = field(record, "image_path", where, list)
        if not names or not isinstance(names[0], str):
            raise UserError(f"{where}: image_path is {names!r}, expected a list of file names")
        image = inside(images, names[0])
        report = clean(field(record, "report", where))
        if not image.is_file() or not report:
            continue
        synthetic = bool(record.get("synthetic"))
        dataset = "sample-report" if synthetic else "mimic-cxr"
        key = str(record.get("id", number))
        subject = str(record.get("subject_id", ""))
        examples.append(Example(f"{dataset}/{key}", "caption", dataset, "", report, image, None, None, "caption/report", None, subject))
    return _kept(examples, len(records), path)


def is_medpix(folder: Path) -> bool:
    """MedPix_single_train.csv or MedPix_single_test.csv."""
    return any((folder / f"MedPix_single_{split}.csv").is_file() for split in ("train", "test"))


def read_medpix(folder: Path, split: str) -> list[Example]:
    """Rows of type "caption" with no empty cell: `context` is the caption, `name` the image, in the folder itself or in `images/`."""
    path = folder / f"MedPix_single_{split}.csv"
    if not path.is_file():
        return []
    rows = list(csv.DictReader(read_text(path).splitlines(keepends=True)))
    if rows:
        for column in ("name", "context", "type"):
            field(rows[0], column, f"{path}: first row")
    captions = [row for row in rows if all(row.values()) and row["type"] == "caption"]
    examples = []
    for number, row in enumerate(captions):
        image = next((found for place in (folder, folder / "images") if (found := inside(place, row["name"])).is_file()), None)
        if image is not None:
            key, report = f"medpix/{split}/{number}", clean(row["context"])
            examples.append(Example(key, "caption", "medpix", "", report, image, None, None, "caption/image", None, row["name"]))
    return _kept(examples, len(captions), path)


def _kept(examples: list[Example], total: int, path: Path) -> list[Example]:
    if total and not examples:
        raise UserError(f"{path}: none of its {total} records has its image and text; are the images beside it (files/ or images/)?")
    if len(examples) < total:
        log.warning("%s: %d of %d records dropped: image or text missing", path, total - len(examples), total)
    return examples
