"""Training entries of records, counted as IMAX's paper counts them: a question of a task about an image is one entry.

A box is two entries, one of REC (refer) and one of REG (identify), unless it names one of them. Nothing is opened: an annotation that a
task takes counts, also where reading it would find a fault.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from unimed.records.record import Annotation, BoxOf, Label, Labels, Number, Record
from unimed.tasks import TASKS

PAPER = {"entries": 354_000, "tasks": 7, "tasks per image": 4.10, "entries per image": 7.46}  # abstract of arXiv 2504.09967: "over 354K"


class Entry(NamedTuple):
    """A question about one image of a record. number: of the annotation."""

    task: str
    image: int
    number: int


def entries(record: Record) -> Iterator[Entry]:
    """All of a record."""
    for number, one in enumerate(record.annotations):
        for task in tasks_of(one, bool(record.images)):
            yield Entry(task, one.image, number)


def tasks_of(one: Annotation, with_image: bool = True) -> list[str]:
    """The tasks that ask about an annotation."""
    if isinstance(one, Labels) and not (one.present or one.absent) and one.task in ("", "findings"):
        return []  # nothing certain
    return [tag for tag, task in TASKS.items() if task.needs_image == with_image and task.takes(one)]


def labels(one: Annotation, task: str) -> list[str]:
    """What is balanced within a task: the class of a label, the findings that are present, the name of a box, the kind and answer of a
    question."""
    if isinstance(one, Labels):
        return list(one.present) or ["no finding"]
    if isinstance(one, Label):
        return [f"{one.set}: {one.value}"]
    if isinstance(one, BoxOf | Number):
        return [one.name]
    if one.kind == "qa":
        kind = "/".join(one.template.split("/")[:2])
        return [f"{kind}: {one.answer.lower()}" if one.template or one.answer.lower() in ("yes", "no") else task]
    return [task]


@dataclass
class Counts:
    """Of a data set, or of one of its splits. Images count by record and place, since a path may have many frames.

    with_entries: images that have any; text: entries of records without images, which count nowhere else. tasks and sources: entries.
    images_of: images with the task. of_images: images by their number of tasks. labels: entries by what `labels` says, for each task.
    """

    images: int = 0
    with_entries: int = 0
    text: int = 0
    entries: int = 0
    image_tasks: int = 0
    tasks: Counter[str] = field(default_factory=Counter)
    images_of: Counter[str] = field(default_factory=Counter)
    of_images: Counter[int] = field(default_factory=Counter)
    sources: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    labels: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))

    def add(self, record: Record) -> None:
        if not record.images:
            self.text += sum(1 for _ in entries(record))
            return
        by_image: dict[int, set[str]] = {number: set() for number in range(len(record.images))}
        for task, image, number in entries(record):
            one = record.annotations[number]
            self.entries += 1
            self.tasks[task] += 1
            self.sources[origin(record, one)][task] += 1
            self.labels[task].update(labels(one, task))
            by_image[image].add(task)
        self.images += len(record.images)
        for tasks in by_image.values():
            self.with_entries += bool(tasks)
            self.image_tasks += len(tasks)
            self.images_of.update(tasks)
            self.of_images[len(tasks)] += 1

    def dump(self) -> dict[str, Any]:
        """Plain values, for a file; `merge` takes them."""
        return {name: value if isinstance(value, int) else dict(value) for name, value in vars(self).items()}

    def merge(self, state: dict[str, Any]) -> None:
        """The counts of another part of the same data."""
        for name in ("images", "with_entries", "text", "entries", "image_tasks"):
            setattr(self, name, getattr(self, name) + state[name])
        self.tasks.update(state["tasks"])
        self.images_of.update(state["images_of"])
        self.of_images.update({int(number): some for number, some in state["of_images"].items()})
        for name in ("sources", "labels"):
            for key, some in state[name].items():
                getattr(self, name)[key].update(some)

    @property
    def tasks_per_image(self) -> float:
        """Mean number of tasks of the images that have any."""
        return self.image_tasks / self.with_entries if self.with_entries else 0.0

    @property
    def entries_per_image(self) -> float:
        return self.entries / self.with_entries if self.with_entries else 0.0

    def as_json(self) -> dict[str, Any]:
        """Plain values; tasks in their usual order."""
        tasks = [tag for tag in TASKS if self.tasks[tag]]
        return {
            "entries": self.entries,
            "images": self.with_entries,
            "images without entries": self.images - self.with_entries,
            "entries without an image": self.text,
            "tasks": len(tasks),
            "tasks per image": self.tasks_per_image,
            "entries per image": self.entries_per_image,
            "entries by task": {tag: self.tasks[tag] for tag in tasks},
            "images by task": {tag: self.images_of[tag] for tag in tasks},
            "images by number of tasks": {str(number): count for number, count in sorted(self.of_images.items())},
            "entries by source and task": {
                name: {tag: found[tag] for tag in tasks if found[tag]} for name, found in sorted(self.sources.items())
            },
        }


def count(records: Iterable[Record]) -> Counts:
    """The counts of records."""
    found = Counts()
    for record in records:
        found.add(record)
    return found


def origin(record: Record, one: Annotation) -> str:
    """The source of an annotation, without the row."""
    return (one.source or record.source or record.dataset).partition(":")[0]


def variation(ours: Counter[str], theirs: Counter[str]) -> float:
    """Total variation of two label distributions: half the sum of the differences of their shares, 0 to 1."""
    a, b = max(ours.total(), 1), max(theirs.total(), 1)
    return sum(abs(ours[name] / a - theirs[name] / b) for name in ours | theirs) / 2
