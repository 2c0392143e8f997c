"""`build_sample`: the vendored volumes as a data set of records.

    dataset.json, records-*.jsonl    as `unimed.records` reads them
    images/<slice>.jpg               the slices: questions, boxes and a synthetic report
    masks/<slice>.png                their structures: 1 + index in `masks.STRUCTURES`, 0 elsewhere
    crops/<slice>/<structure>.png    a square around each box, to classify
    sample.json                      what was built from what, the split, and which voxels each image shows

Held-out slabs are the validation split and the held-out subject is the test split. For text questions these are two held-out wordings.
"""

import hashlib
import json
import random
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from unimed import io
from unimed.datasets.load import SPLITS
from unimed.datasets.records import SAMPLE
from unimed.errors import UserError
from unimed.records import jsonl
from unimed.records.box import Box
from unimed.records.record import Annotation, BoxOf, ImageRef, Label, Record, Report
from unimed.records.volume import Volume
from unimed.sample import questions
from unimed.sample.about import NAME, SAMPLE_FILE
from unimed.sample.masks import STRUCTURES
from unimed.sample.slices import ASSETS, BLOCKS, GAP, PIXEL_MM, Slice, slices, subject, vendored_volume

VERSION = 2
MIN_TRAIN_BOXES = 20
CROP = 64
ORGAN = "organ"  # the set of labels
LICENCE = "Apache-2.0"
CITATION = "CT, MR and masks: test data of TotalSegmentator 2.18.0, Wasserthal et al., Radiology: Artificial Intelligence 2023"
Progress = Callable[[int, int, str], None]


def _quiet(done: int, total: int, what: str) -> None:
    pass


def build_sample(out: Path, progress: Progress = _quiet, volumes: Mapping[str, Volume] | None = None) -> None:
    """Write the sample to ``out``: the same bytes every time, built beside its place and renamed; nothing to do when it is there already.

    ``progress(done, total, what)`` is called along the way. ``volumes`` replaces vendored volumes ("ct", "mr", "ct_dicom").
    """
    out = Path(out)
    if out.exists():
        if volumes is None and _is_current(out):
            progress(1, 1, "sample is up to date")
            return
        if not (out / SAMPLE_FILE).is_file() and any(out.iterdir() if out.is_dir() else [out]):
            raise UserError(f"{out}: exists and is not a sample; choose a new folder or remove it")
    cut: list[Slice] = []
    steps = len(BLOCKS) + 2
    for done, name in enumerate(BLOCKS):
        progress(done, steps, f"reading and cutting {name}")
        cut += slices(subject(name, (volumes or {}).get(name) or vendored_volume(name)))
    boxes = Counter(found.name for shown in cut if shown.split == "train" for found in shown.findings)
    names = [name for name in STRUCTURES if boxes[name] >= MIN_TRAIN_BOXES]

    def records(place: Path) -> Iterator[Record]:
        progress(steps - 2, steps, "writing images")
        _write_images(place, cut, names)
        io.write_json(place / SAMPLE_FILE, _manifest(cut, names, boxes))
        progress(steps - 1, steps, "writing questions, boxes and reports")
        for split in ("train", "slab", "subject"):
            yield from _records([shown for shown in cut if shown.split == split], split, names)

    info = jsonl.DatasetInfo(name=NAME, licence=LICENCE, citation=CITATION, classes={ORGAN: names}, made_by=SAMPLE)
    jsonl.write(out, info, records)
    progress(steps, steps, "sample is ready")


def _sources() -> dict[str, str]:
    here = Path(__file__).parent
    code = [here / f"{name}.py" for name in ("build", "slices", "questions", "masks")]
    code += [here.parent / "records" / f"{name}.py" for name in ("volume", "dicom", "greys")]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted([*ASSETS.iterdir(), *code])}


