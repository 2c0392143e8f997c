"""`build_sample`: the vendored volumes written as datasets, in the layouts of the released ones.

    slake/       VQA, REC, REG        imgs/<case>/{source.jpg,detection.json,question.json}; train.txt, validate.txt, test.txt
    medmnist/    classification       organsample_64.npz with <split>_images and <split>_labels; organsample_64.json names the classes
    reports/     report (synthetic)   annotation.json, images/<case>.jpg
    medqa/       text QA              questions/US/{train,dev,test}.jsonl
    sample.json  what was built from what, the split, and which voxels each image shows

Held-out slabs are the files' validation split and the held-out subject is their test split. For text QA these are two held-out wordings.
"""

import hashlib
import io
import json
import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from unimed.errors import UserError
from unimed.io import folder_beside
from unimed.records.volume import Volume
from unimed.sample import questions
from unimed.sample.masks import STRUCTURES
from unimed.sample.slices import ASSETS, BLOCKS, GAP, PIXEL_MM, Slice, slices, subject, vendored_volume

VERSION = 1
MIN_TRAIN_BOXES = 20
CROP = 64
ON_DISK = {"train": "train", "slab": "val", "subject": "test"}
CASE_LISTS = {"train": "train.txt", "slab": "validate.txt", "subject": "test.txt"}
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
        if not (out / "sample.json").is_file() and any(out.iterdir() if out.is_dir() else [out]):
            raise UserError(f"{out}: exists and is not a sample; choose a new folder or remove it")
    with folder_beside(out) as partial:
        _write(partial, progress, volumes or {})


def _sources() -> dict[str, str]:
    here = Path(__file__).parent
    code = [here / f"{name}.py" for name in ("build", "slices", "questions", "masks")]
    code += [here.parent / "records" / f"{name}.py" for name in ("volume", "dicom", "greys")]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted([*ASSETS.iterdir(), *code])}


def _is_current(out: Path) -> bool:
    try:
        manifest = json.loads((out / "sample.json").read_text())
        sizes = {name: (out / name).stat().st_size for name in manifest["files"]}
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return manifest.get("version") == VERSION and manifest.get("sources") == _sources() and manifest["files"] == sizes


def _write(root: Path, progress: Progress, volumes: Mapping[str, Volume]) -> None:
    steps = len(BLOCKS) + 4
    made: list[Slice] = []
    for done, name in enumerate(BLOCKS):
        progress(done, steps, f"reading and cutting {name}")
        made += slices(subject(name, volumes.get(name) or vendored_volume(name)))
    boxes = Counter(found.name for shown in made if shown.split == "train" for found in shown.findings)
    names = [name for name in STRUCTURES if boxes[name] >= MIN_TRAIN_BOXES]
    done = len(BLOCKS)
    for what, write in (("questions and boxes", _write_slake), ("organ crops", _write_medmnist), ("reports", _write_reports)):
        progress(done, steps, f"writing {what}")
        write(root, made, names)
        done += 1
    progress(done, steps, "writing text questions")
    _write_medqa(root)
    _write_manifest(root, made, names, boxes)
    progress(steps, steps, "sample is ready")


def _json(path: Path, value: Any, indent: int | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=indent, ensure_ascii=False) + "\n", encoding="utf-8")


def _jpeg(path: Path, shown: Slice) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    shown.image.save(path, "JPEG", quality=92)


def _write_slake(root: Path, made: Sequence[Slice], names: Sequence[str]) -> None:
    folder = root / "slake"
    for split, case_list in CASE_LISTS.items():
        of_split = [shown for shown in made if shown.split == split]
        asked = questions.vqa(of_split, names, random.Random(f"vqa/{split}"))
        for shown in of_split:
            case = folder / "imgs" / shown.id
            _jpeg(case / "source.jpg", shown)
            _json(case / "detection.json", [{found.name: list(found.box)} for found in shown.findings if found.name in names])
            common = {"img_name": f"{shown.id}/source.jpg", "q_lang": "en", "location": "Abdomen", "subject": shown.subject}
            common["modality"] = questions.MODALITY[shown.modality]
            _json(case / "question.json", [{"qid": qid, **common, **record} for qid, record in enumerate(asked[shown.id])])
        (folder / case_list).write_text("".join(f"{shown.id}\n" for shown in of_split))


