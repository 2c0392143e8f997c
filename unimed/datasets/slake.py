"""Image questions and boxes: SLAKE, SA-Med2D and Path-VQA folders."""

import io
import math
import os
import pickle
from pathlib import Path
from typing import Any

from unimed.errors import UserError
from unimed.records import files as records
from unimed.records.box import Box, clip, from_xywh, to_text
from unimed.records.example import Example
from unimed.records.policy import BadRecord, Tally

SLAKE, SA_MED2D, PATH_VQA = "slake", "sa-med2d", "path-vqa"
LISTS = {"train": ("train",), "val": ("validate", "validation"), "test": ("test",)}


def _listed(folder: Path, suffix: str, split: str | None = None) -> Path | None:
    """The first list that is there, of cases (.txt) or of questions (.json), of one split or of any."""
    names = [f"{name}{suffix}" for key, some in LISTS.items() if split in (key, None) for name in some] or [f"{split}{suffix}"]
    return next((folder / name for name in names if (folder / name).is_file()), None)


def is_slake(folder: Path) -> bool:
    """imgs/ with at least one list of case folders (as in the release) or of questions (as published)."""
    return (folder / "imgs").is_dir() and any(_listed(folder, suffix) for suffix in (".txt", ".json"))


def read_slake(tally: Tally) -> list[Example]:
    """Questions (vqa) and boxes (refer, identify) of one split.

    `<split>.txt` names case folders, each with its own question.json. Where there is no such list, `<split>.json` holds the questions of
    all cases. Boxes come from the detection.json of each case. Questions in other languages than `Rules.languages` are counted, not read.
    """
    by_case = _listed(tally.folder, ".txt") is not None
    path = _listed(tally.folder, ".txt" if by_case else ".json", tally.split)
    if path is None:
        return []
    imgs = tally.folder / "imgs"
    examples: list[Example] = []
    if not by_case:
        rows = records.read_json(path, list)
        for number, row in enumerate(rows):
            examples += _question(tally, row, f"{path}[{number}]", number)
        names = [row.get("img_name") for row in rows if isinstance(row, dict)]
        cases = list(dict.fromkeys(name.rpartition("/")[0] for name in names if isinstance(name, str) and "/" in name))
    else:
        cases = records.read_text(path).split()
    for case in cases:
        try:
            place = records.place(tally, imgs, case)
            if not os.path.isdir(place):
                raise BadRecord("with a missing folder", f"names case {case!r}, but there is no folder {place}")
        except BadRecord as error:
            if by_case:  # else each of its questions has been counted for it
                tally.leave_out(BadRecord(error.kind, f"{path}: {error}"))
            continue
        subject = records.name(case)
        if by_case and (place / "question.json").is_file():
            asked = [
                example
                for where, number, row in _rows(tally, place / "question.json")
                for example in _question(tally, row, where, number, case)
            ]
            subject = asked[0].subject if asked else subject
            examples += asked
        if (place / "detection.json").is_file():
            examples += _boxes(tally, SLAKE, case, imgs, f"{case}/source.jpg", place / "detection.json", subject)
    return examples


def _rows(tally: Tally, path: Path) -> list[tuple[str, int, Any]]:
    """Place, number and value of every row of a JSON list; a file that cannot be read counts as one record."""
    try:
        return [(f"{path}[{number}]", number, row) for number, row in enumerate(records.read_json(path, list))]
    except BadRecord as error:
        tally.leave_out(error)
        return []


def _question(tally: Tally, row: Any, where: str, number: int, case: str | None = None) -> list[Example]:
    with tally.record():
        image_name = records.field(row, "img_name", where)
        language = str(row.get("q_lang") or "en")
        if language not in tally.rules.languages:
            tally.choose(f"with q_lang {records.short(language)} (data.languages={records.short(list(tally.rules.languages))})")
            return []
        answer = records.text(row, "answer", where, tally, (str, int, float))
        question = records.text(row, "question", where, tally)
        answer_type = str(row.get("answer_type") or "OPEN").strip().upper()
        if answer_type not in ("OPEN", "CLOSED"):
            raise BadRecord("with a wrong 'answer_type'", f"{where}: answer_type {records.short(answer_type)}, expected OPEN or CLOSED")
        image, size = records.image(tally, tally.folder / "imgs", image_name, where)
        dataset = tally.folder_name or SLAKE
        if case is None:
            case = records.name(image_name.rpartition("/")[0] or image_name)
            number = row.get("qid", number)
        template = records.name(row.get("template") or f"vqa/{question.lower()}")
        key, subject = records.name(f"{dataset}/{case}/q{number}"), records.name(row.get("subject") or case)
        return [Example(key, "vqa", dataset, question, answer, image, size, None, template, answer_type, subject, SLAKE)]
    return []


