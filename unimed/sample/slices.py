"""The slices of the built-in sample, and the split that keeps held-out voxels out of training.

Both training volumes lose one slab of axial slices, with a gap of two slices on each side that are not used. What is left lies in two
blocks, below and above. Axial images are whole slices of a block or of the slab. Coronal and sagittal images are cut *within* one block
(training) or within the slab (held out), so they are strips as high as that block, and no training image of any plane holds a voxel of a
slab or its gaps. The grey window and the crop to the trunk are measured on a training block too, so a held-out voxel cannot change a
training file by a single byte (tested). The DICOM subject is held out whole, in two blocks of about a slab's height.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image

from unimed.records import volume as volumes
from unimed.records.volume import Region, Volume
from unimed.sample.masks import STRUCTURES, Finding, bounding_box, findings, largest_component, to_structures

ASSETS = Path(__file__).with_name("assets")
PIXEL_MM = 1.5
MIN_MM2 = 540.0  # 60 pixels at 3 mm: smaller structures get no box
MIN_SIDE_MM = 9.0
MARGIN_MM = 12.0
GAP = 2


@dataclass(frozen=True)
class Block:
    """Axial slices [start, stop) of one split; coronal and sagittal images are cut inside one block, from every ``step``-th slice."""

    split: str
    start: int
    stop: int
    step: int


@dataclass(frozen=True)
class Named:
    """What the labels 1, 2, ... stand for, and how large a structure must be on a slice for a box."""

    structures: tuple[str, ...] = STRUCTURES
    min_mm2: float = MIN_MM2
    min_side_mm: float = MIN_SIDE_MM
    min_share: float = 0.0  # of its area in one piece


@dataclass(frozen=True)
class Subject:
    """One volume with structures as labels, its blocks, its grey window and its trunk (x and y ranges)."""

    name: str
    volume: Volume
    blocks: tuple[Block, ...]
    grey: tuple[float, float]
    trunk: tuple[tuple[int, int], tuple[int, int]]
    named: Named = Named()


@dataclass(frozen=True, eq=False)
class Slice:
    """One image of the sample. ``mask``: 1 + index in STRUCTURES at every pixel, 0 elsewhere. ``present`` are all structures with any pixel
    on it, ``findings`` those large enough for a box."""

    id: str
    subject: str
    modality: str
    plane: str
    index: int
    region: Region
    split: str
    image: Image.Image
    mask: np.ndarray
    findings: tuple[Finding, ...]
    present: frozenset[str]
    body_side: str | None  # "left" or "right" for sagittal slices well off the midline

    def finding(self, name: str) -> Finding | None:
        return next((found for found in self.findings if found.name == name), None)


# Slabs lie in the middle, so that what they show is also seen in training, below or above. CT: 30 slices, MR: 20, DICOM: 20 of 2 mm.
BLOCKS = {
    "ct": (Block("train", 0, 10, 2), Block("slab", 12, 19, 6), Block("train", 21, 30, 2)),
    "mr": (Block("train", 0, 6, 2), Block("slab", 8, 13, 6), Block("train", 15, 20, 2)),
    "ct_dicom": (Block("subject", 0, 10, 24), Block("subject", 10, 20, 24)),
}


@lru_cache(maxsize=1)
def _tables() -> dict[str, dict[str, str]]:
    return json.loads((ASSETS / "labels.json").read_text())


def vendored_volume(name: str) -> Volume:
    """A vendored volume ("ct", "mr", "ct_dicom") with structures (masks.STRUCTURES) as labels."""
    if name == "ct_dicom":
        image, mask = volumes.read_dicom_series(ASSETS / "ct_dicom.zip"), "dicom_labels.nii.gz"
    else:
        image, mask = volumes.read_nifti(ASSETS / f"{name}.nii.gz", name.upper()), f"{name}_labels.nii.gz"
    labelled = volumes.with_labels(image, volumes.read_nifti(ASSETS / mask), mask)
    assert labelled.labels is not None
    return replace(labelled, labels=to_structures(labelled.labels, _tables()["total_mr" if name == "mr" else "total"]))


def subject(name: str, volume: Volume, blocks: tuple[Block, ...] = (), named: Named = Named()) -> Subject:
    """Split, window and trunk of a volume, measured on its largest training block (the whole volume when it has none).

    blocks: by default those of the vendored volume of that name.
    """
    blocks = blocks or BLOCKS[name]
    x, y, z = volume.region
    train = [(block.stop - block.start, block) for block in blocks if block.split == "train"]
    if train:
        largest = max(train, key=lambda item: item[0])[1]
        z = (largest.start, largest.stop)
    grey = volumes.window_of(volume, (x, y, z))
    return Subject(name, volume, blocks, grey, _trunk(volume, grey, z), named)


def _trunk(volume: Volume, grey: tuple[float, float], z: tuple[int, int]) -> tuple[tuple[int, int], tuple[int, int]]:
    """x and y ranges of the largest connected body part (no arms, no table) with a margin."""
    seen = np.zeros(volume.data.shape[:2], bool)
    shown = volumes.window(volume.data[:, :, z[0] : z[1]], *grey)
    for k in range(shown.shape[2]):
        seen |= largest_component(shown[:, :, k] > 25)
    left, top, width, height = bounding_box(seen)  # of an [X, Y] array: columns are y
    ranges = []
    for start, length, mm, size in (
        (top, height, volume.spacing[0], volume.data.shape[0]),
        (left, width, volume.spacing[1], volume.data.shape[1]),
    ):
        margin = round(MARGIN_MM / mm)
        ranges.append((max(0, start - margin), min(size, start + length + margin)))
    return ranges[0], ranges[1]


def slices(source: Subject) -> Iterator[Slice]:
    """All images of one subject that show at least one structure large enough for a box, in a fixed order."""
    for block in source.blocks:
        region: Region = (source.trunk[0], source.trunk[1], (block.start, block.stop))
        for plane in volumes.PLANES:
            start, stop = region[volumes.AXIS[plane]]
            step = 1 if plane == "axial" else block.step
            for index in range(start + step // 2, stop, step):
                made = _slice(source, block, plane, index, region)
                if made.findings:
                    yield made


def _slice(source: Subject, block: Block, plane: str, index: int, region: Region) -> Slice:
    volume = source.volume
    structures = volumes.render_labels(volume, plane, index, PIXEL_MM, region)
    named = source.named
    found = tuple(findings(structures, PIXEL_MM, named.min_mm2, named.min_side_mm, named.structures, named.min_share))
    x, y, z = ((index, index + 1) if axis == volumes.AXIS[plane] else bounds for axis, bounds in enumerate(region))
    side = None
    if plane == "sagittal":
        middle = sum(source.trunk[0]) / 2
        off_mm = (index + 0.5 - middle) * volume.spacing[0]  # x grows to the patient's right
        side = None if abs(off_mm) < 20 else "right" if off_mm > 0 else "left"
    return Slice(
        id=f"{source.name}_{plane}_{index:03d}" + ("" if plane == "axial" else f"_z{block.start:02d}"),
        subject=source.name,
        modality=volume.modality,
        plane=plane,
        index=index,
        region=(x, y, z),
        split=block.split,
        image=volumes.render(volume, plane, index, source.grey, PIXEL_MM, region),
        mask=structures,
        findings=found,
        present=frozenset(named.structures[value - 1] for value in np.unique(structures) if value),
        body_side=side,
    )
