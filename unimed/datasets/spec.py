"""What is known of a layout of data sets, in one object. Each file beside this one holds one, its SPEC.

DATASETS has them all, by name; `unimed.datasets` fills it. Everything that reads data looks there when it runs: a layout that a caller puts
in is found in folders, named in recipes, converted and counted like the others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from unimed.records.record import Record
from unimed.records.source import Source


@dataclass(frozen=True)
class DatasetSpec:
    """name: of the layout, and of its data set where it is one. files: what a folder of it holds. matches: whether a folder is one.

    read: place and record of everything in a split, in the order of the files. A bad row goes to the source's tally.
    names: what the data sets of a folder are called, where that is not the layout's name. certain: the files that `matches` looks for are
    of no other layout, so a folder without one good record is an error. tasks: those that its annotations make.
    arrays: its images are in memory, not in files. ratio: batches out of 50 for each task in the release. known: a fault of the published
    split, by the kind of finding. root: the folder that a recipe takes where it names none. info: licence, citation and known faults of a
    folder, where the spec's own are not those.
    """

    name: str
    files: str
    matches: Callable[[Path], bool]
    read: Callable[[Source], Iterator[tuple[str, Record]]]
    tasks: tuple[str, ...]
    title: str = ""
    splits: tuple[str, ...] = ("train", "val", "test")
    ratio: Mapping[str, float] = field(default_factory=dict)
    licence: str = ""
    citation: str = ""
    where: str = ""
    certain: bool = True
    sized: bool = True
    arrays: bool = False
    names: Callable[[Path], list[str]] | None = None
    known: Mapping[str, str] = field(default_factory=dict)
    root: str = ""
    info: Callable[[Path], tuple[str, str, Mapping[str, str]]] | None = None

    def terms(self, folder: Path, name: str = "") -> dict[str, str]:
        """What a report must say of the data set in a folder."""
        licence, citation, known = self.info(folder) if self.info else (self.licence, self.citation, self.known)
        title = name or (self.names(folder)[0] if self.info and self.names else self.title or self.name)
        return {"title": title, "licence": licence, "citation": citation, "known": "; ".join(known.values())}


DATASETS: dict[str, DatasetSpec] = {}
