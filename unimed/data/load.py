"""One way in: find the datasets under a folder by their layouts and read a split of them."""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path

from unimed.data import medmnist, reports, slake, textqa
from unimed.data.example import TASKS, Example
from unimed.errors import UserError

log = logging.getLogger("unimed.data")

SPLITS = {"train": "train", "slab": "val", "val": "val", "subject": "test", "test": "test"}
LAYOUTS: tuple[tuple[str, Callable[[Path], bool], Callable[[Path, str], list[Example]]], ...] = (
    ("SLAKE (imgs/, train.txt)", slake.is_slake, slake.read_slake),
    ("SA-Med2D (regions_small_*/, images_small_*/)", slake.is_sa_med2d, slake.read_sa_med2d),
    ("Path-VQA (<split>_vqa.json or .pkl, images/)", slake.is_path_vqa, slake.read_path_vqa),
    ("MedMNIST (*.npz)", medmnist.is_medmnist, medmnist.read_medmnist),
    ("reports (annotation.json, images/ or files/)", reports.is_annotated, reports.read_annotated),
    ("MedPix (MedPix_single_<split>.csv)", reports.is_medpix, reports.read_medpix),
    ("MedQA (questions/US/*.jsonl)", textqa.is_medqa, textqa.read_medqa),
    ("PubMedQA (<split>_set.json)", textqa.is_pubmedqa, textqa.read_pubmedqa),
)


def load_examples(root: Path, split: str, tasks: Sequence[str] | None = None) -> list[Example]:
    """All examples of a split from every dataset in ``root`` or in a folder of it.

    split: "train", "slab" or "subject"; for released datasets also "val" (= slab) and "test" (= subject).
    """
    root = Path(root)
    if split not in SPLITS:
        raise UserError(f"split {split!r}: expected one of {', '.join(SPLITS)}")
    unknown = sorted(set(tasks or ()) - set(TASKS))
    if unknown:
        raise UserError(f"unknown task {unknown[0]!r}: expected one of {', '.join(TASKS)}")
    if not root.is_dir():
        raise UserError(f"{root}: no such folder")
    found = False
    examples: list[Example] = []
    for folder in [root, *sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))]:
        for _, matches, read in LAYOUTS:
            if matches(folder):
                found = True
                examples += read(folder, SPLITS[split])
    if not found:
        raise UserError(f"{root}: no dataset found here or one folder down; layouts known: {'; '.join(name for name, _, _ in LAYOUTS)}")
    return [example for example in examples if tasks is None or example.task in tasks]
