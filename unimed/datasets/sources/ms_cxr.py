"""MS-CXR: boxes of phrases on images of MIMIC-CXR.

MS_CXR_Local_Alignment_v1.1.0.csv   dicom_id, category_name, label_text, path, x, y, w, h, image_width, image_height
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from unimed.datasets.sources import tables
from unimed.datasets.sources.spec import Known, Row, SourceSpec
from unimed.records.box import from_xywh
from unimed.records.files import short
from unimed.records.policy import BadRecord, Tally
from unimed.records.record import Annotation, BoxOf, made

TABLE = ("MS_CXR_Local_Alignment*.csv",)
COLUMNS = ("dicom_id", "category_name", "label_text", "x", "y", "w", "h", "image_width", "image_height")
CATEGORIES = ("Atelectasis", "Cardiomegaly", "Consolidation", "Edema", "Lung Opacity", "Pleural Effusion", "Pneumonia", "Pneumothorax")


def matches(folder: Path) -> bool:
    return tables.find(folder, TABLE) is not None


def read(folder: Path, tally: Tally) -> Iterator[Row]:
    path = tables.find(folder, TABLE)
    assert path is not None
    for where, cells in tables.rows(path, COLUMNS, tally):
        with tally.record():
            if cells["category_name"] not in CATEGORIES:
                what = f"{where}: category_name is {short(cells['category_name'])}, expected one of {', '.join(CATEGORIES)}"
                raise BadRecord("with a label outside its schema", what)
            corners = from_xywh(*(tables.number(cells, name, where) for name in ("x", "y", "w", "h")))
            values = {"phrase": cells["label_text"], "category": cells["category_name"].lower(), "xyxy": list(corners)}
            yield Row(where, cells["dicom_id"], size=tables.size(cells, "image_width", "image_height"), values=values)


def make(row: Row, image: Known, folder: Path, tally: Tally) -> Iterator[Annotation]:
    """The phrase is referred to, the category identified."""
    xyxy = tuple(row.values["xyxy"])
    yield made(BoxOf, row.where, name=row.values["phrase"], xyxy=xyxy, task="refer", template=f"refer/{row.values['category']}")
    yield made(BoxOf, row.where, name=row.values["category"], xyxy=xyxy, task="identify")


SOURCE = SourceSpec(
    name="ms-cxr",
    title="MS-CXR",
    files="boxes of phrases (MS_CXR_Local_Alignment_v*.csv)",
    matches=matches,
    read=read,
    make=make,
    licence="PhysioNet Credentialed Health Data License 1.5.0",
    citation="Boecking et al., Making the most of text semantics to improve biomedical vision-language processing, ECCV 2022",
    where="https://physionet.org/content/ms-cxr/",
    pages=("https://physionet.org/content/ms-cxr/", "https://doi.org/10.13026/b90j-vb87"),
)
