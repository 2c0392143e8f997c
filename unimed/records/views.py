"""What can be shown of a file: its planes, slices, frames or pages, and the range of its greys."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from unimed.errors import UserError
from unimed.records.greys import grey_range
from unimed.records.modes import DEEP
from unimed.records.pixels import VOLUMES, View, kept_volume, kind_of, open_image, open_view


@dataclass(frozen=True)
class Views:
    """What can be shown of a file. counts: slices, frames or pages by plane. values: the range of its greys, None for colours. window: its
    usual part."""

    counts: dict[str, int]
    values: tuple[float, float] | None = None
    window: tuple[float, float] | None = None


def views(path: Path) -> Views:
    """The planes, slices and grey values that `open_view` can show of a file. A volume that is read for it is kept, as there."""
    from unimed.records import dicom
    from unimed.records import volume as volumes

    kind = kind_of(path)
    if kind in VOLUMES:
        open_view(View(path))
        volume = kept_volume(path, kind)
        counts = dict(zip(volumes.AXIS, (volume.data.shape[axis] for axis in volumes.AXIS.values()), strict=True))
        counts = {plane: counts[plane] for plane in volumes.PLANES}
        return Views(counts, _span(volume.data), volumes.window_of(volume)) if volume.data.ndim == 3 else Views(counts)
    open_image(path)
    if kind == "raster":
        with Image.open(path) as image:
            counts = {"axial": getattr(image, "n_frames", 1)}
            values = np.asarray(image) if image.mode in DEEP else np.array([0, 255])
            return Views(counts, *_greys(values)) if image.mode in (*DEEP, "L", "1") else Views(counts)
    source = dicom.parse(str(path), path.read_bytes())
    count = dicom.frame_count(str(path), source)
    frame = dicom.read_frame(str(path), source, count // 2)
    counts = {"axial": count}
    if count > 1:
        with suppress(UserError):  # frames that lie nowhere are a film, not a volume
            shape = volumes.read_dicom_frames(str(path), source).data.shape
            counts |= {plane: shape[volumes.AXIS[plane]] for plane in volumes.PLANES if plane != "axial"}
    return Views(counts, *_greys(frame.values)) if frame.values.ndim == 2 else Views(counts)


def _greys(values: np.ndarray) -> tuple[tuple[float, float], tuple[float, float]]:
    return _span(values), grey_range(values[np.isfinite(values)])


def _span(values: np.ndarray) -> tuple[float, float]:
    values = values.astype(np.float32, copy=False)
    known = np.isfinite(values)
    return float(values.min(where=known, initial=np.inf)), float(values.max(where=known, initial=-np.inf))
