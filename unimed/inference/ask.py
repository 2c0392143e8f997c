"""One question about one image, answered by a saved model."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from unimed import io
from unimed.errors import UserError
from unimed.inference.predict import answers
from unimed.records import box as boxes
from unimed.records.example import Example
from unimed.records.pixels import open_image
from unimed.tasks import TASKS
from unimed.tasks.answers import read
from unimed.tasks.reading import CHATTY, INVERTED, UNPARSABLE
from unimed.train.run import RUN_FILE, load_model

ODD = {
    INVERTED: "the box's corners are in the wrong order · ",
    UNPARSABLE: "the answer holds several boxes: this is the first · ",
    CHATTY: "the box stands among other text · ",
}


@dataclass(frozen=True)
class Answer:
    text: str
    image: Image.Image | None
    box: boxes.Box | None  # pixels of the image that is shown: found by refer, given to identify
    note: str  # what was done to the file, and by which model
    original: boxes.Box | None = None  # the box in pixels of the file

    @property
    def size(self) -> tuple[int, int]:
        return self.image.size if self.image else (0, 0)

    def draw(self, path: Path) -> None:
        """The image with the box on it, written beside and renamed."""
        if self.image is None or self.box is None:
            raise UserError(f"--save {path}: there is no box to draw; it needs --task refer or identify and an answer that holds a box")
        suffix = path.suffix.lower()
        if suffix not in (".png", ".jpg", ".jpeg"):
            raise UserError(f"--save {path}: must end in .png, .jpg or .jpeg")
        drawn = self.image.copy()
        ImageDraw.Draw(drawn).rectangle(boxes.in_order(self.box), outline=(255, 138, 31), width=max(1, max(drawn.size) // 128))
        with io.beside(path) as partial:
            drawn.save(partial, "PNG" if suffix == ".png" else "JPEG")


def ask(
    image: str,
    question: str,
    task: str,
    model: Path,
    plane: str = "axial",
    index: int | None = None,
    window: str | None = None,
    device: str = "auto",
    verify: bool = False,
) -> Answer:
    """`image` is a path, or "-" for the text-only task. Errors name the argument that is wrong.

    `device` and `verify` as in `load_model`.
    """
    if task not in TASKS:
        raise UserError(f"--task {task}: no such task; valid are {', '.join(TASKS)}")
    of = TASKS[task]
    if (image == "-") == of.needs_image:
        raise UserError(f"--task {task}: " + ("needs an image, not -" if of.needs_image else "takes no image; give - in its place"))
    if not question.strip() and of.asks == "text":
        raise UserError(f"--task {task}: needs a question (refer: the organ's name; identify: a box x1,y1,x2,y2 in pixels)")
    opened = open_image(Path(image), plane=plane, index=index, grey=_window(window)) if of.needs_image else None
    picture = opened.rgb if opened else None
    size = picture.size if picture else None
    box = None
    if of.box == "question" and size:
        box = read_box(question, size)
        question = boxes.to_text(box, size)
    if of.asks == "classes":
        question = _class_question(model, question.strip())
    pixels = np.asarray(picture) if picture else None
    example = Example("asked", task, "asked", question.strip(), "", pixels, size, box, template=task, max_words=0)
    network, processor = load_model(model, device, verify)
    text = answers(network, processor, [example], batch_size=1)[0]
    odd = ""
    if of.box == "answer" and size:
        reading = read(example, text)
        box = boxes.to_pixels(reading.box, size) if reading.box else None
        odd = ODD.get(reading.kind, "") if box else ""
    shown = f"{size[0]} x {size[1]} pixels shown to the model {model} · " if size else f"model {model} · "
    done = "".join(f"{note} · " for note in opened.notes) if opened else ""
    original = opened.to_original(boxes.in_order(box)) if opened and box else None
    return Answer(text, picture, box, odd + done + shown, original)


def read_box(text: str, size: tuple[int, int]) -> boxes.Box:
    """Pixel corners from "x1,y1,x2,y2", or from the model's own form {<x1><y1><x2><y2>} in hundredths."""
    found = boxes.from_text(text)
    if found:
        box = boxes.to_pixels(found, size)
    else:
        parts = [part for part in re.split(r"[,\s]+", text.strip()) if part]
        try:
            values = [float(part) for part in parts]
        except ValueError:
            values = []
        if len(values) != 4:
            raise UserError(f"box {text!r}: write it as x1,y1,x2,y2 in pixels, for example 12,30,80,96")
        box = boxes.Box(*values)
    x1, y1, x2, y2 = box
    if not (0 <= x1 < x2 <= size[0] and 0 <= y1 < y2 <= size[1]):
        raise UserError(f"box {text!r}: must have x1 < x2 and y1 < y2 and lie inside the image of {size[0]} x {size[1]} pixels")
    return box


def _window(text: str | None) -> tuple[float, float] | None:
    if text is None:
        return None
    try:
        low, high = (float(part) for part in text.split(","))
    except ValueError:
        raise UserError(f"--window {text}: write it as lowest,highest, for example --window=-160,240") from None
    if not low < high:
        raise UserError(f"--window {text}: the first number must be below the second")
    return low, high


def _class_question(model: Path, text: str) -> str:
    """The question that lists the classes: one of those in training, which a word of it may name, or the caller's own."""
    known = [str(one) for one in io.read_json(model / RUN_FILE).get("class_questions", [])] if (model / RUN_FILE).is_file() else []
    fitting = [question for question in known if text.casefold() in question.casefold()]
    if len(fitting) == 1:
        return fitting[0]
    if text:
        return text
    if not known:
        raise UserError("--task cls: needs the question that lists the classes, as in training")
    raise UserError(f"--task cls: this model learned {len(known)} lists of classes; ask one, or a word of it: {' | '.join(known)}")
