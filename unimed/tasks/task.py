"""What a task is: all that the rest of unimed must know of it, in one object. Each file beside this one holds one, its TASK.

TASKS has them all, by tag; `unimed.tasks` fills it. Everything that lists tasks reads it when it runs. A task that a caller puts in is
prompted, read, scored, compared and reported like the others. A model learns the tags that its configuration lists.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, Protocol

from unimed.errors import UserError
from unimed.records.policy import BadRecord

if TYPE_CHECKING:
    from unimed.records.record import Annotation
    from unimed.tasks.asked import Asked
    from unimed.tasks.item import Item
    from unimed.tasks.reading import Reading

TASKS: dict[str, Task] = {}


class Majority(Protocol):
    """The answer that fits most of the items that it was given, one after the other."""

    def add(self, item: Item) -> None: ...

    def answer(self) -> str: ...


def no_list(item: Item) -> Sequence[str]:
    """The listed answers of a task whose answers are open."""
    return ()


@dataclass(frozen=True)
class Task:
    """``tag`` is its name, and the mark [tag] that begins its instructions. ``about``: what it asks, in a few words.

    wordings: the training pool by the layout of the data, "" for any other; {} is the question. The first one is the evaluation form.
    read: what a text says that is not empty. listed: the answers to choose from, as far as the item tells. kinds: the kinds of
    `reading.Reading` that its answers can have. score: every metric, released and `_strict` names; coco as in `metrics.score`. is_right:
    whether one answer is right, strictly. majority: makes the counter of answers for that baseline. headline: the metric of the table,
    strict: the one beside it, nature: what a reader must know of either.
    makes: by kind of annotation, the item that an annotation becomes; named: the kinds of which that holds only where they name the task.
    box: the field of an item that holds the text of its box. asks: what a caller must give as the question; "classes" is the question
    that lists them. shown: the question as the report words it; graded: the report shows the score of one answer.
    """

    tag: str
    about: str
    wordings: Mapping[str, tuple[str, ...]]
    read: Callable[[Item, str], Reading]
    kinds: tuple[str, ...]
    score: Callable[[Sequence[str], Sequence[Item], bool | None], dict[str, float]]
    is_right: Callable[[Item, str], bool]
    majority: Callable[[], Majority]
    headline: str
    strict: str
    nature: tuple[str, str]
    needs_image: bool = True
    makes: Mapping[str, Callable[[Asked], Item]] = field(default_factory=dict)
    named: frozenset[str] = frozenset()
    listed: Callable[[Item], Sequence[str]] = no_list
    box: Literal["", "question", "answer"] = ""
    asks: Literal["text", "classes", "nothing"] = "text"
    shown: str = "{}"
    graded: bool = False

    def item(self, asked: Asked) -> Item | None:
        """The item that an annotation of a record becomes; None where it is about something else."""
        one, images = asked.annotation, bool(asked.record.images)
        if not self.takes(one):
            return None
        if images != self.needs_image:
            if one.task:
                what = f"task {one.task!r} in a record {'with' if images else 'without'} images"
                raise BadRecord("of a task that does not fit", f"{asked.where}: {what}")
            return None
        return self.makes[one.kind](asked)

    def takes(self, one: Annotation) -> bool:
        """Whether the task asks about an annotation, as far as its kind and the task that it names tell."""
        return one.kind in self.makes and (one.task == self.tag if one.task else one.kind not in self.named)

    def pool(self, layout: str) -> tuple[str, ...]:
        """The wordings for data of this layout."""
        return self.wordings.get(layout, self.wordings[""])


def task_of(item: Item) -> Task:
    """The task of an item; an unknown one is named together with the item."""
    if item.task not in TASKS:
        raise UserError(f"{item.id}: unknown task {item.task!r}; valid are {', '.join(TASKS)}")
    return TASKS[item.task]
