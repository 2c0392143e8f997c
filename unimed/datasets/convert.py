"""A published data set as a folder of records: `unimed data convert`. Images stay where they are; those of archives become PNG files."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from unimed.datasets.records import CONVERTED
from unimed.datasets.spec import DATASETS
from unimed.errors import UserError
from unimed.progress import watched
from unimed.records import jsonl
from unimed.records.files import once
from unimed.records.image import Images
from unimed.records.imports import ROOT, root_of
from unimed.records.policy import Rules, Tally
from unimed.records.record import SPLITS, ImageRef, Record
from unimed.records.source import Source


class Converted(NamedTuple):
    """The outcome. records: by split. annotations: by kind. left_out: the lines that count bad records."""

    out: Path
    records: dict[str, int]
    annotations: dict[str, int]
    left_out: list[str]


def convert(layout: str, root: Path, out: Path, strict: bool = False, languages: Sequence[str] = ("en",)) -> Converted:
    """Writes `out` from every split of the data set at `root`: whole texts, options and abstracts included."""
    spec = DATASETS.get(layout)
    known = [name for name in DATASETS if name != "records"]
    if spec is None or layout == "records":
        raise UserError(f"{layout!r}: no layout to convert from; one of {', '.join(known)}")
    if not root.is_dir():
        raise UserError(f"{root}: no such folder")
    if not spec.matches(root):
        raise UserError(f"{root}: not a folder of the layout {spec.files}")
    if out.exists():
        raise UserError(f"--out {out}: exists already; choose another folder, or delete it")
    rules = Rules(strict=strict, languages=tuple(languages), protocol="standard")
    sources = {split: Source(Tally(layout, root, split, rules), Images(root, {})) for split in SPLITS}
    classes: dict[str, list[str]] = {}
    kinds: Counter[str] = Counter()

    def records(place: Path) -> Iterator[Record]:
        seen: Counter[str] = Counter()
        for split, source in sources.items():
            for where, record in watched(spec.read(source), f"convert {layout} ({split})"):
                for name, listed in source.classes.items():
                    if classes.setdefault(name, listed) != listed:
                        what = f"{name!r} has other classes than before"
                        raise UserError(f"{where}: {what}; convert each archive from a folder of its own")
                kinds.update(one.kind for one in record.annotations)
                images = tuple(_image(ref, source.images, place) for ref in record.images)
                yield record.model_copy(update={"id": once(record.id, seen), "images": images})
        if not kinds:
            raise UserError(f"{root}: no record can be used: {'; '.join(_lines(sources)) or 'its files hold none'}")

    def info() -> jsonl.DatasetInfo:
        roots = {ROOT: root_of(root, out)}
        made_by = f"{CONVERTED} {layout}"
        return jsonl.DatasetInfo(name=layout, licence=spec.licence, citation=spec.citation, roots=roots, classes=classes, made_by=made_by)

    counts = jsonl.write(out, info, records)
    return Converted(out, {split: counts.get(split, 0) for split in SPLITS}, dict(kinds), _lines(sources))


def _lines(sources: Mapping[Any, Source]) -> list[str]:
    return [line for line in (source.tally.line() for source in sources.values()) if line]


def _image(ref: ImageRef, images: Images, place: Path) -> ImageRef:
    """The reference from the new folder."""
    pixels = images.arrays.get(ref.path)
    if pixels is None:
        return ref.model_copy(update={"path": f"{ROOT}:{ref.path}"})
    path = Path("images", ref.path.replace(".npz/", "/"), f"{ref.frame}.png")
    (place / path).parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels[ref.frame or 0]).save(place / path)
    return ImageRef(path=path.as_posix())
