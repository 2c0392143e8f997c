"""Masks: run-length text as CheXmask writes it, and images. A mask must have its image's size and orientation."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from unimed.records.files import short
from unimed.records.policy import BadRecord


def decode(runs: str, height: int, width: int, where: str) -> np.ndarray:
    """[height, width] bool of "start length start length ...": pixels are counted from 1 along the rows. "" is an empty mask."""
    try:
        numbers = np.array(runs.split(), dtype=np.int64)
    except (ValueError, OverflowError):
        numbers = np.array([-1])
    starts, lengths = (numbers[0::2] - 1, numbers[1::2]) if len(numbers) % 2 == 0 else (np.array([-1]), np.array([0]))
    if (starts < 0).any() or (lengths <= 0).any() or (starts + lengths > height * width).any():
        what = f"{where}: {short(runs)} is no run-length mask of {width} x {height} pixels (pairs of start and length, from 1)"
        raise BadRecord("with a mask that cannot be decoded", what)
    found = np.zeros(height * width, bool)
    for start, length in zip(starts.tolist(), lengths.tolist(), strict=True):
        found[start : start + length] = True
    return found.reshape(height, width)


def encode(mask: np.ndarray) -> str:
    """What `decode` reads."""
    steps = np.diff(np.concatenate([[0], (mask != 0).astype(np.int8).ravel(), [0]]))
    starts, ends = np.flatnonzero(steps == 1), np.flatnonzero(steps == -1)
    return " ".join(f"{start + 1} {end - start}" for start, end in zip(starts, ends, strict=True))


def read(path: Path) -> np.ndarray:
    """[height, width] bool of an image file; what is not black belongs to the mask."""
    try:
        with Image.open(path) as image:
            return np.asarray(image.convert("L")) > 0
    except Exception as error:  # decoders raise nearly anything
        raise BadRecord("with a mask that cannot be read", f"{path}: not a readable image ({error})") from error


def check(mask: np.ndarray, size: tuple[int, int] | None, where: str) -> np.ndarray:
    """The mask, which must be as large as its image of (width, height), where that is known."""
    height, width = mask.shape
    if size in (None, (width, height)):
        return mask
    what = f"{where}: the mask has {width} x {height} pixels, its image {size[0]} x {size[1]}"
    if size == (height, width):
        raise BadRecord("with a mask of another orientation than its image", what)
    raise BadRecord("with a mask of another size than its image", what)


def box(mask: np.ndarray) -> tuple[float, float, float, float]:
    """The smallest box around a mask that is not empty."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    return float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1)
