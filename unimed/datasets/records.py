"""A folder of records as a layout of `load_examples`: the questions of today's tasks, made from annotations.

qa      vqa with an image, qa without; or the annotation's task: vqa, qa, cls
box     refer and identify, or the one that is its task
label   cls: one of the set's classes; with task severity a grade, the classes of dataset.json from the lowest to the highest
labels  findings: those of the record that are certain, present or absent
report  caption
number  calculation, where the record has an image
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path

from unimed.datasets.medmnist import NOTHING, class_list, class_question
from unimed.errors import UserError
from unimed.records import files as records
from unimed.records import jsonl
from unimed.records.box import Box, clip, to_text
from unimed.records.example import Example
from unimed.records.image import Images, Seen
from unimed.records.policy import BadRecord, Tally
from unimed.records.record import QA, Annotation, BoxOf, Label, Labels, Number, Record, Report
from unimed.tasks import calculation

LAYOUT = "records"
QA_TASKS = {"": ("vqa", "qa"), "vqa": ("vqa", ""), "cls": ("cls", ""), "qa": ("", "qa")}  # with and without an image
TASKS_OF = {"qa": tuple(QA_TASKS), "box": ("", "refer", "identify"), "label": ("", "cls", "severity"), "report": ("", "caption")}
TASKS_OF |= {"labels": ("", "findings"), "number": ("", "calculation")}


def names(folder: Path) -> list[str]:
    """The name in dataset.json."""
    try:
        return [records.name(jsonl.read_info(folder).name)]
    except UserError:  # reading it says why
        return [LAYOUT]


def read_examples(tally: Tally) -> list[Example]:
    """All questions of one split."""
    info = jsonl.read_info(tally.folder)
    tally.name = tally.folder_name or info.name
    images = Images(tally.folder, info.roots, tally.rules.links)
    found = list(jsonl.read_records(tally.folder, tally, tally.split))
    classes = info.classes if info.classes or not any(_labels(record) for _, record in found) else label_values(tally.folder)
    maker = _Maker(tally, images, classes, graded=bool(info.classes))
    examples = [example for where, record in found for example in maker.examples(record, where)]
    for kind, count in sorted(maker.unused.items()):
        tally.note(f"no task asks annotations {kind} ({count:,})")
    if maker.cut:
        tally.note(f"texts cut to {tally.rules.max_words} words: {maker.cut:,} (data.protocol=standard keeps them whole)")
    return examples


def label_values(folder: Path) -> dict[str, list[str]]:
    """The classes of each set of labels in the order of the alphabet, where dataset.json does not list them: all that the records have."""
    found: dict[str, set[str]] = defaultdict(set)
    for _, text in jsonl.read_lines_of(folder):
        try:
            record = jsonl.parse(text, "")
        except BadRecord:
            continue
        for one in _labels(record):
            found[one.set].add(one.value)
    return {name: sorted(values) for name, values in found.items()}


def _labels(record: Record) -> list[Label]:
    return [one for one in record.annotations if isinstance(one, Label)]


class _Maker:
    def __init__(self, tally: Tally, images: Images, classes: dict[str, list[str]], graded: bool) -> None:
        self.tally, self.images, self.classes, self.graded = tally, images, classes, graded
        self.cut = 0  # texts that the protocol shortens
        self.unused: Counter[str] = Counter()  # annotations by why they are in no task
        self._faults: dict[str, BadRecord] = {}  # of the record at hand, the first of each kind

    def examples(self, record: Record, where: str) -> list[Example]:
        """The examples of a record. An annotation that cannot be used is named; without any that can, the record is left out."""
        made: list[Example] = []
        self._faults = {}
        for number, annotation in enumerate(record.annotations):
            try:
                made += self._made(record, annotation, number, f"{where}: annotations.{number}")
            except BadRecord as error:
                self._faults.setdefault(error.kind, error)
        faults = list(self._faults.values())
        if faults and not made:
            self.tally.leave_out(faults[0])
            return []
        self.tally.records += 1
        for fault in faults:
            self.tally.mend(fault)
        return made

    def _made(self, record: Record, annotation: Annotation, number: int, where: str) -> Iterator[Example]:
        if annotation.task not in TASKS_OF.get(annotation.kind, ("",)):
            self.unused[f"of kind {annotation.kind!r} with task {records.short(annotation.task)}"] += 1
            return
        if isinstance(annotation, QA):
            task = QA_TASKS[annotation.task][0 if record.images else 1]
            if not task:
                here = "with" if record.images else "without"
                raise BadRecord("of a task that does not fit", f"{where}: task {annotation.task!r} in a record {here} images")
            question, answer = self._text(annotation.question, "question", where), self._text(annotation.answer, "answer", where)
            closed = bool(annotation.options) or answer.lower() in ("yes", "no")
            template = {"qa": "qa/records"}.get(task, f"{task}/{question.lower()}")
            question += "".join(f" ({letter}) {text}" for letter, text in zip(_letters(), annotation.options, strict=False))
            seen = self.images.look(record.images[annotation.image], where) if record.images else None
            kind = ("CLOSED" if closed else "OPEN") if task == "vqa" else None
            words = 0 if annotation.options else self.tally.rules.max_words
            yield self._example(record, number, task, question, answer, seen, None, template, kind, words)
        elif isinstance(annotation, BoxOf):
            seen = self.images.look(record.images[annotation.image], where)
            name, box = self._text(annotation.name, "name", where), self._box(annotation, seen, where)
            text = to_text(box, seen.size)
            if annotation.task != "identify":
                yield self._example(record, number, "refer", name, text, seen, box, f"refer/{name.lower()}")
            if annotation.task != "refer":
                yield self._example(record, number, "identify", text, name, seen, box, "identify")
        elif isinstance(annotation, Label):
            listed = self.classes.get(annotation.set, [])
            if annotation.value not in listed:
                what = f"{annotation.value!r} is no class of {annotation.set!r} in dataset.json, which has {records.short(listed)}"
                raise BadRecord("with a label outside its classes", f"{where}: {what}")
            seen = self.images.look(record.images[annotation.image], where)
            question, answer, task = class_question(annotation.set, listed), self._text(annotation.value, "value", where), "cls"
            if annotation.task == "severity":
                if not self.graded:
                    raise BadRecord("with grades whose order is unknown", f"{where}: dataset.json lists no classes of {annotation.set!r}")
                question, task = f"What is the grade of {annotation.set}: {class_list(listed)}?", "severity"
            yield self._example(record, number, task, question, answer, seen, None, f"{task}/{annotation.set}")
        elif isinstance(annotation, Labels):
            asked = sorted({*annotation.present, *annotation.absent})
            if not asked:
                self.unused["of kind 'labels' where no finding is certain"] += 1
                return
            seen = self.images.look(record.images[annotation.image], where)
            names, present = ([self._text(name, "present", where) for name in some] for some in (asked, sorted(annotation.present)))
            joint = "; " if any("," in name for name in names) else ", "
            answer, question = joint.join(present) or NOTHING, class_question("finding", names, several=True)
            yield self._example(record, number, "findings", question, answer, seen, None, "findings")
        elif isinstance(annotation, Number) and record.images:
            seen = self.images.look(record.images[annotation.image], where)
            name, unit = self._text(annotation.name, "name", where), " ".join(annotation.unit.split())
            question, answer = f"What is the {name}{unit and f' in {unit}'}?", calculation.answer(annotation.value)
            yield self._example(record, number, "calculation", question, answer, seen, None, f"calculation/{name.lower()}")
        elif isinstance(annotation, Report):
            seen = self.images.look(record.images[annotation.image], where)
            yield self._example(record, number, "caption", "", self._text(annotation.text, "text", where), seen, None, "caption/report")
        else:
            self.unused[f"of kind {annotation.kind!r} without an image"] += 1

    def _text(self, text: str, key: str, where: str) -> str:
        found = records.cleaned(text, key, where, self.tally)
        self.cut += len(found.split()) < len(text.split())
        return found

    def _box(self, annotation: BoxOf, seen: Seen, where: str) -> Box:
        """The box in pixels of the image that is shown."""
        box = seen.placement.inverse(annotation.xyxy)
        clipped = clip(box, seen.size)
        what = f"{where}: the box of {annotation.name!r} is {records.short(list(annotation.xyxy))} in pixels of the file"
        file = seen.placement((0, 0, *seen.size))
        size = f"{file.x2 - file.x1:g} x {file.y2 - file.y1:g}"
        if clipped is None:
            raise BadRecord("with a box outside the image", f"{what}, which has {size}")
        if any(abs(one - other) > 0.01 for one, other in zip(clipped, box, strict=True)):
            fault = BadRecord("with a box clipped to the image", f"{what}, which has {size}")
            self._faults.setdefault(fault.kind, fault)
        return clipped

    def _example(
        self,
        record: Record,
        number: int,
        task: str,
        question: str,
        answer: str,
        seen: Seen | None,
        box: Box | None,
        template: str,
        answer_type: str | None = None,
        max_words: int | None = None,
    ) -> Example:
        dataset = self.tally.folder_name or records.name(record.dataset)
        key = records.name(f"{dataset}/{record.id}/{task}{number}")
        image, size = (seen.image, seen.size) if seen else (None, None)
        words = self.tally.rules.max_words if max_words is None else max_words
        return Example(
            key, task, dataset, question, answer, image, size, box, template, answer_type, records.name(record.patient), LAYOUT, words
        )


def _letters() -> Iterator[str]:
    number = 0
    while True:
        yield chr(ord("A") + number) if number < 26 else str(number + 1)
        number += 1
