"""One question to a model and its answer; boxes are in pixels of the image's file."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from unimed.errors import UserError
from unimed.inference.images import Source, open_source
from unimed.records import box as boxes
from unimed.records.pixels import Opened
from unimed.tasks import TASKS
from unimed.tasks.item import Item
from unimed.tasks.reading import CHATTY, INVERTED, UNPARSABLE, Reading


@dataclass(frozen=True, eq=False)
class Request:
    """A question about an image, or about none (task qa).

    image: a path (png, jpg, tiff, DICOM, NIfTI, folder or zip of a DICOM series), the bytes of such a file, a Pillow image or an array.
    question: the object's name for refer, its box for identify (x1,y1,x2,y2 in pixels of the file), a word of the list for cls.
    plane, slice: of a volume; slice is the frame or page of other files. window: lowest and highest value shown.
    """

    image: Source | None = None
    question: str = ""
    task: str = "vqa"
    plane: str = "axial"
    slice: int | None = None
    window: tuple[float, float] | None = None
    max_new_tokens: int = 100


@dataclass(frozen=True)
class Answer:
    """text: as the model wrote it. box: that of the answer (refer) or of the question (identify), in pixels of the image's file.

    confidence: the geometric mean of its tokens' probabilities; it is not calibrated. gates: the connector's mean gate of each expert.
    notes: what was done to the image. parsed: what the text says, and its kind where it is not simply an answer.
    """

    text: str
    box: boxes.Box | None
    task: str
    confidence: float
    gates: tuple[float, ...]
    notes: tuple[str, ...]
    parsed: Reading


_ODD = {
    INVERTED: "the box's corners are in the wrong order",
    UNPARSABLE: "the answer holds several boxes: this is the first",
    CHATTY: "the box stands among other text",
}


def remark(answer: Answer) -> str:
    """What to know of the box of an answer; "" where there is nothing to say."""
    if TASKS[answer.task].box != "answer":
        return ""
    return _ODD.get(answer.parsed.kind, "") if answer.box is not None else "the answer holds no readable box"


@dataclass(frozen=True)
class Asked:
    """A request that was checked: its image, its box in pixels of the file, and the question as tasks take it."""

    item: Item
    opened: Opened | None
    box: boxes.Box | None
    max_new_tokens: int


def check(request: Request) -> None:
    """Raises a UserError where the request cannot be asked of any model."""
    if request.task not in TASKS:
        raise UserError(f"task {request.task!r}: no such task; valid are {', '.join(TASKS)}")
    task = TASKS[request.task]
    if not isinstance(request.question, str):
        raise UserError(f"question of type {type(request.question).__name__}: it must be text")
    if (request.image is None) == task.needs_image:
        raise UserError(f"task {task.tag}: " + ("it needs an image" if task.needs_image else "it takes no image"))
    if not request.question.strip() and task.asks == "text":
        raise UserError(f"task {task.tag}: it needs a question (refer: the object's name; identify: a box x1,y1,x2,y2 in pixels)")
    if not request.max_new_tokens > 0:
        raise UserError(f"max_new_tokens={request.max_new_tokens}: it must be at least 1")


def prepare(request: Request, class_questions: Sequence[str] = ()) -> Asked:
    """Opens the image and words the question. ``class_questions``: the lists of classes that the model learned."""
    check(request)
    task, question, box = TASKS[request.task], request.question.strip(), None
    opened = open_source(request.image, request.plane, request.slice, request.window) if request.image is not None else None
    size = opened.rgb.size if opened else None
    if task.box == "question" and opened:
        shown = read_box(question, opened)
        box, question = opened.to_original(shown), boxes.to_text(shown, opened.rgb.size)
    if task.asks == "classes":
        question = _class_question(task.tag, question, class_questions)
    pixels = np.asarray(opened.rgb) if opened else None
    return Asked(Item("question", task.tag, "", question, image=pixels, size=size, max_words=0), opened, box, request.max_new_tokens)


def read_box(text: str, opened: Opened) -> boxes.Box:
    """The box in pixels of the shown image, from "x1,y1,x2,y2" in pixels of the file or from the model's own {<x1><y1><x2><y2>}."""
    size, found = opened.rgb.size, boxes.from_text(text)
    if found:
        box = boxes.to_pixels(found, size)
    else:
        parts = [part for part in re.split(r"[,\s]+", text.strip()) if part]
        try:
            values = [float(part) for part in parts]
        except ValueError:
            values = []
        if len(values) != 4 or not np.isfinite(values).all():
            raise UserError(f"box {text!r}: write it as x1,y1,x2,y2 in pixels, for example 12,30,80,96")
        box = boxes.Box(*values)
        if box.x1 < box.x2 and box.y1 < box.y2:
            box = opened.to_original.inverse(box)
    x1, y1, x2, y2 = box
    slack = 1e-3  # a placement that stretches rounds
    if not (-slack <= x1 < x2 <= size[0] + slack and -slack <= y1 < y2 <= size[1] + slack):
        whole = opened.to_original(boxes.Box(0, 0, *size))
        where = ", ".join(f"{value:g}" for value in whole)
        raise UserError(f"box {text!r}: must have x1 < x2 and y1 < y2 and lie inside the image, which is {where} in pixels of the file")
    return box


def _class_question(task: str, text: str, known: Sequence[str]) -> str:
    """The question that lists the classes: one of those in training, which a word of it may name, or the caller's own."""
    fitting = [question for question in known if text.casefold() in question.casefold()]
    if len(fitting) == 1:
        return fitting[0]
    if text:
        return text
    if not known:
        raise UserError(f"task {task}: it needs the question that lists the classes, as in training")
    raise UserError(f"task {task}: this model learned {len(known)} lists of classes; ask one, or a word of it: {' | '.join(known)}")
