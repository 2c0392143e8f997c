"""Pulmonary edema severity grades of MIMIC-CXR.

    regex_report_edema_severity.csv, expert_report_edema_severity.csv, consensus_image_edema_severity.csv
        subject_id, study_id, dicom_id, edema_severity: 0 none, 1 vascular congestion, 2 interstitial edema, 3 alveolar edema

The consensus on the image counts most, then the experts' reading of the report, then the regular expressions; one grade an image is kept.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from unimed.datasets.sources import tables
from unimed.datasets.sources.spec import Known, Row, SourceSpec
from unimed.records.files import short
from unimed.records.policy import BadRecord, Tally
from unimed.records.record import Annotation, Label, made

TABLES = tuple(f"{name}_edema_severity.csv" for name in ("consensus_image", "expert_report", "regex_report"))
GRADES = ("none", "vascular congestion", "interstitial edema", "alveolar edema")
SET = "pulmonary edema"


def matches(folder: Path) -> bool:
    return tables.find(folder, TABLES) is not None


def read(folder: Path, tally: Tally) -> Iterator[Row]:
    for name in TABLES:
        path = tables.find(folder, (name,))
        for where, cells in tables.rows(path, ("subject_id", "study_id", "dicom_id", "edema_severity"), tally) if path else ():
            with tally.record():
                grade = cells["edema_severity"].strip().removesuffix(".0")
                if grade not in ("0", "1", "2", "3"):
                    what = f"{where}: edema_severity is {short(cells['edema_severity'])}, expected 0, 1, 2 or 3"
                    raise BadRecord("with a label outside its schema", what)
                study, patient = f"s{cells['study_id']}", f"p{cells['subject_id']}"
                yield Row(where, cells["dicom_id"].strip(), study, patient, values={"grade": int(grade), "rank": TABLES.index(name)})


def make(row: Row, image: Known, folder: Path, tally: Tally) -> Iterator[Annotation]:
    """Nothing: `together` chooses among the grades of an image."""
    return iter(())


def together(rows: list[Row]) -> Iterator[tuple[str, Annotation]]:
    best = min(rows, key=lambda row: row.values["rank"])
    yield best.where, made(Label, best.where, set=SET, value=GRADES[best.values["grade"]], task="severity")


SOURCE = SourceSpec(
    name="edema",
    title="Pulmonary edema severity grades",
    files="edema grades ({consensus_image,expert_report,regex_report}_edema_severity.csv)",
    matches=matches,
    read=read,
    make=make,
    together=together,
    classes={SET: GRADES},
    licence="PhysioNet Credentialed Health Data License 1.5.0",
    citation="Horng et al., Deep learning to quantify pulmonary edema in chest radiographs, Radiology: Artificial Intelligence 2021",
    where="https://physionet.org/content/mimic-cxr-pe-severity/",
    pages=("https://physionet.org/content/mimic-cxr-pe-severity/", "https://github.com/RayRuizhiLiao/mimic_cxr_edema"),
)
