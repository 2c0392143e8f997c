"""From label masks to named structures, and from structures on a slice to boxes and facts."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from unimed.records.box import Box

# Structures of the sample, in the order in which a report lists them. CT and MR tables are merged: vertebrae (and discs) are one spine,
# lobes are one lung. Left out, because the two training volumes hold hardly any slice with 540 mm2 of them: adrenal glands, iliopsoas,
# ribs, costal cartilages, portal vein; and humerus, which only the held-out subject has.
STRUCTURES = (
    "liver", "gallbladder", "spleen", "stomach", "pancreas", "duodenum", "small bowel", "colon", "right kidney", "left kidney",
    "right lung", "left lung", "aorta", "inferior vena cava", "spine", "spinal cord", "right back muscle", "left back muscle",
)  # fmt: skip
ORGANS = STRUCTURES[:12]  # "the largest organ" is asked among these: a spine or a muscle is no organ to most readers

_RULES = (
    (r"(vertebrae.*|intervertebral_discs)", "spine"),
    (r"lung_.*right", "right lung"),
    (r"lung_.*left", "left lung"),
    (r"kidney_(right|left)", r"\1 kidney"),
    (r"autochthon_(right|left)", r"\1 back muscle"),
)


def structure_of(name: str) -> str | None:
    """The structure that a TotalSegmentator class belongs to; None when the sample leaves it out."""
    for pattern, structure in _RULES:
        if re.fullmatch(pattern, name):
            return re.sub(f"^{pattern}$", structure, name)
    plain = name.replace("_", " ")
    return plain if plain in STRUCTURES else None


def to_structures(labels: np.ndarray, table: Mapping[str, str]) -> np.ndarray:
    """Label ids of a class table -> 1 + index in STRUCTURES, 0 elsewhere."""
    lookup = np.zeros(256, np.uint8)
    for key, name in table.items():
        structure = structure_of(name)
        if structure is not None:
            lookup[int(key)] = 1 + STRUCTURES.index(structure)
    return lookup[labels]


def components(mask: np.ndarray) -> np.ndarray:
    """4-connected components of a 2-D mask: int32, 0 outside, 1.. in raster order of their first pixel."""
    padded = np.zeros((mask.shape[0], mask.shape[1] + 2), np.int8)
    padded[:, 1:-1] = mask != 0
    steps = np.diff(padded, axis=1)
    rows, starts = np.nonzero(steps == 1)
    _, ends = np.nonzero(steps == -1)
    parent = list(range(len(rows)))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    above = 0
    for i, row in enumerate(rows):  # runs are in raster order: only runs of the row before can touch this one
        while rows[above] < row - 1:
            above += 1
        j = above
        while rows[j] == row - 1:
            if starts[j] < ends[i] and starts[i] < ends[j]:
                a, b = root(j), root(i)
                parent[max(a, b)] = min(a, b)
            j += 1
    numbers: dict[int, int] = {}
    out = np.zeros(mask.shape, np.int32)
    for i, row in enumerate(rows):
        out[row, starts[i] : ends[i]] = numbers.setdefault(root(i), len(numbers) + 1)
    return out


def largest_component(mask: np.ndarray) -> np.ndarray:
    """The largest 4-connected component as a bool mask (the first of equals)."""
    numbered = components(mask)
    sizes = np.bincount(numbered.ravel())
    sizes[0] = 0
    return (numbered == sizes.argmax()) & (numbered > 0)


def bounding_box(mask: np.ndarray) -> tuple[int, int, int, int]:
    """x, y, width, height of a mask that is not empty."""
    ys, xs = np.nonzero(mask)
    return int(xs.min()), int(ys.min()), int(xs.max() - xs.min() + 1), int(ys.max() - ys.min() + 1)


@dataclass(frozen=True)
class Finding:
    """One structure on one slice: its largest component's box (x, y, width, height in pixels) and its whole area in mm2."""

    name: str
    box: tuple[int, int, int, int]
    area_mm2: float

    @property
    def xyxy(self) -> Box:
        x, y, width, height = self.box
        return Box(float(x), float(y), float(x + width), float(y + height))


def findings(
    structures: np.ndarray,
    pixel_mm: float,
    min_mm2: float,
    min_side_mm: float,
    names: Sequence[str] = STRUCTURES,
    min_share: float = 0.0,
) -> list[Finding]:
    """Structures whose largest component covers ``min_mm2`` and ``min_share`` of their area and is ``min_side_mm`` wide and high, in the
    order of ``names``, which says what the values 1, 2, ... stand for."""
    found = []
    for value in np.unique(structures):
        if value == 0:
            continue
        mask = structures == value
        part = largest_component(mask)
        box = bounding_box(part)
        area, whole = part.sum() * pixel_mm**2, float(mask.sum()) * pixel_mm**2
        if area >= max(min_mm2, min_share * whole) and min(box[2:]) * pixel_mm >= min_side_mm:
            found.append(Finding(names[value - 1], box, whole))
    return found
