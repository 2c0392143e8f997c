"""The built-in CT and MR slices as image-centric data: every slice with all tasks that its masks answer.

    calculation   area of the largest organ in cm2; its width over the body's, both along the image's rows
    caption       the report of the sample (synthetic)
    severity      the liver's share of the body's area in three bins, cut at the terciles of training ("share of the liver, synthetic")
    findings      organs of the slice: present where large enough for a box, absent where not a pixel shows, else uncertain
    refer, identify, vqa   boxes and questions as in the sample

Masks are automatic, and severity is no grade of a disease: what is learned from it says nothing about medicine.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from unimed.records import jsonl
from unimed.records.record import QA, Annotation, BoxOf, ImageRef, Label, Labels, Number, Record, Report
from unimed.sample import questions
from unimed.sample.masks import ORGANS, bounding_box, largest_component
from unimed.sample.slices import BLOCKS, PIXEL_MM, Slice, slices, subject, vendored_volume

NAME = "sample-imax"
LICENCE = "Apache-2.0 (TotalSegmentator's test data)"
SEVERITY = "share of the liver, synthetic"
GRADES = ("small", "medium", "large")
SPLITS = {"train": "train", "slab": "val", "subject": "test"}
BODY = 25  # grey above which a pixel belongs to the body
NEIGHBOURS = 4  # slices of a block of neighbours
Progress = Callable[[int, int, str], None]


def _quiet(done: int, total: int, what: str) -> None:
    pass


def build_imax_sample(out: Path, progress: Progress = _quiet, step: int = 0, names: Sequence[str] = tuple(BLOCKS)) -> dict[str, int]:
    """Writes the records of all slices of the volumes; counts them by split. step: between training slices of the coronal and sagittal
    planes, 0 as in the sample. The held-out images are the sample's."""
    made: list[Slice] = []
    for done, name in enumerate(names):
        progress(done, len(names) + 1, f"cutting {name}")
        source = subject(name, vendored_volume(name))
        if step:
            source = replace(source, blocks=tuple(replace(one, step=step) if one.split == "train" else one for one in source.blocks))
        made += slices(source)
    progress(len(names), len(names) + 1, "writing records")
    info = jsonl.DatasetInfo(
        name=NAME, licence=LICENCE, citation="TotalSegmentator's test data; severity and reports are synthetic",
        classes={SEVERITY: list(GRADES), "organ": list(ORGANS)}, made_by="unimed data build-imax",
    )  # fmt: skip
    counts = jsonl.write(out, info, partial(_records, made))
    progress(len(names) + 1, len(names) + 1, "sample is ready")
    return counts


def _records(made: Sequence[Slice], place: Path) -> list[Record]:
    (place / "images").mkdir()
    names = [name for name in ORGANS if any(one.finding(name) for one in made if one.split == "train")]
    asked: dict[str, list[QA]] = {}
    for split in SPLITS:
        of_split = [one for one in made if one.split == split]
        asked |= questions.vqa(of_split, names, random.Random(f"imax/{split}"))
    body = {one.id: _body(one.image) for one in made}
    cuts = terciles([_share(one, body[one.id]) for one in made if one.split == "train" and one.finding("liver")])
    records = []
    for one in made:
        one.image.save(place / "images" / f"{one.id}.png")
        some = tuple(_annotations(one, names, asked[one.id], body[one.id], cuts))
        known = {"id": one.id, "dataset": NAME, "split": SPLITS[one.split], "patient": one.subject, "source": "sample", "licence": LICENCE}
        known["modality"] = questions.MODALITY[one.modality]
        records.append(Record(**known, images=(ImageRef(path=f"images/{one.id}.png"),), annotations=some))
    return records


def terciles(values: Sequence[float]) -> tuple[float, float]:
    """The two values that part a list into three of one size."""
    low, high = np.quantile(np.asarray(values), [1 / 3, 2 / 3])
    return float(low), float(high)


def grade(share: float, cuts: tuple[float, float]) -> str:
    """The bin of a share of the liver."""
    return GRADES[int(share > cuts[0]) + int(share > cuts[1])]


def _body(image: Image.Image) -> np.ndarray:
    return largest_component(np.asarray(image.convert("L")) > BODY)


def _share(one: Slice, body: np.ndarray) -> float:
    liver = one.finding("liver")
    return liver.area_mm2 / (float(body.sum()) * PIXEL_MM**2) if liver else 0.0


def _annotations(one: Slice, names: Sequence[str], asked: Sequence[QA], body: np.ndarray, cuts: tuple[float, float]) -> list[Annotation]:
    organs = [found for found in one.findings if found.name in ORGANS]
    some: list[Annotation] = []
    if organs:
        largest = max(organs, key=lambda found: found.area_mm2)
        ratio = largest.box[2] / bounding_box(body)[2]
        some.append(Number(name=f"area of the {largest.name}", value=round(largest.area_mm2 / 100, 2), unit="cm2", source="masks"))
        some.append(Number(name=f"ratio of the width of the {largest.name} to the body's", value=round(ratio, 4), source="masks"))
    some.append(Report(text=questions.report(one), source="synthetic"))
    if one.finding("liver"):
        some.append(Label(set=SEVERITY, value=grade(_share(one, body), cuts), task="severity", source="masks"))
    large = {found.name for found in one.findings}
    present, absent = [name for name in names if name in large], [name for name in names if name not in one.present]
    uncertain = [name for name in names if name in one.present and name not in large]
    some.append(Labels(set="organ", present=tuple(present), absent=tuple(absent), uncertain=tuple(uncertain), source="masks"))
    some += [BoxOf(name=found.name, xyxy=tuple(found.xyxy), source="masks") for found in organs]
    some += [one.model_copy(update={"source": "template"}) for one in asked]
    return some


def block_of(record: Record) -> str:
    """The block of neighbours that a slice belongs to: slices next to each other look alike."""
    name, _, index = record.id.partition("_z")[0].rpartition("_")
    zone = record.id.partition("_z")[2]
    return f"{name}/{zone}/{int(index) // NEIGHBOURS:03d}"
