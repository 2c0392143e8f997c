"""One image's record out of the rows of all sources: `unimed data build-imax`, step two.

Up to seven tasks an image: calculation, report (caption), severity, findings, REC (refer), REG (identify) and VQA. Every annotation names
its source and row ("chexmask:OriginalResolution/MIMIC-CXR-JPG.csv:17") and its licence. Template questions name the source "template".

Calculation comes from the masks of heart and lungs: cardiothoracic ratio, cardiopulmonary area ratio and the widths of heart and thorax, in
pixels and, with a known spacing, in mm. A rotated image is measured as it is. Without one of the masks nothing is computed.

Annotations that contradict each other are all kept and listed (conflicts.jsonl).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from unimed.datasets.negation import denied
from unimed.datasets.sources.spec import Known, Row, SourceSpec
from unimed.errors import UserError
from unimed.records import pixels
from unimed.records.box import clip, iou
from unimed.records.policy import BadRecord, Tally
from unimed.records.record import QA, Annotation, BoxOf, ImageRef, Label, Labels, Number, Record, Report, made
from unimed.records.text import short
from unimed.tasks.calculation import Ratios, ratios

SHARES = (("train", 80), ("val", 90), ("test", 100))  # of the patients, where no source says the split
STRUCTURES = ("heart", "right lung", "left lung")
NEAR = 0.3  # the least IoU of a box with the mask of the same structure
SAME = {"cardiac silhouette": "heart"}  # Chest ImaGenome's name
GRADED = {"pulmonary edema": "edema"}  # a set of grades, and the finding that its lowest grade denies
ASKED = 2  # template questions about findings an image, one present and one absent


class Conflict(NamedTuple):
    """Two annotations of one image that cannot both be right."""

    kind: str
    image: str
    what: str
    sources: tuple[str, ...]

    def as_json(self) -> dict[str, Any]:
        return {"kind": self.kind, "image": self.image, "what": self.what, "sources": list(self.sources)}


@dataclass(frozen=True)
class Given:
    """A source of a build: its layout and folder."""

    spec: SourceSpec
    folder: Path
    root: str  # its name in dataset.json


@dataclass
class Joined:
    """The outcome for one image. picture: draws the measured widths; None without masks."""

    record: Record
    conflicts: list[Conflict]
    picture: Callable[[], Image.Image] | None = None


def join(key: str, rows: Sequence[tuple[int, Row]], given: Sequence[Given], tallies: Mapping[int, Tally], name: str) -> Joined | None:
    """The record of one image from its rows, each with the number of its source; None where no source brings the image.

    A row that cannot be used is named in its source's tally.
    """
    image = Known(key)
    conflicts: list[Conflict] = []
    owner = _facts(image, rows, given, tallies, conflicts)
    if owner is None:
        return None
    made_of: list[Annotation] = []
    for number, source in enumerate(given):
        ours = _once([row for at, row in rows if at == number], source.spec, tallies[number])
        made_of += [one for row in ours for one in _made(source, row, image, tallies[number])]
        made_of += _together(source, ours, tallies[number])
    measured = _measured(image, rows, given, tallies)
    made_of += measured
    made_of += _questions(image, made_of)
    made_of = _inside(made_of, image, given, tallies)
    conflicts += _conflicts(image, made_of)
    licences = list(dict.fromkeys(one.licence for one in made_of if one.licence))
    file = next(row.file for at, row in rows if at == owner and row.file)
    record = made(
        Record, key, id=key, dataset=name, split=image.split or split_of(image.patient or image.study or key), patient=image.patient,
        images=(ImageRef(path=f"{given[owner].root}:{file}"),), annotations=tuple(made_of), source=given[owner].spec.name,
        licence="; ".join(licences) or given[owner].spec.licence,
    )  # fmt: skip
    return Joined(record, conflicts, (lambda: picture(image)) if measured else None)


def split_of(patient: str) -> str:
    """The split of a patient by the hash of the name: the same in every build."""
    place = hashed(f"split/{patient}") % 100
    return next(name for name, end in SHARES if place < end)


def hashed(text: str) -> int:
    """A number that any build on any machine draws from a text. (A CRC would not do: ids that count up share its low bits.)"""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest())


def _facts(
    image: Known, rows: Sequence[tuple[int, Row]], given: Sequence[Given], tallies: Mapping[int, Tally], conflicts: list[Conflict]
) -> int | None:
    """Fills in what the rows tell of the image, and gives the number of the source whose file is the image's.

    Of two values the first source's holds; where they differ is a conflict. The size of the file is the one that counts.
    """
    owner = None
    told: dict[str, int] = {}
    for number, row in rows:
        for name in ("size", "spacing", "split", "patient", "study", "view"):
            value = getattr(row, name)
            if not value:
                continue
            known = getattr(image, name)
            if not known:
                setattr(image, name, value)
                told[name] = number
            elif known != value and told[name] != number and name in ("size", "split", "patient"):
                sources = (given[told[name]].spec.name, given[number].spec.name)
                conflicts.append(Conflict(f"a {name} on which sources disagree", image.key, f"{known} and {value}", sources))
        if row.file and owner is None:
            path = given[number].folder / row.file
            try:
                size, spacing = look(path)
            except BadRecord as error:
                tallies[number].spoil(BadRecord(error.kind, f"{row.where}: {error}"))
                continue
            if image.size not in (None, size):
                what = f"{image.size[0]} x {image.size[1]} by {given[told['size']].spec.name}, the file has {size[0]} x {size[1]}"
                conflicts.append(Conflict("a size other than the file's", image.key, what, (given[told["size"]].spec.name,)))
            owner, image.file, image.size = number, path, size
            image.spacing = spacing or image.spacing
            told["size"] = number
    return owner


def look(path: Path) -> tuple[tuple[int, int], tuple[float, float] | None]:
    """Size of an image file, and its spacing in mm from row to row and column to column where a DICOM header tells."""
    if not path.is_file():
        raise BadRecord("with a missing image", f"{path}: no such image")
    try:
        if path.suffix.lower() in (".dicom", ".dcm"):
            return _header(path)
        return pixels.placed_size(path)[0], None
    except Exception as error:  # decoders raise nearly anything
        raise BadRecord("with an unreadable image", f"{path}: not a readable image ({short(error)})") from error


def _header(path: Path) -> tuple[tuple[int, int], tuple[float, float] | None]:
    import pydicom

    tags = ["Rows", "Columns", "PixelSpacing", "ImagerPixelSpacing"]
    header = pydicom.dcmread(path, stop_before_pixels=True, specific_tags=tags)
    steps = header.get("PixelSpacing") or header.get("ImagerPixelSpacing")
    spacing = (float(steps[0]), float(steps[1])) if steps is not None and len(steps) == 2 else None
    return (int(header.Columns), int(header.Rows)), spacing if spacing and min(spacing) > 0 else None


def _once(rows: list[Row], spec: SourceSpec, tally: Tally) -> list[Row]:
    if spec.once:
        for extra in rows[1:]:
            what = f"{extra.where}: {extra.image!r} has a row at {rows[0].where} already; the first is kept"
            tally.spoil(BadRecord("with an id given twice", what))
        return rows[:1]
    return rows


def _made(source: Given, row: Row, image: Known, tally: Tally) -> list[Annotation]:
    try:
        return [_told(one, source, row.where) for one in source.spec.make(row, image, source.folder, tally)]
    except BadRecord as error:
        tally.spoil(error)  # the row is counted where it was read
        return []


def _together(source: Given, rows: list[Row], tally: Tally) -> list[Annotation]:
    if source.spec.together is None or not rows:
        return []
    try:
        return [_told(one, source, where) for where, one in source.spec.together(rows)]
    except BadRecord as error:
        tally.spoil(error)
        return []


def _told(one: Annotation, source: Given, where: str) -> Annotation:
    """With its source, row and licence."""
    return one.model_copy(update={"source": f"{source.root}:{one.source or where}", "licence": one.licence or source.spec.licence})


def _measured(image: Known, rows: Sequence[tuple[int, Row]], given: Sequence[Given], tallies: Mapping[int, Tally]) -> list[Annotation]:
    """Ratios and widths. Where a mask is missing or empty, the tally says that they cannot be computed."""
    if not image.masks:
        return []
    number, row = next((at, row) for at, row in rows if given[at].spec.name == "chexmask")
    missing = [name for name in STRUCTURES if name not in image.masks]
    if missing:
        what = f"{row.where}: no {' and no '.join(missing)} in the masks; the other boxes are kept"
        tallies[number].mend(BadRecord("whose ratios are not computable", what))
        return []
    found = _ratios(image, None)
    values = [("cardiothoracic ratio", found.ctr, ""), ("cardiopulmonary area ratio", found.cpar, "")]
    values += [("width of the heart", found.heart_width, "pixels"), ("width of the thorax", found.thorax_width, "pixels")]
    if image.spacing:
        wide = _ratios(image, image.spacing)
        values += [("width of the heart", wide.heart_width, "mm"), ("width of the thorax", wide.thorax_width, "mm")]
    source = f"{given[number].root}:{row.where}"
    return [made(Number, row.where, name=name, value=round(value, 6), unit=unit, source=source, licence=given[number].spec.licence)
            for name, value, unit in values]  # fmt: skip


def _ratios(image: Known, spacing: tuple[float, float] | None) -> Ratios:
    heart, right, left = (image.masks[name] for name in STRUCTURES)
    return ratios(heart, right, left, spacing)


def picture(image: Known) -> Image.Image:
    """The image with the measured widths: the heart's above, the thorax's below, each at the row of its widest extent."""
    assert image.file is not None
    drawn = pixels.load_image(image.file).copy()
    pen = ImageDraw.Draw(drawn)
    lungs = image.masks["right lung"] | image.masks["left lung"]
    found = _ratios(image, image.spacing)
    unit = "mm" if image.spacing else "pixels"
    thick = max(1, max(drawn.size) // 256)
    for mask, width, colour in ((image.masks["heart"], found.heart_width, (255, 138, 31)), (lungs, found.thorax_width, (86, 180, 233))):
        rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
        y = int((rows[0] + rows[-1]) // 2) + (len(rows) // 4 if mask is lungs else 0)
        x1, x2 = int(columns[0]), int(columns[-1])
        pen.line((x1, y, x2, y), fill=colour, width=thick)
        for x in (x1, x2):
            pen.line((x, rows[0], x, rows[-1]), fill=colour, width=thick)
        pen.text((x1 + 2 * thick, y - 12), f"{width:.0f} {unit}", fill=colour)
    pen.text((4, 4), f"CTR {found.ctr:.3f}  CPAR {found.cpar:.3f}", fill=(255, 255, 255))
    return drawn


def _questions(image: Known, known: Iterable[Annotation]) -> Iterator[Annotation]:
    """Template questions: whether there is a finding, for one that is present and one that is absent, chosen by the image's id."""
    for one in known:
        if isinstance(one, Labels):
            for state, answer in (("present", "yes"), ("absent", "no")):
                names = sorted(getattr(one, state))
                if names and state in ("present", "absent"):
                    name = names[hashed(f"{image.key}/{state}") % len(names)]
                    question = f"Is there {name} in the image?"
                    place = f"template:{one.source}"
                    template = f"vqa/finding/{name}"
                    yield made(QA, place, question=question, answer=answer, template=template, source=place, licence=one.licence)
            return