def _crop(shown: Slice, box: tuple[int, int, int, int]) -> np.ndarray:
    """A square around the box with a tenth to spare, black beyond the image, as CROP x CROP pixels."""
    x, y, width, height = box
    half = max(width, height) * 0.55
    centre_x, centre_y = x + width / 2, y + height / 2
    corners = (round(centre_x - half), round(centre_y - half), round(centre_x + half), round(centre_y + half))
    return np.asarray(shown.image.crop(corners).resize((CROP, CROP)))


def _write_medmnist(root: Path, made: Sequence[Slice], names: Sequence[str]) -> None:
    arrays: dict[str, np.ndarray] = {}
    crops = [(shown, found) for shown in made for found in shown.findings if found.name in names]
    for split, key in ON_DISK.items():
        chosen = [(shown, found) for shown, found in crops if shown.split == split]
        arrays[f"{key}_images"] = np.stack([_crop(shown, found.box) for shown, found in chosen])
        arrays[f"{key}_labels"] = np.array([[names.index(found.name)] for _, found in chosen], np.uint8)
    folder = root / "medmnist"
    folder.mkdir()
    packed = io.BytesIO()
    np.savez_compressed(packed, **arrays)  # type: ignore[arg-type]
    (folder / "organsample_64.npz").write_bytes(packed.getvalue())
    subjects = {key: [shown.subject for shown, _ in crops if shown.split == split] for split, key in ON_DISK.items()}
    _json(folder / "organsample_64.json", {"label": {str(i): name for i, name in enumerate(names)}, "what": "organ", "subjects": subjects})


def _write_reports(root: Path, made: Sequence[Slice], names: Sequence[str]) -> None:
    records: dict[str, list[dict[str, Any]]] = {key: [] for key in ON_DISK.values()}
    for shown in made:
        _jpeg(root / "reports" / "images" / f"{shown.id}.jpg", shown)
        key = ON_DISK[shown.split]
        record = {"id": shown.id, "subject_id": shown.subject, "image_path": [f"{shown.id}.jpg"], "split": key}
        records[key].append({**record, "report": questions.report(shown), "synthetic": True})
    _json(root / "reports" / "annotation.json", records)


def _write_medqa(root: Path) -> None:
    folder = root / "medqa" / "questions" / "US"
    folder.mkdir(parents=True)
    for split, records in questions.text_qa().items():
        lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        (folder / f"{'dev' if split == 'val' else split}.jsonl").write_text(lines, encoding="utf-8")


def _write_manifest(root: Path, made: Sequence[Slice], names: Sequence[str], boxes: Counter[str]) -> None:
    fields = ("id", "subject", "split", "plane", "index", "region")
    images = [{name: getattr(shown, name) for name in fields} for shown in made]
    files = {path.relative_to(root).as_posix(): path.stat().st_size for path in sorted(root.rglob("*")) if path.is_file()}
    blocks = {name: [{"split": block.split, "axial": [block.start, block.stop]} for block in parts] for name, parts in BLOCKS.items()}
    _json(
        root / "sample.json",
        {
            "version": VERSION,
            "note": "Real CT and MR slices; what is asked and answered comes from automatic masks. Research use, not for diagnosis.",
            "synthetic": ["reports/annotation.json: findings text composed from the masks"],
            "pixel_mm": PIXEL_MM,
            "gap_slices": GAP,
            "blocks": blocks,
            "classes": list(names),
            "left_out": {name: boxes[name] for name in STRUCTURES if name not in names},
            "sources": _sources(),
            "images": images,
            "files": files,
        },
    )
