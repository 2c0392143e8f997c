"""Classification from MedMNIST archives: `<split>_images` uint8 and `<split>_labels`.

Images are [N, H, W], [N, H, W, 1] or [N, H, W, 3]; of volumes, [N, D, H, W], the middle slice is shown. Labels are [N] or [N, 1], one class
an image, or [N, classes] of zeros and ones, any number of findings an image.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from unimed.datasets.spec import DatasetSpec
from unimed.records import files
from unimed.records.policy import BadRecord, Tally
from unimed.records.record import ImageRef, Label, Labels, Record, made
from unimed.records.source import Source

_ORGANS = (
    "bladder", "femur-left", "femur-right", "heart", "kidney-left", "kidney-right", "liver", "lung-left", "lung-right", "pancreas",
    "spleen",
)  # fmt: skip
# Class names are not in the archives. Sets not listed here bring `<name>.json` with {"label": {"0": name, ...}, "what": "organ"}.
# Names have no comma, because the question lists them: "normal or benign" is MedMNIST's "normal, benign".
KNOWN: dict[str, tuple[str, tuple[str, ...]]] = {
    "pathmnist": (
        "tissue",
        (
            "adipose", "background", "debris", "lymphocytes", "mucus", "smooth muscle", "normal colon mucosa", "cancer-associated stroma",
            "colorectal adenocarcinoma epithelium",
        ),
    ),
    "chestmnist": (
        "finding",
        (
            "atelectasis", "cardiomegaly", "effusion", "infiltration", "mass", "nodule", "pneumonia", "pneumothorax", "consolidation",
            "edema", "emphysema", "fibrosis", "pleural thickening", "hernia",
        ),
    ),
    "dermamnist": (
        "skin lesion",
        (
            "actinic keratoses and intraepithelial carcinoma", "basal cell carcinoma", "benign keratosis-like lesions", "dermatofibroma",
            "melanoma", "melanocytic nevi", "vascular lesions",
        ),
    ),
    "octmnist": ("retinal disease", ("choroidal neovascularization", "diabetic macular edema", "drusen", "normal")),
    "pneumoniamnist": ("diagnosis", ("normal", "pneumonia")),
    "retinamnist": (
        "grade of diabetic retinopathy",
        (
            "no apparent retinopathy", "mild non-proliferative retinopathy", "moderate non-proliferative retinopathy",
            "severe non-proliferative retinopathy", "proliferative retinopathy",
        ),
    ),
    "breastmnist": ("diagnosis", ("malignant", "normal or benign")),
    "bloodmnist": (
        "blood cell",
        (
            "basophil", "eosinophil", "erythroblast", "immature granulocyte", "lymphocyte", "monocyte", "neutrophil", "platelet",
        ),
    ),
    "tissuemnist": (
        "kidney cell",
        (
            "collecting duct or connecting tubule", "distal convoluted tubule", "glomerular endothelial cell",
            "interstitial endothelial cell", "leukocyte", "podocyte", "proximal tubule segment", "thick ascending limb",
        ),
    ),
    "organamnist": ("organ", _ORGANS),
    "organcmnist": ("organ", _ORGANS),
    "organsmnist": ("organ", _ORGANS),
    "organmnist3d": (
        "organ",
        (
            "liver", "kidney-right", "kidney-left", "femur-right", "femur-left", "bladder", "heart", "lung-right", "lung-left", "spleen",
            "pancreas",
        ),
    ),
    "nodulemnist3d": ("lung nodule", ("benign", "malignant")),
    "adrenalmnist3d": ("adrenal gland", ("normal", "hyperplasia")),
    "fracturemnist3d": ("rib fracture", ("buckle", "nondisplaced", "displaced")),
    "vesselmnist3d": ("vessel", ("healthy vessel", "aneurysm")),
    "synapsemnist3d": ("synapse", ("inhibitory synapse", "excitatory synapse")),
}  # fmt: skip

# What an archive shows: modality, and the organ of all its images ("" where the class names it, or where there is none).
SHOWN = {
    "pathmnist": ("pathology", "colon"), "chestmnist": ("X-ray", "chest"), "dermamnist": ("dermatoscopy", "skin"),
    "octmnist": ("OCT", "eye"), "pneumoniamnist": ("X-ray", "chest"), "retinamnist": ("fundus", "eye"),
    "breastmnist": ("ultrasound", "breast"), "bloodmnist": ("microscopy", "blood"), "tissuemnist": ("microscopy", "kidney"),
    "organamnist": ("CT", ""), "organcmnist": ("CT", ""), "organsmnist": ("CT", ""), "organmnist3d": ("CT", ""),
    "nodulemnist3d": ("CT", "chest"), "adrenalmnist3d": ("CT", "adrenal gland"), "fracturemnist3d": ("CT", "rib"),
    "vesselmnist3d": ("MRI", "brain"), "synapsemnist3d": ("microscopy", "brain"),
}  # fmt: skip


class Classes(NamedTuple):
    """``what`` is classified, the names, and the subject of every image of the split ([]: unknown)."""

    what: str
    names: list[str]
    subjects: list[str]


def class_name(name: str) -> str:
    """Text of a class: "kidney-left" is "left kidney"."""
    part, _, side = name.rpartition("-")
    return f"{side} {part}" if part and side in ("left", "right") else name


def matches(folder: Path) -> bool:
    """Any .npz file."""
    return any(folder.glob("*.npz"))


def archives(folder: Path) -> list[str]:
    """Names of the folder's data sets."""
    return [path.stem for path in sorted(folder.glob("*.npz"))]


