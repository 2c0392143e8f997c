"""Pillow's modes brought to 8 bits: deep greys, transparency, CMYK."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image, PngImagePlugin

from unimed.errors import UserError
from unimed.records.greys import grey_range, window
from unimed.records.text import short

DEEP = ("I", "F", "I;16", "I;16B", "I;16L", "I;16N")  # with more than 8 bits of grey


def read_as_stored(image: Image.Image) -> bool:
    """Whether it is grey with transparency of 16 bits each, of which Pillow keeps 8: its four bytes will then be read as they are."""
    if not isinstance(image, PngImagePlugin.PngImageFile) or not any(tile.args == "LA;16B" for tile in image.tile):
        return False
    image.tile = [tile._replace(args="RGBA") for tile in image.tile]
    return True


def deep_with_alpha(image: Image.Image, grey: tuple[float, float] | None, notes: list[str]) -> Image.Image:
    """Grey and transparency of 8 bits from the four bytes of each pixel: grey, then transparency, the upper byte first."""
    high, low, alpha, _ = (np.asarray(image.getchannel(at)) for at in range(4))
    values = np.where(alpha > 0, high.astype(np.uint16) << 8 | low, 0) if alpha.any() else high.astype(np.uint16) << 8 | low
    shown = deep(Image.fromarray(values), grey, False, notes)
    return Image.merge("LA", [Image.fromarray(shown), Image.fromarray(alpha)])


def deep(image: Image.Image, grey: tuple[float, float] | None, inverted: bool, notes: list[str]) -> np.ndarray:
    """Grey uint8 from 16 or 32 bits. Unsigned: black to the end of the depth in use (8, 10, 12, 14 or 16 bits). Floats in 0..1: 0 to 1."""
    values = np.asarray(image)
    clear = image.info.get("transparency") if values.dtype.kind in "iu" else None
    known = values[values != clear] if isinstance(clear, int) else values
    known = known[np.isfinite(known)] if known.dtype.kind == "f" else known
    if not known.size:
        raise UserError("no pixel that is opaque and a number")
    low, high = float(known.min()), float(known.max())
    if grey is not None:
        low, high = grey
    elif values.dtype.kind in "iu" and low >= 0 and high < 65536:
        low, high = 0.0, 2.0 ** next(bits for bits in (8, 10, 12, 14, 16) if high < 2**bits) - 1
    elif values.dtype.kind == "f" and low >= 0 and 0.5 < high <= 1:
        low, high = 0.0, 1.0
    elif values.dtype.kind == "f" and low >= 0 and 64 < high <= 255:
        low, high = 0.0, 255.0
    else:
        low, high = grey_range(known)
    notes.append(f"values {low:g} to {high:g} shown as black to white")
    shown = window(values, low, high)
    if inverted:
        shown = 255 - shown
        notes.append("inverted (white is zero)")
    if isinstance(clear, int):
        shown[values == clear] = 0
    if values.dtype.kind == "f":
        shown[np.isnan(values)] = 0
    return shown


def opaque(image: Image.Image, notes: list[str]) -> Image.Image:
    """Transparency onto black; an image that is transparent everywhere is shown, since black would hide it."""
    rgba = image.convert("RGBA")
    alpha = rgba.getchannel("A")
    if alpha.getextrema() == (255, 255):
        return image if image.mode in ("L", "RGB") else rgba.convert("RGB")
    if alpha.getextrema() == (0, 0):
        notes.append("transparent everywhere: transparency ignored")
        return rgba.convert("RGB")
    notes.append("transparency onto black")
    return Image.alpha_composite(Image.new("RGBA", rgba.size, (0, 0, 0, 255)), rgba).convert("RGB")


def from_cmyk(image: Image.Image, profile: bytes, notes: list[str]) -> Image.Image:
    """RGB by the image's own profile; as it is where that cannot be read."""
    from PIL import ImageCms

    try:
        made = ImageCms.profileToProfile(image, io.BytesIO(profile), ImageCms.createProfile("sRGB"), outputMode="RGB")
        assert made is not None
    except Exception as error:  # a broken profile; littleCMS raises many kinds
        notes.append(f"ICC profile ignored ({short(error)})")
        return image
    notes.append("CMYK by its ICC profile")
    return made


def is_grey(rgb: Image.Image) -> bool:
    """Whether all three channels are the same."""
    red, green, blue = rgb.split()
    return red.tobytes() == green.tobytes() == blue.tobytes()