def _inside(some: list[Annotation], image: Known, given: Sequence[Given], tallies: Mapping[int, Tally]) -> list[Annotation]:
    """Without boxes that do not lie in the image; others are clipped to it."""
    kept: list[Annotation] = []
    for one in some:
        if isinstance(one, BoxOf) and image.size is not None:
            inner = clip(one.xyxy, image.size)
            name, _, row = one.source.partition(":")
            what = f"{row}: the box of {one.name!r} is {list(one.xyxy)}, the image has {image.size[0]} x {image.size[1]} pixels"
            tally = next(tallies[number] for number, source in enumerate(given) if source.root == name)
            if inner is None:
                tally.spoil(BadRecord("with a box outside the image", what))
                continue
            if tuple(inner) != one.xyxy:
                tally.mend(BadRecord("with a box clipped to the image", what))
                one = one.model_copy(update={"xyxy": tuple(inner)})
        kept.append(one)
    return kept


def _conflicts(image: Known, some: Sequence[Annotation]) -> Iterator[Conflict]:
    """Boxes against masks, findings against the report and each other, grades against findings."""
    masked = [one for one in some if isinstance(one, BoxOf) and one.source.startswith("chexmask")]
    boxes = {one.name: one.xyxy for one in masked if one.name in image.masks}
    for one in some:
        mask = boxes.get(SAME.get(one.name, one.name)) if isinstance(one, BoxOf) else None
        if isinstance(one, BoxOf) and mask is not None and not one.source.startswith("chexmask"):
            overlap = iou(one.xyxy, mask, plus_one=False)
            if overlap < NEAR:
                what = f"{one.name}: IoU {overlap:.2f} with the mask's box"
                yield Conflict("a box that misses its mask", image.key, what, (one.source, "chexmask"))
    reports = [one for one in some if isinstance(one, Report)]
    findings = [one for one in some if isinstance(one, Labels)]
    for labels in findings:
        for report in reports:
            for name in labels.present:
                if denied(name, report.text):
                    yield Conflict("a finding that the report denies", image.key, name, (labels.source, report.source))
    for number, labels in enumerate(findings):
        for other in findings[number + 1 :]:
            for name in sorted((set(labels.present) & set(other.absent)) | (set(labels.absent) & set(other.present))):
                yield Conflict("a finding on which sources disagree", image.key, name, (labels.source, other.source))
    for one in some:
        if isinstance(one, Label) and one.set in GRADED:
            for labels in findings:
                if (one.value == "none" and GRADED[one.set] in labels.present) or (
                    one.value != "none" and GRADED[one.set] in labels.absent
                ):
                    state = "present" if GRADED[one.set] in labels.present else "absent"
                    what = f"{one.set} is graded {one.value!r}, {GRADED[one.set]} is {state}"
                    yield Conflict("a grade that a finding contradicts", image.key, what, (one.source, labels.source))


def source_named(text: str) -> tuple[str, str]:
    """Layout and folder of "LAYOUT=ROOT"."""
    name, equals, root = text.partition("=")
    if not equals or not name or not root:
        raise UserError(f"--source {text}: give it as LAYOUT=FOLDER")
    return name, root
