"""The record: images of one patient and what is known of them. A question is made from a record by a task; the record holds none.

    {"id": "...", "dataset": "...", "split": "train", "patient": "...",
     "images": [{"path": "a.nii.gz", "plane": "axial", "slice": 12, "window": [-160, 240], "frame": null}],
     "annotations": [{"kind": "qa", "question": "...", "answer": "...", "options": []},
                     {"kind": "box", "name": "...", "xyxy": [x1, y1, x2, y2]},
                     {"kind": "label", "set": "...", "value": "..."},
                     {"kind": "labels", "present": [], "absent": [], "uncertain": []},
                     {"kind": "report", "text": "..."},
                     {"kind": "number", "name": "...", "value": 0.48, "unit": "..."}],
     "source": "...", "licence": "..."}

Boxes are in pixels of the image's file. An annotation may name its image by index, a task of its own, its source and its licence. Scores
are listed by the modality ("CT") and the organ or region ("liver", "chest") that an annotation names, or else its record.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from unimed.errors import UserError
from unimed.io import check_name
from unimed.records.policy import BadRecord

Split = Literal["train", "val", "test"]
SPLITS: tuple[Split, ...] = ("train", "val", "test")

NOT_A_RECORD = "that are no records"
Part = TypeVar("Part", bound=BaseModel)


def _some(text: str) -> str:
    if not text.strip():
        raise ValueError("must hold some text")
    return text


Text = Annotated[str, AfterValidator(_some)]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ImageRef(_Part):
    """Where an image is and which part of the file it is.

    path: relative to the data set's folder, or under a root that dataset.json names ("ROOT:path"); a folder or zip is a DICOM series.
    plane and slice: of a volume, as in `unimed predict --plane --slice`. window: lowest and highest value shown. frame: of a multi-frame
    file, or the page.
    """

    path: Text
    plane: Literal["axial", "coronal", "sagittal"] | None = None
    slice: Annotated[int, Field(ge=0)] | None = None
    window: tuple[float, float] | None = None
    frame: Annotated[int, Field(ge=0)] | None = None

    @field_validator("path")
    @classmethod
    def _stays_inside(cls, path: str) -> str:
        try:
            check_name(split_root(path)[1], Path("DATA"))
        except UserError:
            raise ValueError("a path must stay inside the data set's folder or root: no '..', no absolute path") from None
        return path

    @field_validator("window")
    @classmethod
    def _rises(cls, window: tuple[float, float] | None) -> tuple[float, float] | None:
        if window is not None and not (all(map(math.isfinite, window)) and window[0] < window[1]):
            raise ValueError("a window must be [lowest, highest]")
        return window

    @model_validator(mode="after")
    def _one_index(self) -> ImageRef:
        if self.slice is not None and self.frame is not None:
            raise ValueError("an image has a slice (of a volume) or a frame (of a multi-frame file), not both")
        return self


def split_root(path: str) -> tuple[str, str]:
    """Root ("" for the data set's folder) and path of "ROOT:path"."""
    root, colon, name = path.partition(":")
    return (root, name) if colon else ("", path)


class _Annotation(_Part):
    """Fields of every annotation. image: its index among the record's. task: where it is not the usual one of its kind.

    id: of the question made from it, within its data set; by default the record's, the task and the place among the annotations.
    template: the kind of question, where that is not its text; the majority answer is that of one template.
    """

    image: Annotated[int, Field(ge=0)] = 0
    task: str = ""
    id: str = ""
    template: str = ""
    modality: str = ""
    organ: str = ""
    source: str = ""
    licence: str = ""


class QA(_Annotation):
    """A question and its answer, with or without an image.

    answer_type: CLOSED (of few possible answers) or OPEN; by default closed with options, yes or no. context: text before the question.
    """

    kind: Literal["qa"] = "qa"
    question: Text
    answer: Text
    options: tuple[Text, ...] = ()
    answer_type: Literal["OPEN", "CLOSED"] | None = None
    context: str = ""


class BoxOf(_Annotation):
    """Where a named thing is, in pixels of the file: [x1, y1, x2, y2]."""

    kind: Literal["box"] = "box"
    name: Text
    xyxy: tuple[float, float, float, float]

    @field_validator("xyxy")
    @classmethod
    def _is_a_box(cls, xyxy: tuple[float, float, float, float]) -> tuple[float, float, float, float]:
        x1, y1, x2, y2 = xyxy
        if not (all(map(math.isfinite, xyxy)) and x1 < x2 and y1 < y2):
            raise ValueError("a box must be [x1, y1, x2, y2] with x1 < x2 and y1 < y2")
        return xyxy


class Label(_Annotation):
    """One class out of a set; dataset.json lists the classes of each set."""

    kind: Literal["label"] = "label"
    set: Text
    value: Text


class Labels(_Annotation):
    """Findings: present, absent and uncertain are told apart from not mentioned. set: the list of classes that gives their order."""

    kind: Literal["labels"] = "labels"
    set: str = ""
    present: tuple[Text, ...] = ()
    absent: tuple[Text, ...] = ()
    uncertain: tuple[Text, ...] = ()

    @model_validator(mode="after")
    def _each_once(self) -> Labels:
        named = [*self.present, *self.absent, *self.uncertain]
        if len(named) != len(set(named)):
            raise ValueError(f"the finding {next(name for name in named if named.count(name) > 1)!r} is listed twice")
        return self


class Report(_Annotation):
    """The report or caption of an image."""

    kind: Literal["report"] = "report"
    text: Text


class Number(_Annotation):
    """A measured quantity."""

    kind: Literal["number"] = "number"
    name: Text
    value: Annotated[float, Field(allow_inf_nan=False)]
    unit: str = ""


Annotation = Annotated[QA | BoxOf | Label | Labels | Report | Number, Field(discriminator="kind")]


class Record(_Part):
    """One record of a data set."""

    id: Text
    dataset: Text
    split: Split
    patient: str = ""
    images: tuple[ImageRef, ...] = ()
    annotations: tuple[Annotation, ...] = ()
    modality: str = ""
    organ: str = ""
    source: str = ""
    licence: str = ""

    @model_validator(mode="after")
    def _images_exist(self) -> Record:
        for number, annotation in enumerate(self.annotations):
            if annotation.image >= max(len(self.images), 1):
                raise ValueError(f"annotations.{number} is about image {annotation.image}, the record has {len(self.images)}")
            if not self.images and annotation.kind not in ("qa", "number"):
                raise ValueError(f"annotations.{number}: a {annotation.kind} needs an image, the record has none")
        return self


def made(kind: type[Part], where: str, **values: Any) -> Part:
    """A part of a record from values that were read; a BadRecord names the first field that is wrong."""
    try:
        return kind(**values)
    except ValidationError as error:
        raise wrong(error, where) from None


def parse(line: str, where: str) -> Record:
    """A record from its line of JSON; a BadRecord names the file, the line and the field."""
    try:
        return Record.model_validate_json(line, strict=True)
    except ValidationError as error:
        raise wrong(error, where) from None
    except UnicodeEncodeError:
        raise BadRecord("with text that is not Unicode", f"{where}: holds bytes that are no UTF-8 text") from None


def wrong(error: ValidationError, where: str) -> BadRecord:
    """The first fault that pydantic found, in one line."""
    first = error.errors(include_url=False)[0]
    field = "".join(f"{part}: " for part in [".".join(map(str, first["loc"]))] if part)
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "json_invalid":
        return BadRecord("that are not valid JSON", f"{where}: not valid JSON ({message.removeprefix('Invalid JSON: ')})")
    given = "" if first["type"] == "missing" or not first["loc"] else f", it is {_shown(first['input'])}"
    return BadRecord(NOT_A_RECORD, f"{where}: {field}{message[0].lower()}{message[1:]}{given}")


def _shown(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 60 else f"{shown[:57]}..."
