"""Classification from MedMNIST archives: `<split>_images` [N, H, W(, 3)] uint8 and `<split>_labels` [N, 1]."""

import zipfile
from pathlib import Path

import numpy as np

from unimed.data.example import Example
from unimed.data.records import field, read_json
from unimed.data.text import clean
from unimed.errors import UserError

_ORGANS = (
    "bladder", "femur-left", "femur-right", "heart", "kidney-left", "kidney-right", "liver", "lung-left", "lung-right", "pancreas",
    "spleen",
)  # fmt: skip
# Class names are not in the archives. Sets not listed here bring `<name>.json` with {"label": {"0": name, ...}, "what": "organ"}.
KNOWN: dict[str, tuple[str, tuple[str, ...]]] = {
    "dermamnist": (
        "skin lesion",
        (
            "actinic keratoses and intraepithelial carcinoma", "basal cell carcinoma", "benign keratosis-like lesions", "dermatofibroma",
            "melanoma", "melanocytic nevi", "vascular lesions",
        ),
    ),
    "organamnist": ("organ", _ORGANS),
    "organcmnist": ("organ", _ORGANS),
    "organsmnist": ("organ", _ORGANS),
}  # fmt: skip


def class_name(name: str) -> str:
    """Text of a class: "kidney-left" is "left kidney"."""
    part, _, side = name.rpartition("-")
    return f"{side} {part}" if part and side in ("left", "right") else name


def is_medmnist(folder: Path) -> bool:
    """Any .npz file."""
    return any(folder.glob("*.npz"))


def read_medmnist(folder: Path, split: str) -> list[Example]:
    """All archives of the folder, one after the other."""
    return [example for path in sorted(folder.glob("*.npz")) for example in read_archive(path, split)]


def read_archive(path: Path, split: str) -> list[Example]:
    """One archive. Class names come from `<name>.json` beside it, else from the known sets by the file's name (`organsmnist_224.npz`)."""
    what, names, subjects = _classes(path, split)
    try:
        with np.load(path, allow_pickle=False) as archive:
            if f"{split}_images" not in archive:
                if not any(key.endswith("_images") for key in archive):
                    raise UserError(f"{path}: has {', '.join(archive) or 'nothing'}, expected <split>_images and <split>_labels")
                return []
            images, labels = archive[f"{split}_images"], archive[f"{split}_labels"]
    except KeyError as error:
        raise UserError(f"{path}: {error} is missing") from error
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{path}: not a readable .npz archive ({error})") from error
    if images.dtype != np.uint8 or not (images.ndim == 3 or (images.ndim == 4 and images.shape[3] == 3)):
        raise UserError(f"{path}: {split}_images is {images.dtype} {images.shape}, expected uint8 [N, H, W] or [N, H, W, 3]")
    if labels.shape not in ((len(images), 1), (len(images),)) or labels.dtype.kind not in "iu":
        raise UserError(f"{path}: {split}_labels is {labels.dtype} {labels.shape}, expected one integer for each of {len(images)} images")
    flat = labels.reshape(-1)
    if len(flat) and not 0 <= int(flat.min()) <= int(flat.max()) < len(names):
        raise UserError(f"{path}: labels from {flat.min()} to {flat.max()}, but {len(names)} class names")
    if subjects and len(subjects) != len(images):
        raise UserError(f"{path.with_suffix('.json')}: {len(subjects)} subjects for {len(images)} images of {split}")
    question = f"Which {what} is in the image: {', '.join(names)}?"
    size, template = (images.shape[2], images.shape[1]), f"cls/{what}"
    examples = []
    for i, (image, label) in enumerate(zip(images, flat, strict=True)):
        answer, subject = clean(names[int(label)]), subjects[i] if subjects else ""
        examples.append(Example(f"{path.stem}/{split}/{i}", "cls", path.stem, question, answer, image, size, None, template, None, subject))
    return examples


def _classes(path: Path, split: str) -> tuple[str, list[str], list[str]]:
    beside = path.with_suffix(".json")
    if beside.is_file():
        table = read_json(beside, dict)
        label = field(table, "label", str(beside), dict)
        if sorted(label) != sorted(str(i) for i in range(len(label))):
            raise UserError(f"{beside}: label keys {', '.join(label)}, expected 0 to {len(label) - 1}")
        subjects = table.get("subjects", {}).get(split, [])
        names = [class_name(str(label[str(i)])) for i in range(len(label))]
        return str(table.get("what", "class")), names, [str(subject) for subject in subjects]
    known = KNOWN.get(path.stem.split("_")[0])
    if known is None:
        expected = f'put {{"label": {{"0": "name", ...}}}} in {beside.name}'
        raise UserError(f"{path}: class names unknown; {expected} (known by file name: {', '.join(KNOWN)})")
    return known[0], [class_name(name) for name in known[1]], []
