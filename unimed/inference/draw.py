"""The image with a box on it, as a file."""

from __future__ import annotations

from pathlib import Path

from PIL import ImageDraw

from unimed import io
from unimed.errors import UserError
from unimed.records.box import Box
from unimed.records.pixels import Opened

COLOUR = (255, 138, 31)


def save(opened: Opened | None, box: Box | None, path: Path) -> None:
    """Draws a box, given in pixels of the image's file, on the image as the model sees it."""
    if opened is None or box is None:
        raise UserError(f"{path}: there is no box to draw; it needs the task refer or identify, and an answer that holds a box")
    suffix = path.suffix.lower()
    if suffix not in (".png", ".jpg", ".jpeg"):
        raise UserError(f"{path}: must end in .png, .jpg or .jpeg")
    drawn = opened.rgb.copy()
    ImageDraw.Draw(drawn).rectangle(opened.to_original.inverse(box), outline=COLOUR, width=max(1, max(drawn.size) // 128))
    with io.beside(path) as partial:
        drawn.save(partial, "PNG" if suffix == ".png" else "JPEG")
