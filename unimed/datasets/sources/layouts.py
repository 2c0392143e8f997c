"""Any layout of `unimed.DATASETS` as a source: its records, an image at a time, keyed by the stem of the image's file."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from pydantic import TypeAdapter

from unimed.datasets.sources.spec import Known, Row, SourceSpec
from unimed.datasets.spec import DatasetSpec
from unimed.errors import UserError
from unimed.records.image import Images
from unimed.records.policy import Tally
from unimed.records.record import SPLITS, Annotation, ImageRef, Record
from unimed.records.source import Source

_ANNOTATION: TypeAdapter[Annotation] = TypeAdapter(Annotation)


def _about(record: Record, one: Annotation) -> dict[str, str]:
    """The kind of an annotation, and what its record says of the image. A box keeps the name of its organ."""
    said = {"modality": record.modality, "organ": record.organ if one.kind != "box" else ""}
    return {"kind": one.kind, **{name: value for name, value in said.items() if value}}


def source_of(layout: DatasetSpec) -> SourceSpec:
    """The source that a layout is."""

    def read(folder: Path, tally: Tally) -> Iterator[Row]:
        for split in SPLITS:
            part = Tally(tally.name, folder, split, tally.rules)
            source = Source(part, Images(folder, {}))
            for where, record in layout.read(source):
                for number, ref in enumerate(record.images):
                    if ref.path in source.images.arrays or ref != ImageRef(path=ref.path) or ":" in ref.path:
                        what = "a source gives whole image files under its folder"
                        raise UserError(f"{where}: {what}, this is {ref.path!r} of {layout.name}")
                    some = [one for one in record.annotations if one.image == number and one.task != "qa"]
                    values = [{**_about(record, one), **one.model_dump(mode="json", exclude_defaults=True)} for one in some]
                    key = PurePosixPath(ref.path).stem
                    place = where.replace(f"{folder}/", "")
                    known = {"annotations": values, "classes": source.classes}
                    yield Row(place, key, patient=record.patient, split=record.split, file=ref.path, values=known)
            tally.add(part.state())

    def make(row: Row, image: Known, folder: Path, tally: Tally) -> Iterator[Annotation]:
        for value in row.values["annotations"]:
            yield _ANNOTATION.validate_python({**value, "image": 0})

    return SourceSpec(
        name=layout.name,
        title=layout.title,
        files=layout.files,
        matches=layout.matches,
        read=read,
        make=make,
        licence=layout.licence,
        citation=layout.citation,
        where=layout.where,
        pages=(),
    )
