"""VinDr-CXR: boxes and labels of three radiologists an image (five agree on the test split).

annotations/annotations_{train,test}.csv    image_id, rad_id (train), class_name, x_min, y_min, x_max, y_max
annotations/image_labels_{train,test}.csv   image_id, rad_id (train) and a column of 0 or 1 for each of 28 labels
{train,test}/<image_id>.dicom               also .dcm, .png and .jpg
train.csv, vinbigdata-train.csv             the table of the Kaggle competition, with class_id beside class_name
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from unimed.datasets.sources import tables
from unimed.datasets.sources.spec import Known, Row, SourceSpec
from unimed.records.files import short
from unimed.records.policy import BadRecord, Tally
from unimed.records.record import Annotation, BoxOf, Labels, made

COLUMNS = ("image_id", "class_name", "x_min", "y_min", "x_max", "y_max")
LOCAL = (
    "Aortic enlargement", "Atelectasis", "Calcification", "Cardiomegaly", "Clavicle fracture", "Consolidation", "Edema", "Emphysema",
    "Enlarged PA", "ILD", "Infiltration", "Lung Opacity", "Lung cavity", "Lung cyst", "Mediastinal shift", "Nodule/Mass",
    "Pleural effusion", "Pleural thickening", "Pneumothorax", "Pulmonary fibrosis", "Rib fracture", "Other lesion",
)  # fmt: skip
SETS = {
    "train": ("annotations/annotations_train.csv", "annotations_train.csv", "train.csv", "vinbigdata-train.csv"),
    "test": ("annotations/annotations_test.csv", "annotations_test.csv"),
}
LABELS = {name: (f"annotations/image_labels_{name}.csv", f"image_labels_{name}.csv") for name in SETS}
NO_FINDING = "No finding"
OTHER = {"Other disease", "Other diseases", NO_FINDING}


def matches(folder: Path) -> bool:
    path = next((path for names in SETS.values() if (path := tables.find(folder, names))), None)
    return path is not None and tables.has(path, COLUMNS)


def _file(folder: Path, split: str, key: str) -> str:
    names = (f"{split}/{key}{suffix}" for suffix in (".dicom", ".dcm", ".png", ".jpg"))
    return next((name for name in names if (folder / name).is_file()), "")


def read(folder: Path, tally: Tally) -> Iterator[Row]:
    known = {name.lower(): name for name in LOCAL}
    seen: set[str] = set()
    for split, names in SETS.items():
        path, labels = tables.find(folder, names), tables.find(folder, LABELS[split])
        for where, cells in tables.rows(path, COLUMNS, tally) if path else ():
            with tally.record():
                key, name = cells["image_id"].strip(), cells["class_name"].strip()
                file = "" if key in seen else _file(folder, split, key)
                seen.add(key)
                values = {}
                if name != NO_FINDING:
                    if name.lower() not in known:
                        what = f"{where}: class_name is {short(name)}, which is none of the {len(LOCAL)} local labels"
                        raise BadRecord("with a label outside its schema", what)
                    xyxy = [tables.number(cells, column, where) for column in COLUMNS[2:]]
                    values = {"name": name.lower(), "xyxy": xyxy, "reader": cells.get("rad_id", "")}
                yield Row(where, key, split=split, file=file, values=values)
        for where, cells in tables.rows(labels, ("image_id",), tally) if labels else ():
            with tally.record():
                votes = {name: tables.number(cells, name, where) for name in cells if name not in ("image_id", "rad_id", "")}
                if not set(votes.values()) <= {0.0, 1.0}:
                    raise BadRecord("with a label outside its schema", f"{where}: a label is neither 0 nor 1")
                present = [name.lower() for name, vote in votes.items() if vote and name not in OTHER]
                absent = [name.lower() for name, vote in votes.items() if not vote and name not in OTHER]
                key = cells["image_id"].strip()
                file = "" if key in seen else _file(folder, split, key)
                seen.add(key)
                yield Row(where, key, split=split, file=file, values={"present": present, "absent": absent})


def make(row: Row, image: Known, folder: Path, tally: Tally) -> Iterator[Annotation]:
    """A box of one reader. Labels come from `together`, which has all readers."""
    if "xyxy" in row.values:
        yield made(BoxOf, row.where, name=row.values["name"], xyxy=tuple(row.values["xyxy"]))


def together(rows: list[Row]) -> Iterator[tuple[str, Annotation]]:
    """Labels of all readers of an image: present by most, absent by all, else uncertain."""
    votes = [row for row in rows if "present" in row.values]
    if votes:
        names = sorted({name for row in votes for name in (*row.values["present"], *row.values["absent"])})
        shares = {name: sum(name in row.values["present"] for row in votes) / len(votes) for name in names}
        states = {
            "present": tuple(name for name in names if shares[name] > 0.5),
            "absent": tuple(name for name in names if shares[name] == 0),
            "uncertain": tuple(name for name in names if 0 < shares[name] <= 0.5),
        }
        yield votes[0].where, made(Labels, votes[0].where, set="VinDr-CXR", **states)


SOURCE = SourceSpec(
    name="vindr-cxr",
    title="VinDr-CXR",
    files="VinDr-CXR (annotations/annotations_{train,test}.csv, image_labels_{train,test}.csv, train/*.dicom)",
    matches=matches,
    read=read,
    make=make,
    together=together,
    classes={"VinDr-CXR": tuple(name.lower() for name in LOCAL)},
    licence="PhysioNet Credentialed Health Data License 1.5.0",
    citation="Nguyen et al., VinDr-CXR: an open dataset of chest X-rays with radiologist's annotations, Scientific Data 2022",
    where="https://physionet.org/content/vindr-cxr/",
    pages=("https://physionet.org/content/vindr-cxr/1.0.0/", "https://arxiv.org/abs/2012.15029"),
)
