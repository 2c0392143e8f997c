"""ChestX-ray8 and ChestX-ray14 (NIH): boxes of eight findings; labels, patients and pixel spacing, where that table is there.

    BBox_List_2017.csv           Image Index, Finding Label, Bbox [x, y, w, h]  (the commas of the heading part it into four columns)
    Data_Entry_2017*.csv         Image Index, Finding Labels ("A|B"), Patient ID, View Position, OriginalImage[Width, Height],
                                 OriginalImagePixelSpacing[x, y]
    train_val_list.txt, test_list.txt
    images/ or images_001/images/ ... images_012/images/

The images are 1024 x 1024 pixels whatever the radiograph was, so spacing is rescaled, each axis by its own factor.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from unimed.datasets.sources import tables
from unimed.datasets.sources.spec import Known, Row, SourceSpec
from unimed.records.box import from_xywh
from unimed.records.files import read_lines, short
from unimed.records.policy import BadRecord, Tally
from unimed.records.record import Annotation, BoxOf, Labels, made

BOXES, ENTRIES = ("BBox_List_2017.csv",), ("Data_Entry_2017*.csv",)
XYWH = ("Bbox [x", "y", "w", "h]")
LABELS = (
    "Atelectasis", "Cardiomegaly", "Consolidation", "Edema", "Effusion", "Emphysema", "Fibrosis", "Hernia", "Infiltration", "Mass",
    "Nodule", "Pleural_Thickening", "Pneumonia", "Pneumothorax",
)  # fmt: skip
SAME = {"Infiltrate": "Infiltration"}  # the table of boxes has its own name
SIDE = 1024
FINDINGS = tuple(name.lower().replace("_", " ") for name in LABELS)


def matches(folder: Path) -> bool:
    return tables.find(folder, BOXES) is not None


def _file(folder: Path, name: str) -> str:
    places = ("images", *(f"images_{number:03d}/images" for number in range(1, 13)))
    return next((f"{place}/{name}" for place in places if (folder / place / name).is_file()), "")


def _finding(name: str, where: str) -> str:
    name = SAME.get(name.strip(), name.strip())
    if name not in LABELS:
        raise BadRecord("with a label outside its schema", f"{where}: the label {short(name)} is none of {', '.join(LABELS)}")
    return name.lower().replace("_", " ")


def read(folder: Path, tally: Tally) -> Iterator[Row]:
    boxes, entries = tables.find(folder, BOXES), tables.find(folder, ENTRIES)
    assert boxes is not None
    splits: dict[str, str] = {}
    for name, split in (("train_val_list.txt", "train"), ("test_list.txt", "test")):
        if (folder / name).is_file():
            splits |= {line.strip(): split for line in read_lines(folder / name)}
    for where, cells in tables.rows(entries, ("Image Index", "Finding Labels", "Patient ID", "View Position"), tally) if entries else ():
        with tally.record():
            name = cells["Image Index"].strip()
            named = [_finding(one, where) for one in cells["Finding Labels"].split("|") if one.strip() != "No Finding"]
            yield Row(
                where, Path(name).stem, patient=cells["Patient ID"], split=splits.get(name, ""), file=_file(folder, name),
                spacing=_spacing(cells), view=cells["View Position"], values={"present": named},
            )  # fmt: skip
    seen: set[str] = set()
    for where, cells in tables.rows(boxes, ("Image Index", "Finding Label", *XYWH), tally):
        with tally.record():
            name = cells["Image Index"].strip()
            corners = from_xywh(*(tables.number(cells, column, where) for column in XYWH))
            values = {"name": _finding(cells["Finding Label"], where), "xyxy": list(corners)}
            file = "" if entries or name in seen else _file(folder, name)
            seen.add(name)
            yield Row(where, Path(name).stem, patient=name.partition("_")[0], split=splits.get(name, ""), file=file, values=values)


def _spacing(cells: dict[str, str]) -> tuple[float, float] | None:
    """mm from row to row and from column to column of the image as published."""
    try:
        width, height = float(cells["OriginalImage[Width"]), float(cells["Height]"])
        x, y = float(cells["OriginalImagePixelSpacing[x"]), float(cells["y]"])
    except (KeyError, ValueError):
        return None
    found = y * height / SIDE, x * width / SIDE
    return found if min(found) > 0 else None


def make(row: Row, image: Known, folder: Path, tally: Tally) -> Iterator[Annotation]:
    if "xyxy" in row.values:
        yield made(BoxOf, row.where, name=row.values["name"], xyxy=tuple(row.values["xyxy"]))
    elif "present" in row.values:
        present = tuple(dict.fromkeys(row.values["present"]))
        yield made(Labels, row.where, set="ChestX-ray14", present=present, absent=tuple(name for name in FINDINGS if name not in present))


SOURCE = SourceSpec(
    name="nih-boxes",
    title="ChestX-ray14 (NIH)",
    files="NIH boxes and labels (BBox_List_2017.csv, Data_Entry_2017*.csv, images/)",
    matches=matches,
    read=read,
    make=make,
    classes={"ChestX-ray14": FINDINGS},
    licence="no restriction, with the citation and a link (NIH Clinical Center)",
    citation="Wang et al., ChestX-ray8: hospital-scale chest X-ray database and benchmarks, CVPR 2017",
    where="https://nihcc.app.box.com/v/ChestXray-NIHCC",
    pages=("https://nihcc.app.box.com/v/ChestXray-NIHCC", "https://arxiv.org/abs/1705.02315"),
)
