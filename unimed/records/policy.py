"""A record that cannot be used is left out, counted and named in one line; with `strict` the first one is an error.

Readers report to a Tally. Nothing else decides what becomes of a bad record.
"""

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from unimed.errors import UserError
from unimed.records.text import MAX_WORDS

log = logging.getLogger("unimed.records")

ProtocolName = Literal["released", "standard"]

KINDS_SHOWN = 6
_COUNTS = ("_wrong", "_chosen", "_mended")
_printed: set[tuple[str, str]] = set()  # a split is read more than once in a run, its line is printed once


@dataclass(frozen=True)
class Rules:
    """What a recipe says about every data set.

    strict: the first bad record is an error.
    languages: of the questions, where a data set has several.
    protocol: "released" cuts every text to 50 words and shows neither the options of MedQA nor the abstracts of PubMedQA; "standard" keeps
    and shows them.
    links: symbolic links inside a data set's folder are followed.
    """

    strict: bool = False
    languages: tuple[str, ...] = ("en",)
    protocol: ProtocolName = "released"
    links: bool = True

    @property
    def max_words(self) -> int:
        """Words kept of a text; 0 keeps all."""
        return MAX_WORDS if self.protocol == "released" else 0

    @property
    def context(self) -> bool:
        """Whether the text questions of released data sets come with their options and abstracts."""
        return self.protocol == "standard"


class BadRecord(UserError):
    """A record that cannot be used. ``kind`` completes "3 records ..." in the summary: "without a report", "with a missing image"."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(" ".join(message.split()))
        self.kind = kind


@dataclass
class _Count:
    records: int = 0
    first: str = ""


_COUNTS = ("_wrong", "_chosen", "_mended")


@dataclass
class Tally:
    """Counts the records of one split of one data set.

    name: of the data set in the summary. folder_name: the name that its items carry in place of the layout's, where the data has several
    folders of one layout.
    """

    name: str
    folder: Path
    split: str
    rules: Rules = field(default_factory=Rules)
    folder_name: str = ""
    records: int = 0
    _wrong: dict[str, _Count] = field(default_factory=dict)
    _chosen: dict[str, _Count] = field(default_factory=dict)
    _mended: dict[str, _Count] = field(default_factory=dict)
    _notes: list[str] = field(default_factory=list)

    @contextmanager
    def record(self) -> Iterator[None]:
        """One record is read inside; a BadRecord raised there leaves it out."""
        self.records += 1
        try:
            yield
        except BadRecord as error:
            self._fault(self._wrong, error, 1)

    def leave_out(self, error: BadRecord, records: int = 1) -> None:
        """Records that cannot even be looked at one by one, such as those of a damaged file."""
        self.records += records
        self._fault(self._wrong, error, records)

    def spoil(self, error: BadRecord) -> None:
        """A record that was counted when it was read, and turns out to be bad."""
        self._fault(self._wrong, error, 1)

    def mend(self, error: BadRecord) -> None:
        """A bad record that is kept in another form."""
        self._fault(self._mended, error, 1)

    def choose(self, kind: str, records: int = 1) -> None:
        """Good records that the rules leave out. They are no error, also with `strict`."""
        self._chosen.setdefault(kind, _Count()).records += records

    def note(self, text: str) -> None:
        """A choice of ours about good records that a user must know."""
        self._notes.append(text)

    def state(self) -> dict[str, Any]:
        """All that was counted, as plain JSON; `add` and `restore` take it."""
        counts = {name: {kind: [one.records, one.first] for kind, one in getattr(self, name).items()} for name in _COUNTS}
        return {"name": self.name, "records": self.records, "notes": self._notes.copy(), **counts}

    def add(self, state: dict[str, Any]) -> None:
        """The counts of another part of the same data."""
        self.records += state["records"]
        self._notes += [text for text in state["notes"] if text not in self._notes]
        for name in _COUNTS:
            for kind, (records, first) in state[name].items():
                count = getattr(self, name).setdefault(kind, _Count(first=first))
                count.records += records

    def restore(self, state: dict[str, Any]) -> None:
        """Takes the place of all that was counted."""
        counts = {key: {kind: _Count(*one) for kind, one in state[key].items()} for key in _COUNTS}
        self.name, self.records, self._notes = state["name"], state["records"], list(state["notes"])
        vars(self).update(counts)

    def _fault(self, counts: dict[str, _Count], error: BadRecord, records: int) -> None:
        if self.rules.strict:
            raise UserError(f"{error} (strict: the first bad record stops)") from error
        count = counts.setdefault(error.kind, _Count(first=str(error)))
        count.records += records

    @property
    def left_out(self) -> int:
        """Bad records that were left out."""
        return sum(count.records for count in self._wrong.values())

    def line(self) -> str:
        """The summary, "" when every record was kept as it is."""
        parts = []
        for counts, what in ((self._wrong, "left out"), (self._chosen, "left out by choice"), (self._mended, "changed")):
            if counts:
                total = sum(count.records for count in counts.values())
                parts.append(f"{total:,} of {self.records:,} records {what}: {self._kinds(counts)}")
        parts += self._notes
        return f"{self.name} ({self.split}): {'; '.join(parts)}" if parts else ""

    def _kinds(self, counts: dict[str, _Count]) -> str:
        often = sorted(counts.items(), key=lambda item: -item[1].records)
        shown = []
        for kind, count in often[:KINDS_SHOWN]:
            inside = "|".join(re.escape(f"{folder}/") for folder in (self.folder.resolve(), self.folder))
            first = re.sub(rf"(?<![\w./-])(?:{inside})", "", count.first)
            shown.append(f"{count.records:,} {kind}" + (f" (first: {first})" if first else ""))
        more = sum(count.records for _, count in often[KINDS_SHOWN:])
        return ", ".join(shown) + (f", {more:,} of other kinds" if more else "")

    def close(self, kept: int) -> None:
        """Prints the summary. A data set of which nothing can be used is an error: its folder is not as it should be."""
        if self.left_out and not kept:
            raise UserError(f"{self.folder}: no record can be used: {self.line()}")
        self.tell()

    def tell(self) -> None:
        """Prints the summary, once in a process."""
        line = self.line()
        if line and (str(self.folder), line) not in _printed:
            _printed.add((str(self.folder), line))
            log.warning("%s", line)