def _is_current(out: Path) -> bool:
    try:
        io.verify_folder(out, hashes=False)
        made = json.loads((out / SAMPLE_FILE).read_text())
    except (UserError, OSError, ValueError):
        return False
    return isinstance(made, dict) and made.get("version") == VERSION and made.get("sources") == _sources()


def _write_images(root: Path, cut: Sequence[Slice], names: Sequence[str]) -> None:
    for folder in ("images", "masks"):
        (root / folder).mkdir()
    for shown in cut:
        shown.image.save(root / _image(shown).path, "JPEG", quality=92)
        Image.fromarray(shown.mask).save(root / "masks" / f"{shown.id}.png")
        for name, box in _boxes(shown, names):
            path = root / _crop(shown, name).path
            path.parent.mkdir(parents=True, exist_ok=True)
            _square(shown.image, box).save(path)


def _image(shown: Slice) -> ImageRef:
    return ImageRef(path=f"images/{shown.id}.jpg")


def _crop(shown: Slice, name: str) -> ImageRef:
    return ImageRef(path=f"crops/{shown.id}/{name.replace(' ', '-')}.png")


def _boxes(shown: Slice, names: Sequence[str]) -> list[tuple[str, Box]]:
    return [(found.name, found.xyxy) for found in shown.findings if found.name in names]


def _square(image: Image.Image, box: Box) -> Image.Image:
    """A square around the box with a tenth to spare, black beyond the image, as CROP x CROP pixels."""
    x1, y1, x2, y2 = box
    half = max(x2 - x1, y2 - y1) * 0.55
    x, y = (x1 + x2) / 2, (y1 + y2) / 2
    return image.crop((round(x - half), round(y - half), round(x + half), round(y + half))).resize((CROP, CROP))


def _records(cut: Sequence[Slice], split: str, names: Sequence[str]) -> Iterator[Record]:
    """Those of one split of the demo: what is to classify, the text questions, the reports, the questions and boxes."""

    def record(key: str, annotations: Sequence[Annotation], image: ImageRef | None = None, shown: Slice | None = None) -> Record:
        of = {"patient": shown.subject, "modality": questions.MODALITY[shown.modality]} if shown else {}
        fields = {"dataset": NAME, "split": SPLITS[split], "source": NAME, **of}
        return Record(id=key, images=(image,) if image else (), annotations=tuple(annotations), **fields)

    for shown in cut:
        for name, _ in _boxes(shown, names):
            yield record(f"{shown.id}/{name}", [Label(set=ORGAN, value=name)], _crop(shown, name), shown)
    for number, question in enumerate(questions.text_qa()[SPLITS[split]]):
        yield record(f"anatomy/{SPLITS[split]}/{number}", [question])
    for shown in cut:
        yield record(f"{shown.id}/report", [Report(text=questions.report(shown))], _image(shown), shown)
    asked = questions.vqa(cut, names, random.Random(f"vqa/{split}"))
    for shown in cut:
        boxes = [BoxOf(name=name, xyxy=box) for name, box in _boxes(shown, names)]
        yield record(shown.id, [*asked[shown.id], *boxes], _image(shown), shown)


def _manifest(cut: Sequence[Slice], names: Sequence[str], boxes: Counter[str]) -> dict[str, Any]:
    fields = ("id", "subject", "split", "plane", "index", "region")
    return {
        "version": VERSION,
        "note": "Real CT and MR slices; what is asked and answered comes from automatic masks. Research use, not for diagnosis.",
        "synthetic": ["reports: text composed from the masks"],
        "pixel_mm": PIXEL_MM,
        "gap_slices": GAP,
        "blocks": {name: [{"split": block.split, "axial": [block.start, block.stop]} for block in parts] for name, parts in BLOCKS.items()},
        "structures": list(STRUCTURES),
        "classes": list(names),
        "left_out": {name: boxes[name] for name in STRUCTURES if name not in names},
        "sources": _sources(),
        "images": [{name: getattr(shown, name) for name in fields} for shown in cut],
    }
