"""The questions of every task, made from the records of one split of one data set."""

from __future__ import annotations

from collections.abc import Iterator

from unimed.datasets.spec import DatasetSpec
from unimed.records.files import short
from unimed.records.image import Images
from unimed.records.policy import BadRecord, Tally
from unimed.records.record import Record
from unimed.records.source import Source
from unimed.tasks import TASKS
from unimed.tasks.asked import Asked, Unused
from unimed.tasks.item import Item


def read_items(spec: DatasetSpec, tally: Tally) -> list[Item]:
    """All questions of a split, in the order of the records."""
    return list(each_item(spec, Source(tally, Images(tally.folder, {}, tally.rules.links), sized=spec.sized)))


def each_item(spec: DatasetSpec, source: Source) -> Iterator[Item]:
    """The same, one after the other. The tally is whole after the last."""
    tally = source.tally
    for where, record in spec.read(source):
        yield from items(source, record, where)
    for kind, count in sorted(source.unused.items()):
        tally.note(f"no task asks annotations {kind} ({count:,})")
    if source.cut:
        tally.note(f"texts cut to {tally.rules.max_words} words: {source.cut:,} (data.protocol=standard keeps them whole)")


def items(source: Source, record: Record, where: str) -> list[Item]:
    """The questions of a record. An annotation that cannot be used is named; without any that can, the record is left out."""
    made: list[Item] = []
    faults: dict[str, BadRecord] = {}
    for number, annotation in enumerate(record.annotations):
        asked = Asked(source, record, number, f"{where}: annotations.{number}", faults)
        try:
            takers = [task for task in TASKS.values() if annotation.kind in task.makes]
            some = [item for task in takers if (item := task.item(asked)) is not None]
            if not some:
                named = f"with task {short(annotation.task)}" if annotation.task else "without an image"
                raise Unused(f"of kind {annotation.kind!r} {named}")
            made += some
        except BadRecord as error:
            faults.setdefault(error.kind, error)
        except Unused as error:
            source.unused[str(error)] += 1
    if faults and not made:
        source.tally.leave_out(next(iter(faults.values())))
        return []
    source.tally.records += not source.counted
    for fault in faults.values():
        source.tally.mend(fault)
    return made


def tasks_of(kind: str) -> tuple[str, ...]:
    """The tasks that an annotation of a kind may name; "" names none."""
    return ("", *(task.tag for task in TASKS.values() if kind in task.makes))
