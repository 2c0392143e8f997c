"""Chest ImaGenome: a scene graph for each frontal image of MIMIC-CXR.

silver_dataset/scene_graph/<dicom_id>_SceneGraph.json   (also scene_graph/, or the files themselves)
    image_id, study_id, patient_id
    objects      [{bbox_name, original_x1, original_y1, original_x2, original_y2, ...}]   in pixels of the image
    attributes   [{bbox_name, attributes: [["anatomicalfinding|yes|lung opacity", ...], ...]}]   a list a phrase
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from unimed.datasets.sources.spec import Known, Row, SourceSpec
from unimed.records.files import field, read_json, short
from unimed.records.policy import BadRecord, Tally
from unimed.records.record import QA, Annotation, BoxOf, Labels, made

END = "_SceneGraph.json"
CORNERS = ("original_x1", "original_y1", "original_x2", "original_y2")
FINDINGS = ("anatomicalfinding", "disease")  # other categories are technique, tubes and "nlp|yes|abnormal"


def _graphs(folder: Path) -> Path | None:
    for place in (folder / "silver_dataset" / "scene_graph", folder / "scene_graph", folder):
        if next(place.glob(f"*{END}"), None) is not None:
            return place
    return None


def matches(folder: Path) -> bool:
    return _graphs(folder) is not None


def read(folder: Path, tally: Tally) -> Iterator[Row]:
    place = _graphs(folder)
    assert place is not None
    for path in sorted(place.glob(f"*{END}")):
        tally.records += 1
        yield Row(str(path.relative_to(folder)), image=path.name.removesuffix(END))


def make(row: Row, image: Known, folder: Path, tally: Tally) -> Iterator[Annotation]:
    """Boxes of the regions, findings of the image, and a question about each finding in a region. Nothing of a damaged graph."""
    graph = read_json(folder / row.where, dict)
    objects, attributes = (field(graph, name, row.where, list) for name in ("objects", "attributes"))
    for one in objects:
        name = field(one, "bbox_name", row.where)
        corners = tuple(field(one, corner, row.where, (int, float)) for corner in CORNERS)
        yield made(BoxOf, row.where, name=name, xyxy=corners)
    by_region = _findings(attributes, row.where)
    present = {name for names in by_region.values() for name, states in names.items() if "yes" in states}
    named = {name for names in by_region.values() for name in names}
    if named:
        yield made(Labels, row.where, set="Chest ImaGenome", present=tuple(sorted(present)), absent=tuple(sorted(named - present)))
    for region, names in by_region.items():
        for name, states in names.items():
            if len(states) == 1:
                question, answer = f"Is there {name} in the {region}?", next(iter(states))
                yield made(QA, row.where, question=question, answer=answer, template=f"vqa/region/{name}")
            else:
                what = f"{row.where}: {name!r} in the {region} is both present and absent"
                tally.mend(BadRecord("with a finding both present and absent in one region, not asked about", what))


def _findings(attributes: list[Any], where: str) -> dict[str, dict[str, set[str]]]:
    """Region -> finding -> "yes", "no" or both."""
    found: dict[str, dict[str, set[str]]] = {}
    for one in attributes:
        region = field(one, "bbox_name", where)
        for phrase in field(one, "attributes", where, list):
            for text in phrase if isinstance(phrase, list) else []:
                parts = str(text).split("|")
                if len(parts) != 3 or parts[1] not in ("yes", "no"):
                    what = f"{where}: the attribute {short(text)} is not category|yes or no|name"
                    raise BadRecord("with a label outside its schema", what)
                if parts[0] in FINDINGS:
                    found.setdefault(region, {}).setdefault(parts[2], set()).add(parts[1])
    return found


SOURCE = SourceSpec(
    name="chest-imagenome",
    title="Chest ImaGenome",
    files="scene graphs (silver_dataset/scene_graph/*_SceneGraph.json)",
    matches=matches,
    read=read,
    make=make,
    once=True,
    licence="PhysioNet Credentialed Health Data License 1.5.0",
    citation="Wu et al., Chest ImaGenome dataset for clinical reasoning, NeurIPS Datasets and Benchmarks 2021",
    where="https://physionet.org/content/chest-imagenome/",
    pages=("https://physionet.org/content/chest-imagenome/1.0.0/", "https://arxiv.org/abs/2108.00316"),
)
