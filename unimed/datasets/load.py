"""One way in: find the datasets under a folder by their layouts and read a split of them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from unimed.datasets.items import read_items
from unimed.datasets.spec import DATASETS, DatasetSpec
from unimed.errors import NoItems, UserError
from unimed.records.policy import Rules, Tally, log
from unimed.records.record import Split
from unimed.tasks import RELEASED_TASKS, TASKS
from unimed.tasks.item import Item

if TYPE_CHECKING:
    from unimed.datasets.index import Items

Read = Callable[[DatasetSpec, Tally], Sequence[Item]]

SPLIT = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")
SPLITS: dict[str, Split] = {"train": "train", "slab": "val", "val": "val", "subject": "test", "test": "test"}


def load_items(root: Path, split: str, tasks: Sequence[str] | None = None, rules: Rules | None = None) -> list[Item]:
    """All of `find_items` as a list, read anew."""
    return list(find_items(root, split, tasks, rules, read_items))


def load_set(name: str, root: Path, layout: str, split: str, tasks: Sequence[str] | None = None, rules: Rules | None = None) -> list[Item]:
    """All of `set_items` as a list, read anew."""
    return list(set_items(name, root, layout, split, tasks, rules, read_items))


def find_items(root: Path, split: str, tasks: Sequence[str] | None = None, rules: Rules | None = None, read: Read | None = None) -> Items:
    """The items of a split from every dataset in ``root`` or in a folder of it; no two have the same id.

    split: "train", "slab" or "subject"; for released datasets also "val" (= slab), "test" (= subject) and any other that the data has.
    rules: what becomes of bad records, which languages and which texts are read. A data set is named by its layout; where several folders
    have one layout, each of them by its folder. read: by default from the index.
    """
    from unimed.datasets.index import Items, items_of  # it brings pyarrow

    read = read or items_of
    root = Path(root)
    unknown = sorted(set(tasks or ()) - set(TASKS))
    if unknown:
        raise UserError(f"unknown task {unknown[0]!r}: expected one of {', '.join(TASKS)}")
    if not root.is_dir():
        raise UserError(f"{root}: no such folder")
    found = _found(root)
    if not found and split in SPLITS:
        known = "; ".join(layout.files for layout in DATASETS.values())
        raise UserError(f"{root}: no dataset found here or one folder down; layouts known: {known}")
    names = _names(found)
    tallies = []
    parts: list[Sequence[Item]] = []
    for (layout, folder), name in zip(found, names, strict=True) if SPLIT.fullmatch(split) else ():
        tally = Tally(name or layout.name, folder, SPLITS.get(split, split), rules or Rules(), name)
        part = read(layout, tally)
        if layout.certain:
            tally.close(len(part))
        tallies.append(tally)
        parts.append(part)
    items = Items(parts)
    if split not in SPLITS and not items:
        raise NoItems(f"split {split!r}: expected one of {', '.join(SPLITS)}, or another that the data at {root} has")
    for tally in tallies:
        if items:
            tally.tell()
        else:
            tally.close(0)
    return _of_tasks(items.distinct(), tasks)


def set_items(
    name: str,
    root: Path,
    layout: str,
    split: str,
    tasks: Sequence[str] | None = None,
    rules: Rules | None = None,
    read: Read | None = None,
) -> Items:
    """The items of a split of the one data set in the folder ``root``, whose layout is known and whose items carry ``name``."""
    from unimed.datasets.index import Items, items_of

    if layout not in DATASETS:
        raise UserError(f"data.sets.{name}.layout={layout!r}: no such layout; known are {', '.join(DATASETS)}")
    if not root.is_dir():
        raise UserError(f"data.sets.{name}.root={root}: no such folder")
    if not DATASETS[layout].matches(root):
        raise UserError(f"data.sets.{name}.root={root}: not a folder of the layout {DATASETS[layout].files}")
    tally = Tally(name, root, SPLITS.get(split, split), rules or Rules(), name)
    items = Items([(read or items_of)(DATASETS[layout], tally)])
    tally.close(len(items))
    return _of_tasks(items.distinct(), tasks)


def terms(root: Path | None, sets: Mapping[str, tuple[Path, str]]) -> list[dict[str, str]]:
    """Title, licence, citation and known fault of each data set in ``root``, and of the sets by name with their folders and layouts."""
    found = [(spec, folder, "") for spec, folder in (_found(root) if root and root.is_dir() else [])]
    found += [(DATASETS[layout], folder, name) for name, (folder, layout) in sets.items() if layout in DATASETS]
    return [spec.terms(folder, name) for spec, folder, name in found]


def _found(root: Path) -> list[tuple[DatasetSpec, Path]]:
    """Layout and folder of the data sets in a folder and one down."""
    folders = [root, *sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))]
    return [(layout, folder) for folder in folders for layout in DATASETS.values() if layout.matches(folder)]


def _names(found: Sequence[tuple[DatasetSpec, Path]]) -> list[str]:
    """The folder's name where another folder has a data set of the same name; else "", for the layout's own."""
    own = [layout.names(folder) if layout.names else [layout.name] for layout, folder in found]
    often = Counter(name for names in own for name in names)
    taken = {name for name, count in often.items() if count == 1}
    given = []
    for (layout, folder), names in zip(found, own, strict=True):
        name = ""
        if any(often[one] > 1 for one in names):
            name = folder.resolve().name
            while name in taken:
                name = f"{name}-{layout.name}"
            if not layout.names:  # else it is set before each of the names
                taken.add(name)
        given.append(name)
    return given


def _of_tasks(items: Items, tasks: Sequence[str] | None) -> Items:
    """Those of the tasks. A line counts the others whose task no recipe takes by itself."""
    if tasks is None:
        return items
    counts = items.often("task")
    unnamed = {task: count for task, count in counts.items() if task not in (*tasks, *RELEASED_TASKS)}
    if unnamed:
        log.warning("data.tasks does not name %s", ", ".join(f"{task} ({count:,} items)" for task, count in unnamed.items()))
    return items.of_tasks(tasks)
