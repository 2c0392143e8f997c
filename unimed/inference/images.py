"""Any image that a caller may have, opened as the model sees it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from unimed.errors import UserError
from unimed.records.pixels import Opened, open_bytes, open_image, to_rgb

Source = Path | str | bytes | Image.Image | np.ndarray | Opened
_ARRAYS = "uint8 [H, W], [H, W, 3] or [H, W, 4], or any number [H, W]"


def open_source(source: Source, plane: str = "axial", index: int | None = None, grey: tuple[float, float] | None = None) -> Opened:
    """A path, the bytes of a file, a Pillow image or an array as RGB, with what was done to it and where its pixels lie in the original.

    Bytes are told apart by content, as files are. ``plane``, ``index`` and ``grey`` as in `unimed.records.pixels.open_image`.
    """
    if isinstance(source, Opened):
        return source
    if isinstance(source, bytes | bytearray | memoryview):
        return open_bytes(bytes(source), f"image of {len(source)} bytes", plane, index, grey)
    if isinstance(source, str | Path):
        return open_image(Path(source), plane, index, grey)
    if plane != "axial" or index is not None:
        raise UserError(f"image in memory: it has no plane {plane!r} and no slices; give the file, or its bytes")
    if isinstance(source, np.ndarray):
        source = _from_array(source)
    if not isinstance(source, Image.Image):
        raise UserError(f"image of type {type(source).__name__}: it must be a path, bytes, a Pillow image or a NumPy array")
    try:
        return to_rgb(source, grey)
    except UserError as error:
        raise UserError(f"image in memory: {error}") from error


def _from_array(array: np.ndarray) -> Image.Image:
    kind = array.dtype.kind
    if array.size == 0 or kind not in "biuf" or array.ndim not in (2, 3):
        raise UserError(f"image array of {array.dtype} {array.shape}: it must be {_ARRAYS}")
    if array.dtype == np.uint8 and (array.ndim == 2 or array.shape[2] in (3, 4)):
        return Image.fromarray(np.ascontiguousarray(array))
    if array.ndim != 2:
        raise UserError(f"image array of {array.dtype} {array.shape}: it must be {_ARRAYS}")
    if kind == "b":
        return Image.fromarray(array.astype(np.uint8) * 255)
    if array.dtype == np.uint16:
        return Image.fromarray(np.ascontiguousarray(array))
    return Image.fromarray(array.astype(np.int32 if np.can_cast(array.dtype, np.int32) else np.float32))
