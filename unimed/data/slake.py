"""Image questions and boxes: SLAKE, SA-Med2D and Path-VQA folders."""

import io
import pickle
from pathlib import Path
from typing import Any

from unimed.data.boxes import from_xywh, to_text
from unimed.data.example import Example
from unimed.data.files import inside
from unimed.data.images import image_size
from unimed.data.records import field, read_json, read_text
from unimed.data.text import clean
from unimed.errors import UserError

CASE_LISTS = {"train": "train.txt", "val": "validate.txt", "test": "test.txt"}


def is_slake(folder: Path) -> bool:
    """imgs/ with at least one list of case folders."""
    return (folder / "imgs").is_dir() and any((folder / name).is_file() for name in CASE_LISTS.values())


def read_slake(folder: Path, split: str) -> list[Example]:
    """English questions (vqa) and boxes (refer, identify) of the cases that `<split>.txt` names."""
    listed = folder / CASE_LISTS[split]
    if not listed.is_file():
        return []
    examples: list[Example] = []
    for case in read_text(listed).split():
        place = inside(folder / "imgs", case)
        if not place.is_dir():
            raise UserError(f"{listed}: names case {case!r}, but there is no folder {place}")
        subject = case
        if (place / "question.json").is_file():
            asked = _questions(folder, place, case)
            subject = asked[0].subject if asked else case
            examples += asked
        if (place / "detection.json").is_file():
            examples += _boxes("slake", case, place / "source.jpg", place / "detection.json", subject)
    return examples


def _questions(folder: Path, place: Path, case: str) -> list[Example]:
    examples = []
    sizes: dict[Path, tuple[int, int]] = {}
    for number, record in enumerate(read_json(place / "question.json", list)):
        where = f"{place / 'question.json'}[{number}]"
        answer = clean(str(field(record, "answer", where, (str, int, float))))
        if field(record, "q_lang", where) != "en" or not answer:
            continue
        image = inside(folder / "imgs", field(record, "img_name", where))
        if image not in sizes:
            sizes[image] = image_size(image)
        question = clean(field(record, "question", where))
        answer_type = str(record.get("answer_type", "OPEN")).strip().upper()
        if answer_type not in ("OPEN", "CLOSED"):
            raise UserError(f"{where}: answer_type {answer_type!r}, expected OPEN or CLOSED")
        template = str(record.get("template") or f"vqa/{question.lower()}")
        key, subject = f"slake/{case}/q{number}", str(record.get("subject") or case)
        examples.append(Example(key, "vqa", "slake", question, answer, image, sizes[image], None, template, answer_type, subject))
    return examples


def _boxes(dataset: str, case: str, image: Path, detections: Path, subject: str) -> list[Example]:
    records = read_json(detections, list)
    if not records:
        return []
    size = image_size(image)
    examples = []
    for number, record in enumerate(records):
        where = f"{detections}[{number}]"
        if not isinstance(record, dict) or len(record) != 1:
            raise UserError(f"{where}: expected an object with one key, {{name: [x, y, width, height]}}")
        ((name, xywh),) = record.items()
        if not isinstance(xywh, list) or len(xywh) != 4 or not all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in xywh):
            raise UserError(f"{where}: the box of {name!r} is {xywh!r}, expected [x, y, width, height] in pixels")
        if xywh[2] <= 0 or xywh[3] <= 0 or xywh[0] < 0 or xywh[1] < 0 or xywh[0] + xywh[2] > size[0] + 1 or xywh[1] + xywh[3] > size[1] + 1:
            raise UserError(f"{where}: the box of {name!r} is {xywh!r}, which does not lie in the image of {size[0]} x {size[1]} pixels")
        name, box = clean(name), from_xywh(*map(float, xywh))
        text = to_text(box, size)
        key, template = f"{dataset}/{case}", f"refer/{name.lower()}"
        examples.append(Example(f"{key}/refer{number}", "refer", dataset, name, text, image, size, box, template, None, subject))
        examples.append(Example(f"{key}/identify{number}", "identify", dataset, text, name, image, size, box, "identify", None, subject))
    return examples


def is_sa_med2d(folder: Path) -> bool:
    """regions_small_train or regions_small_test."""
    return any((folder / f"regions_small_{split}").is_dir() for split in ("train", "test"))


def read_sa_med2d(folder: Path, split: str) -> list[Example]:
    """Boxes of `regions_small_<split>/<modality>/<id>.json` on `images_small_<split>/<modality>/<id>.png`; there is no validation split."""
    regions, images = folder / f"regions_small_{split}", folder / f"images_small_{split}"
    examples: list[Example] = []
    for path in sorted(regions.glob("*/*.json")):
        modality, name = path.parent.name, path.stem
        examples += _boxes("sa-med2d", f"{modality}/{name}", inside(images, f"{modality}/{name}.png"), path, name)
    return examples


def is_path_vqa(folder: Path) -> bool:
    """<split>_vqa.json or <split>_vqa.pkl."""
    return any((folder / f"{split}_vqa.{kind}").is_file() for split in CASE_LISTS for kind in ("json", "pkl"))


class _Plain(pickle.Unpickler):
    """Reads lists, dicts, strings and numbers, which need no class; anything that does is refused before it is looked up."""

    def find_class(self, module: str, name: str) -> Any:
        raise UserError(f"the pickle asks for {module}.{name}; only plain lists, dicts, strings and numbers are read")


def _records(folder: Path, split: str) -> tuple[Path, list[Any]] | None:
    if (folder / f"{split}_vqa.json").is_file():
        path = folder / f"{split}_vqa.json"
        return path, read_json(path, list)
    path = folder / f"{split}_vqa.pkl"
    if not path.is_file():
        return None
    try:
        value = _Plain(io.BytesIO(path.read_bytes())).load()
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except Exception as error:  # a damaged pickle raises nearly anything
        raise UserError(f"{path}: not a readable pickle ({error})") from error
    if not isinstance(value, list):
        raise UserError(f"{path}: the top is a {type(value).__name__}, expected a list")
    return path, value


def read_path_vqa(folder: Path, split: str) -> list[Example]:
    """`<split>_vqa.json` (a converted list) or the original pickle, through a reader that builds no objects.

    Images are `images/<split>/<img_id>.jpg`, where the split is the part of img_id before its first underscore.
    """
    found = _records(folder, split)
    if found is None:
        return []
    path, records = found
    examples = []
    for number, record in enumerate(records):
        where = f"{path}[{number}]"
        label = field(record, "label", where, dict)
        if not label:
            continue
        img_id = str(field(record, "img_id", where))
        image = inside(folder / "images", f"{img_id.split('_')[0]}/{img_id}.jpg")
        if not image.is_file():
            raise UserError(f"{where}: its image {image} does not exist")
        question, answer = clean(field(record, "sent", where)), clean(next(iter(label)))
        kind = str(record.get("answer_type", ""))
        answer_type = "CLOSED" if kind == "yes/no" else "OPEN"
        key = record.get("question_id", number)
        template = f"vqa/path/{kind or 'other'}"
        examples.append(Example(f"path-vqa/{key}", "vqa", "path-vqa", question, answer, image, None, None, template, answer_type, img_id))
    return examples
