"""One question with its answer, whatever dataset it comes from, and the image it is about."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from unimed.errors import UserError
from unimed.records.pixels import View, load_image
from unimed.records.text import MAX_WORDS


@dataclass(frozen=True, eq=False)
class Item:
    """``question`` is the bare content: the VQA question, the object's name (refer), the box text (identify), the class question (cls),
    "" (caption). ``answer`` is "" for a question that a user asks.

    size: (width, height) of the image that is shown, None where no task needs it. box: pixel xyxy of that image (refer, identify).
    template: what the majority answer may depend on, e.g. "vqa/modality" or "refer/liver". answer_type: "OPEN" or "CLOSED" (vqa).
    dataset: the name of the set, its folder's where several have one layout. layout: the published set whose form it has.
    modality, organ: as the record says ("" where it does not); a box is of the organ that it is named after.
    max_words: words that the whole instruction of a text question may have, as released; 0: all.
    """

    id: str
    task: str
    dataset: str
    question: str
    answer: str = ""
    image: Path | View | np.ndarray | None = None
    size: tuple[int, int] | None = None
    box: tuple[float, float, float, float] | None = None
    template: str = ""
    answer_type: str | None = None
    subject: str = ""
    layout: str = ""
    modality: str = ""
    organ: str = ""
    max_words: int = MAX_WORDS

    def open(self) -> Image.Image:
        """The RGB image that it is about."""
        if self.image is None:
            raise UserError(f"{self.id}: a {self.task} item has no image")
        return load_image(self.image)

    def __eq__(self, other: object) -> bool:
        """Field by field; images that are arrays by their type, shape and pixels."""
        if not isinstance(other, Item):
            return NotImplemented
        for name in (one.name for one in fields(self)):
            mine, its = getattr(self, name), getattr(other, name)
            if isinstance(mine, np.ndarray) or isinstance(its, np.ndarray):
                if type(mine) is not type(its) or mine.dtype != its.dtype or not np.array_equal(mine, its):
                    return False
            elif mine != its:
                return False
        return True

    def __hash__(self) -> int:
        return hash((self.id, self.task, self.dataset, self.question, self.answer))


def asks(item: Item) -> tuple[Any, ...]:
    """What an item asks and expects, and about what: of the image its file's name, since the data may be moved, and what is shown of it."""
    return item.id, item.task, item.question, item.answer, item.size, item.box, item.subject, shown(item.image)


def shown(image: Path | View | np.ndarray | None) -> tuple[Any, ...] | None:
    """The name of an image's file, then plane, index and grey values of a view; None where it is in no file."""
    if isinstance(image, View):
        return image.path.name, image.plane, image.index, image.grey
    return (image.name, None, None, None) if isinstance(image, Path) else None


def digest(items: Sequence[Item]) -> str:
    """Changes with anything that an item asks or expects; pixels are not read."""
    found = hashlib.sha256()
    for one in items.asked() if hasattr(items, "asked") else map(asks, items):  # an index gives it without making items
        found.update(repr(one).encode())
    return found.hexdigest()
