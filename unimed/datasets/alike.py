"""Images that look alike though their files differ: the same picture at another size or in another file format.

A picture becomes 256 bits: whether each pixel of 17 x 16 greys is darker than the next, by more than the noise of JPEG. Two pictures look
alike when at most NEAR bits differ; flat pictures, which have hardly a bit, look like nothing.
"""

from __future__ import annotations

from collections import defaultdict

import numpy as np
from PIL import Image

SIDE = 16
NOISE = 4
NEAR = 6
FEWEST = 12  # bits of a picture that is not flat
BANDS = 8
KEPT = 64  # pictures that share a band and are compared


def look_hash(image: Image.Image) -> int:
    """The 256 bits of a picture as a number."""
    grey = np.asarray(image.convert("L").resize((SIDE + 1, SIDE), Image.Resampling.BOX), dtype=np.int16)
    return int.from_bytes(np.packbits(np.diff(grey, axis=1) > NOISE).tobytes())


class Alike:
    """The pictures seen so far. Two that differ in at most NEAR bits share one of the BANDS, so only those are compared."""

    def __init__(self) -> None:
        self._bands: list[dict[int, list[tuple[int, str, str, str]]]] = [defaultdict(list) for _ in range(BANDS)]

    def add(self, bits: int, split: str, key: str, where: str) -> str:
        """Where a picture of another split and another file is that looks like this one; "" without any."""
        if bits.bit_count() < FEWEST:
            return ""
        width = SIDE * SIDE // BANDS
        found = ""
        for number, band in enumerate(self._bands):
            part = (bits >> number * width) & ((1 << width) - 1)
            if not part:
                continue
            known = False  # an image that many records name takes one place
            for other, its_split, its_key, its_place in band[part]:
                known |= (other, its_split, its_key) == (bits, split, key)
                if not found and its_split != split and its_key != key and (bits ^ other).bit_count() <= NEAR:
                    found = f"{its_split}: {its_place}"
            if not known and len(band[part]) < KEPT:
                band[part].append((bits, split, key, where))
        return found
