"""PadChest: labels of radiographs, from physicians or from a network that read the reports.

    PADCHEST_chest_x_ray_images_labels_160K_01.02.19.csv   ImageID, ImageDir, StudyID, PatientID, Projection, Rows_DICOM, Columns_DICOM,
                                                           MethodLabel, Labels ("['cardiomegaly', 'pleural effusion']")
    <ImageDir>/<ImageID>                                   16-bit PNG; also <ImageID> beside the table or in images/

Labels name what a report mentions: a finding that is not listed was not mentioned, which is not absent. The reports are stemmed Spanish
text, and are not read.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

from unimed.datasets.sources import tables
from unimed.datasets.sources.spec import Known, Row, SourceSpec
from unimed.records.files import short
from unimed.records.policy import BadRecord, Tally
from unimed.records.record import Annotation, Labels, made

TABLE = ("PADCHEST_chest_x_ray_images_labels_160K*.csv",)
COLUMNS = ("ImageID", "ImageDir", "StudyID", "PatientID", "Projection", "Rows_DICOM", "Columns_DICOM", "Labels")
NO_FINDING = {"normal", "unchanged", "exclude", "suboptimal study", ""}


def matches(folder: Path) -> bool:
    return tables.find(folder, TABLE) is not None


def _file(folder: Path, place: str, name: str) -> str:
    names = (f"{place}/{name}", f"images/{name}", name)
    return next((one for one in names if (folder / one).is_file()), "")


def read(folder: Path, tally: Tally) -> Iterator[Row]:
    path = tables.find(folder, TABLE)
    assert path is not None
    for where, cells in tables.rows(path, COLUMNS, tally):
        with tally.record():
            named = _labels(cells["Labels"], where)
            present = sorted({name for name in named if name not in NO_FINDING})
            if not present:
                tally.choose("whose labels name no finding")
            file = _file(folder, cells["ImageDir"], cells["ImageID"])
            size = tables.size(cells, "Columns_DICOM", "Rows_DICOM")
            values = {"present": present} if present else {}
            key, view = Path(cells["ImageID"]).stem, cells["Projection"]
            yield Row(where, key, cells["StudyID"], cells["PatientID"], file=file, size=size, view=view, values=values)


def _labels(text: str, where: str) -> list[str]:
    """A list of texts as Python writes it, "nan" where there is none."""
    if text.strip() in ("", "nan"):
        return []
    try:
        found = ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        found = None
    if not isinstance(found, list) or not all(isinstance(one, str) for one in found):
        raise BadRecord("with a label outside its schema", f"{where}: Labels is {short(text)}, expected a list of names")
    return [one.strip().lower() for one in found]


def make(row: Row, image: Known, folder: Path, tally: Tally) -> Iterator[Annotation]:
    if "present" in row.values:
        yield made(Labels, row.where, set="PadChest", present=tuple(row.values["present"]))


SOURCE = SourceSpec(
    name="padchest",
    title="PadChest",
    files="PadChest (PADCHEST_chest_x_ray_images_labels_160K_01.02.19.csv)",
    matches=matches,
    read=read,
    make=make,
    once=True,
    licence="CC BY-SA 4.0 (the table's page)",
    citation="Bustos et al., PadChest: a large chest x-ray image dataset with multi-label annotated reports, Medical Image Analysis 2020",
    where="https://bimcv.cipf.es/bimcv-projects/padchest/",
    pages=("https://bimcv.cipf.es/bimcv-projects/padchest/", "https://arxiv.org/abs/1901.07441"),
)
