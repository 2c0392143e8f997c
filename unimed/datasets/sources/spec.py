"""What is known of a source of annotations, in one object. Each file beside this one holds one, its SOURCE.

A source tells something of images that may lie elsewhere: masks, boxes, labels, grades or reports, keyed by the image's id or its study's.
`unimed data build-imax` joins sources into one record an image. A source is read in two steps, so that a million images fit in memory:

    read(folder, tally)    rows as they stand in the files, one after another
    make(row, image, ...)  annotations of a row, once all that is known of its image has been brought together
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from unimed.records.policy import Tally
from unimed.records.record import Annotation


class Row(NamedTuple):
    """A row of a source. image or study: which it is about; a row of a study is about every image of it.

    where: its place, "file:line". file: of the image, relative to the source's folder. size: (width, height) of the image. spacing: mm from
    row to row and from column to column. view: "PA", "AP", ... values: what `make` needs.
    """

    where: str
    image: str = ""
    study: str = ""
    patient: str = ""
    split: str = ""
    file: str = ""
    size: tuple[int, int] | None = None
    spacing: tuple[float, float] | None = None
    view: str = ""
    values: dict[str, Any] = {}  # noqa: RUF012

    def dump(self) -> str:
        """As JSON, without what is empty."""
        return json.dumps({name: value for name, value in self._asdict().items() if value}, ensure_ascii=False, separators=(",", ":"))


def load_row(text: str) -> Row:
    """The row that `Row.dump` wrote."""
    found = json.loads(text)
    for name in ("size", "spacing"):
        if name in found:
            found[name] = tuple(found[name])
    return Row(**found)


@dataclass
class Known:
    """All that the rows tell of one image. masks: [height, width] bool by structure, once a source of masks has been made."""

    key: str
    file: Path | None = None
    size: tuple[int, int] | None = None
    spacing: tuple[float, float] | None = None
    split: str = ""
    patient: str = ""
    study: str = ""
    view: str = ""
    masks: dict[str, np.ndarray] = field(default_factory=dict)


@dataclass(frozen=True)
class SourceSpec:
    """name: of the layout. files: what a folder of it holds. matches: whether a folder is one.

    once: a second row about one image is an id given twice. together: annotations that need all rows of an
    image, each with the place of a row.
    classes: of its sets of labels. pages: the public documentation of its columns.
    """

    name: str
    title: str
    files: str
    matches: Callable[[Path], bool]
    read: Callable[[Path, Tally], Iterator[Row]]
    make: Callable[[Row, Known, Path, Tally], Iterable[Annotation]]
    licence: str
    citation: str
    where: str
    pages: tuple[str, ...]
    once: bool = False
    together: Callable[[list[Row]], Iterable[tuple[str, Annotation]]] | None = None
    classes: dict[str, tuple[str, ...]] = field(default_factory=dict)


SOURCES: dict[str, SourceSpec] = {}
