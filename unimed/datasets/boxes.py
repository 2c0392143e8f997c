"""Boxes as lists of {name: [x, y, width, height]}, the form of SLAKE and SA-Med2D."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from unimed.records import files
from unimed.records.box import Box, clip, from_xywh
from unimed.records.policy import BadRecord
from unimed.records.record import BoxOf, ImageRef, made
from unimed.records.source import Source


def rows(source: Source, path: Path) -> list[tuple[str, int, Any]]:
    """Place, number and value of every row of a JSON list; a file that cannot be read counts as one record."""
    try:
        return [(f"{path}[{number}]", number, row) for number, row in enumerate(files.read_json(path, list))]
    except BadRecord as error:
        source.tally.leave_out(error)
        return []


def read_boxes(source: Source, case: str, prefix: str, image: str, path: Path) -> Iterator[tuple[ImageRef, BoxOf]]:
    """The boxes of one image, clipped to it."""
    for where, number, row in rows(source, path):
        with source.tally.record():
            if not isinstance(row, dict) or len(row) != 1:
                raise BadRecord("of the wrong form", f"{where}: expected an object with one key, {{name: [x, y, width, height]}}")
            ((key, xywh),) = row.items()
            name = files.cleaned(key, "name", where)
            ref, seen = source.image(prefix, image, where)
            box = seen.placement(_box(source, name, xywh, seen.size, where))
            yield ref, made(BoxOf, where, name=name, xyxy=tuple(box), id=files.name(f"{case}/{number}"))


def _box(source: Source, name: str, xywh: Any, size: tuple[int, int], where: str) -> Box:
    what = f"{where}: the box of {name!r} is {files.short(xywh)}"
    if not isinstance(xywh, list) or len(xywh) != 4 or not all(_is_number(value) for value in xywh):
        raise BadRecord("with a wrong box", f"{what}, expected [x, y, width, height] in pixels")
    x, y, width, height = map(float, xywh)
    if width <= 0 or height <= 0:
        raise BadRecord("with a box without area", f"{what}, whose width and height must be above zero")
    box = from_xywh(x, y, width, height)
    clipped = clip(box, size)
    if clipped is None:
        raise BadRecord("with a box outside the image", f"{what}, which does not lie in the image of {size[0]} x {size[1]} pixels")
    if clipped != box:
        source.tally.mend(BadRecord("with a box clipped to the image", f"{what}, the image has {size[0]} x {size[1]} pixels"))
    return clipped


def _is_number(value: Any) -> bool:
    try:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(float(value))
    except OverflowError:  # an integer of more than 308 digits
        return False
