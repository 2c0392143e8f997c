"""From an annotation of a record to the question of a task."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from unimed.records.box import Box, clip
from unimed.records.files import cleaned, name, short
from unimed.records.policy import BadRecord
from unimed.tasks.item import Item

if TYPE_CHECKING:
    from unimed.records.image import Seen
    from unimed.records.record import Record
    from unimed.records.source import Source

LAYOUT = "records"
ORGANS = "organ"  # the set of labels whose classes are organs


class Unused(Exception):
    """A good annotation that makes no question; the text says which."""


@dataclass
class Asked:
    """One annotation of a record. faults: what was wrong with the record and mended, by kind."""

    source: Source
    record: Record
    number: int
    where: str
    faults: dict[str, BadRecord] = field(default_factory=dict)

    @property
    def annotation(self) -> Any:
        return self.record.annotations[self.number]

    @cached_property
    def seen(self) -> Seen | None:
        """The image that the annotation is about."""
        refs = self.record.images
        return self.source.images.look(refs[self.annotation.image], self.where) if refs else None

    def text(self, value: str, key: str) -> str:
        """A text as the protocol cuts it."""
        most = self.source.rules.max_words
        found = cleaned(value, key, self.where, most)
        if most and len(value) > 2 * most:  # a shorter one cannot have more words
            self.source.cut += len(value.split()) > most
        return found

    def classes(self) -> list[str]:
        """Those of the annotation's set of labels."""
        return self.source.classes.get(self.annotation.set, [])

    def label(self) -> list[str]:
        """The classes, of which the label must be one."""
        return self._classes_with([self.annotation.value])

    def certain(self) -> list[str]:
        """The findings that are present or absent, by name."""
        found = sorted({*self.annotation.present, *self.annotation.absent})
        if not found:
            raise Unused("of kind 'labels' where no finding is certain")
        return found

    def labels(self) -> list[str]:
        """The classes, of which every certain finding must be one; the certain findings where the set has no classes."""
        found = self.certain()
        return self._classes_with(found) if self.classes() else found

    def _classes_with(self, names: list[str]) -> list[str]:
        listed = self.classes()
        if outside := [name for name in names if name not in listed]:
            what = f"{outside[0]!r} is no class of {self.annotation.set!r} in dataset.json, which has {short(listed)}"
            raise BadRecord("with a label outside its classes", f"{self.where}: {what}")
        return listed

    @cached_property
    def box(self) -> tuple[Box, tuple[int, int]]:
        """The box in pixels of the image that is shown, and that image's size."""
        one, seen = self.annotation, self.seen
        assert seen is not None  # a record without images has no box
        box = seen.placement.inverse(one.xyxy)
        clipped = clip(box, seen.size)
        if clipped is None or (clipped != box and any(abs(a - b) > 0.01 for a, b in zip(clipped, box, strict=True))):
            file = seen.placement((0, 0, *seen.size))
            size = f"{file.x2 - file.x1:g} x {file.y2 - file.y1:g}"
            what = f"{self.where}: the box of {one.name!r} is {short(list(one.xyxy))} in pixels of the file, which has {size}"
            if clipped is None:
                raise BadRecord("with a box outside the image", what)
            fault = BadRecord("with a box clipped to the image", what)
            self.faults.setdefault(fault.kind, fault)
        return clipped, seen.size

    @property
    def _named(self) -> str:
        """What the annotation itself is about: the name of its box, or the organ that is its class."""
        one = self.annotation
        return str(one.name if one.kind == "box" else one.value if one.kind == "label" and one.set == ORGANS else "")

    def question(self, task: str) -> Item:
        """The item of a question with its answer."""
        one, rules = self.annotation, self.source.rules
        shown = self.source.own or rules.context  # the release shows neither options nor abstracts of its text questions
        question, answer = self.text(one.question, "question"), self.text(one.answer, "answer")
        template = "qa/records" if task == "qa" else f"{task}/{question.lower()}"
        closed = one.answer_type or ("CLOSED" if one.options or answer.lower() in ("yes", "no") else "OPEN")
        if shown:
            question = f"{one.context} {question}".strip()
            question += "".join(f" ({letter}) {text}" for letter, text in zip(_letters(), one.options, strict=False))
        words = 0 if shown and (one.options or one.context) else rules.max_words
        return self.item(task, question, answer, template, answer_type=closed if task == "vqa" else None, max_words=words)

    def item(
        self,
        task: str,
        question: str,
        answer: str,
        template: str,
        box: Box | None = None,
        answer_type: str | None = None,
        max_words: int | None = None,
    ) -> Item:
        one, record, seen = self.annotation, self.record, self.seen
        dataset = name(record.dataset)
        key = one.id
        if one.kind == "box" or not key:
            above, _, last = (key or f"{record.id}/{self.number}").rpartition("/")
            key = f"{above}/{task}{last}"
        return Item(
            id=name(f"{dataset}/{key}"),
            task=task,
            dataset=dataset,
            question=question,
            answer=answer,
            image=seen.image if seen else None,
            size=seen.size if seen and (self.source.sized or box) else None,
            box=box,
            template=one.template or template,
            answer_type=answer_type,
            subject=name(record.patient),
            layout=LAYOUT if self.source.own else record.source,
            modality=name(one.modality or record.modality),
            organ=name(one.organ or self._named or record.organ).lower(),
            max_words=self.source.rules.max_words if max_words is None else max_words,
        )


def _letters() -> Iterator[str]:
    number = 0
    while True:
        yield chr(ord("A") + number) if number < 26 else str(number + 1)
        number += 1