def read(source: Source) -> Iterator[tuple[str, Record]]:
    """All archives of the folder, one after the other. One that cannot be used is left out, its images are counted."""
    for path in sorted(source.folder.glob("*.npz")):
        images = 1  # of an archive that cannot even be opened
        try:
            arrays = _arrays(path, source.split)
            if arrays is not None:
                images = arrays[0].shape[0] if arrays[0].ndim else 1
                yield from _records(source, path, *arrays, _classes(path, source.split))
        except BadRecord as error:
            source.tally.leave_out(error, images)


def _arrays(path: Path, split: str) -> tuple[np.ndarray, np.ndarray] | None:
    """Images and labels of a split; None where the archive has other splits only."""
    try:
        with np.load(path, allow_pickle=False) as archive:
            keys = list(archive)
            has = f"{split}_images" in keys and f"{split}_labels" in keys
            found = (archive[f"{split}_images"], archive[f"{split}_labels"]) if has else None
    except Exception as error:  # a damaged archive raises nearly anything
        raise BadRecord("in an archive that cannot be read", f"{path}: not a readable .npz archive ({error})") from error
    if found is None:
        wrong = [key for key in keys if key.startswith(f"{split}_")] or not any(key.endswith("_images") for key in keys)
        if wrong:
            raise BadRecord(
                "in an archive of another form", f"{path}: has {', '.join(keys) or 'nothing'}, expected {split}_images and {split}_labels"
            )
    return found


def _classes(path: Path, split: str) -> Classes:
    """Class names from `<name>.json` beside the archive, else from the known sets by the file's name (`organsmnist_224.npz`)."""
    beside = path.with_suffix(".json")
    if beside.is_file():
        table = files.read_json(beside, dict)
        label = files.field(table, "label", str(beside), dict)
        if not label or set(label) != {str(i) for i in range(len(label))}:
            raise _wrong_names(f"{beside}: label keys {', '.join(label)}, expected 0 to {len(label) - 1}")
        subjects = table.get("subjects") or {}
        of_split = (subjects.get(split) or []) if isinstance(subjects, dict) else None
        if not isinstance(of_split, list):
            raise _wrong_names(f"{beside}: subjects are {files.short(subjects)}, expected a list for each split")
        names = [class_name(files.name(label[str(i)])) for i in range(len(label))]
        return Classes(files.name(table.get("what", "class")), names, [files.name(subject) for subject in of_split])
    known = KNOWN.get(path.stem.split("_")[0])
    if known is None:
        expected = f'put {{"label": {{"0": "name", ...}}}} in {beside.name}'
        raise BadRecord(
            "in an archive without class names", f"{path}: class names unknown; {expected} (known by file name: {', '.join(KNOWN)})"
        )
    return Classes(known[0], [class_name(name) for name in known[1]], [])


