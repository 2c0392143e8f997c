"""Boxes: pixel xyxy everywhere, xywh on disk (SLAKE, SA-Med2D), and `{<x1><y1><x2><y2>}` in text with integers 0..100 per axis.

Pixel k of an axis lies between the coordinates k and k + 1, so a box around it is [k, ..., k + 1, ...].
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple


class Box(NamedTuple):
    """A box in pixels of an image's file (`ImageRef`), or of the image that is shown."""

    x1: float
    y1: float
    x2: float
    y2: float


Corners = Box | tuple[float, float, float, float]

_TEXT = re.compile(r"\{<(\d{1,3})><(\d{1,3})><(\d{1,3})><(\d{1,3})>\}")


def from_xywh(x: float, y: float, width: float, height: float) -> Box:
    """Corners of a box given as left, top, width, height."""
    return Box(x, y, x + width, y + height)


def to_text(box: Corners, size: tuple[int, int]) -> str:
    """`{<x1><y1><x2><y2>}` of a pixel box: floor(coordinate / size * 100) with size = (width, height), each axis by its own."""
    # Multiplied first: floor is then exact for whole pixels.
    x1, y1, x2, y2 = [min(max(int(value * 100 / side), 0), 100) for value, side in zip(box, size + size, strict=True)]
    return f"{{<{x1}><{y1}><{x2}><{y2}>}}"


def from_text(text: str) -> Box | None:
    """The box (0..100) at the start of ``text``, spaces ignored as in the release; None when there is none or it is not a box."""
    match = _TEXT.match(re.sub(r"\s", "", text)) if isinstance(text, str) else None
    if match is None:
        return None
    x1, y1, x2, y2 = (float(int(value)) for value in match.groups())
    return Box(x1, y1, x2, y2) if max(x1, y1, x2, y2) <= 100 else None


def find(text: str) -> tuple[list[Box], str]:
    """Every box (0..100) in ``text``, wherever it stands, and the text without them, whitespace removed. Outside the release's protocol."""
    squeezed = re.sub(r"\s", "", text)
    found = []
    for match in _TEXT.finditer(squeezed):
        x1, y1, x2, y2 = (float(int(value)) for value in match.groups())
        if max(x1, y1, x2, y2) <= 100:
            found.append(Box(x1, y1, x2, y2))
    return found, _TEXT.sub("", squeezed)


def is_inverted(box: Corners) -> bool:
    """Whether the corners are in the wrong order, so that the box holds nothing."""
    return box[0] > box[2] or box[1] > box[3]


def in_order(box: Corners) -> Box:
    """The box with its corners in order: the same box unless it is inverted."""
    return Box(min(box[0], box[2]), min(box[1], box[3]), max(box[0], box[2]), max(box[1], box[3]))


def is_hit(overlap: float) -> bool:
    """Whether an IoU counts as a box found: strictly above one half, as released. Scores and pictures both ask here."""
    return overlap > 0.5


def to_pixels(box100: Corners, size: tuple[int, int]) -> Box:
    """A 0..100 box in pixels of an image of size (width, height)."""
    width, height = size
    return Box(box100[0] / 100 * width, box100[1] / 100 * height, box100[2] / 100 * width, box100[3] / 100 * height)


def iou(a: Corners, b: Corners, plus_one: bool = True) -> float:
    """Intersection over union. ``plus_one`` is the release's convention: corners are pixels, so a side is x2 - x1 + 1."""
    one = 1.0 if plus_one else 0.0

    def area(box: Corners) -> float:
        return max(0.0, box[2] - box[0] + one) * max(0.0, box[3] - box[1] + one)

    shared = area((max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3])))
    union = area(a) + area(b) - shared
    return shared / union if union > 0 else 0.0


def clip(box: Corners, size: tuple[int, int]) -> Box | None:
    """The part of a pixel box that lies in an image of size (width, height); None when that is less than half of the box."""
    x1, y1, x2, y2 = box
    inner = Box(max(x1, 0.0), max(y1, 0.0), min(x2, float(size[0])), min(y2, float(size[1])))
    kept = max(0.0, inner[2] - inner[0]) * max(0.0, inner[3] - inner[1])
    return inner if kept > 0 and kept * 2 >= (x2 - x1) * (y2 - y1) else None


class BoxFormat(NamedTuple):
    """How a model writes boxes. write(box, size): a pixel box as text. read(text): the box at the start of a text, in 0..100."""

    write: Callable[[Corners, tuple[int, int]], str]
    read: Callable[[str], Box | None]


FORMATS = {"bins100": BoxFormat(to_text, from_text)}


@dataclass(frozen=True)
class Placement:
    """From coordinates of the image that is shown to those of its file: x' = a x + b y + c, y' = d x + e y + f.

    Axes may be swapped, mirrored and stretched.
    """

    a: float = 1.0
    b: float = 0.0
    c: float = 0.0
    d: float = 0.0
    e: float = 1.0
    f: float = 0.0

    def __call__(self, box: Corners) -> Box:
        """The box in coordinates of the file, corners in order."""
        corners = [(self.a * x + self.b * y + self.c, self.d * x + self.e * y + self.f) for x, y in ((box[0], box[1]), (box[2], box[3]))]
        return in_order(Box(*(round(value, 6) for corner in corners for value in corner)))

    def after(self, first: Placement) -> Placement:
        """`first`, then this one."""
        one, two = first, self
        return Placement(
            two.a * one.a + two.b * one.d,
            two.a * one.b + two.b * one.e,
            two.a * one.c + two.b * one.f + two.c,
            two.d * one.a + two.e * one.d,
            two.d * one.b + two.e * one.e,
            two.d * one.c + two.e * one.f + two.f,
        )

    @property
    def inverse(self) -> Placement:
        """From the file to the image that is shown."""
        det = self.a * self.e - self.b * self.d
        a, b, d, e = self.e / det, -self.b / det, -self.d / det, self.a / det
        return Placement(a, b, -(a * self.c + b * self.f), d, e, -(d * self.c + e * self.f))


AS_STORED = Placement()


def turned(width: float, height: float, swapped: bool = False, left_right: bool = False, top_bottom: bool = False) -> Placement:
    """Of an image shown with ``width`` and ``height``: its axes were swapped, then it was mirrored left to right and top to bottom."""
    x = (-1.0, 0.0, width) if left_right else (1.0, 0.0, 0.0)
    y = (0.0, -1.0, height) if top_bottom else (0.0, 1.0, 0.0)
    return Placement(*y, *x) if swapped else Placement(*x, *y)


def stretched(shown: tuple[float, float], stored: tuple[float, float]) -> Placement:
    """Of an image of size ``stored`` that is shown with size ``shown``."""
    return Placement(a=stored[0] / shown[0], e=stored[1] / shown[1])
