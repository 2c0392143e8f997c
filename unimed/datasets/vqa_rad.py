"""VQA-RAD: questions on radiology images, by clinicians."""

from collections.abc import Iterator
from pathlib import Path

from unimed.datasets.spec import DatasetSpec
from unimed.records import files
from unimed.records.policy import BadRecord
from unimed.records.record import QA, ImageRef, Record, made
from unimed.records.source import Source

FILE = "VQA_RAD Dataset Public.json"
ORGANS = {"ABD": "abdomen"}  # the others are words: HEAD, CHEST
IMAGES = ("VQA_RAD Image Folder", "images")


def matches(folder: Path) -> bool:
    """The published JSON file."""
    return (folder / FILE).is_file()


def read(source: Source) -> Iterator[tuple[str, Record]]:
    """A record for each image. Questions whose phrase_type begins with `test_` are the test split; there is no validation split."""
    path = source.folder / FILE
    if source.split not in ("train", "test"):
        return
    images = next((name for name in IMAGES if (source.folder / name).is_dir()), IMAGES[0])
    found: dict[str, tuple[ImageRef, list[QA]]] = {}
    for number, row in enumerate(files.read_json(path, list)):
        where = f"{path}[{number}]"
        phrase = row.get("phrase_type") if isinstance(row, dict) else None
        if isinstance(phrase, str) and phrase.strip().startswith("test_") != (source.split == "test"):
            continue
        with source.tally.record():
            files.text(row, "phrase_type", where)
            question = files.text(row, "question", where)
            answer = files.text(row, "answer", where, (str, int, float))
            kind = files.text(row, "answer_type", where).upper()
            if kind not in ("OPEN", "CLOSED"):
                raise BadRecord("with a wrong 'answer_type'", f"{where}: answer_type {files.short(kind)}, expected OPEN or CLOSED")
            image = files.text(row, "image_name", where)
            ref, _ = source.image(images, image, where)
            key = files.name(row.get("qid", number))
            organ = files.name(row.get("image_organ") or "")
            one = made(QA, where, question=question, answer=answer, answer_type=kind, id=f"q{key}", organ=ORGANS.get(organ, organ))
            found.setdefault(files.name(image), (ref, []))[1].append(one)
    for image, (ref, questions) in found.items():
        key = f"{source.split}/{image}"  # an image may be in both splits
        yield str(path), source.record(str(path), key, SPEC.name, images=(ref,), annotations=tuple(questions), source=SPEC.name)


SPEC = DatasetSpec(
    name="vqa-rad",
    title="VQA-RAD",
    files=f"VQA-RAD ({FILE}, {IMAGES[0]}/)",
    matches=matches,
    read=read,
    tasks=("vqa",),
    splits=("train", "test"),
    licence="CC0 1.0",
    citation="Lau et al., A dataset of clinically generated visual questions and answers about radiology images, Scientific Data 2018",
    where="https://osf.io/89kps/",
    known={"images in several splits": "the published split shares images: its test questions are held out, its images are not"},
)
