"""Boxes: pixel xyxy everywhere, xywh on disk (SLAKE, SA-Med2D), and `{<x1><y1><x2><y2>}` in text with integers 0..100 per axis."""

import re

Box = tuple[float, float, float, float]

_TEXT = re.compile(r"\{<(\d{1,3})><(\d{1,3})><(\d{1,3})><(\d{1,3})>\}")


def from_xywh(x: float, y: float, width: float, height: float) -> Box:
    """Corners of a box given as left, top, width, height."""
    return x, y, x + width, y + height


def to_text(box: Box, size: tuple[int, int]) -> str:
    """`{<x1><y1><x2><y2>}` of a pixel box: floor(coordinate / size * 100) with size = (width, height), each axis by its own."""
    scaled = (int(value * 100 / size[i % 2]) for i, value in enumerate(box))  # multiplied first: floor is then exact for whole pixels
    return "{" + "".join(f"<{min(max(value, 0), 100)}>" for value in scaled) + "}"


def from_text(text: str) -> Box | None:
    """The box (0..100) at the start of ``text``, spaces ignored as in the release; None when there is none or it is not a box."""
    match = _TEXT.match(re.sub(r"\s", "", text)) if isinstance(text, str) else None
    if match is None:
        return None
    x1, y1, x2, y2 = (float(int(value)) for value in match.groups())
    return (x1, y1, x2, y2) if max(x1, y1, x2, y2) <= 100 else None


def find(text: str) -> tuple[list[Box], str]:
    """Every box (0..100) in ``text``, wherever it stands, and the text without them, whitespace removed. Outside the release's protocol."""
    squeezed = re.sub(r"\s", "", text)
    found = []
    for match in _TEXT.finditer(squeezed):
        x1, y1, x2, y2 = (float(int(value)) for value in match.groups())
        if max(x1, y1, x2, y2) <= 100:
            found.append((x1, y1, x2, y2))
    return found, _TEXT.sub("", squeezed)


def is_inverted(box: Box) -> bool:
    """Whether the corners are in the wrong order, so that the box holds nothing."""
    return box[0] > box[2] or box[1] > box[3]


def in_order(box: Box) -> Box:
    """The box with its corners in order: the same box unless it is inverted."""
    return min(box[0], box[2]), min(box[1], box[3]), max(box[0], box[2]), max(box[1], box[3])


def is_hit(overlap: float) -> bool:
    """Whether an IoU counts as a box found: strictly above one half, as released. Scores and pictures both ask here."""
    return overlap > 0.5


def to_pixels(box100: Box, size: tuple[int, int]) -> Box:
    """A 0..100 box in pixels of an image of size (width, height)."""
    width, height = size
    return box100[0] / 100 * width, box100[1] / 100 * height, box100[2] / 100 * width, box100[3] / 100 * height


def iou(a: Box, b: Box, plus_one: bool = True) -> float:
    """Intersection over union. ``plus_one`` is the release's convention: corners are pixels, so a side is x2 - x1 + 1."""
    one = 1.0 if plus_one else 0.0

    def area(box: Box) -> float:
        return max(0.0, box[2] - box[0] + one) * max(0.0, box[3] - box[1] + one)

    shared = area((max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3])))
    union = area(a) + area(b) - shared
    return shared / union if union > 0 else 0.0


def clip(box: Box, size: tuple[int, int]) -> Box | None:
    """The part of a pixel box that lies in an image of size (width, height); None when that is less than half of the box."""
    x1, y1, x2, y2 = box
    inner = max(x1, 0.0), max(y1, 0.0), min(x2, float(size[0])), min(y2, float(size[1]))
    kept = max(0.0, inner[2] - inner[0]) * max(0.0, inner[3] - inner[1])
    return inner if kept > 0 and kept * 2 >= (x2 - x1) * (y2 - y1) else None
