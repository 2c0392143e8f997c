"""The index: the items of one split of one data set on disk, made by one scan and mapped into memory at every later start.

    UNIMED_CACHE/index/NAME-SPLIT-KEY.arrow   one row an item, in their order (Arrow IPC)
    UNIMED_CACHE/index/NAME-SPLIT-KEY.json    the files it was made from, its hash, and what the scan counted

KEY names folder, layout, split and rules. The files of the folder and the code that makes items are compared at every start:
where any differs, the split is scanned again and takes the old one's place. A damaged file is made again. Images are opened when they are
shown, and rows become items when they are taken.

Only what the package itself reads and asks is kept: layouts and tasks of others, and images that a layout holds in memory, are read anew.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import os
import re
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from filelock import FileLock
from pyarrow import ipc

from unimed import io
from unimed.datasets.items import each_item, read_items
from unimed.datasets.spec import DatasetSpec
from unimed.progress import watched
from unimed.records.box import Box
from unimed.records.files import once
from unimed.records.image import Images
from unimed.records.pixels import View
from unimed.records.policy import Tally
from unimed.records.source import Source
from unimed.tasks import TASKS
from unimed.tasks.item import Item, asks, shown
from unimed.tasks.task import Task

log = logging.getLogger("unimed.records")

FORMAT = 2
ROWS = 4096  # in memory at once while an index is made
TICK = 50_000_000  # ns: a file that changes twice within it may keep its time
_TEXT = ("id", "task", "dataset", "question", "answer", "template", "subject", "layout", "modality", "organ")
_TEXT_OR_NONE = ("answer_type", "plane")
_NUMBERS = {
    **dict.fromkeys(("max_words", "index", "width", "height"), pa.int64()),
    **dict.fromkeys(("x1", "y1", "x2", "y2", "low", "high"), pa.float64()),
}
SCHEMA = pa.schema(
    [
        *(pa.field(name, pa.string(), nullable=False) for name in _TEXT),
        *(pa.field(name, pa.string()) for name in _TEXT_OR_NONE),
        pa.field("image", pa.binary()),  # a path; its name may be no text
        *(pa.field(name, kind) for name, kind in _NUMBERS.items()),
    ]
)


class _NotKept(Exception):
    """An item that no row can hold."""


def _row(item: Item) -> tuple[Any, ...]:
    """The values of an item, in the order of SCHEMA."""
    image = item.image
    if not isinstance(image, Path | View | None):
        raise _NotKept(f"{item.id}: its image is not in a file")
    view = image if isinstance(image, View) else View(Path(), "")
    return (
        *(getattr(item, name) for name in _TEXT),
        item.answer_type,
        view.plane or None,
        None if image is None else os.fsencode(view.path if isinstance(image, View) else image),
        item.max_words,
        view.index,
        *(item.size or (None, None)),
        *(item.box or (None,) * 4),
        *(view.grey or (None, None)),
    )


def _item(values: Sequence[Any]) -> Item:
    texts = dict(zip(_TEXT, values, strict=False))
    answer_type, plane, image, max_words, index, width, height, x1, y1, x2, y2, low, high = values[len(_TEXT) :]
    return Item(
        **texts,
        image=_image(image, plane, index, low, high),
        size=None if width is None else (width, height),
        box=None if x1 is None else Box(x1, y1, x2, y2),
        answer_type=answer_type,
        max_words=max_words,
    )


def _image(name: bytes | None, plane: str | None, index: int | None, low: float | None, high: float | None) -> Path | View | None:
    if name is None or plane is None:
        return None if name is None else _path(name)
    return View(_path(name), plane, index, None if low is None or high is None else (low, high))


@lru_cache(64)  # items of one image come one after the other
def _path(name: bytes) -> Path:
    return Path(os.fsdecode(name))


class _Form(NamedTuple):
    """What is made of a row: from these columns, by this function; of an item; under another id."""

    columns: Sequence[str]
    of_row: Callable[[Sequence[Any]], Any]
    of_item: Callable[[Item], Any]
    called: Callable[[Any, str], Any]


WHOLE = _Form(SCHEMA.names, _item, lambda item: item, lambda item, id: replace(item, id=id))
ASKED = _Form(
    ["id", "task", "question", "answer", "width", "height", "x1", "y1", "x2", "y2", "subject", "image", "plane", "index", "low", "high"],
    lambda row: (
        *row[:4],
        None if row[4] is None else (row[4], row[5]),
        None if row[6] is None else Box(*row[6:10]),
        row[10],
        shown(_image(*row[11:])),
    ),
    asks,
    lambda one, id: (id, *one[1:]),
)


class Stored(Sequence[Item]):
    """The items of one file. key: its hash."""

    def __init__(self, path: Path, key: str) -> None:
        self.path, self.key = path, key
        with pa.memory_map(str(path)) as file:
            self.table = ipc.open_file(file).read_all()
        if self.table.schema != SCHEMA:
            raise pa.ArrowInvalid("another schema")

    def __reduce__(self) -> Any:
        return Stored, (self.path, self.key)

    def __len__(self) -> int:
        return self.table.num_rows

    def __getitem__(self, at: Any) -> Any:
        if isinstance(at, slice):
            return list(self.taken(np.arange(len(self))[at]))
        at = range(len(self))[at]
        return _item([column[at].as_py() for column in self.table.columns])

    def taken(self, rows: np.ndarray, form: _Form = WHOLE) -> Iterator[Any]:
        table = self.table.select(form.columns)
        first, count = (int(rows[0]), int(rows[-1] - rows[0]) + 1) if len(rows) else (0, 0)
        if not 0 < count <= 4 * len(rows) or (np.diff(rows) < 0).any():
            yield from (form.of_row([column[row].as_py() for column in table.columns]) for row in rows.tolist())
            return
        columns = [column.to_pylist() for column in table.slice(first, count).columns]
        for row in rows.tolist():
            yield form.of_row([column[row - first] for column in columns])

    def texts(self, name: str) -> pa.ChunkedArray:
        return self.table.column(name)


class Items(Sequence[Item]):
    """The items of several parts, one after the other: lists, indexes or other Items. Those of an index are made when they are taken.

    places: the chosen ones among all, by default each. ids: by place among all, what an item is called instead.
    """

    def __init__(self, parts: Iterable[Sequence[Item]], places: np.ndarray | None = None, ids: Mapping[int, str] | None = None) -> None:
        self.parts = [part for part in parts if len(part)]
        self.starts = np.cumsum([0, *map(len, self.parts)])
        self.places = np.arange(self.starts[-1]) if places is None else places
        self.ids = dict(ids or {})

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, at: Any) -> Any:
        if isinstance(at, slice):
            return self.take(np.arange(len(self))[at])
        return next(self.taken(np.array([range(len(self))[at]])))

    def __iter__(self) -> Iterator[Item]:
        return self._each(WHOLE)

    def asked(self) -> Iterator[tuple[Any, ...]]:
        """What `item.digest` reads of each item."""
        return self._each(ASKED)

    def _each(self, form: _Form) -> Iterator[Any]:
        for start in range(0, len(self), ROWS):
            yield from self.taken(np.arange(start, min(start + ROWS, len(self))), form)

    def taken(self, rows: np.ndarray, form: _Form = WHOLE) -> Iterator[Any]:
        """The items of some rows."""
        places = self.places[rows]
        of = np.searchsorted(self.starts, places, side="right") - 1
        for run in np.split(np.arange(len(places)), np.flatnonzero(np.diff(of)) + 1):
            part, start = self.parts[of[run[0]]], self.starts[of[run[0]]]
            inner = places[run] - start
            own = isinstance(part, Stored | Items)
            found = part.taken(inner, form) if own else (form.of_item(part[row]) for row in inner.tolist())
            for place, one in zip(places[run].tolist(), found, strict=True):
                yield form.called(one, self.ids[place]) if place in self.ids else one

    def take(self, rows: np.ndarray) -> Items:
        """Some of them, in another order if need be."""
        return Items(self.parts, self.places[rows], self.ids)

    def key(self) -> str | None:
        """Changes with any of the items; None where some have no index."""
        keys = [part.key() if isinstance(part, Items) else getattr(part, "key", None) for part in self.parts]
        if None in keys:
            return None
        return hashlib.sha256(repr((keys, sorted(self.ids.items()))).encode() + self.places.tobytes()).hexdigest()

    def texts(self, name: str) -> pa.ChunkedArray:
        """A field of all items that is always text."""
        chunks = pa.chunked_array([], pa.string())
        for part in self.parts:
            own = (
                part.texts(name)
                if isinstance(part, Stored | Items)
                else pa.chunked_array([[getattr(item, name) for item in part]], pa.string())
            )
            chunks = pa.chunked_array([*chunks.chunks, *own.chunks], pa.string())
        whole = len(self.places) == len(chunks) and (np.diff(self.places) == 1).all()
        return chunks if whole else chunks.take(pa.array(self.places))

    def distinct(self) -> Items:
        """The same with a number behind an id that came before. Of all items, before some are chosen."""
        found = self.texts("id")
        if pc.count_distinct(found).as_py() == len(found):
            return self
        counts = pc.value_counts(found)
        often = counts.field("values").filter(pc.greater(counts.field("counts"), 1))
        seen: Counter[str] = Counter()
        rows = np.flatnonzero(pc.is_in(found, often).to_numpy())
        called = {int(row): once(found[int(row)].as_py(), seen) for row in rows}
        return Items(self.parts, self.places, self.ids | {int(self.places[row]): name for row, name in called.items()})

    def often(self, name: str) -> dict[str, int]:
        """How often each text of a field that is always text is there, in the order of the first."""
        return {one["values"]: one["counts"] for one in pc.value_counts(self.texts(name)).to_pylist()}

    def of_tasks(self, tasks: Sequence[str]) -> Items:
        """Those of some tasks."""
        names, of = _encoded(self.texts("task"))
        rows = np.flatnonzero(np.isin(of, [place for place, name in enumerate(names) if name in tasks]))
        return self if len(rows) == len(self) else self.take(rows)


def kinds(items: Sequence[Item]) -> tuple[list[tuple[str, str]], np.ndarray]:
    """Each pair of data set and task in the order of the first item that has it, and for every item the place of its pair."""
    if not isinstance(items, Items):
        pairs = {pair: place for place, pair in enumerate(dict.fromkeys((item.dataset, item.task) for item in items))}
        return list(pairs), np.array([pairs[item.dataset, item.task] for item in items], np.int64)
    (datasets, of_dataset), (tasks, of_task) = (_encoded(items.texts(name)) for name in ("dataset", "task"))
    codes, first, of = np.unique(of_dataset * len(tasks) + of_task, return_index=True, return_inverse=True)
    order = np.argsort(first)
    return [(datasets[code // len(tasks)], tasks[code % len(tasks)]) for code in codes[order]], np.argsort(order)[of]


def _encoded(texts: pa.ChunkedArray) -> tuple[list[str], np.ndarray]:
    encoded = texts.combine_chunks().dictionary_encode()
    return encoded.dictionary.to_pylist(), encoded.indices.to_numpy().astype(np.int64)


def items_of(spec: DatasetSpec, tally: Tally) -> Sequence[Item]:
    """The items of a split: from its index, from a scan that makes the index, or as a list where there can be none."""
    if not _kept(spec):
        return read_items(spec, tally)
    index = _Index(spec, tally)
    before = tally.state()
    try:
        found: Sequence[Item] | None = index.read()
        if found is None:
            index.json.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(index.json.with_suffix(".lock")):  # of two processes, one scans and the other takes what it made
                found = index.read(again=True) or index.make()
        return found
    except (_NotKept, OSError, pa.ArrowException, UnicodeEncodeError) as error:
        log.info("%s (%s): no index: %s", tally.name, tally.split, error)
        if isinstance(error, OSError):
            log.warning("%s: the index cannot be kept there (%s); the data is read at each start", index.json.parent, error)
        tally.restore(before)
        return read_items(spec, tally)


def _kept(spec: DatasetSpec) -> bool:
    """Whether all that makes the items is part of the package, and their images are in files."""
    makers = [make for task in TASKS.values() for make in task.makes.values()]
    own = all(getattr(make, "__module__", "").startswith("unimed.tasks.") for make in makers) and spec.read.__module__.startswith(
        "unimed.datasets."
    )
    return own and not spec.arrays and all(type(task) is Task for task in TASKS.values())


@cache
def code() -> str:
    """Changes with the code that makes items."""
    root = Path(__file__).parent.parent
    found = hashlib.sha256()
    for path in sorted([root / "io.py", *(file for name in ("records", "tasks", "datasets") for file in (root / name).rglob("*.py"))]):
        found.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes())
    return found.hexdigest()


class _Index:
    """The two files of one split of one data set."""

    def __init__(self, spec: DatasetSpec, tally: Tally) -> None:
        self.spec, self.tally = spec, tally
        tasks = [
            (task.tag, task.needs_image, sorted((kind, make.__qualname__) for kind, make in task.makes.items()), sorted(task.named))
            for task in TASKS.values()
        ]
        self.folder = os.path.abspath(tally.folder)
        self.of = [self.folder, spec.name, spec.sized, tally.split, tally.folder_name, repr(tally.rules), repr(tasks)]
        key = hashlib.sha256(json.dumps(self.of).encode()).hexdigest()[:16]
        name = re.sub(r"[^A-Za-z0-9_-]+", "-", os.path.basename(self.folder))[:40]
        self.json = io.index_folder() / f"{name}-{tally.split}-{key}.json"
        self.arrow = self.json.with_suffix(".arrow")

    def read(self, again: bool = False) -> Stored | None:
        """The items as they were kept; None where there are none, or where they are of other files or other code. again: say nothing."""
        try:
            about = json.loads(self.json.read_bytes())
        except FileNotFoundError:
            return None
        except ValueError:
            about = {}
        try:
            if about["made_of"] != self._made_of(about["outside"]):
                log.info("%s: changed since it was scanned", self.folder)
                return None
            found = Stored(self.arrow, about["sha256"]) if io.sha256(self.arrow) == about["sha256"] else None
            if found is not None:
                self.tally.restore(about["tally"])
                return found
        except (KeyError, TypeError, AttributeError, OSError, pa.ArrowException):
            pass
        if not again:
            log.warning("%s: damaged; the data set is scanned again", self.arrow)
        return None

    def make(self) -> Sequence[Item]:
        """Scans the data set."""
        files, newest = _listed(self.folder)
        if 0 <= time.time_ns() - newest < TICK:
            time.sleep(TICK / 1e9)
        source = Source(self.tally, Images(self.tally.folder, {}, self.tally.rules.links), sized=self.spec.sized)
        with io.beside(self.arrow) as partial:
            self._scan(source, partial)
            sha256, size = io.sha256(partial), partial.stat().st_size
        outside = [list(place) for place in sorted(source.images.outside.items())]
        made_of = self._made_of(outside)
        found = Stored(self.arrow, sha256)
        if made_of["files"] == files:  # else they changed meanwhile, and the next start scans them again
            io.write_json(self.json, {"made_of": made_of, "outside": outside, "sha256": sha256, "tally": self.tally.state()})
            log.info("%s (%s): an index of %d items, %.1f MB: %s", self.tally.name, self.tally.split, len(found), size / 1e6, self.arrow)
            self._tidy()
        return found

    def _scan(self, source: Source, path: Path) -> None:
        items = watched(each_item(self.spec, source), f"scan {self.tally.name} ({self.tally.split})")
        with ipc.new_file(str(path), SCHEMA) as writer:
            while rows := [_row(item) for item in itertools.islice(items, ROWS)]:
                columns = [pa.array(column, field.type) for column, field in zip(zip(*rows, strict=True), SCHEMA, strict=True)]
                writer.write_batch(pa.RecordBatch.from_arrays(columns, schema=SCHEMA))

    def _made_of(self, outside: Sequence[Any]) -> dict[str, Any]:
        """What the items depend on."""
        others = [_listed(place, deep)[0] for place, deep in outside]
        return {"format": FORMAT, "code": code(), "of": self.of, "files": _listed(self.folder)[0], "others": others}

    def _tidy(self) -> None:
        """Removes the indexes of folders that are gone."""
        for path in self.json.parent.glob("*.json"):
            with suppress(OSError, ValueError, KeyError, TypeError, IndexError):
                if not os.path.isdir(json.loads(path.read_bytes())["made_of"]["of"][0]):
                    for suffix in (".json", ".arrow", ".lock"):
                        path.with_suffix(suffix).unlink(missing_ok=True)


def _listed(folder: str, deep: bool = True) -> tuple[str, int]:
    """A hash of the names, sizes and times of the files in a folder, and the newest time. deep: also of folders in it, be it by a link."""
    found = hashlib.sha256()
    newest, seen, own = 0, {os.path.realpath(folder)}, os.path.realpath(io.index_folder())

    places = [folder]
    while places:
        try:
            entries = sorted(os.scandir(places.pop()), key=lambda entry: entry.name)
        except OSError as error:
            found.update(b"\0\0%d" % (error.errno or 0))
            continue
        values = []
        for entry in entries:
            try:
                if entry.is_dir():
                    real = os.path.realpath(entry.path) if entry.is_symlink() or entry.name == "index" else ""
                    if deep and real != own and real not in seen:
                        seen.update([real] if real else [])
                        places.append(entry.path)
                    values.append(b"/")
                else:
                    stat = entry.stat()
                    values.append(b"%d %d" % (stat.st_size, stat.st_mtime_ns))
                    newest = max(newest, stat.st_mtime_ns)
            except OSError as error:  # a link that leads nowhere
                values.append(b"%d" % (error.errno or 0))
        found.update(b"\0".join([b"", *(os.fsencode(entry.name) for entry in entries), b"", *values, b""]))
    return found.hexdigest(), newest
