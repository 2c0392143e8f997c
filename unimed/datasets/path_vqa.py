"""Path-VQA: questions on pathology images."""

import io
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from unimed.datasets.spec import DatasetSpec
from unimed.errors import UserError
from unimed.records import files
from unimed.records.record import QA, ImageRef, Record, made
from unimed.records.source import Source


def _answers(folder: Path, split: str) -> Path | None:
    """`<split>_vqa.json` (a converted list) or `<split>_vqa.pkl` (as published), in the folder or where the archive has it, in qas/."""
    places = [place / f"{split}_vqa.{kind}" for place in (folder, folder / "qas", folder / "qas" / split) for kind in ("json", "pkl")]
    return next((path for path in places if path.is_file()), None)


def matches(folder: Path) -> bool:
    """<split>_vqa.json or <split>_vqa.pkl."""
    return any(_answers(folder, split) for split in ("train", "val", "test"))


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
    return files.of_kind(value, list, f"{path}: the top")


def read(source: Source) -> Iterator[tuple[str, Record]]:
    """A record for each image, from JSON or from the original pickle, through a reader that builds no objects.

    Images are `images/<split>/<img_id>.jpg`, where the split is the part of img_id before its first underscore.
    """
    path = _answers(source.folder, source.split)
    if path is None:
        return
    found: dict[str, tuple[ImageRef, list[QA]]] = {}
    for number, row in enumerate(files.read_json(path, list) if path.suffix == ".json" else _unpickled(path)):
        where = f"{path}[{number}]"
        with source.tally.record():
            label = files.field(row, "label", where, dict)
            answer = files.cleaned(next(iter(label), ""), "label", where)
            question = files.text(row, "sent", where)
            img_id = files.field(row, "img_id", where)
            ref, _ = source.image("images", f"{img_id.split('_')[0]}/{img_id}.jpg", where)
            kind = files.name(row.get("answer_type") or "other")
            values = {"answer_type": "CLOSED" if kind == "yes/no" else "OPEN", "template": f"vqa/path/{kind}"}
            one = made(QA, where, question=question, answer=answer, id=files.name(row.get("question_id", number)), **values)
            found.setdefault(files.name(img_id), (ref, []))[1].append(one)
    for key, (ref, questions) in found.items():
        values = {"patient": key, "modality": "pathology", "source": SPEC.name}
        yield str(path), source.record(str(path), key, SPEC.name, images=(ref,), annotations=tuple(questions), **values)


SPEC = DatasetSpec(
    name="path-vqa",
    title="Path-VQA",
    files="Path-VQA (<split>_vqa.json or .pkl, images/)",
    matches=matches,
    read=read,
    tasks=("vqa",),
    ratio={"vqa": 5},
    sized=False,
    licence="MIT (its repository); the pictures come from textbooks and a digital library",
    citation="He et al., PathVQA: 30000+ questions for medical visual question answering, 2020",
    where="https://github.com/UCSD-AI4H/PathVQA",
)