def _boxes(tally: Tally, layout: str, case: str, root: Path, image_name: str, detections: Path, subject: str) -> list[Example]:
    """Two examples for each box: where is it (refer), and what is it (identify)."""
    dataset = tally.folder_name or layout
    examples: list[Example] = []
    for where, number, row in _rows(tally, detections):
        with tally.record():
            if not isinstance(row, dict) or len(row) != 1:
                raise BadRecord("of the wrong form", f"{where}: expected an object with one key, {{name: [x, y, width, height]}}")
            ((key, xywh),) = row.items()
            name = records.cleaned(key, "name", where, tally)
            image, size = records.image(tally, root, image_name, where)
            box = _box(tally, name, xywh, size, where)
            text, template, prefix = to_text(box, size), f"refer/{name.lower()}", records.name(f"{dataset}/{case}")
            common = (image, size, box)
            examples += [
                Example(f"{prefix}/refer{number}", "refer", dataset, name, text, *common, template, None, subject, layout),
                Example(f"{prefix}/identify{number}", "identify", dataset, text, name, *common, "identify", None, subject, layout),
            ]
    return examples


def _box(tally: Tally, name: str, xywh: Any, size: tuple[int, int], where: str) -> Box:
    what = f"{where}: the box of {name!r} is {records.short(xywh)}"
    if not isinstance(xywh, list) or len(xywh) != 4 or not all(_is_number(value) for value in xywh):
        raise BadRecord("with a wrong box", f"{what}, expected [x, y, width, height] in pixels")
    x, y, width, height = map(float, xywh)
    if width <= 0 or height <= 0:
        raise BadRecord("with a box without area", f"{what}, whose width and height must be above zero")
    box = from_xywh(x, y, width, height)
    clipped = clip(box, size)
    if clipped is None:
        raise BadRecord("with a box outside the image", f"{what}, which does not lie in the image of {size[0]} x {size[1]} pixels")
    if clipped != box:
        tally.mend(BadRecord("with a box clipped to the image", f"{what}, the image has {size[0]} x {size[1]} pixels"))
    return clipped


def _is_number(value: Any) -> bool:
    try:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(float(value))
    except OverflowError:  # an integer of more than 308 digits
        return False


def is_sa_med2d(folder: Path) -> bool:
    """regions_small_train or regions_small_test."""
    return any((folder / f"regions_small_{split}").is_dir() for split in ("train", "test"))


def read_sa_med2d(tally: Tally) -> list[Example]:
    """Boxes of `regions_small_<split>/<modality>/<id>.json` on `images_small_<split>/<modality>/<id>.png`; there is no validation split."""
    regions, images = (tally.folder / f"{kind}_small_{tally.split}" for kind in ("regions", "images"))
    examples: list[Example] = []
    for path in sorted(regions.glob("*/*.json")):
        modality, name = path.parent.name, path.stem
        examples += _boxes(tally, SA_MED2D, f"{modality}/{name}", images, f"{modality}/{name}.png", path, records.name(name))
    return examples


def _answers(folder: Path, split: str) -> Path | None:
    """`<split>_vqa.json` (a converted list) or `<split>_vqa.pkl` (as published), in the folder or where the archive has it, in qas/."""
    places = [place / f"{split}_vqa.{kind}" for place in (folder, folder / "qas", folder / "qas" / split) for kind in ("json", "pkl")]
    return next((path for path in places if path.is_file()), None)


def is_path_vqa(folder: Path) -> bool:
    """<split>_vqa.json or <split>_vqa.pkl."""
    return any(_answers(folder, split) for split in LISTS)


class _Plain(pickle.Unpickler):
    """Reads lists, dicts, strings and numbers, which need no class; anything that does is refused before it is looked up."""

    def find_class(self, module: str, name: str) -> Any:
        raise UserError(f"the pickle asks for {module}.{name}; only plain lists, dicts, strings and numbers are read")


def _unpickled(path: Path) -> list[Any]:
    try:
        value = _Plain(io.BytesIO(path.read_bytes())).load()
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except Exception as error:  # a damaged pickle raises nearly anything
        raise UserError(f"{path}: not a readable pickle ({error})") from error
    return records.of_kind(value, list, f"{path}: the top")


def read_path_vqa(tally: Tally) -> list[Example]:
    """Questions of one split, from JSON or from the original pickle, through a reader that builds no objects.

    Images are `images/<split>/<img_id>.jpg`, where the split is the part of img_id before its first underscore.
    """
    path = _answers(tally.folder, tally.split)
    if path is None:
        return []
    rows = records.read_json(path, list) if path.suffix == ".json" else _unpickled(path)
    dataset = tally.folder_name or PATH_VQA
    examples = []
    for number, row in enumerate(rows):
        where = f"{path}[{number}]"
        with tally.record():
            label = records.field(row, "label", where, dict)
            answer = records.cleaned(next(iter(label), ""), "label", where, tally)
            question = records.text(row, "sent", where, tally)
            img_id = records.field(row, "img_id", where)
            image, _ = records.image(tally, tally.folder / "images", f"{img_id.split('_')[0]}/{img_id}.jpg", where)
            kind = records.name(row.get("answer_type") or "other")
            answer_type = "CLOSED" if kind == "yes/no" else "OPEN"
            key, template = records.name(f"{dataset}/{row.get('question_id', number)}"), f"vqa/path/{kind}"
            examples.append(
                Example(key, "vqa", dataset, question, answer, image, None, None, template, answer_type, records.name(img_id), PATH_VQA)
            )
    return examples
