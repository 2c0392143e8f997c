"""One split of one data set while it is read."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from unimed.errors import UserError
from unimed.io import inside
from unimed.records.image import Images, Seen
from unimed.records.policy import BadRecord, Rules, Tally
from unimed.records.record import SPLITS, ImageRef, Record, Split, made


@dataclass
class Source:
    """What a reader is given, and what it says of its data.

    classes: of each set of labels, graded: in an order that means something. own: the records have no other layout than ours.
    counted: the reader counts what it reads. sized: an item tells the size of its image, also without a box.
    cut: texts that the protocol shortened. unused: annotations that no task asks about.
    """

    tally: Tally
    images: Images
    classes: dict[str, list[str]] = field(default_factory=dict)
    graded: bool = False
    own: bool = False
    counted: bool = True
    sized: bool = True
    cut: int = 0
    unused: Counter[str] = field(default_factory=Counter)

    @property
    def folder(self) -> Path:
        return self.tally.folder

    @property
    def split(self) -> str:
        return self.tally.split

    @property
    def rules(self) -> Rules:
        return self.tally.rules

    def called(self, name: str) -> str:
        """The data set's name: the folder's where several folders have one layout."""
        return self.tally.folder_name or name

    def place(self, root: Path, file: str) -> Path:
        """A path that a record names under ``root``."""
        try:
            return inside(root, file, self.rules.links)
        except UserError as error:
            raise BadRecord("with a file name that is not allowed", str(error)) from error

    def image(self, prefix: str, file: str, where: str) -> tuple[ImageRef, Seen]:
        """The image that a row names in a folder of the data set: there, readable and not cut off."""
        try:
            self.place(self.folder / prefix, file)
        except BadRecord as error:
            raise BadRecord(error.kind, f"{where}: {error}") from None
        ref = made(ImageRef, where, path=f"{prefix}/{file}" if prefix else file)
        return ref, self.images.look(ref, where)

    def record(self, where: str, key: str, dataset: str, **values: Any) -> Record:
        """A record of the split that is read. A split of another name counts as test."""
        split: Split = next((known for known in SPLITS if known == self.split), "test")
        return made(Record, where, id=key, dataset=self.called(dataset), split=split, **values)