def _wrong_names(message: str) -> BadRecord:
    return BadRecord("in an archive with wrong class names", message)


def _records(source: Source, path: Path, images: np.ndarray, labels: np.ndarray, classes: Classes) -> Iterator[tuple[str, Record]]:
    split, dataset = source.split, files.name(path.stem)
    called = f"{source.tally.folder_name}-{dataset}" if source.tally.folder_name else dataset
    what, names, subjects = classes
    kind = dataset.split("_")[0]
    modality, organ = SHOWN.get(kind, ("", ""))
    images = _slices(source.tally, path, images)
    several = labels.ndim == 2 and labels.shape[1] > 1
    shape = (len(images), len(names)) if several else (len(images), 1)
    if labels.shape not in (shape, shape[:1]) or labels.dtype.kind not in "iub":
        wanted = f"one integer, or one of 0 and 1 for each of {len(names)} classes, for each of {len(images)} images"
        raise BadRecord("in an archive of another form", f"{path}: {split}_labels is {labels.dtype} {labels.shape}, expected {wanted}")
    if subjects and len(subjects) != len(images):
        raise _wrong_names(f"{path.with_suffix('.json')}: {len(subjects)} subjects for {len(images)} images of {split}")
    member = f"{path.name}/{split}_images"
    source.images.arrays[member] = images
    source.classes[what] = names
    for number in range(len(images)):
        where = f"{path}: {split} image {number}"
        with source.tally.record():
            key = f"{split}/{number}"
            one = _annotation(labels[number], what, names, key, where)
            values = {"patient": subjects[number] if subjects else "", "modality": modality, "organ": organ, "source": kind}
            record = source.record(where, key, dataset, images=(ImageRef(path=member, frame=number),), annotations=(one,), **values)
            yield where, record.model_copy(update={"dataset": called})


def _annotation(label: Any, what: str, names: list[str], key: str, where: str) -> Label | Labels:
    if np.size(label) > 1:
        if not np.isin(label, (0, 1)).all():
            raise BadRecord("with a label out of range", f"{where}: labels {files.short(label.tolist())}, expected 0 and 1")
        by = {there: tuple(name for name, one in zip(names, label, strict=True) if bool(one) == there) for there in (True, False)}
        return made(Labels, where, set=what, present=by[True], absent=by[False], task="cls", id=key)
    index = int(np.reshape(label, -1)[0])
    if not 0 <= index < len(names):
        raise BadRecord("with a label out of range", f"{where}: label {index}, but {len(names)} class names")
    return made(Label, where, set=what, value=names[index], id=key)


def _slices(tally: Tally, path: Path, images: np.ndarray) -> np.ndarray:
    """Images as the model takes them, [N, H, W] or [N, H, W, 3]."""
    if images.ndim == 4 and images.shape[3] == 1:
        images = images[..., 0]
    if images.ndim == 4 and images.shape[3] != 3:
        tally.note(f"{path.name}: volumes, shown by their middle slice")
        images = images[:, images.shape[1] // 2]
    if images.dtype != np.uint8 or images.ndim not in (3, 4) or 0 in images.shape[1:]:
        raise BadRecord(
            "in an archive of another form", f"{path}: images are {images.dtype} {images.shape}, expected uint8 [N, H, W] or [N, H, W, 3]"
        )
    return images * 255 if images.size and images.max() == 1 else images  # a mask of zeros and ones would be black


SPEC = DatasetSpec(
    name="medmnist",
    title="MedMNIST",
    files="MedMNIST (*.npz)",
    matches=matches,
    read=read,
    tasks=("cls",),
    ratio={"cls": 4},
    licence="CC BY 4.0; DermaMNIST CC BY-NC 4.0",
    citation="Yang et al., MedMNIST v2: a benchmark for 2D and 3D biomedical image classification, Scientific Data 2023",
    where="https://medmnist.com",
    certain=False,
    arrays=True,
    names=archives,
)
